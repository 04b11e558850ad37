/* test_stories.c - random stories of keys whose limits change, against a reference that counts the tokens.
 *
 *   test_stories [STORIES [SEED [FIRST [SETS]]]]
 *
 * A story is a few sets of limits, and steps: requests, charges, refunds, settlements, blocks, reservations, and
 * changes from one set to another, any number of them. After each step the library has to say what the
 * reference says (stories_model.h): who is admitted, what is left, and for how long a denial lasts. A story
 * that fails is made as short as it can be, and printed. SEED and FIRST repeat it. SETS: at most so many sets
 * of limits in a story (1: they never change). STORIES and STORIES_SEED may come from the environment; without,
 * it goes on for 10 s. STORIES_LONG: a story that fails is printed as it is. */
#include "unity.c"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>

#include "check.h"
#include "stories_model.h"
#include "stories.h"

#define MOST_RULES 6 /* of one name, over time: each has states of its own */
#define MOST_WAS 8 /* kinds and periods that one has had */
#define STARTS 64 /* of intervals in which admissions are added up */

/* Printed -------------------------------------------------------------------------------------------- */

static void tell_states(char *out, size_t size, const states_t *in) {
  size_t used = 0;
  out[0] = 0;
  for (int i = 0; i < in->n && used + 200 < size; i++) {
    const state_t *s = &in->all[i];
    used += (size_t)snprintf(out + used, size - used, i ? "; or " : "");
    if (s->kind == NOTHING)
      used += (size_t)snprintf(out + used, size - used, "nothing");
    else if (s->kind == FSHM_BUCKET)
      used += (size_t)snprintf(out + used, size - used, "%.6Lf..%.6Lf tokens", s->low, s->high);
    else if (s->kind == FSHM_WINDOW)
      used += (size_t)snprintf(
          out + used, size - used, "%" PRIu64 " tokens until %" PRIu64 "..%" PRIu64, s->total,
          s->end + debt_of(s->total, &s->label), s->late + debt_of(s->total, &s->label));
    else
      used += (size_t)snprintf(out + used, size - used,
                               "%" PRIu64 " tokens, and %" PRIu64 " in the window before", s->count,
                               s->previous);
    if (s->kind != NOTHING)
      used += (size_t)snprintf(out + used, size - used, " under %" PRIu64 " in %" PRIu64 " ns",
                               s->label.n, s->label.per_ns);
  }
}

/* One story, on the library and on the reference ----------------------------------------------- */

static FILE *tell; /* where the story is printed as it goes on, or NULL */
static char why[4096]; /* it failed; "": it did not */
static uint64_t steps_done, stories_left; /* left: gave up */

static fshm_segment *segment;
static fshm_limiter *limiter;
static char limiter_name[32];
static uint64_t key_number;

static const set_t *set; /* in force */
static uint32_t rates; /* of its limits, without permits */
static uint32_t place[FSHM_MAX_LIMITS]; /* which rule each is: its place in `rule` */
static struct {
  fshm_limit last; /* as it was last in force */
  fshm_limit was[MOST_WAS]; /* what else it was */
  uint32_t was_n;
} rule[MOST_RULES];
static uint32_t rules_n;
static uint64_t shape; /* differs after a change of which limits there are, or of their kind */
static real_t quickest
    [2]; /* the shortest interval of any bucket of this name: its own, or that of many stories */
static bool owned; /* it is its own */

typedef struct {
  char name[32];
  states_t states[MOST_RULES];
  uint32_t held;
  uint64_t retry_at; /* when the last denial is over; 0: none */
  /* One bucket alone: since each of its admissions, what was taken, and the most generous of limits. */
  struct {
    uint64_t at;
    real_t taken, burst, rate;
  } since[STARTS];
  uint32_t since_n;
  real_t burst, rate; /* of those in force since the key was last asked */
} told_key_t;
static told_key_t keys[KEYS];

typedef struct {
  fshm_permit permit;
  charged_t of[MOST_RULES];
  uint32_t key;
  uint64_t cost, shape;
  bool settled, used;
} handle_t;
static handle_t handles[HANDLES];
static uint32_t handles_n;

static uint64_t now;

static __attribute__((format(printf, 1, 2))) void wrong(const char *format, ...) {
  va_list arguments;
  if (why[0]) return;
  va_start(arguments, format);
  (void)vsnprintf(why, sizeof why, format, arguments);
  va_end(arguments);
}

static void wrong_states(const char *what, uint32_t i, uint64_t number, const states_t *before) {
  char text[2048];
  tell_states(text, sizeof text, before);
  wrong("limit %u: %s %" PRIu64 "; by the reference, used: %s", i, what, number, text);
}

static void make_room(void) {
  fshm_geometry g;
  fshm_describe(segment, &g);
  /* As in a fresh segment, at a thousandth of its price. */
  memset((unsigned char *)(uintptr_t)g.base + g.slots_offset, 0, g.slots * sizeof(slot_t));
}

static uint32_t rates_of(const set_t *s) {
  return s->count - (s->limits[s->count - 1].kind == FSHM_PERMITS);
}

/* A name goes on from story to story, so that its limits have changed very often, where there are always as many
 * limits. Else an earlier story's limits might be there before. */
static bool own_name(const story_t *t) {
  bool same = true;
  for (uint32_t i = 0; i < t->sets_n; i++) same &= rates_of(&t->sets[i]) == rates_of(&t->sets[0]);
  if (same) {
    (void)snprintf(limiter_name, sizeof limiter_name, "of %u", rates_of(&t->sets[0]));
    return false;
  }
  (void)snprintf(limiter_name, sizeof limiter_name, "%" PRIu64, key_number);
  return true;
}

static uint32_t names_left;
static void fresh_start(const story_t *t, bool anew) {
  const bool own = owned = own_name(t);
  if (anew || !segment || (own && !names_left)) {
    fshm_geometry g;
    fshm_error e;
    if (limiter) fshm_limiter_close(limiter);
    if (segment) {
      fshm_close(segment);
      (void)fshm_remove(segment_names[0], &e);
      segments_made = 0;
    }
    limiter = NULL;
    segment = fresh_segment(64);
    quickest[false] = 1e30L;
    fshm_describe(segment, &g);
    names_left = g.limiters - 6;
  }
  names_left -= own;
  make_room();
}

/* Has any key used of it what is not over by now? */
static bool is_alive(uint32_t r) {
  bool any = false;
  for (uint32_t k = 0; k < KEYS; k++) {
    bool used = true;
    states_t at;
    pass_time(&keys[k].states[r], now, &at);
    for (int i = 0; i < at.n; i++) used &= at.all[i].kind != NOTHING;
    any |= used;
  }
  return any;
}

static bool like(const fshm_limit *a, const fshm_limit *b) {
  return a->kind == b->kind && a->per_ns == b->per_ns;
}

/* The limit of the same kind and period that is not in force. n: how many there are. */
static uint32_t there_before(const fshm_limit *l, const uint32_t *next_place, const bool *found,
                             uint32_t next_rates, uint32_t *n) {
  uint32_t before = 0;
  for (uint32_t r = 0; r < rules_n; r++) {
    bool there = false;
    for (uint32_t k = 0; k < rates; k++) there |= place[k] == r;
    for (uint32_t k = 0; k < next_rates; k++) there |= found[k] && next_place[k] == r;
    if (there) continue;
    for (uint32_t i = 0; i < rule[r].was_n; i++) /* it was, but was another since: who knows */
      gave_up |= like(&rule[r].was[i], l) && !like(&rule[r].last, l);
    if (!like(&rule[r].last, l)) continue;
    ++*n;
    before = r;
  }
  return before;
}

static void note_was(uint32_t r, const fshm_limit *l) {
  for (uint32_t i = 0; i < rule[r].was_n; i++)
    if (like(&rule[r].was[i], l)) return;
  if (rule[r].was_n == MOST_WAS)
    gave_up = true;
  else
    rule[r].was[rule[r].was_n++] = *l;
}

static void partners(const set_t *to) {
  uint32_t next_place[FSHM_MAX_LIMITS] = {0}, next_rates = to->count;
  bool taken[FSHM_MAX_LIMITS] = {false}, found[FSHM_MAX_LIMITS] = {false}, same_shape = true;
  if (to->limits[to->count - 1].kind == FSHM_PERMITS) next_rates--;
  for (int pass = 0; pass < 3; pass++) { /* the same, of the present; of those before; in order */
    for (uint32_t i = 0; i < next_rates; i++) {
      uint32_t without = 0, heirs = 0; /* present limits without one; new limits to be one */
      for (uint32_t k = 0; k < rates; k++) without += !taken[k];
      for (uint32_t k = 0; k < next_rates; k++) heirs += !found[k];
      if (pass == 1 && !found[i] && heirs > without) {
        uint32_t n = 0, before = there_before(&to->limits[i], next_place, found, next_rates, &n);
        gave_up |= n > 1 || (n && !is_alive(before)); /* dead permits need not be known */
        if (n) {
          found[i] = true;
          next_place[i] = before;
        }
      }
      for (uint32_t k = 0; k < rates && !found[i] && pass != 1; k++) {
        const fshm_limit *was = &rule[place[k]].last;
        if (taken[k]) continue;
        if (!pass && !like(was, &to->limits[i])) continue;
        taken[k] = found[i] = true;
        next_place[i] = place[k];
      }
    }
  }
  for (uint32_t i = 0; i < next_rates; i++) {
    if (found[i]) continue;
    if (rules_n == MOST_RULES) { /* the library, too, has room for some */
      gave_up = true;
      return;
    }
    rule[rules_n].was_n = 0;
    next_place[i] = rules_n++;
    for (uint32_t k = 0; k < KEYS; k++) {
      keys[k].states[next_place[i]].n = 1;
      keys[k].states[next_place[i]].all[0] = nothing_used();
    }
  }
  for (uint32_t i = 0; i < next_rates; i++) {
    fshm_limit *last = &rule[next_place[i]].last;
    same_shape &= i < rates && next_rates == rates && place[i] == next_place[i] &&
                  last->kind == to->limits[i].kind &&
                  (last->kind != FSHM_SLIDING || last->per_ns == to->limits[i].per_ns);
    *last = to->limits[i];
    note_was(next_place[i], last);
  }
  memcpy(place, next_place, sizeof place);
  rates = next_rates;
  if (!same_shape) shape++;
}

static void in_force(told_key_t *k, bool asked) {
  if (rates != 1 || set->limits[0].kind != FSHM_BUCKET) return;
  real_t burst = (real_t)set->limits[0].burst, pace = 1 / interval_of(&set->limits[0]);
  k->burst = asked ? burst : larger(k->burst, burst);
  k->rate = asked ? pace : larger(k->rate, pace);
  for (uint32_t i = 0; i < k->since_n; i++) {
    k->since[i].burst = larger(k->since[i].burst, burst);
    k->since[i].rate = larger(k->since[i].rate, pace);
  }
}

/* A change may bring what was used under the new limits, where it is over sooner, as if the key had been asked. */
static void may_go_over(told_key_t *k) {
  states_t at;
  for (uint32_t i = 0; i < rates; i++) {
    states_t *of = &k->states[place[i]];
    if (of->n == 1 && of->all[0].kind == NOTHING) continue;
    pass_time(of, now, &at);
    was_denied(&at, &set->limits[i], 1, false, now, of);
  }
}

static void change_to(const set_t *to) {
  fshm_limiter *next;
  int status = fshm_limiter_open_at(segment, limiter_name, strlen(limiter_name), to->limits,
                                    to->count, now, &next);
  if (status != FSHM_OK) {
    wrong("the limits cannot be changed: %d", status);
    return;
  }
  if (limiter) fshm_limiter_close(limiter);
  limiter = next;
  for (int k = 0; k < KEYS; k++) may_go_over(&keys[k]); /* under those of before, until now */
  partners(to);
  if (gave_up) return;
  set = to;
  for (uint32_t i = 0; i < rates; i++) {
    if (to->limits[i].kind != FSHM_BUCKET) continue;
    quickest[owned] = smaller_of(quickest[owned], interval_of(&to->limits[i]));
    for (uint32_t k = 0; k < HANDLES; k++)
      handles[k].of[i].fastest =
          smaller_of(handles[k].of[i].fastest, slow_interval_of(&to->limits[i]));
  }
  for (int k = 0; k < KEYS; k++) {
    may_go_over(&keys[k]);
    if (rates != 1 || to->limits[0].kind != FSHM_BUCKET) keys[k].since_n = 0;
    in_force(&keys[k], false);
  }
}

static uint32_t permits_of(const set_t *s) {
  const fshm_limit *last = &s->limits[s->count - 1];
  return last->kind == FSHM_PERMITS ? (uint32_t)last->n : 0;
}

/* What is left of each limit, as both have it. */
static void look_at(told_key_t *k, uint64_t *left) {
  states_t states;
  uint64_t n = (uint64_t)fshm_remaining(limiter, k->name, strlen(k->name), now, left);
  if (n != rates) {
    wrong("it has %" PRIu64 " limits, not %u", n, rates);
    return;
  }
  for (uint32_t i = 0; i < rates && !why[0]; i++) {
    states_t *of = &k->states[place[i]];
    pass_time(of, now, &states);
    are_left(&states, &set->limits[i], left[i], now, of);
    if (!of->n && !gave_up) wrong_states("it says that so many are left:", i, left[i], &states);
  }
  if (permits_of(set) && !why[0]) {
    uint32_t held = fshm_in_flight(limiter, k->name, strlen(k->name));
    if (held != k->held) wrong("%u permits are in flight, not %u", held, k->held);
  }
}

static void add_up(told_key_t *k, uint64_t cost, bool admitted) {
  if (rates != 1 || set->limits[0].kind != FSHM_BUCKET) return;
  if (admitted && k->since_n < STARTS) {
    k->since[k->since_n].at = now;
    k->since[k->since_n].taken = 0;
    k->since[k->since_n].burst = k->burst;
    k->since[k->since_n].rate = k->rate;
    k->since_n++;
  }
  for (uint32_t i = 0; i < k->since_n; i++) {
    k->since[i].taken += (real_t)cost;
    real_t may = k->since[i].burst + ((real_t)(now - k->since[i].at) + 16) * k->since[i].rate;
    if (admitted && k->since[i].taken > may + 1e-9L)
      wrong("%.0Lf tokens were admitted within %" PRIu64
            " ns, where the most generous of the limits allows %.3Lf",
            k->since[i].taken, now - k->since[i].at, may);
  }
  in_force(k, true);
}

static void taken_back(told_key_t *k, uint64_t cost) {
  for (uint32_t i = 0; i < k->since_n; i++) k->since[i].taken -= (real_t)cost;
}

static int ask(told_key_t *k, uint32_t op, uint64_t cost, uint64_t wait, uint64_t at,
               fshm_decision *d) {
  const uint64_t costs[FSHM_MAX_LIMITS] = {cost, cost, cost, cost};
  fshm_apply(limiter, op, k->name, strlen(k->name), costs, wait, at, d);
  return d->status;
}

/* Denied until then, and no longer. looked: it was only looked at, so what was used stays under old limits. */
static void check_denial(told_key_t *k, const fshm_decision *d, uint64_t cost, bool looked) {
  fshm_decision later;
  uint64_t after[FSHM_MAX_LIMITS];
  bool never = false, old = false;
  real_t longest = 0;
  states_t next;
  if (d->limit_index >= rates) { /* the permits */
    if (d->limit_index != rates || !permits_of(set)) wrong("limit %u denied it", d->limit_index);
    if (k->held < permits_of(set)) wrong("denied, and %u permits are held", k->held);
    return;
  }
  for (uint32_t i = 0; i < rates; i++) {
    never |= cost > capacity_of(&set->limits[i]);
    const states_t *of = &k->states[place[i]];
    longest = larger(longest, longest_denial(of, &set->limits[i], cost, now));
    for (int j = 0; j < of->n && looked; j++)
      old |= of->all[j].kind != NOTHING && !same_limit(&of->all[j].label, &set->limits[i]);
  }
  for (uint32_t i = 0; i < rates; i++) {
    states_t *of = &k->states[place[i]];
    was_denied(of, &set->limits[i], cost, i == d->limit_index, now, &next);
    if (!next.n && !gave_up) wrong_states("it denied a cost of", i, cost, of);
    copy_states(&next, of);
  }
  if (gave_up || why[0]) return;
  if (never != (d->retry_after_ns == FSHM_NEVER))
    wrong("a cost of %" PRIu64 " %s, and retry_after is %" PRId64, cost,
          never ? "never fits" : "fits some time", d->retry_after_ns);
  if (never || why[0]) return;
  uint64_t retry = (uint64_t)d->retry_after_ns;
  if (d->retry_after_ns <= 0 || (real_t)retry > longest + 16)
    wrong("denied for %" PRId64 " ns, where the longest is %.0Lf", d->retry_after_ns, longest);
  if (retry > TOO_LATE) gave_up = true;
  if (gave_up || why[0]) return;
  if (!old && ask(k, FSHM_PEEK, cost, 0, now + retry + 16, &later) != FSHM_ALLOWED)
    wrong("denied for %" PRIu64 " ns, and after that for another %" PRId64, retry,
          later.retry_after_ns);
  if (!old && retry > 8 && ask(k, FSHM_PEEK, cost, 0, now + retry - 8, &later) == FSHM_ALLOWED)
    wrong("denied for %" PRIu64 " ns, and 8 ns earlier it is admitted", retry);
  k->retry_at = now + retry;
  look_at(k, after);
}

static void acquire(told_key_t *k, const step_t *s, uint64_t cost, uint64_t wait) {
  fshm_decision d;
  fshm_permit permit = {.held = 0};
  uint64_t left[FSHM_MAX_LIMITS], after[FSHM_MAX_LIMITS];
  uint32_t in_flight, permits = permits_of(set);
  states_t next;
  look_at(k, left);
  if (gave_up || why[0]) return;
  const uint64_t costs[FSHM_MAX_LIMITS] = {cost, cost, cost, cost};
  if (s->what == RESERVE)
    (void)ask(k, FSHM_RESERVE, cost, wait, now, &d);
  else if (s->what != ADMIT && !permits)
    (void)ask(k, FSHM_ACQUIRE, cost, 0, now, &d);
  else
    fshm_admit(limiter, k->name, strlen(k->name), costs, now, &permit, &d, &in_flight);
  if (tell)
    fprintf(tell, "%s",
            d.status == FSHM_ALLOWED  ? "admitted"
            : d.status == FSHM_DENIED ? "denied"
                                      : "an error");
  if (tell && d.status == FSHM_DENIED) fprintf(tell, " for %" PRId64 " ns", d.retry_after_ns);
  if (d.status != FSHM_ALLOWED && d.status != FSHM_DENIED) {
    wrong("it answers %d", d.status);
    return;
  }
  if (s->what == RESERVE) { /* of a bucket alone, of which all is under its present limits */
    states_t *of = &k->states[place[0]];
    fshm_limit *l = &rule[place[0]].last;
    real_t room = (real_t)l->burst - (real_t)cost + (real_t)wait / interval_of(l);
    next.n = 0;
    for (int i = 0; i < of->n; i++) {
      const state_t *seen = &of->all[i];
      bool may = cost <= l->burst && seen->low <= room + within(l, 8);
      bool may_not = cost > l->burst || seen->high >= room - within(l, 8);
      if (d.status == FSHM_ALLOWED ? may : may_not) add_state(&next, seen);
    }
    if (!next.n)
      wrong_states(d.status == FSHM_ALLOWED ? "it reserved" : "it did not reserve", 0, cost, of);
    if (d.status == FSHM_ALLOWED) {
      charge_states(&next, l, cost, now, of);
      add_up(k, cost, false);
    } else {
      copy_states(&next, of);
      in_force(k, true);
    }
    look_at(k, after);
    return;
  }
  if (d.status == FSHM_DENIED) {
    check_denial(k, &d, cost, s->what == ADMIT || permits);
    in_force(k, true);
    for (uint32_t i = 0; i < rates && !why[0] && !gave_up; i++) {
      (void)fshm_remaining(limiter, k->name, strlen(k->name), now, after);
      if (left[i] != after[i] && left[i] != after[i] + 1) /* a conversion rounds up */
        wrong("limit %u: denied, and %" PRIu64 " are left, before %" PRIu64, i, after[i], left[i]);
      if (left[i] != after[i] && set->limits[i].kind != FSHM_BUCKET)
        wrong("limit %u: denied, and %" PRIu64 " are left, before %" PRIu64, i, after[i], left[i]);
    }
    return;
  }
  if (permits && k->held >= permits) wrong("admitted, and %u permits were held", k->held);
  handle_t nobody, *h = &nobody;
  if (s->what == ADMIT || permits) h = &handles[handles_n++ % HANDLES];
  *h = (handle_t){
      .permit = permit, .key = (uint32_t)(k - keys), .cost = cost, .shape = shape, .used = true};
  if (permits) k->held++;
  for (uint32_t i = 0; i < rates; i++) {
    states_t *of = &k->states[place[i]];
    was_admitted(of, &set->limits[i], cost, now, &next);
    if (!next.n && !gave_up) wrong_states("it admitted a cost of", i, cost, of);
    copy_states(&next, of);
    if (next.n) {
      const state_t *one = &next.all[0];
      h->of[i] =
          (charged_t){one->serial, one->end, one->index,     one->low,
                      one->high,   now,      set->limits[i], slow_interval_of(&set->limits[i])};
      for (int j = 1; j < next.n; j++) { /* of which, is not known */
        if (next.all[j].kind != FSHM_BUCKET) h->settled = true;
        h->of[i].low = smaller_of(h->of[i].low, next.all[j].low);
        h->of[i].high = larger(h->of[i].high, next.all[j].high);
      }
    }
  }
  if (gave_up || why[0]) return;
  add_up(k, cost, true);
  look_at(k, after);
}

static void force_op(told_key_t *k, const step_t *s, uint64_t cost) {
  uint64_t left[FSHM_MAX_LIMITS];
  fshm_decision d;
  bool buckets = false;
  look_at(k, left);
  if (gave_up || why[0] || !rates) return;
  for (uint32_t i = 0; i < rates; i++) buckets |= set->limits[i].kind == FSHM_BUCKET;
  for (uint32_t i = 0; i < rates; i++) {
    const states_t *of = &k->states[place[i]];
    if (s->what == BLOCK && set->limits[i].kind == FSHM_BUCKET)
      for (int j = 0; j < of->n; j++)
        if (of->all[j].kind != FSHM_BUCKET && of->all[j].kind != NOTHING) return;
    for (int j = 0; j < of->n; j++) /* what a sliding window keeps exactly */
      if (s->what == CHARGE && of->all[j].kind == FSHM_SLIDING &&
          of->all[j].count + cost > SLIDING_EXACT)
        return;
    if (s->what == CHARGE && set->limits[i].kind == FSHM_SLIDING && cost > SLIDING_EXACT) return;
    if (s->what == CHARGE && cost > 1 << 20) return;
  }
  uint32_t op = s->what == CHARGE ? FSHM_CHARGE : s->what == REFUND ? FSHM_REFUND : FSHM_BLOCK;
  int status = ask(k, op, cost, 0, now, &d);
  int right = s->what == BLOCK && !buckets ? FSHM_E_ARGUMENT : FSHM_ALLOWED;
  if (status != right) {
    wrong("it answers %d", status);
    return;
  }
  for (uint32_t i = 0; i < rates; i++) {
    states_t *of = &k->states[place[i]], before;
    copy_states(of, &before);
    if (s->what == CHARGE) charge_states(&before, &set->limits[i], cost, now, of);
    if (s->what == REFUND)
      refund_states(&before, &set->limits[i], cost, NULL, quickest[owned], now, of);
    if (s->what == BLOCK && set->limits[i].kind == FSHM_BUCKET)
      block_states(&before, &set->limits[i], cost, now, of);
  }
  if (s->what == CHARGE) add_up(k, cost, false);
  if (s->what == REFUND) {
    taken_back(k, cost);
    in_force(k, true);
  }
  if (s->what == BLOCK) in_force(k, true);
  if (!gave_up) look_at(k, left);
}

static void settle_op(const step_t *s) {
  uint64_t left[FSHM_MAX_LIMITS];
  if (!handles_n) return;
  handle_t *h = &handles[s->handle % min_u64(handles_n, HANDLES)];
  told_key_t *k = &keys[h->key];
  if (!h->used || h->settled || h->shape != shape || !rates) return;
  uint64_t actual = s->cost % 3 ? s->cost % (h->cost + 1) : h->cost + s->cost % 1000;
  look_at(k, left);
  if (gave_up || why[0]) return;
  for (uint32_t i = 0; i < rates; i++)
    for (int j = 0; j < k->states[place[i]].n; j++) {
      const state_t *one = &k->states[place[i]].all[j];
      if (one->kind == FSHM_SLIDING && one->count + actual > SLIDING_EXACT) return;
      /* All of it was given back, and another window began so soon that its end may be the same. */
      if (one->kind == FSHM_WINDOW && one->serial != h->of[i].serial &&
          one->end - h->of[i].end < 1 << 20)
        return;
    }
  h->settled = true;
  const uint64_t charged[FSHM_MAX_LIMITS] = {h->cost, h->cost, h->cost, h->cost},
                 used[FSHM_MAX_LIMITS] = {actual, actual, actual, actual};
  if (tell) fprintf(tell, "of %" PRIu64 ", %" PRIu64 " were used", h->cost, actual);
  int status = fshm_settle(limiter, k->name, strlen(k->name), charged, used, &h->permit, now);
  if (status != FSHM_ALLOWED) {
    wrong("it answers %d", status);
    return;
  }
  for (uint32_t i = 0; i < rates && actual != h->cost; i++) {
    states_t *of = &k->states[place[i]], before;
    copy_states(of, &before);
    if (actual > h->cost)
      charge_states(&before, &set->limits[i], actual - h->cost, now, of);
    else
      refund_states(&before, &set->limits[i], h->cost - actual, &h->of[i], quickest[owned], now,
                    of);
  }
  if (actual > h->cost)
    add_up(k, actual - h->cost, false);
  else if (actual < h->cost)
    taken_back(k, h->cost - actual);
  in_force(k, true);
  if (!gave_up) look_at(k, left);
}

static void release_op(const step_t *s) {
  if (!handles_n) return;
  handle_t *h = &handles[s->handle % min_u64(handles_n, HANDLES)];
  if (!h->used || !h->permit.held) return;
  if (fshm_permit_release(limiter, &h->permit) != 1) wrong("a permit cannot be released");
  keys[h->key].held--;
}

/* Forgotten, in all limits of the set in force. Those that are not in force may be, too. */
static void reset_op(told_key_t *k) {
  uint64_t left[FSHM_MAX_LIMITS];
  const state_t none = nothing_used();
  int status = fshm_reset_key(limiter, k->name, strlen(k->name));
  if (status != FSHM_OK) wrong("it answers %d", status);
  for (uint32_t r = 0; r < rules_n; r++) {
    bool present = false;
    for (uint32_t i = 0; i < rates; i++) present |= place[i] == r;
    if (present) k->states[r].n = 0;
    add_state(&k->states[r], &none);
  }
  k->since_n = 0;
  shape++; /* what was charged before cannot be settled */
  look_at(k, left);
}

static void one_step(const story_t *t, const step_t *s) {
  told_key_t *k = &keys[s->key];
  uint64_t pause = s->pause, cost = s->cost, left[FSHM_MAX_LIMITS];
  if (s->pause_is == UNTIL_ADMITTED && k->retry_at > now) pause = k->retry_at - now;
  now += pause;
  gave_up |= now > TOO_LATE;
  if (tell && pause) fprintf(tell, "  %" PRIu64 " ns later\n", pause);
  if (gave_up) return;
  if (s->cost_is == WHAT_IS_LEFT) {
    uint64_t n = 0;
    look_at(k, left);
    if (why[0] || gave_up) return;
    for (uint32_t i = 0; i < rates; i++) n = i ? min_u64(n, left[i]) : left[i];
    cost = max_u64(1, n + s->cost);
  }
  if (tell) switch ((int)s->what) {
      case ACQUIRE:
        fprintf(tell, "  key %u: acquire %" PRIu64 ": ", s->key, cost);
        break;
      case ADMIT:
        fprintf(tell, "  key %u: admit %" PRIu64 ": ", s->key, cost);
        break;
      case CHARGE:
        fprintf(tell, "  key %u: charge %" PRIu64, s->key, cost);
        break;
      case REFUND:
        fprintf(tell, "  key %u: refund %" PRIu64, s->key, cost);
        break;
      case BLOCK:
        fprintf(tell, "  key %u: block for %" PRIu64 " ns", s->key, cost);
        break;
      case RESERVE:
        fprintf(tell, "  key %u: reserve %" PRIu64 ": ", s->key, cost);
        break;
      case SETTLE:
        fprintf(tell, "  settle: ");
        break;
      case RELEASE:
        fprintf(tell, "  release a permit");
        break;
      case RESET:
        fprintf(tell, "  key %u: reset", s->key);
        break;
      default:
        break;
    }
  switch ((int)s->what) {
    case ACQUIRE:
    case ADMIT:
      acquire(k, s, cost, 0);
      break;
    case RESERVE: {
      look_at(k, left);
      if (why[0] || gave_up) return;
      bool may = rates == 1 && set->count == 1 && set->limits[0].kind == FSHM_BUCKET;
      for (int i = 0; may && i < k->states[place[0]].n; i++) {
        const state_t *one = &k->states[place[0]].all[i];
        may &= one->kind == NOTHING || same_limit(&one->label, &set->limits[0]);
      }
      if (may) acquire(k, s, cost, set->limits[0].per_ns / 2);
      break;
    }
    case CHARGE:
    case REFUND:
    case BLOCK:
      force_op(k, s, cost);
      break;
    case SETTLE:
      settle_op(s);
      break;
    case RELEASE:
      release_op(s);
      break;
    case RESET:
      reset_op(k);
      break;
    default:
      for (uint32_t i = 0; i < s->times && !why[0] && !gave_up; i++) {
        const set_t *to = &t->sets[(s->set + i) % t->sets_n];
        const bool middle = s->what == CHANGE && i >= 3 && i + 3 < s->times;
        if (tell && !middle) {
          fprintf(tell, i ? "\n  limits: " : "  limits: ");
          tell_set(tell, to);
        } else if (tell && i == 3) {
          fprintf(tell, "\n  and so on, %u changes in all", s->times);
        }
        change_to(to);
        if (s->what != CHANGE_ASKED || why[0] || gave_up) continue;
        uint64_t least = UINT64_MAX;
        look_at(k, left);
        if (why[0] || gave_up) return;
        for (uint32_t n = 0; n < rates; n++) least = min_u64(least, left[n]);
        if (!rates) continue;
        if (tell) fprintf(tell, "\n  key %u: acquire %" PRIu64 ": ", s->key, least + 1);
        acquire(k, s, least + 1, 0);
      }
  }
  if (tell) fprintf(tell, "\n");
}

/* Does it hold? */
static bool story_holds(const story_t *t, bool anew) {
  static const set_t none;
  fresh_start(t, anew);
  why[0] = 0;
  gave_up = false;
  now = t->begin;
  set = &none;
  rates = rules_n = handles_n = 0;
  shape = 0;
  quickest[true] = 1e30L;
  memset(handles, 0, sizeof handles);
  for (int k = 0; k < KEYS; k++) {
    (void)snprintf(keys[k].name, sizeof keys[k].name, "%" PRIu64, key_number++);
    keys[k].held = keys[k].since_n = 0;
    keys[k].retry_at = 0;
    keys[k].burst = keys[k].rate = 0;
  }
  if (tell) {
    fprintf(tell, "  limits: ");
    tell_set(tell, &t->sets[0]);
    fprintf(tell, "\n");
  }
  change_to(&t->sets[0]);
  for (uint32_t i = 0; i < t->steps_n && !why[0] && !gave_up; i++) {
    one_step(t, &t->steps[i]);
    steps_done++;
  }
  for (int k = 0; k < KEYS; k++) keys[k].since_n = 0;
  stories_left += gave_up;
  return !why[0] || gave_up;
}

/* Shrinking -------------------------------------------------------------------------------------- */

static bool still_fails(story_t *t, const story_t *smaller) {
  if (story_holds(smaller, true)) return false;
  *t = *smaller;
  return true;
}

static bool shrink_steps(story_t *t) {
  bool any = false;
  for (uint32_t size = t->steps_n / 2; size; size /= 2) {
    for (uint32_t i = 0; i + size <= t->steps_n;) {
      story_t smaller = *t;
      memmove(&smaller.steps[i], &smaller.steps[i + size],
              (t->steps_n - i - size) * sizeof *t->steps);
      smaller.steps_n -= size;
      if (still_fails(t, &smaller))
        any = true;
      else
        i++;
    }
  }
  return any;
}

static bool shrink_number(story_t *t, uint64_t *number, uint64_t least) {
  bool any = false;
  uint64_t was = *number;
  for (uint64_t cut = was - min_u64(was, least); cut; cut /= 2) {
    while (*number >= least + cut) {
      *number -= cut;
      story_t smaller = *t;
      if (story_holds(&smaller, true)) {
        *number += cut;
        break;
      }
      any = true;
    }
  }
  return any;
}

static bool shrink_step(story_t *t, step_t *s) {
  bool any = false;
  const step_t was = *s;
  uint64_t times = s->times;
  if (s->pause_is) {
    s->pause_is = AS_IT_IS;
    if (story_holds(t, true)) *s = was;
  }
  if (s->key) {
    uint32_t key = s->key;
    s->key = 0;
    if (story_holds(t, true)) s->key = key;
  }
  for (uint64_t cut = times - 1; cut; cut /= 2)
    while (s->times > cut) {
      s->times -= (uint32_t)cut;
      if (!story_holds(t, true)) continue;
      s->times += (uint32_t)cut;
      break;
    }
  any |= shrink_number(t, &s->pause, 0);
  if (s->cost_is == AS_IT_IS) any |= shrink_number(t, &s->cost, 1);
  return any || memcmp(&was, s, sizeof was) != 0;
}

static bool shrink_limit(story_t *t, fshm_limit *l) {
  const fshm_limit was = *l;
  static const uint64_t rounds[] = {1000000000, 60000000000, 3600000000000};
  if (l->strict) {
    l->strict = 0;
    if (story_holds(t, true)) l->strict = 1;
  }
  for (int i = 0; i < 3 && l->per_ns; i++) {
    uint64_t per = l->per_ns;
    l->per_ns = rounds[i];
    if (per == rounds[i] || !limit_valid(l) || story_holds(t, true))
      l->per_ns = per;
    else
      break;
  }
  return memcmp(&was, l, sizeof was) != 0;
}

static void shrink(story_t *t) {
  for (int round = 0; round < 8; round++) {
    bool any = shrink_steps(t);
    for (uint32_t i = 0; i < t->steps_n; i++) any |= shrink_step(t, &t->steps[i]);
    for (uint32_t i = 0; i < t->sets_n; i++)
      for (uint32_t k = 0; k < t->sets[i].count; k++) any |= shrink_limit(t, &t->sets[i].limits[k]);
    if (!any) return;
  }
}

static double seconds(void) {
  struct timespec t;
  (void)clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static uint64_t number_from(int argc, char **argv, int i, const char *name, uint64_t otherwise) {
  const char *text = argc > i ? argv[i] : name ? getenv(name) : NULL;
  return text && *text ? strtoull(text, NULL, 10) : otherwise;
}

int main(int argc, char **argv) {
  const double seconds_at_most = getenv("CHECK_FEWER") ? 2 : 10;
  uint64_t stories = number_from(argc, argv, 1, "STORIES", 0);
  uint64_t seed = number_from(argc, argv, 2, "STORIES_SEED", 20261130);
  uint64_t first = number_from(argc, argv, 3, NULL, 0), i = first;
  static story_t t;
  most_sets = (uint32_t)min_u64(MOST_SETS, number_from(argc, argv, 4, "STORIES_SETS", MOST_SETS));
  const double began = seconds();
  for (; !stories || i < first + stories; i++) {
    if (!stories && i % 256 == 0 && seconds() - began > seconds_at_most) break;
    if (stories && i % 65536 == 0) (void)alarm(300); /* of a hang, not of many stories */
    random_story(&t, seed, i);
    if (story_holds(&t, false)) continue;
    failed++;
    fprintf(stderr, "story %" PRIu64 " of seed %" PRIu64 " failed: %s\n", i, seed, why);
    if (story_holds(&t, true)) {
      fprintf(stderr, "it holds on a fresh segment: repeat from an earlier one\n");
      tell = stderr;
      (void)story_holds(&t, false);
    } else {
      if (!getenv("STORIES_LONG")) shrink(&t);
      tell = stderr;
      fprintf(stderr, "in its shortest form, at %" PRIu64 " ns:\n", t.begin);
      (void)story_holds(&t, true);
      fprintf(stderr, "  %s\n", why);
    }
    break;
  }
  passed += i - first;
  /* of the processor's time: others may be at work */
  const double took = (double)clock() / CLOCKS_PER_SEC;
  printf("%" PRIu64 " stories of seed %" PRIu64 ", %" PRIu64 " steps, %" PRIu64
         " beyond the reference, %.0f stories a second\n",
         i - first, seed, steps_done, stories_left, (double)(i - first) / took);
  return done();
}
