/* per_call.h - a key of a limiter, for calls that pass their limit. */
#ifndef FSHM_PER_CALL_H
#define FSHM_PER_CALL_H

#include "../core/hash_table.h"
#include "../limits/limits.h"

typedef struct {
  fshm_segment *s;
  uint32_t index, counters; /* of the limiter */
  bool fixed; /* the caller gave the time */
  uint64_t hash, who, now;
} keyed_t;

int keyed_begin(keyed_t *k, const fshm_limiter *l, uint32_t kind, const void *key, uint64_t length,
                uint64_t now);
int keyed_at(keyed_t *k, fshm_segment *s, uint64_t slot, uint32_t kind, uint64_t now);
uint64_t keyed_now(const keyed_t *k);
int keyed_put(const keyed_t *k, uint64_t home, found_t *f, uint64_t who, uint64_t next,
              first_state_t *first, void *context);
void keyed_tell(const keyed_t *k, const found_t *f, const void *key, uint64_t length, int status);
void counted_peek(const keyed_t *k, const fshm_limit *limit, fshm_decision *out);

#endif
