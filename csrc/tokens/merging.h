/* merging.h - what two tokens merge to, whether they stay apart, and many short pieces merged by rank, in turn.
 * DESIGN.md, "Merging".
 */
#ifndef FSHM_MERGING_H
#define FSHM_MERGING_H

#include <stdlib.h>

#include "vocabulary.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

/* Steps back that a search may take for each byte of its piece. Only a damaged file needs more. */
#define SEARCH_STEPS 4096

/* A word of the file, read once: it may change between two reads. */
#define WORD(at) __atomic_load_n((at), __ATOMIC_RELAXED)

static inline uint64_t cell_of(const fshm_vocabulary *v, uint32_t at) {
  return likely(at < v->header.cells) ? WORD(&v->nodes[at]) : 0;
}

typedef struct {
  uint32_t token,
      length; /* the longest token that merging can yield; NO_TOKEN: the file is damaged */
} match_t;

/* What the text [p, end) begins with. */
static inline match_t longest_match(const fshm_vocabulary *v, const uint8_t *p,
                                    const uint8_t *end) {
  match_t out = {NO_TOKEN, 0};
  uint32_t base = v->header.root;
  const uint8_t *at = p;
  uint64_t cell = 0;
  for (; at != end && at - p < FSHM_MAX_TOKEN_LENGTH; at++) {
    cell = cell_of(v, base ^ *at);
    if ((cell & 0x1ff) != (NODE_USED | *at)) return out;
    base = NODE_BASE(cell);
    uint32_t token = NODE_TOKEN(cell);
    if (token && token <= v->header.tokens && !(cell & NODE_WHOLE_ONLY)) {
      out.token = token - 1;
      out.length = (uint32_t)(at - p) + 1;
    }
  }
  return out;
}

/* The token that is the whole piece, also one that merging cannot yield; NO_TOKEN: there is none. */
static inline uint32_t whole_token(const fshm_vocabulary *v, const uint8_t *p, size_t length) {
  uint32_t base = v->header.root;
  uint64_t cell = 0;
  if (length > v->header.most_length) return NO_TOKEN;
  for (size_t i = 0; i < length; i++) {
    cell = cell_of(v, base ^ p[i]);
    if ((cell & 0x1ff) != (NODE_USED | p[i])) return NO_TOKEN;
    base = NODE_BASE(cell);
  }
  uint32_t token = NODE_TOKEN(cell);
  return token && token <= v->header.tokens ? token - 1 : NO_TOKEN;
}

static inline uint64_t pair_of(uint32_t left, uint32_t right) {
  return (uint64_t)left << 20 | right;
}

/* Whether the pair with this hash may merge. Mostly not, and then it does not. */
static inline const uint64_t *filter_word(const fshm_vocabulary *v, uint64_t hash) {
  return &v->filter[hash >> (62 - v->header.pair_bits) >> 6];
}
static inline bool may_merge(const fshm_vocabulary *v, uint64_t hash) {
  return WORD(filter_word(v, hash)) >> (hash >> (62 - v->header.pair_bits) & 63) & 1;
}

/* The first entry of `pairs` that may be of the pair with this hash. */
static inline uint64_t pair_home(const fshm_vocabulary *v, uint64_t hash) {
  return hash >> (64 - v->header.pair_bits);
}

/* What a pair that may merge merges to; NO_TOKEN: nothing. */
static inline uint32_t found_pair(const fshm_vocabulary *v, uint64_t pair, uint64_t hash) {
  uint64_t mask = (UINT64_C(1) << v->header.pair_bits) - 1, at = pair_home(v, hash);
  for (int i = 0; i < PROBES; i++, at = (at + 1) & mask) {
    uint64_t seen = WORD(&v->pairs[at]);
    if (seen >> 24 == pair) return (uint32_t)seen & 0xffffff;
    if (seen == PAIR_EMPTY) break;
  }
  return NO_TOKEN;
}

/* What two neighbours merge to; NO_TOKEN: nothing. */
static inline uint32_t merged_pair(const fshm_vocabulary *v, uint32_t left, uint32_t right) {
  uint64_t pair = pair_of(left, right), hash = pair_hash(pair);
  return likely(!may_merge(v, hash)) ? NO_TOKEN : found_pair(v, pair, hash);
}

/* Two neighbours, whose merges are run backwards: left and right are the parts beside their border, and *_until the merge
 * that takes each of them away. */
typedef struct {
  uint32_t left, right, left_until, right_until;
} border_t;

static inline border_t border_between(uint32_t left, uint32_t right) {
  return (border_t){left, right, NO_TOKEN, NO_TOKEN};
}

enum { MERGED, APART, UNDECIDED };

/* One merge back. Each takes one byte away from a side at least, so there are fewer than UNDONE. */
#define UNDONE (2 * FSHM_MAX_TOKEN_LENGTH)
static inline int undo_merge(const fshm_vocabulary *v, border_t *b) {
  const uint32_t merged = merged_pair(v, b->left, b->right);
  if (merged < b->left_until && merged <= b->right_until && merged != NO_TOKEN) return MERGED;
  if ((b->left | b->right) < 256) return APART; /* single bytes */
  if (b->left > b->right) { /* the later one first; of two equal ones, that on the right */
    b->left_until = b->left;
    b->left = WORD(&v->halves[b->left].right);
  } else {
    b->right_until = b->right;
    b->right = WORD(&v->halves[b->right].left);
  }
  const bool damaged = b->left >= v->header.tokens || b->right >= v->header.tokens;
  return unlikely(damaged) ? APART : UNDECIDED;
}

/* Whether merging the bytes of both, side by side, ends with these two. */
static inline bool stay_apart(const fshm_vocabulary *v, uint32_t left, uint32_t right,
                              uint64_t *patience) {
  border_t b = border_between(left, right);
  for (int i = 0; i < UNDONE && *patience; i++, (*patience)--) {
    int found = undo_merge(v, &b);
    if (found != UNDECIDED) return found == APART;
  }
  return false;
}

#define BORDERS_AT_ONCE 64 /* a bit each */

/* Of each, whether its two stay apart: a bit. There is one step of each in turn, and each asks for what the next one
 * reads. */
static inline uint64_t which_stay_apart(const fshm_vocabulary *v, border_t *borders, unsigned n,
                                        uint64_t *patience) {
  uint8_t going[BORDERS_AT_ONCE];
  uint64_t apart = 0;
  for (unsigned i = 0; i < n; i++) going[i] = (uint8_t)i;
  for (int steps = 0; n && steps < UNDONE && *patience >= n; steps++) {
    unsigned left = 0;
    *patience -= n;
    for (unsigned i = 0; i < n; i++) {
      const border_t *b = &borders[going[i]];
      __builtin_prefetch(filter_word(v, pair_hash(pair_of(b->left, b->right))));
      __builtin_prefetch(&v->halves[b->left > b->right ? b->left : b->right]);
    }
    for (unsigned i = 0; i < n; i++) {
      const unsigned at = going[i];
      const int found = undo_merge(v, &borders[at]);
      going[left] = (uint8_t)at;
      left += found == UNDECIDED;
      apart |= (uint64_t)(found == APART) << at;
    }
    n = left;
  }
  return apart;
}

/* Many short pieces ------------------------------------------------------------------------- */

#define MERGED_AT_ONCE 48 /* pieces */
#define PARTS 64 /* a place each. Looked at are as many of them as the length asks for: */
#define SHORT_PARTS 16 /* of a piece of up to SHORT_PIECE bytes */
#define FEWER_PARTS 32 /* of a short window, and of the border of two windows */

/* A piece of 1 to PARTS - 1 bytes that is being merged by rank, as tiktoken does. */
typedef struct {
  _Alignas(16) uint32_t merges[PARTS]; /* by the place where a part begins; see merge_at() */
  uint32_t tokens[PARTS];
  uint64_t parts; /* a bit for each place where one begins */
  uint32_t left, at; /* where the parts of the two new pairs begin */
  uint64_t pairs[2]; /* the part before the new one and it; it and the part behind it */
} merging_t;
#define NO_PAIR UINT64_MAX /* no entry of `pairs` has it */

/* What the part at a place and the one behind it merge to, such that the least is the merge to be done: the number of
 * that token, which compares as ranks do, and then the place, since of equal ones the leftmost is first. As bits of a
 * float these compare alike, since they are those of positive normal numbers: SSE2 has a minimum of floats alone. */
#define SOME_MERGE 0x40000000U
#define NO_MERGE 0x7f7fffffU /* behind all others: FLT_MAX */
static inline uint32_t merge_at(uint32_t merged, unsigned place) {
  return merged > FSHM_MAX_TOKENS ? NO_MERGE : SOME_MERGE | (merged * PARTS + place);
}

static inline uint32_t least_merge(const uint32_t *merges, unsigned parts) {
#if defined(__SSE2__)
  const float *at = (const float *)(const void *)merges;
  __m128 least = _mm_load_ps(at);
  for (unsigned i = 4; i < parts; i += 4) least = _mm_min_ps(least, _mm_load_ps(at + i));
  least = _mm_min_ps(least, _mm_movehl_ps(least, least));
  least = _mm_min_ps(least, _mm_shuffle_ps(least, least, 1));
  return (uint32_t)_mm_cvtsi128_si32(_mm_castps_si128(least));
#else
  uint32_t least = merges[0];
  for (unsigned i = 1; i < parts; i++) least = merges[i] < least ? merges[i] : least;
  return least;
#endif
}

static inline void merge_begin(const fshm_vocabulary *v, merging_t *m, const uint8_t *p,
                               unsigned length, unsigned parts) {
  m->parts = (UINT64_C(1) << length) - 1;
  for (unsigned i = 0; i < parts; i++) m->merges[i] = NO_MERGE;
  for (unsigned i = 0; i < length; i++) {
    m->tokens[i] = NODE_TOKEN(cell_of(v, v->header.root ^ p[i])) - 1;
    if (i + 1 < length) m->merges[i] = merge_at(WORD(&v->bigrams[p[i] << 8 | p[i + 1]]), i);
  }
}

/* Do the next merge, and ask for what tells of the two pairs that it makes. False: there is none. Each merge takes one
 * part away, whatever the file says. */
static inline bool merge_next(const fshm_vocabulary *v, merging_t *m, unsigned parts) {
  uint32_t least = least_merge(m->merges, parts);
  if (least == NO_MERGE) return false;
  unsigned at = least % PARTS, token = (least ^ SOME_MERGE) / PARTS;
  uint64_t before = m->parts & ((UINT64_C(1) << at) - 1),
           behind = m->parts & ~(((UINT64_C(1) << at) << 1) - 1);
  unsigned taken = (unsigned)__builtin_ctzll(behind); /* a merge has a part behind it */
  behind &= behind - 1;
  m->parts &= ~(UINT64_C(1) << taken);
  m->tokens[at] = token;
  m->at = at;
  m->left = before ? 63 - (unsigned)__builtin_clzll(before) : at;
  m->merges[at] = m->merges[taken] = m->merges[m->left] = NO_MERGE;
  m->pairs[0] = before ? pair_of(m->tokens[m->left], token) : NO_PAIR;
  m->pairs[1] = behind ? pair_of(token, m->tokens[__builtin_ctzll(behind)]) : NO_PAIR;
  for (int i = 0; i < 2; i++) __builtin_prefetch(filter_word(v, pair_hash(m->pairs[i])));
  return true;
}

/* A pair that may merge, and where it is told what it merges to. */
typedef struct {
  uint64_t pair;
  uint32_t *merge;
  unsigned place;
} asked_t;

/* Of the two pairs, which may merge: note them, and ask for what they merge to. No branch. */
static inline unsigned merge_filter(const fshm_vocabulary *v, merging_t *m, asked_t *asked) {
  unsigned n = 0;
  for (int i = 0; i < 2; i++) {
    const uint64_t hash = pair_hash(m->pairs[i]);
    const bool may = may_merge(v, hash);
    unsigned place = i ? m->at : m->left;
    asked[n] = (asked_t){m->pairs[i], &m->merges[place], place};
    n += may;
    __builtin_prefetch(&v->pairs[pair_home(v, hash) & -(uint64_t)may]);
  }
  return n;
}

/* Merge all of them to their ends. Which memory a merge reads is known only when the one before it is done: so there is
 * a merge of each piece in turn, and each step asks for what the next one reads. */
static inline __attribute__((always_inline)) void merge_all(const fshm_vocabulary *v,
                                                            merging_t *merging, unsigned n,
                                                            unsigned parts) {
  uint8_t going[MERGED_AT_ONCE];
  asked_t asked[2 * MERGED_AT_ONCE];
  for (unsigned i = 0; i < n; i++) going[i] = (uint8_t)i;
  while (n) {
    unsigned left = 0, pairs = 0;
    for (unsigned i = 0; i < n; i++) {
      going[left] = going[i];
      left += merge_next(v, &merging[going[i]], parts);
    }
    n = left;
    for (unsigned i = 0; i < n; i++) pairs += merge_filter(v, &merging[going[i]], &asked[pairs]);
    for (unsigned i = 0; i < pairs; i++)
      *asked[i].merge =
          merge_at(found_pair(v, asked[i].pair, pair_hash(asked[i].pair)), asked[i].place);
  }
}

#endif
