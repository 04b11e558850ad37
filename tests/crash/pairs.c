/* pairs.c - the pairs of operations of which every schedule is run (schedules.c), and what must come of it.
 * On a table of one line of four slots, unless said otherwise. */
#include "crash.h"

#define OTHER_KEY "k2"

static void run_apply_other_key(outcome_t *out) {
  out->decision = apply_at(world.l, FSHM_ACQUIRE, OTHER_KEY, 1, world.now);
  out->status = out->decision.status;
}
static void run_refund(outcome_t *out) {
  out->decision = apply_at(world.l, FSHM_REFUND, KEY, 1, world.now);
  out->status = out->decision.status;
}

static const fshm_limit rival_limits[] = {{7, PER, 7, FSHM_WINDOW, 0},
                                          {8, PER, 8, FSHM_SLIDING, 0}};
static void run_publish_rival(outcome_t *out) { publish_limits(out, rival_limits, 2); }

/* Then the last of the second limit is taken, so that a check that has charged the first undoes it. */
static void run_publish_and_take(outcome_t *out) {
  const uint64_t costs[FSHM_MAX_LIMITS] = {0, 1, 0, 0};
  run_publish(out);
  if (out->status != FSHM_OK) return;
  fshm_apply(world.l, FSHM_ACQUIRE, KEY, strlen(KEY), costs, 0, world.now, &out->decision);
  out->status = out->decision.status;
}
/* Who has seen the new limits is bound by them. */
static void run_look_and_admit(outcome_t *out) {
  out->number = permits_limit(world.l);
  run_admit(out);
}

/* Raised, taken up, and lowered again: the limit is what it was, and what is held is not. */
static void run_raise_take_lower(outcome_t *out) {
  const fshm_limit high = op->limits[0], low = op->next[0];
  fshm_permit permit;
  fshm_decision d;
  uint32_t held, taken = 0;
  publish_limits(out, &high, 1);
  do {
    fshm_admit(world.l, KEY, strlen(KEY), NULL, world.now, &permit, &d, &held);
    taken += d.status == FSHM_ALLOWED;
  } while (d.status == FSHM_ALLOWED);
  out->number = taken;
  if (out->status == FSHM_OK) publish_limits(out, &low, 1);
}

static uint32_t admitted(const outcome_t out[2]) {
  return (out[0].status == FSHM_ALLOWED) + (out[1].status == FSHM_ALLOWED);
}

static void expect(bool holds, const outcome_t out[2], const char *what) {
  if (!holds) broken("%s: they are answered %d and %d", what, out[0].status, out[1].status);
}

static uint64_t remaining_of(const char *key) {
  levels_t l = levels_of(world.l, key);
  return least_remaining(&l);
}

/* One token is left: one has it, the other learns that there is none. */
static void verify_last_token(const outcome_t out[2]) {
  expect(admitted(out) == 1, out, "one token");
  expect(out[0].status + out[1].status == FSHM_ALLOWED + FSHM_DENIED, out, "one token");
  expect(remaining_of(KEY) == 0, out, "something is left");
}

/* The same, of the last of several limits: what was charged before it is undone. */
static void verify_last_of_several(const outcome_t out[2]) {
  levels_t l = levels_of(world.l, KEY);
  verify_last_token(out);
  expect(l.remaining[0] == op->limits[0].n - op->prior - 1, out, "the first limit");
}

/* The last token of one level: what was charged in others is undone. */
static void verify_last_of_levels(const outcome_t out[2]) {
  levels_t l = levels_of(world.l, KEY);
  expect(admitted(out) == 1, out, "one is admitted");
  for (uint32_t i = 0; i < LEVELS; i++)
    expect(l.remaining[i] == op->limits[i].n - op->prior - 1, out, "a level");
}

static void verify_both(const outcome_t out[2]) {
  expect(admitted(out) == 2, out, "room for both");
}
static void verify_both_charged(const outcome_t out[2]) {
  verify_both(out);
  expect(remaining_of(KEY) == op->limits[0].n - op->prior - 2, out, "both are charged");
}

/* Two keys, one slot: the other learns that the table is full. */
static void verify_one_slot(const outcome_t out[2]) {
  expect(admitted(out) == 1, out, "one slot");
  expect(out[0].status + out[1].status == FSHM_ALLOWED + FSHM_FULL, out, "one slot");
}

/* A key that expires, and one that wants its slot. */
static void verify_own_slot(const outcome_t out[2]) { expect(admitted(out) == 1, out, "one slot"); }

static void verify_refund(const outcome_t out[2]) {
  expect(out[1].status == FSHM_ALLOWED, out, "a refund");
  expect(remaining_of(KEY) == (out[0].status != FSHM_ALLOWED), out, "one token given back");
}

static void verify_reset(const outcome_t out[2]) {
  uint64_t left = remaining_of(KEY), n = op->limits[0].n;
  verify_both(out);
  expect(left == n || left == n - 1, out, "after a reset");
}

static void verify_last_permit(const outcome_t out[2]) {
  expect(admitted(out) == 1, out, "one permit");
  expect(out[0].status + out[1].status == FSHM_ALLOWED + FSHM_DENIED, out, "one permit");
  expect(held_alive(world.l, KEY) == permits_limit(world.l), out, "not all are held");
}

/* Two beside S at once under a lowered limit that has room for one: never both. */
static void verify_lowered(const outcome_t out[2]) {
  expect(admitted(out) <= 1, out, "one permit");
  expect(held_alive(world.l, KEY) == op->prior + admitted(out), out, "what is held");
}

static void verify_raised_and_lowered(const outcome_t out[2]) {
  outcome_t mine = {0};
  uint64_t held = (out[0].status == FSHM_ALLOWED) + out[1].number;
  expect(out[1].status == FSHM_OK, out, "the limits");
  expect(held <= op->limits[0].n, out, "more than the higher limit");
  expect(held_alive(world.l, KEY) == held, out, "what is held");
  expect(fshm_in_flight(world.l, KEY, strlen(KEY)) == held, out, "what is said to be held");
  run_admit(&mine);
  expect(mine.status == FSHM_DENIED, out, "one more is admitted");
}

/* The permits that are valid, and those that may be taken now, are no more than was reported or is allowed. */
static void verify_granted(const outcome_t out[2]) {
  uint64_t most = max_u64(lease_now(false).leased, out[1].number);
  expect(held_alive(world.l, KEY) == op->prior + (out[0].status == FSHM_ALLOWED), out, "held");
  expect(held_alive(world.l, KEY) <= most, out, "more than was told");
  expect(lease_exhaust() <= most, out, "more than is allowed");
}
static void verify_granted_both(const outcome_t out[2]) {
  uint64_t leased = lease_now(false).leased;
  expect(held_alive(world.l, KEY) == op->prior + admitted(out), out, "held");
  expect(op->prior + admitted(out) <= leased, out, "more than is allowed");
  expect(lease_exhaust() == leased, out, "not all that is allowed");
}
/* Without the grantor. What is granted after that, it is counted with; what was, is dropped. */
static void verify_alone(const outcome_t out[2]) {
  uint32_t held = held_alive(world.l, KEY);
  expect(held == (out[0].status == FSHM_ALLOWED), out, "held");
  expect(lease_exhaust() == max_u64(lease_now(false).leased, held), out, "what is allowed");
}

static void verify_release(const outcome_t out[2]) {
  expect(out[0].status == 1, out, "a release");
  expect(held_alive(world.l, KEY) == (out[1].status == FSHM_ALLOWED), out, "what is held");
}

static void verify_freed(const outcome_t out[2]) {
  expect(out[0].status == FSHM_ALLOWED, out, "a dead process's permit");
  expect(held_alive(world.l, KEY) == 1, out, "what is held");
}

static void verify_publish(const outcome_t out[2]) {
  fshm_limit limits[FSHM_MAX_LIMITS];
  uint64_t version;
  verify_both(out);
  uint32_t count = (uint32_t)fshm_limiter_limits(world.l, limits, &version);
  expect((count == op->next_count && same_limits(limits, op->next, count)) ||
             (count == 2 && same_limits(limits, rival_limits, 2)),
         out, "the limits are neither's");
  expect(version == 3, out, "two versions later");
}

static void verify_publish_and_check(const outcome_t out[2]) {
  verify_both(out);
  expect(remaining_of(KEY) == op->next[0].n - op->prior - 1, out, "what was consumed stays");
}

static uint64_t left_of(uint32_t i, uint64_t consumed) { return minus(op->next[i].n, consumed); }

static void verify_publish_and_several(const outcome_t out[2]) {
  levels_t l = levels_of(world.l, KEY);
  uint64_t consumed = op->prior + (out[1].status == FSHM_ALLOWED);
  expect(out[0].status == FSHM_OK, out, "the limits");
  expect(admitted(out) == 2 || op->next[1].n <= op->prior, out, "room for both");
  for (uint32_t i = 0; i < 2; i++)
    expect(l.remaining[i] == left_of(i, consumed), out, "what was consumed stays");
}

static void verify_publish_and_last(const outcome_t out[2]) {
  levels_t l = levels_of(world.l, KEY);
  verify_last_token(out);
  expect(l.remaining[0] == left_of(0, op->prior + (out[1].status == FSHM_ALLOWED)), out,
         "the first limit");
}

/* S holds what the new limit allows. */
static void verify_publish_and_admit(const outcome_t out[2]) {
  outcome_t mine = {0};
  bool allowed = out[1].status == FSHM_ALLOWED;
  expect(out[0].status == FSHM_OK, out, "the limits");
  expect(!allowed || out[1].number > op->next[0].n, out, "more than the limit that it has seen");
  expect(held_alive(world.l, KEY) == op->prior + allowed, out, "what is held");
  run_admit(&mine);
  expect(mine.status == FSHM_DENIED, out, "then one more");
}

/* Of moving windows: as many are admitted as fit, and no token is lost or left over. */
static void verify_moving(const outcome_t out[2]) {
  uint64_t fit = (op->limits[0].n - (op->flags & EXPIRED ? 0 : op->prior)) / op->cost;
  expect(admitted(out) == min_u64(2, fit), out, "what fits");
  uint64_t consumed = admitted(out) * op->cost + (op->flags & EXPIRED ? 0 : op->prior);
  expect(tokens_at(NOW) == consumed, out, "tokens");
  expect(moving_of(0, NOW).count == consumed, out, "what is shown");
  expect(moving_exhaust(NOW) == op->limits[0].n - consumed, out, "what is left");
}

/* Of two that want several, each may take some, and both give them back. */
static void verify_moving_several(const outcome_t out[2]) {
  uint64_t consumed = op->prior + admitted(out) * op->cost;
  expect(admitted(out) <= 1, out, "what fits");
  expect(tokens_at(NOW) == consumed, out, "tokens");
  expect(moving_of(0, NOW).count == consumed, out, "what is shown");
  expect(moving_exhaust(NOW) == op->limits[0].n - consumed, out, "what is left");
}

/* Budgets. What B does beside A's reservation: lower the budget, take back what was added, forget all; and reserve. */
static void run_lower_and_reserve(outcome_t *out) {
  const fshm_limit lower = {3, PER, 0, FSHM_MONEY, 0};
  rule_t rule = rule_make(&lower);
  rule.unit = money_window(world.s, &rule, world.now);
  if (publish(world.s, world.l->index, &rule, 1, world.now) != FSHM_OK)
    broken("the budget cannot be lowered");
  run_budget_reserve(out);
}
static void run_take_back_and_reserve(outcome_t *out) {
  fshm_budget b;
  (void)fshm_budget_add(world.l, KEY, strlen(KEY), 1, -4, world.now);
  out->status = fshm_budget_reserve(world.l, KEY, strlen(KEY), 1, 0, world.now, &b);
}
static void run_forget_and_reserve(outcome_t *out) {
  (void)fshm_reset_all(world.l);
  run_budget_reserve(out);
}
/* What is charged at the end of a window is known to be of that one, and is corrected there. */
#define WINDOW_END ((WALL_BEGAN + NOW / PER * PER + PER) / MINUTE)
static void run_charge(outcome_t *out) {
  fshm_budget b;
  out->status = fshm_budget_reserve(world.l, KEY, strlen(KEY), 2, FSHM_BUDGET_CHARGE, NOW, &b);
  out->number = b.window == WINDOW_END ? 0 : 2;
}
static void charge_two(void) {
  (void)fshm_budget_reserve(world.l, KEY, strlen(KEY), 2, FSHM_BUDGET_CHARGE, NOW, &budget_held);
}
static void run_correct(outcome_t *out) {
  out->status = fshm_budget_settle(world.l, KEY, strlen(KEY), &budget_held, 2, 0, NOW);
}
static void run_spend_later(outcome_t *out) {
  out->status = fshm_budget_add(world.l, KEY, strlen(KEY), 0, 3, NOW + PER);
}
static void run_raise(outcome_t *out) {
  out->status = fshm_budget_raise(world.l, KEY, strlen(KEY), 3, 5, WINDOW_END, NOW);
}
static void run_look_later(outcome_t *out) {
  fshm_budget b;
  out->status = fshm_budget_look(world.l, KEY, strlen(KEY), NOW + PER, &b);
}
static void run_lease(outcome_t *out) {
  fshm_budget b;
  out->status =
      fshm_budget_reserve(world.l, KEY, strlen(KEY), op->cost, FSHM_BUDGET_GRANTED, world.now, &b);
}
static void add_four(void) { (void)fshm_budget_add(world.l, KEY, strlen(KEY), 1, 4, world.now); }
static fshm_budget budget_at(uint64_t now) {
  world.now = now;
  const fshm_budget b = budget_now();
  world.now = NOW;
  return b;
}

static void verify_budget(const outcome_t out[2]) {
  const fshm_budget b = budget_now();
  const uint64_t fit = (op->limits[0].n - (op->flags & EXPIRED ? 0 : op->prior)) / op->cost;
  expect(admitted(out) == min_u64(2, fit), out, "what fits");
  expect(budget_left(&b) == (int64_t)(op->limits[0].n - (op->flags & EXPIRED ? 0 : op->prior) -
                                      admitted(out) * op->cost),
         out, "what is left");
}
/* Each fits only without the other. */
static void verify_not_both(const outcome_t out[2]) { expect(admitted(out) <= 1, out, "both"); }
/* What the one had reserved is at any time reserved, or spent, or both. */
static void verify_settled(const outcome_t out[2]) {
  const fshm_budget b = budget_now();
  const uint64_t room = op->limits[0].n - op->prior - 3;
  expect(out[0].status == FSHM_OK, out, "a settlement");
  expect(out[1].status != FSHM_ALLOWED || op->cost <= room, out, "what does not fit");
  expect(b.spent == op->prior + op->cost, out, "what is spent");
  expect(b.reserved == (admitted(out) - 1) * op->cost, out, "what is reserved");
}
static void verify_added(const outcome_t out[2]) {
  const fshm_budget b = budget_now();
  expect(out[1].status == FSHM_OK, out, "an addition");
  expect(budget_left(&b) == (int64_t)(op->limits[0].n + op->cost - op->prior) -
                                (int64_t)(admitted(out) - 1) * op->cost,
         out, "what is left");
}
/* What is withdrawn is not reserved, nor granted any more; nothing of it is lost. */
static void verify_withdrawn(const outcome_t out[2]) {
  const fshm_budget b = budget_now();
  expect(out[1].status == FSHM_OK, out, "a withdrawal");
  expect(b.granted + out[1].number == 3, out, "what is granted");
  expect(b.spent + b.reserved <= b.granted, out, "what is reserved and not granted");
  expect(b.reserved == (out[0].status == FSHM_ALLOWED ? op->cost : 0), out, "what is reserved");
}
static void verify_next_window(const outcome_t out[2]) {
  expect(budget_at(NOW + PER).spent == 3 + out[0].number, out, "the next window");
}
static void verify_not_granted(const outcome_t out[2]) {
  expect(!budget_at(NOW + PER).granted, out, "the next window has a grant");
}

#define PAIR(a, b, check) .run = {(a), (b)}, .verify = (check)
#define START(title, ...) \
  .start = {.name = (title), .make = start_rate_limits, .op = FSHM_ACQUIRE, .cost = 1, __VA_ARGS__}
#define PERMIT_START(title, ...) .start = {.name = (title), .make = start_permits, __VA_ARGS__}
#define LEASE_START(title, ...) \
  .start = {.name = (title), .make = start_leases, .capacity = 8, ONE(PERMITS(4)), __VA_ARGS__}
#define MOVING_START(title, tokens, ...) \
  .start = {.name = (title),             \
            .make = start_moving,        \
            .op = HIT,                   \
            .cost = (tokens),            \
            .capacity = 4,               \
            __VA_ARGS__}
/* rules: of the budget; a look and a publication take an access for each */
#define BUDGET_START(title, n, rules, tokens, ...) \
  .start = {.name = (title),                       \
            .make = start_budget,                  \
            .op = MONEY_RESERVE,                   \
            .capacity = 8,                         \
            .cost = (tokens),                      \
            MONEY_RULES(n, rules),                 \
            __VA_ARGS__}
#define LEVELS_START(title, inner, middle, outer, ...) \
  .start = {.name = (title),                           \
            .make = start_levels,                      \
            .op = FSHM_ACQUIRE,                        \
            .cost = 1,                                 \
            .levels = true,                            \
            .limits = {inner, middle, outer},          \
            .count = 1,                                \
            __VA_ARGS__}
#define TWO_OF_LEVELS PAIR(run_levels, run_levels, verify_last_of_levels)
#define TWO_RESERVE PAIR(run_budget_reserve, run_budget_reserve, verify_budget)
#define SAME_KEY PAIR(run_apply, run_apply, verify_last_token)
#define TWO_KEYS(check) PAIR(run_apply, run_apply_other_key, check)
#define TWO_TAKERS PAIR(run_admit, run_admit, verify_last_permit)

/* clang-format off: a line for each */
static const pair_of_operations_t pairs[] = {
    /* one token of one key */
    {START("pair-same-key", ONE(WINDOW(1))), SAME_KEY},
    {START("pair-same-key-bucket", ONE(BUCKET(1))), SAME_KEY},
    {START("pair-same-key-tenant", ONE(WINDOW(1)), .flags = TENANT_FIRST | STAGGERED), SAME_KEY},
    {START("pair-same-key-expired", ONE(WINDOW(1)), .prior = 1, .flags = EXPIRED), SAME_KEY},
    {START("pair-same-key-expiring", ONE(WINDOW(1)), .prior = 1, .flags = EXPIRING | STAGGERED),
     SAME_KEY},
    {START("pair-same-key-claimed-low", ONE(WINDOW(1)), .flags = PENDING_LOW), SAME_KEY},
    {START("pair-same-key-claimed-high", ONE(WINDOW(1)), .flags = PENDING_HIGH), SAME_KEY},
    {START("pair-same-key-claimed-twice", ONE(WINDOW(1)), .flags = PENDING_LOW | PENDING_HIGH),
     SAME_KEY},
    {START("pair-same-key-one-slot", ONE(WINDOW(1)), .flags = CROWDED | ONE_LEFT), SAME_KEY},
    {START("pair-same-key-stale", ONE(WINDOW(1)), .flags = STALE), SAME_KEY},
    {START("pair-same-key-exists", ONE(BUCKET(5)), .prior = 4), SAME_KEY},
    {START("pair-same-key-room", ONE(BUCKET(5)), .prior = 1),
     PAIR(run_apply, run_apply, verify_both_charged)},
    /* two keys */
    {START("pair-two-keys-one-slot", ONE(WINDOW(1)), .flags = CROWDED | ONE_LEFT),
     TWO_KEYS(verify_one_slot)},
    /* one finds no room, the other finds some: what is charged to the counter is known in the slot */
    {START("pair-shared-leave", ONE(WINDOW(1)),
           .flags = TENANT_FIRST | STAGGERED | CROWDED | SHARING),
     SAME_KEY},
    {START("pair-shared-leave-used", ONE(BUCKET(3)), .prior = 2,
           .flags = TENANT_FIRST | STAGGERED | CROWDED | SHARING),
     SAME_KEY},
    {START("pair-shared-both", ONE(BUCKET(1)), .flags = CROWDED | SHARING), SAME_KEY},
    {START("pair-two-keys-two-slots", ONE(WINDOW(1)), .flags = CROWDED | TWO_LEFT),
     TWO_KEYS(verify_both)},
    {START("pair-two-keys-tenant", ONE(WINDOW(1)), .flags = TENANT_FIRST | STAGGERED | CROWDED),
     TWO_KEYS(verify_own_slot)},
    {START("pair-two-keys-own-expired", ONE(WINDOW(1)), .prior = 1, .flags = EXPIRED | CROWDED),
     TWO_KEYS(verify_own_slot)},
    {START("pair-two-keys-own-expiring", ONE(WINDOW(1)), .prior = 1,
           .flags = EXPIRING | STAGGERED | CROWDED),
     TWO_KEYS(verify_own_slot)},
    /* several limits */
    {START("pair-multi", .limits = {BUCKET(5), WINDOW(3)}, .count = 2, .prior = 2),
     PAIR(run_apply, run_apply, verify_last_of_several)},
    {START("pair-multi-first", .limits = {BUCKET(5), WINDOW(1)}, .count = 2),
     PAIR(run_apply, run_apply, verify_last_of_several)},
    /* several levels: the last token of the innermost, the middle, the outermost */
    {LEVELS_START("pair-levels-inner", BUCKET(3), SLIDING(6), WINDOW(7), .prior = 2),
     TWO_OF_LEVELS},
    {LEVELS_START("pair-levels-middle", BUCKET(5), SLIDING(3), WINDOW(7), .prior = 2),
     TWO_OF_LEVELS},
    {LEVELS_START("pair-levels-outer", BUCKET(5), SLIDING(6), WINDOW(3), .prior = 2),
     TWO_OF_LEVELS},
    /* other changes of what was consumed */
    {START("pair-check-refund", ONE(BUCKET(5)), .prior = 5),
     PAIR(run_apply, run_refund, verify_refund)},
    {START("pair-check-reset-key", ONE(WINDOW(5)), .prior = 2),
     PAIR(run_apply, run_reset_key, verify_reset)},
    {START("pair-check-reset-limiter", ONE(WINDOW(5)), .prior = 2),
     PAIR(run_apply, run_reset_all, verify_reset)},
    /* moving windows */
    {MOVING_START("pair-moving-first", 1, ONE(WINDOW(1))), PAIR(run_hit, run_hit, verify_moving)},
    {MOVING_START("pair-moving-room", 1, ONE(WINDOW(3)), .prior = 1),
     PAIR(run_hit, run_hit, verify_moving)},
    {MOVING_START("pair-moving-last", 1, ONE(WINDOW(2)), .prior = 1),
     PAIR(run_hit, run_hit, verify_moving)},
    {MOVING_START("pair-moving-again", 1, ONE(WINDOW(2)), .prior = 2, .flags = EXPIRED),
     PAIR(run_hit, run_hit, verify_moving)},
    {MOVING_START("pair-moving-only", 1, ONE(WINDOW(1)), .prior = 1, .flags = EXPIRED),
     PAIR(run_hit, run_hit, verify_moving)},
    {MOVING_START("pair-moving-several", 2, ONE(WINDOW(4)), .prior = 1),
     PAIR(run_hit, run_hit, verify_moving_several)},
    /* budgets */
    {BUDGET_START("pair-budget-last", 5, 1, 1, .prior = 4), TWO_RESERVE},
    {BUDGET_START("pair-budget-window", 5, 1, 5, .prior = 5, .flags = EXPIRED), TWO_RESERVE},
    {BUDGET_START("pair-budget-settle", 6, 1, 3, .prior = 1, .prepare = reserve_three),
     PAIR(run_budget_settle, run_budget_reserve, verify_settled)},
    {BUDGET_START("pair-budget-settle-less", 5, 1, 1, .prior = 1, .prepare = reserve_three),
     PAIR(run_budget_settle, run_budget_reserve, verify_settled)},
    {BUDGET_START("pair-budget-add", 5, 2, 2, .prior = 4),
     PAIR(run_budget_reserve, run_budget_add, verify_added)},
    {BUDGET_START("pair-budget-lower", 5, 1, 1, .prior = 2),
     PAIR(run_budget_reserve, run_lower_and_reserve, verify_not_both)},
    {BUDGET_START("pair-budget-take-back", 5, 2, 2, .prior = 4, .prepare = add_four),
     PAIR(run_budget_reserve, run_take_back_and_reserve, verify_not_both)},
    {BUDGET_START("pair-budget-reset", 5, 1, 5, .prior = 5),
     PAIR(run_budget_reserve, run_forget_and_reserve, verify_not_both)},
    {BUDGET_START("pair-budget-charge-window", 5, 1, 2),
     PAIR(run_charge, run_spend_later, verify_next_window)},
    {BUDGET_START("pair-budget-correct-window", 5, 1, 2, .prepare = charge_two),
     PAIR(run_correct, run_spend_later, verify_next_window)},
    {BUDGET_START("pair-budget-withdraw", 5, 4, 1, .prior = 1, .prepare = grant_three),
     PAIR(run_lease, run_budget_withdraw, verify_withdrawn)},
    {BUDGET_START("pair-budget-raise-window", 5, 4, 2),
     PAIR(run_raise, run_look_later, verify_not_granted)},
    /* permits */
    {PERMIT_START("pair-permit-fresh", ONE(PERMITS(2)), .prior = 1), TWO_TAKERS},
    {PERMIT_START("pair-permit-free", ONE(PERMITS(2)), .prior = 1, .flags = FREED), TWO_TAKERS},
    {PERMIT_START("pair-permit-takeover", ONE(PERMITS(1)), .dead = 1), TWO_TAKERS},
    {PERMIT_START("pair-permit-lowered", ONE(PERMITS(3)), .prior = 1, .flags = FREED,
                  THEN_ONE(PERMITS(2))),
     PAIR(run_admit, run_admit, verify_lowered)},
    {PERMIT_START("pair-permit-lowered-beyond", ONE(PERMITS(3)), .prior = 1, .flags = LOW_FREED,
                  THEN_ONE(PERMITS(2))),
     PAIR(run_admit, run_admit, verify_lowered)},
    {PERMIT_START("pair-permit-raised-and-lowered", .capacity = 8, ONE(PERMITS(4)), .flags = FREED,
                  THEN_ONE(PERMITS(1))),
     PAIR(run_admit, run_raise_take_lower, verify_raised_and_lowered)},
    {PERMIT_START("pair-release-take", ONE(PERMITS(1)), .prepare = take_one_permit),
     PAIR(run_release, run_admit, verify_release)},
    {PERMIT_START("pair-take-reap", ONE(PERMITS(1)), .dead = 1),
     PAIR(run_admit, run_reap, verify_freed)},
    {PERMIT_START("pair-take-in-flight", ONE(PERMITS(1)), .dead = 1),
     PAIR(run_admit, run_in_flight, verify_freed)},
    /* permits that were granted to this host */
    {LEASE_START("pair-lease-take", .op = LEASE_TAKE, .prior = 1, ROOM(2, 0, 0)),
     PAIR(run_lease_take, run_lease_take, verify_granted_both)},
    {LEASE_START("pair-lease-lower", .op = LEASE_TAKE, .cost = 1, .prior = 1, ROOM(3, 0, 0)),
     PAIR(run_lease_take, run_lease_lower, verify_granted)},
    {LEASE_START("pair-lease-lower-more", .op = LEASE_TAKE, .cost = 1, .prior = 1,
                 .flags = LOW_FREED, ROOM(4, 0, 2)),
     PAIR(run_lease_take, run_lease_lower, verify_granted)},
    {LEASE_START("pair-lease-put", .op = LEASE_TAKE, .cost = 2, .prior = 1, .flags = LOW_FREED,
                 ROOM(4, 0, 2)),
     PAIR(run_lease_take, run_lease_put, verify_granted)},
    {LEASE_START("pair-lease-shrink", .op = LEASE_TAKE, .cost = 1, .prepare = begin_beyond,
                 ROOM(4, 0, 0)),
     PAIR(run_lease_take, run_lease_shrink, verify_granted)},
    {LEASE_START("pair-lease-alone", .op = LEASE_ALONE, .cost = 2, .prepare = begin_beyond,
                 ROOM(3, 0, 0)),
     PAIR(run_lease_alone, run_lease_put, verify_alone)},
    /* limits at run time */
    {START("pair-publish", ONE(WINDOW(5)), .next = {WINDOW(9)}, .next_count = 1,
           .flags = UNCHANGED),
     PAIR(run_publish, run_publish_rival, verify_publish)},
    {START("pair-publish-check", ONE(WINDOW(5)), .prior = 2, .next = {WINDOW(9)}, .next_count = 1,
           .flags = UNCHANGED),
     PAIR(run_publish, run_apply, verify_publish_and_check)},
    {START("pair-publish-check-bucket", ONE(BUCKET(5)), .prior = 2, .next = {BUCKET(10)},
           .next_count = 1, .flags = UNCHANGED),
     PAIR(run_publish, run_apply, verify_publish_and_check)},
    {START("pair-publish-multi", .limits = {BUCKET(5), WINDOW(6)}, .count = 2, .prior = 2,
           .next = {BUCKET(10), WINDOW(8)}, .next_count = 2, .flags = UNCHANGED),
     PAIR(run_publish, run_apply, verify_publish_and_several)},
    {START("pair-publish-multi-lower", .limits = {BUCKET(5), WINDOW(6)}, .count = 2, .prior = 2,
           .next = {BUCKET(10), WINDOW(2)}, .next_count = 2, .flags = UNCHANGED),
     PAIR(run_publish, run_apply, verify_publish_and_several)},
    {START("pair-publish-multi-undo", .limits = {BUCKET(5), WINDOW(3)}, .count = 2, .prior = 2,
           .next = {BUCKET(10), WINDOW(3)}, .next_count = 2, .flags = UNCHANGED),
     PAIR(run_publish_and_take, run_apply, verify_publish_and_last)},
    {PERMIT_START("pair-publish-admit", ONE(PERMITS(3)), .prior = 1,
                  .flags = LOW_FREED | UNCHANGED | MOST_BEHIND, THEN_ONE(PERMITS(1))),
     PAIR(run_publish, run_look_and_admit, verify_publish_and_admit)},
};
/* clang-format on */
