/* test_process.c - who is alive: slots, death, forks, a full table. */
#include "../../csrc/unity.c"

#include "check.h"

static unsigned alive_count(fshm_segment *s) {
  unsigned n = 0;
  for (unsigned i = 0; i < PROCESSES; i++) {
    fshm_process_info p;
    CHECK_EQ(fshm_process_at(s, i, &p), FSHM_OK);
    n += p.alive;
  }
  return n;
}

typedef struct {
  fshm_segment *s;
  _Atomic uint64_t joined, leave;
  _Atomic uint32_t slot[PROCESSES + 8];
} stage_t;

static void join_and_stay(int me, void *with) {
  stage_t *stage = with;
  stage->slot[me] = process_join(stage->s);
  atomic_fetch_add(&stage->joined, 1);
  while (!atomic_load(&stage->leave)) (void)usleep(2000);
}

static stage_t *new_stage(fshm_segment *s) {
  stage_t *stage = shared_memory(sizeof *stage);
  stage->s = s;
  return stage;
}

/* A forked child does not take itself for its parent: it joins by itself, with a slot of its own. */
static void test_fork_joins_anew(void) {
  fshm_segment *s = fresh_segment(100);
  stage_t *stage = new_stage(s);
  uint32_t mine = process_slot(s);
  CHECK_OP(mine, <, PROCESSES);
  CHECK_EQ(process_slot(s), mine);
  pid_t pid = start_child(join_and_stay, 0, stage);
  while (!atomic_load(&stage->joined)) (void)usleep(1000);
  CHECK(stage->slot[0] != mine && stage->slot[0] < PROCESSES);
  CHECK(process_alive(s, mine) && process_alive(s, stage->slot[0]));
  CHECK_EQ(alive_count(s), 2);
  fshm_process_info p;
  CHECK_EQ(fshm_process_at(s, stage->slot[0], &p), FSHM_OK);
  CHECK_EQ(p.pid, pid);
  stage->leave = 1;
  end_child(pid);
  CHECK(!process_alive(s, stage->slot[0]));
  CHECK(process_alive(s, mine)); /* its end closed its copy of our lock file, not our lock */
  CHECK_EQ(fshm_process_at(s, PROCESSES, &p), FSHM_E_ARGUMENT);
  (void)munmap(stage, sizeof *stage);
  fshm_close(s);
}

/* Killed: dead at once, even while it is a zombie. */
static void test_zombie_is_dead(void) {
  fshm_segment *s = fresh_segment(100);
  stage_t *stage = new_stage(s);
  pid_t pid = start_child(join_and_stay, 0, stage);
  while (!atomic_load(&stage->joined)) (void)usleep(1000);
  siginfo_t info;
  CHECK(process_alive(s, stage->slot[0]));
  CHECK_EQ(kill(pid, SIGKILL), 0);
  CHECK_EQ(waitid(P_PID, (id_t)pid, &info, WEXITED | WNOWAIT), 0); /* not reaped */
  CHECK(!process_alive(s, stage->slot[0]));
  CHECK_EQ(waitpid(pid, NULL, 0), pid);
  (void)munmap(stage, sizeof *stage);
  fshm_close(s);
}

static void count_and_die(int me, void *with) {
  (void)me;
  fshm_limiter *l = with;
  for (int i = 0; i < 10; i++) (void)apply_at(l, FSHM_ACQUIRE, "k", 1, 1000);
  (void)raise(SIGKILL);
}

/* Slots come back, thousands of processes long, and what the dead counted stays counted. */
static void test_slots_are_reused(void) {
  fshm_segment *s = fresh_segment(100);
  const fshm_limit l = {1000000, UINT64_C(1) << 40, 0, FSHM_WINDOW, 0};
  fshm_limiter *a = fresh_limiter(s, "a", &l, 1);
  const int many = 2 * PROCESSES + 10;
  for (int i = 0; i < many; i++) (void)waitpid(start_child(count_and_die, i, a), NULL, 0);
  uint64_t sum = s->header->retired_admitted;
  for (unsigned i = 0; i < PROCESSES; i++) {
    fshm_process_info p;
    CHECK_EQ(fshm_process_at(s, i, &p), FSHM_OK);
    sum += p.admitted;
  }
  CHECK_EQ(sum, many * 10);
  CHECK_OP(s->header->retired_admitted, >, 0);
  CHECK_EQ(alive_count(s), 1);
  fshm_limiter_close(a);
  fshm_close(s);
}

/* More processes than slots: the rest count into the ledger, and limit as everybody does. */
static void join_and_take(int me, void *with) {
  stage_t *stage = with;
  fshm_limiter *l;
  const fshm_limit limit = {100, UINT64_C(1) << 40, 0, FSHM_WINDOW, 0};
  stage->slot[me] = process_slot(stage->s);
  CHECK_EQ(fshm_limiter_open(stage->s, "a", 1, &limit, 1, &l), FSHM_OK);
  if (apply_at(l, FSHM_ACQUIRE, "k", 1, 1000).status == FSHM_ALLOWED)
    atomic_fetch_add(&stage->joined, UINT64_C(1) << 32);
  atomic_fetch_add(&stage->joined, 1);
  while (!atomic_load(&stage->leave)) (void)usleep(20000);
  fshm_limiter_close(l);
}

static void test_table_full(void) {
  fshm_segment *s = fresh_segment(100);
  stage_t *stage = new_stage(s);
  const int many = PROCESSES + 8;
  pid_t pids[PROCESSES + 8];
  unsigned without = 0, taken[PROCESSES] = {0};
  for (int i = 0; i < many; i++) pids[i] = start_child(join_and_take, i, stage);
  while ((uint32_t)atomic_load(&stage->joined) < (uint32_t)many) (void)usleep(2000);
  for (int i = 0; i < many; i++) {
    without += stage->slot[i] >= PROCESSES;
    if (stage->slot[i] < PROCESSES) taken[stage->slot[i]]++;
  }
  for (unsigned i = 0; i < PROCESSES; i++) CHECK_EQ(taken[i], 1);
  CHECK_EQ(without, 8);
  CHECK_EQ(atomic_load(&stage->joined) >> 32, 100);
  CHECK_EQ(alive_count(s), PROCESSES);
  stage->leave = 1;
  for (int i = 0; i < many; i++) end_child(pids[i]);
  CHECK_EQ(alive_count(s), 0);
  (void)munmap(stage, sizeof *stage);
  fshm_close(s);
}

/* Threads of one process share its slot; none waits for the one that is joining. */
static void *one_thread(void *with) {
  fshm_segment *s = with;
  uint32_t slot;
  while ((slot = process_slot(s)) == NO_SLOT) sched_yield();
  return (void *)(uintptr_t)slot;
}

static void test_threads_share(void) {
  for (int round = 0; round < 8; round++) {
    fshm_segment *s = fresh_segment(100);
    pthread_t threads[8];
    void *slot;
    for (int i = 0; i < 8; i++) CHECK_EQ(pthread_create(&threads[i], NULL, one_thread, s), 0);
    for (int i = 0; i < 8; i++) {
      CHECK_EQ(pthread_join(threads[i], &slot), 0);
      CHECK_EQ((uintptr_t)slot, process_slot(s));
    }
    CHECK_EQ(alive_count(s), 1);
    fshm_close(s);
  }
}

static void join_and_leave(int me, void *with) {
  (void)me;
  CHECK_OP(process_slot(with), <, PROCESSES);
}

static void reader_sees(int slot, void *with) {
  fshm_segment *s;
  fshm_error e;
  CHECK_EQ(fshm_open(with, 0, 0, FSHM_OPEN_READ_ONLY, &s, &e), FSHM_OK);
  CHECK(process_alive(s, (uint32_t)slot));
  fshm_close(s);
}

/* A process that has looked before it joined, and then closes what it looked through, stays alive:
 * closing any descriptor of the lock file would drop its lock. */
static void test_looking_does_not_kill(void) {
  fshm_segment *s, *looking;
  fshm_error e;
  fshm_process_info p;
  const char *name = fresh_name();
  CHECK_EQ(fshm_open(name, 100, 0600, FSHM_OPEN_CREATE, &s, &e), FSHM_OK);
  end_child(start_child(join_and_leave, 0, s)); /* makes the lock file */
  fshm_close(s);
  CHECK_EQ(fshm_open(name, 0, 0, FSHM_OPEN_READ_ONLY, &looking, &e), FSHM_OK);
  CHECK_EQ(alive_count(looking), 0);
  CHECK_EQ(fshm_open(name, 0, 0, 0, &s, &e), FSHM_OK);
  uint32_t mine = process_slot(s);
  end_child(start_child(reader_sees, (int)mine, (void *)(uintptr_t)name));
  CHECK_EQ(fshm_process_at(looking, mine, &p), FSHM_OK);
  CHECK(p.alive); /* seen by itself */
  fshm_close(looking);
  end_child(start_child(reader_sees, (int)mine, (void *)(uintptr_t)name));
  fshm_close(s);
}

static void lock_path(const fshm_segment *s, char *out, size_t size) {
  (void)snprintf(out, size, "%s.%016llx.lock", s->path, (unsigned long long)s->header->instance);
}

/* Where nobody can be asked, nobody is dead: their permits and slots stay theirs. */
static void test_unknown_counts_as_alive(void) {
  fshm_segment *s, *looking;
  fshm_error e;
  char path[400];
  const char *name = fresh_name();
  CHECK_EQ(fshm_open(name, 100, 0600, FSHM_OPEN_CREATE, &s, &e), FSHM_OK);
  stage_t *stage = new_stage(s);
  pid_t pid = start_child(join_and_stay, 0, stage);
  while (!atomic_load(&stage->joined)) (void)usleep(1000);
  lock_path(s, path, sizeof path);
  CHECK_EQ(unlink(path), 0);
  fshm_close(s); /* else the handle for reading would be the same */
  CHECK_EQ(fshm_open(name, 0, 0, FSHM_OPEN_READ_ONLY, &looking, &e), FSHM_OK);
  end_child(start_child(reader_sees, (int)stage->slot[0], (void *)(uintptr_t)name));
  stage->leave = 1;
  end_child(pid);
  fshm_close(looking);
  (void)munmap(stage, sizeof *stage);
}

/* Nobody would remove the lock file that a latecomer to a removed segment made. */
static void test_removed_segment_gets_no_lock_file(void) {
  fshm_segment *s = fresh_segment(100);
  fshm_error e;
  char path[400];
  lock_path(s, path, sizeof path);
  CHECK_EQ(fshm_remove(segment_names[segments_made - 1], &e), FSHM_OK);
  CHECK_EQ(process_slot(s), NO_SLOT);
  CHECK_EQ(access(path, F_OK), -1);
  fshm_close(s);
}

int main(void) {
  test_fork_joins_anew();
  test_zombie_is_dead();
  test_slots_are_reused();
  test_table_full();
  test_threads_share();
  test_looking_does_not_kill();
  test_unknown_counts_as_alive();
  test_removed_segment_gets_no_lock_file();
  return done();
}
