/* test_process.c - who is alive: process indexes, death, forks, a full table. */
/* Fewer than a segment has otherwise, so that they can all be taken. */
#define PROCESSES 320
#define HOME_PROCESSES 64
#include "../../csrc/unity.c"

#include <dirent.h>

#include "check.h"

static unsigned alive_count(fshm_segment *s) {
  unsigned n = 0;
  for (unsigned i = 0; i < PROCESSES; i++) {
    fshm_process_info p;
    CHECK_EQ(fshm_process_at(s, i, &p), FSHM_OK);
    n += p.alive != 0;
  }
  return n;
}

typedef struct {
  fshm_segment *s;
  _Atomic uint64_t joined, leave;
  _Atomic uint32_t process[PROCESSES + 8];
} stage_t;

static void join_and_stay(int me, void *with) {
  stage_t *stage = with;
  stage->process[me] = process_join(stage->s);
  atomic_fetch_add(&stage->joined, 1);
  while (!atomic_load(&stage->leave)) (void)usleep(2000);
}

static stage_t *new_stage(fshm_segment *s) {
  stage_t *stage = shared_memory(sizeof *stage);
  stage->s = s;
  return stage;
}

/* A forked child does not take itself for its parent: it joins by itself, with a process index of its own. */
static void test_fork_joins_anew(void) {
  fshm_segment *s = fresh_segment(100);
  stage_t *stage = new_stage(s);
  uint32_t mine = process_index(s);
  CHECK_OP(mine, <, PROCESSES);
  CHECK_EQ(process_index(s), mine);
  pid_t pid = start_child(join_and_stay, 0, stage);
  while (!atomic_load(&stage->joined)) (void)usleep(1000);
  CHECK(stage->process[0] != mine && stage->process[0] < PROCESSES);
  CHECK(process_alive(s, mine) && process_alive(s, stage->process[0]));
  CHECK_EQ(alive_count(s), 2);
  fshm_process_info p;
  CHECK_EQ(fshm_process_at(s, stage->process[0], &p), FSHM_OK);
  CHECK_EQ(p.pid, pid);
  stage->leave = 1;
  end_child(pid);
  CHECK(!process_alive(s, stage->process[0]));
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
  CHECK(process_alive(s, stage->process[0]));
  CHECK_EQ(kill(pid, SIGKILL), 0);
  CHECK_EQ(waitid(P_PID, (id_t)pid, &info, WEXITED | WNOWAIT), 0); /* not reaped */
  CHECK(!process_alive(s, stage->process[0]));
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
static void test_indexes_are_reused(void) {
  fshm_segment *s = fresh_segment(100);
  const fshm_limit l = {1000000, UINT64_C(1) << 40, 0, FSHM_WINDOW, 0};
  fshm_limiter *a = fresh_limiter(s, "a", &l, 1);
  const int many = 2 * PROCESSES + 10;
  for (int i = 0; i < many; i++) (void)waitpid(start_child(count_and_die, i, a), NULL, 0);
  fshm_counters all[FSHM_COUNTERS];
  fshm_counters_all(s, all);
  CHECK_EQ(all[0].admitted, many * 10);
  for (unsigned i = 0; i < PROCESSES;
       i++) { /* the last owner's alone, whatever others did before it */
    fshm_process_info p;
    CHECK_EQ(fshm_process_at(s, i, &p), FSHM_OK);
    CHECK(p.admitted == 10 || p.pid == (uint32_t)getpid() || !p.pid);
  }
  CHECK_EQ(alive_count(s), 1);
  fshm_limiter_close(a);
  fshm_close(s);
}

/* More processes than process indexes: the rest count into the key statistics, and limit as everybody does. */
static void join_and_take(int me, void *with) {
  stage_t *stage = with;
  fshm_limiter *l;
  const fshm_limit limit = {100, UINT64_C(1) << 40, 0, FSHM_WINDOW, 0};
  stage->process[me] = process_index(stage->s);
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
    without += stage->process[i] >= PROCESSES;
    if (stage->process[i] < PROCESSES) taken[stage->process[i]]++;
  }
  for (unsigned i = 0; i < PROCESSES; i++) CHECK_EQ(taken[i], 1);
  CHECK_EQ(without, 8);
  fshm_geometry g;
  struct stat st;
  fshm_describe(s, &g);
  CHECK_EQ(g.processes_joined, PROCESSES);
  const uint64_t records =
      record_count(s->capacity) * sizeof(limit_record_t); /* when they are used */
  CHECK_EQ(g.memory, g.size - records);
  CHECK_EQ(stat(s->path, &st), 0);
  CHECK_OP(st.st_blocks * 512, >=,
           st.st_size - (off_t)records); /* their rows are there: no SIGBUS */
  CHECK_EQ(atomic_load(&stage->joined) >> 32, 100);
  CHECK_EQ(alive_count(s), PROCESSES);
  stage->leave = 1;
  for (int i = 0; i < many; i++) end_child(pids[i]);
  CHECK_EQ(alive_count(s), 0);
  (void)munmap(stage, sizeof *stage);
  fshm_close(s);
}

/* Threads of one process share its process index; none waits for the one that is joining. */
static void *one_thread(void *with) {
  fshm_segment *s = with;
  uint32_t process;
  while ((process = process_index(s)) == NO_PROCESS) sched_yield();
  return (void *)(uintptr_t)process;
}

static void test_threads_share(void) {
  for (int round = 0; round < 8; round++) {
    fshm_segment *s = fresh_segment(100);
    pthread_t threads[8];
    void *process;
    for (int i = 0; i < 8; i++) CHECK_EQ(pthread_create(&threads[i], NULL, one_thread, s), 0);
    for (int i = 0; i < 8; i++) {
      CHECK_EQ(pthread_join(threads[i], &process), 0);
      CHECK_EQ((uintptr_t)process, process_index(s));
    }
    CHECK_EQ(alive_count(s), 1);
    fshm_close(s);
  }
}

static void join_and_leave(int me, void *with) {
  (void)me;
  CHECK_OP(process_index(with), <, PROCESSES);
}

static void reader_sees(int process, void *with) {
  fshm_segment *s;
  fshm_error e;
  CHECK_EQ(fshm_open(with, 0, 0, FSHM_OPEN_READ_ONLY, &s, &e), FSHM_OK);
  CHECK(process_alive(s, (uint32_t)process));
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
  uint32_t mine = process_index(s);
  end_child(start_child(reader_sees, (int)mine, (void *)(uintptr_t)name));
  CHECK_EQ(fshm_process_at(looking, mine, &p), FSHM_OK);
  CHECK(p.alive); /* seen by itself */
  fshm_close(looking);
  end_child(start_child(reader_sees, (int)mine, (void *)(uintptr_t)name));
  fshm_close(s);
}

static uint32_t noted(fshm_segment *s, uint32_t process) {
  fshm_process_info p;
  CHECK_EQ(fshm_process_at(s, process, &p), FSHM_OK);
  return p.outage;
}

static void notes_and_leaves(int me, void *with) {
  fshm_segment *s = with;
  uint32_t process = process_index(s);
  CHECK_EQ(noted(s, process),
           0); /* whatever its parent, or an earlier owner of the process index, had noted */
  fshm_process_note(s, (uint32_t)me);
  CHECK_EQ(noted(s, process), me);
}

/* What a process has others shown is its own, and dies with it. */
static void test_notes(void) {
  fshm_segment *s = fresh_segment(100);
  uint32_t mine = process_index(s);
  fshm_process_note(s, 7);
  CHECK_EQ(noted(s, mine), 7);
  for (uint32_t i = 0; i < HOME_PROCESSES; i++)
    if (i != mine) store_relaxed(&s->processes[i].outage, 77); /* as dead owners left it */
  for (int i = 1; i < 5; i++) end_child(start_child(notes_and_leaves, i, s));
  CHECK_EQ(noted(s, mine), 7);
  fshm_process_note(s, 0);
  CHECK_EQ(noted(s, mine), 0);
  fshm_close(s);
}

static void lock_path(const fshm_segment *s, char *out, size_t size) {
  (void)snprintf(out, size, "%s.%016llx.lock", s->path, (unsigned long long)s->header->instance);
}

/* Where no liveness check is possible, no process is dead: their permits and process indexes stay theirs. */
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
  end_child(start_child(reader_sees, (int)stage->process[0], (void *)(uintptr_t)name));
  stage->leave = 1;
  end_child(pid);
  fshm_close(looking);
  (void)munmap(stage, sizeof *stage);
}

/* No process would remove the lock file that a latecomer to a removed segment made. */
static void test_removed_segment_gets_no_lock_file(void) {
  fshm_segment *s = fresh_segment(100);
  fshm_error e;
  char path[400];
  lock_path(s, path, sizeof path);
  CHECK_EQ(fshm_remove(segment_names[segments_made - 1], &e), FSHM_OK);
  CHECK_EQ(process_index(s), NO_PROCESS);
  CHECK_EQ(access(path, F_OK), -1);
  fshm_close(s);
}

static void deny_a_newcomer(int process, void *with) {
  fshm_segment *s;
  fshm_error e;
  CHECK_EQ(fshm_open(with, 0, 0, 0, &s, &e), FSHM_OK);
  CHECK_EQ(process_index(s), NO_PROCESS);
  CHECK(process_alive(s, (uint32_t)process));
  CHECK_EQ(process_refusal(s), FSHM_E_LOCK_FILE);
  CHECK_EQ(fshm_liveness(s, &e), FSHM_E_LOCK_FILE);
  CHECK(e.sys_errno == ENOENT || e.sys_errno == ESTALE);
  fshm_close(s);
}

static void join_as_a_fork(int process, void *with) {
  fshm_segment *s = with;
  CHECK_OP(process_index(s), <, PROCESSES);
  CHECK(process_index(s) != (uint32_t)process && process_alive(s, (uint32_t)process));
}

/* An outsider deletes the lock file, or puts another in its place: it tells nothing about those who
 * hold the first, so it is not asked, and none is made anew. Those who have the first open go on. */
static void test_deleted_lock_file(void) {
  fshm_error e;
  char path[400], kept[400];
  const char *name = fresh_name();
  fshm_segment *s;
  CHECK_EQ(fshm_open(name, 100, 0600, FSHM_OPEN_CREATE, &s, &e), FSHM_OK);
  CHECK_EQ(fshm_liveness(s, &e), FSHM_OK); /* no process has joined: there is none yet */
  lock_path(s, path, sizeof path);
  lock_path(s, kept, sizeof kept - 8);
  (void)strcat(kept, ".kept");
  CHECK_EQ(access(path, F_OK), -1);
  stage_t *stage = new_stage(s);
  pid_t pid = start_child(join_and_stay, 0, stage); /* the first to join */
  while (!atomic_load(&stage->joined)) (void)usleep(1000);
  const uint64_t incarnation = s->processes[stage->process[0]].incarnation;
  CHECK_EQ(fshm_liveness(s, &e), FSHM_OK);
  int mine = (int)process_index(s);
  CHECK_EQ(rename(path, kept), 0);
  for (int other = 0; other < 2; other++) {
    CHECK_EQ(fshm_liveness(s, &e), FSHM_E_LOCK_FILE);
    CHECK_EQ(e.sys_errno, other ? ESTALE : ENOENT);
    CHECK(process_alive(s, stage->process[0]));
    end_child(start_child(join_as_a_fork, mine, s));
    void *theirs = (void *)(uintptr_t)name;
    /* not a fork of ours, that is, without our descriptors */
    fshm_segment *list = open_segments;
    open_segments = NULL;
    end_child(start_child(deny_a_newcomer, (int)stage->process[0], theirs));
    open_segments = list;
    CHECK_EQ(access(path, F_OK), other ? 0 : -1);
    CHECK_EQ(close(open(path, O_CREAT | O_RDWR, 0600)), 0);
  }
  CHECK_EQ(s->processes[stage->process[0]].incarnation, incarnation);
  stage->leave = 1;
  end_child(pid);
  CHECK(!process_alive(
      s, stage->process[0])); /* by the descriptor of the first file, all can be checked */
  CHECK_EQ(rename(kept, path), 0);
  CHECK_EQ(fshm_liveness(s, &e), FSHM_OK);
  (void)munmap(stage, sizeof *stage);
  fshm_close(s);
}

static void is_seen(int process, void *with) {
  fshm_segment *s = with;
  CHECK(process_alive(s, (uint32_t)process));
  CHECK(process_index(s) != (uint32_t)process);
}

static void is_not_seen(int process, void *with) { CHECK(!process_alive(with, (uint32_t)process)); }

/* The other modes that a process's locks can be in: by its memory, by a descriptor that is kept (where a mapping
 * does not keep a description), and as POSIX locks (where it may not open the file that it inherited). */
enum { MAPPED, KEPT, POSIX_LOCKS, MODES };

static fshm_segment *joined_segment(int mode, uint32_t *process) {
  fshm_segment *s = fresh_segment(100);
  char path[400];
  if (mode != MAPPED) s->unmapped = 1;
  if (mode == POSIX_LOCKS) { /* as in test_deleted_lock_file, without /proc */
    CHECK(lock_file_ready(s));
    lock_path(s, path, sizeof path);
    s->instance++;
    s->lock_fd = fcntl(s->lock_fd, F_DUPFD_CLOEXEC, 1000);
    (void)snprintf(path, sizeof path, "/proc/self/fd/%d", s->lock_fd);
    CHECK_EQ(unshare(CLONE_FS) | chroot("/dev/shm"), 0);
  }
  *process = process_index(s);
  CHECK_OP(*process, <, PROCESSES);
  return s;
}

static int lock_files_open(const fshm_segment *s) {
  int n = 0;
  for (int fd = 0; fd < 1200; fd++) n += is_file(fd, s->lock_dev, s->lock_ino);
  return n;
}

static void lives_through_all(int mode, void *with) {
  uint32_t mine;
  fshm_error e;
  (void)with;
  fshm_segment *s = joined_segment(mode, &mine);
  uint64_t incarnation = s->processes[mine].incarnation, seen;
  uint32_t process;
  CHECK_EQ(s->fork_page->hold != 0, mode == MAPPED);
  CHECK_EQ(s->fork_page->kept == s->lock_fd + 1, mode == POSIX_LOCKS);
  end_child(start_child(is_seen, (int)mine, s));
  /* A process reads it. */
  (void)close(dup(s->lock_fd));
  if (mode == POSIX_LOCKS) { /* that loses them, unnoticed by the kernel: by us, at the next call */
    end_child(start_child(is_not_seen, (int)mine, s));
    CHECK_EQ(fshm_liveness(s, &e), FSHM_E_NOT_FOUND); /* (the path is not what it was) */
  }
  CHECK(process_identity(s, &process, &seen) && process == mine && seen == incarnation);
  end_child(start_child(is_seen, (int)mine, s));
  if (mode == POSIX_LOCKS) return;
  CHECK_EQ(fshm_liveness(s, &e), FSHM_OK);
  /* A daemoniser closes everything, and the numbers are other files'. */
  int zero = open("/dev/zero", O_RDONLY), others = 0;
  for (int fd = 3; fd < 64; fd++)
    if (is_file(fd, s->lock_dev, s->lock_ino)) CHECK_EQ(dup2(zero, fd), fd);
  CHECK_EQ(lock_files_open(s), 0);
  CHECK_EQ(fshm_unlinked(s), 0);
  CHECK_EQ(fshm_liveness(s, &e), mode == KEPT ? FSHM_E_LOCK_FILE : FSHM_OK);
  end_child(start_child(mode == KEPT ? is_not_seen : is_seen, (int)mine, s));
  CHECK(process_identity(s, &process, &seen) && process == mine && seen == incarnation);
  end_child(start_child(is_seen, (int)mine, s));
  CHECK_EQ(fshm_liveness(s, &e),
           mode == KEPT ? FSHM_E_LOCK_FILE : FSHM_OK); /* it says so for good */
  if (mode == KEPT) CHECK_EQ(e.sys_errno, EBADF);
  fshm_close(s);
  struct stat st;
  (void)fstat(zero, &st);
  for (int fd = 3; fd < 64; fd++) others += is_file(fd, (uint64_t)st.st_dev, st.st_ino);
  CHECK_EQ(others, 1 + (mode == KEPT ? 2 : 1)); /* not closed either */
}

static void test_lives(void) {
  /* each in a process of its own, since it closes descriptors */
  for (int mode = 0; mode < MODES; mode++) {
    if (mode == POSIX_LOCKS && geteuid()) continue; /* chroot */
    end_child(start_child(lives_through_all, mode, NULL));
  }
}

static void stays_with_a_child(int mode, void *with) {
  stage_t *stage = with;
  if (mode == KEPT) stage->s->unmapped = 1;
  stage->process[0] = process_index(stage->s);
  if (!fork()) { /* it never calls the library, and no process makes it */
    atomic_fetch_add(&stage->joined, 1);
    while (!atomic_load(&stage->leave)) (void)usleep(2000);
    atomic_fetch_add(&stage->joined, 1);
    _exit(0);
  }
  while (!atomic_load(&stage->joined)) (void)usleep(1000);
}

/* Dead is who is dead, though a child of it that never came here lives on. */
static void test_dies_before_its_child(void) {
  for (int mode = MAPPED; mode <= KEPT; mode++) {
    fshm_segment *s = fresh_segment(100);
    stage_t *stage = new_stage(s);
    end_child(start_child(stays_with_a_child, mode, stage));
    CHECK(!process_alive(s, stage->process[0]));
    stage->leave = 1;
    while (atomic_load(&stage->joined) < 2) (void)usleep(1000);
    (void)munmap(stage, sizeof *stage);
    fshm_close(s);
  }
}

static void takes_the_index(int process, void *with) {
  fshm_segment *s = with;
  CHECK(lock_file_ready(s));
  const description_t d = open_description(s);
  for (uint32_t i = 0; i < PROCESSES; i++) /* no other is left */
    if (i != (uint32_t)process) (void)byte_lock(d.fd, d.command, F_WRLCK, OWNED(i));
  CHECK_EQ(process_index(s), (uint32_t)process);
  raise(SIGSTOP);
}

/* Where locks were dropped, another process may take the process index: it lives while it lives, and is not taken for us
 * when it is dead; and we join anew. */
static void test_index_lost_to_another(void) {
  fshm_segment *s = fresh_segment(100);
  s->unmapped = 1;
  uint32_t mine = process_index(s), process;
  uint64_t before = s->fork_page->incarnation, incarnation;
  CHECK_OP(mine, <, PROCESSES);
  (void)close(s->fork_page->kept - 1);
  CHECK(process_alive(s, mine));
  pid_t pid = start_child(takes_the_index, (int)mine, s);
  int status;
  CHECK_EQ(waitpid(pid, &status, WUNTRACED), pid);
  CHECK(WIFSTOPPED(status));
  CHECK(process_alive(s, mine));
  CHECK_EQ(kill(pid, SIGKILL), 0);
  CHECK_EQ(waitpid(pid, &status, 0), pid);
  CHECK(WIFSIGNALED(status));
  CHECK(!process_alive(s, mine));
  CHECK(process_identity(s, &process, &incarnation));
  CHECK(process != mine || incarnation > before);
  CHECK(process_alive(s, process));
  end_child(start_child(is_seen, (int)process, s));
  fshm_close(s);
}

/* Two copies of the library in one process are two owners. */
static void test_second_copy(void) {
  fshm_segment *s = fresh_segment(100), *other, *list = open_segments;
  fshm_error e;
  uint32_t mine = process_index(s);
  uint64_t incarnation = s->processes[mine].incarnation;
  open_segments = NULL;
  CHECK_EQ(fshm_open(segment_names[segments_made - 1], 0, 0, 0, &other, &e), FSHM_OK);
  CHECK(process_index(other) != mine && process_index(other) < PROCESSES);
  CHECK_EQ(s->processes[mine].incarnation, incarnation);
  CHECK(process_alive(other, mine) && process_alive(s, process_index(other)));
  CHECK_EQ(alive_count(s), 2);
  fshm_close(other);
  open_segments = list;
  CHECK_EQ(alive_count(s), 1);
  fshm_close(s);
}

static __attribute__((noreturn)) void too_late(int number) { _exit(number); }

static void locks_in_a_namespace(int depth, void *with) {
  static _Atomic uint32_t lock;
  int status = 0;
  if (depth < 2) CHECK_EQ(unshare(CLONE_NEWPID), 0);
  pid_t pid = depth < 2 ? fork() : -1;
  if (!pid) {
    (void)signal(SIGALRM, too_late); /* by default, pid 1 of a namespace goes on */
    (void)alarm(20);
    if (depth == 1) CHECK_EQ(getpid(), 1); /* as its parent */
    threads_lock(&lock); /* depth 1: its parent's thread has it */
    locks_in_a_namespace(depth + 1, with);
    _exit(failed != 0);
  }
  if (pid > 0) CHECK_EQ(waitpid(pid, &status, 0), pid);
  CHECK_EQ(status, 0);
}

/* A child whose pid is its parent's, in a namespace of its own, does not take the parent for itself. */
static void test_same_pid(void) {
  if (!geteuid()) end_child(start_child(locks_in_a_namespace, 0, NULL));
}

/* incarnations that come round ------------------------------------------------------------------------ */

typedef struct {
  fshm_limiter *l;
  uint32_t process;
} race_round_t;

static void hold_one_and_die(int me, void *with) {
  race_round_t *r = with;
  fshm_permit p;
  fshm_decision d;
  uint32_t held;
  fshm_segment *s = r->l->segment;
  (void)me;
  CHECK(lock_file_ready(s));
  const description_t all = open_description(s);
  for (uint32_t i = 0; i < PROCESSES; i++)
    if (i != r->process) (void)byte_lock(all.fd, all.command, F_WRLCK, OWNED(i));
  CHECK_EQ(process_index(s), r->process);
  if (me) fshm_admit(r->l, "k", 1, NULL, 0, &p, &d, &held);
  if (me) CHECK_EQ(d.status, FSHM_ALLOWED);
  if (me > 1) raise(SIGSTOP);
}

/* A dead process's permit is not a living one's whose incarnation has the same lowest bits, 2^14 owners of the
 * process index later. */
static void test_incarnations_come_round(void) {
  const fshm_limit two = {2, 0, 0, FSHM_PERMITS, 0};
  fshm_segment *s = fresh_segment(1000);
  race_round_t r = {fresh_limiter(s, "round", &two, 1), 0};
  int status;
  uint32_t mine = process_index(s);
  r.process = (mine + 1) % HOME_PROCESSES;
  process_t *p = &s->processes[r.process];
  end_child(start_child(hold_one_and_die, 1, &r));
  CHECK_EQ(p->incarnation, 1);
  const uint64_t round = UINT64_C(1) << INCARNATION_BITS;
  store_relaxed(&p->incarnation, round - 2); /* all those before came and went */
  end_child(start_child(hold_one_and_die, 0, &r));
  end_child(start_child(hold_one_and_die, 0, &r));
  CHECK_EQ(p->incarnation, round);
  pid_t pid = start_child(hold_one_and_die, 2, &r);
  CHECK_EQ(waitpid(pid, &status, WUNTRACED), pid);
  CHECK(WIFSTOPPED(status));
  CHECK_EQ(p->incarnation, round + 1);
  CHECK_EQ(fshm_in_flight(r.l, "k", 1), 1);
  CHECK_EQ(kill(pid, SIGKILL), 0);
  CHECK_EQ(waitpid(pid, &status, 0), pid);
  for (int i = 0; i < 10000 && fshm_in_flight(r.l, "k", 1); i++) (void)usleep(1000);
  CHECK_EQ(fshm_in_flight(r.l, "k", 1), 0);
  fshm_limiter_close(r.l);
  fshm_close(s);
}

/* threads that begin at once --------------------------------------------------------------------- */

#define THREADS 8
typedef struct {
  fshm_segment *s;
  _Atomic uint64_t *arrivals;
  uint64_t incarnation;
} starter_t;

static void run_threads(fshm_segment *s, void *(*task)(void *), starter_t *out) {
  _Atomic uint64_t arrivals = 0;
  pthread_t threads[THREADS];
  for (int i = 0; i < THREADS; i++) {
    out[i] = (starter_t){s, &arrivals, 0};
    CHECK_EQ(pthread_create(&threads[i], NULL, task, &out[i]), 0);
  }
  for (int i = 0; i < THREADS; i++) CHECK_EQ(pthread_join(threads[i], NULL), 0);
}

static void *look_at_somebody(void *with) {
  starter_t *me = with;
  meet(me->arrivals, THREADS, 1);
  CHECK(!process_alive(me->s, 0));
  return NULL;
}

static int open_files(void) {
  int n = 0;
  DIR *all = opendir("/proc/self/fd");
  while (all && readdir(all)) n++;
  if (all) (void)closedir(all);
  return n;
}

/* Threads that ask after others before their process has joined open the lock file once. */
static void test_one_lock_file(void) {
  starter_t out[THREADS];
  int before = open_files();
  for (int round = 0; round < 50; round++) {
    fshm_segment *s = fresh_segment(10);
    run_threads(s, look_at_somebody, out);
    CHECK_EQ(open_files(), before + 1); /* the segment, and its lock file */
    fshm_error e;
    CHECK_EQ(fshm_remove(segment_names[--segments_made], &e), FSHM_OK);
    fshm_close(s);
  }
  CHECK_EQ(open_files(), before);
}

static void *join(void *with) {
  starter_t *me = with;
  meet(me->arrivals, 2, 1);
  (void)process_index(me->s);
  return NULL;
}

/* Removed while a process joins: the lock file goes too, whichever comes first. */
static void test_removed_while_joining(void) {
  for (int round = 0; round < fewer(500); round++) {
    fshm_segment *s = fresh_segment(10);
    _Atomic uint64_t arrivals = 0;
    starter_t starter = {s, &arrivals, 0};
    pthread_t thread;
    fshm_error e;
    char path[400];
    lock_path(s, path, sizeof path);
    CHECK_EQ(pthread_create(&thread, NULL, join, &starter), 0);
    meet(&arrivals, 2, 1);
    for (int i = 0; i < round % 100; i++) (void)fshm_now(s);
    CHECK_EQ(fshm_remove(segment_names[--segments_made], &e), FSHM_OK);
    CHECK_EQ(pthread_join(thread, NULL), 0);
    CHECK_EQ(access(path, F_OK), -1);
    (void)unlink(path);
    fshm_close(s);
  }
}

static void hold_all_indexes(int me, void *with) {
  stage_t *stage = with;
  (void)me;
  struct flock all = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 0, .l_len = PROCESSES};
  CHECK(lock_file_ready(stage->s));
  CHECK_EQ(fcntl(stage->s->lock_fd, F_SETLK, &all), 0);
  atomic_fetch_add(&stage->joined, 1);
  while (!atomic_load(&stage->leave)) (void)usleep(100);
}

static void *ask_for_identity(void *with) {
  starter_t *me = with;
  uint32_t process;
  meet(me->arrivals, THREADS, 1);
  CHECK(process_identity(me->s, &process, &me->incarnation));
  return NULL;
}

/* A process that found the table full tries again; its threads join once for all, or what one of them
 * holds would be an earlier owner's, and anybody's to take. */
static void test_threads_join_once(void) {
  starter_t out[THREADS];
  for (int round = 0; round < fewer(100); round++) {
    fshm_segment *s = fresh_segment(10);
    stage_t *stage = new_stage(s);
    pid_t pid = start_child(hold_all_indexes, 0, stage);
    while (!atomic_load(&stage->joined)) (void)usleep(100);
    CHECK_EQ(process_index(s), NO_PROCESS);
    stage->leave = 1;
    end_child(pid);
    run_threads(s, ask_for_identity, out);
    for (int i = 0; i < THREADS; i++) CHECK_EQ(out[i].incarnation, 1);
    fshm_error e;
    CHECK_EQ(fshm_remove(segment_names[--segments_made], &e), FSHM_OK);
    (void)munmap(stage, sizeof *stage);
    fshm_close(s);
  }
}

int main(void) {
  test_fork_joins_anew();
  test_zombie_is_dead();
  test_indexes_are_reused();
  test_table_full();
  test_threads_share();
  test_looking_does_not_kill();
  test_notes();
  test_unknown_counts_as_alive();
  test_removed_segment_gets_no_lock_file();
  test_deleted_lock_file();
  test_lives();
  test_dies_before_its_child();
  test_index_lost_to_another();
  test_second_copy();
  test_same_pid();
  test_incarnations_come_round();
  test_one_lock_file();
  test_removed_while_joining();
  test_threads_join_once();
  return done();
}
