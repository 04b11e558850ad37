/* test_plans.c - keys with plans: handles with limits of their own, states that follow a key from plan to plan, records,
 * overrides. */
#include "../../csrc/unity.c"

#include "check.h"

#define SECOND UINT64_C(1000000000)
#define MINUTE_NS (60 * SECOND)

static fshm_limit bucket(uint64_t n, uint64_t per, uint64_t burst) {
  return (fshm_limit){n, per, burst, FSHM_BUCKET, 0};
}
static fshm_limit window(uint64_t n, uint64_t per) {
  return (fshm_limit){n, per, 0, FSHM_WINDOW, 0};
}

static fshm_limiter *plan_at(fshm_segment *s, const char *name, const fshm_limit *l, uint32_t n) {
  fshm_limiter *out = NULL;
  const int status = fshm_plan_open(s, name, strlen(name), l, n, &out);
  CHECK_EQ(status, FSHM_OK);
  if (status != FSHM_OK) exit(done());
  return out;
}
static fshm_limiter *plan(fshm_segment *s, const fshm_limit *l, uint32_t n) {
  return plan_at(s, "plans", l, n);
}

static fshm_decision call(fshm_limiter *l, uint32_t op, const char *key, uint64_t cost,
                          uint64_t now) {
  fshm_decision d;
  const uint64_t costs[FSHM_MAX_LIMITS] = {cost, cost, cost, cost};
  fshm_apply(l, op, key, strlen(key), costs, 0, now, &d);
  return d;
}
static uint64_t left(fshm_limiter *l, const char *key, uint64_t now) {
  uint64_t remaining[FSHM_MAX_LIMITS];
  CHECK(fshm_remaining(l, key, strlen(key), now, remaining) > 0);
  return remaining[0];
}

/* What was consumed stays consumed, in tokens, when the plan of a key changes. */
static void test_tokens_follow(void) {
  fshm_segment *s = fresh_segment(1000);
  const fshm_limit kinds[][2] = {
      {bucket(10, MINUTE_NS, 10), bucket(100, MINUTE_NS, 100)},
      {window(10, MINUTE_NS), window(100, MINUTE_NS)},
      {{10, MINUTE_NS, 0, FSHM_SLIDING, 0}, {100, MINUTE_NS, 0, FSHM_SLIDING, 0}},
      {{10, 86400 * SECOND, 0, FSHM_CALENDAR, 0}, {100, 86400 * SECOND, 0, FSHM_CALENDAR, 0}},
  };
  const char *names[] = {"b", "w", "s", "c"};
  for (unsigned k = 0; k < 4; k++) {
    fshm_limiter *free_plan = plan_at(s, names[k], &kinds[k][0], 1);
    fshm_limiter *pro = plan_at(s, names[k], &kinds[k][1], 1);
    const uint64_t now = 61 * SECOND;
    for (int i = 0; i < 10; i++)
      CHECK_EQ(call(free_plan, FSHM_ACQUIRE, "ann", 1, now).status, FSHM_ALLOWED);
    CHECK_EQ(call(free_plan, FSHM_ACQUIRE, "ann", 1, now).status, FSHM_DENIED);
    CHECK_EQ(left(pro, "ann", now), 90);
    CHECK_EQ(left(free_plan, "bob", now), 10); /* another key */
    fshm_decision d = call(pro, FSHM_ACQUIRE, "ann", 50, now);
    CHECK_EQ(d.status, FSHM_ALLOWED);
    CHECK_EQ(d.remaining, 40);
    CHECK_EQ(left(free_plan, "ann", now), 0);
    CHECK_EQ(call(free_plan, FSHM_ACQUIRE, "ann", 1, now).status, FSHM_DENIED);
    CHECK_EQ(left(pro, "ann", now), 40); /* a denial under the small plan has changed nothing */
    CHECK_EQ(call(pro, FSHM_REFUND, "ann", 55, now).status, FSHM_ALLOWED);
    CHECK_EQ(left(free_plan, "ann", now), 5);
    CHECK_EQ(call(free_plan, FSHM_CHARGE, "ann", 20, now).status, FSHM_ALLOWED);
    CHECK_EQ(left(pro, "ann", now), 75);
    CHECK_EQ(call(free_plan, FSHM_ACQUIRE, "ann", 0, now).status,
             k ? FSHM_ALLOWED : FSHM_DENIED); /* a bucket denies even nothing beyond its burst */
    CHECK_EQ(left(pro, "ann", now), 75);
    CHECK_EQ(fshm_reset_key(pro, "ann", 3), FSHM_OK);
    CHECK_EQ(left(free_plan, "ann", now), 10);
    CHECK_EQ(call(free_plan, FSHM_ACQUIRE, "ann", 3, now).status, FSHM_ALLOWED);
    CHECK_EQ(fshm_reset_all(pro), FSHM_OK);
    CHECK_EQ(left(free_plan, "ann", now), 10);
    fshm_limiter_close(free_plan);
    fshm_limiter_close(pro);
  }
  fshm_close(s);
}

/* Old use never becomes debt: under a smaller plan a key waits no longer than its tokens would have lasted. */
static void test_no_debt(void) {
  fshm_segment *s = fresh_segment(1000);
  const fshm_limit big = bucket(1000, MINUTE_NS, 1000), small = bucket(1, 3600 * SECOND, 1);
  fshm_limiter *pro = plan(s, &big, 1), *least = plan(s, &small, 1);
  const fshm_limit other = bucket(1, MINUTE_NS, 1);
  fshm_limiter *slow = plan(s, &other, 1);
  uint64_t now = SECOND;
  CHECK_EQ(call(pro, FSHM_ACQUIRE, "k", 1000, now).status, FSHM_ALLOWED);
  fshm_decision d = call(slow, FSHM_ACQUIRE, "k", 1, now);
  CHECK_EQ(d.status, FSHM_DENIED);
  CHECK_OP(d.retry_after_ns, <=, MINUTE_NS + 1024);
  CHECK_EQ(call(slow, FSHM_ACQUIRE, "k", 1, now + (uint64_t)d.retry_after_ns).status, FSHM_ALLOWED);
  /* Another period counts apart. */
  CHECK_EQ(left(least, "k", now), 1);
  /* Debt by a charge drains at the pace of the plan that it was charged under. */
  now += 10 * MINUTE_NS;
  CHECK_EQ(call(slow, FSHM_CHARGE, "d", 3, now).status, FSHM_ALLOWED);
  CHECK_OP(call(slow, FSHM_PEEK, "d", 1, now).retry_after_ns, <=, 3 * MINUTE_NS + 1024);
  CHECK_EQ(left(pro, "d", now), 997);
  /* A window charged beyond its n ends when it would have ended. */
  const fshm_limit ten = window(10, MINUTE_NS), more = window(100, MINUTE_NS);
  fshm_limiter *w = plan(s, &ten, 1), *v = plan(s, &more, 1);
  CHECK_EQ(call(w, FSHM_CHARGE, "w", 1000, now).status, FSHM_ALLOWED);
  CHECK_OP(call(w, FSHM_PEEK, "w", 1, now).retry_after_ns, <=, MINUTE_NS + 2048);
  CHECK_EQ(call(v, FSHM_REFUND, "w", 950, now).status, FSHM_ALLOWED);
  CHECK_EQ(left(v, "w", now), 50);
  CHECK_EQ(left(w, "w", now), 0);
  CHECK_EQ(left(w, "w", now + MINUTE_NS + 2048), 10);
  fshm_limiter *all[] = {pro, least, slow, w, v};
  for (unsigned i = 0; i < 5; i++) fshm_limiter_close(all[i]);
  fshm_close(s);
}

/* One plan and a limiter of the same limits say the same, but for the unit of the arrival time. */
static void test_as_a_limiter(void) {
  fshm_segment *s = fresh_segment(1000);
  for (int story = 0; story < fewer(300); story++) {
    char name[32], own[32];
    fshm_limit l[2];
    const uint64_t per = random_scaled(1000000, 3600 * SECOND);
    const uint64_t n = random_scaled(1, min_u64(per / 100000, 5000));
    l[0] = bucket(n, per, random_scaled(1, n));
    l[1] = random_below(2) ? window(random_scaled(1, 5000), random_scaled(1000000, 3600 * SECOND))
                           : (fshm_limit){random_scaled(1, 100), 10 * SECOND, 0, FSHM_SLIDING, 0};
    (void)snprintf(name, sizeof name, "plan %d", story % 7);
    (void)snprintf(own, sizeof own, "limiter %d", story % 7);
    fshm_limiter *a = plan_at(s, name, l, 2), *b = NULL;
    CHECK_EQ(fshm_limiter_open(s, own, strlen(own), l, 2, &b), FSHM_OK);
    CHECK_EQ(fshm_reset_all(a), FSHM_OK);
    CHECK_EQ(fshm_reset_all(b), FSHM_OK);
    uint64_t now = SECOND;
    int writes = 0;
    for (int i = 0; i < 100; i++) {
      static const uint32_t ops[] = {FSHM_ACQUIRE, FSHM_ACQUIRE, FSHM_ACQUIRE, FSHM_PEEK,
                                     FSHM_REFUND};
      const uint32_t op = ops[random_below(5)];
      const uint64_t cost = random_below(4) ? 1 : random_scaled(1, n);
      now += random_below(3) ? random_scaled(1, per / n + 1) : random_scaled(1, per);
      const fshm_decision x = call(a, op, "k", cost, now), y = call(b, op, "k", cost, now);
      const long long slack = 256LL * ++writes;
      if (x.status != y.status) { /* so close to the instant that the unit decides */
        CHECK_EQ(x.status, FSHM_DENIED);
        CHECK_OP(x.retry_after_ns, <=, slack);
        if (op == FSHM_ACQUIRE) (void)call(a, FSHM_CHARGE, "k", cost, now);
        continue;
      }
      CHECK_OP(x.remaining, <=, y.remaining);
      CHECK_OP(x.remaining + 1 + (uint64_t)slack * n / per, >=, y.remaining);
      if (x.limit_index == y.limit_index && y.retry_after_ns > 0)
        CHECK_OP(x.retry_after_ns - y.retry_after_ns, <=, slack);
    }
    fshm_limiter_close(a);
    fshm_limiter_close(b);
  }
  fshm_close(s);
}

/* Every number of a record is read back, and arrival times are rounded up by less than their unit. */
static void test_numbers(void) {
  for (uint32_t record = 0; record < LIMIT_RECORDS; record += record < 20000 ? 1 : 97) {
    const uint64_t u = UINT64_C(1) << tier_of_record(record)->shift;
    const uint64_t at = random_scaled(1, TIME_MAX - 5000);
    const pair_t pair = {planned_who(random_u64(), record), planned_state(record, at)};
    CHECK_EQ(planned_record(pair), record);
    CHECK(IS_PLANNED(pair.when) && state_possible(pair.when));
    CHECK_OP(planned_arrival(pair.when, 0), >=, at);
    CHECK_OP(planned_arrival(pair.when, 0), <, at + u);
    CHECK_EQ(planned_state(record, planned_arrival(pair.when, 0)), pair.when);
    CHECK_EQ(planned_record((pair_t){pair.who, planned_state(record, TIME_MAX)}), record);
  }
}

/* Of each tier: exactly `burst` at one instant, whatever the instant and the costs; and never more in any interval. */
static void test_tiers(void) {
  fshm_segment *s = fresh_segment(20000);
  static const uint32_t among[] = {0, 300, 2000, 6000, 14000};
  fshm_limiter *l = NULL;
  for (unsigned tier = 0; tier < TIERS; tier++) {
    fshm_limit filler = bucket(1, SECOND, 1);
    uint32_t record = 0;
    for (uint64_t n = 1; record < among[tier] || !tier; n++) {
      filler = bucket(n, 1000 * SECOND + tier, 1);
      CHECK_EQ(record_of(s, &filler, &record), FSHM_OK);
      if (!tier) break;
    }
    for (int i = 0; i < fewer(100); i++) {
      const uint64_t n = random_scaled(1, 300), per = random_scaled(n * 1100000, 5000 * SECOND);
      const fshm_limit lim = bucket(n, per, random_scaled(1, n));
      l = plan(s, &lim, 1);
      CHECK_EQ(tier_of_record(l->own->of[0].record) - tiers, tier);
      char key[32];
      (void)snprintf(key, sizeof key, "tier %u %d", tier, i);
      uint64_t now = SECOND + random_below(SECOND), rest = lim.burst;
      const uint64_t begun = now;
      while (rest) { /* a burst, in costs */
        const uint64_t cost = random_scaled(1, rest);
        CHECK_EQ(call(l, FSHM_ACQUIRE, key, cost, now).status, FSHM_ALLOWED);
        rest -= cost;
        CHECK_EQ(left(l, key, now), rest);
      }
      CHECK_EQ(call(l, FSHM_ACQUIRE, key, 1, now).status, FSHM_DENIED);
      /* As soon as it may, again and again: never before the exact instant. */
      uint64_t admitted = lim.burst;
      for (int k = 0; k < 50; k++) {
        const fshm_decision d = call(l, FSHM_ACQUIRE, key, 1, now);
        if (d.status != FSHM_ALLOWED) {
          now += (uint64_t)d.retry_after_ns;
          continue;
        }
        admitted++;
        /* admitted - burst <= (now - begun) * n / per */
        CHECK((wide_t)(admitted - lim.burst) * per <= (wide_t)(now - begun) * n);
      }
      CHECK_OP(admitted, >, lim.burst);
      fshm_limiter_close(l);
    }
  }
  fshm_close(s);
}

/* Random stories over plans of one key: never more than the most generous plan admits in any interval; windows exactly by
 * their count; nothing made by a change. */
#define PLANS 5
static void test_stories(void) {
  fshm_segment *s = fresh_segment(10000);
  for (int story = 0; story < fewer(2000); story++) {
    const bool windows = story & 1;
    fshm_limiter *plans[PLANS];
    fshm_limit limits[PLANS];
    const uint64_t per = random_scaled(SECOND, 3600 * SECOND);
    double fastest = 0, burst = 0;
    char key[32];
    (void)snprintf(key, sizeof key, "key %d", story);
    for (int i = 0; i < PLANS; i++) {
      const uint64_t n = random_scaled(1, 1000);
      limits[i] = windows ? window(n, per) : bucket(n, per, random_scaled(1, n));
      plans[i] = plan_at(s, windows ? "windows" : "buckets", &limits[i], 1);
      if ((double)n / (double)per > fastest) fastest = (double)n / (double)per;
      if ((double)limits[i].burst > burst) burst = (double)limits[i].burst;
    }
    uint64_t now = SECOND + random_below(SECOND), count = 0, end = 0;
    struct {
      uint64_t at, tokens;
    } log[200];
    int logged = 0;
    for (int i = 0; i < 200; i++) {
      const int p = (int)random_below(PLANS);
      const uint64_t cost = random_below(3) ? 1 : random_scaled(1, limits[p].n);
      now += random_below(4) ? random_below(per / 50) : random_below(per);
      if (end <= now) count = 0;
      const uint64_t free_before = left(plans[p], key, now);
      const uint32_t op = random_below(5)   ? FSHM_ACQUIRE
                          : random_below(2) ? FSHM_PEEK
                          : windows         ? FSHM_CHARGE
                                            : FSHM_ACQUIRE;
      const fshm_decision d = call(plans[p], op, key, cost, now);
      CHECK_EQ(d.status, op == FSHM_CHARGE || free_before >= cost);
      if (windows) {
        CHECK_EQ(free_before, minus(limits[p].n, count));
        if (op == FSHM_PEEK || d.status != FSHM_ALLOWED) continue;
        if (!count) end = now + per;
        count += cost;
        /* The end is kept in units: at most four times the count too late, and never early. */
        const uint64_t reset = (uint64_t)d.reset_after_ns + now;
        CHECK_OP(reset, >=, end);
        CHECK_OP(reset, <=, end + 4 * max_u64(max_u64(count, 1000), 256));
        end = reset;
        continue;
      }
      if (op == FSHM_ACQUIRE && d.status == FSHM_ALLOWED) {
        log[logged].at = now;
        log[logged++].tokens = cost;
      }
      /* The same tokens under every plan, rounded up. */
      const uint64_t mine = limits[p].burst - left(plans[p], key, now);
      for (int q = 0; q < PLANS; q++) {
        const uint64_t its = limits[q].burst - left(plans[q], key, now);
        if (mine < limits[p].burst && its < limits[q].burst) CHECK_OP(its, <=, mine + 1);
      }
    }
    for (int from = 0; from < logged; from++) {
      double sum = 0;
      for (int to = from; to < logged; to++) {
        sum += (double)log[to].tokens;
        const double may = burst + fastest * (double)(log[to].at - log[from].at);
        if (sum > may + 1e-6) CHECK_OP((long long)sum, <=, (long long)may);
      }
    }
    CHECK_OP(logged, <=, 200);
    for (int i = 0; i < PLANS; i++) fshm_limiter_close(plans[i]);
  }
  fshm_close(s);
}

/* Several limits in a plan: all or nothing; alike ones, and plans with different sets. */
static void test_several(void) {
  fshm_segment *s = fresh_segment(1000);
  const fshm_limit four[] = {bucket(10, SECOND, 10),
                             bucket(5, SECOND, 1),
                             window(20, MINUTE_NS),
                             {1000, 86400 * SECOND, 0, FSHM_CALENDAR, 0}};
  const fshm_limit two[] = {window(8, MINUTE_NS), bucket(10, SECOND, 10)};
  fshm_limiter *a = plan(s, four, 4), *b = plan(s, two, 2);
  uint64_t now = SECOND, remaining[4];
  CHECK_EQ(call(a, FSHM_ACQUIRE, "k", 1, now).status, FSHM_ALLOWED);
  fshm_decision d = call(a, FSHM_ACQUIRE, "k", 1, now);
  CHECK_EQ(d.status, FSHM_DENIED);
  CHECK_EQ(d.limit_index, 1);
  CHECK_EQ(fshm_remaining(a, "k", 1, now, remaining), 4);
  CHECK_EQ(remaining[0], 9);
  CHECK_EQ(remaining[1], 0);
  CHECK_EQ(remaining[2], 19);
  CHECK_EQ(remaining[3], 999);
  CHECK_EQ(fshm_remaining(b, "k", 1, now, remaining), 2);
  CHECK_EQ(remaining[0], 7);
  CHECK_EQ(remaining[1], 9);
  /* A reservation, given back. */
  fshm_charged reserved[FSHM_MAX_LIMITS];
  const fshm_limit one = bucket(5, SECOND, 1);
  fshm_limiter *c = plan(s, &one, 1);
  CHECK_EQ(call(c, FSHM_ACQUIRE, "r", 1, now).status, FSHM_ALLOWED);
  fshm_reserve(c, "r", 1, NULL, SECOND, now, &d, reserved);
  CHECK_EQ(d.status, FSHM_ALLOWED);
  CHECK_OP(d.retry_after_ns, >, 0);
  const int64_t longer = call(c, FSHM_PEEK, "r", 1, now).retry_after_ns;
  CHECK_EQ(fshm_cancel(c, "r", 1, ones, reserved, now), 1);
  CHECK_OP(call(c, FSHM_PEEK, "r", 1, now).retry_after_ns, <, longer);
  /* A block. */
  CHECK_EQ(call(c, FSHM_BLOCK, "r", 30 * SECOND, now).status, FSHM_ALLOWED);
  CHECK_OP(call(c, FSHM_PEEK, "r", 1, now).retry_after_ns, >=, 30 * SECOND);
  CHECK_OP(call(c, FSHM_PEEK, "r", 1, now).retry_after_ns, <=, 30 * SECOND + 512);
  fshm_limiter_close(a);
  fshm_limiter_close(b);
  fshm_limiter_close(c);
  fshm_close(s);
}

static void test_arguments(void) {
  fshm_segment *s = fresh_segment(1000);
  const fshm_limit good = bucket(10, SECOND, 10), bad = bucket(0, SECOND, 1);
  const fshm_limit permits = {5, 0, 0, FSHM_PERMITS, 0},
                   money = {5, MONEY_FOREVER, 0, FSHM_MONEY, 0};
  const fshm_limit name_only = {1, 0, 0, FSHM_PLANNED, 0};
  fshm_limiter *l = NULL, *other = NULL;
  CHECK_EQ(fshm_plan_open(s, "p", 1, &bad, 1, &l), FSHM_E_ARGUMENT);
  CHECK_EQ(fshm_plan_open(s, "p", 1, &permits, 1, &l), FSHM_E_ARGUMENT);
  CHECK_EQ(fshm_plan_open(s, "p", 1, &money, 1, &l), FSHM_E_ARGUMENT);
  CHECK_EQ(fshm_plan_open(s, "p", 1, &name_only, 1, &l), FSHM_E_ARGUMENT);
  CHECK_EQ(fshm_plan_open(s, "p", 1, &good, 0, &l), FSHM_E_ARGUMENT);
  CHECK_EQ(fshm_plan_open(s, "", 0, &good, 1, &l), FSHM_E_ARGUMENT);
  l = plan_at(s, "p", &good, 1);
  /* A name has plans, or limits: never both. */
  CHECK_EQ(fshm_limiter_open(s, "p", 1, &good, 1, &other), FSHM_E_ARGUMENT);
  CHECK_EQ(fshm_limiter_open(s, "p", 1, &money, 1, &other), FSHM_E_ARGUMENT);
  CHECK_EQ(fshm_limiter_find(s, "p", 1, &other), FSHM_OK); /* without limits: for resets */
  CHECK_EQ(call(other, FSHM_ACQUIRE, "k", 1, SECOND).status, FSHM_E_ARGUMENT);
  CHECK_EQ(call(l, FSHM_ACQUIRE, "k", 7, SECOND).remaining, 3);
  CHECK_EQ(fshm_reset_key(other, "k", 1), FSHM_OK);
  CHECK_EQ(left(l, "k", SECOND), 10);
  fshm_limiter_close(other);
  CHECK_EQ(fshm_limiter_open(s, "q", 1, &good, 1, &other), FSHM_OK);
  fshm_limiter *third = NULL;
  CHECK_EQ(fshm_plan_open(s, "q", 1, &good, 1, &third), FSHM_E_ARGUMENT);
  /* Calls for permits and for settlements are not for plans. */
  fshm_permit permit;
  fshm_decision d;
  uint32_t in_flight;
  fshm_admit(l, "k", 1, NULL, 0, &permit, &d, &in_flight);
  CHECK_EQ(d.status, FSHM_ALLOWED); /* no permit limit: a check */
  CHECK_EQ(fshm_override_set(other, "k", 1, &good, 1), FSHM_E_ARGUMENT);
  CHECK_EQ(fshm_override_set(l, "k", 1, &bad, 1), FSHM_E_ARGUMENT);
  fshm_limiter_info info;
  CHECK_EQ(fshm_limiter_at(s, 0, &info), FSHM_OK);
  CHECK_EQ(info.planned, 1);
  CHECK_EQ(info.limits_count, 0);
  CHECK_EQ(fshm_limiter_at(s, 1, &info), FSHM_OK);
  CHECK_EQ(info.planned, 0);
  uint64_t at;
  CHECK_EQ(fshm_check(s, &at), FSHM_DAMAGE_NONE);
  fshm_limiter_close(l);
  fshm_limiter_close(other);
  fshm_close(s);
}

static void test_records(void) {
  fshm_segment *s = fresh_segment(100);
  uint32_t first, again_, other;
  fshm_limit l = bucket(10, SECOND, 10), read;
  CHECK_EQ(record_of(s, &l, &first), FSHM_OK);
  CHECK_EQ(record_of(s, &l, &again_), FSHM_OK);
  CHECK_EQ(first, again_);
  CHECK(record_limit(s, first, &read) && read.n == 10 && read.per_ns == SECOND && read.burst == 10);
  l.strict = 1;
  l.burst = 3;
  CHECK_EQ(record_of(s, &l, &other), FSHM_OK);
  CHECK(other != first);
  CHECK(record_limit(s, other, &read) && read.strict == 1 && read.burst == 3 &&
        read.kind == FSHM_BUCKET);
  CHECK(!record_limit(s, other + 1, &read));
  CHECK(!record_limit(s, LIMIT_RECORDS, &read));
  CHECK(!record_limit(s, UINT32_MAX, &read));
  /* Full: an error, and what is there goes on. */
  fshm_geometry g;
  fshm_describe(s, &g);
  const uint64_t memory = g.memory, most = record_count(100);
  int status = FSHM_OK;
  for (uint64_t n = 100; status == FSHM_OK; n++) {
    l = bucket(n, SECOND, 1);
    status = record_of(s, &l, &other);
    if (status == FSHM_OK) CHECK_OP(other, <, most);
  }
  CHECK_EQ(status, FSHM_E_RECORDS);
  CHECK_EQ(other, most - 1);
  fshm_describe(s, &g);
  CHECK_EQ(g.memory - memory, (most - RECORD_BLOCK) * sizeof(limit_record_t));
  fshm_limiter *none = NULL;
  l = bucket(7, SECOND, 1);
  CHECK_EQ(fshm_plan_open(s, "p", 1, &l, 1, &none), FSHM_E_RECORDS);
  CHECK(!none);
  l = bucket(10, SECOND, 10);
  none = plan_at(s, "p", &l, 1);
  CHECK_EQ(call(none, FSHM_ACQUIRE, "k", 4, SECOND).remaining, 6);
  fshm_limiter_close(none);
  fshm_close(s);
}

static void test_overrides(void) {
  fshm_segment *s = fresh_segment(1000);
  const fshm_limit usual = bucket(10, MINUTE_NS, 10);
  fshm_limit more[] = {bucket(500, MINUTE_NS, 20), window(7, SECOND), usual, usual}, got[3];
  fshm_limiter *l = plan(s, &usual, 1);
  CHECK_EQ(fshm_override_get(l, "k", 1, got), 0);
  const uint32_t before = fshm_overrides(l);
  CHECK_EQ(fshm_override_set(l, "k", 1, more, 2), FSHM_OK);
  CHECK(fshm_overrides(l) != before);
  CHECK_EQ(fshm_override_get(l, "k", 1, got), 2);
  CHECK_EQ(got[0].n, 500);
  CHECK_EQ(got[0].burst, 20);
  CHECK_EQ(got[1].kind, FSHM_WINDOW);
  CHECK_EQ(got[1].n, 7);
  CHECK_EQ(fshm_override_get(l, "j", 1, got), 0);
  CHECK_EQ(fshm_override_set(l, "k", 1, more, 4), FSHM_E_ARGUMENT);
  CHECK_EQ(fshm_override_set(l, "k", 1, more, 3), FSHM_OK);
  CHECK_EQ(fshm_override_get(l, "k", 1, got), 3);
  CHECK_EQ(fshm_reset_all(l), FSHM_OK); /* forgets what was consumed, not what may be */
  CHECK_EQ(fshm_override_get(l, "k", 1, got), 3);
  CHECK_EQ(fshm_reset_key(l, "k", 1), FSHM_OK);
  CHECK_EQ(fshm_override_get(l, "k", 1, got), 3);
  /* Inspection, and no other call takes it for something else. */
  unsigned seen = 0;
  for (uint64_t slot = 0; slot < s->slot_count; slot++) {
    fshm_plan_info info;
    if (fshm_plan_at(s, slot, SECOND, &info) != FSHM_OK) continue;
    seen++;
    CHECK_EQ(info.is_override, 1);
    CHECK_EQ(info.count, 3);
    char name[16];
    uint64_t length;
    CHECK(fshm_key_name(s, slot, name, sizeof name, &length) && length == 1 && name[0] == 'k');
  }
  CHECK_EQ(seen, 1);
  uint64_t at;
  CHECK_EQ(fshm_check(s, &at), FSHM_DAMAGE_NONE);
  fshm_budget_info budgets[4];
  CHECK_EQ(fshm_budgets(s, SECOND, budgets, 4), 0);
  /* It is not evicted: fill the table with other keys. */
  for (int i = 0; i < 3000; i++) {
    char key[16];
    (void)snprintf(key, sizeof key, "key %d", i);
    (void)call(l, FSHM_ACQUIRE, key, 1, SECOND);
  }
  CHECK_EQ(fshm_override_get(l, "k", 1, got), 3);
  CHECK_EQ(fshm_override_set(l, "k", 1, NULL, 0), FSHM_OK);
  CHECK_EQ(fshm_override_get(l, "k", 1, got), 0);
  CHECK_EQ(fshm_override_set(l, "k", 1, NULL, 0), FSHM_OK);
  fshm_limiter_close(l);
  fshm_close(s);
}

static void test_inspection(void) {
  fshm_segment *s = fresh_segment(1000);
  const fshm_limit l[] = {bucket(10, MINUTE_NS, 10),
                          window(7, MINUTE_NS),
                          {50, 86400 * SECOND, 0, FSHM_CALENDAR, 0},
                          {50, MINUTE_NS, 0, FSHM_SLIDING, 0}};
  fshm_limiter *p = plan(s, l, 4);
  CHECK_EQ(call(p, FSHM_ACQUIRE, "k", 3, SECOND).status, FSHM_ALLOWED);
  unsigned kinds = 0;
  for (uint64_t slot = 0; slot < s->slot_count; slot++) {
    fshm_plan_info info;
    if (fshm_plan_at(s, slot, SECOND, &info) != FSHM_OK) continue;
    CHECK_EQ(info.used, 3);
    CHECK_OP(info.left_ns, >, 0);
    CHECK_EQ(info.count, info.kind == FSHM_BUCKET);
    if (info.count) CHECK_EQ(info.limits[0].n, 10);
    kinds |= 1U << info.kind;
  }
  CHECK_EQ(kinds, 1U << FSHM_BUCKET | 1U << FSHM_WINDOW | 1U << FSHM_CALENDAR | 1U << FSHM_SLIDING);
  fshm_limiter_close(p);
  fshm_close(s);
}

/* Any bits in a slot or a record: no crash, no hang, an answer. */
static void test_hostile(void) {
  fshm_segment *s = fresh_segment(1000);
  const fshm_limit l[] = {bucket(10, MINUTE_NS, 10), bucket(100, MINUTE_NS, 50)};
  fshm_limiter *a = plan(s, &l[0], 1), *b = plan(s, &l[1], 1);
  for (int i = 0; i < fewer(20000); i++) {
    found_t f;
    snapshot_t p;
    CHECK(limits_load_of(a, &p));
    (void)call(a, FSHM_ACQUIRE, "k", 1, SECOND);
    const uint64_t hash = fshm_siphash(a->key[0], a->key[1], "k", 1);
    table_find(s, hash, snapshot_who(&p, 0, hash), &f);
    if (f.pair.who) {
      pair_t seen = f.pair, to = {f.pair.who ^ (random_u64() & WHO_LABELS), random_u64()};
      if (random_below(2)) to.when = UINT64_C(1) << 59 | (to.when & (UINT64_MAX >> 5));
      if (!IS_PENDING(to.when)) (void)pair_cas(&s->slots[f.slot], &seen, to);
    }
    if (!random_below(50)) {
      limit_record_t *r = &s->records[random_below(2)];
      store_relaxed(&r->n, random_u64());
      store_relaxed(&r->per, random_u64());
      store_relaxed(&r->burst, random_u64());
    }
    const fshm_decision d =
        call(random_below(2) ? a : b, (uint32_t)random_below(7), "k", 1, SECOND);
    CHECK(d.status == FSHM_ALLOWED || d.status == FSHM_DENIED || d.status == FSHM_FULL);
    fshm_plan_info info;
    (void)fshm_plan_at(s, f.slot, SECOND, &info);
    if (random_below(2)) (void)fshm_reset_key(a, "k", 1);
  }
  fshm_limiter_close(a);
  fshm_limiter_close(b);
  fshm_close(s);
}

/* Processes at once, each with another plan of the same key: together never more than the most generous one admits. */
static void test_processes(void) {
  fshm_segment *s = fresh_segment(1000);
  const uint64_t sizes[] = {200, 500, 1000, 350};
  for (int windows = 0; windows < 2; windows++) {
    int ends[2];
    CHECK_EQ(pipe(ends), 0);
    pid_t children[4];
    for (int i = 0; i < 4; i++) {
      children[i] = fork();
      if (children[i]) continue;
      const fshm_limit l =
          windows ? window(sizes[i], 3600 * SECOND) : bucket(sizes[i], 1000000 * SECOND, sizes[i]);
      fshm_limiter *mine = plan_at(s, windows ? "w" : "b", &l, 1);
      uint32_t admitted = 0;
      for (int k = 0; k < 5000; k++)
        admitted += call(mine, FSHM_ACQUIRE, "shared", 1, 0).status == FSHM_ALLOWED;
      fshm_limiter_close(mine);
      _exit(write(ends[1], &admitted, sizeof admitted) != sizeof admitted);
    }
    uint32_t sum = 0;
    for (int i = 0; i < 4; i++) {
      uint32_t one = 0;
      int status;
      CHECK_EQ(read(ends[0], &one, sizeof one), (ssize_t)sizeof one);
      sum += one;
      (void)waitpid(children[i], &status, 0);
      CHECK_EQ(status, 0);
    }
    CHECK_EQ(sum, 1000);
    (void)close(ends[0]);
    (void)close(ends[1]);
  }
  fshm_close(s);
}

int main(void) {
  test_tokens_follow();
  test_no_debt();
  test_as_a_limiter();
  test_numbers();
  test_tiers();
  test_stories();
  test_several();
  test_arguments();
  test_records();
  test_overrides();
  test_inspection();
  test_hostile();
  test_processes();
  return done();
}
