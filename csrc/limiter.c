/* limiter.c - the calls: find the key's cells, ask the meters, swap. Several limits: all or nothing. */
#include "internal.h"

/* One call, as its helpers see it. */
typedef struct {
  fshm_segment *s;
  uint32_t index; /* of the limiter */
  plan_t plan;
  uint64_t hash;
  uint64_t now, at; /* at: the instant it is charged for; later than now where a waiter reserves */
  uint64_t max_wait;
  const uint64_t *costs;
} call_t;

/* What a look at one limit found. */
typedef struct {
  found_t cell;
  verdict_t verdict;
} look_t;

static const uint64_t ones[FSHM_MAX_LIMITS] = {1, 1, 1, 1};

static inline uint64_t fingerprint(const call_t *c, uint32_t i) {
  uint64_t who = c->hash ^ c->plan.twist[i];
  return who + !who; /* 0 is the empty cell */
}

static inline uint64_t version_of(const call_t *c) {
  return (uint64_t)c->plan.version << TIME_BITS;
}

/* A bucket's state, from the time of the limits it was written under to the present ones'. */
static __attribute__((noinline)) uint64_t converted_state(const call_t *c, uint32_t i,
                                                          uint64_t state) {
  rule_t old;
  uint32_t nth = 0;
  for (uint32_t k = 0; k < i; k++) nth += c->plan.rules[k].kind == FSHM_BUCKET;
  unsigned version = (unsigned)(state >> TIME_BITS) & VERSION_MASK;
  bool known = limits_old_rule(&c->s->limiters[c->index], c->plan.current, version, nth, &old);
  return bucket_convert(&c->plan.rules[i], version_of(c), known ? &old : NULL, state, c->now);
}

static inline uint64_t state_of(const call_t *c, uint32_t i, const found_t *f) {
  const rule_t *r = &c->plan.rules[i];
  uint64_t state = f->pair.when;
  if (!f->pair.who || TAG(state) != r->kind) return 0;
  if (r->kind != FSHM_BUCKET || (state & TIME_MAX) <= c->now) return state;
  if (likely(VERSION_OF(state) == version_of(c))) return state;
  return converted_state(c, i, state);
}

static inline void look(const call_t *c, uint32_t i, uint64_t cost, look_t *l) {
  cells_find(c->s, c->hash, fingerprint(c, i), &l->cell);
  l->verdict = meter_take(&c->plan.rules[i], version_of(c), state_of(c, i, &l->cell), c->now, c->at,
                          cost);
}

/* Swap in the next state: CLAIMED, CLAIM_LOST (look again) or CLAIM_FULL. */
static inline int put(const call_t *c, uint32_t i, found_t *f, uint64_t next) {
  if (likely(f->pair.who)) {
    pair_t seen = f->pair, to = {seen.who, next};
    if (next == seen.when) return CLAIMED;
    /* Fails where the state changed, or the cell went to another key. Pairs with every other swap of
     * this cell; the loads before it need no order, since it compares all 16 bytes. */
    return pair_cas(&c->s->cells[f->cell], &seen, to) ? CLAIMED : CLAIM_LOST;
  }
  if (state_expires(next) <= c->now) return CLAIMED; /* equals "never seen": needs no cell */
  uint64_t who = fingerprint(c, i);
  int status = cells_claim(c->s, c->hash, who, next, c->now, &f->cell);
  if (status == CLAIMED) f->pair.who = who;
  return status;
}

/* Charge or refund one limit, whatever its state. */
static int force(const call_t *c, uint32_t op, uint32_t i, look_t *l) {
  const rule_t *r = &c->plan.rules[i];
  for (int tries = 0; tries < MAX_TRIES; tries++) {
    cells_find(c->s, c->hash, fingerprint(c, i), &l->cell);
    uint64_t state = state_of(c, i, &l->cell);
    uint64_t next = op == FSHM_CHARGE ? meter_charge(r, version_of(c), state, c->now, c->costs[i])
                                      : meter_refund(r, version_of(c), state, c->now, c->costs[i]);
    int status = put(c, i, &l->cell, next);
    if (status != CLAIM_LOST) return status == CLAIMED ? FSHM_ALLOWED : FSHM_FULL;
  }
  return FSHM_CONTENDED;
}

static int force_all(const call_t *c, uint32_t op, look_t *looks) {
  int worst = FSHM_ALLOWED;
  for (uint32_t i = 0; i < c->plan.count; i++) {
    int status = force(c, op, i, &looks[i]);
    if (status != FSHM_ALLOWED) worst = status;
  }
  for (uint32_t i = 0; i < c->plan.count; i++) { /* to report how things are after it */
    found_t cell = looks[i].cell;
    look(c, i, 1, &looks[i]);
    if (!looks[i].cell.pair.who) looks[i].cell = cell;
  }
  return worst;
}

/* May a limit that asks for `retry` be charged ahead? Only a bucket has an instant to reserve. */
static inline bool may_wait(const call_t *c, uint32_t op, uint32_t i, uint64_t retry) {
  return op == FSHM_RESERVE && c->plan.rules[i].kind == FSHM_BUCKET && retry <= c->max_wait &&
         retry != UINT64_MAX;
}

static inline int take_one(const call_t *c, uint32_t op, look_t *l) {
  for (int tries = 0; tries < MAX_TRIES; tries++) {
    look(c, 0, c->costs[0], l);
    if (l->verdict.retry && !may_wait(c, op, 0, l->verdict.retry)) return FSHM_DENIED;
    if (op == FSHM_PEEK) return FSHM_ALLOWED;
    int status = put(c, 0, &l->cell, l->verdict.next);
    if (likely(status == CLAIMED)) return FSHM_ALLOWED;
    if (status == CLAIM_FULL) return FSHM_FULL;
  }
  return FSHM_CONTENDED;
}

/* Take back a charge. Where nobody touched the cell since, exactly; else by arithmetic. */
static void undo(const call_t *c, uint32_t i, const look_t *l, uint64_t before) {
  const rule_t *r = &c->plan.rules[i];
  for (int tries = 0; tries < MAX_TRIES; tries++) {
    found_t f;
    cells_find(c->s, c->hash, fingerprint(c, i), &f);
    if (!f.pair.who) return;
    if (r->kind == FSHM_WINDOW && state_expires(f.pair.when) != state_expires(l->verdict.next))
      return; /* another window by now: ours is over, and our charge with it */
    uint64_t next = f.pair.when == l->verdict.next
                        ? before
                        : meter_refund(r, version_of(c), state_of(c, i, &f), c->now, c->costs[i]);
    if (put(c, i, &f, next) != CLAIM_LOST) return;
  }
}

/* Charge limit i of several. FSHM_DENIED: its room went since the look. */
static int charge_looked(const call_t *c, uint32_t i, look_t *l, uint64_t *before) {
  for (int tries = 0; tries < MAX_TRIES; tries++) {
    if (tries) look(c, i, c->costs[i], l);
    if (l->verdict.retry > c->at - c->now) return FSHM_DENIED;
    *before = l->cell.pair.who ? l->cell.pair.when : 0;
    int status = put(c, i, &l->cell, l->verdict.next);
    if (status != CLAIM_LOST) return status == CLAIMED ? FSHM_ALLOWED : FSHM_FULL;
  }
  return FSHM_CONTENDED;
}

/* Several limits: look at all before charging any; undo on denial. Killed in between, some may stay
 * charged, never the reverse. A reservation is charged everywhere as of the latest instant that any
 * limit asks for, since that is when it will be used. */
static int take_all(call_t *c, uint32_t op, look_t *looks) {
  uint32_t count = c->plan.count;
  for (int tries = 0; tries < MAX_TRIES; tries++) {
    uint64_t wait = 0, before[FSHM_MAX_LIMITS];
    bool may = true;
    for (uint32_t i = 0; i < count; i++) {
      look(c, i, c->costs[i], &looks[i]);
      wait = max_u64(wait, looks[i].verdict.retry);
      may &= !looks[i].verdict.retry || may_wait(c, op, i, looks[i].verdict.retry);
    }
    if (!may) return FSHM_DENIED;
    if (op == FSHM_PEEK) return FSHM_ALLOWED;
    if (wait > c->at - c->now) {
      for (uint32_t i = 0; i < count; i++)
        if (c->plan.rules[i].kind != FSHM_BUCKET) return FSHM_DENIED; /* no instant to charge for */
      c->at = c->now + wait;
      continue;
    }
    int status = FSHM_ALLOWED;
    uint32_t i = 0;
    for (; i < count && status == FSHM_ALLOWED; i++)
      status = charge_looked(c, i, &looks[i], &before[i]);
    if (status == FSHM_ALLOWED) return FSHM_ALLOWED;
    for (uint32_t k = i - 1; k-- > 0;) undo(c, k, &looks[k], before[k]);
    if (status != FSHM_DENIED) return status;
    /* Somebody took the room between our look and our charge: look again, and tell from that. */
  }
  return FSHM_CONTENDED;
}

/* Fill a decision from what the looks found. `charged`: tell what is left after the charge. */
static inline void report(const call_t *c, const look_t *looks, bool allowed, bool charged,
                          fshm_decision *out) {
  uint64_t longest = 0, reset = 0, tightest = UINT64_MAX;
  out->version = CURRENT_VERSION(c->plan.current);
  out->limit_index = 0;
  for (uint32_t i = 0; i < c->plan.count; i++) {
    const verdict_t *v = &looks[i].verdict;
    const rule_t *r = &c->plan.rules[i];
    uint64_t left = verdict_remaining(r, charged ? v->used_after : v->used_before);
    if (allowed ? left < tightest : v->retry > longest) out->limit_index = i;
    tightest = min_u64(tightest, left);
    longest = max_u64(longest, v->retry);
    reset = max_u64(reset, charged || r->kind != FSHM_BUCKET ? v->reset : v->used_before);
  }
  out->remaining = tightest;
  out->retry_after_ns = longest == UINT64_MAX ? FSHM_NEVER : (int64_t)longest;
  out->reset_after_ns = (int64_t)reset;
}

static inline void count_call(const call_t *c, uint32_t slot, const look_t *l, int status,
                              const void *key, uint64_t length) {
  bool admitted = status == FSHM_ALLOWED;
  if (likely(l->cell.pair.who && !(c->s->names_mode & FSHM_NAMES_OFF))) {
    ledger_count(c->s, slot, l->cell.cell, ledger_meta(c->index, fingerprint(c, 0)), key, length,
                 admitted);
  } else if (slot < PROCESSES) { /* no cell to count it for */
    process_t *me = &c->s->processes[slot];
    (void)add_relaxed(admitted ? &me->admitted : &me->denied, 1);
    if (status < 0) (void)add_relaxed(&me->refused, 1);
  }
}

/* The whole call. `out` NULL: the caller only wants to know whether it was admitted. */
static inline int apply(fshm_limiter *l, uint32_t op, const void *key, uint64_t key_length,
                        const uint64_t *costs, uint64_t max_wait, uint64_t now,
                        fshm_decision *out) {
  call_t c;
  look_t looks[FSHM_MAX_LIMITS];
  c.s = l->segment;
  c.index = l->index;
  if (unlikely(!limits_load(c.s, c.index, &c.plan))) {
    if (out) memset(out, 0, sizeof *out);
    return FSHM_E_DAMAGED;
  }
  c.hash = fshm_siphash(l->key[0], l->key[1], key, key_length);
  c.now = c.at = now ? min_u64(now, TIME_MAX - 1) : segment_now(c.s);
  c.max_wait = max_wait;
  c.costs = costs ? costs : ones;
  uint32_t slot = process_slot(c.s);
  int status;
  if (unlikely(op >= FSHM_CHARGE))
    status = force_all(&c, op, looks);
  else if (likely(c.plan.count == 1))
    status = take_one(&c, op, looks);
  else
    status = take_all(&c, op, looks);
  if (out)
    report(&c, looks, status == FSHM_ALLOWED, status == FSHM_ALLOWED && op != FSHM_PEEK, out);
  if (likely(op == FSHM_ACQUIRE || op == FSHM_RESERVE))
    count_call(&c, slot, looks, status, key, key_length);
  else if (op == FSHM_CHARGE && looks[0].cell.pair.who && !(c.s->names_mode & FSHM_NAMES_OFF))
    ledger_remember(c.s, looks[0].cell.cell, ledger_meta(c.index, fingerprint(&c, 0)), key,
                    key_length);
  return status;
}

void fshm_apply(fshm_limiter *l, uint32_t op, const void *key, uint64_t key_length,
                const uint64_t *costs, uint64_t max_wait, uint64_t now, fshm_decision *out) {
  int status = apply(l, op, key, key_length, costs, max_wait, now, out);
  out->status = status;
}

int fshm_is_allowed(fshm_limiter *l, const void *key, uint64_t key_length) {
  return apply(l, FSHM_ACQUIRE, key, key_length, NULL, 0, 0, NULL);
}

int fshm_remaining(fshm_limiter *l, const void *key, uint64_t key_length, uint64_t now,
                   uint64_t *remaining) {
  call_t c;
  look_t found;
  c.s = l->segment;
  c.index = l->index;
  c.hash = fshm_siphash(l->key[0], l->key[1], key, key_length);
  c.now = c.at = now ? now : segment_now(c.s);
  if (!limits_load(c.s, c.index, &c.plan)) return 0;
  for (uint32_t i = 0; i < c.plan.count; i++) {
    look(&c, i, 1, &found);
    remaining[i] = verdict_remaining(&c.plan.rules[i], found.verdict.used_before);
  }
  return (int)c.plan.count;
}

int fshm_reset_key(fshm_limiter *l, const void *key, uint64_t key_length) {
  call_t c;
  c.s = l->segment;
  c.hash = fshm_siphash(l->key[0], l->key[1], key, key_length);
  if (!limits_load(c.s, l->index, &c.plan)) return FSHM_E_DAMAGED;
  for (uint32_t i = 0; i < c.plan.count; i++) {
    found_t f;
    cells_find(c.s, c.hash, fingerprint(&c, i), &f);
    if (f.pair.who) cells_clear(c.s, f.cell, f.pair.who);
  }
  return FSHM_OK;
}

/* Looking in, from a cell back to its key's decision. 0: not a cell that the ledger knows. */
int fshm_peek_cell(fshm_segment *s, uint64_t cell, uint64_t now, fshm_decision *out) {
  call_t c;
  look_t looks[FSHM_MAX_LIMITS];
  memset(out, 0, sizeof *out);
  if (cell >= s->cell_count) return FSHM_E_ARGUMENT;
  uint64_t who = load_relaxed(&s->cells[cell].who);
  uint32_t meta = load_relaxed(&s->ledger[cell].meta);
  c.s = s;
  c.index = meta >> 20;
  if (!who || c.index >= s->limiter_count || ledger_meta(c.index, who) != meta) return 0;
  if (!limits_load(s, c.index, &c.plan)) return 0;
  c.hash = who ^ c.plan.twist[0];
  c.now = c.at = now ? now : segment_now(s);
  c.costs = ones;
  bool allowed = true;
  for (uint32_t i = 0; i < c.plan.count; i++) {
    look(&c, i, 1, &looks[i]);
    allowed &= looks[i].verdict.retry == 0;
  }
  report(&c, looks, allowed, false, out);
  out->status = allowed;
  return FSHM_OK;
}
