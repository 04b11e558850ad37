/* test_wait_queue.c - the queue of callers that wait: its order, who may try, wake-ups over processes, and what is left
 * of callers that were killed, stopped, or went away. */
#include "../../csrc/unity.c"

#include "check.h"

#define SECOND UINT64_C(1000000000)
#define NOW (3000 * SECOND)
#define KEY "k", 1

static fshm_limiter *permit_limiter(fshm_segment *s, uint64_t n) {
  const fshm_limit l = {n, 0, 0, FSHM_PERMITS, 0};
  return fresh_limiter(s, "permits", &l, 1);
}

static fshm_place join(fshm_limiter *l, uint64_t tenant, int32_t priority, uint64_t now) {
  const fshm_waiter w = {.tenant = tenant, .priority = priority, .fd = -1};
  fshm_place p;
  CHECK_EQ(fshm_wait_join(l, KEY, &w, now, &p), 1);
  return p;
}

static int turn(fshm_limiter *l, fshm_place *p, uint64_t now) {
  fshm_turn t;
  int first = fshm_wait_turn(l, p, now, &t);
  CHECK_OP(t.ahead, <, t.callers);
  CHECK_EQ(first, t.ahead == 0);
  return first;
}

static void test_order(void) {
  for (int i = 0; i < 200000; i++) {
    waiting_t w[3];
    uint64_t now = NOW + random_below(100 * SECOND);
    for (uint64_t k = 0; k < 3; k++)
      w[k] = (waiting_t){.since = NOW + random_below(3) * 20 * SECOND,
                         .tenant = random_below(3),
                         .id = k + 1,
                         .priority = (int32_t)random_below(5) - 2};
    uint64_t base = random_below(SERVICE_MASK + 1); /* also where it comes round */
    uint64_t of[3] = {base, (base + random_below(3)) & SERVICE_MASK, (base + 9) & SERVICE_MASK};
    for (int k = 0; k < 3; k++) w[k].service = of[w[k].tenant];
    for (int k = 0; k < 3; k++) CHECK(!is_before(&w[k], &w[k], now));
    CHECK(is_before(&w[0], &w[1], now) != is_before(&w[1], &w[0], now));
    if (is_before(&w[0], &w[1], now) && is_before(&w[1], &w[2], now))
      CHECK(is_before(&w[0], &w[2], now));
  }
  waiting_t low = {.since = NOW, .id = 1, .priority = -100}, high = {.id = 2, .priority = 100};
  for (uint64_t waited = 0; waited < 300; waited += 10) { /* no band waits for ever */
    high.since = NOW + waited * SECOND;
    CHECK_EQ(is_before(&low, &high, high.since + 5 * SECOND), waited * SECOND / AGE_NS > 200);
  }
  low.since -= 201 * AGE_NS;
  CHECK(is_before(&low, &high, NOW + 300 * SECOND));
}

/* Random histories of a queue, against a reference that sorts: by band, service, arrival. */
typedef struct {
  fshm_place place;
  uint64_t since, tenant;
  int32_t priority;
  bool waits;
} listed_t;
static uint64_t reference_service[4], reference_last;
static bool reference_before(const listed_t *a, const listed_t *b, uint64_t now) {
  uint64_t band_a = 1000 + (uint64_t)a->priority + (now - a->since) / AGE_NS;
  uint64_t band_b = 1000 + (uint64_t)b->priority + (now - b->since) / AGE_NS;
  if (band_a != band_b) return band_a > band_b;
  uint64_t of_a = reference_service[a->tenant], of_b = reference_service[b->tenant];
  if (of_a < reference_last) of_a = reference_last;
  if (of_b < reference_last) of_b = reference_last;
  return of_a != of_b ? of_a < of_b : a->since < b->since;
}
static void test_histories(void) {
  for (int round = 0; round < fewer(100); round++) {
    fshm_segment *s = fresh_segment(1000);
    fshm_limiter *l = permit_limiter(s, 1);
    enum { MOST = 8 };
    listed_t callers[MOST] = {0};
    uint64_t now = NOW / 2;
    memset(reference_service, 0, sizeof reference_service);
    reference_last = 0;
    for (int step = 0; step < 200; step++) {
      listed_t *c = &callers[random_below(MOST)];
      now += 1 + random_below(SECOND / 5);
      if (!c->waits) {
        *c = (listed_t){.since = now,
                        .tenant = 1 + random_below(3),
                        .priority = (int32_t)random_below(3) - 1,
                        .waits = true};
        c->place = join(l, c->tenant, c->priority, now);
      } else if (!random_below(4)) {
        fshm_wait_leave(l, &c->place);
        c->waits = false;
      }
      listed_t *first = NULL, *said = NULL;
      fshm_turn t;
      for (int i = 0; i < MOST; i++) /* all beat: none is late */
        if (callers[i].waits) (void)fshm_wait_turn(l, &callers[i].place, now, &t);
      for (int i = 0; i < MOST; i++) {
        listed_t *k = &callers[i];
        if (!k->waits) continue;
        if (!first || reference_before(k, first, now)) first = k;
        if (!turn(l, &k->place, now)) continue;
        CHECK(!said); /* one is first */
        said = k;
      }
      CHECK(first == said);
      if (!first || random_below(2)) continue;
      uint64_t cost = 1 + random_below(100), *service = &reference_service[first->tenant];
      bool lone = !first->place.tenant && !first->place.shared;
      CHECK(!lone);
      if (*service < reference_last) *service = reference_last;
      reference_last = *service ? *service : 1; /* 0 is "never seen" */
      *service += cost * SERVICE_UNIT;
      fshm_wait_served(l, &first->place, cost, now);
      fshm_wait_leave(l, &first->place);
      first->waits = false;
    }
    for (int i = 0; i < MOST; i++) fshm_wait_leave(l, &callers[i].place);
    fshm_limiter_close(l);
    fshm_close(s);
    remove_segments();
    segments_made = 0;
  }
}

static void test_first_come(void) {
  fshm_segment *s = fresh_segment(1000);
  fshm_limiter *l = permit_limiter(s, 1);
  fshm_place a = join(l, 0, 0, NOW), b = join(l, 0, 0, NOW + 1), c = join(l, 0, 1, NOW + 2);
  CHECK_EQ(turn(l, &a, NOW + 3), 0);
  CHECK_EQ(turn(l, &b, NOW + 3), 0);
  CHECK_EQ(turn(l, &c, NOW + 3), 1); /* the higher priority */
  fshm_turn t;
  CHECK_EQ(fshm_wait_turn(l, &b, NOW + 3, &t), 0);
  CHECK_EQ(t.ahead, 2);
  CHECK_EQ(t.callers, 3);
  fshm_wait_leave(l, &c);
  fshm_wait_leave(l, &c); /* once more is harmless */
  CHECK_EQ(turn(l, &a, NOW + 4), 1);
  CHECK_EQ(turn(l, &b, NOW + 4), 0);
  fshm_wait_leave(l, &a);
  CHECK_EQ(turn(l, &b, NOW + 5), 1);
  fshm_wait_leave(l, &b);
  const fshm_waiter other = {.fd = -1};
  fshm_place x, y;
  CHECK_EQ(fshm_wait_join(l, "x", 1, &other, NOW, &x), 1); /* another key is no concern of ours */
  CHECK_EQ(fshm_wait_join(l, "y", 1, &other, NOW, &y), 1);
  CHECK_EQ(fshm_wait_turn(l, &x, NOW, &t) + fshm_wait_turn(l, &y, NOW, &t), 2);
  fshm_wait_leave(l, &x);
  fshm_wait_leave(l, &y);
  uint64_t used = 0;
  fshm_wait_wake(l, KEY);
  fshm_wait_wake(l, "x", 1);
  fshm_wait_wake(l, "y", 1);
  for (uint32_t g = 0; g < WAIT_GROUPS; g++) used += REACH(s->header->queues[g]);
  CHECK_EQ(used, 0); /* a release has nothing to look at again */
  fshm_limiter_close(l);
  fshm_close(s);
}

static void test_late(void) {
  fshm_segment *s = fresh_segment(1000);
  fshm_limiter *l = permit_limiter(s, 1);
  fshm_place a = join(l, 0, 0, NOW), b = join(l, 0, 0, NOW + 1), c;
  CHECK_EQ(turn(l, &b, NOW + LATE_NS), 0);
  CHECK_EQ(turn(l, &b, NOW + LATE_NS + 1), 1); /* a is stopped, or dead */
  CHECK_EQ(turn(l, &a, NOW + LATE_NS + 2), 1); /* and goes on: it came first */
  CHECK_EQ(turn(l, &b, NOW + LATE_NS + 3), 0);
  uint64_t later = NOW + LATE_NS + 2 + ABANDONED_NS;
  CHECK_EQ(turn(l, &b, later), 1);
  CHECK(a.owner == load_relaxed(&s->waiters[a.entry].owner));
  c = join(l, 0, 0, later + 1);
  CHECK_EQ(c.entry, a.entry); /* its place is taken */
  CHECK_EQ(turn(l, &a, later + 2), 1); /* it gets another, and is first: it came first */
  CHECK_OP(a.entry, !=, c.entry);
  CHECK_EQ(turn(l, &b, later + 3), 0);
  fshm_place lost = a;
  fshm_wait_leave(l, &a);
  fshm_wait_leave(l, &lost); /* the place is no longer its own */
  CHECK_EQ(turn(l, &b, later + 4), 1);
  CHECK_EQ(turn(l, &c, later + 4), 0);
  fshm_wait_leave(l, &b);
  fshm_wait_leave(l, &c);
  fshm_limiter_close(l);
  fshm_close(s);
}

/* Tenants with always something to do, each in one to three places: what they were served, per weight, differs by no
 * more than two of the largest requests. One that was away gets no credit for it. */
static void test_tenants(void) {
  for (int round = 0; round < fewer(60); round++) {
    fshm_segment *s = fresh_segment(1000);
    fshm_limiter *l = permit_limiter(s, 1);
    enum { MOST = 9 };
    fshm_place places[MOST];
    uint64_t owner[MOST], cost[MOST], count = 0, now = NOW, tenants = 2 + random_below(2);
    uint64_t largest = 1 + random_below(2000);
    uint32_t weight[3];
    double served[3] = {0, 0, 0};
    for (uint64_t t = 0; t < tenants; t++) {
      weight[t] = (uint32_t)(500 * (1 + random_below(6)));
      for (uint64_t k = 1 + random_below(3); k--; count++) {
        const fshm_waiter w = {.tenant = t + 1, .weight = weight[t], .fd = -1};
        CHECK_EQ(fshm_wait_join(l, KEY, &w, now, &places[count]), 1);
        owner[count] = t;
        cost[count] = 1 + random_below(largest);
      }
    }
    uint64_t from = random_below(300), alone = 200 + random_below(200);
    for (uint64_t i = 0; i < 2000; i++) {
      now += SECOND / 1000;
      bool away = i >= from && i < from + alone; /* the first tenant alone */
      if (i == from + alone) memset(served, 0, sizeof served);
      if (i == from || i == from + alone)
        for (uint64_t k = 0; k < count; k++) {
          if (!owner[k]) continue;
          const fshm_waiter w = {.tenant = owner[k] + 1, .weight = weight[owner[k]], .fd = -1};
          if (i == from) fshm_wait_leave(l, &places[k]);
          if (i != from) CHECK_EQ(fshm_wait_join(l, KEY, &w, now, &places[k]), 1);
        }
      int firsts = 0;
      for (uint64_t k = 0; k < count; k++) {
        if ((away && owner[k]) || !turn(l, &places[k], now) || firsts) continue; /* all beat */
        firsts++;
        fshm_wait_served(l, &places[k], cost[k], now);
        served[owner[k]] += (double)cost[k] * 1000 / weight[owner[k]];
        fshm_wait_requeue(l, &places[k], now, 1, now);
        cost[k] = 1 + random_below(largest);
      }
      CHECK_EQ(firsts, 1); /* one is always next: nothing is left idle */
      for (uint64_t t = 1; t < tenants && !away; t++) {
        double bound =
            2.0 * (double)largest * 1000 / (weight[0] < weight[t] ? weight[0] : weight[t]);
        double differ = served[0] - served[t];
        bound += 1; /* what a division leaves over, of each place */
        CHECK(differ <= bound && -differ <= bound);
      }
    }
    fshm_limiter_close(l);
    fshm_close(s);
    remove_segments();
    segments_made = 0;
  }
}

static void test_full(void) {
  fshm_segment *s = fresh_segment(1000);
  fshm_limiter *l = permit_limiter(s, 1);
  const fshm_waiter w = {.fd = -1};
  fshm_place *p = calloc(WAITERS + 1, sizeof *p);
  fshm_turn t;
  for (uint32_t i = 0; i < WAITERS; i++) CHECK_EQ(fshm_wait_join(l, KEY, &w, NOW + i, &p[i]), 1);
  CHECK_EQ(fshm_wait_join(l, KEY, &w, NOW, &p[WAITERS]), 0);
  CHECK_EQ(fshm_wait_turn(l, &p[WAITERS], NOW, &t), 1); /* by no order, but it may try */
  CHECK_EQ(fshm_wait_sleep(l, &p[WAITERS], t.armed, 1000), 0);
  fshm_waiting(l, KEY, NULL, NOW, &t);
  CHECK_EQ(t.callers, WAITERS);
  fshm_wait_leave(l, &p[77]);
  CHECK_EQ(fshm_wait_turn(l, &p[WAITERS], NOW + WAITERS, &t), 0); /* there is a place for it now */
  for (uint32_t i = 0; i <= WAITERS; i++) fshm_wait_leave(l, &p[i]);
  fshm_waiting(l, KEY, NULL, NOW, &t);
  CHECK_EQ(t.callers, 0);
  free(p);
  fshm_limiter_close(l);
  fshm_close(s);
}

typedef struct {
  fshm_segment *s;
  fshm_limiter *l;
  uint32_t permits;
  _Atomic int held, most;
  _Atomic uint64_t served[64];
  _Atomic int stop;
} crowd_t;

/* A blocking call, as the library makes it. False: the time is up. */
static bool take(fshm_limiter *l, fshm_permit *permit, uint64_t ns) {
  const fshm_waiter w = {.fd = -1};
  uint64_t end = fshm_clock() + ns;
  fshm_place p;
  fshm_turn t;
  bool got = false;
  (void)fshm_wait_join(l, KEY, &w, 0, &p);
  while (!got) {
    fshm_decision d;
    uint32_t in_flight;
    if (fshm_wait_turn(l, &p, 0, &t)) {
      fshm_admit(l, KEY, NULL, 0, permit, &d, &in_flight);
      if ((got = d.status == FSHM_ALLOWED)) break;
    }
    uint64_t now = fshm_clock();
    if (now >= end) break;
    (void)fshm_wait_sleep(l, &p, t.armed, end - now);
  }
  fshm_wait_leave(l, &p);
  return got;
}

static void crowd_member(int i, void *with) {
  crowd_t *c = with;
  fshm_permit permit;
  while (!atomic_load(&c->stop)) {
    if (!take(c->l, &permit, 20 * SECOND)) {
      failed++;
      return;
    }
    int held = atomic_fetch_add(&c->held, 1) + 1;
    if (held > (int)c->permits) failed++;
    if (random_below(4) == 0) sched_yield();
    atomic_fetch_sub(&c->held, 1);
    atomic_fetch_add(&c->served[i], 1);
    fshm_permit_release(c->l, &permit);
  }
}

static void test_crowd(void) {
  crowd_t *c = shared_memory(sizeof *c);
  c->s = fresh_segment(1000);
  c->permits = 2;
  c->l = permit_limiter(c->s, c->permits);
  pid_t pids[8];
  for (int i = 0; i < 8; i++) pids[i] = start_child(crowd_member, i, c);
  uint64_t least = 0;
  for (int tries = 0; least < 200 && tries < 20000; tries++) { /* all of them are served */
    (void)usleep(2000);
    least = UINT64_MAX;
    for (int i = 0; i < 8; i++) least = min_u64(least, atomic_load(&c->served[i]));
  }
  CHECK_OP(least, >=, 200);
  atomic_store(&c->stop, 1);
  for (int i = 0; i < 8; i++) end_child(pids[i]);
  CHECK_EQ(fshm_in_flight(c->l, KEY), 0);
  fshm_limiter_close(c->l);
  fshm_close(c->s);
}

static void waits_for_ever(int i, void *with) {
  crowd_t *c = with;
  fshm_permit permit;
  (void)i;
  atomic_fetch_add(&c->held, 1);
  (void)take(c->l, &permit, 600 * SECOND);
}

/* Three processes wait again and again, one of them is killed and comes anew; each is served in the order of its arrival.
 * A caller arrives when it has its place: its number is taken at the join. The permit is held while the order is checked. */
typedef struct {
  crowd_t crowd;
  _Atomic uint64_t since[4]; /* of each that waits: its arrival; 0 = it does not */
  _Atomic uint64_t wrong, turns;
} ordered_t;
static void ordered_member(int i, void *with) {
  ordered_t *o = with;
  fshm_limiter *l = o->crowd.l;
  const fshm_waiter w = {.fd = -1};
  while (!atomic_load(&o->crowd.stop)) {
    fshm_permit permit = {0};
    fshm_place p;
    fshm_turn t;
    fshm_decision d;
    uint32_t in_flight;
    uint64_t before[4];
    for (int k = 0; k < 4; k++) before[k] = atomic_load(&o->since[k]);
    (void)fshm_wait_join(l, KEY, &w, 0, &p);
    atomic_store(&o->since[i], p.since);
    while (!permit.held) {
      if (fshm_wait_turn(l, &p, 0, &t)) fshm_admit(l, KEY, NULL, 0, &permit, &d, &in_flight);
      if (!permit.held) (void)fshm_wait_sleep(l, &p, t.armed, SECOND);
    }
    /* Who was in the queue before we came is served before us, unless it has not been on a processor for long. */
    for (int k = 0; k < 4; k++)
      if (k != i && before[k] && atomic_load(&o->since[k]) == before[k] &&
          before[k] + LATE_NS / 2 > fshm_now(o->crowd.s))
        atomic_fetch_add(&o->wrong, 1);
    atomic_store(&o->since[i], 0);
    fshm_wait_leave(l, &p);
    atomic_fetch_add(&o->turns, 1);
    if (random_below(2)) (void)usleep(1000);
    fshm_permit_release(l, &permit);
  }
}
static void test_order_of_processes(void) {
  ordered_t *o = shared_memory(sizeof *o);
  o->crowd.s = fresh_segment(1000);
  o->crowd.l = permit_limiter(o->crowd.s, 1);
  pid_t pids[4];
  for (int i = 0; i < 4; i++) pids[i] = start_child(ordered_member, i, o);
  for (int kills = 0; kills < 4; kills++) {
    uint64_t now = atomic_load(&o->turns);
    for (int tries = 0; atomic_load(&o->turns) < now + 50 && tries < 20000; tries++)
      (void)usleep(2000);
    CHECK_OP(atomic_load(&o->turns), >=, now + 50); /* the others go on */
    CHECK_EQ(kill(pids[3], SIGKILL), 0);
    CHECK_EQ(waitpid(pids[3], NULL, 0), pids[3]);
    atomic_store(&o->since[3], 0);
    pids[3] = start_child(ordered_member, 3, o);
  }
  atomic_store(&o->crowd.stop, 1);
  for (int i = 0; i < 4; i++) end_child(pids[i]);
  CHECK_EQ(atomic_load(&o->wrong), 0);
  CHECK_EQ(fshm_in_flight(o->crowd.l, KEY), 0);
  fshm_limiter_close(o->crowd.l);
  fshm_close(o->crowd.s);
}

/* 20 waiters are killed, or stopped; the one behind them is admitted. */
static void test_killed(int number) {
  crowd_t *c = shared_memory(sizeof *c);
  fshm_permit mine, theirs;
  pid_t pids[20];
  fshm_turn t;
  c->s = fresh_segment(1000);
  c->l = permit_limiter(c->s, 1);
  CHECK(take(c->l, &mine, SECOND));
  for (int i = 0; i < 20; i++) pids[i] = start_child(waits_for_ever, i, c);
  do {
    (void)usleep(1000);
    fshm_waiting(c->l, KEY, NULL, 0, &t);
  } while (t.callers < 20);
  for (int i = 0; i < 20; i++) CHECK_EQ(kill(pids[i], number), 0);
  CHECK_EQ(fshm_permit_release(c->l, &mine), 1);
  CHECK(take(c->l, &theirs, 100 * SECOND));
  CHECK_EQ(fshm_permit_release(c->l, &theirs), 1);
  for (int i = 0; i < 20; i++) {
    (void)kill(pids[i], SIGKILL);
    CHECK_EQ(waitpid(pids[i], NULL, 0), pids[i]);
  }
  fshm_limiter_close(c->l);
  fshm_close(c->s);
}

static void *watch(void *with) {
  crowd_t *c = with;
  while (!atomic_load(&c->stop)) fshm_wait_watch(c->s, SECOND / 20);
  return NULL;
}

static void releases(int i, void *with) {
  crowd_t *c = with;
  fshm_permit permit;
  (void)i;
  CHECK(take(c->l, &permit, SECOND));
  atomic_store(&c->held, 1);
  while (!atomic_load(&c->most)) (void)usleep(100);
  CHECK_EQ(fshm_permit_release(c->l, &permit), 1);
}

/* A place that an event loop polls is written to: by a release here, and by one of another process. */
static void test_polled(void) {
  crowd_t *c = shared_memory(sizeof *c);
  c->s = fresh_segment(1000);
  c->l = permit_limiter(c->s, 1);
  int ends[2];
  pthread_t watcher;
  CHECK_EQ(pipe(ends), 0);
  CHECK_EQ(pthread_create(&watcher, NULL, watch, c), 0);
  for (int elsewhere = 0; elsewhere < 2; elsewhere++) {
    const fshm_waiter w = {.fd = ends[1]};
    fshm_permit permit;
    fshm_place p;
    fshm_turn t;
    uint64_t entry = WAITERS;
    pid_t pid = 0;
    if (elsewhere) {
      pid = start_child(releases, 0, c);
      while (!atomic_load(&c->held)) (void)usleep(100);
    } else {
      CHECK(take(c->l, &permit, SECOND));
    }
    CHECK_EQ(fshm_wait_join(c->l, KEY, &w, 0, &p), 1);
    CHECK_EQ(fshm_wait_turn(c->l, &p, 0, &t), 1);
    atomic_store(&c->most, elsewhere);
    if (!elsewhere) CHECK_EQ(fshm_permit_release(c->l, &permit), 1);
    CHECK_EQ(read(ends[0], &entry, sizeof entry), sizeof entry);
    CHECK_EQ(entry, p.entry);
    fshm_wait_leave(c->l, &p);
    if (pid) end_child(pid);
  }
  atomic_store(&c->stop, 1);
  CHECK_EQ(pthread_join(watcher, NULL), 0);
  (void)close(ends[0]);
  (void)close(ends[1]);
  fshm_limiter_close(c->l);
  fshm_close(c->s);
}

/* A pipe that may be closed: nothing is written to it once its place was left, or another has the place, or in a forked
 * child, which has a copy of all. */
typedef struct {
  int ends[2];
  fshm_segment *s;
} piped_t;
static void nothing_is_written(int i, void *with) {
  const piped_t *of = with;
  char text[8];
  struct timespec pause = {0, 2000000};
  fshm_segment *s = of->s;
  (void)i;
  for (uint32_t entry = 0; entry < WAITERS; entry++)
    if (load_relaxed(&s->waiters[entry].owner))
      (void)wake_place(s, &s->waiters[entry], 0, FOR_MORE);
  fshm_wait_watch(s, 1000);
  (void)nanosleep(&pause, NULL);
  CHECK_EQ(read(of->ends[0], text, sizeof text), -1);
}
static void test_closed_pipes(void) {
  piped_t of;
  fshm_segment *s = of.s = fresh_segment(1000);
  fshm_limiter *l = permit_limiter(s, 1);
  char text[8];
  fshm_place a, b;
  fshm_turn t;
  CHECK_EQ(pipe(of.ends), 0);
  (void)fcntl(of.ends[0], F_SETFL, O_NONBLOCK);
  const fshm_waiter polled = {.fd = of.ends[1]}, thread = {.fd = -1};
  CHECK_EQ(fshm_wait_join(l, KEY, &polled, 0, &a), 1);
  end_child(
      start_child(nothing_is_written, 0, &of)); /* it has woken us, and not through its copy */
  fshm_wait_watch(s, 1000);
  CHECK_EQ(read(of.ends[0], text, sizeof text), 8);
  store_relaxed(&s->waiters[a.entry].seen, UINT64_MAX); /* as if abandoned; and b takes the place */
  CHECK_EQ(fshm_wait_join(l, KEY, &thread, 0, &b), 1);
  CHECK_EQ(b.entry, a.entry);
  (void)fshm_wait_turn(l, &a, 0, &t); /* a has another */
  CHECK_OP(b.entry, !=, a.entry);
  fshm_wait_leave(l, &a);
  while (read(of.ends[0], text, sizeof text) > 0) continue;
  nothing_is_written(0, &of);
  fshm_wait_leave(l, &b);
  nothing_is_written(0, &of);
  (void)close(of.ends[0]);
  (void)close(of.ends[1]);
  fshm_limiter_close(l);
  fshm_close(s);
}

/* After a fork the place is the parent's; the child takes one of its own. */
typedef struct {
  fshm_place p;
  fshm_limiter *l;
} forked_t;
static void turn_as_child(int i, void *with) {
  const forked_t *of = with;
  fshm_limiter *l = of->l;
  fshm_place p = of->p;
  fshm_turn t;
  (void)i;
  CHECK_EQ(fshm_wait_turn(l, &p, 0, &t), 0); /* the parent came first, by its number */
  CHECK_OP(p.entry, !=, of->p.entry);
  CHECK_EQ(t.callers, 2);
  fshm_wait_leave(l, &p);
}
static void test_fork(void) {
  forked_t of;
  fshm_segment *s = fresh_segment(1000);
  fshm_limiter *l = of.l = permit_limiter(s, 1);
  of.p = join(l, 0, 0, 0);
  end_child(start_child(turn_as_child, 0, &of));
  CHECK_EQ(turn(l, &of.p, 0), 1);
  fshm_wait_leave(l, &of.p);
  fshm_limiter_close(l);
  fshm_close(s);
}

/* A handle for reading goes by no order, and writes nothing. */
static void test_read_only(void) {
  fshm_segment *s = fresh_segment(1000), *reader;
  fshm_limiter *l = permit_limiter(s, 1), *r;
  fshm_place mine = join(l, 0, 0, 0), p;
  fshm_turn t;
  fshm_error e;
  fshm_waiter_info info;
  const fshm_waiter w = {.tenant = 5, .fd = -1};
  char name[FSHM_MAX_NAME + 1];
  (void)snprintf(name, sizeof name, "%s", strchr(strchr(s->path, '.') + 1, '.') + 1);
  s->dev = ~s->dev; /* else the open one is shared, which may be written to */
  CHECK_EQ(fshm_open(name, 0, 0, FSHM_OPEN_READ_ONLY, &reader, &e), FSHM_OK);
  s->dev = ~s->dev;
  CHECK(reader != s);
  CHECK_EQ(fshm_limiter_find(reader, "permits", 7, &r), FSHM_E_READ_ONLY);
  fshm_limiter as_read = *l;
  as_read.segment = reader;
  r = &as_read;
  CHECK_EQ(fshm_wait_join(r, KEY, &w, 0, &p), 0);
  CHECK_EQ(fshm_wait_turn(r, &p, 0, &t), 1);
  CHECK_EQ(fshm_wait_sleep(r, &p, t.armed, 1000), 0);
  fshm_wait_served(r, &p, 10, 0);
  fshm_wait_correct(r, &p, 10, 0);
  fshm_wait_requeue(r, &p, 0, 1, 0);
  fshm_wait_wake(r, KEY);
  fshm_wait_watch(reader, 1000);
  store_relaxed(&s->waiters[mine.entry].seen, UINT64_MAX); /* a place that others would free */
  CHECK_EQ(fshm_wait_next(r, KEY), FSHM_NEXT_NONE);
  CHECK_EQ(fshm_wait_asked(r, KEY), 0);
  CHECK_EQ(fshm_wait_turn(l, &mine, 0, &t), 1);
  fshm_wait_leave(r, &p);
  CHECK_EQ(fshm_is_waited_for(r, KEY), 1);
  fshm_waiting(r, KEY, NULL, 0, &t);
  CHECK_EQ(t.callers, 1);
  CHECK_EQ(fshm_waiter_at(reader, mine.entry, &info), 1);
  CHECK_EQ(info.pid, (uint32_t)getpid());
  fshm_wait_leave(l, &mine);
  fshm_close(reader);
  fshm_limiter_close(l);
  fshm_close(s);
}

/* Words that no caller writes: nobody waits for ever for a place that is of nobody, and what a caller needs of its own
 * place is made good at its next turn. */
static void test_damaged(void) {
  fshm_segment *s = fresh_segment(1000);
  fshm_limiter *l = permit_limiter(s, 1);
  fshm_place a = join(l, 0, 0, NOW), b = join(l, 0, 0, NOW + 1);
  waiter_t *of_a = &s->waiters[a.entry], *of_b = &s->waiters[b.entry];
  store_relaxed(&of_a->seen, UINT64_MAX);
  CHECK_EQ(turn(l, &b, NOW + 2), 1);
  store_relaxed(&of_a->seen, NOW + 3 * SECOND);
  CHECK_EQ(turn(l, &b, NOW + 2), 1);
  CHECK_EQ(turn(l, &a, NOW + 2), 1);
  CHECK_EQ(turn(l, &b, NOW + 2), 0);
  store_relaxed(&s->header->queues[wait_group(a.key)], 0);
  CHECK_EQ(turn(l, &a, NOW + 3), 1);
  CHECK_EQ(turn(l, &b, NOW + 3), 0);
  CHECK_EQ(REACH(s->header->queues[wait_group(a.key)]), 2);
  store_relaxed(&of_b->published, 77);
  CHECK_EQ(turn(l, &b, NOW + 3), 0);
  CHECK_EQ(load_relaxed(&s->waiters[b.entry].published), b.owner);
  store_relaxed(&of_b->key, 78);
  CHECK_EQ(turn(l, &b, NOW + 3), 0);
  for (int which = 0; which < 4; which++) { /* what says how b is woken, and in which order */
    of_b = &s->waiters[b.entry];
    if (which == 0) store_relaxed(&of_b->process, 77);
    if (which == 1) store_relaxed(&of_b->polled, 1);
    if (which == 2) store_relaxed(&of_b->tenant, 77);
    if (which == 3) store_relaxed(&of_b->priority, 77);
    CHECK_EQ(turn(l, &b, NOW + 3), 0);
    of_b = &s->waiters[b.entry];
    CHECK_EQ(load_relaxed(&of_b->owner), b.owner);
    CHECK_EQ(load_relaxed(&of_b->process), process_index(s) + 1);
    CHECK_EQ(load_relaxed(&of_b->polled), 0);
    CHECK_EQ(load_relaxed(&of_b->tenant), 0);
    CHECK_EQ(load_relaxed(&of_b->priority), 0);
  }
  fshm_turn t;
  fshm_waiting(l, KEY, NULL, NOW + 3, &t);
  CHECK_EQ(t.callers, 2);
  fshm_wait_leave(l, &a);
  fshm_wait_leave(l, &b);
  for (uint32_t i = 0; i < WAITERS; i++) store_relaxed(&s->waiters[i].owner, i + 1);
  for (uint32_t i = 0; i < WAITERS; i++) store_relaxed(&s->waiters[i].seen, UINT64_MAX - i);
  a = join(l, 0, 0, NOW); /* a table of places that are of nobody has room */
  CHECK_EQ(turn(l, &a, NOW), 1);
  fshm_wait_leave(l, &a);
  fshm_limiter_close(l);
  fshm_close(s);
}

/* The order changes while all sleep: the one that was first wakes the one that is first now. */
static void test_order_changes(void) {
  fshm_segment *s = fresh_segment(1000);
  fshm_limiter *l = permit_limiter(s, 1);
  uint64_t now = fshm_now(s);
  fshm_place a = join(l, 0, 0, now), b = join(l, 0, 0, now + 1);
  fshm_turn t;
  CHECK_EQ(turn(l, &a, 0), 1);
  CHECK_EQ(fshm_wait_turn(l, &b, 0, &t), 0);
  store_relaxed(&s->waiters[b.entry].priority, 1); /* as if it had waited for longer */
  CHECK_EQ(turn(l, &a, 0), 0);
  CHECK_EQ(fshm_wait_sleep(l, &b, t.armed, FSHM_WAIT_BEAT_NS), 1);
  fshm_wait_leave(l, &a);
  fshm_wait_leave(l, &b);
  fshm_limiter_close(l);
  fshm_close(s);
}

/* The table has no room for the service of a tenant: it is not first for ever. */
static void test_no_room_for_service(void) {
  fshm_segment *s = fresh_segment(1);
  fshm_limiter *l = permit_limiter(s, 1);
  fshm_place a = join(l, 1, 0, NOW), b = join(l, 2, 0, NOW + 1);
  (void)turn(l, &a, NOW + 1);
  (void)turn(l, &b, NOW + 1);
  fshm_wait_served(l, &a, 100, NOW + 1); /* takes a slot for it, and one for the last */
  for (uint64_t i = 0; i < s->slot_count; i++) {
    pair_t seen = pair_load(&s->slots[i]), other = {i * 4 + 2, TIME_MAX};
    if (!seen.who) CHECK(pair_cas(&s->slots[i], &seen, other));
  }
  int served[2] = {0, 0};
  for (uint64_t i = 0; i < 100; i++) {
    uint64_t now = NOW + 2 + i;
    bool of_b = turn(l, &b, now);
    CHECK_EQ(turn(l, &a, now), !of_b);
    fshm_place *first = of_b ? &b : &a;
    served[of_b]++;
    fshm_wait_served(l, first, 100, now);
    fshm_wait_requeue(l, first, now, 1, now);
  }
  CHECK_OP(served[0], >=, 30);
  CHECK_OP(served[1], >=, 30);
  fshm_wait_leave(l, &a);
  fshm_wait_leave(l, &b);
  fshm_limiter_close(l);
  fshm_close(s);
}

/* Holds two permits, one of them idle, and gives that one back when it is asked. */
static void keeps_idle(int i, void *with) {
  crowd_t *c = with;
  fshm_permit used, idle;
  (void)i;
  CHECK(take(c->l, &used, SECOND));
  CHECK(take(c->l, &idle, SECOND));
  CHECK_EQ(fshm_permit_idle(c->l, &idle, 1), 1);
  CHECK_EQ(fshm_wait_asked(c->l, KEY), 0);
  CHECK_EQ(fshm_wait_next(c->l, KEY), FSHM_NEXT_NONE);
  atomic_store(&c->held, 1);
  while (!fshm_wait_watch(c->s, SECOND)) continue;
  CHECK_EQ(fshm_wait_asked(c->l, KEY), 1);
  CHECK_EQ(fshm_wait_asked(c->l, KEY), 0); /* one is enough */
  CHECK_EQ(fshm_wait_watch(c->s, SECOND / 100), 0);
  CHECK_EQ(fshm_wait_next(c->l, KEY), FSHM_NEXT_OTHER);
  CHECK_EQ(fshm_permit_release(c->l, &idle), 1);
  while (!atomic_load(&c->stop)) (void)usleep(100);
  CHECK_EQ(fshm_wait_watch(c->s, SECOND / 100), 0); /* it holds no idle one by now */
  atomic_store(&c->held, 2);
  while (!fshm_wait_watch(c->s, SECOND)) continue; /* any of its permits will do */
  CHECK_EQ(fshm_wait_asked(c->l, KEY), 1);
  CHECK_EQ(fshm_permit_release(c->l, &used), 1);
}

/* The caller of the place tries until it has a permit. */
static void take_in(fshm_limiter *l, fshm_place *p, fshm_permit *permit) {
  fshm_turn t;
  fshm_decision d;
  uint32_t held;
  do {
    CHECK_EQ(fshm_wait_turn(l, p, 0, &t), 1);
    fshm_admit(l, KEY, NULL, 0, permit, &d, &held);
  } while (d.status != FSHM_ALLOWED && !usleep(100));
}

/* What another process keeps is given back to a caller that waits, and asks for it. */
static void test_asks(void) {
  crowd_t *c = shared_memory(sizeof *c);
  fshm_permit one, two;
  fshm_turn t;
  c->s = fresh_segment(1000);
  c->l = permit_limiter(c->s, 2);
  pid_t pid = start_child(keeps_idle, 0, c);
  while (atomic_load(&c->held) != 1) (void)usleep(100);
  fshm_place p = join(c->l, 0, 0, 0);
  CHECK_EQ(fshm_wait_turn(c->l, &p, 0, &t), 1);
  fshm_wait_ask(c->l, KEY, 1, &p);
  CHECK_EQ(fshm_wait_asked(c->l, KEY), 0); /* not by another process */
  take_in(c->l, &p, &one);
  CHECK_EQ(fshm_wait_turn(c->l, &p, 0, &t), 1);
  CHECK_EQ(fshm_wait_next(c->l, KEY), FSHM_NEXT_OURS);
  CHECK_EQ(fshm_wait_sleep(c->l, &p, t.armed, SECOND), 1); /* it was woken */
  CHECK_EQ(fshm_wait_turn(c->l, &p, 0, &t), 1);
  fshm_wait_ask(c->l, KEY, 1, &p);
  atomic_store(&c->stop, 1);
  while (atomic_load(&c->held) != 2) (void)usleep(100);
  CHECK_EQ(fshm_wait_turn(c->l, &p, 0, &t), 1);
  fshm_wait_ask(c->l, KEY, 0, &p);
  take_in(c->l, &p, &two);
  fshm_wait_leave(c->l, &p);
  fshm_wait_ask(c->l, KEY, 0, &p); /* without a place: nothing */
  end_child(pid);
  CHECK_EQ(fshm_permit_release(c->l, &one), 1);
  CHECK_EQ(fshm_permit_release(c->l, &two), 1);
  fshm_limiter_close(c->l);
  fshm_close(c->s);
}

/* Waits, and beats, until it is told to stop. */
static void waits_on(int i, void *with) {
  crowd_t *c = with;
  fshm_turn t;
  (void)i;
  fshm_place p = join(c->l, 0, 0, 0);
  while (!atomic_load(&c->stop)) {
    (void)fshm_wait_turn(c->l, &p, 0, &t);
    atomic_store(&c->held, 1);
    (void)usleep(500);
  }
  fshm_wait_leave(c->l, &p);
}

static void test_stays(void) {
  const waiting_t first = {.since = NOW, .tenant = 1, .id = 7};
  waiting_t own = {.since = NOW + STAYS_NS - 1, .tenant = 1, .id = 8};
  CHECK(stays_here(&first, &own));
  own.priority = 1;
  CHECK(!stays_here(&first, &own));
  own.priority = 0, own.tenant = 2;
  CHECK(!stays_here(&first, &own));
  own.tenant = 1, own.since++;
  CHECK(!stays_here(&first, &own));
}

/* Something is idle here, twice. The first of all is in another process, and two callers of this one came a little later:
 * each is woken for one, and wakes nobody else. */
static void test_own_callers(void) {
  crowd_t *c = shared_memory(sizeof *c);
  c->s = fresh_segment(1000);
  c->l = permit_limiter(c->s, 2);
  CHECK_EQ(fshm_wait_first(c->l, KEY), UINT64_MAX);
  pid_t pid = start_child(waits_on, 0, c);
  while (!atomic_load(&c->held)) (void)usleep(100);
  uint64_t came = fshm_wait_first(c->l, KEY);
  CHECK(came != UINT64_MAX);
  CHECK_EQ(fshm_wait_next(c->l, KEY), FSHM_NEXT_OTHER);
  fshm_place own[2];
  fshm_turn t[2];
  for (uint64_t i = 0; i < 2; i++) {
    own[i] = join(c->l, 0, 0, 0);
    fshm_wait_requeue(c->l, &own[i], came + STAYS_NS / 2 + i, 1, 0);
    CHECK_EQ(fshm_wait_turn(c->l, &own[i], 0, &t[i]), 0);
  }
  for (int i = 0; i < 2; i++) {
    CHECK_EQ(fshm_wait_next(c->l, KEY), FSHM_NEXT_OURS);
    CHECK_EQ(fshm_wait_sleep(c->l, &own[i], t[i].armed, SECOND), 1);
  }
  CHECK_EQ(fshm_wait_next(c->l, KEY), FSHM_NEXT_OTHER); /* both are coming */
  for (uint32_t i = 0; i < WAITERS; i++) {
    waiter_t *e = &c->s->waiters[i];
    if (!load_relaxed(&e->owner) || is_here(c->s, e)) continue;
    uint32_t before = load_relaxed(&e->wake);
    for (int k = 0; k < 2; k++) CHECK_EQ(fshm_wait_turn(c->l, &own[k], 0, &t[k]), 0);
    own[0].took = own[1].took = 1;
    fshm_wait_leave(c->l, &own[0]);
    CHECK_EQ(load_relaxed(&e->wake), before);
    fshm_wait_requeue(c->l, &own[1], came + STAYS_NS, 1, 0);
    CHECK_EQ(load_relaxed(&e->wake), before);
  }
  CHECK_EQ(fshm_wait_next(c->l, KEY), FSHM_NEXT_OTHER); /* it came too late */
  atomic_store(&c->stop, 1);
  end_child(pid);
  CHECK_EQ(fshm_wait_next(c->l, KEY), FSHM_NEXT_OURS); /* of all, now */
  fshm_wait_leave(c->l, &own[1]);
  fshm_limiter_close(c->l);
  fshm_close(c->s);
}

/* What inspection sees: keys by their names, or by their hash alone; places that were left, and those of the dead. */
static void test_looked_at(void) {
  fshm_segment *s = fresh_segment(100);
  fshm_limiter *l = permit_limiter(s, 1);
  const fshm_limit ten = {10, 3600 * SECOND, 0, FSHM_WINDOW, 0};
  fshm_limiter *other = fresh_limiter(s, "rates", &ten, 1);
  fshm_waiter_info found[4];
  fshm_permit permit;
  fshm_decision d;
  uint32_t in_flight;
  char name[256];
  uint64_t length;
  CHECK_EQ(fshm_waiters(s, found, 4, 1), 0);
  fshm_admit(l, KEY, NULL, 0, &permit, &d, &in_flight);
  CHECK_EQ(fshm_is_allowed(other, "rated", 5), 1);
  fshm_place of_key = join(l, 7, -5, 0), second, rated, unnamed;
  const fshm_waiter w = {.fd = -1};
  CHECK_EQ(fshm_wait_join(other, "never asked", 11, &w, 0, &unnamed), 1);
  (void)usleep(LATE_NS / 1000 + 1000);
  of_key.callers = 12;
  turn(l, &of_key, 0);
  second = join(l, 8, 0, 0);
  CHECK_EQ(fshm_wait_join(other, "rated", 5, &w, 0, &rated), 1);
  found[2].key_hash = 12345;
  CHECK_EQ(fshm_waiters(s, found, 2, 0), 4); /* no more than there is room for */
  CHECK_EQ(found[2].key_hash, 12345);
  CHECK_EQ(fshm_waiters(s, NULL, 0, 1), 4);
  CHECK_EQ(fshm_waiters(s, found, 4, 1), 4);
  int seen = 0;
  for (int i = 0; i < 4; i++) {
    const fshm_waiter_info *one = &found[i];
    bool named = fshm_key_name(s, one->table_slot, name, sizeof name, &length);
    CHECK_EQ(one->pid, (uint32_t)getpid());
    if (one->limiter == other->index) {
      CHECK_EQ(one->stale, !named); /* it has not called since it came */
      if (named) CHECK(length == 5 && !memcmp(name, "rated", 5));
      seen |= named ? 1 : 2;
      continue;
    }
    CHECK_EQ(one->limiter, l->index);
    CHECK(named && length == 1 && *name == 'k');
    CHECK_EQ(one->stale, 0);
    if (one->tenant == 7) {
      CHECK_EQ(one->callers, 12);
      CHECK_EQ(one->priority, -5);
      CHECK_OP(one->waited_ns, >, LATE_NS);
      seen |= 4;
    } else {
      CHECK_EQ(one->tenant, 8);
      CHECK_EQ(one->callers, 1);
      seen |= 8;
    }
  }
  CHECK_EQ(seen, 15);
  fshm_wait_leave(l, &of_key);
  fshm_wait_leave(l, &second);
  fshm_wait_leave(other, &rated);
  fshm_wait_leave(other, &unnamed);
  CHECK_EQ(fshm_waiters(s, found, 4, 1), 0);
  CHECK_EQ(fshm_permit_release(l, &permit), 1);
  fshm_limiter_close(other);
  fshm_limiter_close(l);
  fshm_close(s);
}

/* Whoever gives back what a caller waits for wakes it: it need not wait for its next look. */
static void test_given_back(void) {
  enum { REFUND, SETTLE, CANCEL, RESET, RESET_ALL, RAISED, WAYS };
  const uint64_t most[] = {10}, none[] = {0};
  for (int way = 0; way < WAYS; way++) {
    fshm_segment *s = fresh_segment(1000);
    const fshm_limit window = {10, 60 * SECOND, 0, FSHM_WINDOW, 0},
                     bucket = {10, 60 * SECOND, 10, FSHM_BUCKET, 0};
    fshm_limiter *l = fresh_limiter(s, "rates", way == CANCEL ? &bucket : &window, 1), *other;
    fshm_charged reserved[FSHM_MAX_LIMITS];
    fshm_decision d;
    fshm_permit permit = {0};
    fshm_turn t;
    fshm_reserve(l, KEY, most, 0, 0, &d, reserved);
    CHECK_EQ(d.status, FSHM_ALLOWED);
    fshm_place p = join(l, 0, 0, 0);
    CHECK_EQ(fshm_wait_turn(l, &p, 0, &t), 1);
    CHECK_EQ(fshm_is_allowed(l, KEY), FSHM_DENIED);
    CHECK_EQ(fshm_settle(l, KEY, most, (const uint64_t[]){11}, &permit, 0), FSHM_ALLOWED);
    CHECK_EQ(fshm_wait_sleep(l, &p, t.armed, 0), 0); /* that took more */
    CHECK_EQ(fshm_settle(l, "other", 5, most, none, &permit, 0), FSHM_ALLOWED);
    CHECK_EQ(fshm_wait_sleep(l, &p, t.armed, 0), 0);
    if (way == CANCEL) fshm_apply(l, FSHM_REFUND, KEY, (const uint64_t[]){1}, 0, 0, &d);
    CHECK_EQ(fshm_wait_turn(l, &p, 0, &t), 1);
    if (way == REFUND) fshm_apply(l, FSHM_REFUND, KEY, most, 0, 0, &d);
    if (way == SETTLE) CHECK_EQ(fshm_settle(l, KEY, most, none, &permit, 0), FSHM_ALLOWED);
    if (way == CANCEL) {
      fshm_reserve(l, KEY, (const uint64_t[]){1}, 100 * SECOND, 0, &d, reserved);
      CHECK_EQ(d.status, FSHM_ALLOWED);
      CHECK_EQ(fshm_cancel(l, KEY, (const uint64_t[]){1}, reserved, 0), 1);
    }
    if (way == RESET) CHECK_EQ(fshm_reset_key(l, KEY), FSHM_OK);
    if (way == RESET_ALL) CHECK_EQ(fshm_reset_all(l), FSHM_OK);
    if (way == RAISED) {
      const fshm_limit more = {20, 60 * SECOND, 0, FSHM_WINDOW, 0};
      CHECK_EQ(fshm_limiter_open(s, "another", 7, &more, 1, &other), FSHM_OK);
      fshm_limiter_close(other);
      CHECK_EQ(fshm_wait_sleep(l, &p, t.armed, 0), 0);
      CHECK_EQ(fshm_limiter_open(s, "rates", 5, &more, 1, &other), FSHM_OK);
      fshm_limiter_close(other);
    }
    CHECK_EQ(fshm_wait_sleep(l, &p, t.armed, 0), 1);
    fshm_wait_leave(l, &p);
    fshm_limiter_close(l);
    fshm_close(s);
  }
}

int main(void) {
  test_order();
  test_histories();
  test_first_come();
  test_late();
  test_tenants();
  test_full();
  test_crowd();
  test_order_of_processes();
  test_killed(SIGKILL);
  test_killed(SIGSTOP);
  test_polled();
  test_asks();
  test_stays();
  test_own_callers();
  test_closed_pipes();
  test_fork();
  test_read_only();
  test_damaged();
  test_order_changes();
  test_no_room_for_service();
  test_looked_at();
  test_given_back();
  return done();
}
