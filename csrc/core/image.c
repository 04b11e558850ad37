/* image.c - the segment as a file: name, layout, creation, verification, removal.
 *
 * A segment is created whole or not at all: built as an unnamed file, filled, then linked to its name. The loser of
 * a race attaches to the winner's. Verification works on a private copy of the header, and recomputes the layout
 * instead of trusting it.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

#if defined(__linux__)
#include <sys/syscall.h>
#endif

#include "internal.h"

#define PAGE 4096
#define CHUNK (UINT64_C(16) << 20) /* allocated at once: a few ms */

int image_fail(fshm_error *e, int code) {
  e->code = code;
  e->sys_errno = errno;
  return code;
}

int image_fail_errno(fshm_error *e) {
  switch (errno) {
    case ENOENT:
      return image_fail(e, FSHM_E_NOT_FOUND);
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
      return image_fail(e, FSHM_E_SPACE);
    case EACCES:
    case EPERM:
    case EROFS:
      return image_fail(e, FSHM_E_PERMISSION);
    case ELOOP:
      return image_fail(e, FSHM_E_LINK);
    case EISDIR:
    case ENXIO: /* a socket, or a pipe without a reader */
      return image_fail(e, FSHM_E_KIND);
    case ENOMEM:
      return image_fail(e, FSHM_E_MEMORY);
    default:
      return image_fail(e, FSHM_E_SYSTEM);
  }
}

const char *fshm_directory(void) {
#if defined(__linux__)
  return "/dev/shm";
#else
  const char *tmp = getenv("TMPDIR");
  return tmp && *tmp ? tmp : "/tmp";
#endif
}

int fshm_path(const char *name, char *out, uint64_t size) {
  size_t length = strlen(name);
  if (length < 1 || length > FSHM_MAX_NAME || name[0] == '.') return FSHM_E_ARGUMENT;
  if (strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") != length)
    return FSHM_E_ARGUMENT;
  int n =
      snprintf(out, size, "%s/fast_litellm_shm.%d.%s", fshm_directory(), FSHM_LAYOUT_VERSION, name);
  return n > 0 && (uint64_t)n < size ? FSHM_OK : FSHM_E_ARGUMENT;
}

void image_lock_path(const char *path, uint64_t instance, char *out, size_t size) {
  (void)snprintf(out, size, "%s.%016llx.lock", path, (unsigned long long)instance);
}

static uint64_t aligned(uint64_t at, uint64_t to) { return (at + to - 1) / to * to; }

/* The layout, from the capacity alone: all words of the header before names_mode. */
static void lay_out(header_t *h, uint64_t capacity) {
  uint64_t limiters = capacity / 800;
  h->magic = FSHM_MAGIC;
  h->version = FSHM_LAYOUT_VERSION;
  h->byte_order = FSHM_BYTE_ORDER;
  h->capacity = capacity;
  /* 1.3 slots for each key, so that a table filled to its capacity still finds room; whole probe windows
   * (hash_table.c) */
  h->lines = (capacity * 13 + 39) / 40;
  if (h->lines > 2 * PROBE_LINES)
    h->lines = aligned(h->lines, PROBE_LINES);
  else if (h->lines)
    h->lines = UINT64_C(1) << bit_length(h->lines - 1);
  h->limiters = (uint32_t)(limiters < 32 ? 32 : limiters > MAX_LIMITERS ? MAX_LIMITERS : limiters);
  h->processes = PROCESSES;
  h->process_stats_entries = PROCESS_STATS;
  h->names_words = max_u64(h->lines * SLOTS_PER_LINE * 3 / 2, 512); /* 12 bytes a slot */
  h->limiters_offset = aligned(sizeof *h, PAGE);
  h->slots_offset = aligned(
      h->limiters_offset + h->limiters * sizeof(limiter_entry_t) + ZONES * sizeof(zone_t), PAGE);
  h->key_stats_offset = h->slots_offset + h->lines * LINE +
                        h->limiters * (UINT64_C(1) * SHARED * SHARED_PLACES * sizeof(slot_t));
  h->names_offset = h->key_stats_offset + h->lines * SLOTS_PER_LINE * sizeof(key_stats_t);
  /* The memo: room for about a text in every twenty keys, 160 KB by default. */
  h->memo_lines = min_u64(max_u64(capacity / 80, 256), UINT64_C(1) << 24);
  h->memo_offset = aligned(h->names_offset + h->names_words * 8, LINE);
  h->metrics_offset = h->memo_offset + h->memo_lines * LINE;
  h->histograms_offset = aligned(h->metrics_offset + METRICS * sizeof(metric_t), LINE);
  h->deployments_offset = h->histograms_offset + sizeof(histogram_t) * METRICS * METRIC_SHARDS;
  const uint64_t outsiders_offset = h->deployments_offset + DEPLOYMENTS * sizeof(deployment_t);
  h->waiters_offset = outsiders_offset + sizeof(counters_t);
  h->processes_offset =
      aligned(h->waiters_offset + WAITERS * sizeof(waiter_t) + PROCESSES * sizeof(uint32_t), PAGE);
  h->process_stats_offset = h->processes_offset + PROCESSES * sizeof(process_t);
  h->requests_offset = h->process_stats_offset + PROCESSES * sizeof(process_stats_t);
  h->counters_offset = h->requests_offset + PROCESSES * sizeof(requests_t);
  h->records_offset =
      aligned(h->counters_offset + PROCESSES * (sizeof(counters_t) + sizeof(reservations_t)), PAGE);
  h->size = h->records_offset + record_count(capacity) * sizeof(limit_record_t);
}

/* Records of limits: as many as keys, within bounds; whole blocks, none allocated before it is used. */
uint64_t record_count(uint64_t capacity) {
  return aligned(min_u64(max_u64(capacity, 1024), LIMIT_RECORDS), RECORD_BLOCK);
}

/* The rows of process indexes: blocks of 64 are whole pages in each of the arrays. */
#define ROWS 5
typedef struct {
  uint64_t offset, bytes; /* of the array; of one row */
} rows_t;

static void rows_of(const header_t *h, rows_t rows[ROWS]) {
  rows[0] = (rows_t){h->processes_offset, sizeof(process_t)};
  rows[1] = (rows_t){h->process_stats_offset, sizeof(process_stats_t)};
  rows[2] = (rows_t){h->requests_offset, sizeof(requests_t)};
  rows[3] = (rows_t){h->counters_offset, sizeof(counters_t)};
  rows[4] = (rows_t){h->counters_offset + PROCESSES * sizeof(counters_t), sizeof(reservations_t)};
}
static_assert(64 * sizeof(process_t) % PAGE == 0 && 64 * sizeof(process_stats_t) % PAGE == 0 &&
                  64 * sizeof(requests_t) % PAGE == 0 && 64 * sizeof(counters_t) % PAGE == 0 &&
                  64 * sizeof(reservations_t) % PAGE == 0,
              "blocks are whole pages");

uint64_t image_row_bytes(void) {
  return sizeof(process_t) + sizeof(process_stats_t) + sizeof(requests_t) + sizeof(counters_t) +
         sizeof(reservations_t);
}

uint64_t fshm_size_for(uint64_t capacity) {
  header_t h = {0};
  if (capacity < MIN_CAPACITY || capacity > MAX_CAPACITY) return 0;
  lay_out(&h, capacity);
  return h.size;
}

uint64_t fshm_memory_for(uint64_t capacity) {
  const uint64_t size = fshm_size_for(capacity);
  return size ? size - (PROCESSES - HOME_PROCESSES) * image_row_bytes() -
                    record_count(capacity) * sizeof(limit_record_t)
              : 0;
}

/* Identify the clock: clocks of another boot, or of another time namespace, differ. */
static void identify_clock(header_t *h) {
  h->boot[0] = h->boot[1] = h->time_namespace = 0;
#if defined(__linux__)
  char id[64] = {0};
  int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
  if (fd >= 0) {
    ssize_t n = read(fd, id, sizeof id - 1);
    (void)close(fd);
    if (n > 0) {
      h->boot[0] = fshm_siphash(1, 2, id, (uint64_t)n);
      h->boot[1] = fshm_siphash(3, 4, id, (uint64_t)n);
    }
  }
  struct stat st;
  if (!stat("/proc/self/ns/time", &st)) h->time_namespace = st.st_ino;
#endif
}

void image_random(void *out, size_t size) {
#if defined(__linux__)
  /* Not getrandom(): glibc has it from 2.25 on, and wheels are for 2.17. */
  if (syscall(SYS_getrandom, out, size, 0) == (long)size) return;
  /* No entropy is available: better than none. */
  uint64_t seed[2] = {fshm_clock(), (uint64_t)getpid()};
  for (size_t i = 0; i < size / 8; i++)
    ((uint64_t *)out)[i] = fshm_siphash(seed[0], seed[1], &i, sizeof i);
#else
  arc4random_buf(out, size);
#endif
}

/* Report the bytes needed and the bytes available, without what `fd` (-1: none) has taken of them. */
static int no_space(int fd, uint64_t size, fshm_error *e) {
  int saved = errno;
  struct statvfs all;
  struct stat own;
  e->wanted = size;
  e->found = statvfs(fshm_directory(), &all) ? 0 : (uint64_t)all.f_bavail * all.f_frsize;
  if (fd >= 0 && !fstat(fd, &own)) e->found += (uint64_t)own.st_blocks * 512;
  errno = saved;
  return image_fail_errno(e);
}

#if !defined(__APPLE__)
/* unused: no process has the file yet. In a used one, posix_fallocate() is no choice: where a file system cannot
 * allocate, it writes. */
static int allocate_chunk(int fd, uint64_t at, uint64_t size, bool unused) {
#if defined(__linux__)
  int failed = fallocate(fd, 0, (off_t)at, (off_t)size) ? errno : 0;
  if (failed != EOPNOTSUPP || !unused) return failed;
#endif
  return unused ? posix_fallocate(fd, (off_t)at, (off_t)size) : EOPNOTSUPP;
}
#endif

/* Allocate pages now: with a file that only grew by ftruncate, a full file system means SIGBUS. Returns an errno
 * value. */
static int allocate_range(int fd, uint64_t from, uint64_t to, bool unused) {
#if defined(__APPLE__)
  (void)fd, (void)from, (void)to, (void)unused;
  return 0;
#else
  for (uint64_t at = from; at < to; at += CHUNK) {
    /* A signal makes the kernel stop and undo the allocation (EINTR), again and again in a program with a fast
     * timer. So signals are blocked during a chunk, and served after it. */
    sigset_t every, before;
    (void)sigfillset(&every);
    (void)pthread_sigmask(SIG_SETMASK, &every, &before);
    int failed = allocate_chunk(fd, at, min_u64(to - at, CHUNK), unused);
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (failed) return failed;
  }
  return 0;
#endif
}

static int allocate_rows(int fd, const header_t *h, uint64_t from, uint64_t to, bool unused) {
  rows_t rows[ROWS];
  int failed = 0;
  rows_of(h, rows);
  for (int i = 0; i < ROWS && !failed; i++)
    failed = allocate_range(fd, rows[i].offset + from * rows[i].bytes,
                            rows[i].offset + to * rows[i].bytes, unused);
  return failed;
}

/* All but the rows of process indexes beyond the first HOME_PROCESSES. */
static int allocate(int fd, const header_t *h) {
  if (ftruncate(fd, (off_t)h->size)) return errno;
#if !defined(__APPLE__)
  /* Do not begin if it cannot succeed: it would take the host's memory until it fails. (No blocks at all: a tmpfs
   * without a limit.) */
  struct statvfs all;
  if (!fstatvfs(fd, &all) && all.f_blocks &&
      (uint64_t)all.f_bfree * all.f_frsize < fshm_memory_for(h->capacity))
    return ENOSPC;
#endif
  int failed = allocate_range(fd, 0, h->processes_offset, true);
  return failed ? failed : allocate_rows(fd, h, 0, HOME_PROCESSES, true);
}

/* Allocate the block of rows of a process index, for a process that takes it. Returns an errno value. The mapping has
 * no descriptor, so the segment is opened again. */
static int open_to_grow(const fshm_segment *s, int *out) {
  struct stat st;
  int fd = open(s->path, O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
  if (fd < 0) return errno;
  int failed = fstat(fd, &st) ? errno : 0;
  if (!failed && (st.st_ino != s->ino || (uint64_t)st.st_dev != s->dev)) failed = ENOENT;
  /* A file that was cut is not made longer. */
  if (!failed && (uint64_t)st.st_size != s->size) failed = EIO;
  if (failed)
    (void)close(fd);
  else
    *out = fd;
  return failed;
}
COLD int image_grow(const fshm_segment *s, uint32_t process) {
  const uint32_t block = process / 64;
  if (process < HOME_PROCESSES || load_relaxed(&s->header->joined[block])) return 0;
  header_t h = {0};
  int fd, failed = open_to_grow(s, &fd);
  if (failed) return failed;
  lay_out(&h, s->capacity);
  failed = allocate_rows(fd, &h, UINT64_C(64) * block, UINT64_C(64) * (block + 1), false);
  (void)close(fd);
  return failed;
}
/* The same for the block of a record. */
COLD int image_grow_records(const fshm_segment *s, uint32_t record) {
  header_t h = {0};
  int fd, failed = open_to_grow(s, &fd);
  if (failed) return failed;
  lay_out(&h, s->capacity);
  const uint64_t from =
      h.records_offset + record / RECORD_BLOCK * sizeof(limit_record_t) * RECORD_BLOCK;
  failed = allocate_range(fd, from, from + sizeof(limit_record_t) * RECORD_BLOCK, false);
  (void)close(fd);
  return failed;
}

/* Without a secret key: it detects accidents, not forgery. */
COLD uint64_t header_check(const header_t *h) {
  return fshm_siphash(FSHM_MAGIC, FSHM_LAYOUT_VERSION, h, offsetof(header_t, check));
}

static int fill(int fd, uint64_t capacity, uint32_t mode, uint32_t flags, uint32_t group,
                fshm_error *e) {
  header_t h;
  memset(&h, 0, sizeof h);
  lay_out(&h, capacity);
  identify_clock(&h);
  image_random(h.secret, sizeof h.secret);
  image_random(&h.instance, sizeof h.instance);
  struct timespec wall;
  (void)clock_gettime(CLOCK_REALTIME, &wall);
  h.created_realtime_ns = (uint64_t)wall.tv_sec * UINT64_C(1000000000) + (uint64_t)wall.tv_nsec;
  h.epoch = fshm_clock();
  store_relaxed(&h.wall_base, h.created_realtime_ns);
  store_relaxed(&h.wall_floor, h.created_realtime_ns);
  h.names_mode = flags & (FSHM_NAMES_HASHED | FSHM_NAMES_OFF);
  h.check = header_check(&h);
  /* Checked before, since growing beyond the limit raises SIGXFSZ, which ends the program. */
  struct rlimit most;
  if (!getrlimit(RLIMIT_FSIZE, &most) && most.rlim_cur < h.size) {
    errno = EFBIG;
    e->wanted = h.size;
    e->found = most.rlim_cur;
    return image_fail_errno(e);
  }
  int failed = allocate(fd, &h);
  if (failed) {
    errno = failed;
    return no_space(fd, fshm_memory_for(capacity), e);
  }
  /* Before the mode: until then it is for its owner alone. */
  if (group != FSHM_NO_GROUP && fchown(fd, (uid_t)-1, (gid_t)group)) {
    e->wanted = group;
    return image_fail(e, FSHM_E_GROUP);
  }
  if (fchmod(fd, mode)) return image_fail_errno(e); /* not at open: umask would interfere */
  if (pwrite(fd, &h, sizeof h, 0) != (ssize_t)sizeof h) return image_fail_errno(e);
  return FSHM_OK;
}

/* Give an unnamed file a name, unless the name exists. */
int image_link(int fd, const char *path) {
  char self[64];
  (void)snprintf(self, sizeof self, "/proc/self/fd/%d", fd);
  return linkat(AT_FDCWD, self, AT_FDCWD, path, AT_SYMLINK_FOLLOW);
}

/* Give the finished file its name, unless the name exists. */
static int publish_file(int fd, const char *temporary, const char *path) {
  if (!temporary) return image_link(fd, path);
#if defined(__linux__) && defined(SYS_renameat2)
  if (!syscall(SYS_renameat2, AT_FDCWD, temporary, AT_FDCWD, path, 1 /* RENAME_NOREPLACE */))
    return 0;
  if (errno == EEXIST) return -1;
#endif
  return link(temporary, path);
}

static int create_by(bool unnamed, const char *path, uint64_t capacity, uint32_t mode,
                     uint32_t flags, uint32_t group, fshm_error *e) {
  char temporary[300];
  int fd = -1;
#if defined(O_TMPFILE)
  if (unnamed) fd = open(fshm_directory(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
#endif
  if (!unnamed) {
    uint64_t nonce;
    image_random(&nonce, sizeof nonce);
    (void)snprintf(temporary, sizeof temporary, "%s.%016llx.tmp", path, (unsigned long long)nonce);
    fd = open(temporary, O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC | O_NOFOLLOW, 0600);
  }
  if (fd < 0) return no_space(-1, fshm_memory_for(capacity), e);
  int status = fill(fd, capacity, mode, flags, group, e);
  if (status == FSHM_OK && publish_file(fd, unnamed ? NULL : temporary, path) && errno != EEXIST)
    status = image_fail_errno(e); /* EEXIST: another process was faster; attach to its file */
  int saved = errno;
  if (!unnamed) (void)unlink(temporary); /* gone already if it was renamed */
  (void)close(fd);
  errno = saved;
  return status;
}

int image_create(const char *path, uint64_t capacity, uint32_t mode, uint32_t flags, uint32_t group,
                 fshm_error *e) {
  int status = create_by(true, path, capacity, mode, flags, group, e);
  /* No unnamed files, no /proc, or linkat refused: a private name and a rename that replaces nothing. */
  if (status != FSHM_OK && status != FSHM_E_SPACE && status != FSHM_E_GROUP)
    status = create_by(false, path, capacity, mode, flags, group, e);
  return status;
}

/* Check everything that can be wrong with a file of that name. */
int image_verify(int fd, header_t *h, uint32_t flags, uint32_t group, fshm_error *e) {
  struct stat st;
  errno = 0;
  if (fstat(fd, &st)) return image_fail_errno(e);
  if (!S_ISREG(st.st_mode)) return image_fail(e, FSHM_E_KIND);
  /* Only a member of a group can give a file to it. */
  bool of_group = group != FSHM_NO_GROUP && (uint32_t)st.st_gid == group;
  if (st.st_uid != geteuid() && !(flags & FSHM_OPEN_OTHER_OWNER) && !of_group) {
    e->found = st.st_uid;
    e->wanted = geteuid();
    return image_fail(e, FSHM_E_OWNER);
  }
  e->found = (uint64_t)st.st_size;
  e->wanted = sizeof *h;
  if ((uint64_t)st.st_size < sizeof *h || pread(fd, h, sizeof *h, 0) != (ssize_t)sizeof *h)
    return image_fail(e, FSHM_E_DAMAGED);
  if (h->magic != FSHM_MAGIC) return image_fail(e, FSHM_E_DAMAGED);
  if (h->version != FSHM_LAYOUT_VERSION || h->byte_order != FSHM_BYTE_ORDER) {
    e->found = h->version;
    e->wanted = FSHM_LAYOUT_VERSION;
    return image_fail(e, FSHM_E_LAYOUT);
  }
  header_t should = {0};
  if (h->capacity < MIN_CAPACITY || h->capacity > MAX_CAPACITY)
    return image_fail(e, FSHM_E_DAMAGED);
  lay_out(&should, h->capacity);
  e->wanted = should.size;
  if (should.size != (uint64_t)st.st_size ||
      memcmp(h, &should, offsetof(header_t, names_mode)) != 0)
    return image_fail(e, FSHM_E_DAMAGED);
  identify_clock(&should);
  e->found = h->time_namespace;
  e->wanted = should.time_namespace;
  if (should.boot[0] != h->boot[0] || should.boot[1] != h->boot[1] ||
      should.time_namespace != h->time_namespace || h->epoch > fshm_clock())
    return image_fail(e, FSHM_E_BOOT);
  /* The rest of the header: with another secret, for example, processes would count apart. */
  if (h->check != header_check(h)) return image_fail(e, FSHM_E_DAMAGED);
  return FSHM_OK;
}

/* Remove the name. Attached processes keep the segment; see fshm_unlinked(). */
int fshm_remove(const char *name, fshm_error *e) {
  struct stat st;
  header_t h = {0};
  memset(e, 0, sizeof *e);
  if (fshm_path(name, e->path, sizeof e->path) != FSHM_OK) return image_fail(e, FSHM_E_ARGUMENT);
  if (lstat(e->path, &st)) return image_fail_errno(e);
  int fd = S_ISREG(st.st_mode) ? open(e->path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK) : -1;
  bool ours = fd >= 0 && pread(fd, &h, sizeof h, 0) == (ssize_t)sizeof h && h.magic == FSHM_MAGIC;
  if (fd >= 0) (void)close(fd);
  if (unlink(e->path)) return image_fail_errno(e);
  if (ours) {
    char lock[sizeof e->path + 32];
    image_lock_path(e->path, h.instance, lock, sizeof lock);
    (void)unlink(lock);
  }
  return FSHM_OK;
}
