/* test_semaphore.c - permits: at most n held, whichever process dies, forks, lowers the limit or waits. */
#include "../../csrc/unity.c"

#include "check.h"

#define SECOND UINT64_C(1000000000)
#define NOW (1000 * SECOND)

static fshm_limit permits(uint64_t n) { return (fshm_limit){n, 0, 0, FSHM_PERMITS, 0}; }

static fshm_limiter *permit_limiter(fshm_segment *s, const char *name, uint64_t n) {
  const fshm_limit l = permits(n);
  return fresh_limiter(s, name, &l, 1);
}

static int admit(fshm_limiter *l, const char *key, fshm_permit *p) {
  fshm_decision d;
  uint32_t in_flight;
  fshm_admit(l, key, strlen(key), NULL, 0, p, &d, &in_flight);
  CHECK_EQ(p->held, d.status == FSHM_ALLOWED);
  if (d.status == FSHM_DENIED) CHECK_OP(in_flight, >, 0);
  return d.status;
}

static uint32_t in_flight(fshm_limiter *l) { return fshm_in_flight(l, "k", 1); }

static unsigned permit_slots(fshm_segment *s) {
  unsigned n = 0;
  fshm_permit_info info;
  for (uint64_t i = 0; i < s->slot_count; i++) n += (unsigned)fshm_permit_at(s, i, &info);
  return n;
}

static void test_exactly_n(void) {
  static const uint64_t sizes[] = {1, 2, 5, 64, 300};
  fshm_segment *s = fresh_segment(2000);
  for (unsigned i = 0; i < sizeof sizes / sizeof *sizes; i++) {
    const char name[2] = {(char)('a' + i), 0};
    uint64_t n = sizes[i];
    fshm_limiter *l = permit_limiter(s, name, n);
    fshm_permit held[301];
    for (int round = 0; round < 4; round++) { /* the permits are used again, no others */
      for (uint64_t k = 0; k < n; k++) CHECK_EQ(admit(l, "k", &held[k]), FSHM_ALLOWED);
      CHECK_EQ(admit(l, "k", &held[n]), FSHM_DENIED);
      CHECK_EQ(in_flight(l), n);
      CHECK_EQ(fshm_permit_release(l, &held[n]), 0);
      CHECK_EQ(permit_slots(s), n);
      for (uint64_t k = 0; k < n; k++) {
        fshm_permit copy = held[k];
        CHECK_EQ(fshm_permit_release(l, &held[k]), 1);
        CHECK_EQ(fshm_permit_release(l, &held[k]), 0);
        CHECK_EQ(fshm_permit_release(l, &copy), 0);
      }
      CHECK_EQ(in_flight(l), 0);
    }
    CHECK_EQ(fshm_live_slots(s, NULL, 0), 0); /* free permits leave free slots */
    fshm_limiter_close(l);
  }
  fshm_close(s);
}

/* children hold ---------------------------------------------------------------------------------- */

typedef struct {
  fshm_limiter *limiter;
  int take; /* permits of "k" that each takes */
  _Atomic int ready, leave, result;
  fshm_permit permit; /* of the parent */
} stage_t;

static stage_t *new_stage(fshm_limiter *l, int take) {
  stage_t *stage = shared_memory(sizeof *stage);
  stage->limiter = l;
  stage->take = take;
  return stage;
}

static void hold(int me, void *with) {
  stage_t *stage = with;
  fshm_permit p;
  (void)me;
  for (int i = 0; i < stage->take; i++) CHECK_EQ(admit(stage->limiter, "k", &p), FSHM_ALLOWED);
  atomic_fetch_add(&stage->ready, 1);
  while (!atomic_load(&stage->leave)) (void)usleep(1000);
  atomic_store(&stage->result, fshm_permit_release(stage->limiter, &p)); /* the last of them */
}

static pid_t start_holder(stage_t *stage) {
  pid_t pid = start_child(hold, 0, stage);
  while (!atomic_load(&stage->ready)) (void)usleep(500);
  return pid;
}

static void kill_but_do_not_reap(pid_t pid) {
  siginfo_t info;
  CHECK_EQ(kill(pid, SIGKILL), 0);
  CHECK_EQ(waitid(P_PID, (id_t)pid, &info, WEXITED | WNOWAIT), 0);
}

/* Until the last look at the key's permits is too old to be remembered, nobody asks who is dead. */
static bool is_free_in_time(fshm_limiter *l, fshm_permit *p) {
  const uint64_t end = fshm_now(l->segment) + 30 * SECOND;
  while (admit(l, "k", p) != FSHM_ALLOWED && fshm_now(l->segment) < end) (void)usleep(1000);
  return p->held;
}

/* What a dead process held comes back in time, even while it is a zombie. */
static void test_owner_dies(void) {
  fshm_segment *s = fresh_segment(100);
  fshm_limiter *l = permit_limiter(s, "a", 3);
  for (int way = 0; way < 3; way++) {
    stage_t *stage = new_stage(l, 3);
    fshm_permit p[3];
    pid_t pid = start_holder(stage);
    CHECK_EQ(admit(l, "k", &p[0]), FSHM_DENIED);
    CHECK_EQ(in_flight(l), 3);
    CHECK_EQ(fshm_reap(s, 0), 0);
    kill_but_do_not_reap(pid);
    const uint64_t end = fshm_now(s) + 30 * SECOND;
    if (way == 1)
      while (in_flight(l) && fshm_now(s) < end) (void)usleep(1000);
    if (way == 2) CHECK_EQ(fshm_reap(s, 0), 3);
    if (way == 0) CHECK(is_free_in_time(l, &p[0]));
    for (int i = way == 0; i < 3; i++) CHECK_EQ(admit(l, "k", &p[i]), FSHM_ALLOWED);
    for (int i = 0; i < 3; i++) CHECK_EQ(fshm_permit_release(l, &p[i]), 1);
    CHECK_EQ(waitpid(pid, NULL, 0), pid);
    (void)munmap(stage, sizeof *stage);
  }
  fshm_limiter_close(l);
  fshm_close(s);
}

/* Taken from a living process by name: it then cannot give back what is another's. */
static void test_reap_of_the_living(void) {
  fshm_segment *s = fresh_segment(100);
  fshm_limiter *l = permit_limiter(s, "a", 3);
  stage_t *stage = new_stage(l, 2);
  fshm_permit p[3];
  CHECK_EQ(admit(l, "k", &p[0]), FSHM_ALLOWED);
  pid_t pid = start_holder(stage);
  CHECK_EQ(fshm_reap(s, (uint32_t)pid), 2);
  CHECK_EQ(in_flight(l), 1);
  CHECK_EQ(admit(l, "k", &p[1]), FSHM_ALLOWED);
  CHECK_EQ(admit(l, "k", &p[2]), FSHM_ALLOWED);
  stage->leave = 1;
  end_child(pid);
  CHECK_EQ(stage->result, 0);
  CHECK_EQ(in_flight(l), 3);
  (void)munmap(stage, sizeof *stage);
  fshm_limiter_close(l);
  fshm_close(s);
}

/* The place in the process table has a new owner, who lives: the permit is a dead process's still. */
static void test_incarnation(void) {
  fshm_segment *s = fresh_segment(100);
  fshm_limiter *l = permit_limiter(s, "a", 1);
  fshm_permit p, q;
  CHECK_EQ(admit(l, "k", &p), FSHM_ALLOWED);
  pair_t seen = {p.who, p.when}, earlier = {p.who, p.when - (UINT64_C(1) << 18)};
  CHECK(pair_cas(&s->slots[p.slot], &seen, earlier));
  CHECK_EQ(in_flight(l), 0);
  CHECK_EQ(fshm_permit_release(l, &p), 0);
  seen = (pair_t){p.who, 0};
  CHECK(pair_cas(&s->slots[p.slot], &seen, earlier));
  CHECK_EQ(admit(l, "k", &q), FSHM_ALLOWED);
  CHECK_EQ(fshm_permit_release(l, &q), 1);
  fshm_limiter_close(l);
  fshm_close(s);
}

static void free_of_parent(int me, void *with) {
  stage_t *stage = with;
  fshm_permit mine, copy = stage->permit;
  (void)me;
  CHECK_EQ(fshm_permit_idle(stage->limiter, &copy, 1), 0);
  CHECK_EQ(fshm_permit_release(stage->limiter, &copy), 0);
  CHECK_EQ(fshm_in_flight(stage->limiter, "k", 1), 1);
  CHECK_EQ(admit(stage->limiter, "k", &mine), FSHM_ALLOWED);
  CHECK_EQ(fshm_permit_release(stage->limiter, &mine), 1);
}

static void test_child_cannot_free_its_parents(void) {
  fshm_segment *s = fresh_segment(100);
  stage_t *stage = new_stage(permit_limiter(s, "a", 2), 0);
  CHECK_EQ(admit(stage->limiter, "k", &stage->permit), FSHM_ALLOWED);
  run_children(1, free_of_parent, stage);
  CHECK_EQ(fshm_in_flight(stage->limiter, "k", 1), 1);
  CHECK_EQ(fshm_permit_release(stage->limiter, &stage->permit), 1);
  fshm_limiter_close(stage->limiter);
  (void)munmap(stage, sizeof *stage);
  fshm_close(s);
}

/* lowering --------------------------------------------------------------------------------------- */

static void test_lowered(void) {
  fshm_segment *s = fresh_segment(100);
  fshm_limiter *l = permit_limiter(s, "a", 10);
  fshm_permit held[10], p;
  for (int i = 0; i < 8; i++) CHECK_EQ(admit(l, "k", &held[i]), FSHM_ALLOWED);
  fshm_limiter_close(permit_limiter(s, "a", 5));
  for (int i = 0; i < 4; i++) { /* 8, 7, 6, 5 are held: no more */
    CHECK_EQ(in_flight(l), 8 - i);
    CHECK_EQ(admit(l, "k", &p), FSHM_DENIED);
    CHECK_EQ(in_flight(l), 8 - i);
    CHECK_EQ(fshm_permit_release(l, &held[i]), 1);
  }
  CHECK_EQ(admit(l, "k", &p), FSHM_ALLOWED);
  CHECK_EQ(admit(l, "k", &held[8]), FSHM_DENIED);
  CHECK_EQ(in_flight(l), 5);
  fshm_limiter_close(permit_limiter(s, "a", 7));
  CHECK_EQ(admit(l, "k", &held[0]), FSHM_ALLOWED);
  CHECK_EQ(admit(l, "k", &held[1]), FSHM_ALLOWED);
  CHECK_EQ(admit(l, "k", &held[8]), FSHM_DENIED);
  fshm_limiter_close(l);
  fshm_close(s);
}

/* crowds ----------------------------------------------------------------------------------------- */

#define CROWD 6

typedef struct {
  fshm_limiter *limiter;
  _Atomic uint64_t holders, admitted, allowed;
  _Atomic uint64_t turns[CROWD];
  uint64_t least_turns;
  _Atomic int stop;
} crowd_t;

/* holders is raised after a permit was taken and lowered before it is given back: it never exceeds
 * the number of permits that are held. */
static void come_and_go(int me, void *with) {
  crowd_t *c = with;
  fshm_permit p;
  while (!atomic_load(&c->stop) || atomic_load(&c->turns[me]) < c->least_turns) {
    if (admit(c->limiter, "k", &p) == FSHM_ALLOWED) {
      CHECK_OP(atomic_fetch_add(&c->holders, 1) + 1, <=, atomic_load(&c->allowed));
      if (random_below(4) == 0) sched_yield();
      atomic_fetch_sub(&c->holders, 1);
      CHECK_EQ(fshm_permit_release(c->limiter, &p), 1);
      atomic_fetch_add(&c->admitted, 1);
    }
    atomic_fetch_add(&c->turns[me], 1);
  }
}

/* Until each has come at least twice: those that began before have ended. */
static void let_all_turn(crowd_t *c) {
  for (int i = 0; i < CROWD; i++) {
    uint64_t seen = atomic_load(&c->turns[i]);
    while (atomic_load(&c->turns[i]) < seen + 2) sched_yield();
  }
}

static void test_crowd(uint64_t n, uint64_t lowered) {
  fshm_segment *s = fresh_segment(100);
  crowd_t *c = shared_memory(sizeof *c);
  pid_t pids[CROWD];
  c->limiter = permit_limiter(s, "a", n);
  c->least_turns = 20000;
  c->allowed = n;
  for (int i = 0; i < CROWD; i++) pids[i] = start_child(come_and_go, i, c);
  let_all_turn(c);
  if (lowered) {
    fshm_limiter_close(permit_limiter(s, "a", lowered));
    let_all_turn(
        c); /* calls that began under the former limit are over, and so is what they held */
    c->allowed = lowered;
  }
  c->stop = 1;
  for (int i = 0; i < CROWD; i++) end_child(pids[i]);
  CHECK_OP(c->admitted, >, 0);
  CHECK_EQ(in_flight(c->limiter), 0);
  fshm_limiter_close(c->limiter);
  (void)munmap(c, sizeof *c);
  fshm_close(s);
}

/* Permits together with a rate limit: the limit admits exactly n, and no permit is left behind. */
static void admit_all(int me, void *with) {
  crowd_t *c = with;
  const uint64_t costs[FSHM_MAX_LIMITS] = {1, 1, 1, 1};
  fshm_decision d;
  fshm_permit p;
  uint32_t held;
  (void)me;
  for (;;) {
    fshm_admit(c->limiter, "k", 1, costs, NOW, &p, &d, &held);
    if (d.status == FSHM_DENIED && d.limit_index == 0) return; /* the limit is used up */
    if (d.status != FSHM_ALLOWED) continue;
    CHECK_OP(atomic_fetch_add(&c->holders, 1) + 1, <=, 2);
    atomic_fetch_add(&c->admitted, 1);
    atomic_fetch_sub(&c->holders, 1);
    CHECK_EQ(fshm_permit_release(c->limiter, &p), 1);
  }
}

static void test_crowd_with_a_rate(void) {
  fshm_segment *s = fresh_segment(100);
  const fshm_limit limits[2] = {{2000, 3600 * SECOND, 0, FSHM_WINDOW, 0}, permits(2)};
  crowd_t *c = shared_memory(sizeof *c);
  c->limiter = fresh_limiter(s, "a", limits, 2);
  run_children(CROWD, admit_all, c);
  CHECK_EQ(c->admitted, 2000);
  CHECK_EQ(in_flight(c->limiter), 0);
  fshm_limiter_close(c->limiter);
  (void)munmap(c, sizeof *c);
  fshm_close(s);
}

/* A table with no room for a permit says so; what is held stays held. */
static void test_table_full(void) {
  fshm_segment *s = fresh_segment(1);
  fshm_limiter *l = permit_limiter(s, "a", 10);
  fshm_permit p[5];
  CHECK_EQ(s->slot_count, 4);
  for (int i = 0; i < 4; i++) CHECK_EQ(admit(l, "k", &p[i]), FSHM_ALLOWED);
  CHECK_EQ(admit(l, "k", &p[4]), FSHM_FULL);
  CHECK_EQ(admit(l, "other", &p[4]), FSHM_FULL);
  CHECK_EQ(in_flight(l), 4);
  CHECK_EQ(fshm_permit_release(l, &p[2]), 1);
  CHECK_EQ(admit(l, "other", &p[4]), FSHM_ALLOWED); /* a free permit's slot is anybody's */
  CHECK_EQ(in_flight(l), 3);
  fshm_limiter_close(l);
  fshm_close(s);
}

/* A call that finds the table full of dead permits, and is overtaken by one that frees them, must look again. */
static void test_freed_meanwhile(void) {
  fshm_segment *s = fresh_segment(1);
  fshm_limiter *l = permit_limiter(s, "a", 10);
  fshm_permit p[4];
  const uint64_t who = 12345, hash = 1;
  for (int i = 0; i < 4; i++) CHECK_EQ(admit(l, "k", &p[i]), FSHM_ALLOWED);
  CHECK_EQ(semaphore_free_dead(s, hash, who, NOW), false); /* all alive: full */
  CHECK_EQ(fshm_permit_release(l, &p[2]), 1);
  CHECK_EQ(semaphore_free_dead(s, hash, who, NOW), true); /* nothing dead, but a free slot */
  pair_t idle = {p[2].who, 0}, own = {who, NOW + SECOND};
  CHECK_EQ(pair_cas(&s->slots[p[2].slot], &idle, own), true);
  CHECK_EQ(semaphore_free_dead(s, hash, who, NOW), true); /* the key's own, made by the other */
  CHECK_EQ(semaphore_free_dead(s, hash, who + 1, NOW), false);
  fshm_limiter_close(l);
  fshm_close(s);
}

/* A process that joins after the segment was removed can own nothing, and gets an error. */
static void test_removed(void) {
  fshm_segment *s = fresh_segment(100);
  fshm_error e;
  fshm_permit p;
  CHECK_EQ(fshm_remove(segment_names[segments_made - 1], &e), FSHM_OK);
  fshm_limiter *l = permit_limiter(s, "a", 2);
  CHECK_EQ(admit(l, "k", &p), FSHM_E_LOCK_FILE);
  CHECK_EQ(s->lock_fd, -1);
  fshm_limiter_close(l);
  fshm_close(s);
}

int main(void) {
  test_exactly_n();
  test_owner_dies();
  test_reap_of_the_living();
  test_incarnation();
  test_child_cannot_free_its_parents();
  test_lowered();
  test_crowd(1, 0);
  test_crowd(3, 0);
  test_crowd(5, 2);
  test_crowd_with_a_rate();
  test_table_full();
  test_freed_meanwhile();
  test_removed();
  return done();
}
