/* allowance.h - how many permits of a key the processes of this host may hold together, and until when: as one
 * word, the state of a cell. Pure, as meter.h is. Argued in DESIGN.md, "Permits over many hosts".
 *
 *   1 (2 bits) | 18 (5) | end >> 18 (39) | allowance + 1 (17) | clean (1)
 *
 * A window's state with a fixed shift, so that anybody can read off when it is over; the end is rounded down.
 * While it is clean, all that stand hold slots below the allowance; else they have to be counted.
 *
 * Words of a key never recur. One is newer than another if its end is later, or under the same end its last
 * 18 bits are less: an allowance is only lowered under an end, and becomes unclean with that.
 */
#ifndef FSHM_ALLOWANCE_H
#define FSHM_ALLOWANCE_H

#include <assert.h>

#include "../limits/meter.h"

#define ALLOWANCE_UNIT (UINT64_C(1) << FSHM_ALLOWANCE_BITS) /* ns: 0.26 ms */
#define ALLOWANCE_SLACK UINT64_C(1000000000) /* ns, by which an end may be rounded up */
#define ALLOWANCE_OPEN UINT64_C(4000000000) /* ns that a word lasts that allows nothing */
/* ns after its end for which it still counts, for whoever tells others what is held: clocks differ by less. */
#define ALLOWANCE_OVER UINT64_C(1000000)

static_assert(2 * (MAX_PERMITS + 1) + 1 < 1 << FSHM_ALLOWANCE_BITS, "an allowance has 17 bits");

static inline uint64_t allowance_word(uint64_t allowance, bool clean, uint64_t end) {
  allowance = min_u64(allowance, MAX_PERMITS);
  end = min_u64(end, TIME_MAX) & ~(ALLOWANCE_UNIT - 1);
  return ((uint64_t)FSHM_WINDOW << 62) | ((uint64_t)FSHM_ALLOWANCE_BITS << 57) | end |
         (allowance + 1) << 1 | clean;
}

/* Whatever the bits, these are numbers within their ranges; of no word, 0. */
static inline uint64_t allowance_end(uint64_t word) {
  return TAG(word) == FSHM_WINDOW ? word & TIME_MAX & ~(ALLOWANCE_UNIT - 1) : 0;
}
static inline uint64_t allowance_of(uint64_t word) {
  return min_u64(minus((word & (ALLOWANCE_UNIT - 1)) >> 1, 1), MAX_PERMITS);
}
static inline bool allowance_clean(uint64_t word) { return word & 1; }

static inline uint64_t allowance_at(uint64_t word, uint64_t now) {
  return allowance_end(word) > now ? allowance_of(word) : 0;
}

/* At most `to` from now on, under the same end. The same word: that is so already. */
static inline uint64_t allowance_lowered(uint64_t word, uint64_t to) {
  return to < allowance_of(word) ? allowance_word(to, false, allowance_end(word)) : word;
}

/* Nothing, and not clean: who holds permits without an allowance does not care for slots. */
static inline uint64_t allowance_dropped(uint64_t word) {
  return allowance_word(0, false, allowance_end(word));
}

/* The word that follows, or 0: its end would lie too far behind `until`, since others have put later ones. */
static inline uint64_t allowance_next(uint64_t word, uint64_t allowance, bool clean,
                                      uint64_t until) {
  uint64_t end = max_u64(until & ~(ALLOWANCE_UNIT - 1), allowance_end(word) + ALLOWANCE_UNIT);
  if (end > plus_time(until, ALLOWANCE_SLACK) || end > TIME_MAX - ALLOWANCE_UNIT) return 0;
  return allowance_word(allowance, clean, end);
}

#endif
