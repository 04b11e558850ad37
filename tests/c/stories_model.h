/* stories_model.h - what is consumed of a limit whose numbers and kind change, by counting tokens.
 *
 * A reference for test_stories.c: plain sums, no bit fields, no versions. What the library promises leaves some
 * things open: by how many nanoseconds an end is rounded up, and whether a denial, or the change itself, already
 * brings what was used under the new limits, where it would be over sooner. So the reference keeps all the states that are possible;
 * each answer of the library leaves those that explain it. An answer that none explains is a fault.
 *
 * The rules. v: the limits under which a state was written; c: those in force now.
 * - Admitted under c if what is used, in tokens, and the cost fit c. From then on the state is one under c.
 * - A cost of 0 is denied by a bucket of which more than its burst is used, and by nothing else. Either way the state
 *   is as after a denial.
 * - Otherwise (denied, charged or given back) it becomes one under c only where it is over sooner under c; else
 *   it stays one under v. So a change makes no debt of old use, and forgets none.
 * - A charge to a bucket of which no more than c's burst is used makes it one under c, too.
 * - Of another kind (or sliding with another `per`): what is used counts as of now under c. */
#ifndef STORIES_MODEL_H
#define STORIES_MODEL_H

#define MOST_STATES 16
#define NOTHING 7U /* the kind of a state: nothing is consumed */
#define SLIDING_EXACT 255 /* a window before that has more is kept with 8 significant bits */
#define TOO_LATE (UINT64_C(1) << 56) /* no story goes on so long that the end of time matters */
#define TOO_LONG \
  (1LL << 50) /* ns that a bucket takes to flow back: exact where a real_t has 53 bits (valgrind) */

typedef long double real_t;

static real_t larger(real_t a, real_t b) { return a > b ? a : b; }
static real_t smaller_of(real_t a, real_t b) { return a < b ? a : b; }
static uint64_t ceiling(real_t a) { return (uint64_t)a + ((real_t)(uint64_t)a < a); }

typedef struct {
  fshm_limit label; /* v */
  uint32_t kind;
  real_t low, high; /* bucket: tokens used `at`: between these */
  uint64_t at;
  uint64_t total, end, late; /* window: tokens used; its end without debt is between these */
  uint64_t index, previous, count; /* sliding */
  uint64_t serial; /* window: of those that have begun */
} state_t;

typedef struct {
  state_t all[MOST_STATES];
  int n;
} states_t;

static bool gave_up; /* this story leads beyond what the reference can follow */
static uint64_t serials;

static void copy_states(const states_t *from, states_t *to) {
  to->n = from->n;
  memcpy(to->all, from->all, (size_t)from->n * sizeof *from->all);
}

static bool same_limit(const fshm_limit *a, const fshm_limit *b) {
  return a->kind == b->kind && a->n == b->n && a->per_ns == b->per_ns && a->burst == b->burst &&
         a->strict == b->strict;
}

static uint64_t capacity_of(const fshm_limit *l) {
  return l->kind == FSHM_BUCKET ? l->burst : l->n;
}

/* ns for a token to flow back; at the least, and as it is where it is rounded up to whole nanoseconds */
static real_t interval_of(const fshm_limit *l) {
  return (real_t)l->per_ns / (real_t)(l->strict ? l->n - l->burst + 1 : l->n);
}
static bool is_coarse(const fshm_limit *l) { return interval_of(l) >= (1 << 20) - 1; }
static real_t slow_interval_of(const fshm_limit *l) {
  return interval_of(l) + (l->strict || is_coarse(l) ? 1 : 0);
}
/* Tokens that flow back in so many nanoseconds, which roundings may take or give. */
static real_t within(const fshm_limit *l, unsigned ns) {
  return (real_t)ns / interval_of(l) + 1e-12L;
}

static uint64_t debt_of(uint64_t total, const fshm_limit *l) {
  if (total <= l->n) return 0;
  wide_t ns = ((wide_t)(total - l->n) * l->per_ns + l->n - 1) / l->n;
  if (ns > TOO_LATE) gave_up = true;
  return (uint64_t)ns;
}
static uint64_t rounding_of(uint64_t total, const fshm_limit *l) {
  return UINT64_C(2) << bit_length(max_u64(total, l->n));
}

static void add_state(states_t *out, const state_t *s) {
  if (s->kind == FSHM_BUCKET) gave_up |= s->high * slow_interval_of(&s->label) > (real_t)TOO_LONG;
  for (int i = 0; i < out->n; i++) {
    const state_t *o = &out->all[i];
    if (o->kind == s->kind && same_limit(&o->label, &s->label) && o->low == s->low &&
        o->high == s->high && o->total == s->total && o->end == s->end && o->late == s->late &&
        o->index == s->index && o->previous == s->previous && o->count == s->count &&
        o->serial == s->serial)
      return;
  }
  if (out->n == MOST_STATES)
    gave_up = true;
  else
    out->all[out->n++] = *s;
}

static state_t nothing_used(void) { return (state_t){.kind = NOTHING}; }

/* So much is used, as of now. */
static state_t used_now(const fshm_limit *c, uint64_t tokens, uint64_t now) {
  state_t s = {.label = *c, .kind = c->kind, .at = now};
  if (!tokens) return nothing_used();
  if (c->kind == FSHM_BUCKET) {
    s.low = (real_t)tokens;
    s.high = s.low + (is_coarse(c) ? 0 : within(c, 2)); /* rounded up to a nanosecond */
  } else if (c->kind == FSHM_WINDOW) {
    s.total = tokens;
    s.end = now + c->per_ns;
    s.late = s.end + rounding_of(tokens, c);
    s.serial = ++serials;
  } else {
    s.index = now / c->per_ns;
    s.count = tokens;
  }
  return s;
}

/* As time goes by. Where a rounding decides whether a window is over, both. */
static void pass_time(const states_t *in, uint64_t now, states_t *out) {
  out->n = 0;
  for (int i = 0; i < in->n; i++) {
    state_t s = in->all[i], none = nothing_used();
    if (s.kind == FSHM_BUCKET) {
      real_t ns = (real_t)(now - s.at);
      s.low = larger(0, s.low - ns / interval_of(&s.label));
      s.high = larger(0, s.high - ns / slow_interval_of(&s.label));
      s.at = now;
      if (s.high == 0) s = none;
    } else if (s.kind == FSHM_WINDOW) {
      uint64_t debt = debt_of(s.total, &s.label);
      if (!s.total || now >= s.late + debt)
        s = none;
      else if (now >= s.end + debt)
        add_state(out, &none);
    } else if (s.kind == FSHM_SLIDING) {
      uint64_t index = now / s.label.per_ns;
      if (index > s.index) {
        s.previous = index == s.index + 1 ? s.count : 0;
        s.count = 0;
        s.index = index;
        gave_up |= s.previous > SLIDING_EXACT;
      }
      if (!s.count && !s.previous) s = none;
    }
    add_state(out, &s);
  }
}

static uint64_t sliding_used(const state_t *s, uint64_t now) {
  uint64_t per = s->label.per_ns, left = per - now % per;
  return s->count + (uint64_t)(((wide_t)s->previous * left + per - 1) / per);
}

/* Whole tokens that are used: low..high. */
static void used_of(const state_t *s, uint64_t now, uint64_t *low, uint64_t *high) {
  *low = *high = 0;
  if (s->kind == FSHM_WINDOW) *low = *high = s->total;
  if (s->kind == FSHM_SLIDING) *low = *high = sliding_used(s, now);
  if (s->kind != FSHM_BUCKET) return;
  *low = ceiling(larger(0, s->low - within(&s->label, 8)));
  *high = ceiling(s->high + within(&s->label, 8));
}

/* Is it one state under both, whose numbers go on? */
static bool goes_on(const state_t *s, const fshm_limit *c) {
  return s->kind == c->kind && (s->kind != FSHM_SLIDING || s->label.per_ns == c->per_ns);
}

/* For how many ns from now, if nothing else happens: low..high. */
static void over_of(const state_t *s, uint64_t now, real_t *low, real_t *high) {
  *low = *high = 0;
  if (s->kind == FSHM_BUCKET) {
    *low = s->low * interval_of(&s->label) - 8;
    *high = s->high * slow_interval_of(&s->label) + 8;
  } else if (s->kind == FSHM_WINDOW) {
    *low = (real_t)minus(s->end + debt_of(s->total, &s->label), now);
    *high = (real_t)minus(s->late + debt_of(s->total, &s->label), now);
  } else if (s->kind == FSHM_SLIDING) {
    *low = (real_t)((s->index + (s->count ? 2 : 1)) * s->label.per_ns - now);
    *high = (real_t)((s->index + 2) * s->label.per_ns - now);
  }
}

/* The state under c, by the same tokens. Several where it is open how many whole ones they are. */
static void converted(const state_t *s, const fshm_limit *c, uint64_t now, states_t *out) {
  if (s->kind == NOTHING || goes_on(s, c)) {
    state_t t = *s;
    if (s->kind == FSHM_BUCKET && !same_limit(&s->label, c)) t.high += within(c, 4);
    t.label = *c;
    if (s->kind == FSHM_WINDOW) {
      const uint64_t debt = debt_of(t.total, c);
      const state_t none = nothing_used();
      t.late = max_u64(t.late, t.end + rounding_of(t.total, c));
      if (now >= t.end + debt) add_state(out, &none); /* without its debt, it is over */
      if (now >= t.late + debt) return;
    }
    if (s->kind == NOTHING) t = *s;
    add_state(out, &t);
    return;
  }
  uint64_t low, high;
  used_of(s, now, &low, &high);
  gave_up |= high - low > 4;
  /* more than its counter holds: it stays where it is, and how long that may be is not reckoned */
  if (c->kind != FSHM_BUCKET) gave_up |= high > limit_largest_n(c->kind, c->per_ns);
  for (uint64_t used = low; used <= high && !gave_up; used++) {
    state_t t = used_now(c, used, now);
    add_state(out, &t);
  }
}

enum { YES = 1, NO = 2 };

/* Would it be over sooner under c, or at the same time? */
static int sooner(const state_t *s, const fshm_limit *c, uint64_t now) {
  real_t low, high, new_low = 1e30L, new_high = 0;
  states_t under;
  under.n = 0;
  if (s->kind == NOTHING || same_limit(&s->label, c)) return YES;
  if (s->kind == FSHM_BUCKET && c->kind == FSHM_BUCKET) {
    real_t v = interval_of(&s->label), w = interval_of(c);
    return larger(v - w, w - v) <= 1 ? YES | NO : w < v ? YES : NO;
  }
  if (s->kind == FSHM_WINDOW && c->kind == FSHM_WINDOW)
    return debt_of(s->total, c) <= debt_of(s->total, &s->label) ? YES : NO;
  if (goes_on(s, c)) return YES;
  over_of(s, now, &low, &high);
  converted(s, c, now, &under);
  for (int i = 0; i < under.n; i++) {
    real_t a, b;
    over_of(&under.all[i], now, &a, &b);
    new_low = smaller_of(new_low, a);
    new_high = larger(new_high, b);
  }
  return (new_low <= high ? YES : 0) | (new_high > low ? NO : 0);
}

/* Answers ------------------------------------------------------------------------------------- */

/* Nothing is consumed; what was used may count under c from now on, where it is over sooner. */
static void leave_state(const state_t *s, const fshm_limit *c, uint64_t now, states_t *out) {
  add_state(out, s);
  if (!same_limit(&s->label, c) && sooner(s, c, now) & YES) converted(s, c, now, out);
}

static bool may_admit_nothing(const state_t *s, const fshm_limit *c, uint64_t now) {
  uint64_t low, high;
  used_of(s, now, &low, &high);
  return c->kind != FSHM_BUCKET || low <= c->burst;
}

/* The states that explain that the cost was admitted, and what they become. */
static void was_admitted(const states_t *in, const fshm_limit *c, uint64_t cost, uint64_t now,
                         states_t *out) {
  out->n = 0;
  for (int i = 0; i < in->n; i++) {
    state_t s = in->all[i];
    if (cost > capacity_of(c)) continue;
    if (!cost) { /* it makes no debt: the state is over no later */
      if (may_admit_nothing(&s, c, now)) leave_state(&s, c, now, out);
      continue;
    }
    if (s.kind == NOTHING) {
      s = used_now(c, cost, now);
    } else if (goes_on(&s, c)) {
      if (s.kind == FSHM_BUCKET) {
        real_t room = (real_t)(c->burst - cost) + within(c, 2);
        if (s.low > room) continue;
        if (!same_limit(&s.label, c)) s.high += within(c, 4);
        s.high = smaller_of(s.high, room) + (real_t)cost + within(c, 2);
        s.low += (real_t)cost;
      } else if (s.kind == FSHM_WINDOW) {
        states_t under;
        under.n = 0;
        if (sooner(&s, c, now) & YES) converted(&s, c, now, &under);
        for (int k = 0; k < under.n; k++) {
          state_t t = under.all[k];
          if (t.kind == NOTHING) {
            t = used_now(c, cost, now);
          } else {
            if (t.total + cost > c->n) continue;
            t.total += cost;
            t.late = max_u64(t.late, t.end + rounding_of(t.total, c));
          }
          add_state(out, &t);
        }
        continue;
      } else {
        if (sliding_used(&s, now) + cost > c->n) continue;
        s.count += cost;
      }
      s.label = *c;
    } else {
      states_t under;
      under.n = 0;
      converted(&s, c, now, &under);
      for (int k = 0; k < under.n; k++) {
        uint64_t low, high;
        used_of(&under.all[k], now, &low, &high);
        if (under.all[k].kind == FSHM_BUCKET) low = (uint64_t)under.all[k].low;
        if (low + cost > capacity_of(c)) continue;
        s = used_now(c, low + cost, now);
        add_state(out, &s);
      }
      continue;
    }
    add_state(out, &s);
  }
}

static bool may_deny(const state_t *s, const fshm_limit *c, uint64_t cost, uint64_t now) {
  uint64_t low, high;
  if (c->kind == FSHM_BUCKET)
    gave_up |= ((real_t)cost + s->high) * slow_interval_of(c) > (real_t)TOO_LONG;
  if (cost > capacity_of(c)) return true;
  if (!cost && c->kind != FSHM_BUCKET) return false;
  if (s->kind == FSHM_BUCKET && c->kind == FSHM_BUCKET)
    return s->high > (real_t)(c->burst - cost) - within(c, 8);
  if (s->kind == FSHM_WINDOW && c->kind == FSHM_WINDOW && sooner(s, c, now) & YES) {
    states_t under;
    under.n = 0;
    converted(s, c, now, &under);
    for (int k = 0; k < under.n; k++)
      if (under.all[k].kind != NOTHING) return s->total + cost > c->n;
    return false;
  }
  used_of(s, now, &low, &high);
  /* Whole tokens, in the time of a bucket: rounded up to a nanosecond. */
  return high + cost + (c->kind == FSHM_BUCKET && cost && high) > capacity_of(c);
}

/* That this limit denied it, or (this: false) another one. */
static void was_denied(const states_t *in, const fshm_limit *c, uint64_t cost, bool this,
                       uint64_t now, states_t *out) {
  out->n = 0;
  for (int i = 0; i < in->n; i++) {
    state_t s = in->all[i];
    if (this && !may_deny(&s, c, cost, now)) continue;
    if (this && s.kind == FSHM_BUCKET && c->kind == FSHM_BUCKET && cost <= c->burst)
      s.low = smaller_of(s.high, larger(s.low, (real_t)(c->burst - cost) - within(c, 8)));
    leave_state(&s, c, now, out);
  }
}

/* That so many are left. */
static void are_left(const states_t *in, const fshm_limit *c, uint64_t left, uint64_t now,
                     states_t *out) {
  out->n = 0;
  for (int i = 0; i < in->n; i++) {
    state_t s = in->all[i];
    if (s.kind == FSHM_BUCKET && c->kind == FSHM_BUCKET) {
      real_t most = (real_t)c->burst - s.low + within(c, 2);
      real_t least = (real_t)c->burst - s.high - within(c, 8);
      if ((left && (real_t)left > most) || (real_t)(left + 1) <= least) continue;
      if (left) s.high = smaller_of(s.high, (real_t)(c->burst - left) + within(c, 2));
      if (left < c->burst)
        s.low = larger(s.low, (real_t)c->burst - (real_t)(left + 1) - within(c, 8));
      if (s.low > s.high) s.low = s.high;
    } else {
      uint64_t low, high;
      used_of(&s, now, &low, &high);
      if (c->kind == FSHM_BUCKET && high) high++; /* in its time, rounded up to a nanosecond */
      bool right = left >= minus(capacity_of(c), high) && left <= minus(capacity_of(c), low);
      if (s.kind == FSHM_WINDOW && c->kind == FSHM_WINDOW && sooner(&s, c, now) & YES) {
        const uint64_t debt =
            debt_of(s.total, c); /* without what is no debt under c, it may be over */
        right = (right && now < s.late + debt) || (now >= s.end + debt && left == c->n);
      }
      if (!right) continue;
    }
    add_state(out, &s);
  }
}

/* Charges and refunds --------------------------------------------------------------------------- */

/* The states in which it is charged or given back: under c, or still under v. */
static void state_to_change(const state_t *s, const fshm_limit *c, uint64_t cost, uint64_t now,
                            states_t *out) {
  int under_c = sooner(s, c, now);
  uint64_t low, high;
  used_of(s, now, &low, &high);
  if (s->kind == FSHM_BUCKET && c->kind == FSHM_BUCKET) {
    if (s->high <= (real_t)c->burst - within(c, 8))
      under_c = YES;
    else if (s->low <= (real_t)c->burst + within(c, 8))
      under_c |= YES;
  } else if (!goes_on(s, c) && s->kind != NOTHING) {
    if (high + cost <= capacity_of(c))
      under_c = YES;
    else if (low <= capacity_of(c))
      under_c |= YES;
  }
  if (under_c & YES) converted(s, c, now, out);
  if (under_c & NO) add_state(out, s);
}

static void charge_states(const states_t *in, const fshm_limit *c, uint64_t cost, uint64_t now,
                          states_t *out) {
  out->n = 0;
  for (int i = 0; i < in->n; i++) {
    states_t under;
    under.n = 0;
    state_to_change(&in->all[i], c, cost, now, &under);
    for (int k = 0; k < under.n; k++) {
      state_t s = under.all[k];
      if (s.kind == NOTHING) {
        s = used_now(c, cost, now);
      } else if (s.kind == FSHM_BUCKET) {
        s.low += (real_t)cost;
        s.high += (real_t)cost + within(&s.label, 2);
      } else if (s.kind == FSHM_WINDOW) {
        s.total += cost;
        s.late = max_u64(s.late, s.end + rounding_of(s.total, &s.label));
        (void)debt_of(s.total, &s.label);
      } else {
        s.count += cost;
      }
      add_state(out, &s);
    }
  }
}

/* What a settlement knows of its charge. */
typedef struct {
  uint64_t serial, end, index; /* of its window */
  real_t low, high; /* of the bucket, tokens used after it */
  uint64_t at;
  fshm_limit label;
  real_t fastest; /* the shortest interval of any limit that was in force since */
} charged_t;

/* A settlement of which nothing counts any more may leave the state as it was, under v too. */
static void add_if_untouched(const state_t *s, const charged_t *of, uint64_t now, states_t *out) {
  bool counts = true;
  if (s->kind == FSHM_WINDOW) counts = of->serial == s->serial;
  if (s->kind == FSHM_SLIDING) counts = of->index + 1 >= s->index;
  if (s->kind == FSHM_BUCKET)
    counts = same_limit(&of->label, &s->label) &&
             of->low > (real_t)(now - of->at + 8) / interval_of(&of->label);
  if (!counts) add_state(out, s);
}

/* of: NULL, or the charge that it is given back from. `quickest`: the shortest interval of any limits of this name. */
static void refund_states(const states_t *in, const fshm_limit *c, uint64_t cost,
                          const charged_t *of, real_t quickest, uint64_t now, states_t *out) {
  out->n = 0;
  for (int i = 0; i < in->n; i++) {
    states_t under;
    under.n = 0;
    state_to_change(&in->all[i], c, 0, now, &under);
    for (int k = 0; k < under.n; k++) {
      state_t s = under.all[k];
      uint64_t back = cost;
      if (of) add_if_untouched(&in->all[i], of, now, out);
      if (s.kind == FSHM_BUCKET) {
        real_t least = (real_t)cost, most = (real_t)cost;
        if (of) { /* what has flowed back since cannot be given back, nor what may have */
          real_t since = (real_t)(now - of->at);
          most = smaller_of(most, larger(0, of->high - since / of->fastest));
          least = smaller_of(least, larger(0, of->low - (since + 8) / quickest));
        }
        s.low = larger(0, s.low - most - within(&s.label, 4));
        s.high = larger(0, s.high - larger(0, least - within(&s.label, 4)));
        if (s.high == 0) s = nothing_used();
      } else if (s.kind == FSHM_WINDOW) {
        if (!of || of->serial == s.serial) s.total = minus(s.total, back);
        if (!s.total) s = nothing_used();
      } else if (s.kind == FSHM_SLIDING) {
        if (!of || of->index == s.index) {
          uint64_t rest = of ? 0 : minus(back, s.count);
          s.count = minus(s.count, back);
          s.previous = minus(s.previous, rest);
        } else if (of->index + 1 == s.index) {
          s.previous = minus(s.previous, back);
        }
        if (!s.count && !s.previous) s = nothing_used();
      }
      add_state(out, &s);
    }
  }
  states_t after;
  pass_time(out, now, &after); /* a debt that was given back may have been all that kept it */
  copy_states(&after, out);
}

/* Nothing of cost 1 for so long. */
static void block_states(const states_t *in, const fshm_limit *c, uint64_t ns, uint64_t now,
                         states_t *out) {
  out->n = 0;
  for (int i = 0; i < in->n; i++) {
    states_t under;
    under.n = 0;
    state_to_change(&in->all[i], c, 0, now, &under);
    for (int k = 0; k < under.n; k++) {
      state_t s = under.all[k];
      if (s.kind == NOTHING) s = (state_t){.label = *c, .kind = FSHM_BUCKET, .at = now};
      real_t least = (real_t)ns / slow_interval_of(&s.label),
             most = (real_t)ns / interval_of(&s.label) + within(&s.label, 4);
      /* what may be used then is rounded down to a nanosecond */
      s.low =
          larger(s.low, least + (real_t)min_u64(s.label.burst, c->burst) - 1 - within(&s.label, 1));
      s.high = larger(s.high, most + (real_t)max_u64(s.label.burst, c->burst) - 1);
      add_state(out, &s);
    }
  }
}

/* How long a denial may last at most: as under v, or as under c, whichever is shorter. */
static real_t longest_denial(const states_t *in, const fshm_limit *c, uint64_t cost, uint64_t now) {
  real_t longest = 0;
  for (int i = 0; i < in->n; i++) {
    const state_t *s = &in->all[i];
    real_t low, high, shortest;
    if (!may_deny(s, c, cost, now)) continue;
    over_of(s, now, &low, &high);
    shortest = high;
    if (s->kind == FSHM_BUCKET && c->kind == FSHM_BUCKET) {
      real_t beyond = s->high + (real_t)cost - (real_t)c->burst;
      shortest = beyond * smaller_of(slow_interval_of(&s->label), slow_interval_of(c)) + 8;
    } else {
      states_t under;
      under.n = 0;
      real_t most = 0;
      converted(s, c, now, &under);
      for (int k = 0; k < under.n; k++) {
        over_of(&under.all[k], now, &low, &high);
        most = larger(most, high);
      }
      shortest = smaller_of(shortest, most);
    }
    longest = larger(longest, shortest);
  }
  return longest;
}

#endif
