/* holds_first.c - what must hold of the first join of a segment, which makes its lock file: there is none, or
 * it is the one that the header names; and the next process joins, holds permits, and sees which processes live. */
#include "crash.h"

static bool attach_here(void) {
  fshm_error e;
  return opened || fshm_open(segment_name, 0, 0600, 0, &opened, &e) == FSHM_OK;
}

static void attach_first(void) {
  if (!attach_here()) return;
  told->mapping = opened->map;
  told->mapped = opened->size;
}
static void attach_first_by_name(void) {
  no_unnamed_files = true;
  attach_first();
}

static void run_first_join(outcome_t *out) {
  uint32_t process = NO_PROCESS;
  uint64_t incarnation;
  if (!attach_here()) return;
  out->status =
      process_identity(opened, &process, &incarnation) ? FSHM_OK : process_refusal(opened);
  out->number = process;
  out->pid = (uint32_t)getpid();
}

/* The lock file that others would open is the one that the header names. */
static void check_lock_file(void) {
  char path[sizeof opened->path + 32];
  struct stat st;
  image_lock_path(opened->path, opened->instance, path, sizeof path);
  if (stat(path, &st) || st.st_ino != load_relaxed(&opened->header->lock_file))
    broken("the lock file is not the one that the header names");
  if (count_files(segment_name, ".lock", false) != 1) broken("there are several lock files");
}

static bool t_lives;

/* Those who are here: S, `others` of its children, and T, which has joined at the latest when it says so. When T is
 * dead, its slot may be another's: a child may come to the same one by its pid. */
static bool right_ones_live(int others) {
  fshm_process_info info;
  int living = 0;
  bool t_seen = false;
  for (uint32_t i = 0; i < PROCESSES; i++) {
    if (fshm_process_at(opened, i, &info) != FSHM_OK) return false;
    living += info.alive != 0; /* FSHM_ALIVE_BY_LOCK too */
    t_seen |= info.alive && told->done && i == told->number && info.pid == told->pid;
  }
  living -= 1 + others;
  return t_lives && !told->done ? living == 0 || living == 1
                                : living == t_lives && t_seen == t_lives;
}

static fshm_limiter *two_permits(void) {
  const fshm_limit two = {2, 0, 0, FSHM_PERMITS, 0};
  fshm_limiter *l;
  return fshm_limiter_open(opened, "first", 5, &two, 1, &l) == FSHM_OK ? l : NULL;
}

static int admit_one(fshm_limiter *l, fshm_permit *permit) {
  fshm_decision d;
  uint32_t held;
  fshm_admit(l, KEY, strlen(KEY), NULL, NOW, permit, &d, &held);
  return d.status;
}

/* Another process, with a lock file that it has opened itself: S holds one of the two, it takes the other, and
 * dies. Returns what is wrong, 0 = nothing. */
static int look_afresh(void) {
  fshm_permit permit;
  close_opened();
  fshm_limiter *l = attach_here() ? two_permits() : NULL;
  if (!l) return 1;
  if (fshm_in_flight(l, KEY, strlen(KEY)) != 1) return 2;
  if (admit_one(l, &permit) != FSHM_ALLOWED) return 3;
  if (admit_one(l, &permit) != FSHM_DENIED) return 4;
  return right_ones_live(1) ? 0 : 5;
}

/* S joins, if it has not, and works. */
static void check_next(void) {
  fshm_permit mine, another;
  fshm_error e;
  outcome_t joined = {0};
  run_first_join(&joined);
  if (joined.status != FSHM_OK) broken("the next to come cannot join: %d", joined.status);
  if (position.failed) return;
  if (fshm_liveness(opened, &e) != FSHM_OK) broken("who lives cannot be told: %d", e.code);
  check_lock_file();
  fshm_limiter *l = two_permits();
  if (!l || admit_one(l, &mine) != FSHM_ALLOWED) {
    broken("the next to come gets no permit");
    return;
  }
  /* A process takes longer than all the rest: while T is stopped, now and then. */
  bool afresh = !t_lives || told->done || position.k % 16 == 0;
  int wrong = afresh ? fresh_process(look_afresh) : 0;
  if (wrong) broken("another process sees otherwise: %d (look_afresh)", wrong);
  if (!right_ones_live(0)) broken("S does not see who lives");
  if (fshm_in_flight(l, KEY, strlen(KEY)) != 1) broken("a dead process's permit counts");
  if (admit_one(l, &another) != FSHM_ALLOWED) broken("a dead process's permit does not come back");
  if (!fshm_permit_release(l, &mine) || !fshm_permit_release(l, &another))
    broken("a permit cannot be released");
  fshm_limiter_close(l);
}

static void first_end(void) {
  if (told->status != op->status) broken("it answers %d, not %d", told->status, op->status);
  if (count_files(segment_name, ".lock", false) != 1) broken("there is no lock file");
}

/* T is killed afterwards, in the state that it was stopped in. */
static void first_contend(void) {
  static unsigned char *before;
  bool existed = count_files(segment_name, ".lock", false);
  if (!attach_here()) {
    broken("the next to come cannot attach");
    return;
  }
  if (!before && !(before = malloc(opened->size))) abort();
  memcpy(before, opened->map, opened->size);
  t_lives = true;
  check_next();
  memcpy(opened->map, before, opened->size);
  close_opened();
  if (!existed) (void)count_files(segment_name, ".lock", true);
}

static void first_survive(void) {
  fshm_error e;
  if (told->done && told->status != op->status)
    broken("T says %d, not %d", told->status, op->status);
  t_lives = false;
  check_next();
  close_opened();
  if (fshm_remove(segment_name, &e) != FSHM_OK) broken("it cannot be removed: %d", e.code);
  if (count_files(segment_name, "", true)) broken("files are left");
}

static void first_raced(const outcome_t *mine) {
  if (told->status != FSHM_OK || mine->status != FSHM_OK)
    broken("T and S are answered %d and %d", told->status, mine->status);
  if (told->number == mine->number) broken("T and S have the same index");
  t_lives = true;
  check_next();
  close_opened();
}

static const holds_t first = {NULL, first_end, first_contend, first_survive, first_raced, NULL};
