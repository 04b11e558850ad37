/* permit_lease.c - permit leases: a server grants this host's processes a number of permits to hold together. Argued
 * in DESIGN.md, "Permits over many hosts". semaphore.c takes a permit within the lease.
 */
#include "../limits/per_call.h"
#include "../permits/semaphore.h"
#include "../stats/key_stats.h"
#include "token_lease.h"

static uint64_t first_word(void *context) {
  /* Computed after the look, like all first states: so it ends later than any earlier word did. */
  const keyed_t *k = context;
  return permit_lease_word(0, true, plus_time(keyed_now(k), PERMIT_LEASE_OPEN));
}

/* Find the slot of the key's word. f->pair.who = 0: there is none. FSHM_OK, or an error. tries: of the whole call. */
static COLD int word_find(keyed_t *k, bool open, int *tries, found_t *f) {
  for (; *tries < MAX_TRIES; *tries += CLAIM_TRIES) {
    table_find(k->s, k->hash, k->who, f);
    if (f->pair.who || !open) return FSHM_OK;
    if (keyed_put(k, k->hash, f, k->who, 0, first_word, k) == CLAIM_FULL) return FSHM_FULL;
  }
  return FSHM_CONTENDED;
}

/* Allow at most `to` permits from now on, in one swap; drop: none, and processes may take some without a lease. *word:
 * its value afterwards. */
static COLD int word_lower(keyed_t *k, bool open, uint64_t to, bool drop, uint64_t *word) {
  for (int tries = 0; tries < MAX_TRIES; tries++) {
    found_t f;
    int status = word_find(k, open, &tries, &f);
    if (status != FSHM_OK) return status;
    *word = f.pair.who ? f.pair.when : 0;
    uint64_t next = drop ? permit_lease_dropped(*word) : permit_lease_lowered(*word, to);
    if (!f.pair.who || next == *word) return FSHM_OK;
    pair_t seen = f.pair, lower = {f.pair.who, next};
    if (!pair_cas(&k->s->slots[f.slot], &seen, lower)) continue;
    *word = next;
    return FSHM_OK;
  }
  return FSHM_CONTENDED;
}

static COLD int word_reported(fshm_limiter *permits, fshm_limiter *leases, const void *key,
                              uint64_t length, bool open, uint64_t to, uint64_t now,
                              fshm_permit_lease *out) {
  keyed_t k = {.s = NULL};
  memset(out, 0, sizeof *out);
  int status = keyed_begin(&k, leases, FSHM_LEASE, key, length, now);
  if (status == FSHM_OK) status = word_lower(&k, open, to, false, &out->word);
  if (status != FSHM_OK) return status;
  /* Read the word, then the permits. Pairs with after_swap() in stands_granted(): a taker whose permit we do not see
   * goes by this word or a newer one. */
  atomic_thread_fence(memory_order_seq_cst);
  out->now_ns = keyed_now(&k);
  out->leased = permit_lease_at(out->word, out->now_ns);
  out->left_ns = minus(permit_lease_end(out->word), out->now_ns);
  out->held = semaphore_count(permits, key, length, 0);
  out->reported =
      max_u64(permit_lease_at(out->word, minus(out->now_ns, PERMIT_LEASE_OVER)), out->held);
  return FSHM_OK;
}

int fshm_permit_lease_look(fshm_limiter *permits, fshm_limiter *leases, const void *key,
                           uint64_t length, int open, uint64_t now, fshm_permit_lease *out) {
  return word_reported(permits, leases, key, length, open != 0, MAX_PERMITS, now, out);
}

int fshm_permit_lease_lower(fshm_limiter *permits, fshm_limiter *leases, const void *key,
                            uint64_t length, uint64_t to, uint64_t now, fshm_permit_lease *out) {
  return word_reported(permits, leases, key, length, false, to, now, out);
}

/* Do all permits that are valid by this word, now or later, have numbers below the next lease? */
static COLD bool next_is_clean(fshm_limiter *permits, const void *key, uint64_t length,
                               uint64_t word, uint64_t leased) {
  uint64_t before = permit_lease_of(word);
  if (leased < before) return false; /* permits below `before` stay valid by this word */
  if (permit_lease_clean(word) && before) return true;
  /* A process may take permits without a lease. */
  if (!permit_lease_clean(word) && !before) return false;
  /* By this word, no permit that we do not see is valid beyond the lease. Pairs as in word_reported(). */
  atomic_thread_fence(memory_order_seq_cst);
  return semaphore_count(permits, key, length, leased) == 0;
}

COLD int fshm_permit_lease_put(fshm_limiter *permits, fshm_limiter *leases, const void *key,
                               uint64_t length, uint64_t word, uint64_t leased, uint64_t until,
                               uint64_t now) {
  keyed_t k = {.s = NULL};
  found_t f;
  fshm_segment *s = leases->segment;
  int status = keyed_begin(&k, leases, FSHM_LEASE, key, length, now);
  if (status != FSHM_OK) return status;
  table_find(k.s, k.hash, k.who, &f);
  if (!f.pair.who || f.pair.when != word) return 0;
  leased = min_u64(leased, MAX_PERMITS);
  bool clean = next_is_clean(permits, key, length, word, leased);
  uint64_t next = permit_lease_next(word, leased, clean, until);
  pair_t seen = f.pair, to = {f.pair.who, next};
  if (!next || !pair_cas(&s->slots[f.slot], &seen, to)) return 0;
  if (!(s->names_mode & FSHM_NAMES_OFF))
    key_stats_remember(s, f.slot, key_stats_meta(k.index, k.who), key, length);
  if (leased > permit_lease_of(word)) fshm_wait_wake(permits, key, length);
  return FSHM_OK;
}

/* No permit of the lease is free. */
static COLD int not_granted(keyed_t *k, fshm_limiter *permits, const fshm_limiter *refused,
                            const void *key, uint64_t length, const granted_t *g, int status,
                            uint32_t *in_flight) {
  if (status == FSHM_ASK && refused) {
    uint64_t hash = fshm_siphash(refused->key[0], refused->key[1], key, length);
    if (token_lease_refused_ns(refused, hash, NULL, keyed_now(k))) status = FSHM_DENIED;
  }
  if (status == FSHM_ASK && g->alone) status = FSHM_DENIED;
  if (status == FSHM_DENIED && !*in_flight) *in_flight = semaphore_count(permits, key, length, 0);
  return status;
}

/* Cold for the compiler: one more hot caller of these functions would change what is inlined into a check. */
COLD int fshm_permit_lease_admit(fshm_limiter *permits, fshm_limiter *leases, fshm_limiter *refused,
                                 const void *key, uint64_t length, uint32_t alone, uint64_t now,
                                 fshm_permit *permit, fshm_decision *out, uint32_t *in_flight) {
  keyed_t k = {.s = NULL};
  memset(permit, 0, sizeof *permit);
  memset(out, 0, sizeof *out);
  *in_flight = 0;
  int status = keyed_begin(&k, leases, FSHM_LEASE, key, length, now);
  granted_t g = {k.hash, k.who, 0, alone, false};
  if (status == FSHM_OK && alone) status = word_lower(&k, true, 0, true, &g.dropped);
  if (status == FSHM_OK)
    status =
        semaphore_take_granted(permits, key, length, &g, now, permit, &out->version, in_flight);
  if (status == FSHM_ALLOWED)
    out->remaining = INT64_MAX; /* as fshm_admit() returns for a permit limit alone */
  else
    status = not_granted(&k, permits, refused, key, length, &g, status, in_flight);
  out->status = status;
  return status;
}
