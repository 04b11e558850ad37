/* model_token_lease.h - the part of model.h about token leases: what is put in, looked at and taken out. (A spend is an
 * acquire() of limits of their kind.) */
#ifndef MODEL_TOKEN_LEASE_H
#define MODEL_TOKEN_LEASE_H

/* What an end that lies later than now is good for is in algorithms.h, as all arithmetic: the lease of what is
 * left, and of the batch. Limit after limit, each at an instant of its own. */
static inline bool put_batch(const history_t *h, int level, config_t *c, int lane, const op_t *op,
                             unsigned view) {
  uint32_t limit = c->phase[lane];
  view_t v;
  if (!op_open(op) && op->status == FSHM_FULL) {
    if (view || !table_full(h, c, level, op)) return false;
  } else {
    if (!look_at(h, c, op, limit, view, &v)) return false;
    bool nothing = !op->cost[limit] && !op->kept;
    if (!nothing) *v.slot = token_lease_put(v.state, v.now, op->cost[limit], op->kept, op->until);
  }
  return stepped(c, lane, h->limits);
}

static inline bool look_into(const history_t *h, config_t *c, int lane, const op_t *op,
                             unsigned view) {
  uint32_t limit = c->phase[lane];
  view_t v;
  if (!look_at(h, c, op, limit, view, &v)) return false;
  uint64_t left = token_lease_left(v.state, v.now), left_ns = minus(state_expires(v.state), v.now);
  if (!op_open(op) && (op->remaining[limit] != left || op->left_ns[limit] != left_ns)) return false;
  if (op->kind == OP_TAKE && left) *v.slot = v.state - left;
  return stepped(c, lane, h->limits);
}

#endif
