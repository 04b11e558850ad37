/* token_lease.c - token leases: a server grants tokens in batches, and the processes of this host spend them.
 * DESIGN.md.
 *
 * A token lease is a slot of the table, and spending from it is a charge (limiter.c). This file has the rest: adding
 * a batch, taking out what is left, and remembering refusals.
 */
#include "../core/hash_table.h"
#include "../limits/limiter.h"
#include "../limits/limits.h"
#include "../stats/counters.h"
#include "token_lease.h"

static uint64_t change_put(const void *context, uint32_t i, const rule_t *r, uint64_t state,
                           uint64_t now) {
  const fshm_token_lease *lease = (const fshm_token_lease *)context + i;
  (void)r;
  if (!lease->tokens && !lease->kept) return state;
  return token_lease_put(state, now, lease->tokens, lease->kept, lease->until_ns);
}

int fshm_token_lease_put(fshm_limiter *leases, const void *key, uint64_t key_length,
                         const fshm_token_lease *batches, uint64_t now) {
  uint64_t at;
  return limiter_change(leases, key, key_length, now, change_put, batches, NULL, &at);
}

typedef struct {
  const uint64_t *tokens, *until_ns, *most;
  uint64_t *out;
} return_t;

static uint64_t change_return(const void *context, uint32_t i, const rule_t *r, uint64_t state,
                              uint64_t now) {
  const return_t *c = context;
  const uint64_t end = state ? state_expires(state) : 0;
  (void)r;
  c->out[i] = 0;
  /* The lease's end is that of its window, rounded down. An earlier one is another window's. */
  if (end <= now || c->until_ns[i] < end) return state;
  const unsigned s = (unsigned)(state >> 57) & 31;
  const uint64_t left = token_lease_left(state, now);
  c->out[i] = min_u64(c->tokens[i], minus(c->most[i], left));
  if (!c->out[i]) return state;
  /* The shift says how large the batch was: it stays, if the count fits. */
  if ((left + 1 + c->out[i]) >> s == 0) return state + c->out[i];
  return token_lease_put(state, now, c->out[i], 0, end);
}

int fshm_token_lease_return(fshm_limiter *leases, const void *key, uint64_t key_length,
                            const uint64_t *tokens, const uint64_t *until_ns, const uint64_t *most,
                            uint64_t now, uint64_t *out) {
  const return_t back = {tokens, until_ns, most, out};
  uint64_t at;
  memset(out, 0, FSHM_MAX_LIMITS * sizeof *out);
  return limiter_change(leases, key, key_length, now, change_return, &back, NULL, &at);
}

static uint64_t change_take(const void *context, uint32_t i, const rule_t *r, uint64_t state,
                            uint64_t now) {
  (void)context, (void)i, (void)r;
  return state - token_lease_left(state, now);
}
static uint64_t change_nothing(const void *context, uint32_t i, const rule_t *r, uint64_t state,
                               uint64_t now) {
  (void)context, (void)i, (void)r, (void)now;
  return state;
}

int fshm_token_lease_look(fshm_limiter *leases, const void *key, uint64_t key_length, int take,
                          uint64_t now, uint64_t *left, uint64_t *left_ns) {
  uint64_t before[FSHM_MAX_LIMITS] = {0}, at;
  int status = limiter_change(leases, key, key_length, now, take ? change_take : change_nothing,
                              NULL, before, &at);
  for (uint32_t i = 0; i < FSHM_MAX_LIMITS; i++) {
    left[i] = token_lease_left(before[i], at);
    left_ns[i] = minus(before[i] ? state_expires(before[i]) : 0, at);
  }
  return status;
}

/* A recent refusal is stored like a token lease: the least cost that was refused, and until when it is. */
typedef struct {
  const uint64_t *costs;
  uint64_t ns;
} refusal_t;

static uint64_t change_refuse(const void *context, uint32_t i, const rule_t *r, uint64_t state,
                              uint64_t now) {
  const refusal_t *refusal = context;
  (void)r, (void)state;
  if (!refusal->ns) return 0;
  /* a cost of 0 counts as one: no refusal concerns a cost of 0 */
  uint64_t least = min_u64(refusal->costs[i], TOKEN_LEASE_MOST);
  /* The state's end is rounded down to a multiple. */
  uint64_t unit = UINT64_C(1) << bit_length(least + 1);
  return token_lease_state(plus_time(now, refusal->ns) + unit, least);
}

int fshm_token_lease_refuse(fshm_limiter *refused, const void *key, uint64_t key_length,
                            const uint64_t *costs, uint64_t ns, uint64_t now) {
  const refusal_t refusal = {costs, ns};
  uint64_t at;
  return limiter_change(refused, key, key_length, now, change_refuse, &refusal, NULL, &at);
}

typedef struct {
  const uint64_t *used, *left_ns;
} known_t;

static uint64_t change_learn(const void *context, uint32_t i, const rule_t *r, uint64_t state,
                             uint64_t now) {
  const known_t *known = context;
  (void)state;
  if (r->kind == FSHM_BUCKET) return known->left_ns[i] ? plus_time(now, known->left_ns[i]) : 0;
  if (!known->used[i] || !known->left_ns[i]) return 0;
  if (r->kind == FSHM_WINDOW)
    return window_state(
        r, (window_t){plus_time(now, known->left_ns[i]), min_u64(known->used[i], r->n), 0});
  if (r->kind == FSHM_CALENDAR)
    return calendar_state((dated_t){
        (calendar_wall(r, now) + known->left_ns[i] + MINUTE - 1) / MINUTE, known->used[i]});
  return r->kind == FSHM_SLIDING ? rule_begun(r, known->used[i], now) : 0;
}

int fshm_learn(fshm_limiter *l, const void *key, uint64_t key_length, const uint64_t *used,
               const uint64_t *left_ns, uint64_t now) {
  const known_t known = {used, left_ns};
  uint64_t at;
  return limiter_change(l, key, key_length, now, change_learn, &known, NULL, &at);
}

typedef struct {
  uint64_t *used, *left_ns;
} knows_t;

static uint64_t change_tell(const void *context, uint32_t i, const rule_t *r, uint64_t state,
                            uint64_t now) {
  const knows_t *out = context;
  out->used[i] = r->kind == FSHM_BUCKET ? 0 : rule_take(r, state, now, now, 0).used_before;
  out->left_ns[i] =
      out->used[i] || r->kind == FSHM_BUCKET ? minus(state ? rule_ends(r, state) : 0, now) : 0;
  return state;
}

int fshm_known(fshm_limiter *l, const void *key, uint64_t key_length, uint64_t now, uint64_t *used,
               uint64_t *left_ns) {
  const knows_t knows = {used, left_ns};
  uint64_t at;
  memset(used, 0, FSHM_MAX_LIMITS * sizeof *used);
  memset(left_ns, 0, FSHM_MAX_LIMITS * sizeof *left_ns);
  return limiter_change(l, key, key_length, now, change_tell, &knows, NULL, &at);
}

/* For how many ns these costs are refused, since the server refused as much; 0: they are not. */
uint64_t token_lease_refused_ns(const fshm_limiter *l, uint64_t hash, const uint64_t *costs,
                                uint64_t now) {
  snapshot_t snapshot;
  uint64_t least = UINT64_MAX;
  if (!limits_load(l->segment, l->index, &snapshot)) return 0;
  for (uint32_t i = 0; i < snapshot.count; i++) {
    found_t f;
    table_find(l->segment, hash, snapshot_who(&snapshot, i, hash), &f);
    uint64_t state = f.pair.who ? state_for(&snapshot.rules[i], f.pair.when) : 0;
    if (state_expires(state) <= now || !state) return 0;
    if ((costs ? costs[i] : 1) < token_lease_left(state, now)) return 0;
    least = min_u64(least, state_expires(state) - now);
  }
  return snapshot.count ? least : 0;
}

int fshm_spend(fshm_limiter *leases, fshm_limiter *refused, fshm_limiter *limits, const void *key,
               uint64_t key_length, const uint64_t *costs, uint64_t now, fshm_decision *out,
               uint32_t *low) {
  snapshot_t snapshot;
  fshm_decision spent;
  fshm_charged put[FSHM_MAX_LIMITS] = {{0, 0, 0, 0, 0}};
  uint64_t hash = fshm_siphash(leases->key[0], leases->key[1], key, key_length);
  *low = 0;
  if (out) memset(out, 0, sizeof *out);
  if (unlikely(!limits_load(leases->segment, leases->index, &snapshot) || !snapshot.count))
    return damage_limits(leases->segment, leases->index);
  int status =
      limiter_take(leases, &snapshot, hash, FSHM_ACQUIRE, key, key_length, costs, now, &spent, put);
  if (unlikely(status < 0)) {
    if (out) out->status = status;
    return status;
  }
  if (status == FSHM_ALLOWED) {
    if (limits)
      counters_add(leases->segment, process_index(leases->segment), limits->counters, status);
    for (uint32_t i = 0; i < snapshot.count; i++)
      *low |= token_lease_low(put[i].state, costs ? costs[i] : 1);
    if (out) {
      fshm_apply(limits, FSHM_PEEK, key, key_length, costs, 0, now, out);
      if (out->status < 0) return out->status;
      out->remaining += spent.remaining;
      out->retry_after_ns = 0;
      out->status = FSHM_ALLOWED;
    }
    return FSHM_ALLOWED;
  }
  if (!refused) return FSHM_ASK;
  uint64_t at = now ? now : segment_now(leases->segment);
  hash = fshm_siphash(refused->key[0], refused->key[1], key, key_length);
  uint64_t wait = token_lease_refused_ns(refused, hash, costs, at);
  if (!wait) return FSHM_ASK;
  fshm_decision shown;
  fshm_apply(limits, FSHM_PROBE, key, key_length, costs, 0, now, &shown);
  if (shown.status < 0) return shown.status;
  /* By the stored state there is room now, but only the server may grant it. */
  if (shown.status == FSHM_ALLOWED) {
    shown.status = FSHM_DENIED;
    shown.retry_after_ns = (int64_t)wait;
    counters_add(leases->segment, process_index(leases->segment), limits->counters, shown.status);
  }
  if (out) *out = shown;
  return FSHM_DENIED;
}
