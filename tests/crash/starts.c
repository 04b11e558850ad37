/* starts.c - the states that operations start from. */
#include "crash.h"

static fshm_limiter *named(const char *name, const fshm_limit *limits, uint32_t count) {
  fshm_limiter *l = NULL;
  if (op->flags & PLANNED)
    CHECK_EQ(fshm_plan_open(world.s, name, strlen(name), limits, count, &l), FSHM_OK);
  else
    l = fresh_limiter(world.s, name, limits, count);
  l->frontier = 0; /* the same slot first in all processes: they meet */
  return l;
}

/* A process that joins, does this, and dies. */
static void die_after(void (*task)(void)) {
  pid_t pid = fork();
  if (!pid) {
    (void)process_index(world.s);
    task();
    _exit(0);
  }
  (void)waitpid(pid, NULL, 0);
}

static void plant(uint64_t slot, uint64_t who) {
  pair_t empty = {0, 0}, pending = {who, PENDING(fshm_unique(world.s))};
  (void)pair_cas(&world.s->slots[slot], &empty, pending);
}

static uint64_t who_of_key(uint32_t i) {
  call_t c;
  if (!limits_load_of(world.l, &c.snapshot)) abort();
  begin(&c, world.l, KEY, strlen(KEY), NOW);
  return fingerprint(&c, i);
}

/* Fill what is empty, but for the last `leave` slots. */
static void fill_rest(uint64_t leave) {
  char key[16];
  for (uint64_t i = 0; i + leave < world.s->slot_count; i++) {
    if (load_relaxed(&world.s->slots[i].who)) continue;
    (void)snprintf(key, sizeof key, "rest-%d", (int)i);
    if (op->flags & STALE)
      plant(i, fshm_siphash(1, 2, key, strlen(key)));
    else
      (void)apply_at(world.others, FSHM_ACQUIRE, key, 1, op->flags & TENANTS ? LONG_AGO : NOW);
  }
}

static void open_segment(void) {
  fshm_error e;
  if (fshm_open(segment_name, op->capacity ? op->capacity : 1, 0600, FSHM_OPEN_CREATE, &world.s,
                &e) != FSHM_OK) {
    broken("no segment: %d", e.code);
    exit(1);
  }
  world.s->secret[0] =
      11; /* each key in the same slots in every run: --at finds the same boundary */
  world.s->secret[1] = 22;
  (void)process_index(world.s);
  tracee_mapping(world.s->map, world.s->size);
  const fshm_limit plenty = {1000, PER, 1000, FSHM_WINDOW, 0};
  world.others = fresh_limiter(world.s, "others", &plenty, 1);
}

static void admit_to(fshm_limiter *l, const char *key, fshm_permit *permit) {
  fshm_decision d;
  uint32_t held;
  fshm_admit(l, key, strlen(key), NULL, world.now, permit, &d, &held);
  if (d.status != FSHM_ALLOWED) broken("no permit to begin with: %d", d.status);
}

static void take_dead_permits(void) {
  fshm_permit permit;
  fshm_limiter *l = world.permits ? world.permits : world.l;
  for (uint32_t i = 0; i < op->dead; i++) admit_to(l, KEY, &permit);
}

/* Both clocks stand still at NOW, and hours of the calendar begin when windows of segment time do. So every call takes the
 * same path each time: no look at the clock of the day is due, and no check whether others live. */
static void still_clocks(void) {
  header_t *h = world.s->header;
  world.clock = world.s->epoch + NOW;
  world.wall = WALL_BEGAN - world.s->epoch;
  store_relaxed(&h->wall_base, WALL_BEGAN);
  store_relaxed(&h->wall_floor, WALL_BEGAN);
  store_relaxed(&world.s->wall_looked, NOW);
  store_relaxed(&h->liveness, NOW);
}

/* A limiter with op->limits; the key has consumed op->prior; another key lives beside it. */
static void start_rate_limits(void) {
  open_segment();
  world.now = op->flags & REAL_TIME ? 0 : NOW;
  if (op->limits[0].kind == FSHM_CALENDAR) still_clocks();
  world.l = named("limits", op->limits, op->count);
  fshm_limiter_share(world.l, op->flags & SHARING ? 1 : 0);
  /* Windows that are aligned to the wall clock begin when those of segment time do. */
  if (op->side) world.s->created_realtime_ns = 100 * PER;
  if (op->flags & PENDING_LOW) plant(0, who_of_key(0));
  if (op->flags & PENDING_HIGH) plant(world.s->slot_count - 1, who_of_key(0));
  if (op->flags & TENANT_FIRST) (void)apply_at(world.others, FSHM_ACQUIRE, "old", 1, NOW - PER);
  bool old = op->flags & (EXPIRED | EXPIRING); /* last: else another key would have the slot */
  fshm_limiter *mine = world.l;
  if (op->flags & OTHER_PLAN) world.l = named("limits", op->next, op->next_count);
  if (op->prior && !old && !(op->flags & SHARING)) (void)consume(op->prior, world.now);
  world.l = mine;
  (void)apply_at(world.others, FSHM_ACQUIRE, "beside", 1, world.now);
  if (op->flags & (TENANTS | STALE | CROWDED))
    fill_rest(op->flags & TWO_LEFT                                    ? 2
              : old || (op->flags & (ONE_LEFT | SHARING)) == ONE_LEFT ? 1
                                                                      : 0);
  if (op->flags & SHARING) {
    if (op->prior) (void)consume(op->prior, world.now);
    if (op->flags & ONE_LEFT) (void)fshm_reset_key(world.others, "beside", 6);
  }
  if (op->prior && old) (void)consume(op->prior, op->flags & EXPIRED ? LONG_AGO : NOW - PER);
  if (op->dead) { /* they fill the table */
    const fshm_limit dead = {op->dead, 0, 0, FSHM_PERMITS, 0};
    world.permits = named("permits", &dead, 1);
    die_after(take_dead_permits);
  }
  if (op->next_count && !(op->flags & (UNCHANGED | OTHER_PLAN)))
    fshm_limiter_close(named("limits", op->next, op->next_count));
}

/* Several levels, each with one of op->limits, the innermost first; the key has consumed op->prior in each. */
static void start_levels(void) {
  open_segment();
  world.now = NOW;
  for (uint32_t i = 0; i < LEVELS; i++) {
    const char name[] = {'l', (char)('0' + i), 0};
    world.limiters[i] = named(name, &op->limits[i], 1);
  }
  world.l = world.limiters[0];
  if (op->flags & PENDING_LOW) plant(0, who_of_key(0));
  if (op->prior) (void)consume(op->prior, NOW);
  (void)apply_at(world.others, FSHM_ACQUIRE, "beside", 1, NOW);
  if (op->flags & (TENANTS | CROWDED)) fill_rest(op->flags & TWO_LEFT ? 2 : 0);
}

/* A name whose limit comes with the calls; the key has op->prior tokens in its moving window. */
static void start_moving(void) {
  fshm_counted hit;
  open_segment();
  world.now = NOW;
  world.l = named("moving", op->limits, op->count);
  if (op->flags & PENDING_LOW)
    plant(0, side_who(nth_who(side_of(world.l, KEY).who, 0), world.l->index));
  for (uint32_t i = 0; i < op->prior; i++)
    fshm_moving(world.l, KEY, strlen(KEY), &op->limits[0], 1,
                op->flags & EXPIRED ? LONG_AGO : NOW - PER / 2, &hit);
  (void)apply_at(world.others, FSHM_ACQUIRE, "beside", 1, NOW);
  if (op->flags & (TENANTS | STALE | CROWDED)) fill_rest(op->flags & ONE_LEFT ? 1 : 0);
}

static void start_clocks(void) {
  open_segment();
  world.now = NOW;
  still_clocks();
  store_relaxed(&world.s->wall_looked, 0);
  wall_check(world.s);
}

/* A budget of op->limits; the key has spent op->prior. */
static void start_budget(void) {
  open_segment();
  world.now = NOW;
  still_clocks();
  fshm_limiter *l;
  if (fshm_limiter_open_at(world.s, "budget", 6, op->limits, op->count,
                           op->flags & EXPIRED ? LONG_AGO : NOW, &l) != FSHM_OK)
    broken("no budget");
  world.l = l;
  if (op->prior)
    (void)fshm_budget_add(world.l, KEY, strlen(KEY), 0, op->prior,
                          op->flags & EXPIRED ? LONG_AGO : NOW);
  (void)apply_at(world.others, FSHM_ACQUIRE, "beside", 1, NOW);
}

/* What a host was granted: op->prior tokens of each limit. */
static void grant(uint64_t tokens, uint64_t now) {
  fshm_token_lease leases[FSHM_MAX_LIMITS];
  for (uint32_t i = 0; i < FSHM_MAX_LIMITS; i++)
    leases[i] = (fshm_token_lease){tokens, UINT64_MAX, now + PER};
  if (fshm_token_lease_put(world.l, KEY, strlen(KEY), leases, now) != FSHM_OK)
    broken("nothing can be granted");
}
static void start_token_lease(void) {
  open_segment();
  world.now = NOW;
  world.l = named("wallet", op->limits, op->count);
  if (op->flags & PENDING_LOW) plant(0, who_of_key(0));
  if (op->prior) grant(op->prior, op->flags & EXPIRED ? LONG_AGO : NOW);
  if (op->flags & REFUSES) {
    const fshm_limit limit = {9, PER, 0, FSHM_WINDOW, 0};
    const uint64_t costs[FSHM_MAX_LIMITS] = {op->cost}, used[FSHM_MAX_LIMITS] = {9},
                   left[FSHM_MAX_LIMITS] = {PER / 2};
    world.refused = named("refused", op->limits, 1);
    world.known = named("known", &limit, 1);
    if (fshm_token_lease_refuse(world.refused, KEY, strlen(KEY), costs, PER, NOW) != FSHM_OK ||
        fshm_learn(world.known, KEY, strlen(KEY), used, left, NOW) != FSHM_OK)
      broken("nothing can be refused");
  }
  (void)apply_at(world.others, FSHM_ACQUIRE, "beside", 1, NOW);
  if (op->flags & (TENANTS | STALE | CROWDED)) fill_rest(op->flags & ONE_LEFT ? 1 : 0);
}

/* The process will join slot: what dead processes hold, the last owner of that slot held. */
static void make_predecessor(pid_t pid) {
  uint64_t process = (uint32_t)pid * 2654435761u % HOME_PROCESSES, mine = process_index(world.s);
  const uint64_t incarnation = op->flags & COMES_ROUND_NEXT ? (1 << INCARNATION_BITS) - 1 : 7;
  process = process == mine ? (process + 1) % HOME_PROCESSES : process;
  for (uint64_t i = 0; i < world.s->slot_count; i++) {
    pair_t seen = pair_load(&world.s->slots[i]), next = seen;
    if (!IS_PERMIT(seen.when) || OWNER_OF(seen.when) == mine) continue;
    next.when = (seen.when & ~IDENTITY_MASK) | process << 32 | incarnation << 18;
    (void)pair_cas(&world.s->slots[i], &seen, next);
  }
  store_relaxed(&world.s->processes[process].incarnation, incarnation);
}

/* A limiter of permits, op->limits; S holds op->prior, op->dead are dead processes'. Then the limits become
 * op->next, if there are any. */
static void start_permits(void) {
  fshm_permit permits[16];
  open_segment();
  world.now = NOW;
  world.l = named("permits", op->limits, op->count);
  (void)apply_at(world.others, FSHM_ACQUIRE, "beside", 1, NOW);
  if (op->dead) die_after(take_dead_permits);
  for (uint32_t i = 0; i < op->prior; i++) admit_to(world.l, KEY, &permits[i]);
  if (op->prior) world.permit = permits[op->prior - 1];
  if (op->flags & (FREED | LOW_FREED)) {
    const uint32_t n = (uint32_t)op->limits[op->count - 1].n;
    const uint32_t from = op->flags & FREED ? op->prior : 0;
    for (uint32_t i = op->prior; i < n; i++) admit_to(world.l, KEY, &permits[i]);
    for (uint32_t i = from; i < from + n - op->prior; i++)
      (void)fshm_permit_release(world.l, &permits[i]);
    if (op->prior) world.permit = permits[from ? op->prior - 1 : n - 1];
  }
  if (op->flags & COUNTED) (void)fshm_in_flight(world.l, KEY, strlen(KEY));
  if (op->flags & (TENANTS | STALE | CROWDED)) fill_rest(0);
  if (op->flags & MOST_BEHIND)
    store_relaxed(&world.s->limiters[world.l->index].most,
                  (uint32_t)op->next[op->next_count - 1].n);
  if (op->next_count && !(op->flags & UNCHANGED))
    fshm_limiter_close(named("permits", op->next, op->next_count));
}

/* What a pool of connections has: permits of the endpoint, and of the whole pool. */
static void start_pool(void) {
  start_permits();
  const fshm_limit total = {3, 0, 0, FSHM_PERMITS, 0};
  world.totals = named("totals", &total, 1);
  for (uint32_t i = 0; i < op->prior; i++) admit_to(world.totals, "", &world.total);
}

/* A process took the spare slots of the entry, to write rules there, and died. */
static void own_spare_rules(void) {
  limiter_entry_t *e = &world.s->limiters[world.l->index];
  const uint64_t incarnation = world.s->fork_page->incarnation;
  const uint64_t owner = (incarnation << 16 | (process_index(world.s) + 1)) & ~RULE_USED;
  while (take_rule(world.s, e, owner) >= 0) continue;
}

/* A name with op->limits, or none where there are none. */
static void start_names(void) {
  open_segment();
  world.now = NOW;
  (void)apply_at(world.others, FSHM_ACQUIRE, "beside", 1, NOW);
  if (!op->count) return;
  world.l = named("names", op->limits, op->count);
  if (op->prior) (void)apply_at(world.l, FSHM_ACQUIRE, KEY, op->prior, NOW);
  if (op->flags & DEAD_OWNERS) die_after(own_spare_rules);
}
