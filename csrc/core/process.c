/* process.c - who is alive, and which per-process statistics is whose. Argued in DESIGN.md, "Processes".
 *
 * A process owns process index i while byte i of the lock file is locked for it. When the owner has counted the process index's
 * incarnation up, it locks byte PROCESSES + i too: "the owner of this incarnation lives". That is the one that
 * others ask about.
 * The locks are those of an open file description of the process's own (F_OFD_SETLK). On Linux the process maps
 * that description into its memory, where a fork does not inherit it, and closes the descriptor. So the locks last
 * as long as the process's memory: whatever descriptors it opens and closes, however it forks, and until it dies
 * or runs another program. The kernel drops them late in one case: a process that dumps core is asked about in
 * /proc.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "internal.h"

#if defined(__APPLE__) && !defined(F_OFD_SETLK) /* older SDKs do not name them */
#define F_OFD_SETLK 90
#define F_OFD_GETLK 92
#endif

/* What a thread has in its hands while its process takes locks: a fork in that instant must not keep them. */
typedef struct {
  _Atomic int fd; /* + 1; 0 = none, -1 = being written */
  _Atomic uint64_t dev, ino;
  _Atomic uintptr_t map;
} grip_t;
/* One for each segment that this process is just joining, or whose descriptor it must keep. Where there are more:
 * a fork in that instant is told by its parent's pid alone. */
#define GRIPS 64
static grip_t grips[GRIPS], no_grip;

static _Atomic uint32_t forks; /* from the first process of this memory to this one */

static bool is_file(int fd, uint64_t dev, uint64_t ino) {
  struct stat st;
  return fd >= 0 && !fstat(fd, &st) && st.st_ino == ino && (uint64_t)st.st_dev == dev;
}

/* In a forked child: what its parent's life hangs on is not for the child to keep. */
static void in_child(void) {
  (void)add_relaxed(&forks, 1);
  for (int i = 0; i < GRIPS; i++) {
    grip_t *g = &grips[i];
    int fd = load_relaxed(&g->fd) - 1;
    if (is_file(fd, load_relaxed(&g->dev), load_relaxed(&g->ino))) (void)close(fd);
    if (load_relaxed(&g->map)) (void)munmap((void *)load_relaxed(&g->map), 1);
    store_relaxed(&g->map, 0);
    store_relaxed(&g->fd, 0);
  }
}
__attribute__((constructor)) static void watch_forks(void) {
  (void)pthread_atfork(NULL, NULL, in_child);
}

/* This process, among those that its memory was copied to: in a pid namespace of its own a child may have its
 * parent's pid. (Pids have 22 bits.) */
uint32_t process_token(void) { return (uint32_t)getpid() | load_relaxed(&forks) << 22; }

COLD bool process_forked(const fshm_segment *s) {
  return load_relaxed(&s->fork_page->token) != process_token();
}

/* The bytes of a process index. */
#define OWNED(process) (process)
#define ALIVE(process) ((process) + PROCESSES)

static int byte_lock(int fd, int command, short type, uint32_t byte) {
  struct flock lock = {.l_type = type, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1};
  return fcntl(fd, command, &lock);
}

/* Is the byte locked by another description than fd's, in this process or another? Where it cannot be asked: yes. */
static bool byte_held(int fd, uint32_t byte) {
  struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1};
  return fcntl(fd, F_OFD_GETLK, &lock) || lock.l_type != F_UNLCK;
}

/* Is the descriptor by which we ask still that of the lock file? A daemoniser may have closed it, and its number
 * may be another file's by now. */
bool process_lock_open(const fshm_segment *s) {
  int fd = atomic_load_explicit(&s->lock_fd, memory_order_acquire); /* with lock_file_ready() */
  return is_file(fd, load_relaxed(&s->lock_dev), load_relaxed(&s->lock_ino));
}

/* Whoever may write the segment may use its lock file: the same owner, group and mode, as far as we may set them.
 * Who may only read the segment may not even read the lock file: a lock for reading on all bytes would keep every
 * process out of the table. Not at open: umask would interfere. */
static void admit_same_users(const fshm_segment *s, int fd, const struct stat *lock) {
  struct stat segment;
  if (stat(s->path, &segment) || (lock->st_uid != geteuid() && geteuid())) return;
  if (segment.st_uid != lock->st_uid && !geteuid()) (void)!fchown(fd, segment.st_uid, (gid_t)-1);
  if (segment.st_gid != lock->st_gid) (void)!fchown(fd, (uid_t)-1, segment.st_gid);
  mode_t writers = segment.st_mode & 0222, mode = writers | writers << 1;
  if ((lock->st_mode & 07777) != mode) (void)fchmod(fd, mode);
}

/* May whoever owns this file write the segment? Who may only read that knows the file's name, and can make it before any
 * member does. His locks would then be believed. (A file gets a group only by a member of it.) */
static bool by_a_writer(const fshm_segment *s, const struct stat *lock) {
  struct stat segment;
  if (lock->st_uid == geteuid() || !lock->st_uid) return true;
  if (stat(s->path, &segment)) return false;
  return lock->st_uid == segment.st_uid || (segment.st_mode & 0002) ||
         ((segment.st_mode & 0020) && lock->st_gid == segment.st_gid);
}

/* An empty lock file that admits whom the segment admits before it has a name: a maker that is killed shuts
 * nobody out. Where unnamed files are not to be had, it is made under its name. -1: there is one. */
static int make_lock_file(const fshm_segment *s, const char *path, int flags) {
  struct stat st;
#if defined(O_TMPFILE)
  int fd = open(fshm_directory(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
  if (fd >= 0) {
    if (!fstat(fd, &st)) admit_same_users(s, fd, &st);
    if (!image_link(fd, path)) return fd;
    int failed = errno;
    (void)close(fd);
    if (failed == EEXIST) return -1;
  }
#endif
  return open(path, flags | O_CREAT, 0600);
}

/* The lock file of this instance of the segment; its name holds the instance, so a removed and remade
 * segment never shares it. Made by whoever comes first, once: its inode is written into the header
 * before anybody locks a byte of it. Another file of that name tells nothing about those who live, so
 * it is refused, and none is made in place of one that was deleted (DESIGN.md, "Processes").
 * Returns -1 with errno. */
static int open_lock_file(fshm_segment *s, struct stat *st) {
  char path[sizeof s->path + 32];
  image_lock_path(s->path, s->instance, path, sizeof path);
  uint64_t known = load_relaxed(&s->header->lock_file);
  if (!known && s->read_only) { /* nobody has joined; and which file it will be is not decided */
    errno = ENOENT;
    return -1;
  }
  int flags = O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK | (s->read_only ? O_RDONLY : O_RDWR);
  int fd = open(path, flags);
  if (fd < 0 && errno == ENOENT && !known) fd = make_lock_file(s, path, flags);
  if (fd < 0 && errno == EEXIST) fd = open(path, flags); /* somebody was faster */
  int wrong = fd < 0 || fstat(fd, st) ? errno : 0;
  /* Removed since the caller looked: the file may be a new one, which the members do not hold, and which
   * nobody else would remove. */
  if (!s->read_only && fshm_unlinked(s)) {
    (void)unlink(path);
    wrong = ENOENT;
  }
  known = load_relaxed(&s->header->lock_file);
  /* A hard link is somebody else's file, and one without a name was deleted just now. */
  if (!wrong && !known && (!S_ISREG(st->st_mode) || st->st_nlink != 1)) wrong = ESTALE;
  if (!wrong && !known && !by_a_writer(s, st)) wrong = EPERM;
  if (!wrong && !known &&
      atomic_compare_exchange_strong_explicit(&s->header->lock_file, &known, st->st_ino,
                                              memory_order_relaxed, memory_order_relaxed))
    known = st->st_ino;
  if (!wrong && known != st->st_ino) wrong = ESTALE;
  if (!wrong) {
    if (!s->read_only) admit_same_users(s, fd, st);
    return fd;
  }
  if (fd >= 0) (void)close(fd);
  errno = wrong;
  return -1;
}

/* Two threads may come at once: the one that joins and one that asks who is alive. */
static bool lock_file_ready(fshm_segment *s) {
  struct stat st;
  if (process_lock_open(s)) return true; /* also after a fork, which leaves it to the child */
  threads_lock(&s->lock_opener);
  if (!process_lock_open(s)) {
    /* Not for a removed segment: its members hold another lock file, and nobody would remove this one. */
    errno = ENOENT;
    int fd = fshm_unlinked(s) ? -1 : open_lock_file(s, &st);
    store_relaxed(&s->lock_errno, fd < 0 ? errno : 0);
    if (fd >= 0) {
      store_relaxed(&s->lock_dev, (uint64_t)st.st_dev);
      store_relaxed(&s->lock_ino, st.st_ino);
    }
    atomic_store_explicit(&s->lock_fd, fd, memory_order_release); /* with its device and inode */
  }
  threads_unlock(&s->lock_opener);
  return process_lock_open(s);
}

#if defined(__linux__)
/* Read a small file whole. "" where it cannot be read. */
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

/* The start of a process in ticks since boot, the lower 32 bits, as /proc/PID/stat has it; its state, and how many
 * threads it has. False: not to be had. */
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

/* The inode of this process's pid namespace, if /proc is that namespace's. 0: it is not, or there is none. */
static uint32_t pid_namespace(void) {
  struct stat st;
  char self[32] = {0};
  if (readlink("/proc/self", self, sizeof self - 1) <= 0 ||
      strtol(self, NULL, 10) != (long)getpid())
    return 0;
  return stat("/proc/self/ns/pid", &st) ? 0 : (uint32_t)st.st_ino;
}

/* process_t.born of this process. */
static uint64_t own_birth(void) {
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
static uint64_t own_birth(void) { return 0; }
#endif

enum { RUNS, ENDED, UNSEEN };

/* What the system says of the process itself, where its pid is one of our namespace. `thorough`: its pid may be
 * another process's by now (while its byte is locked, it is not, or it does not matter). ENDED is certain: a process
 * that dumps core runs no line of its program any more. */
static int look_at_process(const process_t *p, bool thorough) {
  pid_t pid =
      (pid_t)atomic_load_explicit(&p->pid, memory_order_acquire); /* pairs with process_join() */
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
    if (strchr("ZX", state) && threads <= 1)
      return ENDED; /* not where a thread outlives the first */
  }
  (void)snprintf(path, sizeof path, "/proc/%d/status", (int)pid);
  return dumps_core(path) ? ENDED : RUNS;
#else
  (void)thorough;
  return UNSEEN;
#endif
}

/* Has the process index's owner ended, though its byte is locked, or we may not ask for the byte? Asked of the system twice a
 * second at most, by each process. looked[process index]: incarnation (32 bits) | ended (1) | when, in ms (31). */
#define ENDED_BIT (UINT64_C(1) << 31)
#define LOOKED_MS (ENDED_BIT - 1)

static bool has_ended(fshm_segment *s, uint32_t process, bool thorough) {
  const process_t *p = &s->processes[process];
  uint64_t incarnation = atomic_load_explicit(&p->incarnation, memory_order_acquire);
  uint64_t known = load_relaxed(&s->looked[process]), now = segment_now(s) / 1000000 & LOOKED_MS;
  if (known >> 32 == (uint32_t)incarnation && (known & ENDED_BIT)) return true;
  if (known >> 32 == (uint32_t)incarnation && ((now - known) & LOOKED_MS) < 500) return false;
  bool ended = look_at_process(p, thorough) == ENDED;
  /* The pid that was looked at is that of another incarnation's owner? Then nothing is known. */
  if (atomic_load_explicit(&p->incarnation, memory_order_acquire) != incarnation) return false;
  store_relaxed(&s->looked[process], incarnation << 32 | (ended ? ENDED_BIT : 0) | now);
  return ended;
}

/* Can a reader that may not open the lock file see of every process whether it lives? */
static bool all_seen(const fshm_segment *s) {
  for (uint32_t process = 0; process < PROCESSES; process++)
    if (load_relaxed(&s->processes[process].pid) &&
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
  if (!known)
    return errno && !s->read_only ? image_fail(e, FSHM_E_LOCK_FILE)
                                  : FSHM_OK; /* nobody has joined yet */
  if (lstat(path, &st)) return image_fail(e, FSHM_E_LOCK_FILE);
  e->found = st.st_ino;
  e->wanted = known;
  errno = ESTALE;
  if (st.st_ino != known) return image_fail(e, FSHM_E_LOCK_FILE);
  bool ready = lock_file_ready(s);
  errno = EBADF; /* the lock that said that we live was dropped */
  if (load_relaxed(&s->fork_page->lost) ||
      (member && ready && !byte_held(load_relaxed(&s->lock_fd), ALIVE(joined - 1))))
    return image_fail(e, FSHM_E_LOCK_FILE);
  errno = load_relaxed(&s->lock_errno);
  if (ready && !(errno && joined == NO_PROCESS)) return FSHM_OK;
  if (errno == EACCES && s->read_only && all_seen(s)) return FSHM_OK; /* /proc tells a reader */
  return image_fail(e, FSHM_E_LOCK_FILE);
}

/* Why this process has no process index. */
int process_refusal(const fshm_segment *s) {
  return load_relaxed(&s->lock_errno) ? FSHM_E_LOCK_FILE : FSHM_E_PROCESSES;
}

/* What this process takes and keeps its locks by. */
typedef struct {
  int fd, command; /* -1: none. F_OFD_SETLK or F_SETLK */
  grip_t *grip;
} description_t;

/* One that only this process has. Where none can be had (its user may not open the file, and has it from its
 * parent): the descriptor to ask by, and POSIX locks, which are the process's, and which the close of any
 * descriptor of the file drops. A child does not inherit those. */
static description_t open_description(const fshm_segment *s) {
  char paths[2][sizeof s->path + 32];
  int asks = load_relaxed(&s->lock_fd);
  image_lock_path(s->path, s->instance, paths[0], sizeof paths[0]);
  (void)snprintf(paths[1], sizeof paths[1], "/proc/self/fd/%d", asks); /* it was deleted */
  for (int i = 0; i < 2; i++) {
    int fd = open(paths[i], O_RDWR | O_CLOEXEC | O_NONBLOCK | (i ? 0 : O_NOFOLLOW));
    if (!is_file(fd, load_relaxed(&s->lock_dev), load_relaxed(&s->lock_ino))) {
      if (fd >= 0) (void)close(fd);
      continue;
    }
    for (int k = 0; k < GRIPS; k++) {
      int none = 0;
      if (!atomic_compare_exchange_strong(&grips[k].fd, &none, -1)) continue;
      store_relaxed(&grips[k].dev, load_relaxed(&s->lock_dev));
      store_relaxed(&grips[k].ino, load_relaxed(&s->lock_ino));
      atomic_store(&grips[k].fd, fd + 1);
      return (description_t){fd, F_OFD_SETLK, &grips[k]};
    }
    return (description_t){fd, F_OFD_SETLK, &no_grip};
  }
  return (description_t){asks, F_SETLK, &no_grip};
}

static void grip_end(grip_t *g) {
  store_relaxed(&g->map, 0);
  atomic_store(&g->fd, 0);
}

static void close_description(const fshm_segment *s, const description_t *d) {
  if (d->command == F_OFD_SETLK &&
      is_file(d->fd, load_relaxed(&s->lock_dev), load_relaxed(&s->lock_ino)))
    (void)close(d->fd);
  if (d->grip != &no_grip) grip_end(d->grip);
}

/* The one whose descriptor is kept (fork_page_t.kept). */
static description_t kept_description(const fshm_segment *s) {
  int kept = load_relaxed(&s->fork_page->kept);
  for (int i = 0; i < GRIPS; i++)
    if (load_relaxed(&grips[i].fd) == kept)
      return (description_t){kept - 1, F_OFD_SETLK, &grips[i]};
  return (description_t){kept - 1, kept - 1 == load_relaxed(&s->lock_fd) ? F_SETLK : F_OFD_SETLK,
                         &no_grip};
}

/* Map the description, where no fork inherits it. NULL: that cannot be done here. */
static void *map_description(grip_t *g, int fd) {
#if defined(__linux__)
  /* Its address first, so that a fork at any instant finds it in `grips`. */
  void *at = mmap(NULL, 1, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) return NULL;
  store_relaxed(&g->map, (uintptr_t)at);
  if (mmap(at, 1, PROT_NONE, MAP_SHARED | MAP_FIXED, fd, 0) == at && !madvise(at, 1, MADV_DONTFORK))
    return at;
  (void)munmap(at, 1);
#else
  (void)fd;
#endif
  store_relaxed(&g->map, 0);
  return NULL;
}

/* The description has both bytes of the process index. See to it that they stay locked while we live. False: they were
 * dropped; from now on, descriptors are kept. */
static bool hold_locks(fshm_segment *s, uint32_t process, const description_t *d) {
  fork_page_t *page = s->fork_page;
  void *at = NULL;
  if (d->command == F_OFD_SETLK && !load_relaxed(&s->unmapped))
    at = map_description(d->grip, d->fd);
  if (!at) {
    store_relaxed(&page->kept, d->fd + 1);
    return true;
  }
  close_description(s, d);
  if (byte_held(load_relaxed(&s->lock_fd), ALIVE(process))) {
    store_relaxed(&page->hold, (uintptr_t)at);
    return true;
  }
  (void)munmap(at, 1);
  store_relaxed(&s->unmapped, 1);
  return false;
}

/* Give up the process index that this process has, if it has one. (A child that has not joined has none.) */
static void drop_locks(fshm_segment *s) {
  fork_page_t *page = s->fork_page;
  if (load_relaxed(&page->hold)) (void)munmap((void *)load_relaxed(&page->hold), 1);
  if (load_relaxed(&page->kept)) {
    const description_t kept = kept_description(s);
    close_description(s, &kept);
  }
  store_relaxed(&page->hold, 0);
  store_relaxed(&page->kept, 0);
}

/* The segment is being closed. */
void process_leave(fshm_segment *s) {
  if (s->wiped || !process_forked(s)) drop_locks(s);
  if (process_lock_open(s)) (void)close(load_relaxed(&s->lock_fd));
}

/* Permits carry 18 bits of their owner's incarnation. Before these come round for a process index, what its former owners left
 * goes. Killed in here, the next to join begins again, since the incarnation was not counted up; nobody else can be an
 * owner of the process index meanwhile, since we have its lock. */
#define COMES_ROUND(incarnation) (((incarnation) & 0x3ffff) == 0)

/* Take a process index for this process. Called once in each process (the page is wiped by a fork), by its
 * first call on the segment; a second thread that comes meanwhile counts into the key statistics directly
 * instead of waiting. Where no process index is left, so does the whole process. */
COLD uint32_t process_join(fshm_segment *s) {
  fork_page_t *page = s->fork_page;
  if (s->read_only) return NO_PROCESS;
  if (!s->wiped && process_forked(s)) {
    store_relaxed(&page->token, process_token());
    store_relaxed(&page->hold, 0);
    store_relaxed(&page->kept, 0);
    store_relaxed(&page->lost, 0);
    store_relaxed(&page->joined, 0);
    store_relaxed(&page->joining, 0);
  }
  if (atomic_exchange_explicit(&page->joining, 1, memory_order_relaxed)) return NO_PROCESS;
  uint32_t pid = (uint32_t)getpid();
  store_relaxed(&page->token, process_token());
  if (!lock_file_ready(s)) {
    store_relaxed(&page->joined, NO_PROCESS);
    return NO_PROCESS;
  }
  drop_locks(s);
  description_t d = open_description(s);
  uint32_t start = pid * 2654435761U % PROCESSES; /* spread, so that a probe seldom meets a lock */
  for (uint32_t i = 0; i < PROCESSES; i++) {
    uint32_t process = (start + i) % PROCESSES;
    if (byte_lock(d.fd, d.command, F_WRLCK, OWNED(process))) {
      if (errno == EAGAIN || errno == EACCES) continue;
      store_relaxed(&s->lock_errno, errno); /* the system has no such locks */
      break;
    }
    process_t *p = &s->processes[process];
    if (COMES_ROUND(load_relaxed(&p->incarnation) + 1)) (void)fshm_reap(s, 0);
    /* A pid that is seen with the next incarnation must not be the former owner's. */
    store_relaxed(&p->pid, 0);
    /* First of all: from here on, what an earlier owner of the process index held is a dead process's. Only then
     * the byte that says that the owner lives: stopped in between, we do not keep it held. */
    store_relaxed(&page->incarnation, atomic_fetch_add(&p->incarnation, 1) + 1);
    if (byte_lock(d.fd, d.command, F_WRLCK,
                  ALIVE(process))) { /* a dead owner's is just being dropped */
      (void)byte_lock(d.fd, d.command, F_UNLCK, OWNED(process));
      continue;
    }
    if (!hold_locks(s, process, &d)) {
      d = open_description(s);
      continue;
    }
    /* The process index is ours alone: fold in what a dead owner left. Killed in between, the next owner goes
     * on; counts of keys may be lost then, and nothing decides by them. */
    key_stats_flush_process(s, process);
    fshm_counters so_far;
    counters_of_process(s, process, &so_far);
    store_relaxed(&p->before[0], so_far.admitted);
    store_relaxed(&p->before[1], so_far.denied);
    store_relaxed(&p->before[2], so_far.refused);
    store_relaxed(&p->outage, 0);
    store_relaxed(&p->attached, segment_now(s));
    store_relaxed(&p->born, own_birth());
    /* release: whoever sees the pid sees when it was born, and its incarnation (look_at_process) */
    atomic_store_explicit(&p->pid, pid, memory_order_release);
    requests_join(s, process, load_relaxed(&page->incarnation));
    /* release: other threads that see the process index see its incarnation (process_identity) */
    atomic_store_explicit(&page->joined, process + 1, memory_order_release);
    return process;
  }
  close_description(s, &d);
  store_relaxed(&page->joined, NO_PROCESS);
  return NO_PROCESS;
}

/* Our locks hang on a descriptor, which somebody may have closed. Take them again: with the same incarnation where
 * nobody had the process index meanwhile. False: it is another's by now, and this process must join anew. */
static COLD bool keep_index(fshm_segment *s, uint32_t process, uint64_t incarnation) {
  fork_page_t *page = s->fork_page;
  const process_t *p = &s->processes[process];
  bool ours = load_relaxed(&p->incarnation) == incarnation;
  if (!lock_file_ready(s)) return ours; /* nobody can be asked, and nobody else asks */
  if (ours && byte_held(load_relaxed(&s->lock_fd), ALIVE(process))) return true;
  threads_lock(&s->keeper);
  if (load_relaxed(&page->joined) != process + 1 ||
      load_relaxed(&page->incarnation) != incarnation) {
    ours = false; /* another thread has seen to it */
  } else if (!byte_held(load_relaxed(&s->lock_fd), ALIVE(process)) ||
             load_relaxed(&p->incarnation) != incarnation) {
    store_relaxed(&page->lost, 1);
    drop_locks(s);
    description_t d = open_description(s);
    ours = !byte_lock(d.fd, d.command, F_WRLCK, OWNED(process)) &&
           load_relaxed(&p->incarnation) == incarnation &&
           !byte_lock(d.fd, d.command, F_WRLCK, ALIVE(process)) && hold_locks(s, process, &d);
    if (!ours) {
      if (d.command == F_SETLK) (void)byte_lock(d.fd, d.command, F_UNLCK, OWNED(process));
      close_description(s, &d);
      store_relaxed(&page->joined, 0);
      store_relaxed(&page->joining, 0);
    }
  }
  threads_unlock(&s->keeper);
  return ours;
}

/* This process as the owner of something: its process index and incarnation. Another thread may just be joining
 * (microseconds, once); a process that found no process index earlier tries again. */
UNGUARDED bool process_identity(fshm_segment *s, uint32_t *process, uint64_t *incarnation) {
  struct timespec pause = {0, 50000};
  for (int tries = 0; tries < 20000; tries++) { /* a second */
    *process = process_index(s);
    uint32_t joined = atomic_load_explicit(&s->fork_page->joined, memory_order_acquire);
    if (joined && joined != NO_PROCESS) {
      *process = joined - 1;
      *incarnation = load_relaxed(&s->fork_page->incarnation);
      if (likely(!load_relaxed(&s->fork_page->kept)) || keep_index(s, *process, *incarnation))
        return true;
      continue;
    }
    if (s->read_only) return false; /* it never joins */
    if (joined == NO_PROCESS) {
      if (tries) return false;
      /* One thread makes way for another try: a second would undo what has been joined since. */
      if (atomic_compare_exchange_strong(&s->fork_page->joined, &joined, 0))
        store_relaxed(&s->fork_page->joining, 0);
      continue;
    }
    (void)nanosleep(&pause, NULL);
  }
  return false;
}

bool process_alive(fshm_segment *s, uint32_t process) {
  /* Ours, unless our locks were dropped, and another process has the process index since: then the kernel knows.
   * acquire: the incarnation was stored before. */
  if (!s->read_only &&
      atomic_load_explicit(&s->fork_page->joined, memory_order_acquire) == process + 1 &&
      load_relaxed(&s->processes[process].incarnation) == load_relaxed(&s->fork_page->incarnation))
    return true;
  /* Cannot tell: nobody is declared dead on a guess. A reader may go by /proc alone: it takes nothing. */
  if (!lock_file_ready(s)) return !s->read_only || !has_ended(s, process, true);
  return byte_held(load_relaxed(&s->lock_fd), ALIVE(process)) && !has_ended(s, process, false);
}

int fshm_process_at(fshm_segment *s, uint32_t index, fshm_process_info *out) {
  memset(out, 0, sizeof *out);
  if (index >= PROCESSES) return FSHM_E_ARGUMENT;
  const process_t *p = &s->processes[index];
  out->pid = load_relaxed(&p->pid);
  out->attached_ns = load_relaxed(&p->attached);
  out->outage = load_relaxed(&p->outage);
  fshm_counters so_far;
  counters_of_process(s, index, &so_far);
  out->admitted = so_far.admitted - load_relaxed(&p->before[0]);
  out->denied = so_far.denied - load_relaxed(&p->before[1]);
  out->refused_full = so_far.refused - load_relaxed(&p->before[2]);
  out->alive = out->pid && process_alive(s, index);
  if (out->alive && look_at_process(p, false) == UNSEEN) out->alive = FSHM_ALIVE_BY_LOCK;
  return FSHM_OK;
}

void fshm_process_note(fshm_segment *s, uint32_t outage) {
  uint32_t process = process_index(s);
  if (process < PROCESSES) store_relaxed(&s->processes[process].outage, outage);
}

/* Who speaks for the host: header_t.leader, while that process lives. Its threads lead together. */
#define LEADS(process, incarnation) ((incarnation) << 16 | ((process) + 1))
#define LOOK_FOR_LEADER_NS 250000000

/* The process index of the living process that the word names, or NO_PROCESS. */
static uint32_t leader_index(fshm_segment *s, uint64_t word) {
  uint32_t process = (uint32_t)(word & 0xffff) - 1;
  if (process >= PROCESSES) return NO_PROCESS;
  uint64_t incarnation =
      atomic_load_explicit(&s->processes[process].incarnation, memory_order_acquire);
  return LEADS(process, incarnation) == word && process_alive(s, process) ? process : NO_PROCESS;
}

int fshm_lead(fshm_segment *s, int wait) {
  uint32_t process;
  uint64_t incarnation;
  if (s->read_only) return FSHM_E_READ_ONLY;
  for (;;) {
    if (process_identity(s, &process, &incarnation)) {
      uint64_t seen = load_relaxed(&s->header->leader), mine = LEADS(process, incarnation);
      if (seen == mine) return 1;
      /* From nobody, or a dead process, to us: one swap. It leads to no other memory: relaxed would do. */
      if (leader_index(s, seen) == NO_PROCESS &&
          (atomic_compare_exchange_strong(&s->header->leader, &seen, mine) || seen == mine))
        return 1; /* or another thread of ours was first */
    } else if (process_refusal(s) == FSHM_E_LOCK_FILE) {
      return FSHM_E_LOCK_FILE;
    } /* else the process table is full: it does not lead, until there is a place */
    struct timespec pause = {0, LOOK_FOR_LEADER_NS};
    if (!wait || nanosleep(&pause, NULL)) return 0; /* a signal */
  }
}

int fshm_lead_end(fshm_segment *s) {
  uint32_t joined = load_relaxed(&s->fork_page->joined);
  if (s->read_only || (!s->wiped && process_forked(s)) || !joined || joined == NO_PROCESS) return 0;
  uint64_t mine = LEADS(joined - 1, load_relaxed(&s->fork_page->incarnation));
  (void)atomic_compare_exchange_strong(&s->header->leader, &mine, 0);
  return 1;
}

uint32_t fshm_leader(fshm_segment *s) {
  uint32_t process = leader_index(s, load_relaxed(&s->header->leader));
  return process == NO_PROCESS ? 0 : load_relaxed(&s->processes[process].pid);
}
