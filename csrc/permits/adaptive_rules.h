/* adaptive_rules.h - how a concurrency limit is learned: (settings, words, outcome of a call, now) -> next words. Pure,
 * like algorithms.h: no clock, no memory. Any bit pattern is a legal word. Argued in DESIGN.md, "Limits that are
 * learned".
 *
 * What is learned of a key are four words, each the state of a slot of its own; `end` is when it is forgotten:
 *
 *   limit    end (26) | changes (13) | limit (14) | top (4)          what calls may hold: the only word they go by
 *   turn     end (35) | best (14) | phase (2) | floor (6)            the last turn of the course: when, and why
 *   round    end (26) | calls (14) | tag (8) | rounds (7) | 2 (2)    since the turn
 *   latency  end (26) | mean (16) | base (15)
 *
 * They have the form of a window's state (algorithms.h): 1 (2 bits) | shift (5) | end >> shift | the rest.
 *
 * A round is as many successful calls as the limit: about one round trip. A limit grows at the end of a round, and only
 * if calls used it: at least three quarters of it were in flight. So it never passes 4/3 of what was ever in flight.
 *
 * aimd: additive increase, multiplicative decrease (Chiu and Jain, "Analysis of the Increase and Decrease Algorithms for
 * Congestion Avoidance in Computer Networks", 1989), in the form that CUBIC gave it (RFC 9438). Until the first refusal,
 * the limit grows by an eighth each round. A refusal says that the upstream takes less: the limit goes to nine tenths of
 * `best`, what was in flight less one, and then along a cubic curve: soon near `best`, for long close to it, and then
 * slowly beyond. So a probe, which may cost a refusal, comes once in about 350
 * calls, or 45 rounds of a small limit.
 *
 * gradient: a queue at the upstream shows as latency, before it refuses (TCP Vegas: Brakmo and Peterson, 1995; the
 * Gradient2Limit of Netflix/concurrency-limits; the adaptive concurrency filter of Envoy). Each round moves the limit a
 * fifth of the way to limit * gradient + sqrt(limit), where gradient = tolerance * base / mean latency, from 0.5 to 1.
 * `base`, the latency without a queue, is measured as Envoy does it: every 100 rounds the limit is halved until one round
 * of calls that began after it is over. In between it follows lower latencies, by an eighth each round. Refusals lower it as with aimd, and the curve then bounds it.
 */
#ifndef FSHM_ADAPTIVE_RULES_H
#define FSHM_ADAPTIVE_RULES_H

#include "../limits/algorithms.h"

enum { LEARNED_LIMIT, LEARNED_TURN, LEARNED_ROUND, LEARNED_LATENCY, LEARNED_WORDS };

#define LEARNED_LIFE (UINT64_C(144) << 42) /* ns: 7.3 days without a call, and it is forgotten */
#define LIMIT_SHIFT 31
#define TURN_SHIFT 22 /* 4.2 ms: refusals so soon after each other are of one overload */
#define MOST_ROUNDS 127
#define MEASURE_ROUNDS 100
#define FIRST_MEASURE 10
#define LEAST_SAMPLES 10 /* latencies of a round */
#define WHOLE 1024 /* of fractions: settings->tolerance, gradient */

typedef struct {
  uint64_t words[LEARNED_WORDS]; /* 0: there is none */
} learned_t;

/* The form of a word, and its end. */
static inline bool learned_has(uint64_t word, unsigned shift) {
  return word >> 57 == ((unsigned)FSHM_WINDOW << 5 | shift);
}
static inline uint64_t learned_word(unsigned shift, uint64_t end, uint64_t rest) {
  return (uint64_t)FSHM_WINDOW << 62 | (uint64_t)shift << 57 |
         min_u64(end, TIME_MAX) >> shift << shift | (rest & ((UINT64_C(1) << shift) - 1));
}
static inline uint64_t learned_later(uint64_t now) { return plus_time(now, LEARNED_LIFE); }

/* limit word: `end` and `changes` are one number that each change raises, so no word of a key ever recurs. */
#define LIMIT_NUMBER_BITS 39
#define LIMIT_REST 18

static inline uint32_t learned_limit(uint64_t word) {
  const uint32_t limit = (uint32_t)(word >> 4) & 0x3fff;
  if (!learned_has(word, LIMIT_SHIFT)) return 1;
  return limit < 1 ? 1 : limit > FSHM_MAX_ADAPTIVE ? FSHM_MAX_ADAPTIVE : limit;
}
/* Clean: all permits of calls that were admitted have numbers below the limit. Else below the top. */
static inline bool learned_clean(uint64_t word) {
  return learned_has(word, LIMIT_SHIFT) && !(word & 15);
}
static inline uint32_t learned_top(uint64_t word) {
  if (learned_clean(word)) return learned_limit(word);
  const uint32_t top = 1U << (word & 15), limit = learned_limit(word);
  if (!learned_has(word, LIMIT_SHIFT) || top > FSHM_MAX_ADAPTIVE) return FSHM_MAX_ADAPTIVE;
  return top > limit ? top : limit;
}
static inline unsigned top_code(uint32_t limit) {
  const unsigned code = bit_length(limit - 1);
  return code ? code : 1;
}

/* The word after it. At the end of time (4.5 years): the same. */
static inline uint64_t limit_word_after(uint64_t word, uint32_t limit, unsigned code,
                                        uint64_t now) {
  const uint64_t had = learned_has(word, LIMIT_SHIFT) ? word << 7 >> (7 + LIMIT_REST) : 0;
  const uint64_t number = max_u64(had + 1, learned_later(now) >> LIMIT_SHIFT << 13);
  if (number >> LIMIT_NUMBER_BITS) return word;
  return (uint64_t)((unsigned)FSHM_WINDOW << 5 | LIMIT_SHIFT) << 57 | number << LIMIT_REST |
         (uint64_t)limit << 4 | code;
}
/* A first word says nothing of permits that may be held. */
static inline uint64_t limit_word_first(uint32_t limit, uint64_t now) {
  return limit_word_after(0, limit, 14, now);
}
/* Another limit. Raised: a clean word stays clean, and one becomes so whose top it reaches. Lowered: permits from the
 * limit on may be held. */
static inline uint64_t limit_word_moved(uint64_t word, uint32_t limit, uint64_t now) {
  const uint32_t before = learned_limit(word);
  unsigned code = word & 15;
  if (!learned_has(word, LIMIT_SHIFT)) return limit_word_first(limit, now);
  if (limit == before && state_expires(word) > plus_time(now, LEARNED_LIFE / 2)) return word;
  if (limit < before && top_code(before) > code) code = top_code(before);
  if (limit >= before && code && learned_top(word) <= limit) code = 0;
  return limit_word_after(word, limit, code, now);
}
/* No permit from the limit on is held. */
static inline uint64_t limit_word_cleaned(uint64_t word, uint64_t now) {
  return limit_word_after(word, learned_limit(word), 0, now);
}

/* turn word */
typedef struct {
  uint64_t since; /* calls that began before it do not count; 0: there was no turn */
  uint32_t best, floor; /* floor: refusals of the same overload do not lower `best` below it */
  unsigned phase;
} learned_turn_t;

/* Below 8 itself, above rounded down to three bits. */
static inline unsigned floor_code(uint32_t floor) {
  const unsigned over = floor < 8 ? 0 : bit_length(floor) - 3;
  return over ? 4 + 4 * over + (floor >> over & 3) : floor;
}
static inline uint32_t floor_of(unsigned code) {
  return code < 8 ? code : (4 | (code & 3)) << (code / 4 - 1);
}

static inline uint64_t turn_word(const learned_turn_t *t, uint64_t now) {
  const uint64_t rest = (uint64_t)t->best << 8 | t->phase << 6 | floor_code(t->floor);
  /* The next multiple: a call that began before `now` began before it. */
  const uint64_t end = (plus_time(now, LEARNED_LIFE) >> TURN_SHIFT) + 1;
  return learned_word(TURN_SHIFT, end << TURN_SHIFT, rest);
}
static inline learned_turn_t turn_read(uint64_t word, uint32_t limit) {
  learned_turn_t t = {0, limit, 1, FSHM_PHASE_START};
  if (!learned_has(word, TURN_SHIFT)) return t;
  t.since = minus(state_expires(word), LEARNED_LIFE);
  t.best = (uint32_t)min_u64(max_u64(word >> 8 & 0x3fff, 1), FSHM_MAX_ADAPTIVE);
  t.phase = (unsigned)(word >> 6) & 3;
  t.floor = (uint32_t)min_u64(floor_of(word & 63), t.best);
  return t;
}
/* Rounds belong to the turn with this tag. */
static inline unsigned turn_tag(uint64_t word) {
  return (unsigned)(((word >> 6) * UINT64_C(0x9e3779b97f4a7c15)) >> 56);
}

/* round word */
typedef struct {
  uint32_t calls;
  unsigned rounds;
} learned_round_t;
static inline learned_round_t round_read(uint64_t word, uint64_t turn) {
  learned_round_t r = {0, 0};
  if (!learned_has(word, LIMIT_SHIFT) || (word >> 9 & 0xff) != turn_tag(turn)) return r;
  r.calls = (uint32_t)(word >> 17) & 0x3fff;
  r.rounds = (unsigned)(word >> 2) & 0x7f;
  return r;
}
static inline uint64_t round_word(const learned_round_t *r, uint64_t turn, uint64_t now) {
  const uint64_t rest =
      (uint64_t)r->calls << 17 | (uint64_t)turn_tag(turn) << 9 | (uint64_t)r->rounds << 2 | 2;
  return learned_word(LIMIT_SHIFT, learned_later(now), rest);
}

/* latency word. A latency is kept as a binary logarithm, in 2048ths, from 1 us (1) to 73 minutes; between powers of two
 * it goes linearly. So the mean is nearly the geometric one, which a few slow calls do not move far. */
static inline uint32_t latency_code(uint64_t ns) {
  ns = min_u64(max_u64(ns, 1025), (UINT64_C(1) << 41) - 1);
  const unsigned length = bit_length(ns) - 1; /* 10 .. 40 */
  const uint64_t rest = ns - (UINT64_C(1) << length);
  const uint32_t code = (uint32_t)(length - 10) << 11 |
                        (uint32_t)(length > 11 ? rest >> (length - 11) : rest << (11 - length));
  return code ? code : 1;
}
static inline uint64_t latency_of(uint32_t code) { /* ns */
  const unsigned length = (code >> 11 & 31) + 10;
  return (UINT64_C(1) << length) + ((uint64_t)(code & 2047) << length >> 11);
}
static inline uint32_t latency_mean(uint64_t word) {
  return learned_has(word, LIMIT_SHIFT) ? (uint32_t)(word >> 15) & 0xffff : 0;
}
static inline uint32_t latency_base(uint64_t word) { /* 0: not measured yet */
  return learned_has(word, LIMIT_SHIFT) ? (uint32_t)(word & 0x7fff) << 1 : 0;
}
static inline uint64_t latency_word(uint32_t mean, uint32_t base, uint64_t now) {
  return learned_word(LIMIT_SHIFT, learned_later(now),
                      (uint64_t)(mean ? mean : 1) << 15 | base >> 1);
}
/* The mean with the n-th latency of a round. Of a large round, those before fade, since their weights would be lost in
 * rounding. */
static inline uint32_t latency_add(uint32_t mean, uint32_t n, uint64_t ns) {
  const int64_t code = latency_code(ns), weight = n < 64 ? n : 64;
  if (!mean || n <= 1) return (uint32_t)code;
  const int64_t off = code - (int64_t)mean, half = weight / 2;
  return (uint32_t)((int64_t)mean + (off >= 0 ? off + half : off - half) / weight);
}

/* the course ---------------------------------------------------------------------------------- */

static inline uint32_t adaptive_clamp(const fshm_adaptive *how, uint64_t limit) {
  return (uint32_t)max_u64(how->least, min_u64(limit, how->most));
}
static inline bool adaptive_valid(const fshm_adaptive *how) {
  return how->least >= 1 && how->least <= how->initial && how->initial <= how->most &&
         how->most <= FSHM_MAX_ADAPTIVE && how->algorithm <= FSHM_GRADIENT &&
         how->tolerance >= WHOLE && how->tolerance <= 4 * WHOLE;
}

static inline uint32_t root_of(uint32_t x) {
  uint32_t root = 0;
  while ((root + 1) * (root + 1) <= x) root++; /* at most 100 */
  return root;
}

/* What a refusal takes off `best`, and so the height of the curve. */
static inline uint32_t curve_step(uint32_t best) { return best < 20 ? 1 : (best + 5) / 10; }

/* In how many rounds the curve is at `best` again: so many that a probe comes once in some 350 calls at least, or, of
 * small limits, once in 45 rounds. */
static inline int64_t curve_rounds(uint32_t best) {
  return best <= 8 ? 32 : best >= 32 ? 8 : 256 / best;
}

/* The limit so many rounds after a refusal: best + step * ((rounds - whole) / whole)^3, rounded. */
static inline uint32_t curve_at(uint32_t best, unsigned rounds) {
  const int64_t whole = curve_rounds(best), u = (int64_t)rounds - whole,
                one = whole * whole * whole;
  const int64_t off = (int64_t)curve_step(best) * u * u * u;
  const int64_t at = (int64_t)best + (off >= 0 ? off + one / 2 : off - one / 2) / one;
  return (uint32_t)(at < 1 ? 1 : at);
}
/* A round raises the limit by an eighth at most. */
static inline uint32_t raised_by_round(uint32_t limit) {
  return limit + (limit < 8 ? 1 : limit / 8);
}

/* The limit after a round that was used, without a look at latencies. */
static inline uint32_t grown(const learned_turn_t *t, uint32_t limit, unsigned rounds) {
  const uint32_t most = raised_by_round(limit);
  if (t->phase != FSHM_PHASE_REFUSED || rounds >= MOST_ROUNDS) return most;
  const uint32_t curve = curve_at(t->best, rounds);
  return curve < limit ? limit : curve < most ? curve : most;
}

/* The limit after a round with this mean latency. */
static inline uint32_t steered(const fshm_adaptive *how, uint32_t limit, uint32_t mean,
                               uint32_t base) {
  const uint64_t low = latency_of(base) * how->tolerance, high = latency_of(mean);
  const uint64_t gradient = max_u64(min_u64(low / high, WHOLE), WHOLE / 2);
  const int64_t off = (int64_t)(limit * gradient / WHOLE + root_of(limit)) - (int64_t)limit;
  const int64_t to = (int64_t)limit + (off >= 0 ? off + 4 : off - 4) / 5;
  return (uint32_t)(to < 1 ? 1 : to);
}

/* The upstream refused a call. An overload lasts for a round trip from the turn that answers it: until then calls end that
 * were accepted before, and what is sent for them may be refused again. It lowers the limit by half at most. */
static inline void adaptive_refused(const fshm_adaptive *how, learned_t *w, const fshm_sample *call,
                                    uint64_t now) {
  uint32_t limit = adaptive_clamp(how, learned_limit(w->words[LEARNED_LIMIT]));
  learned_turn_t t = turn_read(w->words[LEARNED_TURN], limit);
  const uint32_t mean = latency_mean(w->words[LEARNED_LATENCY]);
  const uint64_t over = plus_time(t.since, mean ? latency_of(mean) : 0);
  uint64_t at = now;
  if (t.phase == FSHM_PHASE_REFUSED && call->started_ns < over) {
    /* Sent before the turn: one more that the upstream does not take. After it: the turn was too small. */
    const uint32_t less = call->started_ns < t.since ? 1 : curve_step(t.best);
    if (t.best <= t.floor) return;
    t.best = (uint32_t)max_u64(minus(t.best, less), t.floor);
    at = minus(t.since, 1); /* the turn stays when it was */
  } else {
    const uint64_t fewer = call->in_flight ? call->in_flight - 1 : limit;
    t.floor = limit - limit / 2;
    t.best = (uint32_t)max_u64(min_u64(fewer, limit), t.floor);
    t.phase = FSHM_PHASE_REFUSED;
  }
  t.best = adaptive_clamp(how, t.best);
  const uint32_t to = adaptive_clamp(how, minus(t.best, curve_step(t.best)));
  w->words[LEARNED_TURN] = turn_word(&t, at);
  w->words[LEARNED_ROUND] = 0;
  if (to < limit) limit = to;
  w->words[LEARNED_LIMIT] = limit_word_moved(w->words[LEARNED_LIMIT], limit, now);
}

/* A turn that is no refusal: the measuring of the base begins, or ends. */
static inline void adaptive_turn(learned_t *w, unsigned phase, uint32_t best, uint32_t limit,
                                 uint64_t now) {
  const learned_turn_t t = {0, best, 1, phase};
  w->words[LEARNED_TURN] = turn_word(&t, now);
  w->words[LEARNED_ROUND] = 0;
  w->words[LEARNED_LIMIT] = limit_word_moved(w->words[LEARNED_LIMIT], limit, now);
}

/* A round of latencies is over. */
static inline void adaptive_steer(const fshm_adaptive *how, learned_t *w, const learned_turn_t *t,
                                  learned_round_t *r, uint32_t limit, bool used, uint64_t now) {
  const uint32_t mean = latency_mean(w->words[LEARNED_LATENCY]);
  uint32_t base = latency_base(w->words[LEARNED_LATENCY]), to = limit;
  if (!base || t->phase == FSHM_PHASE_MEASURE) base = mean;
  /* A faster upstream is noticed between two measurements, a slower one is not: that may be a queue. */
  if (mean < base) base -= (base - mean + 7) / 8;
  w->words[LEARNED_LATENCY] = latency_word(mean, base, now);
  if (t->phase == FSHM_PHASE_MEASURE) {
    adaptive_turn(w, FSHM_PHASE_STEADY, t->best, adaptive_clamp(how, max_u64(t->best, limit)), now);
    return;
  }
  if (r->rounds >= (t->phase == FSHM_PHASE_START ? FIRST_MEASURE : MEASURE_ROUNDS)) {
    adaptive_turn(w, FSHM_PHASE_MEASURE, limit, adaptive_clamp(how, limit / 2), now);
    return;
  }
  to = steered(how, limit, mean, base);
  if (to > limit) {
    const uint32_t most = grown(t, limit, r->rounds);
    to = !used ? limit : to < most ? to : most;
  }
  w->words[LEARNED_ROUND] = round_word(r, w->words[LEARNED_TURN], now);
  w->words[LEARNED_LIMIT] = limit_word_moved(w->words[LEARNED_LIMIT], adaptive_clamp(how, to), now);
}

/* The upstream served a call. */
static inline void adaptive_served(const fshm_adaptive *how, learned_t *w, const fshm_sample *call,
                                   uint64_t now) {
  const uint32_t limit = adaptive_clamp(how, learned_limit(w->words[LEARNED_LIMIT]));
  const learned_turn_t t = turn_read(w->words[LEARNED_TURN], limit);
  const bool used = 4 * (uint64_t)call->in_flight >= 3 * (uint64_t)limit;
  const bool steers = how->algorithm == FSHM_GRADIENT;
  if (call->started_ns < t.since) return;
  learned_round_t r = round_read(w->words[LEARNED_ROUND], w->words[LEARNED_TURN]);
  if (used || steers) r.calls++;
  const uint64_t latency = w->words[LEARNED_LATENCY];
  const uint32_t nth = steers ? r.calls : 16; /* without rounds of latencies: a mean that forgets */
  w->words[LEARNED_LATENCY] = latency_word(
      latency_add(latency_mean(latency), nth, call->duration_ns), latency_base(latency), now);
  if (!used && !steers) return;
  const bool over = r.calls >= (steers ? max_u64(limit, LEAST_SAMPLES) : limit);
  if (over) {
    r.calls = 0;
    if (r.rounds < MOST_ROUNDS) r.rounds++;
  }
  if (over && steers) {
    adaptive_steer(how, w, &t, &r, limit, used, now);
    return;
  }
  w->words[LEARNED_ROUND] = round_word(&r, w->words[LEARNED_TURN], now);
  const uint32_t to = over ? grown(&t, limit, r.rounds) : limit;
  w->words[LEARNED_LIMIT] = limit_word_moved(w->words[LEARNED_LIMIT], adaptive_clamp(how, to), now);
}

/* What is known after a call. */
static inline void adaptive_next(const fshm_adaptive *how, learned_t *w, const fshm_sample *call,
                                 uint64_t now) {
  if (call->throttled)
    adaptive_refused(how, w, call, now);
  else
    adaptive_served(how, w, call, now);
}

#endif
