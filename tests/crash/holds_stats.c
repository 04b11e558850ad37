/* holds_stats.c - what must hold of statistics: a record is there or not, whole; a stopped process holds up
 * nobody; and a dead process's requests are not in flight. */
#include "crash.h"

#define TEXT "a text that is counted"
#define TOKENS 42
#define FEATURE 3
#define A_COMPONENT "a component"
#define AN_OPERATION "an operation"
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

static int64_t place_of_deployment(void) {
  int64_t first;
  (void)places_of_deployment(&first);
  return first;
}

static fshm_deployment_info deployment_info(void) {
  fshm_deployment_info info = {0};
  const int64_t place = place_of_deployment();
  const uint32_t at = (uint32_t)place;
  if (place >= 0) fshm_deployment_look(world.s, &at, 1, world.now, 1, &info);
  return info;
}

/* How often it was done, as everybody can see. */
static uint64_t done_so_far(void) {
  fshm_metric_info metric;
  switch (op->op) {
    case MEMO: {
      const int64_t count = fshm_memo_get(world.s, encoding_of_text(), TEXT, strlen(TEXT));
      if (count != -1 && count != TOKENS) broken("the memo says %lld", (long long)count);
      return count == TOKENS;
    }
    case METRIC_OPEN:
      return fshm_metric_at(world.s, 0, &metric) == FSHM_OK;
    case METRIC:
      if (fshm_metric_at(world.s, 0, &metric) != FSHM_OK) broken("the metric is gone");
      if (metric.errors > metric.calls) broken("more errors than calls");
      return metric.calls;
    case FEATURE_ERROR:
      return fshm_feature_errors(world.s, FEATURE);
    case DEPLOYMENT_OPEN:
      return place_of_deployment() >= 0;
    case DEPLOYMENT_RECORD:
      return deployment_info().records;
    default:
      return deployment_info().in_flight;
  }
}

static bool once_for_all(void) {
  return op->op == MEMO || op->op == METRIC_OPEN || op->op == DEPLOYMENT_OPEN;
}

static void expect_done(uint64_t times) {
  const uint64_t is = done_so_far();
  if (is != (once_for_all() && times ? 1 : times))
    broken("done %llu times, not %llu", (unsigned long long)is, (unsigned long long)times);
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
  if (op->op == FLIGHT && is) broken("a dead process's request is in flight");
  if (op->op != FLIGHT && told->done && is != op->after)
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

static const holds_t stats = {NULL, stats_end, stats_contend, stats_survive, stats_raced};
