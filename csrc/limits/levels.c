/* levels.c - one admission by several limiters, with a key in each: an organization, its team, its user. All levels
 * are charged, or none. DESIGN.md, "Several levels". */
#include "call.h"

/* The call of one level. */
typedef struct {
  call_t c;
  look_t looks[FSHM_MAX_LIMITS];
  pair_t before[FSHM_MAX_LIMITS]; /* what the slots of the charged limits held */
  uint32_t charged; /* so many of its limits are charged now: the first ones */
  bool passed; /* there was no room for its key, and it admits uncharged */
} level_call_t;

/* Take back what this level was charged. Callers that wait for its key may have seen the charge. */
static COLD void undo_level(level_call_t *v) {
  if (!v->charged) return;
  while (v->charged > 0) {
    v->charged--;
    undo(&v->c, v->charged, &v->looks[v->charged], v->before[v->charged]);
  }
  v->c.in_shared = 0;
  wait_wake_more(v->c.s, wait_key(v->c.hash, v->c.index));
}

/* After a lost swap. */
static COLD int charge_again(call_t *c, uint32_t i, look_t *l, pair_t *before) {
  if (!again(c)) return FSHM_CONTENDED;
  look(c, i, c->costs[i], l);
  return charge_looked(c, i, l, before);
}

/* Charge all limits of a level. The looks at them have found room. */
static inline HOT int charge_level(level_call_t *v, const fshm_level *level) {
  for (uint32_t i = 0; i < v->c.snapshot.count; i++) {
    look_t *l = &v->looks[i];
    v->before[i] = likely(l->slot.pair.who) ? l->slot.pair : (pair_t){0, 0};
    int status = put(&v->c, i, l, l->verdict.next, FSHM_ACQUIRE);
    if (unlikely(status == CLAIM_LOST))
      status = charge_again(&v->c, i, l, &v->before[i]);
    else
      status = status == CLAIMED ? FSHM_ALLOWED : FSHM_FULL;
    if (unlikely(status == FSHM_FULL && level->passes_full)) {
      undo_level(v);
      v->passed = true;
      return FSHM_ALLOWED;
    }
    if (unlikely(status != FSHM_ALLOWED)) return status;
    v->charged++;
  }
  return FSHM_ALLOWED;
}

/* Look at all limits of a level. False: one of them has no room (`*may`), or the limits are to be loaded again. */
static inline HOT void look_level(level_call_t *v, bool *may) {
  for (uint32_t i = 0; i < v->c.snapshot.count; i++) {
    look_inline(&v->c, i, v->c.costs[i], &v->looks[i]);
    if (unlikely(v->c.stale)) return;
    *may &= !v->looks[i].verdict.retry;
  }
}

/* Write the denied states that end sooner under the present limits: keep_moved(). False: look again. */
static bool keep_all_moved(level_call_t *calls, uint32_t count) {
  bool kept = true;
  for (uint32_t n = 0; n < count; n++)
    for (uint32_t i = 0; i < calls[n].c.snapshot.count; i++)
      if (unlikely(calls[n].looks[i].moved)) kept &= keep_moved(&calls[n].c, i, &calls[n].looks[i]);
  return kept;
}

/* Look at all levels, then charge each; undo if one has lost its room meanwhile, and look again. The innermost level is
 * charged first: its key is the one that the fewest calls share. The outermost is charged last, so that a charge in its
 * last limit is never undone. *at: the level that failed, after FSHM_FULL or an error. */
static UNGUARDED int take_levels(level_call_t *calls, const fshm_level *levels, uint32_t count,
                                 uint32_t op, uint32_t *at) {
  while (again(&calls[0].c)) {
    bool may = true, stale = false;
    for (uint32_t n = 0; n < count; n++) {
      int fresh = renewed(&calls[n].c);
      if (unlikely(fresh != FSHM_OK)) {
        *at = n;
        return fresh;
      }
      look_level(&calls[n], &may);
      stale |= calls[n].c.stale;
    }
    if (unlikely(stale)) continue;
    if (!may) {
      if (op != FSHM_PEEK && !keep_all_moved(calls, count)) continue;
      return FSHM_DENIED;
    }
    if (op == FSHM_PEEK) return FSHM_ALLOWED;
    int status = FSHM_ALLOWED;
    uint32_t n = count;
    while (n > 0 && status == FSHM_ALLOWED) {
      n--;
      calls[n].passed = false;
      status = charge_level(&calls[n], &levels[n]);
    }
    if (likely(status == FSHM_ALLOWED)) return FSHM_ALLOWED;
    for (uint32_t k = n; k < count; k++) undo_level(&calls[k]);
    if (status != FSHM_DENIED) {
      *at = n;
      return status;
    }
    /* Another call took the room between our look and our charge: look again, and report that. */
  }
  return FSHM_CONTENDED;
}

/* What each level says, and which decides. */
static inline HOT uint32_t report_levels(level_call_t *calls, fshm_level *levels, uint32_t count,
                                         uint32_t op, int status, fshm_decision *out) {
  uint32_t decides = 0;
  uint64_t tightest = UINT64_MAX, longest = 0;
  int64_t reset = 0;
  const bool allowed = status == FSHM_ALLOWED;
  for (uint32_t n = 0; n < count; n++) {
    level_call_t *v = &calls[n];
    fshm_decision *d = &levels[n].decision;
    bool room = true;
    for (uint32_t i = 0; i < v->c.snapshot.count; i++) room &= !v->looks[i].verdict.retry;
    report(&v->c, v->looks, room, allowed && op == FSHM_ACQUIRE && !v->passed, d);
    d->status = room ? FSHM_ALLOWED : FSHM_DENIED;
    if (unlikely(v->passed)) d->remaining = 0;
    /* FSHM_NEVER is the longest. */
    const uint64_t retry = (uint64_t)d->retry_after_ns;
    if (allowed ? d->remaining < tightest : retry > longest) decides = n;
    tightest = min_u64(tightest, d->remaining);
    longest = max_u64(longest, retry);
    if (d->reset_after_ns > reset) reset = d->reset_after_ns;
  }
  *out = levels[decides].decision;
  out->remaining = tightest;
  out->reset_after_ns = reset;
  return decides;
}

static inline void count_level(level_call_t *v, uint32_t process, fshm_level *level, int status) {
  if (unlikely(v->passed)) status = FSHM_FULL;
  count_call(&v->c, process, v->looks, status, level->key, level->key_length);
}

/* Charge or refund level by level. */
static COLD uint32_t force_levels(fshm_level *levels, uint32_t count, uint32_t op, uint64_t now,
                                  fshm_decision *out) {
  uint32_t decides = 0, failed = count;
  uint64_t tightest = UINT64_MAX;
  int64_t reset = 0;
  for (uint32_t n = 0; n < count; n++) {
    fshm_level *level = &levels[n];
    fshm_decision *d = &level->decision;
    fshm_apply(level->limiter, op, level->key, level->key_length, level->costs, 0, now, d);
    if (d->status < 0 && failed == count) failed = n;
    if (d->remaining < tightest) decides = n;
    tightest = min_u64(tightest, d->remaining);
    if (d->reset_after_ns > reset) reset = d->reset_after_ns;
  }
  if (failed < count) decides = failed;
  *out = levels[decides].decision;
  if (failed == count) out->remaining = tightest;
  out->reset_after_ns = reset;
  return decides;
}

UNGUARDED uint32_t fshm_levels_apply(fshm_level *levels, uint32_t count, uint32_t op, uint64_t now,
                                     fshm_decision *out) {
  level_call_t calls[FSHM_MAX_LEVELS];
  uint64_t hashes[FSHM_MAX_LEVELS] = {0};
  uint32_t at = 0;
  int status = FSHM_OK;
  memset(out, 0, sizeof *out);
  out->status = FSHM_E_ARGUMENT;
  if (count < 1 || count > FSHM_MAX_LEVELS || op == FSHM_RESERVE || op > FSHM_REFUND) return 0;
  for (uint32_t n = 1; n < count; n++)
    if (levels[n].limiter->segment != levels[0].limiter->segment) return n;
  if (unlikely(op >= FSHM_CHARGE)) return force_levels(levels, count, op, now, out);
  for (uint32_t n = 0; n < count; n++) {
    const fshm_level *level = &levels[n];
    int loaded =
        load_call(&calls[n].c, level->limiter, NULL, level->key, level->key_length, &hashes[n]);
    if (unlikely(loaded != FSHM_OK)) {
      out->status = loaded;
      return n;
    }
  }
  for (uint32_t n = 0; n < count; n++) { /* one instant for all levels */
    call_t *c = &calls[n].c;
    begin_hashed(c, levels[n].limiter, hashes[n], n ? calls[0].c.now : now);
    c->fixed = now != 0;
    c->peeks = op == FSHM_PEEK;
    if (levels[n].costs) c->costs = levels[n].costs;
    calls[n].charged = 0;
    calls[n].passed = false;
  }
  fshm_segment *s = calls[0].c.s;
  uint32_t process = process_index(s);
  status = take_levels(calls, levels, count, op, &at);
  if (unlikely(status < 0)) {
    for (uint32_t n = 0; n < count; n++)
      levels[n].decision = (fshm_decision){.version = CURRENT_VERSION(calls[n].c.snapshot.current)};
    *out = levels[at].decision;
    /* Without limits there is nothing to count. */
    if (op == FSHM_ACQUIRE && calls[at].c.snapshot.count)
      count_level(&calls[at], process, &levels[at], status);
    out->status = status;
    return at;
  }
  at = report_levels(calls, levels, count, op, status, out);
  for (uint32_t n = 0; n < count; n++) {
    const bool counts = op == FSHM_ACQUIRE && (status == FSHM_ALLOWED || n == at);
    if (counts) count_level(&calls[n], process, &levels[n], status);
    if (likely(!calls[n].c.met_shared)) continue;
    (void)tell_shared(&calls[n].c, process, status, counts, &levels[n].decision);
    if (n == at) out->shared = 1;
  }
  out->status = status;
  return at;
}
