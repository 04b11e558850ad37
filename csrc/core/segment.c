/* segment.c - the segment as a mapping of this process: open, close, describe.
 *
 * A process maps each segment once, however often it opens it. Handles use the numbers of the verified copy of the
 * header, never those of the mapping.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "wall.h"

#define OPEN_TRIES 100

#if defined(__x86_64__)
bool fshm_wide_loads;
/* Has the processor AVX, and does the kernel save its registers? Not __builtin_cpu_supports(): it asks the compiler's
 * runtime library, and in that of zig, which builds wheels, nothing fills in the answer. */
__attribute__((constructor)) static void detect(void) {
  const unsigned wanted = bit_AVX | bit_OSXSAVE, both = 6; /* XMM and YMM */
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & wanted) != wanted) return;
  __asm__ __volatile__("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  fshm_wide_loads = (a & both) == both;
}
#endif

UNGUARDED uint64_t fshm_now(fshm_segment *s) { return segment_now(s); }

void fshm_keyed_hash(fshm_segment *s, const void *data, uint64_t length, uint64_t out[2]) {
  fshm_siphash128(s->secret[0], s->secret[1] ^ 10, data, length, out);
}

/* A lock among the threads of this process. It holds its holder's token: a thread that stayed in the parent at a
 * fork cannot keep the lock from the child. No hot call takes one. */
void threads_lock(_Atomic uint32_t *lock) {
  const uint32_t me = process_token();
  for (;;) {
    uint32_t holder = 0;
    if (atomic_compare_exchange_strong(lock, &holder, me)) return;
    if (holder != me && atomic_compare_exchange_strong(lock, &holder, me)) return;
    struct timespec pause = {0, 100000};
    (void)nanosleep(&pause, NULL);
  }
}
void threads_unlock(_Atomic uint32_t *lock) { atomic_store(lock, 0); }

size_t page_size(void) { return (size_t)sysconf(_SC_PAGESIZE); }

/* The segments open in this process: each is mapped once and joined once. */
static fshm_segment *open_segments;
static _Atomic uint32_t list_holder;

static fork_page_t *make_fork_page(bool *wiped) {
  void *page =
      mmap(NULL, sizeof(fork_page_t), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (page == MAP_FAILED) return NULL;
  *wiped = false;
#if defined(MADV_WIPEONFORK)
  *wiped = !madvise(page, sizeof(fork_page_t), MADV_WIPEONFORK);
#endif
  return page;
}

/* A handle, zeroed, behind the page that ends with its clock. */
static fshm_segment *make_handle(void) {
  const size_t page = page_size();
  unsigned char *block = mmap(NULL, page + sizeof(fshm_segment), PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return block == MAP_FAILED ? NULL : (fshm_segment *)(void *)(block + page);
}

static void free_handle(fshm_segment *s) {
  const size_t page = page_size();
  (void)munmap((unsigned char *)s - page, page + sizeof *s);
}

static int attach(int fd, const header_t *h, const char *path, uint32_t flags, fshm_segment **out,
                  fshm_error *e) {
  struct stat st;
  if (fstat(fd, &st)) return image_fail_errno(e);
  for (fshm_segment *s = open_segments; s; s = s->next) {
    bool read_only = flags & FSHM_OPEN_READ_ONLY;
    if (s->dev == (uint64_t)st.st_dev && s->ino == st.st_ino && (read_only || !s->read_only)) {
      s->users++;
      *out = s;
      return FSHM_OK;
    }
  }
  fshm_segment *s = make_handle();
  if (!s) return image_fail(e, FSHM_E_MEMORY);
  s->read_only = flags & FSHM_OPEN_READ_ONLY;
  int protection = s->read_only ? PROT_READ : PROT_READ | PROT_WRITE;
  void *map = mmap(NULL, h->size, protection, MAP_SHARED, fd, 0);
  s->fork_page = map == MAP_FAILED ? NULL : make_fork_page(&s->wiped);
  if (!s->fork_page) {
    e->wanted = h->size;
    (void)image_fail_errno(e);
    if (map != MAP_FAILED) (void)munmap(map, h->size);
    free_handle(s);
    return e->code;
  }
  s->map = map;
  s->header = map;
  s->size = h->size;
  s->lines = h->lines;
  s->probe_mask = (h->lines > 2 * PROBE_LINES ? PROBE_LINES : h->lines) - 1;
  s->slot_count = h->lines * SLOTS_PER_LINE;
  s->names_words = h->names_words;
  s->limiter_count = h->limiters;
  s->names_mode = h->names_mode & (FSHM_NAMES_HASHED | FSHM_NAMES_OFF);
  s->epoch = h->epoch;
  store_relaxed(&clock_of(s)->epoch, h->epoch);
  store_relaxed(&clock_of(s)->still, 1);
  s->capacity = h->capacity;
  s->created_realtime_ns = h->created_realtime_ns;
  s->instance = h->instance;
  memcpy(s->secret, h->secret, sizeof s->secret);
  memcpy(s->verified, h, sizeof s->verified);
  s->limiters = (limiter_entry_t *)(void *)(s->map + h->limiters_offset);
  s->zones = (zone_t *)(void *)(s->limiters + h->limiters);
  s->processes = (process_t *)(void *)(s->map + h->processes_offset);
  s->process_stats = (process_stats_t *)(void *)(s->map + h->process_stats_offset);
  s->slots = (slot_t *)(void *)(s->map + h->slots_offset);
  s->key_stats = (key_stats_t *)(void *)(s->map + h->key_stats_offset);
  s->names = (_Atomic uint64_t *)(void *)(s->map + h->names_offset);
  s->memo = (memo_t *)(void *)(s->map + h->memo_offset);
  s->memo_lines = h->memo_lines;
  s->metrics = (metric_t *)(void *)(s->map + h->metrics_offset);
  s->histograms = (histogram_t *)(void *)(s->map + h->histograms_offset);
  s->deployments = (deployment_t *)(void *)(s->map + h->deployments_offset);
  s->requests = (requests_t *)(void *)(s->map + h->requests_offset);
  s->counters = (counters_t *)(void *)(s->map + h->counters_offset);
  s->reservations = (reservations_t *)(void *)(s->counters + PROCESSES);
  s->records = (limit_record_t *)(void *)(s->map + h->records_offset);
  s->waiters = (waiter_t *)(void *)(s->map + h->waiters_offset);
  s->watchers = (_Atomic uint32_t *)(void *)(s->waiters + WAITERS);
  s->outsiders = (counters_t *)(void *)(s->deployments + DEPLOYMENTS);
  s->dev = (uint64_t)st.st_dev;
  s->ino = st.st_ino;
  store_relaxed(&s->lock_fd, -1);
  s->users = 1;
  (void)snprintf(s->path, sizeof s->path, "%s", path);
  s->next = open_segments;
  open_segments = s;
  *out = s;
  return FSHM_OK;
}

int fshm_open(const char *name, uint64_t capacity, uint32_t mode, uint32_t flags,
              fshm_segment **out, fshm_error *e) {
  return fshm_open_group(name, capacity, mode, flags, FSHM_NO_GROUP, out, e);
}

int fshm_open_group(const char *name, uint64_t capacity, uint32_t mode, uint32_t flags,
                    uint32_t group, fshm_segment **out, fshm_error *e) {
  header_t h = {0};
  memset(e, 0, sizeof *e);
  *out = NULL;
  errno = 0;
  if (fshm_path(name, e->path, sizeof e->path) != FSHM_OK || (mode & ~0777U) ||
      (capacity && (capacity < MIN_CAPACITY || capacity > MAX_CAPACITY)))
    return image_fail(e, FSHM_E_ARGUMENT);
  int access = flags & FSHM_OPEN_READ_ONLY ? O_RDONLY : O_RDWR;
  threads_lock(&list_holder);
  int status = FSHM_E_SYSTEM;
  for (int tries = 0; tries < OPEN_TRIES; tries++) {
    int fd = open(e->path, access | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (fd < 0 && errno == ENOENT && (flags & FSHM_OPEN_CREATE)) {
      status = image_create(e->path, capacity ? capacity : DEFAULT_CAPACITY, mode, flags, group, e);
      if (status != FSHM_OK) break;
      continue; /* ours, or the winner's: attach to what is there */
    }
    if (fd < 0) {
      status = image_fail_errno(e);
      break;
    }
    status = image_verify(fd, &h, flags, group, e);
    if (status == FSHM_OK && capacity && capacity != h.capacity) {
      e->found = h.capacity;
      e->wanted = capacity;
      status = image_fail(e, FSHM_E_CAPACITY);
    }
    if (status == FSHM_OK) status = attach(fd, &h, e->path, flags, out, e);
    /* The mapping does not need the descriptor. If we kept it, a daemonising program might close it, and its number
     * would then be another file's. */
    (void)close(fd);
    break;
  }
  threads_unlock(&list_holder);
  if (status == FSHM_OK && !*out) { /* it was removed each time we created it */
    errno = ENOENT;
    status = image_fail(e, FSHM_E_NOT_FOUND);
  }
  return status;
}

void fshm_close(fshm_segment *s) {
  if (!s) return;
  threads_lock(&list_holder);
  if (--s->users == 0) {
    fshm_segment **at = &open_segments;
    while (*at != s) at = &(*at)->next;
    *at = s->next;
    process_leave(s);
    (void)munmap(s->map, s->size);
    (void)munmap(s->fork_page, sizeof *s->fork_page);
    free_handle(s);
  }
  threads_unlock(&list_holder);
}

int fshm_unlinked(fshm_segment *s) {
  struct stat named; /* no other file gets our inode number while it is mapped */
  if (lstat(s->path, &named)) return errno == ENOENT || errno == ENOTDIR;
  return named.st_ino != s->ino || (uint64_t)named.st_dev != s->dev;
}

void fshm_describe(fshm_segment *s, fshm_geometry *out) {
  memset(out, 0, sizeof *out);
  out->base = s->map;
  out->size = s->size;
  out->capacity = s->capacity;
  out->slots = s->slot_count;
  out->created_realtime_ns = s->created_realtime_ns;
  out->time_ns = segment_now(s);
  out->instance = s->instance;
  out->slots_offset = (uint64_t)((unsigned char *)s->slots - s->map);
  out->key_stats_offset = (uint64_t)((unsigned char *)s->key_stats - s->map);
  out->limiters_offset = (uint64_t)((unsigned char *)s->limiters - s->map);
  out->processes_offset = (uint64_t)((unsigned char *)s->processes - s->map);
  out->process_stats_offset = (uint64_t)((unsigned char *)s->process_stats - s->map);
  out->limiters = s->limiter_count;
  out->processes = PROCESSES;
  out->memory = fshm_memory_for(s->capacity);
  for (uint32_t word = 0; word < PROCESSES / 64; word++) {
    uint64_t joined = load_relaxed(&s->header->joined[word]);
    if (joined) out->processes_joined = word * 64 + (uint32_t)bit_length(joined);
    if (joined && word >= HOME_PROCESSES / 64) out->memory += 64 * image_row_bytes();
  }
  out->memory +=
      min_u64(load_relaxed(&s->header->record_blocks) * RECORD_BLOCK, record_count(s->capacity)) *
      sizeof(limit_record_t);
  out->process_stats_entries = PROCESS_STATS;
  out->layout_version = FSHM_LAYOUT_VERSION;
  out->names = s->names_mode;
  out->read_only = s->read_only;
}

/* Mark the slots in use: live[i] = 1. Returns their number; live may be NULL. */
uint64_t fshm_live_slots(fshm_segment *s, uint8_t *live, uint64_t now) {
  uint64_t count = 0;
  if (!now) now = segment_now(s);
  for (uint64_t i = 0; i < s->slot_count; i++) {
    uint64_t when = load_relaxed(&s->slots[i].when);
    uint64_t who = load_relaxed(&s->slots[i].who);
    bool in_use = who && !IS_PENDING(when) && state_ends(s, who, when) > now;
    if (live) live[i] = in_use;
    count += in_use;
  }
  return count;
}
