/* fast_shm.h - rate limits that all processes of a host share, with no server.
 *
 * A segment is one POSIX shared-memory object; limiters are names inside it; every process that
 * opens the same segment and the same limiter name admits from the same limits. All calls are
 * lock-free and safe from any thread and any process. Design and proofs: DESIGN.md.
 *
 * Caveats
 * - Symptom: FSHM_E_LOCK_FILE with EBADF. Cause: the kernel lock that says "this process is alive" was dropped
 *   while it lived: not on Linux; elsewhere, by a program that closed all descriptors, the library's among them.
 *   Cure: open the segment after daemonising. (A fork needs no care: a child joins by itself.)
 * - Symptom: FSHM_E_LOCK_FILE although all went well so far. Cause: somebody deleted the lock file beside
 *   the segment. Cure: stop the workers, `fast-shm rm`, start them. Rates go on being limited until then.
 * - Symptom: limits count apart after `fast-shm rm`. Cause: processes that were attached keep the
 *   removed segment; new ones make a new one. Cure: restart them; fshm_unlinked() tells.
 * - Symptom: FSHM_FULL although old keys could go. Cause: none could: a live key is never
 *   forgotten (I7). Cure: a larger capacity, or shorter periods; or fshm_limiter_share().
 *
 * The text between the two marks is also the cffi cdef: keep it plain declarations.
 */
#ifndef FAST_SHM_H
#define FAST_SHM_H

#include <stddef.h>
#include <stdint.h>

/* [cdef begin] */

#define FSHM_LAYOUT_VERSION 2
#define FSHM_ALIVE_BY_LOCK \
  2     /* in another pid namespace, say: whether it dumps core cannot be seen */
#define FSHM_MAX_LIMITS 4        /* limits of one limiter */
#define FSHM_MAX_NAME 64         /* bytes of a segment name: A-Z a-z 0-9 . _ - */
#define FSHM_MAX_LIMITER_NAME 96 /* bytes of a limiter name */
#define FSHM_NEVER -1 /* a time that never comes. NOLINT: cffi takes no parentheses */

/* What a call answers. Negative: an error, nothing was changed. */
enum fshm_status {
  FSHM_DENIED = 0,
  FSHM_ALLOWED = 1,
  FSHM_OK = 1,
  FSHM_FULL = -1,         /* no free slot among the key's candidates, or none for this limiter */
  FSHM_CONTENDED = -2,    /* gave up after 20,000 lost swaps: somebody scribbles on the segment */
  FSHM_E_ARGUMENT = -10,  /* an argument is out of range */
  FSHM_E_NOT_FOUND = -11, /* no such segment */
  FSHM_E_SPACE = -12,     /* the shared-memory file system is full */
  FSHM_E_PERMISSION = -13,
  FSHM_E_LINK = -14,      /* the name is a symbolic link */
  FSHM_E_KIND = -15,      /* not a regular file */
  FSHM_E_OWNER = -16,     /* belongs to another user */
  FSHM_E_DAMAGED = -17,   /* not a segment of ours, or written over: fshm_damage() */
  FSHM_E_LAYOUT = -18,    /* another layout version or byte order */
  FSHM_E_CAPACITY = -19,  /* exists with another capacity */
  FSHM_E_BOOT = -20,      /* made before the last boot, or in another time namespace */
  FSHM_E_LIMITERS = -21,  /* the table of limiters is full */
  FSHM_E_SYSTEM = -22,    /* another system error: see sys_errno */
  FSHM_E_READ_ONLY = -23, /* the segment was opened for reading */
  FSHM_E_MEMORY = -24,
  FSHM_E_PROCESSES = -25, /* the process table is full: no permit can be owned */
  FSHM_E_LOCK_FILE = -26 /* the file that says who is alive is gone, another, or cannot be opened */
};

enum fshm_kind {
  FSHM_BUCKET = 0,
  FSHM_WINDOW = 1,
  FSHM_SLIDING = 2,
  FSHM_PERMITS = 3, /* at most n in flight; per_ns 0; the last limit of its limiter */
  FSHM_LEASE = 5 /* what was granted to this host, n at most; per_ns 0: see "Token leases" */
};

enum fshm_op {
  FSHM_ACQUIRE = 0, /* charge if every limit has room */
  FSHM_PEEK = 1, /* would it be admitted? charges nothing */
  FSHM_PROBE = 2, /* the same, but a denial is counted as one */
  FSHM_RESERVE = 3, /* charge ahead, at most max_wait_ns (token buckets) */
  FSHM_CHARGE = 4, /* charge, room or not: may go into debt */
  FSHM_REFUND = 5, /* give back */
  FSHM_BLOCK = 6 /* deny for costs[i] ns, or as long as it does already; then one token fits. Token
                  * buckets: other limits stay as they are. FSHM_E_ARGUMENT: all are such */
};
#define FSHM_ASK 2 /* of fshm_spend(): neither yes nor no; who grants must be asked */

enum fshm_open_flag {
  FSHM_OPEN_CREATE = 1, /* make it where there is none */
  FSHM_OPEN_READ_ONLY = 2, /* map for reading, join no process table */
  FSHM_OPEN_OTHER_OWNER = 4, /* accept a segment of another user */
  FSHM_NAMES_HASHED = 8, /* at creation: keep no key names, show keyed hashes */
  FSHM_NAMES_OFF = 16 /* at creation: no key statistics of keys at all */
};

/* What fshm_damage() found; index says which. */
enum fshm_damage_kind {
  FSHM_DAMAGE_NONE = 0,
  FSHM_DAMAGE_SIZE = 1, /* the file was cut or grew; index: its bytes */
  FSHM_DAMAGE_HEADER = 2, /* a word that never changes did; index: its offset */
  FSHM_DAMAGE_LIMITS = 3, /* a limiter's limits are such as nobody sets */
  FSHM_DAMAGE_NAME = 4, /* a limiter's name and its hash differ */
  FSHM_DAMAGE_SLOT = 5 /* a slot holds what nobody writes */
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
  uint16_t limit_index; /* the limit that denied, else the one with least left */
  uint16_t shared; /* 1: decided by a counter that keys without room share */
  uint64_t version; /* of the limiter's limits: differs after a change at run time */
  uint64_t remaining; /* tokens that would be admitted now */
  int64_t retry_after_ns; /* 0 when allowed; FSHM_NEVER: this cost never fits */
  int64_t reset_after_ns; /* until nothing is consumed any more */
} fshm_decision;

/* A charge of one limit, for giving it back later: the state that it wrote, its rule's numbers, when, and the version of
 * the limits (0: not known). */
typedef struct {
  uint64_t state, num, den, at, version;
} fshm_charged;

typedef struct {
  int32_t code; /* enum fshm_status */
  int32_t sys_errno;
  uint64_t found; /* what the segment has (capacity, version, uid, time namespace),
                   * or the file system (bytes free) */
  uint64_t wanted; /* what was asked for, or is needed */
  char path[256];
} fshm_error;

/* Where things lie, for readers of the raw mapping (see layout.h for the structs). The second name in a union is a former
 * one. */
/* clang-format off */
typedef struct {
  const void *base;
  uint64_t size, capacity;
  union { uint64_t slots, cells; };
  uint64_t created_realtime_ns, time_ns, instance;
  union { uint64_t slots_offset, cells_offset; };
  union { uint64_t key_stats_offset, ledger_offset; };
  uint64_t limiters_offset, processes_offset;
  union { uint64_t process_stats_offset, columns_offset; };
  uint32_t limiters, processes;
  union { uint32_t process_stats_entries, column_entries; };
  uint32_t layout_version, names, read_only;
} fshm_geometry;
/* clang-format on */

typedef struct {
  char name[128];
  uint32_t name_length, limits_count;
  uint64_t version, resets, id;
  fshm_limit limits[4];
  uint32_t counters; /* which of fshm_counters_all() its calls count in; FSHM_COUNTERS: none */
  uint64_t shared_ns; /* for how long counters that keys without room share may be in use yet */
} fshm_limiter_info;

typedef struct {
  uint32_t pid, alive; /* 0, 1, or FSHM_ALIVE_BY_LOCK: until the kernel drops its lock */
  uint64_t attached_ns, admitted, denied, refused_full;
  uint32_t outage; /* as fshm_process_note() was told */
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
/* Can it be told who is alive, and can processes join? FSHM_OK; FSHM_E_NOT_FOUND: the segment was
 * removed; FSHM_E_LOCK_FILE: error has the lock file's path, and in sys_errno ENOENT (it was deleted),
 * ESTALE (another lies there), EBADF (this process lost its lock, and others may have taken what it held), or why
 * it cannot be opened or locked. */
int fshm_liveness(fshm_segment *segment, fshm_error *error);
void fshm_describe(fshm_segment *segment, fshm_geometry *out);
uint64_t fshm_now(fshm_segment *segment);
/* 128 bits that nobody can tell who cannot read the segment: a hash of `data` under a secret of the segment. */
void fshm_keyed_hash(fshm_segment *segment, const void *data, uint64_t length, uint64_t out[2]);
/* What was first found damaged in this segment, by any process: enum fshm_damage_kind. It stays so until
 * the segment is removed. Looks at the file's size and the header; fshm_check() looks at all limiters
 * and slots. Damage is only told where it is certain: not all of it can be told. */
int fshm_damage(fshm_segment *segment, uint64_t *index);
int fshm_check(fshm_segment *segment, uint64_t *index);

/* Limiter ----------------------------------------------------------------------------------- */
int fshm_limit_check(const fshm_limit *limit, uint64_t *largest_n);
int fshm_limiter_open(fshm_segment *segment, const char *name, uint64_t name_length,
                      const fshm_limit *limits, uint32_t count, fshm_limiter **out);
/* The same as of a given segment time: where states of earlier limits have to be brought under the present ones. */
int fshm_limiter_open_at(fshm_segment *segment, const char *name, uint64_t name_length,
                         const fshm_limit *limits, uint32_t count, uint64_t now_ns,
                         fshm_limiter **out);
/* The same, for a limiter that is there for another one's sake: its calls count in no counters. Whoever opens a name
 * first decides that. */
int fshm_limiter_open_beside(fshm_segment *segment, const char *name, uint64_t name_length,
                             const fshm_limit *limits, uint32_t count, fshm_limiter **out);
/* A limiter that exists, with the limits it has. FSHM_E_NOT_FOUND where it does not. */
int fshm_limiter_find(fshm_segment *segment, const char *name, uint64_t name_length,
                      fshm_limiter **out);
void fshm_limiter_close(fshm_limiter *limiter);
/* share: from now on calls by this handle charge a key that finds no room to one of 8 counters, under the same limits, instead
 * of answering FSHM_FULL: so it is never admitted more often than its limits say, but together with others. Not those of
 * token leases, permits, blocks, and limits that come with the call. Nothing is given back to such a counter. */
void fshm_limiter_share(fshm_limiter *limiter, int share);
int fshm_limiter_limits(fshm_limiter *limiter, fshm_limit *out, uint64_t *version);
/* Arrays with one value for each limit (costs, reserved, remaining, charged, actual) have room for
 * FSHM_MAX_LIMITS: another process may set more limits at any time.
 * costs: NULL for 1 each. now_ns: segment time, 0 = ask the clock. */
void fshm_apply(fshm_limiter *limiter, uint32_t op, const void *key, uint64_t key_length,
                const uint64_t *costs, uint64_t max_wait_ns, uint64_t now_ns, fshm_decision *out);
/* FSHM_ACQUIRE of cost 1, for callers that want no more than the status. */
int fshm_is_allowed(fshm_limiter *limiter, const void *key, uint64_t key_length);
/* FSHM_RESERVE that can be cancelled: reserved[i] tells the reservation of limit i apart. */
void fshm_reserve(fshm_limiter *limiter, const void *key, uint64_t key_length,
                  const uint64_t *costs, uint64_t max_wait_ns, uint64_t now_ns, fshm_decision *out,
                  fshm_charged *reserved);
/* Give a reservation back, in those limits where nobody has reserved after it; elsewhere its instant
 * passes unused. Returns in how many. */
int fshm_cancel(fshm_limiter *limiter, const void *key, uint64_t key_length, const uint64_t *costs,
                const fshm_charged *reserved, uint64_t now_ns);
/* What each limit still admits of this key now: remaining[i], one for each limit. Returns how many, or
 * FSHM_E_DAMAGED. */
int fshm_remaining(fshm_limiter *limiter, const void *key, uint64_t key_length, uint64_t now_ns,
                   uint64_t *remaining);
int fshm_reset_key(fshm_limiter *limiter, const void *key, uint64_t key_length);
int fshm_reset_all(fshm_limiter *limiter);

/* Numbers that come with the handle: this handle's keys have these n, one for each limit of the name, which must be
 * windows, or permits, of at least as many. Any number of different limits is one name in the segment so. A key must
 * keep to its numbers: have them in it. Heeded by fshm_admit(), fshm_settle(), fshm_remaining() and fshm_in_flight();
 * all else goes by the name's. Once, before the handle is used. FSHM_OK or FSHM_E_ARGUMENT. */
int fshm_limiter_number(fshm_limiter *limiter, const uint64_t *numbers, uint32_t count);

/* Limits that come with the call ----------------------------------------------------------- */
/* For storages of other libraries, whose keys bring their limits along and are asked about without them.
 * The limiter is only a name; its first limit's kind must be that of `limit`. */
typedef struct {
  int32_t status; /* enum fshm_status */
  int32_t unused;
  uint64_t count; /* tokens in the present window, after the call */
  uint64_t previous; /* sliding: tokens in the window before */
  int64_t left_ns; /* until the present window is over; moving: until its oldest hit has left it */
} fshm_counted;
/* Charge cost where it stays within limit->n, else nothing. cost 0: only look, which tells the count and
 * the end of a FSHM_WINDOW whatever limit it was counted under.
 * FSHM_WINDOW: begins at the first hit, and lasts up to 4 * count ns longer than the per_ns of that hit.
 * FSHM_SLIDING: windows begin at multiples of per_ns of the wall clock, as it was when the segment was
 * made; previous * left_ns / per_ns is rounded down. */
void fshm_count(fshm_limiter *limiter, const void *key, uint64_t key_length,
                const fshm_limit *limit, uint64_t cost, uint64_t now_ns, fshm_counted *out);
#define FSHM_MAX_MOVING 1048576 /* n of a moving window */
/* Moving window: at most n tokens in any interval of per_ns, and denied only where they are in it. A token
 * takes a slot. limit: FSHM_WINDOW, n up to FSHM_MAX_MOVING; a key keeps to one. cost 0: only look;
 * count and left_ns are told then only. FSHM_E_MEMORY: of cost > 32. */
void fshm_moving(fshm_limiter *limiter, const void *key, uint64_t key_length,
                 const fshm_limit *limit, uint64_t cost, uint64_t now_ns, fshm_counted *out);
int fshm_moving_clear(fshm_limiter *limiter, const void *key, uint64_t key_length);
/* Token leases: quota that somebody else grants in batches ---------------------------------------- */
/* For limits over many hosts. The grantor (a server) charges a batch to the limit; the host puts it into the
 * key's token lease, and its processes spend it, until the lease is over. A limiter of FSHM_LEASE limits, one for
 * each limit; its slots hold how many tokens are left until when, and nothing ever spends more. */
/* What lease is put, by fshm_token_lease_put(): one for each limit. */
typedef struct {
  uint64_t tokens;
  /* Of what is left, up to this much may be spent until the new end too: the grantor has dated it anew.
   * Where more is left, all ends as before. */
  uint64_t kept;
  uint64_t until_ns; /* segment time */
} fshm_token_lease;
/* Charge the token lease; where it has too little: denied, if `refused` (a limiter of token leases too, NULL: none)
 * remembers that as much was refused of late, else FSHM_ASK. `limits`: the limiter that has the limits; its
 * slots are what this host knows of the grantor's meter (fshm_learn); *out is told from it, and *out counts
 * what the token lease has left on top. *low: this call brought the token lease below a quarter to a half of its batch,
 * and no other call is told so. out NULL: only the status is wanted. */
int fshm_spend(fshm_limiter *leases, fshm_limiter *refused, fshm_limiter *limits, const void *key,
               uint64_t key_length, const uint64_t *costs, uint64_t now_ns, fshm_decision *out,
               uint32_t *low);
/* Add a batch; a token lease has room for 2^24 - 2 tokens, what is beyond is lost. FSHM_OK, or an error: lost. */
int fshm_token_lease_put(fshm_limiter *leases, const void *key, uint64_t key_length,
                         const fshm_token_lease *batches, uint64_t now_ns);
/* What is left, and for how long. take: and take it out, to give it back. */
int fshm_token_lease_look(fshm_limiter *leases, const void *key, uint64_t key_length, int take,
                          uint64_t now_ns, uint64_t *left, uint64_t *left_ns);
/* Remember for ns that these costs were refused: they, and larger ones, are denied until then. ns 0: forget. */
int fshm_token_lease_refuse(fshm_limiter *refused, const void *key, uint64_t key_length,
                            const uint64_t *costs, uint64_t ns, uint64_t now_ns);
/* Set the meters of a key to what the grantor has told: for each limit, tokens used, and ns that its window
 * has left (FSHM_WINDOW, FSHM_SLIDING), or ns that its arrival time is ahead (FSHM_BUCKET). */
int fshm_learn(fshm_limiter *limits, const void *key, uint64_t key_length, const uint64_t *used,
               const uint64_t *left_ns, uint64_t now_ns);
/* What fshm_learn() has told of this key, as of now. */
int fshm_known(fshm_limiter *limits, const void *key, uint64_t key_length, uint64_t now_ns,
               uint64_t *used, uint64_t *left_ns);
/* The process that speaks for the host. 1: this one does, until it dies; 0: another does; or
 * FSHM_E_LOCK_FILE. wait: blocks until it is this one's turn, which comes within half a second when the one
 * before dies. */
int fshm_lead(fshm_segment *segment, int wait);
int fshm_lead_end(fshm_segment *segment);
uint32_t fshm_leader(fshm_segment *segment); /* its pid; 0: nobody */

/* Keys of the limiter that have consumed something, as far as the key statistics knows them (not with
 * FSHM_NAMES_OFF). */
uint64_t fshm_live_keys(fshm_limiter *limiter, uint64_t now_ns);

/* Permits: at most n in flight -------------------------------------------------------------- */
/* A permit held by this process. Copy it freely; release it once. */
typedef struct {
  uint64_t slot, who, when;
  uint32_t wakeup, held;
  fshm_charged put[4]; /* for each other limit, what was charged */
} fshm_permit;

typedef struct {
  uint32_t limiter, pid, alive, idle, number;
  uint64_t age_seconds;
  uint64_t key_hash; /* the same for all permits of a key */
  uint64_t table_slot;
} fshm_permit_info;

/* Take a permit and charge every other limit of the limiter, or do nothing. *in_flight: permits of
 * the key that were seen held, when there was none to take. */
void fshm_admit(fshm_limiter *limiter, const void *key, uint64_t key_length, const uint64_t *costs,
                uint64_t now_ns, fshm_permit *permit, fshm_decision *out, uint32_t *in_flight);
/* Count a call that somebody else has decided: as admitted (FSHM_ALLOWED), denied, or refused (less than 0). */
void fshm_count_call(fshm_limiter *limiter, const void *key, uint64_t key_length, int32_t status);
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
uint32_t fshm_wakeup_arm(fshm_limiter *limiter, const void *key, uint64_t key_length);
int fshm_wakeup_wait(fshm_limiter *limiter, const void *key, uint64_t key_length, uint32_t armed,
                     uint64_t timeout_ns);
void fshm_wakeup_send(fshm_limiter *limiter, const void *key, uint64_t key_length);
/* The permit in a slot: 1, or 0 where there is none. */
int fshm_permit_at(fshm_segment *segment, uint64_t slot, fshm_permit_info *out);
/* All of them, the first `room` into out. Returns how many there are. */
uint64_t fshm_permits(fshm_segment *segment, fshm_permit_info *out, uint64_t room);
/* Give back the permits of dead processes (pid 0), or all of one process. Returns how many. */
uint64_t fshm_reap(fshm_segment *segment, uint32_t pid);
uint64_t fshm_unique(fshm_segment *segment); /* a number that no other call gets */

/* Permit leases: permits that somebody else grants to this host ------------------------------------ */
/* For limits over many hosts. The grantor (a server) allows this host's processes to hold so many permits of a
 * key together, until an end. A limiter of one FSHM_LEASE limit has them: a slot for each key. */
#define FSHM_PERMIT_LEASE_BITS 18 /* of a word: what is below its end, in units of 2^18 ns */
typedef struct {
  uint64_t word; /* as it was read; what fshm_permit_lease_put() must find */
  uint64_t leased; /* 0 where it is over */
  uint64_t held; /* permits of the key, by living processes; where told is asked for */
  uint64_t
      reported; /* what the grantor must count this host with: the permit lease, or what is held if more */
  uint64_t left_ns; /* until its end */
  uint64_t now_ns; /* segment time after the word was read */
} fshm_permit_lease;
/* The key's permit lease, and what is held. open: where there is no word yet, begin with one that allows nothing,
 * so that there is one to be told. FSHM_OK, or an error. */
int fshm_permit_lease_look(fshm_limiter *permits, fshm_limiter *leases, const void *key,
                           uint64_t key_length, int open, uint64_t now_ns, fshm_permit_lease *out);
/* Allow at most `to` from now on. What is held beyond stays held, and is told. */
int fshm_permit_lease_lower(fshm_limiter *permits, fshm_limiter *leases, const void *key,
                            uint64_t key_length, uint64_t to, uint64_t now_ns,
                            fshm_permit_lease *out);
/* What the grantor has answered to `word`. until_ns: segment time; it may be rounded up by a second. FSHM_OK; 0:
 * the word is another by now, so the answer is nobody's. */
int fshm_permit_lease_put(fshm_limiter *permits, fshm_limiter *leases, const void *key,
                          uint64_t key_length, uint64_t word, uint64_t leased, uint64_t until_ns,
                          uint64_t now_ns);
/* Take a permit within the permit lease. FSHM_ASK: there is none, the grantor must be asked; FSHM_DENIED: `refused`
 * (as fshm_token_lease_refuse() has it, cost 1) remembers that it was, of late. alone: without the grantor, whatever
 * was allowed: at most so many held on this host (0: within the permit lease). */
int fshm_permit_lease_admit(fshm_limiter *permits, fshm_limiter *leases, fshm_limiter *refused,
                            const void *key, uint64_t key_length, uint32_t alone, uint64_t now_ns,
                            fshm_permit *permit, fshm_decision *out, uint32_t *in_flight);

/* Looking in -------------------------------------------------------------------------------- */
/* FSHM_OK; 0: no limiter there; or FSHM_E_DAMAGED. */
int fshm_limiter_at(fshm_segment *segment, uint32_t index, fshm_limiter_info *out);
int fshm_process_at(fshm_segment *segment, uint32_t index, fshm_process_info *out);
/* What others are shown of this process as long as it lives: whatever the caller makes of it; 0 at first, and
 * again in a child. Nothing, where the process table is full. */
void fshm_process_note(fshm_segment *segment, uint32_t outage);
uint64_t fshm_live_slots(fshm_segment *segment, uint8_t *live, uint64_t now_ns);
/* Cells in use; and of each limiter (an array for all: fshm_geometry.limiters), how many keys have consumed
 * something: 0 with FSHM_NAMES_OFF. */
uint64_t fshm_used(const fshm_segment *segment, uint64_t now_ns, uint64_t *keys);
int fshm_key_name(fshm_segment *segment, uint64_t slot, char *out, uint64_t size, uint64_t *length);
int fshm_peek_slot(fshm_segment *segment, uint64_t slot, uint64_t now_ns, fshm_decision *out);
/* The same of a key that was asked for with these numbers (fshm_limiter_number): four, 0 = the name's. */
int fshm_peek_numbered(fshm_segment *segment, uint64_t slot, const uint64_t *numbers,
                       uint64_t now_ns, fshm_decision *out);
/* The same of a key whose limit came with its calls. moving: the slot is that of a moving window's key, and
 * up to limit->n others are looked at. FSHM_OK; 0: not a slot that the key statistics knows, of a limiter of this
 * kind; or FSHM_E_ARGUMENT. */
int fshm_peek_counted(fshm_segment *segment, uint64_t slot, const fshm_limit *limit, int moving,
                      uint64_t now_ns, fshm_decision *out);

/* Counters: calls of each limiter, by all processes that ever were. They never fall ----------- */
#define FSHM_COUNTERS 16 /* the first 15 limiters have one each, all others share the last */
typedef struct {
  uint64_t admitted;
  uint64_t denied; /* refused ones among them */
  uint64_t refused; /* met a full table */
  uint64_t shared; /* decided by a counter that keys without room share: admitted or denied */
} fshm_counters;
void fshm_counters_all(const fshm_segment *segment, fshm_counters *out); /* FSHM_COUNTERS of them */

/* Memo: token counts of texts, a cache ----------------------------------------------------- */
typedef struct {
  uint64_t entries, texts, hits, misses;
} fshm_memo_info;
uint64_t fshm_memo_encoding(fshm_segment *segment, const char *name, uint64_t length);
/* The same encoding, for the calls below, with counts that this tenant alone finds. */
uint64_t fshm_memo_tenant(fshm_segment *segment, uint64_t encoding, const void *tenant,
                          uint64_t length);
/* The count, or -1 where it is not known. */
int64_t fshm_memo_get(fshm_segment *segment, uint64_t encoding, const void *text, uint64_t length);
/* Counts from 2^24 on are not kept. */
void fshm_memo_put(fshm_segment *segment, uint64_t encoding, const void *text, uint64_t length,
                   uint64_t count);
/* The same in two steps, for who asks first and keeps then: the text is hashed once. */
void fshm_memo_hash(fshm_segment *segment, uint64_t encoding, const void *text, uint64_t length,
                    uint64_t hash[2]);
int64_t fshm_memo_known(fshm_segment *segment, const uint64_t hash[2]);
void fshm_memo_keep(fshm_segment *segment, const uint64_t hash[2], uint64_t count);
void fshm_memo_count(fshm_segment *segment, uint64_t hits, uint64_t misses);
void fshm_memo_at(fshm_segment *segment, fshm_memo_info *out);

/* Metrics: how long things took, over all processes ---------------------------------------- */
typedef struct {
  char name[104]; /* component, a zero, operation; cut where they are longer */
  uint32_t name_length, component_length;
  uint64_t calls, errors, sum_ns, least_ns, most_ns, size_in, size_out;
  double p50_ns, p95_ns, p99_ns; /* within 5 %, from 64 ns to 1,100 s */
} fshm_metric_info;
/* The number of a metric. The last one, "(other)", where the table is full. */
int fshm_metric_open(fshm_segment *segment, const char *component, uint64_t component_length,
                     const char *operation, uint64_t operation_length);
/* weight: the calls that this one stands for, where only some are measured. */
void fshm_metric_record(fshm_segment *segment, uint32_t metric, uint64_t ns, uint64_t weight,
                        int success, uint64_t size_in, uint64_t size_out);
/* FSHM_OK, or 0: no such metric yet; FSHM_E_ARGUMENT: there can be no more. */
int fshm_metric_at(fshm_segment *segment, uint32_t metric, fshm_metric_info *out);
/* Several metrics as if they were one: quantiles too. The names in *out are left as they are. */
void fshm_metric_sum(fshm_segment *segment, const uint32_t *metrics, uint32_t count,
                     fshm_metric_info *out);
#define FSHM_OCTAVES 34
/* Calls by duration: calls[i] took less than 128 ns * 2^i, and as long as that of i - 1 or longer; the last
 * has all that took longer. They never fall. */
void fshm_metric_octaves(fshm_segment *segment, const uint32_t *metrics, uint32_t count,
                         uint64_t *calls);

/* Features: errors since the last reset, over all processes; 8 numbers --------------------- */
uint64_t fshm_feature_error(fshm_segment *segment, uint32_t feature); /* how many there are now */
uint64_t fshm_feature_errors(fshm_segment *segment, uint32_t feature);
void fshm_feature_reset(fshm_segment *segment, uint32_t feature);
const uint64_t *fshm_feature_words(fshm_segment *segment); /* the 8 numbers, to be read only */

/* Deployments: what routers share ---------------------------------------------------------- */
enum fshm_route {
  FSHM_ROUTE_SHUFFLE = 0,
  FSHM_ROUTE_LEAST_BUSY = 1,
  FSHM_ROUTE_LATENCY = 2,
  FSHM_ROUTE_COST = 3
};
typedef struct {
  uint64_t id;
  uint64_t in_flight, records;
  uint64_t latency_ns; /* decaying mean of successes; UINT64_MAX: none yet */
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
/* Its place, 0..255; FSHM_FULL where all its places were taken by others just now. */
int fshm_deployment_open(fshm_segment *segment, uint64_t id, uint64_t now_ns);
int fshm_request_begin(fshm_segment *segment, uint32_t deployment, uint64_t now_ns,
                       fshm_request *out);
int fshm_request_end(fshm_segment *segment, fshm_request *request);
/* latency_ns, cost (1e-9): UINT64_MAX = not known. More than allowed_fails failures in a minute: it is
   not picked for cooldown_ns. */
void fshm_deployment_record(fshm_segment *segment, uint32_t deployment, uint64_t latency_ns,
                            int success, uint64_t cost, uint32_t allowed_fails,
                            uint64_t cooldown_ns, uint64_t now_ns);
/* fresh: ask now which processes are dead; else that may have been half a second ago. */
void fshm_deployment_look(fshm_segment *segment, const uint32_t *deployments, uint32_t count,
                          uint64_t now_ns, int fresh, fshm_deployment_info *out);
/* Picks by a strategy (enum fshm_route): an index into the arrays, or -1 where all cool down or are
   blocked. weights: 0 or more (shuffle). prices: of a token, 1e-9; below 0: unknown (cost). blocked: NULL
   or one byte each. found: room for `count`. */
int64_t fshm_deployment_pick(fshm_segment *segment, uint32_t strategy, const uint32_t *deployments,
                             const double *weights, const double *prices,
                             const unsigned char *blocked, uint32_t count, uint64_t random,
                             fshm_deployment_info *found);

int fshm_py_install(void *module);

/* [cdef end] */

/* Former names ------------------------------------------------------------------------------ */
/* For programs that were written against them. Fields that have another name now: fshm_limiter_info.counters (tally),
 * fshm_process_info.outage (away), fshm_permit.slot and wakeup (cell, bell), fshm_permit_info.number and table_slot (slot,
 * cell), fshm_permit_lease.leased and reported (allowance, told), fshm_memo_info.entries (places), fshm_request.incarnation
 * (generation). */
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
#define fshm_bell_arm fshm_wakeup_arm
#define fshm_bell_ring fshm_wakeup_send
#define fshm_bell_wait fshm_wakeup_wait

#endif
