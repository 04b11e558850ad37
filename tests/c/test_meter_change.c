/* test_meter_change.c - meters: what is given back, what is owed, and limits that change. */
#include "../../csrc/unity.c"

#include "check.h"

#define SECOND UINT64_C(1000000000)

static fshm_limit some_limit(uint32_t kind, uint64_t most_n) {
  fshm_limit l = {.kind = kind};
again:
  l.per_ns = random_scaled(kind == FSHM_SLIDING ? 1 << 14 : 1000, UINT64_C(1) << 50);
  l.n = random_scaled(1, min_u64(most_n, limit_largest_n(kind, l.per_ns)));
  if (kind == FSHM_BUCKET) {
    l.burst = random_scaled(1, l.n);
    l.strict = (uint32_t)random_below(2);
  }
  if (!limit_valid(&l)) goto again; /* would not be full again before the end of time */
  return l;
}

/* What the limiter does with a verdict: a state that has expired already needs no cell. */
static bool take(const rule_t *r, uint64_t *state, uint64_t now, uint64_t cost) {
  verdict_t v = meter_take(r, 0, *state, now, now, cost);
  if (v.retry) return false;
  *state = state_expires(v.next) <= now ? 0 : v.next;
  return true;
}

static bool same_verdict(const rule_t *r, uint64_t a, uint64_t b, uint64_t now, uint64_t cost) {
  verdict_t x = meter_take(r, 0, a, now, now, cost), y = meter_take(r, 0, b, now, now, cost);
  return x.retry == y.retry && x.used_before == y.used_before && x.used_after == y.used_after &&
         x.reset == y.reset && (!cost || x.retry || x.next == y.next);
}

/* Take and give back, at once: as before; and a refund never leaves more than was there at first. */
static void test_refund(void) {
  for (int i = 0; i < 100000; i++) {
    fshm_limit l = some_limit((uint32_t)i % 3, 10000);
    rule_t r = rule_make(&l);
    uint64_t now = 1 + random_below(TIME_MAX / 8), cost = random_scaled(1, l.n), state = 0, taken;
    state = meter_charge(&r, 0, 0, now, random_scaled(1, l.n));
    taken = state;
    if (take(&r, &taken, now, cost))
      CHECK(same_verdict(&r, meter_refund(&r, 0, taken, now, cost, taken), state, now, 1));
    uint64_t all = meter_refund(&r, 0, state, now, UINT64_MAX, 0);
    CHECK(same_verdict(&r, all, 0, now, cost));
  }
}

/* Debt: after a charge of more than there is, the next request waits it out in full. */
static void test_debt(void) {
  for (int i = 0; i < 20000; i++) {
    fshm_limit l = some_limit((uint32_t)i % 3, 10000);
    rule_t r = rule_make(&l);
    uint64_t now = l.per_ns * (1 + random_below(5)), room = l.kind == FSHM_BUCKET ? l.burst : l.n;
    uint64_t state = meter_charge(&r, 0, 0, now, room + 1);
    verdict_t v = meter_take(&r, 0, state, now, now, 1);
    CHECK_OP(v.retry, >, 0);
    if (l.kind == FSHM_BUCKET) CHECK((wide_t)v.retry * r.den + r.den >= (wide_t)2 * r.num);
    if (l.kind == FSHM_WINDOW) CHECK_OP(v.retry, >=, l.per_ns + l.per_ns / l.n);
    if (l.kind == FSHM_SLIDING) CHECK_OP(v.retry, >, l.per_ns);
    CHECK(take(&r, &state, now + v.retry, 1));
  }
}

/* Debt in pieces is waited out as long as the same debt at once; each piece may round 2n ns up. */
static void test_window_debt_is_linear(void) {
  for (int i = 0; i < 20000; i++) {
    fshm_limit l = some_limit(FSHM_WINDOW, 1000);
    rule_t r = rule_make(&l);
    uint64_t now = 1 + random_below(TIME_MAX / 8), total = 0, pieces = 1 + random_below(12);
    uint64_t state = 0;
    for (uint64_t k = 0; k < pieces; k++) {
      uint64_t cost = random_scaled(1, 2 * l.n);
      state = meter_charge(&r, 0, state, now, cost);
      total += cost;
    }
    uint64_t lasts = state_expires(state) - now, at_once;
    at_once = state_expires(meter_charge(&r, 0, 0, now, total)) - now;
    CHECK_OP(lasts + 2 * l.n, >=, at_once);
    CHECK_OP(lasts, <=, at_once + pieces * (2 * l.n + 1));
    wide_t due = (wide_t)l.per_ns * max_u64(total, l.n) / l.n;
    CHECK(lasts >= due && lasts <= due + pieces * (2 * l.n + 1));
  }
}

/* Given back late: what has drained, or faded, or whose window is over, is not given back again. */
static void test_late_refund(void) {
  for (int i = 0; i < 60000; i++) {
    fshm_limit l = some_limit((uint32_t)i % 3, 200);
    rule_t r = rule_make(&l);
    uint64_t now = l.per_ns + random_below(TIME_MAX / 8), cost = random_scaled(1, l.n);
    uint64_t put = meter_charge(&r, 0, 0, now, cost), later, after, with, without;
    if (l.kind == FSHM_BUCKET) { /* drained in part; others' charge behind it keeps its full time */
      later = now + random_below(2 * bucket_increment(&r, cost));
      without = meter_charge(&r, 0, 0, later, 1);
      with = meter_charge(&r, 0, put, later, 1);
      after = meter_refund(&r, 0, with, later, cost, put);
      CHECK_OP(after, >=, without);
      CHECK(put > later || after == with);
    } else { /* over: a later window's charges are left alone */
      later = state_expires(put) + random_below(3 * l.per_ns);
      with = meter_charge(&r, 0, put, later, cost);
      CHECK_EQ(meter_refund(&r, 0, with, later, cost, put), with);
    }
  }
  fshm_limit l = {100, 60 * SECOND, 0, FSHM_SLIDING,
                  0}; /* faded in part: taken from the one before */
  rule_t r = rule_make(&l);
  uint64_t put = meter_charge(&r, 0, 0, 90 * SECOND, 60);
  uint64_t state = meter_charge(&r, 0, put, 150 * SECOND, 40);
  CHECK_EQ(meter_take(&r, 0, state, 150 * SECOND, 150 * SECOND, 1).used_before, 70);
  state = meter_refund(&r, 0, state, 150 * SECOND, 60, put);
  CHECK_EQ(meter_take(&r, 0, state, 150 * SECOND, 150 * SECOND, 1).used_before, 40);
}

/* The same tokens under other limits: never fewer, and at most the rounding more. */
static void test_conversion(void) {
  for (int i = 0; i < 100000; i++) {
    fshm_limit a = some_limit(FSHM_BUCKET, 100000), b = some_limit(FSHM_BUCKET, 100000);
    a.per_ns = min_u64(a.per_ns, max_u64(a.n, UINT64_C(1) << 40));
    b.per_ns = min_u64(b.per_ns, max_u64(b.n, UINT64_C(1) << 40));
    rule_t old = rule_make(&a), r = rule_make(&b);
    uint64_t now = 1 + random_below(TIME_MAX / 8);
    uint64_t state = meter_charge(&old, 0, 0, now, random_scaled(1, a.burst));
    uint64_t next = bucket_convert(&r, 0, &old, state, now);
    wide_t before = (wide_t)(state - now) * old.den * r.num, scale = (wide_t)r.den * old.num;
    wide_t after = (wide_t)(next - now) * scale;
    CHECK(after >= before);
    CHECK(after < before + 3 * scale);
    CHECK(bucket_convert(&r, 0, &r, state, now) >= state);
    uint64_t unknown = bucket_convert(&r, 0, NULL, state, now); /* forgotten limits: all is used */
    CHECK(meter_take(&r, 0, unknown, now, now, 1).retry);
  }
}

/* The counts stay when n and per change, whatever the change. */
static void counts_survive_a_change(uint32_t kind) {
  for (int i = 0; i < 100000; i++) {
    fshm_limit a = some_limit(kind, 1000), b = some_limit(kind, 1000);
    if (random_below(2)) b.per_ns = a.per_ns + random_below(a.per_ns / 4);
    if (!limit_valid(&b)) continue;
    rule_t old = rule_make(&a), r = rule_make(&b);
    uint64_t now = 1 + random_below(TIME_MAX / 8), cost = 1 + random_below(a.n);
    uint64_t state = meter_charge(&old, 0, 0, now, cost);
    if (kind == FSHM_SLIDING) r.room = now; /* as publish() notes a change of `per` */
    uint64_t used = meter_take(&r, 0, state, now, now, 1).used_before;
    CHECK_OP(used, >=, min_u64(cost, b.n));
  }
}

static void test_window_survives_a_change(void) { counts_survive_a_change(FSHM_WINDOW); }
static void test_sliding_survives_a_change(void) { counts_survive_a_change(FSHM_SLIDING); }

/* A sliding limit whose `per` is changed, wherever in its window, forgets nothing. */
static void test_sliding_other_period(void) {
  static const uint64_t pairs[][2] = {{3600, 86400}, {86400, 3600}, {40, 60}, {60, 40}, {60, 61}};
  for (int i = 0; i < 50000; i++) {
    const uint64_t *p = pairs[i % 5];
    fshm_limit a = {100, p[0] * SECOND, 0, FSHM_SLIDING, 0}, b = a;
    b.per_ns = p[1] * SECOND;
    rule_t old = rule_make(&a), r = rule_make(&b);
    uint64_t now = 2 * a.per_ns + random_below(TIME_MAX / 8), cost = 1 + random_below(100);
    uint64_t state = meter_charge(&old, 0, 0, now - random_below(a.per_ns), 100 - cost);
    state = meter_charge(&old, 0, state, now, cost);
    uint64_t before = meter_take(&old, 0, state, now, now, 1).used_before;
    r.room = now;
    CHECK_OP(meter_take(&r, 0, state, now, now, 1).used_before, >=, before);
    state = meter_charge(&r, 0, state, now + 1, 1);
    CHECK_OP(meter_take(&r, 0, state, now + 1, now + 1, 1).used_before, >=, before);
  }
}

int main(void) {
  test_refund();
  test_debt();
  test_window_debt_is_linear();
  test_late_refund();
  test_conversion();
  test_window_survives_a_change();
  test_sliding_survives_a_change();
  test_sliding_other_period();
  return done();
}
