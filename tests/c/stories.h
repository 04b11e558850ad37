/* stories.h - random stories for test_stories.c: sets of limits of one name, and what is done under them. */
#ifndef STORIES_H
#define STORIES_H

#define KEYS 3
#define MOST_STEPS 40
#define MOST_SETS 5
#define HANDLES 4

typedef enum {
  ACQUIRE,
  ADMIT,
  CHARGE,
  REFUND,
  SETTLE,
  RELEASE,
  BLOCK,
  RESERVE,
  RESET, /* of a key */
  CHANGE, /* `times` changes, from one set to the next */
  CHANGE_ASKED, /* the same; the key is asked for more than is left after each */
  KINDS_OF_STEP
} what_t;

enum { AS_IT_IS, WHAT_IS_LEFT, UNTIL_ADMITTED };

typedef struct {
  what_t what;
  uint32_t key, set, times, handle;
  uint32_t cost_is, pause_is; /* as above */
  uint64_t cost, pause;
} step_t;

typedef struct {
  fshm_limit limits[FSHM_MAX_LIMITS];
  uint32_t count;
} set_t;

typedef struct {
  set_t sets[MOST_SETS];
  step_t steps[MOST_STEPS];
  uint32_t sets_n, steps_n;
  uint64_t begin;
} story_t;

static uint32_t most_sets = MOST_SETS;

static fshm_limit random_limit(uint32_t kind, uint64_t scale, uint64_t most) {
  fshm_limit l = {.kind = kind};
  if (kind == FSHM_PERMITS) {
    l.n = 1 + random_below(6);
    return l;
  }
again:
  l.per_ns = scale * (1 + random_below(random_below(3) ? 4 : 60));
  if (random_below(4) == 0) l.per_ns += random_below(scale);
  if (kind == FSHM_SLIDING) l.per_ns = max_u64(l.per_ns, UINT64_C(1) << 24);
  l.n = random_scaled(1, kind == FSHM_SLIDING ? min_u64(most, 200) : most);
  if (random_below(6) == 0) l.n = 1 + random_below(4);
  l.burst = 0;
  l.strict = 0;
  if (kind == FSHM_BUCKET) {
    l.burst = random_below(2) ? l.n : random_scaled(1, l.n);
    l.strict = random_below(4) == 0;
  }
  if (l.per_ns > UINT64_C(1) << 50 || !limit_valid(&l) || l.per_ns / l.n < 1000) goto again;
  return l;
}

static uint64_t random_ns(const story_t *t) {
  const set_t *s = &t->sets[random_below(t->sets_n)];
  const fshm_limit *l = &s->limits[random_below(s->count)];
  uint64_t per = l->per_ns ? l->per_ns : 1000000000;
  switch (random_below(6)) {
    case 0:
      return per / l->n * (1 + random_below(3));
    case 1:
      return per + random_below(3) - 1;
    case 2:
      return random_below(2 * per);
    default:
      return random_scaled(1, per);
  }
}

/* The same limits, other numbers. */
static void other_numbers(fshm_limit *l, uint64_t scale, uint64_t most) {
  uint64_t per = l->per_ns;
  do *l = random_limit(l->kind, scale, most);
  while (per && per / l->n < 1000);
  if (per && (l->kind != FSHM_BUCKET || random_below(2))) l->per_ns = per;
  if (!limit_valid(l)) l->burst = 1;
}

static void random_sets(story_t *t) {
  static const uint64_t scales[] = {1 << 20, 1000000000, 60 * UINT64_C(1000000000),
                                    3600 * UINT64_C(1000000000), 24 * 3600 * UINT64_C(1000000000)};
  uint64_t scale = scales[random_below(5)], most = random_below(3) ? 100 : 1000;
  if (random_below(8) == 0) most = 100000;
  uint32_t shape = (uint32_t)random_below(10), permits = random_below(5) == 0;
  uint32_t count = shape < 6 ? 1 : 2 + (uint32_t)random_below(permits ? 2 : 3);
  uint32_t kind = (uint32_t)random_below(3);
  t->sets_n = 1 + (uint32_t)random_below(most_sets);
  set_t family = {.count = count};
  for (uint32_t k = 0; k < count; k++)
    family.limits[k] = random_limit(shape < 6 ? kind : (uint32_t)random_below(3), scale, most);
  for (uint32_t i = 0; i < t->sets_n; i++) {
    set_t *s = &t->sets[i];
    s->count = 0;
    for (uint32_t k = 0; k < count; k++) {
      if (shape >= 8 && s->count + count - k > 1 && random_below(3) == 0) continue; /* left out */
      fshm_limit *l = &s->limits[s->count++];
      *l = family.limits[k];
      if (shape < 4) *l = random_limit(kind, scale, most);
      if (shape == 4 || shape == 5) *l = random_limit((uint32_t)random_below(3), scale, most);
      if (shape >= 6) other_numbers(l, scale, most);
    }
    if (permits && random_below(4)) s->limits[s->count++] = random_limit(FSHM_PERMITS, 0, 0);
  }
}

static uint64_t random_cost(const story_t *t) {
  const set_t *s = &t->sets[random_below(t->sets_n)];
  uint64_t n = capacity_of(&s->limits[random_below(s->count)]);
  switch (random_below(8)) {
    case 0:
      return n;
    case 1:
      return n + 1;
    case 2:
    case 3:
      return random_scaled(1, n);
    default:
      return 1 + random_below(3);
  }
}

static void random_step(const story_t *t, step_t *s) {
  static const what_t whats[] = {ACQUIRE, ACQUIRE, ACQUIRE, ACQUIRE, ADMIT,  ADMIT,       CHARGE,
                                 REFUND,  SETTLE,  SETTLE,  RELEASE, BLOCK,  RESERVE,     RESET,
                                 CHANGE,  CHANGE,  CHANGE,  CHANGE,  CHANGE, CHANGE_ASKED};
  memset(s, 0, sizeof *s);
  s->what = whats[random_below(sizeof whats / sizeof *whats)];
  s->key = random_below(4) ? 0 : (uint32_t)random_below(KEYS);
  s->set = (uint32_t)random_below(t->sets_n);
  s->handle = (uint32_t)random_below(HANDLES);
  s->times = 1;
  if (s->what == CHANGE || s->what == CHANGE_ASKED) {
    if (random_below(4) == 0) s->times = 1 + (uint32_t)random_below(8);
    if (random_below(12) == 0) s->times = 28 + (uint32_t)random_below(42);
    if (random_below(50000) == 0) s->times = 65500 + (uint32_t)random_below(80);
  }
  s->cost = random_cost(t);
  if (s->what <= ADMIT && random_below(4) == 0) {
    s->cost_is = WHAT_IS_LEFT;
    s->cost = random_below(4) == 0;
  }
  if (s->what <= ADMIT && random_below(16) == 0) s->cost = 0, s->cost_is = AS_IT_IS;
  if (s->what == BLOCK) s->cost = random_ns(t);
  if (random_below(3) == 0) s->pause = random_ns(t);
  if (random_below(12) == 0) s->pause_is = UNTIL_ADMITTED;
}

static void random_story(story_t *t, uint64_t seed, uint64_t number) {
  random_state = seed * UINT64_C(0x9e3779b97f4a7c15) + number;
  (void)random_u64();
  random_state ^= random_u64();
  random_sets(t);
  /* far from the time at which limits are really changed: nothing may depend on that */
  t->begin = (UINT64_C(1) << 53) + random_below(UINT64_C(1) << 53);
  t->steps_n = 2 + (uint32_t)random_below(random_below(4) ? 14 : MOST_STEPS - 1);
  for (uint32_t i = 0; i < t->steps_n; i++) random_step(t, &t->steps[i]);
}

/* Printed ------------------------------------------------------------------------------------------ */

static void tell_limit(FILE *f, const fshm_limit *l) {
  static const char *const kinds[] = {"Limit", "Window", "SlidingWindow", "InFlight"};
  fprintf(f, "%s(%" PRIu64, kinds[l->kind], l->n);
  if (l->per_ns) fprintf(f, ", per=%" PRIu64 " ns", l->per_ns);
  if (l->kind == FSHM_BUCKET && l->burst != l->n) fprintf(f, ", burst=%" PRIu64, l->burst);
  if (l->strict) fprintf(f, ", strict");
  fprintf(f, ")");
}

static void tell_set(FILE *f, const set_t *s) {
  for (uint32_t i = 0; i < s->count; i++) {
    fprintf(f, i ? " and " : "");
    tell_limit(f, &s->limits[i]);
  }
}

#endif
