/* shared_counters.c - shared counters: keys without a slot of their own charge one together. DESIGN.md, "Shared
 * counters". */
#include "call.h"

/* Read the shared counter of a key without a slot. pair.who = 0: not used since the last reset. */
static COLD void find_shared(const call_t *c, uint32_t i, found_t *f) {
  const fshm_segment *s = c->s;
  f->slot = shared_slot(s, c->index, c->hash, c->snapshot.rules[i].place);
  f->pair = s->read_only ? pair_peek(&s->slots[f->slot]) : pair_load(&s->slots[f->slot]);
}
static inline bool shared_used(const call_t *c, const found_t *f) {
  return shared_is_of(f->pair.who, c->snapshot.current) &&
         state_ends(c->s, 0, f->pair.when) > c->now;
}

/* Check the cost against a counter's state, which was written under this rule or a former one. */
static COLD void look_at_shared(call_t *c, uint32_t i, uint64_t cost, look_t *l) {
  const rule_t *r = &c->snapshot.rules[i];
  uint64_t state = shared_used(c, &l->slot) ? l->slot.pair.when : 0;
  l->who = fingerprint(c, i);
  l->moved = 0;
  l->stays = false;
  if (outdated(c)) {
    c->stale = true;
    return;
  }
  if (state && ((l->slot.pair.who ^ l->who) & WHO_LABELS)) {
    look_former(c, i, cost, l);
    return;
  }
  if (sliding_is_later(r, state, c->now)) read_clock_again(c);
  l->verdict = rule_take(r, state, c->now, c->at, cost);
}

/* May a denied key get a slot with the counter's state? Not for a window with room for less: it ends at another time
 * than the window that the key would begin with its first hit. */
static inline bool may_begin_denied(const rule_t *r, uint64_t used) {
  return r->kind != FSHM_WINDOW || used >= r->n;
}

/* A key without a slot may have consumed what the counter says. If that denies it, it gets a slot of its own, if
 * there is a free one. */
static COLD void look_shared(call_t *c, uint32_t i, uint64_t cost, look_t *l) {
  find_shared(c, i, &l->slot);
  const bool used = shared_used(c, &l->slot);
  look_at_shared(c, i, cost, l);
  l->slot.pair.who = l->moved = 0;
  if (c->stale || !l->verdict.retry || !used) return;
  c->met_shared = true;
  if (!l->stays && l->verdict.retry != UINT64_MAX &&
      may_begin_denied(&c->snapshot.rules[i], l->verdict.used_before))
    l->moved = l->slot.pair.when;
}

/* A counter's window ends no earlier than the window of any key that it admits, whenever that window began. */
static uint64_t window_lasts(const rule_t *r, uint64_t state, uint64_t now) {
  window_t w = window_open(r, state, now);
  if (r->kind != FSHM_WINDOW || !w.count) return state;
  w.end = max_u64(w.end, plus_time(now, r->per));
  return window_state(r, w);
}

/* What a key that now gets a slot may have consumed. This writes to the counter, though its state stays: another
 * call that is about to charge the counter for this key, and looked for the slot before it existed, then fails
 * (put_shared()). */
static COLD uint64_t leave_shared(call_t *c, uint32_t i, uint64_t now, bool *former) {
  const rule_t *r = &c->snapshot.rules[i];
  found_t f;
  rule_t old;
  uint64_t state;
  do {
    if (!again(c)) return NO_STATE;
    find_shared(c, i, &f);
    pair_t seen = f.pair;
    bool ours = shared_is_of(seen.who, c->snapshot.current);
    f.pair.who = shared_who(seen.who, c->snapshot.current, ours ? seen.who : fingerprint(c, i));
    if (!ours) f.pair.when = 0;
    if (pair_cas(&c->s->slots[f.slot], &seen, f.pair)) break;
  } while (true);
  state = state_ends(c->s, 0, f.pair.when) <= now ? 0 : f.pair.when;
  if (!state || !((f.pair.who ^ fingerprint(c, i)) & WHO_LABELS)) return state_for(r, state);
  if (!former_rule(c, i, &f, &old)) return NO_STATE;
  *former = true;
  return rule_settles(r, &old, state, now, &state) ? state : NO_STATE;
}

static COLD uint64_t first_shared(first_t *f, uint64_t now) {
  call_t *c = f->c;
  const rule_t *r = &c->snapshot.rules[f->i];
  uint64_t state = leave_shared(c, f->i, now, &f->refused);
  if (state == NO_STATE) return NO_STATE;
  if (f->op == FROM_SHARED)
    return state && may_begin_denied(r, window_read(state, now).count) ? state : NO_STATE;
  if (f->op >= FSHM_CHARGE) return window_lasts(r, forced(c, f->op, f->i, r, state, now), now);
  verdict_t v = rule_take(r, state, now, max_u64(c->at, now), c->costs[f->i]);
  /* Charged since the look; or rounded up twice. */
  if (v.retry > f->verdict->retry) return NO_STATE;
  v.retry = f->verdict->retry;
  v.next = window_lasts(r, v.next, now);
  *f->verdict = v;
  return v.next;
}

/* No free slot for the key: charge its shared counter. CLAIMED, or CLAIM_LOST: look again. DESIGN.md, "Shared
 * counters". */
static COLD int put_shared(call_t *c, uint32_t i, look_t *l, uint32_t op) {
  _Atomic uint64_t *word = &c->s->limiters[c->index].shared;
  look_t shared;
  uint64_t needed = 0;
  while (again(c)) {
    uint64_t until = load_relaxed(word);
    if (until < needed) { /* rarely, so a second ahead: keys without a slot read this line */
      uint64_t more = plus_time(needed, UINT64_C(1000000000));
      if (!atomic_compare_exchange_strong_explicit(word, &until, more, memory_order_relaxed,
                                                   memory_order_relaxed))
        continue;
      until = more;
    }
    /* `shared` is raised before we look for the key's slot. Pairs with the fence of confirm(): a claimer whose slot
     * we do not see sees `shared`, and writes to the counter after we read it. */
    atomic_thread_fence(memory_order_seq_cst);
    find_shared(c, i, &shared.slot);
    if (table_has(c->s, c->hash, fingerprint(c, i))) return CLAIM_LOST;
    read_clock_again(c);
    found_t *f = &shared.slot;
    pair_t seen = f->pair, next;
    if (!shared_is_of(seen.who, c->snapshot.current)) f->pair = (pair_t){0, 0};
    if (op >= FSHM_CHARGE) {
      met_t m;
      state_met(c, i, f, &m);
      if (c->stale) return CLAIM_LOST;
      next = (pair_t){m.who, forced(c, op, i, m.rule, m.state, c->now)};
      next.when = window_lasts(m.rule, next.when, c->now);
    } else {
      look_at_shared(c, i, c->costs[i], &shared);
      if (c->stale || shared.verdict.retry > l->verdict.retry) return CLAIM_LOST;
      next = (pair_t){shared.who, window_lasts(&c->snapshot.rules[i], shared.verdict.next, c->now)};
    }
    needed = plus_time(state_ends(c->s, 0, next.when), CLOCKS_DIFFER);
    /* If the clock on the wall is set back, it ends so much later. */
    if (IS_CALENDAR(next.when)) needed = plus_time(needed, WALL_WRONG);
    if (until < needed) continue;
    next.who = shared_who(seen.who, c->snapshot.current, next.who);
    /* Fails if the state changed, or if a key of this counter got a slot since we looked. */
    if (!pair_cas(&c->s->slots[f->slot], &seen, next)) continue;
    if (op < FSHM_CHARGE) {
      shared.verdict.retry = l->verdict.retry;
      shared.verdict.next = next.when;
      l->verdict = shared.verdict;
    }
    c->in_shared |= (uint8_t)(1U << i);
    c->met_shared = true;
    return CLAIMED;
  }
  return CLAIM_LOST;
}

/* The status of a call that a shared counter decided. */
static COLD int tell_shared(const call_t *c, uint32_t process, int status, bool counts,
                            fshm_decision *out) {
  if (counts && c->counters < COUNTERS)
    (void)add_relaxed(&counters_here(c->s, process, c->counters)->shared, 1);
  if (!out)
    return status == FSHM_ALLOWED ? SHARED_ALLOWED : status == FSHM_DENIED ? SHARED_DENIED : status;
  out->shared = 1;
  return status;
}
