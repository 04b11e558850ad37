/* limiter.c - the calls: find the key's slots, check the limits, swap. With several limits: all or nothing. */
#include "../permits/semaphore.h"
#include "../permits/wait_queue.h"
#include "../stats/counters.h"
#include "../stats/key_stats.h"
#include "call.h"

static const uint64_t ones[FSHM_MAX_LIMITS] = {1, 1, 1, 1};

static_assert(offsetof(call_t, share) - offsetof(call_t, index) ==
                      offsetof(fshm_limiter, share) - offsetof(fshm_limiter, index) &&
                  offsetof(call_t, share) - offsetof(call_t, index) == 6,
              "copied as one word: begin_hashed()");

/* The time now, where the time at the start of the call is too old. */
static uint64_t fresh_now(const call_t *c) {
  return c->fixed ? c->now : max_u64(segment_now(c->s), c->now);
}

static inline void met_present(const call_t *c, uint32_t i, uint64_t state, met_t *m) {
  m->state = state;
  m->who = fingerprint(c, i);
  m->rule = &c->snapshot.rules[i];
  m->record = 0;
}

static COLD void read_clock_again(call_t *c) {
  uint64_t now = fresh_now(c);
  c->at += now - c->now;
  c->now = now;
}

/* The rule that the state in this slot was written under. False: the limits or the slot changed; look again. */
static bool former_rule(call_t *c, uint32_t i, const found_t *f, rule_t *old) {
  bool sane = limits_rule(c->s, c->index, WHO_LABEL(f->pair.who), old);
  const pair_t now =
      c->s->read_only ? pair_peek(&c->s->slots[f->slot]) : pair_load(&c->s->slots[f->slot]);
  c->stale |= now.who != f->pair.who || now.when != f->pair.when || outdated(c);
  /* Written over by a stray write: any rule will do. */
  if (unlikely(!sane)) *old = c->snapshot.rules[i];
  if (unlikely(c->own && c->own->numbers[i] && old->kind == FSHM_WINDOW))
    old->n = min_u64(old->n, c->own->numbers[i]);
  return !c->stale;
}

/* The owner of a state that stays under its rule: the same label, in the present epoch. */
static uint64_t staying(const call_t *c, uint32_t i, uint64_t who) {
  const uint64_t label = WHO_OF(0, 0, RULES - 1, 0) & ~UINT64_C(1);
  return (fingerprint(c, i) & ~label) | (who & label);
}

/* state_met() of a key with a plan. The record that a bucket's state names never changes: nothing is to be read again. */
static COLD void met_planned(const call_t *c, uint32_t i, pair_t found, met_t *m) {
  const rule_t *r = &c->snapshot.rules[i];
  if (r->kind == FSHM_WINDOW) {
    m->old = planned_window(r, m->state, c->now, c->costs[i]);
    m->rule = &m->old;
  }
  if (r->kind == FSHM_BUCKET) m->record = c->own->of[i].record;
  if (!found.who || state_ends(c->s, 0, found.when) <= c->now) {
    m->state = 0;
    return;
  }
  if (r->kind != FSHM_BUCKET) return;
  const uint32_t record = planned_record(found);
  uint64_t slack = c->own->of[i].slack;
  const bool former = record != m->record && record_rule(c->s, record, &m->old, &slack);
  const uint64_t state = m->state = planned_arrival(found.when, slack);
  if (!former || rule_settles(r, &m->old, state, c->now, &m->state)) return;
  m->state = state;
  m->record = record;
  m->who = planned_who(m->who, record);
  m->rule = &m->old;
}

/* For a charge, a refund or a block, which need no check. */
static void state_met(call_t *c, uint32_t i, const found_t *f, met_t *m) {
  uint64_t state = f->pair.who ? f->pair.when : 0;
  met_present(c, i, state, m);
  if (outdated(c)) c->stale = true;
  if (planned(c)) {
    met_planned(c, i, f->pair, m);
    return;
  }
  if (!f->pair.who || c->stale) return;
  /* the upper bits of a shared counter's `who` differ */
  bool former = unlikely(f->slot < c->s->slot_count ? f->pair.who != m->who
                                                    : ((f->pair.who ^ m->who) & WHO_LABELS) != 0);
  if (former && !former_rule(c, i, f, &m->old)) return;
  if (sliding_is_later(former ? &m->old : m->rule, state, c->now)) read_clock_again(c);
  if (state_ends(c->s, 0, state) <= c->now) {
    m->state = 0;
  } else if (former) {
    if (rule_settles(m->rule, &m->old, state, c->now, &m->state)) return;
    m->state = state;
    m->who = staying(c, i, f->pair.who);
    m->rule = &m->old;
  }
}

/* Check a state that was written under other limits. It is admitted if the present limits admit it with the same
 * tokens. If not, it is denied by the state that expires earlier: the one in the slot, or the same tokens under the
 * present limits. A cost of 0 makes no debt of what is used: admitted too, it leaves the state that expires earlier. */
static __attribute__((noinline)) void look_by(call_t *c, uint32_t i, const rule_t *by,
                                              uint64_t state, uint64_t cost, look_t *l) {
  const rule_t *r = &c->snapshot.rules[i];
  const rule_t old = *by;
  const uint64_t most = rule_capacity(r), used = rule_used(&old, state, c->now);
  const uint64_t moved = rule_convert(r, &old, state, c->now);
  const bool sooner = rule_over(r, moved) <= rule_over(&old, state);
  if (moved != NO_STATE) {
    l->verdict = rule_take(r, moved, c->now, c->at, cost);
    if (cost > most || (!l->verdict.retry && (cost || sooner))) return;
  }
  if (r->kind == FSHM_BUCKET && cost && cost <= minus(most, used)) {
    /* It just fits: round up once for both, not once for each. */
    l->verdict = bucket_take(r, 0, c->now, c->at, used + cost);
    l->verdict.used_before = min_u64(bucket_increment(r, used), TIME_MAX);
    return;
  }
  const bool fits = !cost && (r->kind != FSHM_BUCKET || used <= most);
  /* A token lease counts tokens left, not tokens used: only n has changed. */
  if (r->kind == FSHM_LEASE || (!c->peeks && !fits && sooner)) {
    l->moved = moved;
    return;
  }
  /* A window would admit a cost of 0: ask for one token more, of one more. */
  rule_t capped = rule_capped(&old, most + !cost);
  l->stays = true;
  l->verdict = rule_take(&capped, state, c->now, c->now, cost + !cost);
  if (fits) l->verdict = (verdict_t){.next = state};
  if (!fits && (old.kind == FSHM_BUCKET || r->kind == FSHM_BUCKET))
    l->verdict.retry = plus_time(l->verdict.retry, 3); /* ns are rounded up, under both */
  l->verdict.used_before = l->verdict.used_after =
      r->kind == FSHM_BUCKET ? min_u64(bucket_increment(r, used), TIME_MAX) : used;
  l->verdict.reset = minus(state_ends(c->s, 0, state), c->now);
}

static __attribute__((noinline)) void look_former(call_t *c, uint32_t i, uint64_t cost, look_t *l) {
  rule_t old;
  if (!former_rule(c, i, &l->slot, &old)) return;
  const uint64_t state = state_for(&old, l->slot.pair.when);
  if (!state) { /* written over: no state of its rule, and some of those never expire */
    l->verdict = rule_take(&c->snapshot.rules[i], 0, c->now, c->at, cost);
    return;
  }
  if (sliding_is_later(&old, state, c->now)) read_clock_again(c);
  look_by(c, i, &old, state, cost, l);
  if (l->stays) l->who = staying(c, i, l->slot.pair.who);
}

/* The state of a key with a plan: of its present one, or of another. */
static __attribute__((noinline)) void look_planned(call_t *c, uint32_t i, uint64_t cost,
                                                   look_t *l) {
  const rule_t *r = &c->snapshot.rules[i];
  const uint32_t record = planned_record(l->slot.pair), own = c->own->of[i].record;
  uint64_t slack = c->own->of[i].slack;
  rule_t old;
  if (r->kind != FSHM_BUCKET) { /* its labels are always the same: written over */
    l->verdict = rule_take(r, l->slot.pair.when, c->now, c->at, cost);
    return;
  }
  const bool former = unlikely(record != own) && record_rule(c->s, record, &old, &slack);
  const uint64_t state = planned_arrival(l->slot.pair.when, slack);
  if (!former || state <= c->now) {
    l->verdict = bucket_take(r, state, c->now, c->at, cost);
  } else {
    look_by(c, i, &old, state, cost, l);
    if (l->stays) {
      l->who = planned_who(l->who, record);
      if (!l->verdict.retry) l->verdict.next = l->slot.pair.when;
      return;
    }
    if (l->moved) l->moved = planned_state(own, l->moved);
  }
  /* A cost of 0 leaves the state as it is. */
  if (record == own && l->verdict.next == state)
    l->verdict.next = l->slot.pair.when;
  else
    l->verdict.next = planned_state(own, l->verdict.next);
}

static COLD void look_later(call_t *c, uint32_t i, uint64_t cost, look_t *l) {
  read_clock_again(c);
  l->verdict = rule_take(&c->snapshot.rules[i], l->slot.pair.when, c->now, c->at, cost);
}

static inline HOT void look_found(call_t *c, uint32_t i, uint64_t cost, look_t *l) {
  const uint64_t who = fingerprint(c, i);
  const rule_t *r = &c->snapshot.rules[i];
  uint64_t state = l->slot.pair.when;
  l->who = who;
  l->moved = 0;
  l->stays = false;
  if (outdated(c)) {
    c->stale = true;
    return;
  }
  if (unlikely(l->slot.pair.who != who)) {
    if (l->slot.pair.who && planned(c)) {
      look_planned(c, i, cost, l);
      return;
    }
    if (l->slot.pair.who && state_ends(c->s, 0, state) > c->now) {
      look_former(c, i, cost, l);
      return;
    }
    if (unlikely(!l->slot.pair.who && shares(c, c->now))) {
      look_shared(c, i, cost, l);
      return;
    }
    state = 0;
  }
  if (likely(r->kind == FSHM_BUCKET)) {
    if (unlikely(!state_is_of(r, state))) {
      if (planned(c)) {
        look_planned(c, i, cost, l);
        return;
      }
      state = 0;
    }
    l->verdict = bucket_take(r, state, c->now, c->at, cost);
  } else if (unlikely(sliding_is_later(r, state, c->now)))
    look_later(c, i, cost, l);
  else
    l->verdict = rule_take(r, state, c->now, c->at, cost);
}
static inline HOT void look_inline(call_t *c, uint32_t i, uint64_t cost, look_t *l) {
  table_find_inline(c->s, c->hash, fingerprint(c, i), &l->slot);
  look_found(c, i, cost, l);
}

static inline void look(call_t *c, uint32_t i, uint64_t cost, look_t *l) {
  look_inline(c, i, cost, l);
}

/* Load the limits again, between two looks. FSHM_OK; FSHM_E_ARGUMENT: the name has only a permit limit now; or
 * FSHM_E_DAMAGED. If it fails, the snapshot has no limits. */
static COLD int renew(call_t *c) {
  c->stale = false;
  if (!limits_load(c->s, c->index, &c->snapshot)) return damage_limits(c->s, c->index);
  if (unlikely(c->own != NULL)) limits_own(c->s, c->own, &c->snapshot);
  /* After these limits were published: from then on states drain at most at their pace. */
  read_clock_again(c);
  return c->snapshot.count ? FSHM_OK : FSHM_E_ARGUMENT;
}
static inline int renewed(call_t *c) { return likely(!c->stale) ? FSHM_OK : renew(c); }

/* What can be left now of a charge to limit i. If the limits changed since, a bucket may have drained at a faster
 * pace in between, even if the present limits are those of the charge again. */
static COLD fshm_charged charge_now(const call_t *c, uint32_t i, const fshm_charged *put,
                                    uint64_t now) {
  if (!put->version || put->version == CURRENT_VERSION(c->snapshot.current)) return *put;
  return charge_left(
      put, limits_pace_since(c->s, c->index, c->snapshot.rules[i].place, put->version), now);
}

/* The state after a charge, a block or a refund, under its own rule. Of a key with a plan: not yet as it is kept. */
static COLD uint64_t forced(const call_t *c, uint32_t op, uint32_t i, const rule_t *r,
                            uint64_t state, uint64_t now) {
  uint64_t cost = c->costs[i];
  if (op == FSHM_CHARGE) return rule_charge(r, state, now, cost);
  if (op == FSHM_REFUND) {
    if (!c->put) return rule_refund(r, state, now, cost, NULL);
    const fshm_charged charge = charge_now(c, i, &c->put[i], now);
    return rule_refund(r, state, now, cost, &charge);
  }
  if (r->kind != FSHM_BUCKET || !cost) return state;
  const rule_t capped = rule_capped(r, rule_capacity(&c->snapshot.rules[i]));
  return bucket_block(&capped, state_for(r, state), plus_time(now, cost));
}

static uint64_t first_state(void *context) {
  first_t *f = context;
  call_t *c = f->c;
  const rule_t *r = &c->snapshot.rules[f->i];
  uint64_t now = fresh_now(c), cost = c->costs[f->i];
  /* The claim is published: a process that changes the limits from now on empties it, or finds the state. */
  if (outdated(c)) {
    c->stale = true;
    return NO_STATE;
  }
  /* The time of day too is of after the look: the clock may have been set since. */
  if (unlikely(r->kind == FSHM_CALENDAR)) calendar_ready(c->s, &c->snapshot.rules[f->i]);
  if (unlikely(shares(c, now))) return first_shared(f, now);
  if (f->op >= FROM_SHARED) return NO_STATE;
  if (f->op >= FSHM_CHARGE) {
    rule_t fine = *r;
    if (planned(c) && r->kind == FSHM_WINDOW) fine = planned_window(r, 0, now, cost);
    return as_kept_by(c, f->i, forced(c, f->op, f->i, &fine, 0, now));
  }
  verdict_t v = rule_take(r, 0, now, max_u64(c->at, now), cost);
  v.next = as_kept_by(c, f->i, v.next);
  v.retry = f->verdict->retry;
  *f->verdict = v;
  return v.next;
}

static __attribute__((noinline)) int put_first(call_t *c, uint32_t i, look_t *l, uint32_t op) {
  first_t first = {c, i, op, &l->verdict, false};
  uint64_t who = fingerprint(c, i);
  found_t *f = &l->slot;
  int status = table_claim(c->s, c->hash, who, c->now, first_state, &first, &f->slot);
  if (status == CLAIMED) f->pair.who = who;
  if (unlikely(status == CLAIM_FULL) && semaphore_free_dead(c->s, c->hash, who, c->now))
    status = CLAIM_LOST;
  if (unlikely(first.refused) && status == CLAIM_LOST && !c->stale) status = CLAIM_FULL;
  if (unlikely(status == CLAIM_FULL) && may_share(c, i, op)) status = put_shared(c, i, l, op);
  if (status == CLAIM_LOST) c->tries += CLAIM_TRIES - 1;
  return status;
}

/* Swap in the next state: CLAIMED, CLAIM_LOST (look again) or CLAIM_FULL. op: as in first_t. */
static inline HOT int put(call_t *c, uint32_t i, look_t *l, uint64_t next, uint32_t op) {
  found_t *f = &l->slot;
  if (unlikely(c->stale)) return CLAIM_LOST;
  if (likely(f->pair.who)) {
    pair_t seen = f->pair, to = {l->who, next};
    if (next == seen.when && l->who == seen.who) return CLAIMED;
    /* Fails if the state changed, or the slot went to another key. Pairs with every other swap of this slot. The
     * loads before it need no order, since it compares all 16 bytes. */
    return pair_cas(&c->s->slots[f->slot], &seen, to) ? CLAIMED : CLAIM_LOST;
  }
  /* Equals "never seen", or was not charged: needs no slot. */
  if (state_ends(c->s, 0, next) <= c->now || !c->costs[i]) return CLAIMED;
  return put_first(c, i, l, op);
}

/* Context of the first state of a new slot, for a change that was decided elsewhere. */
typedef struct {
  call_t *c;
  change_t *change;
  const void *context;
  uint32_t i;
} changed_t;

static uint64_t first_changed(void *context) {
  const changed_t *f = context;
  f->c->stale = outdated(f->c);
  if (f->c->stale) return NO_STATE;
  const rule_t *r = &f->c->snapshot.rules[f->i];
  return as_kept_by(f->c, f->i, f->change(f->context, f->i, r, 0, fresh_now(f->c)));
}

static int put_changed(call_t *c, uint32_t i, look_t *l, uint64_t next, changed_t *first) {
  found_t *f = &l->slot;
  if (f->pair.who || state_ends(c->s, 0, next) <= c->now) return put(c, i, l, next, FSHM_CHARGE);
  int status = table_claim(c->s, c->hash, l->who, c->now, first_changed, first, &f->slot);
  if (status == CLAIMED) f->pair.who = l->who;
  if (status == CLAIM_FULL && semaphore_free_dead(c->s, c->hash, l->who, c->now))
    status = CLAIM_LOST;
  if (status == CLAIM_LOST) c->tries += CLAIM_TRIES - 1;
  return status;
}

static inline bool looks_only(uint32_t op) { return op == FSHM_PEEK || op == FSHM_PROBE; }

/* Charge, block or refund one limit, without a check. */
static int force(call_t *c, uint32_t op, uint32_t i, look_t *l) {
  while (again(c)) {
    int fresh = renewed(c);
    if (fresh != FSHM_OK) return fresh;
    if (i >= c->snapshot.count) return FSHM_ALLOWED; /* fewer limits by now: nothing to charge */
    if (op == FSHM_BLOCK && c->snapshot.rules[i].kind != FSHM_BUCKET) return FSHM_ALLOWED;
    met_t m;
    table_find(c->s, c->hash, fingerprint(c, i), &l->slot);
    state_met(c, i, &l->slot, &m);
    if (c->stale) continue;
    l->who = m.who;
    uint64_t next = as_kept(c, &m, forced(c, op, i, m.rule, m.state, c->now));
    int status = put(c, i, l, next, op);
    if (status != CLAIM_LOST) return status == CLAIMED ? FSHM_ALLOWED : FSHM_FULL;
  }
  return FSHM_CONTENDED;
}

/* Check a cost of 1 against all limits, by limits that are not older than any state found. */
static int look_all(call_t *c, look_t *looks) {
  do {
    int fresh = renewed(c);
    if (unlikely(fresh != FSHM_OK)) return fresh;
    for (uint32_t i = 0; i < c->snapshot.count; i++) look(c, i, 1, &looks[i]);
  } while (unlikely(c->stale) && again(c));
  return FSHM_OK;
}

/* The limits changed at every try: the last looks found nothing to report. */
static inline void drop_stale(const call_t *c, look_t *looks) {
  if (unlikely(c->stale)) memset(looks, 0, FSHM_MAX_LIMITS * sizeof *looks);
}

static int force_all(call_t *c, uint32_t op, look_t *looks) {
  int worst = FSHM_ALLOWED;
  bool buckets = false;
  for (uint32_t i = 0; i < c->snapshot.count; i++)
    buckets |= c->snapshot.rules[i].kind == FSHM_BUCKET;
  if (op == FSHM_BLOCK && !buckets) worst = FSHM_E_ARGUMENT; /* no limit can be blocked */
  looks[0].slot = (found_t){0, {0, 0}};
  for (uint32_t i = 0; i < c->snapshot.count; i++) {
    int status = force(c, op, i, &looks[i]);
    if (status != FSHM_ALLOWED) worst = status;
  }
  c->now = c->at = fresh_now(c);
  /* To store its name in the key statistics, even if its state is gone. */
  found_t first = looks[0].slot;
  int fresh = look_all(c, looks);
  if (unlikely(fresh != FSHM_OK)) return fresh;
  if (!looks[0].slot.pair.who) looks[0].slot = first;
  if (op == FSHM_REFUND) wait_wake_more(c->s, wait_key(c->hash, c->index));
  return worst;
}

/* May a denied limit be charged ahead? Only a bucket has an instant to reserve. */
static inline bool may_wait(const call_t *c, uint32_t op, uint32_t i, const look_t *l) {
  return op == FSHM_RESERVE && c->snapshot.rules[i].kind == FSHM_BUCKET &&
         l->verdict.retry <= c->max_wait && l->verdict.retry != UINT64_MAX && !l->stays;
}

/* Write a denied state that ends sooner under the present limits. False: look again. */
static COLD bool keep_moved(call_t *c, uint32_t i, look_t *l) {
  if (!l->slot.pair.who) /* gets a slot, so that the next answer says when to come back */
    return put_first(c, i, l, FROM_SHARED) == CLAIM_FULL;
  return put(c, i, l, l->moved, FSHM_ACQUIRE) != CLAIM_LOST;
}

enum { RESHAPED = -100 }; /* returned by take_one(): there are several limits now */

static inline HOT int take_one(call_t *c, uint32_t op, look_t *l) {
  while (likely(again(c))) {
    int fresh = renewed(c);
    if (unlikely(fresh != FSHM_OK)) return fresh;
    if (unlikely(c->snapshot.count != 1)) return RESHAPED;
    look_inline(c, 0, c->costs[0], l);
    if (unlikely(c->stale)) continue;
    if (l->verdict.retry && !may_wait(c, op, 0, l)) {
      if (unlikely(l->moved) && op != FSHM_PEEK && !keep_moved(c, 0, l)) continue;
      return FSHM_DENIED;
    }
    if (looks_only(op)) return FSHM_ALLOWED;
    int status = put(c, 0, l, l->verdict.next, FSHM_ACQUIRE);
    if (likely(status == CLAIMED)) {
      c->at = c->now + l->verdict.retry;
      return FSHM_ALLOWED;
    }
    if (status == CLAIM_FULL) return FSHM_FULL;
  }
  return FSHM_CONTENDED;
}

/* Take back a charge: exactly, if the slot was not changed since; else what has not drained yet. The limits may have
 * changed meanwhile: the limit with the same place is the same limit. */
static void undo(call_t *c, uint32_t i, const look_t *l, pair_t before) {
  call_t later = *c;
  const fshm_charged put_there = charged_by(&c->snapshot.rules[i], l->verdict.next, c->now,
                                            CURRENT_VERSION(c->snapshot.current));
  look_t found;
  while (again(&later)) {
    if (renewed(&later) != FSHM_OK) return;
    uint32_t k = 0;
    while (k < later.snapshot.count && later.snapshot.rules[k].place != c->snapshot.rules[i].place)
      k++;
    if (k == later.snapshot.count || later.snapshot.salt != c->snapshot.salt)
      return; /* the limit was removed, or the limiter was reset */
    met_t m;
    const bool shared = c->in_shared >> i & 1;
    later.now = fresh_now(c);
    if (unlikely(shared))
      find_shared(&later, k, &found.slot);
    else
      table_find(c->s, c->hash, fingerprint(&later, k), &found.slot);
    if (!found.slot.pair.who) return;
    state_met(&later, k, &found.slot, &m);
    if (later.stale) continue;
    uint64_t next;
    const bool ours = found.slot.pair.when == l->verdict.next && found.slot.pair.who == l->who;
    if (!shared && ours && (before.who == l->who || !before.who)) {
      found.who = l->who;
      next = before.when;
    } else { /* also if it was under an earlier rule: that rule may be gone */
      bool alike = m.rule->kind == c->snapshot.rules[i].kind;
      found.who = m.who;
      /* Other calls move the end of a counter's window: it is the same window. */
      alike &= !shared || m.rule->kind != FSHM_WINDOW;
      const fshm_charged charge = charge_now(&later, k, &put_there, later.now);
      next = rule_refund(m.rule, m.state, later.now, c->costs[i], alike ? &charge : NULL);
      next = as_kept(&later, &m, next);
    }
    if (unlikely(shared)) {
      pair_t seen = found.slot.pair,
             to = {shared_who(seen.who, later.snapshot.current, found.who), next};
      if (pair_cas(&c->s->slots[found.slot.slot], &seen, to)) return;
      continue;
    }
    if (put(&later, k, &found, next, FSHM_ACQUIRE) != CLAIM_LOST) return;
  }
}

/* Charge limit i of several. FSHM_DENIED: it has no room any more. */
static inline HOT int charge_looked(call_t *c, uint32_t i, look_t *l, pair_t *before) {
  c->in_shared &= (uint8_t)~(1U << i);
  for (bool lost = false; again(c); lost = true) {
    if (lost) look(c, i, c->costs[i], l);
    if (c->stale || l->verdict.retry > c->at - c->now) return FSHM_DENIED;
    *before = l->slot.pair.who ? l->slot.pair : (pair_t){0, 0};
    int status = put(c, i, l, l->verdict.next, FSHM_ACQUIRE);
    if (status != CLAIM_LOST) return status == CLAIMED ? FSHM_ALLOWED : FSHM_FULL;
  }
  return FSHM_CONTENDED;
}

/* Several limits: check all, then charge each; undo on denial. Killed in between, some may stay charged, never the
 * reverse. A reservation charges all limits as of the latest instant that any of them needs, since it is used then. */
static UNGUARDED int take_all(call_t *c, uint32_t op, look_t *looks) {
  while (again(c)) {
    int fresh = renewed(c);
    if (fresh != FSHM_OK) return fresh;
    uint32_t count = c->snapshot.count;
    uint64_t wait = 0;
    pair_t before[FSHM_MAX_LIMITS];
    bool may = true, buckets = true;
    for (uint32_t i = 0; i < count; i++) {
      look_inline(c, i, c->costs[i], &looks[i]);
      wait = max_u64(wait, looks[i].verdict.retry);
      if (c->stale) break;
      may &= !looks[i].verdict.retry || may_wait(c, op, i, &looks[i]);
      buckets &= c->snapshot.rules[i].kind == FSHM_BUCKET;
    }
    if (c->stale) continue;
    if (!may || (wait > c->at - c->now && !buckets)) { /* there is no instant to charge for */
      bool kept = true;
      for (uint32_t i = 0; i < count && op != FSHM_PEEK; i++)
        kept &= likely(!looks[i].moved) || keep_moved(c, i, &looks[i]);
      if (unlikely(!kept)) continue;
      return FSHM_DENIED;
    }
    if (looks_only(op)) return FSHM_ALLOWED;
    if (wait > c->at - c->now) {
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
    /* Another call took the room between our look and our charge: look again, and report that. */
  }
  return FSHM_CONTENDED;
}

/* Fill a decision from the looks. `charged`: report what is left after the charge. */
static inline HOT void report(const call_t *c, const look_t *looks, bool allowed, bool charged,
                              fshm_decision *out) {
  uint64_t longest = allowed && charged ? c->at - c->now : 0, reset = 0, tightest = UINT64_MAX;
  out->version = CURRENT_VERSION(c->snapshot.current);
  out->limit_index = out->shared = 0;
  for (uint32_t i = 0; i < c->snapshot.count; i++) {
    const verdict_t *v = &looks[i].verdict;
    const rule_t *r = &c->snapshot.rules[i];
    uint64_t left = verdict_remaining(r, charged ? v->used_after : v->used_before);
    if (allowed ? left < tightest : v->retry > longest) out->limit_index = (uint16_t)i;
    tightest = min_u64(tightest, left);
    if (!allowed) longest = max_u64(longest, v->retry);
    bool after = charged || r->kind != FSHM_BUCKET || looks[i].stays;
    reset = max_u64(reset, after ? v->reset : v->used_before);
  }
  out->remaining = tightest;
  out->retry_after_ns = longest == UINT64_MAX ? FSHM_NEVER : (int64_t)longest;
  /* At most TIME_MAX: a state that its rule cannot have written is read as "never seen" (state_for). */
  out->reset_after_ns = (int64_t)reset;
}

static inline void count_call(const call_t *c, uint32_t process, const look_t *l, int status,
                              const void *key, uint64_t length) {
  /* Of a lease, fshm_spend() counts it for the limiter of the lease. */
  if (likely(c->snapshot.rules[0].kind != FSHM_LEASE))
    counters_add(c->s, process, c->counters, status);
  if (likely(l->slot.pair.who && !(c->s->names_mode & FSHM_NAMES_OFF)))
    key_stats_count(c->s, process, l->slot.slot, key_stats_meta(c->index, l->slot.pair.who), key,
                    length, status == FSHM_ALLOWED);
}

static inline uint64_t key_hash(const fshm_limiter *l, const void *key, uint64_t length) {
  return fshm_siphash(l->key[0], l->key[1], key, length);
}
static inline void begin_hashed(call_t *c, fshm_limiter *l, uint64_t hash, uint64_t now) {
  c->s = l->segment;
  memcpy((char *)c + offsetof(call_t, index), (const char *)l + offsetof(fshm_limiter, index), 8);
  c->stale = c->met_shared = c->peeks = false;
  c->in_shared = 0;
  c->own = l->own;
  c->tries = 0;
  c->hash = hash;
  c->fixed = now != 0;
  c->now = c->at = now ? min_u64(now, TIME_MAX - 1) : segment_now(c->s);
  c->max_wait = 0;
  c->costs = ones;
  c->put = NULL;
}
static inline void begin(call_t *c, fshm_limiter *l, const void *key, uint64_t length,
                         uint64_t now) {
  begin_hashed(c, l, key_hash(l, key, length), now);
}

/* The first step of a call that admits: load the limits of the handle, hash the key (unless `hash` has that), and fetch
 * its lines. begin_hashed() is the second: it reads the clock, which takes about as long as fetching a line. */
static inline HOT int load_call(call_t *c, const fshm_limiter *l, const uint64_t *hash,
                                const void *key, uint64_t length, uint64_t *hashed) {
  bool readable = limits_load_inline(l->segment, l->index, &c->snapshot);
  if (unlikely(!readable)) return damage_limits(l->segment, l->index);
  /* No limits: of a plan they come with the handle. Else it is a limiter of permits, for fshm_admit(). */
  if (unlikely(!c->snapshot.count && l->own && l->own->planned))
    limits_own(l->segment, l->own, &c->snapshot);
  if (unlikely(!c->snapshot.count)) return FSHM_E_ARGUMENT;
  *hashed = hash ? *hash : key_hash(l, key, length);
  if (hash) return FSHM_OK;
  table_prefetch(l->segment, *hashed);
  table_prefetch_stats(l->segment, *hashed);
  return FSHM_OK;
}

/* The call, once the limits are loaded. `out` NULL: the caller only needs the status. `charges`, or NULL: the charge
 * of each limit. */
static inline HOT int apply_begun(call_t *c, uint32_t op, const void *key, uint64_t key_length,
                                  fshm_decision *out, fshm_charged *charges) {
  look_t looks[FSHM_MAX_LIMITS];
  uint32_t process = process_index(c->s);
  c->peeks = op == FSHM_PEEK;
  int status = RESHAPED;
  if (unlikely(op >= FSHM_CHARGE))
    status = force_all(c, op, looks);
  else if (likely(c->snapshot.count == 1))
    status = take_one(c, op, looks);
  if (status == RESHAPED) status = take_all(c, op, looks);
  bool charged = status == FSHM_ALLOWED && (op == FSHM_ACQUIRE || op == FSHM_RESERVE);
  drop_stale(c, looks);
  if (out) report(c, looks, status == FSHM_ALLOWED, charged, out);
  for (uint32_t i = 0; charges && charged && i < c->snapshot.count; i++)
    charges[i] = charged_by(&c->snapshot.rules[i], looks[i].verdict.next, c->now,
                            CURRENT_VERSION(c->snapshot.current));
  bool counts = likely(op == FSHM_ACQUIRE || op == FSHM_RESERVE);
  if (status == FSHM_DENIED) /* an empty token lease is not a denial yet */
    counts = (counts || op == FSHM_PROBE) && c->snapshot.rules[0].kind != FSHM_LEASE;
  if (counts)
    count_call(c, process, looks, status, key, key_length);
  else if (op >= FSHM_CHARGE && op != FSHM_REFUND && looks[0].slot.pair.who &&
           !(c->s->names_mode & FSHM_NAMES_OFF))
    key_stats_remember(c->s, looks[0].slot.slot, key_stats_meta(c->index, looks[0].slot.pair.who),
                       key, key_length);
  if (unlikely(c->met_shared)) return tell_shared(c, process, status, counts, out);
  return status;
}

/* The whole call. hash: NULL, or the hash of the key. */
static inline HOT int apply(fshm_limiter *l, const uint64_t *hash, uint32_t op, const void *key,
                            uint64_t key_length, const uint64_t *costs, uint64_t max_wait,
                            uint64_t now, fshm_decision *out, fshm_charged *charges) {
  call_t c;
  uint64_t hashed = 0;
  int loaded = load_call(&c, l, hash, key, key_length, &hashed);
  if (unlikely(loaded != FSHM_OK)) {
    if (out) memset(out, 0, sizeof *out);
    return loaded;
  }
  begin_hashed(&c, l, hashed, now);
  c.max_wait = max_wait;
  if (costs) c.costs = costs;
  return apply_begun(&c, op, key, key_length, out, charges);
}

UNGUARDED void fshm_apply(fshm_limiter *l, uint32_t op, const void *key, uint64_t key_length,
                          const uint64_t *costs, uint64_t max_wait, uint64_t now,
                          fshm_decision *out) {
  int status = apply(l, NULL, op, key, key_length, costs, max_wait, now, out, NULL);
  out->status = status;
}

/* For many keys, in two steps: hash a key and prefetch its lines, some keys ahead; then check it. */
uint64_t limiter_fetch(const fshm_limiter *l, const void *key, uint64_t length) {
  uint64_t hash = key_hash(l, key, length);
  table_prefetch(l->segment, hash);
  table_prefetch_stats(l->segment, hash);
  return hash;
}
UNGUARDED void limiter_acquire_fetched(fshm_limiter *l, uint64_t hash, const void *key,
                                       uint64_t length, const uint64_t *costs, fshm_decision *out) {
  out->status = apply(l, &hash, FSHM_ACQUIRE, key, length, costs, 0, 0, out, NULL);
}

UNGUARDED void limiter_acquire_plan(fshm_limiter *l, const rule_t *packed, uint64_t hash,
                                    const void *key, uint64_t length, fshm_decision *out) {
  call_t c;
  own_t own; /* what a call of one limit reads of it */
  plan_unpack(l->index, packed, &own);
  c.snapshot.count = 0;
  if (likely(limits_load_inline(l->segment, l->index, &c.snapshot)))
    limits_own(l->segment, &own, &c.snapshot);
  if (unlikely(!c.snapshot.count)) {
    memset(out, 0, sizeof *out);
    out->status = damage_limits(l->segment, l->index);
    return;
  }
  begin_hashed(&c, l, hash, 0);
  c.own = &own;
  out->status = apply_begun(&c, FSHM_ACQUIRE, key, length, out, NULL);
}

/* For fshm_admit(), which has loaded the limits (at least one) and hashed the key. It calls this twice; each call
 * may go by the limits that it found at its start. */
UNGUARDED int limiter_take(fshm_limiter *l, const snapshot_t *snapshot, uint64_t hash, uint32_t op,
                           const void *key, uint64_t key_length, const uint64_t *costs,
                           uint64_t now, fshm_decision *out, fshm_charged *charges) {
  call_t c;
  memcpy(&c.snapshot, snapshot,
         offsetof(snapshot_t, rules) + snapshot->count * sizeof *snapshot->rules);
  begin_hashed(&c, l, hash, now);
  if (costs) c.costs = costs;
  return out->status = apply_begun(&c, op, key, key_length, out, charges);
}

UNGUARDED int limiter_is_allowed(fshm_limiter *l, const void *key, uint64_t key_length) {
  return apply(l, NULL, FSHM_ACQUIRE, key, key_length, NULL, 0, 0, NULL, NULL);
}
int fshm_is_allowed(fshm_limiter *l, const void *key, uint64_t key_length) {
  int status = limiter_is_allowed(l, key, key_length);
  return likely(status > SHARED_DENIED) ? status
         : status == SHARED_ALLOWED     ? FSHM_ALLOWED
                                        : FSHM_DENIED;
}

void fshm_reserve(fshm_limiter *l, const void *key, uint64_t key_length, const uint64_t *costs,
                  uint64_t max_wait, uint64_t now, fshm_decision *out, fshm_charged *reserved) {
  out->status = apply(l, NULL, FSHM_RESERVE, key, key_length, costs, max_wait, now, out, reserved);
}

/* Only if the reservation is still the last one: later reservations count on their instants, and what lies between
 * would be given away twice. */
int fshm_cancel(fshm_limiter *l, const void *key, uint64_t key_length, const uint64_t *costs,
                const fshm_charged *reserved, uint64_t now) {
  call_t c;
  look_t found;
  int given_back = 0;
  if (!limits_load_of(l, &c.snapshot)) return damage_limits(l->segment, l->index);
  begin(&c, l, key, key_length, now);
  if (costs) c.costs = costs;
  for (uint32_t i = 0; i < c.snapshot.count; i++) {
    met_t m;
    table_find(c.s, c.hash, fingerprint(&c, i), &found.slot);
    if (!found.slot.pair.who || found.slot.pair.when != reserved[i].state) continue;
    state_met(&c, i, &found.slot, &m);
    if (c.stale) continue; /* the limits are changing: its instant passes unused */
    found.who = m.who;
    uint64_t next = as_kept(&c, &m, rule_refund(m.rule, m.state, c.now, c.costs[i], &reserved[i]));
    /* Lost: it is not the last one any more. */
    given_back += put(&c, i, &found, next, FSHM_ACQUIRE) == CLAIMED;
  }
  if (given_back) wait_wake_more(c.s, wait_key(c.hash, c.index));
  return given_back;
}

void fshm_count_call(fshm_limiter *l, const void *key, uint64_t key_length, int32_t status) {
  call_t c;
  look_t first;
  if (!limits_load_of(l, &c.snapshot) || !c.snapshot.count) return;
  begin(&c, l, key, key_length, 0);
  table_find(c.s, c.hash, fingerprint(&c, 0), &first.slot);
  count_call(&c, process_index(c.s), &first, status, key, key_length);
}

/* A change decided elsewhere: `change` computes the next state of each limit. before: the states found, or NULL; at:
 * the time of the change. */
int limiter_change(fshm_limiter *l, const void *key, uint64_t length, uint64_t now,
                   change_t *change, const void *context, uint64_t *before, uint64_t *at) {
  call_t c;
  int worst = FSHM_OK;
  if (!limits_load_of(l, &c.snapshot)) return damage_limits(l->segment, l->index);
  begin(&c, l, key, length, now);
  *at = c.now;
  for (uint32_t i = 0; i < c.snapshot.count; i++) {
    int status = CLAIM_LOST;
    while (status == CLAIM_LOST && again(&c)) {
      met_t m;
      look_t found;
      int fresh = renewed(&c);
      if (fresh != FSHM_OK) return fresh;
      if (i >= c.snapshot.count) break;
      table_find(c.s, c.hash, fingerprint(&c, i), &found.slot);
      state_met(&c, i, &found.slot, &m);
      if (c.stale) continue;
      /* `change` gets a state in the terms of the present limits, whatever it was. */
      if (planned(&c) && c.snapshot.rules[i].kind == FSHM_WINDOW) m.rule = &c.snapshot.rules[i];
      if (m.rule != &c.snapshot.rules[i])
        m.state = rule_convert(&c.snapshot.rules[i], m.rule, m.state, c.now);
      if (m.state == NO_STATE) m.state = 0;
      met_present(&c, i, state_for(&c.snapshot.rules[i], m.state), &m);
      found.who = m.who;
      uint64_t next = change(context, i, m.rule, m.state, c.now);
      if (before) before[i] = m.state;
      changed_t first = {&c, change, context, i};
      /* A look writes nothing: a state that has expired by our time may not have for a call with an earlier time. */
      status =
          next == m.state ? CLAIMED : put_changed(&c, i, &found, as_kept_by(&c, i, next), &first);
      if (status == CLAIMED && found.slot.pair.who && !(c.s->names_mode & FSHM_NAMES_OFF))
        key_stats_remember(c.s, found.slot.slot, key_stats_meta(c.index, found.slot.pair.who), key,
                           length);
    }
    if (status != CLAIMED) worst = status == CLAIM_FULL ? FSHM_FULL : FSHM_CONTENDED;
  }
  return worst;
}

int fshm_settle(fshm_limiter *l, const void *key, uint64_t key_length, const uint64_t *charged,
                const uint64_t *actual, const fshm_permit *permit, uint64_t now) {
  call_t c;
  look_t found;
  uint64_t costs[FSHM_MAX_LIMITS];
  int worst = FSHM_ALLOWED;
  bool given_back = false;
  if (!limits_load_of(l, &c.snapshot)) return damage_limits(l->segment, l->index);
  begin(&c, l, key, key_length, now);
  c.costs = costs;
  c.put = permit->put;
  for (uint32_t i = 0; i < c.snapshot.count; i++) {
    bool more = actual[i] > charged[i];
    costs[i] = more ? actual[i] - charged[i] : charged[i] - actual[i];
    int status = costs[i] ? force(&c, more ? FSHM_CHARGE : FSHM_REFUND, i, &found) : FSHM_ALLOWED;
    if (status != FSHM_ALLOWED) worst = status;
    given_back |= !more && costs[i];
  }
  if (given_back) wait_wake_more(c.s, wait_key(c.hash, c.index));
  return worst;
}

int fshm_remaining(fshm_limiter *l, const void *key, uint64_t key_length, uint64_t now,
                   uint64_t *remaining) {
  call_t c;
  look_t looks[FSHM_MAX_LIMITS];
  if (!limits_load_of(l, &c.snapshot)) return damage_limits(l->segment, l->index);
  begin(&c, l, key, key_length, now);
  if (c.snapshot.count && look_all(&c, looks) == FSHM_E_DAMAGED) return FSHM_E_DAMAGED;
  drop_stale(&c, looks);
  for (uint32_t i = 0; i < c.snapshot.count; i++)
    remaining[i] = verdict_remaining(&c.snapshot.rules[i], looks[i].verdict.used_before);
  return (int)c.snapshot.count;
}

int fshm_reset_key(fshm_limiter *l, const void *key, uint64_t key_length) {
  call_t c;
  found_t f;
  if (!limits_load(l->segment, l->index, &c.snapshot)) return damage_limits(l->segment, l->index);
  begin(&c, l, key, key_length, 0);
  if (snapshot_is_planned(&c.snapshot)) plan_reset_key(c.s, c.index, c.hash);
  for (uint32_t i = 0; i < c.snapshot.count + c.snapshot.money; i++) {
    table_find(c.s, c.hash, fingerprint(&c, i), &f);
    if (f.pair.who) table_clear(c.s, f.slot, f.pair.who);
  }
  /* and a key whose limit comes with the call (per_call.c) */
  uint64_t hash = side_who(c.hash, c.index);
  table_find(c.s, hash, side_who(side_salted(hash, c.snapshot.salt), c.index), &f);
  if (f.pair.who) table_clear(c.s, f.slot, f.pair.who);
  wait_wake_more(c.s, wait_key(c.hash, c.index));
  return FSHM_OK;
}

COLD bool limiter_key_hash(fshm_segment *s, uint32_t index, uint64_t slot, uint64_t *hash) {
  char key[256], name[FSHM_MAX_LIMITER_NAME];
  uint64_t length, named = read_name(&s->limiters[index], name);
  if (!fshm_key_name(s, slot, key, sizeof key, &length) || length > NAME_STORED) return false;
  uint64_t k0 = fshm_siphash(s->secret[0], s->secret[1] ^ 1, name, named);
  uint64_t k1 = fshm_siphash(s->secret[0], s->secret[1] ^ 2, name, named);
  *hash = fshm_siphash(k0, k1, key, length);
  return true;
}

/* Inspection: the decision for the key in a slot. 0: the key statistics do not know the key. */
int fshm_peek_slot(fshm_segment *s, uint64_t slot, uint64_t now, fshm_decision *out) {
  return fshm_peek_numbered(s, slot, NULL, now, out);
}

int fshm_peek_numbered(fshm_segment *s, uint64_t slot, const uint64_t *numbers, uint64_t now,
                       fshm_decision *out) {
  call_t c;
  look_t looks[FSHM_MAX_LIMITS];
  memset(out, 0, sizeof *out);
  if (slot >= s->slot_count) return FSHM_E_ARGUMENT;
  uint64_t who = load_relaxed(&s->slots[slot].who);
  uint32_t meta = load_relaxed(&s->key_stats[slot].meta), index = meta >> 20;
  if (!who || index >= s->limiter_count || key_stats_meta(index, who) != meta) return 0;
  own_t own = {0};
  for (uint32_t i = 0; numbers && i < FSHM_MAX_LIMITS; i++) own.numbers[i] = numbers[i];
  fshm_limiter any = {.segment = s, .index = index, .own = numbers ? &own : NULL};
  if (!limits_load_of(&any, &c.snapshot) || !c.snapshot.count) return 0;
  begin(&c, &any, "", 0, now);
  c.peeks = true;
  bool allowed = true;
  /* A word of a permit lease is shown as a token lease; others have no limit here. */
  if (!(who & 1)) {
    const pair_t pair = s->read_only ? pair_peek(&s->slots[slot]) : pair_load(&s->slots[slot]);
    if (c.snapshot.rules[0].kind != FSHM_LEASE || pair.who != who) return 0;
    c.snapshot.count = 1;
    looks[0] = (look_t){.verdict = rule_take(&c.snapshot.rules[0], pair.when, c.now, c.now, 1)};
    report(&c, looks, looks[0].verdict.retry == 0, false, out);
    out->status = looks[0].verdict.retry == 0;
    return FSHM_OK;
  }
  bool named = limiter_key_hash(s, index, slot, &c.hash);
  for (uint32_t i = 0; i < c.snapshot.count; i++) {
    if (named)
      table_find(s, c.hash, fingerprint(&c, i), &looks[i].slot);
    else
      table_near(s, slot, (who & ~WHO_TAIL) | c.snapshot.tail[i], &looks[i].slot);
    if (named || looks[i].slot.pair.who)
      look_found(&c, i, 1, &looks[i]);
    else /* the key's shared counter is not known */
      looks[i] = (look_t){.verdict = rule_take(&c.snapshot.rules[i], 0, c.now, c.now, 1)};
    if (c.stale) return 0;
    allowed &= looks[i].verdict.retry == 0;
  }
  report(&c, looks, allowed, false, out);
  out->status = allowed;
  return FSHM_OK;
}
