/* test_wait_turns.c - callers of the wait queue that stop before an access of the queue, or of a permit, while others go on:
 * no wake-up is lost, each place is of one caller, and all are served. Every schedule of two of them is tried, and
 * some of three. */
#include "turns.h"

#define SECOND UINT64_C(1000000000)
#define NOW (1000 * SECOND)
#define KEY "k", 1

enum { CALLERS = 3 };

/* What a waiter of the library does, one step after the other: see fast_shm.h. It sleeps for ever, not for a beat: so a
 * wake-up that is lost is seen. */
typedef struct {
  fshm_place place;
  fshm_permit permit;
  uint32_t armed;
  bool waits, got;
} caller_t;
static caller_t callers[CALLERS], callers_then[CALLERS];
static fshm_permit held, also_held; /* by nobody in the queue */
static fshm_permit held_then, also_held_then;
static uint32_t most; /* the limit */
static waiter_t *places_then;
static uint64_t queues_then[WAIT_GROUPS];

static void put_back_queue(void) {
  memcpy((void *)(uintptr_t)s->waiters, places_then, WAITERS * sizeof(waiter_t));
  memcpy((void *)(uintptr_t)s->header->queues, queues_then, sizeof queues_then);
  memcpy(callers, callers_then, sizeof callers);
  held = held_then, also_held = also_held_then;
}
static void keep_all(void) {
  memcpy(places_then, (void *)(uintptr_t)s->waiters, WAITERS * sizeof(waiter_t));
  memcpy(queues_then, (void *)(uintptr_t)s->header->queues, sizeof queues_then);
  memcpy(callers_then, callers, sizeof callers);
  held_then = held, also_held_then = also_held;
  keep_state();
}

static bool in(const volatile void *at, const volatile void *from, size_t size) {
  return (uintptr_t)at - (uintptr_t)from < size;
}
/* What only the owner of a place writes, before others see it, is no reason to stop. */
static bool of_the_queue(const volatile void *at, bool swap) {
  if (in(at, s->waiters, WAITERS * sizeof(waiter_t))) {
    const size_t field = ((uintptr_t)at - (uintptr_t)s->waiters) % sizeof(waiter_t);
    return field != offsetof(waiter_t, tenant) && field != offsetof(waiter_t, priority) &&
           field != offsetof(waiter_t, polled) && field != offsetof(waiter_t, process);
  }
  return in(at, s->header->queues, sizeof s->header->queues) ||
         (swap && in(at, s->slots, s->slot_count * sizeof(slot_t)));
}

static void admit(fshm_permit *permit) {
  fshm_decision d;
  uint32_t in_flight;
  fshm_admit(l, KEY, NULL, 0, permit, &d, &in_flight);
}

static void join(caller_t *c) {
  const fshm_waiter w = {.fd = -1};
  c->waits = true;
  CHECK_EQ(fshm_wait_join(l, KEY, &w, 0, &c->place), 1);
}
static bool
    beats; /* one whose place was taken while it went on after a stop sees that at its next beat */
static bool is_asleep(const caller_t *c) {
  const waiter_t *e = &s->waiters[c->place.entry];
  return c->waits && load_relaxed(&e->wake) == c->armed &&
         (!beats || load_relaxed(&e->owner) == c->place.owner);
}
static void go_on_waiting(caller_t *c) {
  for (int tries = 0; tries < 50; tries++) {
    fshm_turn t;
    int first = fshm_wait_turn(l, &c->place, 0, &t);
    c->armed = t.armed;
    if (first) admit(&c->permit);
    if (c->permit.held) {
      c->place.took = 1; /* it wakes the next only where there may be more */
      fshm_wait_leave(l, &c->place);
      c->waits = false;
      c->got = true;
      return;
    }
    if (is_asleep(c)) return;
  }
  CHECK_EQ(c->waits, false); /* it is woken again and again */
}
static void come(caller_t *c) {
  join(c);
  go_on_waiting(c);
}
static void come_0(void) { come(&callers[0]); }
static void come_1(void) { come(&callers[1]); }
static void come_2(void) { come(&callers[2]); }
static void go_on_0(void) { go_on_waiting(&callers[0]); }
static void give_up_0(void) {
  fshm_wait_leave(l, &callers[0].place);
  callers[0].waits = false;
}
static void requeue_0(void) {
  fshm_wait_requeue(l, &callers[0].place, NOW + 5, 2, 0);
  go_on_waiting(&callers[0]);
}
static void release(void) { CHECK_EQ(fshm_permit_release(l, &held), 1); }
static void release_other(void) { CHECK_EQ(fshm_permit_release(l, &also_held), 1); }

/* All have gone as far as they do by themselves. Who has been woken goes on; nobody may sleep beside a free permit; and
 * each that waits is served when the one before it releases. */
static void verify(void) {
  for (int round = 0; round < 20; round++) {
    bool any = false;
    int waiting = 0;
    for (int i = 0; i < CALLERS; i++) {
      if (callers[i].waits && !is_asleep(&callers[i])) go_on_waiting(&callers[i]), any = true;
      waiting += callers[i].waits;
    }
    if (any) continue;
    if (!waiting || failed) break;
    for (int i = 0; i < CALLERS; i++) {
      const fshm_place *p = &callers[i].place;
      if (!callers[i].waits) continue;
      CHECK_EQ(load_relaxed(&s->waiters[p->entry].owner), p->owner);
      CHECK_EQ(load_relaxed(&s->waiters[p->entry].published), p->owner); /* the others see it */
      CHECK_EQ(load_relaxed(&s->waiters[p->entry].key), p->key);
      for (int k = 0; k < i; k++) CHECK(!callers[k].waits || callers[k].place.entry != p->entry);
    }
    CHECK_EQ(fshm_in_flight(l, KEY), most); /* else a permit is free beside one that sleeps */
    for (int i = 0; i < CALLERS; i++)
      if (callers[i].permit.held) (void)fshm_permit_release(l, &callers[i].permit);
    (void)fshm_permit_release(l, &held);
    (void)fshm_permit_release(l, &also_held);
  }
  for (int i = 0; i < CALLERS; i++) {
    CHECK(!callers[i].waits);
    (void)fshm_permit_release(l, &callers[i].permit);
  }
  (void)fshm_permit_release(l, &held);
  (void)fshm_permit_release(l, &also_held);
  CHECK_EQ(fshm_in_flight(l, KEY), 0);
  fshm_wait_wake(l, KEY);
  uint64_t left = 0;
  for (uint32_t i = 0; i < WAITERS; i++) left += load_relaxed(&s->waiters[i].owner) != 0;
  for (uint32_t g = 0; g < WAIT_GROUPS; g++) left += REACH(load_relaxed(&s->header->queues[g]));
  CHECK_EQ(left, 0);
}

static void begin_test_of(uint32_t permits) {
  const fshm_limit limit = {permits, 0, 0, FSHM_PERMITS, 0};
  most = permits;
  s = fresh_segment(1);
  l = fresh_limiter(s, "a", &limit, 1);
  CHECK_EQ(l->index, 0);
  (void)process_index(s);
  memset(callers, 0, sizeof callers);
  memset(&held, 0, sizeof held);
  memset(&also_held, 0, sizeof also_held);
  time_is = NOW;
  stops_at = of_the_queue;
  also_put_back = put_back_queue;
}
static void begin_test(void) { begin_test_of(1); }
static void end_test(void) {
  also_put_back = NULL, time_is = 0;
  fshm_limiter_close(l);
  fshm_close(s);
}

static void test_release_and_join(void) {
  begin_test();
  admit(&held);
  roles[0].task = release, roles[1].task = come_1, roles[2].task = come_2;
  keep_all();
  CHECK(every_schedule("01", "01", verify));
  CHECK(every_schedule("10", "10", verify));
  CHECK(every_schedule("101", "01", verify));
  end_test();
}
/* One is asleep in the queue, and first. */
static void begin_with_one(void) {
  begin_test();
  admit(&held);
  come_0();
  CHECK(is_asleep(&callers[0]));
  time_is = NOW + 1;
}
static void test_first_leaves(void (*leaves)(void)) {
  begin_with_one();
  roles[0].task = leaves, roles[1].task = come_1, roles[2].task = release;
  keep_all();
  CHECK(every_schedule("01", "01", verify));
  CHECK(every_schedule("10", "10", verify));
  CHECK(every_schedule("021", "012", verify));
  CHECK(every_schedule("210", "210", verify));
  end_test();
}
/* The permit is free, nobody has noticed. */
static void test_two_come(void) {
  begin_test();
  roles[0].task = come_0, roles[1].task = come_1, roles[2].task = come_2;
  keep_all();
  CHECK(every_schedule("01", "01", verify));
  CHECK(every_schedule("010", "10", verify));
  end_test();
}
/* Of two permits. */
static void begin_with_two_asleep(void) {
  begin_test_of(2);
  admit(&held), admit(&also_held);
  come_0(), come_1();
  CHECK(is_asleep(&callers[0]) && is_asleep(&callers[1]));
}
static void test_two_permits(void) {
  begin_test_of(2); /* both are free, and nobody has noticed */
  roles[0].task = come_0, roles[1].task = come_1, roles[2].task = come_2;
  keep_all();
  CHECK(every_schedule("01", "012", verify));
  end_test();
  begin_test_of(2); /* one is free, the other comes back to one that has not looked yet */
  admit(&held);
  roles[0].task = come_0, roles[1].task = come_1, roles[2].task = release;
  keep_all();
  CHECK(every_schedule("01", "201", verify));
  end_test();
  begin_with_two_asleep(); /* the second comes back while the first is taken */
  release();
  CHECK(!is_asleep(&callers[0]));
  roles[0].task = go_on_0, roles[1].task = release_other, roles[2].task = come_2;
  keep_all();
  CHECK(every_schedule("01", "01", verify));
  CHECK(every_schedule("10", "01", verify));
  end_test();
  begin_with_two_asleep();
  roles[0].task = give_up_0, roles[1].task = release, roles[2].task = release_other;
  keep_all();
  CHECK(every_schedule("12", "120", verify));
  CHECK(every_schedule("01", "012", verify));
  end_test();
}
/* Where others stood long ago. */
static void test_used_places(void) {
  begin_test();
  admit(&held);
  for (int i = 0; i < 2; i++) join(&callers[i]);
  for (int i = 0; i < 2; i++) give_up_0(), callers[0] = callers[1], callers[1].waits = false;
  memset(callers, 0, sizeof callers);
  time_is = NOW + 2 * ABANDONED_NS;
  roles[0].task = come_0, roles[1].task = come_1, roles[2].task = release;
  keep_all();
  CHECK(every_schedule("01", "01", verify));
  CHECK(every_schedule("0121", "021", verify));
  end_test();
}
/* One that was stopped for longer than its place is kept goes on, beside others that come. */
static void test_late_one_comes_back(void) {
  begin_with_one();
  time_is = NOW + 2 * ABANDONED_NS;
  beats = true;
  roles[0].task = go_on_0, roles[1].task = come_1, roles[2].task = release;
  keep_all();
  CHECK(every_schedule("01", "01", verify));
  CHECK(every_schedule("10", "10", verify));
  CHECK(every_schedule("021", "012", verify));
  CHECK(every_schedule("010", "102", verify));
  end_test();
  beats = false;
}

int main(int argc, char **argv) {
  /* 3: of two steps, every schedule. Of all, which are half a million: test_wait_turns 1. */
  leaps = argc > 1 ? strtoull(argv[1], NULL, 10) : getenv("CHECK_FEWER") ? 12 : 3;
  places_then = malloc(WAITERS * sizeof(waiter_t));
  if (!places_then) abort();
  start_roles();
  test_release_and_join();
  test_first_leaves(give_up_0);
  test_first_leaves(requeue_0);
  test_two_come();
  test_two_permits();
  test_used_places();
  test_late_one_comes_back();
  end_roles();
  free(places_then);
  printf("%llu schedules\n", (unsigned long long)schedules);
  return done();
}
