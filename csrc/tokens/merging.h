/* merging.h - the tokens of a piece that is no token itself: what merging its bytes by rank ends with, without doing
 * the merges. DESIGN.md, "Merging", proves that a sequence of tokens is that result if and only if each token is the
 * result of its own bytes, and each two neighbours stay apart by themselves. So tokens are tried from left to right,
 * the longest first; a token that does not fit its left neighbour is replaced by the next shorter one.
 */
#ifndef FSHM_MERGING_H
#define FSHM_MERGING_H

#include <stdlib.h>

#include "vocabulary.h"

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

/* Whether merging the bytes of both, side by side, ends with these two. It runs the merges backwards: at each step,
 * left and right are the parts beside the border, and *_until the merge that takes each of them away. */
static inline bool stay_apart(const fshm_vocabulary *v, uint32_t left, uint32_t right,
                              uint64_t *patience) {
  uint32_t left_until = NO_TOKEN, right_until = NO_TOKEN;
  for (int i = 0; i < 2 * FSHM_MAX_TOKEN_LENGTH && *patience; i++, (*patience)--) {
    uint32_t merged = merged_pair(v, left, right);
    if (merged < left_until && merged <= right_until && merged != NO_TOKEN) return false;
    if ((left | right) < 256) return true; /* single bytes */
    if (left > right) { /* the later merge is undone first; of two equal ones, that on the right */
      left_until = left;
      left = WORD(&v->halves[left].right);
    } else {
      right_until = right;
      right = WORD(&v->halves[right].left);
    }
    if (unlikely(left >= v->header.tokens || right >= v->header.tokens)) return true;
  }
  return false;
}

/* Short pieces ------------------------------------------------------------------------------ */

#define MERGED_AT_ONCE 48 /* pieces */
#define PARTS 16 /* more than SHORT_PIECE */
#define NO_MERGE INT32_MAX /* behind all others */

/* A piece of 1 to SHORT_PIECE bytes that is being merged by rank, as tiktoken does. */
typedef struct {
  int32_t merges[PARTS]; /* by the place where a part begins; see merge_at() */
  uint32_t tokens[PARTS];
  unsigned parts; /* a bit for each place where one begins */
  unsigned left, at; /* where the parts of the two new pairs begin */
  uint64_t pairs[2]; /* the part before the new one and it; it and the part behind it */
} merging_t;
#define NO_PAIR UINT64_MAX /* no entry of `pairs` has it */

/* What the part at a place and the one behind it merge to, such that the least is the merge to be done: the number of
 * that token, which compares as ranks do, and then the place, since of equal ones the leftmost is first. */
static inline int32_t merge_at(uint32_t merged, unsigned place) {
  return merged > FSHM_MAX_TOKENS ? NO_MERGE : (int32_t)(merged * PARTS + place);
}

static inline void merge_begin(const fshm_vocabulary *v, merging_t *m, const uint8_t *p,
                               unsigned length) {
  m->parts = (1U << length) - 1;
  for (unsigned i = 0; i < PARTS; i++) m->merges[i] = NO_MERGE;
  for (unsigned i = 0; i < length; i++) {
    m->tokens[i] = NODE_TOKEN(cell_of(v, v->header.root ^ p[i])) - 1;
    if (i + 1 < length) m->merges[i] = merge_at(WORD(&v->bigrams[p[i] << 8 | p[i + 1]]), i);
  }
}

/* Do the next merge, and ask for what tells of the two pairs that it makes. False: there is none. Each merge takes one
 * part away, whatever the file says. */
static inline bool merge_next(const fshm_vocabulary *v, merging_t *m) {
  int32_t least = m->merges[0];
  for (unsigned i = 1; i < PARTS; i++) least = m->merges[i] < least ? m->merges[i] : least;
  if (least == NO_MERGE) return false;
  unsigned at = (unsigned)least % PARTS, token = (unsigned)least / PARTS;
  unsigned before = m->parts & ((1U << at) - 1), behind = m->parts & ~((2U << at) - 1);
  unsigned taken = (unsigned)__builtin_ctz(behind); /* a merge has a part behind it */
  behind &= behind - 1;
  m->parts &= ~(1U << taken);
  m->tokens[at] = token;
  m->at = at;
  m->left = before ? 31 - (unsigned)__builtin_clz(before) : at;
  m->merges[at] = m->merges[taken] = m->merges[m->left] = NO_MERGE;
  m->pairs[0] = before ? pair_of(m->tokens[m->left], token) : NO_PAIR;
  m->pairs[1] = behind ? pair_of(token, m->tokens[__builtin_ctz(behind)]) : NO_PAIR;
  for (int i = 0; i < 2; i++) __builtin_prefetch(filter_word(v, pair_hash(m->pairs[i])));
  return true;
}

/* Of the two pairs, which may merge; and ask for what they merge to. */
static inline void merge_filter(const fshm_vocabulary *v, merging_t *m) {
  for (int i = 0; i < 2; i++) {
    const uint64_t hash = pair_hash(m->pairs[i]);
    const bool may = may_merge(v, hash);
    const uint64_t none = (uint64_t)may - 1; /* all ones where it may not: no branch */
    m->pairs[i] |= none; /* NO_PAIR */
    __builtin_prefetch(&v->pairs[pair_home(v, hash) & ~none]);
  }
}

static inline void merge_look_up(const fshm_vocabulary *v, merging_t *m) {
  for (int i = 0; i < 2; i++) {
    if (m->pairs[i] == NO_PAIR) continue;
    unsigned place = i ? m->at : m->left;
    m->merges[place] = merge_at(found_pair(v, m->pairs[i], pair_hash(m->pairs[i])), place);
  }
}

/* Merge all of them to their ends. Which memory a merge reads is known only when the one before it is done: so there is
 * a merge of each piece in turn, and each step asks for what the next one reads. */
static inline void merge_all(const fshm_vocabulary *v, merging_t *merging, unsigned n) {
  uint8_t going[MERGED_AT_ONCE];
  for (unsigned i = 0; i < n; i++) going[i] = (uint8_t)i;
  while (n) {
    unsigned left = 0;
    for (unsigned i = 0; i < n; i++) {
      going[left] = going[i];
      left += merge_next(v, &merging[going[i]]);
    }
    n = left;
    for (unsigned i = 0; i < n; i++) merge_filter(v, &merging[going[i]]);
    for (unsigned i = 0; i < n; i++) merge_look_up(v, &merging[going[i]]);
  }
}

/* Pieces of any length ---------------------------------------------------------------------- */

/* The memory of a search: the tokens so far, each with its length in the upper 8 bits, and for each place in the piece
 * whether it was given up. */
#define NEAR_LENGTH 4096 /* bytes of a piece whose search needs no allocation */
#define FOUND_TOKEN(found) ((found) & 0xffffff)
#define FOUND_LENGTH(found) ((found) >> 24)

typedef struct {
  uint32_t *found;
  uint8_t *given_up; /* a bit for each place */
} search_t;

/* The next shorter token that this one starts with. */
static inline match_t shorter(const fshm_vocabulary *v, match_t than) {
  uint32_t token = PREFIX_OF(WORD(&v->prefixes[than.token]));
  if (token >= v->header.tokens) return (match_t){NO_TOKEN, 0};
  uint32_t length = LENGTH_OF(WORD(&v->prefixes[token]));
  if (unlikely(!length || length >= than.length)) return (match_t){NO_TOKEN, 0}; /* damaged */
  return (match_t){token, length};
}

/* What to try at `place` after `tried`. before: the token before it, which was tried first if it was tried. */
static inline match_t next_candidate(const fshm_vocabulary *v, const uint8_t *p, size_t place,
                                     size_t length, uint32_t before, match_t tried) {
  match_t next =
      tried.token == before ? longest_match(v, p + place, p + length) : shorter(v, tried);
  return next.token == before && before != NO_TOKEN ? shorter(v, next) : next;
}

/* Whether the token before `place` comes a second time there. */
static inline bool comes_again(const uint8_t *p, size_t place, size_t length, uint32_t size) {
  return p[place] == p[place - size] && length - place >= size &&
         !memcmp(p + place, p + place - size, size);
}

/* Returns the number of tokens in s->found. 0: there are none, which only a damaged file can be the cause of.
 *
 * At each place the token before it is tried first, where it comes again: so long runs of one character are fast, in
 * which many tokens fit for a while. Then all others, the longest first. */
static inline size_t search_tokens(const fshm_vocabulary *v, const uint8_t *p, size_t length,
                                   search_t *s) {
  size_t n = 0, place = 0;
  uint64_t patience = SEARCH_STEPS * ((uint64_t)length + 1);
  match_t next = longest_match(v, p, p + length);
  for (;;) {
    uint32_t before = n ? FOUND_TOKEN(s->found[n - 1]) : NO_TOKEN;
    while (next.token != NO_TOKEN) {
      /* A place that was given up is never right: the tokens before it are the only ones that fit, and nothing fitted
       * behind them. So each place is tried once. */
      size_t to = place + next.length;
      if (!(s->given_up[to / 8] >> (to % 8) & 1) &&
          (!n || stay_apart(v, before, next.token, &patience)))
        break;
      next = next_candidate(v, p, place, length, before, next);
    }
    if (next.token != NO_TOKEN) {
      s->found[n++] = next.length << 24 | next.token;
      place += next.length;
      if (place == length) return n;
      if (!comes_again(p, place, length, next.length))
        next = longest_match(v, p + place, p + length);
      continue;
    }
    if (!n || !patience) return 0;
    s->given_up[place / 8] |= (uint8_t)(1U << (place % 8));
    next = (match_t){before, FOUND_LENGTH(s->found[--n])};
    place -= next.length;
    before = n ? FOUND_TOKEN(s->found[n - 1]) : NO_TOKEN;
    next = next_candidate(v, p, place, length, before, next);
  }
}

#endif
