/* call.h - one call of a limiter, as limiter.c and shared_counters.c see it. Their functions are static: unity.c is
 * the only translation unit, and the compiler inlines them as if they were in one file. */
#ifndef FSHM_CALL_H
#define FSHM_CALL_H

#include "../core/hash_table.h"
#include "limiter.h"
#include "limits.h"
#include "plans.h"
#include "shared_counters.h"

/* One call, as its helpers see it. */
typedef struct {
  fshm_segment *s;
  uint32_t index; /* of the limiter; this field and the next two as in fshm_limiter */
  uint16_t counters, share;
  const own_t *own; /* of the handle */
  snapshot_t snapshot;
  bool stale; /* a state of newer limits was found: load the snapshot again, and look again */
  bool met_shared; /* a shared counter has decided */
  uint8_t in_shared; /* the set of limits that this call charges to a shared counter */
  bool fixed; /* the caller gave the time */
  bool peeks; /* the call writes nothing, so states stay under their rules */
  int tries; /* lost swaps so far, of at most MAX_TRIES */
  uint64_t hash;
  uint64_t now, at; /* at: the instant of the charge; later than now for a reservation */
  uint64_t max_wait;
  const uint64_t *costs;
  const fshm_charged *put; /* of a refund: the charges; NULL = not known */
} call_t;

/* The result of a look at one limit. */
typedef struct {
  found_t slot;
  verdict_t verdict;
  uint64_t who; /* the owner to write with the next state: key and rule */
  uint64_t moved; /* denied: the state under the present rule, to be written; 0 = none */
  bool stays; /* denied, and the state stays under its former rule */
} look_t;

static inline bool again(call_t *c) { return c->tries++ < MAX_TRIES; }

static inline uint64_t fingerprint(const call_t *c, uint32_t i) {
  return snapshot_who(&c->snapshot, i, c->hash);
}

/* Have the limits changed since they were loaded? Asked after a slot was read (which acquires): if not, its label is
 * not newer than the snapshot, and no rule index of the snapshot was given to another rule. Pairs with publish() and
 * sweep(), which change `current` first. */
static inline bool outdated(const call_t *c) {
  return unlikely(entry_current(c->s, c->index) != c->snapshot.current);
}

/* How to read a state: the state in the terms of a rule, that rule, and the owner to write. */
typedef struct {
  uint64_t state, who;
  const rule_t *rule;
  rule_t old;
  uint32_t record; /* of a bucket with a plan */
} met_t;

/* Has the key a plan (plans.h)? */
static inline bool planned(const call_t *c) { return unlikely(c->own && c->own->planned); }

/* A state that was computed by the rule of `m`, as the slot keeps it. */
static inline uint64_t as_kept(const call_t *c, const met_t *m, uint64_t state) {
  return planned(c) && m->rule->kind == FSHM_BUCKET ? planned_state(m->record, state) : state;
}
/* The same of the rule of limit i. */
static inline uint64_t as_kept_by(const call_t *c, uint32_t i, uint64_t state) {
  return planned(c) && c->snapshot.rules[i].kind == FSHM_BUCKET
             ? planned_state(c->own->of[i].record, state)
             : state;
}

/* Context of the first state of a new slot: what the call would do to a key never seen, as of now. */
typedef struct {
  call_t *c;
  uint32_t i, op; /* op: FSHM_CHARGE and FSHM_BLOCK do not check; FROM_SHARED; any other takes */
  verdict_t *verdict;
  bool refused; /* the state of the shared counter does not fit the present limits */
} first_t;
enum { FROM_SHARED = 100 }; /* copy the state of the shared counter, charge nothing */

/* May shared counters be in use? A claim asks after the look of confirm(), which follows a fence. Keys with limits
 * of their own do not use them: other keys' consumption would be debt under a smaller n. */
static inline HOT bool shares(const call_t *c, uint64_t now) {
  return load_relaxed(&c->s->limiters[c->index].shared) > now && !c->own;
}

static inline bool may_share(const call_t *c, uint32_t i, uint32_t op) {
  return c->share && !c->own && op != FSHM_BLOCK && op != FROM_SHARED &&
         c->snapshot.rules[i].kind != FSHM_LEASE;
}

/* limiter.c, for shared_counters.c, which comes before it in unity.c */
static COLD void read_clock_again(call_t *c);
static bool former_rule(call_t *c, uint32_t i, const found_t *f, rule_t *old);
static void state_met(call_t *c, uint32_t i, const found_t *f, met_t *m);
static __attribute__((noinline)) void look_former(call_t *c, uint32_t i, uint64_t cost, look_t *l);
static COLD uint64_t forced(const call_t *c, uint32_t op, uint32_t i, const rule_t *r,
                            uint64_t state, uint64_t now);

#endif
