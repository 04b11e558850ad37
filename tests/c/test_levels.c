/* test_levels.c - one admission over several limiters: as calls one after the other would have it, and all or nothing. */
#include "../../csrc/unity.c"

#include "check.h"

#define SECOND UINT64_C(1000000000)
#define NOW (1000 * SECOND)
#define LEVELS 3
#define KEYS 3 /* of each level, under one key of the level above */

static const char *const names[LEVELS] = {"api/org", "api/team", "api/user"};

static const fshm_limit bucket = {10, 10 * SECOND, 10, FSHM_BUCKET, 0}; /* one a second */
static const fshm_limit window = {5, 60 * SECOND, 0, FSHM_WINDOW, 0};

/* Segments in step: `levels` has the calls under test, `apart` the same done one level after the other. */
typedef struct {
  fshm_segment *s;
  fshm_limiter *l[LEVELS];
} side_t;

static fshm_limit some_limit(void) {
  const uint64_t per = (1 + random_below(50)) * SECOND, n = 1 + random_below(12);
  const uint32_t kind = (uint32_t)random_below(3);
  return (fshm_limit){n, per, kind == FSHM_BUCKET ? 1 + random_below(n) : 0, kind,
                      kind == FSHM_BUCKET && random_below(4) == 0};
}

/* The same limits for one level of both sides. */
static void set_limits(side_t *sides, uint32_t n, uint64_t now) {
  fshm_limit limits[FSHM_MAX_LIMITS];
  const uint32_t count = 1 + (uint32_t)random_below(FSHM_MAX_LIMITS);
  for (uint32_t i = 0; i < count; i++) limits[i] = some_limit();
  for (int k = 0; k < 2; k++) {
    fshm_limiter *l;
    CHECK_EQ(fshm_limiter_open_at(sides[k].s, names[n], strlen(names[n]), limits, count, now, &l),
             FSHM_OK);
    if (sides[k].l[n]) fshm_limiter_close(sides[k].l[n]);
    sides[k].l[n] = l;
  }
}

/* The key of a level is the path down to it. */
static void write_path(char *path, const uint64_t *at, uint32_t n) {
  (void)snprintf(path, 16, "%u", (unsigned)at[0]);
  for (uint32_t i = 1; i <= n; i++) (void)snprintf(path + strlen(path), 8, "/%u", (unsigned)at[i]);
}

static void same_room(const side_t *sides, uint64_t now) {
  uint64_t at[LEVELS];
  for (uint64_t key = 0; key < KEYS * KEYS * KEYS; key++) {
    at[0] = key / (KEYS * KEYS);
    at[1] = key / KEYS % KEYS;
    at[2] = key % KEYS;
    for (uint32_t n = 0; n < LEVELS; n++) {
      char path[16];
      uint64_t left[2][FSHM_MAX_LIMITS] = {{0}};
      write_path(path, at, n);
      for (int k = 0; k < 2; k++)
        CHECK_OP(fshm_remaining(sides[k].l[n], path, strlen(path), now, left[k]), >, 0);
      for (uint32_t i = 0; i < FSHM_MAX_LIMITS; i++) CHECK_EQ(left[0][i], left[1][i]);
    }
  }
}

/* What one level after the other says: a look at each, and if all have room, a charge of each. */
static int one_by_one(const side_t *side, char paths[LEVELS][16], uint64_t costs[][FSHM_MAX_LIMITS],
                      uint32_t count, uint32_t op, uint64_t now, uint64_t *retry) {
  fshm_decision d;
  int status = FSHM_ALLOWED;
  *retry = 0;
  for (uint32_t n = 0; n < count && op <= FSHM_PEEK; n++) {
    fshm_apply(side->l[n], op == FSHM_PEEK ? FSHM_PEEK : FSHM_PROBE, paths[n], strlen(paths[n]),
               costs[n], 0, now, &d);
    *retry = max_u64(*retry, (uint64_t)d.retry_after_ns);
    if (d.status != FSHM_ALLOWED) status = d.status;
  }
  for (uint32_t n = 0; n < count && op != FSHM_PEEK && status == FSHM_ALLOWED; n++)
    fshm_apply(side->l[n], op, paths[n], strlen(paths[n]), costs[n], 0, now, &d);
  return status;
}

static void one_call(side_t *sides, uint32_t op, uint64_t now) {
  fshm_level levels[LEVELS];
  fshm_decision d;
  char paths[LEVELS][16];
  uint64_t costs[LEVELS][FSHM_MAX_LIMITS], at[LEVELS], retry;
  const uint32_t count = 1 + (uint32_t)random_below(LEVELS);
  for (uint32_t n = 0; n < count; n++) at[n] = random_below(KEYS);
  for (uint32_t n = 0; n < count; n++) {
    write_path(paths[n], at, n);
    for (uint32_t i = 0; i < FSHM_MAX_LIMITS; i++) costs[n][i] = random_below(4);
    levels[n] = (fshm_level){.limiter = sides[0].l[n],
                             .key = paths[n],
                             .key_length = strlen(paths[n]),
                             .costs = costs[n]};
  }
  uint32_t decides = fshm_levels_apply(levels, count, op, now, &d);
  int status = one_by_one(&sides[1], paths, costs, count, op, now, &retry);
  CHECK_OP(decides, <, count);
  if (op > FSHM_PEEK) return;
  CHECK_EQ(d.status, status);
  CHECK_EQ((uint64_t)d.retry_after_ns, retry);
  if (status == FSHM_DENIED) {
    CHECK_EQ((uint64_t)levels[decides].decision.retry_after_ns, retry);
    CHECK_EQ(levels[decides].decision.status, FSHM_DENIED);
  }
  for (uint32_t n = 0; n < count; n++) CHECK_OP(d.remaining, <=, levels[n].decision.remaining);
  CHECK_EQ(d.remaining == levels[decides].decision.remaining || status == FSHM_DENIED, 1);
}

/* Random stories: calls of any depth, limits that change, resets, time. Every limit of every key has the same room left
 * on both sides, at every step. */
static void test_stories(void) {
  for (int story = 0; story < fewer(300); story++) {
    side_t sides[2] = {{.s = fresh_segment(500)}, {.s = fresh_segment(500)}};
    uint64_t now = NOW;
    for (uint32_t n = 0; n < LEVELS; n++) set_limits(sides, n, now);
    for (int step = 0; step < 60; step++) {
      const uint64_t dice = random_below(20);
      now += random_below(3) ? random_below(SECOND) : random_below(20 * SECOND);
      if (dice == 0) {
        set_limits(sides, (uint32_t)random_below(LEVELS), now);
      } else if (dice == 1) {
        const uint64_t n = random_below(LEVELS);
        for (int k = 0; k < 2; k++) CHECK_EQ(fshm_reset_all(sides[k].l[n]), FSHM_OK);
      } else {
        one_call(sides,
                 dice < 16   ? FSHM_ACQUIRE
                 : dice < 18 ? FSHM_PEEK
                 : dice < 19 ? FSHM_CHARGE
                             : FSHM_REFUND,
                 now);
      }
      if (step % 6 == 0) same_room(sides, now);
    }
    for (int k = 0; k < 2; k++) {
      for (uint32_t n = 0; n < LEVELS; n++) fshm_limiter_close(sides[k].l[n]);
      fshm_close(sides[k].s);
    }
    remove_segments();
    segments_made = 0;
  }
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

static void three_levels(fshm_limiter *const *l, fshm_level *levels) {
  static const char *const keys[LEVELS] = {"acme", "acme/red", "acme/red/ann"};
  for (uint32_t n = 0; n < LEVELS; n++)
    levels[n] =
        (fshm_level){.limiter = l[n], .key = keys[n], .key_length = strlen(keys[n]), .costs = NULL};
}

/* Whichever of the levels denies: it is named, and no bit of any slot changes. */
static void test_denials(void) {
  fshm_segment *s = fresh_segment(100);
  const fshm_limit two[2] = {bucket, window};
  fshm_limiter *l[LEVELS];
  fshm_level levels[LEVELS];
  fshm_decision d;
  for (uint32_t n = 0; n < LEVELS; n++) l[n] = fresh_limiter(s, names[n], two, 2);
  three_levels(l, levels);
  for (uint32_t which = 0; which < LEVELS; which++) {
    for (uint32_t n = 0; n < LEVELS; n++) CHECK_EQ(fshm_reset_all(l[n]), FSHM_OK);
    CHECK_EQ(fshm_levels_apply(levels, LEVELS, FSHM_ACQUIRE, NOW, &d), 0);
    CHECK_EQ(d.status, FSHM_ALLOWED);
    CHECK_EQ(d.remaining, 4);
    CHECK_EQ(d.limit_index, 1);
    fshm_apply(l[which], FSHM_ACQUIRE, levels[which].key, levels[which].key_length,
               (uint64_t[FSHM_MAX_LIMITS]){4, 4, 4, 4}, 0, NOW, &d);
    pair_t *before = all_slots(s);
    CHECK_EQ(fshm_levels_apply(levels, LEVELS, FSHM_ACQUIRE, NOW + 1, &d), which);
    CHECK_EQ(d.status, FSHM_DENIED);
    CHECK_EQ(d.limit_index, 1);
    CHECK_OP(d.retry_after_ns, >, 59 * (int64_t)SECOND);
    for (uint32_t n = 0; n < LEVELS; n++)
      CHECK_EQ(levels[n].decision.status, n == which ? FSHM_DENIED : FSHM_ALLOWED);
    CHECK(slots_are(s, before));
  }
  /* A cost that never fits is what decides, whatever else denies. */
  const uint64_t never[FSHM_MAX_LIMITS] = {1, 6, 1, 1};
  levels[1].costs = never;
  CHECK_EQ(fshm_levels_apply(levels, LEVELS, FSHM_ACQUIRE, NOW + 1, &d), 1);
  CHECK_EQ(d.retry_after_ns, FSHM_NEVER);
  for (uint32_t n = 0; n < LEVELS; n++) fshm_limiter_close(l[n]);
  fshm_close(s);
}

static void test_arguments(void) {
  fshm_segment *s = fresh_segment(100), *other = fresh_segment(100);
  const fshm_limit permits = {3, 0, 0, FSHM_PERMITS, 0};
  fshm_limiter *l[LEVELS] = {fresh_limiter(s, "a", &window, 1), fresh_limiter(s, "b", &window, 1),
                             fresh_limiter(other, "c", &window, 1)};
  fshm_limiter *held = fresh_limiter(s, "held", &permits, 1);
  fshm_level levels[LEVELS];
  fshm_decision d;
  three_levels(l, levels);
  const uint32_t wrong[] = {FSHM_PROBE + 1, FSHM_BLOCK, 77};
  for (unsigned i = 0; i < 3; i++) {
    (void)fshm_levels_apply(levels, 2, wrong[i], NOW, &d);
    CHECK_EQ(d.status, FSHM_E_ARGUMENT);
  }
  (void)fshm_levels_apply(levels, 0, FSHM_ACQUIRE, NOW, &d);
  CHECK_EQ(d.status, FSHM_E_ARGUMENT);
  (void)fshm_levels_apply(levels, FSHM_MAX_LEVELS + 1, FSHM_ACQUIRE, NOW, &d);
  CHECK_EQ(d.status, FSHM_E_ARGUMENT);
  CHECK_EQ(fshm_levels_apply(levels, 3, FSHM_ACQUIRE, NOW, &d), 2); /* of another segment */
  CHECK_EQ(d.status, FSHM_E_ARGUMENT);
  levels[1].limiter = held; /* calls in flight alone */
  CHECK_EQ(fshm_levels_apply(levels, 2, FSHM_ACQUIRE, NOW, &d), 1);
  CHECK_EQ(d.status, FSHM_E_ARGUMENT);
  CHECK_EQ(apply_at(l[0], FSHM_PEEK, "acme", 1, NOW).remaining, 5);
  fshm_limiter_close(held);
  for (uint32_t n = 0; n < LEVELS; n++) fshm_limiter_close(l[n]);
  fshm_close(s);
  fshm_close(other);
}

/* Charged, and then undone: what another call has charged meanwhile stays. */
static void test_undo(void) {
  fshm_segment *s = fresh_segment(100);
  const fshm_limit two[2] = {bucket, window};
  fshm_limiter *l = fresh_limiter(s, "a", two, 2);
  const fshm_level level = {.limiter = l, .key = "k", .key_length = 1};
  for (int other = 0; other < 2; other++) {
    level_call_t v = {.charged = 0};
    uint64_t hash = 0, left[FSHM_MAX_LIMITS];
    bool may = true;
    CHECK_EQ(fshm_reset_key(l, "k", 1), FSHM_OK);
    CHECK_EQ(apply_at(l, FSHM_ACQUIRE, "k", 1, NOW).status, FSHM_ALLOWED);
    pair_t *before = all_slots(s);
    CHECK_EQ(load_call(&v.c, l, NULL, "k", 1, &hash), FSHM_OK);
    begin_hashed(&v.c, l, hash, NOW);
    look_level(&v, &may);
    CHECK(may);
    CHECK_EQ(charge_level(&v, &level), FSHM_ALLOWED);
    CHECK_EQ(v.charged, 2);
    if (other) CHECK_EQ(apply_at(l, FSHM_ACQUIRE, "k", 1, NOW).status, FSHM_ALLOWED);
    undo_level(&v);
    CHECK_EQ(v.charged, 0);
    CHECK_EQ(fshm_remaining(l, "k", 1, NOW, left), 2);
    CHECK_EQ(left[0], 9 - (uint64_t)other);
    CHECK_EQ(left[1], 4 - (uint64_t)other);
    if (other)
      free(before);
    else
      CHECK(slots_are(s, before));
  }
  fshm_limiter_close(l);
  fshm_close(s);
}

/* No room for the key of one level: nothing is charged in any, or, if that level passes, in all others. Or its keys
 * share a counter. */
static void test_full(void) {
  fshm_segment *s = fresh_segment(1);
  const fshm_limit wide = {1000, 3600 * SECOND, 0, FSHM_WINDOW, 0};
  fshm_limiter *l[LEVELS], *others = fresh_limiter(s, "others", &wide, 1);
  fshm_level levels[LEVELS];
  fshm_decision d;
  char key[16];
  for (uint32_t n = 0; n < LEVELS; n++) l[n] = fresh_limiter(s, names[n], &wide, 1);
  three_levels(l, levels);
  for (uint32_t n = 0; n < 2; n++)
    CHECK_EQ(apply_at(l[n], FSHM_ACQUIRE, levels[n].key, 1, NOW).status, FSHM_ALLOWED);
  for (int i = 0; i < 200; i++) {
    (void)snprintf(key, sizeof key, "%d", i);
    (void)apply_at(others, FSHM_ACQUIRE, key, 1, NOW);
  }
  pair_t *before = all_slots(s);
  CHECK_EQ(fshm_levels_apply(levels, LEVELS, FSHM_ACQUIRE, NOW, &d), 2);
  CHECK_EQ(d.status, FSHM_FULL);
  CHECK(slots_are(s, before));
  levels[2].passes_full = 1;
  for (int i = 1; i <= 5; i++) {
    CHECK_EQ(fshm_levels_apply(levels, LEVELS, FSHM_ACQUIRE, NOW, &d), 2);
    CHECK_EQ(d.status, FSHM_ALLOWED);
    CHECK_EQ(d.remaining, 0);
    CHECK_EQ(apply_at(l[0], FSHM_PEEK, "acme", 1, NOW).remaining, 999 - (uint64_t)i);
  }
  levels[2].passes_full = 0;
  fshm_limiter_share(l[2], 1);
  CHECK_EQ(fshm_levels_apply(levels, LEVELS, FSHM_ACQUIRE, NOW, &d), 0);
  CHECK_EQ(d.status, FSHM_ALLOWED);
  CHECK_EQ(levels[2].decision.shared, 1);
  CHECK_EQ(levels[2].decision.remaining, 999);
  CHECK_EQ(apply_at(l[0], FSHM_PEEK, "acme", 1, NOW).remaining, 993);
  for (uint32_t n = 0; n < LEVELS; n++) fshm_limiter_close(l[n]);
  fshm_limiter_close(others);
  fshm_close(s);
}

/* Processes at the same keys, until nothing fits: exactly the limit of the level that binds is admitted, and each other
 * level is charged for what was admitted and for nothing else. */
#define PROCESSES_HERE 4
typedef struct {
  char segment[FSHM_MAX_NAME + 1];
  uint32_t binds;
  _Atomic uint64_t arrivals, admitted, round;
} shared_t;

#define MOST 3000

static void compete(int i, void *with) {
  shared_t *shared = with;
  fshm_segment *s;
  fshm_error e;
  fshm_limiter *l[LEVELS];
  fshm_level levels[LEVELS];
  uint64_t mine = 0, denied = 0;
  (void)i;
  if (fshm_open(shared->segment, 0, 0600, 0, &s, &e) != FSHM_OK) {
    CHECK(false);
    return;
  }
  for (uint32_t n = 0; n < LEVELS; n++)
    CHECK_EQ(fshm_limiter_find(s, names[n], strlen(names[n]), &l[n]), FSHM_OK);
  three_levels(l, levels);
  meet(&shared->arrivals, PROCESSES_HERE, atomic_load(&shared->round));
  while (denied < 100) {
    fshm_decision d;
    uint32_t decides = fshm_levels_apply(levels, LEVELS, FSHM_ACQUIRE, 0, &d);
    if (d.status == FSHM_ALLOWED) {
      mine++;
      continue;
    }
    denied++;
    CHECK_EQ(d.status, FSHM_DENIED);
    CHECK_EQ(decides, shared->binds);
  }
  atomic_fetch_add(&shared->admitted, mine);
  for (uint32_t n = 0; n < LEVELS; n++) fshm_limiter_close(l[n]);
  fshm_close(s);
}

static void test_processes(void) {
  shared_t *shared = shared_memory(sizeof *shared);
  const fshm_limit wide = {2 * MOST, 3600 * SECOND, 0, FSHM_WINDOW, 0};
  const fshm_limit tight = {MOST, 3600 * SECOND, 0, FSHM_WINDOW, 0};
  for (int round = 0; round < fewer(30); round++) {
    fshm_segment *s = fresh_segment(100);
    fshm_limiter *l[LEVELS];
    fshm_level levels[LEVELS];
    (void)snprintf(shared->segment, sizeof shared->segment, "%s", segment_names[segments_made - 1]);
    shared->binds = (uint32_t)round % LEVELS;
    atomic_store(&shared->admitted, 0);
    atomic_store(&shared->arrivals, 0);
    atomic_store(&shared->round, 1);
    for (uint32_t n = 0; n < LEVELS; n++)
      l[n] = fresh_limiter(s, names[n], n == shared->binds ? &tight : &wide, 1);
    three_levels(l, levels);
    run_children(PROCESSES_HERE, compete, shared);
    CHECK_EQ(atomic_load(&shared->admitted), MOST);
    for (uint32_t n = 0; n < LEVELS; n++) {
      uint64_t left[FSHM_MAX_LIMITS];
      CHECK_EQ(fshm_remaining(l[n], levels[n].key, levels[n].key_length, 0, left), 1);
      CHECK_EQ(left[0], n == shared->binds ? 0 : MOST);
      fshm_limiter_close(l[n]);
    }
    fshm_close(s);
    remove_segments();
    segments_made = 0;
  }
}

int main(void) {
  test_denials();
  test_arguments();
  test_undo();
  test_full();
  test_stories();
  test_processes();
  return done();
}
