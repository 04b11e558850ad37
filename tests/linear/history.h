/* history.h - what some processes asked of one segment, when, and what they were answered.
 *
 * A history has a lane for each process and one for the test itself, which prepares the keys before the
 * processes start and looks at them when they have ended. The operations of a lane follow each other.
 *
 * Stamps come from one shared counter (a sequentially consistent fetch-add), not from a clock. Their order
 * is that of the counter's modifications: total, without ties, and if one operation's response is stamped
 * before another's invocation, then all that the first did happens before all that the second does. A
 * clock promises neither: two processors' clocks may differ, reads may be equal, and the processor may
 * read it early or late against the memory operations beside it. An interval between two stamps contains
 * its operation, so it can only be too long, which makes the check weaker, never wrong. */
#ifndef HISTORY_H
#define HISTORY_H

#include <assert.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "limits/algorithms.h"

#define WORKERS 4
#define TESTER WORKERS /* the lane of the test itself */
#define LANES (WORKERS + 1)
#define LANE_OPS 20
#define READS 12    /* readings of the clock in one operation that are kept */
#define LIMITS 3    /* of the limiter, at most */
#define STATES 6    /* keys times limits, at most */
#define VARIANTS 24 /* sets of limits that a history changes between */
#define MOST_PERMITS 8
#define TENANTS 2
#define STAYS 8 /* in the wait queue, of a process, at most */
#define TURNS 12 /* of each that are kept */
#define SETS 240 /* changes of the limits in one history, at most */
#define VERSIONS 1024 /* of its limits, at most: a change is one, and a sweep */

enum op_kind {
  OP_ACQUIRE,
  OP_IS_ALLOWED,
  OP_SPEND, /* from a token lease */
  OP_RESERVE,
  OP_CANCEL, /* the reservation that this lane made last */
  OP_PEEK,
  OP_CHARGE,
  OP_REFUND,
  OP_RESET,
  OP_REMAINING,
  OP_PUT,  /* a batch into a token lease */
  OP_LOOK, /* at what is left in a token lease */
  OP_TAKE, /* what is left out of it */
  OP_SET, /* change the limits, so many times in a row */
  OP_SETTLE, /* the reservation that this lane made last */
  OP_ADMIT, /* a permit, and a charge of the rate limits, if there are any */
  OP_WAIT, /* an OP_ADMIT that waits for its turn; it has no effect if it gives up */
  OP_RELEASE, /* the permit of this lane that was taken first */
  OP_IN_FLIGHT,
  OP_DEATH, /* a process was killed: between the stamps */
  OP_KINDS
};

typedef struct {
  /* what is asked */
  uint8_t kind, key;
  uint8_t who;          /* OP_DEATH: the lane; OP_SET: the first variant */
  uint8_t times;        /* OP_SET: that one, and those that follow */
  uint8_t fixed;        /* the time is given; else the library reads the clock */
  uint16_t delay;       /* before it */
  uint64_t cost[LIMITS];
  uint64_t max_wait;
  uint64_t kept, lease; /* OP_PUT; lease: from when it is asked */
  /* what happened */
  uint64_t invoked, responded; /* stamps; 0 = never */
  uint64_t read[READS];        /* the times that the operation read, in order, or was given */
  uint32_t reads;
  int32_t status;
  uint64_t latest; /* the time when it responded */
  uint64_t remaining[LIMITS], left_ns[LIMITS], version, put;
  uint64_t until; /* OP_PUT */
  int64_t retry, reset;
  uint32_t limit_index,
      count; /* count: permits in flight; slots of OP_ADMIT and OP_RELEASE in slot */
  uint8_t permit, low;
  int8_t priority; /* OP_WAIT; who: tenant; times: turns after which it gives up, 0: never */
} op_t;

/* A caller of the wait queue: queue.h. Stamps; 0 = never. */
typedef struct {
  uint64_t invoked, responded;
} call_span_t;
typedef struct {
  call_span_t span;
  bool first; /* it is told */
} turn_t;
typedef struct {
  call_span_t join, served, leave;
  uint64_t since, owner;
  uint32_t tenant, cost, count; /* count: of turns; the first ones are kept */
  int32_t priority;
  turn_t turns[TURNS];
} stay_t;

typedef struct {
  /* the limiter */
  rule_t rules[VARIANTS][LIMITS];
  uint32_t counts[VARIANTS], permits_of[VARIANTS]; /* where they change */
  uint32_t limits, permits, keys, slots; /* slots: of the table; 0 = more than can be used */
  uint64_t version; /* of the limits when it began; variant 0 */
  /* Of each version, counted from that one: a stamp of after it came into force (0: there is none), and whether it changed
   * the limits (a sweep does not). Then: sum_up_versions(). */
  uint64_t in_force[VERSIONS];
  uint8_t changed[VERSIONS];
  uint8_t changes; /* the limits are changed meanwhile */
  uint8_t at_once; /* admissions by several limits have to be explained as one step */
  uint32_t count[LANES], stay_count[WORKERS];
  op_t ops[LANES][LANE_OPS];
  stay_t stays[WORKERS][STAYS];
} history_t;

static inline bool op_open(const op_t *op) { return op->responded == 0; } /* killed in it */

/* When the history has ended: changed becomes how often the limits had changed up to each version, and in_force when it or
 * a later one was in force. */
static inline void sum_up_versions(history_t *h) {
  for (uint32_t v = 1; v < VERSIONS; v++)
    h->changed[v] = (uint8_t)(h->changed[v] + h->changed[v - 1]);
  for (uint32_t v = VERSIONS - 1; --v;)
    if (h->in_force[v + 1] && (!h->in_force[v] || h->in_force[v + 1] < h->in_force[v]))
      h->in_force[v] = h->in_force[v + 1];
}

/* Is it the version of so many changes? */
static inline bool version_is(const history_t *h, uint64_t version, unsigned changes) {
  uint64_t v = version - h->version;
  return v < VERSIONS && (!v || h->in_force[v]) && h->changed[v] == changes;
}

/* Did the operation decide by a version that another had followed before it was asked? */
static inline bool decided_by_old_limits(const history_t *h, const op_t *op) {
  bool decides = op->kind == OP_ACQUIRE || op->kind == OP_RESERVE || op->kind == OP_PEEK ||
                 op->kind == OP_CHARGE || op->kind == OP_REFUND || op->kind == OP_ADMIT;
  uint64_t v = op->version - h->version;
  if (!h->changes || !decides || op_open(op) || op->status < FSHM_DENIED) return false;
  if (v >= VERSIONS - 1 || (v && !h->in_force[v])) return true; /* nor is it a version of these */
  return h->in_force[v + 1] && h->in_force[v + 1] < op->invoked;
}

/* printing -------------------------------------------------------------------------------------- */

static const char *const op_names[OP_KINDS] = {
    "acquire", "is_allowed", "spend",     "reserve", "cancel",    "peek",  "charge",
    "refund",  "reset",      "remaining", "put",     "look",      "take",  "set",
    "settle",  "admit",      "wait",      "release", "in_flight", "killed"};

static inline const char *status_name(int status) {
  switch (status) {
    case FSHM_DENIED:
      return "denied";
    case FSHM_ALLOWED:
      return "allowed";
    case FSHM_FULL:
      return "full";
    case FSHM_CONTENDED:
      return "contended";
    default:
      return "error";
  }
}

static inline void print_op(const history_t *h, const op_t *op, uint64_t origin, FILE *out) {
  (void)fprintf(out, "%s", op_names[op->kind]);
  if (op->kind == OP_DEATH) {
    (void)fprintf(out, " process %u\n", op->who);
    return;
  }
  if (op->kind == OP_SET) (void)fprintf(out, " limits %u, %u in a row", op->who, op->times);
  if (h->keys > 1) (void)fprintf(out, " key %u", op->key);
  bool costs = op->kind == OP_ACQUIRE || op->kind == OP_RESERVE || op->kind == OP_PEEK ||
               op->kind == OP_CHARGE || op->kind == OP_REFUND || op->kind == OP_ADMIT ||
               op->kind == OP_SPEND || op->kind == OP_PUT || op->kind == OP_SETTLE;
  for (uint32_t i = 0; costs && i < h->limits; i++)
    (void)fprintf(out, "%s%" PRIu64, i ? "," : " ", op->cost[i]);
  if (op->kind == OP_RESERVE) (void)fprintf(out, " wait %" PRIu64, op->max_wait);
  if (op->kind == OP_PUT)
    (void)fprintf(out, " until %+" PRId64 " keeping %" PRIu64, (int64_t)(op->until - origin),
                  op->kept);
  if (op->reads) (void)fprintf(out, " at %+" PRId64, (int64_t)(op->read[0] - origin));
  if (op->reads > 1) (void)fprintf(out, "..%+" PRId64, (int64_t)(op->read[op->reads - 1] - origin));
  if (op_open(op)) {
    (void)fprintf(out, ": killed in it\n");
    return;
  }
  if (op->kind == OP_IN_FLIGHT) {
    (void)fprintf(out, ": %u\n", op->count);
    return;
  }
  if (op->kind == OP_REMAINING || op->kind == OP_LOOK || op->kind == OP_TAKE) {
    (void)fprintf(out, ":");
    for (uint32_t i = 0; i < h->limits; i++) {
      (void)fprintf(out, " %" PRIu64, op->remaining[i]);
      if (op->kind != OP_REMAINING) (void)fprintf(out, " for %" PRIu64 " ns", op->left_ns[i]);
    }
    (void)fprintf(out, " left\n");
    return;
  }
  if (op->kind == OP_CANCEL || op->kind == OP_RELEASE || op->kind == OP_RESET) {
    (void)fprintf(out, ": %d\n", op->status);
    return;
  }
  (void)fprintf(out, ": %s", status_name(op->status));
  if (op->kind == OP_ADMIT && op->status == FSHM_ALLOWED)
    (void)fprintf(out, ", slot %u", op->permit);
  else if (op->kind == OP_ADMIT)
    (void)fprintf(out, " by limit %u, %u in flight", op->limit_index, op->count);
  if (op->kind == OP_SPEND) (void)fprintf(out, op->low ? ", runs low" : "");
  if (op->kind != OP_IS_ALLOWED && op->kind != OP_SPEND && op->kind != OP_PUT &&
      op->kind != OP_SET && h->limits == 1)
    (void)fprintf(out, ", %" PRIu64 " left, retry %" PRId64 ", reset %" PRId64, op->remaining[0],
                  op->retry, op->reset);
  (void)fprintf(out, "\n");
}

#define BAR 48 /* per-process statistics of the picture of when an operation ran */

static inline void print_rule(const rule_t *r, FILE *out) {
  if (r->kind == FSHM_LEASE) {
    (void)fprintf(out, " token lease");
    return;
  }
  static const char *const kinds[] = {"bucket", "window", "sliding", "permits"};
  (void)fprintf(out, " %s %" PRIu64 " per %" PRIu64 " ns", kinds[r->kind & 3], r->n, r->per);
  if (r->kind == FSHM_BUCKET) (void)fprintf(out, " burst %" PRIu64, r->burst);
}

/* Everything, lane by lane; stamps and times count from the first. */
static inline void print_history(const history_t *h, FILE *out) {
  uint64_t first = UINT64_MAX, last = 0, origin = UINT64_MAX;
  for (int lane = 0; lane < LANES; lane++)
    for (uint32_t i = 0; i < h->count[lane]; i++) {
      const op_t *op = &h->ops[lane][i];
      if (op->invoked) first = min_u64(first, op->invoked);
      last = max_u64(last, max_u64(op->invoked, op->responded));
      if (op->reads) origin = min_u64(origin, op->read[0]);
    }
  for (unsigned v = 0; v < (h->changes ? VARIANTS : 1); v++) {
    (void)fprintf(out, h->changes ? "limits %u:" : "limits:", v);
    for (uint32_t i = 0; i < (h->changes ? h->counts[v] : h->limits); i++)
      print_rule(&h->rules[v][i], out);
    const uint32_t permits = h->changes ? h->permits_of[v] : h->permits;
    if (permits) (void)fprintf(out, " permits %u", permits);
    (void)fprintf(out, "\n");
  }
  for (int lane = 0; lane < LANES; lane++) {
    if (!h->count[lane]) continue;
    if (lane == TESTER)
      (void)fprintf(out, "the test, before and after\n");
    else
      (void)fprintf(out, "process %d\n", lane);
    for (uint32_t i = 0; i < h->count[lane]; i++) {
      const op_t *op = &h->ops[lane][i];
      if (!op->invoked) continue; /* killed before it */
      uint64_t from = op->invoked - first, to = op_open(op) ? last - first : op->responded - first;
      uint64_t scale = last - first + 1;
      char bar[BAR + 1];
      memset(bar, ' ', BAR);
      bar[BAR] = 0;
      for (uint64_t at = from * BAR / scale; at <= to * BAR / scale; at++) bar[at] = '=';
      (void)fprintf(out, "  %3" PRIu64 "-%-3" PRIu64 " |%s| ", from, to, bar);
      print_op(h, op, origin, out);
    }
  }
}

#endif
