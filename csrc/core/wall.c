/* wall.c - the wall clock of a segment: see wall.h. */
#include <time.h>

#include "wall.h"

/* For tests: so much is added to what the kernel says, in this process. */
static _Atomic int64_t wall_pretended;

void wall_follow(fshm_segment *s, uint64_t wall, uint64_t now) {
  header_t *h = s->header;
  const uint64_t base = minus(wall, now), before = load_relaxed(&h->wall_base);
  const uint64_t differs = base > before ? base - before : before - base;
  if (differs > WALL_DIFFERS) {
    if (base < before) {
      /* No process has gone by the former base for longer than WALL_CHECK since `floor` was raised. */
      const uint64_t floor = load_relaxed(&h->wall_floor), seen = now + before;
      raise_to(&h->wall_floor, floor ? min_u64(seen, floor + 2 * WALL_CHECK) : seen);
    }
    uint64_t expected = before; /* lost: another process follows the same clock */
    (void)atomic_compare_exchange_strong_explicit(&h->wall_base, &expected, base,
                                                  memory_order_release, memory_order_relaxed);
  }
  uint64_t floor = load_relaxed(&h->wall_floor);
  if (floor >
      wall +
          WALL_WRONG) /* lost: another process has raised or lowered it, and the next look decides */
    (void)atomic_compare_exchange_strong_explicit(&h->wall_floor, &floor, wall,
                                                  memory_order_relaxed, memory_order_relaxed);
  else
    raise_to(&h->wall_floor, wall);
}

/* now: segment time just before. Under a clock that tests move, the time of day is a function of that: it moves, and
 * stands still, with the clock. */
static uint64_t kernel_wall(const fshm_segment *s, uint64_t now) {
  struct timespec t;
  const segment_clock_t *clock = clock_of(s);
  if (clock->magic) return now + load_relaxed(&clock->day);
  (void)clock_gettime(CLOCK_REALTIME, &t);
  return (uint64_t)t.tv_sec * UINT64_C(1000000000) + (uint64_t)t.tv_nsec +
         (uint64_t)load_relaxed(&wall_pretended);
}

/* A reading counts if both clocks were read within a millisecond: a caller may be stopped between them. */
static COLD void wall_look(fshm_segment *s) {
  for (int tries = 0; tries < 8; tries++) {
    const uint64_t before = segment_now(s), wall = kernel_wall(s, before), after = segment_now(s);
    if (after - before > 1000000) continue;
    wall_follow(s, wall, before);
    store_relaxed(&s->wall_looked, before);
    return;
  }
}

void wall_check(fshm_segment *s) {
  if (s->read_only) return;
  const uint64_t now = segment_now(s), looked = load_relaxed(&s->wall_looked);
  if (unlikely(!looked || now - looked > WALL_CHECK)) wall_look(s); /* also where it went back */
}

void wall_look_now(fshm_segment *s) {
  if (!s->read_only) wall_look(s);
}

void fshm_wall_pretend(fshm_segment *s, int64_t ns) {
  store_relaxed(&wall_pretended, ns);
  wall_look_now(s);
}

uint64_t fshm_wall(fshm_segment *s, uint64_t now) {
  wall_check(s);
  if (!now) now = segment_now(s);
  const uint64_t base = atomic_load_explicit(&s->header->wall_base, memory_order_acquire);
  return max_u64(now + base, load_relaxed(&s->header->wall_floor));
}

/* The window of money is that of its rule, which `who` names. If the rule index was given to another rule meanwhile, the
 * slot has changed, and the caller's swap fails. */
COLD uint64_t dated_state_ends(const fshm_segment *s, uint64_t who, uint64_t state) {
  rule_t r = {.words = {0}};
  uint64_t end = CALENDAR_END(state);
  if (IS_MONEY(state)) {
    if (!(who & 1) || WHO_LIMITER(who) >= s->limiter_count) return UINT64_MAX;
    if (WHO_PLACE(who) == PLACE_NONE) return UINT64_MAX; /* an override: plans.c */
    end = load_relaxed(&s->limiters[WHO_LIMITER(who)].rules[WHO_LABEL(who)][RULE_END]);
    end = min_u64(end, (UINT64_C(1) << 28) - 1);
  }
  r.base = atomic_load_explicit(&s->header->wall_base, memory_order_acquire);
  r.floor = load_relaxed(&s->header->wall_floor);
  return calendar_instant(&r, end);
}
