/* threads_statistics.h - what threads do with what is only counted: deployments and requests in flight, the memo
 * of texts, metrics, features. Nothing is lost among those that live. Part of test_threads.c. */
#ifndef THREADS_STATISTICS_H
#define THREADS_STATISTICS_H

#define ROUTED 6 /* deployments */
#define FEATURE 3

typedef struct {
  uint32_t deployments[ROUTED];
  _Atomic uint64_t records, measured, errors;
} statistics_t;

static int open_deployment(fshm_segment *s, uint64_t i) {
  char name[8];
  int length = snprintf(name, sizeof name, "d%d", (int)i);
  return fshm_deployment_open(s, fshm_deployment_id(s, name, (uint64_t)length), 0);
}

static void statistics_begin(statistics_t *c, fshm_segment *s) {
  for (uint32_t i = 0; i < ROUTED; i++) {
    c->deployments[i] = (uint32_t)open_deployment(s, i);
    CHECK_OP(c->deployments[i], <, DEPLOYMENTS);
  }
}

static void statistics_end(statistics_t *c, fshm_segment *s) {
  fshm_deployment_info info[ROUTED];
  fshm_metric_info metric;
  uint64_t records = 0;
  fshm_deployment_look(s, c->deployments, ROUTED, 0, 1, info);
  for (int i = 0; i < ROUTED; i++) {
    records += info[i].records;
    CHECK_EQ(info[i].in_flight, 0);
  }
  CHECK_EQ(records, c->records);
  CHECK_EQ(fshm_feature_errors(s, FEATURE), c->errors);
  if (!c->measured) return;
  const uint32_t metrics[] = {(uint32_t)fshm_metric_open(s, "c", 1, "o", 1)};
  CHECK_EQ(fshm_metric_at(s, metrics[0], &metric), FSHM_OK);
  CHECK_EQ(metric.calls, c->measured);
  CHECK_EQ(metric.sum_ns, c->measured * 5000);
  CHECK_EQ(metric.size_out, c->measured * 9);
}

static void route(statistics_t *c, fshm_segment *s) {
  const double weights[ROUTED] = {1, 2, 3, 4, 5, 6}, prices[ROUTED] = {5, -1, 3, 2, 1, 0};
  const unsigned char blocked[ROUTED] = {1, 0, 0, 0, 0, 0};
  fshm_deployment_info found[ROUTED];
  fshm_request request;
  int64_t at = fshm_deployment_pick(s, (uint32_t)random_below(4), c->deployments, weights, prices,
                                    random_below(2) ? blocked : NULL, ROUTED, random_u64(), found);
  CHECK_OP(at, >=, -1);
  CHECK_OP(at, <, ROUTED);
  const uint32_t deployment = c->deployments[at < 0 ? 0 : at];
  CHECK_EQ(fshm_request_begin(s, deployment, 0, &request), 1);
  fshm_deployment_look(s, &deployment, 1, 0, (int)random_below(2), found);
  CHECK_OP(found[0].in_flight, >=, 1);
  fshm_deployment_record(s, deployment, random_below(1000000), (int)random_below(4),
                         random_below(100), 5, 1000, 0);
  (void)atomic_fetch_add(&c->records, 1);
  CHECK_EQ(fshm_request_end(s, &request), 1);
  CHECK_EQ(fshm_request_end(s, &request), 0);
  CHECK_OP(open_deployment(s, random_below(30)), >=, 0);
}

static void memoize(fshm_segment *s, const char *text) {
  const uint64_t encoding = fshm_memo_encoding(s, "e", 1), length = strlen(text);
  uint64_t hash[2];
  fshm_memo_info info;
  fshm_memo_put(s, encoding, text, length, length);
  int64_t count = fshm_memo_get(s, encoding, text, length);
  CHECK(count == -1 || count == (int64_t)length);
  const uint64_t tenants = fshm_memo_tenant(s, encoding, "t", 1);
  fshm_memo_put(s, tenants, text, length, length + 1);
  count = fshm_memo_get(s, tenants, text, length);
  CHECK(count == -1 || count == (int64_t)length + 1);
  fshm_memo_hash(s, encoding, &length, sizeof length, hash);
  fshm_memo_keep(s, hash, length + 1);
  count = fshm_memo_known(s, hash);
  CHECK(count == -1 || count == (int64_t)length + 1);
  fshm_memo_count(s, 100, 100);
  fshm_memo_at(s, &info);
  CHECK_OP(info.texts, <=, info.entries);
}

static void measure(statistics_t *c, fshm_segment *s, const char *other) {
  const int metric = fshm_metric_open(s, "c", 1, "o", 1);
  const uint32_t both[] = {(uint32_t)metric,
                           (uint32_t)fshm_metric_open(s, "c", 1, other, strlen(other))};
  uint64_t octaves[FSHM_OCTAVES];
  fshm_metric_info info;
  fshm_metric_record(s, both[0], 5000, 1, 1, 7, 9);
  (void)atomic_fetch_add(&c->measured, 1);
  fshm_metric_record(s, both[1], random_u64() >> random_below(64), 3, 0, 0, 0);
  CHECK_EQ(fshm_metric_at(s, both[random_below(2)], &info), FSHM_OK);
  fshm_metric_sum(s, both, 2, &info);
  CHECK_OP(info.calls, >=, 4);
  fshm_metric_octaves(s, both, 2, octaves);
  /* an error for good, and one that is forgotten */
  CHECK_OP(fshm_feature_error(s, FEATURE), >, 0);
  (void)atomic_fetch_add(&c->errors, 1);
  (void)fshm_feature_error(s, FEATURE + 1);
  fshm_feature_reset(s, FEATURE + 1);
  (void)load_relaxed((const _Atomic uint64_t *)(const void *)fshm_feature_words(s) + FEATURE);
}

#endif
