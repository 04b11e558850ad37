/* spending.c - inspection of budgets: all amounts of a segment, for people. It writes nothing to a mapping that is read
 * only, and begins no window; in others it follows the clock of the day, as all calls do.
 */
#include "../core/hash_table.h"
#include "../stats/key_stats.h"
#include "limiter.h"
#include "limits.h"

/* An amount of a key, as of now. False: the slot holds none. */
static bool money_seen(fshm_segment *s, uint64_t slot, uint64_t now, fshm_budget_info *out) {
  const pair_t pair = s->read_only ? pair_peek(&s->slots[slot]) : pair_load(&s->slots[slot]);
  const uint32_t index = WHO_LIMITER(pair.who);
  snapshot_t p;
  rule_t own;
  uint32_t i = 0;
  if (!(pair.who & 1) || !IS_MONEY(pair.when) || index >= s->limiter_count ||
      !limits_load(s, index, &p))
    return false;
  while (i < p.money && p.rules[i].place != WHO_PLACE(pair.who)) i++;
  if (i >= p.money || !limits_rule(s, index, WHO_LABEL(pair.who), &own) || own.kind != FSHM_MONEY)
    return false;
  const bool over = own.unit <= calendar_minute(&p.rules[0], now);
  *out =
      (fshm_budget_info){slot, pair.who & ~WHO_TAIL, over ? 0 : MONEY_OF(pair.when), 0, index, i};
  return true;
}

uint64_t fshm_budgets(fshm_segment *s, uint64_t now, fshm_budget_info *out, uint64_t room) {
  uint64_t found = 0;
  now = now ? min_u64(now, TIME_MAX - 1) : segment_now(s);
  for (uint32_t index = 0; index < s->limiter_count; index++) {
    snapshot_t p;
    if (!load_relaxed(&s->limiters[index].current) || !limits_load(s, index, &p) || !p.money)
      continue;
    const rule_t *r = &p.rules[0];
    const bool open = r->unit > calendar_minute(r, now);
    const uint64_t left = calendar_left(r, open ? r->unit : money_window(s, r, now), now);
    if (found++ < room)
      out[found - 1] = (fshm_budget_info){0, 0, rule_money(r), left, index, FSHM_BUDGET_LIMIT};
  }
  if (!found) return 0;
  for (uint64_t slot = 0; slot < s->slot_count; slot++) {
    fshm_budget_info one;
    if (!IS_MONEY(load_relaxed(&s->slots[slot].when)) || !money_seen(s, slot, now, &one)) continue;
    if (found++ < room) out[found - 1] = one;
  }
  for (uint32_t process = 0; process < PROCESSES; process++) {
    if (!process_joined(s, process)) continue;
    const reservations_t *r = &s->reservations[process];
    /* As in reserved_by_all(); and a reader waits for nobody to mark the dead. */
    const uint64_t its = atomic_load_explicit(&r->incarnation, memory_order_acquire);
    if (!its || load_relaxed(&s->processes[process].incarnation) != its) continue;
    bool known = false;
    for (uint32_t i = 0; i < RESERVED; i++) {
      const pair_t pair = s->read_only ? pair_peek(&r->of[i]) : pair_load(&r->of[i]);
      if (!pair.who || !pair.when) continue;
      if (!known && !process_alive(s, process)) break;
      known = true;
      const uint64_t id = pair.who * UINT64_C(0x9e3779b97f4a7c15) & ~WHO_TAIL; /* snapshot_who() */
      if (found++ < room)
        out[found - 1] = (fshm_budget_info){0, id,         min_u64(pair.when, 2 * MONEY_MOST),
                                            0, UINT32_MAX, FSHM_BUDGET_RESERVED};
    }
  }
  return found;
}
