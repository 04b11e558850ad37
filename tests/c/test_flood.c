/* test_flood.c - floods of keys: what one limiter's flood leaves to others, and to the keys that were there. */
#include "../../csrc/unity.c"

#include "check.h"

#define NOW 1000000000
#define PER UINT64_C(3600000000000)

static const fshm_limit window = {3, PER, 0, FSHM_WINDOW, 0};
static const fshm_limit bucket = {3, PER, 3, FSHM_BUCKET, 0};

static const char *named(char *key, const char *what, uint64_t i) {
  (void)snprintf(key, 32, "%s %llu", what, (unsigned long long)i);
  return key;
}

static int hit(fshm_limiter *l, const char *what, uint64_t i) {
  char key[32];
  return apply_at(l, FSHM_ACQUIRE, named(key, what, i), 1, NOW).status;
}

/* Keys that no one has asked for before, as many as asked for. How many found room. */
static uint64_t flood(fshm_limiter *l, uint64_t from, uint64_t keys) {
  uint64_t admitted = 0;
  for (uint64_t i = from; i < from + keys; i++) {
    int status = hit(l, "flood", i);
    CHECK(status == FSHM_ALLOWED || status == FSHM_FULL);
    admitted += status == FSHM_ALLOWED;
  }
  return admitted;
}

/* Each key is admitted exactly as often as the limit says, less what it has used. */
static void exact(fshm_limiter *l, const char *what, uint64_t keys, int left) {
  uint64_t wrong = 0;
  for (uint64_t i = 0; i < keys; i++)
    for (int k = 0; k <= left; k++)
      wrong += hit(l, what, i) != (k < left ? FSHM_ALLOWED : FSHM_DENIED);
  CHECK_EQ(wrong, 0);
}

/* A flood on one limiter: others admit as before, to the last request, and so do keys that were there. */
static void test_others(uint64_t capacity, uint64_t keys, const fshm_limit *limit, uint64_t some) {
  fshm_segment *s = fresh_segment(capacity);
  fshm_limiter *flooded = fresh_limiter(s, "flooded", limit, 1);
  fshm_limiter *other = fresh_limiter(s, "other", limit, 1);
  for (uint64_t i = 0; i < some; i++) {
    CHECK_EQ(hit(flooded, "there", i), FSHM_ALLOWED);
    CHECK_EQ(hit(other, "there", i), FSHM_ALLOWED);
  }
  uint64_t got = flood(flooded, 0, capacity - some), more = flood(flooded, capacity, keys);
  CHECK_OP(got + some, >=, capacity - capacity / 1000); /* it has what was promised to it */
  CHECK_OP(got + more + some, <=, s->slot_count / 8 * 7);
  exact(flooded, "there", some, 2);
  exact(other, "there", some, 2);
  exact(other, "new", some, 3);
  fshm_limiter_close(flooded);
  fshm_limiter_close(other);
  fshm_close(s);
}

/* Several floods at once, on that many limiters: there is room for another one's keys yet. */
static void test_several(uint64_t capacity, uint32_t limiters) {
  fshm_segment *s = fresh_segment(capacity);
  fshm_limiter *flooded[32], *other = fresh_limiter(s, "other", &bucket, 1);
  char name[32];
  for (uint32_t i = 0; i < limiters; i++)
    flooded[i] = fresh_limiter(s, named(name, "flooded", i), &window, 1);
  for (uint64_t i = 0; i < 2 * s->slot_count; i++) (void)flood(flooded[i % limiters], i, 1);
  uint64_t full = 0;
  for (uint64_t i = 0; i < s->lines / PROBE_LINES; i++) { /* whatever the keys are */
    unsigned left = 0;
    for (uint64_t k = 0; k < PROBE_LINES * SLOTS_PER_LINE; k++)
      left += !load_relaxed(&s->slots[i * PROBE_LINES * SLOTS_PER_LINE + k].who);
    CHECK_OP(left, >=, limiters < 2 ? SCARCE : 0);
    full += !left;
  }
  /* Two cannot fill a probe window. More of them can where one has no slot when a single one is left. */
  CHECK_OP(full, <=, limiters < 3 ? 0 : 2);
  exact(other, "new", 1,
        3); /* the first of its limiter in a probe window: there is a place for one */
  for (uint32_t i = 0; i < limiters; i++) fshm_limiter_close(flooded[i]);
  fshm_limiter_close(other);
  fshm_close(s);
}

/* Permits of keys that were there: their slots have a share of their own. */
static void test_permits(void) {
  fshm_segment *s = fresh_segment(2000);
  const fshm_limit both[2] = {window, {2, 0, 0, FSHM_PERMITS, 0}};
  fshm_limiter *l = fresh_limiter(s, "flooded", both, 2);
  const uint64_t one[FSHM_MAX_LIMITS] = {1, 1, 1, 1};
  fshm_permit permit;
  fshm_decision d;
  uint32_t held;
  CHECK_EQ(hit(l, "there", 1), FSHM_ALLOWED);
  (void)flood(l, 0, 20000);
  for (int i = 0; i < 3; i++) {
    fshm_admit(l, "there 1", 7, one, NOW, &permit, &d, &held);
    CHECK_EQ(d.status, i < 2 ? FSHM_ALLOWED : FSHM_DENIED);
    if (d.status == FSHM_ALLOWED) CHECK_EQ(fshm_permit_release(l, &permit), 1);
  }
  fshm_limiter_close(l);
  fshm_close(s);
}

/* shared counters ------------------------------------------------------------------------------ */

/* A table of four slots, all of them taken for good; and a limiter whose keys share counters. */
static fshm_limiter *crowded(const fshm_limit *limits, uint32_t count, fshm_segment **s,
                             fshm_limiter **filler) {
  *s = fresh_segment(1);
  const fshm_limit for_good = {3, 100 * PER, 0, FSHM_WINDOW, 0};
  *filler = fresh_limiter(*s, "filler", &for_good, 1);
  for (uint64_t i = 0; i < (*s)->slot_count; i++) CHECK_EQ(hit(*filler, "f", i), FSHM_ALLOWED);
  fshm_limiter *l = fresh_limiter(*s, "l", limits, count);
  fshm_limiter_share(l, 1);
  return l;
}
static void leave(fshm_limiter *l, fshm_limiter *filler, fshm_segment *s) {
  fshm_limiter_close(l);
  fshm_limiter_close(filler);
  fshm_close(s);
}

static fshm_decision ask(fshm_limiter *l, uint32_t op, uint64_t key, uint64_t cost, uint64_t now) {
  char name[32];
  return apply_at(l, op, named(name, "k", key), cost, now);
}

/* Of a limit of n: all keys together are admitted n times for each counter, no key more often than that, and a denied one
 * gets the time when it will be admitted. */
static void test_counters(const fshm_limit *limit) {
  fshm_segment *s;
  fshm_limiter *filler, *l = crowded(limit, 1, &s, &filler);
  uint64_t admitted = 0, wrong = 0;
  fshm_decision d = {0};
  for (uint64_t round = 0; round < limit->n + 1; round++)
    for (uint64_t key = 0; key < 200; key++) {
      d = ask(l, FSHM_ACQUIRE, key, 1, NOW);
      wrong += d.status != FSHM_ALLOWED && d.status != FSHM_DENIED;
      wrong += !d.shared;
      admitted += d.status == FSHM_ALLOWED;
    }
  CHECK_EQ(wrong, 0);
  CHECK_EQ(admitted, SHARED * limit->n);
  CHECK_EQ(d.status, FSHM_DENIED);
  CHECK_OP(d.retry_after_ns, >, 0);
  CHECK_EQ(ask(l, FSHM_PEEK, 199, 1, NOW + (uint64_t)d.retry_after_ns - 1).status, FSHM_DENIED);
  CHECK_EQ(ask(l, FSHM_ACQUIRE, 199, 1, NOW + (uint64_t)d.retry_after_ns).status, FSHM_ALLOWED);
  fshm_counters counters[FSHM_COUNTERS];
  fshm_counters_all(s, counters);
  CHECK_EQ(counters[l->counters].shared, 200 * (limit->n + 1) + 1);
  CHECK_EQ(counters[l->counters].refused, 0);
  fshm_limiter_info info;
  CHECK_EQ(fshm_limiter_at(s, l->index, &info), FSHM_OK);
  CHECK_OP(info.shared_ns, >, 0);
  CHECK_EQ(ask(filler, FSHM_ACQUIRE, 5, 1, NOW).status,
           FSHM_FULL); /* whose handle does not share */
  leave(l, filler, s);
}

/* What each call does to a counter. */
static void test_calls(void) {
  fshm_segment *s;
  const fshm_limit both[2] = {bucket, {2, PER, 0, FSHM_WINDOW, 0}};
  fshm_limiter *filler, *l = crowded(&bucket, 1, &s, &filler);
  fshm_decision d;
  const uint64_t minute[FSHM_MAX_LIMITS] = {60000000000};
  CHECK_EQ(ask(l, FSHM_PEEK, 1, 1, NOW).shared, 0);
  CHECK_EQ(ask(l, FSHM_ACQUIRE, 1, 4, NOW).retry_after_ns, FSHM_NEVER);
  CHECK_EQ(ask(l, FSHM_ACQUIRE, 1, 0, NOW).shared, 0); /* needs no slot, and no counter */
  CHECK_EQ(ask(l, FSHM_ACQUIRE, 1, 1, NOW).shared, 1);
  CHECK_EQ(ask(l, FSHM_PEEK, 1, 1, NOW).remaining, 2);
  CHECK_EQ(ask(l, FSHM_REFUND, 1, 1, NOW).remaining,
           2); /* nothing comes back: whose it was is not known */
  CHECK_EQ(ask(l, FSHM_CHARGE, 1, 5, NOW).remaining, 0);
  CHECK_EQ(ask(l, FSHM_PROBE, 1, 1, NOW).status, FSHM_DENIED);
  CHECK_EQ(ask(l, FSHM_PEEK, 1, 1, NOW).retry_after_ns, 4 * (PER / 3));
  fshm_apply(l, FSHM_BLOCK, "k 1", 3, minute, 0, NOW, &d); /* others are not blocked for one */
  CHECK_EQ(d.status, FSHM_FULL);
  CHECK_EQ(fshm_reset_key(l, "k 1", 3), FSHM_OK);
  CHECK_EQ(ask(l, FSHM_PEEK, 1, 1, NOW).status, FSHM_DENIED);
  fshm_apply(l, FSHM_RESERVE, "k 1", 3, NULL, 4 * PER, NOW, &d);
  CHECK_EQ(d.status, FSHM_ALLOWED);
  CHECK_EQ(d.retry_after_ns, 4 * (PER / 3));
  CHECK_EQ(fshm_reset_all(l), FSHM_OK);
  CHECK_EQ(ask(l, FSHM_PEEK, 1, 1, NOW).remaining, 3);
  exact(l, "flood", 1, 3);
  fshm_limiter_close(l);

  l = fresh_limiter(s, "two", both,
                    2); /* one denies: the other is given back what it was charged */
  fshm_limiter_share(l, 1);
  for (int i = 0; i < 4; i++) {
    d = ask(l, FSHM_ACQUIRE, 1, 1, NOW);
    CHECK_EQ(d.status, i < 2 ? FSHM_ALLOWED : FSHM_DENIED);
  }
  uint64_t left[FSHM_MAX_LIMITS];
  CHECK_EQ(fshm_remaining(l, "k 1", 3, NOW, left), 2);
  CHECK_EQ(left[0], 1);
  CHECK_EQ(left[1], 0);
  leave(l, filler, s);
}

/* A key that gets a slot begins with what its counter says, whichever keys were charged there; denied, it gets one too. */
static void test_leaving(void) {
  fshm_segment *s;
  fshm_limiter *filler, *l = crowded(&bucket, 1, &s, &filler);
  while (ask(l, FSHM_ACQUIRE, 1, 1, NOW).status == FSHM_ALLOWED) continue;
  CHECK_EQ(fshm_reset_key(filler, "f 0", 3), FSHM_OK);
  fshm_decision d = ask(l, FSHM_ACQUIRE, 1, 1, NOW);
  CHECK_EQ(d.status, FSHM_DENIED);
  CHECK_EQ(d.retry_after_ns, PER / 3);
  CHECK_EQ(hit(filler, "f", 0), FSHM_FULL); /* it has a slot */
  for (int i = 0; i < 20; i++) (void)ask(l, FSHM_CHARGE, 100 + (uint64_t)i, 5, NOW);
  d = ask(l, FSHM_ACQUIRE, 1, 1, NOW + PER / 3); /* which no other key is charged to */
  CHECK_EQ(d.status, FSHM_ALLOWED);
  CHECK_EQ(d.shared, 0);
  leave(l, filler, s);
}

/* A cost of 0 keeps a counter's window no longer. */
static void test_nothing(void) {
  fshm_segment *s;
  fshm_limiter *filler, *l = crowded(&window, 1, &s, &filler);
  CHECK_EQ(ask(l, FSHM_ACQUIRE, 1, 2, NOW).shared, 1);
  CHECK_EQ(ask(l, FSHM_ACQUIRE, 1, 0, NOW + PER / 2).status, FSHM_ALLOWED);
  CHECK_EQ(ask(l, FSHM_PEEK, 1, 1, NOW + PER + 100).remaining, 3);
  leave(l, filler, s);
}

/* Limits change: what was consumed stays consumed, through sweeps too. */
static void test_changes(const fshm_limit *limit) {
  fshm_segment *s;
  fshm_limiter *filler, *l = crowded(limit, 1, &s, &filler);
  CHECK_EQ(ask(l, FSHM_ACQUIRE, 1, 2, NOW).status, FSHM_ALLOWED);
  for (uint64_t i = 0; i < 60; i++) {
    fshm_limit other = *limit;
    other.n = limit->n + 1 + i;
    other.burst = limit->burst ? other.n : 0;
    fshm_limiter *changed;
    CHECK_EQ(fshm_limiter_open_at(s, "l", 1, i < 59 ? &other : limit, 1, NOW, &changed), FSHM_OK);
    fshm_limiter_close(changed);
    CHECK_EQ(ask(l, FSHM_PEEK, 1, 1, NOW).remaining, i < 59 ? other.n - 2 : 1);
    if (i % 3 == 0) CHECK_EQ(ask(l, FSHM_CHARGE, 1, 0, NOW).status, FSHM_ALLOWED);
  }
  CHECK_EQ(ask(l, FSHM_ACQUIRE, 1, 1, NOW).status, FSHM_ALLOWED);
  CHECK_EQ(ask(l, FSHM_ACQUIRE, 1, 1, NOW).status, FSHM_DENIED);
  leave(l, filler, s);
}

/* What a key was admitted for. A window may have begun before the key's first hit in it, but its windows follow one
 * another, and none is shorter than `per`: in less than m of them there are n at most in each of m + 1. */
#define MOST_HITS 64
typedef struct {
  uint64_t at[MOST_HITS], cost[MOST_HITS], count;
} hits_t;

static bool more_than_windows(hits_t *h, const fshm_limit *limit, uint64_t now, uint64_t cost) {
  h->at[h->count % MOST_HITS] = now;
  h->cost[h->count++ % MOST_HITS] = cost;
  for (uint64_t m = 1; m < 4; m++) {
    uint64_t sum = 0;
    for (uint64_t k = h->count; k-- > 0 && h->count - k < MOST_HITS;) {
      if (now - h->at[k % MOST_HITS] >= m * limit->per_ns) break;
      sum += h->cost[k % MOST_HITS];
    }
    if (sum > (m + 1) * limit->n) return true;
  }
  return false;
}

/* Keys that find room and lose it, at random: no one is ever admitted more often than its limit says. */
#define STORY_KEYS 12
static void test_story(const fshm_limit *limit) {
  fshm_segment *s = fresh_segment(1);
  fshm_limiter *l = fresh_limiter(s, "l", limit, 1);
  fshm_limiter_share(l, 1);
  const rule_t rule = rule_make(limit);
  static hits_t hits[STORY_KEYS];
  memset(hits, 0, sizeof hits);
  uint64_t alone[STORY_KEYS] = {0}, now = NOW, over = 0, shared = 0, own = 0, pace = 0;
  for (int i = 0; i < fewer(200000); i++) {
    uint64_t key = random_below(STORY_KEYS), cost = 1 + random_below(8) / 7;
    if (i % 1000 == 0) pace = limit->per_ns >> (3 + random_below(6));
    now += random_below(pace);
    fshm_decision d = ask(l, FSHM_ACQUIRE, key, cost, now);
    CHECK(d.status == FSHM_ALLOWED || d.status == FSHM_DENIED);
    if (d.status != FSHM_ALLOWED) continue;
    shared += d.shared;
    own += !d.shared;
    verdict_t v = rule_take(&rule, alone[key], now, now, cost);
    if (limit->kind == FSHM_WINDOW)
      over += more_than_windows(&hits[key], limit, now, cost);
    else
      over += v.retry > 2; /* rounding, in ns */
    alone[key] = v.next;
  }
  CHECK_EQ(over, 0);
  CHECK_OP(shared, >, 100);
  CHECK_OP(own, >, 100);
  fshm_limiter_close(l);
  fshm_close(s);
}

/* Real processes: keys get slots, or do not, while others leave theirs; each is admitted n times at most. */
#define RACE_KEYS 40
typedef struct {
  _Atomic uint64_t arrivals, admitted[RACE_KEYS];
  fshm_limiter *l, *filler;
  uint64_t racers, rounds;
} race_t;

static void racer(int me, void *with) {
  race_t *race = with;
  fshm_segment *s = race->l->segment;
  char name[32];
  uint64_t met = 0;
  for (uint64_t round = 0; round < race->rounds; round++) {
    meet(&race->arrivals, race->racers, ++met);
    for (int i = 0; i < 200; i++) {
      uint64_t key = random_below(RACE_KEYS);
      if (random_below(8) == 0) { /* perhaps another key gets a slot */
        named(name, "f", random_below(4));
        (void)fshm_reset_key(race->filler, name, strlen(name));
      } else if (random_below(8) == 0) {
        (void)hit(race->filler, "f", random_below(4));
      } else if (ask(race->l, FSHM_ACQUIRE, key, 1, NOW).status == FSHM_ALLOWED) {
        atomic_fetch_add(&race->admitted[key], 1);
      }
    }
    meet(&race->arrivals, race->racers, ++met);
    if (me == 0) {
      for (int key = 0; key < RACE_KEYS; key++)
        CHECK_OP(atomic_exchange(&race->admitted[key], 0), <=, 3);
      memset((void *)s->slots, 0, shared_slot(s, s->limiter_count, 0, 0) * sizeof *s->slots);
      store_relaxed(&s->limiters[race->l->index].shared, 0);
    }
    meet(&race->arrivals, race->racers, ++met);
  }
}

static void test_race(int racers) {
  fshm_segment *s;
  race_t *race = shared_memory(sizeof *race);
  race->l = crowded(&window, 1, &s, &race->filler);
  race->racers = (uint64_t)racers;
  race->rounds = (uint64_t)fewer(400);
  run_children(racers, racer, race);
  leave(race->l, race->filler, s);
  (void)munmap(race, sizeof *race);
}

int main(void) {
  const fshm_limit limits[] = {window, bucket, {3, PER, 0, FSHM_SLIDING, 0}};
  const fshm_limit short_ones[] = {{3, 1000000, 0, FSHM_WINDOW, 0},
                                   {3, 1000000, 3, FSHM_BUCKET, 0},
                                   {6, 1000000, 2, FSHM_BUCKET, 1},
                                   {3, 1000000, 0, FSHM_SLIDING, 0}};
  for (int i = 0; i < 3; i++) test_counters(&limits[i]);
  for (int i = 0; i < 3; i++) test_changes(&limits[i]);
  for (int i = 0; i < 4; i++) test_story(&short_ones[i]);
  test_calls();
  test_leaving();
  test_nothing();
  test_race(2);
  test_race(4);
  test_permits();
  test_others(1000, 20000, &window, 10);
  test_others(200000, 1000000, &bucket, 1000);
  for (uint32_t i = 1; i <= 4; i++) test_several(2000, i);
  return done();
}
