/* test_limits.c - the table of limiters: names, versions, changes by many, deaths in between. */
#include "../../csrc/unity.c"

#include "check.h"

static fshm_limit bucket(uint64_t n) {
  return (fshm_limit){n, n * UINT64_C(10000000), n, FSHM_BUCKET, 0};
}

static int change(fshm_segment *s, const char *name, const fshm_limit *l, uint32_t count) {
  fshm_limiter *out;
  int status = fshm_limiter_open(s, name, strlen(name), l, count, &out);
  fshm_limiter_close(out);
  return status;
}

static void test_versions(void) {
  fshm_segment *s = fresh_segment(100);
  fshm_limit l = bucket(1), got[FSHM_MAX_LIMITS];
  fshm_limiter *a = fresh_limiter(s, "a", &l, 1);
  uint64_t version;
  CHECK_EQ(fshm_limiter_limits(a, got, &version), 1);
  CHECK_EQ(version, 1);
  CHECK_EQ(change(s, "a", &l, 1), FSHM_OK); /* the same: no change */
  CHECK_EQ(fshm_limiter_limits(a, got, &version), 1);
  CHECK_EQ(version, 1);
  uint64_t expected = version;
  unsigned used =
      1; /* rules: each change takes one, until there is none; then a sweep frees all but the present one */
  for (uint64_t n = 2; n < 200; n++) {
    l = bucket(n);
    expected += used == RULES ? 2 : 1; /* a sweep is a version too */
    used = used == RULES ? 2 : used + 1;
    CHECK_EQ(change(s, "a", &l, 1), FSHM_OK);
    CHECK_EQ(fshm_limiter_limits(a, got, &version), 1);
    CHECK_EQ(version, expected);
    CHECK_EQ(got[0].n, n);
    CHECK_EQ(got[0].per_ns, l.per_ns);
  }
  fshm_limit two[2] = {bucket(5), {7, 1000000, 0, FSHM_SLIDING, 0}};
  CHECK_EQ(change(s, "a", two, 2), FSHM_OK);
  CHECK_EQ(fshm_limiter_limits(a, got, &version), 2);
  CHECK_EQ(got[1].kind, FSHM_SLIDING);
  CHECK_EQ(got[1].n, 7);
  fshm_limiter_close(a);
  fshm_close(s);
}

static void test_arguments(void) {
  fshm_segment *s = fresh_segment(100);
  const fshm_limit good = bucket(5);
  fshm_limit bad[] = {good, good, good, good, good, good, good};
  char long_name[FSHM_MAX_LIMITER_NAME + 2] = {0};
  memset(long_name, 'n', FSHM_MAX_LIMITER_NAME + 1);
  bad[0].n = 0, bad[1].per_ns = 0, bad[2].burst = 0, bad[3].burst = 6, bad[4].kind = 3;
  bad[5].per_ns = BUCKET_MAX_PER + 1, bad[6].kind = FSHM_SLIDING, bad[6].per_ns = 2000;
  for (unsigned i = 0; i < sizeof bad / sizeof *bad; i++)
    CHECK_EQ(change(s, "bad", &bad[i], 1), FSHM_E_ARGUMENT);
  CHECK_EQ(change(s, "bad", &good, 0), FSHM_E_ARGUMENT);
  CHECK_EQ(change(s, "bad", &good, FSHM_MAX_LIMITS + 1), FSHM_E_ARGUMENT);
  CHECK_EQ(change(s, "", &good, 1), FSHM_E_ARGUMENT);
  CHECK_EQ(change(s, long_name, &good, 1), FSHM_E_ARGUMENT);
  long_name[FSHM_MAX_LIMITER_NAME] = 0;
  CHECK_EQ(change(s, long_name, &good, 1), FSHM_OK);
  fshm_limiter_info info;
  CHECK_EQ(fshm_limiter_at(s, 0, &info), FSHM_OK);
  CHECK_EQ(info.name_length, FSHM_MAX_LIMITER_NAME);
  CHECK(!memcmp(info.name, long_name, FSHM_MAX_LIMITER_NAME));
  CHECK_EQ(fshm_limiter_at(s, 1, &info), 0);
  CHECK_EQ(fshm_limiter_at(s, UINT32_MAX, &info), FSHM_E_ARGUMENT);
  fshm_close(s);
}

static void test_table_full(void) {
  fshm_segment *s = fresh_segment(100);
  char name[32];
  for (uint32_t i = 0; i < s->limiter_count; i++) {
    fshm_limit l = bucket(i + 1);
    (void)snprintf(name, sizeof name, "limiter %u", i);
    CHECK_EQ(change(s, name, &l, 1), FSHM_OK);
  }
  fshm_limit l = bucket(1);
  CHECK_EQ(change(s, "one more", &l, 1), FSHM_E_LIMITERS);
  CHECK_EQ(change(s, "limiter 7", &l, 1), FSHM_OK); /* a name that is there needs no room */
  for (uint32_t i = 0; i < s->limiter_count; i++) {
    fshm_limiter_info info;
    (void)snprintf(name, sizeof name, "limiter %u", i);
    CHECK_EQ(fshm_limiter_at(s, i, &info), FSHM_OK);
    CHECK(info.name_length == strlen(name) && !memcmp(info.name, name, info.name_length));
    CHECK_EQ(info.limits[0].n, i == 7 ? 1 : i + 1);
  }
  fshm_close(s);
}

#define CHANGES 2500
#define CHANGERS 4

static void changer(int me, void *with) {
  fshm_segment *s = with;
  for (int i = 0; i < CHANGES; i++) {
    uint64_t n = 1 + random_below(100000);
    fshm_limit l[FSHM_MAX_LIMITS];
    uint32_t count = 1 + (uint32_t)(n % FSHM_MAX_LIMITS);
    for (uint32_t k = 0; k < count; k++) l[k] = bucket(n);
    /* With more changers at once than there are rule indexes to write in, one has to come again. */
    int status = me < CHANGERS ? change(s, "busy", l, count) : FSHM_OK;
    CHECK(status == FSHM_OK || status == FSHM_CONTENDED);
    snapshot_t p;
    CHECK(limits_load(s, 0, &p));
    CHECK_EQ(p.count, 1 + p.rules[0].n % FSHM_MAX_LIMITS);
    for (uint32_t k = 0; k < p.count; k++) /* a set is one set: never parts of two */
      CHECK(p.rules[k].n == p.rules[0].n && p.rules[k].burst == p.rules[0].n &&
            p.rules[k].per == p.rules[0].n * UINT64_C(10000000));
  }
}

static void test_many_change_and_read(void) {
  fshm_segment *s = fresh_segment(100);
  fshm_limit l[2] = {bucket(1), bucket(1)};
  CHECK_EQ(change(s, "busy", l, 2), FSHM_OK);
  run_children(CHANGERS + 2, changer, s);
  l[0] = bucket(100001);
  CHECK_EQ(change(s, "busy", l, 1), FSHM_OK); /* nothing of it is stuck */
  unsigned owned = 0;
  for (unsigned i = 0; i < RULES; i++) {
    uint64_t owner = load_relaxed(&s->limiters[0].owners[i]);
    owned += owner && !(owner & RULE_USED);
  }
  CHECK_EQ(owned, 0); /* what is used needs no owner, and the rest was given back */
  fshm_close(s);
}

/* An owner word of this process, as publish() makes them. */
static uint64_t owner_word(fshm_segment *s) {
  uint64_t process = process_index(s);
  return s->fork_page->incarnation << 16 | (process + 1);
}

/* A child that takes all free rule indexes of the entry and dies without publishing. */
static void take_and_die(int me, void *with) {
  fshm_segment *s = with;
  limiter_entry_t *e = &s->limiters[0];
  int taken = 0;
  (void)me;
  while (take_rule(s, e, owner_word(s)) >= 0)
    if (++taken > RULES) _exit(1); /* took what was taken */
  (void)raise(SIGKILL);
}

static void test_dead_publisher(void) {
  fshm_segment *s = fresh_segment(100);
  fshm_limit l = bucket(1);
  fshm_limiter *a = fresh_limiter(s, "a", &l, 1);
  for (uint64_t n = 2; n < 60; n++) {
    int status;
    pid_t pid = start_child(take_and_die, (int)n, s);
    CHECK_EQ(waitpid(pid, &status, 0), pid);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
    l = bucket(n);
    CHECK_EQ(change(s, "a", &l, 1), FSHM_OK);
    CHECK_EQ(apply_at(a, FSHM_PEEK, "k", n, 1).status, FSHM_ALLOWED);
  }
  fshm_limiter_close(a);
  fshm_close(s);
}

/* Rule indexes whose owner is dead are free, even if its process index has a new owner; those that a living process is
 * filling are not. */
static void test_dead_owners(void) {
  fshm_segment *s = fresh_segment(100);
  fshm_limit l = bucket(1);
  limiter_entry_t *e = &s->limiters[0];
  CHECK_EQ(change(s, "a", &l, 1), FSHM_OK);
  for (uint64_t n = 2; n < 40; n++) {
    uint64_t earlier = owner_word(s) - (UINT64_C(1) << 16); /* of our place, a incarnation ago */
    for (unsigned i = 0; i < RULES; i++)
      if (!(load_relaxed(&e->owners[i]) & RULE_USED)) store_relaxed(&e->owners[i], earlier);
    l = bucket(n);
    CHECK_EQ(change(s, "a", &l, 1), FSHM_OK);
  }
  for (unsigned i = 0; i < RULES; i++) /* alive, and writing in all but the present one */
    if (SET_RULE(load_relaxed(&e->set), 0) != i) store_relaxed(&e->owners[i], owner_word(s));
  l = bucket(50);
  CHECK_EQ(change(s, "a", &l, 1), FSHM_CONTENDED);
  snapshot_t p;
  CHECK(limits_load(s, 0, &p));
  CHECK_EQ(p.rules[0].n, 39);
  fshm_close(s);
}

/* Keys that are asleep, or denied, through any number of changes: their rules are kept until what is used fits. */
static void test_sweeps(void) {
  fshm_segment *s = fresh_segment(200);
  const uint64_t hour = UINT64_C(3600000000000), now = hour;
  const fshm_limit big = {1000, hour, 1000, FSHM_BUCKET, 0};
  fshm_limiter *l = fresh_limiter(s, "a", &big, 1), *again;
  CHECK_EQ(apply_at(l, FSHM_ACQUIRE, "k", 900, now).status, FSHM_ALLOWED);
  uint64_t left[FSHM_MAX_LIMITS], epochs = 0;
  unsigned epoch = 0;
  for (uint64_t n = 1; n < 400; n++) {
    const fshm_limit small = {n, hour, n, FSHM_BUCKET, 0};
    CHECK_EQ(fshm_limiter_open_at(s, "a", 1, &small, 1, now, &again), FSHM_OK);
    fshm_limiter_close(again);
    const fshm_decision d = apply_at(l, FSHM_ACQUIRE, "k", 1, now);
    CHECK_EQ(d.status, FSHM_DENIED);
    /* by the rule under which they were used, a token comes every 3.6 s: not n an hour */
    CHECK_OP((uint64_t)d.retry_after_ns, <=, (901 - n) * (hour / 1000) + 10);
    CHECK_EQ(fshm_remaining(l, "k", 1, now, left), 1);
    CHECK_EQ(left[0], 0);
    const uint64_t current = load_relaxed(&s->limiters[0].current);
    epochs += CURRENT_EPOCH(current) != epoch;
    epoch = CURRENT_EPOCH(current);
    char key[8];
    (void)snprintf(key, sizeof key, "%u", (unsigned)n % 20);
    (void)apply_at(l, FSHM_ACQUIRE, key, 1, now);
  }
  CHECK_OP(epochs, >, 10);
  CHECK_EQ(fshm_limiter_open_at(s, "a", 1, &big, 1, now, &again), FSHM_OK);
  fshm_limiter_close(again);
  CHECK_EQ(apply_at(l, FSHM_ACQUIRE, "k", 101, now).status, FSHM_DENIED);
  CHECK_EQ(apply_at(l, FSHM_ACQUIRE, "k", 100, now).status, FSHM_ALLOWED);
  fshm_limiter_close(l);
  fshm_close(s);
}

/* All rules but the present one have keys that have used more than it admits: the rule index of one of them is freed all the
 * same, and no token is made. */
static void test_every_rule_is_in_use(void) {
  fshm_segment *s = fresh_segment(500);
  const uint64_t hour = UINT64_C(3600000000000), now = hour;
  for (uint32_t kind = FSHM_BUCKET; kind <= FSHM_SLIDING; kind++) {
    const char *name = kind == FSHM_BUCKET ? "bucket" : kind == FSHM_WINDOW ? "window" : "sliding";
    fshm_limiter *l = NULL, *again;
    char key[16];
    for (unsigned n = 40; n > 0;
         n--) { /* each lower than the last: the keys used up what there was */
      const fshm_limit limit = {n * 10, hour, kind == FSHM_BUCKET ? n * 10 : 0, kind, 0};
      CHECK_EQ(fshm_limiter_open_at(s, name, strlen(name), &limit, 1, now, &again), FSHM_OK);
      if (l) fshm_limiter_close(again);
      if (!l) l = again;
      for (unsigned k = 40; k >= n; k--) {
        (void)snprintf(key, sizeof key, "%u", k);
        CHECK_EQ(apply_at(l, FSHM_ACQUIRE, key, n * 10, now).status,
                 k == n ? FSHM_ALLOWED : FSHM_DENIED);
        const fshm_decision d = apply_at(l, FSHM_PEEK, key, 1, now);
        CHECK_EQ(d.status, FSHM_DENIED);
        CHECK_OP((uint64_t)d.retry_after_ns, <=, 2 * hour);
      }
    }
    const fshm_limit most = {10000, hour, kind == FSHM_BUCKET ? 10000 : 0, kind, 0};
    CHECK_EQ(fshm_limiter_open_at(s, name, strlen(name), &most, 1, now, &again), FSHM_OK);
    fshm_limiter_close(again);
    for (unsigned k = 40; k > 0; k--) {
      uint64_t left[FSHM_MAX_LIMITS];
      (void)snprintf(key, sizeof key, "%u", k);
      CHECK_EQ(fshm_remaining(l, key, strlen(key), now, left), 1);
      CHECK_EQ(left[0], 10000 - 10 * k);
    }
    fshm_limiter_close(l);
  }
  fshm_close(s);
}

/* The same, where one of the rules is the last of a limit that is there no more: it is kept, and what was used of it. */
static void test_last_rule_of_a_limit_is_kept(void) {
  fshm_segment *s = fresh_segment(100);
  const uint64_t hour = UINT64_C(3600000000000), now = hour;
  fshm_limit limits[2] = {{0, hour, 0, FSHM_WINDOW, 0}, {40, hour / 2, 0, FSHM_WINDOW, 0}};
  fshm_limiter *l = NULL, *again;
  char key[4];
  for (unsigned k = 0; k < RULES; k++) { /* each key has used up what there was */
    limits[0].n = k == 1 ? 60 : 60 - 2 * k;
    CHECK_EQ(fshm_limiter_open_at(s, "a", 1, limits, k ? 1 : 2, now, &again), FSHM_OK);
    if (l) fshm_limiter_close(again);
    if (!l) l = again;
    const uint64_t costs[FSHM_MAX_LIMITS] = {60 - 2 * k, 1, 0, 0};
    fshm_decision d;
    (void)snprintf(key, sizeof key, "%u", k);
    fshm_apply(l, FSHM_ACQUIRE, key, strlen(key), costs, 0, now, &d);
    CHECK_EQ(d.status, FSHM_ALLOWED);
  }
  for (unsigned k = 0; k < RULES; k++) CHECK(load_relaxed(&s->limiters[0].owners[k]));
  limits[0].n = 11;
  CHECK_EQ(fshm_limiter_open_at(s, "a", 1, limits, 1, now, &again), FSHM_OK);
  fshm_limiter_close(again);
  limits[0].n = 100;
  CHECK_EQ(fshm_limiter_open_at(s, "a", 1, limits, 2, now, &again), FSHM_OK);
  fshm_limiter_close(again);
  for (unsigned k = 0; k < RULES; k++) {
    uint64_t left[FSHM_MAX_LIMITS];
    (void)snprintf(key, sizeof key, "%u", k);
    CHECK_EQ(fshm_remaining(l, key, strlen(key), now, left), 2);
    CHECK_EQ(left[0], 100 - (60 - 2 * k));
    CHECK_EQ(left[1], k ? 40 : 39);
  }
  fshm_limiter_close(l);
  fshm_close(s);
}

/* A charge that is given back under its own limits again, after a faster rule that a sweep has freed since: what may have
 * drained at that pace does not come back; without such a rule, all of it does. */
static void test_pace_since(void) {
  const uint64_t hour = UINT64_C(3600000000000), second = 1000000000;
  for (unsigned fast = 0; fast < 2; fast++) {
    fshm_segment *s = fresh_segment(100);
    const fshm_limit slow = {10, 10 * hour, 10, FSHM_BUCKET, 0};
    const fshm_limit other = {10, fast ? second : 20 * hour, 10, FSHM_BUCKET, 0};
    fshm_limiter *l = fresh_limiter(s, "a", &slow, 1), *again;
    const uint64_t version = CURRENT_VERSION(load_relaxed(&s->limiters[0].current));
    const uint64_t ten[FSHM_MAX_LIMITS] = {10}, none[FSHM_MAX_LIMITS] = {0};
    fshm_permit permit;
    fshm_decision d;
    uint32_t held;
    fshm_admit(l, "k", 1, ten, hour, &permit, &d, &held);
    CHECK_EQ(d.status, FSHM_ALLOWED);
    CHECK_EQ(permit.put[0].version, version);
    CHECK_EQ(limits_pace_since(s, 0, 0, version), UINT64_MAX);
    CHECK_EQ(fshm_limiter_open_at(s, "a", 1, &other, 1, hour, &again), FSHM_OK);
    fshm_limiter_close(again);
    CHECK_EQ(limits_pace_since(s, 0, 0, version), (fast ? second / 10 : 2 * hour) << 10);
    for (unsigned k = 0; k < 3 * RULES; k++) { /* more than there are rule indexes for */
      const fshm_limit slower = {20 + k, (20 + k) * 3 * hour, 20 + k, FSHM_BUCKET, 0};
      CHECK_EQ(fshm_limiter_open_at(s, "a", 1, &slower, 1, hour, &again), FSHM_OK);
      fshm_limiter_close(again);
    }
    CHECK_EQ(limits_pace_since(s, 0, 0, version), (fast ? second / 10 : 2 * hour) << 10);
    CHECK_EQ(fshm_limiter_open_at(s, "a", 1, &slow, 1, hour, &again), FSHM_OK);
    fshm_limiter_close(again);
    CHECK_EQ(fshm_settle(l, "k", 1, ten, none, &permit, hour + (fast ? second : 0)), FSHM_ALLOWED);
    uint64_t left[FSHM_MAX_LIMITS];
    CHECK_EQ(fshm_remaining(l, "k", 1, hour + (fast ? second : 0), left), 1);
    CHECK_EQ(left[0], fast ? 0 : 10);
    /* Whatever was written over the rules: some pace, and no division by zero. */
    for (unsigned k = 0; k < RULES; k++) store_relaxed(&s->limiters[0].rules[k][5], 0);
    CHECK_OP(limits_pace_since(s, 0, 0, version), >, 0);
    CHECK(fshm_limiter_open_at(s, "a", 1, &other, 1, hour, &again) < FSHM_DENIED);
    fshm_limiter_close(l);
    fshm_close(s);
  }
}

static void test_resets(void) {
  fshm_segment *s = fresh_segment(100);
  fshm_limit l = {3, 1000000000, 0, FSHM_WINDOW, 0};
  fshm_limiter *a = fresh_limiter(s, "a", &l, 1), *b = fresh_limiter(s, "b", &l, 1);
  uint64_t salt = 0;
  for (int i = 0; i < 50; i++) {
    snapshot_t p;
    CHECK(limits_load(s, a->index, &p));
    CHECK(!i || p.salt != salt);
    salt = p.salt;
    for (const char *k = "xyz"; *k; k++) {
      const char key[2] = {*k, 0};
      CHECK_EQ(apply_at(a, FSHM_ACQUIRE, key, 3, 1000).status, FSHM_ALLOWED);
      CHECK_EQ(apply_at(a, FSHM_ACQUIRE, key, 1, 1000).status, FSHM_DENIED);
    }
    if (!i) CHECK_EQ(apply_at(b, FSHM_ACQUIRE, "x", 3, 1000).status, FSHM_ALLOWED);
    CHECK_EQ(fshm_live_slots(s, NULL, 1000), 4);
    CHECK_EQ(fshm_reset_all(a), FSHM_OK);
    CHECK_EQ(fshm_live_slots(s, NULL, 1000), 1); /* freed at once; the other limiter's stays */
    CHECK_EQ(apply_at(b, FSHM_ACQUIRE, "x", 1, 1000).status, FSHM_DENIED);
    fshm_limiter_info info;
    CHECK_EQ(fshm_limiter_at(s, a->index, &info), FSHM_OK);
    CHECK_EQ(info.resets, i + 1);
    CHECK_EQ(info.version, 1);
  }
  CHECK_EQ(apply_at(b, FSHM_ACQUIRE, "y", 1, 1000).status, FSHM_ALLOWED);
  CHECK_EQ(fshm_reset_key(b, "x", 1), FSHM_OK);
  CHECK_EQ(apply_at(b, FSHM_PEEK, "x", 3, 1000).status, FSHM_ALLOWED);
  CHECK_EQ(apply_at(b, FSHM_PEEK, "y", 3, 1000).status, FSHM_DENIED);
  fshm_limiter_close(a);
  fshm_limiter_close(b);
  fshm_close(s);
}

/* Rules that do not add up are refused whole, not half used. */
static void test_damaged(void) {
  fshm_segment *s = fresh_segment(100);
  fshm_limit l = bucket(5);
  fshm_limiter *a = fresh_limiter(s, "a", &l, 1);
  limiter_entry_t *e = &s->limiters[0];
  uint64_t current = load_relaxed(&e->current), set = load_relaxed(&e->set);
  for (unsigned i = 0; i < 200000; i++) {
    /* Each of these calls may leave a slot that never expires: else the table is full by and by. */
    for (uint64_t slot = 0; slot < s->slot_count && i % 8 == 0; slot++) {
      store_relaxed(&s->slots[slot].who, 0);
      store_relaxed(&s->slots[slot].when, 0);
    }
    for (unsigned k = 0; k < RULE_WORDS; k++)
      store_relaxed(&e->rules[SET_RULE(set, 0)][k], random_u64() >> random_below(64));
    store_relaxed(&e->set, i % 3 ? set : random_u64() >> random_below(64));
    store_relaxed(&e->current, i % 2 ? current : random_u64());
    int status =
        apply_at(a, i % 5, "k", random_u64() >> random_below(64), 1 + random_below(TIME_MAX))
            .status;
    snapshot_t p;
    bool no_rate =
        limits_load(s, 0, &p) && !p.count; /* permits, money and plans are not for apply */
    CHECK(status == FSHM_DENIED || status == FSHM_ALLOWED || status == FSHM_E_DAMAGED ||
          (status == FSHM_E_ARGUMENT && no_rate));
  }
  fshm_limiter_close(a);
  fshm_close(s);
}

/* A call that has loaded the limits, and meets a state that was written under newer ones, has to load them
 * again before it reports what is left: by the old ones it could not read the state at all. */
static void test_changed_meanwhile(void) {
  fshm_segment *s = fresh_segment(100);
  fshm_limit before = bucket(10), after = bucket(20);
  fshm_limiter *l = fresh_limiter(s, "a", &before, 1);
  uint64_t now = fshm_now(s);
  call_t c;
  look_t looks[FSHM_MAX_LIMITS];
  CHECK(limits_load(s, l->index, &c.snapshot));
  begin(&c, l, "k", 1, now);
  CHECK_EQ(change(s, "a", &after, 1), FSHM_OK);
  CHECK_EQ(apply_at(l, FSHM_ACQUIRE, "k", 3, now).status, FSHM_ALLOWED);
  CHECK_EQ(look_all(&c, looks), FSHM_OK);
  CHECK_EQ(c.snapshot.rules[0].n, 20);
  CHECK_EQ(verdict_remaining(&c.snapshot.rules[0], looks[0].verdict.used_before), 17);
  fshm_limiter_close(l);
  fshm_close(s);
}

/* So has a charge, a refund or a block, which acts whatever the state is: the bucket would count as full. */
static void test_forced_meanwhile(void) {
  static const struct {
    uint32_t op;
    uint64_t cost, left;
  } cases[] = {{FSHM_CHARGE, 2, 15}, {FSHM_REFUND, 2, 19}, {FSHM_REFUND, 0, 17}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    fshm_segment *s = fresh_segment(100);
    fshm_limit before = bucket(10), after = bucket(20);
    fshm_limiter *l = fresh_limiter(s, "a", &before, 1);
    uint64_t now = fshm_now(s), remaining[FSHM_MAX_LIMITS];
    call_t c;
    look_t found;
    CHECK(limits_load(s, l->index, &c.snapshot));
    begin(&c, l, "k", 1, now);
    c.costs = &cases[i].cost;
    CHECK_EQ(change(s, "a", &after, 1), FSHM_OK);
    CHECK_EQ(apply_at(l, FSHM_ACQUIRE, "k", 3, now).status, FSHM_ALLOWED);
    CHECK_EQ(force(&c, cases[i].op, 0, &found), FSHM_ALLOWED);
    CHECK_EQ(fshm_remaining(l, "k", 1, now, remaining), 1);
    CHECK_EQ(remaining[0], cases[i].left);
    fshm_limiter_close(l);
    fshm_close(s);
  }
}

/* The limits change between the charge of a request's first limit and its second: the first is undone, by
 * the limits as they are then, whatever kind it is and wherever it stands among them. */
static void test_undo_by_changed_limits(void) {
  const uint64_t hour = UINT64_C(3600000000000);
  const fshm_limit window = {10, hour, 0, FSHM_WINDOW, 0}, slow = {10, hour, 10, FSHM_BUCKET, 0};
  const fshm_limit fast = {20, hour, 20, FSHM_BUCKET, 0}, sliding = {10, hour, 0, FSHM_SLIDING, 0};
  const fshm_limit before[3][2] = {{window, slow}, {slow, window}, {sliding, slow}};
  const fshm_limit after[3][2] = {{window, fast}, {window, fast}, {fast, sliding}};
  for (int order = 0; order < 3; order++) {
    for (int meanwhile = 0; meanwhile < 2; meanwhile++) { /* does another call charge it too? */
      fshm_segment *s = fresh_segment(100);
      fshm_limiter *l = fresh_limiter(s, "a", before[order], 2);
      const uint64_t now = 1000000;
      for (int i = 0; i < 2; i++)
        CHECK_EQ(apply_at(l, FSHM_ACQUIRE, "k", 1, now).status, FSHM_ALLOWED);
      call_t c;
      look_t looks[FSHM_MAX_LIMITS];
      uint64_t remaining[FSHM_MAX_LIMITS];
      pair_t was;
      CHECK(limits_load(s, l->index, &c.snapshot));
      begin(&c, l, "k", 1, now);
      for (uint32_t i = 0; i < 2; i++) look(&c, i, 1, &looks[i]);
      CHECK_EQ(charge_looked(&c, 0, &looks[0], &was), FSHM_ALLOWED);
      CHECK_EQ(change(s, "a", after[order], 2), FSHM_OK);
      if (meanwhile) CHECK_EQ(apply_at(l, FSHM_ACQUIRE, "k", 1, now).status, FSHM_ALLOWED);
      c.stale = true; /* as the look at a state of the new limits says */
      CHECK_EQ(charge_looked(&c, 1, &looks[1], &was), FSHM_DENIED);
      undo(&c, 0, &looks[0], looks[0].slot.pair);
      CHECK_EQ(fshm_remaining(l, "k", 1, now, remaining), 2);
      bool bucket_first = after[order][0].kind == FSHM_BUCKET;
      CHECK_EQ(remaining[bucket_first], 8 - meanwhile);
      CHECK_EQ(remaining[!bucket_first], 18 - meanwhile);
      fshm_limiter_close(l);
      fshm_close(s);
    }
  }
}

/* Sixteen rules have states, and the one to be given up has a debt of more tokens than any other rule can hold. */
static void test_a_debt_that_no_window_holds(void) {
  fshm_segment *s = fresh_segment(1000);
  const uint64_t second = UINT64_C(1000000000), now = 3600 * second;
  const fshm_limit slow = {1, second, 1, FSHM_BUCKET, 0};
  fshm_limiter *l;
  fshm_decision d;
  uint64_t cost = UINT64_C(1) << 24;
  CHECK_EQ(fshm_limiter_open_at(s, "a", 1, &slow, 1, now, &l), FSHM_OK);
  fshm_apply(l, FSHM_CHARGE, "debtor", 6, &cost, 0, now, &d);
  CHECK_EQ(d.status, FSHM_ALLOWED);
  fshm_limiter_close(l);
  for (uint64_t i = 0; i < 64; i++) {
    const fshm_limit window = {5, second + i * second / 100, 0, FSHM_SLIDING, 0};
    CHECK_EQ(fshm_limiter_open_at(s, "a", 1, &window, 1, now, &l), FSHM_OK);
    cost = 20;
    for (int key = 0; key < 3; key++) { /* more states than the debtor's rule has */
      char name[16];
      const int length = snprintf(name, sizeof name, "%d %d", (int)i, key);
      fshm_apply(l, FSHM_CHARGE, name, (uint64_t)length, &cost, 0, now, &d);
      CHECK_EQ(d.status, FSHM_ALLOWED);
    }
    cost = 1;
    fshm_apply(l, FSHM_ACQUIRE, "debtor", 6, &cost, 0, now, &d);
    CHECK_EQ(d.status, FSHM_DENIED);
    fshm_limiter_close(l);
  }
  fshm_close(s);
}

int main(void) {
  test_versions();
  test_a_debt_that_no_window_holds();
  test_arguments();
  test_table_full();
  test_many_change_and_read();
  test_dead_publisher();
  test_dead_owners();
  test_sweeps();
  test_every_rule_is_in_use();
  test_last_rule_of_a_limit_is_kept();
  test_pace_since();
  test_resets();
  test_damaged();
  test_changed_meanwhile();
  test_forced_meanwhile();
  test_undo_by_changed_limits();
  return done();
}
