/* semaphore.h - permits, for other files. */
#ifndef FSHM_SEMAPHORE_H
#define FSHM_SEMAPHORE_H

#include "../core/hash_table.h"
#include "../leasing/permit_lease.h"

/* Free the permits of dead processes in a key's probe windows. True: there is room, look again. */
bool semaphore_free_dead(fshm_segment *s, uint64_t hash, uint64_t who, uint64_t now);

/* Forget the last look at the permits of the key with this hash (its lowest 52 bits): the next call looks at them, and for the dead. */
void semaphore_forget(fshm_segment *s, uint64_t hash);

/* The permit lease of a key, for a taker. */
typedef struct {
  uint64_t hash, who; /* of the slot of its word */
  uint64_t dropped; /* alone: the word after it was dropped */
  uint32_t alone; /* the server is unreachable: at most so many on this host; 0: within the lease */
  bool learned; /* the word is a learned limit (adaptive_rules.h) */
} granted_t;

static inline uint64_t granted_word(const fshm_segment *s, const granted_t *g) {
  found_t f;
  table_find(s, g->hash, g->who, &f);
  return f.pair.who ? f.pair.when : 0;
}

/* FSHM_ASK: not within the lease. */
int semaphore_take_granted(fshm_limiter *l, const void *key, uint64_t length, const granted_t *g,
                           uint64_t now, fshm_permit *out, uint64_t *version, uint32_t *held);
/* Take a permit below the learned limit. *held: as seen, with the permit taken. FSHM_ASK: nothing is learned yet. */
int semaphore_take_learned(fshm_limiter *l, const void *key, uint64_t length, const granted_t *g,
                           uint64_t now, fshm_permit *out, uint64_t *version, uint32_t *held);
/* Count the key's held permits with numbers from `from` on. Frees those of dead processes. */
uint32_t semaphore_count(fshm_limiter *l, const void *key, uint64_t length, uint64_t from);

#endif
