/* holds_budgets.c - what must hold of budgets: what is spent and reserved is never more than the limit; what a dead
 * process had reserved is free again, and what it had settled is spent once. */
#include "crash.h"

static uint64_t spent_before, spent_after, granted_before, granted_after;

static fshm_budget budget_now(void) {
  fshm_budget b;
  const int status = fshm_budget_look(world.l, KEY, strlen(KEY), world.now, &b);
  if (status != FSHM_OK) broken("the budget cannot be looked at: %d", status);
  return b;
}
static int64_t budget_left(const fshm_budget *b) {
  return (int64_t)b->limit - (int64_t)b->spent - (int64_t)b->reserved;
}

static void budgets_begin(void) {
  const fshm_budget b = budget_now();
  spent_before = b.spent;
  granted_before = b.granted;
  if (budget_left(&b) != (int64_t)op->before)
    broken("before it, %lld are left", (long long)budget_left(&b));
}

static void budgets_end(void) {
  if (told->status != op->status) broken("it answers %d, not %d", told->status, op->status);
  const fshm_budget b = budget_now();
  spent_after = b.spent;
  granted_after = b.granted;
  if (op->op == MONEY_WITHDRAW &&
      (b.granted != b.spent || told->number != granted_before - b.spent))
    broken("of %llu granted, %llu are taken", (unsigned long long)granted_before,
           (unsigned long long)told->number);
  if (budget_left(&b) != (int64_t)op->after)
    broken("after it, %lld are left", (long long)budget_left(&b));
}

/* All that is left can be reserved, and no more; then it is given back. */
static void budget_exhaust(void) {
  fshm_budget mine, more, before = budget_now();
  const int64_t left = budget_left(&before);
  if (left < 0) return;
  const size_t length = strlen(KEY);
  const int first = fshm_budget_reserve(world.l, KEY, length, (uint64_t)left, 0, world.now, &mine);
  const int second = fshm_budget_reserve(world.l, KEY, length, 1, 0, world.now, &more);
  if (first != FSHM_ALLOWED || second != FSHM_DENIED)
    broken("of %lld left, S is answered %d, and then %d", (long long)left, first, second);
  if (mine.spent + mine.reserved > mine.limit)
    broken("%llu are spent and %llu reserved", (unsigned long long)mine.spent,
           (unsigned long long)mine.reserved);
  (void)fshm_budget_settle(world.l, KEY, length, &mine, (uint64_t)left, 0, world.now);
}

static void budgets_contend(void) {
  const fshm_budget b = budget_now();
  const int64_t left = budget_left(&b);
  /* A settlement is spent before it is not reserved any more. */
  const bool both = op->op == MONEY_SETTLE && left == (int64_t)op->before - (int64_t)op->cost;
  if (left != (int64_t)op->before && left != (int64_t)op->after && !both)
    broken("%lld are left while T is stopped", (long long)left);
  budget_exhaust();
}

static void budgets_survive(void) {
  look_for_dead(world.s);
  const fshm_budget b = budget_now();
  const uint64_t limit = op->op == MONEY_ADD && told->done ? op->full + op->cost : op->full;
  if (told->done && told->status != op->status)
    broken("T says %d, not %d", told->status, op->status);
  if (b.granted != granted_before && b.granted != granted_after)
    broken("%llu are granted", (unsigned long long)b.granted);
  if (told->done && b.granted != granted_after)
    broken("T says it is done, and %llu are granted", (unsigned long long)b.granted);
  if (b.reserved) broken("%llu are reserved by the dead", (unsigned long long)b.reserved);
  if (b.spent != spent_before && b.spent != spent_after)
    broken("%llu are spent", (unsigned long long)b.spent);
  if (told->done && b.spent != spent_after) broken("T says it is done, and it is not");
  if (told->done ? b.limit != limit : b.limit < limit || b.limit > op->full + op->cost)
    broken("the limit is %llu", (unsigned long long)b.limit);
  budget_exhaust();
  check_invariants(true);
  position.later = true;
  const uint64_t now = world.now;
  world.now = LATER;
  const fshm_budget later = budget_now();
  if (budget_left(&later) != (int64_t)op->full)
    broken("later %lld are left", (long long)budget_left(&later));
  world.now = now;
}

static void budgets_raced(const outcome_t *mine) {
  const fshm_budget b = budget_now();
  if (op->op == MONEY_RESERVE || op->op == MONEY_CHARGE) {
    const uint64_t admitted = (told->status == FSHM_ALLOWED) + (mine->status == FSHM_ALLOWED);
    if (op->status == FSHM_ALLOWED && admitted != min_u64(2, op->before / op->cost))
      broken("of T and S, %llu were admitted", (unsigned long long)admitted);
    if (budget_left(&b) != (int64_t)(op->before - admitted * op->cost))
      broken("%lld are left after both", (long long)budget_left(&b));
  } else if (op->op == MONEY_GRANT) {
    if (b.granted != granted_before + 2 * op->cost)
      broken("%llu are granted after both", (unsigned long long)b.granted);
  } else if (op->op == MONEY_WITHDRAW) { /* what one takes, the other one does not */
    if (b.granted + told->number + mine->number != granted_before)
      broken("%llu are granted, and %llu and %llu taken", (unsigned long long)b.granted,
             (unsigned long long)told->number, (unsigned long long)mine->number);
  } else if (op->op == MONEY_ADD) {
    if (budget_left(&b) != (int64_t)(op->before + 2 * op->cost))
      broken("%lld are left after both", (long long)budget_left(&b));
  } else if (budget_left(&b) != (int64_t)op->after) { /* S has nothing to settle */
    broken("%lld are left after both", (long long)budget_left(&b));
  }
  check_invariants(false);
}

static const holds_t budgets = {budgets_begin,   budgets_end,   budgets_contend,
                                budgets_survive, budgets_raced, NULL};
