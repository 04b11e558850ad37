/* limiter.h - the calls of limiter.c, for other files. */
#ifndef FSHM_LIMITER_H
#define FSHM_LIMITER_H

#include "../core/internal.h"

uint64_t limiter_fetch(const fshm_limiter *l, const void *key, uint64_t length);
void limiter_acquire_fetched(fshm_limiter *l, uint64_t hash, const void *key, uint64_t length,
                             const uint64_t *costs, fshm_decision *out);
/* FSHM_ACQUIRE of cost 1, by the limits of another handle of the same name (plans.h). */
void limiter_acquire_plan(fshm_limiter *l, const rule_t *packed, uint64_t hash, const void *key,
                          uint64_t length, fshm_decision *out);
/* A plan of one limit, in the one cache line that such a call takes of it: for callers with many plans. False: it has
 * several. */
bool plan_pack(const own_t *own, rule_t *out);
int limiter_take(fshm_limiter *l, const snapshot_t *snapshot, uint64_t hash, uint32_t op,
                 const void *key, uint64_t key_length, const uint64_t *costs, uint64_t now,
                 fshm_decision *out, fshm_charged *charges);

/* fshm_is_allowed(), with a status of its own if a shared counter decided. */
enum { SHARED_DENIED = -100, SHARED_ALLOWED = -101 };
int limiter_is_allowed(fshm_limiter *l, const void *key, uint64_t key_length);

/* Computes the next state of one limit of a key, for a change that was decided elsewhere (token_lease.c). */
typedef uint64_t change_t(const void *context, uint32_t i, const rule_t *r, uint64_t state,
                          uint64_t now);
int limiter_change(fshm_limiter *l, const void *key, uint64_t length, uint64_t now,
                   change_t *change, const void *context, uint64_t *before, uint64_t *at);

/* The hash of the key in a slot, computed from its name, if that is known whole. */
bool limiter_key_hash(fshm_segment *s, uint32_t index, uint64_t slot, uint64_t *hash);

#endif
