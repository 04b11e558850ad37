/* test_limiter.c - the calls: several limits all or nothing, reservations, undo, odd costs. */
#include "../../csrc/unity.c"

#include "check.h"

#define MS UINT64_C(1000000)
#define NOW (UINT64_C(1000) * 1000 * MS)

static const fshm_limit bucket = {10, 10000 * MS, 10, FSHM_BUCKET, 0}; /* one a second */
static const fshm_limit window = {5, 60000 * MS, 0, FSHM_WINDOW, 0};
static const fshm_limit sliding = {5, 60000 * MS, 0, FSHM_SLIDING, 0};

static pair_t *all_slots(const fshm_segment *s) {
  pair_t *copy = calloc(s->slot_count, sizeof *copy);
  for (uint64_t i = 0; i < s->slot_count; i++) copy[i] = pair_load(&s->slots[i]);
  return copy;
}

static bool slots_are(const fshm_segment *s, pair_t *copy) {
  pair_t *now = all_slots(s);
  bool same = !memcmp(now, copy, s->slot_count * sizeof *now);
  free(now);
  free(copy);
  return same;
}

static int apply_costs(fshm_limiter *l, uint32_t op, const uint64_t *costs, uint64_t wait,
                       uint64_t now, fshm_decision *d) {
  fshm_apply(l, op, "k", 1, costs, wait, now, d);
  return d->status;
}

/* Whichever of the limits denies, no bit of any slot changes; peeks never change any. */
static void test_denial_consumes_nothing(void) {
  fshm_segment *s = fresh_segment(100);
  const fshm_limit limits[4] = {bucket, window, sliding, bucket};
  fshm_limiter *l = fresh_limiter(s, "a", limits, 4);
  fshm_decision d;
  for (uint32_t which = 0; which < 4; which++) {
    for (uint64_t used = 0; used < 4; used++) {
      uint64_t costs[4] = {1, 1, 1, 1};
      CHECK_EQ(fshm_reset_key(l, "k", 1), FSHM_OK);
      for (uint64_t i = 0; i < used; i++)
        CHECK_EQ(apply_costs(l, FSHM_ACQUIRE, costs, 0, NOW, &d), FSHM_ALLOWED);
      costs[which] = limits[which].n + 1 - used; /* one too many */
      pair_t *before = all_slots(s);
      CHECK_EQ(apply_costs(l, FSHM_ACQUIRE, costs, 0, NOW + 1, &d), FSHM_DENIED);
      CHECK_EQ(d.limit_index, which);
      CHECK(used ? d.retry_after_ns > 0 : d.retry_after_ns == FSHM_NEVER);
      CHECK_EQ(apply_costs(l, FSHM_PEEK, costs, 0, NOW + 1, &d), FSHM_DENIED);
      costs[which] = 1;
      CHECK_EQ(apply_costs(l, FSHM_PEEK, costs, 0, NOW + 1, &d), FSHM_ALLOWED);
      CHECK(slots_are(s, before));
    }
  }
  fshm_limiter_close(l);
  fshm_close(s);
}

/* Denied after some were charged (here by hand; else a race): what was charged is taken back. */
static void test_undo(void) {
  fshm_segment *s = fresh_segment(100);
  const fshm_limit limits[3] = {bucket, window, sliding};
  fshm_limiter *l = fresh_limiter(s, "a", limits, 3);
  call_t c = {.s = s, .index = l->index, .now = NOW, .at = NOW};
  const uint64_t costs[FSHM_MAX_LIMITS] = {2, 2, 2, 2};
  c.costs = costs;
  c.hash = fshm_siphash(l->key[0], l->key[1], "k", 1);
  CHECK(limits_load(s, l->index, &c.snapshot));
  for (int other = 0; other < 2; other++) {
    for (uint32_t i = 0; i < 3; i++) {
      look_t looked;
      pair_t before = {0, 0};
      fshm_decision d;
      CHECK_EQ(fshm_reset_key(l, "k", 1), FSHM_OK);
      CHECK_EQ(apply_costs(l, FSHM_ACQUIRE, NULL, 0, NOW, &d), FSHM_ALLOWED);
      pair_t *slots = all_slots(s);
      look(&c, i, 2, &looked);
      CHECK_EQ(charge_looked(&c, i, &looked, &before), FSHM_ALLOWED);
      if (other) /* another call charges one more in between: that one stays */
        CHECK_EQ(apply_costs(l, FSHM_ACQUIRE, NULL, 0, NOW, &d), FSHM_ALLOWED);
      undo(&c, i, &looked, before);
      if (other) {
        uint64_t left[FSHM_MAX_LIMITS];
        CHECK_EQ(fshm_remaining(l, "k", 1, NOW, left), 3);
        for (uint32_t k = 0; k < 3; k++) CHECK_EQ(left[k], limits[k].n - 2);
        free(slots);
      } else {
        CHECK(slots_are(s, slots));
      }
    }
  }
  fshm_limiter_close(l);
  fshm_close(s);
}

static void test_costs(void) {
  fshm_segment *s = fresh_segment(100);
  const fshm_limit limits[3] = {bucket, window, sliding};
  for (uint32_t i = 0; i < 3; i++) {
    const char name[] = {(char)('a' + i), 0};
    fshm_limiter *l = fresh_limiter(s, name, &limits[i], 1);
    uint64_t n = limits[i].n;
    CHECK_EQ(apply_at(l, FSHM_ACQUIRE, "k", 0, NOW).status, FSHM_ALLOWED); /* 0: needs no room */
    CHECK_EQ(apply_at(l, FSHM_PEEK, "k", 1, NOW).remaining, n);
    fshm_decision d = apply_at(l, FSHM_ACQUIRE, "k", n, NOW);
    CHECK_EQ(d.status, FSHM_ALLOWED);
    CHECK_EQ(d.remaining, 0);
    CHECK_EQ(d.retry_after_ns, 0);
    CHECK_OP(d.reset_after_ns, >, 0);
    CHECK_EQ(apply_at(l, FSHM_ACQUIRE, "k", 0, NOW).status, FSHM_ALLOWED);
    CHECK_OP(apply_at(l, FSHM_ACQUIRE, "k", 1, NOW).retry_after_ns, >, 0);
    const uint64_t never[] = {n + 1, UINT32_MAX, UINT64_MAX};
    for (unsigned k = 0; k < 3; k++) {
      d = apply_at(l, FSHM_ACQUIRE, "k", never[k], NOW);
      CHECK_EQ(d.status, FSHM_DENIED);
      CHECK_EQ(d.retry_after_ns, FSHM_NEVER);
      d = apply_at(l, FSHM_RESERVE, "k", never[k], NOW);
      CHECK_EQ(d.status, FSHM_DENIED);
    }
    CHECK_EQ(apply_at(l, FSHM_REFUND, "k", UINT64_MAX, NOW).remaining, n);
    CHECK_EQ(apply_at(l, FSHM_CHARGE, "k", n + 1, NOW).remaining, 0); /* debt */
    CHECK_EQ(apply_at(l, FSHM_ACQUIRE, "k", 1, NOW).status, FSHM_DENIED);
    fshm_limiter_close(l);
  }
  fshm_close(s);
}

/* Blocked until the latest of the instants that were asked for, in whatever order; then one token fits. */
static void test_block(void) {
  fshm_segment *s = fresh_segment(100);
  const fshm_limit wide = {10, 60000 * MS, 0, FSHM_WINDOW, 0};
  const fshm_limit both[2] = {wide, bucket};
  fshm_limiter *l = fresh_limiter(s, "a", &bucket, 1), *two = fresh_limiter(s, "b", both, 2);
  fshm_limiter *none = fresh_limiter(s, "c", &wide, 1);
  const uint64_t orders[][3] = {{3, 5, 5}, {5, 3, 5}, {5, 5, 3}, {0, 5, 0}};
  for (unsigned i = 0; i < 4; i++) {
    CHECK_EQ(fshm_reset_key(l, "k", 1), FSHM_OK);
    if (i % 2) CHECK_EQ(apply_at(l, FSHM_ACQUIRE, "k", 4, NOW).status, FSHM_ALLOWED);
    for (unsigned k = 0; k < 3; k++)
      CHECK_EQ(apply_at(l, FSHM_BLOCK, "k", orders[i][k] * 1000 * MS, NOW).status, FSHM_ALLOWED);
    CHECK_EQ(apply_at(l, FSHM_ACQUIRE, "k", 1, NOW).retry_after_ns, 5000 * MS);
    CHECK_EQ(apply_at(l, FSHM_ACQUIRE, "k", 1, NOW + 5000 * MS - 1).status, FSHM_DENIED);
    CHECK_EQ(apply_at(l, FSHM_ACQUIRE, "k", 1, NOW + 5000 * MS).status, FSHM_ALLOWED);
    CHECK_EQ(apply_at(l, FSHM_ACQUIRE, "k", 1, NOW + 5000 * MS).status, FSHM_DENIED);
  }
  /* with a window beside it, which stays as it is; and with windows alone, where nothing can be done */
  CHECK_EQ(apply_at(two, FSHM_BLOCK, "k", 5000 * MS, NOW).status, FSHM_ALLOWED);
  CHECK_EQ(apply_at(two, FSHM_PEEK, "k", 1, NOW).retry_after_ns, 5000 * MS);
  CHECK_EQ(apply_at(two, FSHM_ACQUIRE, "k", 1, NOW + 5000 * MS).remaining, 0);
  CHECK_EQ(apply_at(two, FSHM_ACQUIRE, "k", 1, NOW + 66000 * MS).remaining, 9);
  CHECK_EQ(apply_at(none, FSHM_BLOCK, "k", 5000 * MS, NOW).status, FSHM_E_ARGUMENT);
  CHECK_EQ(apply_at(none, FSHM_PEEK, "k", 1, NOW).remaining, 10);
  /* for ever */
  CHECK_EQ(apply_at(l, FSHM_BLOCK, "k", UINT64_MAX, NOW).status, FSHM_ALLOWED);
  CHECK_EQ(apply_at(l, FSHM_PEEK, "k", 1, NOW).retry_after_ns, FSHM_NEVER);
  CHECK_EQ(fshm_reset_key(l, "k", 1), FSHM_OK);
  CHECK_EQ(apply_at(l, FSHM_PEEK, "k", 1, NOW).status, FSHM_ALLOWED);
  fshm_limiter_close(none);
  fshm_limiter_close(two);
  fshm_limiter_close(l);
  fshm_close(s);
}

/* A reservation is charged, in every bucket, as of the latest instant that any of them asks for. */
static void test_reserve(void) {
  fshm_segment *s = fresh_segment(100);
  const fshm_limit slow = {2, 20000 * MS, 2, FSHM_BUCKET, 0}; /* one in 10 s */
  const fshm_limit two[2] = {bucket, slow};
  fshm_limiter *one = fresh_limiter(s, "one", &bucket, 1), *l = fresh_limiter(s, "two", two, 2);
  uint64_t left[FSHM_MAX_LIMITS];
  fshm_decision d;

  for (int i = 0; i < 10; i++)
    CHECK_EQ(apply_costs(one, FSHM_RESERVE, NULL, 0, NOW, &d), FSHM_ALLOWED);
  for (uint64_t i = 1; i <= 20; i++) { /* served in order, a second apart */
    CHECK_EQ(apply_costs(one, FSHM_RESERVE, NULL, i * 1000 * MS - 1, NOW, &d), FSHM_DENIED);
    CHECK_EQ(apply_costs(one, FSHM_RESERVE, NULL, i * 1000 * MS, NOW, &d), FSHM_ALLOWED);
    CHECK_EQ(d.retry_after_ns, i * 1000 * MS);
  }
  CHECK_EQ(apply_at(one, FSHM_REFUND, "k", 20, NOW).status, FSHM_ALLOWED);
  CHECK_EQ(apply_at(one, FSHM_PEEK, "k", 1, NOW + 1000 * MS - 1).status, FSHM_DENIED);
  CHECK_EQ(apply_at(one, FSHM_PEEK, "k", 1, NOW + 1000 * MS).status, FSHM_ALLOWED);

  for (int i = 0; i < 2; i++)
    CHECK_EQ(apply_costs(l, FSHM_RESERVE, NULL, 0, NOW, &d), FSHM_ALLOWED);
  pair_t *before = all_slots(s);
  CHECK_EQ(apply_costs(l, FSHM_RESERVE, NULL, 10000 * MS - 1, NOW, &d), FSHM_DENIED);
  CHECK(slots_are(s, before));
  CHECK_EQ(apply_costs(l, FSHM_RESERVE, NULL, 10000 * MS, NOW, &d), FSHM_ALLOWED);
  CHECK_EQ(d.retry_after_ns, 10000 * MS); /* the caller must know when */
  /* At that instant the quick bucket has had time to fill, and one token of it is gone. */
  CHECK_EQ(fshm_remaining(l, "k", 1, NOW + 10000 * MS, left), 2);
  CHECK_EQ(left[0], 9);
  CHECK_EQ(left[1], 0);

  const fshm_limit mixed[2] = {bucket, window}; /* a window has no instant to reserve */
  fshm_limiter *m = fresh_limiter(s, "mixed", mixed, 2);
  for (int i = 0; i < 5; i++)
    CHECK_EQ(apply_costs(m, FSHM_RESERVE, NULL, UINT64_MAX, NOW, &d), FSHM_ALLOWED);
  before = all_slots(s);
  CHECK_EQ(apply_costs(m, FSHM_RESERVE, NULL, UINT64_MAX, NOW, &d), FSHM_DENIED);
  CHECK(slots_are(s, before));
  fshm_limiter_close(one);
  fshm_limiter_close(l);
  fshm_limiter_close(m);
  fshm_close(s);
}

/* Only the last in the queue can go; the instant of one before passes unused. */
static void test_cancel(void) {
  fshm_segment *s = fresh_segment(100);
  fshm_limiter *l = fresh_limiter(s, "a", &bucket, 1);
  fshm_charged tokens[3][FSHM_MAX_LIMITS];
  fshm_decision d;
  CHECK_EQ(apply_at(l, FSHM_ACQUIRE, "k", 10, NOW).status, FSHM_ALLOWED);
  for (int i = 0; i < 3; i++) {
    fshm_reserve(l, "k", 1, NULL, 60000 * MS, NOW, &d, tokens[i]);
    CHECK_EQ(d.retry_after_ns, (uint64_t)(i + 1) * 1000 * MS);
  }
  pair_t *before = all_slots(s);
  CHECK_EQ(fshm_cancel(l, "k", 1, NULL, tokens[0], NOW), 0);
  CHECK_EQ(fshm_cancel(l, "k", 1, NULL, tokens[1], NOW), 0);
  CHECK(slots_are(s, before));
  CHECK_EQ(fshm_cancel(l, "k", 1, NULL, tokens[2], NOW), 1);
  CHECK_EQ(fshm_cancel(l, "k", 1, NULL, tokens[2], NOW), 0); /* once */
  CHECK_EQ(fshm_cancel(l, "k", 1, NULL, tokens[1], NOW), 1); /* now the last */
  fshm_reserve(l, "k", 1, NULL, 60000 * MS, NOW, &d, tokens[1]);
  CHECK_EQ(d.retry_after_ns, 2000 * MS); /* behind the first, who still comes */
  fshm_limiter_close(l);
  fshm_close(s);
}

/* A new slot's state is of the time at which it is put, not of that at which the call began. */
static void test_first_state_is_of_now(void) {
  fshm_segment *s = fresh_segment(100);
  const fshm_limit kinds[3] = {bucket, window, sliding};
  for (int i = 0; i < 3; i++) {
    const char name[] = {(char)('a' + i), 0};
    fshm_limiter *l = fresh_limiter(s, name, &kinds[i], 1);
    (void)usleep(1000);
    uint64_t now = segment_now(s);
    call_t c = {.s = s, .index = l->index, .now = 1, .at = 1, .costs = ones};
    CHECK(limits_load(s, l->index, &c.snapshot));
    verdict_t v = {0};
    const uint32_t ops[] = {FSHM_ACQUIRE, FSHM_CHARGE};
    for (unsigned o = 0; o < 2; o++) {
      first_t first = {&c, 0, ops[o], &v, false};
      uint64_t due = kinds[i].per_ns / (i ? 1 : kinds[i].n);
      CHECK_OP(state_expires(first_state(&first)), >=, now + due);
    }
    fshm_limiter_close(l);
  }
  fshm_close(s);
}

/* Limits that change at run time, by any process: consumed tokens stay consumed. */
static void test_change(void) {
  fshm_segment *s = fresh_segment(100);
  fshm_limit l = {100, 100000 * MS, 100, FSHM_BUCKET, 0};
  fshm_limiter *a = fresh_limiter(s, "a", &l, 1);
  CHECK_EQ(apply_at(a, FSHM_ACQUIRE, "k", 40, NOW).remaining, 60);
  const uint64_t sizes[] = {50, 200, 41, 1000, 100};
  for (unsigned i = 0; i < 5; i++) {
    l.n = l.burst = sizes[i];
    l.per_ns = sizes[i] * (i + 3) * 10 * MS;
    fshm_limiter_close(fresh_limiter(s, "a", &l, 1));
    CHECK_EQ(apply_at(a, FSHM_PEEK, "k", 1, NOW).remaining, sizes[i] - 40);
    if (i % 2) continue; /* charged or not in between */
    CHECK_EQ(apply_at(a, FSHM_ACQUIRE, "k", 1, NOW).status, FSHM_ALLOWED);
    CHECK_EQ(apply_at(a, FSHM_REFUND, "k", 1, NOW).remaining, sizes[i] - 40);
  }
  l = window; /* of another kind: what was consumed stays consumed */
  l.n = 45;
  fshm_limiter_close(fresh_limiter(s, "a", &l, 1));
  CHECK_EQ(apply_at(a, FSHM_ACQUIRE, "k", 5, NOW).status, FSHM_ALLOWED);
  CHECK_EQ(apply_at(a, FSHM_ACQUIRE, "k", 1, NOW).status, FSHM_DENIED);
  l.n = 3;
  fshm_limiter_close(fresh_limiter(s, "a", &l, 1));
  CHECK_EQ(apply_at(a, FSHM_ACQUIRE, "k", 1, NOW).status, FSHM_DENIED);
  l.n = 47;
  fshm_limiter_close(fresh_limiter(s, "a", &l, 1));
  CHECK_EQ(apply_at(a, FSHM_ACQUIRE, "k", 2, NOW).status, FSHM_ALLOWED);
  CHECK_EQ(apply_at(a, FSHM_ACQUIRE, "k", 1, NOW).status, FSHM_DENIED);
  fshm_limiter_close(a);
  fshm_close(s);
}

/* Several processes, two limits, one key: together exactly the tighter one, and the other is charged
 * for what was admitted, no more. */
typedef struct {
  fshm_limiter *limiter;
  _Atomic uint64_t admitted;
} crowd_t;

static void crowd(int me, void *with) {
  crowd_t *c = with;
  (void)me;
  for (int i = 0; i < 20000; i++)
    if (apply_at(c->limiter, FSHM_ACQUIRE, "k", 1, NOW).status == FSHM_ALLOWED)
      atomic_fetch_add(&c->admitted, 1);
}

static void test_crowd(void) {
  fshm_segment *s = fresh_segment(100);
  const fshm_limit wide = {100000, 100000 * 10000 * MS, 100000, FSHM_BUCKET, 0};
  const fshm_limit tight = {1000, 60000 * MS, 0, FSHM_WINDOW, 0};
  for (int order = 0; order < 2; order++) {
    const fshm_limit limits[2] = {order ? wide : tight, order ? tight : wide};
    crowd_t *c = shared_memory(sizeof *c);
    c->limiter = fresh_limiter(s, order ? "b" : "a", limits, 2);
    run_children(4, crowd, c);
    CHECK_EQ(c->admitted, 1000);
    uint64_t left[FSHM_MAX_LIMITS];
    CHECK_EQ(fshm_remaining(c->limiter, "k", 1, NOW, left), 2);
    CHECK_EQ(left[order ? 1 : 0], 0);
    CHECK_EQ(left[order ? 0 : 1], 99000);
    fshm_limiter_close(c->limiter);
    (void)munmap(c, sizeof *c);
  }
  fshm_close(s);
}

static void test_full_table(void) {
  fshm_segment *s = fresh_segment(1);
  fshm_limiter *l = fresh_limiter(s, "a", &window, 1);
  const fshm_limit both[2] = {window, sliding};
  fshm_limiter *two = fresh_limiter(s, "two", both, 2);
  const char *keys[] = {"a", "b", "c"};
  for (int i = 0; i < 3; i++)
    CHECK_EQ(apply_at(l, FSHM_ACQUIRE, keys[i], 1, NOW).status, FSHM_ALLOWED);
  /* One slot is left, and two are needed: refused, and the one goes back. */
  CHECK_EQ(apply_at(two, FSHM_ACQUIRE, "d", 1, NOW).status, FSHM_FULL);
  CHECK_EQ(fshm_live_slots(s, NULL, NOW), 3);
  CHECK_EQ(apply_at(l, FSHM_ACQUIRE, "d", 1, NOW).status, FSHM_ALLOWED);
  CHECK_EQ(apply_at(l, FSHM_ACQUIRE, "e", 1, NOW).status, FSHM_FULL);
  CHECK_EQ(apply_at(l, FSHM_ACQUIRE, "e", 0, NOW).status, FSHM_ALLOWED); /* needs no slot */
  CHECK_EQ(apply_at(l, FSHM_PEEK, "e", 1, NOW).status, FSHM_ALLOWED);
  CHECK_EQ(apply_at(l, FSHM_CHARGE, "e", 1, NOW).status, FSHM_FULL);
  CHECK_EQ(apply_at(l, FSHM_REFUND, "e", 1, NOW).status, FSHM_ALLOWED);
  for (int i = 0; i < 3; i++)
    CHECK_EQ(apply_at(l, FSHM_ACQUIRE, keys[i], 4, NOW).status, FSHM_ALLOWED);
  fshm_limiter_close(l);
  fshm_limiter_close(two);
  fshm_close(s);
}

int main(void) {
  test_denial_consumes_nothing();
  test_undo();
  test_costs();
  test_block();
  test_reserve();
  test_cancel();
  test_first_state_is_of_now();
  test_change();
  test_crowd();
  test_full_table();
  return done();
}
