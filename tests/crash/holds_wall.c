/* holds_wall.c - what must hold of the time of day: it does not go back; and who has looked at the clock of the day sees
 * what that shows, or the latest that was seen before it was set back. */
#include "crash.h"

enum { AS_BEFORE, SET_FORWARD, SET_BACK, SET_RIGHT }; /* op->prior: what the clock has done */

static int64_t wall_step(void) {
  static const int64_t steps[] = {0, 600, -600, -2 * 24 * 3600}; /* s */
  return steps[op->prior] * 1000000000;
}
/* Since the last look, the clock was set. */
static void set_clock(void) {
  world.wall = world_at_start.wall + (uint64_t)wall_step();
  store_relaxed(&world.s->wall_looked, 0);
}
static void run_wall(outcome_t *out) {
  out->number = fshm_wall(world.s, NOW);
  out->status = 1;
}

static uint64_t wall_shown(void) {
  const header_t *h = world.s->header;
  return max_u64(NOW + load_relaxed(&h->wall_base), load_relaxed(&h->wall_floor));
}
static void wall_look_and_check(void) {
  const int64_t step = op->prior == SET_BACK ? 0 : wall_step();
  set_clock();
  const uint64_t shown = fshm_wall(world.s, NOW), right = NOW + WALL_BEGAN + (uint64_t)step;
  if (shown != right)
    broken("it is %lld ns later than it should be", (long long)(int64_t)(shown - right));
}
static void check_not_back(void) {
  if (op->prior != SET_RIGHT && wall_shown() < NOW + WALL_BEGAN)
    broken("the time of day went back");
}

static void check_wall(void) {
  check_not_back();
  wall_look_and_check();
}
static void wall_raced(const outcome_t *mine) {
  (void)mine;
  check_wall();
}

static const holds_t walls = {NULL, check_wall, check_wall, check_wall, wall_raced, NULL};
