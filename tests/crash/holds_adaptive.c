/* holds_adaptive.c - what must hold of a limit that is learned: no call is admitted beyond it, all that it allows can be
 * taken, and a course that was cut short is one that any call goes on from, whichever process dies or stops where. */
#include "crash.h"

static const fshm_adaptive learning = {4, 1, 6, FSHM_AIMD, 1280};

static int take_adaptive(fshm_permit *permit) {
  fshm_decision d;
  uint32_t held;
  return fshm_adaptive_admit(world.l, world.permit_leases, &learning, KEY, strlen(KEY), world.now,
                             permit, &d, &held);
}
static fshm_learned learned_now(void) {
  fshm_learned known;
  if (fshm_adaptive_look(world.permit_leases, KEY, strlen(KEY), world.now, &known) != FSHM_OK)
    broken("what is learned cannot be read");
  return known;
}
static int report_call(uint32_t throttled, uint64_t pause) {
  const fshm_sample sample = {NOW, 1000000, 6, throttled};
  return fshm_adaptive_end(world.l, world.permit_leases, &learning, KEY, strlen(KEY), &sample,
                           pause, world.now);
}
static void move_limit(uint32_t to) {
  const keyed_t k = side_of(world.permit_leases, KEY);
  found_t f;
  const uint64_t word = word_look(&k, LEARNED_LIMIT, &f);
  if (word_put(&k, LEARNED_LIMIT, &f, limit_word_moved(word, to, NOW)) != CLAIMED)
    broken("the limit cannot be set");
}

/* op->before is the limit, and S holds op->prior of its permits; op->full: then it falls to that. op->cost: so many calls
 * of the round have ended. */
static void start_adaptive(void) {
  static const fshm_limit granted = {1, 0, 0, FSHM_LEASE, 0};
  fshm_permit permits[MOST_TAKEN];
  open_segment();
  world.now = NOW;
  world.l = named("permits", op->limits, op->count);
  world.permit_leases = named("learned", &granted, 1);
  (void)apply_at(world.others, FSHM_ACQUIRE, "beside", 1, NOW);
  if (!op->before) return;
  if (take_adaptive(&permits[0]) == FSHM_ALLOWED) (void)fshm_permit_release(world.l, &permits[0]);
  move_limit(op->before);
  uint32_t all = op->flags & LOW_FREED ? op->before : op->prior;
  for (uint32_t i = 0; i < all; i++)
    if (take_adaptive(&permits[i]) != FSHM_ALLOWED) broken("no permit to begin with");
  for (uint32_t i = 0; i + op->prior < all; i++) (void)fshm_permit_release(world.l, &permits[i]);
  if (op->full) move_limit(op->full);
  for (uint32_t i = 0; i < op->cost; i++) (void)report_call(0, 0);
}

/* A limit that was learned, and whose word another program erased. */
static void start_adaptive_erased(void) {
  fshm_permit permit;
  start_adaptive();
  if (take_adaptive(&permit) != FSHM_ALLOWED || !fshm_permit_release(world.l, &permit))
    broken("no permit to begin with");
  const keyed_t k = side_of(world.permit_leases, KEY);
  found_t f;
  if (!word_look(&k, LEARNED_LIMIT, &f)) broken("there is no limit to begin with");
  store_relaxed(&world.s->slots[f.slot].when, 0);
}

static void run_adaptive_take(outcome_t *out) { out->status = take_adaptive(&out->permit); }
static void run_adaptive_refused(outcome_t *out) { out->status = report_call(1, 0); }
static void run_adaptive_served(outcome_t *out) { out->status = report_call(0, 0); }
static void run_adaptive_pause(outcome_t *out) { out->status = report_call(1, PER); }
static void run_adaptive_forget(outcome_t *out) {
  out->status = fshm_adaptive_forget(world.l, world.permit_leases, &learning, KEY, strlen(KEY));
}

static uint32_t adaptive_exhaust(void) {
  fshm_permit permits[MOST_TAKEN];
  uint32_t taken = 0;
  while (taken < MOST_TAKEN && take_adaptive(&permits[taken]) == FSHM_ALLOWED) taken++;
  uint32_t held = held_alive(world.l, KEY);
  for (uint32_t i = 0; i < taken; i++)
    if (!fshm_permit_release(world.l, &permits[i])) broken("a permit cannot be released");
  return held;
}

/* How things are after one or two of the operation, or after a part of it. */
static void adaptive_fits(void) {
  const fshm_learned known = learned_now();
  const uint32_t limit = op->full ? op->full : op->before;
  if (!known.limit) {
    if (limit) broken("the limit is gone");
    return;
  }
  if (known.limit < learning.least || known.limit > learning.most)
    broken("the limit is %u", known.limit);
  if (op->op == ADAPTIVE_TAKE && known.limit != (limit ? limit : learning.initial))
    broken("the limit is %u, and nobody has moved it", known.limit);
  if (op->op == ADAPTIVE_REFUSED && known.limit > limit)
    broken("refused, and the limit is %u", known.limit);
  if (op->op == ADAPTIVE_SERVED && known.limit < limit)
    broken("served, and the limit is %u", known.limit);
  if (op->op == ADAPTIVE_SERVED && known.limit > limit + 1)
    broken("one round raised it to %u", known.limit);
  if (known.paused_ns) return;
  const uint32_t most = adaptive_exhaust(), holds = op->prior;
  if (most < max_u64(known.limit, holds) && !told->done && op->op == ADAPTIVE_TAKE) return;
  if (most > max_u64(known.limit, held_at_start + 1))
    broken("%u can be held of %u", most, known.limit);
}

static void adaptive_begin(void) { held_at_start = held_alive(world.l, KEY); }
static void adaptive_end(void) {
  if (told->status != op->status) broken("it answers %d, not %d", told->status, op->status);
  if (op->after && learned_now().limit != op->after) broken("the limit is %u", learned_now().limit);
}

static void adaptive_contend(void) {
  outcome_t mine = {0};
  const fshm_learned before = learned_now();
  const uint32_t held = held_alive(world.l, KEY),
                 limit = before.limit ? before.limit : learning.initial;
  op->run(&mine);
  if (op->op == ADAPTIVE_TAKE) {
    if ((held < limit) != (mine.status == FSHM_ALLOWED))
      broken("%u of %u are held, and S is answered %d", held, limit, mine.status);
    if (mine.status == FSHM_ALLOWED && !fshm_permit_release(world.l, &mine.permit))
      broken("S cannot release its permit");
  } else if (mine.status != FSHM_OK) {
    broken("S is answered %d", mine.status);
  }
  if (op->run == run_adaptive_pause && take_adaptive(&mine.permit) != FSHM_DENIED)
    broken("it is paused, and S is admitted");
  adaptive_fits();
}

static void adaptive_survive(void) {
  if (held_alive(world.l, KEY) != op->prior) broken("%u are held", held_alive(world.l, KEY));
  adaptive_fits();
  if (op->op == ADAPTIVE_TAKE) {
    const fshm_learned known = learned_now();
    const uint32_t most = adaptive_exhaust();
    if (known.limit && most != max_u64(known.limit, op->prior))
      broken("%u can be held, and the limit is %u", most, known.limit);
  }
  /* Others learn on: the limit moves. */
  const uint32_t before = learned_now().limit;
  if (!learned_now().paused_ns && before > 1) {
    for (int i = 0; i < 50; i++) {
      world.now += PER;
      const fshm_sample sample = {world.now - 1, 1, 6, 1};
      if (fshm_adaptive_end(world.l, world.permit_leases, &learning, KEY, strlen(KEY), &sample, 0,
                            world.now) != FSHM_OK)
        broken("a later call teaches nothing");
    }
    world.now = NOW;
    if (learned_now().limit != 1) broken("50 refusals, and the limit is %u", learned_now().limit);
  }
  check_invariants(true);
}

static void adaptive_raced(const outcome_t *mine) {
  const uint32_t held = held_alive(world.l, KEY);
  if (op->op == ADAPTIVE_TAKE) {
    const uint32_t both = (told->status == FSHM_ALLOWED) + (mine->status == FSHM_ALLOWED);
    const uint32_t limit = learned_now().limit;
    if (held != held_at_start + both) broken("%u are held after both", held);
    if (held > max_u64(limit, held_at_start)) broken("%u are held of %u", held, limit);
    if (both != min_u64(2, minus(limit, held_at_start)))
      broken("%u of T and S were admitted", both);
  } else if (told->status != FSHM_OK || mine->status != FSHM_OK) {
    broken("they are answered %d and %d", told->status, mine->status);
  }
  check_invariants(false);
}

static const holds_t adaptive = {adaptive_begin,   adaptive_end,   adaptive_contend,
                                 adaptive_survive, adaptive_raced, NULL};
