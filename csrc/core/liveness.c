/* liveness.c - liveness checks by /proc, where a lock does not suffice; and fshm_liveness(). DESIGN.md, "Processes". */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "lock_file.h"

#if defined(__linux__)
/* Read a small file whole. "": it cannot be read. */
static void read_proc(const char *path, char *out, size_t room) {
  size_t length = 0;
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  for (ssize_t n = fd >= 0; n > 0 && length < room - 1; length += (size_t)n) {
    n = read(fd, out + length, room - 1 - length);
    if (n < 0) n = 0;
  }
  if (fd >= 0) (void)close(fd);
  out[length] = 0;
}

/* From /proc/PID/stat: the start of the process, in ticks since boot (the lower 32 bits), its state, and its number
 * of threads. False: not available. */
static bool read_stat(const char *path, uint32_t *start, char *state, long *threads) {
  char text[1024], *end;
  read_proc(path, text, sizeof text);
  const char *at = strrchr(text, ')'); /* the name before it may hold anything */
  if (!at || at[1] != ' ' || !at[2]) return false;
  *state = at[2];
  unsigned long long fields[20] = {0}; /* from the 4th on: numbers */
  at += 3;
  for (unsigned i = 0; i < 19; i++, at = end) {
    fields[i] = strtoull(at, &end, 10);
    if (end == at) return false;
  }
  *threads = (long)fields[20 - 4];
  *start = (uint32_t)fields[22 - 4];
  return true;
}

/* The inode of this process's pid namespace; 0: /proc belongs to another namespace, or there is none. */
static uint32_t pid_namespace(void) {
  struct stat st;
  char self[32] = {0};
  if (readlink("/proc/self", self, sizeof self - 1) <= 0 ||
      strtol(self, NULL, 10) != (long)getpid())
    return 0;
  return stat("/proc/self/ns/pid", &st) ? 0 : (uint32_t)st.st_ino;
}

/* process_t.born of this process. */
uint64_t own_birth(void) {
  uint32_t start, space = pid_namespace();
  char state;
  long threads;
  if (!space || !read_stat("/proc/self/stat", &start, &state, &threads)) return 0;
  return (uint64_t)space << 32 | start;
}

static bool dumps_core(const char *path) {
  char text[8192]; /* the groups come before it */
  read_proc(path, text, sizeof text);
  const char *at = strstr(text, "\nCoreDumping:");
  return at && strtol(at + strlen("\nCoreDumping:"), NULL, 10) == 1;
}
#else
uint64_t own_birth(void) { return 0; }
#endif

/* What the system says of a process whose pid is of our namespace. `thorough`: another process may have its pid by
 * now (while its byte is locked, that is not so, or does not matter). ENDED is certain: a process that dumps core
 * executes no more of its program. */
int look_at_process(const process_t *p, bool thorough) {
  /* Pairs with process_join(). */
  pid_t pid = (pid_t)atomic_load_explicit(&p->pid, memory_order_acquire);
  uint64_t born = load_relaxed(&p->born);
  if (pid <= 0 || !born) return UNSEEN;
#if defined(__linux__)
  char path[64], state;
  uint32_t start;
  long threads;
  if (pid_namespace() != born >> 32) return UNSEEN;
  if (kill(pid, 0) && errno == ESRCH) return ENDED; /* /proc may hide it (hidepid); this does not */
  if (thorough) {
    (void)snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
    if (!read_stat(path, &start, &state, &threads)) return UNSEEN;
    if (start != (uint32_t)born) return ENDED;
    /* Not if a thread outlives the first one. */
    if (strchr("ZX", state) && threads <= 1) return ENDED;
  }
  (void)snprintf(path, sizeof path, "/proc/%d/status", (int)pid);
  return dumps_core(path) ? ENDED : RUNS;
#else
  (void)thorough;
  return UNSEEN;
#endif
}

/* Has the owner of the index ended, though its byte is locked, or we may not test the byte? Each process asks the
 * system at most twice a second. looked[index]: incarnation (32 bits) | ended (1) | time, in ms (31). */
#define ENDED_BIT (UINT64_C(1) << 31)
#define LOOKED_MS (ENDED_BIT - 1)
#ifndef LOOK_AGAIN_MS
#define LOOK_AGAIN_MS 500
#endif

bool has_ended(fshm_segment *s, uint32_t process, bool thorough) {
  const process_t *p = &s->processes[process];
  uint64_t incarnation = atomic_load_explicit(&p->incarnation, memory_order_acquire);
  /* Of this process alone, and no time of the segment: a test may have stopped that. */
  uint64_t known = load_relaxed(&s->looked[process]), now = fshm_clock() / 1000000 & LOOKED_MS;
  if (known >> 32 == (uint32_t)incarnation && (known & ENDED_BIT)) return true;
  if (known >> 32 == (uint32_t)incarnation && ((now - known) & LOOKED_MS) < LOOK_AGAIN_MS)
    return false;
  bool ended = look_at_process(p, thorough) == ENDED;
  /* The incarnation changed: the pid may be another owner's, and nothing is known. */
  if (atomic_load_explicit(&p->incarnation, memory_order_acquire) != incarnation) return false;
  store_relaxed(&s->looked[process], incarnation << 32 | (ended ? ENDED_BIT : 0) | now);
  return ended;
}

/* Can a reader that may not open the lock file check all processes by /proc? */
static bool all_seen(const fshm_segment *s) {
  for (uint32_t process = 0; process < PROCESSES; process++)
    if (process_joined(s, process) && load_relaxed(&s->processes[process].pid) &&
        look_at_process(&s->processes[process], true) == UNSEEN)
      return false;
  return true;
}

int fshm_liveness(fshm_segment *s, fshm_error *e) {
  struct stat st;
  memset(e, 0, sizeof *e);
  errno = 0;
  (void)snprintf(e->path, sizeof e->path, "%s", s->path);
  if (fshm_unlinked(s)) return image_fail(e, FSHM_E_NOT_FOUND);
  char path[sizeof s->path + 32];
  image_lock_path(s->path, s->instance, path, sizeof path);
  (void)snprintf(e->path, sizeof e->path, "%.*s", (int)sizeof e->path - 1, path);
  uint64_t known = load_relaxed(&s->header->lock_file);
  uint32_t joined = load_relaxed(&s->fork_page->joined);
  bool member = !s->read_only && !process_forked(s) && joined && joined != NO_PROCESS;
  errno = load_relaxed(&s->lock_errno);
  if (!known) /* no process has joined yet */
    return errno && !s->read_only ? image_fail(e, FSHM_E_LOCK_FILE) : FSHM_OK;
  if (lstat(path, &st)) return image_fail(e, FSHM_E_LOCK_FILE);
  e->found = st.st_ino;
  e->wanted = known;
  errno = ESTALE;
  if (st.st_ino != known) return image_fail(e, FSHM_E_LOCK_FILE);
  bool ready = lock_file_ready(s);
  errno = EBADF; /* our own lock was dropped */
  if (load_relaxed(&s->fork_page->lost) ||
      (member && ready && !byte_held(load_relaxed(&s->lock_fd), ALIVE(joined - 1))))
    return image_fail(e, FSHM_E_LOCK_FILE);
  errno = load_relaxed(&s->lock_errno);
  if (ready && !(errno && joined == NO_PROCESS)) return FSHM_OK;
  if (errno == EACCES && s->read_only && all_seen(s)) return FSHM_OK; /* a reader can use /proc */
  return image_fail(e, FSHM_E_LOCK_FILE);
}
