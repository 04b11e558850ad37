/* test_algorithms.c - the arithmetic of each algorithm, edge by edge, and with any numbers at all. */
#include "../../csrc/unity.c"

#include "check.h"

#define SECOND UINT64_C(1000000000)

static fshm_limit bucket(uint64_t n, uint64_t per, uint64_t burst, bool strict) {
  return (fshm_limit){n, per, burst, FSHM_BUCKET, strict};
}

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

static uint64_t take_singly(const rule_t *r, uint64_t *state, uint64_t now, uint64_t most) {
  uint64_t n = 0;
  while (n < most && take(r, state, now, 1)) n++;
  return n;
}

/* A limit that passes the check can be used: never refused as damaged afterwards. */
static void test_valid_is_sane(void) {
  unsigned refused = 0;
  for (int i = 0; i < 200000; i++) {
    fshm_limit l = {.kind = (uint32_t)i % 3, .strict = (uint32_t)random_below(2)};
    l.per_ns = random_scaled(1000, BUCKET_MAX_PER);
    l.n = random_scaled(1, max_u64(1, limit_largest_n(l.kind, l.per_ns)));
    l.burst = random_below(3) ? random_scaled(1, l.n) : l.n;
    refused += !limit_valid(&l);
    if (!limit_valid(&l)) continue;
    rule_t r = rule_make(&l);
    CHECK(rule_sane(&r));
    uint64_t state = 0, most = l.kind == FSHM_BUCKET ? l.burst : l.n;
    CHECK(take(&r, &state, 1, most) && !take(&r, &state, 1, 1));
  }
  CHECK_OP(refused, >, 0);
}

/* An interval that is no whole number of ns: a request as large as the burst fits an unused bucket. */
static void test_fractional_interval(void) {
  for (int i = 0; i < 20000; i++) {
    fshm_limit l = some_limit(FSHM_BUCKET, 1000000);
    l.per_ns = 1000 + random_below(l.n * 20); /* from far below one ns up */
    if (random_below(2)) l.burst = 1;
    if (!limit_valid(&l)) continue;
    rule_t r = rule_make(&l);
    uint64_t state = 0, now = 1 + random_below(TIME_MAX / 4);
    CHECK(take(&r, &state, now, l.burst));
    uint64_t full = minus(state & TIME_MAX, now);
    CHECK(take(&r, &state, now + full, l.burst)); /* and again when it is full again */
  }
}

/* From COARSE up, exactly `burst` fit at one instant, however they are split, dividing or not. */
static void test_burst_is_exact(void) {
  for (int i = 0; i < 2000; i++) {
    fshm_limit l = some_limit(FSHM_BUCKET, 2000);
    l.per_ns = max_u64(l.per_ns, l.n * COARSE + random_below(1000));
    if (!limit_valid(&l)) continue;
    rule_t r = rule_make(&l);
    uint64_t state = 0, split = 0, now = 1 + random_below(TIME_MAX / 4), got = 0;
    CHECK_EQ(take_singly(&r, &state, now, l.n + 2), l.burst);
    for (uint64_t cost; got < l.burst; got += cost) {
      cost = 1 + random_below(l.burst - got);
      CHECK(take(&r, &split, now, cost));
    }
    CHECK(!take(&r, &split, now, 1));
    CHECK_EQ(state, split);
  }
}

/* Below, each request may lose under 1 ns: never more than burst, and none lost that costs no ns. */
static void test_burst_of_fast_buckets(void) {
  for (int i = 0; i < 2000; i++) {
    fshm_limit l = some_limit(FSHM_BUCKET, 3000);
    l.per_ns = 1000 + random_below(l.n * COARSE);
    if (!limit_valid(&l)) continue;
    rule_t r = rule_make(&l);
    uint64_t state = 0, now = 1 + random_below(TIME_MAX / 4);
    CHECK_EQ(verdict_remaining(&r, 0), l.burst);
    uint64_t got = take_singly(&r, &state, now, l.n + 2);
    CHECK_OP(got, <=, l.burst);
    CHECK((wide_t)got * (r.num + r.den) + r.den > (wide_t)(l.burst - 1) * r.num); /* < 1 ns each */
    CHECK_EQ(got, r.room / r.unit + 1);
    state = 0;
    CHECK(take(&r, &state, now, l.burst)); /* rounded up once for the request */
    CHECK(!take(&r, &state, now, 1));
  }
}

/* Denied until the nanosecond before, admitted from that on; and `remaining` is what fits. */
static void test_answers_are_exact(void) {
  for (int i = 0; i < 60000; i++) {
    fshm_limit l = some_limit((uint32_t)i % 3, 1 + random_below(UINT64_C(1) << 20));
    rule_t r = rule_make(&l);
    uint64_t state = 0, now = 1 + random_below(TIME_MAX / 8);
    for (int step = 0; step < 12; step++) {
      uint64_t cost = random_below(3) ? random_scaled(1, l.n) : 1;
      if (!random_below(8)) state = rule_charge(&r, state, now, cost);
      if (!random_below(8)) state = rule_refund(&r, state, now, cost, NULL);
      verdict_t v = rule_take(&r, state, now, now, cost);
      uint64_t left = verdict_remaining(&r, v.used_before);
      CHECK(!left || !rule_take(&r, state, now, now, left).retry);
      CHECK(rule_take(&r, state, now, now, left + 1).retry);
      if (v.retry == UINT64_MAX) {
        CHECK(l.kind == FSHM_BUCKET ? cost > l.burst : cost > l.n);
      } else if (v.retry) {
        CHECK_OP(cost, <=, l.kind == FSHM_BUCKET ? l.burst : l.n);
        CHECK(rule_take(&r, state, now + v.retry - 1, now + v.retry - 1, cost).retry);
        uint64_t between = now + random_below(v.retry);
        CHECK_EQ(rule_take(&r, state, between, between, cost).retry, now + v.retry - between);
        now += v.retry;
        CHECK(!rule_take(&r, state, now, now, cost).retry);
      }
      (void)take(&r, &state, now, cost);
      now += random_scaled(1, l.per_ns);
    }
  }
}

/* An interval rounded to whole ns for each token would be 17 % off: 6 ns where 5.0000000046 are due. */
static void test_millions_of_tokens(void) {
  const uint64_t rates[] = {10 * 1000 * 1000, 9999991, UINT64_C(11999999989)};
  for (unsigned i = 0; i < 3; i++) {
    fshm_limit l = bucket(rates[i], 60 * SECOND, rates[i] / 60, false);
    rule_t r = rule_make(&l);
    uint64_t state = 0, now = SECOND, got = 0, last = now + 600 * SECOND;
    for (uint64_t cost; now <= last;) {
      cost = 1 + random_below(l.burst / 4);
      verdict_t v = rule_take(&r, state, now, now, cost);
      if (v.retry) {
        now += v.retry;
        continue;
      }
      state = v.next;
      got += cost;
    }
    CHECK_OP(got, <=, l.burst + 10 * rates[i]);
    CHECK_OP(got, >=, 10 * rates[i] - rates[i] / 100000);
  }
}

/* Strict: the n+1st admission is always more than `per` after the first of the n before it. */
static void test_strict_bound(void) {
  for (int i = 0; i < 400; i++) {
    fshm_limit l = some_limit(FSHM_BUCKET, 60);
    l.strict = 1;
    rule_t r = rule_make(&l);
    uint64_t times[64], n = 0, state = 0, now = 1 + random_below(TIME_MAX / 8);
    for (int step = 0; step < 1500; step++) {
      verdict_t v = rule_take(&r, state, now, now, 1);
      if (v.retry) {
        now += random_below(3) ? v.retry : random_scaled(1, 2 * l.per_ns);
        continue;
      }
      if (n >= l.n) CHECK_OP(now - times[(n - l.n) % 64], >, l.per_ns);
      times[n++ % 64] = now;
      state = v.next;
    }
    CHECK_OP(n, >, l.n);
  }
}

static void test_window(void) {
  for (int i = 0; i < 3000; i++) {
    fshm_limit l = some_limit(FSHM_WINDOW, 500);
    rule_t r = rule_make(&l);
    uint64_t state = 0, begin = 1 + random_below(TIME_MAX / 8), now = begin, got = 0;
    CHECK(take(&r, &state, now, 1));
    for (got = 1; got < l.n; got++) {
      now = begin + random_below(l.per_ns);
      CHECK(take(&r, &state, now, 1));
    }
    CHECK(!take(&r, &state, begin + l.per_ns - 1, 1));
    verdict_t v = rule_take(&r, state, begin, begin, 1);
    CHECK_OP(v.retry, >=, l.per_ns); /* the first hit began it; it may last up to 2n ns longer */
    CHECK_OP(v.retry, <=, l.per_ns + 2 * l.n);
    CHECK(take(&r, &state, begin + v.retry, l.n));
  }
}

/* What was charged to a window that is not full comes back whole, however its end was rounded. */
static void test_window_refund(void) {
  for (int i = 0; i < 3000; i++) {
    fshm_limit l = some_limit(FSHM_WINDOW, (UINT64_C(1) << 31) - 1);
    rule_t r = rule_make(&l);
    uint64_t begin = 1 + random_below(TIME_MAX / 8), now = begin + random_below(l.per_ns);
    uint64_t charged = random_below(l.n), back = charged ? random_below(charged + 1) : 0;
    uint64_t state = rule_charge(&r, 0, begin, charged);
    state = rule_refund(&r, state, now, back, 0);
    CHECK_EQ(rule_take(&r, state, now, now, 0).used_before, charged - back);
  }
}

/* The definition, in rational numbers; previous windows up to 255 are kept exactly. */
static void test_sliding(void) {
  for (int i = 0; i < 3000; i++) {
    fshm_limit l = some_limit(FSHM_SLIDING, random_below(2) ? 255 : 200000);
    rule_t r = rule_make(&l);
    uint64_t state = 0, now = 1 + random_below(TIME_MAX / 8), index = 0;
    uint64_t count = 0, before = 0;
    for (int step = 0; step < 60; step++) {
      now += random_scaled(1, 2 * l.per_ns);
      if (now / l.per_ns != index) before = now / l.per_ns == index + 1 ? count : 0, count = 0;
      index = now / l.per_ns;
      uint64_t cost = random_scaled(1, l.n), left = l.per_ns - now % l.per_ns;
      wide_t used = ((wide_t)count * l.per_ns + (wide_t)before * left);
      bool may = used + (wide_t)cost * l.per_ns <= (wide_t)l.n * l.per_ns;
      bool surely = before <= 255 ||
                    used + used / 128 + (wide_t)(cost + 1) * l.per_ns <= (wide_t)l.n * l.per_ns;
      bool got = take(&r, &state, now, cost);
      CHECK(may || !got);
      CHECK(got || !may || !surely);
      if (got) count += cost;
    }
  }
}

static void test_float12(void) {
  uint64_t last = 0;
  for (uint64_t v = 0; v < 2000000; v++) {
    uint64_t f = float12_up(v), read = float12_read(f);
    if (f > 4095 || read < v || read > v + v / 128 || (v < 256 && read != v) || f < last) {
      CHECK_EQ(read, v);
      return;
    }
    last = f;
  }
  for (uint64_t f = 0; f < 4096; f++) CHECK_EQ(float12_up(float12_read(f)), f);
  for (int i = 0; i < 100000; i++) {
    uint64_t v = random_scaled(1, (UINT64_C(1) << 29) - 1), read = float12_read(float12_up(v));
    CHECK(read >= v && read <= v + v / 128);
  }
}

static bool same_verdict(const rule_t *r, uint64_t a, uint64_t b, uint64_t now, uint64_t cost) {
  verdict_t x = rule_take(r, a, now, now, cost), y = rule_take(r, b, now, now, cost);
  return x.retry == y.retry && x.used_before == y.used_before && x.used_after == y.used_after &&
         x.reset == y.reset && (!cost || x.retry || x.next == y.next);
}

/* From state_expires() on, a state (any bits) is as good as none: what reuse of slots relies on. */
static void test_expired_equals_never_seen(void) {
  for (int i = 0; i < 300000; i++) {
    fshm_limit l = some_limit((uint32_t)i % 3, UINT64_C(1) << 30);
    rule_t r = rule_make(&l);
    uint64_t state = random_u64() >> random_below(8);
    if (random_below(2)) { /* one that this rule may have written */
      uint64_t then = 1 + random_below(TIME_MAX / 8);
      state = rule_charge(&r, 0, then, random_scaled(1, l.n));
    }
    uint64_t expires = state_expires(state), cost = random_scaled(1, l.n);
    if (expires >= TIME_MAX - 1) continue;
    uint64_t now = max_u64(1, expires + (random_below(2) ? 0 : random_below(TIME_MAX - expires)));
    CHECK(same_verdict(&r, state, 0, now, cost));
    CHECK(same_verdict(&r, state, 0, now, 0));
    CHECK(rule_charge(&r, state, now, cost) == rule_charge(&r, 0, now, cost));
    uint64_t refunded = rule_refund(&r, state, now, cost, NULL);
    CHECK(same_verdict(&r, refunded, 0, now, cost));
  }
}

/* A clock behind the others' sees at least as much used: nothing is admitted that later would not. */
static void test_time_backwards(void) {
  for (int i = 0; i < 100000; i++) {
    fshm_limit l = some_limit((uint32_t)i % 3, 10000);
    rule_t r = rule_make(&l);
    uint64_t now = 1 + random_below(TIME_MAX / 8), state = 0, cost = random_scaled(1, l.n);
    for (int k = 0; k < 4; k++, now += random_scaled(1, l.per_ns))
      state = rule_charge(&r, state, now, random_scaled(1, l.n));
    uint64_t late = now, early = late - random_below(min_u64(late, 3 * l.per_ns));
    verdict_t a = rule_take(&r, state, early, early, cost);
    verdict_t b = rule_take(&r, state, late, late, cost);
    CHECK_OP(a.used_before, >=, b.used_before);
    CHECK(a.retry || !b.retry);
  }
}

/* Processes whose readings are up to 10 s old, among others: what is admitted at an earlier instant counts in full
 * from then on, ends no window sooner, and fits into the bounds with all others, by the instants that were read. */
static void test_earlier_readings(void) {
  enum { STEPS = 40 };
  uint64_t earlier = 0;
  for (int i = 0; i < 40000; i++) {
    fshm_limit l = some_limit((uint32_t)i % 3, 1 + random_below(1000));
    if (random_below(2))
      l.per_ns = SECOND + random_below(20 * SECOND); /* of the same order as 10 s */
    if (!limit_valid(&l)) continue;
    rule_t r = rule_make(&l);
    uint64_t state = 0, latest = 20 * SECOND + random_below(TIME_MAX / 8), at[STEPS], costs[STEPS];
    uint64_t in_window = 0, n = 0;
    for (int step = 0; step < STEPS; step++) {
      if (random_below(2)) latest += random_scaled(1, l.per_ns);
      /* A sliding window knows a later clock's state by one window; beyond, the clock is read again. */
      uint64_t oldest = l.kind == FSHM_SLIDING ? min_u64(l.per_ns, 10 * SECOND) : 10 * SECOND;
      uint64_t now = latest - (random_below(2) ? random_scaled(1, oldest) : 0);
      uint64_t cost = random_scaled(1, l.kind == FSHM_BUCKET ? l.burst : l.n), was = state;
      if (!take(&r, &state, now, cost)) continue;
      earlier += now < latest;
      if (state_expires(was) <= now) was = 0;
      CHECK_OP(state_expires(state), >=, state_expires(was));
      if (l.kind == FSHM_WINDOW) {
        CHECK(!was || state_expires(state) == state_expires(was));
        in_window = was ? in_window + cost : cost;
        CHECK_OP(in_window, <=, l.n);
      }
      uint64_t more = l.kind == FSHM_BUCKET ? bucket_increment(&r, cost) : cost;
      /* what a window had, fades; what is counted in the present one does not */
      if (l.kind == FSHM_SLIDING ? sliding_read(&r, was, latest).count > 0
                                 : was && state_expires(was) > latest)
        CHECK_EQ(rule_take(&r, state, latest, latest, 0).used_before,
                 rule_take(&r, was, latest, latest, 0).used_before + more);
      at[n] = now;
      costs[n++] = cost;
    }
    for (uint64_t from = 0; l.kind == FSHM_BUCKET && from < n; from++) {
      for (uint64_t to = 0; to < n; to++) {
        uint64_t sum = 0;
        for (uint64_t k = 0; k < n; k++) sum += at[from] <= at[k] && at[k] <= at[to] ? costs[k] : 0;
        CHECK(sum <= r.burst ||
              (wide_t)(sum - r.burst) * r.num <= (wide_t)(at[to] - at[from]) * r.den);
      }
    }
  }
  CHECK_OP(earlier, >, 10000);
}

/* At the end of time (4.5 years) a key stays denied rather than forgotten. */
static void test_end_of_time(void) {
  for (int i = 0; i < 30000; i++) {
    fshm_limit l = some_limit((uint32_t)i % 3, 200);
    rule_t r = rule_make(&l);
    uint64_t now = TIME_MAX - 1, state = 0;
    if (i % 4) now -= random_scaled(1, 4 * l.per_ns);
    CHECK_OP(take_singly(&r, &state, now, l.n + 1), <=, l.n);
    state = rule_charge(&r, 0, TIME_MAX - 1, l.n);
    CHECK_EQ(rule_take(&r, state, TIME_MAX - 1, TIME_MAX - 1, 1).retry, UINT64_MAX);
    CHECK_EQ(rule_take(&r, 0, TIME_MAX - 1, TIME_MAX - 1, 1).retry, UINT64_MAX);
  }
}

/* Whatever lies in the segment: no undefined behaviour (UBSan watches), and verdicts that add up. */
static void test_any_bits(void) {
  uint64_t sum = 0;
  for (int i = 0; i < 3000000; i++) {
    rule_t r;
    for (unsigned k = 0; k < RULE_WORDS; k++) r.words[k] = random_u64() >> random_below(64);
    r.kind %= 3;
    r.per = 1000 + r.per % (BUCKET_MAX_PER - 999);
    r.num &= TIME_MAX, r.den &= TIME_MAX, r.room &= TIME_MAX, r.unit &= TIME_MAX;
    if (!rule_sane(&r)) continue;
    uint64_t state = random_u64(), now = 1 + random_below(TIME_MAX - 1), cost;
    cost = random_u64() >> random_below(64);
    uint64_t at = now + random_below(TIME_MAX - now);
    verdict_t v = rule_take(&r, state, now, r.kind == FSHM_BUCKET ? at : now, cost);
    const fshm_charged charge = {random_u64(), random_u64() >> random_below(64),
                                 random_u64() >> random_below(64), random_u64(), random_u64()};
    sum += v.next ^ v.reset ^ verdict_remaining(&r, v.used_after);
    sum += charge_left(&charge, random_u64() >> random_below(64), now).state;
    sum += rule_charge(&r, state, now, cost) ^
           rule_refund(&r, state, now, cost, random_below(2) ? &charge : NULL);
    rule_t old = r;
    old.num = max_u64(1, random_u64() & TIME_MAX);
    old.kind = random_below(2) ? r.kind : (uint32_t)random_below(3);
    sum += rule_convert(&r, &old, state, now) ^ state_expires(state);
  }
  CHECK(sum);
  for (uint32_t kind = 0; kind < 5; kind++) { /* any limit may be asked about */
    for (uint64_t per = 0; per < 20000; per += 7) {
      fshm_limit l = {1, per, 1, kind, 0};
      uint64_t largest;
      CHECK_EQ(fshm_limit_check(&l, &largest) == FSHM_OK, limit_valid(&l));
      CHECK(!limit_valid(&l) || largest >= 1);
    }
  }
}

int main(void) {
  test_valid_is_sane();
  test_fractional_interval();
  test_burst_is_exact();
  test_burst_of_fast_buckets();
  test_answers_are_exact();
  test_millions_of_tokens();
  test_strict_bound();
  test_window();
  test_window_refund();
  test_sliding();
  test_float12();
  test_expired_equals_never_seen();
  test_time_backwards();
  test_earlier_readings();
  test_end_of_time();
  test_any_bits();
  return done();
}
