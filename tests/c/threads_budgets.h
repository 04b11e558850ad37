/* threads_budgets.h - what threads do with a budget, and with the time of day. Part of test_threads.c. */
#ifndef THREADS_BUDGETS_H
#define THREADS_BUDGETS_H

#define BUDGET UINT64_C(1000000) /* of a year */

typedef struct {
  fshm_limiter *lasting, *brief; /* brief: of an hour, with other threads that reset it */
  _Atomic uint64_t settled;
} budgets_t;

static void budget_limits(fshm_limit out[FSHM_MAX_LIMITS], uint64_t n, uint64_t per) {
  for (int i = 0; i < FSHM_MAX_LIMITS; i++)
    out[i] = (fshm_limit){i ? MONEY_MOST : n, per, 0, FSHM_MONEY, 0};
}

static void budgets_begin(budgets_t *b, fshm_segment *s) {
  fshm_limit limits[FSHM_MAX_LIMITS];
  budget_limits(limits, BUDGET, YEAR_NS);
  b->lasting = fresh_limiter(s, "budget", limits, FSHM_MAX_LIMITS);
  budget_limits(limits, 100, HOUR_NS);
  b->brief = fresh_limiter(s, "brief budget", limits, FSHM_MAX_LIMITS);
}

static void budgets_end(budgets_t *b) {
  fshm_budget found;
  CHECK_EQ(fshm_budget_look(b->lasting, "k", 1, 0, &found), FSHM_OK);
  CHECK_EQ(found.spent, b->settled);
  CHECK_EQ(found.reserved, 0);
  CHECK_OP(found.spent, <=, BUDGET);
  fshm_limiter_close(b->lasting);
  fshm_limiter_close(b->brief);
}

/* Of one key, so that each thread competes with all others: what is admitted fits, and what was settled is spent. */
static void spend_together(budgets_t *all) {
  fshm_budget b;
  const uint64_t amount = 1 + random_below(BUDGET / 2), actual = random_below(amount / 10000 + 1);
  const uint32_t flags = random_below(4) ? 0 : FSHM_BUDGET_CHARGE;
  const int status = fshm_budget_reserve(all->lasting, "k", 1, amount, flags, 0, &b);
  if (status != FSHM_ALLOWED) {
    CHECK_EQ(status, FSHM_DENIED);
    return;
  }
  CHECK_OP(b.spent + b.reserved, <=, BUDGET);
  CHECK_EQ(fshm_budget_settle(all->lasting, "k", 1, &b, amount, actual, 0), FSHM_OK);
  (void)atomic_fetch_add(&all->settled, actual);
}

static void spend_each(budgets_t *all, fshm_segment *s, const char *key) {
  fshm_budget b;
  const uint64_t length = strlen(key), spans[] = {ZONE_SPAN(0, 60)};
  char name[ZONE_NAME + 1];
  check_known(fshm_budget_reserve(all->brief, key, length, random_below(60),
                                  random_below(2) ? FSHM_BUDGET_CHARGE : 0, 0, &b));
  if (b.status == FSHM_ALLOWED)
    check_known(fshm_budget_settle(all->brief, key, length, &b, b.reserved, random_below(60), 0));
  const int64_t by = (int64_t)random_below(40) - 20;
  check_known(fshm_budget_add(all->brief, key, length, (uint32_t)random_below(2), by, 0));
  check_known(fshm_budget_raise(all->brief, key, length, 3, random_below(99), b.window, 0));
  check_known(fshm_budget_once(all->brief, key, length, 0));
  check_known(fshm_budget_grant(all->brief, key, length, random_below(9), b.window, 0));
  if (!random_below(4)) check_known(fshm_budget_withdraw(all->brief, key, length, b.window, 0, &b));
  if (!random_below(9)) fshm_budget_denied(all->brief, key, length);
  CHECK_EQ(fshm_budget_look(all->brief, key, length, 0, &b), FSHM_OK);
  if (!random_below(20)) CHECK_EQ(fshm_reset_all(all->brief), FSHM_OK);
  const uint64_t wall = fshm_wall(s, 0);
  fshm_wall_pretend(s, 0);
  CHECK_OP(fshm_wall(s, 0), >=, wall);
  CHECK_EQ(fshm_zone(s, "Etc/GMT-1", 9, spans, 1), 1);
  CHECK_EQ(fshm_zone_name(s, 1, name, sizeof name), FSHM_OK);
  CHECK(!strcmp(name, "Etc/GMT-1"));
  CHECK_EQ(fshm_calendar_end(HOUR_NS, spans, 1, 61), 120);
}

#endif
