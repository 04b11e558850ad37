/* wallet.c - quota that somebody else grants in batches, spent by the processes of this host. DESIGN.md.
 *
 * A wallet is a cell like any other, and spending from it a charge like any other (limiter.c). Here is what is
 * particular: putting a batch in, taking what is left out, and remembering what was refused.
 */
#include "../core/internal.h"

static uint64_t change_put(const void *context, uint32_t i, const rule_t *r, uint64_t state,
                           uint64_t now) {
  const fshm_lease *lease = (const fshm_lease *)context + i;
  (void)r;
  if (!lease->tokens && !lease->kept) return state;
  return wallet_put(state, now, lease->tokens, lease->kept, lease->until_ns);
}

int fshm_wallet_put(fshm_limiter *wallet, const void *key, uint64_t key_length,
                    const fshm_lease *leases, uint64_t now) {
  uint64_t at;
  return limiter_change(wallet, key, key_length, now, change_put, leases, NULL, &at);
}

static uint64_t change_take(const void *context, uint32_t i, const rule_t *r, uint64_t state,
                            uint64_t now) {
  (void)context, (void)i, (void)r;
  return state - wallet_left(state, now);
}
static uint64_t change_nothing(const void *context, uint32_t i, const rule_t *r, uint64_t state,
                               uint64_t now) {
  (void)context, (void)i, (void)r, (void)now;
  return state;
}

int fshm_wallet_look(fshm_limiter *wallet, const void *key, uint64_t key_length, int take,
                     uint64_t now, uint64_t *left, uint64_t *left_ns) {
  uint64_t before[FSHM_MAX_LIMITS] = {0}, at;
  int status = limiter_change(wallet, key, key_length, now, take ? change_take : change_nothing,
                              NULL, before, &at);
  for (uint32_t i = 0; i < FSHM_MAX_LIMITS; i++) {
    left[i] = wallet_left(before[i], at);
    left_ns[i] = minus(before[i] ? state_expires(before[i]) : 0, at);
  }
  return status;
}

/* What was refused of late is kept as a wallet is: the least cost that was, and until when it is. */
typedef struct {
  const uint64_t *costs;
  uint64_t ns;
} refusal_t;

static uint64_t change_refuse(const void *context, uint32_t i, const rule_t *r, uint64_t state,
                              uint64_t now) {
  const refusal_t *refusal = context;
  (void)r, (void)state;
  if (!refusal->ns) return 0;
  /* a cost of 0 counts as one: it was not what was refused, and is none that will be denied */
  uint64_t least = min_u64(refusal->costs[i], WALLET_MOST);
  uint64_t unit =
      UINT64_C(1) << bit_length(least + 1); /* that the state's end is rounded down to */
  return wallet_state(plus_time(now, refusal->ns) + unit, least);
}

int fshm_wallet_refuse(fshm_limiter *refused, const void *key, uint64_t key_length,
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
  if (r->kind != FSHM_SLIDING) return 0;
  sliding_t s = sliding_read(r, 0, now);
  s.count = known->used[i];
  return sliding_state(r, s);
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
  out->used[i] = r->kind == FSHM_BUCKET ? 0 : meter_take(r, state, now, now, 0).used_before;
  out->left_ns[i] =
      out->used[i] || r->kind == FSHM_BUCKET ? minus(state ? state_expires(state) : 0, now) : 0;
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

/* For how long these costs are refused, since no smaller ones fitted of late; 0: they are not. */
uint64_t wallet_refused_ns(const fshm_limiter *l, uint64_t hash, const uint64_t *costs,
                           uint64_t now) {
  plan_t plan;
  uint64_t least = UINT64_MAX;
  if (!limits_load(l->segment, l->index, &plan)) return 0;
  for (uint32_t i = 0; i < plan.count; i++) {
    found_t f;
    cells_find(l->segment, hash, plan_who(&plan, i, hash), &f);
    uint64_t state = f.pair.who ? state_for(&plan.rules[i], f.pair.when) : 0;
    if (state_expires(state) <= now || !state) return 0;
    if ((costs ? costs[i] : 1) < wallet_left(state, now)) return 0;
    least = min_u64(least, state_expires(state) - now);
  }
  return plan.count ? least : 0;
}

int fshm_spend(fshm_limiter *wallet, fshm_limiter *refused, fshm_limiter *limits, const void *key,
               uint64_t key_length, const uint64_t *costs, uint64_t now, fshm_decision *out,
               uint32_t *low) {
  plan_t plan;
  fshm_decision spent;
  fshm_charged put[FSHM_MAX_LIMITS] = {{0, 0, 0, 0, 0}};
  uint64_t hash = fshm_siphash(wallet->key[0], wallet->key[1], key, key_length);
  *low = 0;
  if (out) memset(out, 0, sizeof *out);
  if (unlikely(!limits_load(wallet->segment, wallet->index, &plan) || !plan.count))
    return damage_limits(wallet->segment, wallet->index);
  int status =
      limiter_take(wallet, &plan, hash, FSHM_ACQUIRE, key, key_length, costs, now, &spent, put);
  if (unlikely(status < 0)) {
    if (out) out->status = status;
    return status;
  }
  if (status == FSHM_ALLOWED) {
    if (limits) tally_call(wallet->segment, process_slot(wallet->segment), limits->tally, status);
    for (uint32_t i = 0; i < plan.count; i++)
      *low |= wallet_low(put[i].state, costs ? costs[i] : 1);
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
  uint64_t at = now ? now : segment_now(wallet->segment);
  hash = fshm_siphash(refused->key[0], refused->key[1], key, key_length);
  uint64_t wait = wallet_refused_ns(refused, hash, costs, at);
  if (!wait) return FSHM_ASK;
  fshm_decision told;
  fshm_apply(limits, FSHM_PROBE, key, key_length, costs, 0, now, &told);
  if (told.status < 0) return told.status;
  if (told.status == FSHM_ALLOWED) { /* room has come since by the meter, but must be asked for */
    told.status = FSHM_DENIED;
    told.retry_after_ns = (int64_t)wait;
    tally_call(wallet->segment, process_slot(wallet->segment), limits->tally, told.status);
  }
  if (out) *out = told;
  return FSHM_DENIED;
}
