/* threads_grants.h - what threads do with limits over many hosts: token leases, what the server reported and refused,
 * permit leases, and the leader. Part of test_threads.c. */
#ifndef THREADS_GRANTS_H
#define THREADS_GRANTS_H

#define GRANTED \
  3000 /* tokens of the token lease that lasts: spent once, and never again within the test */
#define ALLOWED 1 /* permits of the permit lease that lasts */

typedef struct {
  fshm_limiter *token_leases, *refused, *rates, *permits, *permit_leases, *asking;
  _Atomic uint64_t spent;
  _Atomic int64_t holders; /* within the permit lease that lasts */
  _Atomic int64_t askers; /* of the one key that is asked about */
} grants_t;

static const fshm_limit token_lease_limits[] = {{TOKEN_LEASE_MOST, 0, 0, FSHM_LEASE, 0},
                                                {TOKEN_LEASE_MOST, 0, 0, FSHM_LEASE, 0}};
static const fshm_limit rates_limits[] = {{1000, 100000000, 100, FSHM_BUCKET, 0},
                                          {100, 20000000, 0, FSHM_SLIDING, 0}};
static const fshm_limit granted_permits[] = {{6, 0, 0, FSHM_PERMITS, 0}};
static const fshm_limit one_permit[] = {{1, 0, 0, FSHM_PERMITS, 0}};

static void grants_begin(grants_t *g, fshm_segment *s) {
  const fshm_token_lease leases[FSHM_MAX_LIMITS] = {{GRANTED, 0, TIME_MAX / 2},
                                                    {GRANTED, 0, TIME_MAX / 2}};
  fshm_permit_lease a;
  g->token_leases = fresh_limiter(s, "token-leases", token_lease_limits, 2);
  g->refused = fresh_limiter(s, "refused", token_lease_limits, 2);
  g->rates = fresh_limiter(s, "rates", rates_limits, 2);
  g->permits = fresh_limiter(s, "granted", granted_permits, 1);
  g->permit_leases = fresh_limiter(s, "permit-leases", token_lease_limits, 1);
  g->asking = fresh_limiter(s, "asking", one_permit, 1);
  CHECK_EQ(fshm_token_lease_put(g->token_leases, "lasting", 7, leases, 0), FSHM_OK);
  CHECK_EQ(fshm_permit_lease_look(g->permits, g->permit_leases, "lasting", 7, 1, 0, &a), FSHM_OK);
  CHECK_EQ(fshm_permit_lease_put(g->permits, g->permit_leases, "lasting", 7, a.word, ALLOWED,
                                 TIME_MAX / 2, 0),
           FSHM_OK);
}

static void grants_end(grants_t *g) {
  fshm_limiter *all[] = {g->token_leases, g->refused,       g->rates,
                         g->permits,      g->permit_leases, g->asking};
  uint64_t left[FSHM_MAX_LIMITS], ns[FSHM_MAX_LIMITS];
  CHECK_EQ(fshm_token_lease_look(g->token_leases, "lasting", 7, 0, 0, left, ns), FSHM_OK);
  CHECK_EQ(left[0] + g->spent, GRANTED);
  CHECK_EQ(g->holders, 0);
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) fshm_limiter_close(all[i]);
}

/* One thread at a time asks about a key. */
static void ask_server(grants_t *g, const char *key) {
  const uint64_t length = strlen(key), costs[FSHM_MAX_LIMITS] = {2, 2};
  const fshm_asked asked = {g->rates, g->token_leases, g->refused, g->asking, 2, 1, {100, 100}};
  const double answer[20] = {1, 3, 0, 0, 0, 0, 8, 1e6, 1000, 0, 0, 0, 0, 8, 1000, 1000, 0, 0, 0, 5};
  const bool ahead = random_below(2);
  fshm_question question = {.sent_ns = 0};
  fshm_decision d;
  int status = fshm_question_begin(&asked, key, length, costs, ahead, &question);
  CHECK_EQ(question.permit.held, status == FSHM_ALLOWED);
  if (status != FSHM_ALLOWED) {
    check_known(status);
    return;
  }
  CHECK_EQ(atomic_fetch_add(&g->askers, 1), 0);
  CHECK(question.numbers[0] == 2 && question.numbers[6] == 2);
  check_known(fshm_question_end(&asked, key, length, costs, &question, answer, ahead ? NULL : &d));
  (void)atomic_fetch_sub(&g->askers, 1);
  fshm_question_drop(g->asking, &question);
}

/* A token lease that is filled once; and some that are filled, emptied, reported and refused all the time. */
static void use_token_leases(grants_t *g, const char *key) {
  const uint64_t length = strlen(key), cost = 1 + random_below(3);
  const uint64_t costs[FSHM_MAX_LIMITS] = {cost, cost},
                 until = fshm_now(g->token_leases->segment) + 1000000;
  const fshm_token_lease leases[FSHM_MAX_LIMITS] = {{9, UINT64_MAX, until}, {9, 0, until}};
  uint64_t used[FSHM_MAX_LIMITS] = {7, 7}, ns[FSHM_MAX_LIMITS] = {9000000, 9000000};
  fshm_decision d;
  uint32_t low;
  int status = fshm_spend(g->token_leases, NULL, g->rates, "lasting", 7, costs, 0, NULL, &low);
  CHECK(status == FSHM_ALLOWED || status == FSHM_ASK);
  if (status == FSHM_ALLOWED) {
    /* Some of it is not used: it goes back. */
    const uint64_t most[FSHM_MAX_LIMITS] = {GRANTED, GRANTED};
    const uint64_t back[FSHM_MAX_LIMITS] = {cost / 2, cost / 2};
    const uint64_t ends[FSHM_MAX_LIMITS] = {TIME_MAX / 2, TIME_MAX / 2};
    uint64_t out[FSHM_MAX_LIMITS];
    CHECK_EQ(fshm_token_lease_return(g->token_leases, "lasting", 7, back, ends, most, 0, out),
             FSHM_OK);
    CHECK_EQ(out[0], cost / 2);
    atomic_fetch_add(&g->spent, cost - out[0]);
  }
  const fshm_limit limit = {10, 1000000000, 10, (uint32_t)(cost - 1), 0};
  fshm_stored stored = {.limit = {0}};
  const fshm_stored_time at = {.now_ns = until};
  fshm_stored_answer answer;
  CHECK_EQ(fshm_stored_apply(FSHM_ACQUIRE, &limit, &stored, cost, NULL, &at, &answer), FSHM_OK);
  CHECK_EQ(answer.remaining, 10 - cost);
  check_known(fshm_learn(g->rates, key, length, used, ns, 0));
  check_known(fshm_token_lease_put(g->token_leases, key, length, leases, 0));
  check_known(fshm_token_lease_refuse(g->refused, key, length, costs, random_below(2) * 9000, 0));
  status = fshm_spend(g->token_leases, g->refused, g->rates, key, length, costs, 0, &d, &low);
  if (status != FSHM_ASK) check_known(status);
  CHECK_EQ(fshm_known(g->rates, key, length, 0, used, ns), FSHM_OK);
  CHECK_OP(used[1], <=, rates_limits[1].n);
  check_known(
      fshm_token_lease_look(g->token_leases, key, length, (int)random_below(2), 0, used, ns));
  ask_server(g, "asked");
}

/* Another key's permit lease goes up and down. */
static void change_permit_lease(grants_t *g, const char *key) {
  const uint64_t length = strlen(key);
  fshm_permit_lease a;
  fshm_permit permit;
  fshm_decision d;
  uint32_t in_flight;
  int status = random_below(2)
                   ? fshm_permit_lease_look(g->permits, g->permit_leases, key, length, 1, 0, &a)
                   : fshm_permit_lease_lower(g->permits, g->permit_leases, key, length, 1, 0, &a);
  check_known(status);
  if (status == FSHM_OK)
    check_known(fshm_permit_lease_put(g->permits, g->permit_leases, key, length, a.word,
                                      random_below(4), a.now_ns + 1000000, 0));
  status = fshm_permit_lease_admit(g->permits, g->permit_leases, NULL, key, length,
                                   (uint32_t)random_below(3), 0, &permit, &d, &in_flight);
  if (status != FSHM_ASK) check_known(status);
  if (permit.held) CHECK_EQ(fshm_permit_release(g->permits, &permit), 1);
}

/* Within what is allowed, never more hold. */
static void use_permit_leases(grants_t *g, const char *other) {
  fshm_permit permit;
  fshm_decision d;
  uint32_t in_flight;
  int status = fshm_permit_lease_admit(g->permits, g->permit_leases, g->refused, "lasting", 7, 0, 0,
                                       &permit, &d, &in_flight);
  CHECK(status == FSHM_ALLOWED || status == FSHM_ASK);
  CHECK_EQ(permit.held, status == FSHM_ALLOWED);
  if (permit.held) CHECK_OP(atomic_fetch_add(&g->holders, 1), <, ALLOWED);
  for (int i = 0; i < 3; i++) change_permit_lease(g, other);
  if (!permit.held) return;
  (void)atomic_fetch_sub(&g->holders, 1);
  CHECK_EQ(fshm_permit_release(g->permits, &permit), 1);
}

/* The lead is the process's: its threads have it together. */
static void lead(fshm_segment *s) {
  fshm_error e;
  CHECK_EQ(fshm_lead(s, (int)random_below(2)), 1);
  uint32_t leader = fshm_leader(s);
  CHECK(!leader || leader == (uint32_t)getpid());
  if (!random_below(4)) CHECK_EQ(fshm_lead_end(s), 1);
  CHECK_EQ(fshm_liveness(s, &e), FSHM_OK);
  uint64_t once[2], again[2], another[2];
  fshm_keyed_hash(s, "a name", 6, once);
  fshm_keyed_hash(s, "a name", 6, again);
  fshm_keyed_hash(s, "b name", 6, another);
  CHECK(once[0] == again[0] && once[1] == again[1] && once[0] != another[0] &&
        once[1] != another[1]);
}

#endif
