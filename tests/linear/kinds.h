/* kinds.h - the kinds of histories, and what is asked in each: drawn from a seed, so that it comes again. */
#ifndef KINDS_H
#define KINDS_H

#include "workers.h"

#define MS UINT64_C(1000000)
#define US UINT64_C(1000)

typedef struct {
  const char *name;
  uint32_t sets; /* of limits; a history has one of them, or changes between them */
  uint32_t count; /* of limits in each */
  fshm_limit limits[6][FSHM_MAX_LIMITS];
  const char *ops; /* to draw from, one letter each: letters[] below */
  const char *before; /* what the test draws from, before the processes start; NULL: nothing */
  uint32_t keys, slots;
  bool changes, at_once, real_clock, frozen;
  bool sweeps; /* changes come in rows, so that each needs a sweep */
  bool queue; /* callers wait in turn; each second operation is a release */
  uint64_t lease; /* of a batch, at most */
  uint64_t step; /* of the clock at each reading, on average; 0 = any */
} kind_t;

#define BUCKET_OF(n, per, burst) {(n), (per), (burst), FSHM_BUCKET, 0}
#define STRICT_OF(n, per, burst) {(n), (per), (burst), FSHM_BUCKET, 1}
#define WINDOW_OF(n, per) {(n), (per), 0, FSHM_WINDOW, 0}
#define SLIDING_OF(n, per) {(n), (per), 0, FSHM_SLIDING, 0}
#define TOKEN_LEASE {TOKEN_LEASE_MOST, 0, 0, FSHM_LEASE, 0}
#define PERMITS_OF(n) {(n), 0, 0, FSHM_PERMITS, 0}

#define CHANGES(title, drawn, shapes, ...) \
  {.name = (title),                        \
   .sets = (shapes),                       \
   .count = 1,                             \
   .limits = {__VA_ARGS__},                \
   .ops = (drawn),                         \
   .before = "aac",                        \
   .keys = 2,                              \
   .changes = true,                        \
   .frozen = true}

static const char letters[OP_KINDS] = {
    [OP_ACQUIRE] = 'a',   [OP_IS_ALLOWED] = 'i', [OP_RESERVE] = 'w', [OP_CANCEL] = 'x',
    [OP_PEEK] = 'p',      [OP_CHARGE] = 'c',     [OP_REFUND] = 'r',  [OP_RESET] = 'z',
    [OP_REMAINING] = 'm', [OP_SET] = 's',        [OP_ADMIT] = 't',   [OP_RELEASE] = 'g',
    [OP_IN_FLIGHT] = 'f', [OP_SPEND] = 'e',      [OP_PUT] = 'b',     [OP_TAKE] = 'k',
    [OP_LOOK] = 'l',      [OP_SETTLE] = 'h',     [OP_WAIT] = 'q'};

static const kind_t kinds[] = {
    {.name = "bucket",
     .sets = 4,
     .count = 1,
     .limits = {{BUCKET_OF(6, 600 * MS, 6)},
                {BUCKET_OF(10, 7 * MS + 1, 3)}, /* an interval that is a fraction */
                {BUCKET_OF(1, 10 * MS, 1)},
                {STRICT_OF(5, 90 * MS, 2)}},
     .ops = "aaaaaaiiiwwxpcrrzm",
     .before = "aac",
     .keys = 1},
    {.name = "window",
     .sets = 3,
     .count = 1,
     .limits = {{WINDOW_OF(5, 100 * MS)}, {WINDOW_OF(1, 3 * MS)}, {WINDOW_OF(9, 50 * US)}},
     .ops = "aaaaaaiiipcrrzm",
     .before = "aac",
     .keys = 1},
    {.name = "sliding",
     .sets = 3,
     .count = 1,
     .limits = {{SLIDING_OF(5, 100 * MS)}, {SLIDING_OF(1, 3 * MS)}, {SLIDING_OF(9, 500 * US)}},
     .ops = "aaaaaaiiipcrrzm",
     .before = "aac",
     .keys = 1},
    {.name = "clock", /* the library's own clock, and limits that fill within a history */
     .sets = 6,
     .count = 1,
     .limits = {{BUCKET_OF(5, 50 * US, 3)},
                {BUCKET_OF(2, 30 * US + 1, 2)},
                {STRICT_OF(4, 40 * US, 2)},
                {WINDOW_OF(3, 20 * US)},
                {SLIDING_OF(3, 40 * US)},
                {SLIDING_OF(2, 17 * US)}},
     .ops = "aaaaaaiiipcrrzm",
     .before = "aac",
     .keys = 1,
     .real_clock = true},
    {.name = "keys", /* more keys than slots: claims, and reuse of what has expired */
     .sets = 4,
     .count = 1,
     .limits = {{BUCKET_OF(2, 20 * US, 2)},
                {WINDOW_OF(1, 12 * US)},
                {WINDOW_OF(2, 40 * US)},
                {SLIDING_OF(2, 17 * US)}},
     .ops = "aaaaaaaaiicpzm",
     .before = "aac",
     .keys = 6,
     .slots = SLOTS_PER_LINE},
    {.name =
         "claims", /* a key comes, goes, and loses its slot, while a claimer of the same key stands */
     .sets = 2,
     .count = 1,
     .limits = {{WINDOW_OF(1, 60 * US)}, {BUCKET_OF(1, 60 * US, 1)}},
     .ops = "a",
     .keys = 5,
     .slots = SLOTS_PER_LINE,
     .step = 12 * US},
    /* Limits that change meanwhile: shapes; draw_variants() has the numbers. */
    CHANGES("changes-window", "aaaaaiipcrzmsss", 2, {WINDOW_OF(6, 100 * MS)},
            {WINDOW_OF(2, 170 * MS)}),
    CHANGES("changes-bucket", "aaaaiipwwhhcrzmsss", 1, {BUCKET_OF(6, 42 * MS, 6)}),
    {.name = "changes-sweeps",
     .sets = 1,
     .count = 1,
     .limits = {{BUCKET_OF(6, 42 * MS, 6)}},
     .ops = "aaacss",
     .before = "aac",
     .keys = 1,
     .changes = true,
     .frozen = true,
     .sweeps = true},
    CHANGES("changes-sliding", "aaaaaiipcrzmsss", 2, {SLIDING_OF(6, 100 * MS)},
            {SLIDING_OF(2, 170 * MS)}),
    CHANGES("changes-settle", "aawwwhhhcrmsss", 1, {WINDOW_OF(6, 100 * MS)}),
    CHANGES("changes-kind", "aaaaaiipcrzmsss", 3, {BUCKET_OF(6, 42 * MS, 6)},
            {WINDOW_OF(2, 100 * MS)}, {SLIDING_OF(4, 100 * MS)}),
    CHANGES("changes-several", "aaaaaapcrzmss", 2,
            {WINDOW_OF(6, 100 * MS), SLIDING_OF(4, 100 * MS)}, {WINDOW_OF(4, 100 * MS)}),
    {.name = "changes-permits",
     .sets = 1,
     .count = 1,
     .limits = {{PERMITS_OF(3)}},
     .ops = "ttttggggffss",
     .keys = 1,
     .changes = true},
    {.name = "acquires", /* of several limits, nothing else: has to be all at once */
     .sets = 3,
     .count = 2,
     .limits = {{BUCKET_OF(9, 900 * MS, 9), BUCKET_OF(4, 900 * MS, 4)},
                {WINDOW_OF(8, 100 * MS), WINDOW_OF(4, 1000 * MS)},
                {SLIDING_OF(9, 100 * MS), BUCKET_OF(5, 500 * MS, 5)}},
     .ops = "a",
     .before = "aac",
     .keys = 2,
     .at_once = true,
     .frozen = true},
    {.name = "several", /* limits, and every operation */
     .sets = 3,
     .count = 2,
     .limits = {{BUCKET_OF(9, 900 * MS, 9), BUCKET_OF(4, 90 * MS, 4)},
                {WINDOW_OF(8, 100 * MS), SLIDING_OF(4, 10 * MS)},
                {BUCKET_OF(6, 60 * MS + 1, 6), WINDOW_OF(3, 9 * MS)}},
     .ops = "aaaaaaaaipcrzm",
     .before = "aac",
     .keys = 1},
    {.name = "three",
     .sets = 2,
     .count = 3,
     .limits = {{BUCKET_OF(9, 900 * MS, 9), WINDOW_OF(6, 90 * MS), SLIDING_OF(4, 900 * MS)},
                {WINDOW_OF(8, 100 * MS), WINDOW_OF(5, 10 * MS), WINDOW_OF(3, 1000 * MS)}},
     .ops = "aaaaaaaaaiprm",
     .before = "aac",
     .keys = 1},
    {.name = "permits",
     .sets = 3,
     .count = 1,
     .limits = {{PERMITS_OF(1)}, {PERMITS_OF(2)}, {PERMITS_OF(3)}},
     .ops = "ttttggggf",
     .keys = 1},
    {.name = "queue",
     .sets = 2,
     .count = 1,
     .limits = {{PERMITS_OF(1)}, {PERMITS_OF(2)}},
     .ops = "qqqt",
     .keys = 1,
     .queue = true},
    {.name = "admit", /* a permit and a rate limit */
     .sets = 3,
     .count = 2,
     .limits = {{WINDOW_OF(4, 100 * MS), PERMITS_OF(2)},
                {BUCKET_OF(5, 50 * MS, 3), PERMITS_OF(3)},
                {SLIDING_OF(6, 100 * MS), PERMITS_OF(1)}},
     .ops = "ttttgggf",
     .keys = 1},
    {.name = "token-lease", /* batches are put in, spent, and what is left of them is taken out */
     .sets = 1,
     .count = 1,
     .limits = {{TOKEN_LEASE}},
     .ops = "eeeeeeebbbkl",
     .before = "bb",
     .keys = 1,
     .lease = 2 * US},
    {.name = "token-lease-keys", /* more token leases than slots */
     .sets = 1,
     .count = 1,
     .limits = {{TOKEN_LEASE}},
     .ops = "eeeeebbbbkl",
     .before = "b",
     .keys = 6,
     .slots = SLOTS_PER_LINE,
     .lease = US},
    {.name = "token-leases", /* of two limits */
     .sets = 1,
     .count = 2,
     .limits = {{TOKEN_LEASE, TOKEN_LEASE}},
     .ops = "eeeeeebbkl",
     .before = "bb",
     .keys = 1,
     .lease = 2 * US},
};
#define KINDS (sizeof kinds / sizeof *kinds)

static uint8_t op_of_letter(char letter) {
  uint8_t kind = 0;
  while (kind < OP_KINDS && letters[kind] != letter) kind++;
  return kind;
}

static bool takes_time(uint8_t kind) {
  return kind != OP_IS_ALLOWED && kind != OP_RESET && kind != OP_SET && kind != OP_RELEASE &&
         kind != OP_IN_FLIGHT && kind != OP_WAIT;
}

static void draw_op(const kind_t *k, const fshm_limit *limits, op_t *op, const char *ops,
                    bool with_time) {
  memset(op, 0, sizeof *op);
  op->kind = op_of_letter(ops[random_below(strlen(ops))]);
  op->key = (uint8_t)random_below(k->keys);
  op->who = (uint8_t)random_below(VARIANTS);
  op->times =
      random_below(6) ? 1 : 1 + (uint8_t)random_below(20); /* more than there are slots for rules */
  if (k->sweeps) op->times = 14 + (uint8_t)random_below(6);
  op->delay = (uint16_t)(random_below(2) ? 0 : random_below(300));
  op->fixed = with_time && takes_time(op->kind) && random_below(2);
  for (uint32_t i = 0; i < LIMITS; i++) {
    uint64_t n = limits[i].n ? limits[i].n : 1;
    uint64_t most = op->kind == OP_CHARGE || n < 4 ? n + 1 : n / 2;
    op->cost[i] = random_below(3) ? 1 : random_below(most + 1);
    if (op->kind == OP_IS_ALLOWED) op->cost[i] = 1;
    if (op->kind == OP_SPEND) op->cost[i] = random_below(3) ? 1 : random_below(5);
    if (op->kind == OP_PUT) op->cost[i] = random_below(16);
  }
  if (op->kind == OP_PUT) {
    op->lease = random_scaled(1, k->lease);
    op->kept = random_below(3) ? random_below(8) : random_below(2) ? 0 : UINT64_MAX;
  }
  if (k->queue) {
    op->who = 1 + (uint8_t)random_below(TENANTS);
    op->times = random_below(3) ? 0 : 1 + (uint8_t)random_below(3);
    op->priority = (int8_t)(random_below(4) ? 0 : random_below(3)) - 1;
    op->cost[0] = 1 + random_below(20);
    op->fixed = 0;
  }
  if (op->kind == OP_RESERVE && limits[0].n)
    op->max_wait = random_below(3) * (limits[0].per_ns / limits[0].n);
}

/* Limits of the kind's shapes, with as many tokens as may be, and at any pace: mostly no two alike, so that their rules
 * soon have no room, in any history. */
static void draw_variants(const kind_t *k, history_t *h) {
  for (uint32_t v = 0; v < VARIANTS; v++) {
    const fshm_limit *shape = k->limits[random_below(k->sets)];
    for (uint32_t i = 0; i < FSHM_MAX_LIMITS && shape[i].n; i++) {
      fshm_limit *l = &arena->variants[v][i];
      *l = shape[i];
      l->n = 1 + random_below(l->kind == FSHM_PERMITS ? 6 : 12);
      if (l->kind == FSHM_PERMITS) {
        h->permits_of[v] = (uint32_t)l->n;
        break;
      }
      if (l->kind == FSHM_BUCKET) { /* an interval of whole ns: tokens are exact */
        l->burst = 1 + random_below(l->n);
        l->per_ns = l->n * (shape[i].per_ns / shape[i].n) * (1 + random_below(9));
      }
      h->rules[v][i] = rule_make(l);
      h->counts[v] = i + 1;
      h->limits = (uint32_t)max_u64(h->limits, i + 1);
    }
    if (h->permits_of[v]) h->permits = MOST_PERMITS;
  }
}

/* Draw history number `number` of the kind, and put it into the arena, with the clock set. */
static void draw_history(const kind_t *k, fshm_limiter *const *limiters, uint64_t seed,
                         uint64_t number) {
  history_t *h = &arena->history;
  memset(h, 0, sizeof *h);
  random_state = (seed * UINT64_C(0x9e3779b97f4a7c15)) ^ (number << 20) ^ (uint64_t)(k - kinds);
  uint32_t set = k->changes ? 0 : (uint32_t)random_below(k->sets);
  const fshm_limit *limits = k->limits[set];
  h->keys = k->keys;
  h->slots = k->slots;
  h->changes = k->changes;
  h->at_once = k->at_once;
  bool permits = limits[k->count - 1].kind == FSHM_PERMITS;
  h->limits = k->count - permits;
  h->permits = permits ? (uint32_t)limits[k->count - 1].n : 0;
  for (uint32_t i = 0; i < h->limits; i++) h->rules[0][i] = rule_make(&limits[i]);
  if (k->changes) {
    h->limits = h->permits = 0;
    memset(arena->variants, 0, sizeof arena->variants);
    draw_variants(k, h);
  }
  (void)snprintf(arena->limiter_name, sizeof arena->limiter_name, "limiter-%u", set);
  arena->limiter = limiters[set];
  arena->workers = k->count == LIMITS || k->sweeps ? 3 : 3 + (uint32_t)random_below(2);
  arena->seed = random_u64();
  arena->pause = (uint32_t)random_below(PAUSES);
  arena->one_core = number / 64 % 4 == 3;
  uint64_t interval = k->lease ? k->lease / 16 : limits[0].per_ns / limits[0].n;
  arena->step = k->frozen || !random_below(3) ? 0 : random_scaled(1, interval / 2 + 2);
  if (k->step) arena->step = k->step / 2 + random_below(k->step);
  bool with_time = !k->real_clock && !k->slots;
  for (uint32_t i = random_below(4); i-- && k->before;)
    draw_op(k, limits, &h->ops[TESTER][h->count[TESTER]++], k->before, false);
  /* Many lanes, or long ones: the search grows with both. */
  uint32_t changes = 0;
  bool several = k->changes && h->limits > 1;
  uint32_t most = several || arena->workers == 4 || k->keys > 2 || k->count > 2 ? 6 : 8;
  for (uint32_t lane = 0; lane < arena->workers; lane++) {
    h->count[lane] = 4 + (uint32_t)random_below(most - 3);
    h->count[lane] += k->queue && h->count[lane] % 2;
    if (k->sweeps) h->count[lane] = 2 + (uint32_t)random_below(2); /* each row is many steps */
    for (uint32_t i = 0; i < h->count[lane]; i++) {
      op_t *op = &h->ops[lane][i];
      draw_op(k, limits, op, k->queue && i % 2 ? "g" : k->ops, with_time);
      if (k->changes) op->max_wait = 0;
      if (op->kind != OP_SET) continue;
      if (several) op->times = 1 + op->times % 4;
      if (changes + op->times >= SETS / 2) op->times = 1;
      changes += op->times;
    }
  }
  arena->dies = random_below(12) ? 0 : 1 + (uint32_t)random_below(arena->workers);
  arena->dies_at = 1 + (uint32_t)random_below(60);
  arena->waits = random_below(2) ? 0 : 1 + (uint32_t)random_below(arena->workers);
  arena->waits_at = 1 + (uint32_t)random_below(30);
  arena->waits_for = 2 + random_below(40);
  if (k->queue) { /* what a dead caller held or stood in the way of is found by time, which stands here */
    arena->step = random_below(1000);
    arena->dies = 0;
    arena->waits = random_below(16) ? 0 : arena->waits;
  }
}

#endif
