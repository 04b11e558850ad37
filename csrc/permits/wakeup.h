/* wakeup.h - wake-ups of callers that wait for the answer to another call. */
#ifndef FSHM_WAKEUP_H
#define FSHM_WAKEUP_H

#include "../core/internal.h"

/* Wake one waiter of this key (wakeup: the upper half of its hash), or all waiters. */
static inline uint32_t wakeup_of(uint64_t hash) { return (uint32_t)(hash >> 32); }
void wakeup_send(fshm_segment *s, uint32_t wakeup);

#endif
