/* test_bounded.c - a scribbler writes over each slot just before a call swaps it: every call gives up soon (I6).
 *
 * Nothing in the library is changed: the swap of 16 bytes is wrapped where it is declared, and loads are counted. A
 * scribbler as fast as this one does not exist; what is bounded here is bounded against any. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#define pair_cas library_pair_cas
#define pair_load library_pair_load
#include "../../csrc/core/internal.h"
#undef pair_cas
#undef pair_load

/* What the scribbler does to a slot that is about to be swapped. */
enum {
  NOTHING,
  CHANGE, /* another state, over at once */
  EMPTY, /* the key is gone */
  EMPTY_CONFIRMED, /* the same, but a slot can be claimed up to the last step */
  EMPTY_SOME, /* one in eight */
  WAYS
};
static unsigned scribbler; /* how it works */
static uint64_t swaps, loads, most_swaps, scribbled;

static inline pair_t pair_load(const void *slot) {
  loads++;
  return library_pair_load(slot);
}

static inline bool pair_cas(void *slot, pair_t *seen, pair_t next) {
  bool strikes = scribbler && (scribbler != EMPTY_CONFIRMED || !IS_PENDING(next.when)) &&
                 (scribbler != EMPTY_SOME || scribbled % 8 == 0);
  swaps++;
  scribbled += scribbler != NOTHING;
  if (swaps > most_swaps) scribbler = NOTHING; /* without a bound: so that the test ends */
  if (strikes) {
    pair_t *there = slot, was = library_pair_load(there), to = {0, 0};
    if (scribbler == CHANGE) to = (pair_t){was.who, 1 + scribbled % 1000};
    (void)library_pair_cas(there, &was, to);
  }
  return library_pair_cas(slot, seen, next);
}

#include "../../csrc/unity.c"

#include "check.h"

#define SECOND UINT64_C(1000000000)
static const char key[] = "key";
#define KEY key, sizeof key - 1

static fshm_segment *s;

static void begin_scribbling(unsigned how, uint64_t most) {
  scribbler = how;
  swaps = loads = scribbled = 0;
  most_swaps = most;
}

/* tries: lost swaps that the call may see; a lost claim is 64 of them. A claim that is lost in its last step has
 * swapped twice in each of its rounds, and looked at all candidates three times. */
static void ended_within(uint64_t tries) {
  CHECK(scribbler != NOTHING);
  scribbler = NOTHING;
  CHECK_OP(swaps, <=, 3 * tries);
  CHECK_OP(loads, <=, 3 * tries * table_probe_count(s));
}

static fshm_limiter *limiter_of(const char *name, uint32_t kind, uint64_t n) {
  const fshm_limit l = {n, kind_has_period(kind) ? 60 * SECOND : 0, 0, kind, 0};
  return fresh_limiter(s, name, &l, 1);
}

static void forget_slots(void) { memset((void *)s->slots, 0, s->slot_count * sizeof *s->slots); }

static void test_permits(uint64_t n, bool with_slots) {
  char name[32];
  (void)snprintf(name, sizeof name, "permits %llu", (unsigned long long)n);
  fshm_limiter *l = limiter_of(name, FSHM_PERMITS, n);
  fshm_permit *held = calloc(n, sizeof *held), p;
  fshm_decision d;
  uint32_t in_flight;
  for (unsigned how = CHANGE; held && how < WAYS; how++) {
    forget_slots();
    for (uint64_t i = 0; with_slots && i < n; i++)
      fshm_admit(l, KEY, NULL, 0, &held[i], &d, &in_flight);
    for (uint64_t i = 0; with_slots && i < n; i++) CHECK_EQ(fshm_permit_release(l, &held[i]), 1);
    const uint64_t tries = MAX_TRIES + 4 * n;
    begin_scribbling(how, 4 * tries);
    fshm_admit(l, KEY, NULL, 0, &p, &d, &in_flight);
    ended_within(tries);
    if (how != EMPTY_SOME) CHECK_EQ(d.status, FSHM_CONTENDED);
  }
  free(held);
  fshm_limiter_close(l);
}

static void test_counted(void) {
  fshm_limiter *l = limiter_of("counted", FSHM_WINDOW, 1000);
  const fshm_limit limit = {1000, 60 * SECOND, 0, FSHM_WINDOW, 0};
  fshm_counted out;
  for (unsigned how = CHANGE; how < WAYS; how++) {
    forget_slots();
    begin_scribbling(how, 4 * MAX_TRIES);
    fshm_count(l, KEY, &limit, 1, 0, &out);
    ended_within(MAX_TRIES);
    if (how != EMPTY_SOME) CHECK_EQ(out.status, FSHM_CONTENDED);
  }
  fshm_limiter_close(l);
}

static void test_checks(uint32_t count) {
  const fshm_limit limits[] = {{1000, 60 * SECOND, 0, FSHM_WINDOW, 0},
                               {1000, 60 * SECOND, 1000, FSHM_BUCKET, 0}};
  fshm_limiter *l = fresh_limiter(s, count > 1 ? "two" : "one", limits, count);
  for (unsigned op = FSHM_ACQUIRE; op <= FSHM_CHARGE; op += FSHM_CHARGE - FSHM_ACQUIRE) {
    for (unsigned how = CHANGE; how < WAYS; how++) {
      fshm_decision d;
      forget_slots();
      begin_scribbling(how, 4 * MAX_TRIES);
      fshm_apply(l, op, KEY, NULL, 0, 0, &d);
      ended_within(MAX_TRIES);
      if (how != EMPTY_SOME) CHECK_EQ(d.status, FSHM_CONTENDED);
    }
  }
  fshm_limiter_close(l);
}

static void test_moving(uint64_t n, uint64_t cost) {
  fshm_limiter *l = limiter_of("moving", FSHM_WINDOW, 1000);
  const fshm_limit limit = {n, 60 * SECOND, 0, FSHM_WINDOW, 0};
  fshm_counted out;
  for (unsigned how = CHANGE; how < WAYS; how++) {
    forget_slots();
    const uint64_t tries = MAX_TRIES + 32 * n;
    begin_scribbling(how, 4 * tries);
    fshm_moving(l, KEY, &limit, cost, 0, &out);
    ended_within(tries);
    if (how != EMPTY_SOME) CHECK_EQ(out.status, FSHM_CONTENDED);
  }
  fshm_limiter_close(l);
}

/* A clear looks once at each slot that the head says there can be, and swaps each once. */
static void test_moving_clear(void) {
  fshm_limiter *l = limiter_of("clear", FSHM_WINDOW, 1000);
  const fshm_limit limit = {1000, 60 * SECOND, 0, FSHM_WINDOW, 0};
  fshm_counted out;
  forget_slots();
  fshm_moving(l, KEY, &limit, 1000, 0, &out);
  CHECK_EQ(out.status, FSHM_ALLOWED);
  begin_scribbling(CHANGE, 4 * MAX_TRIES);
  CHECK_EQ(fshm_moving_clear(l, KEY), FSHM_OK);
  ended_within(MAX_TRIES + 1000);
  fshm_limiter_close(l);
}

static void test_token_lease(void) {
  fshm_limiter *l = limiter_of("lease", FSHM_LEASE, 1000);
  fshm_token_lease lease = {.tokens = 10, .until_ns = 3600 * SECOND};
  for (unsigned how = CHANGE; how < WAYS; how++) {
    forget_slots();
    begin_scribbling(how, 4 * MAX_TRIES);
    int status = fshm_token_lease_put(l, KEY, &lease, 0);
    ended_within(MAX_TRIES);
    if (how != EMPTY_SOME) CHECK_EQ(status, FSHM_CONTENDED);
  }
  fshm_limiter_close(l);
}

static void test_permit_lease(void) {
  fshm_limiter *permits = limiter_of("granted", FSHM_PERMITS, 4);
  fshm_limiter *words = limiter_of("words", FSHM_LEASE, 1000);
  fshm_permit_lease out;
  fshm_permit p;
  fshm_decision d;
  uint32_t in_flight;
  for (unsigned how = CHANGE; how < WAYS; how++) {
    forget_slots();
    begin_scribbling(how, 4 * MAX_TRIES);
    int status = fshm_permit_lease_look(permits, words, KEY, 1, 0, &out);
    ended_within(MAX_TRIES);
    if (how != EMPTY_SOME) CHECK_EQ(status, FSHM_CONTENDED);
    /* With its permits, three times at most. */
    begin_scribbling(how, 16 * MAX_TRIES);
    status = fshm_permit_lease_admit(permits, words, NULL, KEY, 4, 0, &p, &d, &in_flight);
    ended_within(4 * (MAX_TRIES + 16));
    if (how != EMPTY_SOME) CHECK_EQ(status, FSHM_CONTENDED);
  }
  fshm_limiter_close(permits);
  fshm_limiter_close(words);
}

int main(void) {
  s = fresh_segment(20000);
  test_permits(1, false);
  test_permits(1, true);
  test_permits(8, false);
  test_permits(8, true);
  test_permits(1000, true);
  test_counted();
  test_checks(1);
  test_checks(2);
  test_moving(1, 1);
  test_moving(100, 1);
  test_moving(1000, 1000);
  test_moving_clear();
  test_token_lease();
  test_permit_lease();
  fshm_close(s);
  return done();
}
