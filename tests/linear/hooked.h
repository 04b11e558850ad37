/* hooked.h - the library itself (unity.c), with places at which a test may hold it up.
 *
 * Nothing in it is changed: its ways to the outside world are wrapped where they are declared. Before each
 * swap, after each 16-byte load and swap, and after each reading of the clock, hook() may spin, yield, sleep
 * or kill the process; so the windows between look and swap, which are nanoseconds wide, are open for as
 * long as it takes others to run through them. The clock can be a counter in shared memory, that each
 * reading advances, and every reading is recorded. */
#ifndef HOOKED_H
#define HOOKED_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include <stdatomic.h>

static void hook(void);
#undef atomic_compare_exchange_strong
#ifdef __clang__
#define atomic_compare_exchange_strong(p, seen, next) \
  (hook(),                                            \
   __c11_atomic_compare_exchange_strong((p), (seen), (next), __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
#else
#define atomic_compare_exchange_strong(p, seen, next) \
  (hook(), __atomic_compare_exchange_n((p), (seen), (next), 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
#endif

#define pair_load library_pair_load
#define pair_cas library_pair_cas
#define segment_now library_segment_now
#include "core/internal.h"
#undef pair_load
#undef pair_cas
#undef segment_now

static uint64_t clock_read(const fshm_segment *s);
static void swapped_in(const void *slot, pair_t was, pair_t is);
static uint64_t lost_swaps; /* of this process */

static inline bool pair_cas(void *slot, pair_t *seen, pair_t next) {
  hook();
  bool swapped = library_pair_cas(slot, seen, next);
  lost_swaps += !swapped;
  if (swapped) swapped_in(slot, *seen, next);
  hook();
  return swapped;
}

static inline pair_t pair_load(const void *slot) {
  pair_t pair = library_pair_load(slot);
  hook();
  return pair;
}

static inline uint64_t segment_now(const fshm_segment *s) {
  uint64_t now = clock_read(s);
  hook();
  return now;
}

#include "unity.c"

#endif
