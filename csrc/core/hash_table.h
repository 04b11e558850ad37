/* hash_table.h - the hash table: its calls, and the part of a look-up that is inlined into each call. */
#ifndef FSHM_HASH_TABLE_H
#define FSHM_HASH_TABLE_H

#include "wall.h"

typedef struct {
  uint64_t slot;
  pair_t pair; /* as read; who = 0: the key has no slot */
} found_t;

/* CLAIM_LOST: another process changed the slot, look again. */
enum { CLAIMED = 1, CLAIM_LOST = 0, CLAIM_FULL = -1 };

void table_find(const fshm_segment *s, uint64_t hash, uint64_t who, found_t *f);
/* Computes the first state of a new slot, as of now. NO_STATE: the slot must not be claimed on what the caller knows. */
typedef uint64_t first_state_t(void *context);

int table_claim(fshm_segment *s, uint64_t hash, uint64_t who, uint64_t now, first_state_t *first,
                void *context, uint64_t *slot);
bool table_has(const fshm_segment *s, uint64_t hash, uint64_t who);
bool table_room(const fshm_segment *s, uint64_t hash, uint64_t who, uint64_t now);
void table_clear(fshm_segment *s, uint64_t slot, uint64_t who);
uint64_t table_probe_count(const fshm_segment *s);
uint64_t table_probe(const fshm_segment *s, uint64_t hash, uint64_t i);

/* A key can have many slots: one for each permit, or for each token in a moving window. The n-th has its own hash and
 * fingerprint. Numbers 4k .. 4k+3 have the same home line. hash, key_who: of the key. */
#define NTH_STEP UINT64_C(0xa24baed4963ee407)
static inline uint64_t spread(uint64_t x) { /* murmur3's finaliser */
  x = (x ^ x >> 33) * UINT64_C(0xff51afd7ed558ccd);
  x = (x ^ x >> 33) * UINT64_C(0xc4ceb9fe1a85ec53);
  return x ^ x >> 33;
}
static inline uint64_t nth_hash(uint64_t hash, uint32_t n) {
  return spread(hash + (n / SLOTS_PER_LINE + 1) * UINT64_C(0x9e3779b97f4a7c15));
}
static inline uint64_t nth_who(uint64_t key_who, uint32_t n) {
  uint64_t who = spread(key_who ^ NTH_STEP * (n + 1));
  return who + !who;
}

/* The probe windows of a key: their number, their length in lines, and the line where each begins. */
static inline unsigned probe_windows(const fshm_segment *s) {
  return s->lines <= 2 * PROBE_LINES ? 1 : 2;
}
static inline uint64_t probe_lines(const fshm_segment *s) {
  return s->lines <= 2 * PROBE_LINES ? s->lines : PROBE_LINES;
}
static inline uint64_t probe_start(const fshm_segment *s, uint64_t hash, unsigned window) {
  return ((window ? hash & UINT32_MAX : hash >> 32) * s->lines) >> 32;
}
/* The next line of the same probe window. */
static inline uint64_t line_after(const fshm_segment *s, uint64_t line) {
  return line ^ (((line + 1) ^ line) & s->probe_mask);
}

/* May a slot be the key's? */
static inline unsigned is_at(const fshm_segment *s, uint64_t slot, uint64_t who) {
  return same_key(load_relaxed(&s->slots[slot].who), who);
}
/* May a slot of this line be the key's? Each slot is read once, in any order, without a branch for each: most slots
 * that a look-up reads belong to other keys. */
static_assert(SLOTS_PER_LINE == 4, "four are looked at");
#if defined(__SSE2__)
/* The `who` of two slots. */
static inline __m128i two_whos(const slot_t *at) {
  const void *one = &at[0].who, *two = &at[1].who;
  __m128i out;
  __asm__ __volatile__("movq %1, %0\n\tmovhps %2, %0"
                       : "=x"(out)
                       : "m"(*(const volatile uint64_t *)one),
                         "m"(*(const volatile uint64_t *)two));
  return out;
}
/* In which of two lanes the upper half of a `who` is this one, which the label and the epoch are not in: of 4 billion
 * other keys one has it too, and the caller looks closer. */
#define UPPER_HALVES 0xa
static_assert(!(WHO_LABELS >> 32), "the upper half is the key's alone");
#endif
static inline bool line_has(const fshm_segment *s, uint64_t first, uint64_t who) {
#if defined(__SSE2__)
  const __m128i key = _mm_set1_epi64x((long long)who);
  const __m128i one = _mm_cmpeq_epi32(two_whos(&s->slots[first]), key);
  const __m128i two = _mm_cmpeq_epi32(two_whos(&s->slots[first + 2]), key);
  return _mm_movemask_ps(_mm_castsi128_ps(_mm_or_si128(one, two))) & UPPER_HALVES;
#else
  return is_at(s, first, who) | is_at(s, first + 1, who) | is_at(s, first + 2, who) |
         is_at(s, first + 3, who);
#endif
}
/* How many slots of a line are of a key: one of a `who` without an upper half counts as empty. */
static inline unsigned line_used(const fshm_segment *s, uint64_t first) {
#if defined(__SSE2__)
  const __m128i none = _mm_setzero_si128();
  const __m128i one = _mm_cmpeq_epi32(two_whos(&s->slots[first]), none);
  const __m128i two = _mm_cmpeq_epi32(two_whos(&s->slots[first + 2]), none);
  const __m128i both = _mm_shuffle_epi32(_mm_add_epi32(one, two), 0xd); /* -1 for each empty one */
  return SLOTS_PER_LINE +
         (unsigned)_mm_cvtsi128_si32(_mm_add_epi32(both, _mm_srli_epi64(both, 32)));
#else
  unsigned used = 0;
  for (unsigned k = 0; k < SLOTS_PER_LINE; k++) used += load_relaxed(&s->slots[first + k].who) != 0;
  return used;
#endif
}

/* acquire: pairs with the swap that wrote the slot. `who` alone is a hint; the pair decides. */
static inline HOT bool confirmed_at(const fshm_segment *s, uint64_t slot, uint64_t who,
                                    pair_t *pair) {
  if (load_relaxed(&s->slots[slot].who) != who) return false;
  *pair = likely(!s->read_only) ? pair_load(&s->slots[slot]) : pair_peek(&s->slots[slot]);
  return pair->who == who && !IS_PENDING(pair->when);
}

void table_find_further(const fshm_segment *s, uint64_t hash, uint64_t who, found_t *f);
void table_near(const fshm_segment *s, uint64_t slot, uint64_t who, found_t *f);

static inline HOT bool table_find_home(const fshm_segment *s, uint64_t hash, uint64_t who,
                                       found_t *f) {
  uint64_t first = probe_start(s, hash, 0) * SLOTS_PER_LINE;
  for (unsigned k = 0; k < SLOTS_PER_LINE; k++) {
    if (likely(confirmed_at(s, first + k, who, &f->pair))) {
      f->slot = first + k;
      return true;
    }
  }
  return false;
}
static inline HOT void table_find_inline(const fshm_segment *s, uint64_t hash, uint64_t who,
                                         found_t *f) {
  if (unlikely(!table_find_home(s, hash, who, f))) table_find_further(s, hash, who, f);
}

/* Prefetch the key's home line, where most keys are. */
static inline void table_prefetch(const fshm_segment *s, uint64_t hash) {
  __builtin_prefetch(&s->slots[probe_start(s, hash, 0) * SLOTS_PER_LINE], 1);
}
/* The same, of a slot that will hardly be written. */
static inline void table_prefetch_read(const fshm_segment *s, uint64_t hash) {
  __builtin_prefetch(&s->slots[probe_start(s, hash, 0) * SLOTS_PER_LINE]);
}
/* Prefetch the line of its key statistics, for the end of the call. */
static inline void table_prefetch_stats(const fshm_segment *s, uint64_t hash) {
  __builtin_prefetch(&s->key_stats[probe_start(s, hash, 0) * SLOTS_PER_LINE], 1);
}

#endif
