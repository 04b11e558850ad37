/* process.c - who is alive, and which column is whose.
 *
 * A process owns slot i while it holds the POSIX lock on byte i of the lock file. The kernel grants
 * it to one process at a time and drops it at the owner's death, at once, in any pid namespace, for
 * zombies too; a forked child does not inherit it. (Open-file-description locks would be inherited.)
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

bool process_forked(const fshm_segment *s) { return s->fork_page->pid != (uint32_t)getpid(); }

static int byte_lock(int fd, int command, uint32_t slot, struct flock *lock) {
  *lock = (struct flock){.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = slot, .l_len = 1};
  return fcntl(fd, command, lock);
}

/* The lock file of this instance of the segment. Created by whoever comes first; its name holds the
 * instance, so a removed and remade segment never shares it. */
static int open_lock_file(const fshm_segment *s) {
  char path[sizeof s->path + 32];
  (void)snprintf(path, sizeof path, "%s.%016llx.lock", s->path,
                 (unsigned long long)s->header->instance);
  int flags = O_CLOEXEC | O_NOFOLLOW | (s->read_only ? O_RDONLY : O_RDWR | O_CREAT);
  int fd = open(path, flags, 0600);
  struct stat segment, lock;
  if (fd >= 0 && !s->read_only && !fstat(fd, &lock) && !fstat(s->fd, &segment) &&
      (lock.st_mode & 07777) != (segment.st_mode & 07777) && lock.st_uid == geteuid())
    (void)fchmod(fd, segment.st_mode & 07777);
  return fd;
}

static bool lock_file_ready(fshm_segment *s) {
  struct stat st;
  /* After a fork the descriptor is inherited; a daemoniser may have closed or reused it. */
  if (s->lock_fd >= 0 && !fstat(s->lock_fd, &st) && st.st_ino == s->lock_ino) return true;
  /* Not for a removed segment: its members hold another lock file, and nobody would remove this one. */
  s->lock_fd = fshm_unlinked(s) ? -1 : open_lock_file(s);
  if (s->lock_fd < 0 || fstat(s->lock_fd, &st)) return false;
  s->lock_ino = st.st_ino;
  return true;
}

/* Take a slot for this process. Called once in each process (the page is wiped by a fork), by its
 * first call on the segment; a second thread that comes meanwhile counts into the ledger directly
 * instead of waiting. Where no slot is left, so does the whole process. */
uint32_t process_join(fshm_segment *s) {
  fork_page_t *page = s->fork_page;
  if (s->read_only) return NO_SLOT;
  if (!s->wiped && process_forked(s)) {
    page->pid = (uint32_t)getpid();
    store_relaxed(&page->joined, 0);
    store_relaxed(&page->joining, 0);
  }
  if (atomic_exchange_explicit(&page->joining, 1, memory_order_relaxed)) return NO_SLOT;
  uint32_t pid = (uint32_t)getpid();
  page->pid = pid;
  if (!lock_file_ready(s)) {
    store_relaxed(&page->joined, NO_SLOT);
    return NO_SLOT;
  }
  struct flock lock;
  uint32_t start = pid * 2654435761u % PROCESSES; /* spread, so that a probe seldom meets a lock */
  for (uint32_t i = 0; i < PROCESSES; i++) {
    uint32_t slot = (start + i) % PROCESSES;
    if (byte_lock(s->lock_fd, F_SETLK, slot, &lock)) continue;
    process_t *p = &s->processes[slot];
    /* First of all: from here on, what an earlier owner of the slot held is a dead process's. */
    page->generation = atomic_fetch_add(&p->generation, 1) + 1;
    /* The slot is ours alone: fold in what a dead owner left. Killed in between, the next owner goes
     * on; counts may be lost or doubled then, and nothing decides by them. */
    ledger_flush_column(s, slot);
    (void)add_relaxed(&s->header->retired_admitted, atomic_exchange(&p->admitted, 0));
    (void)add_relaxed(&s->header->retired_denied, atomic_exchange(&p->denied, 0));
    store_relaxed(&p->refused, 0);
    store_relaxed(&p->attached, segment_now(s));
    store_relaxed(&p->pid, pid);
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
      *generation = s->fork_page->generation;
      return true;
    }
    if (joined == NO_SLOT) {
      if (s->read_only || tries) return false;
      store_relaxed(&s->fork_page->joined, 0);
      store_relaxed(&s->fork_page->joining, 0);
      continue;
    }
    (void)nanosleep(&pause, NULL);
  }
  return false;
}

bool process_alive(fshm_segment *s, uint32_t slot) {
  struct flock lock;
  if (!s->read_only && load_relaxed(&s->fork_page->joined) == slot + 1) return true;
  if (!lock_file_ready(s)) return true; /* cannot tell: nobody is declared dead on a guess */
  /* The kernel does not tell a process of its own locks: a handle for reading goes by the pid. */
  if (s->read_only && load_relaxed(&s->processes[slot].pid) == (uint32_t)getpid()) return true;
  return byte_lock(s->lock_fd, F_GETLK, slot, &lock) || lock.l_type != F_UNLCK;
}

int fshm_process_at(fshm_segment *s, uint32_t index, fshm_process_info *out) {
  memset(out, 0, sizeof *out);
  if (index >= PROCESSES) return FSHM_E_ARGUMENT;
  const process_t *p = &s->processes[index];
  out->pid = load_relaxed(&p->pid);
  out->attached_ns = load_relaxed(&p->attached);
  out->admitted = load_relaxed(&p->admitted);
  out->denied = load_relaxed(&p->denied);
  for (uint32_t i = 0; i < COLUMN_ENTRIES; i++) {
    out->admitted += load_relaxed(&s->columns[index].entries[i].admitted);
    out->denied += load_relaxed(&s->columns[index].entries[i].denied);
  }
  out->refused_full = load_relaxed(&p->refused);
  out->alive = out->pid && process_alive(s, index);
  return FSHM_OK;
}
