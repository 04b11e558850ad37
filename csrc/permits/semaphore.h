/* semaphore.h - permits, for other files */
#ifndef FSHM_SEMAPHORE_H
#define FSHM_SEMAPHORE_H

#include "../core/hash_table.h"
#include "../leasing/permit_lease.h"

/* semaphore.c: free the permits of dead processes among a key's candidate slots. True: look again. */
bool semaphore_free_dead(fshm_segment *s, uint64_t hash, uint64_t who, uint64_t now);

/* Where permits are granted to this host: the key's permit lease. */
typedef struct {
  uint64_t hash, who; /* of its word's slot */
  uint64_t dropped; /* alone: the word, as it was dropped before */
  uint32_t
      alone; /* at most so many of this host, without the grantor; 0: within the permit lease */
} granted_t;

static inline uint64_t granted_word(const fshm_segment *s, const granted_t *g) {
  found_t f;
  table_find(s, g->hash, g->who, &f);
  return f.pair.who ? f.pair.when : 0;
}

/* FSHM_ASK: not within what is granted. */
int semaphore_take_granted(fshm_limiter *l, const void *key, uint64_t length, const granted_t *g,
                           uint64_t now, fshm_permit *out, uint64_t *version, uint32_t *held);
/* The key's held permits, from this number on. Frees those of dead processes. */
uint32_t semaphore_count(fshm_limiter *l, const void *key, uint64_t length, uint64_t from);

#endif
