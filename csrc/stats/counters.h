/* counters.h - counting a call of a limiter. */
#ifndef FSHM_COUNTERS_H
#define FSHM_COUNTERS_H

#include "../core/internal.h"

/* The sums of all calls that were counted through a process index. */
void counters_of_process(const fshm_segment *s, uint32_t process, fshm_counters *out);

static inline counters_t *counters_row(const fshm_segment *s, uint32_t process) {
  return likely(process < PROCESSES) ? &s->counters[process] : s->outsiders;
}

/* Count one call of a limiter. counters: of fshm_limiter. */
static inline void counters_add(fshm_segment *s, uint32_t process, uint32_t counters, int status) {
  if (unlikely(counters >= COUNTERS)) return; /* an auxiliary limiter of another one */
  limiter_counters_t *t = &counters_row(s, process)->of[counters];
  (void)add_relaxed(status == FSHM_ALLOWED ? &t->admitted : &t->denied, 1);
  if (unlikely(status < 0)) (void)add_relaxed(&t->refused, 1);
}

#endif
