/* test_adaptive.c - limits that are learned: words of any bits, the course over hours of virtual time, each call alone, and
 * processes that take permits while the limit moves under them. */
#include "../../csrc/unity.c"

#include "check.h"
#include "upstreams.h"

#define MS UINT64_C(1000000)
#define SECOND (1000 * MS)
#define KEY "k", 1

static const fshm_limit keeps = {1, 0, 0, FSHM_LEASE, 0};
static const fshm_limit grants = {200, 0, 0, FSHM_PERMITS, 0};
static const fshm_adaptive aimd = {20, 1, 200, FSHM_AIMD, 1280};
static const fshm_adaptive gradient = {20, 1, 200, FSHM_GRADIENT, 1280};

/* words */

static uint64_t number_of(uint64_t word) { return word << 7 >> (7 + LIMIT_REST); }

static void test_latencies(void) {
  uint64_t last = 0;
  for (uint64_t ns = 1025; ns < UINT64_C(1) << 41; ns += ns / 3000 + 1) {
    const uint32_t code = latency_code(ns);
    CHECK_OP(code, >=, last);
    CHECK_OP(code, <=, 0xffff);
    const double off = (double)latency_of(code) / (double)ns - 1;
    CHECK(off < 0.001 && off > -0.001);
    last = code;
  }
  CHECK_EQ(latency_code(0), latency_code(1025));
  CHECK_OP(latency_code(0), >, 0);
  CHECK_EQ(latency_code(UINT64_MAX), latency_code((UINT64_C(1) << 41) - 1));
  for (uint32_t f = 0; f <= FSHM_MAX_ADAPTIVE; f++) {
    CHECK_OP(floor_of(floor_code(f)), <=, f);
    CHECK_OP(5 * floor_of(floor_code(f)), >=, 4 * f);
    CHECK_OP(floor_code(f), <, 64);
  }
}

/* Nearly a word, or any bits. */
static uint64_t some_word(unsigned word, uint64_t now) {
  const unsigned shift = word == LEARNED_TURN ? TURN_SHIFT : LIMIT_SHIFT;
  switch (random_below(4)) {
    case 0:
      return random_u64();
    case 1:
      return 0;
    default:
      return learned_word(shift, random_below(2) ? learned_later(now) : random_u64(), random_u64());
  }
}

/* Whatever the words say and a call reports: the limit keeps to its bounds, a refusal never raises it, a call that was
 * served never lowers it (aimd), nothing raises it by more than an eighth, and no word of it comes back. */
static void test_any_bits(void) {
  for (int i = 0, n = fewer(500000); i < n; i++) {
    fshm_adaptive how = {0, (uint32_t)random_scaled(1, FSHM_MAX_ADAPTIVE), 0,
                         (uint32_t)random_below(2), (uint32_t)(WHOLE + random_below(3 * WHOLE))};
    how.most = (uint32_t)(how.least + random_below(FSHM_MAX_ADAPTIVE + 1 - how.least));
    how.initial = how.least;
    CHECK(adaptive_valid(&how));
    const uint64_t now = random_scaled(1, TIME_MAX - 1);
    learned_t w = {{0}};
    for (unsigned word = 0; word < LEARNED_WORDS; word++) w.words[word] = some_word(word, now);
    const learned_t before = w;
    const fshm_sample call = {random_below(2) ? now : random_u64(),
                              random_u64() >> random_below(64),
                              (uint32_t)random_u64() >> random_below(32), random_below(2) != 0};
    adaptive_next(&how, &w, &call, now);
    const uint64_t was = before.words[LEARNED_LIMIT], is = w.words[LEARNED_LIMIT];
    const uint32_t limit = adaptive_clamp(&how, learned_limit(was)), next = learned_limit(is);
    CHECK_OP(learned_top(is), >=, next);
    if (is == was) continue;
    CHECK_OP(next, >=, how.least);
    CHECK_OP(next, <=, how.most);
    if (learned_has(was, LIMIT_SHIFT)) CHECK_OP(number_of(is), >, number_of(was));
    if (call.throttled) CHECK_OP(next, <=, limit);
    const bool was_measured =
        turn_read(before.words[LEARNED_TURN], limit).phase == FSHM_PHASE_MEASURE;
    if (!call.throttled && how.algorithm == FSHM_AIMD) CHECK_OP(next, >=, limit);
    if (!was_measured) CHECK_OP(next, <=, raised_by_round(limit));
    /* Permits that calls before it may hold are below the top. */
    if (learned_has(was, LIMIT_SHIFT))
      CHECK_OP(learned_top(is), >=, min_u64(learned_top(was), learned_limit(was)));
    if (next < learned_limit(was)) CHECK(!learned_clean(is));
    for (unsigned word = 0; word < LEARNED_WORDS; word++)
      if (w.words[word] != before.words[word])
        CHECK(!w.words[word] || state_possible(w.words[word]));
  }
}

static void test_limit_words(void) {
  const uint64_t now = 5 * SECOND;
  uint64_t word = limit_word_first(20, now);
  CHECK_EQ(learned_limit(word), 20);
  CHECK(!learned_clean(word)); /* it says nothing of permits */
  CHECK_EQ(learned_top(word), FSHM_MAX_ADAPTIVE);
  word = limit_word_cleaned(word, now);
  CHECK(learned_clean(word));
  CHECK_EQ(learned_limit(word), 20);
  word = limit_word_moved(word, 30, now);
  CHECK(learned_clean(word));
  word = limit_word_moved(word, 10, now);
  CHECK(!learned_clean(word));
  CHECK_EQ(learned_top(word), 32);
  CHECK(!learned_clean(limit_word_moved(word, 31, now)));
  CHECK(learned_clean(limit_word_moved(word, 32, now)));
  CHECK_EQ(limit_word_moved(word, 10, now), word);
  /* It is written anew before it is forgotten. */
  CHECK(limit_word_moved(word, 10, now + LEARNED_LIFE / 2 + 3 * SECOND) != word);
  CHECK_OP(state_expires(word), >, now + LEARNED_LIFE - 3 * SECOND);
  /* Changes that come faster than the clock's unit. */
  uint64_t last = number_of(word);
  for (int i = 0; i < 20000; i++) {
    word = limit_word_moved(word, 11 - (uint32_t)(i & 1), now);
    CHECK_OP(number_of(word), >, last);
    last = number_of(word);
  }
  /* At the end of time nothing changes any more. */
  const uint64_t end = limit_word_first(5, TIME_MAX - 1);
  for (int i = 0; i < 10000; i++) word = limit_word_moved(end, 6, TIME_MAX - 1);
  CHECK(learned_has(word, LIMIT_SHIFT));
}

/* the course */

static const upstream_t refuses = {64, 0, 50 * MS, 1, MS, 400, false};
static const upstream_t rates = {64, 0, 50 * MS, 1, MS, 400, true};
static const upstream_t queues = {64, 100, 50 * MS, 1, MS, 400, false};

static void good(measured_t m, double use, double refused, const char *what, int line) {
  if (m.use < use || m.refused > refused)
    fprintf(stderr, "line %d, %s: use %.3f, refused %.4f, latency %.2f\n", line, what, m.use,
            m.refused, m.latency);
  CHECK(m.use >= use);
  CHECK(m.refused <= refused);
}
#define GOOD(m, use, refused, what) good(m, use, refused, what, __LINE__)

/* The hidden limit halves. Within 10 s, and ever after: 90 % of it are used, and 2 % of the calls refused. */
static void test_halves(void) {
  static simulated_t s;
  const uint32_t spreads = (uint32_t)fewer(2), largest = fewer(10) < 10 ? 16 : 128;
  for (int i = 0, n = fewer(2); i < n; i++) {
    for (uint32_t spread = 0; spread < spreads; spread++) {
      for (uint32_t hidden = 16; hidden <= largest; hidden *= 2) {
        upstream_t up = refuses;
        for (uint32_t kind = 0; kind < 2; kind++) {
          up = kind ? rates : refuses;
          up.hidden = hidden;
          up.spread = spread;
          up.duration = i % 2 ? 250 * MS : 50 * MS;
          simulate_begin(&s, aimd, up);
          (void)simulate(&s, 30 * SECOND);
          GOOD(simulate(&s, 10 * SECOND), 0.9, 0.02, kind ? "rate" : "aimd");
          s.up.hidden /= 2;
          const measured_t first = simulate(&s, 10 * SECOND);
          GOOD(first, 0.8, 0.03, kind ? "rate, first 10 s" : "aimd, first 10 s");
          /* Of a rate, over half a minute: calls that begin together are refused together. */
          for (int j = 0; j < 3; j++)
            GOOD(simulate(&s, (kind ? 30 : 10) * SECOND), 0.9, 0.02,
                 kind ? "rate, halved" : "aimd, halved");
          s.up.hidden *= 2;
          (void)simulate(&s, 60 * SECOND);
          GOOD(simulate(&s, 60 * SECOND), 0.9, 0.02, kind ? "rate, doubled" : "aimd, doubled");
        }

        up = queues;
        up.hidden = hidden;
        up.spread = spread;
        simulate_begin(&s, gradient, up);
        (void)simulate(&s, 30 * SECOND);
        GOOD(simulate(&s, 10 * SECOND), 0.9, 0.02, "gradient");
        s.up.hidden /= 2;
        (void)simulate(&s, 10 * SECOND);
        for (int j = 0; j < 3; j++) {
          const measured_t m = simulate(&s, 10 * SECOND);
          GOOD(m, 0.9, 0.02, "gradient, halved");
          CHECK(m.latency < 2.5);
        }
        s.up.hidden *= 2;
        (void)simulate(&s, 30 * SECOND);
        GOOD(simulate(&s, 60 * SECOND), 0.9, 0.02, "gradient, doubled");
      }
    }
  }
}

/* Small limits, long calls, large limits. */
static void test_other_upstreams(void) {
  static simulated_t s;
  static const struct {
    upstream_t up;
    double use, refused;
  } cases[] = {
      {{1, 0, 50 * MS, 1, MS, 50, false}, 0.9, 0.025},
      {{2, 0, 50 * MS, 1, MS, 50, false}, 0.85, 0.02},
      {{4, 0, 50 * MS, 1, MS, 50, false}, 0.9, 0.02},
      {{20, 0, 3 * SECOND, 2, 20 * MS, 200, false}, 0.9, 0.02},
      {{150, 0, 5 * MS, 1, MS, 400, false}, 0.9, 0.02},
  };
  for (size_t i = 0; i < (size_t)fewer(sizeof cases / sizeof *cases); i++) {
    simulate_begin(&s, aimd, cases[i].up);
    (void)simulate(&s, 300 * SECOND);
    GOOD(simulate(&s, 600 * SECOND), cases[i].use, cases[i].refused, "another upstream");
  }
}

/* The latency without a queue doubles: the limit may not fall for good. */
static void test_slower(void) {
  static simulated_t s;
  simulate_begin(&s, gradient, queues);
  (void)simulate(&s, 60 * SECOND);
  s.up.duration *= 3;
  (void)simulate(&s, 120 * SECOND);
  GOOD(simulate(&s, 60 * SECOND), 0.9, 0.02, "gradient, slower");
  s.up.duration /= 3;
  (void)simulate(&s, 120 * SECOND);
  const measured_t m = simulate(&s, 60 * SECOND);
  GOOD(m, 0.9, 0.02, "gradient, faster");
  CHECK(m.latency < 2);
}

/* A limit that is not used does not grow past 4/3 of what is in flight, and an eighth. */
static void test_not_used(void) {
  static simulated_t s;
  const fshm_adaptive *both[] = {&aimd, &gradient};
  for (int i = 0; i < 2; i++) {
    upstream_t up = refuses;
    up.hidden = 100;
    up.demand = 30;
    simulate_begin(&s, *both[i], up);
    (void)simulate(&s, (fewer(10) < 10 ? 100 : 1000) * SECOND);
    CHECK_OP(s.highest, <=, 45);
    CHECK_OP(learned_limit(s.words.words[LEARNED_LIMIT]), >=, 15); /* halved while it is measured */
  }
}

/* Refusals of one overload count once: the limit falls to nine tenths, less one for each further refusal, and by half at
 * most. */
static void test_one_overload(void) {
  learned_t w = {{limit_word_first(100, SECOND)}};
  const uint64_t now = 100 * SECOND;
  fshm_sample call = {now - 50 * MS, MS, 100, 1};
  adaptive_next(&aimd, &w, &call, now);
  CHECK_EQ(turn_read(w.words[LEARNED_TURN], 0).best, 99);
  CHECK_EQ(learned_limit(w.words[LEARNED_LIMIT]), 89);
  for (int i = 0; i < 10; i++) adaptive_next(&aimd, &w, &call, now + MS);
  CHECK_EQ(turn_read(w.words[LEARNED_TURN], 0).best, 89);
  CHECK_EQ(learned_limit(w.words[LEARNED_LIMIT]), 80);
  for (int i = 0; i < 1000; i++) adaptive_next(&aimd, &w, &call, now + MS);
  const uint32_t least = learned_limit(w.words[LEARNED_LIMIT]);
  CHECK_OP(least, >=, 36);
  CHECK_OP(least, <=, 45);
  /* A call that began after it is another overload. */
  call = (fshm_sample){now + SECOND, MS, least, 1};
  adaptive_next(&aimd, &w, &call, now + 2 * SECOND);
  CHECK_OP(learned_limit(w.words[LEARNED_LIMIT]), <, least);
}

/* calls */

typedef struct {
  fshm_segment *s;
  fshm_limiter *permits, *learned;
} world_t;

static world_t make_world(void) {
  world_t w = {.s = fresh_segment(4000)};
  w.permits = fresh_limiter(w.s, "permits", &grants, 1);
  w.learned = fresh_limiter(w.s, "learned", &keeps, 1);
  return w;
}
static void leave(world_t *w) {
  fshm_limiter_close(w->permits);
  fshm_limiter_close(w->learned);
  fshm_close(w->s);
}
static int admit(const world_t *w, const fshm_adaptive *how, uint64_t now, fshm_permit *permit,
                 fshm_decision *d, uint32_t *in_flight) {
  const int status =
      fshm_adaptive_admit(w->permits, w->learned, how, KEY, now, permit, d, in_flight);
  CHECK_EQ(d->status, status);
  return status;
}
static fshm_learned known(const world_t *w, uint64_t now) {
  fshm_learned l;
  CHECK_EQ(fshm_adaptive_look(w->learned, KEY, now, &l), FSHM_OK);
  return l;
}
static void end_call(const world_t *w, const fshm_adaptive *how, fshm_sample sample, uint64_t pause,
                     uint64_t now) {
  CHECK_EQ(fshm_adaptive_end(w->permits, w->learned, how, KEY, &sample, pause, now), FSHM_OK);
}

static void test_calls(void) {
  world_t w = make_world();
  fshm_permit held[40];
  fshm_decision d;
  uint32_t in_flight;
  const uint64_t now = 100 * SECOND;
  CHECK_EQ(known(&w, now).limit, 0);
  for (uint32_t i = 0; i < 20; i++) {
    CHECK_EQ(admit(&w, &aimd, now, &held[i], &d, &in_flight), FSHM_ALLOWED);
    CHECK_EQ(in_flight, i + 1);
  }
  CHECK_EQ(known(&w, now).exact, 1);
  CHECK_EQ(admit(&w, &aimd, now, &held[20], &d, &in_flight), FSHM_DENIED);
  CHECK_EQ(in_flight, 20);
  CHECK_EQ(d.retry_after_ns, 0);
  /* A refusal lowers the limit to 19 - 2, or 1 less: nobody begins before 18 are released. */
  end_call(&w, &aimd, (fshm_sample){now, MS, 20, 1}, 0, now + 10 * MS);
  const uint32_t limit = known(&w, now + 10 * MS).limit;
  CHECK_EQ(limit, 18);
  CHECK_EQ(known(&w, now).exact, 0);
  CHECK_EQ(known(&w, now).phase, FSHM_PHASE_REFUSED);
  for (uint32_t i = 0; i < 2; i++) { /* the lowest numbers */
    CHECK_EQ(fshm_permit_release(w.permits, &held[i]), 1);
    CHECK_EQ(admit(&w, &aimd, now, &held[30], &d, &in_flight), FSHM_DENIED);
    CHECK_EQ(in_flight, 19 - i);
  }
  CHECK_EQ(fshm_permit_release(w.permits, &held[2]), 1);
  CHECK_EQ(admit(&w, &aimd, now, &held[2], &d, &in_flight), FSHM_ALLOWED);
  CHECK_EQ(admit(&w, &aimd, now, &held[30], &d, &in_flight), FSHM_DENIED);
  for (uint32_t i = 2; i < 20; i++) CHECK_EQ(fshm_permit_release(w.permits, &held[i]), 1);
  CHECK_EQ(admit(&w, &aimd, now, &held[0], &d, &in_flight), FSHM_ALLOWED);
  CHECK_EQ(known(&w, now).exact, 1); /* none beyond the limit is held */
  CHECK_EQ(fshm_permit_release(w.permits, &held[0]), 1);
  /* A pause holds for all; one that ends later stays. */
  end_call(&w, &aimd, (fshm_sample){now, MS, 1, 1}, 2 * SECOND, now);
  CHECK_EQ(fshm_adaptive_pause(w.permits, w.learned, KEY, SECOND, now), FSHM_OK);
  CHECK_EQ(admit(&w, &aimd, now + SECOND, &held[0], &d, &in_flight), FSHM_DENIED);
  CHECK_OP(d.retry_after_ns, >=, SECOND);
  CHECK_OP(d.retry_after_ns, <, SECOND + MS);
  CHECK_EQ(admit(&w, &aimd, now + 2 * SECOND + MS, &held[0], &d, &in_flight), FSHM_ALLOWED);
  CHECK_EQ(fshm_permit_release(w.permits, &held[0]), 1);
  CHECK_EQ(fshm_adaptive_pause(w.permits, w.learned, KEY, 0, now), FSHM_OK);
  CHECK_EQ(admit(&w, &aimd, now, &held[0], &d, &in_flight), FSHM_ALLOWED);
  CHECK_EQ(fshm_permit_release(w.permits, &held[0]), 1);
  /* What is learned stays, until it is forgotten. */
  CHECK_OP(known(&w, now).limit, <, 18);
  CHECK_EQ(fshm_adaptive_forget(w.permits, w.learned, &aimd, KEY), FSHM_OK);
  CHECK_EQ(known(&w, now).limit, 20);
  CHECK_EQ(known(&w, now).phase, FSHM_PHASE_START);
  CHECK_EQ(admit(&w, &aimd, now, &held[0], &d, &in_flight), FSHM_ALLOWED);
  CHECK_EQ(fshm_permit_release(w.permits, &held[0]), 1);
  /* Arguments that are none. */
  fshm_adaptive wrong = aimd;
  wrong.most = FSHM_MAX_ADAPTIVE + 1;
  CHECK_EQ(admit(&w, &wrong, now, &held[0], &d, &in_flight), FSHM_E_ARGUMENT);
  CHECK_EQ(fshm_adaptive_admit(w.permits, w.permits, &aimd, KEY, now, &held[0], &d, &in_flight),
           FSHM_E_ARGUMENT);
  leave(&w);
}

/* Another program wrote 0 over the limit's word: it begins anew, and the call is answered. */
static void test_no_word(void) {
  world_t w = make_world();
  fshm_permit held;
  fshm_decision d;
  uint32_t in_flight, erased = 0;
  const uint64_t now = 100 * SECOND;
  CHECK_EQ(admit(&w, &aimd, now, &held, &d, &in_flight), FSHM_ALLOWED);
  CHECK_EQ(fshm_permit_release(w.permits, &held), 1);
  for (uint64_t i = 0; i < w.s->slot_count; i++) {
    const pair_t pair = pair_load(&w.s->slots[i]);
    if (!pair.who || IS_PERMIT(pair.when)) continue;
    w.s->slots[i].when = 0;
    erased++;
  }
  CHECK_OP(erased, >=, 1);
  CHECK_EQ(known(&w, now).limit, 0); /* nothing is learned */
  CHECK_EQ(admit(&w, &aimd, now, &held, &d, &in_flight), FSHM_ALLOWED);
  CHECK_EQ(known(&w, now).limit, 20);
  CHECK_EQ(fshm_permit_release(w.permits, &held), 1);
  leave(&w);
}

/* Learning through the segment goes as learning in memory. */
static void test_same_course(void) {
  world_t w = make_world();
  for (uint32_t algorithm = 0; algorithm < 2; algorithm++) {
    fshm_adaptive how = aimd;
    how.algorithm = algorithm;
    const char key = (char)('a' + algorithm);
    learned_t words = {{0}};
    uint64_t now = 100 * SECOND;
    fshm_permit permit;
    fshm_decision d;
    uint32_t in_flight;
    CHECK_EQ(fshm_adaptive_admit(w.permits, w.learned, &how, &key, 1, now, &permit, &d, &in_flight),
             FSHM_ALLOWED);
    CHECK_EQ(fshm_permit_release(w.permits, &permit), 1);
    words.words[LEARNED_LIMIT] = limit_word_cleaned(limit_word_first(20, now), now);
    for (int i = 0, n = fewer(20000); i < n; i++) {
      now += random_below(20 * MS);
      const fshm_sample call = {now - random_below(100 * MS), random_below(100 * MS),
                                (uint32_t)random_below(40), random_below(50) == 0};
      adaptive_next(&how, &words, &call, now);
      CHECK_EQ(fshm_adaptive_end(w.permits, w.learned, &how, &key, 1, &call, 0, now), FSHM_OK);
      fshm_learned l;
      CHECK_EQ(fshm_adaptive_look(w.learned, &key, 1, now, &l), FSHM_OK);
      CHECK_EQ(l.limit, learned_limit(words.words[LEARNED_LIMIT]));
      CHECK_EQ(l.rounds, round_read(words.words[LEARNED_ROUND], words.words[LEARNED_TURN]).rounds);
    }
  }
  leave(&w);
}

/* processes */

typedef struct {
  _Atomic int64_t held; /* what calls are sure to hold */
  _Atomic uint64_t checked, stop;
} shared_t;
typedef struct {
  world_t *w;
  shared_t *shared;
} given_t;

static uint64_t word_now(const world_t *w) {
  keyed_t k;
  found_t f;
  CHECK_EQ(keyed_begin(&k, w->learned, FSHM_LEASE, KEY, 1), FSHM_OK);
  return word_look(&k, LEARNED_LIMIT, &f);
}

/* A call that was admitted while the limit did not change: never more than the limit are held. */
static void take_and_check(int i, void *with) {
  const given_t *g = with;
  fshm_permit held[8];
  uint32_t mine = 0;
  for (int n = 0, most = fewer(40000); n < most; n++) {
    const uint64_t before = word_now(g->w);
    fshm_decision d;
    uint32_t in_flight;
    int status = FSHM_DENIED;
    if (mine < 8) status = admit(g->w, &aimd, 0, &held[mine], &d, &in_flight);
    if (status == FSHM_ALLOWED) {
      mine++;
      const int64_t all = atomic_fetch_add(&g->shared->held, 1) + 1;
      if (before && learned_limit(word_now(g->w)) == learned_limit(before) &&
          word_now(g->w) == before) {
        CHECK_OP(all, <=, learned_limit(before));
        atomic_fetch_add(&g->shared->checked, 1);
      }
    }
    if (mine && (status != FSHM_ALLOWED || random_below(2))) {
      const uint32_t which = (uint32_t)random_below(mine);
      atomic_fetch_sub(&g->shared->held, 1);
      CHECK_EQ(fshm_permit_release(g->w->permits, &held[which]), 1);
      held[which] = held[--mine];
    }
    if (i == 0 && random_below(4) == 0) { /* the limit goes up and down */
      const uint64_t now = segment_now(g->w->s);
      keyed_t k;
      found_t f;
      CHECK_EQ(keyed_begin(&k, g->w->learned, FSHM_LEASE, KEY, now), FSHM_OK);
      const uint64_t word = word_look(&k, LEARNED_LIMIT, &f);
      if (word)
        (void)word_put(&k, LEARNED_LIMIT, &f,
                       limit_word_moved(word, 1 + (uint32_t)random_below(24), now));
    }
  }
  while (mine) {
    atomic_fetch_sub(&g->shared->held, 1);
    CHECK_EQ(fshm_permit_release(g->w->permits, &held[--mine]), 1);
  }
}

static void test_processes(void) {
  world_t w = make_world();
  given_t g = {&w, shared_memory(sizeof(shared_t))};
  run_children(4, take_and_check, &g);
  CHECK_OP(g.shared->checked, >, 1000);
  CHECK_EQ(g.shared->held, 0);
  CHECK_EQ(fshm_in_flight(w.permits, KEY), 0);
  leave(&w);
}

/* What four processes learn together is one course: each round is counted once. */
static void served_calls(int i, void *with) {
  const given_t *g = with;
  (void)i;
  for (int n = 0; n < 500; n++)
    end_call(g->w, &aimd, (fshm_sample){200 * SECOND, MS, 1000, 0}, 0, 200 * SECOND);
}
static void test_learn_together(void) {
  world_t w = make_world();
  given_t g = {&w, NULL};
  fshm_permit permit;
  fshm_decision d;
  uint32_t in_flight;
  CHECK_EQ(admit(&w, &aimd, 100 * SECOND, &permit, &d, &in_flight), FSHM_ALLOWED);
  learned_t alone = {{limit_word_first(20, 100 * SECOND)}};
  for (int n = 0; n < 2000; n++) {
    const fshm_sample call = {200 * SECOND, MS, 1000, 0};
    adaptive_next(&aimd, &alone, &call, 200 * SECOND);
  }
  run_children(4, served_calls, &g);
  const uint32_t limit = known(&w, 200 * SECOND).limit;
  CHECK_OP(limit, <=, learned_limit(alone.words[LEARNED_LIMIT]));
  CHECK_OP(limit, >, 60); /* some samples are lost to others */
  leave(&w);
}

int main(void) {
  test_latencies();
  test_limit_words();
  test_any_bits();
  test_one_overload();
  test_halves();
  test_other_upstreams();
  test_slower();
  test_not_used();
  test_calls();
  test_no_word();
  test_same_course();
  test_processes();
  test_learn_together();
  return done();
}
