/* grants.h - the calls for limits over many hosts: token leases, what a server reported and refused, permit leases, and
 * the leader. Part of calls.h. */
#ifndef GRANTS_H
#define GRANTS_H

#include <math.h>

static const char *const granted_names[GRANTED] = {"wallets", "refused", "allowances",
                                                   "rate_limits"};

static void open_granted(user_t *u, unsigned which) {
  const fshm_limit token_leases = {TOKEN_LEASE_MOST, 0, 0, FSHM_LEASE, 0};
  const fshm_limit bucket = {100, 1000000000, 10, FSHM_BUCKET, 0};
  const fshm_limit sliding = {50, 1000000000, 0, FSHM_SLIDING, 0};
  const fshm_limit all[GRANTED][2] = {{token_leases, token_leases},
                                      {token_leases, token_leases},
                                      {token_leases},
                                      {bucket, sliding}};
  const char *name = granted_names[which];
  if (u->granted[which] || u->s->read_only) return;
  check_status(u, fshm_limiter_open(u->s, name, strlen(name), all[which],
                                    which == PERMIT_LEASES ? 1 : 2, &u->granted[which]));
}

static void close_granted(user_t *u) {
  for (unsigned i = 0; i < GRANTED; i++) {
    fshm_limiter_close(u->granted[i]);
    u->granted[i] = NULL;
  }
  fshm_limiter_close(u->budget);
  u->budget = NULL;
}

/* A file can hold anything: the words of a stored state, and of the charge that is undone. */
static void use_stored(user_t *u, uint64_t n, uint64_t now, unsigned what) {
  static const uint32_t kinds[] = {FSHM_BUCKET, FSHM_WINDOW, FSHM_SLIDING, FSHM_CALENDAR,
                                   FSHM_PERMITS};
  const bool dated = n % 4 == 3;
  const fshm_limit limit = {n % 1000 + 1, dated ? DAY_NS : UINT64_C(1000000) << what % 32,
                            dated ? 0 : n % 1000 + 1, kinds[n % 4], 0};
  const uint64_t spans[] = {n, n >> 9, n << 5, what};
  const fshm_stored_time at = {what & 2 ? n + now : now, what & 1 ? n : now, spans, n % 5};
  fshm_stored states[2] = {{limit, n, n >> 7, n << 9}, {limit, n << 3, what, n}};
  fshm_stored_answer out;
  if (what & 16) states[0].limit = (fshm_limit){n, n >> 3, n >> 5, kinds[n % 5], what & 1};
  const int status = fshm_stored_apply(what >> 5 & 7, &limit, &states[0], what & 8 ? n : what,
                                       what & 4 ? &states[1] : NULL, &at, &out);
  (void)u;
  MUST(status == FSHM_OK || status == FSHM_E_ARGUMENT || status == FSHM_E_DAMAGED);
  MUST(status != FSHM_OK || out.status == FSHM_ALLOWED || out.status == FSHM_DENIED);
}

/* l: stands in for each of them, now and then: it may be of any kind. */
static void use_token_lease(user_t *u, fshm_limiter *l, const char *key, uint64_t n, uint64_t now,
                            unsigned what) {
  fshm_limiter *token_leases = what & 8 ? l : u->granted[TOKEN_LEASES];
  fenced_t left = {FENCE, {0, 0, 0, 0}, FENCE}, ns = left;
  fshm_token_lease leases[FSHM_MAX_LIMITS];
  for (uint64_t i = 0; i < FSHM_MAX_LIMITS; i++)
    leases[i] =
        (fshm_token_lease){n >> i, what & 1 ? UINT64_MAX : n,
                           what & 2 ? n : (now ? now : fshm_now(u->s)) + UINT64_C(1000000000)};
  check_status(u, fshm_token_lease_put(token_leases, key, 1, leases, now));
  check_status(u,
               fshm_token_lease_look(token_leases, key, 1, what & 4, now, left.values, ns.values));
  check_fenced(&left);
  check_fenced(&ns);
  for (int i = 0; i < FSHM_MAX_LIMITS; i++) MUST(left.values[i] <= WINDOW_MAX_N);
  const uint64_t tokens[FSHM_MAX_LIMITS] = {n, n >> 4, what, 1}, until[FSHM_MAX_LIMITS] = {n, now};
  fenced_t out = {FENCE, {0, 0, 0, 0}, FENCE};
  check_status(u, fshm_token_lease_return(token_leases, key, 1, tokens, until,
                                          what & 16 ? tokens : until, now, out.values));
  check_fenced(&out);
  use_stored(u, n, now, what);
}

static void spend(user_t *u, fshm_limiter *l, const char *key, const uint64_t *costs, uint64_t now,
                  unsigned what) {
  fshm_limiter *refused = what & 1 ? u->granted[REFUSED] : what & 2 ? l : NULL;
  fshm_decision d;
  uint32_t low = 0;
  int status = fshm_spend(what & 4 ? l : u->granted[TOKEN_LEASES], refused,
                          what & 8 ? l : u->granted[RATE_LIMITS], key, 1, what & 16 ? costs : NULL,
                          now, what & 32 ? &d : NULL, &low);
  if (status != FSHM_ASK) check_status(u, status);
  if (what & 32) check_decision(u, &d);
  MUST(low <= 1);
}

/* The server may answer anything. */
static void ask_server(user_t *u, fshm_limiter *l, const char *key, const uint64_t *costs,
                       uint64_t n, unsigned what) {
  const fshm_asked asked = {what & 1 ? l : u->granted[RATE_LIMITS],
                            what & 2 ? l : u->granted[TOKEN_LEASES],
                            what & 4 ? l : u->granted[REFUSED],
                            what & 8 || !u->limiters[5] ? l : u->limiters[5],
                            1 + what % FSHM_MAX_LIMITS,
                            what >> 5,
                            {n, n >> 3, n >> 9, what}};
  double answer[6 + 7 * FSHM_MAX_LIMITS];
  fshm_question question;
  fshm_decision d;
  memset(&question, 0, sizeof question);
  int status = fshm_question_begin(&asked, key, 1, costs, what & 16, &question);
  check_status(u, status);
  for (int i = 0; i < 6 * FSHM_MAX_LIMITS; i++) MUST(question.numbers[i] >= 0);
  for (unsigned i = 0; i < sizeof answer / sizeof *answer; i++)
    answer[i] = (what >> i % 8 & 1 ? -1.0 : 1.0) * (double)(n << i % 40) * (what & 32 ? 1e250 : 1);
  if (what & 64) answer[n % 34] = NAN;
  check_status(u, fshm_question_end(&asked, key, 1, costs, &question, answer, &d));
  MUST(d.status == FSHM_ALLOWED || d.status == FSHM_DENIED);
  fshm_question_drop(asked.asking, &question);
  MUST(!question.permit.held);
}

static void be_told(user_t *u, fshm_limiter *l, const char *key, uint64_t n, uint64_t now,
                    unsigned what) {
  fshm_limiter *rate_limits = what & 1 ? l : u->granted[RATE_LIMITS];
  fenced_t used = {FENCE, {n, what, n >> 3, 1}, FENCE}, ns = {FENCE, {n, n >> 1, what, n}, FENCE};
  if (what & 2)
    check_status(u, fshm_token_lease_refuse(what & 4 ? l : u->granted[REFUSED], key, 1, used.values,
                                            what & 8 ? 0 : n, now));
  else
    check_status(u, fshm_learn(rate_limits, key, 1, used.values, ns.values, now));
  check_status(u, fshm_known(rate_limits, key, 1, now, used.values, ns.values));
  check_fenced(&used);
  check_fenced(&ns);
}

static void use_permit_lease(user_t *u, fshm_limiter *permits, const char *key, uint64_t n,
                             uint64_t now, unsigned what) {
  fshm_limiter *words = what & 64 ? permits : u->granted[PERMIT_LEASES];
  fshm_permit_lease a;
  fshm_permit permit;
  fshm_decision d;
  uint32_t in_flight;
  int status = what & 1 ? fshm_permit_lease_look(permits, words, key, 1, what & 2, now, &a)
                        : fshm_permit_lease_lower(permits, words, key, 1, n, now, &a);
  check_status(u, status);
  if (status == FSHM_OK) {
    MUST(a.held <= MAX_PERMITS && a.reported >= a.held);
    check_status(u, fshm_permit_lease_put(permits, words, key, 1, what & 4 ? a.word : n, what % 8,
                                          what & 8 ? n : a.now_ns + UINT64_C(1000000000), now));
  }
  status = fshm_permit_lease_admit(permits, words, what & 16 ? u->granted[REFUSED] : NULL, key, 1,
                                   what & 32 ? what % 5 : 0, now, &permit, &d, &in_flight);
  if (status != FSHM_ASK) check_status(u, status);
  MUST(in_flight <= MAX_PERMITS && (status == FSHM_ALLOWED) == (permit.held != 0));
  if (permit.held) (void)fshm_permit_release(permits, &permit);
}

static void speak_for_host(user_t *u, unsigned what) {
  fshm_error e;
  int status = fshm_lead(u->s, 0); /* who waits, waits for another process */
  MUST(status == 1 || !status || status == FSHM_E_LOCK_FILE || status == FSHM_E_READ_ONLY);
  (void)fshm_leader(u->s);
  if (what & 3) (void)fshm_lead_end(u->s);
  status = fshm_liveness(u->s, &e);
  MUST(status == FSHM_OK || status == FSHM_E_NOT_FOUND || status == FSHM_E_LOCK_FILE);
  MUST(memchr(e.path, 0, sizeof e.path));
}

#endif
