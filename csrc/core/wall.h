/* wall.h - the wall clock of a segment: for windows of the calendar. Argued in DESIGN.md, "The calendar".
 *
 * The kernel's clock of the day (CLOCK_REALTIME) is set, forward and back; the segment's own clock is not. What the
 * processes of a segment take for the time of day is one function of segment time, kept in two words of the header:
 *
 *   wall(now) = max(now + base, floor)
 *
 * `base` follows the kernel. `floor` is the latest time that was seen. So all processes agree on the time of day, and it
 * never goes back: where the kernel's clock is set back, it stands still until that has caught up. A clock that is
 * set back by more than a day had been wrong before: then the time of day goes back with it.
 */
#ifndef FSHM_WALL_H
#define FSHM_WALL_H

#include "internal.h"

#define WALL_CHECK \
  UINT64_C(10000000) /* ns: how long a process goes without a look at the kernel's clock */
#define WALL_DIFFERS \
  UINT64_C(10000000) /* ns: a smaller difference is no step of the kernel's clock */
#define WALL_WRONG (UINT64_C(24) * 3600 * 1000000000) /* ns back: the clock had been wrong */

/* The kernel's clock of the day shows `wall` (ns since 1970) at segment time `now`. */
void wall_follow(fshm_segment *s, uint64_t wall, uint64_t now);
/* wall_follow() by this process's clocks, if it has not looked for WALL_CHECK. */
void wall_check(fshm_segment *s);

/* The same, whenever it was that it looked. */
void wall_look_now(fshm_segment *s);

/* Of a copy of a calendar's rule: what its arithmetic needs of the segment. */
static inline void calendar_ready(fshm_segment *s, rule_t *r) {
  wall_check(s);
  /* acquire: pairs with wall_follow(), which raises `floor` before it sets `base` back. */
  r->base = atomic_load_explicit(&s->header->wall_base, memory_order_acquire);
  r->floor = load_relaxed(&s->header->wall_floor);
  r->zone = r->strict && r->strict < ZONES ? &s->zones[r->strict] : NULL;
}

COLD uint64_t dated_state_ends(const fshm_segment *s, uint64_t who, uint64_t state);

/* When the state of this slot becomes equal to "never seen", in segment time; a pending slot never does. */
static inline uint64_t state_ends(const fshm_segment *s, uint64_t who, uint64_t state) {
  const bool dated = state - (UINT64_C(1) << 60) < UINT64_C(3) << 60; /* money, or a calendar's */
  return unlikely(dated) ? dated_state_ends(s, who, state) : state_expires(state);
}

#endif
