/* world.c - the segment that an operation is tried on: made, saved, put back; and reports about it. */
#include <setjmp.h>
#include <stdarg.h>
#include <sys/time.h>

#include "crash.h"

#define DEADLINE 2 /* seconds in which S must have finished */
#define MOST_REPORTS 5 /* of one operation; it is given up after that */

static char segment_name[FSHM_MAX_NAME + 1];
static world_t world, world_at_start;
static const operation_t *op;
static outcome_t *told; /* T's answer, in shared memory */
static options_t options;
static totals_t *totals;
static position_t position;

/* By a system call: one instruction, where the kernel's code in user space takes a path now and another
 * then. Stands for the C library's, which is the same otherwise. */
int clock_gettime(clockid_t clock, struct timespec *out) {
  int status = (int)syscall(SYS_clock_gettime, clock, out);
  if (world.clock && clock == CLOCK_BOOTTIME)
    *out = (struct timespec){(time_t)(world.clock / 1000000000), (long)(world.clock % 1000000000)};
  const uint64_t wall = world.clock + world.wall;
  if (world.wall && clock == CLOCK_REALTIME)
    *out = (struct timespec){(time_t)(wall / 1000000000), (long)(wall % 1000000000)};
  return status;
}

/* As on a file system that knows no unnamed files. Stands for the C library's too. */
static bool no_unnamed_files;
int open(const char *path, int flags, ...) {
  va_list arguments;
  va_start(arguments, flags);
  mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(arguments, mode_t) : 0;
  va_end(arguments);
  if (no_unnamed_files && (flags & O_TMPFILE) == O_TMPFILE) {
    errno = EOPNOTSUPP;
    return -1;
  }
  return (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}

/* reports -------------------------------------------------------------------------------------- */

/* Function and line of an instruction, if addr2line is there. */
static void describe_place(uint64_t pc, char *out, size_t size) {
  char command[160], function[96] = "", line[160] = "";
  (void)snprintf(command, sizeof command, "addr2line -sfie /proc/%d/exe 0x%llx 2>/dev/null",
                 (int)getpid(), (unsigned long long)pc);
  FILE *f = pc ? popen(command, "r") : NULL;
  if (f) {
    if (fgets(function, sizeof function, f) && fgets(line, sizeof line, f)) {
      function[strcspn(function, "\n")] = 0;
      line[strcspn(line, "\n")] = 0;
    }
    (void)pclose(f);
  }
  (void)snprintf(out, size, "%s %s (0x%llx)", function[0] ? function : "?", line,
                 (unsigned long long)pc);
}

/* Something does not hold: printed once for each boundary, with how to repeat it. */
__attribute__((format(printf, 1, 2))) static void broken(const char *format, ...) {
  char what[256], place[320];
  va_list arguments;
  if (position.failed) return;
  position.failed = true;
  if (totals->failures++ >= MOST_REPORTS) return;
  va_start(arguments, format);
  (void)vsnprintf(what, sizeof what, format, arguments);
  va_end(arguments);
  describe_place(position.pc, place, sizeof place);
  if (position.schedule)
    (void)fprintf(stderr,
                  "FAILED %s: schedule %zu, %zu, %s: %s\n"
                  "  the second was preempted before: %s\n  repeat: make crash CRASH='--only %s'\n",
                  op->name, position.k, position.j, position.stage, what, place, op->name);
  else
    (void)fprintf(stderr,
                  "FAILED %s: boundary %zu, %s: %s\n"
                  "  stopped before: %s\n  repeat: make crash CRASH='--only %s --at %zu'\n",
                  op->name, position.k, position.stage, what, place, op->name, position.k);
}

static bool hung; /* one that hangs is enough */
static bool given_up(void) { return hung || totals->failures >= MOST_REPORTS; }

/* deadlines ------------------------------------------------------------------------------------ */

static sigjmp_buf too_late;
static void alarmed(int number) {
  (void)number;
  siglongjmp(too_late, 1);
}

/* S works; if it has not finished in time, that is the failure that is reported. */
static void in_time(void (*work)(void)) {
  const struct itimerval until = {{0, 0}, {DEADLINE, 0}}, never = {{0, 0}, {0, 0}};
  (void)signal(SIGALRM, alarmed);
  if (sigsetjmp(too_late, 1)) {
    atomic_store(&list_holder, 0); /* in case it hung there */
    broken("not finished within %d s", DEADLINE);
    hung = true;
    return;
  }
  (void)setitimer(ITIMER_REAL, &until, NULL);
  work();
  (void)setitimer(ITIMER_REAL, &never, NULL);
}

/* A process that comes anew does the task, and dies. Returns its answer, 0..255; -1 = it failed. */
static int fresh_process(int (*task)(void)) {
  int status = 0;
  pid_t pid = fork();
  if (!pid) {
    (void)signal(SIGALRM, SIG_DFL);
    (void)alarm(DEADLINE);
    _exit(task());
  }
  if (pid < 0 || waitpid(pid, &status, 0) != pid || !WIFEXITED(status)) return -1;
  return WEXITSTATUS(status);
}

/* snapshots ------------------------------------------------------------------------------------ */

static unsigned char *pristine, *stopped;

static void copy_differences(unsigned char *to, const unsigned char *from, uint64_t size) {
  for (uint64_t at = 0; at < size; at += 4096)
    if (memcmp(to + at, from + at, 4096)) memcpy(to + at, from + at, 4096);
}

static void segment_save(unsigned char **to) {
  if (!world.s) return;
  if (!*to && !(*to = malloc(world.s->size))) abort();
  copy_differences(*to, world.s->map, world.s->size);
}

/* Put the segment's bytes back, and what this process had. No other process may be at work. */
/* S remembers no look at permits, be it from another boundary or when T lived. */
static void forget_looks(void) { memset(world.s->looks, 0, sizeof world.s->looks); }

static void segment_restore(const unsigned char *from) {
  if (!world.s) return;
  forget_looks();
  copy_differences(world.s->map, from, world.s->size);
  world = world_at_start;
  fshm_limiter *handles[] = {world.l, world.others, world.totals};
  for (size_t i = 0; i < sizeof handles / sizeof *handles; i++) {
    if (!handles[i]) continue;
    handles[i]->released = 0;
    handles[i]->frontier = 0;
    handles[i]->beyond = 0;
  }
}

/* levels: what a key has consumed -------------------------------------------------------------- */

typedef struct {
  uint32_t count;
  uint64_t remaining[FSHM_MAX_LIMITS], state[FSHM_MAX_LIMITS]; /* state 0: as if never seen */
} levels_t;

static uint64_t now_or_clock(void) { return world.now ? world.now : fshm_now(world.s); }

/* A key whose limit comes with its calls. */
static keyed_t side_of(const fshm_limiter *l, const char *key) {
  keyed_t k = {0};
  snapshot_t snapshot;
  if (!limits_load(world.s, l->index, &snapshot) ||
      keyed_begin(&k, l, snapshot.rules[0].kind, key, strlen(key), now_or_clock()) != FSHM_OK)
    broken("the limits of the name cannot be read");
  return k;
}
static fshm_counted count_side(uint64_t cost, uint64_t now) {
  fshm_counted out;
  fshm_count(world.l, KEY, strlen(KEY), &op->limits[0], cost, now, &out);
  return out;
}
static levels_t levels_of_side(void) {
  found_t f;
  const keyed_t k = side_of(world.l, KEY);
  levels_t out = {.count = 1, .remaining = {op->limits[0].n - count_side(0, k.now).count}};
  table_find(world.s, k.hash, k.who, &f);
  if (f.pair.who && state_expires(f.pair.when) > k.now) out.state[0] = f.pair.when;
  return out;
}

static levels_t levels_of_limiter(fshm_limiter *l, const char *key) {
  levels_t out = {0};
  call_t c;
  found_t f;
  if (!limits_load_of(l, &c.snapshot)) {
    broken("the limits of the name cannot be read");
    return out;
  }
  begin(&c, l, key, strlen(key), now_or_clock());
  out.count = (uint32_t)fshm_remaining(l, key, strlen(key), c.now, out.remaining);
  for (uint32_t i = 0; i < c.snapshot.count; i++) {
    table_find(c.s, c.hash, fingerprint(&c, i), &f);
    if (f.pair.who && state_ends(c.s, f.pair.who, f.pair.when) > c.now) out.state[i] = f.pair.when;
  }
  return out;
}

/* As if each level were a limit, in the order in which they are charged. */
static levels_t levels_of_all(const char *key) {
  levels_t out = {.count = LEVELS};
  for (uint32_t i = 0; i < LEVELS; i++) {
    const levels_t one = levels_of_limiter(world.limiters[i], key);
    out.remaining[i] = one.remaining[0];
    out.state[i] = one.state[0];
  }
  return out;
}

static levels_t levels_of(fshm_limiter *l, const char *key) {
  if (op->side) return levels_of_side();
  return op->levels ? levels_of_all(key) : levels_of_limiter(l, key);
}

/* One call for all levels; the outermost is the first. */
static fshm_decision apply_levels(uint32_t which, uint64_t cost, uint64_t now) {
  const uint64_t costs[FSHM_MAX_LIMITS] = {cost};
  fshm_level levels[LEVELS];
  fshm_decision d;
  for (uint32_t i = 0; i < LEVELS; i++)
    levels[i] = (fshm_level){.limiter = world.limiters[LEVELS - 1 - i],
                             .key = KEY,
                             .key_length = strlen(KEY),
                             .costs = costs};
  (void)fshm_levels_apply(levels, LEVELS, which, now, &d);
  return d;
}

static bool same_level(const levels_t *a, const levels_t *b, uint32_t i) {
  return a->remaining[i] == b->remaining[i] &&
         (op->flags & REAL_TIME || a->state[i] == b->state[i]);
}

static bool same_levels(const levels_t *a, const levels_t *b) {
  for (uint32_t i = 0; i < a->count; i++)
    if (!same_level(a, b, i)) return false;
  return a->count == b->count;
}

static uint64_t least_remaining(const levels_t *l) {
  uint64_t least = UINT64_MAX;
  for (uint32_t i = 0; i < l->count; i++) least = min_u64(least, l->remaining[i]);
  return least;
}

static void tell_levels(const levels_t *l, char *out, size_t size) {
  size_t at = 0;
  out[0] = 0;
  for (uint32_t i = 0; i < l->count && at < size; i++)
    at += (size_t)snprintf(out + at, size - at, "%s%llu (%llx)", i ? ", " : "",
                           (unsigned long long)l->remaining[i], (unsigned long long)l->state[i]);
}

static int consume(uint64_t cost, uint64_t now) {
  if (op->levels) return apply_levels(FSHM_ACQUIRE, cost, now).status;
  return op->side ? count_side(cost, now).status
                  : apply_at(world.l, FSHM_ACQUIRE, KEY, cost, now).status;
}

/* Acquire one by one until refused: how many were admitted. */
static uint64_t exhaust(uint64_t now) {
  uint64_t admitted = 0;
  while (admitted < 100 && consume(1, now) == FSHM_ALLOWED) admitted++;
  return admitted;
}
