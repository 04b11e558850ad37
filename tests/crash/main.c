/* main.c - stop, overtake and kill a process at every instruction of every operation; run every schedule
 * of two processes with two preemptions. See operations.c for what is tried.
 *
 *   harness [--only NAME] [--at K] [--every N] [--above N] [--share K/N] [--jobs N] [--list]
 *
 * --only: operations and schedules whose name begins so. --at: only the boundary before instruction K.
 * --every: of operations of more than 2,000 instructions (or as many as --above says), T is stopped and killed at every
 * Nth boundary only, and at those before an access of the segment or a system call. --share: of a pair, the first is
 * preempted at its accesses K, K+N, K+2N... only; all shares together are all schedules. */
#define PROCESSES 320 /* a segment is copied for each boundary */
#define HOME_PROCESSES 256
#define WAITERS 32 /* the same; and a look at all of them is an access for each */
#define WAIT_GROUPS 16
#define LOOK_AGAIN_MS LOOKED_MS /* no path may depend on the time that passes: kill.c */
#define METRIC_SHARDS 1 /* or T and S would add up apart, and never meet */
#include "unity.c"
#include "check.h"

#include <sys/prctl.h>
#include <sys/resource.h>

#include "tracee.c"
#include "world.c"
#include "invariants.c"
#include "holds_rate_limits.c"
#include "starts.c"
#include "holds_permits.c"
#include "holds_queue.c"
#include "holds_names.c"
#include "holds_changes.c"
#include "holds_stats.c"
#include "holds_files.c"
#include "holds_first.c"
#include "holds_moving_windows.c"
#include "holds_token_leases.c"
#include "holds_permit_leases.c"
#include "holds_adaptive.c"
#include "holds_learned.c"
#include "holds_lead.c"
#include "holds_budgets.c"
#include "holds_wall.c"
#include "operations.c"
#include "kill.c"
#include "schedules.c"
#include "pairs.c"

#define COUNT(array) (sizeof(array) / sizeof *(array))

typedef struct {
  const char *name;
  const operation_t *operation;
  const pair_of_operations_t *pair; /* or this */
  pid_t pid;
  totals_t *totals;
} job_t;

static double seconds_now(void) {
  struct timespec t;
  (void)clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static bool wanted(const char *name) {
  return !options.only || !strncmp(name, options.only, strlen(options.only));
}

/* The child's part: one operation or pair of the table, on the segment of that name. */
static void work(const job_t *job, int place) {
  (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
  (void)signal(SIGINT, SIG_DFL);
  (void)signal(SIGTERM, SIG_DFL);
  cpu_set_t cpus;
  double began = seconds_now();
  CPU_ZERO(&cpus); /* T and S take turns: on one processor a stop costs a third */
  CPU_SET((size_t)place % (size_t)sysconf(_SC_NPROCESSORS_ONLN), &cpus);
  (void)sched_setaffinity(0, sizeof cpus, &cpus);
  (void)snprintf(segment_name, sizeof segment_name, "%s", segment_names[place]);
  counter_trusted = false; /* the kernel's clock: one path, however fast time goes */
  totals = job->totals;
  failed = 0;
  if (job->pair)
    try_schedules(job->pair);
  else
    try_operation(job->operation);
  totals->seconds = seconds_now() - began;
  totals->failures += failed;
  totals->done = true;
  (void)fflush(NULL);
  _exit(0);
}

static void tell(const job_t *job) {
  const totals_t *t = job->totals;
  if (!t->done) (void)fprintf(stderr, "FAILED %s: the harness died\n", job->name);
  printf("%-28s", job->name);
  if (t->boundaries) printf(" %6llu boundaries", (unsigned long long)t->boundaries);
  if (t->races) printf(" %5llu races", (unsigned long long)t->races);
  if (t->schedules) printf(" %6llu schedules", (unsigned long long)t->schedules);
  if (t->strayed) printf(" %llu strayed", (unsigned long long)t->strayed);
  printf(" %3llu failures %7.2f s\n", (unsigned long long)(t->failures + !t->done), t->seconds);
  passed += t->boundaries + t->races + t->schedules;
  passed -= min_u64(passed, t->failures);
  failed += t->failures + !t->done;
}

static job_t *jobs;
static size_t next; /* job to start */

/* Nothing is left in /dev/shm, whatever the workers were doing. */
static void stop_all(int number) {
  for (size_t i = 0; i < next; i++) {
    if (jobs[i].pid <= 0) continue;
    (void)kill(jobs[i].pid, SIGKILL);
    (void)waitpid(jobs[i].pid, NULL, 0);
  }
  for (int i = 0; i < segments_made; i++) (void)count_files(segment_names[i], "", true);
  _exit(128 + number);
}

static void run_jobs(size_t count) {
  int busy = 0;
  bool taken[MOST_SEGMENTS] = {false};
  int *places = calloc(count + 1, sizeof *places);
  if (!places) abort();
  while (next < count || busy) {
    while (next < count && busy < options.jobs) {
      int place = 0;
      while (taken[place]) place++;
      taken[place] = true;
      places[next] = place;
      (void)fflush(NULL);
      jobs[next].pid = fork();
      if (!jobs[next].pid) work(&jobs[next], place);
      next++;
      busy++;
    }
    pid_t ended = waitpid(-1, NULL, 0);
    for (size_t i = 0; i < next; i++) {
      if (jobs[i].pid != ended) continue;
      jobs[i].pid = 0; /* another job may get the same */
      (void)count_files(segment_names[places[i]], "", true);
      taken[places[i]] = false;
      busy--;
      tell(&jobs[i]);
    }
  }
  free(places);
}

int main(int argc, char **argv) {
  options = (options_t){
      .at = -1, .every = 1, .above = 2000, .shares = 1, .jobs = (int)sysconf(_SC_NPROCESSORS_ONLN)};
  bool list = false;
  for (int i = 1; i < argc; i++) {
    const char *value = i + 1 < argc ? argv[i + 1] : "";
    if (!strcmp(argv[i], "--list")) {
      list = true;
    } else if (!strcmp(argv[i], "--only")) {
      options.only = value, i++;
    } else if (!strcmp(argv[i], "--at")) {
      options.at = atoll(value), i++;
    } else if (!strcmp(argv[i], "--every")) {
      options.every = max_u64(1, strtoull(value, NULL, 10)), i++;
    } else if (!strcmp(argv[i], "--above")) {
      options.above = strtoull(value, NULL, 10), i++;
    } else if (!strcmp(argv[i], "--share")) {
      const char *slash = strchr(value, '/');
      options.shares = slash ? max_u64(1, strtoull(slash + 1, NULL, 10)) : 1;
      options.share = strtoull(value, NULL, 10) % options.shares, i++;
    } else if (!strcmp(argv[i], "--jobs")) {
      options.jobs = atoi(value), i++;
    } else {
      (void)fprintf(stderr, "unknown option %s: see tests/crash/main.c\n", argv[i]);
      return 2;
    }
  }
  if (options.jobs < 1) options.jobs = 1;
  if (options.jobs > MOST_SEGMENTS) options.jobs = MOST_SEGMENTS;
  static job_t all[COUNT(operations) + COUNT(pairs)];
  size_t count = 0;
  jobs = all;
  for (size_t i = 0; i < COUNT(operations); i++)
    if (wanted(operations[i].name))
      jobs[count++] = (job_t){.name = operations[i].name, .operation = &operations[i]};
  for (size_t i = 0; i < COUNT(pairs) && options.at < 0; i++)
    if (wanted(pairs[i].start.name))
      jobs[count++] = (job_t){.name = pairs[i].start.name, .pair = &pairs[i]};
  if (list) {
    for (size_t i = 0; i < count; i++) puts(jobs[i].name);
    return 0;
  }
  if (!count) {
    (void)fprintf(stderr, "nothing has that name: see --list\n");
    return 2;
  }
  for (int i = 0; i < options.jobs; i++) (void)fresh_name();
  (void)alarm(0); /* each step has a deadline of its own */
  (void)signal(SIGINT, stop_all);
  (void)signal(SIGTERM, stop_all);
  for (size_t i = 0; i < count; i++) jobs[i].totals = shared_memory(sizeof(totals_t));
  run_jobs(count);
  return done();
}
