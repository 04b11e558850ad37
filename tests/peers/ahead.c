/* ahead.c - for LD_PRELOAD: the clock that segments are measured by (csrc/core/clock.c), stopped or ahead of the
 * kernel's, so that tests which turn Python's clocks with hiro find windows as old as they think. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>

long long ahead_ns; /* how far it is ahead */
long long frozen_ns; /* where it stands; 0: it runs */

int clock_gettime(clockid_t id, struct timespec *t) {
  static int (*real)(clockid_t, struct timespec *);
  if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
  int failed = real(id, t);
  if (failed || id != CLOCK_BOOTTIME) return failed;
  long long ns = frozen_ns ? frozen_ns : (long long)t->tv_sec * 1000000000 + t->tv_nsec;
  ns += ahead_ns;
  t->tv_sec = ns / 1000000000;
  t->tv_nsec = ns % 1000000000;
  return 0;
}
