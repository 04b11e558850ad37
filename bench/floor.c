/* floor.c - what a check cannot cost less than, beside what it costs in C.
 *
 *   floor ROUNDS CALLS SEGMENT
 *
 * Writes a line for each round: nanoseconds a call of
 *   clock    clock_gettime(CLOCK_MONOTONIC) alone
 *   floor    that clock, and one 64-bit compare-and-swap that moves a GCRA's arrival time: a limiter with
 *            one key, one limit, and nothing to find
 *   ours     fshm_is_allowed() of a hot key
 * all uncontended, each in turn in every round. */
#include "unity.c"

#include <stdio.h>
#include <stdlib.h>

static _Alignas(64) _Atomic uint64_t arrival_64;
static volatile uint64_t sink;

static uint64_t clock_now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void run_clock(long calls) {
  for (long i = 0; i < calls; i++) sink = clock_now();
}

static void run_floor(long calls) {
  for (long i = 0; i < calls; i++) {
    uint64_t now = clock_now(), was = atomic_load_explicit(&arrival_64, memory_order_relaxed), next;
    do {
      next = (was > now ? was : now) + 1;
      if (next > now + 1000000000u) break; /* denied */
    } while (!atomic_compare_exchange_weak(&arrival_64, &was, next));
    sink = next;
  }
}

int main(int argc, char **argv) {
  if (argc != 4) return 2;
  int rounds = atoi(argv[1]);
  long calls = atol(argv[2]);
  fshm_segment *segment;
  fshm_limiter *limiter;
  fshm_error error;
  fshm_limit limit = {
      .n = 1000000000, .per_ns = 1000000000, .burst = 1000000000, .kind = FSHM_BUCKET};
  if (fshm_open(argv[3], 1000, 0600, FSHM_OPEN_CREATE, &segment, &error) != FSHM_OK) return 3;
  if (fshm_limiter_open(segment, "floor", 5, &limit, 1, &limiter) != FSHM_OK) return 4;
  long denied = 0;
  for (int round = -1; round < rounds; round++) { /* the first warms up */
    uint64_t at[4];
    at[0] = clock_now();
    run_clock(calls);
    at[1] = clock_now();
    run_floor(calls);
    at[2] = clock_now();
    for (long i = 0; i < calls; i++)
      denied += fshm_is_allowed(limiter, "default", 7) != FSHM_ALLOWED;
    at[3] = clock_now();
    if (round >= 0)
      printf("%.3f %.3f %.3f\n", (double)(at[1] - at[0]) / (double)calls,
             (double)(at[2] - at[1]) / (double)calls, (double)(at[3] - at[2]) / (double)calls);
  }
  fshm_limiter_close(limiter);
  fshm_close(segment);
  fshm_remove(argv[3], &error);
  return denied ? 5 : 0;
}
