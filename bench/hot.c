/* hot.c - the paths that every request takes, one after another, for two readers.
 *
 * Under `valgrind --tool=callgrind --collect-atstart=no` it has the instructions of each path counted and
 * dumped under the path's name (bench/instructions.py compares them with the committed ones). Run as it is,
 * it times them: ns a call, least and median of the rounds, the paths in turn, beside the floor: the
 * clock and one swap.
 *   hot [ROUNDS [CALLS]]
 */
#include "../csrc/unity.c"

#include <valgrind/callgrind.h>

#include "../tests/c/check.h"

#define SECOND UINT64_C(1000000000)
#define CALLS \
  1000 /* counted; few enough that no 4,096th call of the key statistics comes in between */
#define DEPLOYED 20

static fshm_segment *s;
static fshm_limiter *one, *shut, *three, *pooled, *quota, *taken;
static fshm_level levels[3];
#define TAKEN 50000 /* permits, all held */
static uint64_t encoding, swapped[2] __attribute__((aligned(16)));
static int metric;
static char text[1000];
static uint32_t deployed[DEPLOYED];
static double weights[DEPLOYED], prices[DEPLOYED];
static fshm_deployment_info found[DEPLOYED];
static fshm_permit connection;
static uint64_t
    serial; /* of new keys; at 10^9 a second a key is over, and its slot free, at once */
static _Atomic uint64_t sink; /* so that no result is thought to be unused */

static const char key[] = "user-1234567890"; /* 15 bytes */
#define KEY key, sizeof key - 1

static void use(uint64_t value) { store_relaxed(&sink, value); }

static UNGUARDED void floor_(uint64_t i) {
  uint64_t now = segment_now(s);
  pair_t seen = pair_load(swapped), next = {now, i};
  use(pair_cas(swapped, &seen, next));
}
static void admitted(uint64_t i) {
  (void)i;
  use((uint64_t)fshm_is_allowed(one, KEY));
}
static void denied(uint64_t i) {
  (void)i;
  use((uint64_t)fshm_is_allowed(shut, KEY));
}
static void new_key(uint64_t i) {
  (void)i;
  uint64_t name[2] = {++serial, UINT64_C(0x2d72657375)};
  use((uint64_t)fshm_is_allowed(one, name, sizeof name));
}
static void acquire(fshm_limiter *l) {
  fshm_decision d;
  fshm_apply(l, FSHM_ACQUIRE, KEY, NULL, 0, 0, &d);
  use(d.remaining);
}
static UNGUARDED void acquire_one(uint64_t i) {
  (void)i;
  acquire(one);
}
static UNGUARDED void acquire_three(uint64_t i) {
  (void)i;
  acquire(three);
}
static UNGUARDED void acquire_levels(uint64_t i) {
  (void)i;
  fshm_decision d;
  (void)fshm_levels_apply(levels, 3, FSHM_ACQUIRE, 0, &d);
  use(d.remaining);
}
static void admit_release(fshm_limiter *l) {
  fshm_permit permit;
  fshm_decision d;
  uint32_t in_flight;
  fshm_admit(l, KEY, NULL, 0, &permit, &d, &in_flight);
  use((uint64_t)fshm_permit_release(l, &permit));
}
static UNGUARDED void permit(uint64_t i) {
  (void)i;
  admit_release(pooled);
}
static UNGUARDED void permit_and_limits(uint64_t i) {
  (void)i;
  admit_release(quota);
}
static UNGUARDED void permit_denied(uint64_t i) {
  (void)i;
  fshm_permit permit;
  fshm_decision d;
  uint32_t in_flight;
  fshm_admit(taken, KEY, NULL, 0, &permit, &d, &in_flight);
  use(in_flight + (uint64_t)d.status); /* FSHM_DENIED is 0 */
}
static UNGUARDED void count_held_permits(uint64_t i) {
  (void)i;
  use(fshm_in_flight(taken, KEY));
}
/* What py_pool.c does of a get and a return, without Python's share: the dictionaries. */
static UNGUARDED void pool(uint64_t i) {
  (void)i;
  int taken = fshm_clock() && fshm_permit_idle(pooled, &connection, 0);
  use(taken && fshm_permit_idle(pooled, &connection, 1) && fshm_clock());
}
static UNGUARDED void memo_short(uint64_t i) {
  (void)i;
  use((uint64_t)fshm_memo_get(s, encoding, text, 20));
}
static UNGUARDED void memo_long(uint64_t i) {
  (void)i;
  use((uint64_t)fshm_memo_get(s, encoding, text, sizeof text));
}
static void record(uint64_t i) { fshm_metric_record(s, (uint32_t)metric, 1000 + i, 1, 1, 10, 20); }
static void pick(uint32_t strategy, uint64_t random) {
  use((uint64_t)fshm_deployment_pick(s, strategy, deployed, weights, prices, NULL, DEPLOYED, random,
                                     found));
}
/* i in the highest bits: every part of the list is picked. */
static void shuffle(uint64_t i) { pick(FSHM_ROUTE_SHUFFLE, i * UINT64_C(0x9e3779b97f4a7c15)); }
static void least_busy(uint64_t i) {
  pick(FSHM_ROUTE_LEAST_BUSY, i * UINT64_C(0x9e3779b97f4a7c15));
}
static void latency(uint64_t i) { pick(FSHM_ROUTE_LATENCY, i * UINT64_C(0x9e3779b97f4a7c15)); }
static void cost(uint64_t i) { pick(FSHM_ROUTE_COST, i * UINT64_C(0x9e3779b97f4a7c15)); }

static const struct {
  const char *name;
  void (*call)(uint64_t);
} paths[] = {{"floor: clock, load and swap", floor_},
             {"is_allowed, admitted", admitted},
             {"is_allowed, denied", denied},
             {"is_allowed, new key", new_key},
             {"acquire, 1 limit", acquire_one},
             {"acquire, 3 limits", acquire_three},
             {"acquire, 3 levels of 1 limit", acquire_levels},
             {"permit: admit and release", permit},
             {"permit and 2 limits: admit and release", permit_and_limits},
             {"permit: denied, 50,000 are held", permit_denied},
             {"in flight, 50,000 are held", count_held_permits},
             {"pool: in use and idle again", pool},
             {"memo hit, 20 bytes", memo_short},
             {"memo hit, 1,000 bytes", memo_long},
             {"metric record", record},
             {"pick of 20, shuffle", shuffle},
             {"pick of 20, least busy", least_busy},
             {"pick of 20, latency", latency},
             {"pick of 20, cost", cost}};
#define PATHS (sizeof paths / sizeof *paths)

static void make_all(void) {
  const fshm_limit wide = {1000000000, SECOND, 1000000000, FSHM_BUCKET, 0};
  const fshm_limit narrow = {1, 3600 * SECOND, 1, FSHM_BUCKET, 0};
  const fshm_limit window = {1000000000, 60 * SECOND, 0, FSHM_WINDOW, 0};
  const fshm_limit sliding = {100000, 3600 * SECOND, 0, FSHM_SLIDING, 0};
  const fshm_limit permits = {8, 0, 0, FSHM_PERMITS, 0};
  const fshm_limit all[] = {wide, window, sliding}, some[] = {wide, window, permits};
  s = fresh_segment(200000);
  /* Always the same secret, hence the same places: counts of two runs are equal. */
  s->secret[0] = s->header->secret[0] = 1;
  s->secret[1] = s->header->secret[1] = 2;
  one = fresh_limiter(s, "one", &wide, 1);
  shut = fresh_limiter(s, "shut", &narrow, 1);
  three = fresh_limiter(s, "three", all, 3);
  const char *const paths_down[] = {"acme", "acme/research", "acme/research/user-1234567890"};
  for (uint32_t i = 0; i < 3; i++) {
    const char name[] = {'a', '/', (char)('a' + i), 0};
    levels[i] = (fshm_level){.limiter = fresh_limiter(s, name, &wide, 1),
                             .key = paths_down[i],
                             .key_length = strlen(paths_down[i])};
  }
  pooled = fresh_limiter(s, "slots", &permits, 1);
  quota = fresh_limiter(s, "quota", some, 3);
  fshm_decision d;
  uint32_t in_flight;
  const fshm_limit many = {TAKEN, 0, 0, FSHM_PERMITS, 0};
  taken = fresh_limiter(fresh_segment(4 * TAKEN), "taken", &many, 1);
  for (uint32_t i = 0; i < TAKEN; i++) {
    fshm_permit permit;
    fshm_admit(taken, KEY, NULL, 0, &permit, &d, &in_flight);
    CHECK_EQ(d.status, FSHM_ALLOWED);
  }
  fshm_admit(pooled, "endpoint", 8, NULL, 0, &connection, &d, &in_flight);
  CHECK_EQ(fshm_permit_idle(pooled, &connection, 1), 1);
  encoding = fshm_memo_encoding(s, "cl100k", 6);
  memset(text, 'x', sizeof text);
  fshm_memo_put(s, encoding, text, 20, 5);
  fshm_memo_put(s, encoding, text, sizeof text, 250);
  metric = fshm_metric_open(s, "bench", 5, "hot", 3);
  for (uint32_t i = 0; i < DEPLOYED; i++) {
    fshm_request request;
    uint64_t id = fshm_deployment_id(s, (const char *)&i, sizeof i);
    deployed[i] = (uint32_t)fshm_deployment_open(s, id, 0);
    weights[i] = prices[i] = 1 + i % 5;
    fshm_deployment_record(s, deployed[i], (1 + i % 7) * 1000000, 1, 1000 * (1 + i % 3), 3, 0, 0);
    for (uint32_t n = 0; n < 1 + i % 4; n++)
      CHECK_EQ(fshm_request_begin(s, deployed[i], 0, &request), 1);
  }
}

/* Is each path what its name says? A path that fails early is quick. */
static void check_all(void) {
  CHECK_EQ(fshm_is_allowed(one, KEY), FSHM_ALLOWED);
  CHECK_EQ(fshm_is_allowed(shut, KEY), FSHM_ALLOWED);
  CHECK_EQ(fshm_is_allowed(shut, KEY), FSHM_DENIED);
  CHECK_EQ(fshm_memo_get(s, encoding, text, 20), 5);
  CHECK_EQ(fshm_memo_get(s, encoding, text, sizeof text), 250);
  for (size_t p = 0; p < PATHS; p++) {
    store_relaxed(&sink, UINT64_MAX);
    paths[p].call(1);
    uint64_t gave = load_relaxed(&sink);
    if (paths[p].call == denied)
      CHECK_EQ(gave, FSHM_DENIED);
    else if (paths[p].call == permit_denied || paths[p].call == count_held_permits)
      CHECK_EQ(gave, TAKEN);
    else if (paths[p].call == shuffle || paths[p].call == cost || paths[p].call == latency ||
             paths[p].call == least_busy)
      CHECK_OP(gave, <, DEPLOYED);
    else if (paths[p].call != record)
      CHECK(gave && gave != UINT64_MAX);
  }
}

/* The kernel's clock is none of our instructions, and how often it is asked depends on the time that
 * passes: for CALLS calls, the counter is believed. */
static void hold_clock(void) {
#if defined(__x86_64__) && defined(__linux__)
  counter_trusted = true;
  last_reading = (pair_t){__rdtsc(), kernel_clock()};
  store_relaxed(&rate, UINT64_C(0xffffffff) << 32 | 1);
#endif
}

static void count_all(void) {
  for (size_t p = 0; p < PATHS; p++) {
    /* They look at all permits again after a time, which is not the same in two runs. */
    if (paths[p].call == permit_denied || paths[p].call == count_held_permits) continue;
    for (uint64_t i = 0; i < 10; i++) paths[p].call(i);
    hold_clock();
    CALLGRIND_TOGGLE_COLLECT;
    for (uint64_t i = 0; i < CALLS; i++) paths[p].call(i);
    CALLGRIND_TOGGLE_COLLECT;
    CALLGRIND_DUMP_STATS_AT(paths[p].name);
  }
}

static int by_size(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static void time_all(uint64_t rounds, uint64_t calls) {
  double *took = calloc(PATHS * rounds, sizeof *took);
  if (!took) exit(1);
  for (uint64_t r = 0; r < rounds; r++) {
    for (size_t p = 0; p < PATHS; p++) {
      uint64_t begun = kernel_clock();
      for (uint64_t i = 0; i < calls; i++) paths[p].call(i);
      took[p * rounds + r] = (double)(kernel_clock() - begun) / (double)calls;
    }
  }
  for (size_t p = 0; p < PATHS; p++) {
    qsort(&took[p * rounds], rounds, sizeof *took, by_size);
    printf("%-40s %8.1f %8.1f\n", paths[p].name, took[p * rounds], took[p * rounds + rounds / 2]);
  }
  free(took);
}

int main(int argc, char **argv) {
  make_all();
  check_all();
  if (failed) return done();
  if (RUNNING_ON_VALGRIND)
    count_all();
  else
    time_all(argc > 1 ? strtoull(argv[1], NULL, 10) : 101,
             argc > 2 ? strtoull(argv[2], NULL, 10) : 20000);
  fshm_close(s);
  return 0;
}
