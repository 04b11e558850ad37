/* permit_lease.h - the word of a permit lease: how many permits of a key this host's processes may hold together,
 * and until when. The word is the state of a slot. Pure, like algorithms.h. Argued in DESIGN.md, "Permits over many
 * hosts".
 *
 *   1 (2 bits) | 18 (5) | end >> 18 (39) | permits leased + 1 (17) | clean (1)
 *
 * It is a window's state with a fixed shift, so state_expires() can read its end; the end is rounded down. While the
 * word is clean, all valid permits have numbers below the lease; else they have to be counted.
 *
 * Words of a key never recur. A word is newer than another if its end is later, or, with the same end, if its last
 * 18 bits are less: with the same end a lease is only lowered, and becomes unclean by that.
 */
#ifndef FSHM_PERMIT_LEASE_H
#define FSHM_PERMIT_LEASE_H

#include <assert.h>

#include "../limits/algorithms.h"

#define PERMIT_LEASE_UNIT (UINT64_C(1) << FSHM_PERMIT_LEASE_BITS) /* ns: 0.26 ms */
#define PERMIT_LEASE_SLACK UINT64_C(1000000000) /* ns: an end may be rounded up by so much */
#define PERMIT_LEASE_OPEN \
  UINT64_C(4000000000) /* ns: life of a first word, which allows no permits */
/* ns after its end for which a lease is still reported to the server: clocks differ by less */
#define PERMIT_LEASE_OVER UINT64_C(1000000)

static_assert(2 * (MAX_PERMITS + 1) + 1 < 1 << FSHM_PERMIT_LEASE_BITS, "a lease has 17 bits");

static inline uint64_t permit_lease_word(uint64_t leased, bool clean, uint64_t end) {
  leased = min_u64(leased, MAX_PERMITS);
  end = min_u64(end, TIME_MAX) & ~(PERMIT_LEASE_UNIT - 1);
  return ((uint64_t)FSHM_WINDOW << 62) | ((uint64_t)FSHM_PERMIT_LEASE_BITS << 57) | end |
         (leased + 1) << 1 | clean;
}

/* These return numbers within their ranges for any bits; for no word, 0. */
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

/* At most `to` permits from now on, with the same end. Returns the same word if that is so already. */
static inline uint64_t permit_lease_lowered(uint64_t word, uint64_t to) {
  return to < permit_lease_of(word) ? permit_lease_word(to, false, permit_lease_end(word)) : word;
}

/* No permits, and not clean: processes that take permits without a lease use any number. */
static inline uint64_t permit_lease_dropped(uint64_t word) {
  return permit_lease_word(0, false, permit_lease_end(word));
}

/* The next word; 0: its end would be too far beyond `until`, since other processes stored later words. */
static inline uint64_t permit_lease_next(uint64_t word, uint64_t leased, bool clean,
                                         uint64_t until) {
  uint64_t end =
      max_u64(until & ~(PERMIT_LEASE_UNIT - 1), permit_lease_end(word) + PERMIT_LEASE_UNIT);
  if (end > plus_time(until, PERMIT_LEASE_SLACK) || end > TIME_MAX - PERMIT_LEASE_UNIT) return 0;
  return permit_lease_word(leased, clean, end);
}

#endif
