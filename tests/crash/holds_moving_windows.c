/* holds_moving_windows.c - what must hold of moving windows: the tokens in the window are as before the operation, as
 * after it, or some on the way; exactly what they leave fits; and the head hides none of them. */
#include "crash.h"

static uint64_t tokens_before, tokens_after;

static fshm_counted moving_of(uint64_t cost, uint64_t now) {
  fshm_counted out;
  fshm_moving(world.l, KEY, strlen(KEY), &op->limits[0], cost, now, &out);
  return out;
}

/* By the slots alone, wherever the library would look for them. */
static uint64_t tokens_at(uint64_t now) {
  uint64_t found = 0, who = side_of(world.l, KEY).who;
  for (uint32_t position = 0; position < MOST_NUMBERED; position++)
    for (uint64_t i = 0; i < world.s->slot_count; i++) {
      pair_t pair = pair_load(&world.s->slots[i]);
      found += pair.who == side_who(nth_who(who, position), world.l->index) &&
               !IS_PENDING(pair.when) && window_read(pair.when, now).count;
    }
  return found;
}

static uint64_t moving_exhaust(uint64_t now) {
  uint64_t admitted = 0;
  while (admitted < 100 && moving_of(1, now).status == FSHM_ALLOWED) admitted++;
  return admitted;
}

static void check_room(uint64_t expected, const char *when) {
  static unsigned char *saved;
  segment_save(&saved);
  uint64_t room = moving_exhaust(world.now);
  segment_restore(saved);
  if (room != expected)
    broken("%s, %llu fit, not %llu", when, (unsigned long long)room, (unsigned long long)expected);
}

static void moving_begin(void) {
  tokens_before = tokens_at(world.now);
  check_room(op->before, "before it");
}

static void moving_end(void) {
  if (told->status != op->status) broken("it answers %d, not %d", told->status, op->status);
  tokens_after = tokens_at(world.now);
  check_room(op->after, "after it");
}

static uint64_t known_tokens(void) {
  uint64_t seen = tokens_at(world.now), shown = moving_of(0, world.now).count;
  if (seen < min_u64(tokens_before, tokens_after) || seen > max_u64(tokens_before, tokens_after))
    broken("%llu tokens, of %llu before and %llu after it", (unsigned long long)seen,
           (unsigned long long)tokens_before, (unsigned long long)tokens_after);
  if (shown != seen)
    broken("it shows %llu tokens of %llu", (unsigned long long)shown, (unsigned long long)seen);
  return seen;
}

static void moving_contend(void) {
  outcome_t mine = {0};
  uint64_t seen = known_tokens();
  op->run(&mine);
  uint64_t now = tokens_at(world.now);
  if (op->op == CLEAR) {
    if (now) broken("%llu tokens are left", (unsigned long long)now);
    return;
  }
  int status = seen + op->cost <= op->limits[0].n ? FSHM_ALLOWED : FSHM_DENIED;
  if (op->status < 0) status = op->status;
  if (mine.status != status) broken("S is answered %d, not %d", mine.status, status);
  if (now != seen + (mine.status == FSHM_ALLOWED ? op->cost : 0))
    broken("%llu tokens after S, %llu before it", (unsigned long long)now,
           (unsigned long long)seen);
}

static int moving_exhaust_afresh(void) { return (int)moving_exhaust(world.now); }

static void moving_survive(void) {
  uint64_t seen = known_tokens(), fit = op->status < 0 ? op->after : op->limits[0].n - seen;
  if (told->done && told->status != op->status)
    broken("T says %d, not %d", told->status, op->status);
  if (told->done && seen != tokens_after) broken("T says it is done, and it is not");
  uint64_t admitted = position.k % 16 ? 0 : (uint64_t)fresh_process(moving_exhaust_afresh);
  admitted += moving_exhaust(world.now);
  if (admitted != fit)
    broken("then %llu fit, not %llu", (unsigned long long)admitted, (unsigned long long)fit);
  check_invariants(true);
  position.later = true;
  admitted = moving_exhaust(LATER);
  if (admitted != op->full)
    broken("later %llu fit, not %u", (unsigned long long)admitted, op->full);
}

static void moving_raced(const outcome_t *mine) {
  uint64_t now = tokens_at(world.now);
  if (op->op == CLEAR) {
    if (now) broken("%llu tokens are left", (unsigned long long)now);
    return;
  }
  uint64_t admitted = (told->status == FSHM_ALLOWED) + (mine->status == FSHM_ALLOWED);
  uint64_t fit = op->status < 0 ? 0 : min_u64(2, (op->limits[0].n - tokens_before) / op->cost);
  uint64_t expected = tokens_before + admitted * op->cost;
  if (admitted != fit)
    broken("of T and S, %llu were admitted, not %llu", (unsigned long long)admitted,
           (unsigned long long)fit);
  if (now != expected)
    broken("%llu tokens after both, not %llu", (unsigned long long)now,
           (unsigned long long)expected);
  check_invariants(false);
}

static const holds_t moving = {moving_begin,   moving_end,   moving_contend,
                               moving_survive, moving_raced, NULL};
