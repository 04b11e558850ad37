/* holds_queue.c - what must hold of the wait queue: whatever became of T, S is next within a second, no wake-up of S is
 * lost, each place is of one caller, and in the end all places are free. Time stands, but for what the checks say. */
#include "crash.h"

#define TENANT 5
#define SERVED 100
#define MOMENT UINT64_C(1000000000) /* after which a caller that does nothing is passed over */

static void queue_time(uint64_t later) { world.clock = world.s->epoch + NOW + later; }

/* S has world.permit if op->prior, and waits in world.place, asleep, if ARMED. */
static void queue_join(fshm_place *p, uint64_t since) {
  const bool polled = world.ends[1] && p == &world.place;
  const fshm_waiter w = {.tenant = op->op == QUEUE_SERVE ? TENANT : 0,
                         .fd = polled ? world.ends[1] : -1};
  if (!fshm_wait_join(world.l, KEY, strlen(KEY), &w, since, p)) broken("there is no place");
}
static bool queue_woken(void) {
  return load_relaxed(&world.s->waiters[world.place.entry].wake) != world.asleep;
}
/* As a caller of the library does until it sleeps, or has a permit. Returns whether it was first the last time. */
static bool queue_go_on(void) {
  fshm_decision d;
  fshm_turn t;
  uint32_t held;
  bool first = false;
  for (int tries = 0; tries < 20 && !world.waited.held; tries++) {
    first = fshm_wait_turn(world.l, &world.place, 0, &t);
    world.asleep = t.armed;
    if (first) fshm_admit(world.l, KEY, strlen(KEY), NULL, world.now, &world.waited, &d, &held);
    if (world.waited.held) fshm_wait_leave(world.l, &world.place);
    if (!queue_woken()) break;
  }
  return first;
}

static void join_and_die(void) {
  fshm_place p;
  queue_join(&p, 0);
}
static void start_queue(void) {
  counter_trusted = false;
  start_permits();
  if (op->dead) { /* long ago */
    world.clock = world.s->epoch + NOW - 20 * MOMENT;
    die_after(join_and_die);
  }
  queue_time(0);
  (void)fshm_wait_watch(world.s, 0); /* a thread of S watches */
  if (!(op->flags & ARMED)) return;
  fshm_turn t;
  queue_join(&world.place, NOW);
  if (!fshm_wait_turn(world.l, &world.place, 0, &t)) broken("S is not the first that waits");
  world.asleep = t.armed;
}

/* S's place is polled by an event loop; a thread watches for wake-ups of other processes. */
static uint32_t watched; /* what that thread saw of its word before it slept */
static void start_queue_polled(void) {
  if (pipe(world.ends)) broken("no pipe");
  for (int i = 0; i < 2; i++) (void)fcntl(world.ends[i], F_SETFL, O_NONBLOCK);
  start_queue();
}
static bool loop_woken(void) {
  uint64_t entries[8];
  return read(world.ends[0], entries, sizeof entries) > 0;
}
static void watch_and_sleep(void) {
  (void)fshm_wait_watch(world.s, 0);
  watched = load_relaxed(&world.s->watchers[process_index(world.s)]);
}
/* As it was when S fell asleep: what S has in its own memory is not put back with the segment. */
static void queue_resume(void) {
  queue_time(0);
  if (!world.ends[1]) return;
  (void)loop_woken();
  poll_begin(world.s, &world.place);
  watch_and_sleep();
}

/* S asks the processes that keep what it waits for. */
static void ask_for_it(void) {
  if (!wait_place_asks(world.s, &world.place)) broken("S has lost its place");
}
static void start_queue_asked(void) {
  start_queue();
  ask_for_it();
}
/* What T, or a process that comes anew, does when it is told that somebody has asked. */
static int hears(void) { return fshm_wait_asked(world.l, KEY, strlen(KEY)); }
static uint32_t heard; /* how often, by S or such a process, at this boundary */
static void watch_and_hear(void) {
  while (fshm_wait_watch(world.s, 0))
    while (hears()) heard++;
}

static uint32_t queue_callers(void) {
  fshm_turn t;
  fshm_waiting(world.l, KEY, strlen(KEY), NULL, 0, &t);
  return t.callers;
}
static uint64_t queue_service(void) {
  found_t f;
  const uint64_t hash = fshm_siphash(world.l->key[0], world.l->key[1], KEY, strlen(KEY));
  return service_read(world.s, wait_key(hash, world.l->index), TENANT, NOW, &f);
}
static uint64_t service_before;

/* Each place is of one caller; nobody is admitted beyond the limit. */
static void check_places(void) {
  const waiter_t *mine = &world.s->waiters[world.place.entry];
  if (held_alive(world.l, KEY) > permits_limit(world.l)) broken("more are admitted than may be");
  if (world.place.owner && (load_relaxed(&mine->owner) != world.place.owner ||
                            load_relaxed(&mine->published) != world.place.owner))
    broken("S has lost its place");
  for (uint32_t i = 0; i < WAITERS; i++) {
    fshm_waiter_info info;
    if (!load_relaxed(&world.s->waiters[i].owner)) continue;
    if (fshm_waiter_at(world.s, i, &info) && info.limiter != world.l->index)
      broken("a caller waits for another limiter");
  }
}

static void queue_begin(void) { service_before = queue_service(); }
static void queue_end(void) {
  queue_time(0);
  if (told->status != op->status) broken("it answers %d, not %d", told->status, op->status);
  if (op->op == QUEUE_SERVE && queue_service() != service_before + SERVED * SERVICE_UNIT)
    broken("the service is %llu", (unsigned long long)queue_service());
  check_places();
}

/* S lets go of what it holds: it is woken, or T is before it, and alive. */
static void release_own(bool alone) {
  if (!op->prior) return;
  fshm_permit permit = world.permit;
  if (!fshm_permit_release(world.l, &permit)) broken("S cannot release its permit");
  if (alone ? !queue_woken() : !queue_woken() && queue_callers() < 2)
    broken("a permit is free, and S was not woken");
}

/* After a second S is first, whoever is stopped or dead. */
static void be_served(bool alone) {
  queue_time(MOMENT);
  if (!world.place.owner) queue_join(&world.place, NOW);
  (void)queue_go_on();
  if (!world.waited.held) {
    if (!queue_go_on()) broken("a caller that does nothing is before S");
    release_own(alone);
    (void)queue_go_on();
    bool room = alone || held_alive(world.l, KEY) < permits_limit(world.l);
    if (!world.waited.held && room) broken("S is next, and is not admitted");
  }
  check_places();
}

static void queue_contend(void) {
  fshm_place another;
  queue_resume();
  if (op->op == QUEUE_ASKED) {
    ask_for_it();
    if (fresh_process(hears) != 1) broken("S asks, and a new process does not hear it");
  }
  if (!world.place.owner) queue_join(&world.place, NOW);
  (void)queue_go_on();
  queue_join(&another, 0);
  if (world.place.owner && another.entry == world.place.entry) broken("two have one place");
  check_places();
  fshm_wait_leave(world.l, &another);
  if (!world.waited.held && op->prior) {
    release_own(false);
    world.permit.held = 0;
  }
  if (!world.waited.held) (void)queue_go_on();
  check_places();
  if (!world.waited.held) {
    queue_time(MOMENT);
    if (!queue_go_on() && !world.waited.held) broken("a caller that is stopped is before S");
    if (!world.waited.held && held_alive(world.l, KEY) < permits_limit(world.l))
      broken("S is next, and is not admitted");
  }
  if (op->op == QUEUE_SERVE) fshm_wait_served(world.l, &world.place, SERVED, 0);
}

static int queue_afresh(void) {
  fshm_turn t;
  queue_join(&world.place, 0);
  return fshm_wait_turn(world.l, &world.place, 0, &t) && t.callers == 1;
}

static void queue_survive(void) {
  queue_resume();
  if (told->done && told->status != op->status)
    broken("T says %d, not %d", told->status, op->status);
  if (op->op == QUEUE_SERVE) {
    uint64_t more = queue_service() - service_before;
    if (more && more != SERVED * SERVICE_UNIT)
      broken("the service is half written: %llu", (unsigned long long)more);
  }
  be_served(true);
  (void)fshm_permit_release(world.l, &world.waited);
  queue_time(2 * ABANDONED_NS);
  fshm_wait_wake(world.l, KEY, strlen(KEY));
  for (uint32_t i = 0; i < WAITERS; i++)
    if (!free_abandoned(&world.s->waiters[i], NOW + 2 * ABANDONED_NS))
      broken("place %u is not free in the end", i);
  for (uint32_t g = 0; g < WAIT_GROUPS; g++)
    if (REACH(load_relaxed(&world.s->header->queues[g])))
      broken("the queue has a reach in the end");
  fshm_place anew[2]; /* in T's place, and in S's */
  for (int i = 0; i < 2; i++) {
    queue_join(&anew[i], 0);
    if (load_relaxed(&world.s->waiters[anew[i].entry].asked)) broken("a new caller has asked");
  }
  for (int i = 0; i < 2; i++) fshm_wait_leave(world.l, &anew[i]);
  if (position.k % 16 == 0 && fresh_process(queue_afresh) != 1)
    broken("a new process is not first in an empty queue");
}

/* S comes, or looks again; of a service: it is served as well. */
static void queue_overtake(void) {
  queue_resume();
  heard = 0;
  op->overtake();
}
static void sleep_on_and_on(void) {}
static void hear_anew(void) { heard += fresh_process(hears) == 1; }
static void ask_again(void) {
  ask_for_it();
  wait_tell(world.s, told->pid);
}
static void come_or_look(void) {
  if (!world.place.owner) queue_join(&world.place, NOW);
  (void)queue_go_on();
}
static void be_served_too(void) {
  queue_join(&world.place, NOW);
  fshm_wait_served(world.l, &world.place, SERVED, 0);
}

/* Who asks is heard, once: by S, or T, or a process that came meanwhile; or somebody is still to look. */
static void check_asked(void) {
  if (op->op == QUEUE_ASK) {
    watch_and_hear();
    if (heard != 1) broken("T has asked, and S hears it %u times", heard);
  }
  if (op->op == QUEUE_ASKED && told->status + (int)heard != 1)
    broken("S has asked, and %d processes hear it", told->status + (int)heard);
  if (op->op == QUEUE_WATCH && load_relaxed(&world.s->waiters[world.place.entry].asked) &&
      !(load_relaxed(&world.s->watchers[told->pid]) & WATCH_ASKED))
    broken("S has asked, and T sleeps");
}

/* T has gone on to its end, and lives. Who is asleep beside a free permit has missed a wake-up. */
static void queue_raced(const outcome_t *mine) {
  (void)mine;
  queue_time(0);
  bool waits = op->op == QUEUE_JOIN || op->op == QUEUE_STAY || op->op == QUEUE_ASK;
  if (world.ends[1] && queue_woken() && !loop_woken() &&
      watched == load_relaxed(&world.s->watchers[process_index(world.s)]))
    broken("S was woken, and the thread that watches sleeps");
  check_asked();
  if (op->op != QUEUE_SERVE && queue_woken() && !world.waited.held) (void)queue_go_on();
  const bool either = op->op == QUEUE_JOIN || op->op == QUEUE_ASKED;
  if (!either && told->status != op->status)
    broken("T is answered %d, not %d", told->status, op->status);
  uint64_t more = queue_service() - service_before - 2 * SERVED * SERVICE_UNIT;
  if (op->op == QUEUE_SERVE && more > 1) /* the first service that is counted begins at 1, not 0 */
    broken("of two services, %lld is too much", (long long)more);
  if (waits) {
    const waiter_t *e = &world.s->waiters[told->place.entry];
    if (load_relaxed(&e->owner) != told->place.owner ||
        load_relaxed(&e->published) != told->place.owner)
      broken("T has lost its place");
    if (world.place.owner && world.place.entry == told->place.entry) broken("two have one place");
  }
  check_places();
  if (op->op != QUEUE_SERVE && queue_callers() != (uint32_t)waits + (world.place.owner != 0))
    broken("%u wait", queue_callers());
  if (op->op != QUEUE_SERVE && !world.waited.held &&
      held_alive(world.l, KEY) < permits_limit(world.l))
    broken("a permit is free, and S sleeps");
  check_invariants(false);
}

static const holds_t queue = {queue_begin,   queue_end,   queue_contend,
                              queue_survive, queue_raced, queue_overtake};

/* the operations */

static void run_queue_join(outcome_t *out) {
  fshm_turn t;
  queue_join(&out->place, 0);
  out->status = fshm_wait_turn(world.l, &out->place, 0, &t);
}
static void come_first(void) { queue_join(&world.theirs, NOW - 5); }
static void come_next(void) { queue_join(&world.theirs, NOW + 5); }
static void come_and_lose(void) {
  come_first();
  store_relaxed(&world.s->waiters[world.theirs.entry].owner,
                0); /* as one that finds it abandoned */
}
static void run_queue_turn(outcome_t *out) {
  fshm_turn t;
  out->status = fshm_wait_turn(world.l, &world.theirs, 0, &t);
  out->place = world.theirs;
}
static void run_queue_leave(outcome_t *out) {
  fshm_wait_leave(world.l, &world.theirs);
  out->status = 1;
}
static void run_queue_requeue(outcome_t *out) {
  fshm_wait_requeue(world.l, &world.theirs, NOW + 5, 1, 0);
  out->place = world.theirs;
  out->status = 1;
}
static void run_queue_wake(outcome_t *out) {
  fshm_wait_wake(world.l, KEY, strlen(KEY));
  out->status = 1;
}
static void run_queue_next(outcome_t *out) {
  out->status = fshm_wait_next(world.l, KEY, strlen(KEY));
  out->place = world.theirs;
}
static void run_queue_ask(outcome_t *out) {
  fshm_wait_ask(world.l, KEY, strlen(KEY), 0, &world.theirs);
  out->place = world.theirs;
  out->status = 1;
}
static void run_queue_asked(outcome_t *out) { out->status = hears(); }
static void run_queue_watch(outcome_t *out) {
  out->status = fshm_wait_watch(world.s, 0);
  if (out->status) out->number = (uint64_t)hears();
}
static void be_told(void) {
  told->pid = process_index(world.s);
  wait_tell(world.s, told->pid);
}
/* T has been woken, for a permit that is free. */
static void come_and_be_woken(void (*come)(void)) {
  come();
  (void)atomic_fetch_add(&world.s->waiters[world.theirs.entry].wake, 1);
}
static void come_first_woken(void) { come_and_be_woken(come_first); }
static void come_next_woken(void) { come_and_be_woken(come_next); }
/* The reach was damaged. */
static void come_unreached(void) {
  come_first();
  store_relaxed(&world.s->header->queues[wait_group(world.theirs.key)], 0);
}
static void run_queue_served(outcome_t *out) {
  fshm_wait_served(world.l, &world.theirs, SERVED, 0);
  out->status = 1;
}
static void run_queue_correct(outcome_t *out) {
  fshm_wait_correct(world.l, &world.theirs, SERVED, 0);
  out->status = 1;
}
/* T is served for the first time, or again. */
static void come_to_be_served(void) { come_next(); }
static void come_to_be_served_again(void) {
  come_next();
  fshm_wait_served(world.l, &world.theirs, SERVED, 0);
}
