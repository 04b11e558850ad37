/* internal.h - what all files of csrc/ share: macros, the handles, and the calls of core/. */
#ifndef FSHM_INTERNAL_H
#define FSHM_INTERNAL_H

#include <stdbool.h>
#include <string.h>

#include "atomic128.h"
#include "../fast_shm.h"
#include "layout.h"
#include "../limits/algorithms.h"

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

/* Rarely called: kept out of the hot path, and of the compiler's inlining decisions there. */
#define COLD __attribute__((noinline, cold))

/* Part of the hot path: always inlined, whatever its size. (Use with `inline`.) */
#define HOT __attribute__((always_inline))

/* On the hot path, and compiled without the stack check that csrc/hardening asks of all other functions: it costs 6
 * to 40 instructions of a call. The arrays of such a function hold numbers, one for each of at most FSHM_MAX_LIMITS
 * limits, or a pair of words. No text, and no length from a caller or the segment, is written into them. */
#if __has_attribute(no_stack_protector)
#define UNGUARDED __attribute__((no_stack_protector))
#else
#define UNGUARDED
#endif

#define load_relaxed(p) atomic_load_explicit((p), memory_order_relaxed)
#define store_relaxed(p, v) atomic_store_explicit((p), (v), memory_order_relaxed)
#define add_relaxed(p, v) atomic_fetch_add_explicit((p), (v), memory_order_relaxed)

/* A barrier between a swap and a later load. On x86 the locked swap is a full barrier already. */
#if defined(__x86_64__)
#define after_swap() atomic_signal_fence(memory_order_seq_cst)
#else
#define after_swap() atomic_thread_fence(memory_order_seq_cst)
#endif

/* No loop may depend without bound on a word that another process can write (I6). */
#define MAX_TRIES 20000
/* A lost claim counts as so many lost swaps: it has looked at the whole probe windows as often (ROUNDS of
 * hash_table.c). Honest processes cannot make a call lose 300 claims: the winner of a claim leaves a slot that the
 * next look finds. */
#define CLAIM_TRIES 64
/* The lost swaps and claims that a call may still have before it gives up, over all the slots that it visits. */
typedef struct {
  int64_t swaps, claims;
} patience_t;
static inline patience_t patience(uint64_t swaps) {
  return (patience_t){(int64_t)swaps, MAX_TRIES / CLAIM_TRIES};
}
static inline bool patient(const patience_t *p) { return p->swaps > 0 && p->claims > 0; }

/* A word that only rises, for statistics. */
static inline void raise_to(_Atomic uint64_t *word, uint64_t to) {
  uint64_t seen = load_relaxed(word);
  for (int i = 0; seen < to && i < MAX_TRIES; i++)
    if (atomic_compare_exchange_weak_explicit(word, &seen, to, memory_order_relaxed,
                                              memory_order_relaxed))
      return;
}

#define NO_PROCESS UINT32_MAX
#define CLOCKS_DIFFER 30000 /* ns: two processes' clocks differ by less (clock.c) */

/* The kernel wipes this page in a forked child (MADV_WIPEONFORK): so the child sees that it has not joined. */
typedef struct {
  _Atomic uint32_t joined; /* 0 = not yet; process index + 1; NO_PROCESS: none was free */
  _Atomic uint32_t joining;
  _Atomic uint32_t token; /* where the kernel cannot wipe: compare with process_token() */
  _Atomic uint64_t incarnation; /* of our process index */
  _Atomic uintptr_t hold; /* the mapping that keeps the description with our locks open; 0 = none */
  _Atomic uint32_t lost; /* our locks were dropped although we live */
  _Atomic int kept; /* no mapping keeps our locks: this descriptor (+ 1) does */
} fork_page_t;

/* A place of the wait queue that an event loop of this process polls. */
typedef struct {
  _Atomic uint64_t owner; /* of the place; 0: no loop polls it */
  _Atomic uint32_t token; /* process_token() of that process: a forked child has a copy */
  _Atomic uint32_t lock; /* threads_lock() around a write to fd, and around the fields */
  _Atomic int fd;
  _Atomic uint32_t heard; /* wake-ups that fshm_wait_watch() has passed on */
  /* Also of a place where a thread sleeps: its owner (48 bits), and how often it was woken since its last turn for what is
   * idle in this process (16). */
  _Atomic uint64_t here;
} polled_t;
/* What a process remembers of a look at all permits of a key: semaphore.c. Relaxed words, and a check over them. */
#define LOOKS 256
#define LOOK_WORDS 4
typedef struct {
  _Atomic uint64_t hash, words[LOOK_WORDS], check;
} look_entry_t;

/* What a segment's clock is in this process: it ends the page before the handle, so that a test can put a file in the
 * place of that page (moved_clock.c), which then moves the clock of all processes that have done so. Nothing else
 * changes it. Each word is read and written alone (relaxed): see DESIGN.md, "A clock that tests move". */
typedef struct {
  uint64_t magic, instance; /* in a file: of the segment that it belongs to */
  _Atomic uint64_t
      epoch; /* fshm_clock() at segment time 0; less when the clock was moved forward */
  _Atomic uint64_t
      still; /* the time while the clock stands: fshm_clock() - epoch is below 0 then */
  _Atomic uint64_t moved; /* ns by which it was moved, all together: waiting calls go by that */
  _Atomic uint64_t day; /* the time of day at segment time 0, ns since 1970 */
  _Atomic uint64_t holds; /* waiting calls do not move it while it stands */
  uint64_t unused;
} segment_clock_t;

struct fshm_segment {
  unsigned char *map;
  header_t *header;
  slot_t *slots;
  key_stats_t *key_stats;
  limiter_entry_t *limiters;
  zone_t *zones; /* behind the limiters: ZONES of them; the first is UTC, and is not used */
  process_t *processes;
  process_stats_t *process_stats;
  _Atomic uint64_t *names;
  memo_t *memo;
  metric_t *metrics;
  histogram_t *histograms;
  deployment_t *deployments;
  requests_t *requests;
  reservations_t *reservations;
  limit_record_t *records;
  counters_t *counters, *outsiders; /* outsiders: of all processes without a process index */
  waiter_t *waiters;
  /* Of each process, a futex word: wake-ups << 2 | another process asks for a connection << 1 | a thread watches */
  _Atomic uint32_t *watchers;
  uint64_t memo_lines;
  uint64_t lines, slot_count, names_words, size, epoch;
  uint64_t probe_mask; /* cache lines of a probe window - 1: a power of two - 1 */
  uint64_t capacity, created_realtime_ns, instance, secret[2];
  unsigned char verified[offsetof(header_t, damage)]; /* the header when this process attached */
  _Atomic uint64_t damage; /* as header_t.damage, for read-only mappings */
  uint32_t limiter_count, names_mode;
  fork_page_t *fork_page;
  bool read_only;
  bool wiped; /* the kernel wipes fork_page in a child; else compare fork_page->token */
  _Atomic int lock_fd; /* the descriptor for liveness checks; -1 = not open */
  _Atomic uint64_t lock_dev, lock_ino;
  _Atomic uint32_t lock_opener; /* threads_lock() around the opening */
  _Atomic uint32_t keeper; /* threads_lock() around retaking lost locks */
  _Atomic uint32_t unmapped; /* here a mapping keeps no description: descriptors stay open */
  _Atomic uint64_t looked[PROCESSES]; /* liveness.c: the last answers of /proc */
  _Atomic int lock_errno; /* why the lock file could not be opened the last time; 0 = it could */
  look_entry_t looks[LOOKS];
  _Atomic uint64_t watched; /* the clock when this process last looked for its file: py_watch.h */
  _Atomic uint64_t
      wall_looked; /* segment ns of this process's last look at the wall clock: wall.c */
  uint64_t dev, ino;
  polled_t polled[WAITERS];
  uint32_t users; /* handles on this mapping in this process */
  char path[256];
  struct fshm_segment *next;
};

/* Limits of a handle's own, in place of the name's. Written before the handle is used. */
typedef struct {
  bool planned; /* false: numbers; true: of[] (plans.h) */
  uint32_t count;
  struct own_limit {
    rule_t rule;
    uint64_t tail; /* as snapshot_t.tail */
    uint64_t slack;
    uint32_t record;
  } of[FSHM_MAX_LIMITS]; /* most plans have one or two: together, so that a call takes few cache lines */
  uint64_t numbers[FSHM_MAX_LIMITS]; /* the n of each limit: fshm_limiter_number() */
} own_t;

/* A limiter's limits at one instant: copied out of the segment for one call. A readable one with no limits at all is
 * of a name whose handles have plans. */
typedef struct {
  uint64_t current; /* the word that named them */
  uint32_t count; /* limits with a state; rules[count]: that of permits, if any */
  uint32_t permits; /* held at most; 0 = no such limit */
  uint32_t money; /* limits of a budget: then these are all, and `count` is 0 */
  uint64_t salt; /* mixed into the key's hash; each reset changes it */
  /* The low bits of `who` in limit i's slots; of a plan's limit also what is mixed into the fingerprint. */
  uint64_t tail[FSHM_MAX_LIMITS];
  rule_t rules[FSHM_MAX_LIMITS];
} snapshot_t;

static inline bool snapshot_is_planned(const snapshot_t *p) {
  return !p->count && !p->permits && !p->money;
}

/* The owner of a slot: slot_t.who. For a limiter's limits:
 *
 *   fingerprint (42) | limiter (11) | place of the rule (3) | label (4) | epoch (3) | 1
 *
 * Label and epoch say which rule the state was written under; they may differ for the same key. The label is the
 * rule index. The epoch counts the sweeps that free rule indexes (limit_changes.c). The fingerprint and the slot's
 * line identify the key: in a table of some size the line is 10 bits or more of the hash. All other owners (windows
 * whose limit comes with the call, tokens and heads of moving windows, words of permit leases, permits) end in 0,
 * and have the lowest seven bits of the limiter's number where label and epoch are. */
#define WHO_BITS 22
#define WHO_LABELS UINT64_C(0xfe) /* label and epoch */
#define WHO_OF(limiter, place, label, epoch)                                     \
  ((uint64_t)(limiter) << 11 | (uint64_t)(place) << 8 | (uint64_t)(label) << 4 | \
   (uint64_t)(epoch) << 1 | 1)
#define WHO_LIMITER(who) ((uint32_t)((who) >> 11) & (MAX_LIMITERS - 1))
#define WHO_PLACE(who) ((unsigned)((who) >> 8) & 7)
#define WHO_LABEL(who) ((unsigned)((who) >> 4) & (RULES - 1))
#define WHO_EPOCH(who) ((unsigned)((who) >> 1) & 7)

static inline bool same_key(uint64_t a, uint64_t b) { return ((a ^ b) & ~WHO_LABELS) == 0; }
#define WHO_TAIL ((UINT64_C(1) << WHO_BITS) - 1)
/* The fingerprint is the top of a product, so that it does not depend on the lines that the hash names: two keys
 * with the same lower halves, and so the same second probe window, never have the same fingerprint. */
static inline uint64_t snapshot_who(const snapshot_t *p, uint32_t i, uint64_t hash) {
  return ((hash ^ p->salt) * UINT64_C(0x9e3779b97f4a7c15) & ~WHO_TAIL) ^ p->tail[i];
}
/* The `who` of a key whose limit comes with the call. */
#define WHO_TAG_OF(limiter) ((uint64_t)(limiter) << 1 & WHO_LABELS)
static inline uint64_t side_who(uint64_t hash, uint32_t limiter) {
  uint64_t rest = hash & ~(WHO_LABELS | 1);
  return (rest ? rest : WHO_LABELS + 2) | WHO_TAG_OF(limiter);
}
/* Each reset of the limiter changes it. */
static inline uint64_t side_salted(uint64_t hash, uint64_t salt) {
  return hash ^ (salt & ~(WHO_LABELS | 1));
}

struct fshm_limiter {
  fshm_segment *segment;
  uint32_t index; /* in the table of limiters */
  uint16_t counters; /* index of its counters; COUNTERS: its calls are not counted */
  uint16_t share; /* keys without a slot use shared counters: fshm_limiter_share() */
  uint64_t key[2]; /* SipHash key of this limiter */
  own_t *own; /* NULL: the limits are those of the name */
  _Atomic uint32_t released; /* 1 + the permit number released last; 0 = none */
  _Atomic uint32_t frontier; /* the permit number where this process looks for a free one next */
  _Atomic uint64_t beyond; /* segment ns of the last look beyond a lowered limit */
};

/* money.c */
void reservations_join(fshm_segment *s, uint32_t process, uint64_t incarnation);

/* hash.c */
uint64_t fshm_siphash(uint64_t k0, uint64_t k1, const void *data, uint64_t length);

void fshm_siphash128(uint64_t k0, uint64_t k1, const void *data, uint64_t length, uint64_t out[2]);

/* image.c */
int image_fail(fshm_error *e, int code);
int image_fail_errno(fshm_error *e);
void image_lock_path(const char *path, uint64_t instance, char *out, size_t size);
int image_create(const char *path, uint64_t capacity, uint32_t mode, uint32_t flags, uint32_t group,
                 fshm_error *e);
int image_link(int fd, const char *path);
void image_random(void *out, size_t size);
uint64_t header_check(const header_t *h);
int image_verify(int fd, header_t *header, uint32_t flags, uint32_t group, fshm_error *e);
int image_grow(const fshm_segment *s, uint32_t process);
uint64_t record_count(uint64_t capacity);
int image_grow_records(const fshm_segment *s, uint32_t record);
uint64_t image_row_bytes(void);

/* damage.c */
void damage_note(fshm_segment *s, unsigned kind, uint64_t index);
int damage_limits(fshm_segment *s, uint32_t index);

/* clock.c */
uint64_t fshm_clock(void);

static inline segment_clock_t *clock_of(const fshm_segment *s) {
  return (segment_clock_t *)(uintptr_t)s - 1;
}

/* moved_clock.c: the segment time where clock and epoch differ by so much that their difference is none */
COLD uint64_t clock_beyond(const segment_clock_t *clock, uint64_t differ);

/* The segment time now. Never 0; saturates (see algorithms.h). */
static inline HOT uint64_t segment_now(const fshm_segment *s) {
  const segment_clock_t *clock = clock_of(s);
  const uint64_t now = fshm_clock() - load_relaxed(&clock->epoch);
  return likely(now - 1 < TIME_MAX - 1) ? now : clock_beyond(clock, now);
}

/* segment.c: a lock among the threads of this process; no hot call takes one */
void threads_lock(_Atomic uint32_t *lock);
void threads_unlock(_Atomic uint32_t *lock);
size_t page_size(void);

/* Does the process index have a row that was ever taken? Other rows are not to be touched: their memory may not be
 * there. Relaxed: who learns of an index by what its owner wrote (acquire) sees the bit. */
static inline bool process_joined(const fshm_segment *s, uint32_t process) {
  return process < PROCESSES &&
         (load_relaxed(&s->header->joined[process / 64]) >> (process % 64) & 1);
}

/* The blocks of 64 process indexes of which any was ever taken: bits. */
static inline uint64_t joined_blocks(const fshm_segment *s) {
  return load_relaxed(&s->header->joined_blocks) & (UINT64_MAX >> (64 - PROCESSES / 64));
}

/* process.c */
uint32_t process_join(fshm_segment *s);
bool process_alive(fshm_segment *s, uint32_t process);
bool process_identity(fshm_segment *s, uint32_t *process, uint64_t *incarnation);
bool process_lock_open(const fshm_segment *s);
int process_refusal(const fshm_segment *s);
bool process_forked(const fshm_segment *s);
void process_leave(fshm_segment *s);
uint32_t process_token(void);

static inline uint32_t process_index(fshm_segment *s) {
  uint32_t joined = load_relaxed(&s->fork_page->joined);
  if (unlikely(!s->wiped && process_forked(s))) joined = 0;
  return likely(joined) ? joined - (joined != NO_PROCESS) : process_join(s);
}

/* process_index(), but NO_PROCESS where this process has not joined. */
static inline uint32_t process_index_known(const fshm_segment *s) {
  uint32_t joined = load_relaxed(&s->fork_page->joined);
  return joined && joined != NO_PROCESS ? joined - 1 : NO_PROCESS;
}

/* process_identity(), without a call where this process has joined and nothing but its death drops its locks. */
static inline HOT bool process_identity_inline(fshm_segment *s, uint32_t *process,
                                               uint64_t *incarnation) {
  const fork_page_t *page = s->fork_page;
  /* acquire: pairs with process_join() */
  const uint32_t index = atomic_load_explicit(&page->joined, memory_order_acquire) - 1;
  *incarnation = load_relaxed(&page->incarnation);
  *process = index;
  if (likely(index < PROCESSES && s->wiped && !load_relaxed(&page->kept))) return true;
  return process_identity(s, process, incarnation);
}

#endif
