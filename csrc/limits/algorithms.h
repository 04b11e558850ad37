/* algorithms.h - the arithmetic of each rate-limit algorithm: (rule, state, now, cost) -> (new state, verdict).
 *
 * Pure: no clock, no memory, no side effect. Every decision on a limit goes through these functions. Any bit pattern
 * is a legal state (a hostile segment may hold it).
 *
 * Time is nanoseconds since the segment's epoch, 1 .. TIME_MAX (4.5 years). Later times saturate: such a key stays
 * denied, and the segment must be made anew. (fshm_now() never returns 0, which means "never".) A state has 64 bits;
 * the two highest say how to read the rest:
 *
 *   0  token bucket   0 (5) | theoretical arrival time (57)
 *   1  window         shift s (5) | end >> s (57 - s) | tokens used (s)
 *   1  token lease    the same; count: tokens left + 1
 *   0  calendar       1 (1) | end (28): minutes since 1970 | tokens used (33)
 *   0  money          0 (1) | 1 (1) | nano-dollars (60); its window is the one of its rule
 *   0  planned        0 (2) | 1 (1) | record (2) | arrival time (49) | record (8): a bucket's (plans.h)
 *   2  sliding        class p (5) | end of the next window >> P (57 - P) | previous (12) | count (P - 12)
 *   3  0 pending      ticket (61): a slot being claimed (hash_table.c)
 *   3  1 permit       held by a process (semaphore.c)
 *
 * The state 0 is "never seen". state_expires() says when a state becomes equal to "never seen"; it needs no limit. (A
 * calendar window ends by the clock on the wall: state_ends() of core/wall.h also takes the segment.)
 * All else is read by the rule that the state was written under, which the slot names (internal.h). If the limits
 * have changed since, rule_convert() expresses the same tokens under the present rule; DESIGN.md, "Limits that
 * change", says when.
 *
 * Sources: GCRA: ITU-T I.371 (virtual scheduling). Sliding window counter, an estimate from two fixed windows:
 * "Counting things, a lot of different things" (Cloudflare, 2017).
 */
#ifndef FSHM_ALGORITHMS_H
#define FSHM_ALGORITHMS_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "../fast_shm.h"
#include "calendar.h"

__extension__ typedef unsigned __int128 wide_t;

#define TIME_BITS 57
#define TIME_MAX ((UINT64_C(1) << TIME_BITS) - 1)
#define TAG(state) ((unsigned)((state) >> 62))
#define PENDING(ticket) ((UINT64_C(6) << 61) | ((ticket) & ((UINT64_C(1) << 61) - 1)))
#define IS_PENDING(state) ((state) >> 61 == 6)
#define IS_PERMIT(state) ((state) >> 61 == 7)
#define IS_CALENDAR(state) ((state) >> 61 == 1)
#define IS_MONEY(state) ((state) >> 60 == 1)
#define IS_PLANNED(state) ((state) >> 59 == 1)
#define MONEY_STATE(amount) (UINT64_C(1) << 60 | (amount))
#define MONEY_OF(state) ((state) & ((UINT64_C(1) << 60) - 1))
#define MONEY_MOST UINT64_C(1000000000000000000) /* 10^9 dollars */
#define MONEY_FOREVER (UINT64_C(1) << 55) /* `per` of a budget that ends never */
#define CALENDAR_COUNT ((UINT64_C(1) << 33) - 1)
#define CALENDAR_END(state) ((state) >> 33 & ((UINT64_C(1) << 28) - 1))
#define NO_STATE UINT64_MAX /* never written: a permit with a number that no permit has */
#define MAX_PERMITS 100000 /* of one key: below 2^17 */
#define WINDOW_MAX_N ((UINT64_C(1) << 31) - 1)
/* Tokens in a token lease: its end is in units of up to 2^24 ns. */
#define TOKEN_LEASE_MOST ((UINT64_C(1) << 24) - 2)
#define BUCKET_MAX_PER (UINT64_C(1) << 55) /* 416 days */
#define SLIDING_MIN_PER (UINT64_C(1) << 14)
#define COARSE UINT64_C(1048576) /* ns; see rule_make */
#define ZONES 64 /* time zones of a segment */
#define PLACES 7 /* of a limiter's rules; 3 bits, the last says that it has none */
#define PLACE_NONE 7

/* A limit, prepared. 64 bytes, stored in the segment as it is (limiter_entry_t); copied out and checked (rule_sane)
 * before use. */
typedef union {
  struct {
    uint32_t kind;
    uint16_t strict; /* calendar: the zone's index */
    uint16_t place; /* the slot of a key in which it counts; PLACE_NONE: of permits */
    uint64_t n, per;
    uint64_t burst;
    uint64_t num, den; /* bucket: emission interval num/den ns */
    uint64_t
        unit; /* bucket: increment of cost 1, ns. money: when the window ends, minutes since 1970 */
    /* bucket: how far the arrival time may be ahead of now for cost 1, ns. money: the lower half of the limit, whose upper
     * half is n - 1 */
    uint64_t room;
  };
  /* Of a calendar, in a copy that is used (calendar_ready()); not in the segment. */
  struct {
    uint64_t head[3];
    uint64_t base; /* what the clock on the wall shows at segment time 0: ns since 1970 */
    uint64_t floor; /* and at least at any time now */
    const zone_t *zone; /* NULL: UTC */
  };
  uint64_t words[8];
} rule_t;

typedef struct {
  uint64_t next; /* the state to swap in, if allowed */
  uint64_t retry; /* ns until allowed; 0 = allowed; UINT64_MAX = never */
  /* bucket: ns; others: tokens (rounded up). For verdict_remaining */
  uint64_t used_before, used_after;
  uint64_t reset; /* ns until all tokens are back, after the call */
} verdict_t;

static inline uint64_t min_u64(uint64_t a, uint64_t b) { return a < b ? a : b; }
static inline uint64_t max_u64(uint64_t a, uint64_t b) { return a > b ? a : b; }
static inline uint64_t minus(uint64_t a, uint64_t b) { return a > b ? a - b : 0; }
static inline uint64_t plus_time(uint64_t a, uint64_t b) {
  return a >= TIME_MAX || b >= TIME_MAX - a ? TIME_MAX : a + b;
}
static inline unsigned bit_length(uint64_t v) { return v ? 64U - (unsigned)__builtin_clzll(v) : 0; }

static inline uint64_t saturate(wide_t v) { return v > UINT64_MAX ? UINT64_MAX : (uint64_t)v; }

/* The class p of a sliding window: 2^P <= per. */
static inline unsigned sliding_class(uint64_t per) {
  unsigned p = bit_length(per) - 1;
  return p > 41 ? 41 : p < 14 ? 14 : p;
}

/* The largest n that this kind can count in `per`. */
static inline uint64_t limit_largest_n(uint32_t kind, uint64_t per) {
  if (kind == FSHM_PERMITS) return MAX_PERMITS;
  if (kind == FSHM_LEASE) return TOKEN_LEASE_MOST;
  if (kind == FSHM_MONEY) return MONEY_MOST;
  if (kind == FSHM_PLANNED) return 1;
  if (kind == FSHM_BUCKET) return per; /* one a nanosecond */
  if (kind == FSHM_WINDOW || kind == FSHM_CALENDAR) return WINDOW_MAX_N;
  if (per < SLIDING_MIN_PER) return 0;
  return (UINT64_C(1) << (sliding_class(per) - 12)) - 1;
}

static inline bool kind_has_period(uint32_t kind) {
  return kind <= FSHM_SLIDING || kind == FSHM_CALENDAR ||
         kind == FSHM_MONEY; /* not of FSHM_PLANNED */
}

static inline bool limit_valid(const fshm_limit *l) {
  if (l->kind == FSHM_PERMITS || l->kind == FSHM_LEASE)
    return l->n >= 1 && l->n <= limit_largest_n(l->kind, 0) && l->per_ns == 0;
  if (l->kind == FSHM_MONEY)
    return l->n >= 1 && l->n <= MONEY_MOST && l->burst >> 28 == 0 && l->strict < ZONES &&
           (calendar_period(l->per_ns) || l->per_ns == MONEY_FOREVER);
  if (l->kind == FSHM_PLANNED) return l->n == 1 && !l->per_ns && !l->burst && !l->strict;
  if (l->kind == FSHM_CALENDAR)
    return l->n >= 1 && l->n <= WINDOW_MAX_N && calendar_period(l->per_ns) && !l->burst &&
           l->strict < ZONES;
  if (l->kind > FSHM_SLIDING || l->per_ns < 1000 || l->per_ns > BUCKET_MAX_PER) return false;
  if (l->kind == FSHM_SLIDING && l->per_ns < SLIDING_MIN_PER) return false;
  if (l->n < 1 || l->n > limit_largest_n(l->kind, l->per_ns)) return false;
  if (l->kind != FSHM_BUCKET) return true;
  if (l->burst < 1 || l->burst > l->n) return false;
  /* an empty bucket must be full again before the end of time */
  uint64_t steps = l->strict ? l->n - l->burst + 1 : l->n;
  return (wide_t)l->burst * (l->per_ns + steps) / steps <= TIME_MAX / 2;
}

/* Make a rule of a valid limit.
 *
 * Bucket. The emission interval is per/n; strict stretches it to a hair over per/(n-burst+1), so that
 * even a closed interval of length `per` holds at most burst + (n-burst) admissions. From 1 ms up
 * (COARSE) it is rounded up to whole nanoseconds once, here: a rate at most a millionth too slow,
 * then all sums are exact, and exactly `burst` fit at one instant whatever their costs. Below 1 ms it stays a
 * fraction and every request is rounded up once (wide_t), whatever its cost; the under 1 ns a request that
 * this loses is less than the time the request itself takes. Either way a request of cost c is admitted
 * iff what was charged before, converted to time and rounded up, leaves (burst - c) * num/den:
 *   sum(cost before) * num/den <= sum(increment before) <= (burst - c) * num/den + interval,
 * hence sum(cost) <= burst + interval / (num/den): never more than the bound.
 *
 * Part of the layout: all libraries of one layout version make the same rule of a limit (rule_genuine). */
static inline rule_t rule_make(const fshm_limit *l) {
  rule_t r = {.words = {0}};
  r.kind = l->kind;
  r.n = l->n;
  r.per = kind_has_period(l->kind) ? l->per_ns : 1000;
  r.den = 1;
  r.num = 1;
  if (l->kind == FSHM_CALENDAR || l->kind == FSHM_MONEY) r.strict = (uint16_t)l->strict;
  if (l->kind == FSHM_MONEY) {
    r.n = (l->n >> 32) + 1;
    r.room = l->n & UINT32_MAX;
    r.unit = l->burst;
  }
  if (l->kind != FSHM_BUCKET) return r;
  r.burst = l->burst;
  r.strict = l->strict != 0;
  uint64_t steps = l->strict ? l->n - l->burst + 1 : l->n;
  if (l->per_ns / steps >= COARSE || (!l->strict && l->per_ns % steps == 0)) {
    r.num = l->strict ? l->per_ns / steps + 1 : (l->per_ns + steps - 1) / steps;
  } else {
    r.num = l->strict ? l->per_ns + 1 : l->per_ns;
    r.den = steps;
  }
  r.unit = (r.num + r.den - 1) / r.den;
  r.room = (uint64_t)((wide_t)(l->burst - 1) * r.num / r.den);
  return r;
}

/* May the arithmetic below use these numbers (no division by zero, no overflow)? What it says
 * of a time zone is checked where it is used (calendar_ready()). */
static inline bool rule_sane(const rule_t *r) {
  return r->kind <= FSHM_PLANNED && r->n && r->num && r->den && r->per >= 1000 &&
         r->per <= BUCKET_MAX_PER && r->burst <= r->n && r->place <= PLACE_NONE &&
         (r->num | r->den | r->unit | r->room | r->n) <= TIME_MAX;
}

/* The limit that a rule was made of. */
static inline uint64_t rule_money(const rule_t *r) { return (r->n - 1) << 32 | r->room; }
static inline fshm_limit rule_limit(const rule_t *r) {
  if (r->kind == FSHM_MONEY)
    return (fshm_limit){rule_money(r), r->per, r->unit, r->kind, r->strict};
  return (fshm_limit){r->n, kind_has_period(r->kind) ? r->per : 0, r->burst, r->kind, r->strict};
}

/* Is it a rule that rule_make() makes of a valid limit? Every published rule is. (Its place comes from
 * limit_changes.c.) */
static inline bool rule_genuine(const rule_t *r) {
  const fshm_limit l = rule_limit(r);
  if (!rule_sane(r) || !limit_valid(&l)) return false;
  rule_t made = rule_make(&l);
  made.place = r->place;
  return !memcmp(made.words, r->words, sizeof made.words);
}

/* A rule of a calendar as it stands in the segment. */
static inline rule_t rule_bare(const rule_t *r) {
  rule_t bare = *r;
  if (r->kind == FSHM_CALENDAR || r->kind == FSHM_MONEY) {
    bare.burst = 0;
    bare.num = bare.den = 1;
  }
  return bare;
}

/* When this state becomes equal to "never seen"; a pending slot never does. Not of a calendar's. */
static inline uint64_t state_expires(uint64_t s) {
  unsigned shift;
  switch (TAG(s)) {
    case FSHM_BUCKET:
      return s & TIME_MAX;
    case FSHM_WINDOW:
      shift = (unsigned)(s >> 57) & 31;
      return ((s & TIME_MAX) >> shift) << shift;
    case FSHM_SLIDING:
      shift = ((unsigned)(s >> 57) & 31) + 10;
      return ((s & TIME_MAX) >> shift) << shift;
    default:
      return UINT64_MAX;
  }
}

/* Can a limit (which is not known here), a claim or a permit have written this state? */
static inline bool state_possible(uint64_t s) {
  unsigned shift = (unsigned)(s >> 57) & 31;
  switch (s ? TAG(s) : 4) {
    case FSHM_BUCKET:
      return s <= TIME_MAX || IS_MONEY(s) || IS_PLANNED(s) ||
             (IS_CALENDAR(s) && CALENDAR_END(s) && (s & CALENDAR_COUNT));
    case FSHM_WINDOW: /* a count of at least 1 */
      return shift >= 1 && state_expires(s) && (s & ((UINT64_C(1) << shift) - 1));
    case FSHM_SLIDING: /* 2^14 <= class; something counted in either window */
      return shift >= 4 && state_expires(s) && (s & ((UINT64_C(1) << (shift + 10)) - 1));
    case FSHM_PERMITS:
      return IS_PENDING(s) || (s >> 44 & 0x1ffff) < MAX_PERMITS; /* semaphore.c: the number */
    default:
      return true; /* never seen */
  }
}

/* token bucket (GCRA) ------------------------------------------------------------------------ */

/* Rounded up once for the request, not once for each token. */
static inline uint64_t bucket_increment(const rule_t *r, uint64_t cost) {
  if (cost == 1) return r->unit;
  wide_t product = (wide_t)cost * r->num;
  if (r->den == 1) return saturate(product);
  return saturate((product + r->den - 1) / r->den);
}

/* A charge (fshm_charged of fast_shm.h), to give some of it back later: the state written, and the numbers of its
 * rule. */
static inline fshm_charged charged_by(const rule_t *r, uint64_t state, uint64_t now,
                                      uint64_t version) {
  bool bucket = r->kind == FSHM_BUCKET;
  return (fshm_charged){state, bucket ? r->num : r->per, bucket ? r->den : 1, now, version};
}
/* Can states of this rule hold the charge? Not if the limit is now of another kind. */
static inline bool charged_alike(const rule_t *r, const fshm_charged *put) {
  const bool calendar = r->kind == FSHM_CALENDAR;
  return TAG(put->state) == (r->kind & 3) && calendar == IS_CALENDAR(put->state) && put->num &&
         put->den;
}

/* The pace of a bucket: 1024ths of a nanosecond for a token to drain, rounded down. */
static inline uint64_t bucket_pace(const rule_t *r) {
  return max_u64(saturate(((wide_t)r->num << 10) / r->den), 1);
}

/* What is left of a bucket's charge that has drained at this pace since, or at its own if that is faster. */
static inline fshm_charged charge_left(const fshm_charged *put, uint64_t pace, uint64_t now) {
  fshm_charged left = *put;
  if (TAG(put->state) != FSHM_BUCKET || IS_CALENDAR(put->state) || !put->den) return left;
  const wide_t own = ((wide_t)(put->num & TIME_MAX) << 10) / put->den; /* 67 bits */
  pace = max_u64(pace, 1);
  if (pace >= own) return left; /* no faster, to a 1024th of a nanosecond */
  const uint64_t since = minus(now, put->at) & TIME_MAX;
  const uint64_t drained = saturate((since * (own + 1) + pace - 1) / pace);
  left.state = plus_time(now, minus(minus(put->state & TIME_MAX, put->at), drained));
  left.at = now;
  return left;
}

/* How far the arrival time may be ahead for this cost; the cost must be at most burst. */
static inline uint64_t bucket_room(const rule_t *r, uint64_t cost) {
  if (cost == 1) return r->room;
  wide_t product = (wide_t)(r->burst - cost) * r->num;
  return saturate(r->den == 1 ? product : product / r->den);
}

/* `at`: the instant of the charge: now, or later for a reservation. Inlined for the same reason as rule_take(), and not
 * by the compiler's choice: that changes with code that has nothing to do with it. */
static inline __attribute__((always_inline)) verdict_t bucket_take(const rule_t *r, uint64_t state,
                                                                   uint64_t now, uint64_t at,
                                                                   uint64_t cost) {
  verdict_t v = {0};
  uint64_t tat = max_u64(state & TIME_MAX, at), increment = bucket_increment(r, cost);
  uint64_t next = plus_time(tat, increment);
  v.used_before = minus(state & TIME_MAX, now);
  v.used_after = next - now;
  v.next = increment ? next : state;
  v.reset = v.used_after;
  /* Too much, or at the end of time: charge nothing. */
  if (cost > r->burst || (next == TIME_MAX && increment)) {
    v.retry = UINT64_MAX;
    return v;
  }
  uint64_t room = bucket_room(r, cost);
  if (tat - at > room) v.retry = at - now + (tat - at - room);
  return v;
}

static inline uint64_t bucket_charge(const rule_t *r, uint64_t state, uint64_t now, uint64_t cost) {
  uint64_t increment = bucket_increment(r, cost);
  if (!increment) return state;
  return plus_time(max_u64(state & TIME_MAX, now), increment);
}

/* put: the charge to undo, or NULL. What has drained of it cannot be given back: later requests have it. If the rate
 * changed since, that is computed in tokens, by the faster of both rates. */
static inline uint64_t bucket_refund(const rule_t *r, uint64_t state, uint64_t now, uint64_t cost,
                                     const fshm_charged *put) {
  uint64_t tat = state & TIME_MAX, back = bucket_increment(r, cost);
  if (put) {
    if (!charged_alike(r, put)) return state;
    uint64_t left = minus(put->state & TIME_MAX, now);
    /* The same tokens at the present rate, rounded down. */
    if (put->num != r->num || put->den != r->den) {
      const bool faster = (wide_t)r->num * put->den < (wide_t)put->num * r->den;
      const uint64_t from = faster ? put->at : now, since = minus(now, from);
      wide_t scaled = (wide_t)minus(put->state & TIME_MAX, from) * put->den;
      wide_t ns = (wide_t)saturate(scaled / put->num) * r->num / r->den;
      ns += (wide_t)(uint64_t)(scaled % put->num) * r->num / put->num / r->den;
      left = minus(saturate(ns), since);
    }
    back = min_u64(back, left);
  }
  return tat > now && back ? max_u64(minus(tat, back), now) : state;
}

/* Nothing that costs before `until`, then one token. This is a maximum, not a sum: of several blocks, in any order,
 * the latest instant counts. */
static inline uint64_t bucket_block(const rule_t *r, uint64_t state, uint64_t until) {
  return max_u64(state & TIME_MAX, plus_time(until, r->room));
}

/* The same tokens in another rule's time, rounded up. */
static inline uint64_t bucket_convert(const rule_t *r, const rule_t *old, uint64_t state,
                                      uint64_t now) {
  uint64_t tat = state & TIME_MAX;
  if (tat <= now || (r->num == old->num && r->den == old->den)) return state;
  /* tokens = (tat - now) * den/num of old; new ns = tokens * num/den of new; whole tokens and the
   * part of one apart, so that nothing overflows; each rounded up. */
  wide_t scaled = (wide_t)(tat - now) * old->den;
  uint64_t whole = saturate(scaled / old->num), part = (uint64_t)(scaled % old->num);
  wide_t ns = ((wide_t)whole * r->num + r->den - 1) / r->den;
  if (part) {
    wide_t fine = ((wide_t)part * r->num + old->num - 1) / old->num;
    ns += (fine + r->den - 1) / r->den;
  }
  return plus_time(now, saturate(ns));
}

/* window: begins at the first hit ------------------------------------------------------------- */

/* A window's state. `count`: all tokens charged, less those given back. `end`: the end, including debt. Debt is what
 * exceeds the n of the state's rule. It is waited out at the window's own pace: the full window lasts per/n longer
 * for each token of debt. The tokens, and the end without debt, do not depend on later changes of the limits. */
typedef struct {
  uint64_t end, count; /* end 0 = no window open */
  unsigned shift; /* s: the end is kept in units of 2^s ns; 0 = not kept yet */
} window_t;

static inline __attribute__((always_inline)) window_t window_read(uint64_t state, uint64_t now) {
  unsigned s = (unsigned)(state >> 57) & 31;
  window_t w = {state_expires(state), state & ((UINT64_C(1) << s) - 1), s};
  if (TAG(state) != FSHM_WINDOW || w.end <= now) w = (window_t){0, 0, 0};
  return w;
}

/* How much longer the window lasts for its debt, in units of 2^s ns, rounded up, so that the end without debt can be
 * read back exactly. */
static inline uint64_t window_debt(const rule_t *r, uint64_t count, unsigned s) {
  if (count <= r->n) return 0;
  const wide_t unit = UINT64_C(1) << s;
  wide_t ns = ((wide_t)(count - r->n) * r->per + r->n - 1) / r->n;
  return saturate((ns + unit - 1) & ~(unit - 1));
}

/* The same, with the end without debt, under the rule that the state was written under. */
static inline window_t window_open(const rule_t *r, uint64_t state, uint64_t now) {
  window_t w = window_read(state, now);
  w.end = minus(w.end, window_debt(r, w.count, (unsigned)(state >> 57) & 31));
  return w;
}

/* The state of a window with this end without debt. Ends are kept in units of 2^s ns, rounded up; s is the number of
 * bits of n when the window begins, or more if the count needs them. So a window may last up to 2 * max(n, count) ns
 * longer than `per`, never shorter. The units stay, so they say how far the end can have moved since the window
 * began. Tokens beyond WINDOW_MAX_N, and debt that would end after the end of time, are not counted. */
static inline uint64_t window_state(const rule_t *r, window_t w) {
  uint64_t count = min_u64(w.count, WINDOW_MAX_N);
  if (!count) return 0;
  unsigned s = w.shift ? w.shift : bit_length(r->n), least = bit_length(count);
  s = s < least ? least : s > 31 ? 31 : s;
  const uint64_t unit = UINT64_C(1) << s, last = TIME_MAX & ~(unit - 1);
  uint64_t end = min_u64((w.end + unit - 1) & ~(unit - 1), last), debt = window_debt(r, count, s);
  if (debt > last - end) {
    count = r->n + (uint64_t)((wide_t)(last - end) * r->n / r->per);
    debt = window_debt(r, count, s);
  }
  return ((uint64_t)FSHM_WINDOW << 62) | ((uint64_t)s << 57) | (end + debt) | count;
}

static inline verdict_t window_take(const rule_t *r, uint64_t state, uint64_t now, uint64_t cost) {
  window_t w = window_read(state, now);
  verdict_t v = {state, 0, w.count, w.count, minus(w.end, now)};
  if (cost > r->n) {
    v.retry = UINT64_MAX;
  } else if (cost > minus(r->n, w.count)) {
    v.retry = w.end - now;
  } else if (cost) { /* then there is no debt */
    w.count += cost;
    if (!w.end) w.end = plus_time(now, r->per);
    v.used_after = w.count;
    v.next = window_state(r, w);
    v.reset = minus(state_expires(v.next), now);
    if (!v.reset) v.retry = UINT64_MAX; /* the end of time: a window that cannot be kept */
  }
  return v;
}

/* For limits that come with the call: the end is kept as exactly as the count allows, not as n allows: a count
 * without a limit (n = 2^31 - 1) would have its end in units of 2 s. Each time the count needs one bit more, the end
 * is rounded up anew: in all by less than 2^(s + 1) <= max(512, 4 * count) ns. */
static inline verdict_t window_count(const rule_t *r, uint64_t state, uint64_t now, uint64_t cost) {
  rule_t fine = *r;
  uint64_t total = window_read(state, now).count;
  if (cost > minus(r->n, total)) return window_take(r, state, now, cost);
  total = max_u64(total + cost, 255);
  fine.n = (UINT64_C(1) << bit_length(total)) - 1;
  return window_take(&fine, state, now, cost);
}

static inline uint64_t window_charge(const rule_t *r, uint64_t state, uint64_t now, uint64_t cost) {
  if (!cost) return state;
  window_t w = window_open(r, state, now);
  if (!w.count) w.end = plus_time(now, r->per);
  w.count += min_u64(cost, WINDOW_MAX_N);
  return window_state(r, w);
}

/* put: the charge to undo, or NULL. It was no debt, so its end is that of its window. Nothing is given back once
 * another window has begun. */
static inline uint64_t window_refund(const rule_t *r, uint64_t state, uint64_t now, uint64_t cost,
                                     const fshm_charged *put) {
  window_t w = window_open(r, state, now);
  if (!w.count || !cost) return state;
  if (put) {
    /* The end has moved by less than two of its units in all; a later window ends at least `per` later. */
    uint64_t unit = UINT64_C(2) << w.shift, its = state_expires(put->state);
    if (!charged_alike(r, put) || w.end < its || w.end - its > unit) return state;
  }
  w.count = minus(w.count, cost);
  return window_state(r, w);
}

/* sliding counter ----------------------------------------------------------------------------- */

typedef struct {
  uint64_t index; /* now / per */
  uint64_t previous, count;
  uint64_t left; /* per - (time since the window began): the weight of previous, 1..per */
} sliding_t;

/* previous is kept with 8 significant bits, rounded up: exact to 255, at most 0.8 % over beyond. */
static inline uint64_t float12_up(uint64_t v) {
  if (v < 128) return v;
  unsigned shift = bit_length(v) - 8;
  uint64_t m = (v + (UINT64_C(1) << shift) - 1) >> shift;
  if (m > 255) {
    m >>= 1;
    shift++;
  }
  return shift + 1 > 31 ? 4095 : ((uint64_t)(shift + 1) << 7) | (m & 127);
}
static inline uint64_t float12_read(uint64_t f) {
  uint64_t e = (f >> 7) & 31, m = f & 127;
  return e ? (128 + m) << (e - 1) : m;
}

static inline sliding_t sliding_read(const rule_t *r, uint64_t state, uint64_t now) {
  sliding_t s = {now / r->per, 0, 0, 0};
  s.left = r->per - now % r->per;
  uint64_t gone = state_expires(state);
  if (TAG(state) != FSHM_SLIDING || gone <= now) return s;
  unsigned p = ((unsigned)(state >> 57) & 31) + 10, count_bits = p > 12 ? p - 12 : 0;
  uint64_t count = state & ((UINT64_C(1) << count_bits) - 1);
  uint64_t previous = float12_read((state >> count_bits) & 4095);
  uint64_t unit = UINT64_C(1) << p, index = gone / r->per; /* exact: 2^P <= per, see DESIGN.md */
  index = index > 2 ? index - 2 : 0;
  wide_t end = ((wide_t)(index + 2) * r->per + unit - 1) & ~(wide_t)(unit - 1);
  if (p != sliding_class(r->per) || gone != end || index > s.index + 1) {
    s.count = count + previous; /* no call has written this: all of it counts as recent */
    return s;
  }
  if (index > s.index) { /* written by a clock ahead of ours: treated as the start of its window */
    s.index = index;
    s.left = r->per;
  }
  if (index == s.index) {
    s.count = count;
    s.previous = previous;
  } else if (index + 1 == s.index) {
    s.previous = count;
  }
  return s;
}

/* Is `now` old? True if the state's window begins more than one window after that of `now`: the caller was stopped
 * since it read the clock, and must read it again. */
static inline bool sliding_is_later(const rule_t *r, uint64_t state, uint64_t now) {
  return TAG(state) == FSHM_SLIDING && state_expires(state) > now + 3 * r->per;
}

static inline uint64_t sliding_state(const rule_t *r, sliding_t s) {
  unsigned p = sliding_class(r->per), count_bits = p - 12;
  if (!s.count && !s.previous) return 0;
  uint64_t gone = min_u64(saturate((wide_t)(s.index + 2) * r->per), TIME_MAX);
  uint64_t unit = UINT64_C(1) << p;
  gone = min_u64((gone + unit - 1) & ~(unit - 1), TIME_MAX & ~(unit - 1));
  return ((uint64_t)FSHM_SLIDING << 62) | ((uint64_t)(p - 10) << 57) | gone |
         (float12_up(s.previous) << count_bits) | min_u64(s.count, (UINT64_C(1) << count_bits) - 1);
}

/* previous * left / per, rounded up */
static inline uint64_t sliding_weight(const rule_t *r, uint64_t previous, uint64_t left) {
  return previous ? (uint64_t)(((wide_t)previous * left + r->per - 1) / r->per) : 0;
}

/* Least time into a window at which `full` tokens of the window before leave room for `cost`. */
static inline uint64_t sliding_room_at(const rule_t *r, uint64_t full, uint64_t room) {
  if (full <= room) return 0;
  return r->per - (uint64_t)((wide_t)room * r->per / full);
}

static inline void sliding_add(const rule_t *r, sliding_t *s, uint64_t cost, verdict_t *v) {
  s->count += cost;
  v->used_after = v->used_before + cost;
  v->next = sliding_state(r, *s);
  if (state_expires(v->next) < (wide_t)(s->index + 2) * r->per)
    v->retry = UINT64_MAX; /* the end of time: the state would be read as another window's */
}

static inline verdict_t sliding_take(const rule_t *r, uint64_t state, uint64_t now, uint64_t cost) {
  sliding_t s = sliding_read(r, state, now);
  uint64_t used = s.count + sliding_weight(r, s.previous, s.left);
  verdict_t v = {state, 0, used, used, 0};
  uint64_t window_end = plus_time(now, s.left);
  if (cost > r->n) {
    v.retry = UINT64_MAX;
  } else if (cost > minus(r->n, used)) {
    uint64_t begun = minus(window_end, r->per);
    if (s.count + cost <= r->n) /* in this window, as the one before it fades */
      v.retry = minus(begun + sliding_room_at(r, s.previous, r->n - s.count - cost), now);
    else /* in the next window, as this one fades; in debt, at the latest at its end */
      v.retry = minus(window_end, now) + sliding_room_at(r, s.count, r->n - cost);
    if (!v.retry) v.retry = 1;
  } else if (cost) {
    sliding_add(r, &s, cost, &v);
  }
  if (s.count)
    v.reset = minus(plus_time(window_end, r->per), now);
  else if (s.previous)
    v.reset = minus(window_end, now);
  return v;
}

/* For limits that come with the call: the estimate is rounded down, as in PyPI's `limits`. */
static inline verdict_t sliding_count(const rule_t *r, uint64_t state, uint64_t now,
                                      uint64_t cost) {
  sliding_t s = sliding_read(r, state, now);
  uint64_t used = s.count + (uint64_t)((wide_t)s.previous * s.left / r->per);
  verdict_t v = {state, 0, used, used, 0};
  if (cost > minus(r->n, used)) {
    v.retry = UINT64_MAX; /* the caller computes the time from the counts */
  } else if (cost) {
    sliding_add(r, &s, cost, &v);
  }
  return v;
}

static inline uint64_t sliding_charge(const rule_t *r, uint64_t state, uint64_t now,
                                      uint64_t cost) {
  if (!cost) return state;
  sliding_t s = sliding_read(r, state, now);
  s.count = cost > (UINT64_C(1) << 40) ? cost >> 1 : s.count + cost; /* saturates when stored */
  return sliding_state(r, s);
}

/* put: the charge to undo, or NULL. It is taken from the window that it was charged to. If `per` changed since, its
 * present weight in its own windows is given back. */
static inline uint64_t sliding_refund(const rule_t *r, uint64_t state, uint64_t now, uint64_t cost,
                                      const fshm_charged *put) {
  sliding_t s = sliding_read(r, state, now);
  uint64_t charged = s.index, rest = cost;
  if (put) {
    if (!charged_alike(r, put)) return state;
    charged = minus(state_expires(put->state) / put->num, 2);
    if (put->num != r->per) {
      uint64_t index = now / put->num, left = put->num - now % put->num;
      if (index > charged + 1) return state;
      if (index == charged + 1) rest = (uint64_t)((wide_t)cost * left / put->num);
      charged = s.index;
    }
  }
  if (charged == s.index) {
    cost = rest;
    rest = put ? 0 : minus(cost, s.count);
    s.count = minus(s.count, cost);
  } else if (charged + 1 != s.index) {
    rest = 0;
  }
  s.previous = minus(s.previous, rest);
  return sliding_state(r, s);
}

/* token lease -------------------------------------------------------------------------------------- */

/* Tokens granted to this host, to be spent until the end. A state is a window's, with left + 1 as its count, so that
 * an empty lease still has the size of its batch; the end is rounded down. Spending keeps the shift: with the count
 * it says when a new batch is due. */
static __attribute__((noinline)) uint64_t token_lease_left(uint64_t state, uint64_t now) {
  return minus(window_read(state, now).count, 1);
}

static inline uint64_t token_lease_state(uint64_t end, uint64_t left) {
  uint64_t count = min_u64(left, TOKEN_LEASE_MOST) + 1;
  unsigned s = bit_length(count);
  end = min_u64(end, TIME_MAX) >> s << s;
  return end ? ((uint64_t)FSHM_WINDOW << 62) | ((uint64_t)s << 57) | end | count : 0;
}

static inline verdict_t token_lease_take(const rule_t *r, uint64_t state, uint64_t now,
                                         uint64_t cost) {
  uint64_t left = token_lease_left(state, now), used = minus(r->n, left);
  uint64_t spent = cost > left ? 0 : cost;
  /* The count is in the lowest bits, and larger than the cost. retry: only the server knows it. */
  return (verdict_t){state - spent, cost > left, used, used + spent,
                     minus(state_expires(state), now)};
}

/* A new batch is due if this call brings the tokens left below a quarter of 2^s, s the shift. */
static inline bool token_lease_low(uint64_t state, uint64_t cost) {
  unsigned s = (unsigned)(state >> 57) & 31;
  uint64_t left = minus(state & ((UINT64_C(1) << s) - 1), 1), line = (UINT64_C(1) << s) / 4;
  return s > 3 && left < line && left + cost >= line;
}

/* kept: as fshm_token_lease. */
static inline uint64_t token_lease_put(uint64_t state, uint64_t now, uint64_t tokens, uint64_t kept,
                                       uint64_t end) {
  window_t w = window_read(state, now);
  uint64_t left = minus(w.count, 1);
  if (left > kept) end = min_u64(end, w.end);
  if (end <= now) return state;
  return token_lease_state(end, left > TOKEN_LEASE_MOST - min_u64(tokens, TOKEN_LEASE_MOST)
                                    ? TOKEN_LEASE_MOST
                                    : left + tokens);
}

/* Undo a charge: the lease that it was taken from counts. */
static inline uint64_t token_lease_refund(uint64_t state, uint64_t now, uint64_t cost,
                                          const fshm_charged *put) {
  return cost && put ? token_lease_put(state, now, cost, 0, state_expires(put->state)) : state;
}

/* calendar ------------------------------------------------------------------------------------ */

/* A window of the calendar. Its end is told by the clock on the wall, so it is exact, and follows each step of that
 * clock. Debt ends with the window: the next one is whole. The rule is a copy that calendar_ready() has prepared. */
typedef struct {
  uint64_t end, count; /* end: minutes since 1970; 0 = no window open */
} dated_t;

/* The wall clock, ns since 1970. It never goes back: wall.c. */
static inline uint64_t calendar_wall(const rule_t *r, uint64_t now) {
  return max_u64(now + r->base, r->floor);
}
/* The segment time at which the wall clock shows this minute. (Of one that it has shown: a time that is over.) */
static inline uint64_t calendar_instant(const rule_t *r, uint64_t minute) {
  const uint64_t wall = minute * MINUTE; /* 28 bits * 36 bits */
  return wall <= r->floor ? 0 : min_u64(minus(wall, r->base), TIME_MAX);
}
static inline uint64_t calendar_minute(const rule_t *r, uint64_t now) {
  return calendar_wall(r, now) / MINUTE;
}
static inline uint64_t calendar_ends(const rule_t *r, uint64_t now) {
  return calendar_end(r->per, r->zone, calendar_minute(r, now));
}

static inline dated_t calendar_read(const rule_t *r, uint64_t state, uint64_t now) {
  dated_t w = {CALENDAR_END(state), state & CALENDAR_COUNT};
  const uint64_t minute = calendar_minute(r, now);
  if (!IS_CALENDAR(state) || w.end <= minute) return (dated_t){0, 0};
  /* Longer than any window: it was written while the clock was ahead by more than a day (wall.c). */
  if (w.end > minute + CALENDAR_MOST) w.end = calendar_ends(r, now);
  return w;
}

static inline uint64_t calendar_state(dated_t w) {
  const uint64_t most = (UINT64_C(1) << 28) - 1;
  if (!w.count) return 0;
  return UINT64_C(1) << 61 | min_u64(w.end, most) << 33 | min_u64(w.count, CALENDAR_COUNT);
}

static inline uint64_t calendar_left(const rule_t *r, uint64_t end, uint64_t now) {
  return end ? minus(calendar_instant(r, end), now) : 0; /* longer, while the clock stands still */
}

static __attribute__((noinline)) verdict_t calendar_take(const rule_t *r, uint64_t state,
                                                         uint64_t now, uint64_t cost) {
  dated_t w = calendar_read(r, state, now);
  verdict_t v = {state, 0, w.count, w.count, calendar_left(r, w.end, now)};
  if (cost > r->n) {
    v.retry = UINT64_MAX;
  } else if (cost > minus(r->n, w.count)) {
    v.retry = v.reset;
  } else if (cost) {
    if (!w.end) w.end = calendar_ends(r, now);
    w.count += cost;
    v.used_after = w.count;
    v.next = calendar_state(w);
    v.reset = calendar_left(r, w.end, now);
  }
  return v;
}

static inline uint64_t calendar_charge(const rule_t *r, uint64_t state, uint64_t now,
                                       uint64_t cost) {
  if (!cost) return state;
  dated_t w = calendar_read(r, state, now);
  if (!w.end) w.end = calendar_ends(r, now);
  w.count += min_u64(cost, CALENDAR_COUNT);
  return calendar_state(w);
}

/* put: the charge to undo, or NULL. Nothing is given back once another window has begun. */
static inline uint64_t calendar_refund(const rule_t *r, uint64_t state, uint64_t now, uint64_t cost,
                                       const fshm_charged *put) {
  dated_t w = calendar_read(r, state, now);
  if (!w.count || !cost) return state;
  if (put && (!charged_alike(r, put) || CALENDAR_END(put->state) != w.end)) return state;
  w.count = minus(w.count, cost);
  return calendar_state(w);
}

/* any kind ------------------------------------------------------------------------------------ */

/* A state of another kind than the rule's (or a pending one) is read as "never seen". */
static inline bool state_is_of(const rule_t *r, uint64_t state) {
  if (r->kind == FSHM_BUCKET) return !(state >> TIME_BITS);
  if (r->kind == FSHM_MONEY) return IS_MONEY(state);
  if (r->kind == FSHM_CALENDAR) return IS_CALENDAR(state);
  return TAG(state) == (r->kind & 3); /* a token lease is a window */
}
static inline uint64_t state_for(const rule_t *r, uint64_t state) {
  return state_is_of(r, state) ? state : 0;
}

/* Inline: with several limits, a function call for each costs more than the arithmetic (35 instructions each). */
static inline __attribute__((always_inline)) verdict_t rule_take(const rule_t *r, uint64_t state,
                                                                 uint64_t now, uint64_t at,
                                                                 uint64_t cost) {
  state = state_for(r, state);
  if (r->kind == FSHM_BUCKET) return bucket_take(r, state, now, at, cost);
  if (r->kind == FSHM_WINDOW) return window_take(r, state, now, cost);
  if (r->kind == FSHM_LEASE) return token_lease_take(r, state, now, cost);
  if (r->kind == FSHM_CALENDAR) return calendar_take(r, state, now, cost);
  return sliding_take(r, state, now, cost);
}

static inline uint64_t rule_charge(const rule_t *r, uint64_t state, uint64_t now, uint64_t cost) {
  state = state_for(r, state);
  if (r->kind == FSHM_BUCKET) return bucket_charge(r, state, now, cost);
  if (r->kind == FSHM_WINDOW) return window_charge(r, state, now, cost);
  if (r->kind == FSHM_LEASE) return state - min_u64(token_lease_left(state, now), cost);
  if (r->kind == FSHM_CALENDAR) return calendar_charge(r, state, now, cost);
  return sliding_charge(r, state, now, cost);
}

static inline uint64_t rule_refund(const rule_t *r, uint64_t state, uint64_t now, uint64_t cost,
                                   const fshm_charged *put) {
  state = state_for(r, state);
  if (r->kind == FSHM_BUCKET) return bucket_refund(r, state, now, cost, put);
  if (r->kind == FSHM_WINDOW) return window_refund(r, state, now, cost, put);
  if (r->kind == FSHM_LEASE) return token_lease_refund(state, now, cost, put);
  if (r->kind == FSHM_CALENDAR) return calendar_refund(r, state, now, cost, put);
  return sliding_refund(r, state, now, cost, put);
}

/* The most tokens that the limit admits at one instant. */
static inline uint64_t rule_capacity(const rule_t *r) {
  return r->kind == FSHM_BUCKET ? r->burst : r->n;
}

/* The same limit with another capacity, at its own pace. */
static inline rule_t rule_capped(const rule_t *r, uint64_t capacity) {
  rule_t capped = *r;
  capped.n = capacity;
  if (r->kind != FSHM_BUCKET) return capped;
  capped.burst = capacity;
  capped.room = saturate((wide_t)(capacity - 1) * r->num / r->den);
  return capped;
}

/* Tokens used, rounded up. */
static inline uint64_t rule_used(const rule_t *r, uint64_t state, uint64_t now) {
  state = state_for(r, state);
  if (r->kind == FSHM_BUCKET)
    return saturate(((wide_t)minus(state & TIME_MAX, now) * r->den + r->num - 1) / r->num);
  if (r->kind == FSHM_CALENDAR) return calendar_read(r, state, now).count;
  if (r->kind != FSHM_SLIDING) return window_read(state, now).count;
  sliding_t s = sliding_read(r, state, now);
  return s.count + sliding_weight(r, s.previous, s.left);
}

/* A state of a window that has just begun, or of a sliding one, with so many tokens. */
static inline uint64_t rule_begun(const rule_t *r, uint64_t used, uint64_t now) {
  if (r->kind == FSHM_WINDOW) return window_state(r, (window_t){plus_time(now, r->per), used, 0});
  if (r->kind == FSHM_CALENDAR) return calendar_charge(r, 0, now, used);
  sliding_t s = sliding_read(r, 0, now);
  s.count = used;
  return sliding_state(r, s);
}

/* When a state of the rule becomes equal to "never seen". */
static inline uint64_t rule_ends(const rule_t *r, uint64_t state) {
  if (IS_MONEY(state)) return r->kind == FSHM_MONEY ? calendar_instant(r, r->unit) : 0;
  if (!IS_CALENDAR(state)) return state_expires(state);
  return r->kind == FSHM_CALENDAR ? calendar_instant(r, CALENDAR_END(state)) : 0;
}

/* After a change of the limits: the state under `r` with the same tokens as `state` under `old`. NO_STATE: `r`
 * cannot hold so many (more than it admits). */
static inline uint64_t rule_convert(const rule_t *r, const rule_t *old, uint64_t state,
                                    uint64_t now) {
  if (r->kind == FSHM_MONEY || old->kind == FSHM_MONEY)
    return r->kind == old->kind ? state_for(r, state) : 0;
  /* Tokens left say nothing about tokens used. */
  if (r->kind == FSHM_LEASE || old->kind == FSHM_LEASE)
    return r->kind == old->kind ? state_for(r, state) : 0;
  state = state_for(old, state);
  if (!state || rule_ends(old, state) <= now) return 0;
  if (r->kind == FSHM_CALENDAR && old->kind == FSHM_CALENDAR) return state;
  /* A window that goes on to its end, though the next one begins elsewhere. */
  if (r->kind == FSHM_CALENDAR && old->kind == FSHM_WINDOW) {
    const window_t w = window_open(old, state, now);
    const uint64_t left = (w.end > now ? w.end : state_expires(state)) - now;
    return calendar_state((dated_t){(calendar_wall(r, now) + left + MINUTE - 1) / MINUTE, w.count});
  }
  if (r->kind == FSHM_WINDOW && old->kind == FSHM_CALENDAR) {
    const dated_t w = calendar_read(old, state, now);
    return window_state(r, (window_t){plus_time(now, calendar_left(old, w.end, now)), w.count, 0});
  }
  if (r->kind == old->kind) {
    if (r->kind == FSHM_BUCKET) return bucket_convert(r, old, state, now);
    if (r->kind == FSHM_WINDOW) return window_state(r, window_open(old, state, now));
    if (r->per == old->per) return state;
  }
  uint64_t used = rule_used(old, state, now);
  if (r->kind != FSHM_BUCKET && used > limit_largest_n(r->kind, r->per)) return NO_STATE;
  return r->kind == FSHM_BUCKET ? plus_time(now, bucket_increment(r, used))
                                : rule_begun(r, used, now);
}

/* When all tokens of a state are back. (state_expires() rounds the end of a sliding window up, by up to `per`.) */
static inline uint64_t rule_over(const rule_t *r, uint64_t state) {
  if (IS_CALENDAR(state) || IS_MONEY(state)) return rule_ends(r, state);
  uint64_t expires = state_expires(state);
  return TAG(state) == FSHM_SLIDING && r->kind == FSHM_SLIDING ? expires / r->per * r->per
                                                               : expires;
}

/* Should a state of `old` go on under `r`? If the tokens used fit, or end no later: so old use never becomes debt.
 * Else it stays under its own rule. DESIGN.md, "Limits that change". */
static inline bool rule_settles(const rule_t *r, const rule_t *old, uint64_t state, uint64_t now,
                                uint64_t *converted) {
  *converted = rule_convert(r, old, state, now);
  return rule_used(old, state, now) <= rule_capacity(r) ||
         rule_over(r, *converted) <= rule_over(old, state);
}

/* The tokens that fit now, given the tokens used (verdict_t.used_*). */
static inline uint64_t verdict_remaining(const rule_t *r, uint64_t used) {
  if (r->kind != FSHM_BUCKET) return minus(r->n, used);
  if (!used) return r->burst;
  if (r->den == 1) return minus(r->burst, (used - 1) / r->num + 1);
  return minus(r->burst, saturate(((wide_t)used * r->den + r->num - 1) / r->num));
}

#endif
