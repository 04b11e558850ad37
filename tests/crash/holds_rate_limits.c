/* holds_rate_limits.c - what must hold of operations on rate limits: each limit's consumption is exactly as
 * before or as after, charged in order, and all others find the room that is left, no more and no less. */
#include "crash.h"

/* Before, after, after a second time; and where the operation charges and then undoes, in between. */
static levels_t levels_before, levels_after, levels_twice, levels_between;
static outcome_t undisturbed; /* T's answer */

static void learn_room(uint32_t expected, const char *when) {
  static unsigned char *saved;
  segment_save(&saved);
  uint64_t room = exhaust(world.now);
  segment_restore(saved);
  if (room != expected) broken("%s it, %llu fit, not %u", when, (unsigned long long)room, expected);
}

static void rate_limits_begin(void) {
  levels_before = levels_of(world.l, KEY);
  learn_room(op->before, "before");
}

static void rate_limits_end(void) {
  outcome_t mine;
  undisturbed = *told;
  if (told->status != op->status) broken("it answers %d, not %d", told->status, op->status);
  levels_after = levels_of(world.l, KEY);
  if (op->meddle) { /* what it charged is undone, and nothing else */
    if (levels_after.remaining[0] != levels_between.remaining[0] + op->cost)
      broken("the charge of the first limit is not undone");
    for (uint32_t i = 1; i < levels_after.count; i++)
      if (levels_after.remaining[i] != levels_between.remaining[i])
        broken("the charge of limit %u is not undone", i);
    levels_before = levels_after;
  }
  learn_room(op->after, "after");
  op->run(&mine);
  levels_twice = levels_of(world.l, KEY);
}

/* T stands after its first change, and S has just taken the room of a later limit. */
static void rate_limits_meddled(void) { levels_between = levels_of(world.l, KEY); }

/* Charged for now: the call undoes it when it comes to a level without room. */
static bool charged_for_now(const levels_t *l, uint32_t i) {
  if (!op->levels || (!op->meddle && op->status >= 0)) return false;
  const levels_t *from = op->meddle ? &levels_between : &levels_before;
  return l->remaining[i] + op->cost == from->remaining[i];
}

/* Before or after, in order: a prefix of the limits is charged. */
static bool known_levels(const levels_t *l) {
  bool changed = true; /* all limits up to here */
  if (l->count != levels_before.count && l->count != levels_after.count) return false;
  for (uint32_t i = 0; i < l->count; i++) {
    bool before = same_level(l, &levels_before, i), after = same_level(l, &levels_after, i);
    if (op->meddle && same_level(l, &levels_between, i)) continue;
    if (charged_for_now(l, i)) continue;
    if (!before && !after) return false;
    if (after && !before && !changed) return false;
    changed &= after;
  }
  return true;
}

static void rate_limits_contend(void) {
  outcome_t mine = {0};
  char text[2][160];
  levels_t seen = levels_of(world.l, KEY), wanted = seen;
  bool rough = op->flags & ROUGH, acquires = rough || op->op == FSHM_ACQUIRE;
  if (!known_levels(&seen)) {
    tell_levels(&seen, text[0], sizeof text[0]);
    broken("consumption is neither as before nor as after: %s", text[0]);
  }
  if (acquires) {
    uint64_t cost = rough ? 1 : op->cost;
    if (rough)
      mine.status = apply_at(world.l, FSHM_ACQUIRE, KEY, 1, world.now).status;
    else
      op->run(&mine);
    bool fits = least_remaining(&seen) >= cost;
    int status = op->status < 0 ? op->status : fits ? FSHM_ALLOWED : FSHM_DENIED;
    if (mine.status != status) broken("S is answered %d, not %d", mine.status, status);
    levels_t now = levels_of(world.l, KEY);
    for (uint32_t i = 0; i < seen.count; i++)
      if (now.remaining[i] != seen.remaining[i] - (mine.status == FSHM_ALLOWED ? cost : 0))
        broken("limit %u has %llu left after S, and had %llu", i,
               (unsigned long long)now.remaining[i], (unsigned long long)seen.remaining[i]);
    return;
  }
  op->run(&mine);
  if (mine.status != op->status) broken("S is answered %d, not %d", mine.status, op->status);
  for (uint32_t i = 0; i < seen.count; i++) {
    const levels_t *next = same_level(&seen, &levels_before, i) ? &levels_after : &levels_twice;
    wanted.remaining[i] = next->remaining[i];
    wanted.state[i] = next->state[i];
  }
  levels_t now = levels_of(world.l, KEY);
  tell_levels(&wanted, text[0], sizeof text[0]);
  tell_levels(&now, text[1], sizeof text[1]);
  if (!same_levels(&now, &wanted)) broken("S's own went wrong: %s, not %s", text[1], text[0]);
}

/* After a period or more, everything fits again. */
static void rate_limits_later(void) {
  position.later = true;
  uint64_t admitted = exhaust(world.now ? LATER : fshm_now(world.s) + 4 * PER);
  if (admitted != op->full)
    broken("later %llu fit, not %u", (unsigned long long)admitted, op->full);
}

static int exhaust_afresh(void) { return (int)exhaust(world.now); }

static void rate_limits_survive(void) {
  char text[160];
  levels_t seen = levels_of(world.l, KEY);
  bool full = (op->flags & (CROWDED | SHARING)) == CROWDED;
  tell_levels(&seen, text, sizeof text);
  if (!known_levels(&seen)) broken("consumption is neither as before nor as after: %s", text);
  if (told->done) {
    if (told->status != op->status) broken("T says %d, not %d", told->status, op->status);
    if (!(op->flags & REAL_TIME) &&
        memcmp(&told->decision, &undisturbed.decision, sizeof told->decision))
      broken("T's decision differs from the undisturbed one");
    if (!same_levels(&seen, &levels_after)) broken("T says it is done, and it is not: %s", text);
  }
  uint64_t expected = full ? 0 : least_remaining(&seen);
  if (same_levels(&seen, &levels_before) && !op->meddle) expected = op->before;
  if (same_levels(&seen, &levels_after)) expected = op->after;
  /* by S, or by a process that comes anew, and then S finds nothing more */
  uint64_t admitted = position.k % 16 ? 0 : (uint64_t)fresh_process(exhaust_afresh);
  admitted += exhaust(world.now);
  if (admitted != expected)
    broken("then %llu fit, not %llu", (unsigned long long)admitted, (unsigned long long)expected);
  check_invariants(true);
  rate_limits_later();
}

static void rate_limits_raced(const outcome_t *mine) {
  char text[2][160];
  levels_t seen = levels_of(world.l, KEY);
  tell_levels(&seen, text[0], sizeof text[0]);
  if (op->flags & ROUGH) {
    uint64_t s = mine->status == FSHM_ALLOWED;
    for (uint32_t i = 0; i < seen.count; i++)
      if (seen.remaining[i] + s != levels_after.remaining[i] &&
          seen.remaining[i] + s != levels_before.remaining[i])
        broken("after both, limit %u: %s", i, text[0]);
  } else if (op->op == FSHM_ACQUIRE) {
    uint64_t admitted = (told->status == FSHM_ALLOWED) + (mine->status == FSHM_ALLOWED);
    uint64_t fit = op->status < 0 ? 0 : min_u64(2, least_remaining(&levels_before) / op->cost);
    if (admitted != fit)
      broken("of T and S, %llu were admitted, not %llu", (unsigned long long)admitted,
             (unsigned long long)fit);
    for (uint32_t i = 0; i < seen.count; i++)
      if (seen.remaining[i] + admitted * op->cost != levels_before.remaining[i])
        broken("after both, limit %u: %s", i, text[0]);
  } else if (!same_levels(&seen, &levels_twice)) {
    tell_levels(&levels_twice, text[1], sizeof text[1]);
    broken("after both: %s, not %s", text[0], text[1]);
  }
  check_invariants(false);
}

static const holds_t rate_limits = {rate_limits_begin,   rate_limits_end,   rate_limits_contend,
                                    rate_limits_survive, rate_limits_raced, NULL};
