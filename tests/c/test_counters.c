/* test_counters.c - sums of calls: exact whichever process is killed, and never less than before; and what else an
 * inspection of the whole segment shows. */
#include "../../csrc/unity.c"

#include "check.h"

#define NOW UINT64_C(1000000)
#define WORKERS 4
#define KILLED 150 /* one after the other, in each of the workers' places */
#define KEYS 600 /* more than a per-process statistics has entries: they are flushed all the time */

static const fshm_limit generous = {1000000, UINT64_C(1) << 40, 0, FSHM_WINDOW, 0};

static fshm_counters total(const fshm_segment *s) {
  fshm_counters all[FSHM_COUNTERS], sum = {0};
  fshm_counters_all(s, all);
  for (unsigned i = 0; i < FSHM_COUNTERS; i++) {
    sum.admitted += all[i].admitted;
    sum.denied += all[i].denied;
    sum.refused += all[i].refused;
  }
  return sum;
}

typedef struct {
  fshm_limiter *limiter;
  _Atomic uint64_t begun, ended; /* calls */
} count_t;

static __attribute__((noreturn)) void count_without_end(int me, void *with) {
  count_t *count = with;
  for (uint64_t i = (uint64_t)me;; i++) {
    char key[16];
    (void)snprintf(key, sizeof key, "key %u", (unsigned)(i * 7919 % KEYS));
    atomic_fetch_add(&count->begun, 1);
    (void)apply_at(count->limiter, FSHM_ACQUIRE, key, i % 3 ? 1 : 2000000, NOW);
    atomic_fetch_add(&count->ended, 1);
  }
}

/* Processes killed anywhere, and their indexes taken by others: no sum is less than before, and the last one is that of
 * all calls. */
static void test_never_falls(void) {
  fshm_segment *s = fresh_segment(2000);
  count_t *count = shared_memory(sizeof *count);
  fshm_counters before = {0}, now;
  pid_t pids[WORKERS];
  uint64_t falls = 0, looks = 0;
  const int killed = fewer(KILLED);
  count->limiter = fresh_limiter(s, "a", &generous, 1);
  for (int i = 0; i < WORKERS; i++) pids[i] = start_child(count_without_end, i, count);
  for (int i = 0; i < killed * WORKERS; i++) {
    for (int look = 0; look < 40; look++) {
      now = total(s);
      falls += now.admitted < before.admitted || now.denied < before.denied;
      before = now;
      looks++;
    }
    pid_t *pid = &pids[i % WORKERS];
    CHECK_EQ(kill(*pid, SIGKILL), 0);
    CHECK_EQ(waitpid(*pid, NULL, 0), *pid);
    *pid = i < (killed - 1) * WORKERS ? start_child(count_without_end, i, count) : 0;
  }
  now = total(s);
  CHECK_EQ(falls, 0);
  CHECK_EQ(looks, 40 * killed * WORKERS);
  CHECK_OP(now.admitted + now.denied, >=, count->ended);
  CHECK_OP(now.admitted + now.denied, <=, count->begun);
  CHECK_OP(now.admitted, >=, before.admitted);
  CHECK_EQ(now.refused, 0);
  fshm_limiter_close(count->limiter);
  (void)munmap(count, sizeof *count);
  fshm_close(s);
}

/* By limiter; those beyond the last word share it. */
static void test_by_limiter(void) {
  fshm_segment *s = fresh_segment(80000);
  fshm_counters all[FSHM_COUNTERS];
  fshm_limiter *l[FSHM_COUNTERS + 6];
  for (unsigned i = 0; i < FSHM_COUNTERS + 6; i++) {
    char name[16];
    (void)snprintf(name, sizeof name, "limiter %u", i);
    l[i] = fresh_limiter(s, name, &generous, 1);
    for (unsigned k = 0; k <= i; k++) (void)apply_at(l[i], FSHM_ACQUIRE, "k", 1, NOW);
    (void)apply_at(l[i], FSHM_ACQUIRE, "k", 2000000, NOW);
    (void)apply_at(l[i], FSHM_PEEK, "k", 1, NOW); /* no call */
    (void)apply_at(l[i], FSHM_CHARGE, "k", 1, NOW);
  }
  fshm_counters_all(s, all);
  for (unsigned i = 0; i < FSHM_COUNTERS - 1; i++) {
    CHECK_EQ(all[i].admitted, i + 1);
    CHECK_EQ(all[i].denied, 1);
  }
  CHECK_EQ(all[FSHM_COUNTERS - 1].admitted, 7 * (FSHM_COUNTERS + 3)); /* n, n + 1 .. n + 6 */
  CHECK_EQ(all[FSHM_COUNTERS - 1].denied, 7);
  for (unsigned i = 0; i < FSHM_COUNTERS + 6; i++) fshm_limiter_close(l[i]);
  fshm_close(s);
}

/* Limiters that are there for another one's sake take no counters: those made after them have theirs. Who comes later
 * finds the same, whatever it takes the name for; and the last have none of their own. */
static void test_beside(void) {
  fshm_segment *s = fresh_segment(80000);
  fshm_counters all[FSHM_COUNTERS];
  fshm_limiter_info info;
  const unsigned last = FSHM_COUNTERS - 1;
  for (unsigned i = 0; i <= FSHM_COUNTERS; i++) {
    char name[24];
    fshm_limiter *beside, *again;
    (void)snprintf(name, sizeof name, "beside %u", i);
    CHECK_EQ(fshm_limiter_open_beside(s, name, strlen(name), &generous, 1, &beside), FSHM_OK);
    CHECK_EQ(fshm_limiter_open(s, name, strlen(name), &generous, 1, &again), FSHM_OK);
    CHECK_EQ(again->index, beside->index);
    CHECK_EQ(apply_at(beside, FSHM_ACQUIRE, "k", 1, NOW).status, FSHM_ALLOWED);
    CHECK_EQ(apply_at(again, FSHM_ACQUIRE, "k", 2000000, NOW).status, FSHM_DENIED);
    fshm_count_call(beside, "k", 1, FSHM_ALLOWED);
    CHECK_EQ(fshm_limiter_at(s, 2 * i, &info), FSHM_OK);
    CHECK_EQ(info.counters, FSHM_COUNTERS);
    fshm_limiter_close(again);
    fshm_limiter_close(beside);
    (void)snprintf(name, sizeof name, "limiter %u", i);
    fshm_limiter *l = fresh_limiter(s, name, &generous, 1);
    CHECK_EQ(fshm_limiter_find(s, name, strlen(name), &again), FSHM_OK);
    CHECK_EQ(again->index, 2 * i + 1);
    for (unsigned k = 0; k <= i; k++) (void)apply_at(k % 2 ? l : again, FSHM_ACQUIRE, "k", 1, NOW);
    CHECK_EQ(fshm_limiter_at(s, 2 * i + 1, &info), FSHM_OK);
    CHECK_EQ(info.counters, i < last ? i : last);
    fshm_limiter_close(again);
    fshm_limiter_close(l);
  }
  fshm_counters_all(s, all);
  for (unsigned i = 0; i < last; i++) {
    CHECK_EQ(all[i].admitted, i + 1);
    CHECK_EQ(all[i].denied, 0);
  }
  CHECK_EQ(all[last].admitted, 2 * last + 3);
  fshm_close(s);
}

/* A call that was decided elsewhere counts as any other call, once; nothing is consumed. */
static void test_counted_for_others(void) {
  fshm_segment *s = fresh_segment(100);
  fshm_counters all[FSHM_COUNTERS];
  const fshm_limit two = {2, UINT64_C(1) << 40, 0, FSHM_WINDOW, 0};
  fshm_limiter *l = fresh_limiter(s, "l", &two, 1);
  for (int i = 0; i < 5; i++) fshm_count_call(l, "k", 1, FSHM_ALLOWED);
  for (int i = 0; i < 3; i++) fshm_count_call(l, "k", 1, FSHM_DENIED);
  fshm_count_call(l, "k", 1, FSHM_FULL);
  fshm_counters_all(s, all);
  CHECK_EQ(all[0].admitted, 5);
  CHECK_EQ(all[0].denied, 4);
  CHECK_EQ(all[0].refused, 1);
  CHECK_EQ(apply_at(l, FSHM_ACQUIRE, "k", 2, 0).status, FSHM_ALLOWED);
  fshm_limiter_close(l);
  fshm_close(s);
}

/* A full table: refused, which is denied too. And the keys of each limiter, as long as they are live. */
static void test_refused_and_used(void) {
  fshm_segment *s = fresh_segment(1);
  fshm_limiter *a = fresh_limiter(s, "a", &generous, 1), *b = fresh_limiter(s, "b", &generous, 1);
  uint64_t *keys = calloc(s->limiter_count, sizeof *keys), held = 0;
  for (int i = 0; i < 100; i++) {
    char key[16];
    (void)snprintf(key, sizeof key, "key %d", i);
    held += apply_at(i % 2 ? a : b, FSHM_ACQUIRE, key, 1, NOW).status == FSHM_ALLOWED;
  }
  fshm_counters now = total(s);
  CHECK_EQ(now.admitted, held);
  CHECK_OP(now.refused, >, 0);
  CHECK_EQ(now.refused, now.denied);
  CHECK_EQ(now.admitted + now.denied, 100);
  CHECK(keys);
  CHECK_EQ(fshm_used(s, NOW, keys), held);
  CHECK_EQ(fshm_used(s, NOW, keys), fshm_live_slots(s, NULL, NOW));
  CHECK_EQ(keys[a->index] + keys[b->index], held);
  CHECK_OP(keys[a->index], >, 0);
  CHECK_EQ(fshm_used(s, NOW + (UINT64_C(1) << 42), keys), 0);
  CHECK_EQ(keys[a->index] + keys[b->index], 0);
  free(keys);
  fshm_limiter_close(a);
  fshm_limiter_close(b);
  fshm_close(s);
}

static void test_permits(void) {
  fshm_segment *s = fresh_segment(100);
  const fshm_limit three = {3, 0, 0, FSHM_PERMITS, 0};
  fshm_limiter *l = fresh_limiter(s, "p", &three, 1);
  fshm_permit permits[4];
  fshm_permit_info found[3], one;
  fshm_decision d;
  uint32_t in_flight;
  for (int i = 0; i < 3; i++) fshm_admit(l, "k", 1, NULL, 0, &permits[i], &d, &in_flight);
  fshm_admit(l, "other", 5, NULL, 0, &permits[3], &d, &in_flight);
  CHECK_EQ(fshm_permits(s, NULL, 0), 4);
  found[2].table_slot = 12345;
  CHECK_EQ(fshm_permits(s, found, 2), 4); /* no more than there is room for */
  CHECK_EQ(found[2].table_slot, 12345);
  for (int i = 0; i < 2; i++) {
    CHECK_EQ(fshm_permit_at(s, found[i].table_slot, &one), 1);
    CHECK(!memcmp(&one, &found[i], sizeof one));
  }
  for (int i = 0; i < 4; i++) CHECK_EQ(fshm_permit_release(l, &permits[i]), 1);
  CHECK_EQ(fshm_permits(s, found, 3), 0);
  fshm_limiter_close(l);
  fshm_close(s);
}

/* Octaves: each duration in the one whose bound is the first above it. */
static void test_octaves(void) {
  fshm_segment *s = fresh_segment(100);
  uint64_t calls[FSHM_OCTAVES], expected[FSHM_OCTAVES] = {0};
  int first = fshm_metric_open(s, "a", 1, "b", 1), second = fshm_metric_open(s, "a", 1, "c", 1);
  const uint32_t both[] = {(uint32_t)first, (uint32_t)second, METRICS + 5};
  for (int i = 0; i < 5000; i++) {
    uint64_t ns = random_scaled(1, UINT64_C(1) << 45);
    unsigned octave = 0;
    while (octave < FSHM_OCTAVES - 1 && ns >= UINT64_C(128) << octave) octave++;
    expected[octave]++;
    fshm_metric_record(s, both[i % 2], ns, 1, 1, 0, 0);
  }
  fshm_metric_octaves(s, both, 3, calls);
  for (unsigned i = 0; i < FSHM_OCTAVES; i++) CHECK_EQ(calls[i], expected[i]);
  fshm_close(s);
}

int main(void) {
  test_never_falls();
  test_by_limiter();
  test_beside();
  test_counted_for_others();
  test_refused_and_used();
  test_permits();
  test_octaves();
  return done();
}
