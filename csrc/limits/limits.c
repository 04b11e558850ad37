/* limits.c - the table of limiters: names, their limits, and changing them at run time.
 *
 * The limits of a name belong to the name: whoever sets them last sets them for all processes. A rule is written into a
 * rule index of the limiter's table that its writer owns; then one swap of (current, set) makes the rules the present ones. A
 * rule stays in its rule index while a key's state refers to it; a sweep over the table of slots finds out.
 */
#include <stdlib.h>
#include <unistd.h>

#include "../core/internal.h"

#define SWEEPS \
  64 /* of one publication: each that frees nothing means that another has changed the limits */

static uint64_t mix(uint64_t x) { /* splitmix64's finaliser */
  x += UINT64_C(0x9e3779b97f4a7c15);
  x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
  x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
  return x ^ x >> 31;
}

int fshm_limit_check(const fshm_limit *l, uint64_t *largest_n) {
  bool known = !kind_has_period(l->kind) || l->per_ns >= 1000;
  known &= l->kind <= FSHM_PERMITS || l->kind == FSHM_LEASE;
  *largest_n = known ? limit_largest_n(l->kind, l->per_ns) : 0;
  return limit_valid(l) ? FSHM_OK : FSHM_E_ARGUMENT;
}

/* Copy a rule out. The caller makes sure afterwards that its rule index was not given to another one. */
static inline HOT void read_rule(const limiter_entry_t *e, unsigned rule_index, rule_t *out) {
  for (unsigned k = 0; k < RULE_WORDS; k++) out->words[k] = load_relaxed(&e->rules[rule_index][k]);
}

/* The same for a set: the caller makes sure that `current` has not changed. How many rules, 0 = no such set. */
static inline HOT uint32_t read_set(const limiter_entry_t *e, uint64_t set, rule_t *out) {
  uint32_t count = SET_COUNT(set);
  if (count < 1 || count > FSHM_MAX_LIMITS) return 0;
  for (uint32_t i = 0; i < count; i++) read_rule(e, SET_RULE(set, i), &out[i]);
  return count;
}

/* Every reset gives another salt: what was there is nobody's from then on. */
static inline uint64_t salt_of(const fshm_segment *s, uint64_t current) {
  uint64_t resets = CURRENT_RESETS(current);
  return likely(!resets) ? 0 : mix(s->secret[0] ^ mix(resets)) & ~UINT64_C(1);
}

/* The limits as they stand now. False: none, or damaged; then the snapshot has no limit at all, so that whoever
 * goes on with it divides by nothing (rule_sane). */
static inline HOT bool limits_load_inline(const fshm_segment *s, uint32_t index, snapshot_t *p) {
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
    p->permits = 0;
    p->salt = salt_of(s, current);
    p->count = 1;
    if (likely(has == 1 && p->rules[0].kind != FSHM_PERMITS)) {
      p->tail[0] = tail | WHO_OF(0, p->rules[0].place, SET_RULE(set, 0), 0);
      if (likely(current && rule_sane(&p->rules[0]))) return true;
      break;
    }
    uint32_t i = 0;
    for (; i < has && rule_sane(&p->rules[i]); i++) {
      const rule_t *r = &p->rules[i];
      p->tail[i] = tail | WHO_OF(0, r->place, SET_RULE(set, i), 0);
      if (likely(r->kind != FSHM_PERMITS)) continue;
      if (i + 1 != has || r->n > MAX_PERMITS) break; /* the last: limiter_open() */
      p->permits = (uint32_t)r->n;
    }
    p->count = has - (p->permits != 0);
    if (likely(current && has && i == has)) return true;
    break;
  }
  p->count = p->permits = 0;
  return false;
}
bool limits_load(const fshm_segment *s, uint32_t index, snapshot_t *p) {
  return limits_load_inline(s, index, p);
}

/* numbers: NULL, or those of a handle (fshm_limiter_number), never more than the name's own. */
void limits_number(const uint64_t *numbers, snapshot_t *p) {
  if (likely(!numbers)) return;
  for (uint32_t i = 0; i < p->count; i++)
    if (p->rules[i].kind == FSHM_WINDOW && numbers[i])
      p->rules[i].n = min_u64(p->rules[i].n, numbers[i]);
  if (p->permits && numbers[p->count])
    p->permits = (uint32_t)min_u64(p->permits, numbers[p->count]);
}
/* limits_load(), with the numbers of the handle. */
bool limits_load_of(const fshm_limiter *l, snapshot_t *p) {
  bool readable = limits_load_inline(l->segment, l->index, p);
  limits_number(l->numbers, p);
  return readable;
}

int fshm_limiter_number(fshm_limiter *l, const uint64_t *numbers, uint32_t count) {
  snapshot_t p;
  if (!limits_load(l->segment, l->index, &p)) return damage_limits(l->segment, l->index);
  if (count != p.count + (p.permits > 0)) return FSHM_E_ARGUMENT;
  for (uint32_t i = 0; i < count; i++) {
    if (i < p.count && p.rules[i].kind != FSHM_WINDOW) return FSHM_E_ARGUMENT;
    if (numbers[i] < 1 || numbers[i] > (i < p.count ? p.rules[i].n : p.permits))
      return FSHM_E_ARGUMENT;
  }
  for (uint32_t i = 0; i < count; i++) l->numbered[i] = numbers[i];
  l->numbers = l->numbered;
  return FSHM_OK;
}

/* The rule that a state with this label was written under: for a caller that makes sure afterwards that the slot has
 * not changed, since a rule index is not given to another rule while a state refers to it. */
bool limits_rule(const fshm_segment *s, uint32_t index, unsigned label, rule_t *out) {
  read_rule(&s->limiters[index], label, out);
  atomic_thread_fence(memory_order_acquire); /* the copy, before the second look at the slot */
  return rule_sane(out) && out->kind != FSHM_PERMITS; /* which labels no state */
}

static COLD bool set_wrong(const limiter_entry_t *e, uint64_t set) {
  rule_t rules[FSHM_MAX_LIMITS];
  unsigned places = 0;
  uint32_t count = read_set(e, set, rules);
  for (uint32_t i = 0; i < count; i++) {
    bool permits = rules[i].kind == FSHM_PERMITS;
    if (!rule_genuine(&rules[i]) || (permits && i + 1 != count)) return true;
    if (permits != (rules[i].place == PLACE_NONE) || places >> rules[i].place & 1) return true;
    places |= 1U << rules[i].place;
  }
  return !count;
}

/* A rule that states may refer to, copied out. False: there is none in the rule index, or it went to another. */
static COLD bool read_used(const limiter_entry_t *e, unsigned rule_index, rule_t *out,
                           uint64_t *owner) {
  *owner = atomic_load_explicit(&e->owners[rule_index], memory_order_acquire); /* with publish() */
  if (!(*owner & RULE_USED)) return false;
  read_rule(e, rule_index, out);
  atomic_thread_fence(memory_order_acquire);
  return load_relaxed(&e->owners[rule_index]) == *owner;
}

/* Are these limits such as nobody has set? Certain: rules are complete before they are named, and do not change while
 * they are. published: we have seen limits of this name; else it may have none yet. */
COLD bool limits_wrong(const fshm_segment *s, uint32_t index, bool published) {
  const limiter_entry_t *e = &s->limiters[index];
  rule_t rule;
  uint64_t owner;
  for (unsigned rule_index = 0; rule_index < RULES; rule_index++)
    if (read_used(e, rule_index, &rule, &owner) && !rule_genuine(&rule)) return true;
  for (int tries = 0; tries < MAX_TRIES; tries++) {
    uint64_t current = atomic_load_explicit(&e->current, memory_order_acquire);
    uint64_t set = load_relaxed(&e->set);
    bool wrong = current ? !CURRENT_VERSION(current) || set_wrong(e, set) : published || set;
    atomic_thread_fence(memory_order_acquire); /* the copies, before the second look */
    if (load_relaxed(&e->current) == current) return wrong;
  }
  return false; /* always being changed: nothing is certain */
}

/* An id is a hash of the name, without BESIDE, and that bit where the limiter is there for another one's sake:
 * its calls have no counters. So whoever sees an entry claimed knows which it is. */
#define BESIDE UINT64_C(1)

static COLD uint64_t name_id(const fshm_segment *s, const char *name, uint64_t length) {
  uint64_t id = fshm_siphash(s->secret[0], s->secret[1], name, length) & ~BESIDE;
  return id ? id : 2 * BESIDE;
}

/* Which counters an entry's calls count in; COUNTERS: none. Entries are claimed in order and never given back, so
 * this is the same for all processes, at any time. */
static COLD uint32_t counters_of(const fshm_segment *s, uint32_t index) {
  uint32_t before = 0;
  if (load_relaxed(&s->limiters[index].id) & BESIDE) return COUNTERS;
  for (uint32_t i = 0; i < index && before < COUNTERS - 1; i++)
    before += !(load_relaxed(&s->limiters[i].id) & BESIDE);
  return before;
}

static uint64_t read_name(const limiter_entry_t *e, char *out) {
  uint64_t length = min_u64(load_relaxed(&e->name_length), FSHM_MAX_LIMITER_NAME);
  for (uint64_t i = 0; i < length; i++) out[i] = (char)load_relaxed(&e->name[i]);
  return length;
}

/* Do a name and its id differ? Certain once limits are published: whoever publishes them has written both
 * before. (Killed before, it leaves an id without a name, for the next to complete.) */
COLD bool limits_name_wrong(const fshm_segment *s, uint32_t index) {
  const limiter_entry_t *e = &s->limiters[index];
  char name[FSHM_MAX_LIMITER_NAME];
  if (load_relaxed(&e->name_length) > FSHM_MAX_LIMITER_NAME) return true;
  /* Pairs with the release in publish(): what follows is read after it. */
  if (!atomic_load_explicit(&e->current, memory_order_acquire)) return false;
  uint64_t length = read_name(e, name);
  return (load_relaxed(&e->id) & ~BESIDE) != name_id(s, name, length);
}

/* How many permits may be held, and the changes of that number: read before `current`, and before any count that
 * limits_lower_most() is to stand on. */
#define MOST_BITS 17
#define MOST_OF(most) ((uint32_t)((most) & ((1U << MOST_BITS) - 1)))
uint64_t limits_most(const fshm_segment *s, uint32_t index) {
  return atomic_load_explicit(&s->limiters[index].most,
                              memory_order_acquire); /* with raise_most() */
}

/* Permits up to this number may be held: the largest limit of permits that this name ever had, until a count
 * has found nothing held beyond the present one. */
uint32_t limits_most_permits(uint64_t most, const snapshot_t *p) {
  uint32_t permits = MOST_OF(most) > MAX_PERMITS ? MAX_PERMITS : MOST_OF(most);
  return permits > p->permits ? permits : p->permits;
}

/* A look at all keys that began after `most` was read has found nothing held beyond the present limit. Where limits were
 * published since, or a permit there was taken by older ones, the word has changed, whatever its number is. */
void limits_lower_most(fshm_segment *s, uint32_t index, const snapshot_t *p, uint64_t most) {
  uint64_t lower = most >> MOST_BITS << MOST_BITS | p->permits;
  if (MOST_OF(most) > p->permits)
    (void)atomic_compare_exchange_strong(&s->limiters[index].most, &most, lower);
}

static uint32_t permits_in(const rule_t *rules, uint32_t count) {
  bool any = count && rules[count - 1].kind == FSHM_PERMITS;
  return any ? (uint32_t)min_u64(rules[count - 1].n, MAX_PERMITS) : 0;
}

/* Before anybody can see a set, and whatever the number was: each publication is a change. */
static bool raise_most(limiter_entry_t *e, uint32_t n) {
  uint64_t seen = load_relaxed(&e->most);
  for (int i = 0; n && i < MAX_TRIES; i++) {
    uint64_t next = ((seen >> MOST_BITS) + 1) << MOST_BITS | max_u64(MOST_OF(seen), n);
    if (atomic_compare_exchange_strong(&e->most, &seen, next)) return true;
  }
  return !n;
}
bool limits_raise_most(fshm_segment *s, uint32_t index, uint32_t permits) {
  return raise_most(&s->limiters[index], permits);
}

/* Is this entry's id not what it was: does it have our name under another, or limits without any? */
static COLD bool entry_wrong(fshm_segment *s, uint32_t index, const char *name, uint64_t length) {
  char found[FSHM_MAX_LIMITER_NAME];
  if (!limits_name_wrong(s, index)) return false;
  const limiter_entry_t *e = &s->limiters[index];
  bool ours = read_name(e, found) == length && !memcmp(found, name, length);
  if (!ours && load_relaxed(&e->id)) return false; /* another's, which it may find for itself */
  damage_note(s, FSHM_DAMAGE_NAME, index);
  return true;
}

/* Find the entry of a name, or claim one, with these bits in its id. Entries are claimed in order and stay: two
 * processes that claim for one name contend for the same entry, and the loser finds the winner's. */
static int entry_of(fshm_segment *s, const char *name, uint64_t length, bool claim, uint64_t bits,
                    uint32_t *index) {
  uint64_t id = name_id(s, name, length);
  for (uint32_t i = 0; i < s->limiter_count; i++) {
    uint64_t seen = load_relaxed(&s->limiters[i].id);
    /* Passing by an entry with another id and our name, or taking one that is free but has limits, would
     * count apart from those who opened it before it was written over. */
    if ((seen & ~BESIDE) != id && entry_wrong(s, i, name, length)) return FSHM_E_DAMAGED;
    if (!seen && !claim) return FSHM_E_NOT_FOUND;
    if (!seen &&
        atomic_compare_exchange_strong_explicit(&s->limiters[i].id, &seen, id | bits,
                                                memory_order_relaxed, memory_order_relaxed))
      seen = id;
    if ((seen & ~BESIDE) != id) continue;
    for (uint64_t k = 0; claim && k < length; k++)
      store_relaxed(&s->limiters[i].name[k], (unsigned char)name[k]);
    if (claim) store_relaxed(&s->limiters[i].name_length, (uint32_t)length);
    *index = i;
    return FSHM_OK;
  }
  return claim ? FSHM_E_LIMITERS : FSHM_E_NOT_FOUND;
}

/* Changing the limits ------------------------------------------------------------------------------ */

static bool owner_lives(fshm_segment *s, uint64_t owner) {
  uint64_t process = (owner & 0xffff) - 1;
  if (process >= PROCESSES)
    return true; /* has no place in the process table: cannot be asked after */
  return load_relaxed(&s->processes[process].incarnation) == owner >> 16 &&
         process_alive(s, (uint32_t)process);
}

/* A rule index that no state refers to and nobody alive is filling becomes ours. */
static int take_rule(fshm_segment *s, limiter_entry_t *e, uint64_t owner) {
  for (unsigned i = 0; i < RULES; i++) {
    uint64_t holder = load_relaxed(&e->owners[i]);
    if ((holder & RULE_USED) || (holder && owner_lives(s, holder))) continue;
    /* acquire: pairs with the release of free_rules(): our rule is written after the last state that referred to the
     * former one has gone. */
    if (atomic_compare_exchange_strong_explicit(&e->owners[i], &holder, owner, memory_order_acquire,
                                                memory_order_relaxed))
      return (int)i;
  }
  return -1;
}

/* The rule index that has this very rule, named once more: its owner word says in which version. */
static int find_rule(limiter_entry_t *e, const rule_t *rule, uint64_t version) {
  rule_t found;
  uint64_t owner;
  for (unsigned i = 0; i < RULES; i++) {
    if (!read_used(e, i, &found, &owner) || memcmp(&found, rule, sizeof found) != 0) continue;
    /* Never an older version than it says: then our own swap of `current` fails in any case. */
    if (owner >= (RULE_USED | version) ||
        atomic_compare_exchange_strong(&e->owners[i], &owner, RULE_USED | version))
      return (int)i;
  }
  return -1;
}

static void fill_rule(limiter_entry_t *e, unsigned rule_index, const rule_t *rule,
                      uint64_t version) {
  /* Pairs with the fence of limits_rule(): whoever reads a word of this rule finds the slot changed. */
  atomic_thread_fence(memory_order_release);
  for (unsigned k = 0; k < RULE_WORDS; k++) store_relaxed(&e->rules[rule_index][k], rule->words[k]);
  atomic_store_explicit(&e->owners[rule_index], RULE_USED | version, memory_order_release);
}

/* Which slot of a key each rule counts in: its place. What a limit has consumed goes to the limit that takes its place,
 * so the same limits keep theirs: first those of the same kind and period, also such as were there before; then by
 * order. Others are new. No present limit is left without an heir for the sake of one that was there before: what it has
 * consumed would count no more. */
static void place_rules(const limiter_entry_t *e, const rule_t *present, uint32_t has,
                        rule_t *rules, uint32_t count) {
  unsigned taken = 0, there = 0, ever = 0, left = 0; /* sets of places; of rules without one */
  rule_t used[RULES];
  uint32_t known = 0;
  uint64_t owner;
  for (unsigned i = 0; i < RULES; i++)
    if (read_used(e, i, &used[known], &owner) && used[known].place < PLACES)
      ever |= 1U << used[known++].place;
  for (uint32_t k = 0; k < has; k++)
    if (present[k].place < PLACES) there |= 1U << present[k].place;
  ever |= there;
  for (uint32_t i = 0; i < count; i++) {
    rules[i].place = PLACE_NONE;
    if (rules[i].kind != FSHM_PERMITS) left |= 1U << i;
  }
  for (unsigned round = 0; round < 4; round++) {
    for (uint32_t i = 0; i < count; i++) {
      if (!(left >> i & 1)) continue;
      unsigned place = PLACE_NONE;
      if (round == 0 || round == 2) { /* of the present limits: the same, then any */
        for (uint32_t k = has; k-- > 0;) {
          bool same = present[k].kind == rules[i].kind && present[k].per == rules[i].per;
          if (present[k].place < PLACES && !(taken >> present[k].place & 1) && (round || same))
            place = present[k].place;
        }
      } else if (round == 1) {
        /* The same limit, that was there before; if all the present ones have heirs. */
        if (__builtin_popcount(left) <= __builtin_popcount(there & ~taken)) break;
        for (uint32_t k = 0; k < known; k++) {
          bool same = used[k].kind == rules[i].kind && used[k].per == rules[i].per;
          if (same && !((taken | there) >> used[k].place & 1)) place = used[k].place;
        }
      } else { /* a place where no limit was before; else one that is not taken */
        for (unsigned p = PLACES; p-- > 0;)
          if (!(taken >> p & 1) && (place == PLACE_NONE || !(ever >> p & 1))) place = p;
      }
      if (place == PLACE_NONE) continue;
      rules[i].place = (uint16_t)place;
      taken |= 1U << place;
      left &= ~(1U << i);
    }
  }
}

/* Sweeps: all slots of a limiter are brought under few rules, so that the rule indexes of the others can be given to new ones.
 * DESIGN.md, "Limits that change". */
typedef struct {
  fshm_segment *s;
  uint32_t index;
  uint64_t now;
  bool fixed; /* the caller gave the time */
  snapshot_t snapshot;
  int victim; /* a label that is to go, whatever rule takes its slots; -1: none */
  uint32_t labels[RULES]; /* slots of each, after the sweep */
  unsigned places; /* that have slots: a set */
} sweep_t;

/* Where a state of this label should live: under the present rule of its place, or as it is. */
static COLD pair_t swept(const sweep_t *w, pair_t pair, unsigned place) {
  rule_t old, rule;
  pair_t to = pair;
  bool found = false;
  uint64_t best = 0;
  unsigned label = WHO_LABEL(pair.who);
  to.who = (pair.who & ~WHO_LABELS) | WHO_OF(0, 0, label, CURRENT_EPOCH(w->snapshot.current));
  if (!limits_rule(w->s, w->index, label, &old)) return to; /* nobody has written this */
  for (uint32_t i = 0; i < w->snapshot.count; i++) {
    const rule_t *r = &w->snapshot.rules[i];
    uint64_t state;
    if (r->place != place) continue;
    /* Only where it is over no later, for the key has not been asked: limits of a moment slow nothing down. */
    state = rule_convert(r, &old, pair.when, w->now);
    if (rule_over(r, state) > rule_over(&old, pair.when)) continue;
    return (pair_t){(pair.who & ~WHO_LABELS) | (w->snapshot.tail[i] & WHO_LABELS), state};
  }
  if ((int)label != w->victim) return to;
  for (
      unsigned rule_index = 0; rule_index < RULES;
      rule_index++) { /* the earliest that is not before its own end; if there is none, the slowest */
    uint64_t owner;
    const limiter_entry_t *e = &w->s->limiters[w->index];
    if ((int)rule_index == w->victim || !read_used(e, rule_index, &rule, &owner) ||
        rule.place != place)
      continue;
    uint64_t state = rule_convert(&rule, &old, pair.when, w->now);
    uint64_t over = rule_over(&rule, state), mine = rule_over(&old, pair.when);
    if (state == NO_STATE) continue;
    if (found && (best < mine ? over <= best : over < mine || over >= best)) continue;
    /* In use from now on, for whoever has counted its slots before: free_rules(). */
    const uint64_t later = RULE_USED | CURRENT_VERSION(CURRENT_VERSION(w->snapshot.current) + 1);
    if (owner < later && !atomic_compare_exchange_strong(
                             &w->s->limiters[w->index].owners[rule_index], &owner, later))
      continue;
    to = (pair_t){(to.who & ~WHO_OF(0, 0, RULES - 1, 0)) | WHO_OF(0, 0, rule_index, 0), state};
    best = over;
    found = true;
  }
  return to;
}

/* Is it a slot of this limiter's meters? Of a shared counter, its index says so; one that was never used is changed too,
 * since a call may be about to begin it. */
static inline bool state_slot_of(const fshm_segment *s, uint32_t index, uint64_t slot,
                                 uint64_t who) {
  return slot >= s->slot_count || ((who & 1) && WHO_LIMITER(who) == index);
}

/* One slot. False: it could not be changed, since others change it all the time. */
static COLD bool sweep_slot(sweep_t *w, uint64_t slot) {
  fshm_segment *s = w->s;
  const bool shared = slot >= s->slot_count;
  for (int tries = 0; tries < MAX_TRIES; tries++) {
    pair_t pair = {load_relaxed(&s->slots[slot].who), 0};
    if (!state_slot_of(s, w->index, slot, pair.who)) return true;
    pair = pair_load(&s->slots[slot]);
    if (!state_slot_of(s, w->index, slot, pair.who) || IS_PERMIT(pair.when)) return true;
    const unsigned place =
        shared ? (unsigned)(slot - s->slot_count) % SHARED_PLACES : WHO_PLACE(pair.who);
    /* As a call does it (limiter.c: outdated()): by limits that are in force after the slot was read. Others may have
     * changed them, swept, and given the rule indexes of ours to other rules. */
    if (entry_current(w->s, w->index) != w->snapshot.current) {
      if (!limits_load(w->s, w->index, &w->snapshot)) return false;
      if (!w->fixed)
        w->now =
            segment_now(s); /* after they were published: states drain at their pace from then on */
      continue;
    }
    bool over = IS_PENDING(pair.when) || state_expires(pair.when) <= minus(w->now, CLOCKS_DIFFER);
    pair_t to = {0, 0}, seen = pair;
    over |= shared && !shared_is_of(pair.who, w->snapshot.current);
    if (!over) to = swept(w, pair, place);
    if (!to.when) to.who = 0;
    if (shared) to.who = shared_who(pair.who, w->snapshot.current, to.who | 1);
    /* A pending slot too is emptied: its claimer may go by limits of before. */
    if (to.who != pair.who && !pair_cas(&s->slots[slot], &seen, to)) continue;
    if (to.when) {
      w->labels[WHO_LABEL(to.who)]++;
      w->places |= 1U << place;
    }
    return true;
  }
  return false;
}

/* The slots that a limiter's meters can be in: those of keys, then those of its shared counters. */
static inline uint64_t state_slot_end(const fshm_segment *s) {
  return s->slot_count + UINT64_C(1) * SHARED * SHARED_PLACES;
}
static inline uint64_t state_slot_at(const fshm_segment *s, uint32_t index, uint64_t i) {
  return i < s->slot_count ? i : i + (uint64_t)index * SHARED * SHARED_PLACES;
}

static COLD bool sweep_slots(sweep_t *w) {
  memset(w->labels, 0, sizeof w->labels);
  w->places = 0;
  for (uint64_t i = 0; i < state_slot_end(w->s); i++)
    if (!sweep_slot(w, state_slot_at(w->s, w->index, i))) return false;
  return true;
}

/* The last rule of each place that has slots: which limit their tokens belong to, should it come back. A set of rule indexes. */
static COLD unsigned last_rules(const sweep_t *w) {
  unsigned last[PLACES] = {0}, rules = 0;
  uint64_t when[PLACES] = {0}, owner;
  rule_t rule;
  for (unsigned rule_index = 0; rule_index < RULES; rule_index++) {
    if (!read_used(&w->s->limiters[w->index], rule_index, &rule, &owner) || rule.place >= PLACES)
      continue;
    if (owner <= when[rule.place]) continue;
    when[rule.place] = owner;
    last[rule.place] = rule_index;
  }
  for (unsigned place = 0; place < PLACES; place++)
    if (when[place] && w->places >> place & 1) rules |= 1U << last[place];
  return rules;
}

/* A rule is to be freed that buckets may have drained by: charges of before may be given back later (limits_pace_since).
 * Killed in between: a pace that is said, of a rule that is still there. False: others write these words all the time. */
static COLD bool note_freed(limiter_entry_t *e, unsigned rule_index, uint64_t version) {
  rule_t rule;
  uint64_t owner;
  if (!read_used(e, rule_index, &rule, &owner) || rule.kind != FSHM_BUCKET || !rule_sane(&rule))
    return true;
  const uint64_t pace = bucket_pace(&rule);
  uint64_t seen = load_relaxed(&e->freed_pace);
  int tries = 0;
  while ((!seen || pace < seen) && !atomic_compare_exchange_strong(&e->freed_pace, &seen, pace))
    if (++tries == MAX_TRIES) return false;
  seen = load_relaxed(&e->freed_version);
  while (seen < version && !atomic_compare_exchange_strong(&e->freed_version, &seen, version))
    if (++tries == MAX_TRIES) return false;
  return true;
}

uint64_t limits_pace_since(const fshm_segment *s, uint32_t index, unsigned place,
                           uint64_t version) {
  const limiter_entry_t *e = &s->limiters[index];
  uint64_t fastest = UINT64_MAX, owner;
  rule_t rule;
  for (unsigned rule_index = 0; rule_index < RULES; rule_index++) {
    if (!read_used(e, rule_index, &rule, &owner) || rule.kind != FSHM_BUCKET || rule.place != place)
      continue;
    if (!rule_sane(&rule)) continue; /* nobody has set this */
    if ((owner & ~RULE_USED) > version) fastest = min_u64(fastest, bucket_pace(&rule));
  }
  /* After the rule indexes: who has found one free, or with another rule, finds what note_freed() said of it. Pairs with the
   * release of free_rules(), and of fill_rule() by whoever took the rule index after that. */
  atomic_thread_fence(memory_order_acquire);
  const uint64_t freed = load_relaxed(&e->freed_pace);
  if (freed && load_relaxed(&e->freed_version) > version) fastest = min_u64(fastest, freed);
  return fastest;
}

/* The rule indexes of rules that no state refers to, and that were not named since `version`. How many were freed. */
static COLD unsigned free_rules(const sweep_t *w, uint64_t set, uint64_t version) {
  limiter_entry_t *e = &w->s->limiters[w->index];
  unsigned freed = 0, named = last_rules(w);
  for (uint32_t i = 0; i < SET_COUNT(set); i++) named |= 1U << SET_RULE(set, i);
  for (unsigned rule_index = 0; rule_index < RULES; rule_index++) {
    uint64_t owner = load_relaxed(&e->owners[rule_index]);
    if (!(owner & RULE_USED) || (owner & ~RULE_USED) > version) continue;
    if (named >> rule_index & 1 || w->labels[rule_index]) continue;
    if (!note_freed(e, rule_index, version)) continue;
    freed += atomic_compare_exchange_strong_explicit(&e->owners[rule_index], &owner, 0,
                                                     memory_order_release, memory_order_relaxed);
  }
  return freed;
}

/* Free at least one rule index. False: others have changed the limits meanwhile, or all rules are in use. */
static COLD bool sweep(fshm_segment *s, uint32_t index, uint64_t now) {
  limiter_entry_t *e = &s->limiters[index];
  sweep_t w = {.s = s, .index = index, .victim = -1};
  const uint64_t epochs = UINT64_C(7) << VERSION_BITS;
  /* A new epoch first: whoever goes by what was before finds another `current`, or another slot. */
  uint64_t current = atomic_load_explicit(&e->current, memory_order_acquire);
  pair_t seen = {current, load_relaxed(&e->set)};
  /* And a new version: rule indexes that were named for the next one by a writer that was killed are not newer than it. */
  uint64_t version = CURRENT_VERSION(CURRENT_VERSION(current) + 1);
  version += !version;
  uint64_t rest = current & ~epochs & ~CURRENT_VERSION(UINT64_MAX);
  pair_t next = {rest | ((current + (UINT64_C(1) << VERSION_BITS)) & epochs) | version, seen.when};
  if (!pair_cas(&e->current, &seen, next)) return false;
  if (!limits_load(s, index, &w.snapshot) || w.snapshot.current != next.who) return false;
  w.fixed = now != 0;
  w.now = now ? now : segment_now(s);
  if (!sweep_slots(&w)) return false;
  if (free_rules(&w, next.when, version)) return true;
  /* Each rule still has keys that have used more than the present one admits: of those that are not the last of their
   * place, and not present, the one with the fewest goes. Its slots have counted as slots of the place, so that the
   * place's last rule is kept, and can take them. All that is kept, and a new set, have room: such a rule can be found. */
  unsigned kept = last_rules(&w);
  for (uint32_t i = 0; i < SET_COUNT(next.when); i++) kept |= 1U << SET_RULE(next.when, i);
  static_assert(PLACES + 2 * FSHM_MAX_LIMITS <= RULES, "the last of each place, two sets");
  for (unsigned rule_index = 0; rule_index < RULES; rule_index++) {
    if (kept >> rule_index & 1 || !w.labels[rule_index]) continue;
    if (w.victim < 0 || w.labels[rule_index] < w.labels[w.victim]) w.victim = (int)rule_index;
  }
  if (w.victim < 0) return false;
  for (uint64_t i = 0; i < state_slot_end(s); i++)
    if (!sweep_slot(&w, state_slot_at(s, index, i))) return false;
  uint32_t left = 0;
  for (uint64_t i = 0; i < state_slot_end(s); i++) {
    uint64_t slot = state_slot_at(s, index, i), who = load_relaxed(&s->slots[slot].who);
    left += state_slot_of(s, index, slot, who) && (int)WHO_LABEL(who) == w.victim &&
            load_relaxed(&s->slots[slot].when);
  }
  w.labels[w.victim] = left;
  return free_rules(&w, next.when, version) > 0;
}

/* Give up rule indexes that were filled or taken for a set that was not published. */
static void give_up(limiter_entry_t *e, const int *mine, uint64_t owner) {
  for (uint32_t i = 0; i < FSHM_MAX_LIMITS; i++) {
    uint64_t seen = owner;
    if (mine[i] >= 0) (void)atomic_compare_exchange_strong(&e->owners[mine[i]], &seen, 0);
  }
}

/* Make these rules the present limits of the entry. now: of a sweep; 0 = ask the clock. */
static int publish(fshm_segment *s, uint32_t index, rule_t *rules, uint32_t count, uint64_t now) {
  limiter_entry_t *e = &s->limiters[index];
  uint32_t me;
  uint64_t incarnation, owner;
  int mine[FSHM_MAX_LIMITS] = {-1, -1, -1, -1}; /* rule indexes that we own */
  if (process_identity(s, &me, &incarnation))
    owner = (incarnation << 16 | (me + 1)) & ~RULE_USED;
  else
    owner = (((add_relaxed(&s->header->ticket, 1) + 1) << 16) | (PROCESSES + 1)) & ~RULE_USED;
  for (int tries = 0, sweeps = 0; tries < MAX_TRIES; tries++) {
    rule_t present[FSHM_MAX_LIMITS];
    uint64_t current = atomic_load_explicit(&e->current, memory_order_acquire);
    uint64_t set = load_relaxed(&e->set), next_set = count;
    uint32_t has = current ? read_set(e, set, present) : 0;
    atomic_thread_fence(memory_order_acquire);
    if (load_relaxed(&e->current) != current) continue;
    place_rules(e, present, has, rules, count);
    if (has == count && !memcmp(present, rules, count * sizeof *rules)) {
      give_up(e, mine, owner);
      return FSHM_OK;
    }
    if (!raise_most(e, (uint32_t)max_u64(permits_in(present, has), permits_in(rules, count))))
      break;
    uint64_t version = CURRENT_VERSION(CURRENT_VERSION(current) + 1);
    version += !version; /* 0 is "none yet" */
    int indexes[FSHM_MAX_LIMITS] = {-1, -1, -1, -1};
    bool room = true;
    for (uint32_t i = 0; i < count && room; i++) {
      indexes[i] = find_rule(e, &rules[i], version);
      if (indexes[i] < 0 && mine[i] < 0) mine[i] = take_rule(s, e, owner);
      room = indexes[i] >= 0 || mine[i] >= 0;
    }
    if (!room) {
      if (sweeps++ == SWEEPS) break;
      (void)sweep(s, index, now);
      continue;
    }
    for (uint32_t i = 0; i < count; i++) {
      if (indexes[i] < 0) fill_rule(e, (unsigned)mine[i], &rules[i], version);
      next_set |= (uint64_t)(indexes[i] < 0 ? mine[i] : indexes[i]) << (4 + 4 * i);
    }
    /* The rules are complete before they are named (pairs with the acquire of limits_load()), and counted as in use:
     * killed in between, we leave rules that the next sweep frees. */
    pair_t seen = {current, set};
    pair_t next = {(current & ~CURRENT_VERSION(UINT64_MAX)) | version, next_set};
    bool ok = pair_cas(&e->current, &seen, next);
    /* Not ours again, where the swap has failed: whoever has set the same rule meanwhile has found it there. */
    for (uint32_t i = 0; i < count; i++)
      if (indexes[i] < 0) mine[i] = -1;
    if (!ok) continue;
    give_up(e, mine, owner);
    return FSHM_OK;
  }
  give_up(e, mine, owner);
  return FSHM_CONTENDED; /* others alive are changing this name right now */
}

static fshm_limiter *make_handle(fshm_segment *s, const char *name, uint64_t length) {
  fshm_limiter *l = calloc(1, sizeof *l);
  if (!l) return NULL;
  l->segment = s;
  store_relaxed(&l->frontier, (uint32_t)getpid() * 2654435761U); /* processes begin apart */
  l->key[0] = fshm_siphash(s->secret[0], s->secret[1] ^ 1, name, length);
  l->key[1] = fshm_siphash(s->secret[0], s->secret[1] ^ 2, name, length);
  return l;
}

static int limiter_open(fshm_segment *s, const char *name, uint64_t name_length,
                        const fshm_limit *limits, uint32_t count, uint64_t bits, uint64_t now,
                        fshm_limiter **out) {
  rule_t rules[FSHM_MAX_LIMITS];
  *out = NULL;
  if (s->read_only) return FSHM_E_READ_ONLY;
  if (count < 1 || count > FSHM_MAX_LIMITS || name_length < 1 ||
      name_length > FSHM_MAX_LIMITER_NAME)
    return FSHM_E_ARGUMENT;
  for (uint32_t i = 0; i < count; i++) {
    bool permits = limits[i].kind == FSHM_PERMITS;
    if (!limit_valid(&limits[i]) || (permits && i + 1 != count)) return FSHM_E_ARGUMENT;
    rules[i] = rule_make(&limits[i]);
  }
  fshm_limiter *l = make_handle(s, name, name_length);
  if (!l) return FSHM_E_MEMORY;
  int status = entry_of(s, name, name_length, true, bits, &l->index);
  if (status == FSHM_OK && limits_wrong(s, l->index, false)) status = damage_limits(s, l->index);
  if (status == FSHM_OK) status = publish(s, l->index, rules, count, now);
  if (status != FSHM_OK) {
    free(l);
    return status;
  }
  l->counters = (uint16_t)counters_of(s, l->index);
  *out = l;
  return FSHM_OK;
}

int fshm_limiter_open(fshm_segment *s, const char *name, uint64_t name_length,
                      const fshm_limit *limits, uint32_t count, fshm_limiter **out) {
  return limiter_open(s, name, name_length, limits, count, 0, 0, out);
}

int fshm_limiter_open_at(fshm_segment *s, const char *name, uint64_t name_length,
                         const fshm_limit *limits, uint32_t count, uint64_t now,
                         fshm_limiter **out) {
  return limiter_open(s, name, name_length, limits, count, 0, now, out);
}

int fshm_limiter_open_beside(fshm_segment *s, const char *name, uint64_t name_length,
                             const fshm_limit *limits, uint32_t count, fshm_limiter **out) {
  return limiter_open(s, name, name_length, limits, count, BESIDE, 0, out);
}

int fshm_limiter_find(fshm_segment *s, const char *name, uint64_t name_length, fshm_limiter **out) {
  *out = NULL;
  if (s->read_only) return FSHM_E_READ_ONLY;
  fshm_limiter *l = make_handle(s, name, name_length);
  if (!l) return FSHM_E_MEMORY;
  int status = entry_of(s, name, name_length, false, 0, &l->index);
  if (status == FSHM_OK && !load_relaxed(&s->limiters[l->index].current)) status = FSHM_E_NOT_FOUND;
  if (status == FSHM_OK && limits_wrong(s, l->index, false)) status = damage_limits(s, l->index);
  if (status != FSHM_OK) {
    free(l);
    return status;
  }
  l->counters = (uint16_t)counters_of(s, l->index);
  *out = l;
  return FSHM_OK;
}

void fshm_limiter_close(fshm_limiter *l) { free(l); }

void fshm_limiter_share(fshm_limiter *l, int share) { l->share = share != 0; }

/* limits_load(), for those who show limits: only such as somebody has set. */
static bool load_genuine(const fshm_segment *s, uint32_t index, snapshot_t *p) {
  if (limits_wrong(s, index, true) || !limits_load(s, index, p)) return false;
  for (uint32_t i = 0; i < p->count; i++) /* the copy: it may have been written over since */
    if (!rule_genuine(&p->rules[i])) return false;
  return true;
}

static void describe_limits(const snapshot_t *p, fshm_limit *out) {
  for (uint32_t i = 0; i < p->count; i++) {
    const rule_t *r = &p->rules[i];
    out[i] =
        (fshm_limit){r->n, kind_has_period(r->kind) ? r->per : 0, r->burst, r->kind, r->strict};
  }
  if (p->permits) out[p->count] = (fshm_limit){p->permits, 0, 0, FSHM_PERMITS, 0};
}

/* The limits in force: how many, 0 = damaged. */
int fshm_limiter_limits(fshm_limiter *l, fshm_limit *out, uint64_t *version) {
  snapshot_t p;
  if (!load_genuine(l->segment, l->index, &p)) {
    (void)damage_limits(l->segment, l->index);
    return 0;
  }
  *version = CURRENT_VERSION(p.current);
  describe_limits(&p, out);
  return (int)(p.count + (p.permits > 0));
}

/* Forget all keys of the limiter. One swap: from then on nobody finds the old slots. They expire by themselves; those
 * of the epoch before are freed at once. */
int fshm_reset_all(fshm_limiter *l) {
  fshm_segment *s = l->segment;
  limiter_entry_t *e = &s->limiters[l->index];
  const uint64_t epochs = UINT64_C(7) << VERSION_BITS;
  snapshot_t before;
  pair_t seen = {0, 0}, next;
  int tries = 0;
  do {
    if (tries++ == MAX_TRIES) return FSHM_CONTENDED;
    if (!limits_load(s, l->index, &before)) return damage_limits(s, l->index);
    seen = (pair_t){before.current, load_relaxed(&e->set)};
    uint64_t epoch = (seen.who + (UINT64_C(1) << VERSION_BITS)) & epochs;
    next = (pair_t){(CURRENT_RESETS(seen.who) + 1) << (VERSION_BITS + 3), seen.when};
    next.who |= CURRENT_VERSION(seen.who) | epoch;
  } while (!pair_cas(&e->current, &seen, next));
  for (uint64_t i = s->slot_count; i < state_slot_end(s); i++) {
    const uint64_t slot = state_slot_at(s, l->index, i);
    pair_t pair = pair_load(&s->slots[slot]);
    if (pair.who && !shared_is_of(pair.who, next.who)) /* lost: somebody has begun it anew */
      (void)pair_cas(&s->slots[slot], &pair, (pair_t){shared_who(pair.who, before.current, 1), 0});
  }
  for (uint64_t slot = 0; slot < s->slot_count; slot++) {
    pair_t pair = {load_relaxed(&s->slots[slot].who), 0}, empty = {0, 0};
    if (pair.who & 1) { /* of a permit, whose hash can be anything: it is left alone */
      if (WHO_LIMITER(pair.who) != l->index) continue;
      pair = pair_load(&s->slots[slot]);
      if (!(pair.who & 1) || WHO_LIMITER(pair.who) != l->index || IS_PERMIT(pair.when)) continue;
      if (WHO_EPOCH(pair.who) == CURRENT_EPOCH(before.current))
        (void)pair_cas(&s->slots[slot], &pair, empty);
    } else if (pair.who &&
               load_relaxed(&s->key_stats[slot].meta) == key_stats_meta(l->index, pair.who)) {
      found_t f; /* a key whose limit comes with the call, where the old salt leads to it */
      table_find(s, side_salted(pair.who, before.salt), pair.who, &f);
      if (f.pair.who) table_clear(s, f.slot, f.pair.who);
    }
  }
  return FSHM_OK;
}

int fshm_limiter_at(fshm_segment *s, uint32_t index, fshm_limiter_info *out) {
  snapshot_t p;
  memset(out, 0, sizeof *out);
  if (index >= s->limiter_count) return FSHM_E_ARGUMENT;
  const limiter_entry_t *e = &s->limiters[index];
  if (limits_name_wrong(s, index)) {
    damage_note(s, FSHM_DAMAGE_NAME, index);
    return FSHM_E_DAMAGED;
  }
  if (!load_relaxed(&e->id) || !load_relaxed(&e->current)) return 0;
  if (!load_genuine(s, index, &p)) return damage_limits(s, index);
  describe_limits(&p, out->limits);
  out->limits_count = p.count + (p.permits > 0);
  out->version = CURRENT_VERSION(p.current);
  out->resets = CURRENT_RESETS(p.current);
  out->id = load_relaxed(&e->id);
  out->counters = counters_of(s, index);
  out->shared_ns = minus(load_relaxed(&e->shared), segment_now(s));
  out->name_length = (uint32_t)read_name(e, out->name);
  return FSHM_OK;
}
