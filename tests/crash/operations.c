/* operations.c - the operations that are tried. A new operation of the library gets a line in the table at
 * the end: its starting state (starts.c), what it does, and what must hold (holds_*.c). */
#include "crash.h"

static const uint64_t some_costs[][FSHM_MAX_LIMITS] = {{0, 0, 0, 0}, {1, 1, 1, 1}, {2, 2, 2, 2},
                                                       {3, 3, 3, 3}, {4, 4, 4, 4}, {5, 5, 5, 5},
                                                       {6, 6, 6, 6}, {7, 7, 7, 7}};

/* rate limits */

static void run_apply(outcome_t *out) {
  fshm_apply(world.l, op->op, KEY, strlen(KEY), some_costs[op->cost], 2 * PER, world.now,
             &out->decision);
  out->status = out->decision.status;
}
static void run_is_allowed(outcome_t *out) {
  out->status = fshm_is_allowed(world.l, KEY, strlen(KEY));
}
static void block_before(void) { (void)apply_at(world.l, FSHM_BLOCK, KEY, 3, world.now); }
static void reserve_one(void) {
  fshm_decision d;
  fshm_reserve(world.l, KEY, strlen(KEY), some_costs[1], 2 * PER, world.now, &d, world.reserved);
}
static void run_cancel(outcome_t *out) {
  out->status = fshm_cancel(world.l, KEY, strlen(KEY), some_costs[1], world.reserved, world.now);
}
static void charge_three(void) {
  fshm_decision d;
  uint32_t held;
  fshm_admit(world.l, KEY, strlen(KEY), some_costs[3], world.now, &world.permit, &d, &held);
}
static void run_settle(outcome_t *out) {
  out->status = fshm_settle(world.l, KEY, strlen(KEY), some_costs[3], some_costs[op->cost],
                            &world.permit, world.now);
}
static void run_reset_key(outcome_t *out) {
  out->status = fshm_reset_key(world.l, KEY, strlen(KEY));
}
static void run_reset_all(outcome_t *out) { out->status = fshm_reset_all(world.l); }

/* Another plan of the name, as fshm_plan_open() does it, without the handle: the heap is not put back. */
static void run_record(outcome_t *out) {
  uint32_t record;
  out->status = record_of(world.s, &op->next[0], &record);
}
static void run_override(outcome_t *out) {
  out->status = fshm_override_set(world.l, KEY, strlen(KEY), op->next, op->next_count);
  fshm_limit found[FSHM_MAX_OVERRIDE];
  if (fshm_override_get(world.l, KEY, strlen(KEY), found) != (int)op->next_count ||
      (op->next_count && found[0].n != op->next[0].n))
    broken("another override");
}
static void override_before(void) {
  if (fshm_override_set(world.l, KEY, strlen(KEY), op->limits, 1) != FSHM_OK)
    broken("no override to begin with");
}

/* S takes the room of the second limit, and of the first what `more` says. */
static void take_second(uint64_t more) {
  fshm_decision d;
  const uint64_t costs[FSHM_MAX_LIMITS] = {more, levels_of(world.l, KEY).remaining[1], 0, 0};
  fshm_apply(world.l, FSHM_ACQUIRE, KEY, strlen(KEY), costs, 0, world.now, &d);
  if (d.status != FSHM_ALLOWED) broken("S cannot take the room: %d", d.status);
  rate_limits_meddled();
}
static void meddle_second(void) { take_second(0); }
static void meddle_both(void) { take_second(1); }

/* several levels */

static void run_levels(outcome_t *out) {
  out->decision = apply_levels(op->op, op->cost, world.now);
  out->status = out->decision.status;
}
/* S takes the room of the outermost level, which is charged last, and of the innermost what `more` says. */
static void take_outermost(uint64_t more) {
  const uint64_t left = levels_of(world.l, KEY).remaining[LEVELS - 1];
  if (apply_at(world.limiters[LEVELS - 1], FSHM_ACQUIRE, KEY, left, world.now).status !=
      FSHM_ALLOWED)
    broken("S cannot take the room of the outermost level");
  if (more && apply_at(world.l, FSHM_ACQUIRE, KEY, more, world.now).status != FSHM_ALLOWED)
    broken("S cannot take the room of the innermost level");
  rate_limits_meddled();
}
static void meddle_outermost(void) { take_outermost(0); }
static void meddle_two_levels(void) { take_outermost(1); }

/* limits that come with the call */

static void run_count(outcome_t *out) {
  fshm_counted counted;
  fshm_count(world.l, KEY, strlen(KEY), &op->limits[0], op->cost, world.now, &counted);
  out->status = counted.status;
}
static void run_hit(outcome_t *out) {
  fshm_counted counted;
  fshm_moving(world.l, KEY, strlen(KEY), &op->limits[0], op->cost, world.now, &counted);
  out->status = counted.status;
}
static void run_clear(outcome_t *out) {
  out->status = fshm_moving_clear(world.l, KEY, strlen(KEY));
}

/* budgets */

static fshm_budget budget_held; /* of T */
static void run_budget_reserve(outcome_t *out) {
  fshm_budget b;
  out->status = fshm_budget_reserve(world.l, KEY, strlen(KEY), op->cost,
                                    op->op == MONEY_CHARGE ? FSHM_BUDGET_CHARGE : 0, world.now, &b);
}
static void reserve_three(void) {
  if (fshm_budget_reserve(world.l, KEY, strlen(KEY), 3, 0, world.now, &budget_held) != FSHM_ALLOWED)
    broken("T cannot reserve");
}
static void run_budget_settle(outcome_t *out) {
  out->status = fshm_budget_settle(world.l, KEY, strlen(KEY), &budget_held, 3, op->cost, world.now);
}
static void run_budget_add(outcome_t *out) {
  out->status = fshm_budget_add(world.l, KEY, strlen(KEY), 1, op->cost, world.now);
}
static uint64_t budget_window(void) {
  fshm_budget b;
  (void)fshm_budget_look(world.l, KEY, strlen(KEY), world.now, &b);
  return b.window;
}
static void run_budget_grant(outcome_t *out) {
  out->status = fshm_budget_grant(world.l, KEY, strlen(KEY), op->cost, budget_window(), world.now);
}
static void grant_three(void) {
  if (fshm_budget_grant(world.l, KEY, strlen(KEY), 3, budget_window(), world.now) != FSHM_OK)
    broken("nothing can be granted");
}
static void run_budget_withdraw(outcome_t *out) {
  fshm_budget b;
  out->status = fshm_budget_withdraw(world.l, KEY, strlen(KEY), budget_window(), world.now, &b);
  out->number = b.granted;
}

/* token leases */

static void run_spend(outcome_t *out) {
  uint32_t low;
  out->status =
      fshm_spend(world.l, world.refused, world.known ? world.known : world.l, KEY, strlen(KEY),
                 some_costs[op->cost], world.now, world.known ? &out->decision : NULL, &low);
}
static void run_put(outcome_t *out) {
  fshm_token_lease leases[FSHM_MAX_LIMITS];
  for (uint32_t i = 0; i < FSHM_MAX_LIMITS; i++)
    leases[i] = (fshm_token_lease){op->cost, UINT64_MAX, world.now + PER};
  out->status = fshm_token_lease_put(world.l, KEY, strlen(KEY), leases, world.now);
}
static void run_return(outcome_t *out) {
  uint64_t until[FSHM_MAX_LIMITS], most[FSHM_MAX_LIMITS], back[FSHM_MAX_LIMITS];
  for (uint32_t i = 0; i < FSHM_MAX_LIMITS; i++) until[i] = world.now + PER, most[i] = 20;
  out->status = fshm_token_lease_return(world.l, KEY, strlen(KEY), some_costs[op->cost], until,
                                        most, world.now, back);
}
static void run_take_out(outcome_t *out) {
  uint64_t left[FSHM_MAX_LIMITS], ns[FSHM_MAX_LIMITS];
  out->status = fshm_token_lease_look(world.l, KEY, strlen(KEY), 1, world.now, left, ns);
  out->number = left[0];
}

/* what is put over whatever was there */

static void run_learn(outcome_t *out) {
  const uint64_t left[FSHM_MAX_LIMITS] = {PER / 2, PER / 2, PER / 2, PER / 2};
  out->status = fshm_learn(world.l, KEY, strlen(KEY), some_costs[op->cost], left, world.now);
}
static void refuse_it(void) {
  (void)fshm_token_lease_refuse(world.l, KEY, strlen(KEY), some_costs[op->before], PER, world.now);
}
/* Of cost 0: forget it. */
static void run_refuse(outcome_t *out) {
  out->status = fshm_token_lease_refuse(world.l, KEY, strlen(KEY), some_costs[op->cost],
                                        op->cost ? PER : 0, world.now);
}
static void run_feature_reset(outcome_t *out) {
  fshm_feature_reset(world.s, FEATURE);
  out->status = FSHM_OK;
}

/* permits */

static void run_admit(outcome_t *out) {
  uint32_t held;
  fshm_admit(world.l, KEY, strlen(KEY), NULL, world.now, &out->permit, &out->decision, &held);
  out->status = out->decision.status;
}
static void take_one_permit(void) { admit_to(world.l, KEY, &world.permit); }
static void run_release(outcome_t *out) {
  fshm_permit permit = world.permit;
  out->status = fshm_permit_release(world.l, &permit);
}
static void run_idle(outcome_t *out) {
  fshm_permit permit = world.permit;
  out->status = fshm_permit_idle(world.l, &permit, 1) + fshm_permit_idle(world.l, &permit, 0);
}
static void run_in_flight(outcome_t *out) {
  out->number = fshm_in_flight(world.l, KEY, strlen(KEY));
  out->status = FSHM_OK;
}
static void run_reap(outcome_t *out) {
  out->number = fshm_reap(world.s, 0);
  out->status = FSHM_OK;
}
static void run_reap_by_force(outcome_t *out) {
  out->number = fshm_reap(world.s, harness_pid);
  out->status = FSHM_OK;
}
static void run_join(outcome_t *out) {
  uint32_t process;
  uint64_t incarnation;
  out->status = process_identity(world.s, &process, &incarnation);
}

/* The calls that csrc/python/py_pool.c makes to open a connection, and to hand it back and close it. */
static void run_pool_get(outcome_t *out) {
  uint32_t held;
  fshm_admit(world.l, KEY, strlen(KEY), NULL, world.now, &out->permit, &out->decision, &held);
  if (out->decision.status == FSHM_ALLOWED) {
    fshm_admit(world.totals, "", 0, NULL, world.now, &out->total, &out->decision, &held);
    if (out->decision.status != FSHM_ALLOWED) (void)fshm_permit_release(world.l, &out->permit);
  }
  out->status = out->decision.status;
}
static void open_connection(void) {
  admit_to(world.l, KEY, &world.permit);
  admit_to(world.totals, "", &world.total);
}
static void run_pool_return(outcome_t *out) {
  fshm_permit permit = world.permit, total = world.total;
  out->status = fshm_permit_idle(world.l, &permit, 1) + fshm_permit_idle(world.l, &permit, 0) +
                fshm_permit_release(world.l, &permit) + fshm_permit_release(world.totals, &total);
}

/* names and files */

static void run_set_limits(outcome_t *out) { out->status = set_limits(op->next, op->next_count); }

static void run_create(outcome_t *out) {
  fshm_error e;
  out->status = fshm_open(segment_name, 1, 0600, FSHM_OPEN_CREATE, &opened, &e);
  if (opened) out->number = opened->header->instance;
}
static void run_attach(outcome_t *out) {
  fshm_error e;
  out->status = fshm_open(segment_name, 0, 0600, 0, &opened, &e);
  if (!opened) return;
  (void)process_index(opened);
  out->number = opened->header->instance;
}
static void run_remove(outcome_t *out) {
  fshm_error e;
  out->status = fshm_remove(segment_name, &e);
}

#define BUCKET(n) {n, PER, n, FSHM_BUCKET, 0}
#define WINDOW(n) {n, PER, n, FSHM_WINDOW, 0}
#define CALENDAR(n) {n, PER, 0, FSHM_CALENDAR, 0}
#define SLIDING(n) {n, PER, n, FSHM_SLIDING, 0}
#define PERMITS(n) {n, 0, 0, FSHM_PERMITS, 0}
/* statistics. cost 1: of a request that failed */

static uint32_t stats_place; /* of the deployment */
static void start_stats(void) {
  start_permits();
  if (op->op == METRIC) (void)the_metric();
  if (op->op == DEPLOYMENT_RECORD || op->op == REQUEST)
    stats_place = (uint32_t)fshm_deployment_open(world.s, the_id(), NOW);
  for (uint64_t i = 1; op->flags & CROWDED && i <= 100000; i++) /* each place is another's */
    (void)fshm_deployment_open(world.s, i * UINT64_C(0x9e3779b97f4a7c15), NOW - 2 * PER + i);
}
static void run_memo(outcome_t *out) {
  fshm_memo_put(world.s, encoding_of_text(), TEXT, strlen(TEXT), TOKENS);
  out->status = FSHM_OK;
}
static void run_memo_count(outcome_t *out) {
  fshm_memo_count(world.s, MEMO_HITS, MEMO_MISSES);
  out->status = FSHM_OK;
}
static void run_count_call(outcome_t *out) {
  fshm_count_call(world.l, KEY, strlen(KEY), FSHM_DENIED);
  out->status = FSHM_OK;
}
static void run_metric_open(outcome_t *out) { out->status = the_metric(); }
static void run_metric(outcome_t *out) {
  fshm_metric_record(world.s, 0, DURATION, 1, 0, SIZE_IN, SIZE_OUT);
  out->status = FSHM_OK;
}
static void run_feature(outcome_t *out) { out->status = fshm_feature_error(world.s, FEATURE) > 0; }
static void run_deployment_open(outcome_t *out) {
  out->status = fshm_deployment_open(world.s, the_id(), world.now) >= 0;
}
static void run_deployment_record(outcome_t *out) {
  fshm_deployment_record(world.s, stats_place, LATENCY, !op->cost, COST, 0, COOLDOWN, world.now);
  out->status = FSHM_OK;
}
static void run_request(outcome_t *out) {
  fshm_request request;
  out->status = fshm_request_begin(world.s, stats_place, world.now, &request);
}
static void run_request_and_back(outcome_t *out) {
  fshm_request request;
  out->status = fshm_request_begin(world.s, stats_place, world.now, &request) &&
                fshm_request_end(world.s, &request);
}

#define PLAN .flags = PLANNED
#define UNDER_PLAN(limit) .flags = PLANNED | OTHER_PLAN, .next = {limit}, .next_count = 1
#define ONE(limit) .limits = {limit}, .count = 1
#define THREE .limits = {BUCKET(5), WINDOW(6), SLIDING(7)}, .count = 3
#define THEN_ONE(limit) .next = {limit}, .next_count = 1
#define ROOM(a, b, c) .before = (a), .after = (b), .full = (c)

#define RATE_LIMITS(function) .make = start_rate_limits, .holds = &rate_limits, .run = (function)
#define APPLY(which, tokens) \
  RATE_LIMITS(run_apply), .op = FSHM_##which, .cost = (tokens), .status = 1
#define REFUSED(answer) RATE_LIMITS(run_apply), .op = FSHM_ACQUIRE, .cost = 1, .status = (answer)
#define OF_LEVELS(answer)                                                                  \
  .make = start_levels, .holds = &rate_limits, .run = run_levels, .levels = true,          \
  .limits = {BUCKET(5), SLIDING(6), WINDOW(7)}, .count = 1, .op = FSHM_ACQUIRE, .cost = 1, \
  .status = (answer)
#define CALLS(function) RATE_LIMITS(function), .op = OTHER_OP, .status = 1
#define ASKS RATE_LIMITS(run_is_allowed), .op = FSHM_ACQUIRE, .cost = 1, .status = 1
#define COUNTS RATE_LIMITS(run_count), .op = FSHM_ACQUIRE, .cost = 1, .side = true
#define MOVING(function, which) \
  .make = start_moving, .holds = &moving, .run = (function), .op = (which)
#define HITS(tokens, answer) MOVING(run_hit, HIT), .cost = (tokens), .status = (answer)
#define SETS_CLOCK(after)                                                                    \
  .make = start_clocks, .holds = &walls, .prepare = set_clock, .run = run_wall, .status = 1, \
  .op = LOOK_AT_CLOCK, .prior = (after)
#define MONEY_RULES(n, rules)                      \
  .limits = {{n, PER, 0, FSHM_MONEY, 0},           \
             {MONEY_MOST, PER, 0, FSHM_MONEY, 0},  \
             {MONEY_MOST, PER, 0, FSHM_MONEY, 0},  \
             {MONEY_MOST, PER, 0, FSHM_MONEY, 0}}, \
  .count = (rules)
#define MONEY(n) MONEY_RULES(n, 4)
#define BUDGETS(function, which, amount, answer)                                               \
  .make = start_budget, .holds = &budgets, .run = (function), .op = (which), .cost = (amount), \
  .status = (answer), .capacity = 8
#define TOKEN_LEASE {20, 0, 0, FSHM_LEASE, 0}
#define TOKEN_LEASES(function, which, answer)                                          \
  .make = start_token_lease, .holds = &token_leases, .run = (function), .op = (which), \
  .status = (answer)
#define SPENDS(tokens, answer) TOKEN_LEASES(run_spend, TOKEN_LEASE_SPEND, answer), .cost = (tokens)
#define PUTS(tokens) TOKEN_LEASES(run_put, TOKEN_LEASE_PUT, FSHM_OK), .cost = (tokens)
#define RETURNS(tokens) TOKEN_LEASES(run_return, TOKEN_LEASE_PUT, FSHM_OK), .cost = (tokens)
#define TELLS(function, which) \
  .make = start_told, .holds = &telling, .run = (function), .op = (which), .status = FSHM_OK
#define LEARNS(tokens) TELLS(run_learn, LEARN), .cost = (tokens)
#define REFUSALS(tokens) TELLS(run_refuse, REFUSE), .cost = (tokens), ONE(TOKEN_LEASE)
#define LEASES(function, which, answer)                                                         \
  .make = start_leases, .holds = &leases, .run = (function), .op = (which), .status = (answer), \
  .capacity = 8
#define LEASE_TAKES(answer) LEASES(run_lease_take, LEASE_TAKE, answer)
#define LEASE_DROPS(answer) LEASES(run_lease_alone, LEASE_DROP, answer)
#define LEASE_SETS(function, to) LEASES(function, LEASE_SET, FSHM_OK), .cost = (to)
#define ADAPTIVE(function, which, answer)                                       \
  .make = start_adaptive, .holds = &adaptive, .run = (function), .op = (which), \
  .status = (answer), .capacity = 16, ONE(PERMITS(6))
#define ADAPTIVE_TAKES(answer) ADAPTIVE(run_adaptive_take, ADAPTIVE_TAKE, answer)
#define HOLDING(function, which) \
  .make = start_permits, .holds = &permits, .run = (function), .op = (which)
#define QUEUES(function, which)                                                            \
  .make = start_queue, .holds = &queue, .run = (function), .op = (which), ONE(PERMITS(1)), \
  .prior = 1, .overtake = come_or_look
#define SERVES(function)                                                                       \
  .make = start_queue, .holds = &queue, .run = (function), .op = QUEUE_SERVE, ONE(PERMITS(1)), \
  .status = 1, .overtake = be_served_too, .capacity = 4
#define RELEASES                                                                          \
  .make = start_queue, .holds = &queue, .run = run_release, .op = QUEUE, ONE(PERMITS(1)), \
  .status = 1, .overtake = come_or_look, .prepare = take_one_permit
/* A permit is free, and S sleeps: T is to wake it. */
#define WAKES_S(function, which)                                                           \
  .make = start_queue, .holds = &queue, .run = (function), .op = (which), ONE(PERMITS(1)), \
  .overtake = sleep_on_and_on, .flags = ARMED
#define ASKS_FOR(function, which, made)                                                           \
  .make = (made), .holds = &queue, .run = (function), .op = (which), ONE(PERMITS(1)), .prior = 1, \
  .status = 1
#define TAKES(answer) HOLDING(run_admit, TAKE), .status = (answer)
#define POOL(function, which) \
  .make = start_pool, .holds = &permits, .run = (function), .op = (which)
#define JOINS .make = start_permits, .holds = &joining, .run = run_join, .op = JOIN, .status = 1
#define LEADS_HOST .make = start_lead, .holds = &leading, .run = run_lead, .op = LEAD, .status = 1
#define SETS .make = start_names, .holds = &names, .run = run_set_limits, .status = 1
#define CHANGES(function, what, tokens) \
  .make = start_changes, .holds = &changes, .run = (function), .op = (what), .cost = (tokens)
#define UNDER(which, tokens, changed) \
  CHANGES(run_apply, FSHM_##which, tokens), .status = 1, .overtake = (changed)
#define RAISED_OVER(function, what, answer)                                                      \
  .make = start_permits, .holds = &raising, .run = (function), .op = (what), .status = (answer), \
  .overtake = raise_take_lower, .capacity = 8
#define SWEEPS_WITH(which)                                                                   \
  .make = start_sweep, .holds = &sweeping, .run = run_publish, .status = 1, .cost = (which), \
  .overtake = overtake_sweep, .capacity = 40
#define STATS_OF(function, which) \
  .make = start_stats, .holds = &stats, .run = (function), .op = (which)
#define STATS(function, which) STATS_OF(function, which), ONE(PERMITS(3))
#define FILE_OP(function, which) \
  .make = start_files, .holds = &files, .run = (function), .op = (which), .status = 1
#define FIRST(prepared)                                                                \
  .make = make_segment, .holds = &first, .prepare = (prepared), .run = run_first_join, \
  .op = FIRST_JOIN, .status = 1, .flags = FILES | UNJOINED

/* clang-format off: a line for each */
static const operation_t operations[] = {
    /* a check of a key that has a slot */
    {.name = "check-bucket", APPLY(ACQUIRE, 1), ONE(BUCKET(5)), .prior = 2, ROOM(3, 2, 5)},
    {.name = "check-window", APPLY(ACQUIRE, 1), ONE(WINDOW(5)), .prior = 2, ROOM(3, 2, 5)},
    {.name = "check-sliding", APPLY(ACQUIRE, 1), ONE(SLIDING(5)), .prior = 2, ROOM(3, 2, 5)},
    {.name = "check-last", APPLY(ACQUIRE, 2), ONE(BUCKET(5)), .prior = 3, ROOM(2, 0, 5)},
    {.name = "check-expired",
     APPLY(ACQUIRE, 1),
     ONE(BUCKET(5)),
     .prior = 5,
     .flags = EXPIRED,
     ROOM(5, 4, 5)},
    {.name = "check-converted",
     APPLY(ACQUIRE, 1),
     ONE(BUCKET(5)),
     .prior = 2,
     THEN_ONE(BUCKET(10)),
     ROOM(8, 7, 10)},
    {.name = "is-allowed", ASKS, ONE(BUCKET(5)), .prior = 2, .flags = REAL_TIME, ROOM(3, 2, 5)},
    {.name = "denied", REFUSED(FSHM_DENIED), ONE(BUCKET(5)), .prior = 5, ROOM(0, 0, 5)},
    /* a key that has none */
    {.name = "first-check", APPLY(ACQUIRE, 1), ONE(BUCKET(5)), ROOM(5, 4, 5)},
    {.name = "first-two-regions", APPLY(ACQUIRE, 1), ONE(WINDOW(5)), .capacity = 60, ROOM(5, 4, 5)},
    {.name = "first-is-allowed", ASKS, ONE(BUCKET(5)), .flags = REAL_TIME, ROOM(5, 4, 5)},
    {.name = "insert-over-tenants",
     APPLY(ACQUIRE, 1),
     ONE(SLIDING(5)),
     .flags = TENANTS,
     ROOM(5, 4, 5)},
    {.name = "insert-over-stale", APPLY(ACQUIRE, 1), ONE(BUCKET(5)), .flags = STALE, ROOM(5, 4, 5)},
    {.name = "insert-over-dead-permits",
     APPLY(ACQUIRE, 1),
     ONE(BUCKET(5)),
     .dead = 3,
     ROOM(5, 4, 5)},
    {.name = "insert-full", REFUSED(FSHM_FULL), ONE(BUCKET(5)), .flags = CROWDED, ROOM(0, 0, 5)},
    /* a key that finds no room, and one that has found none before */
    {.name = "shared-first",
     APPLY(ACQUIRE, 1),
     ONE(BUCKET(5)),
     .flags = CROWDED | SHARING,
     ROOM(5, 4, 5)},
    {.name = "shared-window",
     APPLY(ACQUIRE, 1),
     ONE(WINDOW(5)),
     .prior = 2,
     .flags = CROWDED | SHARING,
     ROOM(3, 2, 5)},
    {.name = "shared-several",
     APPLY(ACQUIRE, 1),
     THREE,
     .prior = 2,
     .flags = CROWDED | SHARING,
     ROOM(3, 2, 5)},
    {.name = "shared-charge",
     APPLY(CHARGE, 1),
     ONE(SLIDING(5)),
     .prior = 2,
     .flags = CROWDED | SHARING,
     ROOM(3, 2, 5)},
    {.name = "shared-left",
     APPLY(ACQUIRE, 1),
     ONE(BUCKET(5)),
     .prior = 2,
     .flags = CROWDED | SHARING | ONE_LEFT,
     ROOM(3, 2, 5)},
    {.name = "shared-left-denied",
     REFUSED(FSHM_DENIED),
     ONE(BUCKET(5)),
     .prior = 5,
     .flags = CROWDED | SHARING | ONE_LEFT,
     ROOM(0, 0, 5)},
    {.name = "insert-claimed-low",
     APPLY(ACQUIRE, 1),
     ONE(BUCKET(5)),
     .flags = PENDING_LOW,
     ROOM(5, 4, 5)},
    {.name = "insert-claimed-high",
     APPLY(ACQUIRE, 1),
     ONE(BUCKET(5)),
     .flags = PENDING_HIGH,
     ROOM(5, 4, 5)},
    {.name = "insert-claimed-twice",
     APPLY(ACQUIRE, 1),
     ONE(BUCKET(5)),
     .flags = PENDING_LOW | PENDING_HIGH,
     ROOM(5, 4, 5)},
    /* several limits */
    /* keys with plans */
    {.name = "plan-acquire", APPLY(ACQUIRE, 1), ONE(BUCKET(5)), .prior = 2, PLAN, ROOM(3, 2, 5)},
    {.name = "plan-first", APPLY(ACQUIRE, 1), ONE(BUCKET(5)), PLAN, ROOM(5, 4, 5)},
    {.name = "plan-denied", REFUSED(FSHM_DENIED), ONE(BUCKET(5)), .prior = 5, PLAN, ROOM(0, 0, 5)},
    {.name = "plan-raised",
     APPLY(ACQUIRE, 1),
     ONE(BUCKET(7)),
     .prior = 2,
     UNDER_PLAN(BUCKET(3)),
     ROOM(5, 4, 7)},
    {.name = "plan-lowered",
     APPLY(ACQUIRE, 1),
     ONE(BUCKET(5)),
     .prior = 2,
     UNDER_PLAN(BUCKET(9)),
     ROOM(3, 2, 5)},
    {.name = "plan-lowered-denied",
     REFUSED(FSHM_DENIED),
     ONE(BUCKET(5)),
     .prior = 8,
     UNDER_PLAN(BUCKET(9)),
     ROOM(0, 0, 5)},
    {.name = "plan-lowered-window",
     APPLY(ACQUIRE, 1),
     ONE(WINDOW(5)),
     .prior = 2,
     UNDER_PLAN(WINDOW(9)),
     ROOM(3, 2, 5)},
    {.name = "plan-charge-window",
     APPLY(CHARGE, 7),
     ONE(WINDOW(5)),
     .prior = 2,
     PLAN,
     ROOM(3, 0, 5)},
    {.name = "plan-charge-lowered",
     APPLY(CHARGE, 2),
     ONE(BUCKET(5)),
     .prior = 2,
     UNDER_PLAN(BUCKET(9)),
     ROOM(3, 1, 5)},
    {.name = "plan-refund-raised",
     APPLY(REFUND, 1),
     ONE(BUCKET(9)),
     .prior = 3,
     UNDER_PLAN(BUCKET(4)),
     ROOM(6, 7, 9)},
    {.name = "plan-multi", APPLY(ACQUIRE, 1), THREE, .prior = 2, PLAN, ROOM(3, 2, 5)},
    {.name = "plan-multi-undo",
     REFUSED(FSHM_DENIED),
     THREE,
     .prior = 2,
     .meddle = meddle_second,
     PLAN,
     ROOM(3, 0, 5)},
    {.name = "plan-reset-key",
     CALLS(run_reset_key),
     ONE(BUCKET(5)),
     .prior = 2,
     PLAN,
     ROOM(3, 5, 5)},
    {.name = "plan-reset-all",
     CALLS(run_reset_all),
     ONE(BUCKET(5)),
     .prior = 2,
     PLAN,
     ROOM(3, 5, 5)},
    {.name = "plan-record",
     CALLS(run_record),
     ONE(BUCKET(5)),
     .prior = 2,
     .flags = PLANNED | UNCHANGED,
     THEN_ONE(BUCKET(8)),
     ROOM(3, 3, 5)},
    {.name = "plan-override",
     CALLS(run_override),
     ONE(BUCKET(5)),
     .prior = 2,
     .flags = PLANNED | UNCHANGED,
     THEN_ONE(BUCKET(8)),
     ROOM(3, 3, 5)},
    {.name = "plan-override-again",
     CALLS(run_override),
     .prepare = override_before,
     ONE(BUCKET(5)),
     .prior = 2,
     .flags = PLANNED | UNCHANGED,
     THEN_ONE(BUCKET(8)),
     ROOM(3, 3, 5)},
    {.name = "plan-override-removed",
     CALLS(run_override),
     .prepare = override_before,
     ONE(BUCKET(5)),
     .prior = 2,
     .flags = PLANNED,
     ROOM(3, 3, 5)},
    {.name = "multi-check", APPLY(ACQUIRE, 1), THREE, .prior = 2, ROOM(3, 2, 5)},
    {.name = "multi-first", APPLY(ACQUIRE, 1), THREE, ROOM(5, 4, 5)},
    {.name = "multi-undo",
     REFUSED(FSHM_DENIED),
     THREE,
     .prior = 2,
     .meddle = meddle_second,
     ROOM(3, 0, 5)},
    {.name = "multi-undo-shared",
     REFUSED(FSHM_DENIED),
     THREE,
     .prior = 2,
     .meddle = meddle_both,
     ROOM(3, 0, 5)},
    /* several levels */
    {.name = "levels-check", OF_LEVELS(1), .prior = 2, ROOM(3, 2, 5)},
    {.name = "levels-first", OF_LEVELS(1), ROOM(5, 4, 5)},
    {.name = "levels-claimed", OF_LEVELS(1), .flags = PENDING_LOW, ROOM(5, 4, 5)},
    {.name = "levels-over-tenants", OF_LEVELS(1), .flags = TENANTS, ROOM(5, 4, 5)},
    {.name = "levels-denied", OF_LEVELS(FSHM_DENIED), .prior = 5, ROOM(0, 0, 5)},
    {.name = "levels-full", OF_LEVELS(FSHM_FULL), .flags = CROWDED | TWO_LEFT, ROOM(0, 0, 5)},
    {.name = "levels-undo",
     OF_LEVELS(FSHM_DENIED),
     .prior = 2,
     .meddle = meddle_outermost,
     ROOM(3, 0, 5)},
    {.name = "levels-undo-others",
     OF_LEVELS(FSHM_DENIED),
     .prior = 2,
     .meddle = meddle_two_levels,
     ROOM(3, 0, 5)},
    /* other changes of what was consumed */
    {.name = "refund", APPLY(REFUND, 1), ONE(BUCKET(5)), .prior = 3, ROOM(2, 3, 5)},
    {.name = "multi-refund", APPLY(REFUND, 1), THREE, .prior = 3, ROOM(2, 3, 5)},
    {.name = "charge-debt-bucket", APPLY(CHARGE, 3), ONE(BUCKET(5)), .prior = 4, ROOM(1, 0, 5)},
    {.name = "charge-debt-window", APPLY(CHARGE, 3), ONE(WINDOW(5)), .prior = 4, ROOM(1, 0, 5)},
    {.name = "charge-first", APPLY(CHARGE, 7), ONE(SLIDING(5)), ROOM(5, 0, 5)},
    {.name = "block", APPLY(BLOCK, 7), ONE(BUCKET(5)), .prior = 2, ROOM(3, 0, 5)},
    {.name = "block-first", APPLY(BLOCK, 7), ONE(BUCKET(5)), ROOM(5, 0, 5)},
    {.name = "block-again",
     APPLY(BLOCK, 7),
     ONE(BUCKET(5)),
     .prepare = block_before,
     ROOM(0, 0, 5)},
    {.name = "multi-block",
     APPLY(BLOCK, 7),
     .limits = {BUCKET(5), WINDOW(6), BUCKET(8)},
     .count = 3,
     .prior = 2,
     ROOM(3, 0, 5)},
    {.name = "reserve", APPLY(RESERVE, 1), ONE(BUCKET(5)), .prior = 5, ROOM(0, 0, 5)},
    {.name = "multi-reserve",
     APPLY(RESERVE, 1),
     .limits = {BUCKET(5), BUCKET(8)},
     .count = 2,
     .prior = 5,
     ROOM(0, 0, 5)},
    {.name = "cancel",
     CALLS(run_cancel),
     ONE(BUCKET(5)),
     .prior = 3,
     .prepare = reserve_one,
     .flags = ROUGH,
     ROOM(1, 2, 5)},
    {.name = "settle-less",
     CALLS(run_settle),
     .cost = 1,
     ONE(WINDOW(5)),
     .prepare = charge_three,
     .flags = ROUGH,
     ROOM(2, 4, 5)},
    {.name = "settle-more",
     CALLS(run_settle),
     .cost = 4,
     THREE,
     .prepare = charge_three,
     .flags = ROUGH,
     ROOM(2, 1, 5)},
    {.name = "reset-key", CALLS(run_reset_key), THREE, .prior = 3, ROOM(2, 5, 5)},
    /* with slots to spare: killed before it frees the old slots, these stay until they expire */
    {.name = "reset-limiter",
     CALLS(run_reset_all),
     .capacity = 8,
     THREE,
     .prior = 3,
     ROOM(2, 5, 5)},
    /* windows of the calendar: an hour */
    {.name = "calendar-check", APPLY(ACQUIRE, 1), ONE(CALENDAR(5)), .prior = 2, ROOM(3, 2, 5)},
    {.name = "calendar-denied", REFUSED(FSHM_DENIED), ONE(CALENDAR(5)), .prior = 5, ROOM(0, 0, 5)},
    {.name = "calendar-first", APPLY(ACQUIRE, 1), ONE(CALENDAR(5)), ROOM(5, 4, 5)},
    {.name = "calendar-next",
     APPLY(ACQUIRE, 1),
     ONE(CALENDAR(5)),
     .prior = 5,
     .flags = EXPIRED,
     ROOM(5, 4, 5)},
    {.name = "calendar-over-tenants",
     APPLY(ACQUIRE, 1),
     ONE(CALENDAR(5)),
     .flags = TENANTS,
     ROOM(5, 4, 5)},
    {.name = "calendar-charge", APPLY(CHARGE, 3), ONE(CALENDAR(5)), .prior = 4, ROOM(1, 0, 5)},
    {.name = "calendar-refund", APPLY(REFUND, 1), ONE(CALENDAR(5)), .prior = 3, ROOM(2, 3, 5)},
    {.name = "calendar-several",
     APPLY(ACQUIRE, 1),
     .limits = {CALENDAR(5), BUCKET(8), WINDOW(6)},
     .count = 3,
     .prior = 2,
     ROOM(3, 2, 5)},
    {.name = "calendar-settle",
     CALLS(run_settle),
     .cost = 1,
     ONE(CALENDAR(5)),
     .prepare = charge_three,
     .flags = ROUGH,
     ROOM(2, 4, 5)},
    /* a look at the clock of the day, which was set */
    {.name = "wall-as-before", SETS_CLOCK(AS_BEFORE)},
    {.name = "wall-set-forward", SETS_CLOCK(SET_FORWARD)},
    {.name = "wall-set-back", SETS_CLOCK(SET_BACK)},
    {.name = "wall-set-right", SETS_CLOCK(SET_RIGHT)},
    /* limits that come with the call */
    {.name = "count-window", COUNTS, .status = 1, ONE(WINDOW(5)), .prior = 2, ROOM(3, 2, 5)},
    {.name = "count-window-first", COUNTS, .status = 1, ONE(WINDOW(5)), ROOM(5, 4, 5)},
    {.name = "count-sliding", COUNTS, .status = 1, ONE(SLIDING(5)), .prior = 2, ROOM(3, 2, 5)},
    {.name = "count-denied", COUNTS, .status = 0, ONE(WINDOW(5)), .prior = 5, ROOM(0, 0, 5)},
    {.name = "moving-first", HITS(1, 1), .capacity = 4, ONE(WINDOW(3)), ROOM(3, 2, 3)},
    {.name = "moving-next", HITS(1, 1), ONE(WINDOW(2)), .prior = 1, ROOM(1, 0, 2)},
    {.name = "moving-again",
     HITS(1, 1),
     .capacity = 4,
     ONE(WINDOW(3)),
     .prior = 3,
     .flags = EXPIRED,
     ROOM(3, 2, 3)},
    {.name = "moving-denied", HITS(1, 0), .capacity = 4, ONE(WINDOW(3)), .prior = 3, ROOM(0, 0, 3)},
    {.name = "moving-several",
     HITS(2, 1),
     .capacity = 4,
     ONE(WINDOW(4)),
     .prior = 1,
     ROOM(3, 1, 4)},
    {.name = "moving-several-again",
     HITS(2, 1),
     .capacity = 4,
     ONE(WINDOW(3)),
     .prior = 3,
     .flags = EXPIRED,
     ROOM(3, 1, 3)},
    {.name = "moving-claimed",
     HITS(1, 1),
     .capacity = 4,
     ONE(WINDOW(3)),
     .flags = PENDING_LOW,
     ROOM(3, 2, 3)},
    {.name = "moving-full",
     HITS(2, FSHM_FULL),
     ONE(WINDOW(3)),
     .flags = CROWDED | ONE_LEFT,
     ROOM(0, 0, 3)},
    {.name = "moving-clear",
     MOVING(run_clear, CLEAR),
     .status = 1,
     .capacity = 4,
     ONE(WINDOW(3)),
     .prior = 3,
     ROOM(0, 3, 3)},
    /* budgets: ROOM(left before, after, limit) */
    {.name = "budget-reserve",
     BUDGETS(run_budget_reserve, MONEY_RESERVE, 1, 1),
     MONEY(5),
     .prior = 2,
     ROOM(3, 2, 5)},
    {.name = "budget-last",
     BUDGETS(run_budget_reserve, MONEY_RESERVE, 2, 1),
     MONEY(5),
     .prior = 3,
     ROOM(2, 0, 5)},
    {.name = "budget-first",
     BUDGETS(run_budget_reserve, MONEY_RESERVE, 1, 1),
     MONEY(5),
     ROOM(5, 4, 5)},
    {.name = "budget-denied",
     BUDGETS(run_budget_reserve, MONEY_RESERVE, 1, 0),
     MONEY(5),
     .prior = 5,
     ROOM(0, 0, 5)},
    {.name = "budget-charge",
     BUDGETS(run_budget_reserve, MONEY_CHARGE, 1, 1),
     MONEY(5),
     .prior = 2,
     ROOM(3, 2, 5)},
    {.name = "budget-window",
     BUDGETS(run_budget_reserve, MONEY_RESERVE, 1, 1),
     MONEY(5),
     .prior = 5,
     .flags = EXPIRED,
     ROOM(5, 4, 5)},
    {.name = "budget-settle",
     BUDGETS(run_budget_settle, MONEY_SETTLE, 1, 1),
     MONEY(5),
     .prior = 1,
     .prepare = reserve_three,
     ROOM(1, 3, 5)},
    {.name = "budget-settle-more",
     BUDGETS(run_budget_settle, MONEY_SETTLE, 4, 1),
     MONEY(5),
     .prepare = reserve_three,
     ROOM(2, 1, 5)},
    {.name = "budget-release",
     BUDGETS(run_budget_settle, MONEY_SETTLE, 0, 1),
     MONEY(5),
     .prepare = reserve_three,
     ROOM(2, 5, 5)},
    {.name = "budget-add",
     BUDGETS(run_budget_add, MONEY_ADD, 2, 1),
     MONEY(5),
     .prior = 4,
     ROOM(1, 3, 5)},
    {.name = "budget-grant",
     BUDGETS(run_budget_grant, MONEY_GRANT, 2, 1),
     MONEY(5),
     .prior = 1,
     .prepare = grant_three,
     ROOM(4, 4, 5)},
    {.name = "budget-grant-first",
     BUDGETS(run_budget_grant, MONEY_GRANT, 2, 1),
     MONEY(5),
     .prior = 1,
     ROOM(4, 4, 5)},
    {.name = "budget-withdraw",
     BUDGETS(run_budget_withdraw, MONEY_WITHDRAW, 1, 1),
     MONEY(5),
     .prior = 1,
     .prepare = grant_three,
     ROOM(4, 4, 5)},
    /* token leases */
    {.name = "token-lease-spend", SPENDS(1, 1), ONE(TOKEN_LEASE), .prior = 5, ROOM(5, 4, 0)},
    {.name = "token-lease-spend-last", SPENDS(2, 1), ONE(TOKEN_LEASE), .prior = 2, ROOM(2, 0, 0)},
    {.name = "token-lease-ask", SPENDS(3, FSHM_ASK), ONE(TOKEN_LEASE), .prior = 2, ROOM(2, 2, 0)},
    {.name = "token-lease-ask-none", SPENDS(1, FSHM_ASK), ONE(TOKEN_LEASE), ROOM(0, 0, 0)},
    {.name = "token-lease-denied",
     SPENDS(3, FSHM_DENIED),
     ONE(TOKEN_LEASE),
     .prior = 2,
     .flags = REFUSES,
     ROOM(2, 2, 0)},
    {.name = "token-lease-spend-told",
     SPENDS(1, 1),
     ONE(TOKEN_LEASE),
     .prior = 5,
     .flags = REFUSES,
     ROOM(5, 4, 0)},
    {.name = "token-lease-over",
     SPENDS(1, FSHM_ASK),
     ONE(TOKEN_LEASE),
     .prior = 5,
     .flags = EXPIRED,
     ROOM(0, 0, 0)},
    {.name = "token-lease-spend-several",
     SPENDS(1, 1),
     .limits = {TOKEN_LEASE, TOKEN_LEASE},
     .count = 2,
     .prior = 5,
     ROOM(5, 4, 0)},
    {.name = "token-lease-put", PUTS(3), ONE(TOKEN_LEASE), .prior = 2, ROOM(2, 5, 0)},
    {.name = "token-lease-put-first", PUTS(3), ONE(TOKEN_LEASE), ROOM(0, 3, 0)},
    {.name = "token-lease-put-claimed",
     PUTS(3),
     ONE(TOKEN_LEASE),
     .flags = PENDING_LOW,
     ROOM(0, 3, 0)},
    {.name = "token-lease-put-over",
     PUTS(3),
     ONE(TOKEN_LEASE),
     .prior = 5,
     .flags = EXPIRED,
     ROOM(0, 3, 0)},
    {.name = "token-lease-return", RETURNS(3), ONE(TOKEN_LEASE), .prior = 2, ROOM(2, 5, 0)},
    {.name = "token-lease-take",
     TOKEN_LEASES(run_take_out, TOKEN_LEASE_TAKE, FSHM_OK),
     ONE(TOKEN_LEASE),
     .prior = 5,
     ROOM(5, 0, 0)},
    /* put over whatever was there: ROOM(tokens before, after, -) of the first limit */
    {.name = "learn", LEARNS(3), ONE(WINDOW(5)), .prior = 2, ROOM(2, 3, 0)},
    {.name = "learn-first", LEARNS(3), ONE(WINDOW(5)), ROOM(0, 3, 0)},
    {.name = "learn-claimed", LEARNS(3), ONE(WINDOW(5)), .flags = PENDING_LOW, ROOM(0, 3, 0)},
    {.name = "learn-over-tenants", LEARNS(3), ONE(WINDOW(5)), .flags = TENANTS, ROOM(0, 3, 0)},
    {.name = "learn-none", LEARNS(0), ONE(WINDOW(5)), .prior = 2, ROOM(2, 0, 0)},
    {.name = "learn-several",
     LEARNS(3),
     .limits = {WINDOW(5), BUCKET(5), SLIDING(7)},
     .count = 3,
     .prior = 2,
     ROOM(2, 3, 0)},
    {.name = "refuse", REFUSALS(2), .prepare = refuse_it, ROOM(3, 2, 0)},
    {.name = "refuse-first", REFUSALS(2), ROOM(0, 2, 0)},
    {.name = "refuse-claimed", REFUSALS(2), .flags = PENDING_LOW, ROOM(0, 2, 0)},
    {.name = "refuse-forget", REFUSALS(0), .prepare = refuse_it, ROOM(3, 0, 0)},
    {.name = "feature-reset",
     TELLS(run_feature_reset, FEATURE_RESET),
     ONE(WINDOW(5)),
     ROOM(3, 0, 0)},
    /* permits that were granted to this host: ROOM(allowed, -, lowered to) */
    {.name = "lease-take", LEASE_TAKES(1), ONE(PERMITS(6)), .prior = 1, ROOM(3, 0, 0)},
    {.name = "lease-take-last", LEASE_TAKES(1), ONE(PERMITS(6)), .prior = 2, ROOM(3, 0, 0)},
    {.name = "lease-take-none", LEASE_TAKES(FSHM_ASK), ONE(PERMITS(6)), .prior = 3, ROOM(3, 0, 0)},
    {.name = "lease-take-lowered",
     LEASE_TAKES(1),
     ONE(PERMITS(6)),
     .prior = 1,
     .flags = LOW_FREED,
     ROOM(4, 0, 2)},
    {.name = "lease-take-ask",
     LEASE_TAKES(FSHM_ASK),
     ONE(PERMITS(6)),
     .prior = 2,
     .flags = LOW_FREED,
     ROOM(4, 0, 2)},
    {.name = "lease-alone", LEASE_DROPS(1), ONE(PERMITS(6)), .prior = 1, ROOM(4, 0, 0)},
    {.name = "lease-alone-first", LEASE_DROPS(1), ONE(PERMITS(6))},
    {.name = "lease-alone-none", LEASE_DROPS(0), ONE(PERMITS(6)), .prior = 3, ROOM(4, 0, 0)},
    {.name = "lease-lower",
     LEASE_SETS(run_lease_lower, 1),
     ONE(PERMITS(6)),
     .prior = 2,
     ROOM(4, 0, 0)},
    {.name = "lease-put", LEASE_SETS(run_lease_put, 4), ONE(PERMITS(6)), .prior = 1, ROOM(2, 0, 0)},
    {.name = "lease-put-first", LEASE_SETS(run_lease_put, 2), ONE(PERMITS(6))},
    {.name = "lease-put-lowered",
     LEASE_SETS(run_lease_put, 3),
     ONE(PERMITS(6)),
     .prior = 1,
     .flags = LOW_FREED,
     ROOM(4, 0, 2)},
    /* a limit that is learned: ROOM(limit, limit after it, lowered to) */
    {.name = "adaptive-take", ADAPTIVE_TAKES(1), .prior = 1, ROOM(3, 0, 0)},
    {.name = "adaptive-take-first", ADAPTIVE_TAKES(1), ROOM(0, 4, 0)},
    {.name = "adaptive-take-erased",
     .make = start_adaptive_erased,
     .holds = &adaptive,
     .run = run_adaptive_take,
     .op = ADAPTIVE_TAKE,
     .status = 1,
     .capacity = 16,
     ONE(PERMITS(6)),
     ROOM(0, 4, 0)},
    {.name = "adaptive-take-last", ADAPTIVE_TAKES(1), .prior = 2, ROOM(3, 0, 0)},
    {.name = "adaptive-take-none", ADAPTIVE_TAKES(0), .prior = 3, ROOM(3, 0, 0)},
    {.name = "adaptive-take-lowered",
     ADAPTIVE_TAKES(1),
     .prior = 1,
     .flags = LOW_FREED,
     ROOM(4, 2, 2)},
    {.name = "adaptive-take-over",
     ADAPTIVE_TAKES(0),
     .prior = 2,
     .flags = LOW_FREED,
     ROOM(4, 2, 2)},
    {.name = "adaptive-take-clean", ADAPTIVE_TAKES(1), .prior = 1, ROOM(4, 2, 2)},
    {.name = "adaptive-refused",
     ADAPTIVE(run_adaptive_refused, ADAPTIVE_REFUSED, FSHM_OK),
     .prior = 2,
     ROOM(5, 4, 0)},
    {.name = "adaptive-refused-again",
     ADAPTIVE(run_adaptive_refused, ADAPTIVE_REFUSED, FSHM_OK),
     .prior = 2,
     .cost = 1,
     ROOM(5, 4, 0)},
    {.name = "adaptive-served",
     ADAPTIVE(run_adaptive_served, ADAPTIVE_SERVED, FSHM_OK),
     ROOM(3, 3, 0)},
    {.name = "adaptive-served-round",
     ADAPTIVE(run_adaptive_served, ADAPTIVE_SERVED, FSHM_OK),
     .cost = 2,
     ROOM(3, 4, 0)},
    {.name = "adaptive-pause", ADAPTIVE(run_adaptive_pause, ADAPTIVE_SET, FSHM_OK), ROOM(3, 0, 0)},
    {.name = "adaptive-forget",
     ADAPTIVE(run_adaptive_forget, ADAPTIVE_SET, FSHM_OK),
     .cost = 1,
     .flags = REAL_TIME,
     ROOM(3, 4, 0)},
    /* permits */
    {.name = "permit-fresh", TAKES(1), ONE(PERMITS(3)), .prior = 1},
    {.name = "permit-free", TAKES(1), ONE(PERMITS(3)), .prior = 1, .flags = FREED},
    {.name = "permit-last", TAKES(1), ONE(PERMITS(3)), .prior = 2, .flags = FREED},
    {.name = "permit-takeover", TAKES(1), ONE(PERMITS(3)), .prior = 1, .dead = 2},
    {.name = "permit-denied", TAKES(0), ONE(PERMITS(3)), .prior = 3},
    {.name = "permit-full", TAKES(FSHM_FULL), ONE(PERMITS(3)), .flags = CROWDED},
    {.name = "permit-lowered",
     TAKES(1),
     ONE(PERMITS(3)),
     .prior = 1,
     .flags = FREED,
     THEN_ONE(PERMITS(2))},
    {.name = "permit-lowered-denied",
     TAKES(0),
     ONE(PERMITS(3)),
     .prior = 2,
     .flags = FREED,
     THEN_ONE(PERMITS(1))},
    {.name = "permit-lowered-beyond",
     TAKES(0),
     ONE(PERMITS(3)),
     .prior = 2,
     .flags = LOW_FREED,
     THEN_ONE(PERMITS(1))},
    {.name = "permit-release",
     HOLDING(run_release, RELEASE),
     .status = 1,
     ONE(PERMITS(3)),
     .prior = 1,
     .prepare = take_one_permit},
    {.name = "permit-free-counted",
     TAKES(1),
     ONE(PERMITS(3)),
     .prior = 1,
     .flags = FREED | COUNTED},
    {.name = "permit-release-counted",
     HOLDING(run_release, RELEASE),
     .status = 1,
     ONE(PERMITS(3)),
     .prior = 1,
     .prepare = take_one_permit,
     .flags = COUNTED},
    {.name = "permit-release-remembered",
     .make = start_permits,
     .holds = &remembered,
     .run = run_release,
     .op = RELEASE,
     .status = 1,
     ONE(PERMITS(3)),
     .prior = 2,
     .prepare = take_one_permit,
     .flags = COUNTED},
    {.name = "permit-idle",
     HOLDING(run_idle, IDLE_MARK),
     .status = 2,
     ONE(PERMITS(3)),
     .prior = 1,
     .prepare = take_one_permit},
    {.name = "permits-lower",
     HOLDING(run_publish, LOWER),
     .status = 1,
     ONE(PERMITS(3)),
     .prior = 1,
     .flags = LOW_FREED | UNCHANGED | MOST_BEHIND,
     THEN_ONE(PERMITS(1))},
    {.name = "admit",
     TAKES(1),
     .limits = {BUCKET(50), WINDOW(60), PERMITS(2)},
     .count = 3,
     .capacity = 4,
     .prior = 1},
    {.name = "in-flight",
     HOLDING(run_in_flight, COUNT_HELD),
     .status = 1,
     ONE(PERMITS(3)),
     .prior = 1,
     .dead = 2},
    {.name = "reap", HOLDING(run_reap, REAP), .status = 1, ONE(PERMITS(3)), .prior = 1, .dead = 2},
    {.name = "reap-by-force",
     .make = start_by_force,
     .holds = &by_force,
     .run = run_reap_by_force,
     .op = REAP_BY_FORCE,
     .status = 1,
     .capacity = 8,
     ONE(PERMITS(4)),
     .prior = 2,
     .prepare = take_one_permit},
    /* the wait queue */
    {.name = "queue-join", QUEUES(run_queue_join, QUEUE_JOIN), .status = 0, .flags = ARMED},
    {.name = "queue-join-first", QUEUES(run_queue_join, QUEUE_JOIN), .status = 1},
    {.name = "queue-join-after-dead", QUEUES(run_queue_join, QUEUE_JOIN), .status = 1, .dead = 1},
    {.name = "queue-turn",
     QUEUES(run_queue_turn, QUEUE_STAY),
     .prepare = come_next,
     .status = 0,
     .flags = ARMED},
    {.name = "queue-turn-first",
     QUEUES(run_queue_turn, QUEUE_STAY),
     .prepare = come_first,
     .status = 1,
     .flags = ARMED},
    {.name = "queue-turn-lost",
     QUEUES(run_queue_turn, QUEUE_JOIN),
     .prepare = come_and_lose,
     .status = 1,
     .flags = ARMED},
    {.name = "queue-leave",
     QUEUES(run_queue_leave, QUEUE),
     .prepare = come_first,
     .status = 1,
     .flags = ARMED},
    {.name = "queue-leave-last",
     QUEUES(run_queue_leave, QUEUE),
     .prepare = come_first,
     .status = 1},
    {.name = "queue-requeue",
     QUEUES(run_queue_requeue, QUEUE_STAY),
     .prepare = come_first,
     .status = 1,
     .flags = ARMED},
    {.name = "queue-wake", QUEUES(run_queue_wake, QUEUE), .status = 1, .flags = ARMED},
    {.name = "queue-wake-after-dead", QUEUES(run_queue_wake, QUEUE), .status = 1, .dead = 1},
    {.name = "queue-release", RELEASES, .flags = ARMED},
    {.name = "queue-release-none", RELEASES},
    {.name = "queue-release-polled",
     .make = start_queue_polled,
     .holds = &queue,
     .run = run_release,
     .op = QUEUE,
     ONE(PERMITS(1)),
     .status = 1,
     .overtake = watch_and_sleep,
     .prepare = take_one_permit,
     .flags = ARMED},
    {.name = "queue-turn-unreached",
     QUEUES(run_queue_turn, QUEUE_STAY),
     .prepare = come_unreached,
     .status = 1,
     .flags = ARMED},
    {.name = "queue-turn-woken",
     WAKES_S(run_queue_turn, QUEUE_JOIN),
     .prepare = come_next_woken,
     .status = 0},
    {.name = "queue-leave-woken",
     WAKES_S(run_queue_leave, QUEUE),
     .prepare = come_first_woken,
     .status = 1},
    {.name = "queue-requeue-woken",
     WAKES_S(run_queue_requeue, QUEUE_JOIN),
     .prepare = come_first_woken,
     .status = 1},
    {.name = "queue-reap", WAKES_S(run_reap, QUEUE), .dead = 1, .status = 1},
    {.name = "queue-ask",
     ASKS_FOR(run_queue_ask, QUEUE_ASK, start_queue),
     .prepare = come_first,
     .overtake = watch_and_hear},
    {.name = "queue-asked",
     ASKS_FOR(run_queue_asked, QUEUE_ASKED, start_queue_asked),
     .overtake = hear_anew,
     .flags = ARMED},
    {.name = "queue-watch",
     ASKS_FOR(run_queue_watch, QUEUE_WATCH, start_queue_asked),
     .prepare = be_told,
     .overtake = ask_again,
     .flags = ARMED},
    {.name = "queue-next",
     .make = start_queue_asked,
     .holds = &queue,
     .run = run_queue_next,
     .op = QUEUE,
     ONE(PERMITS(1)),
     .prior = 1,
     .status = FSHM_NEXT_OTHER,
     .overtake = come_or_look,
     .flags = ARMED},
    {.name = "queue-next-ours",
     QUEUES(run_queue_next, QUEUE_STAY),
     .prepare = come_first,
     .status = FSHM_NEXT_OURS,
     .flags = ARMED},
    {.name = "queue-served-first", SERVES(run_queue_served), .prepare = come_to_be_served},
    {.name = "queue-served", SERVES(run_queue_served), .prepare = come_to_be_served_again},
    {.name = "queue-correct", SERVES(run_queue_correct), .prepare = come_to_be_served_again},
    {.name = "pool-get",
     POOL(run_pool_get, TAKE),
     .status = 1,
     ONE(PERMITS(2)),
     .capacity = 4,
     .prior = 1},
    {.name = "pool-return",
     POOL(run_pool_return, RELEASE),
     .status = 4,
     ONE(PERMITS(2)),
     .capacity = 4,
     .prior = 1,
     .prepare = open_connection},
    {.name = "join", JOINS, ONE(PERMITS(3)), .prior = 1, .dead = 2, .flags = UNJOINED},
    {.name = "join-after-holder",
     JOINS,
     ONE(PERMITS(3)),
     .prior = 1,
     .dead = 2,
     .flags = UNJOINED | PREDECESSOR},
    {.name = "join-comes-round",
     JOINS,
     ONE(PERMITS(3)),
     .prior = 1,
     .dead = 2,
     .flags = UNJOINED | PREDECESSOR | COMES_ROUND_NEXT},
    {.name = "lead", LEADS_HOST, ONE(PERMITS(3))},
    {.name = "lead-after-dead", LEADS_HOST, ONE(PERMITS(3)), .flags = DEAD_OWNERS},
    /* names and their limits */
    {.name = "limits-new", SETS, THEN_ONE(WINDOW(9))},
    {.name = "limits-change", SETS, ONE(WINDOW(5)), .prior = 2, THEN_ONE(WINDOW(9))},
    {.name = "limits-change-several",
     SETS,
     THREE,
     .prior = 2,
     .next = {BUCKET(10), WINDOW(8), SLIDING(9), PERMITS(4)},
     .next_count = 4},
    {.name = "limits-change-dead-owners",
     SETS,
     ONE(WINDOW(5)),
     .prior = 2,
     .flags = DEAD_OWNERS,
     THEN_ONE(WINDOW(9))},
    {.name = "limits-lower-permits", SETS, ONE(PERMITS(5)), THEN_ONE(PERMITS(2))},
    /* limits that change under a call, and a change for which all keys have to be looked at */
    {.name = "change-acquire-once",
     UNDER(ACQUIRE, 2, over_once),
     ONE(WINDOW(5)),
     .prior = 2,
     THEN_ONE(WINDOW(3))},
    {.name = "change-acquire-forth",
     UNDER(ACQUIRE, 2, over_forth),
     ONE(WINDOW(5)),
     .prior = 2,
     THEN_ONE(WINDOW(3))},
    {.name = "change-acquire-forth-charged",
     UNDER(ACQUIRE, 2, over_forth_charged),
     ONE(BUCKET(4)),
     .prior = 2,
     THEN_ONE(BUCKET(3))},
    {.name = "change-acquire-many",
     UNDER(ACQUIRE, 2, over_many_charged),
     ONE(BUCKET(5)),
     .prior = 2,
     THEN_ONE(BUCKET(3))},
    {.name = "change-acquire-many-window",
     UNDER(ACQUIRE, 2, over_many_charged),
     ONE(WINDOW(5)),
     .prior = 2,
     THEN_ONE(WINDOW(3))},
    {.name = "change-acquire-many-sliding",
     UNDER(ACQUIRE, 2, over_many_charged),
     ONE(SLIDING(5)),
     .prior = 2,
     THEN_ONE(SLIDING(3))},
    {.name = "change-acquire-twice",
     UNDER(ACQUIRE, 2, over_twice),
     ONE(BUCKET(5)),
     .prior = 2,
     THEN_ONE(BUCKET(3))},
    {.name = "change-acquire-epochs",
     UNDER(ACQUIRE, 2, over_epochs),
     ONE(BUCKET(5)),
     .prior = 2,
     THEN_ONE(BUCKET(3))},
    {.name = "change-acquire-epochs-untouched",
     UNDER(ACQUIRE, 2, over_epochs),
     ONE(BUCKET(20)),
     .prior = 9,
     .flags = HELD_BACK | SLOW,
     THEN_ONE(BUCKET(3))},
    {.name = "change-charge-epochs-untouched",
     UNDER(CHARGE, 2, over_epochs),
     ONE(BUCKET(20)),
     .prior = 9,
     .flags = HELD_BACK | SLOW,
     THEN_ONE(BUCKET(3))},
    {.name = "change-acquire-epochs-untouched-window",
     UNDER(ACQUIRE, 2, over_epochs),
     ONE(WINDOW(20)),
     .prior = 9,
     .flags = HELD_BACK | SLOW,
     THEN_ONE(WINDOW(3))},
    {.name = "change-acquire-kind",
     UNDER(ACQUIRE, 2, over_once),
     ONE(BUCKET(5)),
     .prior = 2,
     THEN_ONE(WINDOW(3))},
    {.name = "change-acquire-reset",
     UNDER(ACQUIRE, 2, over_reset),
     ONE(WINDOW(5)),
     .prior = 2,
     THEN_ONE(WINDOW(3))},
    {.name = "change-claim-once",
     UNDER(ACQUIRE, 2, over_once),
     ONE(BUCKET(5)),
     THEN_ONE(BUCKET(3))},
    {.name = "change-claim-many",
     UNDER(ACQUIRE, 2, over_many),
     ONE(BUCKET(5)),
     THEN_ONE(BUCKET(3))},
    {.name = "change-claim-unused",
     UNDER(ACQUIRE, 2, over_many),
     ONE(BUCKET(5)),
     .flags = UNUSED_RULE,
     THEN_ONE(BUCKET(3))},
    {.name = "change-claim-many-charged",
     UNDER(ACQUIRE, 2, over_many_charged),
     ONE(WINDOW(5)),
     THEN_ONE(WINDOW(2))},
    {.name = "change-claim-epochs",
     UNDER(CHARGE, 2, over_epochs),
     ONE(BUCKET(5)),
     THEN_ONE(BUCKET(3))},
    {.name = "change-claim-reset",
     UNDER(ACQUIRE, 2, over_reset),
     ONE(WINDOW(5)),
     THEN_ONE(WINDOW(2))},
    {.name = "change-charge-forth",
     UNDER(CHARGE, 2, over_forth_charged),
     ONE(BUCKET(5)),
     .prior = 2,
     THEN_ONE(BUCKET(3))},
    {.name = "change-charge-many",
     UNDER(CHARGE, 2, over_many),
     ONE(BUCKET(5)),
     .prior = 2,
     THEN_ONE(BUCKET(3))},
    {.name = "change-charge-many-held-back",
     UNDER(CHARGE, 2, over_many_charged),
     ONE(BUCKET(5)),
     .prior = 9,
     .flags = HELD_BACK,
     THEN_ONE(BUCKET(3))},
    {.name = "change-charge-epochs-held-back",
     UNDER(CHARGE, 2, over_epochs),
     ONE(BUCKET(5)),
     .prior = 9,
     .flags = HELD_BACK,
     THEN_ONE(BUCKET(3))},
    {.name = "change-charge-window-held-back",
     UNDER(CHARGE, 2, over_many),
     ONE(WINDOW(5)),
     .prior = 9,
     .flags = HELD_BACK,
     THEN_ONE(WINDOW(3))},
    {.name = "change-charge-reset",
     UNDER(CHARGE, 2, over_reset),
     ONE(BUCKET(5)),
     .prior = 2,
     THEN_ONE(BUCKET(3))},
    {.name = "change-refund-many",
     UNDER(REFUND, 2, over_many),
     ONE(BUCKET(5)),
     .prior = 3,
     THEN_ONE(BUCKET(3))},
    {.name = "change-refund-held-back",
     UNDER(REFUND, 2, over_many_charged),
     ONE(WINDOW(5)),
     .prior = 9,
     .flags = HELD_BACK,
     THEN_ONE(WINDOW(3))},
    {.name = "change-refund-epochs-held-back",
     UNDER(REFUND, 2, over_epochs),
     ONE(BUCKET(5)),
     .prior = 9,
     .flags = HELD_BACK,
     THEN_ONE(BUCKET(3))},
    {.name = "change-denied-held-back",
     CHANGES(run_apply, FSHM_ACQUIRE, 2),
     .status = 0,
     .overtake = over_many_charged,
     ONE(BUCKET(5)),
     .prior = 9,
     .flags = HELD_BACK,
     THEN_ONE(BUCKET(20))},
    {.name = "change-settle-less",
     CHANGES(run_settle, OTHER_OP, 1),
     .status = 1,
     .overtake = over_many_charged,
     .prepare = charge_three,
     ONE(WINDOW(5)),
     THEN_ONE(WINDOW(3))},
    {.name = "change-settle-more",
     CHANGES(run_settle, OTHER_OP, 5),
     .status = 1,
     .overtake = over_many,
     .prepare = charge_three,
     ONE(BUCKET(5)),
     THEN_ONE(BUCKET(3))},
    {.name = "change-several",
     UNDER(ACQUIRE, 2, over_many_charged),
     THREE,
     .prior = 2,
     .next = {BUCKET(5), WINDOW(3), SLIDING(6)},
     .next_count = 3},
    {.name = "change-several-forth",
     UNDER(ACQUIRE, 2, over_forth),
     THREE,
     .prior = 2,
     .next = {BUCKET(5), WINDOW(3), SLIDING(6)},
     .next_count = 3},
    {.name = "change-several-reset",
     UNDER(ACQUIRE, 2, over_reset),
     THREE,
     .prior = 2,
     .next = {BUCKET(5), WINDOW(3), SLIDING(6)},
     .next_count = 3},
    {.name = "change-permits-take",
     RAISED_OVER(run_admit, TAKE, 1),
     ONE(PERMITS(3)),
     .prior = 1,
     .flags = FREED,
     THEN_ONE(PERMITS(2))},
    {.name = "change-permits-take-last",
     RAISED_OVER(run_admit, TAKE, 1),
     ONE(PERMITS(4)),
     .prior = 2,
     .flags = FREED,
     THEN_ONE(PERMITS(3))},
    {.name = "change-permits-denied",
     RAISED_OVER(run_admit, TAKE, 0),
     ONE(PERMITS(3)),
     .prior = 2,
     .flags = LOW_FREED,
     THEN_ONE(PERMITS(2))},
    {.name = "change-permits-beyond",
     .make = start_permits,
     .holds = &raising,
     .run = run_admit,
     .op = TAKE,
     .status = 1,
     .overtake = lower_take,
     .capacity = 8,
     ONE(PERMITS(3)),
     .prior = 1,
     .prepare = begin_high,
     .flags = UNCHANGED,
     THEN_ONE(PERMITS(2))},
    {.name = "change-permits-as-before",
     .make = start_permits,
     .holds = &raising,
     .run = run_admit,
     .op = TAKE,
     .status = 1,
     .overtake = raise_as_before,
     .capacity = 8,
     ONE(PERMITS(3)),
     .prior = 1,
     .prepare = look_beyond,
     .flags = FREED,
     THEN_ONE(PERMITS(2))},
    {.name = "change-permits-count",
     RAISED_OVER(run_in_flight, COUNT_HELD, 1),
     ONE(PERMITS(3)),
     .prior = 1,
     THEN_ONE(PERMITS(2))},
    {.name = "change-permits-lower",
     RAISED_OVER(run_publish, LOWER, 1),
     ONE(PERMITS(3)),
     .prior = 1,
     .flags = LOW_FREED | UNCHANGED,
     THEN_ONE(PERMITS(2))},
    {.name = "change-sweeps", SWEEPS_WITH(SOME_FIT), ONE(WINDOW(60)), THEN_ONE(WINDOW(11))},
    {.name = "change-sweeps-bucket", SWEEPS_WITH(SOME_FIT), ONE(BUCKET(60)), THEN_ONE(BUCKET(11))},
    {.name = "change-sweeps-none-fits",
     SWEEPS_WITH(NONE_FITS),
     .flags = SLOW,
     ONE(WINDOW(60)),
     THEN_ONE(WINDOW(11))},
    {.name = "change-sweeps-none-fits-bucket",
     SWEEPS_WITH(NONE_FITS),
     .flags = SLOW,
     ONE(BUCKET(60)),
     THEN_ONE(BUCKET(11))},
    {.name = "change-sweeps-lone", SWEEPS_WITH(LONE), ONE(WINDOW(60)), THEN_ONE(WINDOW(11))},
    /* statistics: after = how often it is done then */
    {.name = "memo-put", STATS(run_memo, MEMO), .status = 1, .after = 1},
    {.name = "memo-count", STATS(run_memo_count, MEMO_COUNT), .status = 1, .after = 1},
    {.name = "count-call",
     STATS_OF(run_count_call, COUNT_CALL),
     ONE(BUCKET(5)),
     .status = 1,
     .after = 1},
    {.name = "metric-open", STATS(run_metric_open, METRIC_OPEN), .after = 1},
    {.name = "metric-record", STATS(run_metric, METRIC), .status = 1, .after = 1},
    {.name = "feature-error", STATS(run_feature, FEATURE_ERROR), .status = 1, .after = 1},
    {.name = "deployment-open",
     STATS(run_deployment_open, DEPLOYMENT_OPEN),
     .status = 1,
     .after = 1},
    {.name = "deployment-open-full",
     STATS(run_deployment_open, DEPLOYMENT_OPEN),
     .status = 1,
     .after = 1,
     .flags = CROWDED},
    {.name = "deployment-record",
     STATS(run_deployment_record, DEPLOYMENT_RECORD),
     .status = 1,
     .after = 1},
    {.name = "deployment-record-failure",
     STATS(run_deployment_record, DEPLOYMENT_RECORD),
     .cost = 1,
     .status = 1,
     .after = 1},
    {.name = "request-begin", STATS(run_request, REQUEST), .status = 1, .after = 1},
    {.name = "request-and-back", STATS(run_request_and_back, REQUEST), .status = 1},
    /* the segment */
    {.name = "create", FILE_OP(run_create, CREATE), .flags = FILES},
    {.name = "create-by-rename", FILE_OP(run_create_by_rename, CREATE), .flags = FILES},
    {.name = "attach", FILE_OP(run_attach, ATTACH), .flags = FILES},
    {.name = "first-join", FIRST(attach_first)},
    {.name = "first-join-by-name", FIRST(attach_first_by_name)},
    {.name = "remove", FILE_OP(run_remove, REMOVE), .flags = FILES},
};
/* clang-format on */
