/* plans.h - the calls of keys with plans. Part of calls.h. */
#ifndef PLANS_H
#define PLANS_H

static void look_at_plan(user_t *u, uint64_t slot, uint64_t now) {
  struct {
    fshm_plan_info info;
    uint64_t after;
  } found = {.after = FENCE};
  const int status = fshm_plan_at(u->s, slot, now, &found.info);
  MUST(status == FSHM_OK || status == 0 || status == FSHM_E_ARGUMENT);
  MUST(found.after == FENCE && found.info.count <= FSHM_MAX_OVERRIDE);
  for (uint32_t i = 0; status == FSHM_OK && i < found.info.count; i++) {
    uint64_t largest;
    MUST(fshm_limit_check(&found.info.limits[i], &largest) == FSHM_OK);
  }
}

/* l: of any kind; it is asked for overrides too. */
static void use_plans(user_t *u, fshm_limiter *l, const char *key, uint64_t n, uint64_t now,
                      unsigned what) {
  fshm_limit limits[FSHM_MAX_LIMITS], found[FSHM_MAX_LIMITS];
  fshm_decision d;
  fshm_limiter_info info;
  const uint64_t costs[FSHM_MAX_LIMITS] = {n, 1, what % 7, 0};
  /* sets without permits; those of the second have several */
  const uint32_t count = limits_of(what % 4, what % 15, limits);
  if (u->s->read_only) return;
  for (unsigned k = 0; k < 2; k++) { /* one plan after the other */
    fshm_limiter *plan;
    limits[0].n += k * (1 + n % 5);
    int status = fshm_plan_open(u->s, "plans", 5, limits, count, &plan);
    if (status != FSHM_E_RECORDS) check_status(u, status);
    MUST((plan != NULL) == (status == FSHM_OK));
    if (!plan) return;
    for (uint32_t op = 0; op <= FSHM_BLOCK; op++) {
      fshm_apply(plan, op, key, 1, costs, n, now, &d);
      check_decision(u, &d);
    }
    status = fshm_override_set(plan, key, 1, limits, what % 4);
    if (status != FSHM_E_RECORDS) check_status(u, status);
    fshm_overrides_changed(plan);
    (void)fshm_overrides(plan);
    MUST(fshm_override_get(plan, key, 1, found) <= FSHM_MAX_OVERRIDE);
    MUST(fshm_override_get(l, key, 1, found) <= FSHM_MAX_OVERRIDE);
    status = fshm_limiter_describe(plan, &info);
    MUST(status == 0 || status == FSHM_OK || status == FSHM_E_DAMAGED);
    if (what & 16) check_status(u, fshm_reset_key(plan, key, 1));
    if (what & 32) check_status(u, fshm_reset_all(plan));
    fshm_limiter_close(plan);
  }
  for (uint64_t slot = 0; slot < u->s->slot_count; slot++) look_at_plan(u, slot, now);
}

#endif
