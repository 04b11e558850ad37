/* statistics.h - the calls for what is only counted: deployments and requests in flight, the memo of texts,
 * metrics, features. None needs a limiter, and all take any place. Part of calls.h. */
#ifndef STATISTICS_H
#define STATISTICS_H

#define SOME_DEPLOYMENTS 20

/* Mostly such as there are. */
static uint32_t deployment_of_any(uint64_t n, unsigned i) {
  return n % 8 == 7 ? (uint32_t)(n >> i % 64) : (uint32_t)(n + i) % DEPLOYMENTS;
}

static void record_deployment(user_t *u, uint64_t n, uint64_t now, unsigned what) {
  const uint64_t id = fshm_deployment_id(u->s, "deployment", 1 + what % 10);
  const int at = fshm_deployment_open(u->s, what & 1 ? id : n | 1, now);
  MUST((at >= 0 && at < DEPLOYMENTS) || at == FSHM_FULL || at == FSHM_E_NOT_FOUND);
  fshm_deployment_record(u->s, at < 0 ? (uint32_t)n : (uint32_t)at, n, what & 2, n >> 7,
                         what & 4 ? 0 : (uint32_t)n, what & 8 ? n : 1000000, now);
}

static void use_request(user_t *u, uint64_t n, uint64_t now, unsigned what) {
  fshm_request request;
  if (fshm_request_begin(u->s, deployment_of_any(n, what), now, &request)) {
    MUST(request.deployment < DEPLOYMENTS && request.owner && request.owner <= PROCESSES);
    if (what & 7) MUST(fshm_request_end(u->s, &request) <= 1 && !request.owner);
  }
  request = (fshm_request){n, deployment_of_any(n, 1), what}; /* of none */
  MUST(fshm_request_end(u->s, &request) <= 1);
}

static void pick(user_t *u, uint64_t n, uint64_t now, unsigned what) {
  struct {
    fshm_deployment_info info[SOME_DEPLOYMENTS];
    uint64_t after;
  } found = {.after = FENCE};
  uint32_t deployments[SOME_DEPLOYMENTS];
  double weights[SOME_DEPLOYMENTS], prices[SOME_DEPLOYMENTS];
  unsigned char blocked[SOME_DEPLOYMENTS];
  const uint32_t count = what % (SOME_DEPLOYMENTS + 1);
  for (unsigned i = 0; i < SOME_DEPLOYMENTS; i++) {
    deployments[i] = deployment_of_any(n, i);
    weights[i] = (double)(n >> i & 3);
    prices[i] = (double)(n >> i & 3) - 1;
    blocked[i] = n >> i & 1;
  }
  int64_t at = fshm_deployment_pick(u->s, what / 8 % 5, deployments, weights, prices,
                                    what & 4 ? blocked : NULL, count, n, found.info);
  MUST(at >= -1 && at < (int64_t)count);
  fshm_deployment_look(u->s, deployments, count, now, what & 2, found.info);
  MUST(found.after == FENCE);
}

static void use_memo(user_t *u, uint64_t n, unsigned what) {
  const char text[] = "a text of some length";
  const uint64_t length = 1 + n % (sizeof text - 1), encoding = fshm_memo_encoding(u->s, text, 3);
  fshm_memo_info info;
  uint64_t hash[2] = {n, ~n}; /* any place */
  int64_t count = fshm_memo_get(u->s, encoding, text, length);
  MUST(count >= -1 && count < 1 << 24);
  fshm_memo_put(u->s, encoding, text, length, what & 1 ? n : what);
  const uint64_t tenants = fshm_memo_tenant(u->s, encoding, text, length);
  fshm_memo_put(u->s, tenants, text, length, what);
  if (what & 2) fshm_memo_hash(u->s, encoding, text, length, hash);
  count = fshm_memo_known(u->s, hash);
  MUST(count >= -1 && count < 1 << 24);
  fshm_memo_keep(u->s, hash, n >> 40);
  fshm_memo_count(u->s, n, what);
  if (what % 16) return; /* it looks at all places */
  fshm_memo_at(u->s, &info);
  MUST(info.texts <= info.entries);
}

static void use_metric(user_t *u, uint64_t n, unsigned what) {
  struct {
    fshm_metric_info info;
    uint64_t octaves[FSHM_OCTAVES], after;
  } out = {.after = FENCE};
  static const char names[200] = "a component, an operation, and what is too long for both";
  const uint64_t length = what & 1 ? sizeof names : what % 16;
  const int metric = fshm_metric_open(u->s, names, length, names + 1, n % 100);
  MUST(metric >= 0 && metric < METRICS);
  fshm_metric_record(u->s, what & 2 ? (uint32_t)n : (uint32_t)metric, n, 1 + what, what & 4, n >> 9,
                     what);
  const int status = fshm_metric_at(u->s, what & 8 ? (uint32_t)n : n % METRICS, &out.info);
  MUST(status == FSHM_OK || !status || status == FSHM_E_ARGUMENT);
  MUST(out.info.name_length <= sizeof out.info.name);
  MUST(!out.info.name_length || out.info.component_length < out.info.name_length);
  const uint32_t several[] = {(uint32_t)metric, (uint32_t)n, 0};
  fshm_metric_sum(u->s, several, 3, &out.info);
  fshm_metric_octaves(u->s, several, 3, out.octaves);
  MUST(out.after == FENCE);
}

static void use_feature(user_t *u, uint64_t n, unsigned what) {
  const uint32_t feature = what & 1 ? (uint32_t)n : what % FEATURES;
  (void)fshm_feature_error(u->s, feature);
  (void)fshm_feature_errors(u->s, feature);
  (void)fshm_feature_words(u->s)[what % FEATURES];
  if (what & 2) fshm_feature_reset(u->s, feature);
}

#endif
