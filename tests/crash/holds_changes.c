/* holds_changes.c - what must hold while the limits change under a call, and while they are changed: time stands still,
 * so a key has consumed a number of tokens, whatever its limits were, are and become. Each call adds to it or takes from
 * it what it says, no change does; and the next process can change the limits as often as it likes. */
#include "crash.h"

#define PLENTY 1000 /* no key consumes as much */
#define KEYS 17
static const char *const keys[KEYS] = {KEY,  "k1", "k2", "k3", "k4", "k5", "k6", "k7", "k8",
                                       "k9", "ka", "kb", "kc", "kd", "ke", "kf", "kg"};

typedef struct {
  uint64_t of[KEYS][FSHM_MAX_LIMITS];
} consumed_t;

static consumed_t consumed_before, consumed_stopped;
static outcome_t answered; /* T's answer, undisturbed */
static uint64_t added; /* by S, to KEY, in each limit */
static bool forgotten; /* S has reset the limiter */

static void set_at(const fshm_limit *limits, uint32_t count) {
  outcome_t set;
  publish_limits(&set, limits, count);
  if (set.status != FSHM_OK) broken("S cannot change the limits: %d", set.status);
}

/* The same kinds and periods, with as many tokens. Of a bucket: as long an interval, whatever n. */
static void with_n(fshm_limit *limits, uint64_t n, uint64_t longer) {
  for (uint32_t i = 0; i < op->count; i++) {
    limits[i] = op->limits[i];
    limits[i].n = limits[i].burst = n;
    if (limits[i].kind != FSHM_BUCKET) continue;
    limits[i].per_ns = n * (op->limits[i].per_ns / op->limits[i].n + longer);
  }
}

/* Under limits that have room for all, on a copy. */
static consumed_t consumed_now(void) {
  static unsigned char *saved;
  consumed_t out = {{{0}}};
  fshm_limit plenty[FSHM_MAX_LIMITS];
  segment_save(&saved);
  with_n(plenty, PLENTY, 0);
  set_at(plenty, op->count);
  for (uint32_t k = 0; k < KEYS; k++) {
    levels_t l = levels_of(world.l, keys[k]);
    for (uint32_t i = 0; i < l.count; i++) out.of[k][i] = PLENTY - l.remaining[i];
  }
  segment_restore(saved);
  return out;
}

static void check_consumed_of(const consumed_t *seen, uint32_t k, uint32_t i, uint64_t wanted,
                              const char *when) {
  if (seen->of[k][i] != wanted)
    broken("%s, key %u has consumed %llu of limit %u, not %llu", when, k,
           (unsigned long long)seen->of[k][i], i, (unsigned long long)wanted);
}

/* What T's call adds, if it was allowed; to others nothing. */
static int64_t change_of(bool allowed) {
  if (op->op == FSHM_CHARGE) return op->cost;
  if (op->op == FSHM_REFUND) return -(int64_t)op->cost;
  if (op->op == OTHER_OP) return (int64_t)op->cost - 3; /* run_settle() */
  return allowed ? op->cost : 0;
}

/* S's calls, while T stands: changes of the limits, and perhaps a charge at their end. */

/* SLOW: limits that nothing fits, and under which all is over later: what lives under others stays there. */
static uint64_t
    turn; /* anew for each boundary: no two alike within it, and the same ones in every run */
static void change_many(uint32_t count) {
  fshm_limit limits[FSHM_MAX_LIMITS];
  for (uint32_t j = 0; j < count; j++) {
    turn = turn % 250 + 1;
    with_n(limits, op->flags & SLOW ? 1 : 20 + turn, turn * 400000000003);
    for (uint32_t i = 0; op->flags & SLOW && i < op->count; i++)
      limits[i].per_ns += limits[i].kind == FSHM_BUCKET ? 0 : turn;
    set_at(limits, op->count);
  }
}
static void end_with_next(void) { set_at(op->next, op->next_count); }
static void charge_one(void) {
  if (apply_at(world.l, FSHM_CHARGE, KEY, 1, NOW).status != FSHM_ALLOWED) broken("S cannot charge");
  added = 1;
}
static void over_once(void) { end_with_next(); }
static void over_forth(void) {
  end_with_next();
  set_at(op->limits, op->count);
}
static void over_forth_charged(void) {
  end_with_next();
  charge_one();
  set_at(op->limits, op->count);
}
static void over_many(void) {
  change_many(20);
  end_with_next();
}
static void over_many_charged(void) {
  change_many(20);
  end_with_next();
  charge_one();
}
static void over_twice(void) {
  change_many(40);
  end_with_next();
}
/* So many sweeps that the next one's epoch is the present one again: then T would find the slot that it has seen, where
 * nothing has touched it (csrc/DESIGN.md, "Limits that change"). */
static void over_epochs(void) {
  const uint64_t one = UINT64_C(1) << VERSION_BITS,
                 last = entry_current(world.s, world.l->index) - one;
  for (int i = 0; i < 1000; i++) {
    if (CURRENT_EPOCH(entry_current(world.s, world.l->index)) == CURRENT_EPOCH(last)) break;
    change_many(1);
  }
  end_with_next();
}
static void over_reset(void) {
  if (fshm_reset_all(world.l) != FSHM_OK) broken("S cannot reset the limiter");
  forgotten = true;
}

/* A limiter with op->limits, under which the key has consumed op->prior; or, HELD_BACK, more than they admit: under
 * limits that were lowered since. */
static void start_changes(void) {
  open_segment();
  world.now = NOW;
  fshm_limit higher[FSHM_MAX_LIMITS];
  with_n(higher, 30, 7000000049);
  world.l = named("limits", op->flags & HELD_BACK ? higher : op->limits, op->count);
  if (op->prior) (void)apply_at(world.l, FSHM_ACQUIRE, KEY, op->prior, NOW);
  if (op->flags & HELD_BACK) fshm_limiter_close(named("limits", op->limits, op->count));
  if (!(op->flags & UNUSED_RULE)) (void)apply_at(world.l, FSHM_ACQUIRE, keys[1], 1, NOW);
  (void)apply_at(world.others, FSHM_ACQUIRE, "beside", 1, NOW);
}

static void changes_begin(void) { consumed_before = consumed_now(); }

static void changes_end(void) {
  answered = *told;
  if (told->status != op->status) broken("it answers %d, not %d", told->status, op->status);
  consumed_t seen = consumed_now();
  for (uint32_t i = 0; i < op->count; i++)
    check_consumed_of(&seen, 0, i,
                      consumed_before.of[0][i] + (uint64_t)change_of(told->status == FSHM_ALLOWED),
                      "after it");
}

/* T stands, or is dead: KEY is as before or as after it, in each limit; others are as before. */
static void check_stopped(void) {
  consumed_t seen = consumed_stopped = consumed_now();
  for (uint32_t i = 0; i < op->count; i++) {
    uint64_t before = consumed_before.of[0][i];
    if (seen.of[0][i] != before + (uint64_t)change_of(true))
      check_consumed_of(&seen, 0, i, before, "stopped");
    check_consumed_of(&seen, 1, i, consumed_before.of[1][i], "stopped");
  }
}

static void overtake_by_changes(void) {
  added = 0;
  forgotten = false;
  op->overtake();
}

static void check_overtaken(const consumed_t *from) {
  consumed_t seen = consumed_now();
  for (uint32_t k = 0; k < 2; k++)
    for (uint32_t i = 0; i < op->count; i++)
      check_consumed_of(&seen, k, i, forgotten ? 0 : from->of[k][i] + (k ? 0 : added),
                        "after the changes");
}

static void changes_contend(void) {
  check_stopped();
  overtake_by_changes();
  check_overtaken(&consumed_stopped);
  check_labels();
}

static void changes_survive(void) {
  check_stopped();
  if (told->done && told->status != op->status)
    broken("T says %d, not %d", told->status, op->status);
  overtake_by_changes();
  check_overtaken(&consumed_stopped);
  consumed_t now = consumed_now();
  check_invariants(true);
  change_many(2 * RULES);
  forgotten = false, added = 0;
  check_overtaken(&now);
}

/* S has changed the limits; then T went on to its end. */
static void changes_raced(const outcome_t *mine) {
  (void)mine;
  consumed_t seen = consumed_now();
  bool allowed = told->status == FSHM_ALLOWED, all = true, fits = true;
  fshm_limit now[FSHM_MAX_LIMITS];
  uint64_t version;
  if (fshm_limiter_limits(world.l, now, &version) != (int)op->count) broken("other limits");
  for (uint32_t i = 0; i < op->count; i++) {
    all &= consumed_stopped.of[0][i] != consumed_before.of[0][i];
    fits &= consumed_stopped.of[0][i] + added + op->cost <= now[i].n;
  }
  if (forgotten) fits = true;
  /* By the limits as they were, if it had charged; or, where the key has changed since, as they are. */
  if (op->op == FSHM_ACQUIRE && (added || forgotten) && answered.status == FSHM_ALLOWED &&
      allowed != (all || fits))
    broken("T is answered %d, and %s", told->status, fits ? "it fits" : "it does not fit");
  for (uint32_t i = 0; i < op->count; i++) {
    bool was = consumed_stopped.of[0][i] != consumed_before.of[0][i];
    uint64_t wanted = consumed_before.of[0][i] + added + (uint64_t)change_of(allowed);
    if (forgotten) {
      was = op->op == FSHM_ACQUIRE ? all : was;
      wanted = was || change_of(allowed) < 0 ? 0 : (uint64_t)change_of(allowed);
    }
    check_consumed_of(&seen, 0, i, wanted, "after both");
    check_consumed_of(&seen, 1, i, forgotten ? 0 : consumed_before.of[1][i], "after both");
  }
  check_invariants(false);
}

/* As S overtakes T: how things are, then its changes. */
static void overtake_counted(void) {
  check_stopped();
  overtake_by_changes();
}

static const holds_t changes = {changes_begin,   changes_end,   changes_contend,
                                changes_survive, changes_raced, overtake_counted};

/* Permits: others raise the limit, take many, and lower it, within T's call. */

#define RAISED 7
static fshm_permit raised_permits[RAISED];
static uint32_t raised_held;

/* As processes that have not looked for permits beyond the limit within this second: they do. */
static void look_beyond(void) { world.l->beyond = 0; }

static void raise_limit_to(uint32_t most) {
  const fshm_limit raised = {most, 0, 0, FSHM_PERMITS, 0};
  fshm_decision d;
  uint32_t held;
  set_at(&raised, 1);
  raised_held = 0;
  for (uint32_t i = 0; i < RAISED; i++) {
    fshm_admit(world.l, KEY, strlen(KEY), NULL, NOW, &raised_permits[raised_held], &d, &held);
    raised_held += d.status == FSHM_ALLOWED;
  }
  set_at(op->next, op->next_count);
}
static void raise_take_lower(void) { raise_limit_to(RAISED); }
/* No higher than it ever was. */
static void raise_as_before(void) { raise_limit_to((uint32_t)op->limits[0].n); }

/* The limit is lowered, and the rest of it taken: each holder is counted. */
static void lower_take(void) {
  fshm_decision d;
  uint32_t held;
  look_beyond();
  set_at(op->next, op->next_count);
  raised_held = 0;
  fshm_admit(world.l, KEY, strlen(KEY), NULL, NOW, &raised_permits[0], &d, &held);
  raised_held = d.status == FSHM_ALLOWED;
}
static void begin_high(void) {
  look_beyond();
  world.l->frontier = (uint32_t)op->limits[0].n - 1;
}

static void check_raised(const char *when) {
  fshm_permit permit;
  fshm_decision d;
  uint32_t alive = held_alive(world.l, KEY), n = (uint32_t)op->next[0].n, held;
  uint32_t counted = fshm_in_flight(world.l, KEY, strlen(KEY));
  if (counted != alive) broken("%s, %u are in flight, and %u are told", when, alive, counted);
  fshm_admit(world.l, KEY, strlen(KEY), NULL, NOW, &permit, &d, &held);
  if (d.status == FSHM_ALLOWED && alive >= n) broken("%s, one more than %u of %u", when, alive, n);
  if (d.status != FSHM_ALLOWED && alive < n)
    broken("%s, none is granted at %u of %u", when, alive, n);
  if (d.status == FSHM_ALLOWED) (void)fshm_permit_release(world.l, &permit);
}

static void release_raised(void) {
  for (uint32_t i = 0; i < raised_held; i++)
    if (!fshm_permit_release(world.l, &raised_permits[i])) broken("a permit cannot be released");
}

static void raised_end(void) {
  if (told->status != op->status) broken("it answers %d, not %d", told->status, op->status);
}
static void raised_contend(void) {
  op->overtake();
  check_raised("beside T");
  release_raised();
  uint32_t alive = held_alive(world.l, KEY), counted = fshm_in_flight(world.l, KEY, strlen(KEY));
  if (counted != alive) broken("%u are in flight, and %u are told", alive, counted);
}
static void raised_survive(void) {
  op->overtake();
  if (op->overtake == raise_take_lower && raised_held + op->prior != RAISED)
    broken("%u are granted of %d", raised_held, RAISED);
  check_raised("after its death");
  release_raised();
  check_raised("in the end");
  check_invariants(true);
}
static void raised_raced(const outcome_t *mine) {
  (void)mine;
  if (op->overtake == lower_take && held_alive(world.l, KEY) > op->next[0].n)
    broken("%u are held, and the last was granted under %u", held_alive(world.l, KEY),
           (uint32_t)op->next[0].n);
  check_raised("after both");
  release_raised();
  check_raised("in the end");
  uint32_t alive = held_alive(world.l, KEY), taken = 0, held;
  fshm_permit permits[RAISED + 1];
  fshm_decision d;
  do fshm_admit(world.l, KEY, strlen(KEY), NULL, NOW, &permits[taken], &d, &held);
  while (d.status == FSHM_ALLOWED && taken++ < RAISED);
  if (alive + taken != max_u64(alive, op->next[0].n))
    broken("%u were held, and %u more are granted", alive, taken);
  check_invariants(false);
}
static void overtake_raised(void) { op->overtake(); }
static const holds_t raising = {NULL,           raised_end,   raised_contend,
                                raised_survive, raised_raced, overtake_raised};

/* Changes that need a sweep: all slots are in use, since keys live under all rules. */

enum { SOME_FIT, NONE_FITS, LONE };

/* Each key under a rule of its own. LONE: one of them of a second limit, which is there no more. */
static void start_sweep(void) {
  open_segment();
  world.now = NOW;
  fshm_limit limits[FSHM_MAX_LIMITS];
  for (uint32_t k = 0; k < RULES; k++) {
    with_n(limits, 60 - 2 * k, k * 1000000007);
    uint32_t count = op->cost == LONE && !k ? 2 : 1;
    if (count == 2) limits[1] = (fshm_limit){40, PER / 2, 0, FSHM_WINDOW, 0};
    if (op->cost == LONE && k == 1) with_n(limits, 60, 0); /* the same rule, alone */
    fshm_limiter *l = named("limits", limits, count);
    const uint64_t some = k % 2 ? 5 : 60 - 2 * k, all = 60 - 2 * k;
    const uint64_t used[FSHM_MAX_LIMITS] = {op->cost == SOME_FIT ? some : all, 1, 0, 0};
    fshm_decision d;
    fshm_apply(l, FSHM_ACQUIRE, keys[k], strlen(keys[k]), used, 0, NOW, &d);
    if (world.l) fshm_limiter_close(world.l);
    world.l = l;
  }
  (void)apply_at(world.others, FSHM_ACQUIRE, "beside", 1, NOW);
}

static uint32_t count_free_rules(void) {
  uint32_t found = 0;
  for (uint32_t k = 0; k < RULES; k++)
    found += !load_relaxed(&world.s->limiters[world.l->index].owners[k]);
  return found;
}

static void sweep_begin(void) {
  consumed_before = consumed_now();
  for (uint32_t k = 0; k < RULES; k++)
    if (!consumed_before.of[k][0] && keys[k]) broken("key %u has consumed nothing", k);
  if (count_free_rules()) broken("%u rule indexes are free to begin with", count_free_rules());
}

/* added: to KEY, what was taken from the next. */
static void check_swept(const char *when) {
  consumed_t seen = consumed_now();
  for (uint32_t k = 0; k < RULES; k++) {
    uint64_t wanted = consumed_before.of[k][0];
    if (k == 0) wanted += added;
    if (k == 1) wanted -= added;
    check_consumed_of(&seen, k, 0, wanted, when);
  }
  check_labels();
}

static void sweep_end(void) {
  added = 0;
  if (told->status != op->status) broken("it answers %d, not %d", told->status, op->status);
  check_swept("after it");
}

/* What others do during a sweep: they charge, change the limits, for which they sweep, and give back, under
 * limits that have room: so that a key leaves a rule that another one has just come under. */
static void meddle_with_sweep(void) {
  fshm_limit limits[FSHM_MAX_LIMITS];
  charge_one();
  change_many(position.k % 4 ? 1 : 20);
  with_n(limits, 500 + position.k % 100, 0);
  set_at(limits, 1);
  if (apply_at(world.l, FSHM_REFUND, keys[1], 1, NOW).status != FSHM_ALLOWED)
    broken("S cannot refund");
}

static void sweep_contend(void) {
  added = 0;
  check_swept("stopped");
  meddle_with_sweep();
  check_swept("beside T");
}

static void sweep_survive(void) {
  added = 0;
  check_swept("killed");
  check_invariants(true);
  meddle_with_sweep();
  check_swept("after it was killed");
  change_many(2 * RULES);
  check_swept("after many changes");
}

static void sweep_raced(const outcome_t *mine) {
  (void)mine;
  if (told->status != op->status) broken("T is answered %d", told->status);
  check_swept("after both");
  check_invariants(false);
  change_many(2 * RULES);
  check_swept("after many changes");
}

static void overtake_sweep(void) {
  added = 0;
  meddle_with_sweep();
}

static const holds_t sweeping = {sweep_begin,   sweep_end,   sweep_contend,
                                 sweep_survive, sweep_raced, overtake_sweep};
