/* test_allowance.c - permits that are granted to this host: words and their order, each call alone, and
 * processes that take and release while the allowance is put and lowered under them. */
#include "../../csrc/unity.c"

#include "check.h"

#define MS UINT64_C(1000000)
#define SECOND (1000 * MS)
#define NOW (1000 * SECOND)
#define KEY "k", 1

static const fshm_limit purse = {WALLET_MOST, 0, 0, FSHM_WALLET, 0};
static const fshm_limit most = {20, 0, 0, FSHM_PERMITS, 0};

typedef struct {
  fshm_segment *s;
  fshm_limiter *permits, *allowances, *refused;
} world_t;

static void open_limiters(world_t *w) {
  w->permits = fresh_limiter(w->s, "permits", &most, 1);
  w->allowances = fresh_limiter(w->s, "allowances", &purse, 1);
  w->refused = fresh_limiter(w->s, "refused", &purse, 1);
}

static world_t make_world(void) {
  world_t w = {.s = fresh_segment(1000)};
  open_limiters(&w);
  return w;
}

static void leave(world_t *w) {
  fshm_limiter *limiters[] = {w->permits, w->allowances, w->refused};
  for (int i = 0; i < 3; i++) fshm_limiter_close(limiters[i]);
  fshm_close(w->s);
}

static fshm_allowance known(const world_t *w, uint64_t now) {
  fshm_allowance a;
  CHECK_EQ(fshm_allowance_look(w->permits, w->allowances, KEY, 1, now, &a), FSHM_OK);
  return a;
}

static fshm_allowance lower(const world_t *w, uint64_t to, uint64_t now) {
  fshm_allowance a;
  CHECK_EQ(fshm_allowance_lower(w->permits, w->allowances, KEY, to, now, &a), FSHM_OK);
  return a;
}

static int answer(const world_t *w, uint64_t word, uint64_t allowance, uint64_t until,
                  uint64_t now) {
  return fshm_allowance_put(w->permits, w->allowances, KEY, word, allowance, until, now);
}

/* Grant so many until then, whatever there was. */
static void grant(const world_t *w, uint64_t allowance, uint64_t until, uint64_t now) {
  CHECK_EQ(answer(w, known(w, now).word, allowance, until, now), FSHM_OK);
}

static int take(const world_t *w, uint32_t alone, uint64_t now, fshm_permit *permit) {
  fshm_decision d;
  uint32_t held;
  int status = fshm_allowance_admit(w->permits, w->allowances, w->refused, KEY, alone, now, permit,
                                    &d, &held);
  CHECK_EQ(d.status, status);
  return status;
}

static void release(const world_t *w, fshm_permit *permit) {
  CHECK_EQ(fshm_permit_release(w->permits, permit), 1);
}

/* words */

static bool newer(uint64_t a, uint64_t b) {
  if (allowance_end(a) != allowance_end(b)) return allowance_end(a) > allowance_end(b);
  return (a & (ALLOWANCE_UNIT - 1)) < (b & (ALLOWANCE_UNIT - 1));
}

/* Whatever is done to it, a word becomes a newer one or stays; and it says what it was made of. */
static void test_words(void) {
  for (int i = 0; i < 200000; i++) {
    uint64_t allowance = random_scaled(1, MAX_PERMITS + 1) - 1, end = random_scaled(1, TIME_MAX);
    uint64_t now = random_scaled(1, TIME_MAX), to = random_scaled(1, MAX_PERMITS + 1) - 1;
    bool clean = random_below(2);
    uint64_t word = allowance_word(allowance, clean, end);
    CHECK_EQ(allowance_of(word), allowance);
    CHECK_EQ(allowance_clean(word), clean);
    CHECK(allowance_end(word) <= end && allowance_end(word) + ALLOWANCE_UNIT > end);
    CHECK_EQ(state_expires(word), allowance_end(word));
    CHECK(!allowance_end(word) || state_possible(word));
    CHECK_EQ(allowance_at(word, now), allowance_end(word) > now ? allowance : 0);
    uint64_t lowered = allowance_lowered(word, to);
    CHECK_EQ(allowance_of(lowered), min_u64(allowance, to));
    CHECK(lowered == word ? to >= allowance : newer(lowered, word) && !allowance_clean(lowered));
    uint64_t dropped = allowance_dropped(word);
    CHECK(allowance_of(dropped) == 0 && !allowance_clean(dropped));
    CHECK(dropped == word || newer(dropped, word));
    uint64_t until = random_below(2) ? end + random_below(3 * SECOND) - SECOND : now;
    uint64_t next = allowance_next(word, to, clean, until);
    if (!next) continue;
    CHECK(newer(next, word) && allowance_end(next) > allowance_end(word));
    CHECK_OP(allowance_end(next), <=, until + ALLOWANCE_SLACK);
    CHECK_EQ(allowance_of(next), to);
  }
  CHECK_EQ(allowance_next(allowance_word(1, true, 10 * SECOND), 1, true, 8 * SECOND), 0);
  for (int i = 0; i < 200000; i++) { /* any bits */
    uint64_t word = random_u64(), end = allowance_end(word);
    CHECK(allowance_of(word) <= MAX_PERMITS && end <= TIME_MAX);
    CHECK(allowance_end(allowance_lowered(word, 5)) == end || TAG(word) != FSHM_WINDOW);
    (void)allowance_next(word, random_u64(), true, random_u64());
  }
}

/* one process */

static void test_take_within(void) {
  world_t w = make_world();
  fshm_permit p[6];
  CHECK_EQ(take(&w, 0, NOW, &p[0]), FSHM_ASK);
  fshm_allowance a = known(&w, NOW);
  CHECK(a.word != 0 && a.allowance == 0 && a.told == 0);
  CHECK_EQ(known(&w, NOW).word, a.word);
  CHECK_EQ(answer(&w, a.word, 3, NOW + 8 * SECOND, NOW), FSHM_OK);
  for (int i = 0; i < 3; i++) CHECK_EQ(take(&w, 0, NOW, &p[i]), FSHM_ALLOWED);
  CHECK_EQ(take(&w, 0, NOW, &p[3]), FSHM_ASK);
  release(&w, &p[1]);
  CHECK_EQ(take(&w, 0, NOW, &p[1]), FSHM_ALLOWED);
  CHECK_EQ(take(&w, 0, NOW + 8 * SECOND, &p[3]), FSHM_ASK); /* over */
  a = known(&w, NOW + 9 * SECOND);
  CHECK(a.allowance == 0 && a.held == 3 && a.told == 3);
  grant(&w, 4, NOW + 17 * SECOND, NOW + 9 * SECOND);
  CHECK_EQ(take(&w, 0, NOW + 9 * SECOND, &p[3]), FSHM_ALLOWED);
  CHECK_EQ(take(&w, 0, NOW + 9 * SECOND, &p[4]), FSHM_ASK);
  for (int i = 0; i < 4; i++) release(&w, &p[i]);
  leave(&w);
}

/* An answer to another word is nobody's. */
static void test_put_of_another_word(void) {
  world_t w = make_world();
  uint64_t first = known(&w, NOW).word;
  CHECK_EQ(answer(&w, first, 3, NOW + 8 * SECOND, NOW), FSHM_OK);
  CHECK_EQ(answer(&w, first, 9, NOW + 8 * SECOND, NOW), 0);
  uint64_t second = known(&w, NOW).word;
  CHECK_EQ(lower(&w, 1, NOW).allowance, 1);
  CHECK_EQ(answer(&w, second, 9, NOW + 9 * SECOND, NOW), 0);
  CHECK_EQ(answer(&w, known(&w, NOW).word, 9, NOW + 6 * SECOND, NOW),
           0); /* an older question's end */
  CHECK_EQ(known(&w, NOW).allowance, 1);
  /* A word that is over is forgotten with its cell; the next is a later one. */
  CHECK_EQ(fshm_reset_key(w.allowances, KEY), FSHM_OK);
  uint64_t later = NOW + 20 * SECOND, third = known(&w, later).word;
  CHECK(newer(third, second));
  CHECK_EQ(answer(&w, 0, 5, later + SECOND, later), 0);
  leave(&w);
}

/* Lowered below what is held: all of it is told, and none is taken until fewer are held. */
static void test_lower(void) {
  world_t w = make_world();
  fshm_permit p[8], one;
  grant(&w, 8, NOW + 8 * SECOND, NOW);
  for (int i = 0; i < 6; i++) CHECK_EQ(take(&w, 0, NOW, &p[i]), FSHM_ALLOWED);
  CHECK_EQ(lower(&w, 9, NOW).told, 8);
  fshm_allowance a = lower(&w, 2, NOW);
  CHECK(a.allowance == 2 && a.held == 6 && a.told == 6);
  for (int i = 5; i >= 2; i--) {
    CHECK_EQ(take(&w, 0, NOW, &one), FSHM_ASK);
    release(&w, &p[i]);
  }
  CHECK_EQ(known(&w, NOW).told, 2);
  CHECK_EQ(take(&w, 0, NOW, &one), FSHM_ASK);
  release(&w, &p[1]);
  CHECK_EQ(take(&w, 0, NOW, &one), FSHM_ALLOWED);
  release(&w, &one);
  release(&w, &p[0]);
  leave(&w);
}

/* Slots beyond an allowance may be held by those who stand by an older word: then all are counted. */
static void test_high_slots(void) {
  world_t w = make_world();
  fshm_permit p[12], one, two;
  for (int way = 0; way < 2; way++) { /* lowered; or over, and begun anew */
    uint64_t now = NOW + (uint64_t)way * 1000 * SECOND;
    grant(&w, 12, now + 8 * SECOND, now);
    for (int i = 0; i < 12; i++) CHECK_EQ(take(&w, 0, now, &p[i]), FSHM_ALLOWED);
    for (int i = 0; i < 12; i++)
      if (SLOT_OF(p[i].when) < 9) release(&w, &p[i]);
    if (way) {
      CHECK_EQ(fshm_reset_key(w.allowances, KEY), FSHM_OK);
      now += 20 * SECOND;
    } else {
      CHECK_EQ(lower(&w, 3, now).told, 3);
    }
    grant(&w, 4, now + 9 * SECOND, now); /* 9, 10 and 11 are held */
    CHECK_EQ(take(&w, 0, now, &one), FSHM_ALLOWED);
    CHECK_EQ(take(&w, 0, now, &two), FSHM_ASK);
    for (int i = 0; i < 12; i++)
      if (p[i].held) release(&w, &p[i]);
    CHECK(!allowance_clean(known(&w, now).word));
    grant(&w, 4, now + 10 * SECOND, now);
    CHECK(allowance_clean(known(&w, now).word));
    release(&w, &one);
  }
  leave(&w);
}

static void test_refused(void) {
  world_t w = make_world();
  const uint64_t one[FSHM_MAX_LIMITS] = {1};
  fshm_permit p, q;
  CHECK_EQ(fshm_wallet_refuse(w.refused, KEY, one, 60 * MS, NOW), FSHM_OK);
  CHECK_EQ(take(&w, 0, NOW, &p), FSHM_DENIED);
  CHECK_EQ(take(&w, 0, NOW + 61 * MS, &p), FSHM_ASK);
  grant(&w, 1, NOW + 8 * SECOND, NOW);
  CHECK_EQ(take(&w, 0, NOW, &p), FSHM_ALLOWED); /* what is granted is taken all the same */
  CHECK_EQ(take(&w, 0, NOW, &q), FSHM_DENIED);
  release(&w, &p);
  leave(&w);
}

/* Whoever holds all that the name allows needs not ask. */
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
  CHECK_EQ(known(&w, NOW).told, 3);
  CHECK_EQ(answer(&w, word, 4, NOW + 8 * SECOND, NOW), FSHM_OK);
  CHECK(!allowance_clean(known(&w, NOW).word)); /* somebody may have taken one meanwhile */
  CHECK_EQ(take(&w, 0, NOW, &p[3]), FSHM_ALLOWED);
  CHECK_EQ(take(&w, 0, NOW, &one), FSHM_ASK);
  CHECK_EQ(take(&w, 5, NOW, &p[4]), FSHM_ALLOWED); /* away again: what was allowed is dropped */
  CHECK_EQ(known(&w, NOW).allowance, 0);
  CHECK_EQ(known(&w, NOW).told, 5);
  for (int i = 0; i < 5; i++) release(&w, &p[i]);
  leave(&w);
}

/* races: takers stand on nothing but what was allowed or told */

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
    fshm_allowance a = known(&w, 0);
    uint64_t allowance = random_below(20);
    if (answer(&w, a.word, allowance, a.now_ns + 5 * MS, 0) == FSHM_OK)
      expect_at_most(r, max_u64(allowance, a.told));
    clean += allowance_clean(known(&w, 0).word);
    if (!random_below(20)) { /* until it is over */
      while (known(&w, 0).left_ns) sched_yield();
      (void)usleep(1100);
      expect_at_most(r, known(&w, 0).told);
    }
    if (random_below(2)) expect_at_most(r, lower(&w, random_below(20), 0).told);
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
  test_high_slots();
  test_refused();
  test_all_are_here();
  test_alone();
  test_race();
  return done();
}
