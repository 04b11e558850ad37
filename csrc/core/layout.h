/* layout.h - every struct in the segment. There are no pointers; every index read from here is masked or checked
 * before use. All words are native-endian; the header says which byte order.
 *
 * For each field: unit; who writes it; memory order; its value after a crash.
 */
#ifndef FSHM_LAYOUT_H
#define FSHM_LAYOUT_H

#include <assert.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "../fast_shm.h"
#include "../limits/algorithms.h"

#define FSHM_MAGIC UINT64_C(0x314d48534c4c4146) /* "FALLSHM1" read as little-endian bytes */
#define FSHM_BYTE_ORDER UINT32_C(0x01020304)
#define LINE 64
#define SLOTS_PER_LINE 4
#define PROBE_LINES UINT64_C(8) /* a key may live in two probe windows of so many cache lines */
/* Process table. Of each process index there are 5,824 bytes, in five arrays at the end of the segment. Those of the
 * first HOME_PROCESSES are allocated with it, the others in blocks, when a process takes an index there. */
#ifndef PROCESSES /* tests that copy segments, or fill the table, have fewer */
#define PROCESSES 4096
#define HOME_PROCESSES 64
#endif
#define INCARNATION_BITS 14 /* of the owner of a permit */
#define RESERVED 128 /* keys of budgets that a process has reservations of: a power of two */
#define RESERVED_WAYS 4 /* entries where a key can be: one line */
#define PROCESS_STATS 128 /* entries of one process: a power of two */
#define COUNTERS FSHM_COUNTERS /* sets of call counters of a process index, in each lane */
#define COUNTER_LANES 2 /* of a process index: counters.h. A power of two */
/* Rules that a limiter can keep: the present ones, and those that states in the table use. */
#define RULES 16
#define MAX_LIMITERS 2048 /* 11 bits of key_stats_t.meta */
#define SHARED 8 /* shared counters of a limiter, for keys without a slot: a power of two */
#define SHARED_PLACES 8 /* slots of a shared counter: one for each place of a rule */
#ifndef WAITERS /* tests that copy segments have fewer */
#define WAITERS 4096 /* places of callers that wait, over all keys: a power of two */
#define WAIT_GROUPS 256 /* where the places of a key begin */
#endif
#define CHANGE_WORDS 512 /* pairs of words that say which permits were freed and taken */
#define MEMO_WAYS 4 /* entries where a text can be in the memo: one line */
#define METRICS 32 /* (component, operation) pairs that are measured */
#ifndef METRIC_SHARDS /* the crash harness has one, so that any two processes meet in it */
#define METRIC_SHARDS 4 /* of a metric's sums; processes spread over them. A power of two */
#endif
#define METRIC_NAME 104 /* bytes of "component\0operation" that are kept */
#define DURATIONS 238 /* buckets of a histogram: histogram.h */
#define FEATURES 8 /* words of errors, for features.py to name */
#define DEPLOYMENTS 256 /* deployments whose statistics routers share */
#define MIN_CAPACITY 1
#define MAX_CAPACITY (UINT64_C(1) << 31)
#define DEFAULT_CAPACITY UINT64_C(200000)

/* A slot of the hash table: the state of one key's limit. Any process swaps it whole, by a 16-byte compare-and-swap:
 * a crash leaves the old value or the new one. (0, 0) is empty; algorithms.h describes `when`, internal.h `who`. */
typedef struct {
  _Alignas(16) _Atomic uint64_t who;
  _Atomic uint64_t when;
} slot_t;

/* After the slots of keys lie the slots of the limiters' shared counters: SHARED * SHARED_PLACES for each limiter,
 * in order. They have no key statistics. Their `who`:
 *
 *   writes (48) | resets of the limiter, the lowest 8 bits | label (4) | epoch (3) | 1
 *
 * Each write adds one, so no pair ever comes back. */

/* Statistics of the key in the slot of the same index, for people. Relaxed and lossy; no decision reads them. */
typedef struct {
  /* owner tag: permit or state (1 bit), limiter index (11), fingerprint (20) */
  _Atomic uint32_t meta;
  _Atomic uint32_t admitted; /* calls, saturating; written when a process flushes its entry */
  _Atomic uint32_t denied;
  _Atomic uint32_t name; /* low 32 bits of the position in the ring buffer of names, in words */
} key_stats_t;

/* A process's own counts of one key. Only its threads write them (relaxed), so counting never contends. */
typedef struct {
  _Atomic uint64_t key; /* (slot + 1) << 32 | meta; 0 = unused */
  _Atomic uint32_t admitted;
  _Atomic uint32_t denied;
} process_stat_t;

typedef struct {
  process_stat_t entries[PROCESS_STATS];
} process_stats_t;

/* Call counters of one limiter and one lane of a process index, for all its owners, one after the other. Each call is one
 * relaxed add. No counter is ever lowered, moved or summed up elsewhere, so no reader sees a sum fall. A crash
 * leaves the call counted or not. */
typedef struct {
  _Atomic uint64_t admitted;
  _Atomic uint64_t denied; /* includes refused */
  _Atomic uint64_t refused; /* the table was full */
  _Atomic uint64_t shared; /* admitted or denied by a shared counter */
} limiter_counters_t;

/* The first COUNTERS - 1 limiters that are counted have one set each, all others the last one (limits.c: counters_of).
 * One more stands before them: for all processes without a process index. */
typedef struct {
  _Alignas(LINE) limiter_counters_t of[COUNTER_LANES][COUNTERS];
} counters_t;

/* A text that was counted: `who` = half of its 128-bit keyed hash, `when` = 40 bits of the other half |
 * count (24). Swapped whole: token_memo.c. A crash leaves the old entry or the new one. */
typedef slot_t memo_t;

/* A metric. Entries are claimed in order and never given back: histogram.c. */
typedef struct {
  _Atomic uint64_t id; /* keyed hash of the names; 0 = free; one compare-and-swap */
  _Atomic uint32_t name_length; /* bytes of both and the zero between; 0 = not written yet */
  _Atomic uint32_t component_length;
  _Atomic unsigned char name[METRIC_NAME]; /* written by any process: always the same bytes */
} metric_t;

/* The sums of one metric in one shard. Any process adds to them, relaxed. A crash may leave a record out, or half in
 * (counted, but not in the sum). */
typedef struct {
  _Alignas(LINE) _Atomic uint64_t errors; /* calls */
  _Atomic uint64_t sum; /* ns */
  _Atomic uint64_t least; /* ~ns, so that 0 = none yet; only rises */
  _Atomic uint64_t most; /* ns; only rises */
  _Atomic uint64_t sizes[2]; /* bytes or tokens in and out, as the caller counts them */
  _Atomic uint64_t buckets[DURATIONS]; /* calls, by duration: histogram.h */
} histogram_t;

/* Statistics of a deployment: deployments.c. Each word has a compare-and-swap of its own. */
typedef struct {
  _Alignas(LINE) _Atomic uint64_t id; /* keyed hash of its name; 0 = free */
  _Atomic uint64_t latency; /* decaying mean, in units of 64 ns (44 bits) | records (20) */
  _Atomic uint64_t success; /* decaying rate in units of 2^-32 (32) | records (32) */
  _Atomic uint64_t cost; /* decaying mean in units of 1e-9 (44) | records (20) */
  _Atomic uint64_t failures; /* minute of segment time (40) | failures in it (24) */
  _Atomic uint64_t cooldown; /* ends then, segment ns; 0 = none */
  _Atomic uint64_t used; /* segment ns of the last record or start of a request */
} deployment_t;

/* One process's requests in flight, by deployment. Only its threads write them. They count only while `incarnation`
 * is that of the process index and its owner lives, so all requests of a dead process vanish at once. */
typedef struct {
  _Alignas(LINE) _Atomic uint64_t incarnation;
  _Atomic uint16_t in_flight[DEPLOYMENTS];
} requests_t;

/* What a process has reserved of one key of a budget: `who` says which (money.c; 0 = free), `when` how many nano-dollars.
 * Swapped whole. */
typedef slot_t reserved_t;
/* Of one process; only its threads write them. They count only while `incarnation` is that of the process index and its
 * owner lives, so all reservations of a dead process vanish at once. */
typedef struct {
  _Alignas(LINE) _Atomic uint64_t incarnation;
  _Alignas(LINE) reserved_t of[RESERVED];
} reservations_t;

/* Process index i belongs to the process that holds byte lock i of the lock file. The kernel drops the lock when the
 * process dies; the fields below then describe a dead process until another one takes the index. */
typedef struct {
  /* 0 = never used. The owner sets it to 0 before it raises `incarnation`, and writes it (release) after `born`: a
   * reader that finds it set (acquire) and `incarnation` unchanged has the pid of that incarnation. */
  _Alignas(LINE) _Atomic uint32_t pid;
  _Atomic uint32_t outage; /* fshm_process_note(). The owner writes it, relaxed */
  _Atomic uint64_t attached; /* segment time, ns */
  /* The sums of the index's counters when its owner joined; the rest of the sums are the owner's calls. The owner
   * writes them, relaxed. Killed in between, a dead process shows too many calls. */
  _Atomic uint64_t before[3]; /* admitted, denied, refused */
  /* Counts the owners of the index. A permit of an earlier incarnation belongs to a dead process. The owner adds 1
   * once it has the lock (release); readers acquire. A crash leaves it as it is. */
  _Atomic uint64_t incarnation;
  /* An incarnation whose owner is known to be dead. Any process that asked the kernel writes it (deployments.c). */
  _Atomic uint64_t dead;
  /* The inode of the pid namespace (32 bits) | start of the process, in ticks since boot (32). 0 = not known. The
   * owner writes it, before pid. */
  _Atomic uint64_t born;
} process_t;

/* A place of callers of one process that wait for a key: wait_queue.c. Only its owner writes it, but for `wake` and
 * `asked`. After
 * a crash: it is not written any more, and soon does not count. */
typedef struct {
  /* 0 = free. A number that no other owner has had; taken and freed by compare-and-swap. */
  _Alignas(LINE) _Atomic uint64_t owner;
  _Atomic uint64_t published; /* the owner that has written the fields below (release) */
  _Atomic uint64_t key; /* wait_queue.h: wait_key() */
  _Atomic uint64_t tenant; /* hash of its name; 0 = none */
  _Atomic uint64_t since; /* segment ns: when its first caller came */
  _Atomic uint64_t seen; /* segment ns: when its owner wrote it last */
  _Atomic uint32_t wake; /* wake-ups: a futex word. Any process adds 1 */
  _Atomic uint32_t callers; /* that wait in it */
  _Atomic uint16_t process; /* index + 1 */
  _Atomic uint8_t polled; /* an event loop waits, not a thread */
  _Atomic int8_t priority;
  /* 1: its caller asks other processes to close an idle connection. The owner sets it; who closes one clears it. */
  _Atomic uint32_t asked;
} waiter_t;

/* The limits of a name are rules (rule_t, as relaxed words), each at an index of its limiter's table. Only the
 * process that owns a rule index writes the rule, before `set` names it. The rule does not change while a state may
 * refer to it: the state of a key has the rule index (its label) of the rule that it was written under. */
#define RULE_WORDS 8
#define RULE_END 6 /* the word of a rule of money that says when its window ends: rule_t.unit */
/* Owners of rule indexes. 0: free. RULE_USED | version: in use, and last named in that version of the limits. Else
 * the owner: incarnation << 16 | process index + 1. */
#define RULE_USED (UINT64_C(1) << 63)

/* A limiter's name and limits. Entries are claimed in order and never given back. */
typedef struct {
  /* keyed hash of the name; lowest bit: the calls are not counted; 0 = free; one compare-and-swap */
  _Alignas(LINE) _Atomic uint64_t id;
  /* changes (47 bits) | permits (17): permits below this number may be held. Raised before limits are published. Each
   * publication adds 1 to the changes, so that two words with the same number differ. */
  _Atomic uint64_t most;
  /* The limits: two words, changed together by one 16-byte compare-and-swap (release). Each change of `set` also
   * changes the version, so a reader of current (acquire), set, and the same current again has read one pair.
   * current: version (37 bits; 0 = no limits published yet) | epoch (3) | resets (20). set: count (4 bits) | index
   * of each rule (4 bits each), in the caller's order. */
  _Alignas(16) _Atomic uint64_t current;
  _Atomic uint64_t set;
  _Atomic uint32_t name_length; /* bytes; written by any process: always the same value */
  _Atomic uint32_t overrides; /* changes of its overrides: one add after each */
  _Atomic unsigned char name[104];
  _Atomic uint64_t owners[RULES];
  /* Of the rules that sweeps have freed: the fastest pace of a bucket (1024ths of a ns for a token; 0 = none), only
   * lowered; and the version of the last sweep that freed one, only raised. Both are written before the rule index
   * is free (release). */
  _Atomic uint64_t freed_pace, freed_version;
  /* Segment ns: until then, shared counters may be in use (shared_counters.c: put_shared). Only raised, relaxed,
   * before one is charged. After a crash: at worst too late. */
  _Atomic uint64_t shared;
  _Alignas(LINE) _Atomic uint64_t rules[RULES][RULE_WORDS];
} limiter_entry_t;

/* A limit of a plan or an override, which states and overrides name by its index. Entries are claimed in order, and never
 * change or go. plans.c */
typedef struct {
  _Atomic uint64_t id; /* keyed hash of the limit; 0 = free; one compare-and-swap */
  /* Written by any process that uses the entry, relaxed, before it writes a slot that names it: always the same values. */
  _Atomic uint64_t n;
  _Atomic uint64_t per; /* ns (56 bits) | strict (8) */
  _Atomic uint64_t burst; /* (56 bits) | kind (8) */
} limit_record_t;
#define RECORD_BITS 17
#define LIMIT_RECORDS ((1U << RECORD_BITS) - 1) /* the last number says that there is none */
#define RECORD_BLOCK 128 /* are allocated at once: a page */

/* Counts of the permits freed and taken, of the keys of one hash, while a process has asked for them: changes.h. Swaps
 * and adds, seq_cst. After a crash: a release or take that was not counted is found by a look at the permits, within
 * half a second. */
typedef struct {
  _Alignas(16) _Atomic uint64_t freed, taken;
} changes_t;

/* Written before the segment is published; constant afterwards, except `damage` and the lines from 320 on. */
typedef struct {
  uint64_t magic;
  uint32_t version;
  uint32_t byte_order;
  uint64_t size; /* bytes, of the whole segment */
  uint64_t capacity; /* keys, as the creator asked for */
  uint64_t lines; /* cache lines of slots */
  uint64_t limiters_offset, processes_offset, process_stats_offset, key_stats_offset, names_offset,
      slots_offset, memo_offset, metrics_offset, histograms_offset, deployments_offset,
      requests_offset, records_offset; /* bytes from the start */
  uint64_t memo_lines;
  uint64_t names_words; /* of the ring buffer of key names */
  uint64_t counters_offset, waiters_offset;
  uint32_t limiters, processes, process_stats_entries, names_mode;
  uint64_t boot[2]; /* the kernel's boot id */
  uint64_t time_namespace; /* inode; 0 = unknown */
  uint64_t epoch; /* CLOCK_BOOTTIME at segment time 0, ns */
  uint64_t created_realtime_ns; /* for people */
  uint64_t secret[2]; /* SipHash key */
  uint64_t instance; /* random; part of the lock file's name */
  uint64_t check; /* hash of all words above: header_check() */
  /* The first damage found: kind (8 bits) | index (56); 0 = none. The process that finds it sets it by one
   * compare-and-swap (relaxed). It is never cleared, and no decision reads it. */
  _Atomic uint64_t damage;
  unsigned char unused[LINE - 32];
  _Alignas(LINE) _Atomic uint64_t ticket; /* next pending ticket; fetch-add, relaxed */
  _Alignas(LINE) _Atomic uint64_t names_head; /* words ever reserved in the names; fetch-add */
  /* The inode of the lock file; 0 = none yet. The first process that has the file open sets it by one
   * compare-and-swap; constant afterwards. Relaxed: it is only compared. After a crash: 0, or the inode. */
  _Alignas(LINE) _Atomic uint64_t lock_file;
  /* The leader: incarnation (48 bits) | process index + 1 (16). 0 = none. A process that finds no living leader sets
   * it, by one compare-and-swap. */
  _Atomic uint64_t leader;
  /* Errors of each feature on this host since the last reset. The caller defines the features. One add each. */
  _Alignas(LINE) _Atomic uint64_t feature_errors[FEATURES];
  /* Added in batches, relaxed: token_memo.c. */
  _Alignas(LINE) _Atomic uint64_t memo_hits, memo_misses;
  /* Process indexes whose rows are allocated, and that were ever taken: bits, only set, before the row is used. */
  _Alignas(LINE) _Atomic uint64_t joined[PROCESSES / 64];
  _Atomic uint64_t joined_blocks; /* which words of `joined` are not 0: bits, set after those */
  _Atomic uint64_t liveness; /* segment ns of the last liveness check; one compare-and-swap */
  /* The time of day (wall.h), ns since 1970: at segment time 0; and the latest that was seen. Any process changes them,
   * each by one compare-and-swap. After a crash: floor is raised and base is not set back yet; the next look does it. */
  _Atomic uint64_t wall_base, wall_floor;
  /* Blocks of records that are allocated. Only raised, after the allocation. */
  _Atomic uint64_t record_blocks;
  /* For each group of keys: changes (32 bits) | how many entries of `waiters` may be in use (32). wait_queue.c */
  _Alignas(LINE) _Atomic uint64_t queues[WAIT_GROUPS];
  _Alignas(LINE) changes_t changes[CHANGE_WORDS];
} header_t;

static_assert(sizeof(slot_t) == 16, "a slot is swapped as 16 bytes");
static_assert(offsetof(slot_t, when) == 8, "who, then when");
static_assert(sizeof(key_stats_t) == 16, "key statistics");
static_assert(sizeof(process_stat_t) == 16, "process statistics: an entry");
static_assert(sizeof(process_stats_t) == 2048, "process statistics");
static_assert(sizeof(counters_t) == 1024, "counters");
static_assert(sizeof(process_t) == 64, "process");
static_assert(sizeof(waiter_t) == 64, "waiter");
static_assert(sizeof(metric_t) == 120, "metric");
static_assert(sizeof(histogram_t) == 1984, "histogram");
static_assert(sizeof(deployment_t) == 64, "deployment");
static_assert(sizeof(requests_t) == 576, "requests in flight");
static_assert(sizeof(reservations_t) == 2112, "reservations");
static_assert(sizeof(limit_record_t) == 32 && sizeof(limit_record_t) * RECORD_BLOCK == 4096,
              "record");
static_assert(sizeof(zone_t) == UINT64_C(16) * LINE, "zone");
static_assert(sizeof(rule_t) == UINT64_C(8) * RULE_WORDS, "rule");
static_assert(sizeof(limiter_entry_t) == 1344, "limiter entry");
static_assert(offsetof(limiter_entry_t, current) == 16, "swapped as 16 bytes");
static_assert(offsetof(header_t, names_mode) == 180, "without padding: compared as bytes");
static_assert(offsetof(header_t, damage) == 256, "the constant words end at 256");
static_assert(offsetof(header_t, ticket) == 320, "the changing lines start at 320");
static_assert(PROCESSES % 64 == 0 && PROCESSES <= 64 * 64 && HOME_PROCESSES % 64 == 0,
              "blocks of 64, at most 64 of them");
static_assert(sizeof(header_t) == 704 + (PROCESSES / 64 + 12) / 8 * LINE + WAIT_GROUPS * 8 +
                                      CHANGE_WORDS * sizeof(changes_t),
              "header");
static_assert(sizeof(_Atomic uint64_t) == 8, "atomics are plain words");

#endif
