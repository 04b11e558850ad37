/* counters.h - how a call is counted */
#ifndef FSHM_COUNTERS_H
#define FSHM_COUNTERS_H

#include "../core/internal.h"

/* counters.c: all calls that were counted through a process index. */
void counters_of_process(const fshm_segment *s, uint32_t process, fshm_counters *out);

/* Count one call of a limiter: the sums that are shown (counters.c). counters: of fshm_limiter. */
static inline void counters_add(fshm_segment *s, uint32_t process, uint32_t counters, int status) {
  if (unlikely(counters >= COUNTERS)) return; /* a limiter beside another one */
  limiter_counters_t *t = &s->counters[process < PROCESSES ? process : PROCESSES].of[counters];
  (void)add_relaxed(status == FSHM_ALLOWED ? &t->admitted : &t->denied, 1);
  if (unlikely(status < 0)) (void)add_relaxed(&t->refused, 1);
}

#endif
