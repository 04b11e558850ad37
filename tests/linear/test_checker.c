/* test_checker.c - the checker itself: what is known to be wrong is refused, what is right is taken, and on
 * random small histories it says what a search of all orders says, which is too simple to be wrong. */
#include "checker.h"
#include "queue.h"

static uint64_t passed, failed, random_state = 20240229;

#define CHECK_EQ(a, b)                                                                  \
  do {                                                                                  \
    const long long a_ = (long long)(a), b_ = (long long)(b);                           \
    if (a_ == b_) {                                                                     \
      passed++;                                                                         \
    } else {                                                                            \
      failed++;                                                                         \
      fprintf(stderr, "%s:%d: %s is %lld, not %lld\n", __FILE__, __LINE__, #a, a_, b_); \
    }                                                                                   \
  } while (0)

static uint64_t random_below(uint64_t n) { /* splitmix64 */
  uint64_t x = random_state += UINT64_C(0x9e3779b97f4a7c15);
  x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
  x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
  return (x ^ x >> 31) % n;
}

#define NOW UINT64_C(1000000000000)
#define PER UINT64_C(1000000000)

static search_t search;

/* A window of n, or several. */
static history_t windows(uint64_t n0, uint64_t n1) {
  history_t h;
  memset(&h, 0, sizeof h);
  h.keys = 1;
  h.limits = n1 ? 2 : 1;
  for (uint32_t v = 0; v < VARIANTS; v++)
    for (uint32_t i = 0; i < h.limits; i++) {
      fshm_limit l = {i ? n1 : n0, PER, 0, FSHM_WINDOW, 0};
      h.rules[v][i] = rule_make(&l);
    }
  return h;
}

static op_t *add(history_t *h, int lane, int kind, uint64_t from, uint64_t to, uint64_t cost,
                 int status) {
  op_t *op = &h->ops[lane][h->count[lane]++];
  op->kind = (uint8_t)kind;
  op->invoked = from;
  op->responded = to;
  op->cost[0] = op->cost[1] = cost;
  op->status = status;
  op->reads = 1;
  op->read[0] = op->latest = NOW;
  return op;
}

/* With one limit: what is left, as reported; the rest follows. used: by then, this operation included. */
static void tell(const history_t *h, op_t *op, uint64_t used) {
  rule_t r = h->rules[0][0];
  bool charged = op->status == FSHM_ALLOWED && op->kind == OP_ACQUIRE;
  uint64_t begun = used - (charged ? op->cost[0] : 0);
  uint64_t state = begun ? window_state(&r, (window_t){NOW + PER, begun, 0}) : 0;
  verdict_t v = rule_take(&r, state, NOW, NOW, op->cost[0]);
  op->remaining[0] = minus(r.n, used);
  op->retry = op->status == FSHM_ALLOWED ? 0 : (int64_t)v.retry;
  op->reset = (int64_t)v.reset;
}

static void acquire_op(history_t *h, int lane, uint64_t from, uint64_t to, int status,
                       uint64_t used) {
  tell(h, add(h, lane, OP_ACQUIRE, from, to, 1, status), used);
}

static void left_op(history_t *h, uint64_t from, uint64_t left) {
  add(h, TESTER, OP_REMAINING, from, from + 1, 1, 1)->remaining[0] = left;
}

static int verdict(const history_t *h, int level) { return check_history(&search, h, level); }

static void test_one_limit(void) {
  history_t h = windows(5, 0); /* in order */
  acquire_op(&h, 0, 1, 2, FSHM_ALLOWED, 1);
  acquire_op(&h, 1, 3, 4, FSHM_ALLOWED, 2);
  left_op(&h, 5, 3);
  CHECK_EQ(verdict(&h, 0), LINEARISABLE);

  h = windows(5, 0); /* overlapping, answered the other way round */
  acquire_op(&h, 0, 1, 4, FSHM_ALLOWED, 2);
  acquire_op(&h, 1, 2, 3, FSHM_ALLOWED, 1);
  left_op(&h, 5, 3);
  CHECK_EQ(verdict(&h, 0), LINEARISABLE);

  h = windows(5, 0); /* the same, but one after the other */
  acquire_op(&h, 0, 1, 2, FSHM_ALLOWED, 2);
  acquire_op(&h, 1, 3, 4, FSHM_ALLOWED, 1);
  left_op(&h, 5, 3);
  CHECK_EQ(verdict(&h, 1), NOT_LINEARISABLE);

  h = windows(5, 0); /* lost update: both say that they were the first */
  acquire_op(&h, 0, 1, 4, FSHM_ALLOWED, 1);
  acquire_op(&h, 1, 2, 3, FSHM_ALLOWED, 1);
  CHECK_EQ(verdict(&h, 1), NOT_LINEARISABLE);

  h = windows(5, 0); /* lost update, seen by the end alone */
  add(&h, 0, OP_IS_ALLOWED, 1, 4, 1, FSHM_ALLOWED);
  add(&h, 1, OP_IS_ALLOWED, 2, 3, 1, FSHM_ALLOWED);
  left_op(&h, 5, 4);
  CHECK_EQ(verdict(&h, 1), NOT_LINEARISABLE);

  h = windows(1, 0); /* double admission */
  add(&h, 0, OP_IS_ALLOWED, 1, 4, 1, FSHM_ALLOWED);
  add(&h, 1, OP_IS_ALLOWED, 2, 3, 1, FSHM_ALLOWED);
  CHECK_EQ(verdict(&h, 1), NOT_LINEARISABLE);

  h = windows(1, 0); /* it is free, yet one is denied */
  add(&h, 0, OP_IS_ALLOWED, 1, 2, 1, FSHM_DENIED);
  add(&h, 1, OP_IS_ALLOWED, 3, 4, 1, FSHM_ALLOWED);
  CHECK_EQ(verdict(&h, 1), NOT_LINEARISABLE);
  h.ops[0][0].responded = 5; /* overlapping: the other was first */
  CHECK_EQ(verdict(&h, 0), LINEARISABLE);

  h = windows(5, 0); /* stale read: the look began after the admission had ended */
  acquire_op(&h, 0, 1, 2, FSHM_ALLOWED, 1);
  add(&h, 1, OP_REMAINING, 3, 4, 1, 1)->remaining[0] = 5;
  CHECK_EQ(verdict(&h, 1), NOT_LINEARISABLE);
  h.ops[1][0].invoked = 1; /* or while it ran */
  CHECK_EQ(verdict(&h, 0), LINEARISABLE);

  h = windows(5, 0); /* two looks that go back */
  acquire_op(&h, 0, 1, 8, FSHM_ALLOWED, 1);
  add(&h, 1, OP_REMAINING, 2, 3, 1, 1)->remaining[0] = 4;
  add(&h, 1, OP_REMAINING, 4, 5, 1, 1)->remaining[0] = 5;
  CHECK_EQ(verdict(&h, 1), NOT_LINEARISABLE);

  h = windows(1, 0); /* a denial that charged */
  acquire_op(&h, 0, 1, 2, FSHM_ALLOWED, 1);
  acquire_op(&h, 1, 3, 4, FSHM_DENIED, 1);
  add(&h, 0, OP_RESET, 5, 6, 1, FSHM_OK);
  left_op(&h, 7, 0);
  CHECK_EQ(verdict(&h, 1), NOT_LINEARISABLE);
  h.ops[TESTER][0].remaining[0] = 1;
  CHECK_EQ(verdict(&h, 0), LINEARISABLE);
}

static void test_killed(void) {
  for (uint64_t left = 2; left <= 5; left++) { /* it took effect, or it did not; not twice */
    history_t h = windows(5, 0);
    add(&h, 0, OP_ACQUIRE, 1, 0, 1, 0);
    acquire_op(&h, 1, 2, 3, FSHM_ALLOWED, 1);
    add(&h, TESTER, OP_DEATH, 4, 5, 0, 0)->who = 0;
    left_op(&h, 6, left);
    CHECK_EQ(verdict(&h, 1), left == 3 || left == 4 ? LINEARISABLE : NOT_LINEARISABLE);
  }
  history_t h = windows(5, 0); /* not after its death */
  add(&h, 0, OP_ACQUIRE, 1, 0, 1, 0);
  add(&h, TESTER, OP_DEATH, 2, 3, 0, 0)->who = 0;
  left_op(&h, 4, 5);
  left_op(&h, 6, 4);
  CHECK_EQ(verdict(&h, 1), NOT_LINEARISABLE);
}

/* Two limits, one of them exhausted. The only exception: a charge that is about to be undone. */
static void test_several(void) {
  history_t h = windows(1, 1);
  add(&h, 0, OP_ACQUIRE, 1, 2, 1, FSHM_ALLOWED); /* all of both */
  add(&h, 1, OP_ACQUIRE, 3, 4, 1, FSHM_DENIED);
  left_op(&h, 5, 0);
  CHECK_EQ(verdict(&h, 0), LINEARISABLE);

  /* Process 0 charges the first limit, loses the second to process 1 (cost 0,1), and undoes; process 2
   * wants the first only, meanwhile. */
  h = windows(1, 1);
  add(&h, 0, OP_ACQUIRE, 1, 10, 1, FSHM_DENIED);
  add(&h, 1, OP_ACQUIRE, 2, 9, 0, FSHM_ALLOWED)->cost[1] = 1;
  op_t *victim = add(&h, 2, OP_ACQUIRE, 3, 8, 1, FSHM_DENIED);
  victim->cost[1] = 0;
  op_t *end = add(&h, TESTER, OP_REMAINING, 11, 12, 1, 1);
  end->remaining[0] = 1;
  CHECK_EQ(verdict(&h, 0), NOT_LINEARISABLE);
  CHECK_EQ(verdict(&h, 1), LINEARISABLE);
  end->remaining[0] = 0; /* not undone */
  CHECK_EQ(verdict(&h, 2), NOT_LINEARISABLE);
  end->remaining[0] = 1;
  victim->invoked = 13,
  victim->responded = 14; /* afterwards there is no other operation to blame */
  end->invoked = 15, end->responded = 16;
  CHECK_EQ(verdict(&h, 2), NOT_LINEARISABLE);
  victim->invoked = 3, victim->responded = 8;
  h.ops[1][0].status = FSHM_DENIED; /* the second was not taken: no reason to undo */
  end->remaining[1] = 1;
  CHECK_EQ(verdict(&h, 2), NOT_LINEARISABLE);

  h = windows(2, 1); /* half of it: the first was charged, the request denied */
  add(&h, 0, OP_ACQUIRE, 1, 2, 1, FSHM_ALLOWED);
  add(&h, 1, OP_ACQUIRE, 3, 4, 1, FSHM_DENIED);
  left_op(&h, 5, 0);
  CHECK_EQ(verdict(&h, 2), NOT_LINEARISABLE);
  h.ops[TESTER][0].remaining[0] = 1;
  CHECK_EQ(verdict(&h, 0), LINEARISABLE);
  h.ops[1][0].responded =
      0; /* but killed in it, the first may stay charged, if it had room in both */
  h.ops[1][0].invoked = 1;
  add(&h, TESTER, OP_DEATH, 7, 8, 0, 0)->who = 1;
  left_op(&h, 9, 0);
  CHECK_EQ(verdict(&h, 1), LINEARISABLE);
}

static history_t permits_of(uint32_t n) {
  history_t h = windows(1, 0);
  h.limits = 0;
  h.permits = n;
  return h;
}

static op_t *admit_op(history_t *h, int lane, uint64_t from, uint64_t to, int permit) {
  op_t *op = add(h, lane, OP_ADMIT, from, to, 0, permit < 0 ? FSHM_DENIED : FSHM_ALLOWED);
  op->permit = (uint8_t)(permit < 0 ? 0 : permit);
  op->count = permit < 0 ? h->permits : 0;
  return op;
}

static void test_permits(void) {
  history_t h = permits_of(1);
  admit_op(&h, 0, 1, 2, 0);
  admit_op(&h, 1, 3, 4, -1);
  add(&h, 0, OP_RELEASE, 5, 6, 0, 1);
  admit_op(&h, 1, 7, 8, 0);
  CHECK_EQ(verdict(&h, 0), LINEARISABLE);
  h.ops[1][0].invoked = 7, h.ops[1][0].responded = 8; /* denied when it was free */
  h.ops[1][1].invoked = 9, h.ops[1][1].responded = 10;
  CHECK_EQ(verdict(&h, 1), NOT_LINEARISABLE);

  h = permits_of(1); /* two hold one */
  admit_op(&h, 0, 1, 4, 0);
  admit_op(&h, 1, 2, 3, 0);
  CHECK_EQ(verdict(&h, 1), NOT_LINEARISABLE);

  h = permits_of(1); /* the permit of a dead process goes to the next, not before its death */
  admit_op(&h, 0, 1, 2, 0);
  add(&h, TESTER, OP_DEATH, 3, 6, 0, 0)->who = 0;
  admit_op(&h, 1, 4, 5, 0);
  CHECK_EQ(verdict(&h, 0), LINEARISABLE);
  h.ops[TESTER][0].invoked = 7, h.ops[TESTER][0].responded = 8;
  CHECK_EQ(verdict(&h, 1), NOT_LINEARISABLE);

  h = permits_of(2); /* counted slot by slot: each was held at some instant, never both at one */
  admit_op(&h, 0, 1, 2, 0);
  admit_op(&h, 1, 3, 12, -1);
  add(&h, 0, OP_RELEASE, 4, 5, 0, 1);
  admit_op(&h, 2, 6, 7, 1);
  CHECK_EQ(verdict(&h, 0), NOT_LINEARISABLE);
  CHECK_EQ(verdict(&h, 1), LINEARISABLE);
  h.ops[1][0].invoked = 6; /* the first was free by then */
  CHECK_EQ(verdict(&h, 1), NOT_LINEARISABLE);
}

static op_t *in_flight_op(history_t *h, int lane, uint64_t from, uint64_t to, uint32_t held) {
  op_t *op = add(h, lane, OP_IN_FLIGHT, from, to, 0, 0);
  op->count = held;
  return op;
}

/* A count may be of before a call that is not over, also where another has seen what the call did. */
static void test_permits_that_are_remembered(void) {
  history_t h = permits_of(1);
  op_t *taken = admit_op(&h, 0, 1, 8, 0);
  admit_op(&h, 1, 2, 3, -1);
  in_flight_op(&h, 2, 4, 5, 0);
  CHECK_EQ(verdict(&h, 0), NOT_LINEARISABLE);
  CHECK_EQ(verdict(&h, 1), LINEARISABLE);
  taken->responded = 3; /* over */
  CHECK_EQ(verdict(&h, 1), NOT_LINEARISABLE);

  h = permits_of(2);
  admit_op(&h, 0, 1, 2, 0);
  op_t *freed = add(&h, 0, OP_RELEASE, 3, 10, 0, 1);
  in_flight_op(&h, 1, 4, 5, 0);
  op_t *counted = in_flight_op(&h, 2, 6, 7, 1);
  CHECK_EQ(verdict(&h, 0), NOT_LINEARISABLE);
  CHECK_EQ(verdict(&h, 1), LINEARISABLE);
  counted->count = 2;
  CHECK_EQ(verdict(&h, 1), NOT_LINEARISABLE);
  counted->count = 1;
  freed->responded = 5;
  CHECK_EQ(verdict(&h, 1), NOT_LINEARISABLE);

  h = permits_of(1); /* likewise where limits change */
  h.changes = 1;
  for (unsigned v = 0; v < VARIANTS; v++) h.permits_of[v] = 1;
  taken = admit_op(&h, 0, 1, 8, 0);
  in_flight_op(&h, 1, 2, 3, 1);
  in_flight_op(&h, 2, 4, 5, 0);
  CHECK_EQ(verdict(&h, 1), LINEARISABLE);
  taken->responded = 3;
  CHECK_EQ(verdict(&h, 1), NOT_LINEARISABLE);

  h = permits_of(1); /* denied when another has seen it free */
  admit_op(&h, 0, 1, 2, 0);
  freed = add(&h, 0, OP_RELEASE, 3, 10, 0, 1);
  in_flight_op(&h, 1, 4, 5, 0);
  admit_op(&h, 2, 6, 7, -1);
  CHECK_EQ(verdict(&h, 0), NOT_LINEARISABLE);
  CHECK_EQ(verdict(&h, 1), LINEARISABLE);
  freed->responded = 5;
  CHECK_EQ(verdict(&h, 1), NOT_LINEARISABLE);
}

/* A look counts for 64 times the time that it took, also where a holder was killed meanwhile. */
static void test_looks_over_a_death(void) {
  for (int changes = 0; changes < 2; changes++) {
    history_t h = permits_of(1);
    h.changes = (uint8_t)changes;
    for (unsigned v = 0; v < VARIANTS; v++) h.permits_of[v] = 1;
    admit_op(&h, 0, 1, 2, 0);
    op_t *look = in_flight_op(&h, 1, 3, 4, 1);
    add(&h, TESTER, OP_DEATH, 5, 6, 0, 0)->who = 0;
    op_t *counted = in_flight_op(&h, 1, 7, 8, 1), *denied = admit_op(&h, 1, 9, 10, -1);
    look->reads = 2;
    look->read[1] = NOW + 10;
    counted->read[0] = denied->read[0] = NOW + 639;
    CHECK_EQ(verdict(&h, 0), NOT_LINEARISABLE);
    CHECK_EQ(verdict(&h, 1), LINEARISABLE);
    denied->read[0] = NOW + 640; /* the look no longer counts */
    CHECK_EQ(verdict(&h, 1), NOT_LINEARISABLE);
    denied->read[0] = NOW + 1, counted->read[0] = NOW + 640;
    CHECK_EQ(verdict(&h, 1), NOT_LINEARISABLE);
    counted->read[0] = NOW + 1, h.ops[TESTER][0].responded = 4; /* still before the look ended */
    h.ops[TESTER][0].invoked = 3;
    CHECK_EQ(verdict(&h, 1), LINEARISABLE);
    look->read[1] = NOW + 400000000, counted->read[0] = NOW + 499999999;
    CHECK_EQ(verdict(&h, 1), LINEARISABLE);
    counted->read[0] = NOW + 500000000; /* half a second, however long the look took */
    CHECK_EQ(verdict(&h, 1), NOT_LINEARISABLE);
    counted->read[0] = NOW + 1;
    h.ops[TESTER][0].responded = 2; /* over before the look, which finds the permit free */
    h.ops[TESTER][0].invoked = 2, look->count = 0;
    CHECK_EQ(verdict(&h, 1), NOT_LINEARISABLE);
  }
}

static op_t *put_op(history_t *h, int lane, uint64_t from, uint64_t to, uint64_t tokens,
                    uint64_t lease) {
  op_t *op = add(h, lane, OP_PUT, from, to, tokens, FSHM_OK);
  op->until = NOW + lease;
  return op;
}

static op_t *take_op(history_t *h, int lane, uint64_t from, uint64_t to, uint64_t tokens,
                     uint64_t left_ns) {
  op_t *op = add(h, lane, OP_TAKE, from, to, 0, FSHM_OK);
  op->remaining[0] = tokens;
  op->left_ns[0] = left_ns;
  return op;
}

static history_t a_token_lease(void) {
  const fshm_limit token_leases = {TOKEN_LEASE_MOST, 0, 0, FSHM_LEASE, 0};
  history_t h = windows(1, 0);
  h.rules[0][0] = rule_make(&token_leases);
  return h;
}

/* A change to another period, for which there was a sweep: only the version says which limits decided. */
static void test_versions(void) {
  for (uint64_t told = 0; told < 5; told++) {
    history_t h = windows(5, 0);
    h.changes = 1;
    h.version = 7;
    for (unsigned v = 0; v < VARIANTS; v++) h.counts[v] = 1;
    h.rules[1][0].per = 2 * PER;
    op_t *set = add(&h, 0, OP_SET, 1, 5, 0, FSHM_OK);
    set->who = set->times = 1;
    h.in_force[1] = 2;
    h.in_force[2] = 4;
    h.changed[2] = 1;
    op_t *late = add(&h, 1, OP_ACQUIRE, 6, 9, 1, FSHM_ALLOWED);
    tell(&h, late, 1);
    late->version = 6 + told;
    sum_up_versions(&h);
    CHECK_EQ(decided_by_old_limits(&h, late), told != 3);
    CHECK_EQ(verdict(&h, 1), told == 3 ? LINEARISABLE : NOT_LINEARISABLE);
    late->invoked = 3; /* the sweep has been, the change not yet: either is right */
    CHECK_EQ(decided_by_old_limits(&h, late), told < 2 || told > 3);
    late->invoked = 1;
    CHECK_EQ(decided_by_old_limits(&h, late), told < 1 || told > 3);
    CHECK_EQ(verdict(&h, 1), told >= 1 && told <= 3 ? LINEARISABLE : NOT_LINEARISABLE);
  }
  /* Two versions whose stamps came the other way round. */
  history_t h = {.changes = 1, .in_force = {0, 9, 8}, .changed = {0, 1, 1}};
  const op_t op = {.kind = OP_PEEK, .status = FSHM_DENIED, .invoked = 9, .responded = 10};
  sum_up_versions(&h);
  CHECK_EQ(decided_by_old_limits(&h, &op), true);
}

/* Two limits: the first charged 3, the second found no room because of a charge; a reset took both away; 1 was charged;
 * and the undo takes it. Without the reset, or with it after the undo, none may be missing. */
static void test_undo_after_reset(void) {
  history_t h = windows(12, 4);
  h.changes = 1;
  for (unsigned v = 0; v < VARIANTS; v++) h.counts[v] = 2;
  op_t *both = add(&h, 0, OP_ACQUIRE, 1, 20, 3, FSHM_ALLOWED);
  both->cost[1] = 1;
  add(&h, 1, OP_CHARGE, 2, 3, 5, FSHM_ALLOWED)->cost[0] = 2;
  op_t *reset = add(&h, 1, OP_RESET, 4, 5, 0, 1);
  add(&h, 1, OP_ACQUIRE, 6, 7, 1, FSHM_ALLOWED)->cost[1] = 2;
  left_op(&h, 30, 9);
  op_t *left = &h.ops[TESTER][0];
  left->remaining[1] = 1;
  left->status = 2;
  CHECK_EQ(verdict(&h, 0), NOT_LINEARISABLE);
  CHECK_EQ(verdict(&h, 1), LINEARISABLE);
  left->remaining[0] = 8; /* or nothing was undone */
  CHECK_EQ(verdict(&h, 0), LINEARISABLE);
  left->remaining[0] = 9;
  h.ops[1][0].cost[1] = 1; /* the second had room: nothing to undo */
  CHECK_EQ(verdict(&h, 1), NOT_LINEARISABLE);
  h.ops[1][0].cost[1] = 5;
  reset->kind = OP_REMAINING; /* nothing was taken away */
  reset->status = 2;
  reset->remaining[0] = 10, reset->remaining[1] = 0;
  CHECK_EQ(verdict(&h, 1), NOT_LINEARISABLE);
}

/* Charged in the first limit; then there is one limit only, for a while: the second is not charged. */
static void test_charge_of_fewer(void) {
  history_t h = windows(6, 3);
  h.changes = 1;
  for (unsigned v = 0; v < VARIANTS; v++) h.counts[v] = v == 1 ? 1 : 2;
  add(&h, 0, OP_CHARGE, 1, 20, 2, FSHM_ALLOWED);
  op_t *before = add(&h, 1, OP_REMAINING, 2, 3, 0, 2);
  before->remaining[0] = 4, before->remaining[1] = 3;
  for (uint8_t v = 1; v < 3; v++) {
    op_t *set = add(&h, 1, OP_SET, v * UINT64_C(5), v * UINT64_C(5) + 1, 0, FSHM_OK);
    set->who = v;
    set->times = 1;
  }
  left_op(&h, 30, 4);
  op_t *left = &h.ops[TESTER][0];
  left->status = 2;
  left->remaining[1] = 3;
  CHECK_EQ(verdict(&h, 0), LINEARISABLE);
  left->remaining[1] = 1;
  CHECK_EQ(verdict(&h, 0), LINEARISABLE);
  left->remaining[1] = 3;
  h.ops[0][0].responded = 4;
  CHECK_EQ(verdict(&h, 1), NOT_LINEARISABLE);
}

/* Taken by limits of before, counted by those that came then, given back after others: denied, if these are few. */
static void test_permits_that_change(void) {
  for (uint32_t lowest = 1; lowest < 5; lowest++) {
    history_t h = windows(5, 0);
    h.limits = 0;
    h.changes = 1;
    h.permits = MOST_PERMITS;
    for (unsigned v = 0; v < VARIANTS; v++) h.permits_of[v] = v == 1 ? lowest : 5 + (v > 1);
    add(&h, 0, OP_ADMIT, 1, 2, 0, FSHM_ALLOWED)->permit = 0;
    add(&h, 1, OP_ADMIT, 3, 4, 0, FSHM_ALLOWED)->permit = 1;
    op_t *denied = add(&h, 2, OP_ADMIT, 5, 30, 0, FSHM_DENIED);
    denied->count = 2;
    for (uint8_t v = 1; v < 3; v++) {
      op_t *set = add(&h, 0, OP_SET, v * UINT64_C(10), v * UINT64_C(10) + 1, 0, FSHM_OK);
      set->who = v;
      set->times = 1;
    }
    add(&h, 1, OP_IN_FLIGHT, 22, 24, 0, 0)->count = 3;
    add(&h, 1, OP_IN_FLIGHT, 31, 32, 0, 0)->count = 2;
    CHECK_EQ(verdict(&h, 1), lowest <= 2 ? LINEARISABLE : NOT_LINEARISABLE);
  }
}

static void test_token_leases(void) {
  history_t h = a_token_lease(); /* 3 are put in, 1 is spent, 2 are taken out: none is left */
  put_op(&h, 0, 1, 2, 3, 1 << 10);
  add(&h, 1, OP_SPEND, 3, 4, 1, FSHM_ALLOWED);
  take_op(&h, 2, 5, 6, 2, 1 << 10);
  add(&h, 1, OP_SPEND, 7, 8, 1, FSHM_DENIED);
  CHECK_EQ(verdict(&h, 0), LINEARISABLE);
  h.ops[1][1].status = FSHM_ALLOWED; /* one is spent and taken out */
  CHECK_EQ(verdict(&h, 1), NOT_LINEARISABLE);
  h.ops[1][1].status = FSHM_DENIED;
  h.ops[2][0].remaining[0] = 3; /* likewise */
  CHECK_EQ(verdict(&h, 1), NOT_LINEARISABLE);
  h.ops[2][0].remaining[0] = 2;
  h.ops[1][0].low = 1; /* it did not run low */
  CHECK_EQ(verdict(&h, 1), NOT_LINEARISABLE);

  h = a_token_lease(); /* spent while it was put in; not before */
  put_op(&h, 0, 2, 4, 1, 1 << 10);
  add(&h, 1, OP_SPEND, 1, 3, 1, FSHM_ALLOWED);
  CHECK_EQ(verdict(&h, 0), LINEARISABLE);
  h.ops[0][0].invoked = 3, h.ops[1][0].responded = 2;
  CHECK_EQ(verdict(&h, 1), NOT_LINEARISABLE);

  h = a_token_lease(); /* until the end of the lease, which a second batch does not put off */
  put_op(&h, 0, 1, 2, 1, 1 << 10);
  op_t *second = put_op(&h, 0, 3, 4, 1, 1 << 12);
  op_t *late = add(&h, 1, OP_SPEND, 5, 6, 1, FSHM_ALLOWED);
  late->read[0] = late->latest = NOW + (1 << 11);
  CHECK_EQ(verdict(&h, 1), NOT_LINEARISABLE);
  second->kept = 1; /* unless what is left was dated anew */
  CHECK_EQ(verdict(&h, 0), LINEARISABLE);
  late->read[0] = late->latest = NOW + (1 << 13);
  CHECK_EQ(verdict(&h, 1), NOT_LINEARISABLE);

  h = a_token_lease(); /* taken out twice at once */
  put_op(&h, 0, 1, 2, 2, 1 << 10);
  take_op(&h, 1, 3, 5, 2, 1 << 10);
  take_op(&h, 2, 4, 6, 2, 1 << 10);
  CHECK_EQ(verdict(&h, 1), NOT_LINEARISABLE);
  h.ops[2][0].remaining[0] = 0;
  CHECK_EQ(verdict(&h, 0), LINEARISABLE);
}

static void test_full_and_forgotten(void) {
  history_t h = windows(1, 0);
  h.keys = 3;
  h.slots = 2;
  add(&h, 0, OP_IS_ALLOWED, 1, 2, 1, FSHM_ALLOWED);
  add(&h, 0, OP_IS_ALLOWED, 3, 4, 1, FSHM_ALLOWED)->key = 1;
  add(&h, 1, OP_IS_ALLOWED, 5, 6, 1, FSHM_FULL)->key = 2;
  CHECK_EQ(verdict(&h, 0), LINEARISABLE);
  h.ops[0][1].key = 0; /* one slot is free */
  h.ops[0][1].status = FSHM_DENIED;
  CHECK_EQ(verdict(&h, 0), NOT_LINEARISABLE);

  h = windows(1, 0); /* a live key was forgotten */
  acquire_op(&h, 0, 1, 2, FSHM_ALLOWED, 1);
  acquire_op(&h, 1, 3, 4, FSHM_ALLOWED, 1);
  CHECK_EQ(verdict(&h, 1), NOT_LINEARISABLE);
  op_t *later = &h.ops[1][0]; /* an expired one, by a call that took its time before it expired */
  later->reads = 2;
  later->read[1] = later->latest = NOW + 2 * PER;
  CHECK_EQ(verdict(&h, 0), LINEARISABLE);
}

/* Every order of the operations, no memory of what was tried. */
static bool any_order(const history_t *h, const config_t *c) {
  bool complete = true;
  uint64_t bound = UINT64_MAX;
  for (int lane = 0; lane < LANES; lane++) {
    const op_t *op = next_op(h, c, lane);
    if (op) complete = false, bound = min_u64(bound, op->responded);
  }
  if (complete) return true;
  for (int lane = 0; lane < LANES; lane++) {
    const op_t *op = next_op(h, c, lane);
    if (!op || op->invoked > bound) continue;
    config_t to = *c;
    uint64_t *used = &to.state[0], n = h->rules[0][0].n, cost = op->cost[0];
    to.at[lane]++;
    if (op->kind == OP_REMAINING ? op->remaining[0] != n - *used
                                 : op->status != (*used + cost <= n))
      continue;
    if (op->kind == OP_IS_ALLOWED && op->status) *used += cost;
    if (any_order(h, &to)) return true;
  }
  return false;
}

static void test_random(void) {
  unsigned answers[2] = {0, 0};
  for (int round = 0; round < 20000; round++) {
    history_t h = windows(1 + random_below(3), 0);
    uint64_t n = h.rules[0][0].n, used = 0, count = 4 + random_below(5), clock = 100;
    uint64_t ends[3] = {0, 0, 0};
    for (uint64_t i = 0; i < count; i++) { /* one after the other, then made to overlap */
      int lane = (int)random_below(3);
      bool look = random_below(3) == 0, allowed = used < n;
      uint64_t from = clock - random_below(12), to = clock + random_below(12);
      clock += 4;
      if (from <= ends[lane]) from = ends[lane] + 1;
      if (to <= from) to = from + 1;
      ends[lane] = to;
      op_t *op = add(&h, lane, look ? OP_REMAINING : OP_IS_ALLOWED, from, to, 1, allowed);
      op->remaining[0] = n - used;
      if (!look) used += allowed;
    }
    if (random_below(2)) { /* one wrong answer */
      int lane = (int)random_below(3);
      if (h.count[lane]) {
        op_t *op = &h.ops[lane][random_below(h.count[lane])];
        op->status = !op->status;
        op->remaining[0] = random_below(n + 1);
      }
    }
    config_t start;
    memset(&start, 0, sizeof start);
    bool expected = any_order(&h, &start);
    answers[expected]++;
    CHECK_EQ(verdict(&h, 0), expected ? LINEARISABLE : NOT_LINEARISABLE);
  }
  CHECK_EQ(answers[0] > 1000 && answers[1] > 1000, 1); /* it has told them apart often enough */
}

/* One stands in the queue from 1 on, another joins from `from` to `to`. What one of them is told between 20 and 30. */
static int queue_verdict(const stay_t *one, const stay_t *other, int asks, bool first) {
  static history_t h;
  memset(&h, 0, sizeof h);
  h.stay_count[0] = h.stay_count[1] = 1;
  h.stays[0][0] = *one;
  h.stays[1][0] = *other;
  stay_t *asking = &h.stays[asks][0];
  asking->turns[asking->count++] = (turn_t){{20, 30}, first};
  return wrong_turn(&h) == NULL;
}
static void test_queue(void) {
  const stay_t one = {.join = {1, 2}, .since = 5, .owner = 1, .tenant = 1};
  const stay_t next = {.join = {3, 4}, .since = 6, .owner = 2, .tenant = 1};
  stay_t other = next;
  CHECK_EQ(queue_verdict(&one, &other, 0, true), true);
  CHECK_EQ(queue_verdict(&one, &other, 0, false), false); /* a caller that is never told */
  CHECK_EQ(queue_verdict(&one, &other, 1, true), false);
  CHECK_EQ(queue_verdict(&one, &other, 1, false), true);
  other.since = 5; /* at the same time: the lower number */
  CHECK_EQ(queue_verdict(&one, &other, 1, true), false);
  other.priority = 1;
  CHECK_EQ(queue_verdict(&one, &other, 0, true), false);
  CHECK_EQ(queue_verdict(&one, &other, 1, true), true);
  other.join.responded = 25; /* it comes meanwhile: either may be so */
  CHECK_EQ(queue_verdict(&one, &other, 0, true), true);
  CHECK_EQ(queue_verdict(&one, &other, 0, false), true);
  other.join = (call_span_t){31, 35};
  CHECK_EQ(queue_verdict(&one, &other, 0, false), false);
  other = next;
  other.priority = 1;
  other.leave = (call_span_t){29, 40}; /* it may have left */
  CHECK_EQ(queue_verdict(&one, &other, 0, true), true);
  CHECK_EQ(queue_verdict(&one, &other, 0, false), true);
  other.leave = (call_span_t){5, 19}; /* it has */
  CHECK_EQ(queue_verdict(&one, &other, 0, true), true);
  CHECK_EQ(queue_verdict(&one, &other, 0, false), false);
  other = next;
  other.tenant = 2; /* the first is the one whose tenant was served less; or came first */
  CHECK_EQ(queue_verdict(&one, &other, 1, true), false);
  stay_t served = one;
  served.served = (call_span_t){10, 12};
  served.cost = 3;
  CHECK_EQ(queue_verdict(&served, &other, 1, true), true);
  CHECK_EQ(queue_verdict(&served, &other, 0, true), false);
  served.served.responded = 22; /* meanwhile */
  CHECK_EQ(queue_verdict(&served, &other, 1, true), true);
  CHECK_EQ(queue_verdict(&served, &other, 0, true), true);
}

int main(void) {
  test_queue();
  test_one_limit();
  test_killed();
  test_several();
  test_permits();
  test_permits_that_are_remembered();
  test_looks_over_a_death();
  test_versions();
  test_undo_after_reset();
  test_charge_of_fewer();
  test_permits_that_change();
  test_token_leases();
  test_full_and_forgotten();
  test_random();
  search_end(&search);
  printf("%" PRIu64 " passed, %" PRIu64 " failed\n", passed, failed);
  return failed != 0;
}
