/* limits.c - the table of limiters: their names, and the limits in force.
 *
 * The limits belong to the name: the last process that sets them sets them for all (limit_changes.c).
 */
#include <stdlib.h>
#include <unistd.h>

#include "../core/hash_table.h"
#include "../permits/wait_queue.h"
#include "../stats/key_stats.h"
#include "limits.h"
#include "plans.h"
#include "shared_counters.h"

int fshm_limit_check(const fshm_limit *l, uint64_t *largest_n) {
  bool known = !kind_has_period(l->kind) || l->per_ns >= 1000;
  known &= l->kind <= FSHM_PLANNED;
  *largest_n = known ? limit_largest_n(l->kind, l->per_ns) : 0;
  return limit_valid(l) ? FSHM_OK : FSHM_E_ARGUMENT;
}

bool limits_load(fshm_segment *s, uint32_t index, snapshot_t *p) {
  return limits_load_inline(s, index, p);
}

/* The limits of a budget (money.c), or a name whose handles have plans: no other call counts by them. */
COLD void limits_are_other(fshm_segment *s, snapshot_t *p) {
  if (p->rules[0].kind == FSHM_PLANNED) {
    p->count = p->permits = 0;
    return;
  }
  p->money = p->count + (p->permits > 0);
  p->count = p->permits = 0;
  calendar_ready(s, &p->rules[0]);
  for (uint32_t i = 1; i < p->money; i++) {
    p->rules[i].base = p->rules[0].base;
    p->rules[i].floor = p->rules[0].floor;
    p->rules[i].zone = p->rules[0].zone;
  }
}

/* Apply the handle's own limits: those of its plan; or its numbers (fshm_limiter_number()), which are never above
 * those of the name. */
__attribute__((noinline)) void limits_own(fshm_segment *s, const own_t *own, snapshot_t *p) {
  const uint64_t *numbers = own->numbers;
  if (own->planned) {
    /* None: damaged, or the name has other limits. */
    if (p->current && snapshot_is_planned(p)) plan_load(s, own, p);
    return;
  }
  for (uint32_t i = 0; i < p->count; i++)
    if (p->rules[i].kind == FSHM_WINDOW && numbers[i])
      p->rules[i].n = min_u64(p->rules[i].n, numbers[i]);
  if (p->permits && numbers[p->count])
    p->permits = (uint32_t)min_u64(p->permits, numbers[p->count]);
}
bool limits_load_of(const fshm_limiter *l, snapshot_t *p) { return limits_load_of_inline(l, p); }

int fshm_limiter_number(fshm_limiter *l, const uint64_t *numbers, uint32_t count) {
  snapshot_t p;
  if (!limits_load(l->segment, l->index, &p)) return damage_limits(l->segment, l->index);
  if (count != p.count + (p.permits > 0)) return FSHM_E_ARGUMENT;
  for (uint32_t i = 0; i < count; i++) {
    if (i < p.count && p.rules[i].kind != FSHM_WINDOW) return FSHM_E_ARGUMENT;
    if (numbers[i] < 1 || numbers[i] > (i < p.count ? p.rules[i].n : p.permits))
      return FSHM_E_ARGUMENT;
  }
  own_t *own = calloc(1, sizeof *own);
  if (!own) return FSHM_E_MEMORY;
  for (uint32_t i = 0; i < count; i++) own->numbers[i] = numbers[i];
  limiter_owns(l, own);
  return FSHM_OK;
}

/* The rule that a state with this label was written under. The caller checks afterwards that the slot has not
 * changed: a rule index is not given to another rule while a state refers to it. */
bool limits_rule(fshm_segment *s, uint32_t index, unsigned label, rule_t *out) {
  read_rule(&s->limiters[index], label, out);
  atomic_thread_fence(memory_order_acquire); /* the copy, before the second look at the slot */
  if (!rule_sane(out)) return false;
  if (out->kind == FSHM_CALENDAR || out->kind == FSHM_MONEY) calendar_ready(s, out);
  return out->kind != FSHM_PERMITS; /* no state has its label */
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

/* Copy out a rule that states may refer to. False: the index has none, or was given to another rule meanwhile. */
COLD bool read_used(const limiter_entry_t *e, unsigned rule_index, rule_t *out, uint64_t *owner) {
  *owner = atomic_load_explicit(&e->owners[rule_index], memory_order_acquire); /* with publish() */
  if (!(*owner & RULE_USED)) return false;
  read_rule(e, rule_index, out);
  atomic_thread_fence(memory_order_acquire);
  return load_relaxed(&e->owners[rule_index]) == *owner;
}

/* Are these limits ones that no call sets? Certain: rules are complete before they are named, and do not change
 * while they are named. published: the caller has seen limits of this name; else it may have none yet. */
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

/* An id is a hash of the name without the bit BESIDE; that bit is set for an auxiliary limiter
 * (fshm_limiter_open_beside()), whose calls are not counted. So every process that sees a claimed entry knows this. */
#define BESIDE UINT64_C(1)

static COLD uint64_t name_id(const fshm_segment *s, const char *name, uint64_t length) {
  uint64_t id = fshm_siphash(s->secret[0], s->secret[1], name, length) & ~BESIDE;
  return id ? id : 2 * BESIDE;
}

/* The index of an entry's counters; COUNTERS: its calls are not counted. Entries are claimed in order and never
 * given back, so all processes compute the same index at any time. */
static COLD uint32_t counters_of(const fshm_segment *s, uint32_t index) {
  uint32_t before = 0;
  if (load_relaxed(&s->limiters[index].id) & BESIDE) return COUNTERS;
  for (uint32_t i = 0; i < index && before < COUNTERS - 1; i++)
    before += !(load_relaxed(&s->limiters[i].id) & BESIDE);
  return before;
}

uint64_t read_name(const limiter_entry_t *e, char *out) {
  uint64_t length = min_u64(load_relaxed(&e->name_length), FSHM_MAX_LIMITER_NAME);
  for (uint64_t i = 0; i < length; i++) out[i] = (char)load_relaxed(&e->name[i]);
  return length;
}

/* Do a name and its id differ? Certain once limits are published: the publisher has written both before. (A process
 * killed before that leaves an id without a name; the next one completes it.) */
COLD bool limits_name_wrong(const fshm_segment *s, uint32_t index) {
  const limiter_entry_t *e = &s->limiters[index];
  char name[FSHM_MAX_LIMITER_NAME];
  if (load_relaxed(&e->name_length) > FSHM_MAX_LIMITER_NAME) return true;
  /* Pairs with the release in publish(): what follows is read after it. */
  if (!atomic_load_explicit(&e->current, memory_order_acquire)) return false;
  uint64_t length = read_name(e, name);
  return (load_relaxed(&e->id) & ~BESIDE) != name_id(s, name, length);
}

/* How many permits may be held, and a count of its changes: read it before `current`, and before a count for
 * limits_lower_most(). */
uint64_t limits_most(const fshm_segment *s, uint32_t index) {
  return entry_most(&s->limiters[index]);
}

/* Permits below this number may be held: the largest permit limit that this name ever had, until a count found no
 * permit beyond the present limit. */
uint32_t limits_most_permits(uint64_t most, const snapshot_t *p) {
  uint32_t permits = MOST_OF(most) > MAX_PERMITS ? MAX_PERMITS : MOST_OF(most);
  return permits > p->permits ? permits : p->permits;
}

/* A look at all keys, begun after `most` was read, found no permit beyond the present limit: lower `most`. If limits
 * were published since, or an older call took such a permit, the word has changed, even if its number is the same. */
void limits_lower_most(fshm_segment *s, uint32_t index, const snapshot_t *p, uint64_t most) {
  uint64_t lower = most >> MOST_BITS << MOST_BITS | p->permits;
  if (MOST_OF(most) > p->permits)
    (void)atomic_compare_exchange_strong(&s->limiters[index].most, &most, lower);
}

uint32_t permits_in(const rule_t *rules, uint32_t count) {
  bool any = count && rules[count - 1].kind == FSHM_PERMITS;
  return any ? (uint32_t)min_u64(rules[count - 1].n, MAX_PERMITS) : 0;
}

/* Called before a set is published, even where the number stays: each publication counts as a change. */
bool raise_most(limiter_entry_t *e, uint32_t n) {
  uint64_t seen = load_relaxed(&e->most);
  for (int i = 0; n && i < MAX_TRIES; i++) {
    uint64_t next = ((seen >> MOST_BITS) + 1) << MOST_BITS | max_u64(MOST_OF(seen), n);
    if (atomic_compare_exchange_strong(&e->most, &seen, next)) return true;
  }
  return !n;
}

/* Was this entry's id changed: does it have our name under another id, or limits without an id? */
static COLD bool entry_wrong(fshm_segment *s, uint32_t index, const char *name, uint64_t length) {
  char found[FSHM_MAX_LIMITER_NAME];
  if (!limits_name_wrong(s, index)) return false;
  const limiter_entry_t *e = &s->limiters[index];
  bool ours = read_name(e, found) == length && !memcmp(found, name, length);
  /* Another name's entry: the process that opens that name reports it. */
  if (!ours && load_relaxed(&e->id)) return false;
  damage_note(s, FSHM_DAMAGE_NAME, index);
  return true;
}

/* Find the entry of a name, or claim one, with these bits in its id. Entries are claimed in order and stay. Two
 * processes that claim the same name contend for the same entry, and the loser finds the winner's. */
static int entry_of(fshm_segment *s, const char *name, uint64_t length, bool claim, uint64_t bits,
                    uint32_t *index) {
  uint64_t id = name_id(s, name, length);
  for (uint32_t i = 0; i < s->limiter_count; i++) {
    uint64_t seen = load_relaxed(&s->limiters[i].id);
    /* If this call passed an entry with our name under another id, or took a free one that has limits, it would
     * count apart from processes that opened the name before it was written over. */
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

/* A handle of the limiter. rules: what its limits become. NULL: it exists, and keeps its limits. */
static int open_handle(fshm_segment *s, const char *name, uint64_t length, rule_t *rules,
                       uint32_t count, uint64_t bits, uint64_t now, fshm_limiter **out) {
  fshm_limiter *l = calloc(1, sizeof *l);
  if (!l) return FSHM_E_MEMORY;
  l->segment = s;
  store_relaxed(&l->frontier, (uint32_t)getpid() * 2654435761U); /* processes begin apart */
  l->key[0] = fshm_siphash(s->secret[0], s->secret[1] ^ 1, name, length);
  l->key[1] = fshm_siphash(s->secret[0], s->secret[1] ^ 2, name, length);
  int status = entry_of(s, name, length, rules != NULL, bits, &l->index);
  if (status == FSHM_OK && !rules && !load_relaxed(&s->limiters[l->index].current))
    status = FSHM_E_NOT_FOUND;
  if (status == FSHM_OK && limits_wrong(s, l->index, false)) status = damage_limits(s, l->index);
  /* What is counted in tokens is not counted in money afterwards, nor by plans, nor the other way round. */
  snapshot_t present;
  if (status == FSHM_OK && rules && limits_load(s, l->index, &present) &&
      ((present.money > 0) != (rules[0].kind == FSHM_MONEY) ||
       snapshot_is_planned(&present) != (rules[0].kind == FSHM_PLANNED)))
    status = FSHM_E_ARGUMENT;
  if (status == FSHM_OK && rules) status = publish(s, l->index, rules, count, now);
  if (status != FSHM_OK) {
    free(l);
    return status;
  }
  l->counters = (uint16_t)counters_of(s, l->index);
  *out = l;
  return FSHM_OK;
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
    if (!limit_valid(&limits[i]) || (permits && i + 1 != count) ||
        (limits[i].kind == FSHM_MONEY) != (limits[0].kind == FSHM_MONEY) ||
        (limits[i].kind == FSHM_PLANNED && count != 1))
      return FSHM_E_ARGUMENT;
    rules[i] = rule_make(&limits[i]);
    if (limits[i].kind == FSHM_MONEY) rules[i].unit = money_window(s, &rules[i], now);
  }
  return open_handle(s, name, name_length, rules, count, bits, now, out);
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
  return open_handle(s, name, name_length, NULL, 0, 0, 0, out);
}

void limiter_owns(fshm_limiter *l, own_t *own) {
  free(l->own);
  l->own = own;
}

void fshm_limiter_close(fshm_limiter *l) {
  if (l) limiter_owns(l, NULL);
  free(l);
}

void fshm_limiter_share(fshm_limiter *l, int share) { l->share = share != 0; }

/* limits_load(), for inspection: only limits that a call can have set. */
static bool load_genuine(fshm_segment *s, uint32_t index, snapshot_t *p) {
  if (limits_wrong(s, index, true) || !limits_load(s, index, p)) return false;
  /* Check the copy: the segment may have been written over since. */
  for (uint32_t i = 0; i < p->count + p->money; i++) {
    const rule_t bare = rule_bare(&p->rules[i]);
    if (!rule_genuine(&bare)) return false;
  }
  return true;
}

static void describe_limits(const snapshot_t *p, fshm_limit *out) {
  for (uint32_t i = 0; i < p->count + p->money; i++) {
    const rule_t bare = rule_bare(&p->rules[i]);
    out[i] = rule_limit(&bare);
  }
  if (p->permits) out[p->count] = (fshm_limit){p->permits, 0, 0, FSHM_PERMITS, 0};
}

/* The limits in force. Returns their number; 0 = damaged. */
int fshm_limiter_limits(fshm_limiter *l, fshm_limit *out, uint64_t *version) {
  snapshot_t p;
  if (!load_genuine(l->segment, l->index, &p)) {
    (void)damage_limits(l->segment, l->index);
    return 0;
  }
  *version = CURRENT_VERSION(p.current);
  describe_limits(&p, out);
  return (int)(p.count + p.money + (p.permits > 0));
}

/* Forget all keys of the limiter. One swap: afterwards no call finds the old slots. They expire by themselves; those
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
    if (pair.who && !shared_is_of(pair.who, next.who)) /* lost: another call has begun it anew */
      (void)pair_cas(&s->slots[slot], &pair, (pair_t){shared_who(pair.who, before.current, 1), 0});
  }
  for (uint64_t slot = 0; slot < s->slot_count; slot++) {
    pair_t pair = {load_relaxed(&s->slots[slot].who), 0}, empty = {0, 0};
    if (pair.who & 1) { /* a limit's state; a permit is left alone */
      if (WHO_LIMITER(pair.who) != l->index) continue;
      if (unlikely(snapshot_is_planned(&before))) {
        plan_forget(s, l->index, slot, next.who);
        continue;
      }
      pair = pair_load(&s->slots[slot]);
      if (!(pair.who & 1) || WHO_LIMITER(pair.who) != l->index || IS_PERMIT(pair.when)) continue;
      if (WHO_EPOCH(pair.who) == CURRENT_EPOCH(before.current))
        (void)pair_cas(&s->slots[slot], &pair, empty);
    } else if (pair.who &&
               load_relaxed(&s->key_stats[slot].meta) == key_stats_meta(l->index, pair.who)) {
      found_t f; /* a key whose limit comes with the call, if the old salt leads to it */
      table_find(s, side_salted(pair.who, before.salt), pair.who, &f);
      if (f.pair.who) table_clear(s, f.slot, f.pair.who);
    }
  }
  wait_wake_limiter(s, l->index);
  return FSHM_OK;
}

int fshm_limiter_describe(fshm_limiter *l, fshm_limiter_info *out) {
  return fshm_limiter_at(l->segment, l->index, out);
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
  out->planned = snapshot_is_planned(&p);
  out->overrides = load_relaxed(&e->overrides);
  describe_limits(&p, out->limits);
  out->limits_count = p.count + p.money + (p.permits > 0);
  out->version = CURRENT_VERSION(p.current);
  out->resets = CURRENT_RESETS(p.current);
  out->id = load_relaxed(&e->id);
  out->counters = counters_of(s, index);
  out->shared_ns = minus(load_relaxed(&e->shared), segment_now(s));
  out->name_length = (uint32_t)read_name(e, out->name);
  return FSHM_OK;
}
