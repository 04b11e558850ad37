/* wait_order.h - who is next among the callers that wait for one key. Pure: no clock, no memory, no side effect.
 *
 * The caller of the highest band is next: its priority, plus one for each AGE_NS that it has waited, so that no band
 * waits for ever. In a band, the caller of the tenant that has had the least service; of one tenant, the one that came
 * first. Service is counted in tokens divided by the tenant's weight: "Fairness in Serving Large Language Models" (OSDI
 * 2024), "Start-time Fair Queueing" (SIGCOMM 1996). */
#ifndef FSHM_WAIT_ORDER_H
#define FSHM_WAIT_ORDER_H

#include <stdbool.h>
#include <stdint.h>

#define AGE_NS UINT64_C(10000000000)
#define MOST_PRIORITY 100 /* and -100 is the least */

/* Service has 30 bits and comes round: two numbers are compared by their difference. Units: SERVICE_UNIT for a token. */
#define SERVICE_BITS 30
#define SERVICE_MASK ((UINT64_C(1) << SERVICE_BITS) - 1)
#define SERVICE_UNIT 16U
#define MOST_SERVICE (UINT64_C(1) << (SERVICE_BITS - 3)) /* of one call, in units */

typedef struct {
  uint64_t since; /* when it came: segment ns */
  uint64_t tenant; /* 0 = of none */
  uint64_t service; /* that its tenant has had */
  uint64_t id; /* a number that no other has: of two that are alike, the lower is first */
  int32_t priority;
} waiting_t;

static inline int64_t service_ahead(uint64_t a, uint64_t b) { /* a - b */
  uint64_t d = (a - b) & SERVICE_MASK;
  return d > SERVICE_MASK / 2 ? (int64_t)d - (int64_t)(SERVICE_MASK + 1) : (int64_t)d;
}

/* A tenant that comes back has no credit for the time away: at least the service of the one that was served last. */
static inline uint64_t service_lifted(uint64_t service, uint64_t last) {
  return service_ahead(service, last) < 0 ? last : service;
}

/* Units for a cost in tokens and a weight in thousandths. rest: what the division has left over, below the weight, for the
 * next call: or the sum of many small costs would be some percent too large. */
static inline uint64_t service_units(uint64_t cost, uint32_t weight, uint32_t *rest) {
  if (!weight) weight = 1;
  if (cost > MOST_SERVICE) cost = MOST_SERVICE;
  uint64_t whole = cost * SERVICE_UNIT * 1000 + *rest % weight;
  *rest = (uint32_t)(whole % weight);
  return whole / weight > MOST_SERVICE ? MOST_SERVICE : whole / weight;
}

static inline int64_t band_of(const waiting_t *w, uint64_t now) {
  return w->priority + (now > w->since ? (int64_t)((now - w->since) / AGE_NS) : 0);
}

static inline bool is_before(const waiting_t *a, const waiting_t *b, uint64_t now) {
  int64_t band_a = band_of(a, now), band_b = band_of(b, now);
  if (band_a != band_b) return band_a > band_b;
  if (a->tenant != b->tenant) {
    int64_t ahead = service_ahead(a->service, b->service);
    if (ahead) return ahead < 0;
  }
  if (a->since != b->since) return a->since < b->since;
  return a->id < b->id;
}

/* A connection that is idle in one process, while the caller that is first of all is in another one, has to be closed here
 * and opened anew there. Over TLS that takes some ms, while a use may take less. So it stays for a caller of its own
 * process that came less than STAYS_NS after the first of all. Who comes later overtakes nobody: so no caller waits longer
 * than if it had come so much later, and all were served in order. */
#define STAYS_NS UINT64_C(20000000)
static inline bool stays_here(const waiting_t *first, const waiting_t *own) {
  return own->priority == first->priority && own->tenant == first->tenant &&
         own->since < first->since + STAYS_NS;
}

#endif
