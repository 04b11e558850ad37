/* test_turns.c - limits that change while a call, a writer or a sweeper is stopped at any access: every schedule. Each
 * test is a way in which a limit could have been broken (DESIGN.md, "Limits that change"). */
#include "turns.h"

#define SECOND UINT64_C(1000000000)
#define HOUR (3600 * SECOND)
#define NOW (100 * HOUR)

/* n tokens, one each `interval` seconds. */
static fshm_limit bucket(uint64_t n, uint64_t interval) {
  return (fshm_limit){n, n * interval * SECOND, n, FSHM_BUCKET, 0};
}
static fshm_limit window(uint64_t n) { return (fshm_limit){n, HOUR, 0, FSHM_WINDOW, 0}; }
static fshm_limit permits_of(uint64_t n) { return (fshm_limit){n, 0, 0, FSHM_PERMITS, 0}; }

static int set_limits(const fshm_limit *limits, uint32_t count, uint64_t now) {
  fshm_limiter *out;
  int status = fshm_limiter_open_at(s, "a", 1, limits, count, now, &out);
  fshm_limiter_close(out);
  return status;
}

static void begin_test(const fshm_limit *limits, uint32_t count) {
  s = fresh_segment(1);
  l = fresh_limiter(s, "a", limits, count);
  CHECK_EQ(l->index, 0);
  (void)process_index(s);
}
static void end_test(void) {
  meanwhile = NULL, always = NULL;
  time_is = 0;
  fshm_limiter_close(l);
  fshm_close(s);
}

static bool in(const volatile void *at, const volatile void *from, size_t size) {
  return (uintptr_t)at - (uintptr_t)from < size;
}
static bool of_a_slot(const volatile void *at) {
  return in(at, s->slots, s->slot_count * sizeof(slot_t));
}
static bool of_limits(const volatile void *at) { /* who, most, current, set, owners: no rule */
  const limiter_entry_t *e = &s->limiters[0];
  return in(at, e, offsetof(limiter_entry_t, rules));
}
static bool swaps_and_slots(const volatile void *at, bool swap) {
  return of_a_slot(at) || (swap && of_limits(at));
}
static uint64_t owner_of(unsigned rule) { return load_relaxed(&s->limiters[0].owners[rule]); }
static unsigned rules_used(void) {
  unsigned used = 0;
  for (unsigned i = 0; i < RULES; i++) used += owner_of(i) != 0;
  return used;
}
static void check_named_are_used(void) {
  uint64_t set = load_relaxed(&s->limiters[0].set);
  for (uint32_t i = 0; i < SET_COUNT(set); i++) CHECK(owner_of(SET_RULE(set, i)) & RULE_USED);
}

/* A request is charged to its first limit, of which the state thereby leaves an earlier rule; a sweep frees that rule's
 * rule index, and another rule gets it; then the second limit denies, and the first charge is taken back. */
#define PRIOR 3
static fshm_decision answer;
static int written;
static void acquire_two(void) { answer = apply_at(l, FSHM_ACQUIRE, "k", 1, NOW); }
static void fill_second(void) {
  const fshm_limit next[2] = {bucket(100, 50), window(PRIOR)};
  written = set_limits(next, 2, NOW);
}
static void verify_undone(void) {
  const fshm_limit more[2] = {bucket(100, 50), window(10)};
  uint64_t left[FSHM_MAX_LIMITS], consumed = PRIOR + (answer.status == FSHM_ALLOWED);
  CHECK_EQ(written, FSHM_OK);
  CHECK_EQ(set_limits(more, 2, NOW), FSHM_OK);
  CHECK_EQ(fshm_remaining(l, "k", 1, NOW, left), 2);
  CHECK_EQ(100 - left[0], consumed);
  CHECK_EQ(10 - left[1], consumed);
}
static void test_undo_beside_a_sweep(void) {
  fshm_limit limits[2] = {bucket(100, 1), window(4)};
  begin_test(limits, 2);
  CHECK_EQ(apply_at(l, FSHM_ACQUIRE, "k", PRIOR, NOW).status, FSHM_ALLOWED);
  for (uint64_t i = 2; i < RULES; i++) { /* each slower: the key's state stays where it is */
    limits[0] = bucket(100, i);
    CHECK_EQ(set_limits(limits, 2, NOW), FSHM_OK);
  }
  CHECK_EQ(rules_used(), RULES);
  stops_at = swaps_and_slots, always = check_named_are_used;
  roles[0].task = fill_second, roles[1].task = acquire_two;
  keep_state();
  CHECK(every_schedule("01", "01", verify_undone));
  CHECK(every_schedule("10", "10", verify_undone));
  end_test();
}

/* A writer is stopped before it names a rule that is there; another one names it for a later version, while a third frees
 * rule indexes that were not named lately. */
static unsigned rule_named;
static int written_by[ROLES];
static bool of_that_rule(const volatile void *at, bool swap) {
  const limiter_entry_t *e = &s->limiters[0];
  const bool rule = (uintptr_t)at == (uintptr_t)&e->owners[rule_named];
  if (mine == &roles[0] && rule)
    return true; /* also before it reads which version it is named in */
  if (mine == &roles[1] && of_a_slot(at)) return true; /* while it sweeps, before it frees */
  return swap && (rule || (uintptr_t)at == (uintptr_t)&e->current);
}
static void name_again(int i) {
  const fshm_limit old = bucket(100, 3);
  written_by[i] = set_limits(&old, 1, NOW);
}
static void name_first(void) { name_again(0); }
static void sweep_for_another(void) {
  const fshm_limit other = bucket(100, 99);
  written_by[1] = set_limits(&other, 1, NOW);
}
static void name_third(void) { name_again(2); }
static void verify_named(void) {
  for (int i = 0; i < ROLES; i++) CHECK_EQ(written_by[i], FSHM_OK);
}
static void test_named_for_a_later_version(void) {
  fshm_limit one = bucket(100, 1);
  begin_test(&one, 1);
  for (uint64_t i = 2; i <= RULES; i++) {
    one = bucket(100, i);
    CHECK_EQ(set_limits(&one, 1, NOW), FSHM_OK);
  }
  rule_named = 2; /* of bucket(100, 3) */
  CHECK_EQ(rules_used(), RULES);
  stops_at = of_that_rule, always = check_named_are_used;
  roles[0].task = name_first, roles[1].task = sweep_for_another, roles[2].task = name_third;
  keep_state();
  CHECK(every_schedule("01201", "210", verify_named));
  end_test();
}

/* A sweeper is stopped; an hour later limits with a fast pace come; it goes on by these. A state has drained at its own
 * pace until then, and not at the fast one. */
static void sweep_slowly(void) {
  fshm_limiter *out;
  const fshm_limit other = bucket(100, 99 * 3600);
  written = fshm_limiter_open(s, "a", 1, &other, 1, &out);
  fshm_limiter_close(out);
}
static void an_hour_later(void) {
  fshm_limiter *out;
  const fshm_limit fast = bucket(100, 1);
  time_is += HOUR;
  CHECK_EQ(fshm_limiter_open(s, "a", 1, &fast, 1, &out), FSHM_OK);
  fshm_limiter_close(out);
}
static void verify_drained(void) {
  uint64_t left[FSHM_MAX_LIMITS];
  const fshm_limit fast = bucket(100, 1);
  CHECK_EQ(written, FSHM_OK);
  CHECK_EQ(set_limits(&fast, 1, time_is), FSHM_OK);
  CHECK_EQ(fshm_remaining(l, "k", 1, time_is, left), 1);
  CHECK_EQ(left[0], 100 - 9); /* one of ten in an hour */
}
static void test_sweep_by_a_fast_pace(void) {
  fshm_limit one = bucket(100, 3600);
  begin_test(&one, 1);
  time_is = NOW;
  CHECK_EQ(apply_at(l, FSHM_ACQUIRE, "k", 10, 0).status, FSHM_ALLOWED);
  for (uint64_t i = 1; i < RULES; i++) {
    one = bucket(100, 3600 + i);
    CHECK_EQ(set_limits(&one, 1, NOW), FSHM_OK);
  }
  CHECK_EQ(rules_used(), RULES);
  stops_at = swaps_and_slots, always = check_named_are_used;
  roles[0].task = sweep_slowly, roles[1].task = an_hour_later;
  keep_state();
  CHECK(every_schedule("01", "01", verify_drained));
  end_test();
}

/* Writers that are killed between filling rule indexes and the swap that names them leave the rule indexes as of a version that never
 * comes. They do not run out. */
static bool current_alone(const volatile void *at, bool swap) {
  return swap && (uintptr_t)at == (uintptr_t)&s->limiters[0].current;
}
static void die_there(const volatile void *at) {
  (void)at;
  (void)raise(SIGKILL);
}
static void fill_and_die(int i, void *with) {
  static role_t role = {.left = TO_THE_END};
  const fshm_limit some = bucket(200, 10 + (uint64_t)i);
  (void)with;
  stops_at = current_alone, meanwhile = die_there;
  mine = &role;
  (void)set_limits(&some, 1, NOW);
}
static void test_writers_that_are_killed(void) {
  fshm_limit one = bucket(100, 1);
  begin_test(&one, 1);
  for (int i = 0; i < 60; i++) {
    int status;
    pid_t pid = start_child(fill_and_die, i, NULL);
    CHECK_EQ(waitpid(pid, &status, 0), pid);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
    one = bucket(100, 2 + (uint64_t)i);
    if (i % 20 == 19) CHECK_EQ(set_limits(&one, 1, NOW), FSHM_OK);
    check_named_are_used();
  }
  end_test();
}

/* A taker whose rule index is taken, while the limits change at each of its looks, or are of another kind. */
static unsigned changes;
static bool loads_of_most(const volatile void *at, bool swap) {
  return !swap && (uintptr_t)at == (uintptr_t)&s->limiters[0].most;
}
static void other_number(const volatile void *at) {
  const fshm_limit next = permits_of(5 + ++changes % 2);
  (void)at;
  CHECK_EQ(set_limits(&next, 1, NOW), FSHM_OK);
}
static void other_kind(const volatile void *at) {
  const fshm_limit next = bucket(5, 1);
  (void)at;
  if (!changes++) CHECK_EQ(set_limits(&next, 1, NOW), FSHM_OK);
}
static void test_takers_of_limits_that_change(void) {
  static role_t role = {.left = TO_THE_END};
  const fshm_limit few = permits_of(5);
  fshm_permit permit;
  fshm_decision d;
  uint32_t held;
  begin_test(&few, 1);
  stops_at = loads_of_most, meanwhile = other_number, changes = 0;
  mine = &role;
  fshm_admit(l, "k", 1, NULL, NOW, &permit, &d, &held);
  mine = NULL;
  CHECK_OP(changes, >=, MAX_TRIES / 2);
  CHECK_EQ(d.status, FSHM_DENIED); /* it was never sure of its rule index, which is given back */
  CHECK_EQ(held, 0);
  CHECK_EQ(fshm_in_flight(l, "k", 1), 0);
  CHECK_EQ(set_limits(&few, 1, NOW), FSHM_OK);
  meanwhile = other_kind, changes = 0;
  mine = &role;
  fshm_admit(l, "k", 1, NULL, NOW, &permit, &d, &held);
  mine = NULL;
  CHECK_OP(changes, >, 0);
  CHECK_EQ(d.status, FSHM_ALLOWED); /* nothing limits it any more */
  CHECK_EQ(set_limits(&few, 1, NOW), FSHM_OK);
  CHECK_EQ(fshm_in_flight(l, "k", 1), 1);
  CHECK_EQ(fshm_permit_release(l, &permit), 1);
  CHECK_EQ(fshm_in_flight(l, "k", 1), 0);
  end_test();
}

/* A limit is lowered, and then a permit beyond it given back, at each instant of a taker's call. Before the change as many
 * are held as may be; after it too: at no instant there is room, so it is denied. */
static unsigned access_n, at_access;
static fshm_permit beyond;
static bool any_access(const volatile void *at, bool swap) {
  (void)at;
  (void)swap;
  return true;
}
static void lower_and_give_back(const volatile void *at) {
  const fshm_limit two = permits_of(2);
  (void)at;
  if (++access_n != at_access) return;
  CHECK_EQ(set_limits(&two, 1, NOW), FSHM_OK);
  CHECK_EQ(fshm_permit_release(l, &beyond), 1);
}
static void test_lowered_and_given_back_while_it_counts(void) {
  static role_t role = {.left = TO_THE_END};
  const fshm_limit four = permits_of(4), three = permits_of(3);
  begin_test(&four, 1);
  for (at_access = 1, access_n = 1; access_n >= at_access; at_access++) {
    fshm_permit permits[4], got;
    fshm_decision d;
    uint32_t held;
    CHECK_EQ(set_limits(&four, 1, NOW), FSHM_OK);
    for (int i = 0; i < 4; i++) fshm_admit(l, "k", 1, NULL, NOW, &permits[i], &d, &held);
    for (int i = 0; i < 4; i++) {
      if (PERMIT_NUMBER(permits[i].when) == 2) CHECK_EQ(fshm_permit_release(l, &permits[i]), 1);
      if (PERMIT_NUMBER(permits[i].when) == 3) beyond = permits[i];
    }
    CHECK_EQ(set_limits(&three, 1, NOW), FSHM_OK);
    stops_at = any_access, meanwhile = lower_and_give_back, access_n = 0;
    mine = &role;
    fshm_admit(l, "k", 1, NULL, NOW, &got, &d, &held);
    mine = NULL;
    CHECK_EQ(d.status, FSHM_DENIED);
    (void)fshm_permit_release(l, &got);
    (void)fshm_permit_release(l, &beyond); /* the last time it was not yet */
    for (int i = 0; i < 4; i++)
      if (PERMIT_NUMBER(permits[i].when) < 2) CHECK_EQ(fshm_permit_release(l, &permits[i]), 1);
    CHECK_EQ(fshm_in_flight(l, "k", 1), 0);
  }
  end_test();
  CHECK_OP(at_access, >, 10);
}

int main(void) {
  test_writers_that_are_killed(); /* forks: before there are threads */
  start_roles();
  test_undo_beside_a_sweep();
  test_named_for_a_later_version();
  test_sweep_by_a_fast_pace();
  test_takers_of_limits_that_change();
  test_lowered_and_given_back_while_it_counts();
  end_roles();
  printf("%llu schedules\n", (unsigned long long)schedules);
  return done();
}
