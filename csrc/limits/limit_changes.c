/* limit_changes.c - changing the limits of a name at run time. Argued in DESIGN.md, "Limits that change".
 *
 * A process takes a rule index of the limiter's table and writes its rule there; then one swap of (current, set)
 * makes the rules the present ones. A rule keeps its index while a key's state refers to it; a sweep over the hash
 * table finds out.
 */
#include "../permits/wait_queue.h"
#include "limits.h"
#include "shared_counters.h"

/* Of one publication. A sweep that frees nothing means that another process has changed the limits. */
#define SWEEPS 64

static bool owner_lives(fshm_segment *s, uint64_t owner) {
  uint64_t process = (owner & 0xffff) - 1;
  /* Not in the process table: no liveness check is possible. */
  if (process >= PROCESSES) return true;
  return process_joined(s, (uint32_t)process) &&
         load_relaxed(&s->processes[process].incarnation) == owner >> 16 &&
         process_alive(s, (uint32_t)process);
}

/* Take a rule index that no state refers to and no living process is filling. */
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

/* Find the index that has this rule, and mark it as named in `version`. */
static int find_rule(limiter_entry_t *e, const rule_t *rule, uint64_t version) {
  rule_t found;
  uint64_t owner;
  for (unsigned i = 0; i < RULES; i++) {
    if (!read_used(e, i, &found, &owner) ||
        memcmp(found.words, rule->words, sizeof found.words) != 0)
      continue;
    /* Never an older version than it says: then our own swap of `current` fails in any case. */
    if (owner >= (RULE_USED | version) ||
        atomic_compare_exchange_strong(&e->owners[i], &owner, RULE_USED | version))
      return (int)i;
  }
  return -1;
}

static void fill_rule(limiter_entry_t *e, unsigned rule_index, const rule_t *rule,
                      uint64_t version) {
  /* Pairs with the fence of limits_rule(): a caller that reads a word of this rule finds the slot changed. */
  atomic_thread_fence(memory_order_release);
  for (unsigned k = 0; k < RULE_WORDS; k++) store_relaxed(&e->rules[rule_index][k], rule->words[k]);
  atomic_store_explicit(&e->owners[rule_index], RULE_USED | version, memory_order_release);
}

/* Give each rule a place: the slot of a key in which it counts. A new limit takes over what the limit at its place
 * has consumed, so equal limits keep their place: first those of the same kind and period, former ones included,
 * then by order. Other limits get a new place. A present limit is not left without an heir in favour of a former
 * one: its consumption would be lost. */
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

/* Sweeps: bring all states of a limiter under few rules, so that the indexes of the other rules can be given to new ones.
 * DESIGN.md, "Limits that change". */
typedef struct {
  fshm_segment *s;
  uint32_t index;
  uint64_t now;
  bool fixed; /* the caller gave the time */
  snapshot_t snapshot;
  int victim; /* the label to empty, whichever rule takes its states; -1: none */
  uint32_t labels[RULES]; /* states of each label, after the sweep */
  unsigned places; /* places that have states: a set */
} sweep_t;

/* The pair that a state of this label becomes: under the present rule of its place, or as it is. */
static COLD pair_t swept(const sweep_t *w, pair_t pair, unsigned place) {
  rule_t old, rule;
  pair_t to = pair;
  bool found = false;
  uint64_t best = 0;
  unsigned label = WHO_LABEL(pair.who);
  to.who = (pair.who & ~WHO_LABELS) | WHO_OF(0, 0, label, CURRENT_EPOCH(w->snapshot.current));
  if (!limits_rule(w->s, w->index, label, &old)) return to; /* no call has written this */
  for (uint32_t i = 0; i < w->snapshot.count; i++) {
    const rule_t *r = &w->snapshot.rules[i];
    uint64_t state;
    if (r->place != place) continue;
    /* Only if it does not end later, since the key was not asked: limits in force for a moment slow nothing down. */
    state = rule_convert(r, &old, pair.when, w->now);
    if (rule_over(r, state) > rule_over(&old, pair.when)) continue;
    return (pair_t){(pair.who & ~WHO_LABELS) | (w->snapshot.tail[i] & WHO_LABELS), state};
  }
  if ((int)label != w->victim) return to;
  /* Choose the earliest end that is not before its own; if there is none, the slowest. If no rule can hold so many
   * tokens, then the second round: the most that a rule can hold, which it denies as it would deny more. */
  for (unsigned round = 0; round < 2 && !found; round++)
    for (unsigned rule_index = 0; rule_index < RULES; rule_index++) {
      uint64_t owner;
      const limiter_entry_t *e = &w->s->limiters[w->index];
      if ((int)rule_index == w->victim || !read_used(e, rule_index, &rule, &owner) ||
          rule.place != place)
        continue;
      if (rule.kind == FSHM_CALENDAR || rule.kind == FSHM_MONEY) calendar_ready(w->s, &rule);
      uint64_t state = rule_convert(&rule, &old, pair.when, w->now);
      if (state == NO_STATE && round)
        state = rule_begun(&rule, limit_largest_n(rule.kind, rule.per), w->now);
      if (state == NO_STATE) continue;
      uint64_t over = rule_over(&rule, state), mine = rule_over(&old, pair.when);
      if (found && (best < mine ? over <= best : over < mine || over >= best)) continue;
      /* In use from now on, also for a process that counted its states before: free_rules(). */
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

/* Does this slot hold a state of this limiter? A shared counter's index says so. Counters that were never used are
 * changed too, since a call may be about to begin one. */
static inline bool state_slot_of(const fshm_segment *s, uint32_t index, uint64_t slot,
                                 uint64_t who) {
  return slot >= s->slot_count || ((who & 1) && WHO_LIMITER(who) == index);
}

/* Sweep one slot. False: other processes change it all the time. */
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
    /* As in a call (outdated()): by limits in force after the slot was read. Another process may have changed the
     * limits, swept, and given our rule indexes to other rules. */
    if (entry_current(w->s, w->index) != w->snapshot.current) {
      if (!limits_load(w->s, w->index, &w->snapshot)) return false;
      /* After they were published: from then on states drain at most at their pace. */
      if (!w->fixed) w->now = segment_now(s);
      continue;
    }
    bool over =
        IS_PENDING(pair.when) || state_ends(s, pair.who, pair.when) <= minus(w->now, CLOCKS_DIFFER);
    pair_t to = {0, 0}, seen = pair;
    over |= shared && !shared_is_of(pair.who, w->snapshot.current);
    if (!over) to = swept(w, pair, place);
    if (!to.when) to.who = 0;
    if (shared) to.who = shared_who(pair.who, w->snapshot.current, to.who | 1);
    /* A pending slot is emptied too: its claimer may go by earlier limits. */
    if (to.who != pair.who && !pair_cas(&s->slots[slot], &seen, to)) continue;
    if (to.when) {
      w->labels[WHO_LABEL(to.who)]++;
      w->places |= 1U << place;
    }
    return true;
  }
  return false;
}

static COLD bool sweep_slots(sweep_t *w) {
  for (uint64_t i = 0; i < state_slot_end(w->s); i++)
    if (!sweep_slot(w, state_slot_at(w->s, w->index, i))) return false;
  return true;
}

/* The last rule of each place that has states: the limit that their tokens belong to, should it come back. A set of
 * indexes. */
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

/* Record the pace of a bucket's rule that is about to be freed: charges under it may be given back later
 * (limits_pace_since). Killed in between: the pace is recorded, and the rule is still there. False: other processes
 * write these words all the time. */
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
    if (!read_used(e, rule_index, &rule, &owner) || rule.kind != FSHM_BUCKET ||
        rule.place != place || !rule_sane(&rule)) /* not sane: no call has set this */
      continue;
    if ((owner & ~RULE_USED) > version) fastest = min_u64(fastest, bucket_pace(&rule));
  }
  /* After the indexes: a caller that found one free, or with another rule, now finds what note_freed() recorded of
   * it. Pairs with the release of free_rules(), and of fill_rule() by the next owner of the index. */
  atomic_thread_fence(memory_order_acquire);
  const uint64_t freed = load_relaxed(&e->freed_pace);
  if (freed && load_relaxed(&e->freed_version) > version) fastest = min_u64(fastest, freed);
  return fastest;
}

/* Free the indexes of rules that no state refers to and that were not named since `version`. Returns how many. */
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
  /* A new epoch first: a call that goes by earlier limits then finds another `current`, or another slot. */
  uint64_t current = atomic_load_explicit(&e->current, memory_order_acquire);
  pair_t seen = {current, load_relaxed(&e->set)};
  /* And a new version: indexes that a killed process named for the next version are not newer than it. */
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
  /* Each rule still has keys that have used more than the present one admits. Of the rules that are neither present
   * nor the last of their place, the one with the fewest states goes. Its states count as states of the place, so
   * the last rule of the place is kept and can take them. The kept rules and a new set fit into the table, so there
   * is such a rule. */
  unsigned kept = last_rules(&w);
  for (uint32_t i = 0; i < SET_COUNT(next.when); i++) kept |= 1U << SET_RULE(next.when, i);
  static_assert(PLACES + 2 * FSHM_MAX_LIMITS <= RULES, "the last of each place, two sets");
  for (unsigned rule_index = 0; rule_index < RULES; rule_index++) {
    if (kept >> rule_index & 1 || !w.labels[rule_index]) continue;
    if (w.victim < 0 || w.labels[rule_index] < w.labels[w.victim]) w.victim = (int)rule_index;
  }
  if (w.victim < 0) return false;
  if (!sweep_slots(&w)) return false; /* counts again: a label that had states keeps a count */
  uint32_t left = 0;
  for (uint64_t i = 0; i < state_slot_end(s); i++) {
    uint64_t slot = state_slot_at(s, index, i), who = load_relaxed(&s->slots[slot].who);
    left += state_slot_of(s, index, slot, who) && (int)WHO_LABEL(who) == w.victim &&
            load_relaxed(&s->slots[slot].when);
  }
  w.labels[w.victim] = left;
  return free_rules(&w, next.when, version) > 0;
}

/* Give up indexes that were filled or taken for a set that was not published. */
static void give_up(limiter_entry_t *e, const int *mine, uint64_t owner) {
  for (uint32_t i = 0; i < FSHM_MAX_LIMITS; i++) {
    uint64_t seen = owner;
    if (mine[i] >= 0) (void)atomic_compare_exchange_strong(&e->owners[mine[i]], &seen, 0);
  }
}

/* Make these rules the present limits of the entry. now: for a sweep; 0 = read the clock. */
int publish(fshm_segment *s, uint32_t index, rule_t *rules, uint32_t count, uint64_t now) {
  limiter_entry_t *e = &s->limiters[index];
  uint32_t me;
  uint64_t incarnation, owner;
  int mine[FSHM_MAX_LIMITS] = {-1, -1, -1, -1}; /* indexes that we own */
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
    /* The rules are complete before they are named (pairs with the acquire of limits_load()), and marked as in use.
     * Killed in between, we leave rules that the next sweep frees. */
    pair_t seen = {current, set};
    pair_t next = {(current & ~CURRENT_VERSION(UINT64_MAX)) | version, next_set};
    bool ok = pair_cas(&e->current, &seen, next);
    /* If the swap failed, they are not ours again: another process may have found and named the same rule there. */
    for (uint32_t i = 0; i < count; i++)
      if (indexes[i] < 0) mine[i] = -1;
    if (!ok) continue;
    give_up(e, mine, owner);
    wait_wake_limiter(s, index);
    return FSHM_OK;
  }
  give_up(e, mine, owner);
  return FSHM_CONTENDED; /* other processes are changing this name right now */
}
