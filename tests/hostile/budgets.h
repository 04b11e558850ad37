/* budgets.h - the calls of budgets, of time zones and of the time of day. Part of calls.h. */
#ifndef BUDGETS_H
#define BUDGETS_H

static void open_budget(user_t *u) {
  const fshm_limit money = {1000, HOUR_NS, 0, FSHM_MONEY, 0},
                   beside = {MONEY_MOST, HOUR_NS, 0, FSHM_MONEY, 0};
  const fshm_limit four[FSHM_MAX_LIMITS] = {money, beside, beside, beside};
  if (!u->budget && !u->s->read_only)
    check_status(u, fshm_limiter_open(u->s, "budget", 6, four, 4, &u->budget));
}

static void check_budget(user_t *u, const fshm_budget *b) {
  if (b->status != FSHM_ASK) check_status(u, b->status);
  MUST(b->direct <= 1 && b->left_ns >= 0 && b->entry + 1 <= RESERVED_WAYS);
  MUST(b->spent < UINT64_C(1) << 60 && b->reserved <= RESERVED_MOST);
  MUST(b->granted < UINT64_C(1) << 60);
}

/* l: stands in for the budget, now and then: it may be of any kind. */
static void use_budget(user_t *u, fshm_limiter *l, const char *key, uint64_t n, uint64_t now,
                       unsigned what) {
  fshm_budget b;
  open_budget(u);
  if (!u->budget) return;
  fshm_limiter *budget = what & 1 ? l : u->budget;
  MUST(fshm_budget_reserve(budget, key, 1, n % 2000, what >> 1 & 7, now, &b) == b.status);
  check_budget(u, &b);
  if (what & 8) b.owner = (uint32_t)n, b.entry = what, b.id ^= n & 1;
  const int status = fshm_budget_settle(budget, key, 1, &b, n % 2000, what & 16 ? n : what, now);
  if (status != FSHM_ASK) check_status(u, status);
  check_status(u, fshm_budget_add(budget, key, 1, what % 5, (int64_t)n, now));
  check_status(u, fshm_budget_raise(budget, key, 1, what % 5, n, what & 32 ? n : b.window, now));
  check_status(u, fshm_budget_once(budget, key, 1, now));
  check_status(u, fshm_budget_grant(budget, key, 1, n, b.window, now));
  MUST(fshm_budget_withdraw(budget, key, 1, what & 32 ? n : b.window, now, &b) == b.status);
  check_status(u, b.status);
  fshm_budget_denied(budget, key, 1);
  MUST(fshm_budget_look(budget, key, 1, now, &b) == b.status);
  check_budget(u, &b);
}

static void use_zones(user_t *u, const char *key, uint64_t n, uint64_t now, unsigned what) {
  const uint64_t spans[4] = {n, n >> 7, n << 9, what}, minute = n & ((UINT64_C(1) << 28) - 1);
  static const uint64_t periods[] = {HOUR_NS, DAY_NS, WEEK_NS, MONTH_NS, YEAR_NS, 1};
  struct {
    char bytes[ZONE_NAME + 1];
    uint64_t after;
  } name = {"", FENCE};
  const int index = fshm_zone(u->s, key, 1, spans, what % 5);
  MUST(index < ZONES && index);
  if (index < 0 && index != FSHM_E_READ_ONLY) check_status(u, index);
  if (fshm_zone_name(u->s, what, name.bytes, sizeof name.bytes)) MUST(memchr(name.bytes, 0, 41));
  MUST(name.after == FENCE);
  const uint64_t end = fshm_calendar_end(periods[what % 6], spans, what % 4, minute);
  MUST(what % 6 == 5 ? !end : end > minute && end <= minute + CALENDAR_MOST);
  (void)fshm_wall(u->s, now);
  fshm_wall_pretend(u->s, 0);
}

#endif
