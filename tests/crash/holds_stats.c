/* holds_stats.c - what must hold of statistics: a record is there or not, whole; a stopped process blocks
 * no other; and a dead process's requests are not in flight. */
#include "crash.h"

#define TEXT "a text that is counted"
#define TOKENS 42
#define FEATURE 3
#define A_COMPONENT "a component"
#define AN_OPERATION "an operation"
#define MEMO_HITS 100 /* of the memo, in one count; and misses */
#define MEMO_MISSES 200
#define DURATION 5000 /* ns, of a call that is measured */
#define SIZE_IN 7
#define SIZE_OUT 9
#define LATENCY (UINT64_C(1000) * LATENCY_UNIT)
#define COST 5
#define COOLDOWN (UINT64_C(5) * 1000000000)

static uint64_t encoding_of_text(void) { return fshm_memo_encoding(world.s, "o200k_base", 10); }

static int the_metric(void) {
  return fshm_metric_open(world.s, A_COMPONENT, strlen(A_COMPONENT), AN_OPERATION,
                          strlen(AN_OPERATION));
}

static uint64_t the_id(void) { return fshm_deployment_id(world.s, "d1", 2); }

/* How many places it has. Killed or stopped in between, one may be left over. */
static uint32_t places_of_deployment(int64_t *first) {
  uint32_t found = 0;
  const uint64_t id = the_id();
  *first = -1;
  for (uint32_t i = 0; i < PROBES; i++) {
    if (load_relaxed(&world.s->deployments[probe(id, i)].id) != id) continue;
    if (!found++) *first = probe(id, i);
  }
  return found;
}

static int64_t index_of_deployment(void) {
  int64_t first;
  (void)places_of_deployment(&first);
  return first;
}

static fshm_deployment_info deployment_info(void) {
  fshm_deployment_info info = {0};
  const int64_t index = index_of_deployment();
  const uint32_t at = (uint32_t)index;
  if (index >= 0) fshm_deployment_look(world.s, &at, 1, world.now, 1, &info);
  return info;
}

/* How often it was done, as everybody can see. */
static uint64_t done_so_far(void) {
  fshm_metric_info metric;
  fshm_memo_info memo;
  switch (op->op) {
    case MEMO: {
      const int64_t count = fshm_memo_get(world.s, encoding_of_text(), TEXT, strlen(TEXT));
      if (count != -1 && count != TOKENS) broken("the memo says %lld", (long long)count);
      return count == TOKENS;
    }
    case MEMO_COUNT:
      fshm_memo_at(world.s, &memo);
      return memo.hits / MEMO_HITS;
    case COUNT_CALL: {
      fshm_counters totals[FSHM_COUNTERS];
      fshm_counters_all(world.s, totals);
      return totals[world.l->counters].denied;
    }
    case METRIC_OPEN:
      return fshm_metric_at(world.s, 0, &metric) == FSHM_OK;
    case METRIC:
      if (fshm_metric_at(world.s, 0, &metric) != FSHM_OK) broken("the metric is gone");
      return metric.calls;
    case FEATURE_ERROR:
      return fshm_feature_errors(world.s, FEATURE);
    case DEPLOYMENT_OPEN:
      return index_of_deployment() >= 0;
    case DEPLOYMENT_RECORD:
      return deployment_info().records;
    default:
      return deployment_info().in_flight;
  }
}

static bool once_for_all(void) {
  return op->op == MEMO || op->op == METRIC_OPEN || op->op == DEPLOYMENT_OPEN;
}

/* A sum that each record adds `one` to, after done_so_far() can see the record. */
static void expect_sum(const char *what, uint64_t is, uint64_t one, uint64_t times) {
  const uint64_t least =
      told->done ? times : minus(times, 1); /* T may stand before it, or be dead */
  if (is % one || is / one < least || is / one > times)
    broken("%s: %llu, of %llu records", what, (unsigned long long)is, (unsigned long long)times);
}

/* All that a record changes, where it was done so often. */
static void expect_sums(uint64_t times) {
  if (op->op == MEMO_COUNT) {
    fshm_memo_info memo;
    fshm_memo_at(world.s, &memo);
    expect_sum("misses", memo.misses, MEMO_MISSES, times);
  } else if (op->op == METRIC) {
    fshm_metric_info m;
    (void)fshm_metric_at(world.s, 0, &m);
    expect_sum("time", m.sum_ns, DURATION, times);
    expect_sum("errors", m.errors, 1, times);
    expect_sum("size in", m.size_in, SIZE_IN, times);
    expect_sum("size out", m.size_out, SIZE_OUT, times);
    if (times && told->done && (m.least_ns != DURATION || m.most_ns != DURATION))
      broken("it took %llu to %llu ns", (unsigned long long)m.least_ns,
             (unsigned long long)m.most_ns);
  } else if (op->op == DEPLOYMENT_RECORD) {
    const deployment_t *d = &world.s->deployments[index_of_deployment()];
    const fshm_deployment_info info = deployment_info();
    const bool fails = op->cost;
    expect_sum("costs", load_relaxed(&d->cost) & RECORDS_MASK, 1, times);
    expect_sum("failures", failures_of(load_relaxed(&d->failures)), 1, fails ? times : 0);
    expect_sum("latencies", load_relaxed(&d->latency) & RECORDS_MASK, 1, fails ? 0 : times);
    if (!times || !told->done) return;
    if (info.cost != COST || info.latency_ns != (fails ? UINT64_MAX : LATENCY))
      broken("it costs %llu and takes %llu ns", (unsigned long long)info.cost,
             (unsigned long long)info.latency_ns);
    if (info.cooldown_ns != (fails ? COOLDOWN : 0) || (info.success_rate < 1) != fails)
      broken("it cools down for %llu ns", (unsigned long long)info.cooldown_ns);
  }
}

static void expect_done(uint64_t times) {
  const uint64_t is = done_so_far();
  if (is != (once_for_all() && times ? 1 : times))
    broken("done %llu times, not %llu", (unsigned long long)is, (unsigned long long)times);
  expect_sums(times);
}

static void stats_end(void) {
  if (told->status != op->status) broken("it answers %d, not %d", told->status, op->status);
  expect_done(op->after);
}

static void do_it(void) {
  outcome_t mine = {0};
  op->run(&mine);
  if (mine.status != op->status) broken("S is answered %d, not %d", mine.status, op->status);
}

/* T's own: not at all, or once; and once where T says so. */
static uint64_t mine_and_no_more(void) {
  const uint64_t is = done_so_far();
  if (is > 1) broken("done %llu times by T alone", (unsigned long long)is);
  return is;
}

static void stats_contend(void) {
  const uint64_t is = mine_and_no_more();
  if (told->done && is != op->after) broken("T says that it is done, and it is not to be seen");
  do_it();
  expect_done(is + op->after);
}

static void stats_survive(void) {
  uint64_t is = mine_and_no_more();
  if (op->op == REQUEST && is) broken("a dead process's request is in flight");
  if (op->op != REQUEST && told->done && is != op->after)
    broken("T said that it is done, and it is not to be seen");
  for (uint64_t i = 1; i <= 3; i++) {
    do_it();
    expect_done(is + i * op->after);
  }
}

static void stats_raced(const outcome_t *mine) {
  if (told->status != op->status || mine->status != op->status)
    broken("T and S are answered %d and %d", told->status, mine->status);
  expect_done(2 * (uint64_t)op->after);
  int64_t first;
  if (op->op == DEPLOYMENT_OPEN && places_of_deployment(&first) != 1)
    broken("the deployment has two places");
  check_invariants(false);
}

static const holds_t stats = {NULL, stats_end, stats_contend, stats_survive, stats_raced, NULL};
