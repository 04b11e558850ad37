/* test_deployments.c - deployments: the rules of each strategy, places, requests in flight, cooldown. */
/* Fewer than a segment has otherwise. */
#define PROCESSES 320
#define HOME_PROCESSES 256
#include "../../csrc/unity.c"

#include "check.h"

#define PARTIES 4
#define RECORDS 20000
#define DRAWS 40000
#define SECOND UINT64_C(1000000000)

static const char *shared_name;

static fshm_segment *open_shared(void) {
  fshm_segment *s;
  fshm_error e;
  CHECK_EQ(fshm_open(shared_name, 0, 0600, 0, &s, &e), FSHM_OK);
  if (!s) exit(1);
  return s;
}

static uint32_t index_of_name(fshm_segment *s, const char *name) {
  int index = fshm_deployment_open(s, fshm_deployment_id(s, name, strlen(name)), 0);
  CHECK(index >= 0 && index < DEPLOYMENTS);
  return (uint32_t)index;
}

static fshm_deployment_info known_of(fshm_segment *s, uint32_t index) {
  fshm_deployment_info info;
  fshm_deployment_look(s, &index, 1, 0, 1, &info);
  return info;
}

/* rules ---------------------------------------------------------------------------------------- */

static void test_means(void) {
  for (int n = 0; n < fewer(1000); n++) {
    uint64_t word = 0, successes = 0;
    double mean = 0, share = 0, weight;
    for (int i = 1; i <= 60; i++) {
      uint64_t value = random_scaled(1000, UINT64_C(1) << 40), success = random_below(2);
      weight = i < DECAY ? i : DECAY;
      word = next_mean(word, value);
      successes = next_rate(successes, success);
      mean += ((double)value - mean) / weight;
      share += ((double)success - share) / weight;
      double found = (double)(word >> RECORDS_BITS), part = (double)(successes >> 32) / UINT32_MAX;
      if (found - mean > 20 || mean - found > 20) CHECK_EQ(found, mean);
      if (part - share > 1e-6 || share - part > 1e-6) CHECK(part == share);
      if ((word & RECORDS_MASK) != (uint64_t)i) CHECK_EQ(word & RECORDS_MASK, i);
    }
  }
  CHECK_EQ(next_mean(0, UINT64_MAX) >> RECORDS_BITS, MEAN_MAX);
  CHECK_EQ(next_mean(MEAN_MAX << RECORDS_BITS | RECORDS_MASK, MEAN_MAX),
           MEAN_MAX << RECORDS_BITS | RECORDS_MASK);
  uint64_t all = next_rate(0, 1);
  for (int i = 0; i < 1000; i++) all = next_rate(all, 1);
  CHECK_EQ(all >> 32, UINT32_MAX);
  for (int i = 0; i < 1000; i++) all = next_rate(all, 0);
  CHECK_EQ(all >> 32, 0);
  CHECK_EQ(next_rate(UINT64_MAX, 1), UINT64_MAX);
  CHECK_EQ(failures_of(next_failures(next_failures(0, 7), 7)), 2);
  CHECK_EQ(failures_of(next_failures(next_failures(0, 7), 8)), 1);
  CHECK_EQ(failures_of(next_failures(7u << 24 | 0xffffff, 7)), 0xffffff);
}

/* How often each of n is picked, of DRAWS. */
static void draw(uint32_t strategy, const fshm_deployment_info *d, const double *weights,
                 const double *prices, const unsigned char *blocked, uint32_t n, int *counts) {
  memset(counts, 0, n * sizeof *counts);
  for (int i = 0; i < DRAWS; i++) {
    int64_t at = route_pick(strategy, d, weights, prices, blocked, n, random_u64());
    if (at >= (int64_t)n) CHECK_OP(at, <, n);
    if (at >= 0) counts[at]++;
  }
}

/* Within 5 standard deviations of a binomial, which the fixed seed makes certain. */
static void check_share(int count, double share) {
  double off = count - DRAWS * share;
  CHECK(off * off <= 25 * DRAWS * share * (1 - share) + 1);
  if (off * off > 25 * DRAWS * share * (1 - share) + 1)
    fprintf(stderr, "  %d of %d, share %f\n", count, DRAWS, share);
}

#define FRESH {.latency_ns = UINT64_MAX, .cost = UINT64_MAX, .success_rate = 1}

static void test_shuffle(void) {
  fshm_deployment_info d[4] = {FRESH, FRESH, FRESH, FRESH};
  int counts[4];
  draw(FSHM_ROUTE_SHUFFLE, d, (double[]){1, 2, 0, 5}, NULL, NULL, 4, counts);
  check_share(counts[0], 1 / 8.);
  check_share(counts[1], 2 / 8.);
  CHECK_EQ(counts[2], 0);
  check_share(counts[3], 5 / 8.);
  d[3].cooldown_ns = 1;
  draw(FSHM_ROUTE_SHUFFLE, d, (double[]){1, 2, 0, 5}, NULL, (unsigned char[]){0, 1, 0, 0}, 4,
       counts);
  CHECK_EQ(counts[0], DRAWS); /* the only one with a weight that is left */
  draw(FSHM_ROUTE_SHUFFLE, d, (double[]){0, 0, 0, 5}, NULL, NULL, 4, counts);
  for (int i = 0; i < 3; i++) check_share(counts[i], 1 / 3.);
  CHECK_EQ(counts[3], 0);
  draw(FSHM_ROUTE_SHUFFLE, d, (double[]){1, 1, 1, 1}, NULL, (unsigned char[]){1, 1, 1, 0}, 4,
       counts);
  CHECK_EQ(counts[0] + counts[1] + counts[2] + counts[3], 0);
  CHECK_EQ(route_pick(FSHM_ROUTE_SHUFFLE, d, NULL, NULL, NULL, 0, 1), -1);
}

static void test_least_busy(void) {
  fshm_deployment_info d[4] = {FRESH, FRESH, FRESH, FRESH};
  const double none[4] = {0};
  int counts[4];
  d[0].in_flight = 3;
  d[1].in_flight = d[3].in_flight = 1;
  d[2].in_flight = 2;
  draw(FSHM_ROUTE_LEAST_BUSY, d, none, none, NULL, 4, counts);
  check_share(counts[1], 1 / 2.);
  check_share(counts[3], 1 / 2.);
  draw(FSHM_ROUTE_LEAST_BUSY, d, none, none, (unsigned char[]){0, 1, 0, 1}, 4, counts);
  CHECK_EQ(counts[2], DRAWS);
  for (int i = 0; i < 4; i++) d[i].cooldown_ns = 1;
  CHECK_EQ(route_pick(FSHM_ROUTE_LEAST_BUSY, d, none, none, NULL, 4, 1), -1);
}

static void test_latency(void) {
  fshm_deployment_info d[4] = {FRESH, FRESH, FRESH, FRESH};
  const double none[4] = {0};
  int counts[4];
  d[0].latency_ns = 300, d[1].latency_ns = 100, d[2].latency_ns = 200;
  draw(FSHM_ROUTE_LATENCY, d, none, none, NULL, 4, counts);
  CHECK_EQ(counts[3], DRAWS); /* not tried yet */
  d[3].in_flight = 1;
  draw(FSHM_ROUTE_LATENCY, d, none, none, NULL, 4, counts);
  CHECK_EQ(counts[1], DRAWS); /* a request is trying it */
  d[2].idle_ns = STALE_NS + 1;
  draw(FSHM_ROUTE_LATENCY, d, none, none, NULL, 4, counts);
  CHECK_EQ(counts[2], DRAWS); /* not tried for a minute */
  d[2].in_flight = 1, d[2].latency_ns = 50; /* a long request: what was known still counts */
  draw(FSHM_ROUTE_LATENCY, d, none, none, NULL, 4, counts);
  CHECK_EQ(counts[2], DRAWS);
  d[2].latency_ns = 200;
  d[3].in_flight = 0, d[3].records = 2; /* has only failed */
  draw(FSHM_ROUTE_LATENCY, d, none, none, (unsigned char[]){1, 1, 0, 0}, 4, counts);
  CHECK_EQ(counts[2], DRAWS);
  draw(FSHM_ROUTE_LATENCY, d, none, none, (unsigned char[]){1, 1, 1, 0}, 4, counts);
  CHECK_EQ(counts[3], DRAWS);
}

static void test_cost(void) {
  fshm_deployment_info d[4] = {FRESH, FRESH, FRESH, FRESH};
  const double none[4] = {0};
  int counts[4];
  draw(FSHM_ROUTE_COST, d, none, (double[]){30, 10, -1, 10}, NULL, 4, counts);
  check_share(counts[1], 1 / 2.); /* prices are compared; unknown comes last */
  check_share(counts[3], 1 / 2.);
  draw(FSHM_ROUTE_COST, d, none, (double[]){-1, -1, -1, -1}, NULL, 4, counts);
  for (int i = 0; i < 4; i++) check_share(counts[i], 1 / 4.);
  /* 100 tokens a request, as deployment 0 tells: deployment 1 will cost 1000, 3 costs 1100 */
  d[0].cost = 3000, d[3].cost = 1100;
  draw(FSHM_ROUTE_COST, d, none, (double[]){30, 10, -1, -1}, NULL, 4, counts);
  CHECK_EQ(counts[1], DRAWS);
  draw(FSHM_ROUTE_COST, d, none, (double[]){30, 12, -1, -1}, NULL, 4, counts);
  CHECK_EQ(counts[3], DRAWS);
  /* none has both: a price says nothing beside a cost */
  draw(FSHM_ROUTE_COST, d, none, (double[]){-1, 1, -1, -1}, NULL, 4, counts);
  CHECK_EQ(counts[3], DRAWS);
  draw(FSHM_ROUTE_COST, d, none, (double[]){-1, 0, -1, -1}, NULL, 4, counts);
  CHECK_EQ(counts[1], DRAWS); /* but free is free */
}

/* places --------------------------------------------------------------------------------------- */

static void test_places(void) {
  fshm_segment *s = fresh_segment(10);
  uint64_t base = 1 + DEPLOYMENTS * 1000; /* ids whose first place is 1 */
  for (uint64_t i = 0; i < PROBES; i++)
    CHECK_EQ(fshm_deployment_open(s, base + i * DEPLOYMENTS, 1000 + i), 1 + i);
  for (uint64_t i = 0; i < PROBES; i++)
    CHECK_EQ(fshm_deployment_open(s, base + i * DEPLOYMENTS, 5000), 1 + i);
  fshm_deployment_record(s, 4, 500 * 64, 0, 7, 0, SECOND, 900); /* place 4: idle for longest now */
  CHECK_OP(known_of(s, 4).records, ==, 1);
  uint64_t newcomer = base + PROBES * DEPLOYMENTS;
  CHECK_EQ(fshm_deployment_open(s, newcomer, 6000), 4);
  fshm_deployment_info info = known_of(s, 4);
  CHECK_EQ(info.id, newcomer);
  CHECK_EQ(info.records, 0);
  CHECK_EQ(info.latency_ns, UINT64_MAX);
  CHECK_EQ(info.cost, UINT64_MAX);
  CHECK_EQ(info.cooldown_ns, 0);
  uint32_t none[] = {DEPLOYMENTS, UINT32_MAX};
  fshm_deployment_info found[2];
  fshm_deployment_look(s, none, 2, 0, 0, found); /* of places that are none, nothing is known */
  CHECK_EQ(found[0].in_flight + found[1].in_flight + found[0].id + found[1].id, 0);
  CHECK_EQ(found[1].latency_ns, UINT64_MAX);
  fshm_request request;
  CHECK_EQ(fshm_request_begin(s, DEPLOYMENTS, 0, &request), 0);
  CHECK_EQ(fshm_request_end(s, &request), 0);
  fshm_deployment_record(s, DEPLOYMENTS, 1, 1, 1, 0, 0, 0);
  fshm_close(s);
}

/* As many as AdvancedRouter promises to keep: none takes another's place. */
static void test_room_for_many(void) {
  enum { MANY = 200 };
  fshm_segment *s = fresh_segment(10);
  uint64_t ids[MANY];
  int indexes[MANY];
  for (int i = 0; i < MANY; i++) {
    ids[i] = random_u64() | 1;
    indexes[i] = fshm_deployment_open(s, ids[i], 1000 + (uint64_t)i);
  }
  for (int i = 0; i < MANY; i++) CHECK_EQ(s->deployments[indexes[i]].id, ids[i]);
  fshm_close(s);
}

static void open_and_record(int i, void *with) {
  fshm_segment *s = open_shared();
  meet(with, PARTIES, 1);
  for (int n = 0; n < RECORDS; n++) {
    char name[16];
    (void)snprintf(name, sizeof name, "d%d", n % 16);
    fshm_deployment_record(s, index_of_name(s, name), 640 * (uint64_t)(i + 1), n % 32 < 16, 1000,
                           UINT32_MAX, SECOND, 0);
  }
  fshm_close(s);
}

static void test_records_of_processes(fshm_segment *s) {
  run_children(PARTIES, open_and_record, shared_memory(sizeof(_Atomic uint64_t)));
  for (int i = 0; i < 16; i++) {
    char name[16];
    (void)snprintf(name, sizeof name, "d%d", i);
    fshm_deployment_info info = known_of(s, index_of_name(s, name));
    CHECK_EQ(info.records, PARTIES * RECORDS / 16);
    CHECK(info.latency_ns >= 640 && info.latency_ns <= 640 * PARTIES);
    CHECK_EQ(info.cost, 1000);
    CHECK(info.success_rate > 0 && info.success_rate < 1);
    CHECK_EQ(info.cooldown_ns, 0);
  }
}

static void test_cooldown(fshm_segment *s) {
  uint32_t index = index_of_name(s, "cooling");
  uint64_t now = fshm_now(s) / (60 * SECOND) * (60 * SECOND) + SECOND; /* not at a minute's end */
  fshm_deployment_info info;
  for (int i = 1; i <= 4; i++) {
    fshm_deployment_look(s, &index, 1, now, 0, &info);
    CHECK_EQ(info.cooldown_ns, 0);
    fshm_deployment_record(s, index, UINT64_MAX, 0, UINT64_MAX, 3, 5 * SECOND, now);
  }
  fshm_deployment_look(s, &index, 1, now, 0, &info);
  CHECK_EQ(info.cooldown_ns, 5 * SECOND);
  CHECK_EQ(info.latency_ns, UINT64_MAX);
  CHECK(info.success_rate == 0);
  fshm_deployment_look(s, &index, 1, now + 5 * SECOND, 0, &info);
  CHECK_EQ(info.cooldown_ns, 0);
  fshm_deployment_record(s, index, UINT64_MAX, 0, UINT64_MAX, 3, 0, now + 6 * SECOND);
  fshm_deployment_look(s, &index, 1, now + 6 * SECOND, 0, &info);
  CHECK_EQ(info.cooldown_ns, 0); /* 0 = never */
  fshm_deployment_record(s, index, UINT64_MAX, 0, UINT64_MAX, 3, SECOND, now + 60 * SECOND);
  fshm_deployment_look(s, &index, 1, now + 60 * SECOND, 0, &info);
  CHECK_EQ(info.cooldown_ns, 0); /* the first of another minute */
  fshm_deployment_record(s, index, UINT64_MAX, 0, UINT64_MAX, 0, UINT64_MAX, now + 61 * SECOND);
  fshm_deployment_look(s, &index, 1, now + 61 * SECOND, 0, &info);
  CHECK_OP(info.cooldown_ns, >, SECOND); /* no overflow */
}

/* in flight ------------------------------------------------------------------------------------ */

static _Noreturn void hold(int i, void *with) {
  fshm_segment *s = open_shared();
  fshm_request request;
  for (int n = 0; n <= i; n++)
    CHECK_EQ(fshm_request_begin(s, index_of_name(s, "held"), 0, &request), 1);
  atomic_fetch_add((_Atomic uint64_t *)with, 1);
  for (;;) (void)pause();
}

static void test_death(fshm_segment *s) {
  _Atomic uint64_t *ready = shared_memory(sizeof *ready);
  uint32_t index = index_of_name(s, "held");
  pid_t pids[PARTIES];
  for (int i = 0; i < PARTIES; i++) pids[i] = start_child(hold, i, ready);
  while (atomic_load(ready) < PARTIES) sched_yield();
  CHECK_EQ(known_of(s, index).in_flight, 1 + 2 + 3 + 4);
  uint64_t left = 10;
  for (int i = 0; i < PARTIES; i++) {
    (void)kill(pids[i], SIGKILL);
    (void)waitpid(pids[i], NULL, 0);
    left -= (uint64_t)i + 1;
    CHECK_EQ(known_of(s, index).in_flight, left);
  }
  /* A router makes a liveness check by itself, half a second after the last one. */
  pids[0] = start_child(hold, 0, ready);
  while (atomic_load(ready) < PARTIES + 1) sched_yield();
  fshm_deployment_info info;
  const double none[1] = {0};
  uint64_t now = fshm_now(s);
  fshm_deployment_look(s, &index, 1, now + LIVENESS_NS, 0, &info);
  CHECK_EQ(info.in_flight, 1);
  (void)kill(pids[0], SIGKILL);
  (void)waitpid(pids[0], NULL, 0);
  fshm_deployment_look(s, &index, 1, now + 2 * LIVENESS_NS, 0, &info);
  CHECK_EQ(info.in_flight, 0);
  CHECK_EQ(fshm_deployment_pick(s, FSHM_ROUTE_LEAST_BUSY, &index, none, none, NULL, 1, 1, &info),
           0);
}

/* As long as there are slots, and longer: what an earlier owner of a slot left does not count. */
static void leave_one(int i, void *with) {
  fshm_segment *s = open_shared();
  fshm_request request;
  uint32_t index = index_of_name(s, "left");
  (void)i, (void)with;
  CHECK_EQ(fshm_request_begin(s, index, 0, &request), 1);
  CHECK_EQ(known_of(s, index).in_flight, 1);
}

static void test_indexes_used_again(void) {
  for (int i = 0; i < PROCESSES + 40; i++) run_children(1, leave_one, NULL);
}

/* A slot's next owner cannot end what the one before it began, though the slot is the same. */
static void test_another_incarnation(fshm_segment *s) {
  uint32_t index = index_of_name(s, "incarnation");
  fshm_request request;
  CHECK_EQ(fshm_request_begin(s, index, 0, &request), 1);
  fshm_request older = request, elsewhere = request;
  older.incarnation--;
  elsewhere.owner = request.owner % PROCESSES + 1;
  CHECK_EQ(fshm_request_end(s, &older), 0);
  CHECK_EQ(fshm_request_end(s, &elsewhere), 0);
  CHECK_EQ(known_of(s, index).in_flight, 1);
  CHECK_EQ(fshm_request_end(s, &request), 1);
}

static fshm_request parents;
static void end_parents(int i, void *with) {
  (void)i;
  fshm_segment *s = with;
  fshm_request mine, copy = parents;
  uint32_t index = index_of_name(s, "forked");
  CHECK_EQ(fshm_request_end(s, &copy), 0); /* the parent's is not the child's to end */
  CHECK_EQ(known_of(s, index).in_flight, 1);
  CHECK_EQ(fshm_request_begin(s, index, 0, &mine), 1);
  CHECK_EQ(known_of(s, index).in_flight, 2);
  CHECK_EQ(fshm_request_end(s, &mine), 1);
  CHECK_EQ(fshm_request_end(s, &mine), 0);
  CHECK_EQ(known_of(s, index).in_flight, 1);
}

static void test_fork(fshm_segment *s) {
  uint32_t index = index_of_name(s, "forked");
  CHECK_EQ(fshm_request_begin(s, index, 0, &parents), 1);
  end_child(start_child(end_parents, 0, s));
  CHECK_EQ(known_of(s, index).in_flight, 1);
  CHECK_EQ(fshm_request_end(s, &parents), 1);
  CHECK_EQ(known_of(s, index).in_flight, 0);
}

static void churn(int i, void *with) {
  fshm_segment *s = open_shared();
  uint32_t index = index_of_name(s, "churn");
  (void)with;
  for (int n = 0; n < 20 + i; n++) {
    fshm_request requests[8];
    for (int f = 0; f < 8; f++) CHECK_EQ(fshm_request_begin(s, index, 0, &requests[f]), 1);
    for (int f = 0; f < (n % 5 ? 8 : 7); f++) CHECK_EQ(fshm_request_end(s, &requests[f]), 1);
  }
  /* ends without ending all: what is left vanishes with the process */
}

/* Slots are used again, by other incarnations: nothing of an earlier owner counts. */
static void test_reuse(fshm_segment *s) {
  uint32_t index = index_of_name(s, "churn");
  for (int round = 0; round < 5; round++) {
    run_children(60, churn, NULL);
    CHECK_EQ(known_of(s, index).in_flight, 0);
  }
}

/* A reader, who may not write what it found, counts no dead process either. */
static void test_reader(void) {
  fshm_segment *reader;
  fshm_error e;
  _Atomic uint64_t *ready = shared_memory(sizeof *ready);
  fshm_segment *s = fresh_segment(10);
  const char *before = shared_name;
  shared_name = segment_names[segments_made - 1];
  uint32_t index = index_of_name(s, "held");
  fshm_close(s);
  CHECK_EQ(fshm_open(shared_name, 0, 0600, FSHM_OPEN_READ_ONLY, &reader, &e), FSHM_OK);
  pid_t pid = start_child(hold, 2, ready);
  while (!atomic_load(ready)) sched_yield();
  CHECK_EQ(known_of(reader, index).in_flight, 3);
  (void)kill(pid, SIGKILL);
  (void)waitpid(pid, NULL, 0);
  CHECK_EQ(known_of(reader, index).in_flight, 0);
  CHECK_EQ(fshm_deployment_open(reader, 12345, 0), FSHM_E_NOT_FOUND);
  fshm_close(reader);
  shared_name = before;
}

static void test_hostile(void) {
  fshm_segment *s = fresh_segment(10);
  uint32_t indexes[16];
  double weights[16], prices[16];
  fshm_deployment_info found[16];
  fshm_request request;
  for (int n = 0; n < fewer(500); n++) {
    unsigned char *bytes = (unsigned char *)s->deployments;
    for (size_t i = 0; i < DEPLOYMENTS * sizeof(deployment_t); i += 1 + random_below(16))
      bytes[i] = (unsigned char)random_u64();
    bytes = (unsigned char *)s->requests;
    for (size_t i = 0; i < PROCESSES * sizeof(requests_t); i += 1 + random_below(512))
      bytes[i] = (unsigned char)random_u64();
    for (unsigned i = 0; i < PROCESSES / 64; i++) s->header->joined[i] = random_u64();
    s->header->joined_blocks = random_u64();
    for (int i = 0; i < 16; i++) {
      indexes[i] = random_below(4) ? (uint32_t)random_below(DEPLOYMENTS) : (uint32_t)random_u64();
      weights[i] = (double)random_below(3);
      prices[i] = (double)random_below(3) - 1;
    }
    for (uint32_t strategy = 0; strategy < 4; strategy++) {
      int64_t at = fshm_deployment_pick(s, strategy, indexes, weights, prices, NULL, 16,
                                        random_u64(), found);
      CHECK(at >= -1 && at < 16);
    }
    int index = fshm_deployment_open(s, random_u64() | 1, random_u64());
    CHECK(index == FSHM_FULL || (index >= 0 && index < DEPLOYMENTS));
    request = (fshm_request){random_u64(), (uint32_t)random_u64(), (uint32_t)random_u64()};
    (void)fshm_request_end(s, &request);
    fshm_deployment_record(s, indexes[0], random_u64(), n % 2, random_u64(), 1, random_u64(), 0);
  }
  fshm_close(s);
}

int main(void) {
  fshm_segment *s = fresh_segment(10);
  shared_name = segment_names[0];
  test_means();
  test_shuffle();
  test_least_busy();
  test_latency();
  test_cost();
  test_places();
  test_room_for_many();
  test_records_of_processes(s);
  test_cooldown(s);
  test_death(s);
  test_fork(s);
  test_indexes_used_again();
  test_another_incarnation(s);
  test_reuse(s);
  test_reader();
  test_hostile();
  fshm_close(s);
  return done();
}
