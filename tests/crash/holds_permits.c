/* holds_permits.c - what must hold of permits: never more than n are held, what a dead process held comes
 * back, what a living one holds stays, and all that is left can be taken. */
#include "crash.h"

#define MOST_TAKEN 16

static uint32_t held_at_start; /* by S and T */

static uint32_t permits_limit(fshm_limiter *l) {
  snapshot_t snapshot;
  return limits_load(world.s, l->index, &snapshot) ? snapshot.permits : 0;
}

/* Take permits (of a pool: both kinds) until refused. Returns how many. */
static uint32_t take_many(fshm_permit *permits, fshm_permit *totals) {
  fshm_decision d;
  uint32_t taken = 0, held;
  for (; taken < MOST_TAKEN; taken++) {
    fshm_admit(world.l, KEY, strlen(KEY), NULL, world.now, &permits[taken], &d, &held);
    if (d.status != FSHM_ALLOWED) break;
    if (!world.totals) continue;
    fshm_admit(world.totals, "", 0, NULL, world.now, &totals[taken], &d, &held);
    if (d.status == FSHM_ALLOWED) continue;
    (void)fshm_permit_release(world.l, &permits[taken]);
    break;
  }
  return taken;
}

static uint32_t fit_beside(uint32_t held) {
  uint32_t n = permits_limit(world.l), fit = n > held ? n - held : 0;
  if (world.totals) fit = (uint32_t)min_u64(fit, minus(permits_limit(world.totals), held));
  return fit;
}

/* A process that comes anew finds as much room as S, and dies with it. */
static int fresh_takes_all(void) {
  fshm_permit permits[MOST_TAKEN + 1], totals[MOST_TAKEN + 1];
  return take_many(permits, totals) == fit_beside(op->prior);
}

static void permits_begin(void) {
  levels_before = levels_of(world.l, KEY);
  held_at_start = held_alive(world.l, KEY);
}

static void permits_end(void) {
  if (told->status != op->status) broken("it answers %d, not %d", told->status, op->status);
  levels_after = levels_of(world.l, KEY);
}

static void contend_take(void) {
  outcome_t mine = {0};
  uint32_t held = held_alive(world.l, KEY), n = permits_limit(world.l);
  bool fits = held < n;
  if (world.totals) fits &= held_alive(world.totals, "") < permits_limit(world.totals);
  int status = op->status < 0 ? op->status : fits ? FSHM_ALLOWED : FSHM_DENIED;
  op->run(&mine);
  if (mine.status != status)
    broken("%u of %u are held, and S is answered %d", held, n, mine.status);
  uint32_t after = held_alive(world.l, KEY);
  if (after != held + (mine.status == FSHM_ALLOWED))
    broken("%u are held after S, before %u", after, held);
}

/* S takes all that is left, and gives it back: what the dead held, and nothing beyond the limit. */
static void contend_for_the_rest(uint32_t held) {
  fshm_permit permits[MOST_TAKEN + 1], totals[MOST_TAKEN + 1];
  uint32_t taken = take_many(permits, totals);
  if (taken != fit_beside(held))
    broken("T is stopped, and %u can be taken, not %u", taken, fit_beside(held));
  for (uint32_t i = 0; i < taken; i++)
    if (!fshm_permit_release(world.l, &permits[i])) broken("a permit cannot be released");
}

/* T's description of its permit does not make it S's. */
static void check_not_mine(const fshm_permit *theirs, fshm_limiter *l) {
  fshm_permit copy = *theirs;
  if (!told->done || !copy.held) return;
  if (fshm_permit_idle(l, &copy, 1)) broken("S has marked T's permit");
  if (fshm_permit_release(l, &copy)) broken("S has released T's permit");
}

/* A forked child has what its parent holds in its memory, and does not hold it. */
static int release_as_child(void) {
  fshm_permit copy = world.permit;
  return fshm_permit_idle(world.l, &copy, 1) + fshm_permit_release(world.l, &copy);
}

static int join_anew(void) {
  uint32_t process;
  uint64_t incarnation;
  return process_identity(world.s, &process, &incarnation);
}

static void permits_contend(void) {
  outcome_t mine = {0};
  uint32_t held = held_alive(world.l, KEY);
  if (op->op == TAKE) {
    check_not_mine(&told->permit, world.l);
    check_not_mine(&told->total, world.totals);
    contend_take();
    return;
  }
  if (op->op == JOIN) {
    if (fresh_process(join_anew) != 1) broken("a new process cannot join");
    contend_for_the_rest(op->prior);
    if (fshm_in_flight(world.l, KEY, strlen(KEY)) != op->prior)
      broken("T joins, and a dead process's permits count as T's");
    return;
  }
  if (op->op == LOWER) contend_for_the_rest(held);
  op->run(&mine);
  if (mine.status != op->status) broken("S is answered %d, not %d", mine.status, op->status);
  if (op->op == COUNT_HELD && mine.number != held)
    broken("S counts %llu, not %u", (unsigned long long)mine.number, held);
  uint32_t after = held_alive(world.l, KEY);
  if (after != held - (op->op == RELEASE)) broken("%u are held after S, before %u", after, held);
  if (op->op == LOWER) contend_for_the_rest(held);
}

static void permits_survive(void) {
  fshm_permit permits[MOST_TAKEN + 1], totals[MOST_TAKEN + 1];
  forget_looks();
  if (told->done && told->status != op->status)
    broken("T says %d, not %d", told->status, op->status);
  levels_t seen = levels_of(world.l, KEY);
  if (!known_levels(&seen)) broken("consumption is neither as before nor as after");
  check_not_mine(&told->permit, world.l);
  check_not_mine(&told->total, world.totals);
  if ((op->op == RELEASE || op->op == IDLE_MARK) && fresh_process(release_as_child))
    broken("a forked child has released its parent's permit");
  if (op->op == LOWER && told->done && permits_limit(world.l) != op->next[0].n)
    broken("T says that it has set the limit, and it is %u", permits_limit(world.l));
  if (position.k % 16 == 0 && !(op->flags & CROWDED))
    if (fresh_process(fresh_takes_all) != 1)
      broken("a new process does not find the room that is left");
  for (int round = 0; round < 2; round++) {
    uint32_t held = fshm_in_flight(world.l, KEY, strlen(KEY));
    if (held != op->prior) broken("%u count as held, and the living hold %u", held, op->prior);
    if (held_alive(world.l, KEY) != op->prior) broken("the living have lost a permit");
    uint32_t taken = take_many(permits, totals);
    uint32_t fit = op->flags & CROWDED && op->status < 0 ? 0 : fit_beside(op->prior);
    if (taken != fit) broken("%u can be taken, not %u", taken, fit);
    check_invariants(true);
    for (uint32_t i = 0; i < taken; i++) {
      if (!fshm_permit_release(world.l, &permits[i])) broken("a permit cannot be released");
      if (world.totals && !fshm_permit_release(world.totals, &totals[i]))
        broken("a permit of the pool cannot be released");
    }
  }
  (void)fshm_reap(world.s, 0);
  if (fshm_in_flight(world.l, KEY, strlen(KEY)) != op->prior)
    broken("a reap takes from the living");
}

static void permits_raced(const outcome_t *mine) {
  uint32_t held = held_alive(world.l, KEY), n = permits_limit(world.l);
  uint32_t most = (uint32_t)max_u64(n, held_at_start);
  if (held > most) broken("%u are held, of %u", held, most);
  if (op->op == TAKE) {
    uint32_t admitted = (told->status == FSHM_ALLOWED) + (mine->status == FSHM_ALLOWED);
    uint32_t fit = op->status < 0 ? 0 : (uint32_t)min_u64(2, minus(n, held_at_start));
    if (world.totals)
      fit = (uint32_t)min_u64(fit, minus(permits_limit(world.totals), held_at_start));
    /* under a lowered limit, two that count at once may both give back: DESIGN.md, "Permits" */
    if (admitted > fit || (admitted < fit && !op->next_count))
      broken("of T and S, %u were admitted, not %u", admitted, fit);
    if (held != held_at_start + admitted) broken("%u are held after both", held);
    if (world.totals && held_alive(world.totals, "") != held) broken("the pool counts otherwise");
  } else {
    if (told->status != op->status || mine->status != op->status)
      broken("T and S are answered %d and %d", told->status, mine->status);
    if (held != held_at_start - 2 * (op->op == RELEASE)) broken("%u are held after both", held);
  }
  check_invariants(false);
}

static const holds_t permits = {permits_begin,   permits_end,   permits_contend,
                                permits_survive, permits_raced, NULL};
/* S has been denied, and goes by what it remembers: T's release that is over is seen at once, and what T did not come
 * to say, or held when it died, within a second. */
static int admitted_now(fshm_permit *out) {
  fshm_decision d;
  uint32_t held;
  fshm_admit(world.l, KEY, strlen(KEY), NULL, 0, out, &d, &held);
  return d.status == FSHM_ALLOWED;
}

static uint64_t remembered_look[LOOK_WORDS];

static void remembered_begin(void) {
  fshm_permit p;
  permits_begin();
  if (admitted_now(&p)) broken("S is admitted beyond the limit");
  const uint64_t hash = fshm_siphash(world.l->key[0], world.l->key[1], KEY, strlen(KEY));
  if (!look_load(world.s, hash, fshm_now(world.s), remembered_look))
    broken("S does not remember that it was denied");
}

/* S looked before T began, 20 ms before its look is too old. */
static void remember_look(void) {
  const uint64_t hash = fshm_siphash(world.l->key[0], world.l->key[1], KEY, strlen(KEY));
  remembered_look[LOOK_UNTIL] = fshm_now(world.s) + UINT64_C(20000000);
  look_store(world.s, hash, remembered_look);
}

static void remembered_contend(void) {
  fshm_permit p;
  remember_look();
  bool over = told->done;
  if (admitted_now(&p))
    (void)fshm_permit_release(world.l, &p);
  else if (over)
    broken("T's release is over, and S is denied");
}

static void remembered_survive(void) {
  fshm_permit p;
  remember_look();
  const uint64_t end = fshm_now(world.s) + UINT64_C(1000000000);
  bool over = told->done;
  while (!admitted_now(&p)) {
    if (over) broken("T's release is over, and S is denied");
    if (fshm_now(world.s) > end) broken("T is dead, and S is denied for a second");
    if (over || fshm_now(world.s) > end) return;
  }
  (void)fshm_permit_release(world.l, &p);
  permits_survive();
}

static const holds_t remembered = {remembered_begin,   permits_end, remembered_contend,
                                   remembered_survive, NULL,        NULL};
static const holds_t joining = {permits_begin,   permits_end, permits_contend,
                                permits_survive, NULL,        NULL};

/* S's permits are taken back by force, one after the other; T's own stays while T lives. */
static uint32_t harness_pid;

static void start_by_force(void) {
  start_permits();
  harness_pid = (uint32_t)getpid();
}

/* lives: T does, and holds one. */
static uint64_t taken_back(bool lives) { return op->prior + lives - held_alive(world.l, KEY); }

static void by_force_begin(void) {
  if (taken_back(true)) broken("T and S do not hold what they should");
}

static void by_force_end(void) {
  if (told->status != op->status || told->number != op->prior || taken_back(true) != op->prior)
    broken("%llu were taken back, and it says %llu", (unsigned long long)taken_back(true),
           (unsigned long long)told->number);
}

static void by_force_contend(void) {
  outcome_t mine = {0};
  uint64_t before = taken_back(true);
  op->run(&mine);
  if (mine.number != op->prior - before || taken_back(true) != op->prior)
    broken("S took %llu back after %llu, and %llu are", (unsigned long long)mine.number,
           (unsigned long long)before, (unsigned long long)taken_back(true));
}

static void by_force_survive(void) {
  fshm_permit permits[MOST_TAKEN + 1];
  uint64_t before = taken_back(false);
  if (told->done && (before != op->prior || told->number != op->prior))
    broken("T says that all were taken back, and %llu were", (unsigned long long)before);
  fshm_permit own = world.permit; /* S's last one */
  if (told->done && (fshm_permit_held(world.l, &own) || fshm_permit_release(world.l, &own)))
    broken("what was taken back can be released");
  uint32_t taken = take_many(permits, NULL);
  if (taken != fit_beside(op->prior - (uint32_t)before)) broken("%u can be taken", taken);
  for (uint32_t i = 0; i < taken; i++)
    if (!fshm_permit_release(world.l, &permits[i])) broken("a permit cannot be released");
  if (fshm_reap(world.s, harness_pid) != op->prior - before || held_alive(world.l, KEY))
    broken("not all can be taken back");
}

static void by_force_raced(const outcome_t *mine) {
  if (told->number + mine->number != op->prior || taken_back(true) != op->prior)
    broken("T and S took %llu and %llu back", (unsigned long long)told->number,
           (unsigned long long)mine->number);
  check_invariants(false);
}

static const holds_t by_force = {by_force_begin,   by_force_end,   by_force_contend,
                                 by_force_survive, by_force_raced, NULL};
