/* queue.h - is the order kept, in which callers of the wait queue are told that they are first?
 *
 * A turn looks at one place after the other, and others come and go meanwhile. So it is judged by those who stood in the
 * queue for certain during all of it, and by those who may have stood there at some instant of it: who is told to be
 * first has no other before it for certain; who is told not to be first has one that may be before it. A caller that is
 * never told does not come to its end: the callers of these histories sleep until they are woken, and for ever if they
 * are not. */
#ifndef QUEUE_H
#define QUEUE_H

#include "permits/wait_order.h"

#include "history.h"

static inline bool is_before_for_certain(uint64_t a, uint64_t b) { return a && a < b; }

/* The services of the tenants at a turn. False: not known, since one of them was written meanwhile. */
static inline bool services_at(const history_t *h, const call_span_t *turn,
                               uint64_t services[TENANTS + 1]) {
  const stay_t *served[WORKERS * STAYS];
  uint32_t count = 0;
  uint64_t last = 0;
  memset(services, 0, (TENANTS + 1) * sizeof *services);
  for (int lane = 0; lane < WORKERS; lane++)
    for (uint32_t i = 0; i < h->stay_count[lane]; i++) {
      const stay_t *y = &h->stays[lane][i];
      if (!y->served.invoked || y->served.invoked > turn->responded) continue;
      if (!is_before_for_certain(y->served.responded, turn->invoked)) return false;
      uint32_t at = count++;
      for (; at && served[at - 1]->served.invoked > y->served.invoked; at--)
        served[at] = served[at - 1];
      served[at] = y;
    }
  for (uint32_t i = 0; i < count; i++) {
    uint64_t *service = &services[served[i]->tenant];
    if (i && served[i]->served.invoked < served[i - 1]->served.responded) return false;
    if (*service < last) *service = last;
    last = *service ? *service : 1; /* 0 is "never seen" */
    *service += served[i]->cost * SERVICE_UNIT;
  }
  for (int t = 0; t <= TENANTS; t++)
    if (services[t] < last) services[t] = last;
  return true;
}

/* 1: a is before b; 0: it is not; -1: not known. */
static inline int stay_before(const stay_t *a, const stay_t *b, const uint64_t *services) {
  if (a->priority != b->priority) return a->priority > b->priority;
  if (a->tenant != b->tenant) {
    if (!services) return -1;
    if (services[a->tenant] != services[b->tenant])
      return services[a->tenant] < services[b->tenant];
  }
  return a->since != b->since ? a->since < b->since : a->owner < b->owner;
}

static inline bool turn_is_right(const history_t *h, const stay_t *mine, const turn_t *turn) {
  uint64_t services[TENANTS + 1];
  const bool known = services_at(h, &turn->span, services);
  bool others_may_be = false;
  for (int lane = 0; lane < WORKERS; lane++)
    for (uint32_t i = 0; i < h->stay_count[lane]; i++) {
      const stay_t *y = &h->stays[lane][i];
      if (y == mine || y->join.invoked > turn->span.responded) continue;
      if (is_before_for_certain(y->leave.responded, turn->span.invoked)) continue;
      const int before = stay_before(y, mine, known ? services : NULL);
      bool certain = is_before_for_certain(y->join.responded, turn->span.invoked) &&
                     !is_before_for_certain(y->leave.invoked, turn->span.responded);
      if (turn->first && certain && before > 0) return false;
      others_may_be |= before != 0;
    }
  return turn->first || others_may_be;
}

/* Who was told wrongly? NULL: nobody. */
static inline const turn_t *wrong_turn(const history_t *h) {
  for (int lane = 0; lane < WORKERS; lane++)
    for (uint32_t i = 0; i < h->stay_count[lane]; i++)
      for (uint32_t t = 0; t < h->stays[lane][i].count; t++)
        if (!turn_is_right(h, &h->stays[lane][i], &h->stays[lane][i].turns[t]))
          return &h->stays[lane][i].turns[t];
  return NULL;
}

static inline void print_stays(const history_t *h, const turn_t *wrong, FILE *out) {
  for (int lane = 0; lane < WORKERS; lane++)
    for (uint32_t i = 0; i < h->stay_count[lane]; i++) {
      const stay_t *y = &h->stays[lane][i];
      (void)fprintf(out,
                    "process %d waits: tenant %u, priority %d, came at %" PRIu64 " as %" PRIu64
                    ": join %" PRIu64 "-%" PRIu64 ", served %u at %" PRIu64 "-%" PRIu64
                    ", leave %" PRIu64 "-%" PRIu64 "\n",
                    lane, y->tenant, y->priority, y->since, y->owner, y->join.invoked,
                    y->join.responded, y->cost, y->served.invoked, y->served.responded,
                    y->leave.invoked, y->leave.responded);
      for (uint32_t t = 0; t < y->count; t++)
        (void)fprintf(out, "  turn %" PRIu64 "-%" PRIu64 ": %s%s\n", y->turns[t].span.invoked,
                      y->turns[t].span.responded, y->turns[t].first ? "first" : "not first",
                      &y->turns[t] == wrong ? " (wrong)" : "");
    }
}

#endif
