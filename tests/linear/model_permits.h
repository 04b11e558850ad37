/* model_permits.h - the part of model.h about permits. */
#ifndef MODEL_PERMITS_H
#define MODEL_PERMITS_H

static inline bool permit_held(const config_t *c, unsigned permit) {
  return c->holder[permit] && !(c->dead >> (c->holder[permit] - 1) & 1);
}

static inline unsigned permits_held(const history_t *h, const config_t *c) {
  unsigned held = 0;
  for (unsigned permit = 0; permit < h->permits; permit++)
    held |= (unsigned)permit_held(c, permit) << permit;
  return held;
}

/* Permits that another call is taking or giving back, one bit each: it has swapped the slot, and is not over. */
static inline unsigned permits_unsaid(const history_t *h, const config_t *c, int but) {
  unsigned unsaid = 0;
  for (int lane = 0; lane < LANES; lane++) {
    if (lane == but || !c->phase[lane] || c->at[lane] >= h->count[lane]) continue;
    const op_t *op = &h->ops[lane][c->at[lane]];
    if (op->kind == OP_RELEASE) unsaid |= 1u << op->permit;
    if (op->kind == OP_ADMIT) unsaid |= 1u << (c->seen_held[lane] - 1);
  }
  return unsaid;
}

/* Permits of killed processes that the call may take for held: its process has looked at them before the kill was over,
 * and still goes by that look ("Denials in constant time": the dead say nothing). It does so for 64 times the time that
 * the look took, half a second at most. */
#define LOOK_COUNTS 64
#define LOOK_COUNTS_NS UINT64_C(500000000)
static inline bool goes_by_look(const history_t *h, const config_t *c, int lane, const op_t *op,
                                uint64_t death) {
  if (op->fixed || !op->reads) return false;
  for (uint32_t i = 0; i < c->at[lane]; i++) {
    const op_t *look = &h->ops[lane][i];
    if (look->kind != OP_IN_FLIGHT && look->kind != OP_ADMIT) continue;
    if (look->fixed || look->key != op->key || look->reads < 2 || look->invoked > death) continue;
    const uint64_t took = look->read[look->reads - 1] - look->read[0];
    if (op->read[0] < look->read[0] + min_u64(took * LOOK_COUNTS, LOOK_COUNTS_NS)) return true;
  }
  return false;
}
static inline unsigned permits_of_dead(const history_t *h, const config_t *c, int lane,
                                       const op_t *op) {
  unsigned known = 0;
  for (uint32_t i = 0; c->dead && i < c->at[TESTER]; i++) {
    const op_t *death = &h->ops[TESTER][i];
    if (death->kind != OP_DEATH || !goes_by_look(h, c, lane, op, death->responded)) continue;
    for (unsigned permit = 0; permit < h->permits; permit++)
      known |= (unsigned)(c->holder[permit] == death->who + 1) << permit;
  }
  return known;
}

/* What a call may take for held that is not. */
static inline unsigned permits_believed(const history_t *h, const config_t *c, int lane,
                                        const op_t *op) {
  return permits_unsaid(h, c, lane) | permits_of_dead(h, c, lane, op);
}

/* A permit, then the rate limits. seen_held: the permit that was taken, plus 1. */
static inline bool admit(const history_t *h, int level, config_t *c, int lane, const op_t *op,
                         unsigned branch, unsigned view) {
  uint8_t *phase = &c->phase[lane], *seen_held = &c->seen_held[lane];
  unsigned all = (1u << h->permits) - 1;
  bool denied = !op_open(op) && op->status != FSHM_ALLOWED;
  bool by_permits = denied && op->limit_index == h->limits;
  unsigned held = permits_held(h, c) | permits_believed(h, c, lane, op);
  enum { SEARCHING, TAKEN, LOST };
  switch (branch) {
    case 0: /* take a slot: the one that is known, else any */
      if (*phase != SEARCHING || view >= h->permits || by_permits || (denied && !level))
        return false;
      if (!op_open(op) && !denied && op->permit != view) return false;
      if (permit_held(c, view)) return false;
      c->holder[view] = (uint8_t)(lane + 1);
      if (!h->limits && !op_open(op) && !level) return finish(c, lane);
      *seen_held = (uint8_t)(view + 1);
      *phase = TAKEN;
      return true;
    case 1: /* charge */
      if (*phase != TAKEN || denied) return false;
      if (!h->limits) return level && !view && finish(c, lane);
      return charge_limit(h, c, lane, op, 0, view) && finish(c, lane);
    case 2: /* no permit; or its permit was lost with the room */
      if (!by_permits || view) return false;
      if (op->count != h->permits) return false;
      if (!level) return permits_held(h, c) == all && finish(c, lane);
      if (!(held & ~(unsigned)*seen_held)) return false;
      *seen_held |= (uint8_t)held;
      return *seen_held == all ? finish(c, lane) : true;
    case 3: /* no room in the rate limit: before it took a permit, or since */
      if (!h->limits || by_permits || *phase == LOST || (!denied && !op_open(op))) return false;
      if (!no_room(h, c, op, 0, view)) return false;
      if (*phase == SEARCHING) return finish(c, lane);
      *phase = LOST;
      return true;
    case 4: /* give the permit back */
      if (*phase != LOST || view) return false;
      if (c->holder[*seen_held - 1] == lane + 1) c->holder[*seen_held - 1] = 0;
      return finish(c, lane);
    default:
      return false;
  }
}

/* At level 1 in two steps: the permit is free, then everybody knows. */
static inline bool release(int level, config_t *c, int lane, const op_t *op, unsigned view) {
  bool mine = c->holder[op->permit] == lane + 1;
  if (view) return false;
  if (c->phase[lane]) return finish(c, lane);
  if (!op_open(op) && op->status != mine) return false;
  if (!mine) return finish(c, lane);
  c->holder[op->permit] = 0;
  return stepped(c, lane, level ? 2 : 1);
}

/* view 1: as it was before a call that is not over, or before its holder was killed. */
static inline bool in_flight(const history_t *h, int level, config_t *c, int lane, const op_t *op,
                             unsigned view) {
  if (!level) {
    unsigned held = (unsigned)__builtin_popcount(permits_held(h, c));
    return !view && (op_open(op) || held == op->count) && finish(c, lane);
  }
  unsigned permit = c->phase[lane];
  if (view > 1 || (view && !(permits_believed(h, c, lane, op) >> permit & 1))) return false;
  c->seen_held[lane] += permit_held(c, permit) != (view == 1);
  if (permit + 1 == h->permits && !op_open(op) && c->seen_held[lane] != op->count) return false;
  return stepped(c, lane, h->permits);
}

static inline bool permits(const history_t *h, int level, config_t *c, int lane, const op_t *op,
                           unsigned branch, unsigned view) {
  if (op->kind == OP_ADMIT) return admit(h, level, c, lane, op, branch, view);
  if (branch) return false;
  if (op->kind == OP_RELEASE) return release(level, c, lane, op, view);
  return in_flight(h, level, c, lane, op, view);
}

#endif
