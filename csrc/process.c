/* process.c - who is alive, and which column is whose.
 *
 * A process owns slot i while it holds the POSIX lock on byte i of the lock file. The kernel grants
 * it to one process at a time and drops it at the owner's death, at once, in any pid namespace, for
 * zombies too; a forked child does not inherit it. (Open-file-description locks would be inherited.)
 * When the owner has counted the slot's generation up, it locks byte PROCESSES + i too: "the owner of this
 * generation lives". That is the one that others ask about.
 * The lock file is opened once for each process and segment, by nobody else, and stays open: closing
 * any descriptor of it would drop the process's locks.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "internal.h"

bool process_forked(const fshm_segment *s) {
  return load_relaxed(&s->fork_page->pid) != (uint32_t)getpid();
}

/* The bytes of a slot. */
#define OWNED(slot) (slot)
#define ALIVE(slot) ((slot) + PROCESSES)

static int byte_lock(int fd, int command, short type, uint32_t byte, struct flock *lock) {
  *lock = (struct flock){.l_type = type, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1};
  return fcntl(fd, command, lock);
}

/* Is the descriptor still that of the lock file? A daemoniser may have closed it, and its number may be
 * another file's by now. */
bool process_lock_open(const fshm_segment *s) {
  struct stat st;
  int fd = atomic_load_explicit(&s->lock_fd, memory_order_acquire); /* with lock_file_ready() */
  return fd >= 0 && !fstat(fd, &st) && st.st_ino == load_relaxed(&s->lock_ino) &&
         (uint64_t)st.st_dev == load_relaxed(&s->lock_dev);
}

/* Whoever may use the segment may use its lock file: the same owner, group and mode, as far as we may
 * set them. Not at open: umask would interfere. */
static void admit_same_users(const fshm_segment *s, int fd, const struct stat *lock) {
  struct stat segment;
  if (stat(s->path, &segment) || (lock->st_uid != geteuid() && geteuid())) return;
  if (segment.st_uid != lock->st_uid && !geteuid()) (void)!fchown(fd, segment.st_uid, (gid_t)-1);
  if (segment.st_gid != lock->st_gid) (void)!fchown(fd, (uid_t)-1, segment.st_gid);
  if ((lock->st_mode & 07777) != (segment.st_mode & 07777))
    (void)fchmod(fd, segment.st_mode & 07777);
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
  /* A hard link is somebody else's file, and one without a name was deleted just now. (Asked of the
   * file that is not the one yet: closing that one would drop the locks of this process.) */
  if (!wrong && !known && (!S_ISREG(st->st_mode) || st->st_nlink != 1)) wrong = ESTALE;
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
  bool member = !s->read_only && !process_forked(s) && joined && joined != NO_SLOT;
  errno = load_relaxed(&s->lock_errno);
  if (!known)
    return errno && !s->read_only ? image_fail(e, FSHM_E_LOCK_FILE)
                                  : FSHM_OK; /* nobody has joined yet */
  if (lstat(path, &st)) return image_fail(e, FSHM_E_LOCK_FILE);
  e->found = st.st_ino;
  e->wanted = known;
  errno = ESTALE;
  if (st.st_ino != known) return image_fail(e, FSHM_E_LOCK_FILE);
  errno = EBADF; /* and with it the lock that said that we live */
  if (member && !process_lock_open(s)) return image_fail(e, FSHM_E_LOCK_FILE);
  if (lock_file_ready(s)) return FSHM_OK;
  errno = load_relaxed(&s->lock_errno);
  return image_fail(e, FSHM_E_LOCK_FILE);
}

/* Why this process has no slot. */
int process_refusal(const fshm_segment *s) {
  return load_relaxed(&s->lock_errno) ? FSHM_E_LOCK_FILE : FSHM_E_PROCESSES;
}

/* Take a slot for this process. Called once in each process (the page is wiped by a fork), by its
 * first call on the segment; a second thread that comes meanwhile counts into the ledger directly
 * instead of waiting. Where no slot is left, so does the whole process. */
uint32_t process_join(fshm_segment *s) {
  fork_page_t *page = s->fork_page;
  if (s->read_only) return NO_SLOT;
  if (!s->wiped && process_forked(s)) {
    store_relaxed(&page->pid, (uint32_t)getpid());
    store_relaxed(&page->joined, 0);
    store_relaxed(&page->joining, 0);
  }
  if (atomic_exchange_explicit(&page->joining, 1, memory_order_relaxed)) return NO_SLOT;
  uint32_t pid = (uint32_t)getpid();
  store_relaxed(&page->pid, pid);
  if (!lock_file_ready(s)) {
    store_relaxed(&page->joined, NO_SLOT);
    return NO_SLOT;
  }
  struct flock lock;
  uint32_t start = pid * 2654435761U % PROCESSES; /* spread, so that a probe seldom meets a lock */
  for (uint32_t i = 0; i < PROCESSES; i++) {
    uint32_t slot = (start + i) % PROCESSES;
    const int fd = load_relaxed(&s->lock_fd);
    if (byte_lock(fd, F_SETLK, F_WRLCK, OWNED(slot), &lock)) continue;
    process_t *p = &s->processes[slot];
    /* First of all: from here on, what an earlier owner of the slot held is a dead process's. Only then
     * the byte that says that the owner lives: stopped in between, we do not keep it held. */
    store_relaxed(&page->generation, atomic_fetch_add(&p->generation, 1) + 1);
    if (byte_lock(fd, F_SETLK, F_WRLCK, ALIVE(slot),
                  &lock)) { /* a dead owner's is just being dropped */
      (void)byte_lock(fd, F_SETLK, F_UNLCK, OWNED(slot), &lock);
      continue;
    }
    /* The slot is ours alone: fold in what a dead owner left. Killed in between, the next owner goes
     * on; counts of keys may be lost then, and nothing decides by them. */
    ledger_flush_column(s, slot);
    fshm_tally so_far;
    tally_slot(s, slot, &so_far);
    store_relaxed(&p->before[0], so_far.admitted);
    store_relaxed(&p->before[1], so_far.denied);
    store_relaxed(&p->before[2], so_far.refused);
    store_relaxed(&p->away, 0);
    store_relaxed(&p->attached, segment_now(s));
    store_relaxed(&p->pid, pid);
    route_join(s, slot, load_relaxed(&page->generation));
    /* release: other threads that see the slot see its generation (process_identity) */
    atomic_store_explicit(&page->joined, slot + 1, memory_order_release);
    return slot;
  }
  store_relaxed(&page->joined, NO_SLOT);
  return NO_SLOT;
}

/* This process as the owner of something: its slot and generation. Another thread may just be joining
 * (microseconds, once); a process that found no slot earlier tries again. */
bool process_identity(fshm_segment *s, uint32_t *slot, uint64_t *generation) {
  struct timespec pause = {0, 50000};
  for (int tries = 0; tries < 20000; tries++) { /* a second */
    *slot = process_slot(s);
    uint32_t joined = atomic_load_explicit(&s->fork_page->joined, memory_order_acquire);
    if (joined && joined != NO_SLOT) {
      *slot = joined - 1;
      *generation = load_relaxed(&s->fork_page->generation);
      return true;
    }
    if (s->read_only) return false; /* it never joins */
    if (joined == NO_SLOT) {
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

bool process_alive(fshm_segment *s, uint32_t slot) {
  struct flock lock;
  /* Ours, unless somebody closed our lock file's descriptor, which drops the locks, and another process
   * has the slot since: then the kernel knows. acquire: the generation was stored before. */
  if (!s->read_only &&
      atomic_load_explicit(&s->fork_page->joined, memory_order_acquire) == slot + 1 &&
      load_relaxed(&s->processes[slot].generation) == load_relaxed(&s->fork_page->generation))
    return true;
  if (!lock_file_ready(s)) return true; /* cannot tell: nobody is declared dead on a guess */
  /* The kernel does not tell a process of its own locks: a handle for reading goes by the pid. */
  if (s->read_only && load_relaxed(&s->processes[slot].pid) == (uint32_t)getpid()) return true;
  return byte_lock(load_relaxed(&s->lock_fd), F_GETLK, F_WRLCK, ALIVE(slot), &lock) ||
         lock.l_type != F_UNLCK;
}

int fshm_process_at(fshm_segment *s, uint32_t index, fshm_process_info *out) {
  memset(out, 0, sizeof *out);
  if (index >= PROCESSES) return FSHM_E_ARGUMENT;
  const process_t *p = &s->processes[index];
  out->pid = load_relaxed(&p->pid);
  out->attached_ns = load_relaxed(&p->attached);
  out->away = load_relaxed(&p->away);
  fshm_tally so_far;
  tally_slot(s, index, &so_far);
  out->admitted = so_far.admitted - load_relaxed(&p->before[0]);
  out->denied = so_far.denied - load_relaxed(&p->before[1]);
  out->refused_full = so_far.refused - load_relaxed(&p->before[2]);
  out->alive = out->pid && process_alive(s, index);
  return FSHM_OK;
}

void fshm_process_note(fshm_segment *s, uint32_t away) {
  uint32_t slot = process_slot(s);
  if (slot < PROCESSES) store_relaxed(&s->processes[slot].away, away);
}

/* Who speaks for the host: the holder of one more byte. The kernel hands it on at its death, at once, to one
 * of those who wait. The lock is the process's: its threads lead together. */
#define LEADER (2 * PROCESSES)

int fshm_lead(fshm_segment *s, int wait) {
  struct flock lock;
  if (s->read_only) return FSHM_E_READ_ONLY;
  if (!lock_file_ready(s)) return FSHM_E_LOCK_FILE;
  if (!byte_lock(load_relaxed(&s->lock_fd), wait ? F_SETLKW : F_SETLK, F_WRLCK, LEADER, &lock)) {
    store_relaxed(&s->leads, (uint32_t)getpid());
    return 1;
  }
  return errno == EAGAIN || errno == EACCES || errno == EINTR ? 0 : FSHM_E_LOCK_FILE;
}

int fshm_lead_end(fshm_segment *s) {
  struct flock lock;
  if (s->read_only || !process_lock_open(s)) return 0;
  store_relaxed(&s->leads, 0);
  return !byte_lock(load_relaxed(&s->lock_fd), F_SETLK, F_UNLCK, LEADER, &lock);
}

uint32_t fshm_leader(fshm_segment *s) {
  struct flock lock;
  uint32_t leads = load_relaxed(&s->leads);
  if (leads && leads == (uint32_t)getpid())
    return leads; /* the kernel does not tell of own locks */
  if (!lock_file_ready(s)) return 0;
  if (byte_lock(load_relaxed(&s->lock_fd), F_GETLK, F_WRLCK, LEADER, &lock)) return 0;
  return lock.l_type == F_UNLCK || lock.l_pid <= 0 ? 0 : (uint32_t)lock.l_pid;
}
