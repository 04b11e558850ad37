/* test_moving_window.c - moving windows and counted windows against lists of timestamps: frozen times, then
 * processes that race. */
#include "../../csrc/unity.c"

#include "check.h"

#define MS UINT64_C(1000000)
#define NOW (UINT64_C(1000) * 1000 * MS)
#define MOST 4000 /* hits of a history */

static const fshm_limit any_window = {WINDOW_MAX_N, 1000 * MS, 0, FSHM_WINDOW, 0};
static const fshm_limit any_sliding = {1000, 1000 * MS, 0, FSHM_SLIDING, 0};

static fshm_limit window_of(uint64_t n, uint64_t per) {
  return (fshm_limit){n, per, 0, FSHM_WINDOW, 0};
}

static fshm_counted moving_at(fshm_limiter *l, const char *key, fshm_limit limit, uint64_t cost,
                              uint64_t now) {
  fshm_counted out;
  fshm_moving(l, key, strlen(key), &limit, cost, now, &out);
  return out;
}

static fshm_counted count_at(fshm_limiter *l, const char *key, fshm_limit limit, uint64_t cost,
                             uint64_t now) {
  fshm_counted out;
  fshm_count(l, key, strlen(key), &limit, cost, now, &out);
  return out;
}

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

/* The brute force: when each token was taken. */
typedef struct {
  uint64_t at[MOST], count;
} log_t;

static uint64_t within(const log_t *g, uint64_t per, uint64_t now, uint64_t *oldest) {
  uint64_t found = 0;
  *oldest = 0;
  for (uint64_t i = 0; i < g->count; i++) {
    if (g->at[i] + per < now) continue;
    if (!found++) *oldest = g->at[i];
  }
  return found;
}

/* One key's history; times go on, stand, and now and then leap over several windows. Even times,
 * since ends are kept in units of 2 ns. */
static void moving_history(fshm_limiter *l, const char *key, uint64_t n, uint64_t per) {
  static log_t g;
  static uint64_t now = NOW;
  fshm_limit limit = window_of(n, per);
  uint64_t oldest;
  now += 2000 * MS; /* what other keys had is over */
  g.count = 0;
  while (g.count + n + 1 < MOST && random_below(400)) {
    now += 2 * (random_below(3)    ? random_below(per / n + 1)
                : random_below(20) ? 0
                                   : random_below(2 * per));
    uint64_t cost = random_below(4) ? 1 : 1 + random_below(n + 1);
    uint64_t used = within(&g, per, now, &oldest);
    fshm_counted seen = moving_at(l, key, limit, 0, now);
    CHECK_EQ(seen.status, FSHM_ALLOWED);
    CHECK_EQ(seen.count, used);
    CHECK_EQ(seen.left_ns, used ? (oldest + per + 2 - per % 2) - now : 0);
    bool fits = used + cost <= n;
    pair_t *before = fits ? NULL : all_slots(l->segment);
    CHECK_EQ(moving_at(l, key, limit, cost, now).status, fits ? FSHM_ALLOWED : FSHM_DENIED);
    if (!fits) CHECK(slots_are(l->segment, before));
    for (uint64_t i = 0; fits && i < cost; i++) g.at[g.count++] = now;
    if (!random_below(100)) {
      CHECK_EQ(fshm_moving_clear(l, key, strlen(key)), FSHM_OK);
      g.count = 0;
    }
  }
}

static void test_moving_histories(void) {
  fshm_segment *s = fresh_segment(2000);
  fshm_limiter *l = fresh_limiter(s, "m", &any_window, 1);
  char key[16];
  for (int i = 0; i < fewer(300); i++) {
    (void)snprintf(key, sizeof key, "k%d", i);
    moving_history(l, key, 1 + random_below(40), random_scaled(1000, 1000 * MS));
  }
  CHECK_EQ(fshm_reset_all(l), FSHM_OK);
  CHECK_EQ(moving_at(l, "k1", window_of(1, 1000), 1, NOW).status, FSHM_ALLOWED);
  fshm_limiter_close(l);
  fshm_close(s);
}

/* A process that reads the clock and is then held up meets hits of a later time than its own. */
static void test_late_times(void) {
  fshm_segment *s = fresh_segment(100);
  fshm_limiter *l = fresh_limiter(s, "m", &any_window, 1);
  const fshm_limit limit = window_of(3, 1001);
  for (int i = 0; i < 3; i++)
    CHECK_EQ(moving_at(l, "k", limit, 1, NOW + 2000).status, FSHM_ALLOWED);
  CHECK_EQ(moving_at(l, "k", limit, 1, NOW).status, FSHM_DENIED);
  CHECK_EQ(moving_at(l, "k", limit, 1, NOW + 3000).status, FSHM_DENIED);
  CHECK_EQ(moving_at(l, "k", limit, 3, NOW + 3002).status, FSHM_ALLOWED);
  const fshm_limit longer = window_of(3, 1000 * MS); /* the head outlives the latest of them */
  CHECK_EQ(moving_at(l, "late", longer, 1, NOW + 100 * MS).status, FSHM_ALLOWED);
  CHECK_EQ(moving_at(l, "late", longer, 1, NOW).status, FSHM_ALLOWED);
  CHECK_EQ(moving_at(l, "late", longer, 0, NOW + 1050 * MS).count, 1);
  fshm_limiter_close(l);
  fshm_close(s);
}

/* What the head says may be wrong in any way: only what the slots say decides. */
static void test_any_head(void) {
  fshm_segment *s = fresh_segment(1000);
  fshm_limiter *l = fresh_limiter(s, "m", &any_window, 1);
  const fshm_limit limit = window_of(7, 100001);
  moving_t m = {.n = 7, .per = 100001};
  for (int round = 0; round < fewer(2000); round++) {
    char key[16];
    (void)snprintf(key, sizeof key, "k%d", round);
    uint64_t now = NOW + (uint64_t)round * 1000000, admitted = 0;
    for (int i = 0; i < 20; i++) {
      CHECK_EQ(keyed_begin(&m.k, l, FSHM_WINDOW, key, strlen(key), now), FSHM_OK);
      head_t h = head_look(&m);
      if (h.turn && random_below(2)) {
        pair_t seen = h.slot.pair,
               to = {seen.who,
                     head_state(1 + random_below(random_below(2) ? 14 : MOST_TURNS - 1), h.end)};
        CHECK(pair_cas(&s->slots[h.slot.slot], &seen, to));
      }
      uint64_t cost = 1 + random_below(3);
      fshm_counted hit = moving_at(l, key, limit, cost, now);
      CHECK_EQ(hit.status, admitted + cost <= 7 ? FSHM_ALLOWED : FSHM_DENIED);
      admitted += hit.status == FSHM_ALLOWED ? cost : 0;
    }
    CHECK_EQ(moving_at(l, key, limit, 7 - admitted, now).status, FSHM_ALLOWED);
  }
  fshm_limiter_close(l);
  fshm_close(s);
}

/* The table has room for the head and some slots: all or nothing, and the rest is admitted. */
static void test_full(void) {
  fshm_segment *s = fresh_segment(1);
  fshm_limiter *l = fresh_limiter(s, "m", &any_window, 1);
  const fshm_limit limit = window_of(1000, 1001);
  uint64_t slots = s->slot_count;
  CHECK_EQ(moving_at(l, "k", limit, slots, NOW).status, FSHM_FULL);
  for (uint64_t i = 0; i + 1 < slots; i++)
    CHECK_EQ(moving_at(l, "k", limit, 1, NOW).status, FSHM_ALLOWED);
  CHECK_EQ(moving_at(l, "k", limit, 1, NOW).status, FSHM_FULL);
  CHECK_EQ(moving_at(l, "k", limit, 0, NOW).count, slots - 1);
  CHECK_EQ(fshm_moving_clear(l, "other", 5), FSHM_OK);
  CHECK_EQ(moving_at(l, "k", limit, 0, NOW).count, slots - 1);
  fshm_limiter_close(l);
  fshm_close(s);
}

static void test_arguments(void) {
  fshm_segment *s = fresh_segment(100);
  fshm_limiter *l = fresh_limiter(s, "m", &any_window, 1);
  fshm_limiter *sliding = fresh_limiter(s, "s", &any_sliding, 1);
  const fshm_limit bucket = {5, 1000 * MS, 5, FSHM_BUCKET, 0};
  CHECK_EQ(moving_at(l, "k", window_of(FSHM_MAX_MOVING + 1, 1000), 1, NOW).status, FSHM_E_ARGUMENT);
  CHECK_EQ(moving_at(l, "k", window_of(0, 1000), 1, NOW).status, FSHM_E_ARGUMENT);
  CHECK_EQ(moving_at(l, "k", any_sliding, 1, NOW).status, FSHM_E_ARGUMENT);
  CHECK_EQ(moving_at(sliding, "k", window_of(5, 1000), 1, NOW).status, FSHM_E_ARGUMENT);
  CHECK_EQ(count_at(l, "k", bucket, 1, NOW).status, FSHM_E_ARGUMENT);
  CHECK_EQ(count_at(l, "k", any_sliding, 1, NOW).status, FSHM_E_ARGUMENT);
  CHECK_EQ(count_at(sliding, "k", any_window, 1, NOW).status, FSHM_E_ARGUMENT);
  CHECK_EQ(fshm_moving_clear(sliding, "k", 1), FSHM_E_ARGUMENT);
  CHECK_EQ(moving_at(l, "k", window_of(5, 1000), 6, NOW).status, FSHM_DENIED);
  CHECK_EQ(moving_at(l, "k", window_of(5, 1000), 1, TIME_MAX - 2).status, FSHM_DENIED);
  CHECK_EQ(fshm_live_keys(l, NOW), 0);
  fshm_limiter_close(sliding);
  fshm_limiter_close(l);
  fshm_close(s);
}

/* A key that is denied at its first hit needs no slot. */
static void test_denied_unseen(void) {
  fshm_segment *s = fresh_segment(100);
  fshm_limiter *l = fresh_limiter(s, "f", &any_window, 1);
  fshm_limiter *sliding = fresh_limiter(s, "s", &any_sliding, 1);
  const fshm_limit of_sliding = {5, 1000 * MS, 0, FSHM_SLIDING, 0};
  pair_t *before = all_slots(s);
  CHECK_EQ(count_at(l, "k", window_of(5, 1000 * MS), 6, NOW).status, FSHM_DENIED);
  CHECK_EQ(count_at(sliding, "k", of_sliding, 6, NOW).status, FSHM_DENIED);
  CHECK_EQ(moving_at(l, "k", window_of(5, 1000 * MS), 6, NOW).status, FSHM_DENIED);
  CHECK_EQ(count_at(l, "k", window_of(5, 1000 * MS), 0, NOW).count, 0);
  CHECK_EQ(moving_at(l, "k", window_of(5, 1000 * MS), 0, NOW).count, 0);
  CHECK(slots_are(s, before));
  fshm_limiter_close(sliding);
  fshm_limiter_close(l);
  fshm_close(s);
}

/* counted windows ------------------------------------------------------------------------------ */

static void test_fixed_histories(void) {
  fshm_segment *s = fresh_segment(1000);
  fshm_limiter *l = fresh_limiter(s, "f", &any_window, 1);
  char key[16];
  for (int i = 0; i < fewer(300); i++) {
    uint64_t n = random_scaled(1, 1000000), per = random_scaled(1000000, 1000 * MS);
    uint64_t now = NOW, begun = 0, count = 0, most = 0;
    (void)snprintf(key, sizeof key, "k%d", i);
    for (int step = 0; step < 200; step++) {
      now += random_below(3) ? random_below(per / 50) : 0;
      /* the end may be late by 4 * count, which the test keeps out of */
      bool over = count && now >= begun + per;
      if (over && now < begun + per + max_u64(512, 4 * most))
        now = begun + per + max_u64(512, 4 * most);
      if (over) count = most = 0;
      uint64_t cost = random_scaled(1, n + n / 4 + 1);
      fshm_counted seen =
          count_at(l, key, window_of(1, 1000), 0, now); /* whatever limit is given */
      CHECK_EQ(seen.count, count);
      if (count) CHECK_OP(seen.left_ns, >=, begun + per - now);
      if (count) CHECK_OP(seen.left_ns, <=, begun + per - now + max_u64(512, 4 * most));
      bool fits = count + cost <= n;
      fshm_counted hit = count_at(l, key, window_of(n, per), cost, now);
      CHECK_EQ(hit.status, fits ? FSHM_ALLOWED : FSHM_DENIED);
      if (fits && !count) begun = now;
      count += fits ? cost : 0;
      most = max_u64(most, count);
      CHECK_EQ(hit.count, count);
    }
  }
  CHECK_OP(fshm_live_keys(l, NOW), >, fewer(250));
  fshm_limiter_close(l);
  fshm_close(s);
}

/* floor(previous * left / per) + current, as limits has it; windows aligned to the wall clock. */
static void test_sliding_histories(void) {
  fshm_segment *s = fresh_segment(1000);
  fshm_limiter *l = fresh_limiter(s, "s", &any_sliding, 1);
  char key[16];
  for (int i = 0; i < fewer(300); i++) {
    uint64_t per = random_scaled(100 * MS, 100000 * MS), n = 1 + random_below(255);
    uint64_t now = NOW, index = 0, current = 0, previous = 0;
    fshm_limit limit = {n, per, 0, FSHM_SLIDING, 0};
    (void)snprintf(key, sizeof key, "k%d", i);
    for (int step = 0; step < 300; step++) {
      now += random_below(3) ? random_below(per / 20) : 0;
      uint64_t wall = s->created_realtime_ns % per + now; /* up to whole windows */
      uint64_t left = per - wall % per;
      if (wall / per != index) {
        previous = wall / per == index + 1 ? current : 0;
        current = 0;
        index = wall / per;
      }
      fshm_counted seen = count_at(l, key, limit, 0, now);
      CHECK_EQ(seen.count, current);
      CHECK_EQ(seen.previous, previous);
      CHECK_EQ(seen.left_ns, left);
      uint64_t cost = 1 + random_below(random_below(4) ? 2 : n + 1);
      bool fits = (uint64_t)((wide_t)previous * left / per) + current + cost <= n;
      CHECK_EQ(count_at(l, key, limit, cost, now).status, fits ? FSHM_ALLOWED : FSHM_DENIED);
      current += fits ? cost : 0;
    }
  }
  fshm_limiter_close(l);
  fshm_close(s);
}

/* processes ------------------------------------------------------------------------------------ */

#define PROCESSES_AT_ONCE 4
#define HITS 20000

typedef struct {
  uint64_t began, ended, cost;
} admission_t;

typedef struct {
  fshm_segment *s;
  fshm_limit limit;
  uint64_t most_cost, clears;
  bool fixed; /* fshm_count instead */
  _Atomic uint64_t arrivals, admissions;
  _Atomic uint64_t admitted;
  admission_t log[PROCESSES_AT_ONCE * HITS];
} race_t;

static void race(int i, void *with) {
  race_t *r = with;
  fshm_limiter *l = fresh_limiter(r->s, "race", &any_window, 1);
  (void)i;
  meet(&r->arrivals, PROCESSES_AT_ONCE, 1);
  for (int k = 0; k < fewer(HITS); k++) {
    uint64_t cost = 1 + random_below(r->most_cost), began = fshm_now(r->s);
    fshm_counted hit =
        r->fixed ? count_at(l, "k", r->limit, cost, 0) : moving_at(l, "k", r->limit, cost, 0);
    if (hit.status != FSHM_ALLOWED) {
      CHECK_EQ(hit.status, FSHM_DENIED);
      continue;
    }
    r->log[atomic_fetch_add(&r->admissions, 1)] = (admission_t){began, fshm_now(r->s), cost};
    atomic_fetch_add(&r->admitted, cost);
  }
  fshm_limiter_close(l);
}

static int by_end(const void *a, const void *b) {
  const admission_t *x = a, *y = b;
  return x->ended < y->ended ? -1 : x->ended > y->ended;
}

/* No calls that lie wholly within one interval of `per` were given more than n. */
static void check_bound(race_t *r) {
  uint64_t count = r->admissions, from = 0;
  qsort(r->log, count, sizeof *r->log, by_end);
  for (uint64_t i = 0; i < count; i++) {
    while (r->log[from].ended + r->limit.per_ns < r->log[i].ended) from++;
    uint64_t sum = 0;
    for (uint64_t k = from; k <= i; k++)
      if (r->log[k].began + r->limit.per_ns >= r->log[i].ended) sum += r->log[k].cost;
    if (sum > r->limit.n) {
      CHECK_OP(sum, <=, r->limit.n);
      return;
    }
  }
  CHECK_OP(count, >, 0);
}

static race_t *raced(fshm_limit limit, uint64_t most_cost, bool fixed) {
  race_t *r = shared_memory(sizeof *r);
  r->s = fresh_segment(5000);
  r->limit = limit;
  r->most_cost = most_cost;
  r->fixed = fixed;
  run_children(PROCESSES_AT_ONCE, race, r);
  fshm_close(r->s);
  return r;
}

static void test_races(void) {
  const uint64_t hour = 3600000 * MS;
  race_t *r = raced(window_of(1000, hour), 1, false); /* exactly n, of all that came */
  CHECK_EQ(r->admitted, 1000);
  (void)munmap(r, sizeof *r);
  r = raced(window_of(1000, hour), 1, true);
  CHECK_EQ(r->admitted, 1000);
  (void)munmap(r, sizeof *r);
  r = raced(window_of(1000, hour), 5, false); /* a single token always comes, sooner or later */
  CHECK_EQ(r->admitted, 1000);
  (void)munmap(r, sizeof *r);
  r = raced(window_of(9, 200001), 1, false);
  check_bound(r);
  (void)munmap(r, sizeof *r);
  r = raced(window_of(9, 100001), 4, false);
  check_bound(r);
  (void)munmap(r, sizeof *r);
}

/* Inspection of a key shows the same as a call with the key and its limit. */
static fshm_decision peeked(fshm_limiter *l, const char *key, const fshm_limit *limit, int moving,
                            uint64_t now) {
  keyed_t k;
  found_t f;
  fshm_decision d;
  CHECK_EQ(keyed_begin(&k, l, limit->kind, key, strlen(key), now), FSHM_OK);
  table_find(k.s, k.hash, k.who, &f);
  CHECK(f.pair.who);
  CHECK_EQ(fshm_peek_counted(k.s, f.slot, limit, moving, now, &d), FSHM_OK);
  return d;
}

static void peeks(fshm_limiter *l, const char *key, fshm_limit limit, bool moving) {
  uint64_t now = NOW;
  for (int hits = 0; hits < 300; hits++, now += 2 * random_below(limit.per_ns / limit.n)) {
    const uint64_t most = limit.n;
    fshm_counted hit = moving ? moving_at(l, key, limit, 1, now) : count_at(l, key, limit, 1, now);
    fshm_counted seen = moving ? moving_at(l, key, limit, 0, now) : count_at(l, key, limit, 0, now);
    fshm_decision d = peeked(l, key, &limit, moving, now);
    uint64_t used = seen.count;
    if (limit.kind == FSHM_SLIDING)
      used += (uint64_t)((wide_t)seen.previous * (uint64_t)seen.left_ns / limit.per_ns);
    CHECK(hit.status >= 0);
    CHECK_EQ(d.remaining, most - used);
    CHECK_EQ(d.status, used < most ? FSHM_ALLOWED : FSHM_DENIED);
    CHECK_EQ(d.retry_after_ns == 0, used < most);
    CHECK(d.reset_after_ns > 0);
    const uint64_t over = now + (uint64_t)d.reset_after_ns; /* and by then it equals "never seen" */
    seen = moving ? moving_at(l, key, limit, 0, over) : count_at(l, key, limit, 0, over);
    CHECK_EQ(seen.count + seen.previous, 0);
    if (used < most) continue;
    now += (uint64_t)d.retry_after_ns; /* not before, and then at once */
    if (limit.kind != FSHM_SLIDING)
      CHECK_EQ(peeked(l, key, &limit, moving, now - 1).status, FSHM_DENIED);
    CHECK_EQ(peeked(l, key, &limit, moving, now).status, FSHM_ALLOWED);
  }
}

static void test_peeks(void) {
  fshm_segment *s = fresh_segment(2000);
  fshm_limiter *l = fresh_limiter(s, "w", &any_window, 1);
  fshm_limiter *sliding = fresh_limiter(s, "s", &any_sliding, 1);
  const fshm_limit of_sliding = {8, 1000 * MS, 0, FSHM_SLIDING, 0};
  const fshm_limit bucket = {5, 1000 * MS, 5, FSHM_BUCKET, 0};
  fshm_decision d;
  peeks(l, "fixed", window_of(7, 1000 * MS), false);
  peeks(l, "moving", window_of(7, 1000 * MS), true);
  peeks(sliding, "sliding", of_sliding, false);
  CHECK_EQ(fshm_peek_counted(s, s->slot_count, &any_window, 0, NOW, &d), 0);
  CHECK_EQ(fshm_peek_counted(s, 0, &bucket, 0, NOW, &d), FSHM_E_ARGUMENT);
  CHECK_EQ(fshm_peek_counted(s, 0, &of_sliding, 1, NOW, &d), FSHM_E_ARGUMENT);
  for (uint64_t slot = 0; slot < s->slot_count; slot++) /* of another kind than the limiter */
    if (load_relaxed(&s->key_stats[slot].meta) >> 20 == l->index)
      CHECK_EQ(fshm_peek_counted(s, slot, &of_sliding, 0, NOW, &d), 0);
  fshm_limiter_close(l);
  fshm_limiter_close(sliding);
  fshm_close(s);
}

int main(void) {
  test_moving_histories();
  test_late_times();
  test_any_head();
  test_full();
  test_arguments();
  test_denied_unseen();
  test_fixed_histories();
  test_sliding_histories();
  test_peeks();
  test_races();
  return done();
}
