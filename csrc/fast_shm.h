/* fast_shm.h - rate limits that all processes of a host share, with no server.
 *
 * A segment is one POSIX shared-memory object; limiters are names inside it; every process that
 * opens the same segment and the same limiter name admits from the same limits. All calls are
 * lock-free and safe from any thread and any process. Design and proofs: DESIGN.md.
 *
 * Caveats
 * - Symptom: EBADF-like oddities after daemonising. Cause: the program closed all descriptors, the
 *   library's among them, and with them the kernel lock that says "this process is alive".
 *   Cure: open the segment after daemonising. (A fork needs no care: a child joins by itself.)
 * - Symptom: limits count apart after `fast-shm rm`. Cause: processes that were attached keep the
 *   removed segment; new ones make a new one. Cure: restart them; fshm_unlinked() tells.
 * - Symptom: FSHM_FULL although old keys could go. Cause: none could: a live key is never
 *   forgotten (I7). Cure: a larger capacity, or shorter periods.
 *
 * The text between the two marks is also the cffi cdef: keep it plain declarations.
 */
#ifndef FAST_SHM_H
#define FAST_SHM_H

#include <stddef.h>
#include <stdint.h>

/* [cdef begin] */

#define FSHM_LAYOUT_VERSION 1
#define FSHM_MAX_LIMITS 4        /* limits of one limiter */
#define FSHM_MAX_NAME 64         /* bytes of a segment name: A-Z a-z 0-9 . _ - */
#define FSHM_MAX_LIMITER_NAME 96 /* bytes of a limiter name */
#define FSHM_NEVER -1            /* a time that never comes */

/* What a call answers. Negative: an error, nothing was changed. */
enum fshm_status {
  FSHM_DENIED = 0,
  FSHM_ALLOWED = 1,
  FSHM_OK = 1,
  FSHM_FULL = -1,         /* no free cell among the key's candidates */
  FSHM_CONTENDED = -2,    /* gave up after 20,000 lost swaps: somebody scribbles on the segment */
  FSHM_E_ARGUMENT = -10,  /* an argument is out of range */
  FSHM_E_NOT_FOUND = -11, /* no such segment */
  FSHM_E_SPACE = -12,     /* the shared-memory file system is full */
  FSHM_E_PERMISSION = -13,
  FSHM_E_LINK = -14,      /* the name is a symbolic link */
  FSHM_E_KIND = -15,      /* not a regular file */
  FSHM_E_OWNER = -16,     /* belongs to another user */
  FSHM_E_DAMAGED = -17,   /* not a segment of ours, or its header does not add up */
  FSHM_E_LAYOUT = -18,    /* another layout version or byte order */
  FSHM_E_CAPACITY = -19,  /* exists with another capacity */
  FSHM_E_BOOT = -20,      /* made before the last boot, or in another time namespace */
  FSHM_E_LIMITERS = -21,  /* the table of limiters is full */
  FSHM_E_SYSTEM = -22,    /* another system error: see sys_errno */
  FSHM_E_READ_ONLY = -23, /* the segment was opened for reading */
  FSHM_E_MEMORY = -24,
  FSHM_E_PROCESSES = -25 /* the process table is full: no permit can be owned */
};

enum fshm_kind {
  FSHM_BUCKET = 0,
  FSHM_WINDOW = 1,
  FSHM_SLIDING = 2,
  FSHM_PERMITS = 3 /* at most n in flight; per_ns 0; the last limit of its limiter */
};

enum fshm_op {
  FSHM_ACQUIRE = 0, /* charge if every limit has room */
  FSHM_PEEK = 1,    /* would it be admitted? charges nothing */
  FSHM_PROBE = 2,   /* the same, but a denial is counted as one */
  FSHM_RESERVE = 3, /* charge ahead, at most max_wait_ns (token buckets) */
  FSHM_CHARGE = 4,  /* charge, room or not: may go into debt */
  FSHM_REFUND = 5   /* give back */
};

enum fshm_open_flag {
  FSHM_OPEN_CREATE = 1,      /* make it where there is none */
  FSHM_OPEN_READ_ONLY = 2,   /* map for reading, join no process table */
  FSHM_OPEN_OTHER_OWNER = 4, /* accept a segment of another user */
  FSHM_NAMES_HASHED = 8,     /* at creation: keep no key names, show keyed hashes */
  FSHM_NAMES_OFF = 16        /* at creation: no ledger of keys at all */
};

typedef struct fshm_segment fshm_segment;
typedef struct fshm_limiter fshm_limiter;

/* One limit. kind: enum fshm_kind. n: tokens, per_ns: nanoseconds; burst (bucket): 1..n;
   strict (bucket): at most n in any interval of per_ns. Ranges: fshm_limit_check(). */
typedef struct {
  uint64_t n;
  uint64_t per_ns;
  uint64_t burst;
  uint32_t kind;
  uint32_t strict;
} fshm_limit;

typedef struct {
  int32_t status;         /* enum fshm_status */
  uint32_t limit_index;   /* the limit that denied, else the one with least left */
  uint64_t version;       /* of the limiter's limits: differs after a change at run time */
  uint64_t remaining;     /* tokens that would be admitted now */
  int64_t retry_after_ns; /* 0 when allowed; FSHM_NEVER: this cost never fits */
  int64_t reset_after_ns; /* until nothing is consumed any more */
} fshm_decision;

typedef struct {
  int32_t code; /* enum fshm_status */
  int32_t sys_errno;
  uint64_t found;  /* what the segment has (capacity, version, uid) */
  uint64_t wanted; /* what was asked for */
  char path[256];
} fshm_error;

/* Where things lie, for readers of the raw mapping (see layout.h for the structs). */
typedef struct {
  const void *base;
  uint64_t size, capacity, cells, created_realtime_ns, time_ns, instance;
  uint64_t cells_offset, ledger_offset, limiters_offset, processes_offset, columns_offset;
  uint32_t limiters, processes, column_entries, layout_version, names, read_only;
  uint64_t retired_admitted, retired_denied;
} fshm_geometry;

typedef struct {
  char name[128];
  uint32_t name_length, limits_count;
  uint64_t version, resets, id;
  fshm_limit limits[4];
} fshm_limiter_info;

typedef struct {
  uint32_t pid, alive;
  uint64_t attached_ns, admitted, denied, refused_full;
} fshm_process_info;

/* Segment ----------------------------------------------------------------------------------- */
int fshm_open(const char *name, uint64_t capacity, uint32_t mode, uint32_t flags,
              fshm_segment **out, fshm_error *error);
void fshm_close(fshm_segment *segment);
int fshm_remove(const char *name, fshm_error *error);
int fshm_path(const char *name, char *out, uint64_t size);
const char *fshm_directory(void);
uint64_t fshm_size_for(uint64_t capacity);
int fshm_unlinked(fshm_segment *segment);
void fshm_describe(fshm_segment *segment, fshm_geometry *out);
uint64_t fshm_now(fshm_segment *segment);

/* Limiter ----------------------------------------------------------------------------------- */
int fshm_limit_check(const fshm_limit *limit, uint64_t *largest_n);
int fshm_limiter_open(fshm_segment *segment, const char *name, uint64_t name_length,
                      const fshm_limit *limits, uint32_t count, fshm_limiter **out);
/* A limiter that exists, with the limits it has. FSHM_E_NOT_FOUND where it does not. */
int fshm_limiter_find(fshm_segment *segment, const char *name, uint64_t name_length,
                      fshm_limiter **out);
void fshm_limiter_close(fshm_limiter *limiter);
int fshm_limiter_limits(fshm_limiter *limiter, fshm_limit *out, uint64_t *version);
/* costs: one for each limit, or NULL for 1 each. now_ns: segment time, 0 = ask the clock. */
void fshm_apply(fshm_limiter *limiter, uint32_t op, const void *key, uint64_t key_length,
                const uint64_t *costs, uint64_t max_wait_ns, uint64_t now_ns, fshm_decision *out);
/* FSHM_ACQUIRE of cost 1, for callers that want no more than the status. */
int fshm_is_allowed(fshm_limiter *limiter, const void *key, uint64_t key_length);
/* FSHM_RESERVE that can be cancelled: reserved[i] tells the reservation of limit i apart. */
void fshm_reserve(fshm_limiter *limiter, const void *key, uint64_t key_length,
                  const uint64_t *costs, uint64_t max_wait_ns, uint64_t now_ns, fshm_decision *out,
                  uint64_t *reserved);
/* Give a reservation back, in those limits where nobody has reserved after it; elsewhere its instant
 * passes unused. Returns in how many. */
int fshm_cancel(fshm_limiter *limiter, const void *key, uint64_t key_length, const uint64_t *costs,
                const uint64_t *reserved, uint64_t now_ns);
/* What each limit still admits of this key now: remaining[i], one for each limit. Returns how many. */
int fshm_remaining(fshm_limiter *limiter, const void *key, uint64_t key_length, uint64_t now_ns,
                   uint64_t *remaining);
int fshm_reset_key(fshm_limiter *limiter, const void *key, uint64_t key_length);
int fshm_reset_all(fshm_limiter *limiter);

/* Permits: at most n in flight -------------------------------------------------------------- */
/* A permit held by this process. Copy it freely; release it once. */
typedef struct {
  uint64_t cell, who, when;
  uint32_t bell, held;
  uint64_t put[4]; /* for each other limit, the state that the charge put there */
} fshm_permit;

typedef struct {
  uint32_t limiter, pid, alive, idle, slot;
  uint64_t age_seconds;
  uint64_t key_hash; /* the same for all permits of a key */
} fshm_permit_info;

/* Take a permit and charge every other limit of the limiter, or do nothing. *in_flight: permits of
 * the key that were seen held, when there was none to take. */
void fshm_admit(fshm_limiter *limiter, const void *key, uint64_t key_length, const uint64_t *costs,
                uint64_t now_ns, fshm_permit *permit, fshm_decision *out, uint32_t *in_flight);
/* Book actual instead of charged costs (one for each limit but the permits): more may go into debt, less
 * is given back, as far as the charge still counts. */
int fshm_settle(fshm_limiter *limiter, const void *key, uint64_t key_length,
                const uint64_t *charged, const uint64_t *actual, const fshm_permit *permit,
                uint64_t now_ns);
/* 1: released. 0: was released already, or belongs to another process (the parent, after a fork). */
int fshm_permit_release(fshm_limiter *limiter, fshm_permit *permit);
/* Mark a held permit as idle (a pooled connection nobody uses) or in use again. Likewise 1 or 0. */
int fshm_permit_idle(fshm_limiter *limiter, fshm_permit *permit, int idle);
/* 0: released, or taken back by force (fshm_reap of a living process). */
int fshm_permit_held(const fshm_limiter *limiter, const fshm_permit *permit);
/* Permits of the key that living processes hold; gives back those of dead ones. */
uint32_t fshm_in_flight(fshm_limiter *limiter, const void *key, uint64_t key_length);
/* Waiting: arm, try to take, and sleep if that failed. A ring since arm() ends the sleep at once. */
uint32_t fshm_bell_arm(fshm_limiter *limiter, const void *key, uint64_t key_length);
int fshm_bell_wait(fshm_limiter *limiter, const void *key, uint64_t key_length, uint32_t armed,
                   uint64_t timeout_ns);
void fshm_bell_ring(fshm_limiter *limiter, const void *key, uint64_t key_length);
/* The permit in a cell: 1, or 0 where there is none. */
int fshm_permit_at(fshm_segment *segment, uint64_t cell, fshm_permit_info *out);
/* Give back the permits of dead processes (pid 0), or all of one process. Returns how many. */
uint64_t fshm_reap(fshm_segment *segment, uint32_t pid);
uint64_t fshm_unique(fshm_segment *segment); /* a number that no other call gets */

/* Looking in -------------------------------------------------------------------------------- */
int fshm_limiter_at(fshm_segment *segment, uint32_t index, fshm_limiter_info *out);
int fshm_process_at(fshm_segment *segment, uint32_t index, fshm_process_info *out);
uint64_t fshm_live_cells(fshm_segment *segment, uint8_t *live, uint64_t now_ns);
int fshm_key_name(fshm_segment *segment, uint64_t cell, char *out, uint64_t size, uint64_t *length);
int fshm_peek_cell(fshm_segment *segment, uint64_t cell, uint64_t now_ns, fshm_decision *out);
int fshm_py_install(void *module);

/* [cdef end] */

#endif
