/* deployments.c - what routers know of deployments, shared by all processes: requests in flight, latency, success,
 * cost, cooldown. Statistics, not limits: each word is valid by itself. Argued in DESIGN.md, "Deployments".
 *
 * Requests in flight: each process counts its own, at its process index (requests_t). They count while the process
 * lives; the sum over all processes is the number in flight, and there is no other. So all requests of a dead
 * process vanish with the next liveness check, at most LIVENESS_NS later.
 */
#include "../core/internal.h"
#include "deployments.h"

#define LIVENESS_NS UINT64_C(500000000)
/* Indexes where a deployment may be: 200 deployments find room (with 8, not even 120). */
#define PROBES 64
/* Of one process and deployment: below 2^16, with a margin for concurrent threads. */
#define MOST_IN_FLIGHT 60000

uint64_t fshm_deployment_id(fshm_segment *s, const char *name, uint64_t length) {
  uint64_t id = fshm_siphash(s->secret[0], s->secret[1] ^ 9, name, length);
  return id + !id;
}

static inline uint32_t probe(uint64_t id, uint32_t i) { return (uint32_t)(id + i) % DEPLOYMENTS; }

/* Find a deployment: the first of several entries, in the order that all processes see. NULL: there is none. */
static deployment_t *find_deployment(fshm_segment *s, uint64_t id) {
  for (uint32_t i = 0; i < PROBES; i++)
    if (load_relaxed(&s->deployments[probe(id, i)].id) == id) return &s->deployments[probe(id, i)];
  return NULL;
}

/* The same, and free all other entries of the id: their records are lost. */
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

/* A free entry, else the one that has been idle for longest. */
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

/* Find the index of a deployment. A new one takes a free entry, else the one among its PROBES that has been idle for
 * longest, whose statistics are lost. The id is swapped in; then the old statistics are cleared word by word. A
 * record that comes in between counts for the new deployment, which is harmless. Two processes that open a
 * deployment at the same time may take two entries: each looks again after its swap (a full barrier), and only the
 * first entry stays. A process stopped or killed before that leaves an entry that no look-up finds; it becomes the
 * oldest and is reused first. */
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
    after_swap(); /* pairs with the same barrier of another process that opens it */
    d = keep_first(s, id);
  }
  return d ? (int)(d - s->deployments) : FSHM_FULL;
}

/* in flight ------------------------------------------------------------------------------------ */

/* Called by a process that has just taken its process index, before its other threads can see its incarnation: no
 * other thread writes these words. Until the last store, `incarnation` is an earlier owner's. */
void requests_join(fshm_segment *s, uint32_t process, uint64_t incarnation) {
  requests_t *f = &s->requests[process];
  store_relaxed(&f->incarnation, 0);
  for (uint32_t i = 0; i < DEPLOYMENTS; i++) store_relaxed(&f->in_flight[i], 0);
  /* release: pairs with the acquire in fshm_deployment_look() */
  atomic_store_explicit(&f->incarnation, incarnation, memory_order_release);
}

/* 1: counted; end it with fshm_request_end(). 0: this process is not in the process table. */
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

/* Call it once. A forked child is another process, and cannot end its parent's requests. */
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

/* Liveness check of all process indexes. A dead incarnation does not come back, so it does not matter which process
 * stores the result, nor how late. */
static void look_for_dead(fshm_segment *s) {
  uint64_t blocks = joined_blocks(s);
  for (; blocks; blocks &= blocks - 1) {
    uint32_t first = (uint32_t)__builtin_ctzll(blocks) * 64;
    for (uint32_t process = first; process < first + 64; process++) {
      if (!process_joined(s, process)) continue;
      process_t *p = &s->processes[process];
      uint64_t incarnation = atomic_load_explicit(&p->incarnation, memory_order_acquire);
      /* Without a pid the owner is just joining: it has raised the incarnation, and may not have locked the byte that
       * says that it lives. What is called dead stays so. (acquire above: the pid was set to 0 before that.) */
      if (load_relaxed(&p->dead) == incarnation || !load_relaxed(&p->pid) ||
          process_alive(s, process))
        continue;
      store_relaxed(&p->dead, incarnation);
    }
  }
}

/* One process of the host at a time makes the check, every half second, while requests are routed. */
static void heartbeat(fshm_segment *s, uint64_t now) {
  uint64_t last = load_relaxed(&s->header->liveness);
  if (likely(now < last + LIVENESS_NS && now >= last)) return;
  if (!s->read_only && !atomic_compare_exchange_strong(&s->header->liveness, &last, now)) return;
  if (!s->read_only) look_for_dead(s);
}

/* ask: check each process now, for a reader that may not store the results. */
static void add_requests(fshm_segment *s, const uint32_t *deployments, uint32_t count, bool ask,
                         fshm_deployment_info *out) {
  uint64_t blocks = joined_blocks(s);
  for (; blocks; blocks &= blocks - 1) {
    const uint32_t word = (uint32_t)__builtin_ctzll(blocks);
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

/* All but the requests in flight. An index that does not exist has no statistics. */
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

/* The statistics of these deployments, by index. `fresh`: make a liveness check now, however recent the last one is. */
void fshm_deployment_look(fshm_segment *s, const uint32_t *deployments, uint32_t count,
                          uint64_t now, int fresh, fshm_deployment_info *out) {
  if (!now) now = fshm_now(s);
  if (fresh && !s->read_only)
    look_for_dead(s);
  else
    heartbeat(s, now);
  read_words(s, deployments, count, now, out);
  add_requests(s, deployments, count, fresh && s->read_only, out);
}

/* Pick by a strategy: an index into the arrays, or -1. See route_pick(). */
int64_t fshm_deployment_pick(fshm_segment *s, uint32_t strategy, const uint32_t *deployments,
                             const double *weights, const double *prices,
                             const unsigned char *blocked, uint32_t count, uint64_t random,
                             fshm_deployment_info *found) {
  uint64_t now = fshm_now(s);
  read_words(s, deployments, count, now, found);
  if (strategy == FSHM_ROUTE_LEAST_BUSY || strategy == FSHM_ROUTE_LATENCY) {
    heartbeat(s, now);
    add_requests(s, deployments, count, false, found);
  }
  return route_pick(strategy, found, weights, prices, blocked, count, random);
}

/* records -------------------------------------------------------------------------------------- */

/* Replace the word by next(word, value). Returns the new word. */
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

/* Record the end of a request. latency_ns, cost: UINT64_MAX = not known. Each word is swapped by itself: if the
 * process is killed in between, the later words miss this record. */
void fshm_deployment_record(fshm_segment *s, uint32_t deployment, uint64_t latency_ns, int success,
                            uint64_t cost, uint32_t allowed_fails, uint64_t cooldown_ns,
                            uint64_t now) {
  if (deployment >= DEPLOYMENTS || s->read_only) return;
  deployment_t *d = &s->deployments[deployment];
  if (!now) now = fshm_now(s);
  store_relaxed(&d->used, now);
  update(&d->success, next_rate, success != 0);
  if (cost != UINT64_MAX) update(&d->cost, next_mean, cost);
  if (success) { /* the time of a failure is not recorded: failures are often quick */
    if (latency_ns != UINT64_MAX) update(&d->latency, next_mean, latency_ns / LATENCY_UNIT);
    return;
  }
  uint64_t minute = now / 60000000000U, next = update(&d->failures, next_failures, minute);
  if (cooldown_ns && failures_of(next) > allowed_fails)
    raise_to(&d->cooldown, plus_time(now, cooldown_ns));
}
