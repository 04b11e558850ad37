/* test_token_lease.c - token leases against a plain account of what was granted and spent; who leads a host. */
#include "../../csrc/unity.c"

#include "check.h"

#define MS UINT64_C(1000000)
#define NOW (UINT64_C(1000) * 1000 * MS)
#define KEY "k", 1

static const fshm_limit account = {TOKEN_LEASE_MOST, 0, 0, FSHM_LEASE, 0};
static const fshm_limit window = {1000, 60000 * MS, 0, FSHM_WINDOW, 0};

typedef struct {
  fshm_segment *s;
  fshm_limiter *token_leases, *refused, *limits;
} world_t;

static world_t make_world(void) {
  world_t w = {.s = fresh_segment(1000)};
  w.token_leases = fresh_limiter(w.s, "lease", &account, 1);
  w.refused = fresh_limiter(w.s, "refused", &account, 1);
  w.limits = fresh_limiter(w.s, "limits", &window, 1);
  return w;
}

static void leave(world_t *w) {
  fshm_limiter *limiters[] = {w->token_leases, w->refused, w->limits};
  for (int i = 0; i < 3; i++)
    if (limiters[i]) fshm_limiter_close(limiters[i]);
  fshm_close(w->s);
}

static int spend(const world_t *w, uint64_t cost, uint64_t now, uint32_t *low) {
  const uint64_t costs[FSHM_MAX_LIMITS] = {cost};
  return fshm_spend(w->token_leases, w->refused, w->limits, KEY, costs, now, NULL, low);
}

static void grant(const world_t *w, uint64_t tokens, uint64_t kept, uint64_t until, uint64_t now) {
  const fshm_token_lease lease[FSHM_MAX_LIMITS] = {{tokens, kept, until}};
  CHECK_EQ(fshm_token_lease_put(w->token_leases, KEY, lease, now), FSHM_OK);
}

static uint64_t left(const world_t *w, uint64_t now, uint64_t *ns) {
  uint64_t tokens[FSHM_MAX_LIMITS], rest[FSHM_MAX_LIMITS];
  CHECK_EQ(fshm_token_lease_look(w->token_leases, KEY, 0, now, tokens, rest), FSHM_OK);
  if (ns) *ns = rest[0];
  return tokens[0];
}

/* Random grants and calls, against the account: never more than was granted, never after the end, and all
 * of it until shortly before the end. */
static void test_account(void) {
  world_t w = make_world();
  uint64_t now = NOW, held = 0, until = 0;
  uint32_t low;
  for (int i = 0; i < 200000; i++) {
    now += random_below(4) ? 0 : random_below(MS);
    if (now >= until) held = 0;
    if (!random_below(8)) {
      uint64_t tokens = random_scaled(1, TOKEN_LEASE_MOST - held),
               end = now + random_below(10 * MS);
      uint64_t kept = random_below(2) ? held : held / 2;
      grant(&w, tokens, kept, end, now);
      if (held > kept && end > until) end = until;
      if (end > now) { /* what is kept of the end is rounded down, to 2^24 ns at most */
        uint64_t rest, tokens_left = left(&w, now, &rest);
        CHECK_OP(rest, <=, end - now);
        CHECK_OP(rest + (UINT64_C(2) << bit_length(held + tokens)), >=, end - now);
        held = rest ? held + tokens : 0;
        until = now + rest;
        CHECK_EQ(tokens_left, held);
      }
    } else {
      uint64_t cost = random_scaled(1, held + 2);
      CHECK_EQ(spend(&w, cost, now, &low), cost <= held ? FSHM_ALLOWED : FSHM_ASK);
      if (cost <= held) held -= cost;
      CHECK_EQ(left(&w, now, NULL), held);
    }
  }
  CHECK_EQ(spend(&w, held + 1, now, &low), FSHM_ASK);
  if (until > now) CHECK_EQ(left(&w, until, NULL), 0);
  leave(&w);
}

/* One call learns that the token lease runs low, at a quarter to a half of the batch. */
static void test_low_once(void) {
  world_t w = make_world();
  for (uint64_t batch = 1; batch < 5000; batch += 1 + batch / 7) {
    uint32_t low;
    uint64_t told = 0, at = 0;
    grant(&w, batch, 0, NOW + 1000 * MS, NOW);
    for (uint64_t i = 0; i < batch; i++) {
      CHECK_EQ(spend(&w, 1, NOW, &low), FSHM_ALLOWED);
      if (low) at = batch - i - 1;
      told += low;
    }
    CHECK_EQ(told, batch >= 7); /* smaller ones are not worth it */
    if (told) CHECK(at < batch / 2 + 1 && at + 1 >= batch / 4);
  }
  leave(&w);
}

static uint64_t hand_back(const world_t *w, uint64_t tokens, uint64_t until, uint64_t most,
                          uint64_t now) {
  const uint64_t of[FSHM_MAX_LIMITS] = {tokens}, ends[FSHM_MAX_LIMITS] = {until};
  const uint64_t at_most[FSHM_MAX_LIMITS] = {most};
  uint64_t out[FSHM_MAX_LIMITS] = {77, 77, 77, 77};
  CHECK_EQ(fshm_token_lease_return(w->token_leases, KEY, of, ends, at_most, now, out), FSHM_OK);
  CHECK_EQ(out[1], 0);
  return out[0];
}

/* Tokens go back to the lease that they were spent from, and to no other one. */
static void test_return(void) {
  world_t w = make_world();
  const uint64_t end = NOW + 1000 * MS, next = end + 1000 * MS;
  uint32_t low;
  CHECK_EQ(hand_back(&w, 5, end, 100, NOW), 0); /* there is none */
  grant(&w, 10, 0, end, NOW);
  CHECK_EQ(spend(&w, 6, NOW, &low), FSHM_ALLOWED);
  CHECK_EQ(hand_back(&w, 2, end, 10, NOW), 2);
  CHECK_EQ(left(&w, NOW, NULL), 6);
  CHECK_EQ(hand_back(&w, 9, end, 10, NOW), 4); /* not more than a lease may have */
  CHECK_EQ(left(&w, NOW, NULL), 10);
  CHECK_EQ(hand_back(&w, 9, end, 5, NOW), 0);
  CHECK_EQ(hand_back(&w, 90, end, 100, NOW), 90); /* more than the count's bits hold */
  CHECK_EQ(left(&w, NOW, NULL), 100);
  CHECK_EQ(spend(&w, 100, NOW, &low), FSHM_ALLOWED);
  CHECK_EQ(hand_back(&w, 3, end, 10, NOW), 3); /* it has no token, but its end */
  CHECK_EQ(left(&w, end, NULL), 0);
  CHECK_EQ(hand_back(&w, 3, end, 10, end), 0); /* over */
  grant(&w, 10, 0, next, end);
  CHECK_EQ(spend(&w, 6, end, &low), FSHM_ALLOWED);
  CHECK_EQ(hand_back(&w, 3, end, 10, end + MS), 0); /* charged to the window before */
  CHECK_EQ(hand_back(&w, 3, next, 10, end + MS), 3);
  CHECK_EQ(left(&w, end + MS, NULL), 7);
  leave(&w);
}

static void test_refusals(void) {
  world_t w = make_world();
  const uint64_t ten[FSHM_MAX_LIMITS] = {10}, used[FSHM_MAX_LIMITS] = {995};
  const uint64_t rest[FSHM_MAX_LIMITS] = {5000 * MS};
  uint32_t low;
  fshm_decision d;
  CHECK_EQ(fshm_learn(w.limits, KEY, used, rest, NOW), FSHM_OK);
  CHECK_EQ(fshm_token_lease_refuse(w.refused, KEY, ten, 50 * MS, NOW), FSHM_OK);
  CHECK_EQ(spend(&w, 9, NOW, &low), FSHM_ASK);
  CHECK_EQ(spend(&w, 10, NOW, &low), FSHM_DENIED);
  CHECK_EQ(spend(&w, 11, NOW + 49 * MS, &low), FSHM_DENIED);
  CHECK_EQ(spend(&w, 11, NOW + 51 * MS, &low), FSHM_ASK);
  CHECK_EQ(fshm_spend(w.token_leases, w.refused, w.limits, KEY, ten, NOW, &d, &low), FSHM_DENIED);
  CHECK_EQ(d.status, FSHM_DENIED);
  CHECK_EQ(d.remaining, 5);
  CHECK_OP(d.retry_after_ns, >=, (int64_t)(5000 * MS));
  CHECK_OP(d.retry_after_ns, <=, (int64_t)(5000 * MS + 2048));
  grant(&w, 10, 0, NOW + 1000 * MS, NOW); /* what is granted meanwhile is spent */
  CHECK_EQ(fshm_spend(w.token_leases, w.refused, w.limits, KEY, ten, NOW, &d, &low), FSHM_ALLOWED);
  CHECK_EQ(d.remaining, 5);
  CHECK_EQ(fshm_token_lease_refuse(w.refused, KEY, ten, 0, NOW), FSHM_OK);
  CHECK_EQ(spend(&w, 10, NOW, &low), FSHM_ASK);
  leave(&w);
}

/* However large it is, and wherever between the units of its end it is refused: as long as was asked for. */
static void test_refusals_of_any_cost(void) {
  world_t w = make_world();
  const uint64_t costs[] = {1, (1U << 23) - 1, TOKEN_LEASE_MOST, UINT64_C(1) << 40, UINT64_MAX};
  uint32_t low;
  for (size_t i = 0; i < sizeof costs / sizeof *costs; i++) {
    const uint64_t refused[FSHM_MAX_LIMITS] = {costs[i]}, now = (UINT64_C(1) << 40) + 1;
    CHECK_EQ(fshm_token_lease_refuse(w.refused, KEY, refused, 1000, now), FSHM_OK);
    CHECK_EQ(spend(&w, costs[i], now + 999, &low), FSHM_DENIED);
    CHECK_EQ(spend(&w, costs[i], now + (UINT64_C(1) << 25), &low), FSHM_ASK);
  }
  leave(&w);
}

/* Each denial is counted once, for the limiter of the lease, even if the stored state has room again. */
static void test_denials_are_counted(void) {
  world_t w = make_world();
  const uint64_t ten[FSHM_MAX_LIMITS] = {10}, rest[FSHM_MAX_LIMITS] = {5000 * MS};
  uint32_t low;
  for (uint64_t used = 0, denials = 0; used <= 1000;
       used += 1000) { /* by the stored state ten fit; not */
    const uint64_t now_used[FSHM_MAX_LIMITS] = {used};
    CHECK_EQ(fshm_learn(w.limits, KEY, now_used, rest, NOW), FSHM_OK);
    CHECK_EQ(fshm_token_lease_refuse(w.refused, KEY, ten, 50 * MS, NOW), FSHM_OK);
    for (int i = 0; i < 3; i++) {
      fshm_counters all[FSHM_COUNTERS];
      CHECK_EQ(spend(&w, 10, NOW, &low), FSHM_DENIED);
      fshm_counters_all(w.s, all);
      CHECK_EQ(all[w.limits->index].denied, ++denials);
      CHECK_EQ(all[w.token_leases->index].denied, 0);
    }
  }
  leave(&w);
}

/* fshm_known() returns what fshm_learn() stored, for each kind of limit. */
static void test_learnt(void) {
  fshm_segment *s = fresh_segment(1000);
  const fshm_limit kinds[] = {{1000, 60000 * MS, 1000, FSHM_BUCKET, 0},
                              {1000, 60000 * MS, 0, FSHM_WINDOW, 0},
                              {1000, 60000 * MS, 0, FSHM_SLIDING, 0}};
  fshm_limiter *l = fresh_limiter(s, "kinds", kinds, 3);
  for (int i = 0; i < 20000; i++) {
    uint64_t used[FSHM_MAX_LIMITS] = {0}, rest[FSHM_MAX_LIMITS] = {0}, known[FSHM_MAX_LIMITS],
             known_rest[FSHM_MAX_LIMITS], remaining[FSHM_MAX_LIMITS];
    uint64_t now = NOW + random_below(100000 * MS);
    for (int k = 0; k < 3; k++) {
      used[k] = random_below(1001);
      rest[k] = used[k] * 60 * MS;
    }
    CHECK_EQ(fshm_learn(l, KEY, used, rest, now), FSHM_OK);
    CHECK_EQ(fshm_known(l, KEY, now, known, known_rest), FSHM_OK);
    CHECK_EQ(fshm_remaining(l, KEY, now, remaining), 3);
    CHECK_EQ(known[1], used[1]);
    CHECK_EQ(known[2], used[2]);
    CHECK_EQ(known_rest[0], rest[0]);
    for (int k = 0; k < 3; k++) CHECK_EQ(remaining[k], 1000 - used[k]);
    CHECK_OP(known_rest[1], >=, rest[1]);
    CHECK_OP(known_rest[1], <=, rest[1] + 2048);
  }
  fshm_limiter_close(l);
  fshm_close(s);
}

/* A look finds what is left, even if the limit of the lease changed since it was filled. */
static void test_look_after_a_change(void) {
  world_t w = make_world();
  fshm_limit smaller = account;
  fshm_limiter *again;
  uint32_t low;
  smaller.n = 100;
  grant(&w, 5, 0, 2 * NOW, NOW);
  CHECK_EQ(spend(&w, 5, NOW, &low), FSHM_ALLOWED);
  CHECK_EQ(fshm_limiter_open(w.s, "lease", 5, &smaller, 1, &again), FSHM_OK);
  const fshm_decision d = apply_at(again, FSHM_PEEK, "k", 1, NOW);
  CHECK_EQ(d.status, FSHM_DENIED);
  CHECK_EQ(d.remaining, 0);
  fshm_limiter_close(again);
  leave(&w);
}

/* What a window has counted is not what a token lease has left, nor the other way round. */
static void test_a_window_and_a_token_lease_of_one_name(void) {
  world_t w = make_world();
  const fshm_limit all[] = {{50, 60000 * MS, 0, FSHM_WINDOW, 0}, account};
  fshm_limiter *named = NULL;
  uint32_t low;
  for (int i = 0; i < 4; i++) {
    if (named) fshm_limiter_close(named);
    CHECK_EQ(fshm_limiter_open(w.s, "named", 5, &all[i % 2], 1, &named), FSHM_OK);
    if (i % 2) {
      CHECK(fshm_spend(named, NULL, NULL, KEY, NULL, NOW, NULL, &low) != FSHM_ALLOWED);
      const fshm_token_lease lease[FSHM_MAX_LIMITS] = {{40, 0, NOW + 60000 * MS}};
      CHECK_EQ(fshm_token_lease_put(named, KEY, lease, NOW), FSHM_OK);
    } else {
      CHECK_EQ(apply_at(named, FSHM_PEEK, "k", 50, NOW).status, FSHM_ALLOWED);
      CHECK_EQ(apply_at(named, FSHM_ACQUIRE, "k", 49, NOW).status, FSHM_ALLOWED);
    }
  }
  fshm_limiter_close(named);
  leave(&w);
}

static void test_arguments(void) {
  fshm_segment *s = fresh_segment(10);
  fshm_limiter *out;
  uint64_t most;
  fshm_limit wrong[] = {account, account, account};
  wrong[0].n = 0;
  wrong[1].n = TOKEN_LEASE_MOST + 1;
  wrong[2].per_ns = 1000;
  for (int i = 0; i < 3; i++) {
    CHECK_EQ(fshm_limit_check(&wrong[i], &most), FSHM_E_ARGUMENT);
    CHECK_EQ(fshm_limiter_open(s, "wrong", 5, &wrong[i], 1, &out), FSHM_E_ARGUMENT);
  }
  CHECK_EQ(fshm_limit_check(&account, &most), FSHM_OK);
  CHECK_EQ(most, TOKEN_LEASE_MOST);
  fshm_close(s);
}

/* races: processes spend what one of them puts in */

enum { SPENDERS = 4, BATCHES = 3000, BATCH = 7 };
typedef struct {
  char name[FSHM_MAX_NAME + 1];
  _Atomic uint64_t spent, low, done;
} race_t;

static void race(int i, void *with) {
  race_t *r = with;
  fshm_error e;
  world_t w = {0};
  uint32_t low;
  CHECK_EQ(fshm_open(r->name, 0, 0600, 0, &w.s, &e), FSHM_OK);
  w.token_leases = fresh_limiter(w.s, "lease", &account, 1);
  for (int n = 0; !i && n < BATCHES; n++)
    grant(&w, BATCH, UINT64_MAX, fshm_now(w.s) + 60000 * MS, 0);
  if (!i) r->done = 1;
  while (true) {
    bool last = r->done;
    if (fshm_spend(w.token_leases, NULL, NULL, KEY, NULL, 0, NULL, &low) == FSHM_ALLOWED)
      r->spent++;
    else if (last)
      break;
  }
  leave(&w);
}

static void test_race(void) {
  race_t *r = shared_memory(sizeof *r);
  fshm_segment *s = fresh_segment(1000);
  (void)snprintf(r->name, sizeof r->name, "%s", segment_names[segments_made - 1]);
  run_children(SPENDERS, race, r);
  CHECK_EQ(r->spent, (uint64_t)BATCHES * BATCH);
  fshm_close(s);
  (void)munmap(r, sizeof *r);
}

/* who leads */

typedef struct {
  char name[FSHM_MAX_NAME + 1];
  _Atomic uint32_t leads, waits;
} lead_t;

static void lead(int i, void *with) {
  lead_t *r = with;
  fshm_segment *s;
  fshm_error e;
  (void)i;
  CHECK_EQ(fshm_open(r->name, 0, 0600, 0, &s, &e), FSHM_OK);
  r->waits++;
  CHECK_EQ(fshm_lead(s, 1), 1);
  r->leads = (uint32_t)getpid();
  (void)pause(); /* it is killed */
}

static void kill_leader(pid_t pid) {
  int status;
  CHECK_EQ(kill(pid, SIGKILL), 0);
  CHECK_EQ(waitpid(pid, &status, 0), pid);
}

static void test_leader(void) {
  lead_t *r = shared_memory(sizeof *r);
  fshm_segment *s = fresh_segment(10);
  (void)snprintf(r->name, sizeof r->name, "%s", segment_names[segments_made - 1]);
  CHECK_EQ(fshm_leader(s), 0);
  CHECK_EQ(fshm_lead(s, 0), 1);
  CHECK_EQ(fshm_lead(s, 1), 1); /* it does already */
  CHECK_EQ(fshm_leader(s), (uint32_t)getpid());
  pid_t first = start_child(lead, 0, r), second = start_child(lead, 1, r);
  while (r->waits < 2) (void)usleep(1000);
  CHECK_EQ(r->leads, 0);
  CHECK_EQ(fshm_lead_end(s), 1);
  while (!r->leads) (void)usleep(1000);
  uint32_t leader = r->leads;
  CHECK_EQ(fshm_leader(s), leader);
  CHECK_EQ(fshm_lead(s, 0), 0);
  kill_leader((pid_t)leader); /* killed: the next one leads, at once */
  while (r->leads == leader) (void)usleep(1000);
  CHECK_EQ(r->leads, (uint32_t)(leader == (uint32_t)first ? second : first));
  kill_leader((pid_t)r->leads);
  CHECK_EQ(fshm_leader(s), 0);
  fshm_close(s);
  (void)munmap(r, sizeof *r);
}

/* A question takes out what is leased, and one process asks at a time; the answer is put in, and decides. */
static void test_question(void) {
  static const fshm_limit one = {1, 0, 0, FSHM_PERMITS, 0};
  world_t w = make_world();
  fshm_limiter *asking = fresh_limiter(w.s, "asking", &one, 1);
  const fshm_asked asked = {w.limits, w.token_leases, w.refused, asking, 1, 0, {1000}};
  const uint64_t costs[FSHM_MAX_LIMITS] = {7}, refused[FSHM_MAX_LIMITS] = {1};
  const uint64_t minute_us = 60000000, now = fshm_now(w.s);
  fshm_question question = {.sent_ns = 0}, other = {.sent_ns = 0};
  fshm_decision decision;
  grant(&w, 5, 0, now + 60000 * MS, 0);
  CHECK_EQ(fshm_question_begin(&asked, KEY, costs, 0, &question), FSHM_ALLOWED);
  CHECK(question.sent_ns >= now);
  const double first[6] = {7, 0, 5, 0, 0, 0};
  for (int i = 0; i < 6; i++) CHECK(question.numbers[i] == first[i]);
  CHECK_EQ(left(&w, 0, NULL), 0);
  CHECK_EQ(fshm_question_begin(&asked, KEY, costs, 0, &other), FSHM_DENIED);

  /* admitted, and 3 times the cost beyond: 28 of 1000 are used */
  const double answer[13] = {1, 3, 0, 0, 0, 0, 28, (double)minute_us, (double)minute_us,
                             0, 0, 0, 5};
  CHECK_EQ(fshm_question_end(&asked, KEY, costs, &question, answer, &decision), FSHM_OK);
  CHECK_EQ(decision.status, FSHM_ALLOWED);
  CHECK_EQ(decision.remaining, 1000 - 28 + 21);
  CHECK_EQ(decision.retry_after_ns, 0);
  CHECK_EQ(decision.reset_after_ns, 60000 * (int64_t)MS);
  CHECK_EQ(left(&w, 0, NULL), 21);
  fshm_question_drop(asking, &question);
  fshm_question_drop(asking, &question); /* is held no more: nothing */

  /* ahead: not where there are tokens, or a refusal */
  CHECK_EQ(fshm_question_begin(&asked, KEY, costs, 1, &other), FSHM_DENIED);
  const uint64_t more[FSHM_MAX_LIMITS] = {22};
  CHECK_EQ(fshm_question_begin(&asked, KEY, more, 1, &other), FSHM_ALLOWED);
  CHECK(other.numbers[0] == 22 && other.numbers[1] == 21 && other.numbers[2] == 0);
  CHECK(other.numbers[3] == 28 && other.numbers[4] == 0);
  CHECK(other.numbers[5] > 50000000 && other.numbers[5] <= 60100000); /* us */
  CHECK_EQ(left(&w, 0, NULL), 21);
  const double none[13] = {1, 0, 0, 0, 0, 0, 28, (double)minute_us, (double)minute_us, 0, 0, 0, 5};
  CHECK_EQ(fshm_question_end(&asked, KEY, more, &other, none, NULL), FSHM_OK);
  CHECK_EQ(left(&w, 0, NULL), 21);
  fshm_question_drop(asking, &other);
  CHECK_EQ(fshm_token_lease_refuse(w.refused, KEY, refused, 60000 * MS, 0), FSHM_OK);
  CHECK_EQ(fshm_question_begin(&asked, KEY, more, 1, &other), FSHM_DENIED);

  /* denied: by the first limit, for 2 ms */
  CHECK_EQ(fshm_question_begin(&asked, KEY, more, 0, &question), FSHM_ALLOWED);
  const double denied[13] = {0, 0, 2000, 60000, 0, 0, 990, (double)minute_us, 0, 0, 0, 0, 5};
  CHECK_EQ(fshm_question_end(&asked, KEY, more, &question, denied, &decision), FSHM_OK);
  CHECK_EQ(decision.status, FSHM_DENIED);
  CHECK_EQ(decision.remaining, 10);
  CHECK_EQ(decision.retry_after_ns, 2 * (int64_t)MS);
  /* what no server of ours says changes nothing that must not be */
  const double junk[13] = {-1, -5, -1, 1e300, -7, 0, 1e300, -1e300, 1e300, 3, 0, 0, -1};
  CHECK_EQ(fshm_question_end(&asked, KEY, more, &question, junk, &decision), FSHM_OK);
  fshm_question_drop(asking, &question);
  CHECK_EQ(left(&w, 0, NULL), 0);
  fshm_limiter_close(asking);
  leave(&w);
}

int main(void) {
  test_account();
  test_low_once();
  test_return();
  test_refusals();
  test_refusals_of_any_cost();
  test_denials_are_counted();
  test_learnt();
  test_look_after_a_change();
  test_a_window_and_a_token_lease_of_one_name();
  test_question();
  test_arguments();
  test_race();
  test_leader();
  return done();
}
