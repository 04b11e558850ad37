/* search.h - the tokens of a piece of any length, without doing its merges. DESIGN.md, "Merging", proves that a sequence
 * of tokens is the result of merging if and only if each token is the result of its own bytes, and each two neighbours
 * stay apart by themselves. So tokens are tried from left to right, and a token that does not fit its left neighbour is
 * replaced by another one. The order in which they are tried changes the time alone.
 */
#ifndef FSHM_SEARCH_H
#define FSHM_SEARCH_H

#include "merging.h"

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
