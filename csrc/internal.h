/* internal.h - what the rooms of csrc/ share: the handles, and the calls from one room to another. */
#ifndef FSHM_INTERNAL_H
#define FSHM_INTERNAL_H

#include <stdbool.h>
#include <string.h>

#include "atomic128.h"
#include "fast_shm.h"
#include "layout.h"
#include "meter.h"

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

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

#define NO_SLOT UINT32_MAX

/* Wiped to zero in a forked child (MADV_WIPEONFORK), which thereby sees that it has not joined. */
typedef struct {
  _Atomic uint32_t joined; /* 0 = not yet; slot + 1; or NO_SLOT: counts straight into the ledger */
  _Atomic uint32_t joining;
  uint32_t pid; /* where the kernel cannot wipe: compare with getpid() */
  uint64_t generation; /* of the slot, while it is ours */
} fork_page_t;

struct fshm_segment {
  unsigned char *map;
  header_t *header;
  cell_t *cells;
  ledger_t *ledger;
  limiter_entry_t *limiters;
  process_t *processes;
  column_t *columns;
  _Atomic uint64_t *names;
  uint64_t lines, cell_count, names_words, size, epoch;
  uint32_t limiter_count, names_mode;
  fork_page_t *fork_page;
  bool read_only;
  bool wiped; /* the kernel wipes fork_page in a child; else the pid is compared */
  int fd, lock_fd;
  uint64_t lock_ino;
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
  unsigned version; /* its lowest 5 bits */
  uint64_t twist[FSHM_MAX_LIMITS]; /* fingerprint of limit i = hash of the key ^ twist[i] */
  rule_t rules[FSHM_MAX_LIMITS];
} plan_t;

struct fshm_limiter {
  fshm_segment *segment;
  uint32_t index; /* in the table of limiters */
  uint64_t key[2]; /* SipHash key of this limiter */
  _Atomic uint32_t released; /* slot + 1 that this process released last: likely free; 0 = none */
  _Atomic uint32_t frontier; /* where this process goes on looking for a free slot */
};

/* hash.c */
uint64_t fshm_siphash(uint64_t k0, uint64_t k1, const void *data, uint64_t length);

/* image.c */
int image_fail(fshm_error *e, int code);
int image_fail_errno(fshm_error *e);
int image_create(const char *path, uint64_t capacity, uint32_t mode, uint32_t flags, fshm_error *e);
int image_verify(int fd, header_t *header, uint32_t flags, fshm_error *e);

/* clock.c */
uint64_t fshm_clock(void);

/* Segment time of now. Never 0; saturates (header comment of meter.h). */
static inline uint64_t segment_now(const fshm_segment *s) {
  uint64_t clock = fshm_clock();
  return unlikely(clock <= s->epoch) ? 1 : min_u64(clock - s->epoch, TIME_MAX - 1);
}

/* process.c */
uint32_t process_join(fshm_segment *s);
bool process_alive(fshm_segment *s, uint32_t slot);
bool process_identity(fshm_segment *s, uint32_t *slot, uint64_t *generation);
bool process_forked(const fshm_segment *s);

static inline uint32_t process_slot(fshm_segment *s) {
  uint32_t joined = load_relaxed(&s->fork_page->joined);
  if (unlikely(!s->wiped && process_forked(s))) joined = 0;
  return likely(joined) ? joined - (joined != NO_SLOT) : process_join(s);
}

/* cells.c */
typedef struct {
  uint64_t cell;
  pair_t pair; /* as seen; who = 0: there is no cell of this key */
} found_t;

enum { CLAIMED = 1, CLAIM_LOST = 0 /* somebody else has it now: look again */, CLAIM_FULL = -1 };

void cells_find(const fshm_segment *s, uint64_t hash, uint64_t who, found_t *out);
/* Computes the state a new cell begins with, as of now. */
typedef uint64_t first_state_t(void *context);

int cells_claim(fshm_segment *s, uint64_t hash, uint64_t who, uint64_t now, first_state_t *first,
                void *context, uint64_t *cell);
void cells_clear(fshm_segment *s, uint64_t cell, uint64_t who);
uint64_t cells_candidates(const fshm_segment *s);
uint64_t cells_candidate(const fshm_segment *s, uint64_t hash, uint64_t i);

/* limits.c: the table of limiters and their limits */
#define CURRENT_VERSION(c) ((c) & ((UINT64_C(1) << 28) - 1))
#define CURRENT_RESETS(c) (((c) >> 28) & ((UINT64_C(1) << 20) - 1))
#define CURRENT_SLOT(c, back) ((unsigned)((c) >> (48 + 4 * (back))) & 15)

bool limits_load(const fshm_segment *s, uint32_t index, plan_t *out);
uint32_t limits_most_permits(const fshm_segment *s, uint32_t index, const plan_t *p);
void limits_lower_most(fshm_segment *s, uint32_t index, const plan_t *p, uint32_t most);
bool limits_old_rule(const limiter_entry_t *e, uint64_t current, unsigned version, uint32_t nth,
                     rule_t *out);

/* lease.c: free the permits of dead processes among a key's candidate cells. True if there were any. */
bool lease_free_dead(fshm_segment *s, uint64_t hash);

/* limiter.c */
int limiter_take(fshm_limiter *l, uint32_t op, const void *key, uint64_t key_length,
                 const uint64_t *costs, uint64_t now, fshm_decision *out, uint64_t *put);

/* ledger.c */
uint32_t ledger_meta(uint32_t limiter, uint64_t who);
void ledger_miss(fshm_segment *s, uint32_t slot, uint64_t cell, uint32_t meta, const void *key,
                 uint64_t length, bool admitted);
void ledger_flush_column(fshm_segment *s, uint32_t slot);
void ledger_remember(fshm_segment *s, uint64_t cell, uint32_t meta, const void *key,
                     uint64_t length);

/* Count one call for the key in `cell`: in this process's own column; out of it only when another
 * key needs the entry, or every 4,096th time, to keep the name in the ring. */
static inline void ledger_count(fshm_segment *s, uint32_t slot, uint64_t cell, uint32_t meta,
                                const void *key, uint64_t length, bool admitted) {
  if (likely(slot < PROCESSES)) {
    column_entry_t *e = &s->columns[slot].entries[cell & (COLUMN_ENTRIES - 1)];
    if (likely(load_relaxed(&e->key) == ((cell + 1) << 32 | meta))) {
      uint32_t before = add_relaxed(admitted ? &e->admitted : &e->denied, 1);
      if (likely((before & 4095) != 4095)) return;
    }
  }
  ledger_miss(s, slot, cell, meta, key, length, admitted);
}

#endif
