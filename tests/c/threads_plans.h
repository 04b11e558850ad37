/* threads_plans.h - what threads do with keys that have plans. Part of test_threads.c. */
#ifndef THREADS_PLANS_H
#define THREADS_PLANS_H

#define PLANS_OF_THREADS 3

typedef struct {
  fshm_limiter *of[PLANS_OF_THREADS];
  _Atomic uint64_t admitted; /* of the key that all share */
} plans_of_threads_t;

static void plans_begin(plans_of_threads_t *p, fshm_segment *s) {
  for (uint64_t i = 0; i < PLANS_OF_THREADS; i++) {
    const fshm_limit l = {500 + 100 * i, UINT64_C(1) << 54, 500 + 100 * i, FSHM_BUCKET, 0};
    CHECK_EQ(fshm_plan_open(s, "plans", 5, &l, 1, &p->of[i]), FSHM_OK);
  }
}

/* Each thread under another plan: together as many as the most generous one admits, at most. */
static void plans_end(plans_of_threads_t *p) {
  CHECK_OP(p->admitted, <=, 500 + 100 * (PLANS_OF_THREADS - 1) + 1);
  for (uint64_t i = 0; i < PLANS_OF_THREADS; i++) fshm_limiter_close(p->of[i]);
}

static void share_plans(plans_of_threads_t *p) {
  fshm_limiter *plan = p->of[random_below(PLANS_OF_THREADS)];
  p->admitted += apply_at(plan, FSHM_ACQUIRE, "together", 1, 0).status == FSHM_ALLOWED;
}

/* What has no sum: other keys, overrides, plans that are opened, inspection. */
static void use_plans(plans_of_threads_t *p, fshm_segment *s, const char *key) {
  fshm_limiter *plan = p->of[random_below(PLANS_OF_THREADS)], *another;
  fshm_limit l[FSHM_MAX_OVERRIDE] = {{1 + random_below(50), HOUR, 1, FSHM_BUCKET, 0},
                                     {1 + random_below(50), HOUR, 0, FSHM_WINDOW, 0}};
  fshm_plan_info found;
  fshm_limiter_info info;
  (void)apply_at(plan, (uint32_t)random_below(FSHM_BLOCK + 1), key, 1, 0);
  const int status = fshm_override_set(plan, key, strlen(key), l, (uint32_t)random_below(3));
  CHECK(status == FSHM_OK || status == FSHM_FULL || status == FSHM_CONTENDED);
  CHECK_OP(fshm_override_get(plan, key, strlen(key), l), <=, 2);
  (void)fshm_overrides(plan);
  fshm_overrides_changed(plan);
  CHECK_EQ(fshm_limiter_describe(plan, &info), FSHM_OK);
  CHECK_EQ(info.planned, 1);
  l[0] = (fshm_limit){1 + random_below(50), HOUR, 1, FSHM_BUCKET, 0};
  CHECK_EQ(fshm_plan_open(s, "plans", 5, l, 1, &another), FSHM_OK);
  fshm_limiter_close(another);
  const int seen = fshm_plan_at(s, random_below(s->slot_count), 0, &found);
  CHECK(seen == FSHM_OK || seen == 0);
}

#endif
