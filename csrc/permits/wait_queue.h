/* wait_queue.h - callers that wait for a key, for other files. */
#ifndef FSHM_WAIT_QUEUE_H
#define FSHM_WAIT_QUEUE_H

#include "../core/internal.h"

/* The key of a queue: hash of the key (52 bits) | limiter (11) | 1. Never 0. */
static inline uint64_t wait_key(uint64_t hash, uint32_t limiter) {
  return hash << 12 | (uint64_t)limiter << 1 | 1;
}
static inline uint32_t wait_group(uint64_t key) { return (uint32_t)(key >> 44) % WAIT_GROUPS; }

/* Not 0 in its lower half: callers may wait for the key of the permit. */
const _Atomic uint64_t *wait_queue_of(const fshm_segment *s, const fshm_permit *p);

void wait_wake_next(fshm_segment *s, uint64_t key);

/* A permit of a key of the group was released, after whose swap this is called: may any caller wait? Pairs with
 * fshm_wait_join(), which raises the reach (a full barrier) before its caller looks at the permits: one of the two sees
 * the other. */
static inline bool wait_any(const fshm_segment *s, uint32_t group) {
  after_swap();
  return (uint32_t)load_relaxed(&s->header->queues[group % WAIT_GROUPS]) != 0;
}

/* Then wake the caller that is next, for the one permit. */
static inline void wait_wake(fshm_segment *s, uint64_t key) {
  if (unlikely(wait_any(s, wait_group(key)))) wait_wake_next(s, key);
}
void wait_wake_all(fshm_segment *s);
/* After the swap by which a key got room for any number of callers: tokens were given back, or forgotten. */
void wait_wake_more(fshm_segment *s, uint64_t key);
/* After the swap by which all keys of a limiter may have got room. */
void wait_wake_limiter(fshm_segment *s, uint32_t limiter);

/* Set the word `asked` of a place. False: the place was lost. */
bool wait_place_asks(fshm_segment *s, const fshm_place *p);
/* Let fshm_wait_watch() of a process return 1. */
void wait_tell(fshm_segment *s, uint32_t process);

#endif
