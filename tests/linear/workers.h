/* workers.h - the processes that make a history: they wait for it, start together, and run their lanes. */
#ifndef WORKERS_H
#define WORKERS_H

#include "hooked.h"
/* after it: */
#include <linux/futex.h>
#include <sys/prctl.h>
#include <sys/syscall.h>

#include "../c/check.h"
#include "history.h"

enum { PAUSE_NONE, PAUSE_SPIN, PAUSE_YIELD, PAUSE_SLEEP, PAUSES };

/* In memory that all processes share. */
typedef struct {
  _Atomic uint32_t round; /* futex: the workers wait for it to change */
  _Atomic uint32_t finished; /* futex: workers that have run their lanes */
  _Alignas(LINE) _Atomic uint64_t stamp;
  _Alignas(LINE) _Atomic uint64_t clock; /* segment time; 0 = the library's own clock */
  _Alignas(LINE) _Atomic uint64_t arrived;
  _Atomic uint64_t lost_swaps;
  /* how this history is run */
  uint64_t step; /* that each reading advances the clock by */
  uint64_t seed;
  uint32_t workers, pause, one_core, stop;
  uint32_t dies, dies_at; /* this lane - 1 kills itself at its hook of that number; 0 = none */
  uint32_t waits,
      waits_at; /* this one stops there, until the others have taken so many stamps, or */
  uint64_t waits_for; /* all have come to their ends */
  _Atomic uint32_t ended; /* lanes */
  uint64_t death; /* stamp */
  fshm_limiter *limiter; /* at the same address in all: they were forked */
  fshm_limit variants[VARIANTS][FSHM_MAX_LIMITS];
  char limiter_name[32];
  char key[2][24]; /* of key i: key[0], and its number as the last character */
  history_t history;
} arena_t;

static arena_t *arena;
static fshm_segment *segment;

/* This process. */
static op_t *current; /* the operation that runs: the clock's readings are noted there */
static int my_lane = TESTER;
static bool paused_at_hooks;
static uint32_t hooks_seen;
static fshm_permit my_permits[LANE_OPS];
static uint32_t permits_taken, permits_released;
static fshm_charged my_reservation, my_charges[FSHM_MAX_LIMITS];
static uint8_t my_key;
static uint64_t my_reserved_cost, my_charged[LIMITS]; /* of a reservation; to be settled */

static void spin(uint64_t turns) {
  for (volatile uint64_t i = 0; i < turns; i++) continue;
}

static uint64_t stamp_now(void) { return atomic_fetch_add(&arena->stamp, 1) + 1; }

static void die(void) {
  arena->death = stamp_now();
  (void)atomic_fetch_add(&arena->ended, 1);
  (void)kill(getpid(), SIGKILL);
  for (;;) (void)pause();
}

/* As if it were stopped: whatever others do, they do it meanwhile. No other process waits for it, so they come to their ends. */
static void wait_for_others(void) {
  const uint64_t until = atomic_load(&arena->stamp) + arena->waits_for;
  const uint64_t deadline = kernel_clock() + 100 * UINT64_C(1000000);
  while (atomic_load(&arena->stamp) < until && atomic_load(&arena->ended) + 1 < arena->workers)
    if (sched_yield() || kernel_clock() > deadline) break;
}

static void hook(void) {
  if (!paused_at_hooks) return;
  hooks_seen++;
  if (arena->dies == (uint32_t)my_lane + 1 && hooks_seen == arena->dies_at) die();
  if (arena->waits == (uint32_t)my_lane + 1 && hooks_seen == arena->waits_at) wait_for_others();
  if (arena->pause == PAUSE_NONE) return;
  uint64_t dice = random_below(64);
  if (dice >= 8) return;
  struct timespec shortest = {0, 1};
  if (arena->pause == PAUSE_SLEEP && dice == 0)
    (void)nanosleep(&shortest, NULL); /* some 50 us: others run all that they have */
  else if (arena->pause >= PAUSE_YIELD && dice < 4)
    (void)sched_yield();
  else
    spin(random_below(200));
}

/* A version of the limits came into force: a sweep (of an epoch of its own), or a change. No process is killed between
 * the swap and this. */
static void swapped_in(const void *slot, pair_t was, pair_t is) {
  history_t *h = &arena->history;
  if (!arena->limiter || slot != &segment->limiters[arena->limiter->index].current) return;
  uint64_t version = CURRENT_VERSION(is.who) - h->version;
  if (!version || version >= VERSIONS) return;
  h->changed[version] = CURRENT_EPOCH(was.who) == CURRENT_EPOCH(is.who);
  h->in_force[version] = stamp_now();
}

static uint64_t time_now(void) {
  uint64_t now = atomic_load(&arena->clock);
  return now ? now : library_segment_now(segment);
}

static uint64_t clock_read(const fshm_segment *s) {
  uint64_t now = atomic_load(&arena->clock) ? atomic_fetch_add(&arena->clock, arena->step)
                                            : library_segment_now(s);
  if (current && !current->fixed) {
    if (current->reads == READS) current->reads--; /* the last one counts */
    current->read[current->reads] = now;
    current->reads++;
  }
  return now;
}

static void note_decision(op_t *op, const fshm_decision *d) {
  op->status = d->status;
  op->limit_index = d->limit_index;
  op->remaining[0] = d->remaining;
  op->retry = d->retry_after_ns;
  op->reset = d->reset_after_ns;
  op->version = d->version;
}

static void apply_op(op_t *op, const char *key, uint64_t now) {
  static const uint32_t ops[] = {[OP_ACQUIRE] = FSHM_ACQUIRE,
                                 [OP_RESERVE] = FSHM_RESERVE,
                                 [OP_PEEK] = FSHM_PEEK,
                                 [OP_CHARGE] = FSHM_CHARGE,
                                 [OP_REFUND] = FSHM_REFUND};
  fshm_limiter *l = arena->limiter;
  uint64_t costs[FSHM_MAX_LIMITS] = {op->cost[0], op->cost[1], op->cost[2], 0};
  fshm_charged put[FSHM_MAX_LIMITS] = {{0, 0, 0, 0, 0}};
  fshm_decision d;
  if (op->kind == OP_RESERVE)
    fshm_reserve(l, key, strlen(key), costs, op->max_wait, now, &d, put);
  else
    fshm_apply(l, ops[op->kind], key, strlen(key), costs, 0, now, &d);
  note_decision(op, &d);
  if (op->kind != OP_RESERVE) return;
  op->put = put[0].state;
  if (d.status != FSHM_ALLOWED) return;
  my_reservation = put[0], my_reserved_cost = op->cost[0];
  memcpy(my_charges, put, sizeof my_charges);
  memcpy(my_charged, op->cost, sizeof my_charged);
  my_key = op->key;
}

static void permit_op(op_t *op, const char *key, uint64_t now) {
  fshm_limiter *l = arena->limiter;
  uint64_t costs[FSHM_MAX_LIMITS] = {op->cost[0], 0, 0, 0};
  fshm_decision d;
  if (op->kind == OP_IN_FLIGHT) {
    op->count = fshm_in_flight(l, key, strlen(key));
  } else if (op->kind == OP_ADMIT) {
    fshm_permit *p = &my_permits[permits_taken];
    fshm_admit(l, key, strlen(key), costs, now, p, &d, &op->count);
    note_decision(op, &d);
    op->permit = (uint8_t)PERMIT_NUMBER(p->when);
    permits_taken += d.status == FSHM_ALLOWED;
  } else {
    op->status = fshm_permit_release(l, &my_permits[permits_released++]);
  }
}

static void futex_wait(_Atomic uint32_t *word, uint32_t value, const struct timespec *most) {
  (void)syscall(SYS_futex, word, FUTEX_WAIT, value, most, NULL, 0);
}

/* As the library's callers wait. But it sleeps until it is woken, however long: a wake-up that is lost is seen. */
static void wait_op(op_t *op, const char *key) {
  fshm_limiter *l = arena->limiter;
  history_t *h = &arena->history;
  stay_t *mine = &h->stays[my_lane][h->stay_count[my_lane]++];
  const fshm_waiter w = {.tenant = op->who, .priority = op->priority, .fd = -1};
  fshm_place place;
  *mine = (stay_t){.tenant = op->who, .priority = op->priority, .cost = (uint32_t)op->cost[0]};
  mine->join.invoked = stamp_now();
  CHECK_EQ(fshm_wait_join(l, key, strlen(key), &w, 0, &place), 1);
  mine->since = place.since;
  mine->owner = place.owner;
  mine->join.responded = stamp_now();
  op->status = FSHM_DENIED;
  for (uint32_t turns = 1;; turns++) {
    fshm_turn seen;
    turn_t t = {.span.invoked = stamp_now()};
    t.first = fshm_wait_turn(l, &place, 0, &seen);
    t.span.responded = stamp_now();
    if (mine->count < TURNS) mine->turns[mine->count++] = t;
    if (t.first) permit_op(op, key, 0);
    if (op->status == FSHM_ALLOWED || turns == op->times) break;
    _Atomic uint32_t *word = &segment->waiters[place.entry].wake;
    while (atomic_load(word) == seen.armed) futex_wait(word, seen.armed, NULL);
  }
  if (op->status == FSHM_ALLOWED) {
    mine->served.invoked = stamp_now();
    fshm_wait_served(l, &place, op->cost[0], 0);
    mine->served.responded = stamp_now();
  }
  mine->leave.invoked = stamp_now();
  fshm_wait_leave(l, &place);
  mine->leave.responded = stamp_now();
}

static void token_lease_op(op_t *op, const char *key, uint64_t now) {
  fshm_limiter *l = arena->limiter;
  uint64_t left[FSHM_MAX_LIMITS], left_ns[FSHM_MAX_LIMITS];
  fshm_token_lease leases[FSHM_MAX_LIMITS] = {{0, 0, 0}};
  if (op->kind == OP_SPEND) {
    uint64_t costs[FSHM_MAX_LIMITS] = {op->cost[0], op->cost[1], op->cost[2], 0};
    uint32_t low;
    int status = fshm_spend(l, NULL, NULL, key, strlen(key), costs, now, NULL, &low);
    op->status = status == FSHM_ASK ? FSHM_DENIED : status;
    op->low = low != 0;
  } else if (op->kind == OP_PUT) {
    for (uint32_t i = 0; i < LIMITS; i++)
      leases[i] = (fshm_token_lease){op->cost[i], op->kept, op->until};
    op->status = fshm_token_lease_put(l, key, strlen(key), leases, now);
  } else {
    op->status =
        fshm_token_lease_look(l, key, strlen(key), op->kind == OP_TAKE, now, left, left_ns);
    memcpy(op->remaining, left, sizeof op->remaining);
    memcpy(op->left_ns, left_ns, sizeof op->left_ns);
  }
}

/* Less or more than the last reservation: the same call, whether it has a permit or not. */
static void settle_op(op_t *op, const char *key, uint64_t now) {
  fshm_permit charged = {0};
  const uint64_t was[FSHM_MAX_LIMITS] = {my_charged[0], my_charged[1], my_charged[2], 0};
  const uint64_t is[FSHM_MAX_LIMITS] = {op->cost[0], op->cost[1], op->cost[2], 0};
  memcpy(charged.put, my_charges, sizeof charged.put);
  my_reservation.state = 0;
  op->status = fshm_settle(arena->limiter, key, strlen(key), was, is, &charged, now);
}

static void set_op(const op_t *op, int *status) {
  fshm_limiter *other;
  for (unsigned i = 0; i < op->times; i++) {
    const unsigned v = (op->who + i) % VARIANTS;
    const uint32_t count = arena->history.counts[v] + (arena->history.permits_of[v] > 0);
    *status = fshm_limiter_open(segment, arena->limiter_name, strlen(arena->limiter_name),
                                arena->variants[v], count, &other);
    if (*status != FSHM_OK) return;
    fshm_limiter_close(other);
  }
}

static void run_op(op_t *op) {
  char key[sizeof arena->key[0] + 2];
  uint64_t now = op->fixed ? time_now() : 0;
  op->put = my_reservation.state;
  (void)snprintf(key, sizeof key, "%s%c", arena->key[0], 'a' + op->key);
  const bool waits = op->kind == OP_WAIT;
  if (waits) op->kind = OP_ADMIT;
  if (op->kind == OP_RELEASE) {
    if (permits_released == permits_taken) return; /* it has none: as if it were not there */
    op->permit = (uint8_t)PERMIT_NUMBER(my_permits[permits_released].when);
  }
  if (op->kind == OP_CANCEL) {
    if (!my_reservation.state) return;
    op->cost[0] = my_reserved_cost;
  }
  if (op->kind == OP_SETTLE) {
    if (!my_reservation.state) return;
    op->key = my_key;
    (void)snprintf(key, sizeof key, "%s%c", arena->key[0], 'a' + op->key);
    memcpy(op->remaining, my_charged, sizeof op->remaining);
  }
  if (op->fixed) op->read[0] = now, op->reads = 1;
  op->until = time_now() + op->lease;
  op->latest = UINT64_MAX;
  spin(op->delay);
  current = op;
  op->invoked = stamp_now();
  switch (op->kind) {
    case OP_IS_ALLOWED:
      op->status = fshm_is_allowed(arena->limiter, key, strlen(key));
      break;
    case OP_RESET:
      op->status = fshm_reset_key(arena->limiter, key, strlen(key));
      break;
    case OP_REMAINING:
      op->status = fshm_remaining(arena->limiter, key, strlen(key), now, op->remaining);
      break;
    case OP_CANCEL:
      op->status = fshm_cancel(arena->limiter, key, strlen(key), op->cost, &my_reservation, now);
      my_reservation.state = 0;
      break;
    case OP_SET:
      set_op(op, &op->status);
      break;
    case OP_SETTLE:
      settle_op(op, key, now);
      break;
    case OP_SPEND:
    case OP_PUT:
    case OP_LOOK:
    case OP_TAKE:
      token_lease_op(op, key, now);
      break;
    case OP_ADMIT:
      if (waits)
        wait_op(op, key);
      else
        permit_op(op, key, now);
      break;
    case OP_RELEASE:
    case OP_IN_FLIGHT:
      permit_op(op, key, now);
      break;
    default:
      apply_op(op, key, now);
  }
  op->latest = time_now();
  op->responded = stamp_now();
  if (waits && op->status != FSHM_ALLOWED) op->invoked = 0; /* as if it were not there */
  current = NULL;
}

static void futex_wake(_Atomic uint32_t *word) {
  (void)syscall(SYS_futex, word, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
}

static void run_on_one_core(bool one) {
  static int now = -1;
  if (now == one) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  for (int cpu = 0; cpu < (one ? 1 : CPU_SETSIZE); cpu++) CPU_SET(cpu, &set);
  if (!sched_setaffinity(0, sizeof set, &set)) now = one;
}

static void run_lane(int lane) {
  history_t *h = &arena->history;
  hooks_seen = permits_taken = permits_released = 0;
  my_reservation.state = 0;
  random_state = arena->seed + (uint64_t)(lane + 1) * 7919;
  lost_swaps = 0;
  run_on_one_core(arena->one_core);
  meet(&arena->arrived, arena->workers, 1);
  for (uint32_t i = 0; i < h->count[lane]; i++) {
    paused_at_hooks = true;
    run_op(&h->ops[lane][i]);
    paused_at_hooks = false;
  }
  if (arena->dies == (uint32_t)lane + 1) die(); /* it had fewer hooks than that */
  (void)atomic_fetch_add(&arena->ended, 1);
  (void)atomic_fetch_add(&arena->lost_swaps, lost_swaps);
}

static void await_round(uint32_t *round) {
  while (atomic_load(&arena->round) == *round) futex_wait(&arena->round, *round, NULL);
  *round = atomic_load(&arena->round);
}

static void finish_round(void) {
  (void)atomic_fetch_add(&arena->finished, 1);
  futex_wake(&arena->finished);
}

static void worker(int lane, uint32_t round) {
  my_lane = lane;
  (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
  (void)process_index(segment); /* joins, which reads the clock: not within an operation */
  for (;;) { /* every worker takes part in every round, so that none comes late to the next */
    await_round(&round);
    if (arena->stop) _exit(0);
    bool takes_part = (uint32_t)lane < arena->workers;
    if (takes_part) run_lane(lane);
    finish_round();
    /* What it still holds it keeps until all have ended, and the test has looked. */
    await_round(&round);
    while (takes_part && permits_released < permits_taken)
      (void)fshm_permit_release(arena->limiter, &my_permits[permits_released++]);
    finish_round();
  }
}

static pid_t worker_pids[WORKERS];

static void start_worker(int lane) {
  uint32_t round = atomic_load(&arena->round); /* read here: it may have moved on in the child */
  pid_t pid = fork();
  if (!pid) worker(lane, round);
  worker_pids[lane] = pid;
  CHECK_OP(pid, >, 0);
}

static void start_workers(void) {
  arena->stop = 0;
  for (int lane = 0; lane < WORKERS; lane++) start_worker(lane);
}

static void next_round(void) {
  atomic_store(&arena->finished, 0);
  (void)atomic_fetch_add(&arena->round, 1);
  futex_wake(&arena->round);
}

static void stop_workers(void) {
  arena->stop = 1;
  next_round();
  for (int lane = 0; lane < WORKERS; lane++) end_child(worker_pids[lane]);
}

/* After one of them hung. */
static void kill_workers(void) {
  for (int lane = 0; lane < WORKERS; lane++) (void)kill(worker_pids[lane], SIGKILL);
  for (int lane = 0; lane < WORKERS; lane++) (void)waitpid(worker_pids[lane], NULL, 0);
}

/* False: a process did not end in 20 s. */
static bool wait_for(uint32_t workers) {
  const struct timespec second = {1, 0};
  uint64_t deadline = kernel_clock() + 20 * UINT64_C(1000000000);
  for (;;) {
    uint32_t finished = atomic_load(&arena->finished);
    if (finished >= workers) return true;
    if (kernel_clock() > deadline) return false;
    futex_wait(&arena->finished, finished, &second);
  }
}

static void stop_for_a_while(pid_t pid) {
  struct timespec some = {0, (long)random_below(40000)};
  (void)nanosleep(&some, NULL);
  (void)kill(pid, SIGSTOP);
  (void)nanosleep(&some, NULL);
  (void)kill(pid, SIGCONT);
}

/* The lane's operations that never began are taken out. */
static void take_out_the_unasked(history_t *h) {
  for (int lane = 0; lane < LANES; lane++) {
    uint32_t kept = 0;
    for (uint32_t i = 0; i < h->count[lane]; i++)
      if (h->ops[lane][i].invoked) h->ops[lane][kept++] = h->ops[lane][i];
    h->count[lane] = kept;
  }
}

static op_t *tester_op(uint8_t kind, uint8_t key) {
  history_t *h = &arena->history;
  op_t *op = &h->ops[TESTER][h->count[TESTER]++];
  memset(op, 0, sizeof *op);
  op->kind = kind;
  op->key = key;
  for (uint32_t i = 0; i < LIMITS; i++) op->cost[i] = 1;
  return op;
}

/* What is left of every key, as a last look: whatever order is found has to end there. */
static void look_at_the_end(void) {
  history_t *h = &arena->history;
  for (uint32_t key = 0; key < h->keys && h->limits; key++) {
    bool token_leases = h->rules[0][0].kind == FSHM_LEASE;
    run_op(tester_op(token_leases ? OP_LOOK : OP_REMAINING, (uint8_t)key));
    run_op(tester_op(token_leases ? OP_SPEND : OP_PEEK, (uint8_t)key));
  }
  if (h->permits) run_op(tester_op(OP_IN_FLIGHT, 0));
}

/* Run the history that lies in the arena. False: it did not end. */
static bool run_history(bool stop_one) {
  history_t *h = &arena->history;
  atomic_store(&arena->arrived, 0);
  atomic_store(&arena->ended, 0);
  for (uint32_t i = 0; i < h->count[TESTER]; i++) run_op(&h->ops[TESTER][i]);
  uint32_t alive = WORKERS - (arena->dies != 0);
  next_round();
  if (stop_one) stop_for_a_while(worker_pids[random_below(arena->workers)]);
  if (arena->dies) {
    int lane = (int)arena->dies - 1, status = 0;
    CHECK_EQ(waitpid(worker_pids[lane], &status, 0), worker_pids[lane]);
    op_t *death = tester_op(OP_DEATH, 0);
    death->who = (uint8_t)lane;
    death->invoked = arena->death;
    death->latest = time_now();
    death->responded = stamp_now();
    if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL) return false;
  }
  if (!wait_for(alive)) return false;
  look_at_the_end();
  next_round(); /* give back what is held */
  if (!wait_for(alive)) return false;
  if (arena->dies) start_worker((int)arena->dies - 1);
  take_out_the_unasked(h);
  return true;
}

#endif
