/* changes.h - which permits were freed and taken since a look at them. Argued in DESIGN.md, "Denials in constant time".
 *
 * Two words for each key, which it shares with other keys of its hash. Nothing is written to them until a process that
 * looks at all permits of a key arms them; then each release says so:
 *   freed: releases (46 bits) | number of the permit (17) | armed (1)      taken: takes (63) | armed (1)
 * After FREED_BLOCK releases, and after the first take, the word is no longer armed.
 */
#ifndef FSHM_CHANGES_H
#define FSHM_CHANGES_H

#include "../core/internal.h"

#define FREED_BITS 18
#define FREED_BLOCK 256
#define FREED_COUNT(w) ((w) >> FREED_BITS)
#define FREED_NUMBER(w) ((uint32_t)((w) >> 1) & 0x1ffff)

/* Which of the words are a key's, by its hash: PERMIT_KEY() is enough of it. Also fshm_permit.group. */
static inline uint32_t changes_index(uint64_t hash) { return (uint32_t)(hash >> 32); }
static inline changes_t *changes_of(const fshm_segment *s, uint32_t index) {
  return &s->header->changes[index % CHANGE_WORDS];
}

/* More was freed than one number can say: whoever remembers a look has to look again. */
static inline void changes_freed_some(fshm_segment *s, uint32_t index) {
  (void)atomic_fetch_add(&changes_of(s, index)->freed, UINT64_C(2) << FREED_BITS);
}

static COLD uint64_t changes_say_freed(fshm_segment *s, uint32_t index, uint64_t seen,
                                       uint32_t number) {
  uint64_t count = FREED_COUNT(seen) + 1;
  uint64_t next = count << FREED_BITS | (uint64_t)number << 1 | (count % FREED_BLOCK != 0);
  if (atomic_compare_exchange_strong(&changes_of(s, index)->freed, &seen, next)) return next;
  changes_freed_some(s, index); /* another release came between, and the word has its number */
  return 0;
}

/* A permit was freed, by a swap before this. Returns the word that says so; 0: none does. The barrier pairs with that
 * of changes_arm_freed(): we see the word armed, or the look that follows sees the permit free. */
static inline uint64_t changes_freed(fshm_segment *s, uint32_t index, uint32_t number) {
  after_swap();
  uint64_t seen = load_relaxed(&changes_of(s, index)->freed);
  return likely(!(seen & 1)) ? 0 : changes_say_freed(s, index, seen, number);
}

/* A permit was taken. If the swap is lost, another take has changed the word since we read it, and that was after our
 * permit was taken: a look that began with the new word sees it. */
static inline void changes_taken(fshm_segment *s, uint32_t index) {
  after_swap(); /* pairs with changes_arm_taken() */
  uint64_t seen = load_relaxed(&changes_of(s, index)->taken);
  if (unlikely(seen & 1))
    (void)atomic_compare_exchange_strong(&changes_of(s, index)->taken, &seen, seen + 1);
}

/* Arm a word, before a look at all permits of the key. What the look finds is true as of the value returned. */
static inline uint64_t changes_arm(_Atomic uint64_t *word) {
  uint64_t armed = atomic_fetch_or(word, 1) | 1;
  after_swap(); /* pairs with changes_freed(), changes_taken(): the word, then the permits */
  return armed;
}
static inline uint64_t changes_arm_freed(fshm_segment *s, uint32_t index) {
  return changes_arm(&changes_of(s, index)->freed);
}
static inline uint64_t changes_arm_taken(fshm_segment *s, uint32_t index) {
  return changes_arm(&changes_of(s, index)->taken);
}

/* How many permits were freed at most between two values of the word. UINT64_MAX: not known. It is disarmed only
 * where a block of counts begins; so from an armed value to an armed value of the same block all releases counted. */
static inline uint64_t changes_between(uint64_t armed, uint64_t now) {
  if (armed == now) return 0;
  bool same = (now & 1) && FREED_COUNT(now) / FREED_BLOCK == FREED_COUNT(armed) / FREED_BLOCK;
  return same ? FREED_COUNT(now) - FREED_COUNT(armed) : UINT64_MAX;
}

#endif
