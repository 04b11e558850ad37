/* model_changes.h - the part of model.h about limits that change meanwhile.
 *
 * Time stands still in these histories, so a key has consumed a number of tokens in each limit, whatever its limits
 * were, are and become: acquire, charge, refund and settle change that number, a change of limits does not. Nothing here
 * knows of rules, labels, rates or states. Likewise permits: some slots are held, and some of these stand.
 *
 * An operation goes by the limits of one instant (LOAD). Level 0: they are still in force when it takes effect. Level 1:
 * they may have changed since; what it goes by in a limit must not have. */
#ifndef MODEL_CHANGES_H
#define MODEL_CHANGES_H

enum { EFFECT, OTHERWISE, SEE, BACK, LOAD_LIMITS };
enum { SEARCHING, TAKEN, GIVEN_BACK }; /* phases of a permit */
#define LOOK 99 /* phase of what charged all that it had to */

static inline bool same_variant(const history_t *h, unsigned a, unsigned b) {
  return h->counts[a] == h->counts[b] && h->permits_of[a] == h->permits_of[b] &&
         !memcmp(h->rules[a], h->rules[b], sizeof h->rules[a]);
}

static inline bool change_limits(const history_t *h, config_t *c, int lane, const op_t *op) {
  unsigned to = (op->who + c->phase[lane]) % VARIANTS;
  if (!op_open(op) && op->status != FSHM_OK) return false;
  if (!same_variant(h, c->variant, to)) {
    if (c->changes + 1 == SETS) return false;
    c->changes++;
    c->variant = (uint8_t)to;
  }
  return stepped(c, lane, op->times);
}

/* The limits that the operation goes by from here on, whatever becomes of them: those of now. */
static inline void pin(const history_t *h, config_t *c, int lane, const op_t *op) {
  c->snapshot[lane] = (uint8_t)(c->changes + 1);
  c->loaded[lane] = c->variant;
  for (uint32_t i = 0; i < h->limits && op->kind != OP_ADMIT; i++)
    c->seen[lane][i] = (uint8_t)c->state[op->key * h->limits + i];
}
static inline void unpin(config_t *c, int lane) {
  c->snapshot[lane] = c->loaded[lane] = 0;
  memset(c->seen[lane], 0, sizeof c->seen[lane]);
}
static inline unsigned snapshot_of(const config_t *c, int lane) {
  return c->snapshot[lane] ? c->snapshot[lane] : c->changes + 1u;
}
static inline unsigned loaded(const config_t *c, int lane) {
  return c->snapshot[lane] ? c->loaded[lane] : c->variant;
}

/* Only where limits can change before the operation ends is it worth a step of its own. */
static inline bool may_change(const history_t *h, const config_t *c, int lane, const op_t *op) {
  for (int k = 0; k < LANES; k++)
    for (uint32_t i = c->at[k]; i < h->count[k] && k != lane; i++)
      if (h->ops[k][i].kind == OP_SET && (op_open(op) || h->ops[k][i].invoked < op->responded))
        return true;
  return false;
}

/* May a process be at changing the limits now? */
static inline bool change_begun(const history_t *h, const config_t *c) {
  uint64_t bound = UINT64_MAX, first = UINT64_MAX;
  for (int lane = 0; lane < LANES; lane++) {
    if (c->at[lane] >= h->count[lane]) continue;
    const op_t *op = &h->ops[lane][c->at[lane]];
    if (!op_open(op)) bound = min_u64(bound, op->responded);
    if (op->kind == OP_SET) first = min_u64(first, op->invoked);
  }
  return first < bound;
}

static inline bool load_limits(const history_t *h, int level, config_t *c, int lane,
                               const op_t *op) {
  bool looks = op->kind == OP_PEEK || op->kind == OP_REMAINING;
  bool forces = op->kind == OP_CHARGE || op->kind == OP_REFUND || op->kind == OP_SETTLE;
  if (looks && c->phase[lane] && c->snapshot[lane] != c->changes + 1) {
    c->phase[lane] = 0; /* it looks at all anew */
    unpin(c, lane);
    return true;
  }
  if (op->kind == OP_ADMIT && c->phase[lane] == TAKEN) { /* it counts by limits of then */
    if (!level || op_open(op) || op->status != FSHM_DENIED || c->snapshot[lane] == c->changes + 1)
      return false;
    if (!c->snapshot[lane] && !may_change(h, c, lane, op)) return false;
    pin(h, c, lane, op);
    return true;
  }
  if (!level || c->snapshot[lane] || (c->phase[lane] && !forces)) return false;
  if (!may_change(h, c, lane, op)) return false;
  pin(h, c, lane, op);
  return true;
}

/* May the operation go by what it has loaded, in this limit? */
static inline bool goes_by(const config_t *c, int level, int lane, uint32_t i, uint64_t used) {
  if (snapshot_of(c, lane) == c->changes + 1u) return true;
  return level && c->seen[lane][i] == (uint8_t)used;
}

static inline uint64_t most_of(const history_t *h, const config_t *c, int lane, uint32_t i) {
  return rule_capacity(&h->rules[loaded(c, lane)][i]);
}

/* Nothing at all is denied by a bucket that is in debt, and by nothing else. */
static inline bool fits(const history_t *h, const config_t *c, int lane, uint32_t i, uint64_t used,
                        uint64_t cost) {
  bool bucket = h->rules[loaded(c, lane)][i].kind == FSHM_BUCKET;
  return (!cost && !bucket) || used + cost <= most_of(h, c, lane, i);
}

/* With one limit, what is left is reported as of the instant of the operation. */
static inline bool told_left(const history_t *h, const config_t *c, int lane, const op_t *op,
                             uint64_t used) {
  if (op_open(op) || op->kind == OP_IS_ALLOWED || h->counts[loaded(c, lane)] != 1) return true;
  return op->remaining[0] == minus(most_of(h, c, lane, 0), used) &&
         version_is(h, op->version, snapshot_of(c, lane) - 1);
}

static inline void add_tokens(config_t *c, uint32_t which, uint64_t tokens) {
  if (!c->state[which] && tokens) c->born[which]++;
  c->state[which] += tokens;
}

static inline bool acquire_changing(const history_t *h, int level, config_t *c, int lane,
                                    const op_t *op, unsigned branch) {
  uint32_t i = c->phase[lane], count = h->counts[loaded(c, lane)], which = op->key * h->limits + i;
  bool denied = !op_open(op) && op->status != FSHM_ALLOWED, ends = i + 1 == count;
  uint64_t *used = &c->state[which];
  if (branch == EFFECT) {
    if (denied && (!level || ends)) return false;
    /* Of several limits (none is a bucket here), one of which it asks nothing decides nothing. */
    if ((op->cost[i] || count == 1) && !goes_by(c, level, lane, i, *used)) return false;
    if (!fits(h, c, lane, i, *used, op->cost[i])) return false;
    if (!told_left(h, c, lane, op, *used + op->cost[i])) return false;
    if (!i && !c->snapshot[lane] && count > 1) pin(h, c, lane, op);
    add_tokens(c, which, op->cost[i]);
    if (c->snapshot[lane]) c->seen[lane][i] = (uint8_t)*used;
    if (op->kind == OP_RESERVE) c->charged[lane][i] = op->cost[i] ? c->born[which] : 255;
    if (ends || level) return stepped(c, lane, count);
    c->phase[lane]++; /* all at once */
    return acquire_changing(h, level, c, lane, op, branch);
  }
  if (branch == OTHERWISE) {
    if (!denied || i || op->status != FSHM_DENIED) return false;
    for (uint32_t k = 0; k < count; k++) {
      uint64_t there = c->state[op->key * h->limits + k];
      if (goes_by(c, level, lane, k, there) && !fits(h, c, lane, k, there, op->cost[k]) &&
          told_left(h, c, lane, op, there))
        return finish(c, lane);
    }
    return false;
  }
  /* Of two limits, the first was charged; the second had no room, or the limits have changed (or a sweep for a change
   * has been): that is undone, and it begins anew. What it found, and what it undoes, are instants of their own: others
   * may act in between. */
  if (branch != BACK || !level || i != 1 || c->seen_held[lane] == 2) return false;
  bool changed = snapshot_of(c, lane) != c->changes + 1u || change_begun(h, c);
  if (!changed && fits(h, c, lane, i, *used, op->cost[i])) return false;
  c->phase[lane] = UNDOING;
  c->seen_held[lane]++;
  return true;
}

/* What its first limit was charged is given back, whatever became of it. */
static inline bool undo_changing(const history_t *h, config_t *c, int lane, const op_t *op) {
  uint64_t *used = &c->state[op->key * h->limits];
  *used = minus(*used, op->cost[0]);
  c->phase[lane] = 0;
  unpin(c, lane);
  return true;
}

/* A charge, a refund or a settlement: limit by limit, and then, with one limit, a look. */
static inline bool force_changing(const history_t *h, int level, config_t *c, int lane,
                                  const op_t *op, unsigned branch) {
  uint32_t i = c->phase[lane], count = h->counts[loaded(c, lane)], which = op->key * h->limits + i;
  if (branch != EFFECT && (branch != OTHERWISE || op->kind != OP_SETTLE)) return false;
  if (!op_open(op) && op->status != FSHM_ALLOWED) return false;
  if (i >= count && i != LOOK) { /* fewer by now */
    c->phase[lane] = LOOK;
    unpin(c, lane);
    return branch == EFFECT;
  }
  if (i == LOOK) {
    uint64_t used = c->state[op->key * h->limits];
    if (branch != EFFECT || !goes_by(c, level, lane, 0, used)) return false;
    return (op->kind == OP_SETTLE || told_left(h, c, lane, op, used)) && finish(c, lane);
  }
  uint64_t *used = &c->state[which], more = op->kind == OP_REFUND ? 0 : op->cost[i];
  uint64_t less = op->kind == OP_REFUND ? op->cost[i] : 0;
  if (op->kind == OP_SETTLE) { /* remaining: what was charged before */
    less = minus(op->remaining[i], op->cost[i]);
    more = minus(op->cost[i], op->remaining[i]);
    /* What was given back whole since, and begun anew, may be another window. */
    bool another = c->charged[lane][i] != c->born[which];
    if (branch == OTHERWISE && !another) return false;
    if (branch == OTHERWISE) less = 0;
  }
  if (!goes_by(c, level, lane, i, *used)) return false;
  if (more) add_tokens(c, which, more);
  *used = minus(*used, less);
  unpin(c, lane); /* each limit by itself */
  c->phase[lane] = i + 1 < count ? (uint8_t)(i + 1) : LOOK;
  return true;
}

static inline bool look_changing(const history_t *h, int level, config_t *c, int lane,
                                 const op_t *op, unsigned branch) {
  uint32_t i = c->phase[lane], count = h->counts[loaded(c, lane)];
  uint64_t used = c->state[op->key * h->limits + i], most = most_of(h, c, lane, i);
  if (op->kind == OP_PEEK && op->status == FSHM_DENIED)
    return acquire_changing(h, level, c, lane, op, branch == EFFECT ? OTHERWISE : SEE);
  if (branch != EFFECT || !goes_by(c, level, lane, i, used)) return false;
  if (op->kind == OP_PEEK) {
    if (!fits(h, c, lane, i, used, op->cost[i]) || !told_left(h, c, lane, op, used)) return false;
  } else if (!op_open(op)) {
    if (op->remaining[i] != minus(most, used) || op->status != (int)count) return false;
  }
  if (!i && !c->snapshot[lane] && count > 1) pin(h, c, lane, op);
  return stepped(c, lane, count);
}

static inline unsigned bit_of(unsigned permit) { return 1u << permit; }

/* A permit: a slot is taken; then it stands, where no more stand with it than are allowed at that instant. A denial has
 * seen as many held, each at an instant of its own, also such as did not stand. */
static inline bool admit_changing(const history_t *h, int level, config_t *c, int lane,
                                  const op_t *op, unsigned branch, unsigned view) {
  uint8_t *phase = &c->phase[lane], *seen_held = &c->seen_held[lane], *seen = &c->seen[lane][0];
  bool denied = !op_open(op) && op->status != FSHM_ALLOWED;
  unsigned standing = (unsigned)__builtin_popcount(c->stands & permits_held(h, c));
  unsigned held = permits_held(h, c) | permits_believed(h, c, lane, op);
  if (*phase == TAKEN) held &= ~bit_of(*seen_held - 1u);
  if (branch == EFFECT) {
    if (*phase == TAKEN) {
      if (denied || view || standing >= h->permits_of[c->variant]) return false;
      c->stands |= (uint8_t)bit_of(*seen_held - 1u);
      return finish(c, lane);
    }
    if (*phase || view >= h->permits_of[loaded(c, lane)] || permit_held(c, view)) return false;
    if ((denied && !level) || (!denied && !op_open(op) && op->permit != view)) return false;
    c->holder[view] = (uint8_t)(lane + 1);
    c->stands &= (uint8_t)~bit_of(view);
    *seen_held = (uint8_t)(view + 1);
    *phase = TAKEN;
    return level || admit_changing(h, level, c, lane, op, branch, 0);
  }
  if (view) return false;
  if (branch == OTHERWISE) {
    if (!denied || *phase == TAKEN || op->status != FSHM_DENIED) return false;
    unsigned found = (unsigned)__builtin_popcount(level ? *seen : held);
    return found >= h->permits_of[level ? loaded(c, lane) : c->variant] && finish(c, lane);
  }
  if (branch == SEE) {
    if (!level || !denied || (*seen | held) == *seen) return false;
    *seen |= (uint8_t)held;
    return true;
  }
  if (branch != BACK || !denied || *phase != TAKEN) return false;
  if (c->holder[*seen_held - 1] == lane + 1) c->holder[*seen_held - 1] = 0;
  *phase = GIVEN_BACK;
  /* It counted by the limits of then. */
  if (!c->snapshot[lane]) pin(h, c, lane, op);
  return true;
}

static inline bool changing(const history_t *h, int level, config_t *c, int lane, const op_t *op,
                            unsigned branch, unsigned view) {
  bool snapshots = op->kind != OP_SET && op->kind != OP_RELEASE && op->kind != OP_IN_FLIGHT;
  if (op->kind != OP_ADMIT && op->kind != OP_IN_FLIGHT && view) return false;
  if (branch == LOAD_LIMITS) return snapshots && !view && load_limits(h, level, c, lane, op);
  switch (op->kind) {
    case OP_ACQUIRE:
    case OP_IS_ALLOWED:
    case OP_RESERVE:
      if (c->phase[lane] == UNDOING) return branch == BACK && undo_changing(h, c, lane, op);
      return acquire_changing(h, level, c, lane, op, branch);
    case OP_CHARGE:
    case OP_REFUND:
    case OP_SETTLE:
      return force_changing(h, level, c, lane, op, branch);
    case OP_PEEK:
    case OP_REMAINING:
      return look_changing(h, level, c, lane, op, branch);
    case OP_RESET:
      if (branch != EFFECT) return false;
      if (!c->snapshot[lane]) pin(h, c, lane, op);
      c->state[op->key * h->limits + c->phase[lane]] = 0;
      return stepped(c, lane, h->counts[loaded(c, lane)]);
    case OP_ADMIT:
      return admit_changing(h, level, c, lane, op, branch, view);
    case OP_SET:
      return branch == EFFECT && change_limits(h, c, lane, op);
    default:
      return branch == EFFECT && permits(h, level, c, lane, op, branch, view);
  }
}

#endif
