/* shared_counters.h - shared counters: their slots, and the words in them. */
#ifndef FSHM_SHARED_COUNTERS_H
#define FSHM_SHARED_COUNTERS_H

#include "limits.h"

/* The slot of a counter, by limiter, hash of the key and place of the rule. */
static inline uint64_t shared_slot(const fshm_segment *s, uint32_t index, uint64_t hash,
                                   unsigned place) {
  return s->slot_count + ((uint64_t)index * SHARED + hash % SHARED) * SHARED_PLACES + place;
}
#define SHARED_WRITE (UINT64_C(1) << 16)
static inline bool shared_is_of(uint64_t who, uint64_t current) {
  return (who & 1) && !((who >> 8 ^ CURRENT_RESETS(current)) & 255);
}
/* The next `who` of a counter: of this reset, with this label and epoch. */
static inline uint64_t shared_who(uint64_t who, uint64_t current, uint64_t labels) {
  return ((who | (SHARED_WRITE - 1)) + 1) | (CURRENT_RESETS(current) & 255) << 8 |
         (labels & (WHO_LABELS | 1));
}

#endif
