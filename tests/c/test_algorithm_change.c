/* test_algorithm_change.c - the algorithms: refunds, debt, and limits that change. */
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

/* What the limiter does with a verdict: a state that has expired already needs no slot. */
static bool take(const rule_t *r, uint64_t *state, uint64_t now, uint64_t cost) {
  verdict_t v = rule_take(r, *state, now, now, cost);
  if (v.retry) return false;
  *state = state_expires(v.next) <= now ? 0 : v.next;
  return true;
}

static bool same_verdict(const rule_t *r, uint64_t a, uint64_t b, uint64_t now, uint64_t cost) {
  verdict_t x = rule_take(r, a, now, now, cost), y = rule_take(r, b, now, now, cost);
  return x.retry == y.retry && x.used_before == y.used_before && x.used_after == y.used_after &&
         x.reset == y.reset && (!cost || x.retry || x.next == y.next);
}

/* Take and give back, at once: as before; and a refund never leaves more than was there at first. */
static void test_refund(void) {
  for (int i = 0; i < 100000; i++) {
    fshm_limit l = some_limit((uint32_t)i % 3, 10000);
    rule_t r = rule_make(&l);
    uint64_t now = 1 + random_below(TIME_MAX / 8), cost = random_scaled(1, l.n), state = 0, taken;
    state = rule_charge(&r, 0, now, random_scaled(1, l.n));
    taken = state;
    if (take(&r, &taken, now, cost)) {
      const fshm_charged put = charged_by(&r, taken, now, 0);
      CHECK(same_verdict(&r, rule_refund(&r, taken, now, cost, &put), state, now, 1));
    }
    uint64_t all = rule_refund(&r, state, now, UINT64_MAX, NULL);
    CHECK(same_verdict(&r, all, 0, now, cost));
  }
}

/* Debt: after a charge of more than there is, the next request waits it out in full. */
static void test_debt(void) {
  for (int i = 0; i < 20000; i++) {
    fshm_limit l = some_limit((uint32_t)i % 3, 10000);
    rule_t r = rule_make(&l);
    uint64_t now = l.per_ns * (1 + random_below(5)), room = l.kind == FSHM_BUCKET ? l.burst : l.n;
    uint64_t state = rule_charge(&r, 0, now, room + 1);
    verdict_t v = rule_take(&r, state, now, now, 1);
    CHECK_OP(v.retry, >, 0);
    if (l.kind == FSHM_BUCKET) CHECK((wide_t)v.retry * r.den + r.den >= (wide_t)2 * r.num);
    if (l.kind == FSHM_WINDOW) CHECK_OP(v.retry, >=, l.per_ns + l.per_ns / l.n);
    if (l.kind == FSHM_SLIDING) CHECK_OP(v.retry, >, l.per_ns);
    CHECK(take(&r, &state, now + v.retry, 1));
  }
}

/* Debt in pieces is waited out as long as the same debt at once: what is rounded up is the end without it, once for
 * each bit of the count. */
static void test_window_debt_is_linear(void) {
  for (int i = 0; i < 20000; i++) {
    fshm_limit l = some_limit(FSHM_WINDOW, 1000);
    rule_t r = rule_make(&l);
    uint64_t now = 1 + random_below(TIME_MAX / 8), total = 0, pieces = 1 + random_below(12);
    uint64_t state = 0;
    for (uint64_t k = 0; k < pieces; k++) {
      uint64_t cost = random_scaled(1, 2 * l.n);
      state = rule_charge(&r, state, now, cost);
      total += cost;
    }
    uint64_t lasts = state_expires(state) - now, at_once;
    at_once = state_expires(rule_charge(&r, 0, now, total)) - now;
    const uint64_t unit = UINT64_C(2) << bit_length(max_u64(l.n, total));
    CHECK_OP(lasts + unit, >=, at_once);
    CHECK_OP(lasts, <=, at_once + unit);
    wide_t due = (wide_t)l.per_ns * max_u64(total, l.n) / l.n;
    CHECK(lasts >= due && lasts <= due + unit);
  }
}

/* Given back late: what has drained, or faded, or whose window is over, is not given back again. */
static void test_late_refund(void) {
  for (int i = 0; i < 60000; i++) {
    fshm_limit l = some_limit((uint32_t)i % 3, 200);
    rule_t r = rule_make(&l);
    uint64_t now = l.per_ns + random_below(TIME_MAX / 8), cost = random_scaled(1, l.n);
    uint64_t put = rule_charge(&r, 0, now, cost), later, after, with, without;
    const fshm_charged charge = charged_by(&r, put, now, 0);
    if (l.kind == FSHM_BUCKET) { /* drained in part; others' charge behind it keeps its full time */
      later = now + random_below(2 * bucket_increment(&r, cost));
      without = rule_charge(&r, 0, later, 1);
      with = rule_charge(&r, put, later, 1);
      after = rule_refund(&r, with, later, cost, &charge);
      CHECK_OP(after, >=, without);
      CHECK(put > later || after == with);
    } else { /* over: a later window's charges are left alone */
      later = state_expires(put) + random_below(3 * l.per_ns);
      with = rule_charge(&r, put, later, cost);
      CHECK_EQ(rule_refund(&r, with, later, cost, &charge), with);
    }
  }
  fshm_limit l = {100, 60 * SECOND, 0, FSHM_SLIDING,
                  0}; /* faded in part: taken from the one before */
  rule_t r = rule_make(&l);
  uint64_t put = rule_charge(&r, 0, 90 * SECOND, 60);
  uint64_t state = rule_charge(&r, put, 150 * SECOND, 40);
  CHECK_EQ(rule_take(&r, state, 150 * SECOND, 150 * SECOND, 1).used_before, 70);
  const fshm_charged charge = charged_by(&r, put, 90 * SECOND, 0);
  state = rule_refund(&r, state, 150 * SECOND, 60, &charge);
  CHECK_EQ(rule_take(&r, state, 150 * SECOND, 150 * SECOND, 1).used_before, 40);
}

/* Given back after a change of the pace, in whichever direction: what has drained by then is not given back, as others may
 * have used it. */
static void test_refund_at_another_pace(void) {
  uint64_t drained = 0, faster = 0;
  for (int i = 0; i < 200000; i++) {
    fshm_limit a = some_limit(FSHM_BUCKET, 1000), b = some_limit(FSHM_BUCKET, 1000);
    rule_t old = rule_make(&a), r = rule_make(&b);
    uint64_t now = 1 + random_below(TIME_MAX / 8), cost = random_scaled(1, a.burst);
    const uint64_t put = rule_charge(&old, 0, now, cost);
    const fshm_charged charge = charged_by(&old, put, now, 0);
    const uint64_t changed = now + random_below(put - now),
                   state = rule_convert(&r, &old, put, changed);
    const uint64_t later = changed + random_below(2 * (state - changed)),
                   others = random_below(1000);

    uint64_t with = rule_charge(&r, state, later, others),
             without = rule_charge(&r, 0, later, others);
    if (with == TIME_MAX) continue; /* the end of time: some of it is not counted */
    const uint64_t after = rule_refund(&r, with, later, cost, &charge);
    CHECK_OP(after, >=, without);
    CHECK_OP(after, <=, with);
    drained += state <= later;
    faster += bucket_increment(&r, 1) < bucket_increment(&old, 1);
  }
  CHECK_OP(drained, >, 10000);
  CHECK_OP(faster, >, 10000);
}

/* The same tokens under other limits: never fewer, and at most the rounding more. */
static void test_conversion(void) {
  for (int i = 0; i < 100000; i++) {
    fshm_limit a = some_limit(FSHM_BUCKET, 100000), b = some_limit(FSHM_BUCKET, 100000);
    a.per_ns = min_u64(a.per_ns, max_u64(a.n, UINT64_C(1) << 40));
    b.per_ns = min_u64(b.per_ns, max_u64(b.n, UINT64_C(1) << 40));
    rule_t old = rule_make(&a), r = rule_make(&b);
    uint64_t now = 1 + random_below(TIME_MAX / 8);
    uint64_t state = rule_charge(&old, 0, now, random_scaled(1, a.burst));
    uint64_t next = bucket_convert(&r, &old, state, now);
    wide_t before = (wide_t)(state - now) * old.den * r.num, scale = (wide_t)r.den * old.num;
    wide_t after = (wide_t)(next - now) * scale;
    CHECK(after >= before);
    CHECK(after < before + 3 * scale);
    CHECK_EQ(bucket_convert(&r, &r, state, now), state);
  }
}

/* The tokens stay, whatever the change: of kind, n, per or burst. */
static void test_tokens_survive_a_change(void) {
  for (int i = 0; i < 300000; i++) {
    fshm_limit a = some_limit((uint32_t)i % 3, 1000), b = some_limit((uint32_t)i / 3 % 3, 1000);
    if (random_below(2)) b.per_ns = a.per_ns;
    if (!limit_valid(&b)) continue;
    rule_t old = rule_make(&a), r = rule_make(&b);
    uint64_t now = 1 + random_below(TIME_MAX / 8), state = 0;
    for (uint64_t k = random_below(3); k-- > 0; now += random_below(a.per_ns))
      state = rule_charge(&old, state, now, random_scaled(1, a.n));
    state = rule_charge(&old, state, now, 1 + random_below(a.n));
    uint64_t used = rule_used(&old, state, now), moved = rule_convert(&r, &old, state, now);
    if (a.kind == FSHM_WINDOW && b.kind == FSHM_WINDOW && state_expires(moved) <= now) continue;
    if (state_expires(moved) > TIME_MAX - TIME_MAX / 64) continue; /* the end of time */
    if (b.kind == FSHM_SLIDING) /* as many as its field holds, which is no fewer than n */
      CHECK_OP(rule_used(&r, moved, now), >=, min_u64(used, b.n));
    else
      CHECK_OP(rule_used(&r, moved, now), >=, used);
    if (used <= rule_capacity(&r)) /* and none are made of nothing, but for rounding */
      CHECK_OP(rule_used(&r, moved, now), <=, used + 2);
  }
}

/* A window keeps its tokens and its end, however often n is changed and however low: and what exceeds a lowered n is no
 * debt. */
static void test_window_and_any_n(void) {
  for (int i = 0; i < 100000; i++) {
    fshm_limit a = some_limit(FSHM_WINDOW, 100000), b = a;
    rule_t first = rule_make(&a), last = first;
    uint64_t now = 1 + random_below(TIME_MAX / 8), used = 1 + random_below(a.n);
    uint64_t state = rule_charge(&first, 0, now, used), end = state_expires(state), largest = a.n;
    for (int change = 0; change < 5; change++) {
      b.n = random_scaled(1, 100000);
      largest = max_u64(largest, b.n);
      rule_t r = rule_make(&b);
      uint64_t moved;
      if (!rule_settles(&r, &last, state, now, &moved)) continue; /* stays where it is */
      CHECK_OP(state_expires(moved), <=, end + 4 * largest);
      state = moved;
      last = r;
      CHECK_EQ(rule_used(&last, state, now), used);
    }
    verdict_t v =
        rule_take(&first, rule_convert(&first, &last, state, now), now, now, a.n - used + 1);
    CHECK_OP(v.retry, >, 0);
    v = rule_take(&first, rule_convert(&first, &last, state, now), now, now, a.n - used);
    CHECK_EQ(v.retry, 0);
  }
}

int main(void) {
  test_refund();
  test_debt();
  test_window_debt_is_linear();
  test_late_refund();
  test_refund_at_another_pace();
  test_conversion();
  test_tokens_survive_a_change();
  test_window_and_any_n();
  return done();
}
