/* limits.h - the table of limiters: reading the limits of a name, inlined into each call. */
#ifndef FSHM_LIMITS_H
#define FSHM_LIMITS_H

#include "../core/wall.h"

#define VERSION_BITS 37
#define RESET_BITS 20
#define CURRENT_VERSION(c) ((c) & ((UINT64_C(1) << VERSION_BITS) - 1))
#define CURRENT_EPOCH(c) ((unsigned)((c) >> VERSION_BITS) & 7)
#define CURRENT_RESETS(c) ((c) >> (VERSION_BITS + 3) & ((UINT64_C(1) << RESET_BITS) - 1))
#define SET_COUNT(set) ((unsigned)(set) & 15)
#define SET_RULE(set, i) ((unsigned)((set) >> (4 + 4 * (i))) & (RULES - 1))

#define MOST_BITS 17
#define MOST_OF(most) ((uint32_t)((most) & ((1U << MOST_BITS) - 1)))

static inline uint64_t entry_most(const limiter_entry_t *e) {
  /* With raise_most(). */
  return atomic_load_explicit(&e->most, memory_order_acquire);
}

static inline uint64_t entry_current(const fshm_segment *s, uint32_t index) {
  return load_relaxed(&s->limiters[index].current);
}
/* Of the limits in force: a handle that knows this version knows them. */
static inline uint64_t limiter_version(const fshm_limiter *l) {
  return CURRENT_VERSION(entry_current(l->segment, l->index));
}

static inline uint64_t mix(uint64_t x) { /* splitmix64's finaliser */
  x += UINT64_C(0x9e3779b97f4a7c15);
  x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
  x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
  return x ^ x >> 31;
}

/* Copy a rule out. The caller checks afterwards that its rule index was not given to another rule. */
static inline HOT void read_rule(const limiter_entry_t *e, unsigned rule_index, rule_t *out) {
  static_assert(RULE_WORDS == 8, "eight are copied");
  const _Atomic uint64_t *from = e->rules[rule_index];
  out->words[0] = load_relaxed(&from[0]);
  out->words[1] = load_relaxed(&from[1]);
  out->words[2] = load_relaxed(&from[2]);
  out->words[3] = load_relaxed(&from[3]);
  out->words[4] = load_relaxed(&from[4]);
  out->words[5] = load_relaxed(&from[5]);
  out->words[6] = load_relaxed(&from[6]);
  out->words[7] = load_relaxed(&from[7]);
}

/* The same for a set; the caller checks that `current` has not changed. Returns the number of rules; 0 = no such set. */
static inline HOT uint32_t read_set(const limiter_entry_t *e, uint64_t set, rule_t *out) {
  uint32_t count = SET_COUNT(set);
  if (count < 1 || count > FSHM_MAX_LIMITS) return 0;
  for (uint32_t i = 0; i < count; i++) read_rule(e, SET_RULE(set, i), &out[i]);
  return count;
}

/* Each reset changes the salt: afterwards no key finds its former slots. */
static inline uint64_t salt_of(const fshm_segment *s, uint64_t current) {
  uint64_t resets = CURRENT_RESETS(current);
  return likely(!resets) ? 0 : mix(s->secret[0] ^ mix(resets)) & ~UINT64_C(1);
}

void limits_are_other(fshm_segment *s, snapshot_t *p);
uint64_t money_window(fshm_segment *s, const rule_t *rule, uint64_t now); /* money.c */

/* Load the present limits. False: none, or damaged; then the snapshot has no limits, so that a caller that goes on
 * never divides by zero (rule_sane). */
static inline HOT bool limits_load_inline(fshm_segment *s, uint32_t index, snapshot_t *p) {
  const limiter_entry_t *e = &s->limiters[index];
  for (int tries = 0; tries < MAX_TRIES; tries++) {
    /* acquire: pairs with publish(), whose rules are complete before they are named. */
    uint64_t current = atomic_load_explicit(&e->current, memory_order_acquire);
    uint64_t set = load_relaxed(&e->set);
    uint32_t has = SET_COUNT(set);
    if (likely(has == 1)) /* most limiters; without the loop */
      read_rule(e, SET_RULE(set, 0), &p->rules[0]);
    else
      has = read_set(e, set, p->rules);
    atomic_thread_fence(memory_order_acquire); /* the copy, before the second look */
    if (unlikely(load_relaxed(&e->current) != current)) continue;
    const uint64_t tail = WHO_OF(index, 0, 0, CURRENT_EPOCH(current));
    p->current = current;
    p->permits = p->money = 0;
    p->salt = salt_of(s, current);
    p->count = 1;
    if (likely(has == 1 && p->rules[0].kind != FSHM_PERMITS)) {
      p->tail[0] = tail | WHO_OF(0, p->rules[0].place, SET_RULE(set, 0), 0);
      if (unlikely(!current || !rule_sane(&p->rules[0]))) break;
      if (unlikely(p->rules[0].kind == FSHM_CALENDAR)) calendar_ready(s, &p->rules[0]);
      if (unlikely(p->rules[0].kind >= FSHM_MONEY)) limits_are_other(s, p);
      return true;
    }
    if (likely(has == 1)) { /* permits alone */
      p->count = 0;
      p->permits = (uint32_t)p->rules[0].n;
      if (likely(current && rule_sane(&p->rules[0]) && p->rules[0].n <= MAX_PERMITS)) return true;
      break;
    }
    uint32_t i = 0;
    for (; i < has && rule_sane(&p->rules[i]); i++) {
      const rule_t *r = &p->rules[i];
      p->tail[i] = tail | WHO_OF(0, r->place, SET_RULE(set, i), 0);
      if (unlikely(r->kind == FSHM_CALENDAR)) calendar_ready(s, &p->rules[i]);
      if (likely(r->kind != FSHM_PERMITS)) continue;
      if (i + 1 != has || r->n > MAX_PERMITS) break; /* the last: limiter_open() */
      p->permits = (uint32_t)r->n;
    }
    p->count = has - (p->permits != 0);
    if (likely(current && has && i == has)) {
      if (unlikely(p->rules[0].kind >= FSHM_MONEY)) limits_are_other(s, p);
      return true;
    }
    break;
  }
  p->count = p->permits = p->money = 0;
  return false;
}

bool limits_load(fshm_segment *s, uint32_t index, snapshot_t *out);
void limits_own(fshm_segment *s, const own_t *own, snapshot_t *p);
/* limits_load(), with the handle's own limits. */
static inline HOT bool limits_load_of_inline(const fshm_limiter *l, snapshot_t *p) {
  bool readable = limits_load_inline(l->segment, l->index, p);
  if (unlikely(l->own != NULL)) limits_own(l->segment, l->own, p);
  return readable;
}
bool limits_load_of(const fshm_limiter *l, snapshot_t *out);
void limiter_owns(fshm_limiter *l, own_t *own);
bool limits_wrong(const fshm_segment *s, uint32_t index, bool published);
bool limits_name_wrong(const fshm_segment *s, uint32_t index);
uint64_t limits_most(const fshm_segment *s, uint32_t index);
uint32_t limits_most_permits(uint64_t most, const snapshot_t *p);
void limits_lower_most(fshm_segment *s, uint32_t index, const snapshot_t *p, uint64_t most);
bool limits_rule(fshm_segment *s, uint32_t index, unsigned label, rule_t *out);
/* The fastest pace (bucket_pace()) at which a bucket of this place can have drained since the limits had this version.
 * UINT64_MAX: no bucket's limit was in force since. */
uint64_t limits_pace_since(const fshm_segment *s, uint32_t index, unsigned place, uint64_t version);

/* The slots that can hold states of a limiter: those of keys, then those of its shared counters. */
static inline uint64_t state_slot_end(const fshm_segment *s) {
  return s->slot_count + UINT64_C(1) * SHARED * SHARED_PLACES;
}
static inline uint64_t state_slot_at(const fshm_segment *s, uint32_t index, uint64_t i) {
  return i < s->slot_count ? i : i + (uint64_t)index * SHARED * SHARED_PLACES;
}

/* limits.c, for the other files of limits/ */
uint64_t read_name(const limiter_entry_t *e, char *out);
bool read_used(const limiter_entry_t *e, unsigned rule_index, rule_t *out, uint64_t *owner);
uint32_t permits_in(const rule_t *rules, uint32_t count);
bool raise_most(limiter_entry_t *e, uint32_t n);

/* limit_changes.c: make these rules the present limits of the entry. now: of a sweep; 0 = ask the clock. */
int publish(fshm_segment *s, uint32_t index, rule_t *rules, uint32_t count, uint64_t now);

#endif
