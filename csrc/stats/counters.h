/* counters.h - counting a call of a limiter. */
#ifndef FSHM_COUNTERS_H
#define FSHM_COUNTERS_H

#include "../core/internal.h"

/* The sums of all calls that were counted through a process index. */
void counters_of_process(const fshm_segment *s, uint32_t process, fshm_counters *out);

static inline counters_t *counters_row(const fshm_segment *s, uint32_t process) {
  return likely(process < PROCESSES) ? &s->counters[process] : s->outsiders;
}

/* The lane of this thread. Threads of a Python without the GIL have one each, up to COUNTER_LANES: in one line, each call
 * would wait for what the others have just written. Others take turns anyway, and have one together. */
static inline uint32_t counters_lane(void) {
#ifdef Py_GIL_DISABLED
  static _Atomic uint32_t threads;
  static _Thread_local uint32_t mine; /* lane + 1; 0: none yet */
  if (unlikely(!mine)) mine = 1 + (add_relaxed(&threads, 1) & (COUNTER_LANES - 1));
  return mine - 1;
#else
  return 0;
#endif
}

/* Where the calls of this thread count. counters: of fshm_limiter, less than COUNTERS. */
static inline limiter_counters_t *counters_here(const fshm_segment *s, uint32_t process,
                                                uint32_t counters) {
  return &counters_row(s, process)->of[counters_lane()][counters];
}

/* Count one call of a limiter. counters: of fshm_limiter. */
static inline void counters_add(fshm_segment *s, uint32_t process, uint32_t counters, int status) {
  if (unlikely(counters >= COUNTERS)) return; /* an auxiliary limiter of another one */
  limiter_counters_t *t = counters_here(s, process, counters);
  (void)add_relaxed(status == FSHM_ALLOWED ? &t->admitted : &t->denied, 1);
  if (unlikely(status < 0)) (void)add_relaxed(&t->refused, 1);
}

#endif
