/* test_permit_lease.c - permits that are granted to this host: words and their order, each call alone, and
 * processes that take and release while the permit lease is put and lowered under them. */
#include "../../csrc/unity.c"

#include "check.h"

#define MS UINT64_C(1000000)
#define SECOND (1000 * MS)
#define NOW (1000 * SECOND)
#define KEY "k", 1

static const fshm_limit account = {TOKEN_LEASE_MOST, 0, 0, FSHM_LEASE, 0};
static const fshm_limit most = {20, 0, 0, FSHM_PERMITS, 0};

typedef struct {
  fshm_segment *s;
  fshm_limiter *permits, *permit_leases, *refused;
} world_t;

static void open_limiters(world_t *w) {
  w->permits = fresh_limiter(w->s, "permits", &most, 1);
  w->permit_leases = fresh_limiter(w->s, "leases", &account, 1);
  w->refused = fresh_limiter(w->s, "refused", &account, 1);
}

static world_t make_world(void) {
  world_t w = {.s = fresh_segment(1000)};
  open_limiters(&w);
  return w;
}

static void leave(world_t *w) {
  fshm_limiter *limiters[] = {w->permits, w->permit_leases, w->refused};
  for (int i = 0; i < 3; i++) fshm_limiter_close(limiters[i]);
  fshm_close(w->s);
}

static fshm_permit_lease known(const world_t *w, uint64_t now) {
  fshm_permit_lease a;
  CHECK_EQ(fshm_permit_lease_look(w->permits, w->permit_leases, KEY, 1, now, &a), FSHM_OK);
  return a;
}

static fshm_permit_lease lower(const world_t *w, uint64_t to, uint64_t now) {
  fshm_permit_lease a;
  CHECK_EQ(fshm_permit_lease_lower(w->permits, w->permit_leases, KEY, to, now, &a), FSHM_OK);
  return a;
}

static int answer(const world_t *w, uint64_t word, uint64_t leased, uint64_t until, uint64_t now) {
  return fshm_permit_lease_put(w->permits, w->permit_leases, KEY, word, leased, until, now);
}

/* Grant so many until then, whatever there was. */
static void grant(const world_t *w, uint64_t leased, uint64_t until, uint64_t now) {
  CHECK_EQ(answer(w, known(w, now).word, leased, until, now), FSHM_OK);
}

static int take(const world_t *w, uint32_t alone, uint64_t now, fshm_permit *permit) {
  fshm_decision d;
  uint32_t held;
  int status = fshm_permit_lease_admit(w->permits, w->permit_leases, w->refused, KEY, alone, now,
                                       permit, &d, &held);
  CHECK_EQ(d.status, status);
  return status;
}

static void release(const world_t *w, fshm_permit *permit) {
  CHECK_EQ(fshm_permit_release(w->permits, permit), 1);
}

/* words */

static bool newer(uint64_t a, uint64_t b) {
  if (permit_lease_end(a) != permit_lease_end(b)) return permit_lease_end(a) > permit_lease_end(b);
  return (a & (PERMIT_LEASE_UNIT - 1)) < (b & (PERMIT_LEASE_UNIT - 1));
}

/* Whatever is done to it, a word becomes a newer one or stays; and it says what it was made of. */
static void test_words(void) {
  for (int i = 0; i < 200000; i++) {
    uint64_t leased = random_scaled(1, MAX_PERMITS + 1) - 1, end = random_scaled(1, TIME_MAX);
    uint64_t now = random_scaled(1, TIME_MAX), to = random_scaled(1, MAX_PERMITS + 1) - 1;
    bool clean = random_below(2);
    uint64_t word = permit_lease_word(leased, clean, end);
    CHECK_EQ(permit_lease_of(word), leased);
    CHECK_EQ(permit_lease_clean(word), clean);
    CHECK(permit_lease_end(word) <= end && permit_lease_end(word) + PERMIT_LEASE_UNIT > end);
    CHECK_EQ(state_expires(word), permit_lease_end(word));
    CHECK(!permit_lease_end(word) || state_possible(word));
    CHECK_EQ(permit_lease_at(word, now), permit_lease_end(word) > now ? leased : 0);
    uint64_t lowered = permit_lease_lowered(word, to);
    CHECK_EQ(permit_lease_of(lowered), min_u64(leased, to));
    CHECK(lowered == word ? to >= leased : newer(lowered, word) && !permit_lease_clean(lowered));
    uint64_t dropped = permit_lease_dropped(word);
    CHECK(permit_lease_of(dropped) == 0 && !permit_lease_clean(dropped));
    CHECK(dropped == word || newer(dropped, word));
    uint64_t until = random_below(2) ? end + random_below(3 * SECOND) - SECOND : now;
    uint64_t next = permit_lease_next(word, to, clean, until);
    if (!next) continue;
    CHECK(newer(next, word) && permit_lease_end(next) > permit_lease_end(word));
    CHECK_OP(permit_lease_end(next), <=, until + PERMIT_LEASE_SLACK);
    CHECK_EQ(permit_lease_of(next), to);
  }
  CHECK_EQ(permit_lease_next(permit_lease_word(1, true, 10 * SECOND), 1, true, 8 * SECOND), 0);
  for (int i = 0; i < 200000; i++) { /* any bits */
    uint64_t word = random_u64(), end = permit_lease_end(word);
    CHECK(permit_lease_of(word) <= MAX_PERMITS && end <= TIME_MAX);
    CHECK(permit_lease_end(permit_lease_lowered(word, 5)) == end || TAG(word) != FSHM_WINDOW);
    (void)permit_lease_next(word, random_u64(), true, random_u64());
  }
}

/* one process */

static void test_take_within(void) {
  world_t w = make_world();
  fshm_permit p[6];
  CHECK_EQ(take(&w, 0, NOW, &p[0]), FSHM_ASK);
  fshm_permit_lease a = known(&w, NOW);
  CHECK(a.word != 0 && a.leased == 0 && a.reported == 0);
  CHECK_EQ(known(&w, NOW).word, a.word);
  CHECK_EQ(answer(&w, a.word, 3, NOW + 8 * SECOND, NOW), FSHM_OK);
  for (int i = 0; i < 3; i++) CHECK_EQ(take(&w, 0, NOW, &p[i]), FSHM_ALLOWED);
  CHECK_EQ(take(&w, 0, NOW, &p[3]), FSHM_ASK);
  release(&w, &p[1]);
  CHECK_EQ(take(&w, 0, NOW, &p[1]), FSHM_ALLOWED);
  CHECK_EQ(take(&w, 0, NOW + 8 * SECOND, &p[3]), FSHM_ASK); /* over */
  a = known(&w, NOW + 9 * SECOND);
  CHECK(a.leased == 0 && a.held == 3 && a.reported == 3);
  grant(&w, 4, NOW + 17 * SECOND, NOW + 9 * SECOND);
  CHECK_EQ(take(&w, 0, NOW + 9 * SECOND, &p[3]), FSHM_ALLOWED);
  CHECK_EQ(take(&w, 0, NOW + 9 * SECOND, &p[4]), FSHM_ASK);
  for (int i = 0; i < 4; i++) release(&w, &p[i]);
  leave(&w);
}

/* An answer to another word is obsolete. */
static void test_put_of_another_word(void) {
  world_t w = make_world();
  uint64_t first = known(&w, NOW).word;
  CHECK_EQ(answer(&w, first, 3, NOW + 8 * SECOND, NOW), FSHM_OK);
  CHECK_EQ(answer(&w, first, 9, NOW + 8 * SECOND, NOW), 0);
  uint64_t second = known(&w, NOW).word;
  CHECK_EQ(lower(&w, 1, NOW).leased, 1);
  CHECK_EQ(answer(&w, second, 9, NOW + 9 * SECOND, NOW), 0);
  CHECK_EQ(answer(&w, known(&w, NOW).word, 9, NOW + 6 * SECOND, NOW),
           0); /* an older question's end */
  CHECK_EQ(known(&w, NOW).leased, 1);
  /* A word that is over is forgotten with its slot; the next is a later one. */
  CHECK_EQ(fshm_reset_key(w.permit_leases, KEY), FSHM_OK);
  uint64_t later = NOW + 20 * SECOND, third = known(&w, later).word;
  CHECK(newer(third, second));
  CHECK_EQ(answer(&w, 0, 5, later + SECOND, later), 0);
  leave(&w);
}

/* Lowered below what is held: all of it is reported, and none is taken until fewer are held. */
static void test_lower(void) {
  world_t w = make_world();
  fshm_permit p[8], one;
  grant(&w, 8, NOW + 8 * SECOND, NOW);
  for (int i = 0; i < 6; i++) CHECK_EQ(take(&w, 0, NOW, &p[i]), FSHM_ALLOWED);
  CHECK_EQ(lower(&w, 9, NOW).reported, 8);
  fshm_permit_lease a = lower(&w, 2, NOW);
  CHECK(a.leased == 2 && a.held == 6 && a.reported == 6);
  for (int i = 5; i >= 2; i--) {
    CHECK_EQ(take(&w, 0, NOW, &one), FSHM_ASK);
    release(&w, &p[i]);
  }
  CHECK_EQ(known(&w, NOW).reported, 2);
  CHECK_EQ(take(&w, 0, NOW, &one), FSHM_ASK);
  release(&w, &p[1]);
  CHECK_EQ(take(&w, 0, NOW, &one), FSHM_ALLOWED);
  release(&w, &one);
  release(&w, &p[0]);
  leave(&w);
}

/* Slots beyond an permit lease may be held by those who stand by an older word: then all are counted. */
static void test_high_numbers(void) {
  world_t w = make_world();
  fshm_permit p[12], one, two;
  for (int way = 0; way < 2; way++) { /* lowered; or over, and begun anew */
    uint64_t now = NOW + (uint64_t)way * 1000 * SECOND;
    grant(&w, 12, now + 8 * SECOND, now);
    for (int i = 0; i < 12; i++) CHECK_EQ(take(&w, 0, now, &p[i]), FSHM_ALLOWED);
    for (int i = 0; i < 12; i++)
      if (PERMIT_NUMBER(p[i].when) < 9) release(&w, &p[i]);
    if (way) {
      CHECK_EQ(fshm_reset_key(w.permit_leases, KEY), FSHM_OK);
      now += 20 * SECOND;
    } else {
      CHECK_EQ(lower(&w, 3, now).reported, 3);
    }
    grant(&w, 4, now + 9 * SECOND, now); /* 9, 10 and 11 are held */
    CHECK_EQ(take(&w, 0, now, &one), FSHM_ALLOWED);
    CHECK_EQ(take(&w, 0, now, &two), FSHM_ASK);
    for (int i = 0; i < 12; i++)
      if (p[i].held) release(&w, &p[i]);
    CHECK(!permit_lease_clean(known(&w, now).word));
    grant(&w, 4, now + 10 * SECOND, now);
    CHECK(permit_lease_clean(known(&w, now).word));
    release(&w, &one);
  }
  leave(&w);
}

static void test_refused(void) {
  world_t w = make_world();
  const uint64_t one[FSHM_MAX_LIMITS] = {1};
  fshm_permit p, q;
  CHECK_EQ(fshm_token_lease_refuse(w.refused, KEY, one, 60 * MS, NOW), FSHM_OK);
  CHECK_EQ(take(&w, 0, NOW, &p), FSHM_DENIED);
  CHECK_EQ(take(&w, 0, NOW + 61 * MS, &p), FSHM_ASK);
  grant(&w, 1, NOW + 8 * SECOND, NOW);
  CHECK_EQ(take(&w, 0, NOW, &p), FSHM_ALLOWED); /* what is granted is taken all the same */
  CHECK_EQ(take(&w, 0, NOW, &q), FSHM_DENIED);
  release(&w, &p);
  leave(&w);
}

/* A host that holds all that the name allows does not ask. */
static void test_all_are_here(void) {
  world_t w = make_world();
  fshm_permit p[20], one;
  grant(&w, 20, NOW + 8 * SECOND, NOW);
  for (int i = 0; i < 20; i++) CHECK_EQ(take(&w, 0, NOW, &p[i]), FSHM_ALLOWED);
  CHECK_EQ(take(&w, 0, NOW, &one), FSHM_DENIED);
  for (int i = 0; i < 20; i++) release(&w, &p[i]);
  leave(&w);
}

/* Without the grantor: by what is held, whatever was allowed; and then it is counted once more. */
static void test_alone(void) {
  world_t w = make_world();
  fshm_permit p[8], one;
  for (int i = 0; i < 3; i++) CHECK_EQ(take(&w, 3, NOW, &p[i]), FSHM_ALLOWED);
  CHECK_EQ(take(&w, 3, NOW, &one), FSHM_DENIED);
  CHECK_EQ(take(&w, 0, NOW, &one), FSHM_ASK);
  uint64_t word = known(&w, NOW).word;
  CHECK_EQ(known(&w, NOW).reported, 3);
  CHECK_EQ(answer(&w, word, 4, NOW + 8 * SECOND, NOW), FSHM_OK);
  CHECK(
      !permit_lease_clean(known(&w, NOW).word)); /* another process may have taken one meanwhile */
  CHECK_EQ(take(&w, 0, NOW, &p[3]), FSHM_ALLOWED);
  CHECK_EQ(take(&w, 0, NOW, &one), FSHM_ASK);
  CHECK_EQ(take(&w, 5, NOW, &p[4]), FSHM_ALLOWED); /* unreachable again: the lease is dropped */
  CHECK_EQ(known(&w, NOW).leased, 0);
  CHECK_EQ(known(&w, NOW).reported, 5);
  for (int i = 0; i < 5; i++) release(&w, &p[i]);
  leave(&w);
}

/* races: permits are valid only by what was allowed or reported */

enum { TAKERS = 3, ROUNDS_PUT = 4000 };
typedef struct {
  char name[FSHM_MAX_NAME + 1];
  _Atomic int64_t standing; /* at most what stands: counted after, and before it is released */
  _Atomic uint64_t taken, done;
} race_t;

static void take_and_release(int i, void *with) {
  race_t *r = with;
  fshm_error e;
  world_t w = {0};
  CHECK_EQ(fshm_open(r->name, 0, 0600, 0, &w.s, &e), FSHM_OK);
  open_limiters(&w);
  random_state += (uint64_t)i;
  fshm_permit held[8];
  uint32_t count = 0;
  while (!r->done && getppid() == tester) {
    if (count < 8 && random_below(2) && take(&w, 0, 0, &held[count]) == FSHM_ALLOWED) {
      r->standing++;
      r->taken++;
      count++;
    } else if (count && random_below(3)) {
      r->standing--;
      release(&w, &held[--count]);
    }
  }
  while (count) {
    r->standing--;
    release(&w, &held[--count]);
  }
  leave(&w);
}

static void expect_at_most(race_t *r, uint64_t bound) {
  for (uint64_t i = random_below(400); i; i--)
    if (r->standing > (int64_t)bound) {
      CHECK_OP(r->standing, <=, bound);
      return;
    }
  CHECK(true);
}

static void test_race(void) {
  race_t *r = shared_memory(sizeof *r);
  world_t w = make_world();
  (void)snprintf(r->name, sizeof r->name, "%s", segment_names[segments_made - 1]);
  pid_t pids[TAKERS];
  for (int i = 0; i < TAKERS; i++) pids[i] = start_child(take_and_release, i, r);
  uint64_t clean = 0;
  for (int n = 0; n < ROUNDS_PUT; n++) {
    fshm_permit_lease a = known(&w, 0);
    uint64_t leased = random_below(20);
    if (answer(&w, a.word, leased, a.now_ns + 5 * MS, 0) == FSHM_OK)
      expect_at_most(r, max_u64(leased, a.reported));
    clean += permit_lease_clean(known(&w, 0).word);
    if (!random_below(20)) { /* until it is over */
      while (known(&w, 0).left_ns) sched_yield();
      (void)usleep(1100);
      expect_at_most(r, known(&w, 0).reported);
    }
    if (random_below(2)) expect_at_most(r, lower(&w, random_below(20), 0).reported);
  }
  r->done = 1;
  for (int i = 0; i < TAKERS; i++) end_child(pids[i]);
  CHECK_OP(clean, >, ROUNDS_PUT / 20);
  CHECK_OP(r->taken, >, 1000);
  CHECK_EQ(known(&w, 0).held, 0);
  leave(&w);
  (void)munmap(r, sizeof *r);
}

int main(void) {
  test_words();
  test_take_within();
  test_put_of_another_word();
  test_lower();
  test_high_numbers();
  test_refused();
  test_all_are_here();
  test_alone();
  test_race();
  return done();
}
