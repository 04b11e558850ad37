/* limits.c - the table of limiters: names, their limits, and changing them at run time.
 *
 * The limits of a name belong to the name: whoever sets them last sets them for all processes. Sets
 * are published whole: a slot is owned by the process that fills it, then one swap of `current` makes
 * it the present one; a referenced slot never changes. Token buckets convert their state from the
 * set it was written under (`version`, 5 bits in each state) to the present one when next charged.
 */
#include <stdlib.h>
#include <unistd.h>

#include "internal.h"

#define NO_SET 15U

static uint64_t mix(uint64_t x) { /* splitmix64's finaliser */
  x += UINT64_C(0x9e3779b97f4a7c15);
  x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
  x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
  return x ^ x >> 31;
}

int fshm_limit_check(const fshm_limit *l, uint64_t *largest_n) {
  bool known = !kind_has_period(l->kind) || l->per_ns >= 1000;
  known &= l->kind <= FSHM_PERMITS || l->kind == FSHM_WALLET;
  *largest_n = known ? limit_largest_n(l->kind, l->per_ns) : 0;
  return limit_valid(l) ? FSHM_OK : FSHM_E_ARGUMENT;
}

/* Which cell of the key belongs to limit i: its fingerprint is hash ^ twist. A limit is known by its
 * kind and its place among its kind, not by its numbers, so those can change. */
static const uint64_t twists[4][FSHM_MAX_LIMITS] = {
    /* splitmix64 of kind << 8 | place: any fixed unrelated numbers would do */
    {UINT64_C(0xe220a8397b1dcdaf), UINT64_C(0x910a2dec89025cc1), UINT64_C(0x975835de1c9756ce),
     UINT64_C(0x1d0b14e4db018fed)},
    {UINT64_C(0x6602d201e324653f), UINT64_C(0x7329322350602724), UINT64_C(0x1e09f8a031519da4),
     UINT64_C(0xffdd8d3d3394cb38)},
    {UINT64_C(0xfa9d65e76f024466), UINT64_C(0x78eeb3fa847e7419), UINT64_C(0xa6c164434ff86cda),
     UINT64_C(0x1f796dfefa18e2fa)},
};

/* Copy one set out. The caller makes sure afterwards that it was still named: pairs with the release
 * in publish(). Returns how many rules, 0 = no such set. */
static inline HOT uint32_t read_set(const limiter_entry_t *e, unsigned slot, rule_t *out) {
  if (slot >= LIMITS_SLOTS) return 0;
  const limits_slot_t *set = &e->slots[slot];
  uint64_t count = load_relaxed(&set->count);
  if (count < 1 || count > FSHM_MAX_LIMITS) return 0;
  for (uint64_t i = 0; i < count; i++)
    for (unsigned k = 0; k < RULE_WORDS; k++) out[i].words[k] = load_relaxed(&set->rules[i][k]);
  return (uint32_t)count;
}

/* The limits as they stand now. False: none, or damaged; then the plan has no limit at all, so that whoever
 * goes on with it divides by nothing (rule_sane). */
static inline HOT bool limits_load_inline(const fshm_segment *s, uint32_t index, plan_t *p) {
  const limiter_entry_t *e = &s->limiters[index];
  for (int tries = 0; tries < MAX_TRIES; tries++) {
    uint64_t current = atomic_load_explicit(&e->current, memory_order_acquire);
    uint32_t has = current ? read_set(e, CURRENT_SLOT(current, 0), p->rules) : 0;
    atomic_thread_fence(memory_order_acquire); /* the copy, before the second look */
    if (unlikely(load_relaxed(&e->current) != current)) continue;
    p->current = current;
    p->version = CURRENT_VERSION(current) & VERSION_MASK;
    p->count = has;
    p->permits = 0;
    uint64_t resets = CURRENT_RESETS(current), salt = 0;
    /* Every reset gives another salt: what was there is nobody's from then on. */
    if (unlikely(resets)) salt = mix(s->secret[0] ^ mix(resets));
    if (likely(has == 1 &&
               p->rules[0].kind != FSHM_PERMITS)) { /* most limiters; without the loop */
      p->twist[0] = twists[p->rules[0].kind & 3][0] ^ salt;
      if (likely(rule_sane(&p->rules[0]))) return true;
      break;
    }
    uint32_t places[4] = {0, 0, 0, 0}, i = 0;
    for (; i < has; i++) {
      if (unlikely(!rule_sane(&p->rules[i]))) break;
      if (p->rules[i].kind == FSHM_PERMITS) { /* the last: fshm_limiter_open() */
        if (i + 1 != has || p->rules[i].n > MAX_PERMITS) break;
        p->permits = (uint32_t)p->rules[i].n;
        p->count--;
        return true;
      }
      uint32_t tag = p->rules[i].kind & 3; /* a wallet's limiter has no windows */
      p->twist[i] = twists[tag][places[tag]++] ^ salt;
    }
    if (likely(has && i == has)) return true;
    break;
  }
  p->count = p->permits = 0;
  return false;
}
bool limits_load(const fshm_segment *s, uint32_t index, plan_t *p) {
  return limits_load_inline(s, index, p);
}

static COLD bool set_wrong(const limiter_entry_t *e, unsigned slot) {
  rule_t rules[FSHM_MAX_LIMITS];
  uint32_t count = read_set(e, slot, rules);
  for (uint32_t i = 0; i < count; i++)
    if (!rule_genuine(&rules[i]) || (rules[i].kind == FSHM_PERMITS && i + 1 != count)) return true;
  return !count;
}

/* Are these limits such as nobody has set? Certain: named sets are complete before they are named, and
 * do not change while they are. published: we have seen limits of this name; else it may have none yet. */
COLD bool limits_wrong(const fshm_segment *s, uint32_t index, bool published) {
  const limiter_entry_t *e = &s->limiters[index];
  for (int tries = 0; tries < MAX_TRIES; tries++) {
    uint64_t current = atomic_load_explicit(&e->current, memory_order_acquire);
    bool wrong = current ? !CURRENT_VERSION(current) : published;
    for (unsigned back = 0; current && back < HISTORY && !wrong; back++) {
      unsigned slot = CURRENT_SLOT(current, back);
      wrong = !(back && slot == NO_SET) && set_wrong(e, slot);
    }
    atomic_thread_fence(memory_order_acquire); /* the copies, before the second look */
    if (load_relaxed(&e->current) == current) return wrong;
  }
  return false; /* always being changed: nothing is certain */
}

/* An id is a hash of the name, without BESIDE, and that bit where the limiter is there for another one's sake:
 * its calls have no tallies. So whoever sees an entry claimed knows which it is. */
#define BESIDE UINT64_C(1)

static COLD uint64_t name_id(const fshm_segment *s, const char *name, uint64_t length) {
  uint64_t id = fshm_siphash(s->secret[0], s->secret[1], name, length) & ~BESIDE;
  return id ? id : 2 * BESIDE;
}

/* Which tallies an entry's calls count in; TALLIES: none. Entries are claimed in order and never given back, so
 * this is the same for all processes, at any time. */
static COLD uint32_t tally_of(const fshm_segment *s, uint32_t index) {
  uint32_t before = 0;
  if (load_relaxed(&s->limiters[index].id) & BESIDE) return TALLIES;
  for (uint32_t i = 0; i < index && before < TALLIES - 1; i++)
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

/* Slots up to this one may be held: the largest limit of permits that this name ever had, until a count
 * has found nothing held beyond the present one. */
uint32_t limits_most_permits(const fshm_segment *s, uint32_t index, const plan_t *p) {
  uint32_t most = atomic_load_explicit(&s->limiters[index].most, memory_order_acquire);
  most = most > MAX_PERMITS ? MAX_PERMITS : most;
  return most > p->permits ? most : p->permits;
}

/* Nothing is held beyond the present limit. Whoever still takes a slot there by an older plan notices
 * that `current` has changed, and gives it back (take_permit). */
void limits_lower_most(fshm_segment *s, uint32_t index, const plan_t *p, uint32_t most) {
  if (most > p->permits)
    (void)atomic_compare_exchange_strong(&s->limiters[index].most, &most, p->permits);
}

static void raise_most(limiter_entry_t *e, const rule_t *rules, uint32_t count) {
  if (!count || rules[count - 1].kind != FSHM_PERMITS) return;
  uint32_t seen = load_relaxed(&e->most), n = (uint32_t)min_u64(rules[count - 1].n, MAX_PERMITS);
  for (int i = 0; seen < n && i < MAX_TRIES; i++)
    if (atomic_compare_exchange_strong(&e->most, &seen, n)) return;
}

/* The nth bucket of the set that had this version (5 bits), among the three before the present. */
bool limits_old_rule(const limiter_entry_t *e, uint64_t current, unsigned version, uint32_t nth,
                     rule_t *out) {
  rule_t rules[FSHM_MAX_LIMITS];
  for (unsigned back = 1; back < HISTORY; back++) {
    if (((CURRENT_VERSION(current) - back) & VERSION_MASK) != version) continue;
    uint32_t count = read_set(e, CURRENT_SLOT(current, back), rules), seen = 0;
    atomic_thread_fence(memory_order_acquire);
    if (load_relaxed(&e->current) != current) return false;
    for (uint32_t i = 0; i < count; i++) {
      if (rules[i].kind != FSHM_BUCKET || seen++ != nth) continue;
      *out = rules[i];
      return rule_sane(out);
    }
  }
  return false;
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

/* An owner: nonce (32 bits), generation of the process slot (16), process slot + 1 (16). */
static bool owner_lives(fshm_segment *s, uint64_t owner) {
  uint64_t slot = (owner & 0xffff) - 1;
  if (slot >= PROCESSES) return true; /* has no place in the process table: cannot be asked after */
  uint64_t generation = load_relaxed(&s->processes[slot].generation);
  return (generation & 0xffff) == (owner >> 16 & 0xffff) && process_alive(s, (uint32_t)slot);
}

/* A slot that `current` does not name and nobody alive is filling becomes ours. */
static int take_slot(fshm_segment *s, limiter_entry_t *e, uint64_t current, uint64_t owner) {
  for (unsigned i = 0; i < LIMITS_SLOTS; i++) {
    bool named = false;
    for (unsigned back = 0; current && back < HISTORY; back++)
      named |= CURRENT_SLOT(current, back) == i;
    uint64_t holder = load_relaxed(&e->slots[i].owner);
    if (named || (holder && owner_lives(s, holder))) continue;
    if (atomic_compare_exchange_strong_explicit(&e->slots[i].owner, &holder, owner,
                                                memory_order_acquire, memory_order_relaxed))
      return (int)i;
  }
  return -1;
}

/* Note in each sliding rule when its `per` was changed: what was counted before may have been counted in
 * another one (sliding_read). */
static void note_changes(const rule_t *present, uint32_t has, rule_t *rules, uint32_t count,
                         uint64_t now) {
  for (uint32_t i = 0, nth = 0; i < count; i++) {
    if (rules[i].kind != FSHM_SLIDING) continue;
    uint32_t seen = 0, k = 0;
    while (k < has && (present[k].kind != FSHM_SLIDING || seen++ != nth)) k++;
    rules[i].room = k == has ? 0 : present[k].per == rules[i].per ? present[k].room : now;
    nth++;
  }
}

/* Make these rules the present set of the entry. */
static int publish(fshm_segment *s, limiter_entry_t *e, rule_t *rules, uint32_t count) {
  uint32_t me;
  uint64_t generation, owner = PROCESSES + 1;
  if (process_identity(s, &me, &generation)) owner = (generation & 0xffff) << 16 | (me + 1);
  owner |= (add_relaxed(&s->header->ticket, 1) + 1) << 32;
  int slot = -1;
  for (int tries = 0; tries < MAX_TRIES; tries++) {
    rule_t present[FSHM_MAX_LIMITS];
    uint64_t current = atomic_load_explicit(&e->current, memory_order_acquire);
    uint32_t has = current ? read_set(e, CURRENT_SLOT(current, 0), present) : 0;
    atomic_thread_fence(memory_order_acquire);
    if (load_relaxed(&e->current) != current) continue;
    note_changes(present, has, rules, count, segment_now(s));
    if (has == count && !memcmp(present, rules, count * sizeof *rules)) {
      if (slot >= 0) store_relaxed(&e->slots[slot].owner, 0);
      return FSHM_OK;
    }
    raise_most(e, present, has); /* before anybody can see the set */
    raise_most(e, rules, count);
    if (slot < 0) {
      slot = take_slot(s, e, current, owner);
      if (slot < 0) return FSHM_CONTENDED; /* others alive are changing this name right now */
      /* It was unnamed when we looked; its owner may have named it since, and died. From here on, being
       * ours, it cannot be. */
      atomic_thread_fence(memory_order_seq_cst);
      if (load_relaxed(&e->current) != current) {
        uint64_t mine = owner;
        (void)atomic_compare_exchange_strong(&e->slots[slot].owner, &mine, 0);
        slot = -1;
        continue;
      }
    }
    store_relaxed(&e->slots[slot].count, count);
    for (uint32_t i = 0; i < count; i++)
      for (unsigned k = 0; k < RULE_WORDS; k++)
        store_relaxed(&e->slots[slot].rules[i][k], rules[i].words[k]);
    uint64_t next = ((CURRENT_VERSION(current) + 1) & ((UINT64_C(1) << 28) - 1)) |
                    CURRENT_RESETS(current) << 28 | (uint64_t)slot << 48;
    for (unsigned back = 1; back < HISTORY; back++)
      next |= (uint64_t)(current ? CURRENT_SLOT(current, back - 1) : NO_SET) << (48 + 4 * back);
    if (!CURRENT_VERSION(next)) next++; /* 0 is "none yet" */
    /* release: the set is complete before it is named. Pairs with the acquire in limits_load(). */
    if (atomic_compare_exchange_strong_explicit(&e->current, &current, next, memory_order_release,
                                                memory_order_relaxed)) {
      /* Named slots need no owner; when it drops out of the history, it is free. */
      store_relaxed(&e->slots[slot].owner, 0);
      return FSHM_OK;
    }
  }
  return FSHM_CONTENDED;
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
                        const fshm_limit *limits, uint32_t count, uint64_t bits,
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
  if (status == FSHM_OK) status = publish(s, &s->limiters[l->index], rules, count);
  if (status != FSHM_OK) {
    free(l);
    return status;
  }
  l->tally = tally_of(s, l->index);
  *out = l;
  return FSHM_OK;
}

int fshm_limiter_open(fshm_segment *s, const char *name, uint64_t name_length,
                      const fshm_limit *limits, uint32_t count, fshm_limiter **out) {
  return limiter_open(s, name, name_length, limits, count, 0, out);
}

int fshm_limiter_open_beside(fshm_segment *s, const char *name, uint64_t name_length,
                             const fshm_limit *limits, uint32_t count, fshm_limiter **out) {
  return limiter_open(s, name, name_length, limits, count, BESIDE, out);
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
  l->tally = tally_of(s, l->index);
  *out = l;
  return FSHM_OK;
}

void fshm_limiter_close(fshm_limiter *l) { free(l); }

/* limits_load(), for those who show limits: only such as somebody has set. */
static bool load_genuine(const fshm_segment *s, uint32_t index, plan_t *p) {
  if (limits_wrong(s, index, true) || !limits_load(s, index, p)) return false;
  for (uint32_t i = 0; i < p->count; i++) /* the copy: it may have been written over since */
    if (!rule_genuine(&p->rules[i])) return false;
  return true;
}

static void describe_limits(const plan_t *p, fshm_limit *out) {
  for (uint32_t i = 0; i < p->count; i++) {
    const rule_t *r = &p->rules[i];
    out[i] =
        (fshm_limit){r->n, kind_has_period(r->kind) ? r->per : 0, r->burst, r->kind, r->strict};
  }
  if (p->permits) out[p->count] = (fshm_limit){p->permits, 0, 0, FSHM_PERMITS, 0};
}

/* The limits in force: how many, 0 = damaged. */
int fshm_limiter_limits(fshm_limiter *l, fshm_limit *out, uint64_t *version) {
  plan_t p;
  if (!load_genuine(l->segment, l->index, &p)) {
    (void)damage_limits(l->segment, l->index);
    return 0;
  }
  *version = CURRENT_VERSION(p.current);
  describe_limits(&p, out);
  return (int)(p.count + (p.permits > 0));
}

/* Forget all keys of the limiter. One swap: from then on nobody finds the old cells. They expire by
 * themselves; those that the ledger knows to be ours are freed at once. */
int fshm_reset_all(fshm_limiter *l) {
  fshm_segment *s = l->segment;
  limiter_entry_t *e = &s->limiters[l->index];
  const uint64_t mask = ((UINT64_C(1) << 20) - 1) << 28;
  plan_t before;
  if (!limits_load(s, l->index, &before)) return damage_limits(s, l->index);
  uint64_t current = atomic_load_explicit(&e->current, memory_order_acquire), next;
  int tries = 0;
  do {
    if (tries++ == MAX_TRIES) return FSHM_CONTENDED;
    next = (current & ~mask) | (((CURRENT_RESETS(current) + 1) << 28) & mask);
  } while (!atomic_compare_exchange_strong_explicit(&e->current, &current, next,
                                                    memory_order_acq_rel, memory_order_acquire));
  for (uint64_t cell = 0; cell < s->cell_count; cell++) {
    uint64_t who = load_relaxed(&s->cells[cell].who);
    if (!who || load_relaxed(&s->ledger[cell].meta) != ledger_meta(l->index, who)) continue;
    uint64_t hash = who ^ before.twist[0];
    for (uint32_t i = 0; i < before.count; i++) {
      found_t f;
      cells_find(s, hash, hash ^ before.twist[i], &f);
      if (f.pair.who) cells_clear(s, f.cell, f.pair.who);
    }
  }
  return FSHM_OK;
}

int fshm_limiter_at(fshm_segment *s, uint32_t index, fshm_limiter_info *out) {
  plan_t p;
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
  out->tally = tally_of(s, index);
  out->name_length = (uint32_t)read_name(e, out->name);
  return FSHM_OK;
}
