/* internal.h - what the rooms of csrc/ share: the handles, and the calls from one room to another. */
#ifndef FSHM_INTERNAL_H
#define FSHM_INTERNAL_H

#include <stdbool.h>
#include <string.h>

#include "../leasing/permit_lease.h"
#include "atomic128.h"
#include "../fast_shm.h"
#include "layout.h"
#include "../limits/algorithms.h"

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

/* Called seldom: kept out of the hot path, and out of what the compiler thinks may be inlined there. */
#define COLD __attribute__((noinline, cold))

/* Part of the hot path: inlined whatever the compiler thinks of its size. (With `inline`.) */
#define HOT __attribute__((always_inline))

/* On the hot path, and built without the check of its stack frame that csrc/hardening asks of all others: that takes
 * 6 to 40 instructions of a call. Its arrays hold numbers, one for each of at most FSHM_MAX_LIMITS limits or a pair of
 * words; no text and no length of a caller's or of the segment's is written there. */
#if __has_attribute(no_stack_protector)
#define UNGUARDED __attribute__((no_stack_protector))
#else
#define UNGUARDED
#endif

#define load_relaxed(p) atomic_load_explicit((p), memory_order_relaxed)
#define store_relaxed(p, v) atomic_store_explicit((p), (v), memory_order_relaxed)
#define add_relaxed(p, v) atomic_fetch_add_explicit((p), (v), memory_order_relaxed)

/* Between a swap and a load that must come after it. x86's locked swap is a full barrier by itself. */
#if defined(__x86_64__)
#define after_swap() atomic_signal_fence(memory_order_seq_cst)
#else
#define after_swap() atomic_thread_fence(memory_order_seq_cst)
#endif

/* Nothing may loop for ever on a word that somebody else can write (I6). */
#define MAX_TRIES 20000
/* A lost claim counts as so many lost swaps: it has looked at all candidates as often (ROUNDS of hash_table.c). Honest
 * processes cannot make a call lose 300 claims: whoever wins one leaves a slot that the next look finds. */
#define CLAIM_TRIES 64
/* What a call may still lose before it gives up, where it walks many slots: over all of them. */
typedef struct {
  int64_t swaps, claims;
} patience_t;
static inline patience_t patience(uint64_t swaps) {
  return (patience_t){(int64_t)swaps, MAX_TRIES / CLAIM_TRIES};
}
static inline bool patient(const patience_t *p) { return p->swaps > 0 && p->claims > 0; }

#define NO_PROCESS UINT32_MAX
#define CLOCKS_DIFFER 30000 /* ns, by which two processes' clocks may differ at most (clock.c) */

/* Wiped to zero in a forked child (MADV_WIPEONFORK), which thereby sees that it has not joined. */
typedef struct {
  _Atomic uint32_t
      joined; /* 0 = not yet; process index + 1; or NO_PROCESS: counts straight into the key statistics */
  _Atomic uint32_t joining;
  _Atomic uint32_t token; /* where the kernel cannot wipe: compare with process_token() */
  _Atomic uint64_t incarnation; /* of the process index, while it is ours */
  _Atomic uintptr_t hold; /* where the description that has our locks is mapped; 0 = it is not */
  _Atomic uint32_t lost; /* our locks were dropped while we lived */
  _Atomic int kept; /* then it is this descriptor (+ 1) that has them */
} fork_page_t;

struct fshm_segment {
  unsigned char *map;
  header_t *header;
  slot_t *slots;
  key_stats_t *key_stats;
  limiter_entry_t *limiters;
  process_t *processes;
  process_stats_t *process_stats;
  _Atomic uint64_t *names;
  memo_t *memo;
  metric_t *metrics;
  histogram_t *histograms;
  deployment_t *deployments;
  requests_t *requests;
  counters_t *counters;
  uint64_t memo_lines;
  uint64_t lines, slot_count, names_words, size, epoch;
  uint64_t probe_mask; /* lines of a probe window, less one: a power of two, less one */
  uint64_t capacity, created_realtime_ns, instance, secret[2];
  unsigned char verified[offsetof(header_t, damage)]; /* the header as it was when we attached */
  _Atomic uint64_t damage; /* as header_t.damage, for mappings that cannot be written */
  uint32_t limiter_count, names_mode;
  fork_page_t *fork_page;
  bool read_only;
  bool wiped; /* the kernel wipes fork_page in a child; else the pid is compared */
  _Atomic int lock_fd; /* of the lock file, to ask by; -1 = not open */
  _Atomic uint64_t lock_dev, lock_ino;
  _Atomic uint32_t lock_opener; /* threads_lock() around the opening */
  _Atomic uint32_t keeper; /* threads_lock() around taking lost locks again */
  _Atomic uint32_t
      unmapped; /* here a mapping does not keep a description: its descriptor must be kept */
  _Atomic uint64_t looked[PROCESSES]; /* process.c: what /proc said last */
  _Atomic int lock_errno; /* why it could not be had when it was last wanted; 0 = it was */
  uint64_t dev, ino;
  uint32_t users; /* handles on this mapping in this process */
  char path[256];
  struct fshm_segment *next;
};

/* A limiter's limits as they stood at one instant: copied out of the segment for one call. */
typedef struct {
  uint64_t current; /* the word that named them */
  uint32_t count; /* of meters; rules[count] is the limit of permits, where there is one */
  uint32_t permits; /* in flight at most; 0 = no such limit */
  uint64_t salt; /* of the key's hash: another one after each reset */
  uint64_t tail[FSHM_MAX_LIMITS]; /* the low bits of limit i's slots */
  rule_t rules[FSHM_MAX_LIMITS];
} snapshot_t;

/* Whose slot it is: slot_t.who. Of a limiter's limits:
 *
 *   fingerprint (42) | limiter (11) | place of the rule (3) | label (4) | epoch (3) | 1
 *
 * Label and epoch say which rule the state was written under, and may differ for one and the same key: the label is the
 * number of the rule's process index, the epoch counts the sweeps that free process indexes (limits.c). The fingerprint and the slot's line
 * together tell keys apart: a line is 10 bits or more of the hash in any table of some size.
 * All others (windows whose limit comes with the call, tokens and heads of moving windows, leases' words, permits) end
 * in 0, and have the lowest seven bits of the limiter's number above that, where label and epoch are. */
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
/* The fingerprint is the top of a product, so that it is independent of the lines that the hash names: two keys whose
 * lower halves are the same, and with them the second probe window, never have the same one. */
static inline uint64_t snapshot_who(const snapshot_t *p, uint32_t i, uint64_t hash) {
  return ((hash ^ p->salt) * UINT64_C(0x9e3779b97f4a7c15) & ~WHO_TAIL) | p->tail[i];
}
/* The slot of a key of a limiter whose limit comes with the call. */
#define WHO_TAG_OF(limiter) ((uint64_t)(limiter) << 1 & WHO_LABELS)
static inline uint64_t side_who(uint64_t hash, uint32_t limiter) {
  uint64_t rest = hash & ~(WHO_LABELS | 1);
  return (rest ? rest : WHO_LABELS + 2) | WHO_TAG_OF(limiter);
}
/* After each reset of the limiter another one. */
static inline uint64_t side_salted(uint64_t hash, uint64_t salt) {
  return hash ^ (salt & ~(WHO_LABELS | 1));
}

struct fshm_limiter {
  fshm_segment *segment;
  uint32_t index; /* in the table of limiters */
  uint16_t counters; /* which counters its calls count in; COUNTERS: none */
  uint16_t share; /* keys without room share counters: fshm_limiter_share() */
  uint64_t key[2]; /* SipHash key of this limiter */
  const uint64_t *numbers; /* NULL, or `numbered`: the n of each limit, in place of the name's */
  uint64_t numbered[FSHM_MAX_LIMITS];
  _Atomic uint32_t
      released; /* process index + 1 that this process released last: likely free; 0 = none */
  _Atomic uint32_t frontier; /* where this process goes on looking for a free process index */
  _Atomic uint64_t
      beyond; /* segment ns: when this process last looked for permits beyond a lowered limit */
};

/* hash.c */
uint64_t fshm_siphash(uint64_t k0, uint64_t k1, const void *data, uint64_t length);

void fshm_siphash128(uint64_t k0, uint64_t k1, const void *data, uint64_t length, uint64_t out[2]);

/* image.c */
int image_fail(fshm_error *e, int code);
int image_fail_errno(fshm_error *e);
void image_lock_path(const char *path, uint64_t instance, char *out, size_t size);
int image_create(const char *path, uint64_t capacity, uint32_t mode, uint32_t flags, fshm_error *e);
int image_link(int fd, const char *path);
int image_verify(int fd, header_t *header, uint32_t flags, fshm_error *e);

/* damage.c */
uint64_t header_check(const header_t *h);
void damage_note(fshm_segment *s, unsigned kind, uint64_t index);
int damage_limits(fshm_segment *s, uint32_t index);

/* clock.c */
uint64_t fshm_clock(void);

/* Segment time of now. Never 0; saturates (header comment of algorithms.h). */
static inline uint64_t segment_now(const fshm_segment *s) {
  uint64_t clock = fshm_clock();
  return unlikely(clock <= s->epoch) ? 1 : min_u64(clock - s->epoch, TIME_MAX - 1);
}

/* segment.c: a lock among the threads of this process; no hot call takes one */
void threads_lock(_Atomic uint32_t *lock);
void threads_unlock(_Atomic uint32_t *lock);

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

/* hash_table.c */
typedef struct {
  uint64_t slot;
  pair_t pair; /* as seen; who = 0: there is no slot of this key */
} found_t;

enum { CLAIMED = 1, CLAIM_LOST = 0 /* somebody else has it now: look again */, CLAIM_FULL = -1 };

void table_find(const fshm_segment *s, uint64_t hash, uint64_t who, found_t *f);
/* Computes the state a new slot begins with, as of now; NO_STATE: it must not be claimed by what the caller knows. */
typedef uint64_t first_state_t(void *context);

int table_claim(fshm_segment *s, uint64_t hash, uint64_t who, uint64_t now, first_state_t *first,
                void *context, uint64_t *slot);
bool table_has(const fshm_segment *s, uint64_t hash, uint64_t who);
bool table_room(const fshm_segment *s, uint64_t hash, uint64_t who, uint64_t now);
void table_clear(fshm_segment *s, uint64_t slot, uint64_t who);
uint64_t table_probe_count(const fshm_segment *s);
uint64_t table_probe(const fshm_segment *s, uint64_t hash, uint64_t i);

/* A key can have many slots: one for each permit in flight, or for each hit in a moving window. The n-th has a hash and a
 * fingerprint of its own. Numbers 4k .. 4k+3 share a home line. hash, key_who: of the key. */
#define NTH_STEP UINT64_C(0xa24baed4963ee407)
static inline uint64_t spread(uint64_t x) { /* murmur3's finaliser */
  x = (x ^ x >> 33) * UINT64_C(0xff51afd7ed558ccd);
  x = (x ^ x >> 33) * UINT64_C(0xc4ceb9fe1a85ec53);
  return x ^ x >> 33;
}
static inline uint64_t nth_hash(uint64_t hash, uint32_t n) {
  return spread(hash + (n / SLOTS_PER_LINE + 1) * UINT64_C(0x9e3779b97f4a7c15));
}
static inline uint64_t nth_who(uint64_t key_who, uint32_t n) {
  uint64_t who = spread(key_who ^ NTH_STEP * (n + 1));
  return who + !who;
}

/* per_call.c: a key of a limiter, for calls that bring the limit along. */
typedef struct {
  fshm_segment *s;
  uint32_t index, counters; /* of the limiter */
  bool fixed; /* the caller gave the time */
  uint64_t hash, who, now;
} keyed_t;

int keyed_begin(keyed_t *k, const fshm_limiter *l, uint32_t kind, const void *key, uint64_t length,
                uint64_t now);
int keyed_at(keyed_t *k, fshm_segment *s, uint64_t slot, uint32_t kind, uint64_t now);
uint64_t keyed_now(const keyed_t *k);
int keyed_put(const keyed_t *k, uint64_t home, found_t *f, uint64_t who, uint64_t next,
              first_state_t *first, void *context);
void keyed_tell(const keyed_t *k, const found_t *f, const void *key, uint64_t length, int status);
void counted_peek(const keyed_t *k, const fshm_limit *limit, fshm_decision *out);

/* limits.c: the table of limiters and their limits */
#define VERSION_BITS 37
#define RESET_BITS 20
#define CURRENT_VERSION(c) ((c) & ((UINT64_C(1) << VERSION_BITS) - 1))
#define CURRENT_EPOCH(c) ((unsigned)((c) >> VERSION_BITS) & 7)
#define CURRENT_RESETS(c) ((c) >> (VERSION_BITS + 3) & ((UINT64_C(1) << RESET_BITS) - 1))
#define SET_COUNT(set) ((unsigned)(set) & 15)
#define SET_RULE(set, i) ((unsigned)((set) >> (4 + 4 * (i))) & (RULES - 1))

/* A counter's slot, by its limiter, the key's hash and the place of the rule: its index, as of other slots. */
static inline uint64_t shared_slot(const fshm_segment *s, uint32_t index, uint64_t hash,
                                   unsigned place) {
  return s->slot_count + ((uint64_t)index * SHARED + hash % SHARED) * SHARED_PLACES + place;
}
#define SHARED_WRITE (UINT64_C(1) << 16)
static inline bool shared_is_of(uint64_t who, uint64_t current) {
  return (who & 1) && !((who >> 8 ^ CURRENT_RESETS(current)) & 255);
}
/* The next `who`: of this reset, with this label and epoch. */
static inline uint64_t shared_who(uint64_t who, uint64_t current, uint64_t labels) {
  return ((who | (SHARED_WRITE - 1)) + 1) | (CURRENT_RESETS(current) & 255) << 8 |
         (labels & (WHO_LABELS | 1));
}

static inline uint64_t entry_current(const fshm_segment *s, uint32_t index) {
  return load_relaxed(&s->limiters[index].current);
}

bool limits_load(const fshm_segment *s, uint32_t index, snapshot_t *out);
bool limits_load_of(const fshm_limiter *l, snapshot_t *out);
void limits_number(const uint64_t *numbers, snapshot_t *p);
bool limits_wrong(const fshm_segment *s, uint32_t index, bool published);
bool limits_name_wrong(const fshm_segment *s, uint32_t index);
uint64_t limits_most(const fshm_segment *s, uint32_t index);
uint32_t limits_most_permits(uint64_t most, const snapshot_t *p);
void limits_lower_most(fshm_segment *s, uint32_t index, const snapshot_t *p, uint64_t most);
bool limits_raise_most(fshm_segment *s, uint32_t index, uint32_t permits);
bool limits_rule(const fshm_segment *s, uint32_t index, unsigned label, rule_t *out);
/* The fastest pace (bucket_pace()) that a bucket of this place can have drained at since the limits had this version.
 * UINT64_MAX: none was in force since. */
uint64_t limits_pace_since(const fshm_segment *s, uint32_t index, unsigned place, uint64_t version);

/* wakeup.c: wakes one who sleeps for this key (the upper half of its hash), or all who sleep */
static inline uint32_t wakeup_of(uint64_t hash) { return (uint32_t)(hash >> 32); }
void wakeup_send(fshm_segment *s, uint32_t wakeup);
void wakeup_send_all(fshm_segment *s);

/* semaphore.c: free the permits of dead processes among a key's candidate slots. True: look again. */
bool semaphore_free_dead(fshm_segment *s, uint64_t hash, uint64_t who, uint64_t now);

/* Where permits are granted to this host: the key's permit lease. */
typedef struct {
  uint64_t hash, who; /* of its word's slot */
  uint64_t dropped; /* alone: the word, as it was dropped before */
  uint32_t
      alone; /* at most so many of this host, without the grantor; 0: within the permit lease */
} granted_t;

static inline uint64_t granted_word(const fshm_segment *s, const granted_t *g) {
  found_t f;
  table_find(s, g->hash, g->who, &f);
  return f.pair.who ? f.pair.when : 0;
}

/* FSHM_ASK: not within what is granted. */
int semaphore_take_granted(fshm_limiter *l, const void *key, uint64_t length, const granted_t *g,
                           uint64_t now, fshm_permit *out, uint64_t *version, uint32_t *held);
/* The key's held permits, from this number on. Frees those of dead processes. */
uint32_t semaphore_count(fshm_limiter *l, const void *key, uint64_t length, uint64_t from);

/* token_lease.c: for how long these costs are refused; 0: they are not */
uint64_t token_lease_refused_ns(const fshm_limiter *l, uint64_t hash, const uint64_t *costs,
                                uint64_t now);

/* limiter.c */
uint64_t limiter_fetch(const fshm_limiter *l, const void *key, uint64_t length);
void limiter_acquire_fetched(fshm_limiter *l, uint64_t hash, const void *key, uint64_t length,
                             const uint64_t *costs, fshm_decision *out);
int limiter_take(fshm_limiter *l, const snapshot_t *snapshot, uint64_t hash, uint32_t op,
                 const void *key, uint64_t key_length, const uint64_t *costs, uint64_t now,
                 fshm_decision *out, fshm_charged *charges);

/* fshm_is_allowed(), for who wants to know too where a shared counter has decided. */
enum { SHARED_DENIED = -100, SHARED_ALLOWED = -101 };
int limiter_is_allowed(fshm_limiter *l, const void *key, uint64_t key_length);

/* What somebody else has decided about a key: the next state of each of its limits (token_lease.c). */
typedef uint64_t change_t(const void *context, uint32_t i, const rule_t *r, uint64_t state,
                          uint64_t now);
int limiter_change(fshm_limiter *l, const void *key, uint64_t length, uint64_t now,
                   change_t *change, const void *context, uint64_t *before, uint64_t *at);

/* deployments.c: empty the per-process statistics of a process index that is ours from now on. */
void requests_join(fshm_segment *s, uint32_t process, uint64_t incarnation);

/* counters.c: all calls that were counted through a process index. */
void counters_of_process(const fshm_segment *s, uint32_t process, fshm_counters *out);

#define KEY_STORED 200 /* bytes of a key's name that are kept */
/* key_stats.c */
uint32_t key_stats_meta(uint32_t limiter, uint64_t who);
void key_stats_miss(fshm_segment *s, uint32_t process, uint64_t slot, uint32_t meta,
                    const void *key, uint64_t length, bool admitted);
void key_stats_flush_process(fshm_segment *s, uint32_t process);
void key_stats_remember(fshm_segment *s, uint64_t slot, uint32_t meta, const void *key,
                        uint64_t length);

/* Count one call of a limiter: the sums that are shown (counters.c). counters: of fshm_limiter. */
static inline void counters_add(fshm_segment *s, uint32_t process, uint32_t counters, int status) {
  if (unlikely(counters >= COUNTERS)) return; /* a limiter beside another one */
  limiter_counters_t *t = &s->counters[process < PROCESSES ? process : PROCESSES].of[counters];
  (void)add_relaxed(status == FSHM_ALLOWED ? &t->admitted : &t->denied, 1);
  if (unlikely(status < 0)) (void)add_relaxed(&t->refused, 1);
}

/* Count one call for the key in `slot`: in this process's own per-process statistics; out of it only when another
 * key needs the entry, or every 4,096th time, to keep the name in the ring. */
static inline void key_stats_count(fshm_segment *s, uint32_t process, uint64_t slot, uint32_t meta,
                                   const void *key, uint64_t length, bool admitted) {
  if (likely(process < PROCESSES)) {
    process_stat_t *e = &s->process_stats[process].entries[slot & (PROCESS_STATS - 1)];
    if (likely(load_relaxed(&e->key) == ((slot + 1) << 32 | meta))) {
      uint32_t before = add_relaxed(admitted ? &e->admitted : &e->denied, 1);
      if (likely((before & 4095) != 4095)) return;
    }
  }
  key_stats_miss(s, process, slot, meta, key, length, admitted);
}

#endif
