/* lease.c - what is held: requests in flight, pooled connections. Argued in DESIGN.md.
 *
 * A key that may have n permits has n slots. A slot is a cell of the table like any other, with the
 * fingerprint of (limiter, key, slot): taking it is one swap from free to held-by-me, or a claim where
 * the slot has no cell yet. A free slot equals "never seen", so its cell can be reused by any key. The
 * count is what the cells say; there is no second number.
 *
 * when = 7 (3 bits) | slot (17) | owner: process slot (8) and its generation (18) | idle (1) |
 *        taken, in seconds of segment time (17)
 */
#include "../core/internal.h"

#define PERMIT_BIT 2048U /* of the limiter index in ledger_t.meta */
#define SLOT_OF(w) ((uint32_t)((w) >> 44) & 0x1ffff)
#define OWNER_OF(w) ((uint32_t)((w) >> 36) & 0xff)
#define GENERATION_OF(w) ((w) >> 18 & 0x3ffff)
#define IDLE (UINT64_C(1) << 17)
#define TAKEN_OF(w) ((w) & 0x1ffff)

static_assert(PROCESSES <= 256, "an owner is 8 bits");
static_assert(MAX_PERMITS < 1 << 17, "a slot is 17 bits");

/* Which slots' owners are alive, asked once in each call: a question is a system call. */
typedef struct {
  uint8_t known[PROCESSES];       /* 0 = not asked, 1 = alive, 2 = dead */
  uint64_t generation[PROCESSES]; /* that was asked for: the slot may get a new owner meanwhile */
} census_t;

static void census_begin(census_t *census) { memset(census, 0, sizeof *census); }

static bool owner_alive(fshm_segment *s, uint64_t when, census_t *census) {
  uint32_t owner = OWNER_OF(when);
  uint64_t generation = atomic_load_explicit(&s->processes[owner].generation, memory_order_acquire);
  if ((generation & 0x3ffff) != GENERATION_OF(when)) return false; /* an earlier owner's */
  if (!census->known[owner] || census->generation[owner] != generation) {
    census->generation[owner] = generation;
    census->known[owner] = process_alive(s, owner) ? 1 : 2;
  }
  return census->known[owner] == 1;
}

/* This process as an owner; false where the process table is full. */
static bool own_identity(fshm_segment *s, uint64_t *identity) {
  uint32_t slot;
  uint64_t generation;
  if (!process_identity(s, &slot, &generation)) return false;
  *identity = (uint64_t)slot << 36 | (generation & 0x3ffff) << 18;
  return true;
}

#define IDENTITY_MASK (UINT64_C(0x3ffffff) << 18)

/* Whose permit it is: hash of key and slot (52 bits) | limiter (11) | 0. From a held one, whose slot is known, the key's
 * bits can be read back. */
static inline uint64_t slot_bits(uint32_t slot) { return spread(SLOT_STEP * (slot + 1)); }
static inline uint64_t permit_who(uint32_t limiter, uint64_t hash, uint32_t slot) {
  uint64_t who = (hash ^ slot_bits(slot)) << 12 | (uint64_t)limiter << 1;
  return who ? who : UINT64_C(1) << 12;
}
#define PERMIT_LIMITER(who) ((uint32_t)((who) >> 1) & (MAX_LIMITERS - 1))
#define PERMIT_KEY(who, slot) ((((who) >> 12) ^ slot_bits(slot)) & (UINT64_MAX >> 12))

typedef struct {
  fshm_segment *s;
  fshm_limiter *limiter;
  const void *key;
  uint64_t key_length, hash, now, identity;
  bool fixed; /* the caller gave the time */
} holder_t;

static bool holder_make(holder_t *h, fshm_limiter *l, const void *key, uint64_t length,
                        uint64_t now) {
  h->s = l->segment;
  h->limiter = l;
  h->key = key;
  h->key_length = length;
  h->hash = fshm_siphash(l->key[0], l->key[1], key, length);
  h->fixed = now != 0;
  h->now = now ? min_u64(now, TIME_MAX - 1) : segment_now(h->s);
  return own_identity(h->s, &h->identity);
}

enum { SLOT_HELD, SLOT_TAKEN, SLOT_FULL, SLOT_CONTENDED };

static uint64_t held_by_me(void *context) { return *(uint64_t *)context; }

static bool free_dead(fshm_segment *s, uint64_t hash, uint64_t who, uint64_t now, census_t *census);

/* Try one slot. With a census, a dead process's permit is taken over. left: for the whole call;
 * with as many tries for each slot, who scribbles on the key's cells could hold us up for hours (I6). */
static int take_slot_of_key(const holder_t *h, uint32_t slot, census_t *census, patience_t *left,
                            fshm_permit *out) {
  uint64_t place = slot_place(h->hash, slot);
  uint64_t who = permit_who(h->limiter->index, h->hash, slot);
  pair_t mine = {who, UINT64_C(7) << 61 | (uint64_t)slot << 44 | h->identity |
                          (h->now / 1000000000 & 0x1ffff)};
  for (; patient(left); left->swaps--) {
    found_t f;
    cells_find(h->s, place, who, &f);
    if (!f.pair.who) {
      int status = cells_claim(h->s, place, who, h->now, held_by_me, &mine.when, &f.cell);
      /* Only with a census: one for each slot would ask the kernel n times for each process. */
      if (status == CLAIM_FULL && !(census && free_dead(h->s, place, who, h->now, census)))
        return SLOT_FULL;
      if (status != CLAIMED) {
        left->claims--;
        continue;
      }
    } else {
      if (IS_PERMIT(f.pair.when) && (!census || owner_alive(h->s, f.pair.when, census)))
        return SLOT_HELD;
      /* From free, or from a dead owner, to mine: one swap. Pairs with every other taker's, and with
       * the release: whoever fails sees a slot that somebody else has just taken. */
      pair_t seen = f.pair;
      if (!pair_cas(&h->s->cells[f.cell], &seen, mine)) continue;
    }
    out->cell = f.cell; /* and what was charged stays as it is */
    out->who = who;
    out->when = mine.when;
    out->bell = bell_of(h->hash);
    out->held = 1;
    return SLOT_TAKEN;
  }
  return SLOT_CONTENDED;
}

/* Count the key's held slots from .. to-1; free those of dead processes on the way. */
static uint32_t count_held_from(const holder_t *h, uint32_t from, uint32_t to, census_t *census) {
  uint32_t held = 0;
  for (uint32_t slot = from; slot < to; slot++) {
    found_t f;
    cells_find(h->s, slot_place(h->hash, slot), permit_who(h->limiter->index, h->hash, slot), &f);
    if (!f.pair.who || !IS_PERMIT(f.pair.when)) continue;
    pair_t seen = f.pair, idle = {f.pair.who, 0};
    if (owner_alive(h->s, f.pair.when, census))
      held++;
    else
      (void)pair_cas(&h->s->cells[f.cell], &seen,
                     idle); /* lost: somebody took it over or freed it */
  }
  return held;
}

static uint32_t count_held(const holder_t *h, uint32_t slots, census_t *census) {
  return count_held_from(h, 0, slots, census);
}

static int give_back(holder_t *h, const fshm_permit *p) {
  pair_t seen = {p->who, p->when}, idle = {p->who, 0};
  return p->cell < h->s->cell_count && pair_cas(&h->s->cells[p->cell], &seen, idle);
}

/* Up to which slot permits of a key may be held. */
static uint32_t slots_of(const fshm_limiter *l, const plan_t *plan) {
  if (l->numbers) return plan->permits;
  return limits_most_permits(limits_most(l->segment, l->index), plan);
}

#define BEYOND_NS UINT64_C(1000000000)

/* Does any key of the limiter hold permits beyond the present limit? Frees those of dead processes. A look at the whole
 * table, so a process does it once a second at most; until one has found none, each taker counts all held slots. */
static COLD bool none_beyond(const holder_t *h, const plan_t *plan, census_t *census) {
  fshm_segment *s = h->s;
  uint64_t last = load_relaxed(&h->limiter->beyond);
  if (last && h->now < last + BEYOND_NS && h->now >= last) return false;
  store_relaxed(&h->limiter->beyond, h->now);
  for (uint64_t cell = 0; cell < s->cell_count; cell++) {
    uint64_t when = load_relaxed(&s->cells[cell].when);
    if (!IS_PERMIT(when) || SLOT_OF(when) < plan->permits) continue;
    pair_t seen = pair_load(&s->cells[cell]), idle = {seen.who, 0};
    if (!IS_PERMIT(seen.when) || SLOT_OF(seen.when) < plan->permits) continue;
    if (PERMIT_LIMITER(seen.who) != h->limiter->index) continue;
    if (owner_alive(s, seen.when, census) || !pair_cas(&s->cells[cell], &seen, idle)) return false;
  }
  return true;
}

/* A slot of the key is ours. Does it stand? Not where more than n are held: the limit was lowered, by now
 * or earlier, and slots beyond it are still held. Ours is published: of any set of holders the last to
 * publish counts all others, so they never exceed n. */
static bool stands(holder_t *h, plan_t *plan, uint32_t slot, uint32_t *held) {
  const limiter_entry_t *e = &h->s->limiters[h->limiter->index];
  bool said = false;
  /* All who ask for this key bring the same number, so no slot beyond it was ever taken. */
  if (unlikely(h->limiter->numbers != NULL)) return true;
  after_swap(); /* pairs with publish(): it sees our slot, or we see its limits */
  for (int tries = 0; tries < MAX_TRIES; tries++) {
    uint64_t seen =
        limits_most(h->s, h->limiter->index); /* before `current`, and before the count */
    uint32_t most = limits_most_permits(seen, plan);
    bool same = load_relaxed(&e->current) == plan->current;
    /* A slot of earlier limits: said in the word after our swap, so whoever has looked for such slots before it cannot
     * lower the word any more, and whoever comes looks up to here. Pairs with limits_lower_most(). */
    if (unlikely(slot >= plan->permits && !said)) {
      if (!limits_raise_most(h->s, h->limiter->index, slot + 1)) break;
      said = true;
      continue;
    }
    if (likely(same && most <= plan->permits)) return true;
    if (!same) {
      if (!limits_load(h->s, h->limiter->index, plan) || !plan->permits) return true;
      continue; /* count by the limits as they are now */
    }
    census_t census;
    census_begin(&census);
    *held = count_held(h, most, &census);
    /* By limits that were in force all the while: what was given back after a change made no room before it. Pairs with
     * publish(). */
    atomic_thread_fence(memory_order_acquire);
    if (load_relaxed(&e->current) != plan->current) continue;
    if (*held > plan->permits) return false;
    if (count_held_from(h, plan->permits, most, &census) == 0 && none_beyond(h, plan, &census))
      limits_lower_most(h->s, h->limiter->index, plan, seen);
    return true;
  }
  *held = 1; /* ours, that is given back; others change the limits all the time */
  return false;
}

/* And within what was granted to this host? Of those who stand, each slot is below the allowance, or all were
 * counted: DESIGN.md, "Permits over many hosts". */
static __attribute__((noinline)) bool stands_granted(const holder_t *h, const plan_t *plan,
                                                     const granted_t *g, uint32_t slot,
                                                     uint32_t *held) {
  after_swap(); /* pairs with the swap and the scan of allowance.c: it sees our slot, or we its word */
  uint64_t word = granted_word(h->s, g);
  uint64_t most = g->alone;
  if (g->alone) {
    if (word != g->dropped) return false; /* it is granted again */
  } else {
    most =
        allowance_at(word, h->fixed ? h->now : segment_now(h->s)); /* the word before the clock */
    if (slot >= most) return false;
    if (likely(allowance_clean(word))) return true;
  }
  census_t census;
  census_begin(&census);
  *held = count_held(h, limits_most_permits(limits_most(h->s, h->limiter->index), plan), &census);
  return *held <= most;
}

/* Take one of the key's first n slots: FSHM_ALLOWED, FSHM_DENIED (*held says how many are), FSHM_FULL,
 * FSHM_CONTENDED; FSHM_ASK: it does not stand, by what is granted (NULL: this host's limit alone counts). */
static UNGUARDED int take_permit(holder_t *h, plan_t *plan, uint32_t n, const granted_t *granted,
                                 fshm_permit *out, uint32_t *held) {
  uint32_t start = load_relaxed(&h->limiter->frontier) % n;
  uint32_t likely_free = atomic_exchange_explicit(&h->limiter->released, 0, memory_order_relaxed);
  census_t census;
  bool full = false;
  patience_t left = patience(MAX_TRIES + 2 * (uint64_t)n); /* one a slot and pass: honest takers */
  for (int pass = 0; pass < 2; pass++) { /* the second asks who is dead */
    if (pass) census_begin(&census);
    for (uint32_t i = likely_free && !pass ? 0 : 1; i <= n; i++) {
      uint32_t slot = i == 0 ? (likely_free - 1) % n : (start + i - 1) % n;
      int status = take_slot_of_key(h, slot, pass ? &census : NULL, &left, out);
      if (unlikely(status == SLOT_CONTENDED)) return FSHM_CONTENDED;
      full |= status == SLOT_FULL;
      if (status != SLOT_TAKEN) continue;
      if (i) store_relaxed(&h->limiter->frontier, slot + 1);
      ledger_remember(h->s, out->cell, ledger_meta(h->limiter->index | PERMIT_BIT, out->who),
                      h->key, h->key_length);
      if (pass)
        bell_ring(h->s, out->bell); /* a dead process may have held more: the next may look */
      bool fits = stands(h, plan, slot, held);
      if (likely(fits && (!granted || stands_granted(h, plan, granted, slot, held))))
        return FSHM_ALLOWED;
      (void)give_back(h, out); /* without a ring: nobody else may have it either */
      out->held = 0;
      if (fits) return FSHM_ASK;
      *held -= 1;
      return FSHM_DENIED;
    }
  }
  uint32_t most = slots_of(h->limiter, plan);
  *held = full || most > n ? count_held(h, most, &census) : n;
  return full ? FSHM_FULL : FSHM_DENIED;
}

#define GRANTED_TRIES 3 /* of a taker whose slot does not stand since the word has changed */

int lease_take_granted(fshm_limiter *l, const void *key, uint64_t length, const granted_t *g,
                       uint64_t now, fshm_permit *out, uint64_t *version, uint32_t *held) {
  holder_t h;
  plan_t plan;
  bool member = holder_make(&h, l, key, length, now);
  if (!limits_load(h.s, l->index, &plan)) return damage_limits(h.s, l->index);
  *version = CURRENT_VERSION(plan.current);
  if (!plan.permits) return FSHM_E_ARGUMENT;
  if (!member) return process_refusal(h.s);
  for (int tries = 0; tries < GRANTED_TRIES; tries++) {
    uint64_t may = g->alone ? g->alone : allowance_at(granted_word(h.s, g), h.now);
    uint32_t n = (uint32_t)min_u64(may, plan.permits);
    if (!n) return FSHM_ASK;
    int status = take_permit(&h, &plan, n, g, out, held);
    if (status == FSHM_DENIED && n < plan.permits && !g->alone) return FSHM_ASK;
    if (status != FSHM_ASK) return status;
    if (!h.fixed) h.now = segment_now(h.s);
  }
  return FSHM_ASK;
}

uint32_t lease_count(fshm_limiter *l, const void *key, uint64_t length, uint64_t from) {
  holder_t h;
  plan_t plan;
  census_t census;
  census_begin(&census);
  (void)holder_make(&h, l, key, length, 0);
  if (!limits_load_of(l, &plan)) {
    (void)damage_limits(h.s, l->index);
    return 0;
  }
  if (!plan.permits) return 0;
  uint32_t most = slots_of(l, &plan);
  return count_held_from(&h, (uint32_t)min_u64(from, most), most, &census);
}

/* The cells that a key could use are all taken: free those whose permits are dead processes'. Nobody
 * asked for those keys since, so nobody else has noticed. Where somebody else has noticed at the same time, there
 * may be nothing left to free, but room all the same. */
static bool free_dead(fshm_segment *s, uint64_t hash, uint64_t who, uint64_t now,
                      census_t *census) {
  bool any = false;
  for (uint64_t i = 0; i < cells_candidates(s); i++) {
    cell_t *cell = &s->cells[cells_candidate(s, hash, i)];
    if (!IS_PERMIT(load_relaxed(&cell->when))) continue;
    pair_t seen = pair_load(cell), idle = {seen.who, 0};
    if (!IS_PERMIT(seen.when) || owner_alive(s, seen.when, census)) continue;
    any |= pair_cas(cell, &seen, idle);
  }
  return any || cells_room(s, hash, who, now);
}

bool lease_free_dead(fshm_segment *s, uint64_t hash, uint64_t who, uint64_t now) {
  census_t census;
  census_begin(&census);
  return free_dead(s, hash, who, now, &census);
}

UNGUARDED int fshm_permit_release(fshm_limiter *l, fshm_permit *p) {
  holder_t h = {.s = l->segment, .limiter = l};
  if (!p->held) return 0;
  p->held = 0;
  /* A forked child has an identity of its own and cannot free what is its parent's. */
  if (!own_identity(h.s, &h.identity) || (p->when & IDENTITY_MASK) != h.identity) return 0;
  if (!give_back(&h, p)) return 0;
  bell_ring(h.s, p->bell);
  store_relaxed(&l->released, SLOT_OF(p->when) + 1);
  return 1;
}

UNGUARDED int fshm_permit_idle(fshm_limiter *l, fshm_permit *p, int idle) {
  fshm_segment *s = l->segment;
  uint64_t identity, to = idle ? p->when | IDLE : p->when & ~IDLE;
  if (!p->held || p->cell >= s->cell_count) return 0;
  if (!own_identity(s, &identity) || (p->when & IDENTITY_MASK) != identity) return 0;
  pair_t seen = {p->who, p->when}, next = {p->who, to};
  if (!pair_cas(&s->cells[p->cell], &seen, next)) return 0;
  p->when = to;
  return 1;
}

int fshm_permit_held(const fshm_limiter *l, const fshm_permit *p) {
  const fshm_segment *s = l->segment;
  if (!p->held || p->cell >= s->cell_count) return 0;
  pair_t now = pair_load(&s->cells[p->cell]);
  return now.who == p->who && now.when == p->when;
}

uint32_t fshm_in_flight(fshm_limiter *l, const void *key, uint64_t length) {
  return lease_count(l, key, length, 0);
}

/* Permit and meters together: look at the meters, take the permit, charge the meters; give the permit
 * back if they have lost their room meanwhile. Killed after the permit, it is a dead process's and comes
 * back by itself; killed after the charge, rates stay charged. */
UNGUARDED void fshm_admit(fshm_limiter *l, const void *key, uint64_t key_length,
                          const uint64_t *costs, uint64_t now, fshm_permit *permit,
                          fshm_decision *out, uint32_t *in_flight) {
  holder_t h;
  plan_t plan;
  permit->cell = permit->who = permit->when = 0;
  permit->bell = permit->held = 0;
  for (uint32_t i = 0; i < FSHM_MAX_LIMITS; i++) permit->put[i].den = 0; /* nothing was charged */
  memset(out, 0, sizeof *out);
  *in_flight = 0;
  bool member = holder_make(&h, l, key, key_length, now);
  if (!limits_load_of(l, &plan)) {
    out->status = damage_limits(h.s, l->index);
    return;
  }
  out->version = CURRENT_VERSION(plan.current);
  out->status = FSHM_ALLOWED;
  out->remaining = INT64_MAX;
  if (plan.count) {
    if (limiter_take(l, &plan, h.hash, FSHM_PROBE, key, key_length, costs, now, out, NULL) !=
        FSHM_ALLOWED)
      return;
  }
  if (plan.permits) {
    int status = member ? take_permit(&h, &plan, plan.permits, NULL, permit, in_flight)
                        : process_refusal(h.s);
    if (status != FSHM_ALLOWED) {
      out->status = status;
      out->limit_index = (uint16_t)plan.count;
      out->remaining = 0;
      out->retry_after_ns = 0; /* nobody knows when a holder lets go */
      return;
    }
  }
  if (plan.count) {
    (void)limiter_take(l, &plan, h.hash, FSHM_ACQUIRE, key, key_length, costs, now, out,
                       permit->put);
    if (out->status != FSHM_ALLOWED && permit->held) (void)fshm_permit_release(l, permit);
  }
}

/* looking in ------------------------------------------------------------------------------------ */

static int permit_at(fshm_segment *s, uint64_t cell, census_t *census, fshm_permit_info *out) {
  memset(out, 0, sizeof *out);
  pair_t pair = {load_relaxed(&s->cells[cell].who), load_relaxed(&s->cells[cell].when)};
  uint32_t meta = load_relaxed(&s->ledger[cell].meta);
  uint32_t limiter = (meta >> 20) & (PERMIT_BIT - 1);
  if (!IS_PERMIT(pair.when) || !pair.who) return 0;
  bool known = meta == ledger_meta(limiter | PERMIT_BIT, pair.who) && limiter < s->limiter_count;
  out->limiter = known ? limiter : UINT32_MAX;
  out->pid = load_relaxed(&s->processes[OWNER_OF(pair.when)].pid);
  out->alive = owner_alive(s, pair.when, census);
  if (!out->alive) out->pid = 0; /* the slot may be another's by now */
  out->idle = (pair.when & IDLE) != 0;
  out->slot = SLOT_OF(pair.when);
  out->key_hash = PERMIT_KEY(pair.who, SLOT_OF(pair.when));
  out->age_seconds = (segment_now(s) / 1000000000 - TAKEN_OF(pair.when)) & 0x1ffff;
  out->cell = cell;
  return 1;
}

int fshm_permit_at(fshm_segment *s, uint64_t cell, fshm_permit_info *out) {
  census_t census;
  census_begin(&census);
  memset(out, 0, sizeof *out);
  return cell < s->cell_count && permit_at(s, cell, &census, out);
}

uint64_t fshm_permits(fshm_segment *s, fshm_permit_info *out, uint64_t room) {
  census_t census; /* one for all: the kernel is asked once about each process */
  uint64_t found = 0;
  census_begin(&census);
  for (uint64_t cell = 0; cell < s->cell_count; cell++) {
    fshm_permit_info one;
    if (!IS_PERMIT(load_relaxed(&s->cells[cell].when)) || !permit_at(s, cell, &census, &one))
      continue;
    if (found < room) out[found] = one;
    found++;
  }
  return found;
}

uint64_t fshm_reap(fshm_segment *s, uint32_t pid) {
  census_t census;
  uint64_t freed = 0;
  census_begin(&census);
  if (s->read_only) return 0;
  for (uint64_t cell = 0; cell < s->cell_count; cell++) {
    if (!IS_PERMIT(load_relaxed(&s->cells[cell].when))) continue;
    pair_t seen = pair_load(&s->cells[cell]);
    if (!IS_PERMIT(seen.when)) continue;
    bool alive = owner_alive(s, seen.when, &census);
    bool theirs = alive && load_relaxed(&s->processes[OWNER_OF(seen.when)].pid) == pid;
    if (pid ? !theirs : alive) continue;
    pair_t idle = {seen.who, 0};
    if (pair_cas(&s->cells[cell], &seen, idle)) freed++;
  }
  if (freed) bell_ring_all(s);
  return freed;
}

uint64_t fshm_unique(fshm_segment *s) { return add_relaxed(&s->header->ticket, 1); }
