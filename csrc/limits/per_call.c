/* per_call.c - windows whose limit comes with the call. Argued in DESIGN.md.
 *
 * A storage of another library gets a key, its limit and its period with each hit, and later only the key. So the
 * limiter here is only a name: it says whose keys these are, and when they were reset. A window's state has its
 * count and its end, without any limit.
 */
#include "../permits/semaphore.h"
#include "../stats/counters.h"
#include "../stats/key_stats.h"
#include "per_call.h"

/* FSHM_OK; FSHM_E_ARGUMENT: the limiter is of another kind; or FSHM_E_DAMAGED. */
int keyed_begin(keyed_t *k, const fshm_limiter *l, uint32_t kind, const void *key, uint64_t length,
                uint64_t now) {
  snapshot_t snapshot;
  k->s = l->segment;
  k->index = l->index;
  k->counters = l->counters;
  if (unlikely(!limits_load(k->s, k->index, &snapshot))) return damage_limits(k->s, k->index);
  if (unlikely(!snapshot.count || snapshot.rules[0].kind != kind)) return FSHM_E_ARGUMENT;
  k->hash = side_who(fshm_siphash(l->key[0], l->key[1], key, length), k->index);
  k->who = side_who(side_salted(k->hash, snapshot.salt), k->index);
  k->fixed = now != 0;
  k->now = now ? min_u64(now, TIME_MAX - 1) : segment_now(k->s);
  return FSHM_OK;
}

/* The key in a slot. FSHM_OK; 0: the key statistics do not know it, or its limiter is of another kind. */
COLD int keyed_at(keyed_t *k, fshm_segment *s, uint64_t slot, uint32_t kind, uint64_t now) {
  snapshot_t snapshot;
  if (slot >= s->slot_count) return 0;
  uint64_t who = load_relaxed(&s->slots[slot].who);
  uint32_t meta = load_relaxed(&s->key_stats[slot].meta), index = meta >> 20;
  if (!who || index >= s->limiter_count || key_stats_meta(index, who) != meta) return 0;
  if (!limits_load(s, index, &snapshot) || !snapshot.count || snapshot.rules[0].kind != kind)
    return 0;
  k->s = s;
  k->index = index;
  k->counters = COUNTERS; /* inspection is not a call */
  k->hash = side_salted(who, snapshot.salt);
  k->who = who;
  k->fixed = now != 0;
  k->now = now ? min_u64(now, TIME_MAX - 1) : segment_now(s);
  return FSHM_OK;
}

/* The time now, where the time at the start of the call is too old. */
uint64_t keyed_now(const keyed_t *k) {
  return k->fixed ? k->now : max_u64(segment_now(k->s), k->now);
}

/* Swap in the next state, or claim a slot with the first one. CLAIMED, CLAIM_LOST (look again) or CLAIM_FULL. */
int keyed_put(const keyed_t *k, uint64_t home, found_t *f, uint64_t who, uint64_t next,
              first_state_t *first, void *context) {
  if (likely(f->pair.who)) {
    pair_t seen = f->pair, to = {seen.who, next};
    return pair_cas(&k->s->slots[f->slot], &seen, to) ? CLAIMED : CLAIM_LOST;
  }
  int status = table_claim(k->s, home, who, k->now, first, context, &f->slot);
  if (status == CLAIMED) f->pair.who = who;
  if (unlikely(status == CLAIM_FULL) && semaphore_free_dead(k->s, home, who, k->now))
    return CLAIM_LOST;
  return status;
}

/* Count the call. */
void keyed_tell(const keyed_t *k, const found_t *f, const void *key, uint64_t length, int status) {
  uint32_t process = process_index(k->s);
  counters_add(k->s, process, k->counters, status);
  if (likely(f->pair.who && !(k->s->names_mode & FSHM_NAMES_OFF)))
    key_stats_count(k->s, process, f->slot, key_stats_meta(k->index, k->who), key, length,
                    status == FSHM_ALLOWED);
}

typedef struct {
  const keyed_t *k;
  rule_t rule;
  uint64_t cost;
  uint64_t ahead; /* ns added to segment time, to align the windows */
  verdict_t verdict;
  uint64_t next; /* the state after the call */
} counted_t;

static void counted_take(counted_t *c, uint64_t state, uint64_t now) {
  state = state_for(&c->rule, state);
  c->verdict = c->rule.kind == FSHM_WINDOW
                   ? window_count(&c->rule, state, now, c->cost)
                   : sliding_count(&c->rule, state, now + c->ahead, c->cost);
  c->next = c->verdict.retry ? state : c->verdict.next;
}

static uint64_t first_counted(void *context) {
  counted_t *c = context;
  counted_take(c, 0, keyed_now(c->k));
  return c->next;
}

static void counted_tell(const counted_t *c, uint64_t now, fshm_counted *out) {
  if (c->rule.kind == FSHM_WINDOW) {
    window_t w = window_read(c->next, now);
    out->count = w.count;
    out->left_ns = (int64_t)minus(w.end, now);
    return;
  }
  sliding_t s = sliding_read(&c->rule, c->next, now + c->ahead);
  out->count = s.count;
  out->previous = s.previous;
  out->left_ns = (int64_t)s.left;
}

void fshm_count(fshm_limiter *l, const void *key, uint64_t key_length, const fshm_limit *limit,
                uint64_t cost, uint64_t now, fshm_counted *out) {
  keyed_t k;
  found_t f;
  memset(out, 0, sizeof *out);
  out->status = FSHM_E_ARGUMENT;
  if (!limit_valid(limit) || (limit->kind != FSHM_WINDOW && limit->kind != FSHM_SLIDING)) return;
  out->status = keyed_begin(&k, l, limit->kind, key, key_length, now);
  if (unlikely(out->status != FSHM_OK)) return;
  counted_t c = {.k = &k, .rule = rule_make(limit), .cost = cost};
  if (limit->kind == FSHM_SLIDING) c.ahead = k.s->created_realtime_ns % limit->per_ns;
  out->status = FSHM_CONTENDED;
  for (int tries = 0; tries < MAX_TRIES; tries += f.pair.who ? 1 : CLAIM_TRIES) {
    table_find(k.s, k.hash, k.who, &f);
    uint64_t state = f.pair.who ? f.pair.when : 0;
    if (unlikely(c.rule.kind == FSHM_SLIDING && sliding_is_later(&c.rule, state, k.now + c.ahead)))
      k.now = keyed_now(&k); /* we were stopped since the clock was read */
    counted_take(&c, state, k.now);
    out->status = c.verdict.retry ? FSHM_DENIED : FSHM_ALLOWED;
    if (!cost || c.verdict.retry) break;
    int status = keyed_put(&k, k.hash, &f, k.who, c.next, first_counted, &c);
    if (likely(status == CLAIMED)) break;
    out->status = status == CLAIM_FULL ? FSHM_FULL : FSHM_CONTENDED;
    if (status == CLAIM_FULL) break;
  }
  if (cost) keyed_tell(&k, &f, key, key_length, out->status);
  if (out->status >= 0) counted_tell(&c, k.now, out);
}

/* The answer to a hit of 1, without the hit: for people. For a sliding counter, the times are those of the algorithm
 * that rounds the estimate up: a hit fits then at the latest. */
COLD void counted_peek(const keyed_t *k, const fshm_limit *limit, fshm_decision *out) {
  found_t f;
  counted_t c = {.k = k, .rule = rule_make(limit)};
  if (limit->kind == FSHM_SLIDING) c.ahead = k->s->created_realtime_ns % limit->per_ns;
  table_find(k->s, k->hash, k->who, &f);
  uint64_t state = state_for(&c.rule, f.pair.who ? f.pair.when : 0), at = k->now + c.ahead;
  counted_take(&c, state, k->now);
  out->remaining = minus(limit->n, c.verdict.used_before);
  out->status = out->remaining ? FSHM_ALLOWED : FSHM_DENIED;
  uint64_t retry = out->remaining ? 0 : rule_take(&c.rule, state, at, at, 1).retry;
  out->retry_after_ns = retry == UINT64_MAX ? FSHM_NEVER : (int64_t)retry;
  out->reset_after_ns = (int64_t)rule_take(&c.rule, state, at, at, 0).reset;
}

uint64_t fshm_live_keys(fshm_limiter *l, uint64_t now) {
  fshm_segment *s = l->segment;
  uint64_t count = 0;
  if (!now) now = segment_now(s);
  for (uint64_t slot = 0; slot < s->slot_count; slot++) {
    uint64_t who = load_relaxed(&s->slots[slot].who);
    if (!who || load_relaxed(&s->key_stats[slot].meta) != key_stats_meta(l->index, who)) continue;
    pair_t pair = s->read_only ? pair_peek(&s->slots[slot]) : pair_load(&s->slots[slot]);
    count += pair.who == who && !IS_PENDING(pair.when) && state_ends(s, pair.who, pair.when) > now;
  }
  return count;
}
