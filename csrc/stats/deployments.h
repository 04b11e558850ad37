/* deployments.h - the rules of routing: decaying means, failures, and which deployment a strategy picks. Pure.
 *
 * The strategies are those of LiteLLM's router, under the same names. The mean is an exponential moving average with
 * weight 1/10, after a plain mean of the first ten. Costs are in units of 1e-9 of any currency.
 */
#ifndef FSHM_ROUTE_H
#define FSHM_ROUTE_H

#include <stdbool.h>

#include "../core/layout.h"

#define LATENCY_UNIT 64 /* ns */
#define DECAY 10 /* the newest record of a mean weighs 1/10 */
#define RECORDS_BITS 20
#define RECORDS_MASK ((UINT64_C(1) << RECORDS_BITS) - 1)
#define MEAN_MAX ((UINT64_C(1) << (64 - RECORDS_BITS)) - 1)
/* A latency without a new record for so long counts as unknown. */
#define STALE_NS UINT64_C(60000000000)

/* A mean of `weight` values, with the next one in place of one of them. more: rounds the change, below `weight`. */
static inline uint64_t mean_with(uint64_t mean, uint64_t value, uint64_t weight, uint64_t more) {
  if (value >= mean) return mean + (value - mean + more) / weight;
  return mean - (mean - value + more) / weight;
}

/* word: mean (44 bits) | records (20, saturating). */
static inline uint64_t next_mean(uint64_t word, uint64_t value) {
  uint64_t records = word & RECORDS_MASK, weight = records < DECAY ? records + 1 : DECAY;
  uint64_t mean = mean_with(word >> RECORDS_BITS, min_u64(value, MEAN_MAX), weight, weight / 2);
  return mean << RECORDS_BITS | (records < RECORDS_MASK ? records + 1 : records);
}

/* word: share of successes in 2^-32 (32 bits; ~0 = all) | records (32, saturating). */
static inline uint64_t next_rate(uint64_t word, uint64_t success) {
  uint64_t records = word & UINT32_MAX, weight = records < DECAY ? records + 1 : DECAY;
  uint64_t share = mean_with(word >> 32, success ? UINT32_MAX : 0, weight, weight - 1);
  return share << 32 | (records < UINT32_MAX ? records + 1 : records);
}

/* word: minute (40 bits) | failures in it (24, saturating). */
static inline uint64_t failures_of(uint64_t word) { return word & 0xffffff; }
static inline uint64_t next_failures(uint64_t word, uint64_t minute) {
  uint64_t count = word >> 24 == minute ? failures_of(word) : 0;
  return minute << 24 | (count < 0xffffff ? count + 1 : count);
}

typedef struct {
  uint64_t latency, success, cost, cooldown, used;
} deployment_words_t;

static inline fshm_deployment_info deployment_read(const deployment_words_t *w, uint64_t now) {
  fshm_deployment_info d = {0};
  uint64_t records = w->latency & RECORDS_MASK;
  d.records = w->success & UINT32_MAX;
  d.success_rate = d.records ? (double)(w->success >> 32) / UINT32_MAX : 1;
  d.idle_ns = minus(now, w->used);
  d.latency_ns = records ? (w->latency >> RECORDS_BITS) * LATENCY_UNIT : UINT64_MAX;
  d.cost = w->cost & RECORDS_MASK ? w->cost >> RECORDS_BITS : UINT64_MAX;
  d.cooldown_ns = minus(w->cooldown, now);
  return d;
}

/* Scores above any latency (2^50 ns) and any cost (2^44). */
#define ASKED 1e18 /* unknown, and a request in flight is measuring it */
#define FAILING 1e30
#define UNKNOWN 1e300

/* The mean latency of successful requests. A deployment without one, or with none for a minute, is tried first, by
 * one request at a time. One that has only failed comes last. */
static inline double latency_score(const fshm_deployment_info *d) {
  bool known = d->latency_ns != UINT64_MAX, stale = d->idle_ns > STALE_NS;
  if (known && (!stale || d->in_flight)) return (double)d->latency_ns;
  if (!known && d->records && !stale) return FAILING;
  return ASKED * (double)d->in_flight;
}

/* The tokens of a request, estimated from the deployments whose cost and price are both known; it converts a price
 * to a cost. No deployment has a cost: 1, and prices are compared. -1: costs and prices cannot be compared. */
static inline double tokens_of_request(const fshm_deployment_info *d, const double *prices,
                                       uint32_t count) {
  double sum = 0;
  uint32_t costs = 0, both = 0;
  for (uint32_t i = 0; i < count; i++) {
    if (d[i].cost == UINT64_MAX) continue;
    costs++;
    if (!(prices[i] > 0)) continue;
    sum += (double)d[i].cost / prices[i];
    both++;
  }
  return both ? sum / both : costs ? -1 : 1;
}

/* The mean cost of a request, else the cost by its price; unknown comes last. */
static inline double cost_score(const fshm_deployment_info *d, double price, double tokens) {
  if (d->cost != UINT64_MAX) return (double)d->cost;
  if (price <= 0) return price < 0 ? UNKNOWN : 0;
  return tokens >= 0 ? price * tokens : UNKNOWN;
}

static inline bool route_out(const fshm_deployment_info *d, const unsigned char *blocked,
                             uint32_t i) {
  return d[i].cooldown_ns || (blocked && blocked[i]);
}

/* Pick in proportion to the weights (0 or more). If all that are left have weight 0, each is equally likely. */
static inline int64_t shuffle_pick(const fshm_deployment_info *d, const double *weights,
                                   const unsigned char *blocked, uint32_t count, uint64_t random) {
  int64_t best = -1;
  double total = 0;
  uint32_t left = 0;
  for (uint32_t i = 0; i < count; i++) {
    if (route_out(d, blocked, i)) continue;
    total += weights[i];
    left++;
  }
  bool alike = !(total > 0);
  double at = (double)(random >> 11) * 0x1p-53 * (alike ? left : total);
  for (uint32_t i = 0; i < count; i++) {
    double weight = alike ? 1 : weights[i];
    if (route_out(d, blocked, i) || weight <= 0) continue;
    best = i;
    if (at < weight) break;
    at -= weight;
  }
  return best;
}

/* Pick one of `count` deployments: an index into the arrays, or -1 if all cool down or are blocked. prices: of a
 * token, in the unit of costs; below 0: unknown. blocked: NULL, or 1 for those to leave out. random: 64 random bits,
 * to break ties. */
static inline int64_t route_pick(uint32_t strategy, const fshm_deployment_info *d,
                                 const double *weights, const double *prices,
                                 const unsigned char *blocked, uint32_t count, uint64_t random) {
  if (strategy == FSHM_ROUTE_SHUFFLE) return shuffle_pick(d, weights, blocked, count, random);
  double tokens = strategy == FSHM_ROUTE_COST ? tokens_of_request(d, prices, count) : 0, least = 0;
  int64_t best = -1;
  uint32_t ties = 0;
  for (uint32_t i = 0; i < count; i++) {
    if (route_out(d, blocked, i)) continue;
    double score = strategy == FSHM_ROUTE_LEAST_BUSY ? (double)d[i].in_flight
                   : strategy == FSHM_ROUTE_LATENCY  ? latency_score(&d[i])
                                                     : cost_score(&d[i], prices[i], tokens);
    if (best >= 0 && score > least) continue;
    ties = best >= 0 && score >= least ? ties + 1 : 1;
    least = score;
    /* the n-th of n equal ones replaces the pick with probability 1/n: all are equally likely */
    if (ties == 1 || (double)(random >> 11) * 0x1p-53 * ties < 1) best = i;
    if (ties > 1) random = random * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
  }
  return best;
}

/* Empty the requests in flight of a process index that this process has just taken. */
void requests_join(fshm_segment *s, uint32_t process, uint64_t incarnation);

#endif
