/* Budgets: what is spent and reserved, in windows; what the dead leave; what a segment may hold. */
#include "../../csrc/unity.c"

#include "check.h"

#define USD UINT64_C(1000000000)
#define KEY "k"

/* Handles that live as long as the test. */
static void *volatile kept[512]; /* else it is never written */
static int kept_n;
#define KEEP(handle) (kept[kept_n++ % 512] = (handle))

static fshm_limiter *budget(fshm_segment *s, const char *name, uint64_t n, uint64_t per) {
  const fshm_limit limits[4] = {{n, per, 0, FSHM_MONEY, 0},
                                {MONEY_MOST, per, 0, FSHM_MONEY, 0},
                                {MONEY_MOST, per, 0, FSHM_MONEY, 0},
                                {MONEY_MOST, per, 0, FSHM_MONEY, 0}};
  return KEEP(fresh_limiter(s, name, limits, 4));
}

static int reserve(fshm_limiter *l, uint64_t amount, uint32_t flags, uint64_t now,
                   fshm_budget *out) {
  return fshm_budget_reserve(l, KEY, 1, amount, flags, now, out);
}
static int settle(fshm_limiter *l, const fshm_budget *b, uint64_t amount, uint64_t actual,
                  uint64_t now) {
  return fshm_budget_settle(l, KEY, 1, b, amount, actual, now);
}
static fshm_budget view(fshm_limiter *l, uint64_t now) {
  fshm_budget b;
  CHECK_EQ(fshm_budget_look(l, KEY, 1, now, &b), FSHM_OK);
  return b;
}

static void test_calls(void) {
  fshm_segment *s = KEEP(fresh_segment(100));
  fshm_limiter *l = budget(s, "b", 50 * USD, MONTH_NS);
  fshm_budget one, two;
  CHECK_EQ(reserve(l, 20 * USD, 0, 0, &one), FSHM_ALLOWED);
  CHECK_EQ(one.reserved, 20 * USD);
  CHECK_EQ(reserve(l, 30 * USD + 1, 0, 0, &two), FSHM_DENIED);
  CHECK_EQ(reserve(l, 30 * USD, 0, 0, &two), FSHM_ALLOWED);
  CHECK_EQ(settle(l, &one, 20 * USD, 7, 0), FSHM_OK);
  CHECK_EQ(view(l, 0).spent, 7);
  CHECK_EQ(view(l, 0).reserved, 30 * USD);
  CHECK_EQ(settle(l, &two, 30 * USD, 60 * USD, 0), FSHM_OK);
  CHECK_EQ(view(l, 0).spent, 60 * USD + 7);
  CHECK_EQ(view(l, 0).reserved, 0);
  CHECK_EQ(fshm_budget_add(l, KEY, 1, 1, (int64_t)(20 * USD), 0), FSHM_OK);
  CHECK_EQ(view(l, 0).limit, 70 * USD);
  CHECK_EQ(reserve(l, 10 * USD - 7, FSHM_BUDGET_CHARGE, 0, &one), FSHM_ALLOWED);
  CHECK_EQ(one.direct, 1);
  CHECK_EQ(view(l, 0).spent, 70 * USD);
  CHECK_EQ(settle(l, &one, 10 * USD - 7, 0, 0), FSHM_OK);
  CHECK_EQ(view(l, 0).spent, 60 * USD + 7);
  CHECK_EQ(fshm_budget_once(l, KEY, 1, 0), FSHM_OK);
  CHECK_EQ(fshm_budget_once(l, KEY, 1, 0), FSHM_DENIED);
  /* only what was granted */
  CHECK_EQ(reserve(l, USD, FSHM_BUDGET_GRANTED, 0, &one), FSHM_ASK);
  CHECK_EQ(fshm_budget_add(l, KEY, 1, 3, (int64_t)(62 * USD), 0), FSHM_OK);
  CHECK_EQ(reserve(l, USD, FSHM_BUDGET_GRANTED, 0, &one), FSHM_ALLOWED);
  CHECK_EQ(reserve(l, USD, FSHM_BUDGET_GRANTED, 0, &two), FSHM_ASK);
  CHECK_EQ(reserve(l, 40 * USD, FSHM_BUDGET_GRANTED, 0, &two), FSHM_DENIED);
  CHECK_EQ(fshm_reset_key(l, KEY, 1), FSHM_OK);
  CHECK_EQ(view(l, 0).spent, 0);
  CHECK_EQ(view(l, 0).limit, 50 * USD);
  /* of another kind */
  fshm_decision d;
  fshm_apply(l, FSHM_ACQUIRE, KEY, 1, NULL, 0, 0, &d);
  CHECK_EQ(d.status, FSHM_E_ARGUMENT);
  fshm_limit tokens = {5, HOUR_NS, 0, FSHM_WINDOW, 0};
  fshm_limiter *other = KEEP(fresh_limiter(s, "t", &tokens, 1));
  CHECK_EQ(reserve(other, 1, 0, 0, &one), FSHM_E_ARGUMENT);
  CHECK_EQ(fshm_limiter_open(s, "b", 1, &tokens, 1, &other), FSHM_E_ARGUMENT);
  fshm_limit found[4];
  uint64_t version, index;
  CHECK_EQ(fshm_limiter_limits(l, found, &version), 4);
  CHECK(found[0].n == 50 * USD && found[1].n == MONEY_MOST && found[0].per_ns == MONTH_NS);
  CHECK_EQ(fshm_check(s, &index), FSHM_DAMAGE_NONE);
}

/* What a server leases to this host, and asks back. */
static void test_leases(void) {
  fshm_segment *s = KEEP(fresh_segment(100));
  fshm_limiter *l = budget(s, "b", 50 * USD, MONTH_NS);
  fshm_budget one, two, taken;
  const unsigned leased = FSHM_BUDGET_SHARED;
  CHECK_EQ(reserve(l, 60 * USD, leased, 0, &one), FSHM_ASK); /* the server knows the limit */
  const uint64_t window = view(l, 0).window;
  CHECK_EQ(fshm_budget_grant(l, KEY, 1, 60 * USD, window, 0), FSHM_OK);
  CHECK_EQ(fshm_budget_grant(l, KEY, 1, USD, window + 1, 0), FSHM_DENIED);
  CHECK_EQ(reserve(l, 60 * USD, leased, 0, &one), FSHM_ALLOWED);
  CHECK_EQ(settle(l, &one, 60 * USD, 20 * USD, 0), FSHM_OK);
  CHECK_EQ(reserve(l, 5 * USD, leased, 0, &one), FSHM_ALLOWED);
  CHECK_EQ(fshm_budget_withdraw(l, KEY, 1, window + 1, 0, &taken), FSHM_DENIED);
  CHECK_EQ(taken.granted, 0);
  CHECK_EQ(fshm_budget_withdraw(l, KEY, 1, window, 0, &taken), FSHM_OK);
  CHECK_EQ(taken.granted, 35 * USD);
  CHECK_EQ(view(l, 0).granted, 25 * USD);
  CHECK_EQ(fshm_budget_withdraw(l, KEY, 1, window, 0, &taken), FSHM_OK);
  CHECK_EQ(taken.granted, 0);
  CHECK_EQ(reserve(l, 1, leased, 0, &two), FSHM_ASK);
  CHECK_EQ(settle(l, &one, 5 * USD, 9 * USD, 0),
           FSHM_OK); /* more than is leased: spent all the same */
  CHECK_EQ(fshm_budget_withdraw(l, KEY, 1, window, 0, &taken), FSHM_OK);
  CHECK_EQ(taken.granted, 0);
  CHECK_EQ(view(l, 0).spent, 29 * USD);
  /* with another period comes another window: what was leased is of the former one, what was spent counts on */
  fshm_limiter_close(budget(s, "b", 50 * USD, YEAR_NS));
  if (view(l, 0).window != window) {
    CHECK_EQ(view(l, 0).spent, 29 * USD);
    CHECK_EQ(view(l, 0).granted, 0);
    CHECK_EQ(reserve(l, 1, leased, 0, &two), FSHM_ASK);
    CHECK_EQ(fshm_budget_grant(l, KEY, 1, USD, view(l, 0).window, 0), FSHM_OK);
    CHECK_EQ(view(l, 0).granted, USD);
  }
}

/* Windows at given times: the wall clock is what the segment was made with. */
static void test_windows(void) {
  fshm_segment *s = KEEP(fresh_segment(100));
  fshm_limiter *l = budget(s, "b", 50 * USD, DAY_NS);
  fshm_budget b, held;
  const uint64_t start = fshm_wall(s, 0) / DAY_NS * DAY_NS - load_relaxed(&s->header->wall_base);
  const uint64_t day = start + DAY_NS; /* segment time at which tomorrow begins */
  CHECK_EQ(reserve(l, 10 * USD, 0, day, &b), FSHM_ALLOWED);
  CHECK_EQ(settle(l, &b, 10 * USD, 9 * USD, day), FSHM_OK);
  CHECK_EQ(view(l, day).left_ns, DAY_NS);
  CHECK_EQ(reserve(l, 10 * USD, 0, day + DAY_NS - 1, &held), FSHM_ALLOWED);
  CHECK_EQ(view(l, day + DAY_NS - 1).spent, 9 * USD);
  uint64_t version, later;
  fshm_limit found[4];
  CHECK_EQ(fshm_limiter_limits(l, found, &version), 4);
  CHECK_EQ(view(l, day + DAY_NS).spent, 0);
  CHECK_EQ(view(l, day + DAY_NS).reserved, 10 * USD);
  CHECK_EQ(fshm_limiter_limits(l, found, &later), 4);
  CHECK_EQ(later, version + 1); /* one publication a window */
  CHECK_EQ(view(l, day + DAY_NS + 5).spent, 0);
  CHECK_EQ(settle(l, &held, 10 * USD, 4 * USD, day + DAY_NS + 5), FSHM_OK);
  CHECK_EQ(view(l, day + DAY_NS + 6).spent, 4 * USD);
  /* many windows: the rules of those that are over make room */
  for (uint64_t i = 2; i < 60; i++) {
    CHECK_EQ(reserve(l, 50 * USD, 0, day + i * DAY_NS, &b), FSHM_ALLOWED);
    CHECK_EQ(settle(l, &b, 50 * USD, 49 * USD, day + i * DAY_NS), FSHM_OK);
    CHECK_EQ(reserve(l, 2 * USD, 0, day + (i + 1) * DAY_NS - 1, &b), FSHM_DENIED);
  }
  /* many limits in one window */
  for (uint64_t n = 1; n < 60; n++) {
    fshm_limiter_close(budget(s, "b", 60 * USD + n, DAY_NS));
    CHECK_EQ(view(l, day + 59 * DAY_NS + n).spent, 49 * USD);
    CHECK_EQ(reserve(l, 11 * USD + n + 1, 0, day + 59 * DAY_NS + n, &b), FSHM_DENIED);
  }
  uint64_t index;
  CHECK_EQ(fshm_check(s, &index), FSHM_DAMAGE_NONE);
}

/* The clock was ahead for a moment, by days: the window that began then ends with that of the right time. What was spent
 * in it stays spent. A window that a longer period began goes on. */
static void test_wrong_clock(void) {
  static const uint64_t periods[] = {HOUR_NS, DAY_NS, WEEK_NS, MONTH_NS, YEAR_NS};
  for (size_t i = 0; i < sizeof periods / sizeof *periods; i++) {
    fshm_segment *s = KEEP(fresh_segment(100));
    const uint64_t per = periods[i];
    const int64_t ahead = (int64_t)(4 * per > 2 * DAY_NS ? 4 * per : 2 * DAY_NS);
    fshm_limiter *l = budget(s, "b", 50 * USD, per);
    fshm_budget b;
    CHECK_EQ(fshm_budget_add(l, KEY, 1, 0, 5, 0), FSHM_OK);
    const fshm_budget right = view(l, 0);
    fshm_wall_pretend(s, ahead);
    CHECK_EQ(view(l, 0).spent, 0);
    CHECK_EQ(fshm_budget_add(l, KEY, 1, 0, 7, 0), FSHM_OK);
    CHECK_EQ(view(l, 0).spent, 7);
    CHECK_OP(view(l, 0).window, >, right.window);
    fshm_wall_pretend(s, 0);
    CHECK_EQ(view(l, 0).window, right.window); /* (unless an hour ends just now) */
    CHECK_OP(view(l, 0).left_ns, <=, right.left_ns);
    CHECK_EQ(view(l, 0).spent, 7);
    CHECK_EQ(reserve(l, 10, 0, 0, &b), FSHM_ALLOWED);
    CHECK_EQ(settle(l, &b, 10, 2, 0), FSHM_OK);
    CHECK_EQ(view(l, 0).spent, 9);
    fshm_wall_pretend(s, right.left_ns); /* it ends when it should */
    CHECK_EQ(view(l, 0).spent, 0);
    CHECK_EQ(reserve(l, 50 * USD, 0, 0, &b), FSHM_ALLOWED);
    fshm_wall_pretend(s, 0);
  }
  fshm_segment *s = KEEP(fresh_segment(100));
  fshm_limiter *l = budget(s, "p", 50 * USD, YEAR_NS);
  CHECK_EQ(fshm_budget_add(l, KEY, 1, 0, 5, 0), FSHM_OK);
  const int64_t year = view(l, 0).left_ns;
  l = budget(s, "p", 50 * USD, DAY_NS);
  CHECK_EQ(view(l, 0).spent, 5);
  fshm_wall_pretend(s, year);
  CHECK_EQ(view(l, 0).spent, 0);
  fshm_wall_pretend(s, 0);
}

/* What is reserved stays in its entry until it is settled: a look reads one entry after the other, and one that has read
 * the first must find in the second what was there all the time. */
static void test_entries(void) {
  fshm_segment *s = KEEP(fresh_segment(100));
  fshm_limiter *l = budget(s, "b", 50 * USD, DAY_NS);
  fshm_budget one, two;
  CHECK_EQ(reserve(l, 5, 0, 0, &one), FSHM_ALLOWED);
  CHECK_EQ(settle(l, &one, 5, 0, 0), FSHM_OK);
  reserved_t *set = reserved_set(s, process_index(s), one.id);
  CHECK_EQ(one.entry, 0);
  store_relaxed(&set[0].who, one.id + 1); /* another key's */
  store_relaxed(&set[0].when, 1);
  CHECK_EQ(reserve(l, 5, 0, 0, &one), FSHM_ALLOWED);
  CHECK_EQ(one.entry, 1);
  store_relaxed(&set[0].who, one.id); /* a thread that had seen it free */
  store_relaxed(&set[0].when, 0);
  CHECK_EQ(reserve(l, 7, 0, 0, &two), FSHM_ALLOWED);
  CHECK_EQ(two.entry, 0);
  CHECK_EQ(view(l, 0).reserved, 12);
  CHECK_EQ(settle(l, &one, 5, 5, 0), FSHM_OK);
  CHECK_EQ(load_relaxed(&set[0].when), 7);
  CHECK_EQ(load_relaxed(&set[1].when), 0);
  CHECK_EQ(settle(l, &two, 7, 7, 0), FSHM_OK);
  CHECK_EQ(view(l, 0).reserved, 0);
  CHECK_EQ(view(l, 0).spent, 12);
}

/* What was charged is corrected in its own window, and not where it is forgotten: others have spent there since. */
static void test_corrections(void) {
  fshm_segment *s = KEEP(fresh_segment(100));
  fshm_limiter *l = budget(s, "b", 50 * USD, DAY_NS);
  fshm_budget b[5];
  const uint64_t now = segment_now(s) + DAY_NS;
  for (int i = 0; i < 5; i++) CHECK_EQ(reserve(l, 5, FSHM_BUDGET_CHARGE, now, &b[i]), FSHM_ALLOWED);
  CHECK_EQ(settle(l, &b[0], 5, 2, now), FSHM_OK);
  CHECK_EQ(view(l, now).spent, 22);
  CHECK_EQ(fshm_budget_add(l, KEY, 1, 0, 10, now + DAY_NS), FSHM_OK);
  CHECK_EQ(settle(l, &b[1], 5, 2, now + DAY_NS), FSHM_OK);
  CHECK_EQ(view(l, now + DAY_NS).spent, 10);
  CHECK_EQ(settle(l, &b[2], 5, 7, now + DAY_NS), FSHM_OK);
  CHECK_EQ(view(l, now + DAY_NS).spent, 12);
  CHECK_EQ(fshm_reset_all(l), FSHM_OK);
  CHECK_EQ(fshm_budget_add(l, KEY, 1, 0, 10, now + DAY_NS), FSHM_OK);
  CHECK_EQ(settle(l, &b[3], 5, 2, now + DAY_NS), FSHM_OK);
  CHECK_EQ(view(l, now + DAY_NS).spent, 12);
  CHECK_EQ(settle(l, &b[4], 5, 5, now + DAY_NS), FSHM_OK);
  CHECK_EQ(view(l, now + DAY_NS).spent, 17);
  /* the same in one window: what was charged before a reset is not taken back from what came after it */
  const uint64_t then = now + DAY_NS;
  CHECK_EQ(reserve(l, 5, FSHM_BUDGET_CHARGE, then, &b[0]), FSHM_ALLOWED);
  CHECK_EQ(fshm_reset_all(l), FSHM_OK);
  CHECK_EQ(fshm_budget_add(l, KEY, 1, 0, 10, then), FSHM_OK);
  CHECK_EQ(settle(l, &b[0], 5, 2, then), FSHM_OK);
  CHECK_EQ(view(l, then).spent, 12);
  /* a period that changes: what was charged in an hour is not taken back from the month that follows it */
  l = budget(s, "p", 50 * USD, HOUR_NS);
  CHECK_EQ(reserve(l, 5, FSHM_BUDGET_CHARGE, now, &b[0]), FSHM_ALLOWED);
  l = budget(s, "p", 50 * USD, YEAR_NS);
  CHECK_EQ(reserve(l, 5, FSHM_BUDGET_CHARGE, now, &b[1]), FSHM_ALLOWED);
  CHECK_EQ(view(l, now).spent, 10);
  CHECK_EQ(settle(l, &b[0], 5, 1, now), FSHM_OK);
  CHECK_EQ(view(l, now).spent, 6);
  CHECK_EQ(fshm_budget_add(l, KEY, 1, 0, 10, now + HOUR_NS), FSHM_OK);
  CHECK_EQ(view(l, now + HOUR_NS).spent, 10);
  CHECK_EQ(settle(l, &b[1], 5, 1, now + HOUR_NS), FSHM_OK);
  CHECK_EQ(view(l, now + HOUR_NS).spent, 10);
}

/* A slot whose window is over is free for others; one whose window is not, is not. */
static void test_expiry(void) {
  fshm_segment *s = KEEP(fresh_segment(1));
  fshm_limiter *l = budget(s, "b", 50 * USD, DAY_NS);
  const fshm_limit plenty = {1000, HOUR_NS, 0, FSHM_WINDOW, 0};
  fshm_limiter *others = KEEP(fresh_limiter(s, "o", &plenty, 1));
  const uint64_t now = segment_now(s) + DAY_NS;
  fshm_decision d;
  char key[16];
  CHECK_EQ(fshm_budget_add(l, KEY, 1, 0, 5, now), FSHM_OK);
  for (int i = 0; i < 20; i++) {
    (void)snprintf(key, sizeof key, "%d", i);
    fshm_apply(others, FSHM_ACQUIRE, key, strlen(key), NULL, 0, now, &d);
  }
  CHECK_EQ(d.status, FSHM_FULL);
  CHECK_EQ(view(l, now).spent, 5);
  for (int i = 20; i < 40; i++) {
    (void)snprintf(key, sizeof key, "%d", i);
    fshm_apply(others, FSHM_ACQUIRE, key, strlen(key), NULL, 0, now + DAY_NS, &d);
  }
  CHECK_EQ(d.status, FSHM_FULL);
  CHECK_EQ(view(l, now + DAY_NS).spent, 0);
  bool there = false;
  for (uint64_t i = 0; i < s->slot_count; i++) there |= IS_MONEY(load_relaxed(&s->slots[i].when));
  CHECK(!there); /* others have its slot */
  fshm_budget b;
  CHECK_EQ(reserve(l, 1, 0, now + DAY_NS, &b), FSHM_FULL);
  CHECK_EQ(view(l, now + DAY_NS).reserved, 0);
}

/* What a hostile process may have written: sums are cut, and nothing overflows. */
static void test_hostile(void) {
  fshm_segment *s = KEEP(fresh_segment(100));
  fshm_limiter *l = budget(s, "b", 50 * USD, DAY_NS);
  fshm_budget b;
  CHECK_EQ(reserve(l, 1, 0, 0, &b), FSHM_ALLOWED);
  const uint32_t process = process_index(s);
  reserved_t *set = reserved_set(s, process, b.id);
  for (uint32_t i = 0; i < RESERVED_WAYS; i++) {
    store_relaxed(&set[i].who, b.id);
    store_relaxed(&set[i].when, UINT64_MAX - i);
  }
  CHECK_EQ(view(l, 0).reserved, RESERVED_MOST);
  fshm_budget other;
  CHECK_EQ(reserve(l, 1, 0, 0, &other), FSHM_DENIED);
  CHECK_EQ(reserve(l, UINT64_MAX, FSHM_BUDGET_CHARGE, 0, &other), FSHM_DENIED);
  (void)settle(l, &b, UINT64_MAX, UINT64_MAX, 0);
  CHECK(view(l, 0).spent <= MONEY_MOST * 2);
  for (int i = 0; i < 20; i++) CHECK_EQ(fshm_budget_add(l, KEY, 1, 0, INT64_MAX, 0), FSHM_OK);
  CHECK(view(l, 0).spent < UINT64_C(1) << 60);
  CHECK_EQ(fshm_budget_raise(l, KEY, 1, 3, UINT64_MAX, view(l, 0).window, 0), FSHM_OK);
  CHECK_EQ(view(l, 0).granted, (UINT64_C(1) << 60) - 1);
  CHECK_EQ(fshm_budget_add(l, KEY, 1, 0, INT64_MIN, 0), FSHM_OK);
  CHECK_EQ(fshm_budget_add(l, KEY, 1, 4, 1, 0), FSHM_E_ARGUMENT);
}

/* Threads and a dead process: what stands is never more than the limit. */
static fshm_limiter *shared;
static _Atomic uint64_t spent_by_threads, most_seen;
static void *spend(void *given) {
  uint64_t mine = 0;
  random_state = (uintptr_t)given;
  for (int i = 0; i < fewer(20000); i++) {
    fshm_budget b;
    const uint64_t amount = 1 + random_below(USD);
    if (reserve(shared, amount, i % 5 ? 0 : FSHM_BUDGET_CHARGE, 0, &b) != FSHM_ALLOWED) continue;
    raise_to(&most_seen, b.spent + b.reserved);
    const uint64_t actual = random_below(amount + 1) / 500;
    (void)settle(shared, &b, amount, actual, 0);
    mine += actual;
  }
  (void)atomic_fetch_add(&spent_by_threads, mine);
  return NULL;
}
static void test_threads(void) {
  fshm_segment *s = KEEP(fresh_segment(100));
  pthread_t threads[4];
  shared = budget(s, "b", 3 * USD, YEAR_NS);
  for (uintptr_t i = 0; i < 4; i++) pthread_create(&threads[i], NULL, spend, (void *)(i + 1));
  for (int i = 0; i < 4; i++) pthread_join(threads[i], NULL);
  CHECK_EQ(view(shared, 0).spent, load_relaxed(&spent_by_threads));
  CHECK_EQ(view(shared, 0).reserved, 0);
  CHECK(load_relaxed(&most_seen) <= 3 * USD && load_relaxed(&most_seen) > 2 * USD);
}

/* Threads that reserve, and one that takes back what they do not use. slack: what is leased less what is held and spent.
 * It falls after each change that makes it less, and rises before each that makes it more: it never falls below 0. */
static _Atomic uint64_t slack, running;
static void less_slack(uint64_t by) { CHECK(atomic_fetch_sub(&slack, by) >= by); }
static void *take_back(void *given) {
  const uint64_t window = view(shared, 0).window;
  (void)given;
  while (load_relaxed(&running)) {
    fshm_budget taken;
    (void)atomic_fetch_add(&slack, USD / 4);
    CHECK_EQ(fshm_budget_grant(shared, KEY, 1, USD / 4, window, 0), FSHM_OK);
    (void)usleep(20);
    CHECK_EQ(fshm_budget_withdraw(shared, KEY, 1, window, 0, &taken), FSHM_OK);
    less_slack(taken.granted);
  }
  return NULL;
}
static void *spend_leased(void *given) {
  random_state = (uintptr_t)given;
  for (int i = 0; i < fewer(20000); i++) {
    fshm_budget b;
    const uint64_t amount = 1 + random_below(USD / 8), actual = random_below(3);
    if (reserve(shared, amount, FSHM_BUDGET_SHARED, 0, &b) != FSHM_ALLOWED) continue;
    less_slack(amount);
    (void)atomic_fetch_add(&slack, amount - min_u64(actual, amount));
    (void)settle(shared, &b, amount, min_u64(actual, amount), 0);
  }
  return NULL;
}
static void test_take_back(void) {
  fshm_segment *s = KEEP(fresh_segment(100));
  pthread_t threads[4];
  shared = budget(s, "b", 3 * USD, YEAR_NS);
  store_relaxed(&running, 1);
  for (uintptr_t i = 0; i < 4; i++)
    pthread_create(&threads[i], NULL, i ? spend_leased : take_back, (void *)(i + 1));
  for (int i = 1; i < 4; i++) pthread_join(threads[i], NULL);
  store_relaxed(&running, 0);
  pthread_join(threads[0], NULL);
  const fshm_budget b = view(shared, 0);
  CHECK_EQ(b.reserved, 0);
  CHECK_EQ(b.granted - b.spent, load_relaxed(&slack));
}

/* A process that has raised its incarnation, and does not hold the byte yet that says that it lives, is not dead. */
static void test_joining(void) {
  fshm_segment *s = KEEP(fresh_segment(100));
  const uint32_t mine = process_index(s), other = (mine + 1) % HOME_PROCESSES;
  process_t *p = &s->processes[other];
  atomic_fetch_or(&s->header->joined[other / 64], UINT64_C(1) << other % 64);
  atomic_fetch_or(&s->header->joined_blocks, UINT64_C(1) << other / 64);
  store_relaxed(&p->incarnation, 5);
  look_for_dead(s);
  CHECK_EQ(load_relaxed(&p->dead), 0);
  store_relaxed(&p->pid, 1);
  look_for_dead(s);
  CHECK_EQ(load_relaxed(&p->dead), 5);
}

static void test_death(void) {
  fshm_segment *s = KEEP(fresh_segment(100));
  fshm_limiter *l = budget(s, "b", 50 * USD, YEAR_NS);
  fshm_budget b;
  CHECK_EQ(view(l, 0).reserved, 0);
  for (int i = 0; i < 5; i++) {
    pid_t pid = fork();
    if (!pid) {
      (void)reserve(l, 30 * USD, 0, 0, &b);
      (void)kill(getpid(), SIGKILL);
    }
    (void)waitpid(pid, NULL, 0);
    for (int tries = 0; tries < 3000 && view(l, 0).reserved; tries++) (void)usleep(1000);
    CHECK_EQ(view(l, 0).reserved, 0);
  }
  CHECK_EQ(reserve(l, 50 * USD, 0, 0, &b), FSHM_ALLOWED);
  pid_t pid = fork(); /* a child settles nothing of its parent's */
  if (!pid) _exit(settle(l, &b, 50 * USD, 1, 0) != 0);
  int status;
  (void)waitpid(pid, &status, 0);
  CHECK_EQ(WEXITSTATUS(status), 0);
  CHECK_EQ(view(l, 0).reserved, 50 * USD);
}

/* All amounts, as one reader sees them: of which = w, of a key with this id. */
static uint64_t seen(fshm_segment *s, uint64_t now, uint32_t which, uint64_t id) {
  fshm_budget_info all[64];
  uint64_t sum = 0, count = fshm_budgets(s, now, all, 64);
  CHECK(count <= 64);
  for (uint64_t i = 0; i < count; i++)
    if (all[i].which == which && (!id || all[i].id == id)) sum += all[i].amount;
  return sum;
}

static void test_inspection(void) {
  fshm_segment *s = KEEP(fresh_segment(100));
  const fshm_limit tokens = {5, HOUR_NS, 0, FSHM_WINDOW, 0};
  fshm_decision d;
  fshm_limiter *other = KEEP(fresh_limiter(s, "t", &tokens, 1));
  fshm_apply(other, FSHM_ACQUIRE, KEY, 1, NULL, 0, 0, &d);
  CHECK_EQ(fshm_budgets(s, 0, NULL, 0), 0);
  fshm_limiter *l = budget(s, "b", 50 * USD, DAY_NS);
  const uint64_t now = segment_now(s) + DAY_NS;
  fshm_budget b;
  fshm_budget_info one[2] = {{0}};
  CHECK_EQ(fshm_budgets(s, now, one, 2), 1);
  CHECK_EQ(one[0].which, FSHM_BUDGET_LIMIT);
  CHECK_EQ(one[0].amount, 50 * USD);
  CHECK_EQ(one[0].left_ns, (uint64_t)view(l, now).left_ns);
  CHECK_EQ(one[0].limiter, l->index);
  CHECK_EQ(fshm_budget_add(l, KEY, 1, 1, 7, now), FSHM_OK); /* a slot for its name, too */
  CHECK_EQ(fshm_budgets(s, now, one, 2), 3);
  CHECK_EQ(fshm_budget_add(l, KEY, 1, 0, 5, now), FSHM_OK);
  CHECK_EQ(fshm_budget_once(l, KEY, 1, now), FSHM_OK);
  CHECK_EQ(reserve(l, 3, 0, now, &b), FSHM_ALLOWED);
  fshm_budget_info all[8];
  CHECK_EQ(fshm_budgets(s, now, all, 8), 5);
  uint64_t id = 0, named = 0;
  char name[256];
  for (int i = 0; i < 5; i++) {
    if (all[i].which == FSHM_BUDGET_LIMIT) continue;
    CHECK(!id || id == all[i].id);
    id = all[i].id;
    CHECK_EQ(all[i].limiter, all[i].which == FSHM_BUDGET_RESERVED ? UINT32_MAX : l->index);
    if (all[i].which == 0) CHECK_EQ(fshm_key_name(s, all[i].slot, name, 256, &named), 1);
  }
  CHECK_EQ(named, 1);
  CHECK_EQ(name[0], KEY[0]);
  CHECK_EQ(seen(s, now, 0, id), 5);
  CHECK_EQ(seen(s, now, 1, id), 7);
  CHECK_EQ(seen(s, now, 2, id), 1);
  CHECK_EQ(seen(s, now, FSHM_BUDGET_RESERVED, id), 3);
  /* Under another limit, and in the next window; the look publishes nothing. */
  fshm_limiter_close(budget(s, "b", 60 * USD, DAY_NS));
  CHECK_EQ(seen(s, now, 0, id), 5);
  CHECK_EQ(seen(s, now, FSHM_BUDGET_LIMIT, 0), 60 * USD);
  const uint64_t current = entry_current(s, l->index);
  CHECK_EQ(seen(s, now + DAY_NS, 0, id), 0);
  CHECK_EQ(seen(s, now + DAY_NS, FSHM_BUDGET_RESERVED, id), 3);
  CHECK_EQ(entry_current(s, l->index), current);
  /* of a process that is dead */
  pid_t pid = fork();
  if (!pid) {
    (void)fshm_budget_reserve(l, "j", 1, 4, 0, now, &b);
    _exit(0);
  }
  (void)waitpid(pid, NULL, 0);
  CHECK_EQ(seen(s, now, FSHM_BUDGET_RESERVED, 0), 3);
}

int main(void) {
  test_calls();
  test_leases();
  test_windows();
  test_wrong_clock();
  test_entries();
  test_corrections();
  test_expiry();
  test_hostile();
  test_joining(); /* before there are threads: a child has none of them, and their memory */
  test_death();
  test_threads();
  test_take_back();
  test_inspection();
  return done();
}
