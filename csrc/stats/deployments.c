/* deployments.c - what routers know of deployments, shared by all processes: requests in flight, latency,
 * success, cost, cooldown. Statistics, not limits: each word is right by itself. Argued in DESIGN.md,
 * "Deployments".
 *
 * In flight: each process counts its own, in a per-process statistics of its process index. A per-process statistics counts while its
 * owner lives; the sum over per-process statistics is the number in flight, and there is no other. So a dead process's
 * requests vanish whole, as soon as somebody has asked the kernel about it: at most LIVENESS_NS later.
 */
#include "../core/internal.h"
#include "deployments.h"

#define LIVENESS_NS UINT64_C(500000000)
#define PROBES 64 /* places where a deployment may stand: 200 find room (with 8, not even 120) */
#define MOST_IN_FLIGHT \
  60000 /* of one process and deployment: below 2^16 by more threads than there are */

uint64_t fshm_deployment_id(fshm_segment *s, const char *name, uint64_t length) {
  uint64_t id = fshm_siphash(s->header->secret[0], s->header->secret[1] ^ 9, name, length);
  return id + !id;
}

static inline uint32_t probe(uint64_t id, uint32_t i) { return (uint32_t)(id + i) % DEPLOYMENTS; }

/* Where it stands: of several places the first, as everybody sees it; NULL: nowhere. */
static deployment_t *find_deployment(fshm_segment *s, uint64_t id) {
  for (uint32_t i = 0; i < PROBES; i++)
    if (load_relaxed(&s->deployments[probe(id, i)].id) == id) return &s->deployments[probe(id, i)];
  return NULL;
}

/* The same, and nobody keeps another: what was recorded there is forgotten. */
static deployment_t *keep_first(fshm_segment *s, uint64_t id) {
  deployment_t *first = find_deployment(s, id);
  for (uint32_t i = 0; first && i < PROBES; i++) {
    deployment_t *d = &s->deployments[probe(id, i)];
    uint64_t seen = id;
    if (d != first && load_relaxed(&d->id) == id)
      (void)atomic_compare_exchange_strong(&d->id, &seen, 0);
  }
  return first;
}

/* A free place, else that of the one that has been idle for longest. */
static deployment_t *choose_deployment(fshm_segment *s, uint64_t id) {
  deployment_t *oldest = NULL;
  uint64_t unused_since = UINT64_MAX;
  for (uint32_t i = 0; i < PROBES; i++) {
    deployment_t *d = &s->deployments[probe(id, i)];
    uint64_t used = load_relaxed(&d->used);
    if (!load_relaxed(&d->id)) return d;
    if (oldest && used >= unused_since) continue;
    unused_since = used;
    oldest = d;
  }
  return oldest;
}

/* Where the deployment stands; a new one takes a free place, else that of the one among its PROBES that
 * has been idle for longest, whose statistics are forgotten. One swap of the id; what it knew is then
 * cleared word by word, and a record that comes in between counts for the newcomer: harmless. Two that open
 * it at once may take two places: whoever took one looks again (a full barrier between, in the swap), and
 * only the first of them stays. Who was stopped or killed before that leaves one that nobody finds, and
 * that is the next to go. */
int fshm_deployment_open(fshm_segment *s, uint64_t id, uint64_t now) {
  deployment_t *d = find_deployment(s, id);
  if (!d && s->read_only) return FSHM_E_NOT_FOUND;
  if (!now) now = segment_now(s);
  for (int tries = 0; !d && tries < PROBES; tries++) {
    d = choose_deployment(s, id);
    uint64_t seen = load_relaxed(&d->id);
    if (seen == id) break;
    if (!atomic_compare_exchange_strong(&d->id, &seen, id)) {
      d = find_deployment(s, id);
      continue;
    }
    store_relaxed(&d->latency, 0);
    store_relaxed(&d->success, 0);
    store_relaxed(&d->cost, 0);
    store_relaxed(&d->failures, 0);
    store_relaxed(&d->cooldown, 0);
    store_relaxed(&d->used, now);
    after_swap(); /* pairs with that of whoever else opens it */
    d = keep_first(s, id);
  }
  return d ? (int)(d - s->deployments) : FSHM_FULL;
}

/* in flight ------------------------------------------------------------------------------------ */

/* Called by a process that has just got its process index, before it shows its incarnation to its own threads:
 * nobody else writes the per-process statistics. Until the last store the per-process statistics's incarnation is an earlier owner's. */
void requests_join(fshm_segment *s, uint32_t process, uint64_t incarnation) {
  requests_t *f = &s->requests[process];
  store_relaxed(&f->incarnation, 0);
  for (uint32_t i = 0; i < DEPLOYMENTS; i++) store_relaxed(&f->in_flight[i], 0);
  /* release: pairs with the acquire in fshm_deployment_look() */
  atomic_store_explicit(&f->incarnation, incarnation, memory_order_release);
  (void)atomic_fetch_or_explicit(&s->header->joined[process / 64], UINT64_C(1) << (process % 64),
                                 memory_order_relaxed);
}

/* 1: counted; end it with fshm_request_end(). 0: this process has no place in the process table. */
int fshm_request_begin(fshm_segment *s, uint32_t deployment, uint64_t now, fshm_request *out) {
  memset(out, 0, sizeof *out);
  uint32_t process;
  uint64_t incarnation;
  if (deployment >= DEPLOYMENTS || !process_identity(s, &process, &incarnation)) return 0;
  _Atomic uint16_t *count = &s->requests[process].in_flight[deployment];
  if (load_relaxed(count) >= MOST_IN_FLIGHT) return 0;
  (void)add_relaxed(count, 1);
  store_relaxed(&s->deployments[deployment].used, now ? now : segment_now(s));
  *out = (fshm_request){incarnation, deployment, process + 1};
  return 1;
}

/* Once. A forked child is another process: what its parent began is not its to end. */
int fshm_request_end(fshm_segment *s, fshm_request *request) {
  uint32_t process, mine = request->owner;
  uint64_t incarnation;
  request->owner = 0;
  if (!mine || mine > PROCESSES || request->deployment >= DEPLOYMENTS) return 0;
  if (!process_identity(s, &process, &incarnation) || process + 1 != mine ||
      incarnation != request->incarnation)
    return 0;
  (void)atomic_fetch_sub_explicit(&s->requests[process].in_flight[request->deployment], 1,
                                  memory_order_relaxed);
  return 1;
}

/* Ask the kernel which owners of process indexes are dead. Truth that stays true: a incarnation that is dead
 * does not come back, so it does not matter who writes it, nor how late. */
static void look_for_dead(fshm_segment *s) {
  for (uint32_t process = 0; process < PROCESSES; process++) {
    if (!(load_relaxed(&s->header->joined[process / 64]) >> (process % 64) & 1)) continue;
    process_t *p = &s->processes[process];
    uint64_t incarnation = atomic_load_explicit(&p->incarnation, memory_order_acquire);
    if (load_relaxed(&p->dead) == incarnation || process_alive(s, process)) continue;
    store_relaxed(&p->dead, incarnation);
  }
}

/* One process of the host at a time, every half second, when somebody routes. */
static void heartbeat(fshm_segment *s, uint64_t now) {
  uint64_t last = load_relaxed(&s->header->liveness);
  if (likely(now < last + LIVENESS_NS && now >= last)) return;
  if (!s->read_only && !atomic_compare_exchange_strong(&s->header->liveness, &last, now)) return;
  if (!s->read_only) look_for_dead(s);
}

/* ask: whether each process lives, for one that may not write what it found. */
static void add_requests(fshm_segment *s, const uint32_t *deployments, uint32_t count, bool ask,
                         fshm_deployment_info *out) {
  for (uint32_t word = 0; word < PROCESSES / 64; word++) {
    uint64_t joined = load_relaxed(&s->header->joined[word]);
    for (; joined; joined &= joined - 1) {
      uint32_t process = word * 64 + (uint32_t)__builtin_ctzll(joined);
      const process_t *p = &s->processes[process];
      const requests_t *f = &s->requests[process];
      uint64_t incarnation = load_relaxed(&p->incarnation);
      if (load_relaxed(&p->dead) == incarnation ||
          atomic_load_explicit(&f->incarnation, memory_order_acquire) != incarnation ||
          (ask && !process_alive(s, process)))
        continue;
      for (uint32_t i = 0; i < count; i++)
        if (deployments[i] < DEPLOYMENTS)
          out[i].in_flight += load_relaxed(&f->in_flight[deployments[i]]);
    }
  }
}

/* All but the requests in flight. A place that is none: nothing is known. */
static void read_words(const fshm_segment *s, const uint32_t *deployments, uint32_t count,
                       uint64_t now, fshm_deployment_info *out) {
  for (uint32_t i = 0; i < count; i++) {
    deployment_words_t w = {0};
    uint64_t id = 0;
    if (deployments[i] < DEPLOYMENTS) {
      const deployment_t *d = &s->deployments[deployments[i]];
      w = (deployment_words_t){load_relaxed(&d->latency), load_relaxed(&d->success),
                               load_relaxed(&d->cost), load_relaxed(&d->cooldown),
                               load_relaxed(&d->used)};
      id = load_relaxed(&d->id);
    }
    out[i] = deployment_read(&w, now);
    out[i].id = id;
  }
}

/* What is known of these deployments (places, as fshm_deployment_open() gave them). `fresh`: ask about
 * dead processes now, however lately that was done. */
void fshm_deployment_look(fshm_segment *s, const uint32_t *deployments, uint32_t count,
                          uint64_t now, int fresh, fshm_deployment_info *out) {
  if (!now) now = segment_now(s);
  if (fresh && !s->read_only)
    look_for_dead(s);
  else
    heartbeat(s, now);
  read_words(s, deployments, count, now, out);
  add_requests(s, deployments, count, fresh && s->read_only, out);
}

/* Which of these a strategy picks: an index into the arrays, or -1. See route_pick(). */
int64_t fshm_deployment_pick(fshm_segment *s, uint32_t strategy, const uint32_t *deployments,
                             const double *weights, const double *prices,
                             const unsigned char *blocked, uint32_t count, uint64_t random,
                             fshm_deployment_info *found) {
  uint64_t now = segment_now(s);
  read_words(s, deployments, count, now, found);
  if (strategy == FSHM_ROUTE_LEAST_BUSY || strategy == FSHM_ROUTE_LATENCY) {
    heartbeat(s, now);
    add_requests(s, deployments, count, false, found);
  }
  return route_pick(strategy, found, weights, prices, blocked, count, random);
}

/* records -------------------------------------------------------------------------------------- */

/* The word that it put there. */
static uint64_t update(_Atomic uint64_t *word, uint64_t (*next)(uint64_t, uint64_t),
                       uint64_t value) {
  uint64_t seen = load_relaxed(word), written = next(seen, value);
  for (int i = 0; i < MAX_TRIES; i++) {
    if (atomic_compare_exchange_weak_explicit(word, &seen, written, memory_order_relaxed,
                                              memory_order_relaxed))
      break;
    written = next(seen, value);
  }
  return written;
}

/* A request has ended. latency_ns, cost: UINT64_MAX = not known. Each word by a swap of its own: a kill
 * in between leaves the later ones as they were, which is a record less of them. */
void fshm_deployment_record(fshm_segment *s, uint32_t deployment, uint64_t latency_ns, int success,
                            uint64_t cost, uint32_t allowed_fails, uint64_t cooldown_ns,
                            uint64_t now) {
  if (deployment >= DEPLOYMENTS || s->read_only) return;
  deployment_t *d = &s->deployments[deployment];
  if (!now) now = segment_now(s);
  store_relaxed(&d->used, now);
  update(&d->success, next_rate, success != 0);
  if (cost != UINT64_MAX) update(&d->cost, next_mean, cost);
  if (success) { /* a failure is often quick: its time says nothing */
    if (latency_ns != UINT64_MAX) update(&d->latency, next_mean, latency_ns / LATENCY_UNIT);
    return;
  }
  uint64_t minute = now / 60000000000U, next = update(&d->failures, next_failures, minute);
  if (cooldown_ns && failures_of(next) > allowed_fails) {
    uint64_t until = plus_time(now, cooldown_ns), old = load_relaxed(&d->cooldown);
    for (int i = 0; old < until && i < MAX_TRIES; i++)
      if (atomic_compare_exchange_weak_explicit(&d->cooldown, &old, until, memory_order_relaxed,
                                                memory_order_relaxed))
        return;
  }
}
