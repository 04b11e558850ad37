/* money.c - budgets: money that is spent, and reserved, in windows of the calendar. Argued in DESIGN.md, "Budgets".
 *
 * What was spent of a key is a state of the hash table, which only grows by what calls cost. What is reserved is in
 * the rows of the processes (reservations_t), so that it goes with a process that dies.
 */
#include <sched.h>

#include "../permits/semaphore.h"
#include "../permits/wait_queue.h"
#include "../stats/counters.h"
#include "../stats/key_stats.h"
#include "limiter.h"
#include "limits.h"

#define RESERVED_MOST (UINT64_C(1) << 61) /* no sum overflows, whatever is in the rows */
#ifndef ROUNDS_OF_MONEY
#define ROUNDS_OF_MONEY 32 /* in each lost one, another process has reserved or spent */
#endif
enum { MONEY_ADDED = 1, MONEY_GRANTED = 3 }; /* places of a budget's limits */

/* One call. */
typedef struct {
  fshm_segment *s;
  const fshm_limiter *l;
  bool fixed; /* the caller gave the time */
  uint64_t hash, now;
  uint64_t window; /* the only one that the call is about: its end; 0: any */
  snapshot_t p;
} money_t;

/* The end of the window that it is now. */
uint64_t money_window(fshm_segment *s, const rule_t *rule, uint64_t now) {
  rule_t r = *rule;
  if (r.per == MONEY_FOREVER) return (UINT64_C(1) << 28) - 1;
  calendar_ready(s, &r);
  return calendar_ends(&r, now ? now : segment_now(s));
}

/* Whether the rule's window is not over; and not of a clock that was ahead, and is right by now: a window that ends later
 * than a usual one can. (A month of 31 days, a leap year and a day of 25 hours are no longer than that.) Not where the
 * caller gives the time: it may be one of before, and of a window that is over. */
static inline bool money_is_now(const money_t *m, const rule_t *rule) {
  const uint64_t minute = calendar_minute(rule, m->now), usual = rule->per / MINUTE;
  if (unlikely(rule->unit <= minute)) return false;
  return likely(rule->unit - minute <= usual + usual / 24) || m->fixed ||
         rule->unit == money_window(m->s, rule, m->now);
}

/* Load the limits, of the window that it is now. The first call of a window gives the rules its end: one publication,
 * as of any limits that change. */
static int money_load(money_t *m) {
  for (int tries = 0; tries < 64; tries++) {
    if (!limits_load(m->s, m->l->index, &m->p)) return damage_limits(m->s, m->l->index);
    if (!m->p.money) return FSHM_E_ARGUMENT;
    if (!m->fixed) m->now = segment_now(m->s);
    if (likely(money_is_now(m, &m->p.rules[0])))
      return likely(!m->window) || m->p.rules[0].unit == m->window ? FSHM_OK : FSHM_DENIED;
    rule_t next[FSHM_MAX_LIMITS];
    for (uint32_t i = 0; i < m->p.money; i++) {
      next[i] = rule_bare(&m->p.rules[i]);
      next[i].unit = money_window(m->s, &m->p.rules[i], m->now);
    }
    int status = publish(m->s, m->l->index, next, m->p.money, m->fixed ? m->now : 0);
    if (status != FSHM_OK) return status;
  }
  return FSHM_CONTENDED;
}

/* Of the key in reservations; a reset of all keys changes it. */
static inline uint64_t money_id(const money_t *m) {
  const uint64_t id = m->hash ^ m->p.salt;
  return id + !id;
}

static int money_begin_in(money_t *m, const fshm_limiter *l, const void *key, uint64_t length,
                          uint64_t now, uint64_t window) {
  m->window = window;
  m->s = l->segment;
  m->l = l;
  m->fixed = now != 0;
  m->now = min_u64(now, TIME_MAX - 1);
  m->hash = fshm_siphash(l->key[0], l->key[1], key, length);
  return money_load(m);
}
static int money_begin(money_t *m, const fshm_limiter *l, const void *key, uint64_t length,
                       uint64_t now) {
  return money_begin_in(m, l, key, length, now, 0);
}

/* A slot of the key, and the amount in it. `who`: to write with the next amount: a window that has begun goes on under its
 * own rule. False: the limits or the slot changed; load the limits, and look again. */
typedef struct {
  found_t f;
  uint64_t amount, who, window; /* window: the end of the one that the amount is of */
} amount_t;

static bool money_look(money_t *m, uint32_t i, amount_t *out) {
  const rule_t *r = &m->p.rules[i];
  rule_t old;
  out->who = snapshot_who(&m->p, i, m->hash);
  out->amount = 0;
  out->window = r->unit;
  table_find(m->s, m->hash, out->who, &out->f);
  if (entry_current(m->s, m->l->index) != m->p.current) return false; /* as outdated() */
  if (!out->f.pair.who) return true;
  const uint64_t state = out->f.pair.when;
  if (likely(out->f.pair.who == out->who)) {
    out->amount = IS_MONEY(state) ? MONEY_OF(state) : 0;
    return true;
  }
  const bool sane = limits_rule(m->s, m->l->index, WHO_LABEL(out->f.pair.who), &old);
  const pair_t again = pair_load(&m->s->slots[out->f.slot]);
  if (again.who != out->f.pair.who || again.when != state ||
      entry_current(m->s, m->l->index) != m->p.current)
    return false;
  if (!sane || old.kind != FSHM_MONEY || !IS_MONEY(state) || old.unit <= calendar_minute(r, m->now))
    return true; /* its window is over */
  calendar_ready(m->s, &old);
  const bool began =
      money_is_now(m, &old); /* else of a clock that was ahead: it belongs to this window */
  if (i == MONEY_GRANTED && old.unit != r->unit) return true; /* of another window: ask anew */
  out->amount = MONEY_OF(state);
  if (old.unit != r->unit && began) {
    const uint64_t label = WHO_OF(0, 0, RULES - 1, 0) & ~UINT64_C(1);
    out->who = (out->who & ~label) | (out->f.pair.who & label);
    out->window = old.unit;
  }
  return true;
}

static uint64_t money_add_to(uint64_t amount, int64_t by) {
  if (by < 0) return minus(amount, (uint64_t)-by);
  return min_u64(amount + (uint64_t)by, MONEY_OF(UINT64_MAX));
}

typedef struct {
  money_t *m;
  uint32_t i;
  uint64_t amount;
  bool stale;
} first_money_t;

static uint64_t first_money(void *context) {
  first_money_t *f = context;
  money_t *m = f->m;
  /* As first_state(): from now on, no change of the limits passes this slot by. */
  calendar_ready(m->s, &m->p.rules[f->i]);
  if (!m->fixed) m->now = segment_now(m->s);
  f->stale = entry_current(m->s, m->l->index) != m->p.current ||
             m->p.rules[f->i].unit <= calendar_minute(&m->p.rules[f->i], m->now);
  return f->stale ? NO_STATE : MONEY_STATE(f->amount);
}

/* Add to an amount of the key. Others answer FSHM_DENIED where they do not: ONCE: only if it is 0. RAISE: to this, if it is
 * less, of this window. CORRECT: only an amount of this window, and not after a reset; what another window has spent must not
 * be lowered. The window may end while we try: it is compared with what the swap replaces. out: the slot, and its window;
 * or NULL. */
enum { ADD, ONCE, RAISE, CORRECT };
static int money_add(money_t *m, uint32_t i, int64_t by, unsigned how, uint64_t window, uint64_t id,
                     amount_t *out) {
  for (int tries = 0; tries < MAX_TRIES; tries++) {
    amount_t a;
    if (!money_look(m, i, &a)) {
      int fresh = money_load(m);
      if (fresh != FSHM_OK) return fresh;
      if (i >= m->p.money) return FSHM_E_ARGUMENT;
      continue;
    }
    if (how == ONCE && a.amount) return FSHM_DENIED;
    if (how == RAISE && m->p.rules[0].unit != window) return FSHM_DENIED;
    if (how == CORRECT && (a.window != window || money_id(m) != id)) return FSHM_DENIED;
    const uint64_t next =
        how == RAISE ? max_u64(a.amount, (uint64_t)by) : money_add_to(a.amount, by);
    if (likely(a.f.pair.who)) {
      pair_t seen = a.f.pair, to = {a.who, MONEY_STATE(next)};
      if (likely(pair_cas(&m->s->slots[a.f.slot], &seen, to))) {
        if (out) *out = a;
        return FSHM_OK;
      }
      continue;
    }
    first_money_t first = {m, i, next, false};
    int status = table_claim(m->s, m->hash, a.who, m->now, first_money, &first, &a.f.slot);
    if (status == CLAIMED) {
      a.f.pair.who = a.who;
      if (out) *out = a;
      return FSHM_OK;
    }
    if (status == CLAIM_FULL && !semaphore_free_dead(m->s, m->hash, a.who, m->now))
      return FSHM_FULL;
    tries += CLAIM_TRIES - 1;
    if (first.stale) {
      status = money_load(m);
      if (status != FSHM_OK) return status;
    }
  }
  return FSHM_CONTENDED;
}

static int money_read(money_t *m, uint32_t i, amount_t *out) {
  for (int tries = 0; tries < MAX_TRIES; tries++) {
    out->amount = out->f.pair.who = 0;
    if (i >= m->p.money || money_look(m, i, out)) return FSHM_OK;
    int fresh = money_load(m);
    if (fresh != FSHM_OK) return fresh;
  }
  return FSHM_CONTENDED;
}

/* reservations ---------------------------------------------------------------------------------- */

void reservations_join(fshm_segment *s, uint32_t process, uint64_t incarnation) {
  reservations_t *r = &s->reservations[process];
  /* As requests_join(): until the last store, what is here counts for nobody. */
  store_relaxed(&r->incarnation, 0);
  for (uint32_t i = 0; i < RESERVED; i++) {
    store_relaxed(&r->of[i].who, 0);
    store_relaxed(&r->of[i].when, 0);
  }
  /* release: pairs with the acquire in reserved_by_all() */
  atomic_store_explicit(&r->incarnation, incarnation, memory_order_release);
}

static inline reserved_t *reserved_set(fshm_segment *s, uint32_t process, uint64_t id) {
  return &s->reservations[process].of[(id >> 32) % (RESERVED / RESERVED_WAYS) * RESERVED_WAYS];
}

/* What living processes have reserved of the key. */
static uint64_t reserved_by_all(fshm_segment *s, uint64_t id) {
  uint64_t sum = 0;
  for (uint64_t blocks = joined_blocks(s); blocks; blocks &= blocks - 1) {
    const uint32_t word = (uint32_t)__builtin_ctzll(blocks);
    uint64_t joined = load_relaxed(&s->header->joined[word]);
    for (; joined; joined &= joined - 1) {
      const uint32_t process = word * 64 + (uint32_t)__builtin_ctzll(joined);
      const reserved_t *set = reserved_set(s, process, id);
      uint64_t its = 0;
      for (uint32_t i = 0; i < RESERVED_WAYS; i++) {
        if (likely(load_relaxed(&set[i].who) != id)) continue;
        const pair_t pair = pair_load(&set[i]);
        if (pair.who == id) its += min_u64(pair.when, RESERVED_MOST);
      }
      if (likely(!its)) continue;
      const process_t *p = &s->processes[process];
      const uint64_t incarnation = load_relaxed(&p->incarnation);
      if (load_relaxed(&p->dead) != incarnation &&
          atomic_load_explicit(&s->reservations[process].incarnation, memory_order_acquire) ==
              incarnation)
        sum = min_u64(sum + its, RESERVED_MOST);
    }
  }
  return sum;
}

/* Add to what this process has reserved. Returns the entry; -1: none is free. */
static int reserve_here(fshm_segment *s, uint32_t process, uint64_t id, uint64_t amount) {
  reserved_t *set = reserved_set(s, process, id);
  for (int tries = 0; tries < 64; tries++) {
    int chosen = -1;
    pair_t seen = {0, 0};
    for (int i = 0; i < RESERVED_WAYS; i++) {
      const pair_t pair = pair_load(&set[i]);
      if (pair.who != id && (pair.when || chosen >= 0)) continue;
      chosen = i;
      seen = pair;
      if (pair.who == id) break;
    }
    if (chosen < 0) return -1;
    const pair_t next = {id, min_u64((seen.who == id ? seen.when : 0) + amount, RESERVED_MOST)};
    if (pair_cas(&set[chosen], &seen, next)) return chosen;
  }
  return -1;
}
/* From the entry where it is, and from no other one of the same key (two threads may have taken two): what is reserved
 * stays where it is, so a look that comes by while others come and go does not miss it. */
static void release_here(fshm_segment *s, uint32_t process, uint64_t id, uint32_t entry,
                         uint64_t amount) {
  reserved_t *of = &reserved_set(s, process, id)[entry % RESERVED_WAYS];
  for (int tries = 0; tries < MAX_TRIES; tries++) {
    pair_t seen = pair_load(of);
    if (seen.who != id) return; /* no process of ours has done that */
    if (pair_cas(of, &seen, (pair_t){id, minus(seen.when, amount)})) return;
  }
}

/* calls ------------------------------------------------------------------------------------------- */

/* What is spent and reserved. Reservations first: a settlement adds to what is spent before it ends the reservation, so
 * what is not seen here any more is seen there. */
static int money_used(money_t *m, uint64_t id, amount_t *spent, fshm_budget *out) {
  out->reserved = reserved_by_all(m->s, id);
  atomic_thread_fence(memory_order_acquire); /* pairs with the swap that ended a reservation */
  int status = money_read(m, 0, spent);
  out->spent = spent->amount;
  return status;
}
/* added: with what was added, which most keys have no slot for: to find none takes longer than all the rest. */
static int money_limit(money_t *m, bool added, amount_t *granted, fshm_budget *out) {
  amount_t more = {.amount = 0};
  int status = FSHM_OK;
  if (added) status = money_read(m, MONEY_ADDED, &more);
  if (status == FSHM_OK && granted) status = money_read(m, MONEY_GRANTED, granted);
  out->limit = rule_money(&m->p.rules[0]) + more.amount;
  out->granted = granted ? granted->amount : 0;
  out->window = m->p.rules[0].unit;
  out->left_ns = (int64_t)calendar_left(&m->p.rules[0], m->p.rules[0].unit, m->now);
  return status;
}

static uint64_t money_most(const fshm_budget *b, bool leased, bool shared) {
  const uint64_t limit = shared ? UINT64_MAX : b->limit; /* the server knows it */
  return leased ? min_u64(limit, b->granted) : limit;
}

/* Whether that much is granted yet: fshm_budget_withdraw() may have taken some back. */
static bool money_stands(money_t *m, const amount_t *granted) {
  if (!granted->f.pair.who) return true;
  const pair_t seen = pair_load(&m->s->slots[granted->f.slot]);
  return seen.who == granted->f.pair.who && seen.when >= granted->f.pair.when;
}

static void money_tell(const money_t *m, const amount_t *a, const void *key, uint64_t length,
                       int status) {
  uint32_t process = process_index(m->s);
  counters_add(m->s, process, m->l->counters, status);
  if (likely(a->f.pair.who && !(m->s->names_mode & FSHM_NAMES_OFF)))
    key_stats_count(m->s, process, a->f.slot, key_stats_meta(m->l->index, a->f.pair.who), key,
                    length, status == FSHM_ALLOWED);
}

int fshm_budget_reserve(fshm_limiter *l, const void *key, uint64_t length, uint64_t amount,
                        uint32_t flags, uint64_t now, fshm_budget *out) {
  money_t m;
  amount_t spent;
  uint32_t process;
  memset(out, 0, sizeof *out);
  out->status = money_begin(&m, l, key, length, now);
  if (unlikely(out->status != FSHM_OK)) return out->status;
  bool row = process_identity_inline(m.s, &process, &out->incarnation);
  /* Called dead while its locks were lost, its row counts for nobody. */
  const bool counts = row && load_relaxed(&m.s->processes[process].dead) != out->incarnation;
  out->direct = !counts || (flags & FSHM_BUDGET_CHARGE);
  out->owner = row ? process + 1 : 0;
  out->kept = flags & FSHM_BUDGET_GRANTED;
  heartbeat(m.s, m.now);
  amount = min_u64(amount, MONEY_MOST * 2);
  const bool shared = flags & FSHM_BUDGET_SHARED, leased = shared || flags & FSHM_BUDGET_GRANTED;
  amount_t granted = {.amount = 0};
  bool added = false; /* look at what was added only where the budget alone has no room */
  int denials = 0;
  for (int round = 0; round < ROUNDS_OF_MONEY; round++) {
    out->status = money_limit(&m, added, leased ? &granted : NULL, out);
    /* A reservation stands under the limits that it was measured by, or not at all. */
    const uint64_t current = m.p.current, id = out->id = money_id(&m);
    if (out->status == FSHM_OK) out->status = money_used(&m, id, &spent, out);
    if (unlikely(out->status != FSHM_OK)) return out->status;
    if (unlikely(!added && !shared && out->spent + out->reserved + amount > out->limit)) {
      added = true;
      round--; /* none is lost: after the last one, this would be its answer */
      continue;
    }
    const uint64_t most = money_most(out, leased, shared);
    if (unlikely(out->spent + out->reserved + amount > most)) {
      /* Nothing was granted yet: who grants may know more of the key, also what was added. */
      const bool none = leased && !out->granted;
      const bool beyond = out->spent + out->reserved + amount > money_most(out, false, shared);
      out->status = beyond && !none ? FSHM_DENIED : FSHM_ASK;
      /* Of what is reserved, another call may be about to withdraw some. */
      if (out->status == FSHM_ASK || out->spent + amount > most || ++denials == 3) break;
      (void)sched_yield();
      continue;
    }
    out->status = FSHM_OK;
    if (unlikely(!spent.f.pair.who)) /* so that what it will cost has a slot */
      out->status = money_add(&m, 0, 0, ADD, 0, 0, &spent);
    if (unlikely(out->status != FSHM_OK)) return out->status;
    amount_t charged = {.window = out->window};
    if (!out->direct) {
      const int entry = reserve_here(m.s, process, id, amount);
      out->direct = entry < 0;
      out->entry = (uint32_t)entry;
    }
    if (unlikely(out->direct)) {
      out->status = money_add(&m, 0, (int64_t)amount, ADD, 0, 0, &charged);
      if (out->status != FSHM_OK) return out->status;
    }
    /* Published, then looked: of all that stand, the last to publish has counted all. Pairs with the fence in
     * fshm_budget_withdraw() too: either it counts this, or what is granted is less here. */
    atomic_thread_fence(memory_order_seq_cst);
    if (unlikely(added)) /* it may have been taken back meanwhile */
      out->status = money_limit(&m, true, leased ? &granted : NULL, out);
    if (likely(out->status == FSHM_OK)) out->status = money_used(&m, id, &spent, out);
    if (likely(out->status == FSHM_OK && m.p.current == current &&
               out->spent + out->reserved <= money_most(out, leased, shared) &&
               (!leased || money_stands(&m, &granted)))) {
      out->status = FSHM_ALLOWED;
      out->window = charged.window;
      break;
    }
    const int failed = out->status;
    if (out->direct)
      (void)money_add(&m, 0, -(int64_t)amount, CORRECT, charged.window, id, NULL);
    else
      release_here(m.s, process, id, out->entry, amount);
    if (failed != FSHM_OK) return out->status = failed;
    out->status = FSHM_DENIED;
    /* Two that meet at the last of it: one goes first. */
    if (row && round > 1)
      for (uint32_t turn = 0; turn < process % 8; turn++) (void)sched_yield();
  }
  if (out->status != FSHM_ASK) money_tell(&m, &spent, key, length, out->status);
  return out->status;
}

void fshm_budget_denied(fshm_limiter *l, const void *key, uint64_t length) {
  money_t m;
  amount_t spent;
  if (money_begin(&m, l, key, length, 0) != FSHM_OK || money_read(&m, 0, &spent) != FSHM_OK) return;
  money_tell(&m, &spent, key, length, FSHM_DENIED);
}

/* FSHM_ASK: more is used than was granted, or of what was granted more is left than a hundredth of the budget, and than
 * what this call had reserved. */
static int money_kept(money_t *m, uint64_t amount) {
  fshm_budget b;
  amount_t spent, granted = {.amount = 0};
  if (money_limit(m, false, &granted, &b) != FSHM_OK ||
      money_used(m, money_id(m), &spent, &b) != FSHM_OK)
    return FSHM_OK;
  const uint64_t used = b.spent + b.reserved, left = minus(b.granted, used);
  return used > b.granted || left > max_u64(b.limit / 100, amount) ? FSHM_ASK : FSHM_OK;
}

int fshm_budget_settle(fshm_limiter *l, const void *key, uint64_t length,
                       const fshm_budget *reserved, uint64_t amount, uint64_t actual,
                       uint64_t now) {
  money_t m;
  uint32_t process;
  uint64_t incarnation;
  amount = min_u64(amount, MONEY_MOST * 2);
  actual = min_u64(actual, MONEY_MOST * 2);
  const bool row = process_identity(l->segment, &process, &incarnation);
  const bool mine = row && process + 1 == reserved->owner && incarnation == reserved->incarnation;
  if (reserved->owner ? !mine : row && !reserved->direct) return 0;
  int status = money_begin(&m, l, key, length, now);
  /* Spent first: killed in between, it is spent, and what was reserved is given back. */
  if (status == FSHM_OK && !reserved->direct && actual)
    status = money_add(&m, 0, (int64_t)actual, ADD, 0, 0, NULL);
  if (status == FSHM_OK && reserved->direct)
    status = money_add(&m, 0, (int64_t)actual - (int64_t)amount, CORRECT, reserved->window,
                       reserved->id, NULL);
  /* It was charged in a window that is over, or is forgotten: only what it cost beyond that, or all of it. */
  if (status == FSHM_DENIED) {
    const uint64_t counted = money_id(&m) == reserved->id ? amount : 0;
    status =
        actual > counted ? money_add(&m, 0, (int64_t)(actual - counted), ADD, 0, 0, NULL) : FSHM_OK;
  }
  if (status < 0) return status;
  if (!reserved->direct) release_here(l->segment, process, reserved->id, reserved->entry, amount);
  if (actual < amount) wait_wake_more(l->segment, wait_key(m.hash, l->index));
  return reserved->kept && status == FSHM_OK ? money_kept(&m, amount) : FSHM_OK;
}

int fshm_budget_look(fshm_limiter *l, const void *key, uint64_t length, uint64_t now,
                     fshm_budget *out) {
  money_t m;
  amount_t spent;
  memset(out, 0, sizeof *out);
  out->status = money_begin(&m, l, key, length, now);
  if (out->status == FSHM_OK) heartbeat(m.s, m.now);
  amount_t granted;
  if (out->status == FSHM_OK) out->status = money_limit(&m, true, &granted, out);
  if (out->status == FSHM_OK) out->status = money_used(&m, money_id(&m), &spent, out);
  return out->status;
}

int fshm_budget_add(fshm_limiter *l, const void *key, uint64_t length, uint32_t which,
                    int64_t amount, uint64_t now) {
  money_t m;
  amount_t a;
  const int64_t most = (int64_t)MONEY_MOST;
  int status = money_begin(&m, l, key, length, now);
  if (status != FSHM_OK) return status;
  if (which >= m.p.money) return FSHM_E_ARGUMENT;
  amount = amount > most ? most : amount < -most ? -most : amount;
  status = money_add(&m, which, amount, ADD, 0, 0, &a);
  /* The name of a key is with what it has spent: fshm_budgets(). */
  if (status == FSHM_OK && which) (void)money_add(&m, 0, 0, ADD, 0, 0, &a);
  if (status == FSHM_OK && !(m.s->names_mode & FSHM_NAMES_OFF))
    key_stats_remember(m.s, a.f.slot, key_stats_meta(l->index, a.f.pair.who), key, length);
  wait_wake_more(m.s, wait_key(m.hash, l->index));
  return status;
}

int fshm_budget_once(fshm_limiter *l, const void *key, uint64_t length, uint64_t now) {
  money_t m;
  int status = money_begin(&m, l, key, length, now);
  if (status != FSHM_OK) return status;
  return m.p.money < 3 ? FSHM_E_ARGUMENT : money_add(&m, 2, 1, ONCE, 0, 0, NULL);
}

int fshm_budget_raise(fshm_limiter *l, const void *key, uint64_t length, uint32_t which,
                      uint64_t to, uint64_t window, uint64_t now) {
  money_t m;
  int status = money_begin_in(&m, l, key, length, now, window);
  if (status != FSHM_OK) return status;
  if (which >= m.p.money) return FSHM_E_ARGUMENT;
  return money_add(&m, which, (int64_t)min_u64(to, MONEY_OF(UINT64_MAX)), RAISE, window, 0, NULL);
}

int fshm_budget_grant(fshm_limiter *l, const void *key, uint64_t length, uint64_t amount,
                      uint64_t window, uint64_t now) {
  money_t m;
  int status = money_begin_in(&m, l, key, length, now, window);
  if (status != FSHM_OK) return status;
  if (m.p.money <= MONEY_GRANTED) return FSHM_E_ARGUMENT;
  return money_add(&m, MONEY_GRANTED, (int64_t)min_u64(amount, MONEY_MOST * 2), ADD, 0, 0, NULL);
}

int fshm_budget_withdraw(fshm_limiter *l, const void *key, uint64_t length, uint64_t window,
                         uint64_t now, fshm_budget *out) {
  money_t m;
  amount_t granted = {.amount = 0}, spent;
  memset(out, 0, sizeof *out);
  int status = money_begin_in(&m, l, key, length, now, window);
  for (int tries = 0; status == FSHM_OK && tries < MAX_TRIES; tries++) {
    status = money_limit(&m, false, &granted, out);
    if (status == FSHM_OK) status = money_used(&m, money_id(&m), &spent, out);
    out->granted = 0;
    const uint64_t used = out->spent + out->reserved;
    if (status != FSHM_OK || granted.amount <= used) break;
    pair_t seen = granted.f.pair;
    if (!pair_cas(&m.s->slots[granted.f.slot], &seen, (pair_t){granted.who, MONEY_STATE(used)}))
      continue;
    /* Lowered, then looked: a reservation that looked at what was granted before is counted here, or finds less after
     * its own fence. Killed before it is put back, or reported: what was taken stays granted, and nobody has it. */
    atomic_thread_fence(memory_order_seq_cst);
    status = money_used(&m, money_id(&m), &spent, out);
    const uint64_t since = min_u64(minus(out->spent + out->reserved, used), granted.amount - used);
    if (status == FSHM_OK && since)
      status = money_add(&m, MONEY_GRANTED, (int64_t)since, ADD, 0, 0, NULL);
    if (status == FSHM_OK) out->granted = granted.amount - used - since;
    break;
  }
  return out->status = status;
}
