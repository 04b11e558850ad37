/* fast_shm.h - rate limits that all processes of a host share, without a server.
 *
 * A segment is one POSIX shared-memory object. It holds limiters, each under a name. All processes that open the
 * same segment and the same limiter name share its limits. All calls are lock-free and safe from any thread and any
 * process. Design and proofs: DESIGN.md.
 *
 * Caveats
 * - Symptom: FSHM_E_LOCK_FILE with EBADF. Cause: this process lost the kernel lock that says that it is alive. This
 *   does not happen on Linux. Elsewhere, the program has closed all its descriptors, also the library's. Cure: open the
 *   segment after daemonising. (After a fork there is nothing to do: the child joins by itself.)
 * - Symptom: FSHM_E_LOCK_FILE after it worked. Cause: the lock file beside the segment was deleted. Cure: stop the
 *   workers, run `fast-shm rm`, start them. Rate limits work until then.
 * - Symptom: processes count apart after `fast-shm rm`. Cause: attached processes keep the removed segment, and new
 *   ones make a new one. Cure: restart them. fshm_unlinked() says whether a process has a removed segment.
 * - Symptom: FSHM_FULL although there are old keys. Cause: those are all live, and a live key is never forgotten
 *   (I7). Cure: a larger capacity, shorter periods, or fshm_limiter_share().
 *
 * The text between the two marks is also the cffi cdef: keep it plain declarations.
 */
#ifndef FAST_SHM_H
#define FAST_SHM_H

#include <stddef.h>
#include <stdint.h>

/* [cdef begin] */

#define FSHM_LAYOUT_VERSION 6
/* The lock is held; whether it dumps core cannot be seen (another pid namespace). */
#define FSHM_ALIVE_BY_LOCK 2
#define FSHM_MAX_LIMITS 4        /* limits of one limiter */
#define FSHM_MAX_NAME 64         /* bytes of a segment name: A-Z a-z 0-9 . _ - */
#define FSHM_MAX_LIMITER_NAME 96 /* bytes of a limiter name */
#define FSHM_NO_GROUP 0xffffffff
#define FSHM_NEVER -1 /* a time that never comes. NOLINT: cffi takes no parentheses */

/* The status of a call. Negative: an error, and nothing was changed. */
enum fshm_status {
  FSHM_DENIED = 0,
  FSHM_ALLOWED = 1,
  FSHM_OK = 1,
  FSHM_FULL = -1,         /* no free slot in the key's probe windows, or none for this limiter */
  FSHM_CONTENDED = -2, /* gave up after 20,000 lost swaps: a process scribbles on the segment */
  FSHM_E_ARGUMENT = -10, /* an argument is out of range */
  FSHM_E_NOT_FOUND = -11, /* no such segment */
  FSHM_E_SPACE = -12, /* the shared-memory file system is full */
  FSHM_E_PERMISSION = -13,
  FSHM_E_LINK = -14, /* the name is a symbolic link */
  FSHM_E_KIND = -15, /* not a regular file */
  FSHM_E_OWNER = -16, /* belongs to another user */
  FSHM_E_DAMAGED = -17, /* not a segment, or written over: see fshm_damage() */
  FSHM_E_LAYOUT = -18, /* another layout version or byte order */
  FSHM_E_CAPACITY = -19, /* exists with another capacity */
  FSHM_E_BOOT = -20, /* made before the last boot, or in another time namespace */
  FSHM_E_LIMITERS = -21, /* the table of limiters is full */
  FSHM_E_SYSTEM = -22, /* another system error: see sys_errno */
  FSHM_E_READ_ONLY = -23, /* the segment was opened for reading */
  FSHM_E_MEMORY = -24,
  FSHM_E_PROCESSES = -25, /* the process table is full: no permit can be owned */
  FSHM_E_LOCK_FILE = -26, /* the lock file (who is alive) is gone, replaced, or cannot be opened */
  FSHM_E_RECORDS = -27, /* the segment has no room for another limit of plans */
  FSHM_E_GROUP = -28 /* the caller may not give a file to the group: it is no member */
};

enum fshm_kind {
  FSHM_BUCKET = 0,
  FSHM_WINDOW = 1,
  FSHM_SLIDING = 2,
  FSHM_PERMITS = 3, /* at most n held at a time; per_ns 0; the last limit of its limiter */
  FSHM_CALENDAR =
      4, /* a window of the calendar; per_ns: an hour, a day, a week, 30 days (a month) or 365 (a year); strict:
                      * the index of its time zone */
  FSHM_LEASE = 5, /* granted to this host by a server, n at most; per_ns 0: see "Token leases" */
  FSHM_MONEY =
      6, /* of a budget: n nano-dollars in each window; as FSHM_CALENDAR, or per_ns 2^55: for ever */
  FSHM_PLANNED = 7 /* a name whose handles have plans: fshm_plan_open(); n 1, all else 0 */
};

enum fshm_op {
  FSHM_ACQUIRE = 0, /* charge if every limit has room */
  FSHM_PEEK = 1, /* would it be admitted? charges and counts nothing */
  FSHM_PROBE = 2, /* as FSHM_PEEK, but counts a denial */
  FSHM_RESERVE = 3, /* charge ahead, at most max_wait_ns (token buckets) */
  FSHM_CHARGE = 4, /* charge without a check: may go into debt */
  FSHM_REFUND = 5, /* give tokens back */
  /* Deny for costs[i] ns (an earlier block that ends later stays); then one token fits. Changes token buckets only.
   * FSHM_E_ARGUMENT: no limit is a token bucket. */
  FSHM_BLOCK = 6
};
#define FSHM_ASK 2 /* of fshm_spend(): not decided here; ask the server that grants */

enum fshm_open_flag {
  FSHM_OPEN_CREATE = 1, /* create it if it does not exist */
  FSHM_OPEN_READ_ONLY = 2, /* map for reading, join no process table */
  FSHM_OPEN_OTHER_OWNER = 4, /* accept a segment of another user */
  FSHM_NAMES_HASHED = 8, /* at creation: keep no key names, show keyed hashes */
  FSHM_NAMES_OFF = 16 /* at creation: no key statistics at all */
};

/* What fshm_damage() found; its index says where. */
enum fshm_damage_kind {
  FSHM_DAMAGE_NONE = 0,
  FSHM_DAMAGE_SIZE = 1, /* the file was cut or grew; index: its bytes */
  FSHM_DAMAGE_HEADER = 2, /* a constant word has changed; index: its offset */
  FSHM_DAMAGE_LIMITS = 3, /* a limiter has limits that no call sets */
  FSHM_DAMAGE_NAME = 4, /* a limiter's name and its hash differ */
  FSHM_DAMAGE_SLOT = 5 /* a slot holds a value that no call writes */
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
  int32_t status; /* enum fshm_status */
  uint16_t limit_index; /* the limit that denied, else the one with the fewest tokens left */
  uint16_t shared; /* 1: a shared counter decided: see fshm_limiter_share() */
  uint64_t version; /* of the limiter's limits: another one after each change */
  uint64_t remaining; /* tokens that would be admitted now */
  int64_t retry_after_ns; /* 0 when allowed; FSHM_NEVER: this cost never fits */
  int64_t reset_after_ns; /* until all tokens are back */
} fshm_decision;

/* A charge of one limit, to give it back later: the state that it wrote, the numbers of its rule, the time, and the
 * version of the limits (0: not known). */
typedef struct {
  uint64_t state, num, den, at, version;
} fshm_charged;

typedef struct {
  int32_t code; /* enum fshm_status */
  int32_t sys_errno;
  uint64_t found; /* capacity, version, uid, time namespace, or bytes free, as they are */
  uint64_t wanted; /* the value that the caller asked for or needs */
  char path[256];
} fshm_error;

/* Offsets for readers of the raw mapping (the structs: layout.h). */
typedef struct {
  const void *base;
  uint64_t size, capacity, slots;
  uint64_t created_realtime_ns, time_ns, instance;
  uint64_t slots_offset, key_stats_offset, limiters_offset, processes_offset, process_stats_offset;
  uint32_t limiters, processes, process_stats_entries;
  uint32_t layout_version, names, read_only;
  uint32_t
      processes_joined; /* from this index on, none was ever taken, and nothing is to be read */
  uint64_t memory; /* bytes of `size` that are allocated */
} fshm_geometry;

typedef struct {
  char name[128];
  uint32_t name_length, limits_count;
  uint64_t version, resets, id;
  fshm_limit limits[4];
  uint32_t counters; /* index into fshm_counters_all(); FSHM_COUNTERS: its calls are not counted */
  uint64_t shared_ns; /* for how long shared counters may still be in use */
  uint32_t planned; /* 1: its handles have plans, and limits_count is 0 */
  uint32_t overrides; /* changes of its overrides */
} fshm_limiter_info;

typedef struct {
  uint32_t pid, alive; /* 0, 1, or FSHM_ALIVE_BY_LOCK: alive until the kernel drops its lock */
  uint64_t attached_ns, admitted, denied, refused_full;
  uint32_t outage; /* the value of its last fshm_process_note() */
} fshm_process_info;

/* Segment ----------------------------------------------------------------------------------- */
int fshm_open(const char *name, uint64_t capacity, uint32_t mode, uint32_t flags,
              fshm_segment **out, fshm_error *error);
/* The same for the users of a group: a new segment gets this group id (mode: with its bits), and one of another user is
 * accepted if it has it. FSHM_NO_GROUP: as fshm_open(). */
int fshm_open_group(const char *name, uint64_t capacity, uint32_t mode, uint32_t flags,
                    uint32_t group, fshm_segment **out, fshm_error *error);
void fshm_close(fshm_segment *segment);
int fshm_remove(const char *name, fshm_error *error);
int fshm_path(const char *name, char *out, uint64_t size);
const char *fshm_directory(void);
uint64_t fshm_size_for(uint64_t capacity); /* of the file */
uint64_t fshm_memory_for(uint64_t capacity); /* of the file's bytes, so many are allocated */
int fshm_unlinked(fshm_segment *segment);
/* Do liveness checks and joins work? FSHM_OK. FSHM_E_NOT_FOUND: the segment was removed. FSHM_E_LOCK_FILE: error has the
 * path of the lock file, and in sys_errno ENOENT (it was deleted), ESTALE (another file lies there), EBADF (this process
 * lost its lock, and others may have taken its permits), or why it cannot be opened or locked. */
int fshm_liveness(fshm_segment *segment, fshm_error *error);
void fshm_describe(fshm_segment *segment, fshm_geometry *out);
uint64_t fshm_now(fshm_segment *segment);
/* A 128-bit hash of `data` under a secret of the segment: a process that cannot read the segment cannot compute it. */
void fshm_keyed_hash(fshm_segment *segment, const void *data, uint64_t length, uint64_t out[2]);
/* The first damage that any process found in this segment: enum fshm_damage_kind. It stays until the segment is
 * removed. fshm_damage() looks at the file's size and the header, fshm_check() at all limiters and slots too. Both
 * report only what is certain: some damage cannot be detected. */
int fshm_damage(fshm_segment *segment, uint64_t *index);
int fshm_check(fshm_segment *segment, uint64_t *index);

/* Limiter ----------------------------------------------------------------------------------- */
int fshm_limit_check(const fshm_limit *limit, uint64_t *largest_n);
int fshm_limiter_open(fshm_segment *segment, const char *name, uint64_t name_length,
                      const fshm_limit *limits, uint32_t count, fshm_limiter **out);
/* fshm_limiter_open() at a given segment time: for states that must be converted from earlier limits. */
int fshm_limiter_open_at(fshm_segment *segment, const char *name, uint64_t name_length,
                         const fshm_limit *limits, uint32_t count, uint64_t now_ns,
                         fshm_limiter **out);
/* fshm_limiter_open() for an auxiliary limiter of another one: its calls are not counted. The first process that opens
 * a name decides this. */
int fshm_limiter_open_beside(fshm_segment *segment, const char *name, uint64_t name_length,
                             const fshm_limit *limits, uint32_t count, fshm_limiter **out);
/* Open an existing limiter, with the limits that it has. FSHM_E_NOT_FOUND: it does not exist. */
int fshm_limiter_find(fshm_segment *segment, const char *name, uint64_t name_length,
                      fshm_limiter **out);
void fshm_limiter_close(fshm_limiter *limiter);
/* share: from now on, calls by this handle charge a key that finds no free slot to one of 8 shared counters, under
 * the same limits, instead of returning FSHM_FULL. Such a key is never admitted more often than its limits say, but
 * it shares them with other keys. This does not apply to token leases, permits, blocks, and limits that come with
 * the call. A charge of a shared counter is never given back. */
void fshm_limiter_share(fshm_limiter *limiter, int share);
int fshm_limiter_limits(fshm_limiter *limiter, fshm_limit *out, uint64_t *version);
/* Arrays with one value for each limit (costs, reserved, remaining, charged, actual) must have room for FSHM_MAX_LIMITS
 * values: another process may set more limits at any time.
 * costs: NULL = 1 for each limit. now_ns: segment time; 0 = read the clock. */
void fshm_apply(fshm_limiter *limiter, uint32_t op, const void *key, uint64_t key_length,
                const uint64_t *costs, uint64_t max_wait_ns, uint64_t now_ns, fshm_decision *out);
/* FSHM_ACQUIRE of cost 1, for callers that need only the status. */
int fshm_is_allowed(fshm_limiter *limiter, const void *key, uint64_t key_length);
/* FSHM_RESERVE that can be cancelled: reserved[i] identifies the reservation of limit i. */
void fshm_reserve(fshm_limiter *limiter, const void *key, uint64_t key_length,
                  const uint64_t *costs, uint64_t max_wait_ns, uint64_t now_ns, fshm_decision *out,
                  fshm_charged *reserved);
/* Give a reservation back, in each limit where it is still the last one. In the other limits its turn passes unused.
 * Returns the number of limits. */
int fshm_cancel(fshm_limiter *limiter, const void *key, uint64_t key_length, const uint64_t *costs,
                const fshm_charged *reserved, uint64_t now_ns);
/* The tokens that each limit still admits for this key now: remaining[i]. Returns the number of limits, or
 * FSHM_E_DAMAGED. */
int fshm_remaining(fshm_limiter *limiter, const void *key, uint64_t key_length, uint64_t now_ns,
                   uint64_t *remaining);
int fshm_reset_key(fshm_limiter *limiter, const void *key, uint64_t key_length);
int fshm_reset_all(fshm_limiter *limiter);

/* Several levels: an organization, its team, its user -------------------------------------- */
#define FSHM_MAX_LEVELS 8
/* One level of an admission: a limiter, and a key there. All limiters are of one segment. No two levels are the same key
 * of the same limiter. */
typedef struct {
  fshm_limiter *limiter;
  const void *key;
  uint64_t key_length;
  const uint64_t *costs; /* as of fshm_apply(); NULL = 1 for each limit */
  uint32_t passes_full; /* 1: if there is no room for the key, this level admits, uncharged */
  uint32_t unused;
  /* Out: of this level alone; its status: FSHM_ALLOWED if it had room. After an error only `version` is set. */
  fshm_decision decision;
} fshm_level;
/* Of all levels, or of none. op: FSHM_ACQUIRE or FSHM_PEEK; FSHM_CHARGE and FSHM_REFUND go level by level, and charge or
 * give back what they can. count: 1 .. FSHM_MAX_LEVELS. *out: the decision of the level that decides, with the least
 * `remaining` and the longest `reset_after_ns` of all levels. Returns the index of that level: of those that deny, the one
 * with the longest retry_after_ns; if all admit, the one with the least left. The key statistics and counters count an
 * admission in each level, and a denial in the level that decides. */
uint32_t fshm_levels_apply(fshm_level *levels, uint32_t count, uint32_t op, uint64_t now_ns,
                           fshm_decision *out);

/* Give this handle its own n, one for each limit of the name. The limits of the name must be windows or permits, and
 * their n must not be smaller. So one name serves any number of different limits. A key must always be used with the
 * same numbers: make them part of the key. Only fshm_admit(), fshm_settle(), fshm_remaining() and fshm_in_flight()
 * use these numbers; all other calls use those of the name. Call it once, before the handle is used. FSHM_OK or
 * FSHM_E_ARGUMENT. */
int fshm_limiter_number(fshm_limiter *limiter, const uint64_t *numbers, uint32_t count);

/* Plans: each key has limits of its own ------------------------------------------------------ */
/* A handle of the name with these limits, 1 to 4 (no permits, leases or money). All keys of the name count together,
 * whichever handle: a key that comes with the handle of another plan keeps what it has consumed, limit by limit, where
 * kind and period are the same (of a bucket also `strict` may differ). So there may be as many plans as keys. The
 * name itself has no limits. FSHM_E_ARGUMENT: it has some. FSHM_E_RECORDS: 131,071 different token buckets and limits of
 * overrides were used in this segment (fewer where it has fewer keys), or no memory is free. A reservation, a refund, a block, a reset: as with any handle; fshm_reset_key()
 * resets the key under all plans. Keys with plans use no shared counters. A window charged beyond its n ends when it would
 * have ended. fshm_limiter_find() gives a handle without limits, for resets and overrides. */
int fshm_plan_open(fshm_segment *segment, const char *name, uint64_t name_length,
                   const fshm_limit *limits, uint32_t count, fshm_limiter **out);
/* Overrides: the plan of one key, kept in the segment until it is removed. Calls do not look at it: who chooses a handle
 * does. limiter: any handle of the name. */
#define FSHM_MAX_OVERRIDE 3 /* limits of an override */
/* count 0: remove it. FSHM_OK, FSHM_FULL, FSHM_E_RECORDS, FSHM_E_ARGUMENT or FSHM_CONTENDED. */
int fshm_override_set(fshm_limiter *limiter, const void *key, uint64_t key_length,
                      const fshm_limit *limits, uint32_t count);
/* The number of limits; 0: the key has none. */
int fshm_override_get(fshm_limiter *limiter, const void *key, uint64_t key_length, fshm_limit *out);
/* How often overrides of the name were set or removed. An override that was set before is found by a later get. */
uint32_t fshm_overrides(fshm_limiter *limiter);
/* As if one had changed: whoever goes by that number looks again. */
void fshm_overrides_changed(fshm_limiter *limiter);
/* For inspection. */
typedef struct {
  uint32_t limiter;
  uint32_t
      count; /* of limits: of an override up to 3; of a state 1 (a bucket's), or 0: not known */
  fshm_limit limits[3];
  uint32_t is_override, kind; /* kind: of the state */
  uint64_t used; /* tokens */
  uint64_t left_ns; /* until all are back, or the window ends */
} fshm_plan_info;
/* What a slot holds of a key with a plan. FSHM_OK; 0: nothing. */
int fshm_plan_at(fshm_segment *segment, uint64_t slot, uint64_t now_ns, fshm_plan_info *out);

/* Limits that come with the call ----------------------------------------------------------- */
/* For storages of other libraries (PyPI's `limits`): each hit passes its limit, and later questions about the key
 * pass none. The limiter is only a name; the kind of its first limit must be that of `limit`. */
typedef struct {
  int32_t status; /* enum fshm_status */
  int32_t unused;
  uint64_t count; /* tokens in the present window, after the call */
  uint64_t previous; /* sliding: tokens in the window before */
  int64_t left_ns; /* until the present window ends; moving: until its oldest hit leaves it */
} fshm_counted;
/* Charge cost if the count stays within limit->n, else charge nothing. cost 0: only look. A look reports the count
 * and the end of a FSHM_WINDOW, whatever limit it was counted under. FSHM_WINDOW: begins at the first hit, and lasts
 * up to 4 * count ns longer than the per_ns of that hit. FSHM_SLIDING: windows begin at multiples of per_ns of the
 * wall clock at the creation of the segment; previous * left_ns / per_ns is rounded down. */
void fshm_count(fshm_limiter *limiter, const void *key, uint64_t key_length,
                const fshm_limit *limit, uint64_t cost, uint64_t now_ns, fshm_counted *out);
#define FSHM_MAX_MOVING 1048576 /* n of a moving window */
/* Moving window: at most n tokens in any interval of per_ns; a hit is denied only if they are in it. Each token
 * takes a slot of the table. limit: FSHM_WINDOW, n up to FSHM_MAX_MOVING; always the same for a key. cost 0: only
 * look; only then count and left_ns are set. FSHM_E_MEMORY: possible where cost > 32. */
void fshm_moving(fshm_limiter *limiter, const void *key, uint64_t key_length,
                 const fshm_limit *limit, uint64_t cost, uint64_t now_ns, fshm_counted *out);
int fshm_moving_clear(fshm_limiter *limiter, const void *key, uint64_t key_length);

/* Token leases: a server grants tokens to this host in batches -------------------------------- */
/* For limits over many hosts. The server charges a batch of tokens to the limit; this host adds it to the key's
 * lease, and its processes spend it until the lease ends. A limiter of FSHM_LEASE limits, one for each limit, holds
 * the leases: each slot says how many tokens are left until when. Together the processes never spend more. */
/* A batch, for fshm_token_lease_put(): one for each limit. */
typedef struct {
  uint64_t tokens;
  uint64_t kept; /* if more tokens are left, all keep the old end, if it is earlier */
  uint64_t until_ns; /* segment time */
} fshm_token_lease;
/* Charge the token lease. If it has too few tokens: FSHM_DENIED if `refused` remembers that the server has just
 * refused this cost or a smaller one, else FSHM_ASK. `refused`: a limiter of FSHM_LEASE limits too, or NULL.
 * `limits`: the limiter with the limits themselves; its slots hold what the server last reported (fshm_learn()). *out
 * is computed from these, and out->remaining includes the tokens left of the lease. *low: 1 for the one call that
 * brings the lease below a mark, which is a quarter to a half of its batch. out NULL: only the status. */
int fshm_spend(fshm_limiter *leases, fshm_limiter *refused, fshm_limiter *limits, const void *key,
               uint64_t key_length, const uint64_t *costs, uint64_t now_ns, fshm_decision *out,
               uint32_t *low);
/* Add a batch. A lease has room for 2^24 - 2 tokens; more are lost. FSHM_OK, or an error: the batch is lost. */
int fshm_token_lease_put(fshm_limiter *leases, const void *key, uint64_t key_length,
                         const fshm_token_lease *batches, uint64_t now_ns);
/* Tokens left, and for how many ns. take: also remove them, to return them to the server. */
int fshm_token_lease_look(fshm_limiter *leases, const void *key, uint64_t key_length, int take,
                          uint64_t now_ns, uint64_t *left, uint64_t *left_ns);
/* Remember for ns that the server refused these costs: these and larger ones are denied until then. ns 0: forget. */
int fshm_token_lease_refuse(fshm_limiter *refused, const void *key, uint64_t key_length,
                            const uint64_t *costs, uint64_t ns, uint64_t now_ns);
/* Store what the server reported of a key: for each limit the tokens used, and the ns until its window ends (FSHM_WINDOW,
 * FSHM_SLIDING) or that its arrival time is ahead (FSHM_BUCKET). */
int fshm_learn(fshm_limiter *limits, const void *key, uint64_t key_length, const uint64_t *used,
               const uint64_t *left_ns, uint64_t now_ns);
/* What fshm_learn() stored of this key, as of now. */
int fshm_known(fshm_limiter *limits, const void *key, uint64_t key_length, uint64_t now_ns,
               uint64_t *used, uint64_t *left_ns);
/* Give tokens that were spent back to their lease, as many as keep it at `most` tokens at most: out[i] says how many. None
 * if the lease is gone, or its window has ended: until_ns[i] is the end of the window in which they were granted. */
int fshm_token_lease_return(fshm_limiter *leases, const void *key, uint64_t key_length,
                            const uint64_t *tokens, const uint64_t *until_ns, const uint64_t *most,
                            uint64_t now_ns, uint64_t *out);
/* Leader election among the processes of the host. 1: this process leads until it dies. 0: another one leads. Or
 * FSHM_E_LOCK_FILE. wait: block until this process leads; when a leader dies, the next one follows within half a
 * second. */
int fshm_lead(fshm_segment *segment, int wait);
int fshm_lead_end(fshm_segment *segment);
uint32_t fshm_leader(fshm_segment *segment); /* its pid; 0: there is none */

/* Budgets ------------------------------------------------------------------------------------------ */
/* A limiter of one to four limits of FSHM_MONEY with one period and time zone: the budget; then, with n 10^18 each, what was
 * added to it for this window, a mark for fshm_budget_once(), and what a file or server granted of it. Amounts are
 * nano-dollars. */
typedef struct {
  int32_t status;
  uint32_t
      direct; /* the reservation was charged, so that the death of the process does not give it back */
  uint64_t limit, spent,
      reserved; /* of the key, in this window, after the call; limit: with what was added */
  uint64_t granted;
  uint64_t window; /* its end, minutes since 1970 */
  int64_t left_ns; /* until then */
  uint64_t incarnation, id; /* of the reservation, as the next two */
  uint32_t owner, entry;
  uint64_t kept; /* made with FSHM_BUDGET_GRANTED */
} fshm_budget;
enum fshm_budget_flag {
  FSHM_BUDGET_CHARGE = 1, /* of a process that dies, what it has reserved stays spent */
  FSHM_BUDGET_GRANTED = 2, /* at most what was granted */
  FSHM_BUDGET_SHARED = 4 /* the same, and a server knows the limit: FSHM_ASK, never FSHM_DENIED */
};
/* Reserve the amount, if the budget has room: FSHM_ALLOWED, FSHM_DENIED; FSHM_ASK: only what was granted has none. Or
 * FSHM_FULL, FSHM_E_ARGUMENT (not a budget), FSHM_E_DAMAGED. */
int fshm_budget_reserve(fshm_limiter *limiter, const void *key, uint64_t key_length,
                        uint64_t amount, uint32_t flags, uint64_t now_ns, fshm_budget *out);
/* For the counters: FSHM_ASK ended in a denial. */
void fshm_budget_denied(fshm_limiter *limiter, const void *key, uint64_t key_length);
/* End it: `actual` is spent. Call it once. 0: the reservation is another process's (before a fork). FSHM_ASK, of one with
 * FSHM_BUDGET_GRANTED: it is ended; whoever grants has to grant more afterwards, or takes some back. */
int fshm_budget_settle(fshm_limiter *limiter, const void *key, uint64_t key_length,
                       const fshm_budget *reserved, uint64_t amount, uint64_t actual,
                       uint64_t now_ns);
int fshm_budget_look(fshm_limiter *limiter, const void *key, uint64_t key_length, uint64_t now_ns,
                     fshm_budget *out);
/* Add to a number of the key for this window: which 0 = spent, 1 = added, 3 = granted. It goes down to 0 at least. */
int fshm_budget_add(fshm_limiter *limiter, const void *key, uint64_t key_length, uint32_t which,
                    int64_t amount, uint64_t now_ns);
/* Raise one of these numbers to this, if it is less: of the window with this end. FSHM_DENIED: it is another one now. */
int fshm_budget_raise(fshm_limiter *limiter, const void *key, uint64_t key_length, uint32_t which,
                      uint64_t to, uint64_t window, uint64_t now_ns);
/* Add to what was granted in the window with this end. FSHM_DENIED: it is another one now. */
int fshm_budget_grant(fshm_limiter *limiter, const void *key, uint64_t key_length, uint64_t amount,
                      uint64_t window, uint64_t now_ns);
/* Take back what was granted in the window with this end and is neither spent nor reserved: out->granted. FSHM_DENIED:
 * it is another window now. */
int fshm_budget_withdraw(fshm_limiter *limiter, const void *key, uint64_t key_length,
                         uint64_t window, uint64_t now_ns, fshm_budget *out);
/* 1: for the first call of a key in its window. */
int fshm_budget_once(fshm_limiter *limiter, const void *key, uint64_t key_length, uint64_t now_ns);
/* For inspection: one amount. which: 0 .. 3, as of fshm_budget_add(), 2: the mark; FSHM_BUDGET_RESERVED: what one process
 * has reserved of a key; FSHM_BUDGET_LIMIT: of the limiter, for each key. */
#define FSHM_BUDGET_RESERVED 4
#define FSHM_BUDGET_LIMIT 5
typedef struct {
  uint64_t slot; /* of 0 .. 3: that of 0 has the name of the key, for fshm_key_name() */
  uint64_t id; /* the same for all amounts of a key of a limiter */
  uint64_t amount; /* in the present window: 0 where it is of an earlier one */
  uint64_t left_ns; /* of FSHM_BUDGET_LIMIT: until the window ends */
  uint32_t limiter; /* UINT32_MAX of FSHM_BUDGET_RESERVED: that of the key with this id */
  uint32_t which;
} fshm_budget_info;
/* All amounts of all budgets; the first `room` go into out. Returns the number of all. It begins no window. */
uint64_t fshm_budgets(fshm_segment *segment, uint64_t now_ns, fshm_budget_info *out, uint64_t room);

/* Time zones and the time of day, for FSHM_CALENDAR ----------------------------------------------- */
/* The index of a zone, for fshm_limit.strict; UTC is 0 and needs none. A span: the minute since 1970 at which it begins,
 * << 16, | the minutes east of UTC, + 32768. The first begins at 0. At most 121 spans, and 40 bytes of name.
 * FSHM_E_LIMITERS: the segment has no room for another zone. */
int fshm_zone(fshm_segment *segment, const char *name, uint64_t name_length, const uint64_t *spans,
              uint64_t count);
/* Its name, ended by a 0. out: 41 bytes at least. 0: there is no such zone. */
int fshm_zone_name(fshm_segment *segment, uint32_t index, char *out, uint64_t size);
/* The minute at which a window ends, the one that `minute` is in. Pure. 0: not a period of the calendar. */
uint64_t fshm_calendar_end(uint64_t per_ns, const uint64_t *spans, uint64_t count, uint64_t minute);
/* The time of day that all processes of the segment go by, ns since 1970: core/wall.h. */
uint64_t fshm_wall(fshm_segment *segment, uint64_t now_ns);
/* For tests: from now on, the kernel's clock of the day shows so much more in this process. */
void fshm_wall_pretend(fshm_segment *segment, int64_t ns);

/* A clock that tests move -------------------------------------------------------------------------------- */
/* From now on the segment's clock is what the file says: of this process, and of each other one that has done the same
 * with the same file. fd: may be closed afterwards. make: the file is empty, and is made. A process has one such clock
 * for each segment. FSHM_E_ARGUMENT: it is another segment's file, or none. FSHM_E_SYSTEM: errno says why. */
int fshm_clock_share(fshm_segment *segment, int fd, int make);
/* Move it to segment time `now_ns`, forward only (FSHM_MOVE_TO), stop it (FSHM_MOVE_STOP), let it go on
 * (FSHM_MOVE_RUN), or add `now_ns` to the time of day, modulo 2^64 (FSHM_MOVE_DAY). One caller at a time, over all processes.
 * FSHM_E_ARGUMENT: the clock is no file's, or the segment's time ends before (4.5 years). */
#define FSHM_MOVE_TO 0
#define FSHM_MOVE_STOP 1
#define FSHM_MOVE_RUN 2
#define FSHM_MOVE_DAY 3
#define FSHM_MOVE_HOLD 4 /* now_ns: whether waiting calls leave it alone while it stands */
int fshm_clock_move(fshm_segment *segment, int how, uint64_t now_ns);
/* By how many ns it was moved, all together; 0: it is no file's. how: 1: it stands still; | 2: and waiting calls leave
 * it alone. */
uint64_t fshm_clock_moved(fshm_segment *segment, int *how);

/* The number of the limiter's keys that have consumed something, as far as the key statistics know (0 with
 * FSHM_NAMES_OFF). */
uint64_t fshm_live_keys(fshm_limiter *limiter, uint64_t now_ns);

/* Stored states: what a limit has counted for a key, outside a segment ------------------------ */
/* For a file that outlives the segment: plain integers, which mean the same in every version of this library. */
/* limit: under which the tokens were counted; n 0: nothing was ever counted. Of FSHM_CALENDAR with `strict` 0: the caller
 * knows the zone. end: of a bucket its arrival time, else the end of the present window, without debt; of FSHM_CALENDAR
 * in minutes since 1970; 0: nothing counts. used: tokens of the present window, previous: of the one before (a sliding
 * limit). */
typedef struct {
  fshm_limit limit;
  uint64_t end, used, previous;
} fshm_stored;
/* used, remaining: tokens, after the call. left_ns: as fshm_learn() takes it. window_ns: until the present window ends,
 * without debt; 0: a bucket, or no window has begun. over_ns: until all tokens are back. */
typedef struct {
  int32_t status; /* FSHM_ALLOWED or FSHM_DENIED */
  int32_t unused;
  uint64_t used, remaining;
  int64_t retry_ns; /* 0 when allowed; FSHM_NEVER */
  uint64_t left_ns, window_ns, over_ns;
} fshm_stored_answer;
/* When a call is. now_ns, and all instants: of one clock that never goes back. For FSHM_CALENDAR: wall_ns: the time of
 * day, ns since 1970; spans: of the zone of the call's limit, as of fshm_zone(); none: UTC. */
typedef struct {
  uint64_t now_ns, wall_ns;
  const uint64_t *spans;
  uint64_t span_count;
} fshm_stored_time;
/* Apply FSHM_ACQUIRE, FSHM_PEEK, FSHM_CHARGE, FSHM_REFUND or FSHM_BLOCK of `cost` under `limit` (any but FSHM_PERMITS,
 * FSHM_LEASE and FSHM_MONEY), with the arithmetic of all limiters. charged: NULL, or the state as a charge has left it,
 * of which a refund gives some back. FSHM_OK, FSHM_E_ARGUMENT, or FSHM_E_DAMAGED: *stored is no state. */
int fshm_stored_apply(uint32_t op, const fshm_limit *limit, fshm_stored *stored, uint64_t cost,
                      const fshm_stored *charged, const fshm_stored_time *at,
                      fshm_stored_answer *out);

/* Permits: at most n held at a time -------------------------------------------------------------- */
/* A permit held by this process. Copy it freely; release it once. */
typedef struct {
  uint64_t slot, who, when;
  uint32_t held, group; /* group: of its key, for those that wait or look */
  fshm_charged put[4]; /* the charge of each other limit */
} fshm_permit;

typedef struct {
  uint32_t limiter, pid, alive, idle, number;
  uint64_t age_seconds;
  uint64_t key_hash; /* the same for all permits of a key */
  uint64_t table_slot;
} fshm_permit_info;

/* Take a permit and charge every other limit of the limiter, or do nothing. *in_flight: if no permit was free, the number
 * of the key's permits that were seen held. */
void fshm_admit(fshm_limiter *limiter, const void *key, uint64_t key_length, const uint64_t *costs,
                uint64_t now_ns, fshm_permit *permit, fshm_decision *out, uint32_t *in_flight);
/* Count a call that was decided elsewhere: FSHM_ALLOWED as admitted, FSHM_DENIED as denied, less than 0 as refused. */
void fshm_count_call(fshm_limiter *limiter, const void *key, uint64_t key_length, int32_t status);
/* Settlement: replace the charged costs by the actual ones (one for each limit but the permits). More may go into
 * debt; less is given back, as far as the charge still counts. */
int fshm_settle(fshm_limiter *limiter, const void *key, uint64_t key_length,
                const uint64_t *charged, const uint64_t *actual, const fshm_permit *permit,
                uint64_t now_ns);
/* 1: released. 0: it was released before, or belongs to another process (the parent, after a fork). */
int fshm_permit_release(fshm_limiter *limiter, fshm_permit *permit);
/* Mark a held permit as idle (a pooled connection that is not in use) or in use again. Likewise 1 or 0. */
int fshm_permit_idle(fshm_limiter *limiter, fshm_permit *permit, int idle);
/* 0: it was released, or taken back by fshm_reap() although its process lives. */
int fshm_permit_held(const fshm_limiter *limiter, const fshm_permit *permit);
/* The number of the key's permits that living processes hold. Frees those of dead processes. One that another call is
 * taking or releasing at this instant may count or not. */
uint32_t fshm_in_flight(fshm_limiter *limiter, const void *key, uint64_t key_length);

/* Questions for a server that grants tokens: what the host tells with one, and what it takes over from the answer, as
 * fast_litellm_shm/cluster/algorithms.lua says. Of limits that are neither FSHM_SLIDING nor FSHM_CALENDAR. */
typedef struct {
  fshm_limiter *limits, *leases, *refused;
  fshm_limiter
      *asking; /* of one permit for each key: its holder asks the server, and no other process */
  uint32_t count; /* limits */
  uint32_t buckets; /* bit i: the i-th is a FSHM_BUCKET */
  uint64_t most[4]; /* n, or burst */
} fshm_asked;
typedef struct {
  fshm_permit permit; /* to ask */
  uint64_t sent_ns; /* segment time */
  double numbers[24]; /* six a limit */
} fshm_question;
/* FSHM_ALLOWED: the permit is held, and the question is to be asked. What was leased is taken out, to be given back with
 * it. ahead: for a batch, and what is leased stays. Else nothing is to be asked: another process asks, or (ahead) the
 * lease has these tokens, or the server has refused some of late. FSHM_FULL and other errors: no permit is to be had. */
int fshm_question_begin(const fshm_asked *asked, const void *key, uint64_t key_length,
                        const uint64_t *costs, int ahead, fshm_question *question);
/* Take over the answer: six numbers, and seven a limit. out NULL: to a question ahead. Else the decision; a refusal is
 * neither counted nor remembered. The permit stays held. FSHM_OK, or an error: a batch is lost. */
int fshm_question_end(const fshm_asked *asked, const void *key, uint64_t key_length,
                      const uint64_t *costs, const fshm_question *question, const double *answer,
                      fshm_decision *out);
/* Release the permit, if it is held. */
void fshm_question_drop(fshm_limiter *asking, fshm_question *question);

/* Waiting for a key ------------------------------------------------------------------------ */
/* Callers that wait for a permit, or for tokens, stand in one queue for each key, over all processes. The queue says
 * which of them may try; what it tries is any call of the limiter. A place is of one caller (a thread), or of several
 * that take turns (tasks of an event loop). Its owner calls fshm_wait_turn() at least every FSHM_WAIT_BEAT_NS; a place
 * whose owner does not (it is dead, or stopped) is passed over within a second:
 *
 *   fshm_wait_join(...);
 *   while (!fshm_wait_turn(l, &place, 0, &turn) || !try()) fshm_wait_sleep(l, &place, turn.armed, ns);
 *   fshm_wait_served(...); fshm_wait_leave(l, &place);
 */
#define FSHM_WAIT_BEAT_NS 200000000
typedef struct {
  uint64_t
      tenant; /* hash of its name; 0 = none. Tenants get equal service, in proportion to their weights */
  uint32_t weight; /* thousandths; 0 = 1000 */
  int32_t priority; /* -100 .. 100; higher is first; one more for each 10 s of waiting */
  int32_t
      fd; /* to be written to at a wake-up: an eventfd or a pipe of an event loop; -1: a thread sleeps */
} fshm_waiter;
typedef struct {
  uint64_t key, owner, tenant;
  uint64_t since; /* segment ns: when its first caller came */
  uint32_t entry, weight, rest, woken, shared, pid, was_first;
  uint32_t units, here, more, asked, looked; /* what it was woken for: wait_queue.c */
  uint32_t took; /* set it to 1 where the caller got one permit, before requeue and leave */
  uint32_t callers; /* that wait in it */
  int32_t priority, fd;
} fshm_place;
typedef struct {
  uint32_t armed; /* pass it to fshm_wait_sleep() */
  uint32_t ahead; /* callers that are before this place */
  uint32_t callers; /* that wait for the key, this place's included */
} fshm_turn;
typedef struct {
  uint64_t key_hash; /* 52 bits, as in fshm_permit_info */
  uint64_t tenant, waited_ns;
  uint64_t
      table_slot; /* that has the key's name, for fshm_key_name(); UINT64_MAX: it is not known */
  uint32_t limiter, pid, callers;
  uint32_t stale; /* 1: its owner is stopped or dead, so it does not count */
  int32_t priority;
  uint32_t unused;
} fshm_waiter_info;
/* Join the queue. 1; 0: it has no room for more places (4,096 on a host): then the caller goes by no order, but may
 * try. now_ns: 0 = now. */
int fshm_wait_join(fshm_limiter *limiter, const void *key, uint64_t key_length,
                   const fshm_waiter *waiter, uint64_t now_ns, fshm_place *place);
/* 1: the place is next: try. 0: sleep. */
int fshm_wait_turn(fshm_limiter *limiter, fshm_place *place, uint64_t now_ns, fshm_turn *out);
/* How many callers of other places are before a caller that came to this one at `since`. */
uint32_t fshm_wait_ahead(fshm_limiter *limiter, fshm_place *place, uint64_t since_ns,
                         uint64_t now_ns);
/* Sleep until the place is woken, at most FSHM_WAIT_BEAT_NS. 1: it was woken. */
int fshm_wait_sleep(fshm_limiter *limiter, const fshm_place *place, uint32_t armed, uint64_t ns);
/* The place's caller was admitted, with a cost in tokens: counts as service of its tenant. */
void fshm_wait_served(fshm_limiter *limiter, fshm_place *place, uint64_t cost, uint64_t now_ns);
/* So many tokens more, or fewer, were used in the end. */
void fshm_wait_correct(fshm_limiter *limiter, const fshm_place *place, int64_t tokens,
                       uint64_t now_ns);
/* For a place of several callers: its first caller has gone, the next one came at `since`. Wakes whichever place is
 * next. */
void fshm_wait_requeue(fshm_limiter *limiter, fshm_place *place, uint64_t since_ns,
                       uint32_t callers, uint64_t now_ns);
/* The same first caller, and another number of callers. */
void fshm_wait_count(fshm_limiter *limiter, fshm_place *place, uint32_t callers);
/* Leave the queue, and wake the next. No effect the second time. */
void fshm_wait_leave(fshm_limiter *limiter, fshm_place *place);
/* There may be room for a caller of the key. (A release of a permit does this by itself.) */
void fshm_wait_wake(fshm_limiter *limiter, const void *key, uint64_t key_length);
/* 0: no caller waits for the key. 1: some may. One look. */
int fshm_is_waited_for(fshm_limiter *limiter, const void *key, uint64_t key_length);
/* How many callers wait for the key (tenant: of this one only): out->callers. */
void fshm_waiting(fshm_limiter *limiter, const void *key, uint64_t key_length,
                  const uint64_t *tenant, uint64_t now_ns, fshm_turn *out);
/* Pass the wake-ups of other processes on to the event loops of this one, for so long: a thread of its own. 1, at once:
 * another process has called fshm_wait_ask(). */
int fshm_wait_watch(fshm_segment *segment, uint64_t ns);
/* For what a process keeps while it does not use it, such as an idle connection with its permit. Whoever gives it back
 * does that first, and releases the permit then.
 *
 * Who is next? A caller of this process is woken: it may use what is kept here, also where its turn has not come. For one
 * of another process, give back something that is kept here. A caller of this process is next also if it came up to
 * 20 ms after the first of all. */
#define FSHM_NEXT_NONE 0
#define FSHM_NEXT_OURS 1
#define FSHM_NEXT_OTHER 2
int fshm_wait_next(fshm_limiter *limiter, const void *key, uint64_t key_length);
/* When the caller that is next came: segment ns. UINT64_MAX: none waits. */
uint64_t fshm_wait_first(fshm_limiter *limiter, const void *key, uint64_t key_length);
/* The caller of the place, which is next and found no permit, asks the other processes that hold one (idle: one that
 * is marked as idle) to give one back. They learn it by fshm_wait_watch(). */
void fshm_wait_ask(fshm_limiter *limiter, const void *key, uint64_t key_length, int idle,
                   fshm_place *place);
/* 1: a caller of another process is next and has asked, and this call is the first to see it: give one back. 0: also
 * where a caller of this process was woken instead, as by fshm_wait_next(). */
int fshm_wait_asked(fshm_limiter *limiter, const void *key, uint64_t key_length);
/* The place of this number, below 4,096; without the name of its key. 1; 0: it is free. */
int fshm_waiter_at(fshm_segment *segment, uint32_t index, fshm_waiter_info *out);
/* All places; the first `room` of them go into out. Returns the number of all. names: also look for the names of their
 * keys (table_slot), which hashes the names of all keys of their limiters. */
uint64_t fshm_waiters(fshm_segment *segment, fshm_waiter_info *out, uint64_t room, int names);
/* The permit in a slot of the table: 1, or 0 if there is none. */
int fshm_permit_at(fshm_segment *segment, uint64_t slot, fshm_permit_info *out);
/* All permits; the first `room` of them go into out. Returns the number of all. */
uint64_t fshm_permits(fshm_segment *segment, fshm_permit_info *out, uint64_t room);
/* Free the permits of dead processes (pid 0), or all permits of one process. Returns their number. */
uint64_t fshm_reap(fshm_segment *segment, uint32_t pid);
uint64_t fshm_unique(fshm_segment *segment); /* a number that no other call gets */

/* Permit leases: a server grants permits to this host ---------------------------------------- */
/* For limits over many hosts. The server lets the processes of this host hold a number of a key's permits together,
 * until an end. A limiter of one FSHM_LEASE limit holds the leases: one word, in a slot of the table, for each key. */
#define FSHM_PERMIT_LEASE_BITS 18 /* low bits of a word; above them its end, in units of 2^18 ns */
typedef struct {
  uint64_t word; /* as it was read: pass it to fshm_permit_lease_put() */
  uint64_t leased; /* permits that the host may hold; 0 after the end */
  uint64_t held; /* permits of the key that living processes hold */
  uint64_t reported; /* the larger of both: what the server must count for this host */
  uint64_t left_ns; /* until the end */
  uint64_t now_ns; /* segment time after the word was read */
} fshm_permit_lease;
/* The key's permit lease, and the number of permits held. open: if there is no word yet, create one that allows no
 * permits, so that there is a word to report. FSHM_OK, or an error. */
int fshm_permit_lease_look(fshm_limiter *permits, fshm_limiter *leases, const void *key,
                           uint64_t key_length, int open, uint64_t now_ns, fshm_permit_lease *out);
/* Allow at most `to` permits from now on. Permits held beyond stay held, and are reported. */
int fshm_permit_lease_lower(fshm_limiter *permits, fshm_limiter *leases, const void *key,
                            uint64_t key_length, uint64_t to, uint64_t now_ns,
                            fshm_permit_lease *out);
/* Store the server's answer to `word`. until_ns: segment time; it may be rounded up by a second. FSHM_OK. 0: the word has
 * changed, so the answer is obsolete. */
int fshm_permit_lease_put(fshm_limiter *permits, fshm_limiter *leases, const void *key,
                          uint64_t key_length, uint64_t word, uint64_t leased, uint64_t until_ns,
                          uint64_t now_ns);
/* Take a permit within the lease. FSHM_ASK: none is left, ask the server. FSHM_DENIED: `refused` remembers a recent
 * refusal (fshm_token_lease_refuse() of cost 1). alone: 0, normally. Else the server is unreachable: this host holds
 * at most `alone` permits, whatever the lease says. */
int fshm_permit_lease_admit(fshm_limiter *permits, fshm_limiter *leases, fshm_limiter *refused,
                            const void *key, uint64_t key_length, uint32_t alone, uint64_t now_ns,
                            fshm_permit *permit, fshm_decision *out, uint32_t *in_flight);

/* Limits that are learned ------------------------------------------------------------------------ */
/* A limit of calls in flight, for each key, that all processes of the host learn together from how the calls end. Two
 * limiters: `permits`, of one FSHM_PERMITS limit, grants at most `most`; `learned`, of one FSHM_LEASE limit, keeps what is
 * learned, in up to five slots of the table for each key. */
#define FSHM_MAX_ADAPTIVE 10000
enum fshm_algorithm { FSHM_AIMD = 0, FSHM_GRADIENT = 1 };
/* 1 <= least <= initial <= most <= FSHM_MAX_ADAPTIVE. tolerance (gradient): 1024ths of the base latency that are no queue
 * yet, 1024 .. 4096. */
typedef struct {
  uint32_t initial, least, most, algorithm, tolerance;
} fshm_adaptive;
/* How a call ended. in_flight: as fshm_adaptive_admit() reported it. throttled: the upstream refused it. */
typedef struct {
  uint64_t started_ns, duration_ns; /* segment time; ns */
  uint32_t in_flight, throttled;
} fshm_sample;
enum fshm_phase {
  FSHM_PHASE_START = 0,
  FSHM_PHASE_REFUSED = 1,
  FSHM_PHASE_MEASURE = 2,
  FSHM_PHASE_STEADY = 3
};
typedef struct {
  uint32_t limit; /* 0: nothing is learned of the key */
  uint32_t
      best; /* what was in flight, less one, when the upstream last refused a call; the limit before it is measured */
  uint32_t phase; /* enum fshm_phase: the last turn */
  uint32_t calls, rounds; /* in this round; and rounds since the turn */
  uint32_t exact; /* 0: more than the limit may be in flight, from before it fell */
  uint64_t turn_ns; /* since the turn; 0: there was none */
  uint64_t paused_ns; /* no call is admitted for so long */
  uint64_t base_ns, mean_ns; /* latency without a queue, and of this round; 0: not known */
} fshm_learned;
/* Take a permit below the learned limit. FSHM_DENIED: out->retry_after_ns says for how long the key is paused; 0: until a
 * permit is released. *in_flight: of the key, with this call if it was admitted; above 1,000 an estimate. */
int fshm_adaptive_admit(fshm_limiter *permits, fshm_limiter *learned, const fshm_adaptive *how,
                        const void *key, uint64_t key_length, uint64_t now_ns, fshm_permit *permit,
                        fshm_decision *out, uint32_t *in_flight);
/* Learn from a call that ended. pause_ns: admit no call of the key for so long. FSHM_OK, or an error. */
int fshm_adaptive_end(fshm_limiter *permits, fshm_limiter *learned, const fshm_adaptive *how,
                      const void *key, uint64_t key_length, const fshm_sample *sample,
                      uint64_t pause_ns, uint64_t now_ns);
/* Admit no call of the key for so long; an earlier pause that ends later stays. 0: end the pause. */
int fshm_adaptive_pause(fshm_limiter *permits, fshm_limiter *learned, const void *key,
                        uint64_t key_length, uint64_t ns, uint64_t now_ns);
/* What is known of the key. FSHM_OK, or an error. */
int fshm_adaptive_look(fshm_limiter *learned, const void *key, uint64_t key_length, uint64_t now_ns,
                       fshm_learned *out);
/* The same of the key whose limit is in this slot. FSHM_OK; 0: there is none. */
int fshm_adaptive_at(fshm_segment *segment, uint64_t slot, uint64_t now_ns, fshm_learned *out);
/* Forget what is learned of the key, and end its pause: it begins with `initial` again. */
int fshm_adaptive_forget(fshm_limiter *permits, fshm_limiter *learned, const fshm_adaptive *how,
                         const void *key, uint64_t key_length);

/* Inspection -------------------------------------------------------------------------------- */
/* FSHM_OK; 0: no limiter has this index; or FSHM_E_DAMAGED. */
int fshm_limiter_at(fshm_segment *segment, uint32_t index, fshm_limiter_info *out);
int fshm_limiter_describe(fshm_limiter *limiter, fshm_limiter_info *out);
int fshm_process_at(fshm_segment *segment, uint32_t index, fshm_process_info *out);
/* Set fshm_process_info.outage of this process. The caller defines its meaning. It is 0 at first, and again in a
 * forked child. No effect if the process table is full. */
void fshm_process_note(fshm_segment *segment, uint32_t outage);
uint64_t fshm_live_slots(fshm_segment *segment, uint8_t *live, uint64_t now_ns);
/* Slots in use. keys[i] (an array of fshm_geometry.limiters): how many keys of limiter i have consumed something; 0 with
 * FSHM_NAMES_OFF. */
uint64_t fshm_used(const fshm_segment *segment, uint64_t now_ns, uint64_t *keys);
/* The key statistics of the slots from `from` to before `until`, into arrays by slot. who: 0, the slot has no key. */
void fshm_key_stats(const fshm_segment *segment, uint64_t from, uint64_t until, uint64_t *who,
                    uint32_t *meta, uint64_t *admitted, uint64_t *denied);
/* The slots, of so many that fshm_key_stats() has read, whose statistics are those of their key; in order, with the
 * index of the limiter of each. of_limiter: an array of FSHM_KEY_OWNERS: 0, leave out the slots of that one. Returns how
 * many there are; all arrays have room for count. */
#define FSHM_KEY_OWNERS 4096
uint64_t fshm_known_keys(const uint64_t *who, const uint32_t *meta, uint64_t count,
                         const uint8_t *of_limiter, int64_t *places, uint16_t *limiters);
int fshm_key_name(fshm_segment *segment, uint64_t slot, char *out, uint64_t size, uint64_t *length);
int fshm_peek_slot(fshm_segment *segment, uint64_t slot, uint64_t now_ns, fshm_decision *out);
/* fshm_peek_slot() for a key that is used with these numbers (fshm_limiter_number()): an array
 * of 4; 0 = the name's. */
int fshm_peek_numbered(fshm_segment *segment, uint64_t slot, const uint64_t *numbers,
                       uint64_t now_ns, fshm_decision *out);
/* fshm_peek_slot() for a key whose limit comes with the call. moving: the key has a moving window, and the call looks
 * at up to limit->n other slots. FSHM_OK; 0: the key statistics know no key of a limiter of this kind in the slot; or
 * FSHM_E_ARGUMENT. */
int fshm_peek_counted(fshm_segment *segment, uint64_t slot, const fshm_limit *limit, int moving,
                      uint64_t now_ns, fshm_decision *out);

/* Counters: calls of each limiter, by all processes, dead ones too. They never fall ------------ */
/* The first 15 limiters have one set each, all others share the last one. */
#define FSHM_COUNTERS 16
typedef struct {
  uint64_t admitted;
  uint64_t denied; /* includes refused */
  uint64_t refused; /* the table was full */
  uint64_t shared; /* admitted or denied by a shared counter */
} fshm_counters;
/* out: FSHM_COUNTERS of them. */
void fshm_counters_all(const fshm_segment *segment, fshm_counters *out);

/* Memo: a cache of the token counts of texts ----------------------------------------------------- */
typedef struct {
  uint64_t entries, texts, hits, misses;
} fshm_memo_info;
uint64_t fshm_memo_encoding(fshm_segment *segment, const char *name, uint64_t length);
/* An encoding for the calls below whose counts only this tenant finds. */
uint64_t fshm_memo_tenant(fshm_segment *segment, uint64_t encoding, const void *tenant,
                          uint64_t length);
/* The count, or -1: not known. */
int64_t fshm_memo_get(fshm_segment *segment, uint64_t encoding, const void *text, uint64_t length);
/* A count of 2^24 or more is not kept. */
void fshm_memo_put(fshm_segment *segment, uint64_t encoding, const void *text, uint64_t length,
                   uint64_t count);
/* The same in two steps, for callers that get and then put: they hash the text once. */
void fshm_memo_hash(fshm_segment *segment, uint64_t encoding, const void *text, uint64_t length,
                    uint64_t hash[2]);
int64_t fshm_memo_known(fshm_segment *segment, const uint64_t hash[2]);
void fshm_memo_keep(fshm_segment *segment, const uint64_t hash[2], uint64_t count);
void fshm_memo_count(fshm_segment *segment, uint64_t hits, uint64_t misses);
void fshm_memo_at(fshm_segment *segment, fshm_memo_info *out);

/* Metrics: how long things took, over all processes ---------------------------------------- */
typedef struct {
  char name[104]; /* component, a zero, operation; cut if they are longer */
  uint32_t name_length, component_length;
  uint64_t calls, errors, sum_ns, least_ns, most_ns, size_in, size_out;
  double p50_ns, p95_ns, p99_ns; /* within 5 %, from 64 ns to 1,100 s */
} fshm_metric_info;
/* The index of a metric. The last one, "(other)", if the table is full. */
int fshm_metric_open(fshm_segment *segment, const char *component, uint64_t component_length,
                     const char *operation, uint64_t operation_length);
/* weight: how many calls this one stands for, if only some are measured. */
void fshm_metric_record(fshm_segment *segment, uint32_t metric, uint64_t ns, uint64_t weight,
                        int success, uint64_t size_in, uint64_t size_out);
/* FSHM_OK; 0: no such metric yet; FSHM_E_ARGUMENT: no metric can have this index. */
int fshm_metric_at(fshm_segment *segment, uint32_t metric, fshm_metric_info *out);
/* The sum of several metrics, and the quantiles of all their calls. The names in *out stay as they are. */
void fshm_metric_sum(fshm_segment *segment, const uint32_t *metrics, uint32_t count,
                     fshm_metric_info *out);
#define FSHM_OCTAVES 34
/* Calls by duration: calls[i] took less than 128 ns * 2^i, and at least 128 ns * 2^(i - 1). The last one has all
 * that took longer. They never fall. */
void fshm_metric_octaves(fshm_segment *segment, const uint32_t *metrics, uint32_t count,
                         uint64_t *calls);

/* Features: errors since the last reset, over all processes; 8 numbers --------------------- */
uint64_t fshm_feature_error(fshm_segment *segment, uint32_t feature); /* how many there are now */
uint64_t fshm_feature_errors(fshm_segment *segment, uint32_t feature);
void fshm_feature_reset(fshm_segment *segment, uint32_t feature);
const uint64_t *fshm_feature_words(fshm_segment *segment); /* the 8 numbers, to be read only */

/* Deployments: statistics that routers share ---------------------------------------------------------- */
enum fshm_route {
  FSHM_ROUTE_SHUFFLE = 0,
  FSHM_ROUTE_LEAST_BUSY = 1,
  FSHM_ROUTE_LATENCY = 2,
  FSHM_ROUTE_COST = 3
};
typedef struct {
  uint64_t id;
  uint64_t in_flight, records;
  uint64_t latency_ns; /* decaying mean of the successful requests; UINT64_MAX: none yet */
  uint64_t cost; /* decaying mean, 1e-9; UINT64_MAX: none yet */
  uint64_t cooldown_ns; /* what is left of it */
  uint64_t idle_ns; /* since it was last used */
  double success_rate; /* decaying; 1 where there are no records */
} fshm_deployment_info;
typedef struct {
  uint64_t incarnation;
  uint32_t deployment, owner;
} fshm_request;
uint64_t fshm_deployment_id(fshm_segment *segment, const char *name, uint64_t length);
/* Its index, 0..255; FSHM_FULL: other processes took all its indexes just now. */
int fshm_deployment_open(fshm_segment *segment, uint64_t id, uint64_t now_ns);
int fshm_request_begin(fshm_segment *segment, uint32_t deployment, uint64_t now_ns,
                       fshm_request *out);
int fshm_request_end(fshm_segment *segment, fshm_request *request);
/* latency_ns, cost (1e-9): UINT64_MAX = not known. After more than allowed_fails failures in a minute, the
 * deployment is not picked for cooldown_ns. */
void fshm_deployment_record(fshm_segment *segment, uint32_t deployment, uint64_t latency_ns,
                            int success, uint64_t cost, uint32_t allowed_fails,
                            uint64_t cooldown_ns, uint64_t now_ns);
/* fresh: check now which processes are dead; else the last liveness check may be half a second old. */
void fshm_deployment_look(fshm_segment *segment, const uint32_t *deployments, uint32_t count,
                          uint64_t now_ns, int fresh, fshm_deployment_info *out);
/* Pick by a strategy (enum fshm_route): returns an index into the arrays, or -1 if all cool down or are blocked.
 * weights: 0 or more (shuffle). prices: of a token, 1e-9; below 0: unknown (cost). blocked: NULL, or one byte for
 * each. found: room for `count`. */
int64_t fshm_deployment_pick(fshm_segment *segment, uint32_t strategy, const uint32_t *deployments,
                             const double *weights, const double *prices,
                             const unsigned char *blocked, uint32_t count, uint64_t random,
                             fshm_deployment_info *found);

/* [cdef end] */

/* Former names ------------------------------------------------------------------------------ */
/* For programs that were written against them. Fields that have another name now: fshm_limiter_info.counters
 * (tally), fshm_process_info.outage (away), fshm_permit.slot (cell), fshm_permit_info.number and
 * table_slot (slot, cell), fshm_permit_lease.leased and reported (allowance, told), fshm_memo_info.entries (places),
 * fshm_request.incarnation (generation). */
#define FSHM_TALLIES FSHM_COUNTERS
#define fshm_tally fshm_counters
#define fshm_tally_all fshm_counters_all
#define FSHM_DAMAGE_CELL FSHM_DAMAGE_SLOT
#define FSHM_WALLET FSHM_LEASE
#define fshm_live_cells fshm_live_slots
#define fshm_peek_cell fshm_peek_slot
#define fshm_allowance fshm_permit_lease
#define fshm_allowance_admit fshm_permit_lease_admit
#define FSHM_ALLOWANCE_BITS FSHM_PERMIT_LEASE_BITS
#define fshm_allowance_look fshm_permit_lease_look
#define fshm_allowance_lower fshm_permit_lease_lower
#define fshm_allowance_put fshm_permit_lease_put
#define fshm_flight fshm_request
#define fshm_flight_begin fshm_request_begin
#define fshm_flight_end fshm_request_end
#define fshm_lease fshm_token_lease
#define fshm_wallet_look fshm_token_lease_look
#define fshm_wallet_put fshm_token_lease_put
#define fshm_wallet_refuse fshm_token_lease_refuse

#endif
