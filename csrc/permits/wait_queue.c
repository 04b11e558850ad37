/* wait_queue.c - the queue of callers that wait for a key. Argued in DESIGN.md, "The wait queue".
 *
 * The queue only says which caller may try. A caller that is next takes its permit, or its tokens, by the same call as
 * any other. So no damage to the queue, and no kill, admits more than the limit.
 *
 * A place is an entry of a table that all keys share. Its group says where a key's places begin; `queues` says how many
 * entries from there on may be in use (reach, the lower half), and how often that changed (the upper half). The owner
 * of a place writes to it at least every FSHM_WAIT_BEAT_NS. A place that has not been written for LATE_NS does not
 * count: its process is dead or stopped. After ABANDONED_NS any process may take it.
 */
#include <errno.h>
#include <time.h>
#include <unistd.h>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

#include "../limits/limiter.h"
#include "../limits/limits.h"
#include "semaphore.h"
#include "wait_order.h"
#include "wait_queue.h"

#define LATE_NS UINT64_C(700000000)
#define ABANDONED_NS UINT64_C(10000000000)
/* No owner writes a time so far ahead: it is damage. A place that says so does not count; or is free. */
#define AHEAD_NS UINT64_C(1000000000)
#define FAR_AHEAD_NS UINT64_C(3600000000000)
#define SERVICE_NS UINT64_C(60000000000) /* a tenant without service for so long begins anew */
#define LAST_SERVED UINT64_MAX /* as a tenant: the service of the one that was served last */
#define REACH(word) ((uint32_t)(word))
#define CHANGED (UINT64_C(1) << 32)
/* What a wake-up adds to the word of a place. For one permit that was released: who takes it need not wake the next. Or
 * there may be room for any number: who takes one wakes the next. */
#define FOR_ONE 1U
#define FOR_MORE (1U << 16)
#define HERE_COUNT UINT64_C(0xffff) /* of a word `here` */
/* Of a word of `watchers`. */
#define WATCH_SLEEPS 1U
#define WATCH_ASKED 2U
#define WATCH_WAKE_UP 4U

static_assert(LATE_NS / 3 >= FSHM_WAIT_BEAT_NS, "two beats may be lost");

static waiter_t *place_at(const fshm_segment *s, uint32_t group, uint32_t nth) {
  return &s->waiters[(group * (WAITERS / WAIT_GROUPS) + nth) % WAITERS];
}

static uint32_t nth_of(const fshm_place *p) {
  return (p->entry - wait_group(p->key) * (WAITERS / WAIT_GROUPS)) % WAITERS;
}

static uint32_t reach_of(const fshm_segment *s, uint32_t group) {
  /* acquire: pairs with raise_reach(); the entries below it are seen */
  uint32_t reach = REACH(atomic_load_explicit(&s->header->queues[group], memory_order_acquire));
  return reach > WAITERS ? WAITERS : reach;
}

/* A full barrier between the publication of the place and its owner's look at the queue and the limits. Each call
 * changes the word, so that no scan that has missed our entry can lower it (lower_reach). */
static void raise_reach(fshm_segment *s, uint32_t group, uint32_t to) {
  _Atomic uint64_t *word = &s->header->queues[group];
  uint64_t seen = load_relaxed(word);
  for (int tries = 0; tries < MAX_TRIES; tries++) {
    uint32_t reach = REACH(seen) > to ? REACH(seen) : to;
    if (atomic_compare_exchange_strong(word, &seen, ((seen >> 32) + 1) << 32 | reach)) break;
  }
  after_swap(); /* pairs with wait_wake(): it sees the place, or its owner sees what was released */
}

/* None of the group's entries was in use, as of `seen`. */
static void lower_reach(fshm_segment *s, uint32_t group, uint64_t seen) {
  if (REACH(seen))
    (void)atomic_compare_exchange_strong(&s->header->queues[group], &seen,
                                         ((seen >> 32) + 1) << 32);
}

static void wake_first(fshm_segment *s, uint64_t key, uint32_t what);
void wait_wake_more(fshm_segment *s, uint64_t key) {
  if (wait_any(s, wait_group(key))) wake_first(s, key, FOR_MORE);
}

/* A caller took one of the permits that its place was woken for, and there are no others: so nobody need look for more. */
static bool took_one(const fshm_place *p) { return p->took && p->units && !p->more && !p->asked; }

/* service --------------------------------------------------------------------------------------- */

/* Of a tenant of a key: a window's state in the hash table, whose count is the service (never 0: 0 is "never seen"). */
static uint64_t service_hash(uint64_t key, uint64_t tenant) {
  return spread(key ^ tenant * UINT64_C(0x9e3779b97f4a7c15));
}
static uint64_t service_who(uint64_t key, uint64_t tenant) {
  return side_who(service_hash(key, tenant), (uint32_t)(key >> 1) & (MAX_LIMITERS - 1));
}
static uint64_t service_state(uint64_t service, uint64_t now) {
  static const rule_t rule = {.kind = FSHM_WINDOW, .n = SERVICE_MASK, .per = SERVICE_NS};
  window_t w = {plus_time(now, SERVICE_NS), service & SERVICE_MASK, 0};
  if (!w.count) w.count = 1;
  return window_state(&rule, w);
}
static uint64_t service_read(const fshm_segment *s, uint64_t key, uint64_t tenant, uint64_t now,
                             found_t *f) {
  table_find(s, service_hash(key, tenant), service_who(key, tenant), f);
  return f->pair.who ? window_read(f->pair.when, now).count : 0;
}
static uint64_t service_of(const fshm_segment *s, uint64_t key, uint64_t tenant, uint64_t now) {
  found_t f;
  uint64_t last = service_read(s, key, LAST_SERVED, now, &f);
  if (!last) return 0; /* none was served lately, or the table has no room: all are alike */
  uint64_t own = service_read(s, key, tenant, now, &f);
  return own ? service_lifted(own, last) : last;
}

static uint64_t first_service(void *context) { return *(uint64_t *)context; }

/* Write a service: at least `least`, plus `more`. False: the table has no room for it. */
static bool service_add(fshm_segment *s, uint64_t key, uint64_t tenant, uint64_t least,
                        uint64_t more, uint64_t now) {
  for (int tries = 0; tries < MAX_TRIES / CLAIM_TRIES; tries++) {
    found_t f;
    uint64_t own = service_read(s, key, tenant, now, &f);
    uint64_t next = service_state((own ? service_lifted(own, least) : least) + more, now);
    if (!f.pair.who) {
      int status = table_claim(s, service_hash(key, tenant), service_who(key, tenant), now,
                               first_service, &next, &f.slot);
      if (status != CLAIM_LOST) return status == CLAIMED;
      continue;
    }
    pair_t seen = f.pair, to = {seen.who, next};
    /* Pairs with the swaps of other callers of the tenant: each adds its own. */
    if (pair_cas(&s->slots[f.slot], &seen, to)) return true;
  }
  return false;
}

/* places ---------------------------------------------------------------------------------------- */

/* What an entry says. False: it is free, or is just being taken. */
static bool read_entry(const waiter_t *e, uint64_t *owner, uint64_t *key, uint64_t *seen,
                       waiting_t *w) {
  /* acquire: pairs with take_entry(), which writes `published` last */
  *owner = atomic_load_explicit(&e->published, memory_order_acquire);
  if (!*owner || load_relaxed(&e->owner) != *owner) return false;
  *key = load_relaxed(&e->key);
  *seen = load_relaxed(&e->seen);
  *w = (waiting_t){.since = load_relaxed(&e->since),
                   .tenant = load_relaxed(&e->tenant),
                   .id = *owner,
                   .priority = load_relaxed(&e->priority)};
  /* Pairs with the fence of take_entry(): if a field is of another owner, so is `owner`. */
  atomic_thread_fence(memory_order_acquire);
  return load_relaxed(&e->owner) == *owner;
}

static bool is_past(uint64_t seen, uint64_t now, uint64_t ns, uint64_t ahead) {
  return now > seen ? now - seen > ns : seen - now > ahead;
}
static bool is_late(uint64_t seen, uint64_t now) { return is_past(seen, now, LATE_NS, AHEAD_NS); }

/* Free a place whose owner has not been seen for long. An owner that goes on sees that it has lost the place. True: the
 * place is free. */
static bool free_abandoned(waiter_t *e, uint64_t now) {
  /* acquire: pairs with take_entry(): `seen` is of this owner, or later */
  uint64_t owner = atomic_load_explicit(&e->owner, memory_order_acquire);
  if (!owner) return true;
  if (!is_past(load_relaxed(&e->seen), now, ABANDONED_NS, FAR_AHEAD_NS)) return false;
  return atomic_compare_exchange_strong(&e->owner, &owner, 0);
}

static void beat(waiter_t *e, const fshm_place *p, uint64_t now) {
  store_relaxed(&e->since, p->since);
  store_relaxed(&e->callers, p->callers);
  store_relaxed(&e->seen, now);
}

/* 0: it has none. */
static uint16_t own_process(fshm_segment *s) { return (uint16_t)(process_index(s) + 1); }

/* Not so: we were stopped for long, and another has the place; or it was damaged, or half written by one that was
 * stopped while it took it; or we are a forked child, or a process that has joined anew. All that take_entry() writes
 * is compared: a beat does not write it again. */
static bool is_ours(fshm_segment *s, const fshm_place *p) {
  const waiter_t *e = &s->waiters[p->entry];
  return p->owner && load_relaxed(&e->owner) == p->owner &&
         load_relaxed(&e->published) == p->owner && load_relaxed(&e->key) == p->key &&
         load_relaxed(&e->tenant) == p->tenant && load_relaxed(&e->priority) == p->priority &&
         load_relaxed(&e->polled) == (p->fd >= 0) && p->pid == (uint32_t)getpid() &&
         load_relaxed(&e->process) == own_process(s);
}

/* The descriptor of an event loop. After poll_end() no thread writes to it: the program may close it. */
static void poll_begin(fshm_segment *s, const fshm_place *p) {
  polled_t *mine = &s->polled[p->entry];
  if (p->fd < 0) return;
  threads_lock(&mine->lock);
  store_relaxed(&mine->fd, p->fd);
  store_relaxed(&mine->token, process_token());
  store_relaxed(&mine->heard, p->woken);
  store_relaxed(&mine->owner, p->owner);
  threads_unlock(&mine->lock);
}
static void poll_end(fshm_segment *s, const fshm_place *p) {
  polled_t *mine = &s->polled[p->entry];
  if (p->fd < 0) return;
  threads_lock(&mine->lock);
  if (load_relaxed(&mine->owner) == p->owner) store_relaxed(&mine->owner, 0);
  threads_unlock(&mine->lock);
}
/* The event loop reads the number of the place. A full pipe has woken it already: then it looks at all its places.
 * False: no loop of this process polls it. */
static bool poll_wake(fshm_segment *s, uint64_t entry) {
  polled_t *mine = &s->polled[entry];
  if (!load_relaxed(&mine->owner)) return false;
  int kept = errno;
  threads_lock(&mine->lock);
  bool polled = load_relaxed(&mine->owner) && load_relaxed(&mine->token) == process_token();
  if (polled) (void)!write(load_relaxed(&mine->fd), &entry, sizeof entry);
  threads_unlock(&mine->lock);
  errno = kept;
  return polled;
}

static void let_go(fshm_segment *s, fshm_place *p) {
  uint64_t owner = p->owner;
  if (!owner || p->pid != (uint32_t)getpid()) return; /* after a fork: it is the parent's */
  poll_end(s, p);
  p->owner = 0;
  /* From mine to free; release: the next owner's stores come after. Fails: another has it. */
  (void)atomic_compare_exchange_strong(&s->waiters[p->entry].owner, &owner, 0);
}

/* Take an entry of the key's group. False: all are in use. */
static bool take_entry(fshm_segment *s, fshm_place *p, uint64_t now) {
  uint32_t group = wait_group(p->key);
  uint64_t mine = add_relaxed(&s->header->ticket, 1) + 1;
  mine += !mine; /* only of a damaged word */
  for (uint32_t nth = 0; nth < WAITERS; nth++) {
    waiter_t *e = place_at(s, group, nth);
    uint64_t none = 0;
    if (!free_abandoned(e, now)) continue;
    /* Before it is ours: else one that looks at it now would find it abandoned, and take it too. */
    store_relaxed(&e->seen, now);
    /* From free to mine; pairs with every other taker's swap. No number comes twice. */
    if (!atomic_compare_exchange_strong(&e->owner, &none, mine)) continue;
    atomic_thread_fence(memory_order_release); /* pairs with the fence of read_entry() */
    p->owner = mine;
    p->pid = (uint32_t)getpid();
    p->entry = (uint32_t)(e - s->waiters);
    p->took = p->asked = p->looked = p->units = p->here = 0;
    p->more = 1; /* what was released while nobody waited woke nobody */
    store_relaxed(&e->key, p->key);
    store_relaxed(&e->tenant, p->tenant);
    store_relaxed(&e->priority, (int8_t)p->priority);
    store_relaxed(&e->process, own_process(s));
    store_relaxed(&e->polled, p->fd >= 0);
    store_relaxed(&e->asked, 0);
    p->woken = load_relaxed(&e->wake);
    poll_begin(s, p);
    beat(e, p, now);
    /* release: pairs with read_entry() */
    atomic_store_explicit(&e->published, mine, memory_order_release);
    raise_reach(s, group, nth + 1);
    return true;
  }
  p->owner = 0;
  return false;
}

static uint64_t now_of(const fshm_segment *s, uint64_t now) {
  return now ? min_u64(now, TIME_MAX - 1) : segment_now(s);
}

int fshm_wait_join(fshm_limiter *l, const void *key, uint64_t length, const fshm_waiter *w,
                   uint64_t now, fshm_place *p) {
  fshm_segment *s = l->segment;
  memset(p, 0, sizeof *p);
  p->key = wait_key(fshm_siphash(l->key[0], l->key[1], key, length), l->index);
  p->tenant = w->tenant == LAST_SERVED ? 1 : w->tenant;
  p->priority = w->priority > MOST_PRIORITY    ? MOST_PRIORITY
                : w->priority < -MOST_PRIORITY ? -MOST_PRIORITY
                                               : w->priority;
  p->weight = w->weight ? w->weight : 1000;
  p->callers = 1;
  p->fd = w->fd;
  now = now_of(s, now);
  p->since = now;
  p->rest = (uint32_t)spread(now ^ p->key) % p->weight; /* any: on average half a unit */
  return !s->read_only && take_entry(s, p, now);
}

/* Of wake-ups for what is idle in this process: how many the place has not seen yet. */
static uint32_t here_of(uint64_t word, uint64_t owner) {
  return word >> 16 == owner << 16 >> 16 ? (uint32_t)(word & HERE_COUNT) : 0;
}
/* Each caller of the place was woken for something that is idle in this process, and has not looked yet. */
static bool are_coming(const fshm_segment *s, const waiter_t *e, uint64_t owner) {
  return here_of(load_relaxed(&s->polled[e - s->waiters].here), owner) >= load_relaxed(&e->callers);
}
static void here_add(fshm_segment *s, const waiter_t *e, uint64_t owner) {
  _Atomic uint64_t *word = &s->polled[e - s->waiters].here;
  uint64_t seen = load_relaxed(word), next;
  do {
    uint64_t count = here_of(seen, owner) + 1U;
    next = owner << 16 | (count < HERE_COUNT ? count : HERE_COUNT);
  } while (!atomic_compare_exchange_weak(word, &seen, next));
}

static bool is_here(fshm_segment *s, const waiter_t *e) {
  return (uint32_t)load_relaxed(&e->process) - 1 == process_index(s);
}

/* The place of the caller that is next; here: of those of this process that are not coming. NULL: none waits. */
static waiter_t *next_of(fshm_segment *s, uint64_t key, bool here, uint64_t now, waiting_t *out) {
  uint32_t group = wait_group(key);
  uint64_t word = atomic_load_explicit(&s->header->queues[group], memory_order_acquire);
  uint32_t reach = REACH(word) > WAITERS ? WAITERS : REACH(word);
  waiter_t *best = NULL;
  waiting_t first = {0}, w;
  bool any = false;
  for (uint32_t nth = 0; nth < reach; nth++) {
    waiter_t *e = place_at(s, group, nth);
    uint64_t owner, of, seen;
    any |= !free_abandoned(e, now);
    if (!read_entry(e, &owner, &of, &seen, &w) || of != key || is_late(seen, now)) continue;
    if (here && (!is_here(s, e) || are_coming(s, e, owner))) continue;
    if (best && w.tenant != first.tenant) {
      first.service = service_of(s, key, first.tenant, now);
      w.service = service_of(s, key, w.tenant, now);
    }
    if (best && !is_before(&w, &first, now)) continue;
    best = e;
    first = w;
  }
  if (!any) lower_reach(s, group, word);
  *out = first;
  return best;
}

/* Whether no other place of the key is before this one, if its caller came at `since`. */
static bool is_first(fshm_segment *s, fshm_place *p, uint64_t since, uint64_t now, fshm_turn *out) {
  uint32_t group = wait_group(p->key), reach = reach_of(s, group);
  waiting_t me = {since, p->tenant, 0, p->owner, p->priority}, w;
  bool known = false, first = true;
  for (uint32_t nth = 0; nth < reach; nth++) {
    waiter_t *e = place_at(s, group, nth);
    uint64_t owner, of, seen;
    if (!read_entry(e, &owner, &of, &seen, &w) || owner == p->owner) continue;
    if (of != p->key || is_late(seen, now)) continue;
    if (w.tenant != me.tenant) {
      p->shared = 1; /* the key has several tenants */
      if (!known) me.service = service_of(s, p->key, me.tenant, now);
      known = true;
      w.service = service_of(s, p->key, w.tenant, now);
    } else {
      w.service = me.service;
    }
    uint32_t callers = load_relaxed(&e->callers);
    out->callers += callers;
    if (!is_before(&w, &me, now)) continue;
    first = false;
    out->ahead += callers;
  }
  return first;
}

int fshm_wait_turn(fshm_limiter *l, fshm_place *p, uint64_t now, fshm_turn *out) {
  fshm_segment *s = l->segment;
  memset(out, 0, sizeof *out);
  now = now_of(s, now);
  if (!p->owner || !is_ours(s, p)) {
    let_go(s, p);
    p->was_first = 1; /* it may have been woken in the other place */
    /* It keeps its time of arrival. */
    if (s->read_only || !take_entry(s, p, now)) {
      out->armed = 0;
      return 1; /* it goes by no order: all places are in use */
    }
  }
  waiter_t *mine = &s->waiters[p->entry];
  uint32_t group = wait_group(p->key), nth = nth_of(p);
  if (reach_of(s, group) <= nth) raise_reach(s, group, nth + 1); /* it was damaged */
  bool rested = minus(now, load_relaxed(&mine->seen)) >= FSHM_WAIT_BEAT_NS / 2;
  beat(mine, p, now);
  /* Full: a place that was late is seen by wait_wake(), or we see what was released. */
  atomic_thread_fence(memory_order_seq_cst);
  /* seq_cst: before the look at the limits. A release after that look changes the word. */
  out->armed = atomic_load(&mine->wake);
  out->callers = p->callers;
  bool first = is_first(s, p, p->since, now, out);
  uint32_t woken = out->armed - p->woken;
  if (p->looked) p->units = p->here = p->more = 0; /* in vain: there was nothing */
  p->looked = 1;
  p->units += woken % FOR_MORE;
  p->here += here_of(atomic_exchange(&s->polled[p->entry].here, 0), p->owner);
  p->more |= woken >= FOR_MORE;
  /* Woken, but another is first by now: the wake-up was meant for that one. Or the order has changed: the one that is
   * first now may sleep beside room that only we were told of. */
  if (!first && (p->more || p->units > p->here || p->was_first)) {
    if (woken || p->units || p->was_first) wait_wake_more(s, p->key);
    p->units = p->here;
    p->more = 0;
  }
  /* Its sleep ran out: it looks at all permits, and for dead processes. */
  if (first && rested && !woken) semaphore_forget(s, p->key >> 12);
  p->took = 0;
  p->woken = out->armed;
  p->was_first = first;
  return first;
}

uint32_t fshm_wait_ahead(fshm_limiter *l, fshm_place *p, uint64_t since, uint64_t now) {
  fshm_turn found = {0};
  (void)is_first(l->segment, p, since, now_of(l->segment, now), &found);
  return found.ahead;
}

void fshm_wait_served(fshm_limiter *l, fshm_place *p, uint64_t cost, uint64_t now) {
  fshm_segment *s = l->segment;
  if (s->read_only || (!p->tenant && !p->shared)) return; /* all are of one tenant */
  now = now_of(s, now);
  uint64_t before = service_of(s, p->key, p->tenant, now);
  uint64_t units = service_units(cost, p->weight, &p->rest);
  (void)service_add(s, p->key, LAST_SERVED, before, 0, now);
  /* No room in the table for its service: as if each tenant had it. Else this tenant would be first for ever. */
  if (!service_add(s, p->key, p->tenant, before, units, now))
    (void)service_add(s, p->key, LAST_SERVED, before + units, 0, now);
}

void fshm_wait_correct(fshm_limiter *l, const fshm_place *p, int64_t tokens, uint64_t now) {
  fshm_segment *s = l->segment;
  found_t f;
  if (s->read_only || !tokens || (!p->tenant && !p->shared)) return;
  now = now_of(s, now);
  uint64_t last = service_read(s, p->key, LAST_SERVED, now, &f);
  uint64_t before = service_of(s, p->key, p->tenant, now);
  uint64_t cost = tokens < 0 ? 0 - (uint64_t)tokens : (uint64_t)tokens;
  uint32_t rest = p->weight / 2;
  uint64_t units = service_units(cost, p->weight, &rest);
  /* So far behind that its service would come round, and count as little. */
  if (tokens > 0 && service_ahead(before, last) > (int64_t)(2 * MOST_SERVICE)) return;
  (void)service_add(s, p->key, p->tenant, before, tokens < 0 ? 0 - units : units, now);
}

void fshm_wait_requeue(fshm_limiter *l, fshm_place *p, uint64_t since, uint32_t callers,
                       uint64_t now) {
  fshm_segment *s = l->segment;
  bool more = !took_one(p);
  p->since = since;
  p->callers = callers;
  p->units = more ? 0 : p->units - 1; /* for the next caller of the place */
  p->here = more || !p->here ? 0 : p->here - 1;
  p->took = p->more = p->asked = p->looked = 0;
  if (!p->owner || !is_ours(s, p)) return; /* the next turn takes another place */
  beat(&s->waiters[p->entry], p, now_of(s, now));
  atomic_thread_fence(memory_order_seq_cst); /* wait_wake() comes after a swap elsewhere */
  /* Another may be first by now, and there may be room for more. */
  if (more)
    wait_wake_more(s, p->key);
  else
    p->was_first = 0;
}

void fshm_wait_count(fshm_limiter *l, fshm_place *p, uint32_t callers) {
  p->callers = callers;
  if (p->owner && is_ours(l->segment, p))
    store_relaxed(&l->segment->waiters[p->entry].callers, callers);
}

void fshm_wait_leave(fshm_limiter *l, fshm_place *p) {
  fshm_segment *s = l->segment;
  if (!p->owner) return;
  bool more = !took_one(p) || p->units > 1;
  let_go(s, p);
  if (p->owner) return;
  /* Whatever woke us may be for the next; and there may be room for more than one. seq_cst: pairs with wake_place(). */
  if (more || atomic_load(&s->waiters[p->entry].wake) != p->woken) wait_wake_more(s, p->key);
}

int fshm_is_waited_for(fshm_limiter *l, const void *key, uint64_t length) {
  uint64_t of = wait_key(fshm_siphash(l->key[0], l->key[1], key, length), l->index);
  return REACH(load_relaxed(&l->segment->header->queues[wait_group(of)])) != 0;
}

/* Of the key; `tenant`: only of this one. */
void fshm_waiting(fshm_limiter *l, const void *key, uint64_t length, const uint64_t *tenant,
                  uint64_t now, fshm_turn *out) {
  fshm_segment *s = l->segment;
  uint64_t of, seen, owner,
      wanted = wait_key(fshm_siphash(l->key[0], l->key[1], key, length), l->index);
  uint32_t group = wait_group(wanted), reach = reach_of(s, group);
  waiting_t w;
  memset(out, 0, sizeof *out);
  now = now_of(s, now);
  for (uint32_t nth = 0; nth < reach; nth++) {
    const waiter_t *e = place_at(s, group, nth);
    if (!read_entry(e, &owner, &of, &seen, &w) || of != wanted || is_late(seen, now)) continue;
    if (!tenant || *tenant == w.tenant) out->callers += load_relaxed(&e->callers);
  }
}

/* inspection ------------------------------------------------------------------------------------ */

static bool place_info(const fshm_segment *s, const waiter_t *e, uint64_t now,
                       fshm_waiter_info *out) {
  uint64_t key, seen, owner;
  waiting_t w;
  if (!read_entry(e, &owner, &key, &seen, &w)) return false;
  uint32_t process = (uint32_t)load_relaxed(&e->process) - 1;
  *out = (fshm_waiter_info){.key_hash = key >> 12,
                            .tenant = w.tenant,
                            .waited_ns = minus(now, w.since),
                            .table_slot = UINT64_MAX,
                            .limiter = (uint32_t)(key >> 1) & (MAX_LIMITERS - 1),
                            .callers = load_relaxed(&e->callers),
                            .stale = is_late(seen, now),
                            .priority = w.priority};
  if (process_joined(s, process)) out->pid = load_relaxed(&s->processes[process].pid);
  return true;
}

int fshm_waiter_at(fshm_segment *s, uint32_t index, fshm_waiter_info *out) {
  memset(out, 0, sizeof *out);
  return index < WAITERS && place_info(s, &s->waiters[index], segment_now(s), out);
}

/* A hash table of places by their key, for one look: 1 + an index; 0 = free. */
#define KEYS_WAITED (WAITERS * 2)
static uint16_t *waited_at(uint16_t *table, const fshm_waiter_info *infos, uint64_t key_hash,
                           uint32_t limiter) {
  uint32_t at = (uint32_t)spread(key_hash ^ (uint64_t)limiter << 52) % KEYS_WAITED;
  for (;; at = (at + 1) % KEYS_WAITED) { /* half of it is free */
    if (!table[at]) return &table[at];
    const fshm_waiter_info *i = &infos[table[at] - 1];
    if (i->key_hash == key_hash && i->limiter == limiter) return &table[at];
  }
}

static void find_names(fshm_segment *s, fshm_waiter_info *infos, uint32_t count) {
  uint16_t table[KEYS_WAITED] = {0};
  uint64_t limiters[MAX_LIMITERS / 64] = {0};
  if (s->names_mode) return;
  for (uint32_t i = 0; i < count; i++) {
    uint16_t *at = waited_at(table, infos, infos[i].key_hash, infos[i].limiter);
    if (!*at) *at = (uint16_t)(i + 1);
    limiters[infos[i].limiter / 64] |= UINT64_C(1) << infos[i].limiter % 64;
  }
  for (uint64_t slot = 0; slot < s->slot_count; slot++) {
    uint32_t limiter = load_relaxed(&s->key_stats[slot].meta) >> 20 & (MAX_LIMITERS - 1);
    uint64_t hash;
    if (!(limiters[limiter / 64] >> limiter % 64 & 1) || limiter >= s->limiter_count ||
        !limiter_key_hash(s, limiter, slot, &hash))
      continue;
    uint16_t at = *waited_at(table, infos, hash & (UINT64_MAX >> 12), limiter);
    if (at) infos[at - 1].table_slot = slot;
  }
  for (uint32_t i = 0; i < count; i++)
    infos[i].table_slot =
        infos[*waited_at(table, infos, infos[i].key_hash, infos[i].limiter) - 1].table_slot;
}

uint64_t fshm_waiters(fshm_segment *s, fshm_waiter_info *out, uint64_t room, int names) {
  uint64_t found = 0, now = segment_now(s);
  for (uint32_t at = 0; at < WAITERS; at++) {
    fshm_waiter_info one;
    if (!place_info(s, &s->waiters[at], now, &one)) continue;
    if (found < room) out[found] = one;
    found++;
  }
  uint64_t given = min_u64(found, room);
  if (given && names) find_names(s, out, (uint32_t)given);
  return found;
}

/* waking ---------------------------------------------------------------------------------------- */

static void wake_sleeper(_Atomic uint32_t *word) {
#if defined(__linux__)
  /* Not private: it is shared. All: one that has lost the place may sleep there too. */
  (void)syscall(SYS_futex, word, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
#else
  (void)word; /* sleep_on() looks every 0.5 ms */
#endif
}

/* False: the owner has left meanwhile, and may not have seen it. */
static bool wake_place(fshm_segment *s, waiter_t *e, uint64_t owner, uint32_t what) {
  uint32_t process = (uint32_t)load_relaxed(&e->process) - 1;
  (void)atomic_fetch_add(&e->wake, what);
  if (!load_relaxed(&e->polled)) {
    wake_sleeper(&e->wake);
  } else if (process != process_index_known(s) || !poll_wake(s, (uint64_t)(e - s->waiters))) {
    /* its watcher, if one sleeps */
    if (process < PROCESSES &&
        atomic_fetch_add(&s->watchers[process], WATCH_WAKE_UP) & WATCH_SLEEPS)
      wake_sleeper(&s->watchers[process]);
  }
  /* seq_cst: pairs with fshm_wait_leave(), which frees the place before it looks at `wake`. */
  return atomic_load(&e->owner) == owner;
}

static void wake_first(fshm_segment *s, uint64_t key, uint32_t what) {
  for (int tries = 0; tries < MAX_TRIES; tries++) {
    waiting_t first;
    waiter_t *e = next_of(s, key, false, segment_now(s), &first);
    if (!e || wake_place(s, e, first.id, what)) break;
  }
}
void wait_wake_next(fshm_segment *s, uint64_t key) { wake_first(s, key, FOR_ONE); }

/* One of each key: whoever takes something wakes the next. */
void wait_wake_limiter(fshm_segment *s, uint32_t limiter) {
  uint64_t last = 0;
  for (uint32_t group = 0; group < WAIT_GROUPS; group++) {
    if (!wait_any(s, group)) continue;
    uint32_t reach = reach_of(s, group);
    for (uint32_t nth = 0; nth < reach; nth++) {
      const waiter_t *e = place_at(s, group, nth);
      uint64_t key = load_relaxed(&e->key);
      if (!load_relaxed(&e->owner) || wait_group(key) != group || key == last) continue;
      if (((uint32_t)(key >> 1) & (MAX_LIMITERS - 1)) != limiter) continue;
      wake_first(s, key, FOR_MORE);
      last = key;
    }
  }
}

void wait_wake_all(fshm_segment *s) {
  after_swap();
  for (uint32_t i = 0; i < WAITERS; i++)
    if (load_relaxed(&s->waiters[i].owner)) (void)wake_place(s, &s->waiters[i], 0, FOR_MORE);
}

void fshm_wait_wake(fshm_limiter *l, const void *key, uint64_t length) {
  if (l->segment->read_only) return;
  atomic_thread_fence(memory_order_seq_cst); /* after whatever the caller has changed */
  wait_wake_more(l->segment, wait_key(fshm_siphash(l->key[0], l->key[1], key, length), l->index));
}

/* Sleep until the word is no longer `seen`, at most so long. 1: it changed. 0: the time is up, or a signal came. */
static int sleep_on(_Atomic uint32_t *word, uint32_t seen, uint64_t ns) {
#if defined(__linux__)
  struct timespec left = {(time_t)(ns / 1000000000), (long)(ns % 1000000000)};
  if (syscall(SYS_futex, word, FUTEX_WAIT, seen, &left, NULL, 0)) return errno == EAGAIN;
  return 1;
#else
  struct timespec slice = {0, 500000};
  for (uint64_t slept = 0; slept < ns; slept += 500000) {
    if (load_relaxed(word) != seen) return 1;
    (void)nanosleep(&slice, NULL);
  }
  return 0;
#endif
}

int fshm_wait_sleep(fshm_limiter *l, const fshm_place *p, uint32_t armed, uint64_t ns) {
  if (ns > FSHM_WAIT_BEAT_NS) ns = FSHM_WAIT_BEAT_NS;
  if (p->owner) return sleep_on(&l->segment->waiters[p->entry].wake, armed, ns);
  struct timespec pause = {0, (long)min_u64(ns, 5000000)};
  (void)nanosleep(&pause, NULL);
  return 0;
}

bool wait_place_asks(fshm_segment *s, const fshm_place *p) {
  if (!is_ours(s, p)) return false;
  atomic_store(&s->waiters[p->entry].asked, 1);
  return true;
}

void wait_tell(fshm_segment *s, uint32_t process) {
  if (atomic_fetch_or(&s->watchers[process], WATCH_ASKED) & WATCH_SLEEPS)
    wake_sleeper(&s->watchers[process]);
}

/* Who is next for something that is idle in this process. OURS: a caller of this process, which is woken. */
static int next_for(fshm_segment *s, uint64_t key, waiter_t **first) {
  uint64_t now = segment_now(s);
  waiting_t of_all, own;
  for (int tries = 0; tries < MAX_TRIES; tries++) {
    *first = next_of(s, key, false, now, &of_all);
    if (!*first) return FSHM_NEXT_NONE;
    waiter_t *e = next_of(s, key, true, now, &own);
    if (!is_here(s, *first)) {
      if (!e || !stays_here(&of_all, &own)) return FSHM_NEXT_OTHER;
    } else if (!e) {
      e = *first; /* that is coming, and wakes the next */
      own = of_all;
    }
    here_add(s, e, own.id);
    if (wake_place(s, e, own.id, FOR_ONE)) break;
  }
  return FSHM_NEXT_OURS;
}

int fshm_wait_next(fshm_limiter *l, const void *key, uint64_t length) {
  fshm_segment *s = l->segment;
  waiter_t *first;
  uint64_t of = wait_key(fshm_siphash(l->key[0], l->key[1], key, length), l->index);
  if (s->read_only) return FSHM_NEXT_NONE;
  int next = next_for(s, of, &first);
  if (next == FSHM_NEXT_OTHER) store_relaxed(&first->asked, 0); /* it gets what our caller closes */
  return next;
}

uint64_t fshm_wait_first(fshm_limiter *l, const void *key, uint64_t length) {
  fshm_segment *s = l->segment;
  waiting_t first;
  uint64_t of = wait_key(fshm_siphash(l->key[0], l->key[1], key, length), l->index);
  return next_of(s, of, false, segment_now(s), &first) ? first.since : UINT64_MAX;
}

int fshm_wait_asked(fshm_limiter *l, const void *key, uint64_t length) {
  fshm_segment *s = l->segment;
  waiter_t *e;
  waiting_t first;
  uint64_t of = wait_key(fshm_siphash(l->key[0], l->key[1], key, length), l->index);
  if (s->read_only) return 0;
  e = next_of(s, of, false, segment_now(s), &first);
  if (!e || is_here(s, e) || !load_relaxed(&e->asked)) return 0;
  if (next_for(s, of, &e) != FSHM_NEXT_OTHER) return 0; /* it may ask again */
  uint32_t asked = 1;
  /* Pairs with the same swap in other processes: one of them closes a connection. */
  return atomic_compare_exchange_strong(&e->asked, &asked, 0);
}

/* Wake the event loops of this process whose places other processes have woken, until the time is up, or another
 * process asks for a connection. */
int fshm_wait_watch(fshm_segment *s, uint64_t ns) {
  uint32_t process = process_index(s);
  if (process >= PROCESSES) {
    struct timespec pause = {0, (long)min_u64(ns, 5000000)};
    (void)nanosleep(&pause, NULL);
    return 0;
  }
  _Atomic uint32_t *word = &s->watchers[process];
  uint64_t end = fshm_clock() + ns, now;
  do {
    /* seq_cst: before the look at the places. A wake-up after that look changes the word. */
    uint32_t seen = atomic_fetch_or(word, WATCH_SLEEPS) | WATCH_SLEEPS;
    for (uint32_t i = 0; i < WAITERS; i++) {
      if (!load_relaxed(&s->polled[i].owner)) continue;
      uint32_t wake = load_relaxed(&s->waiters[i].wake);
      if (wake == load_relaxed(&s->polled[i].heard)) continue;
      store_relaxed(&s->polled[i].heard, wake);
      (void)poll_wake(s, i);
    }
    if (seen & WATCH_ASKED) {
      (void)atomic_fetch_and(word, ~WATCH_ASKED); /* before the caller's look at who has asked */
      return 1;
    }
    now = fshm_clock();
    if (now < end) (void)sleep_on(word, seen, end - now);
  } while (now < end);
  return 0;
}
