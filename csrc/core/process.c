/* process.c - the process table: joining, leaving, liveness. Argued in DESIGN.md, "Processes".
 *
 * A process owns process index i while it holds the lock on byte i of the lock file. Once it has raised the index's
 * incarnation, it also locks byte PROCESSES + i: "the owner of this incarnation lives". Liveness checks test this
 * byte. The locks belong to an open file description of the process's own (F_OFD_SETLK). On Linux the process maps
 * the description into its memory, where a fork does not inherit it, and closes the descriptor. So the locks last as
 * long as the process's memory, whatever descriptors it opens and closes, and however it forks, until it dies or
 * runs another program. In one case the kernel drops them late: liveness.c asks /proc about a process that dumps
 * core.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "../stats/counters.h"
#include "../stats/deployments.h"
#include "../stats/key_stats.h"
#include "internal.h"
#include "lock_file.h"

/* The descriptor and mapping of a thread that takes locks for its process: a child forked at that instant must not
 * keep them. */
typedef struct {
  _Atomic int fd; /* + 1; 0 = none, -1 = being written */
  _Atomic uint64_t dev, ino;
  _Atomic uintptr_t map;
} grip_t;
/* One for each segment that this process is joining, or whose descriptor it must keep. If there are more, a child
 * forked at that instant knows only by its parent's pid that it is a child. */
#define GRIPS 64
static grip_t grips[GRIPS], no_grip;

static _Atomic uint32_t forks; /* since the first process with this memory */

/* In a forked child: close what holds its parent's locks. */
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

/* A number that tells this process from all others with a copy of its memory. In a new pid namespace a child may
 * have its parent's pid. (Pids have 22 bits.) */
uint32_t process_token(void) { return (uint32_t)getpid() | load_relaxed(&forks) << 22; }

COLD bool process_forked(const fshm_segment *s) {
  return load_relaxed(&s->fork_page->token) != process_token();
}

/* The error of a process without a process index. */
int process_refusal(const fshm_segment *s) {
  return load_relaxed(&s->lock_errno) ? FSHM_E_LOCK_FILE : FSHM_E_PROCESSES;
}

/* The description that has this process's locks. */
typedef struct {
  int fd, command; /* -1: none. F_OFD_SETLK or F_SETLK */
  grip_t *grip;
} description_t;

/* A description that only this process has. If there can be none (its user may not open the file, and has it from
 * its parent): the descriptor for liveness checks, with POSIX locks. Those belong to the process; closing any
 * descriptor of the file drops them, and a child does not inherit them. */
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

/* The description whose descriptor is kept (fork_page_t.kept). */
static description_t kept_description(const fshm_segment *s) {
  int kept = load_relaxed(&s->fork_page->kept);
  for (int i = 0; i < GRIPS; i++)
    if (load_relaxed(&grips[i].fd) == kept)
      return (description_t){kept - 1, F_OFD_SETLK, &grips[i]};
  return (description_t){kept - 1, kept - 1 == load_relaxed(&s->lock_fd) ? F_SETLK : F_OFD_SETLK,
                         &no_grip};
}

/* Map the description, so that no fork inherits it. NULL: not possible on this system. */
static void *map_description(grip_t *g, int fd) {
#if defined(__linux__)
  /* Its address first, so that a child forked at any instant finds it in `grips`. */
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

/* The description has locked both bytes of the index. Make the locks last as long as we live. False: they were
 * dropped; from now on, descriptors are kept open. */
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

/* Give up this process's index, if it has one. (A child that has not joined has none.) */
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

/* Permits have INCARNATION_BITS of their owner's incarnation. Before these repeat for an index, free all permits of its
 * former owners. Killed in here, the next process to join begins again, since the incarnation was not raised; no
 * other process can own the index meanwhile, since we have its lock. */
#define COMES_ROUND(incarnation) ((incarnation) % (1 << INCARNATION_BITS) == 0)

/* The indexes in the order in which a process tries them: those at home from `start` on, which spreads processes, then
 * the others from the lowest on, so that few blocks of them are ever allocated. */
static inline uint32_t nth_index(uint32_t start, uint32_t i) {
  return i < HOME_PROCESSES ? (start + i) % HOME_PROCESSES : i;
}

/* Does the index look as if its owner lived? A hint: a lock is tried for 10 us and more where thousands are held. */
#define HELD_BEFORE_HINTS 32
static bool looks_owned(const fshm_segment *s, uint32_t process) {
  if (!process_joined(s, process)) return false;
  pid_t pid = (pid_t)load_relaxed(&s->processes[process].pid);
  return pid > 0 && (!kill(pid, 0) || errno != ESRCH);
}

/* Take a process index for this process. Called once in each process (a fork wipes the page), by its first call on
 * the segment. A second thread that comes meanwhile does not wait: its calls count in the key statistics directly.
 * So do all calls of the process if no index is free. */
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
  const uint32_t start = pid * 2654435761U % HOME_PROCESSES;
  unsigned held = 0;
  for (uint32_t i = 0; i < 2 * PROCESSES; i++) {
    uint32_t process = nth_index(start, i % PROCESSES);
    if (i < PROCESSES ? held >= HELD_BEFORE_HINTS && looks_owned(s, process)
                      : held < HELD_BEFORE_HINTS)
      continue; /* the second time round: those that only looked so */
    if (byte_lock(d.fd, d.command, F_WRLCK, OWNED(process))) {
      held++;
      if (errno == EAGAIN || errno == EACCES) continue;
      store_relaxed(&s->lock_errno, errno); /* the system has no such locks */
      break;
    }
    int no_room = image_grow(s, process);
    if (no_room) {
      store_relaxed(&s->lock_errno, no_room);
      (void)byte_lock(d.fd, d.command, F_UNLCK, OWNED(process));
      break;
    }
    /* Before the row is touched. Killed in between, an index that no process had looks as if one had died in it. */
    (void)atomic_fetch_or_explicit(&s->header->joined[process / 64], UINT64_C(1) << (process % 64),
                                   memory_order_relaxed);
    (void)atomic_fetch_or_explicit(&s->header->joined_blocks, UINT64_C(1) << (process / 64),
                                   memory_order_relaxed);
    process_t *p = &s->processes[process];
    if (COMES_ROUND(load_relaxed(&p->incarnation) + 1)) (void)fshm_reap(s, 0);
    /* A pid that is read together with the next incarnation must not be the former owner's. */
    store_relaxed(&p->pid, 0);
    /* First raise the incarnation: from here on, permits of earlier owners belong to dead processes. Then lock the
     * byte that says that the owner lives: if we are stopped in between, we do not keep it locked for an earlier
     * owner. */
    store_relaxed(&page->incarnation, atomic_fetch_add(&p->incarnation, 1) + 1);
    /* It fails while the kernel is just dropping a dead owner's lock. */
    if (byte_lock(d.fd, d.command, F_WRLCK, ALIVE(process))) {
      (void)byte_lock(d.fd, d.command, F_UNLCK, OWNED(process));
      continue;
    }
    if (!hold_locks(s, process, &d)) {
      d = open_description(s);
      continue;
    }
    /* The index is ours alone: flush what a dead owner left. Killed in between, the next owner goes on; counts of
     * keys may be lost then, and no decision reads them. */
    key_stats_flush_process(s, process);
    fshm_counters so_far;
    counters_of_process(s, process, &so_far);
    store_relaxed(&p->before[0], so_far.admitted);
    store_relaxed(&p->before[1], so_far.denied);
    store_relaxed(&p->before[2], so_far.refused);
    store_relaxed(&p->outage, 0);
    store_relaxed(&p->attached, segment_now(s));
    store_relaxed(&p->born, own_birth());
    /* release: a reader that sees the pid sees its birth and its incarnation (look_at_process) */
    atomic_store_explicit(&p->pid, pid, memory_order_release);
    requests_join(s, process, load_relaxed(&page->incarnation));
    reservations_join(s, process, load_relaxed(&page->incarnation));
    /* release: other threads that see the process index see its incarnation (process_identity) */
    atomic_store_explicit(&page->joined, process + 1, memory_order_release);
    return process;
  }
  close_description(s, &d);
  store_relaxed(&page->joined, NO_PROCESS);
  return NO_PROCESS;
}

/* Our locks depend on a descriptor that the program may have closed. Take them again, with the same incarnation if
 * no other process had the index meanwhile. False: another process has it, and this one must join anew. */
static COLD bool keep_index(fshm_segment *s, uint32_t process, uint64_t incarnation) {
  fork_page_t *page = s->fork_page;
  const process_t *p = &s->processes[process];
  bool ours = load_relaxed(&p->incarnation) == incarnation;
  /* No liveness check is possible, here or in another process. */
  if (!lock_file_ready(s)) return ours;
  if (ours && byte_held(load_relaxed(&s->lock_fd), ALIVE(process))) return true;
  threads_lock(&s->keeper);
  if (load_relaxed(&page->joined) != process + 1 ||
      load_relaxed(&page->incarnation) != incarnation) {
    ours = false; /* another thread has done it */
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

/* This process as an owner: its index and incarnation. Waits while another thread is joining (microseconds, once). A
 * process that found no free index earlier tries again. */
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
      /* Only one thread resets `joined`: a second would undo a new join. */
      if (atomic_compare_exchange_strong(&s->fork_page->joined, &joined, 0))
        store_relaxed(&s->fork_page->joining, 0);
      continue;
    }
    (void)nanosleep(&pause, NULL);
  }
  return false;
}

bool process_alive(fshm_segment *s, uint32_t process) {
  /* Our own index, unless our locks were dropped and another process took it: then the kernel knows. acquire: the
   * incarnation was stored before. */
  if (!s->read_only &&
      atomic_load_explicit(&s->fork_page->joined, memory_order_acquire) == process + 1 &&
      load_relaxed(&s->processes[process].incarnation) == load_relaxed(&s->fork_page->incarnation))
    return true;
  /* Unknown: no process is declared dead on a guess. A reader may go by /proc alone, since it frees nothing. */
  if (!lock_file_ready(s)) return !s->read_only || !has_ended(s, process, true);
  return byte_held(load_relaxed(&s->lock_fd), ALIVE(process)) && !has_ended(s, process, false);
}

int fshm_process_at(fshm_segment *s, uint32_t index, fshm_process_info *out) {
  memset(out, 0, sizeof *out);
  if (index >= PROCESSES) return FSHM_E_ARGUMENT;
  if (!process_joined(s, index)) return FSHM_OK;
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
