/* threads_learned.h - what threads do with limits that are learned, with several levels, and with names and clocks of
 * segments. Part of test_threads.c. */
#ifndef THREADS_LEARNED_H
#define THREADS_LEARNED_H

#define LEARNED_MOST 6

typedef struct {
  fshm_limiter *permits, *learned, *outer, *inner;
  _Atomic int64_t held; /* of the key */
  _Atomic uint64_t admitted; /* by both levels */
} learners_t;

static void learned_begin(learners_t *l, fshm_segment *s) {
  const fshm_limit most = {LEARNED_MOST, 0, 0, FSHM_PERMITS, 0},
                   word = {TOKEN_LEASE_MOST, 0, 0, FSHM_LEASE, 0},
                   outer = {300, UINT64_C(1) << 54, 300, FSHM_BUCKET, 0},
                   inner = {100000, UINT64_C(1) << 54, 0, FSHM_WINDOW, 0};
  l->permits = fresh_limiter(s, "learns", &most, 1);
  CHECK_EQ(fshm_limiter_open_beside(s, "learned", 7, &word, 1, &l->learned), FSHM_OK);
  l->outer = fresh_limiter(s, "outer", &outer, 1);
  l->inner = fresh_limiter(s, "inner", &inner, 1);
}

static void learned_end(learners_t *l) {
  CHECK_EQ(l->held, 0);
  CHECK_EQ(fshm_in_flight(l->permits, "k", 1), 0);
  CHECK_OP(l->admitted, <=, 301);
  fshm_limiter_close(l->permits);
  fshm_limiter_close(l->learned);
  fshm_limiter_close(l->outer);
  fshm_limiter_close(l->inner);
}

static void learn(learners_t *l, fshm_segment *s) {
  const fshm_adaptive settings = {3, 1, LEARNED_MOST, FSHM_AIMD, 1536};
  fshm_permit permit;
  fshm_decision d;
  fshm_learned found;
  uint32_t in_flight;
  const int status =
      fshm_adaptive_admit(l->permits, l->learned, &settings, "k", 1, 0, &permit, &d, &in_flight);
  CHECK(status == FSHM_ALLOWED || status == FSHM_DENIED || status == FSHM_FULL);
  if (d.status == FSHM_ALLOWED) {
    CHECK_OP(++l->held, <=, LEARNED_MOST);
    const fshm_sample sample = {fshm_now(s), 1000, in_flight, random_below(8) == 0};
    l->held--;
    (void)fshm_permit_release(l->permits, &permit);
    (void)fshm_adaptive_end(l->permits, l->learned, &settings, "k", 1, &sample, 0, 0);
  }
  if (fshm_adaptive_look(l->learned, "k", 1, 0, &found) == FSHM_OK)
    CHECK_OP(found.limit, <=, LEARNED_MOST);
  if (!random_below(50)) (void)fshm_adaptive_pause(l->permits, l->learned, "k", 1, 1000, 0);
  if (!random_below(50)) (void)fshm_adaptive_forget(l->permits, l->learned, &settings, "k", 1);
  (void)fshm_adaptive_at(s, random_below(s->slot_count), 0, &found);
}

static void admit_by_levels(learners_t *l, const char *key) {
  fshm_level levels[2] = {{.limiter = l->outer, .key = "all", .key_length = 3},
                          {.limiter = l->inner, .key = key, .key_length = strlen(key)}};
  fshm_decision d;
  CHECK_OP(fshm_levels_apply(levels, 2, FSHM_ACQUIRE, 0, &d), <, 2);
  l->admitted += d.status == FSHM_ALLOWED;
}

static void open_for_a_group(fshm_segment *s, const char *name) {
  fshm_segment *same;
  fshm_error e;
  int how;
  CHECK_EQ(fshm_open_group(name, 0, 0600, 0, FSHM_NO_GROUP, &same, &e), FSHM_OK);
  fshm_close(same);
  CHECK(fshm_clock_share(s, -1, 0) != FSHM_OK);
  CHECK(fshm_clock_move(s, FSHM_MOVE_RUN, 0) != FSHM_OK);
  CHECK_EQ(fshm_clock_moved(s, &how), 0);
}

#endif
