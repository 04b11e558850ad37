/* semaphore.c - counting semaphores: permits held, for requests in flight or pooled connections. Argued in
 * DESIGN.md.
 *
 * A key with n permits has permit numbers 0 .. n-1. A permit is a slot of the hash table, with the fingerprint of
 * (limiter, key, number). Taking it is one swap from free to held-by-me, or a claim if the permit has no slot yet. A
 * free permit equals "never seen", so any key can reuse its slot. The slots are the count; there is no second
 * number.
 *
 * when = 7 (3 bits) | number (17) | owner: process index (12) and its incarnation (14) | idle (1) |
 *        taken, in seconds of segment time (17)
 */
#include "../limits/limiter.h"
#include "../limits/limits.h"
#include "../stats/key_stats.h"
#include "adaptive_rules.h"
#include "changes.h"
#include "semaphore.h"
#include "wait_queue.h"

#define PERMIT_BIT 2048U /* of the limiter index in key_stats_t.meta */
#define PERMIT_NUMBER(w) ((uint32_t)((w) >> 44) & 0x1ffff)
#define OWNER_OF(w) ((uint32_t)((w) >> 32) & 0xfff)
#define LOW_INCARNATION(incarnation) ((incarnation) & ((1 << INCARNATION_BITS) - 1))
#define INCARNATION_OF(w) LOW_INCARNATION((w) >> 18)
#define IDLE (UINT64_C(1) << 17)
#define TAKEN_OF(w) ((w) & 0x1ffff)

static_assert(PROCESSES <= 4096 && 12 + INCARNATION_BITS == 26, "an owner is 12 bits");
static_assert(MAX_PERMITS < 1 << 17, "a permit number has 17 bits");

/* The results of liveness checks: each process is checked once in a call, since a check is a system call. The index
 * of one that was alive may get a new owner meanwhile, which counts as alive too. Of the dead, the last one is known,
 * by its incarnation: mostly the next permit is its own too, and a permit of a dead process is met once. */
typedef struct {
  uint64_t alive[PROCESSES / 64]; /* bits */
  uint64_t dead_incarnation;
  uint32_t dead; /* process index + 1; 0 = none */
} liveness_t;

static bool owner_alive(fshm_segment *s, uint64_t when, liveness_t *liveness) {
  uint32_t owner = OWNER_OF(when);
  if (unlikely(!process_joined(s, owner))) return false;
  uint64_t incarnation =
      atomic_load_explicit(&s->processes[owner].incarnation, memory_order_acquire);
  if (LOW_INCARNATION(incarnation) != INCARNATION_OF(when)) return false; /* of an earlier owner */
  uint64_t *alive = &liveness->alive[owner / 64], bit = UINT64_C(1) << (owner % 64);
  if (*alive & bit) return true;
  if (liveness->dead == owner + 1 && liveness->dead_incarnation == incarnation) return false;
  if (process_alive(s, owner)) {
    *alive |= bit;
    return true;
  }
  liveness->dead = owner + 1;
  liveness->dead_incarnation = incarnation;
  return false;
}

/* This process as an owner. False: the process table is full. */
static inline HOT bool own_identity(fshm_segment *s, uint64_t *identity) {
  uint32_t process;
  uint64_t incarnation;
  if (unlikely(!process_identity_inline(s, &process, &incarnation))) return false;
  *identity = (uint64_t)process << 32 | LOW_INCARNATION(incarnation) << 18;
  return true;
}

#define IDENTITY_MASK (UINT64_C(0x3ffffff) << 18)

/* The owner of a permit's slot: hash of key and number (52 bits) | limiter (11) | 0. The key's bits can be read back
 * from a held permit, whose number is known. */
static inline uint64_t permit_bits(uint32_t number) { return spread(NTH_STEP * (number + 1)); }
static inline uint64_t permit_who(uint32_t limiter, uint64_t hash, uint32_t number) {
  uint64_t who = (hash ^ permit_bits(number)) << 12 | (uint64_t)limiter << 1;
  return who ? who : UINT64_C(1) << 12;
}
#define PERMIT_LIMITER(who) ((uint32_t)((who) >> 1) & (MAX_LIMITERS - 1))
#define PERMIT_KEY(who, number) ((((who) >> 12) ^ permit_bits(number)) & (UINT64_MAX >> 12))

/* The key of the queue of those that wait for such a permit. */
static inline uint64_t wait_key_of(const fshm_permit *p) {
  return wait_key(PERMIT_KEY(p->who, PERMIT_NUMBER(p->when)), PERMIT_LIMITER(p->who));
}

const _Atomic uint64_t *wait_queue_of(const fshm_segment *s, const fshm_permit *p) {
  return &s->header->queues[wait_group(wait_key_of(p))];
}

typedef struct {
  fshm_segment *s;
  fshm_limiter *limiter;
  const void *key;
  uint64_t key_length, hash, now, identity;
  uint64_t seen; /* the key's word of freed permits, read before the last whole look */
  bool fixed; /* the caller gave the time */
} holder_t;

static inline HOT bool holder_make(holder_t *h, fshm_limiter *l, const void *key, uint64_t length,
                                   uint64_t now) {
  h->s = l->segment;
  h->limiter = l;
  h->key = key;
  h->key_length = length;
  h->hash = fshm_siphash(l->key[0], l->key[1], key, length);
  h->seen = 0;
  h->fixed = now != 0;
  h->now = now ? min_u64(now, TIME_MAX - 1) : segment_now(h->s);
  return own_identity(h->s, &h->identity);
}

enum { PERMIT_HELD, PERMIT_TAKEN, PERMIT_FULL, PERMIT_CONTENDED, PERMIT_UNKNOWN };

static uint64_t held_by_me(void *context) { return *(uint64_t *)context; }

static bool free_dead(fshm_segment *s, uint64_t hash, uint64_t who, uint64_t now,
                      liveness_t *liveness);

/* Free a permit that another process holds: it is dead, or an operator says so. */
static bool free_permit(fshm_segment *s, uint64_t slot, pair_t seen) {
  const uint32_t number = PERMIT_NUMBER(seen.when);
  const uint64_t key = PERMIT_KEY(seen.who, number);
  if (!pair_cas(&s->slots[slot], &seen, (pair_t){seen.who, 0})) return false;
  (void)changes_freed(s, changes_index(key), number);
  return true;
}

static inline pair_t held_pair(const holder_t *h, uint32_t number) {
  return (pair_t){
      permit_who(h->limiter->index, h->hash, number),
      UINT64_C(7) << 61 | (uint64_t)number << 44 | h->identity | (h->now / 1000000000 & 0x1ffff)};
}

/* Our swap, or our claim, has written the pair `mine` to the slot. */
static inline HOT void set_held(const holder_t *h, uint64_t slot, pair_t mine, fshm_permit *out) {
  out->slot = slot; /* out->put stays as it is */
  out->who = mine.who;
  out->when = mine.when;
  out->group = changes_index(h->hash); /* wait_group() is a part of it */
  out->held = 1;
  changes_taken(h->s, out->group);
}

/* Try a permit that has a slot in its home line, as most have: try_permit() without all that is seldom, inlined.
 * PERMIT_UNKNOWN: it has no such slot, or another process has just taken it. */
static inline HOT int try_home(const holder_t *h, uint32_t number, fshm_permit *out) {
  const pair_t mine = held_pair(h, number);
  found_t f;
  if (unlikely(!table_find_home(h->s, nth_hash(h->hash, number), mine.who, &f)))
    return PERMIT_UNKNOWN;
  if (unlikely(IS_PERMIT(f.pair.when))) return PERMIT_HELD;
  if (unlikely(!pair_cas(&h->s->slots[f.slot], &f.pair, mine))) return PERMIT_UNKNOWN;
  set_held(h, f.slot, mine, out);
  return PERMIT_TAKEN;
}

/* Try one permit. With `liveness`, a dead process's permit is taken over. left: for the whole call; with as many
 * tries for each permit, a process that scribbles on the key's slots could hold us up for hours (I6). */
static int try_permit(const holder_t *h, uint32_t number, liveness_t *liveness, patience_t *left,
                      fshm_permit *out) {
  uint64_t home = nth_hash(h->hash, number);
  pair_t mine = held_pair(h, number);
  for (; patient(left); left->swaps--) {
    found_t f;
    table_find(h->s, home, mine.who, &f);
    if (!f.pair.who) {
      int status = table_claim(h->s, home, mine.who, h->now, held_by_me, &mine.when, &f.slot);
      /* Only with `liveness`: without the shared results we would ask the kernel n times for each process. */
      if (status == CLAIM_FULL && !(liveness && free_dead(h->s, home, mine.who, h->now, liveness)))
        return PERMIT_FULL;
      if (status != CLAIMED) {
        left->claims--;
        continue;
      }
    } else {
      if (IS_PERMIT(f.pair.when) && (!liveness || owner_alive(h->s, f.pair.when, liveness)))
        return PERMIT_HELD;
      /* From free, or from a dead owner, to mine: one swap. Pairs with every other taker's swap, and with the
       * release: the loser sees that another process has just taken the permit. */
      pair_t seen = f.pair;
      if (!pair_cas(&h->s->slots[f.slot], &seen, mine)) continue;
    }
    set_held(h, f.slot, mine, out);
    return PERMIT_TAKEN;
  }
  return PERMIT_CONTENDED;
}

/* Count the key's held permits with numbers from .. to-1. Frees those of dead processes. */
static uint32_t count_held(const holder_t *h, uint32_t from, uint32_t to, liveness_t *liveness) {
  uint32_t held = 0;
  for (uint32_t number = from; number < to; number++) {
    found_t f;
    table_find(h->s, nth_hash(h->hash, number), permit_who(h->limiter->index, h->hash, number), &f);
    if (!f.pair.who || !IS_PERMIT(f.pair.when)) continue;
    if (owner_alive(h->s, f.pair.when, liveness))
      held++;
    else /* lost: another process took it over or freed it */
      (void)free_permit(h->s, f.slot, f.pair);
  }
  return held;
}

static int give_back(holder_t *h, const fshm_permit *p) {
  pair_t seen = {p->who, p->when}, idle = {p->who, 0};
  return p->slot < h->s->slot_count && pair_cas(&h->s->slots[p->slot], &seen, idle);
}

/* Permits of a key may be held with numbers below this. */
static uint32_t permit_bound(const fshm_limiter *l, const snapshot_t *snapshot) {
  if (l->own) return snapshot->permits;
  return limits_most_permits(limits_most(l->segment, l->index), snapshot);
}

#define BEYOND_NS UINT64_C(1000000000)

/* Does no key of the limiter hold permits beyond the present limit? Frees those of dead processes. This looks at the
 * whole table, so a process does it at most once a second. Until it has found none, each taker counts all held
 * permits. */
static COLD bool none_beyond(const holder_t *h, const snapshot_t *snapshot, liveness_t *liveness) {
  fshm_segment *s = h->s;
  uint64_t last = load_relaxed(&h->limiter->beyond);
  if (last && h->now < last + BEYOND_NS && h->now >= last) return false;
  store_relaxed(&h->limiter->beyond, h->now);
  for (uint64_t slot = 0; slot < s->slot_count; slot++) {
    uint64_t when = load_relaxed(&s->slots[slot].when);
    if (!IS_PERMIT(when) || PERMIT_NUMBER(when) < snapshot->permits) continue;
    pair_t seen = pair_load(&s->slots[slot]);
    if (!IS_PERMIT(seen.when) || PERMIT_NUMBER(seen.when) < snapshot->permits) continue;
    if (PERMIT_LIMITER(seen.who) != h->limiter->index) continue;
    if (owner_alive(s, seen.when, liveness) || !free_permit(s, slot, seen)) return false;
  }
  return true;
}

/* We hold a permit of the key. Is it valid? Not if more than n are held: the limit was lowered, and permits beyond
 * it are still held. Ours is published: of any set of holders the last one to publish counts all others, so they
 * never exceed n. */
static COLD bool stands_counted(holder_t *h, snapshot_t *snapshot, uint32_t number,
                                uint32_t *held) {
  const limiter_entry_t *e = &h->s->limiters[h->limiter->index];
  bool said = false;
  for (int tries = 0; tries < MAX_TRIES; tries++) {
    /* Before `current`, and before the count. */
    uint64_t seen = limits_most(h->s, h->limiter->index);
    uint32_t most = limits_most_permits(seen, snapshot);
    bool same = load_relaxed(&e->current) == snapshot->current;
    /* A permit of earlier limits: raise `most` after our swap. A process that looked for such permits before our
     * swap can then no longer lower it, and later ones look up to here. Pairs with limits_lower_most(). */
    if (unlikely(number >= snapshot->permits && !said)) {
      if (!raise_most(&h->s->limiters[h->limiter->index], number + 1)) break;
      said = true;
      continue;
    }
    if (likely(same && most <= snapshot->permits)) return true;
    if (!same) {
      if (!limits_load(h->s, h->limiter->index, snapshot) || !snapshot->permits) return true;
      continue; /* count by the present limits */
    }
    liveness_t liveness = {0};
    if (!h->fixed) h->seen = changes_arm_freed(h->s, changes_index(h->hash));
    *held = count_held(h, 0, most, &liveness);
    /* The count is by limits that were in force throughout: a permit released after a change made no room before it.
     * Pairs with publish(). */
    atomic_thread_fence(memory_order_acquire);
    if (load_relaxed(&e->current) != snapshot->current) continue;
    if (*held > snapshot->permits) return false;
    if (count_held(h, snapshot->permits, most, &liveness) == 0 &&
        none_beyond(h, snapshot, &liveness))
      limits_lower_most(h->s, h->limiter->index, snapshot, seen);
    return true;
  }
  *held = 1; /* our own permit, which is given back; others change the limits all the time */
  return false;
}

/* The same, without a count where that is seen at once: the limits are those that we went by, and no permit beyond
 * them may be held. */
static inline HOT bool stands(holder_t *h, const limiter_entry_t *e, snapshot_t *snapshot,
                              uint32_t number, uint32_t *held) {
  /* All calls for this key have the same number, so no permit beyond it was ever taken. */
  if (unlikely(h->limiter->own != NULL)) return true;
  after_swap(); /* pairs with publish(): it sees our permit, or we see its limits */
  const uint32_t most = MOST_OF(entry_most(e)); /* before `current` */
  if (likely(most <= snapshot->permits && load_relaxed(&e->current) == snapshot->current))
    return true;
  return stands_counted(h, snapshot, number, held);
}

/* Is it also within the learned limit? As stands_granted(): each valid permit has a number below the limit, or all were
 * counted. DESIGN.md, "Limits that are learned". *held is set where more are held than the limit. */
static COLD bool stands_learned(const holder_t *h, const snapshot_t *snapshot, const granted_t *g,
                                uint32_t number, uint32_t *held) {
  found_t f;
  after_swap(); /* pairs with the fence below: it sees our permit, or we see its word */
  table_find(h->s, g->hash, g->who, &f);
  const uint64_t word = f.pair.who ? f.pair.when : 0;
  const uint32_t limit = learned_limit(word);
  if (number >= limit) return false;
  if (likely(learned_clean(word))) return true;
  liveness_t liveness = {0};
  /* Of the word's top and the name's bound each says which permits may be held. */
  const uint64_t of_name = limits_most_permits(limits_most(h->s, h->limiter->index), snapshot);
  const uint32_t top = (uint32_t)min_u64(learned_top(word), of_name);
  atomic_thread_fence(memory_order_seq_cst); /* the word, then the permits */
  const uint32_t below = count_held(h, 0, limit < top ? limit : top, &liveness);
  const uint32_t beyond = count_held(h, limit, top, &liveness);
  if (below + beyond > limit) {
    *held = below + beyond;
    return false;
  }
  if (!beyond && f.pair.who) {
    pair_t clean = {f.pair.who, limit_word_cleaned(word, h->now)};
    (void)pair_cas(&h->s->slots[f.slot], &f.pair, clean); /* lost: another call will do it */
  }
  return true;
}

/* Is it also within the permit lease of this host? Each valid permit has a number below the lease, or all were
 * counted: DESIGN.md, "Permits over many hosts". */
static __attribute__((noinline)) bool stands_granted(const holder_t *h, const snapshot_t *snapshot,
                                                     const granted_t *g, uint32_t number,
                                                     uint32_t *held) {
  if (g->learned) return stands_learned(h, snapshot, g, number, held);
  after_swap(); /* pairs with the swap and the scan of permit_lease.c: it sees our permit, or we see its word */
  uint64_t word = granted_word(h->s, g);
  uint64_t most = g->alone;
  if (g->alone) {
    if (word != g->dropped) return false; /* the server grants again */
  } else {
    /* The word before the clock. */
    most = permit_lease_at(word, h->fixed ? h->now : segment_now(h->s));
    if (number >= most) return false;
    if (likely(permit_lease_clean(word))) return true;
  }
  liveness_t liveness = {0};
  const uint32_t bound = limits_most_permits(limits_most(h->s, h->limiter->index), snapshot);
  *held = count_held(h, 0, bound, &liveness);
  return *held <= most;
}

/* What a process remembers of a whole look at a key's permits (fshm_segment.looks). Its words: the key's word of freed
 * permits before the look; until when the look counts, since then the dead are looked for again; all permits with
 * numbers below this were held (32 bits) | so many were held (32); of a count, the word of taken permits. */
enum { LOOK_FREED, LOOK_UNTIL, LOOK_HELD, LOOK_TAKEN };
#define LOOK_PATIENCE 64 /* looks take a 64th of the time at most */
#define LOOK_PERMIT_NS UINT64_C(2000) /* a permit and its owner: what took longer was interrupted */
#define LOOK_NS UINT64_C(500000000) /* and a dead process's permit is found after that */
#define LOOK_COUNTED UINT64_C(0x9e3779b97f4a7c15) /* with the key's hash: the entry of a count */

static inline look_entry_t *look_entry(fshm_segment *s, uint64_t hash) {
  return &s->looks[hash % LOOKS];
}

/* Threads may write an entry at the same time, and a fork may come between: an entry is believed if its words are of
 * one writer. */
static inline uint64_t look_check(uint64_t hash, const uint64_t *w) {
  const uint64_t k = UINT64_C(0x9e3779b97f4a7c15), j = UINT64_C(0xbf58476d1ce4e5b9);
  const uint64_t a = (hash ^ w[0]) * k, b = (w[1] ^ (w[2] << 32 | w[2] >> 32)) * j;
  return (a ^ (b << 32 | b >> 32)) + (w[3] ^ a) * j;
}

static COLD void look_store(fshm_segment *s, uint64_t hash, const uint64_t *w) {
  look_entry_t *e = look_entry(s, hash);
  store_relaxed(&e->hash, hash);
  for (int i = 0; i < LOOK_WORDS; i++) store_relaxed(&e->words[i], w[i]);
  store_relaxed(&e->check, look_check(hash, w));
}

static bool look_load(fshm_segment *s, uint64_t hash, uint64_t now, uint64_t *w) {
  const look_entry_t *e = look_entry(s, hash);
  if (load_relaxed(&e->hash) != hash) return false;
  for (int i = 0; i < LOOK_WORDS; i++) w[i] = load_relaxed(&e->words[i]);
  return load_relaxed(&e->check) == look_check(hash, w) && now < w[LOOK_UNTIL] &&
         w[LOOK_UNTIL] <= now + LOOK_NS;
}

/* From h->now on a look took until now: all permits with numbers below n were held, and `held` in all. */
static COLD void look_remember(const holder_t *h, uint64_t hash, uint32_t n, uint32_t held,
                               uint64_t taken) {
  if (!h->seen) return;
  const uint64_t looked = (n > held ? n : held) + UINT64_C(1);
  const uint64_t took = min_u64(minus(segment_now(h->s), h->now), looked * LOOK_PERMIT_NS);
  const uint64_t until = plus_time(h->now, min_u64(took * LOOK_PATIENCE, LOOK_NS));
  look_store(h->s, hash, (const uint64_t[]){h->seen, until, (uint64_t)n << 32 | held, taken});
}

void semaphore_forget(fshm_segment *s, uint64_t hash) {
  if (!((load_relaxed(&look_entry(s, hash)->hash) ^ hash) << 12))
    store_relaxed(&look_entry(s, hash)->hash, 0);
}

/* What is remembered of the key, and its word of freed permits now. Returns how many were freed since. */
static uint64_t look_since(const holder_t *h, uint64_t *w, uint64_t *freed) {
  if (h->fixed || !look_load(h->s, h->hash, h->now, w)) return UINT64_MAX;
  /* acquire: whoever released before this call has said so in the word, and we see that word or a later one */
  *freed =
      atomic_load_explicit(&changes_of(h->s, changes_index(h->hash))->freed, memory_order_acquire);
  return changes_between(w[LOOK_FREED], *freed);
}

/* The limit was lowered. Are more than n held still, whichever those are? */
static COLD bool look_counted(const holder_t *h, uint32_t n, uint32_t *held) {
  uint64_t w[LOOK_WORDS], freed, since = look_since(h, w, &freed);
  if (since == UINT64_MAX) return false;
  *held = (uint32_t)minus((uint32_t)w[LOOK_HELD], since); /* at least */
  return *held >= n;
}

/* The first permit was held. What is known of the others, without a look at them? PERMIT_HELD: none below n is free
 * (*held: how many are held). PERMIT_UNKNOWN: look. PERMIT_TAKEN: the only one that was freed since, *number. */
static __attribute__((noinline)) int look_back(const holder_t *h, uint32_t n, patience_t *left,
                                               uint32_t *number, uint32_t *held, fshm_permit *out) {
  uint64_t w[LOOK_WORDS], freed, since = look_since(h, w, &freed);
  const uint32_t all = (uint32_t)(w[LOOK_HELD] >> 32);
  if (since > 1 || n > all) return PERMIT_UNKNOWN;
  int status = PERMIT_HELD;
  if (since && FREED_NUMBER(freed) < n) { /* ours, or one of another key with the same word */
    *number = FREED_NUMBER(freed);
    status = try_permit(h, *number, NULL, left, out);
  }
  const uint32_t counted = (uint32_t)minus((uint32_t)w[LOOK_HELD], since);
  *held = counted > n ? counted : n;
  if (!since || status != PERMIT_HELD) return status;
  w[LOOK_FREED] = freed;
  w[LOOK_HELD] = (uint64_t)all << 32 | (counted > all ? counted : all);
  look_store(h->s, h->hash, w);
  return PERMIT_HELD;
}

/* We do not keep the permit: more than n are held without it. Without a wake-up: no waiter may have it either. */
static COLD void refuse_permit(holder_t *h, fshm_permit *p) {
  (void)give_back(h, p);
  p->held = 0;
  const uint64_t freed = changes_freed(h->s, p->group, PERMIT_NUMBER(p->when));
  /* Only ours was freed since the count, which the caller does not count. */
  if (freed && h->seen && changes_between(h->seen, freed) == 1) h->seen = freed;
}

/* We have taken a permit: does it stand? As take_permit() answers. */
static inline HOT int keep_permit(holder_t *h, const limiter_entry_t *e, snapshot_t *snapshot,
                                  const granted_t *granted, fshm_permit *out, uint32_t *held) {
  const uint32_t number = PERMIT_NUMBER(out->when);
  key_stats_remember(h->s, out->slot, key_stats_meta(h->limiter->index | PERMIT_BIT, out->who),
                     h->key, h->key_length);
  bool fits = stands(h, e, snapshot, number, held);
  if (likely(fits && (!granted || stands_granted(h, snapshot, granted, number, held))))
    return FSHM_ALLOWED;
  refuse_permit(h, out);
  if (fits) return FSHM_ASK;
  *held -= 1;
  look_remember(h, h->hash, 0, *held, 0);
  return FSHM_DENIED;
}

/* The rest of take_permit(), where its first try has not taken the permit `number`. */
static UNGUARDED __attribute__((noinline)) int take_another(holder_t *h, snapshot_t *snapshot,
                                                            uint32_t n, uint32_t number, int status,
                                                            const granted_t *granted,
                                                            fshm_permit *out, uint32_t *held) {
  const uint32_t first = number, start = load_relaxed(&h->limiter->frontier) % n;
  liveness_t liveness;
  bool full = false, asked = false;
  /* One for each permit and pass: honest takers. */
  patience_t left = patience(MAX_TRIES + 2 * (uint64_t)n);
  for (int pass = 0; pass < 2; pass++) { /* the second asks who is dead */
    if (pass) memset(&liveness, 0, sizeof liveness);
    if (pass && !h->fixed) h->seen = changes_arm_freed(h->s, changes_index(h->hash));
    for (uint32_t i = (uint32_t)pass; i <= n; i++) {
      number = i ? (start + i - 1) % n : first;
      if (i || status != PERMIT_HELD)
        status = try_permit(h, number, pass ? &liveness : NULL, &left, out);
      if (status == PERMIT_HELD && !asked) {
        asked = true;
        status = look_back(h, n, &left, &number, held, out);
        if (status == PERMIT_HELD) return FSHM_DENIED;
      }
      if (unlikely(status == PERMIT_CONTENDED)) return FSHM_CONTENDED;
      full |= status == PERMIT_FULL;
      if (status != PERMIT_TAKEN) continue;
      if (number != first || first == start) store_relaxed(&h->limiter->frontier, number + 1);
      if (pass) { /* a dead process may have held more: let the next caller look */
        changes_freed_some(h->s, out->group);
        wait_wake(h->s, wait_key_of(out));
      }
      return keep_permit(h, &h->s->limiters[h->limiter->index], snapshot, granted, out, held);
    }
  }
  uint32_t most = permit_bound(h->limiter, snapshot);
  *held = full || most > n ? count_held(h, 0, most, &liveness) : n;
  if (!full) look_remember(h, h->hash, n, *held, 0);
  return full ? FSHM_FULL : FSHM_DENIED;
}

/* Take one of the key's first n permits. FSHM_ALLOWED, FSHM_DENIED (*held: how many are held), FSHM_FULL,
 * FSHM_CONTENDED; FSHM_ASK: not within the lease (granted NULL: there is no lease, this host's limit alone counts). */
static inline HOT int take_permit(holder_t *h, snapshot_t *snapshot, uint32_t n,
                                  const granted_t *granted, fshm_permit *out, uint32_t *held) {
  fshm_limiter *l = h->limiter;
  const limiter_entry_t *e = &h->s->limiters[l->index];
  /* Where to look first; hints, which threads may overwrite. Without a swap: that costs as much as the take's own. */
  const uint32_t released = load_relaxed(&l->released);
  uint32_t number = released ? released - 1 : load_relaxed(&l->frontier);
  if (released) store_relaxed(&l->released, 0);
  if (unlikely(number >= n)) number %= n;
  if (unlikely(MOST_OF(entry_most(e)) > n) && permit_bound(l, snapshot) > n && !granted &&
      look_counted(h, n, held))
    return FSHM_DENIED;
  const int status = try_home(h, number, out);
  if (unlikely(status != PERMIT_TAKEN))
    return take_another(h, snapshot, n, number, status, granted, out, held);
  if (!released) store_relaxed(&l->frontier, number + 1);
  return keep_permit(h, e, snapshot, granted, out, held);
}

#define GRANTED_TRIES 3 /* tries of a taker whose permit is not valid because the word changed */

int semaphore_take_granted(fshm_limiter *l, const void *key, uint64_t length, const granted_t *g,
                           uint64_t now, fshm_permit *out, uint64_t *version, uint32_t *held) {
  holder_t h;
  snapshot_t snapshot;
  bool member = holder_make(&h, l, key, length, now);
  if (!limits_load(h.s, l->index, &snapshot)) return damage_limits(h.s, l->index);
  *version = CURRENT_VERSION(snapshot.current);
  if (!snapshot.permits) return FSHM_E_ARGUMENT;
  if (!member) return process_refusal(h.s);
  for (int tries = 0; tries < GRANTED_TRIES; tries++) {
    uint64_t may = g->alone ? g->alone : permit_lease_at(granted_word(h.s, g), h.now);
    uint32_t n = (uint32_t)min_u64(may, snapshot.permits);
    if (!n) return FSHM_ASK;
    int status = take_permit(&h, &snapshot, n, g, out, held);
    if (status == FSHM_DENIED && n < snapshot.permits && !g->alone) return FSHM_ASK;
    if (status != FSHM_ASK) return status;
    if (!h.fixed) h.now = segment_now(h.s);
  }
  return FSHM_ASK;
}

#define MOST_COUNTED 1024 /* permits that an admitted call counts: 5 us */

/* How many permits of the key are held; of many, an estimate from every n-th line of four. */
static uint32_t count_about(const holder_t *h, uint32_t limit) {
  const uint32_t every = (limit + MOST_COUNTED - 1) / MOST_COUNTED;
  uint32_t held = 0;
  for (uint32_t number = 0; number < limit; number++) {
    if (number % SLOTS_PER_LINE == 0 && every > 1) number += SLOTS_PER_LINE * (every - 1);
    found_t f;
    table_find(h->s, nth_hash(h->hash, number), permit_who(h->limiter->index, h->hash, number), &f);
    held += f.pair.who && IS_PERMIT(f.pair.when);
  }
  return held * every;
}

int semaphore_take_learned(fshm_limiter *l, const void *key, uint64_t length, const granted_t *g,
                           uint64_t now, fshm_permit *out, uint64_t *version, uint32_t *held) {
  holder_t h;
  snapshot_t snapshot;
  bool member = holder_make(&h, l, key, length, now);
  if (!limits_load(h.s, l->index, &snapshot)) return damage_limits(h.s, l->index);
  *version = CURRENT_VERSION(snapshot.current);
  if (!snapshot.permits) return FSHM_E_ARGUMENT;
  if (!member) return process_refusal(h.s);
  for (int tries = 0; tries < GRANTED_TRIES; tries++) {
    const uint64_t word = granted_word(h.s, g);
    if (!word) return FSHM_ASK;
    const uint32_t n = (uint32_t)min_u64(learned_limit(word), snapshot.permits);
    *held = 0;
    int status = take_permit(&h, &snapshot, n, g, out, held);
    if (status == FSHM_ALLOWED) *held = count_about(&h, n);
    if (status != FSHM_ASK) return status;
    if (*held) { /* more than the limit, from before it fell */
      *held -= 1;
      return FSHM_DENIED;
    }
    if (!h.fixed) h.now = segment_now(h.s);
  }
  return FSHM_DENIED; /* the limit falls all the time */
}

uint32_t semaphore_count(fshm_limiter *l, const void *key, uint64_t length, uint64_t from) {
  holder_t h;
  snapshot_t snapshot;
  liveness_t liveness = {0};
  (void)holder_make(&h, l, key, length, 0);
  if (!limits_load_of(l, &snapshot)) {
    (void)damage_limits(h.s, l->index);
    return 0;
  }
  if (!snapshot.permits) return 0;
  uint32_t most = permit_bound(l, &snapshot);
  return count_held(&h, (uint32_t)min_u64(from, most), most, &liveness);
}

/* The key's probe windows are full: free the permits of dead processes in them. No call has come for those keys
 * since, so they were not noticed. If another process frees them at the same time, there is nothing left to free,
 * but there is room. */
static bool free_dead(fshm_segment *s, uint64_t hash, uint64_t who, uint64_t now,
                      liveness_t *liveness) {
  bool any = false;
  for (uint64_t i = 0; i < table_probe_count(s); i++) {
    slot_t *slot = &s->slots[table_probe(s, hash, i)];
    if (!IS_PERMIT(load_relaxed(&slot->when))) continue;
    pair_t seen = pair_load(slot);
    if (!IS_PERMIT(seen.when) || owner_alive(s, seen.when, liveness)) continue;
    any |= free_permit(s, (uint64_t)(slot - s->slots), seen);
  }
  return any || table_room(s, hash, who, now);
}

bool semaphore_free_dead(fshm_segment *s, uint64_t hash, uint64_t who, uint64_t now) {
  liveness_t liveness = {0};
  return free_dead(s, hash, who, now, &liveness);
}

static COLD void wake_next(fshm_segment *s, const fshm_permit *p) {
  wait_wake_next(s, wait_key_of(p));
}

UNGUARDED int fshm_permit_release(fshm_limiter *l, fshm_permit *p) {
  holder_t h = {.s = l->segment, .limiter = l};
  if (!p->held) return 0;
  p->held = 0;
  /* A forked child has its own identity, and cannot free its parent's permit. */
  if (!own_identity(h.s, &h.identity) || (p->when & IDENTITY_MASK) != h.identity) return 0;
  if (!give_back(&h, p)) return 0;
  /* Before the wake-up: who is woken sees that there was a release. */
  (void)changes_freed(h.s, p->group, PERMIT_NUMBER(p->when));
  if (unlikely(wait_any(h.s, p->group))) wake_next(h.s, p);
  store_relaxed(&l->released, PERMIT_NUMBER(p->when) + 1);
  return 1;
}

UNGUARDED int fshm_permit_idle(fshm_limiter *l, fshm_permit *p, int idle) {
  fshm_segment *s = l->segment;
  uint64_t identity, to = idle ? p->when | IDLE : p->when & ~IDLE;
  if (!p->held || p->slot >= s->slot_count) return 0;
  if (!own_identity(s, &identity) || (p->when & IDENTITY_MASK) != identity) return 0;
  pair_t seen = {p->who, p->when}, next = {p->who, to};
  if (!pair_cas(&s->slots[p->slot], &seen, next)) return 0;
  /* A thread of this process may ask fshm_permit_held() meanwhile. */
  __atomic_store_n(&p->when, to, __ATOMIC_RELAXED);
  return 1;
}

void fshm_wait_ask(fshm_limiter *l, const void *key, uint64_t length, int idle, fshm_place *place) {
  holder_t h;
  snapshot_t snapshot;
  uint64_t told[(PROCESSES + 63) / 64] = {0};
  if (!holder_make(&h, l, key, length, 0) || !limits_load_of(l, &snapshot) || !snapshot.permits)
    return;
  if (!place->owner || !wait_place_asks(h.s, place)) return;
  place->asked = 0;
  uint32_t own = OWNER_OF(h.identity), most = permit_bound(l, &snapshot);
  for (uint32_t number = 0; number < most; number++) {
    found_t f;
    table_find(h.s, nth_hash(h.hash, number), permit_who(l->index, h.hash, number), &f);
    if (!f.pair.who || !IS_PERMIT(f.pair.when) || (idle && !(f.pair.when & IDLE))) continue;
    uint32_t owner = OWNER_OF(f.pair.when);
    /* joined: an index of the process table; a hostile permit may name any */
    if (owner == own || !process_joined(h.s, owner) || told[owner / 64] >> owner % 64 & 1) continue;
    told[owner / 64] |= UINT64_C(1) << owner % 64;
    wait_tell(h.s, owner);
    place->asked = 1;
  }
}

int fshm_permit_held(const fshm_limiter *l, const fshm_permit *p) {
  const fshm_segment *s = l->segment;
  if (!p->held || p->slot >= s->slot_count) return 0;
  const uint64_t when = __atomic_load_n(&p->when, __ATOMIC_RELAXED);
  pair_t now = pair_load(&s->slots[p->slot]);
  /* fshm_permit_idle() changes both, the slot first. */
  return now.who == p->who && (now.when | IDLE) == (when | IDLE);
}

/* A count holds while no permit of the key was taken or freed. */
uint32_t fshm_in_flight(fshm_limiter *l, const void *key, uint64_t length) {
  holder_t h;
  snapshot_t snapshot;
  uint64_t w[LOOK_WORDS];
  (void)holder_make(&h, l, key, length, 0);
  if (!limits_load_of(l, &snapshot)) {
    (void)damage_limits(h.s, l->index);
    return 0;
  }
  if (!snapshot.permits) return 0;
  const uint32_t most = permit_bound(l, &snapshot);
  const uint64_t hash = h.hash ^ LOOK_COUNTED;
  const changes_t *changes = changes_of(h.s, changes_index(h.hash));
  if (look_load(h.s, hash, h.now, w) && w[LOOK_HELD] >> 32 == most &&
      atomic_load_explicit(&changes->freed, memory_order_acquire) == w[LOOK_FREED] &&
      atomic_load_explicit(&changes->taken, memory_order_acquire) == w[LOOK_TAKEN])
    return (uint32_t)w[LOOK_HELD];
  h.seen = changes_arm_freed(h.s, changes_index(h.hash));
  const uint64_t taken = changes_arm_taken(h.s, changes_index(h.hash));
  liveness_t liveness = {0};
  const uint32_t held = count_held(&h, 0, most, &liveness);
  look_remember(&h, hash, most, held, taken);
  return held;
}

/* A permit and rate limits together: check the limits, take the permit, charge the limits; give the permit back if
 * they have no room any more. Killed after taking the permit, it is a dead process's permit and comes back by
 * itself; killed after the charge, the limits stay charged. */
UNGUARDED void fshm_admit(fshm_limiter *l, const void *key, uint64_t key_length,
                          const uint64_t *costs, uint64_t now, fshm_permit *permit,
                          fshm_decision *out, uint32_t *in_flight) {
  holder_t h;
  snapshot_t snapshot;
  permit->slot = permit->who = permit->when = 0;
  permit->held = 0;
  /* Nothing was charged: also of limits that are set before it is settled. */
  for (uint32_t i = 0; i < FSHM_MAX_LIMITS; i++) permit->put[i].den = permit->put[i].version = 0;
  memset(out, 0, sizeof *out);
  *in_flight = 0;
  bool member = holder_make(&h, l, key, key_length, now);
  if (!limits_load_of_inline(l, &snapshot)) {
    out->status = damage_limits(h.s, l->index);
    return;
  }
  out->version = CURRENT_VERSION(snapshot.current);
  out->status = FSHM_ALLOWED;
  out->remaining = INT64_MAX;
  if (snapshot.count) {
    if (limiter_take(l, &snapshot, h.hash, FSHM_PROBE, key, key_length, costs, now, out, NULL) !=
        FSHM_ALLOWED)
      return;
  }
  if (snapshot.permits) {
    int status = member ? take_permit(&h, &snapshot, snapshot.permits, NULL, permit, in_flight)
                        : process_refusal(h.s);
    if (status != FSHM_ALLOWED) {
      out->status = status;
      out->limit_index = (uint16_t)snapshot.count;
      out->remaining = 0;
      out->retry_after_ns = 0; /* it is not known when a holder releases */
      return;
    }
  }
  if (snapshot.count) {
    (void)limiter_take(l, &snapshot, h.hash, FSHM_ACQUIRE, key, key_length, costs, now, out,
                       permit->put);
    if (out->status != FSHM_ALLOWED && permit->held) (void)fshm_permit_release(l, permit);
  }
}

/* inspection ------------------------------------------------------------------------------------ */

static int permit_at(fshm_segment *s, uint64_t slot, liveness_t *liveness, fshm_permit_info *out) {
  memset(out, 0, sizeof *out);
  pair_t pair = {load_relaxed(&s->slots[slot].who), load_relaxed(&s->slots[slot].when)};
  uint32_t meta = load_relaxed(&s->key_stats[slot].meta);
  uint32_t limiter = (meta >> 20) & (PERMIT_BIT - 1);
  if (!IS_PERMIT(pair.when) || !pair.who) return 0;
  bool known = meta == key_stats_meta(limiter | PERMIT_BIT, pair.who) && limiter < s->limiter_count;
  out->limiter = known ? limiter : UINT32_MAX;
  out->alive = owner_alive(s, pair.when, liveness);
  if (out->alive) out->pid = load_relaxed(&s->processes[OWNER_OF(pair.when)].pid);
  out->idle = (pair.when & IDLE) != 0;
  out->number = PERMIT_NUMBER(pair.when);
  out->key_hash = PERMIT_KEY(pair.who, PERMIT_NUMBER(pair.when));
  out->age_seconds = (segment_now(s) / 1000000000 - TAKEN_OF(pair.when)) & 0x1ffff;
  out->table_slot = slot;
  return 1;
}

int fshm_permit_at(fshm_segment *s, uint64_t slot, fshm_permit_info *out) {
  liveness_t liveness = {0};
  memset(out, 0, sizeof *out);
  return slot < s->slot_count && permit_at(s, slot, &liveness, out);
}

uint64_t fshm_permits(fshm_segment *s, fshm_permit_info *out, uint64_t room) {
  liveness_t liveness = {0}; /* one for all permits: each process is checked once */
  uint64_t found = 0;
  for (uint64_t slot = 0; slot < s->slot_count; slot++) {
    fshm_permit_info one;
    if (!IS_PERMIT(load_relaxed(&s->slots[slot].when)) || !permit_at(s, slot, &liveness, &one))
      continue;
    if (found < room) out[found] = one;
    found++;
  }
  return found;
}

uint64_t fshm_reap(fshm_segment *s, uint32_t pid) {
  liveness_t liveness = {0};
  uint64_t freed = 0;
  if (s->read_only) return 0;
  for (uint64_t slot = 0; slot < s->slot_count; slot++) {
    if (!IS_PERMIT(load_relaxed(&s->slots[slot].when))) continue;
    pair_t seen = pair_load(&s->slots[slot]);
    if (!IS_PERMIT(seen.when)) continue;
    bool alive = owner_alive(s, seen.when, &liveness);
    bool theirs = alive && load_relaxed(&s->processes[OWNER_OF(seen.when)].pid) == pid;
    if (pid ? !theirs : alive) continue;
    if (free_permit(s, slot, seen)) freed++;
  }
  if (freed) wait_wake_all(s);
  return freed;
}

uint64_t fshm_unique(fshm_segment *s) { return add_relaxed(&s->header->ticket, 1); }
