/* layout.h - every struct in the segment. No pointers; every index read from here is masked or
 * checked before use. All words are native-endian; the header says which end.
 *
 * For each field: unit; who writes it; memory order; what it holds after a crash.
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
#define PROBE_LINES UINT64_C(8) /* a key may live in two probe windows of this many lines */
#define PROCESSES 256         /* process table, fixed: 256 x (64 + 2048 + 1536) bytes */
#define PROCESS_STATS 128    /* of one process: a power of two */
#define COUNTERS FSHM_COUNTERS  /* limiters whose calls a process index counts apart */
#define RULES \
  16 /* rules that a limiter can keep: the present ones, and those that states were written under */
#define MAX_LIMITERS 2048 /* 11 bits of key_stats_t.meta */
#define SHARED 8 /* counters of a limiter that keys without room share: a power of two */
#define SHARED_PLACES 8 /* slots of one of them, by the place of the rule */
#define WAKEUPS 256 /* futex words that waiters for permits sleep on */
#define MEMO_WAYS 4 /* places of a text in the memo: one line */
#define METRICS 32 /* (component, operation) pairs that are measured */
#ifndef METRIC_SHARDS /* the crash harness has one: in it, any two processes meet */
#define METRIC_SHARDS 4 /* of a metric's sums: processes spread over them. A power of two */
#endif
#define METRIC_NAME 104 /* bytes of "component\0operation" that are kept */
#define DURATIONS 238 /* buckets of a histogram: histogram.h */
#define FEATURES 8 /* words of errors, for features.py to name */
#define DEPLOYMENTS 256 /* whose statistics routers share */
#define MIN_CAPACITY 1
#define MAX_CAPACITY (UINT64_C(1) << 31)
#define DEFAULT_CAPACITY UINT64_C(200000)

/* One key's meter. Swapped whole by a 16-byte compare-and-swap, by anybody: a crash leaves the old
 * value or the new one. (0, 0) is empty; `when` is described in algorithms.h, `who` in internal.h. */
typedef struct {
  _Alignas(16) _Atomic uint64_t who;
  _Atomic uint64_t when;
} slot_t;

/* After the slots of keys lie those of the limiters' shared counters: SHARED * SHARED_PLACES for each limiter, in order. No
 * key's name or count is kept of them. Their `who`:
 *
 *   writes (48) | resets of the limiter, the lowest 8 bits | label (4) | epoch (3) | 1
 *
 * Each write adds one, so no pair ever comes back. */

/* What people see of the key in the slot of the same index. Relaxed, lossy, never decides. */
typedef struct {
  /* whom it belongs to: permit or meter (1 bit), limiter index (11), fingerprint (20) */
  _Atomic uint32_t meta;
  _Atomic uint32_t
      admitted; /* calls, saturating; written by a process that flushes its per-process statistics */
  _Atomic uint32_t denied;
  _Atomic uint32_t name; /* low 32 bits of the position in the names ring, in words */
} key_stats_t;

/* A process's own counts, written by its threads alone (relaxed): counting contends with nobody. */
typedef struct {
  _Atomic uint64_t key; /* (slot + 1) << 32 | meta; 0 = unused */
  _Atomic uint32_t admitted;
  _Atomic uint32_t denied;
} process_stat_t;

typedef struct {
  process_stat_t entries[PROCESS_STATS];
} process_stats_t;

/* Calls of one limiter that came through one process index, by all its owners, one after the other. Only
 * added to, relaxed, one add a call: nothing is taken away, moved or summed up elsewhere, so no reader ever
 * sees a sum of them fall. A crash leaves the call counted or not. */
typedef struct {
  _Atomic uint64_t admitted;
  _Atomic uint64_t denied; /* refused ones among them */
  _Atomic uint64_t refused; /* met a full table */
  _Atomic uint64_t
      shared; /* decided by a counter that keys without room share: admitted or denied */
} limiter_counters_t;

/* The first COUNTERS - 1 limiters that have counters have one each, all others the last (limits.c: counters_of).
 * Slot PROCESSES: of all processes that have no process index. */
typedef struct {
  _Alignas(LINE) limiter_counters_t of[COUNTERS];
} counters_t;

/* A text that was counted: `who` = half of its 128-bit keyed hash, `when` = 40 bits of the other half |
 * count (24). Swapped whole: token_memo.c. A crash leaves the old entry or the new one. */
typedef slot_t memo_t;

/* What is measured. Entries are claimed in order and never given back: histogram.c. */
typedef struct {
  _Atomic uint64_t id; /* keyed hash of the names; 0 = free; one compare-and-swap */
  _Atomic uint32_t name_length; /* bytes of both and the zero between; 0 = not written yet */
  _Atomic uint32_t component_length;
  _Atomic unsigned char name[METRIC_NAME]; /* whoever knows it writes it: always the same */
} metric_t;

/* The sums of one metric in one shard: only added to, relaxed, by any process. A crash leaves a record
 * out, or half in (counted, but not in the sum). */
typedef struct {
  _Alignas(LINE) _Atomic uint64_t errors; /* calls */
  _Atomic uint64_t sum; /* ns */
  _Atomic uint64_t least; /* ~ns, so that 0 = none yet; only rises */
  _Atomic uint64_t most; /* ns; only rises */
  _Atomic uint64_t sizes[2]; /* bytes or tokens in and out, as the caller counts them */
  _Atomic uint64_t buckets[DURATIONS]; /* calls, by duration: histogram.h */
} histogram_t;

/* What routers know of a deployment: deployments.c. Each word is one compare-and-swap of its own. */
typedef struct {
  _Alignas(LINE) _Atomic uint64_t id; /* keyed hash of its name; 0 = free */
  _Atomic uint64_t latency; /* decaying mean, in units of 64 ns (44 bits) | records (20) */
  _Atomic uint64_t success; /* decaying rate in units of 2^-32 (32) | records (32) */
  _Atomic uint64_t cost; /* decaying mean in units of 1e-9 (44) | records (20) */
  _Atomic uint64_t failures; /* minute of segment time (40) | failures in it (24) */
  _Atomic uint64_t cooldown; /* ends then, segment ns; 0 = none */
  _Atomic uint64_t used; /* segment ns of the last record or beginning */
} deployment_t;

/* One process's requests in flight, by deployment: written by its threads alone. Counts only while
 * `incarnation` is the process index's and its owner lives, so what a dead process had vanishes whole. */
typedef struct {
  _Alignas(LINE) _Atomic uint64_t incarnation;
  _Atomic uint16_t in_flight[DEPLOYMENTS];
} requests_t;

/* Slot i belongs to the process that holds the byte lock i of the lock file; the kernel drops the
 * lock at its death, and the fields below then describe a dead process until the process index is reused. */
typedef struct {
  /* 0 = never used. The owner sets it to 0 before it counts `incarnation` up, and writes it (release) after `born`:
   * whoever finds it set (acquire), and the incarnation as before, has the pid of that incarnation's owner. */
  _Alignas(LINE) _Atomic uint32_t pid;
  _Atomic uint32_t outage; /* fshm_process_note(). Owner writes, relaxed; shown while it lives */
  _Atomic uint64_t attached; /* segment time, ns */
  /* What the process index's counters said when its owner joined: the rest are the owner's. Owner writes, relaxed; killed
   * in between, a dead process shows too many. */
  _Atomic uint64_t before[3]; /* admitted, denied, refused */
  /* counts the owners of the process index: a permit of an earlier one is a dead process's. The owner adds 1
   * when it has the lock (release); readers acquire. Outlives crashes. */
  _Atomic uint64_t incarnation;
  /* a incarnation whose owner is known to be dead; written by anybody who asked the kernel (deployments.c) */
  _Atomic uint64_t dead;
  /* The pid namespace's inode (32 bits) | when the process started, in ticks since boot (32). 0 = not known. Owner
   * writes, before pid. */
  _Atomic uint64_t born;
} process_t;

/* The limits of a name are rules (rule_t, as relaxed words), each at an index of its limiter's table. A rule is written
 * only by the process that owns its index, before `set` names it, and does not change while a state may refer to it: the
 * states of keys say by the index (their label) which rule they were written under. */
#define RULE_WORDS 8
/* Owners of rule indexes: 0 = free; RULE_USED | version of the limits that it was last named in; else the owner:
 * incarnation << 16 | process index + 1. */
#define RULE_USED (UINT64_C(1) << 63)

/* A limiter's name and limits. Entries are claimed in order and never given back. */
typedef struct {
  /* keyed hash of the name, and in the lowest bit whether it has no counters; 0 = free; one compare-and-swap */
  _Alignas(LINE) _Atomic uint64_t id;
  /* changes (47 bits) | permits (17): permits up to this number may be held; raised before limits are published. The changes tell
   * two words of the same number apart: each publication adds one. */
  _Atomic uint64_t most;
  /* What the limits are: two words, changed together by one 16-byte compare-and-swap (release). Each change of `set` also
   * changes the version, so whoever reads current (acquire), set, and the same current again has read one pair.
   * current: version (37 bits; 0 = no limits published yet) | epoch (3) | resets (20).
   * set: count (4 bits) | index of each rule (4 bits each), in the caller's order. */
  _Alignas(16) _Atomic uint64_t current;
  _Atomic uint64_t set;
  _Atomic uint32_t name_length; /* bytes; whoever knows the name writes it: always the same value */
  uint32_t unused;
  _Atomic unsigned char name[104];
  _Atomic uint64_t owners[RULES];
  /* Of the rules that sweeps have freed: the fastest pace of a bucket (1024ths of a ns for a token; 0 = none), only
   * lowered; and the version of the last sweep that freed one, only raised. Both before the index is free (release). */
  _Atomic uint64_t freed_pace, freed_version;
  /* Segment ns: until then counters that keys without room share may be in use (limiter.c: put_shared). Only raised,
   * relaxed, before one is charged. After a crash: at worst too late. */
  _Atomic uint64_t shared;
  _Alignas(LINE) _Atomic uint64_t rules[RULES][RULE_WORDS];
} limiter_entry_t;

/* Written once before the segment is published; constant afterwards, except `damage` and the lines from
 * 320 on. */
typedef struct {
  uint64_t magic;
  uint32_t version;
  uint32_t byte_order;
  uint64_t size; /* bytes, of the whole segment */
  uint64_t capacity; /* keys, as asked for */
  uint64_t lines; /* of slots */
  uint64_t limiters_offset, processes_offset, process_stats_offset, key_stats_offset, names_offset,
      slots_offset, memo_offset, metrics_offset, histograms_offset, deployments_offset,
      requests_offset; /* bytes from the start */
  uint64_t memo_lines;
  uint64_t names_words; /* of the ring of key names */
  uint64_t counters_offset;
  uint32_t limiters, processes, process_stats_entries, names_mode;
  uint64_t boot[2]; /* the kernel's boot id */
  uint64_t time_namespace; /* inode; 0 = unknown */
  uint64_t epoch; /* CLOCK_BOOTTIME at segment time 0, ns */
  uint64_t created_realtime_ns; /* for people */
  uint64_t secret[2]; /* SipHash key */
  uint64_t instance; /* random; part of the lock file's name */
  uint64_t check; /* hash of all words above: header_check() */
  /* What was first found damaged: kind (8 bits) | index (56); 0 = nothing. Set by whoever meets it, by one
   * compare-and-swap (relaxed), and never cleared. No decision reads it. */
  _Atomic uint64_t damage;
  unsigned char unused[LINE - 16];
  _Alignas(LINE) _Atomic uint64_t ticket; /* next pending ticket; fetch-add, relaxed */
  _Alignas(LINE) _Atomic uint64_t names_head; /* words ever reserved in the ring; fetch-add */
  /* The lock file's inode: 0 = not made yet. One compare-and-swap by the first to have it open, then
   * constant; relaxed, since it is compared and leads nowhere. After a crash: 0, or the inode. */
  _Alignas(LINE) _Atomic uint64_t lock_file;
  /* Who speaks for the host: incarnation (48 bits) | process index + 1 (16). 0 = nobody. One compare-and-swap, by
   * whoever finds no living process there. */
  _Atomic uint64_t leader;
  /* Futex words, for waiters of keys that hash to them: semaphore.c. After a crash: at worst a needless
   * wake, or a waiter that looks after a second. */
  _Alignas(LINE) _Atomic uint32_t wakeups[WAKEUPS];
  /* Errors of each feature on this host since the last reset; features.py names them. One add. */
  _Alignas(LINE) _Atomic uint64_t feature_errors[FEATURES];
  _Alignas(LINE) _Atomic uint64_t memo_hits,
      memo_misses; /* by the hundred, relaxed: token_memo.c */
  /* Which process indexes were ever joined: bits, only set. And when somebody last asked for the dead. */
  _Alignas(LINE) _Atomic uint64_t joined[PROCESSES / 64];
  _Atomic uint64_t liveness; /* segment ns; one compare-and-swap */
} header_t;

static_assert(sizeof(slot_t) == 16, "a cell is swapped as 16 bytes");
static_assert(offsetof(slot_t, when) == 8, "who, then when");
static_assert(sizeof(key_stats_t) == 16, "ledger entry");
static_assert(sizeof(process_stat_t) == 16, "column entry");
static_assert(sizeof(process_stats_t) == 2048, "column");
static_assert(sizeof(counters_t) == 512, "tallies");
static_assert(sizeof(process_t) == 64, "process slot");
static_assert(sizeof(metric_t) == 120, "metric");
static_assert(sizeof(histogram_t) == 1984, "histogram");
static_assert(sizeof(deployment_t) == 64, "deployment");
static_assert(sizeof(requests_t) == 576, "flights");
static_assert(sizeof(rule_t) == UINT64_C(8) * RULE_WORDS, "rule");
static_assert(sizeof(limiter_entry_t) == 1344, "limiter entry");
static_assert(offsetof(limiter_entry_t, current) == 16, "swapped as 16 bytes");
static_assert(offsetof(header_t, damage) == 240, "the constant words end at 240");
static_assert(offsetof(header_t, ticket) == 320, "the changing lines start at 320");
static_assert(sizeof(header_t) == 1792, "header");
static_assert(sizeof(_Atomic uint64_t) == 8, "atomics are plain words");

#endif
