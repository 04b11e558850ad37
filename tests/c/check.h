/* check.h - the little that the C tests share: CHECK, segments of their own, children that report.
 *
 * A test program includes unity.c first (so that it reaches the static functions), then this. It
 * calls done() last: that prints the counts, and main returns them as its exit code. */
#ifndef CHECK_H
#define CHECK_H

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/wait.h>

static _Atomic uint64_t passed, failed; /* test_threads.c checks in many threads */

#define CHECK(condition)                                                      \
  do {                                                                        \
    if (condition) {                                                          \
      passed++;                                                               \
    } else {                                                                  \
      failed++;                                                               \
      fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
    }                                                                         \
  } while (0)

#define CHECK_OP(a, op, b)                                                                         \
  do {                                                                                             \
    const long long a_ = (long long)(a), b_ = (long long)(b);                                      \
    if (a_ op b_) {                                                                                \
      passed++;                                                                                    \
    } else {                                                                                       \
      failed++;                                                                                    \
      fprintf(stderr, "%s:%d: not so: %s %s %s: %lld and %lld\n", __FILE__, __LINE__, #a, #op, #b, \
              a_, b_);                                                                             \
    }                                                                                              \
  } while (0)
#define CHECK_EQ(a, b) CHECK_OP(a, ==, b)

/* How often to try something at random: n times, a tenth of that under a tool that makes each of them tens of
 * times slower and finds what it looks for in the first ones (make memcheck). */
static inline int fewer(int n) { return getenv("CHECK_FEWER") ? (n + 9) / 10 : n; }

/* Numbers that are the same in every run, so that a failure comes again (splitmix64). */
static _Thread_local uint64_t random_state = 20240229;
static inline uint64_t random_u64(void) {
  uint64_t x = random_state += UINT64_C(0x9e3779b97f4a7c15);
  x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
  x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
  return x ^ x >> 31;
}
static inline uint64_t random_below(uint64_t n) { return random_u64() % n; }
/* low..high, every order of magnitude as likely as the next */
static inline uint64_t random_scaled(uint64_t low, uint64_t high) {
  uint64_t top = high >> random_below(bit_length(high / low));
  return top <= low ? low : low + random_below(top - low + 1);
}

/* segments ------------------------------------------------------------------------------------- */

#define MOST_SEGMENTS 32
static char segment_names[MOST_SEGMENTS][FSHM_MAX_NAME + 1];
static int segments_made;
static pid_t tester;

static inline void remove_segments(void) {
  fshm_error e;
  if (getpid() != tester) return; /* a child that ends the ordinary way */
  for (int i = 0; i < segments_made; i++) (void)fshm_remove(segment_names[i], &e);
}

static inline void interrupted(int number) {
  static const char late[] = "no end within 300 s: the test hangs, or the machine is overloaded\n";
  if (number == SIGALRM && write(STDERR_FILENO, late, sizeof late - 1) < 0) abort();
  remove_segments();
  (void)signal(number, SIG_DFL);
  (void)raise(number);
}

/* A name of its own; the segment of that name is removed at the end. */
static inline const char *fresh_name(void) {
  if (!tester) {
    const int fatal[] = {SIGINT, SIGTERM, SIGALRM, SIGSEGV, SIGABRT, SIGBUS};
    tester = getpid();
    (void)atexit(remove_segments);
    for (size_t i = 0; i < sizeof fatal / sizeof *fatal; i++) (void)signal(fatal[i], interrupted);
    (void)alarm(300); /* a test that hangs is a test that failed */
  }
  if (segments_made == MOST_SEGMENTS) abort();
  char *name = segment_names[segments_made];
  (void)snprintf(name, sizeof segment_names[0], "t-c-%d-%d", (int)tester, segments_made++);
  return name;
}

static inline fshm_segment *fresh_segment(uint64_t capacity) {
  fshm_segment *s;
  fshm_error e;
  if (fshm_open(fresh_name(), capacity, 0600, FSHM_OPEN_CREATE, &s, &e) != FSHM_OK) {
    fprintf(stderr, "cannot make %s: %d (%s)\n", e.path, e.code, strerror(e.sys_errno));
    exit(1);
  }
  return s;
}

static inline fshm_limiter *fresh_limiter(fshm_segment *s, const char *name, const fshm_limit *l,
                                          uint32_t count) {
  fshm_limiter *out;
  CHECK_EQ(fshm_limiter_open(s, name, strlen(name), l, count, &out), FSHM_OK);
  if (!out) exit(1);
  return out;
}

static inline fshm_decision apply_at(fshm_limiter *l, uint32_t op, const char *key, uint64_t cost,
                                     uint64_t now) {
  const uint64_t costs[FSHM_MAX_LIMITS] = {cost, cost, cost, cost};
  fshm_decision d;
  fshm_apply(l, op, key, strlen(key), costs, 0, now, &d);
  return d;
}

/* children ------------------------------------------------------------------------------------- */

/* Memory that children share with us. Zeroed. */
static inline void *shared_memory(size_t size) {
  void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) abort();
  return p;
}

/* Run task(i, with) in a process of its own; it says by its exit code whether its checks held. */
static inline pid_t start_child(void (*task)(int, void *), int i, void *with) {
  (void)fflush(NULL);
  pid_t pid = fork();
  if (pid) return pid;
  failed = 0;
  random_state += (uint64_t)(i + 1) * 7919;
  task(i, with);
  _exit(failed != 0);
}

static inline void end_child(pid_t pid) {
  int status = -1;
  CHECK_EQ(waitpid(pid, &status, 0), pid);
  CHECK_EQ(status, 0);
}

static inline void run_children(int n, void (*task)(int, void *), void *with) {
  pid_t pids[512];
  for (int i = 0; i < n; i++) {
    pids[i] = start_child(task, i, with);
    CHECK_OP(pids[i], >, 0);
  }
  for (int i = 0; i < n; i++)
    if (pids[i] > 0) end_child(pids[i]);
}

/* Wait until `parties` processes have come here `round` times (1, 2, ...). */
static inline void meet(_Atomic uint64_t *arrivals, uint64_t parties, uint64_t round) {
  atomic_fetch_add(arrivals, 1);
  for (int spins = 0; atomic_load(arrivals) < parties * round; spins++)
    if (spins > 1000) sched_yield(); /* at first not: so that all leave within some ns */
}

static inline int done(void) {
  printf("%llu passed, %llu failed\n", (unsigned long long)passed, (unsigned long long)failed);
  return failed != 0;
}

#endif
