/* holds_token_leases.c - what must hold of token leases: nothing is spent that was not granted, whichever process dies or stops
 * where; what was taken out to be given back is not spent as well; a lease that is over is over. */
#include "crash.h"

/* Of each limit. */
static void left_at(uint64_t now, uint64_t *left) {
  uint64_t ns[FSHM_MAX_LIMITS];
  (void)fshm_token_lease_look(world.l, KEY, strlen(KEY), 0, now, left, ns);
}

static uint64_t least_left(uint64_t now) {
  uint64_t left[FSHM_MAX_LIMITS], least = UINT64_MAX;
  left_at(now, left);
  for (uint32_t i = 0; i < op->count; i++) least = min_u64(least, left[i]);
  return least;
}

static uint64_t token_lease_exhaust(uint64_t now) {
  uint64_t spent = 0;
  uint32_t low;
  while (spent < 100 && fshm_spend(world.l, NULL, world.l, KEY, strlen(KEY), NULL, now, NULL,
                                   &low) == FSHM_ALLOWED)
    spent++;
  return spent;
}
static int token_lease_exhaust_afresh(void) { return (int)token_lease_exhaust(world.now); }

/* One after the other on the way from before to after: a limit is as before it or as after it. */
static uint64_t known_left(void) {
  uint64_t left[FSHM_MAX_LIMITS], least = UINT64_MAX;
  left_at(world.now, left);
  for (uint32_t i = 0; i < op->count; i++) {
    if (left[i] != op->before && left[i] != op->after)
      broken("%llu tokens are left, of %u before and %u after it", (unsigned long long)left[i],
             op->before, op->after);
    least = min_u64(least, left[i]);
  }
  return least;
}

/* What a spender reports of the stored states: all is used, but the tokens of the lease. */
static void check_told_of(const outcome_t *out) {
  const fshm_decision *d = &out->decision;
  if (!world.known) return;
  if (d->status != out->status) broken("it is told %d, and answered %d", d->status, out->status);
  if (d->status == FSHM_DENIED && (d->retry_after_ns != PER / 2 || d->remaining))
    broken("it is told to wait for %lld ns", (long long)d->retry_after_ns);
}

static void token_lease_begin(void) {
  uint64_t left = least_left(world.now);
  if (left != op->before) broken("before it, %llu are left", (unsigned long long)left);
}

static void token_lease_end(void) {
  if (told->status != op->status) broken("it answers %d, not %d", told->status, op->status);
  check_told_of(told);
  uint64_t left = least_left(world.now);
  if (left != op->after) broken("after it, %llu are left", (unsigned long long)left);
}

static void token_lease_contend(void) {
  outcome_t mine = {0};
  uint64_t seen = known_left();
  op->run(&mine);
  uint64_t now = least_left(world.now);
  if (op->op == TOKEN_LEASE_TAKE) {
    if (mine.number != seen || now)
      broken("S took %llu of %llu, %llu are left", (unsigned long long)mine.number,
             (unsigned long long)seen, (unsigned long long)now);
  } else if (op->op == TOKEN_LEASE_PUT) {
    if (now != seen + op->cost) broken("S put some in, %llu are left", (unsigned long long)now);
  } else {
    bool fits = seen >= op->cost;
    if (mine.status != (fits ? FSHM_ALLOWED : op->status == FSHM_ALLOWED ? FSHM_ASK : op->status))
      broken("S is answered %d", mine.status);
    check_told_of(&mine);
    if (now != seen - (fits ? op->cost : 0))
      broken("%llu are left after S, %llu before it", (unsigned long long)now,
             (unsigned long long)seen);
  }
}

static void token_lease_survive(void) {
  uint64_t seen = known_left();
  if (told->done && told->status != op->status)
    broken("T says %d, not %d", told->status, op->status);
  if (told->done && seen != op->after) broken("T says it is done, and it is not");
  uint64_t spent = position.k % 16 ? 0 : (uint64_t)fresh_process(token_lease_exhaust_afresh);
  spent += token_lease_exhaust(world.now);
  if (spent != seen)
    broken("then %llu are spent of %llu", (unsigned long long)spent, (unsigned long long)seen);
  check_invariants(true);
  position.later = true;
  if (least_left(LATER) || token_lease_exhaust(LATER))
    broken("the lease is over, and it is spent from");
}

static void token_lease_raced(const outcome_t *mine) {
  uint64_t now = least_left(world.now), expected;
  if (op->op == TOKEN_LEASE_TAKE) {
    expected = 0;
    if (told->number + mine->number != op->before)
      broken("T and S took %llu and %llu of %u", (unsigned long long)told->number,
             (unsigned long long)mine->number, op->before);
  } else if (op->op == TOKEN_LEASE_PUT) {
    expected = op->before + 2 * op->cost;
  } else {
    uint64_t spent = (told->status == FSHM_ALLOWED) + (mine->status == FSHM_ALLOWED);
    if (spent != min_u64(2, op->before / op->cost))
      broken("T and S have spent %llu times", (unsigned long long)spent);
    expected = op->before - spent * op->cost;
  }
  if (now != expected)
    broken("%llu are left after both, not %llu", (unsigned long long)now,
           (unsigned long long)expected);
  check_invariants(false);
}

static const holds_t token_leases = {token_lease_begin,   token_lease_end,   token_lease_contend,
                                     token_lease_survive, token_lease_raced, NULL};
