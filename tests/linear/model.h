/* model.h - the sequential model: what each operation does and answers when nothing else runs.
 *
 * The arithmetic of a limit is algorithms.h itself (pure functions, which tests/algorithms/ holds against definitions by
 * logs and fractions); a key's state is one word, however and wherever the table keeps it. So what is
 * checked here is everything between: look, swap, claim, reuse, undo, conversion, permits.
 *
 * Time is an argument of an operation: the readings of the clock that it made are recorded. It goes by its
 * first, and by a later one where it claims a slot or gives back (limiter.c: fresh_now).
 *
 * advance() makes one step. Most operations are one step. These are several, each at an instant of its own
 * within the operation (csrc/DESIGN.md, "Several limits", "Permits"):
 * - A limiter of several limits has several states. An admission charges one after the other, each where it
 *   has room; a denial is one limit without room at one instant; other operations go through the limits one
 *   by one. (Where history_t.at_once is set, an admission must be explained as one step for all.)
 * - charge and refund act, and then look, to tell what is left.
 * - An admission with a permit takes the permit, then charges.
 * Level 1 (and 2, with more of it: see CYCLES) allows what csrc/DESIGN.md names as exceptions, in just this form:
 * - Several limits: an admission that has charged some of its limits, and finds the next without room, undoes
 *   what it charged, in later steps. In between others see the charge. Nothing else may hold one.
 * - A permit that was taken for an admission whose limits then have no room, likewise.
 * - A full table: the number of other keys that may have had a slot by then, not those live at one instant.
 * - Limits that are changed meanwhile: an operation may go by limits that it loaded earlier.
 * - Permits are counted slot by slot, each slot at an instant of its own, in order.
 * - Who counts permits or is denied by them may not know yet of a permit that a call takes or gives back and that
 *   is not over; nor, for 64 times the time that their process's last look took, that a holder was killed since ("Denials
 *   in constant time"). */
#ifndef MODEL_H
#define MODEL_H

#include "history.h"

#define BRANCHES 5

#define UNUSED 7 /* to whole words */
typedef struct {
  uint64_t state[STATES]; /* key * limits + limit */
  uint64_t put[LANES][LIMITS - 1], before[LANES][LIMITS - 1]; /* charges that may be undone */
  uint8_t at[LANES];    /* operations put in order */
  uint8_t phase[LANES]; /* steps made of the next one */
  uint8_t seen_held[LANES]; /* slots that it saw held */
  /* Where limits change (model_changes.h): the number of changes so far, and which variant it is; what a lane's
   * operation goes by, and what it saw; how often each state was empty. */
  uint8_t changes, variant, snapshot[LANES], loaded[LANES], seen[LANES][LIMITS], born[STATES];
  uint8_t charged[LANES][LIMITS]; /* born, at the lane's last reservation; 255 = none */
  uint8_t stands; /* permits that were granted: slots, one bit each */
  uint8_t dead; /* lanes, one bit each */
  uint8_t holder[MOST_PERMITS]; /* of each permit: lane + 1; 0 = free */
  uint8_t unused[UNUSED];
} config_t;

static_assert(sizeof(config_t) % 8 == 0, "hashed by words");

#define UNDOING 16 /* phase: so many charges are still to be undone, plus this */

static inline bool finish(config_t *c, int lane) {
  c->at[lane]++;
  c->phase[lane] = c->seen_held[lane] = c->snapshot[lane] = c->loaded[lane] = 0;
  memset(c->seen[lane], 0, sizeof c->seen[lane]);
  memset(c->put[lane], 0, sizeof c->put[lane]);
  memset(c->before[lane], 0, sizeof c->before[lane]);
  return true;
}

/* One more step was made, of so many. */
static inline bool stepped(config_t *c, int lane, uint32_t of) {
  if (++c->phase[lane] >= of) return finish(c, lane);
  return true;
}

/* How a state is seen: 0: as it is, at the operation's first time. v > 0: as never seen, at its v-th time.
 * That is so where nothing has been charged, or where it has all expired: then the slot may have gone to
 * another key, or is claimed anew. An admission with a permit reads the clock anew for the permit, for a
 * look at the limits, and to charge them: views below its number of readings are as it is, the others as
 * never seen. */
static inline unsigned views(const op_t *op) {
  unsigned count = 2;
  for (uint32_t i = 1; i < op->reads; i++)
    if (op->read[i] != op->read[0]) count = 2 * op->reads;
  if (op->kind != OP_ADMIT) return count;
  return op->reads < MOST_PERMITS / 2 ? MOST_PERMITS : 2 * op->reads; /* or: the slot to take */
}

typedef struct {
  const rule_t *rule;
  uint64_t state, now;
  uint64_t *slot;
} view_t;

static inline bool look_when(const history_t *h, config_t *c, const op_t *op, uint32_t limit,
                             bool unseen, uint64_t now, view_t *v) {
  v->rule = &h->rules[0][limit];
  v->slot = &c->state[op->key * h->limits + limit];
  v->now = now;
  v->state = unseen ? 0 : *v->slot;
  return !unseen || state_expires(*v->slot) <= op->latest;
}

static inline bool look_at(const history_t *h, config_t *c, const op_t *op, uint32_t limit,
                           unsigned view, view_t *v) {
  bool unseen = op->kind == OP_ADMIT ? view >= op->reads : view > 0;
  unsigned reading = op->kind == OP_ADMIT ? view - unseen * op->reads : view - unseen;
  if (op->kind != OP_ADMIT && view > op->reads && view < 2 * op->reads) {
    /* As it is, at a later time: who meets a sliding window of long after its time reads the clock again. */
    if (!look_when(h, c, op, limit, false, op->read[view - op->reads], v)) return false;
    return v->rule->kind == FSHM_SLIDING && sliding_is_later(v->rule, v->state, op->read[0]);
  }
  if (reading >= op->reads) return false; /* or killed before it knew the time: it did nothing */
  return look_when(h, c, op, limit, unseen, op->read[reading], v);
}

/* A new charge is as of a time when all has expired; a look may go by an older time, once all has expired in
 * fact. */
static inline bool too_early(const view_t *v, uint64_t cost) {
  return cost && !v->state && state_expires(*v->slot) > v->now;
}

static inline verdict_t verdict_of(const view_t *v, uint64_t cost) {
  return rule_take(v->rule, v->state, v->now, v->now, cost);
}

/* Is this the decision that was returned? (limiter.c: report(), of one limit) */
static inline bool told(const history_t *h, const op_t *op, const view_t *v,
                        const verdict_t *verdict, bool allowed, bool charged) {
  if (op_open(op) || op->kind == OP_IS_ALLOWED || h->limits != 1) return true;
  if (op->kind == OP_SPEND) /* only the call that brings the lease low learns it */
    return op->low == (charged && token_lease_low(verdict->next, op->cost[0]));
  uint64_t retry = allowed && !charged ? 0 : verdict->retry;
  int64_t wait = retry == UINT64_MAX ? FSHM_NEVER : (int64_t)retry;
  uint64_t reset = charged || v->rule->kind != FSHM_BUCKET ? verdict->reset : verdict->used_before;
  uint64_t left = verdict_remaining(v->rule, charged ? verdict->used_after : verdict->used_before);
  return op->remaining[0] == left && op->retry == wait && op->reset == (int64_t)reset &&
         op->version == h->version;
}

static inline bool waits(const op_t *op, const rule_t *r, uint64_t retry) {
  return op->kind == OP_RESERVE && r->kind == FSHM_BUCKET && retry <= op->max_wait &&
         retry != UINT64_MAX;
}

/* Charge one limit where it has room (or may be waited for). */
static inline bool charge_limit(const history_t *h, config_t *c, int lane, const op_t *op,
                                uint32_t limit, unsigned view) {
  view_t v;
  if (!look_at(h, c, op, limit, view, &v)) return false;
  verdict_t verdict = verdict_of(&v, op->cost[limit]);
  if (too_early(&v, op->cost[limit])) return false;
  if (verdict.retry && !waits(op, v.rule, verdict.retry)) return false;
  if (!told(h, op, &v, &verdict, true, true)) return false;
  if (op->kind == OP_RESERVE && !op_open(op) && op->put != verdict.next) return false;
  if (limit + 1 < h->limits) {
    c->put[lane][limit] = verdict.next;
    c->before[lane][limit] = v.state;
  }
  *v.slot = verdict.next;
  return true;
}

static inline bool no_room(const history_t *h, config_t *c, const op_t *op, uint32_t limit,
                           unsigned view) {
  view_t v;
  if (!look_at(h, c, op, limit, view, &v)) return false;
  verdict_t verdict = verdict_of(&v, op->cost[limit]);
  if (!verdict.retry || waits(op, v.rule, verdict.retry)) return false;
  return told(h, op, &v, &verdict, false, false);
}

static inline bool any_no_room(const history_t *h, config_t *c, const op_t *op, unsigned view) {
  for (uint32_t i = 0; i < h->limits; i++)
    if (no_room(h, c, op, i, view)) return true;
  return false;
}

/* A call may find no slot for its key: never while the key has one, nor while there must be a free one. */
static inline bool table_full(const history_t *h, const config_t *c, int level, const op_t *op) {
  uint64_t state = c->state[op->key];
  if (!h->slots || (state && state_expires(state) > op->latest)) return false;
  uint32_t taken = 0;
  for (uint32_t key = 0; !level && key < h->keys; key++)
    taken += key != op->key && state_expires(c->state[key]) > minus(op->read[0], 1000);
  for (int lane = 0; level && lane < LANES; lane++) /* who may have claimed a slot by then */
    for (uint32_t i = 0; i < h->count[lane]; i++) {
      const op_t *o = &h->ops[lane][i];
      bool claims = (o->kind <= OP_RESERVE && o->kind != OP_SPEND) || o->kind == OP_CHARGE ||
                    o->kind == OP_PUT;
      taken += claims && o->key != op->key && o->invoked && o->invoked < op->responded;
    }
  return taken >= h->slots;
}

/* Times that an admission charges and undoes; each needs another's charge in between. */
#define CYCLES(level) ((level) == 1 ? 1 : 3)
#define CYCLE \
  16 /* counters of an admission: cycles times this, and the limits that had room, one bit each */

/* limiter.c: undo() */
static inline bool undo_limit(const history_t *h, config_t *c, int lane, const op_t *op,
                              uint32_t limit, unsigned view) {
  const rule_t *r = &h->rules[0][limit];
  uint64_t *slot = &c->state[op->key * h->limits + limit], put = c->put[lane][limit];
  const fshm_charged charged = charged_by(r, put, 0, 0);
  uint64_t now = op->read[view ? view - 1 : 0];
  if (view && *slot == put) return false; /* the same as view 0 */
  *slot =
      *slot == put ? c->before[lane][limit] : rule_refund(r, *slot, now, op->cost[limit], &charged);
  c->put[lane][limit] = c->before[lane][limit] = 0;
  uint8_t *phase = &c->phase[lane];
  if (--*phase == UNDOING) { /* it looks again */
    *phase = 0;
    c->seen_held[lane] -= c->seen_held[lane] % CYCLE;
  }
  return true;
}

enum { CHARGE_NEXT, DENY, FIND_NO_ROOM, UNDO };

/* An admission by several limits looks at all before it charges any: note which it may have seen with
 * room. (A limit of cost 0 is only looked at.) Called for every operation that may have begun. */
static inline void note_room(const history_t *h, config_t *c, int lane, const op_t *op) {
  if (h->limits < 2 || c->phase[lane] || op->kind > OP_RESERVE) return;
  for (uint32_t i = 0; i < h->limits; i++) {
    view_t v;
    for (unsigned view = 0; view < views(op) && !(c->seen_held[lane] >> i & 1); view++)
      if (look_at(h, c, op, i, view, &v) && !verdict_of(&v, op->cost[i]).retry)
        c->seen_held[lane] |= (uint8_t)(1 << i);
  }
}

static inline bool acquire(const history_t *h, int level, config_t *c, int lane, const op_t *op,
                           unsigned branch, unsigned view) {
  uint32_t phase = c->phase[lane];
  bool denied = !op_open(op) && op->status != FSHM_ALLOWED;
  switch (branch) {
    case CHARGE_NEXT:
      if (phase >= UNDOING) return false;
      if (denied && (!level || phase + 1 >= h->limits)) return false;
      if (level && !phase && !h->at_once && h->limits > 1 &&
          (c->seen_held[lane] + 1) % (1 << h->limits))
        return false; /* it has not seen room in all */
      if (!op->cost[phase] && c->seen_held[lane] >> phase & 1) {
        if (phase + 1 < h->limits)
          c->put[lane][phase] = c->before[lane][phase] = c->state[op->key * h->limits + phase];
        return !view && stepped(c, lane, h->limits);
      }
      for (; h->at_once && !denied && !op_open(op) && phase + 1 < h->limits;
           phase = ++c->phase[lane])
        if (!charge_limit(h, c, lane, op, phase, view)) return false;
      return charge_limit(h, c, lane, op, phase, view) && stepped(c, lane, h->limits);
    case DENY:
      if (phase || !denied) return false;
      if (op->status == FSHM_FULL && !table_full(h, c, level, op)) return false;
      if (op->status == FSHM_DENIED && !any_no_room(h, c, op, view)) return false;
      return finish(c, lane);
    case FIND_NO_ROOM:
      if (!level || !phase || phase >= UNDOING || c->seen_held[lane] / CYCLE >= CYCLES(level))
        return false;
      if (!no_room(h, c, op, phase, view)) return false;
      c->phase[lane] += UNDOING;
      c->seen_held[lane] += CYCLE;
      return true;
    case UNDO:
      return phase > UNDOING && undo_limit(h, c, lane, op, phase - UNDOING - 1, view);
    default:
      return false;
  }
}

static inline bool peek(const history_t *h, config_t *c, int lane, const op_t *op, unsigned view) {
  uint32_t limit = c->phase[lane];
  view_t v;
  if (op->status == FSHM_DENIED) return any_no_room(h, c, op, view) && finish(c, lane);
  if (!look_at(h, c, op, limit, view, &v)) return false;
  verdict_t verdict = verdict_of(&v, op->cost[limit]);
  if (verdict.retry || !told(h, op, &v, &verdict, true, false)) return false;
  return stepped(c, lane, h->limits);
}

static inline bool remaining(const history_t *h, config_t *c, int lane, const op_t *op,
                             unsigned view) {
  uint32_t limit = c->phase[lane];
  view_t v;
  if (!look_at(h, c, op, limit, view, &v)) return false;
  uint64_t left = verdict_remaining(v.rule, verdict_of(&v, 1).used_before);
  if (!op_open(op) && left != op->remaining[limit]) return false;
  return stepped(c, lane, h->limits);
}

/* Charge or refund, whatever the state; with one limit, then look. */
static inline bool force_limit(const history_t *h, int level, config_t *c, int lane, const op_t *op,
                               unsigned view) {
  uint32_t limit = c->phase[lane];
  bool full = !op_open(op) && op->status == FSHM_FULL;
  view_t v;
  if (limit == h->limits) { /* the look; only with one limit */
    uint64_t now = op->read[op->reads - 1];
    if (view > 1 || !look_when(h, c, op, 0, view, now, &v)) return false;
    verdict_t verdict = verdict_of(&v, 1);
    verdict.retry = 0;
    return (full || told(h, op, &v, &verdict, true, false)) && finish(c, lane);
  }
  if (full) {
    if (!table_full(h, c, level, op)) return false;
  } else {
    if (!look_at(h, c, op, limit, view, &v)) return false;
    uint64_t cost = op->cost[limit];
    if (op->kind == OP_CHARGE && too_early(&v, cost)) return false;
    *v.slot = op->kind == OP_CHARGE ? rule_charge(v.rule, v.state, v.now, cost)
                                    : rule_refund(v.rule, v.state, v.now, cost, NULL);
  }
  return stepped(c, lane, h->limits + (h->limits == 1));
}

/* Give back what a reservation charged, where the state still is what it put there. */
static inline bool cancel(const history_t *h, config_t *c, int lane, const op_t *op,
                          unsigned view) {
  view_t v;
  if (!look_at(h, c, op, 0, view, &v)) return false;
  bool given_back = !view && v.state == op->put;
  if (!op_open(op) && op->status != given_back) return false;
  const fshm_charged charged = charged_by(v.rule, op->put, v.now, 0);
  if (given_back) *v.slot = rule_refund(v.rule, v.state, v.now, op->cost[0], &charged);
  return finish(c, lane);
}

#include "model_permits.h"
#include "model_token_lease.h"
#include "model_changes.h"

/* One step of the lane's next operation; false where there is no such step. */
static inline bool advance(const history_t *h, int level, config_t *c, int lane, const op_t *op,
                           unsigned branch, unsigned view) {
  if (op_open(op) && (c->dead >> lane & 1)) return false;
  if (h->changes && op->kind != OP_DEATH) return changing(h, level, c, lane, op, branch, view);
  bool first = branch == 0;
  switch (op->kind) {
    case OP_ACQUIRE:
    case OP_IS_ALLOWED:
    case OP_SPEND:
    case OP_RESERVE:
      return acquire(h, level, c, lane, op, branch, view);
    case OP_PEEK:
      return first && !op_open(op) && peek(h, c, lane, op, view);
    case OP_REMAINING:
      return first && remaining(h, c, lane, op, view);
    case OP_CHARGE:
    case OP_REFUND:
      return first && force_limit(h, level, c, lane, op, view);
    case OP_CANCEL:
      return first && cancel(h, c, lane, op, view);
    case OP_RESET:
      if (!first || view || !op->reads) return false;
      c->state[op->key * h->limits + c->phase[lane]] = 0;
      return stepped(c, lane, h->limits);
    case OP_PUT:
      return first && put_batch(h, level, c, lane, op, view);
    case OP_LOOK:
    case OP_TAKE:
      return first && look_into(h, c, lane, op, view);
    case OP_DEATH:
      if (!first || view) return false;
      c->dead |= (uint8_t)(1 << op->who);
      return finish(c, lane);
    default:
      return permits(h, level, c, lane, op, branch, view);
  }
}

#endif
