/* call.h - one call of a limiter, as limiter.c and shared_counters.c see it. Their functions are static: unity.c is the only
 * translation unit, and the compiler inlines them as if they were in one file. */
#ifndef FSHM_CALL_H
#define FSHM_CALL_H

#include "../core/hash_table.h"
#include "limiter.h"
#include "limits.h"
#include "shared_counters.h"

/* One call, as its helpers see it. */
typedef struct {
  fshm_segment *s;
  uint32_t index; /* of the limiter; this and the next two as in fshm_limiter */
  uint16_t counters, share;
  const uint64_t *numbers; /* of the handle: limits_number() */
  snapshot_t snapshot;
  bool stale; /* met a state of newer limits than the snapshot's: load it again, and look again */
  bool met_shared; /* a shared counter has decided */
  uint8_t in_shared; /* a set: the limits that are charged to a shared counter by this call */
  bool fixed; /* the caller gave the time */
  bool peeks; /* nothing is written, so states stay under the rules that they have */
  int tries; /* lost swaps so far, of at most MAX_TRIES */
  uint64_t hash;
  uint64_t now, at; /* at: the instant it is charged for; later than now where a waiter reserves */
  uint64_t max_wait;
  const uint64_t *costs;
  const fshm_charged *put; /* of a refund: the charges; NULL = not known */
} call_t;

/* What a look at one limit found. */
typedef struct {
  found_t slot;
  verdict_t verdict;
  uint64_t who; /* to be written with the next state: whose, and under which rule */
  uint64_t
      moved; /* of a denial: the state under the present rule, to be kept; 0 = it is kept as it is */
  bool stays; /* denied, and the state lives on under an earlier rule */
} look_t;

static inline bool again(call_t *c) { return c->tries++ < MAX_TRIES; }

static inline uint64_t fingerprint(const call_t *c, uint32_t i) {
  return snapshot_who(&c->snapshot, i, c->hash);
}

/* Have the limits changed since they were loaded? Asked after a slot was read (which acquires): then its label is not
 * newer than the snapshot, and a rule index that the snapshot names has not been given to another rule. Pairs with publish() and
 * sweep(), which change `current` first. */
static inline bool outdated(const call_t *c) {
  return unlikely(entry_current(c->s, c->index) != c->snapshot.current);
}

/* How to read a state: in which terms, by which rule, and what to write as its owner. */
typedef struct {
  uint64_t state, who;
  const rule_t *rule;
  rule_t old;
} met_t;

/* The first state of a new slot: what the call would do to a key never seen, as of now. */
typedef struct {
  call_t *c;
  uint32_t i, op; /* op: FSHM_CHARGE and FSHM_BLOCK, room or not; FROM_SHARED; any other takes */
  verdict_t *verdict;
  bool refused; /* what it may have consumed of a shared counter does not fit the present limits */
} first_t;
enum { FROM_SHARED = 100 }; /* the state of the shared counter, and no more */

/* May shared counters be in use? Of a claim, asked after the look of confirm(), which follows a fence. Keys with numbers of
 * their own have no part in them: others' use would be debt under a smaller n. */
static inline bool shares(const call_t *c, uint64_t now) {
  return load_relaxed(&c->s->limiters[c->index].shared) > now && !c->numbers;
}

static inline bool may_share(const call_t *c, uint32_t i, uint32_t op) {
  return c->share && !c->numbers && op != FSHM_BLOCK && op != FROM_SHARED &&
         c->snapshot.rules[i].kind != FSHM_LEASE;
}

/* limiter.c */
static uint64_t fresh_now(const call_t *c);
static COLD void read_clock_again(call_t *c);
static bool former_rule(call_t *c, uint32_t i, const found_t *f, rule_t *old);
static void state_met(call_t *c, uint32_t i, const found_t *f, met_t *m);
static __attribute__((noinline)) void look_former(call_t *c, uint32_t i, uint64_t cost, look_t *l);
static COLD uint64_t forced(const call_t *c, uint32_t op, uint32_t i, const rule_t *r,
                            uint64_t state, uint64_t now);

/* shared_counters.c */
static COLD void find_shared(const call_t *c, uint32_t i, found_t *f);
static __attribute__((noinline, cold)) void look_shared(call_t *c, uint32_t i, uint64_t cost,
                                                        look_t *l);
static COLD uint64_t first_shared(first_t *f, uint64_t now);
static COLD int put_shared(call_t *c, uint32_t i, look_t *l, uint32_t op);
static COLD int tell_shared(const call_t *c, uint32_t process, int status, bool counts,
                            fshm_decision *out);

#endif
