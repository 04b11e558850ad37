/* permit_lease.h - how many permits of a key the processes of this host may hold together, and until when: as one
 * word, the state of a slot. Pure, as algorithms.h is. Argued in DESIGN.md, "Permits over many hosts".
 *
 *   1 (2 bits) | 18 (5) | end >> 18 (39) | permit lease + 1 (17) | clean (1)
 *
 * A window's state with a fixed shift, so that anybody can read off when it is over; the end is rounded down.
 * While it is clean, all that stand hold permits below the permit lease; else they have to be counted.
 *
 * Words of a key never recur. One is newer than another if its end is later, or under the same end its last
 * 18 bits are less: an permit lease is only lowered under an end, and becomes unclean with that.
 */
#ifndef FSHM_PERMIT_LEASE_H
#define FSHM_PERMIT_LEASE_H

#include <assert.h>

#include "../limits/algorithms.h"

#define PERMIT_LEASE_UNIT (UINT64_C(1) << FSHM_PERMIT_LEASE_BITS) /* ns: 0.26 ms */
#define PERMIT_LEASE_SLACK UINT64_C(1000000000) /* ns, by which an end may be rounded up */
#define PERMIT_LEASE_OPEN UINT64_C(4000000000) /* ns that a word lasts that allows nothing */
/* ns after its end for which it still counts, for whoever tells others what is held: clocks differ by less. */
#define PERMIT_LEASE_OVER UINT64_C(1000000)

static_assert(2 * (MAX_PERMITS + 1) + 1 < 1 << FSHM_PERMIT_LEASE_BITS, "an allowance has 17 bits");

static inline uint64_t permit_lease_word(uint64_t leased, bool clean, uint64_t end) {
  leased = min_u64(leased, MAX_PERMITS);
  end = min_u64(end, TIME_MAX) & ~(PERMIT_LEASE_UNIT - 1);
  return ((uint64_t)FSHM_WINDOW << 62) | ((uint64_t)FSHM_PERMIT_LEASE_BITS << 57) | end |
         (leased + 1) << 1 | clean;
}

/* Whatever the bits, these are numbers within their ranges; of no word, 0. */
static inline uint64_t permit_lease_end(uint64_t word) {
  return TAG(word) == FSHM_WINDOW ? word & TIME_MAX & ~(PERMIT_LEASE_UNIT - 1) : 0;
}
static inline uint64_t permit_lease_of(uint64_t word) {
  return min_u64(minus((word & (PERMIT_LEASE_UNIT - 1)) >> 1, 1), MAX_PERMITS);
}
static inline bool permit_lease_clean(uint64_t word) { return word & 1; }

static inline uint64_t permit_lease_at(uint64_t word, uint64_t now) {
  return permit_lease_end(word) > now ? permit_lease_of(word) : 0;
}

/* At most `to` from now on, under the same end. The same word: that is so already. */
static inline uint64_t permit_lease_lowered(uint64_t word, uint64_t to) {
  return to < permit_lease_of(word) ? permit_lease_word(to, false, permit_lease_end(word)) : word;
}

/* Nothing, and not clean: who holds permits without an permit lease does not care for permits. */
static inline uint64_t permit_lease_dropped(uint64_t word) {
  return permit_lease_word(0, false, permit_lease_end(word));
}

/* The word that follows, or 0: its end would lie too far behind `until`, since others have put later ones. */
static inline uint64_t permit_lease_next(uint64_t word, uint64_t leased, bool clean,
                                         uint64_t until) {
  uint64_t end =
      max_u64(until & ~(PERMIT_LEASE_UNIT - 1), permit_lease_end(word) + PERMIT_LEASE_UNIT);
  if (end > plus_time(until, PERMIT_LEASE_SLACK) || end > TIME_MAX - PERMIT_LEASE_UNIT) return 0;
  return permit_lease_word(leased, clean, end);
}

#endif
