/* plans.h - keys with limits of their own: states that say by which limit they were written. Argued in DESIGN.md,
 * "Plans".
 *
 * The limits of a plan come with the handle. Windows need no more: their state gives the count and the end, whatever
 * the limit. A bucket's state is a time, which says how many tokens were used only together with the limit that it was
 * written under. So it names that limit: a record (layout.h), which never changes. Nine bits of its number are where
 * the states of other limiters have label and epoch (7), and in the state (2). They are enough for the first 256. Of
 * later records the lowest bits of the number are those of the arrival time, which is rounded up for them.
 */
#ifndef FSHM_PLANS_H
#define FSHM_PLANS_H

#include "limits.h"

/* Numbers of records: the first of a tier, the first of its nine bits, and how many bits are in the arrival time. */
typedef struct {
  uint32_t first, nine, shift;
} tier_t;
static const tier_t tiers[] = {
    {0, 0, 0}, {256, 256, 3}, {1280, 384, 6}, {5376, 448, 8}, {13568, 480, 12}};
#define TIERS (sizeof tiers / sizeof *tiers)
static_assert(LIMIT_RECORDS - 13568 <= 31U << 12, "nine bits are enough");

static inline const tier_t *tier_of_record(uint32_t record) {
  unsigned t = TIERS - 1;
  while (tiers[t].first > record) t--;
  return &tiers[t];
}
static inline const tier_t *tier_of_nine(uint32_t nine) {
  unsigned t = TIERS - 1;
  while (tiers[t].nine > nine) t--;
  return &tiers[t];
}
static inline uint32_t record_nine(uint32_t record) {
  const tier_t *t = tier_of_record(record);
  return t->nine + ((record - t->first) >> t->shift);
}
/* The bits of `who` of a record. */
static inline uint64_t record_tail(uint32_t record) {
  return (uint64_t)(record_nine(record) >> 2) << 1;
}
static inline uint64_t planned_who(uint64_t who, uint32_t record) {
  return (who & ~WHO_LABELS) | record_tail(record);
}

static inline uint32_t planned_record(pair_t pair) {
  const uint32_t nine =
      (uint32_t)((pair.who & WHO_LABELS) >> 1 << 2 | (pair.when >> TIME_BITS & 3));
  const tier_t *t = tier_of_nine(nine);
  return t->first + ((nine - t->nine) << t->shift) +
         (uint32_t)(pair.when & ((UINT64_C(1) << t->shift) - 1));
}

/* The rule of a bucket's record. Exactly `burst` have to fit at one instant also where arrival times have units of u ns.
 * So from 1 ms a token up, the interval is a multiple of u, and `slack` (u - 1 ns) is taken off an arrival time that is
 * read, as much as it can have been rounded up. The interval is longer by more than that: DESIGN.md. */
static inline rule_t planned_rule(const fshm_limit *l, uint32_t record, uint64_t *slack) {
  rule_t r = rule_make(l);
  const uint64_t u = UINT64_C(1) << tier_of_record(record)->shift;
  r.place = PLACE_NONE;
  *slack = 0;
  if (u == 1 || r.den != 1 || r.num < COARSE) return r;
  *slack = u - 1;
  r.unit = r.num = ((r.num + u - 1) & ~(u - 1)) + u;
  r.room = (r.burst - 1) * r.num;
  return r;
}

/* The arrival time in a planned state, in the terms of its rule. */
static inline uint64_t planned_arrival(uint64_t state, uint64_t slack) {
  return IS_PLANNED(state) ? minus(state & TIME_MAX, slack) : 0;
}
static inline uint64_t planned_state(uint32_t record, uint64_t arrival) {
  const tier_t *t = tier_of_record(record);
  const uint64_t u = UINT64_C(1) << t->shift, low = (record - t->first) & (u - 1);
  const uint64_t last = TIME_MAX - (u - 1) + low;
  uint64_t at = (arrival & ~(u - 1)) | low;
  if (at < arrival) at += u;
  return UINT64_C(1) << 59 | (uint64_t)(record_nine(record) & 3) << TIME_BITS | min_u64(at, last);
}

/* The rule of a window by which a charge or a refund makes no debt, and reads none: its n is above all counts. */
static inline rule_t planned_window(const rule_t *r, uint64_t state, uint64_t now, uint64_t cost) {
  rule_t fine = *r;
  const uint64_t total = window_read(state, now).count + min_u64(cost, WINDOW_MAX_N);
  const uint64_t bits = bit_length(max_u64(max_u64(total, r->n), 255));
  fine.n = min_u64((UINT64_C(1) << bits) - 1, WINDOW_MAX_N);
  return fine;
}

/* States of before the last reset can be told by their place: it counts the resets. PLACE_NONE: an override. */
static inline unsigned planned_place(uint64_t current) {
  return (unsigned)(CURRENT_RESETS(current) % PLACE_NONE);
}
/* After a reset that wrote this `current`: empty the slot, if it has a state of before. */
void plan_forget(fshm_segment *s, uint32_t index, uint64_t slot, uint64_t current);

/* Forget what the key has consumed under any plan. */
void plan_reset_key(fshm_segment *s, uint32_t index, uint64_t hash);

/* plan_pack() back. Only what a call of one limit reads is set. */
void plan_unpack(uint32_t index, const rule_t *packed, own_t *out);

/* The limits of the handle's plan, for one call. */
void plan_load(fshm_segment *s, const own_t *own, snapshot_t *p);
/* The rule of a bucket's record, and its slack. False: no call has written this number. */
bool record_rule(const fshm_segment *s, uint32_t record, rule_t *out, uint64_t *slack);

#endif
