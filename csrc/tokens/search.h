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
#define FOUND_TOKEN(found) ((found) & 0xfffff)
#define FOUND_LENGTH(found) ((found) >> 24)
#define FOUND_FIRST (1U << 23) /* it was tried before the longest one */
#define FOUND_LAST (1U << 22) /* of a hint: the last one of its window */

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

/* Whether the token before `place` comes a second time there. */
static inline bool comes_again(const uint8_t *p, size_t place, size_t length, uint32_t size) {
  return p[place] == p[place - size] && length - place >= size &&
         !memcmp(p + place, p + place - size, size);
}

/* Hints: windows ---------------------------------------------------------------------------- */

/* Of a long piece of ASCII, the next windows are merged, each by itself and all of them in turn (merge_all). Most tokens
 * of a window are also those of the piece, and they stay apart: so the search takes them as they are, from the first one
 * that fits. */
#define WINDOW (PARTS - 1) /* bytes, at most */
#define LEAST_WINDOW(parts) ((parts) * 11 / 16)
#define LEAST_WINDOWS 4 /* fewer are not worth it */
#define LEAST_WINDOWED ((size_t)LEAST_WINDOWS * LEAST_WINDOW(FEWER_PARTS)) /* bytes that are left */
#define WINDOWS_AT_ONCE 32 /* with their borders, they stay in the nearest cache */
#define SEARCHED_AHEAD (WINDOWS_AT_ONCE * WINDOW)

typedef struct {
  size_t from, until;
  uint32_t tokens
      [SEARCHED_AHEAD]; /* as in `found`, by the place where one begins, less `from`; 0: none begins there */
} hints_t;

/* Whether the next bytes are worth a window: ASCII, and no run of a few characters, in which the search is fast. */
static inline bool is_window(const uint8_t *p, size_t left) {
  uint64_t words[(WINDOW + 7) / 8], all = 0, later;
  if (left < LEAST_WINDOWED) return false;
  memcpy(words, p, sizeof words);
  for (size_t i = 0; i < sizeof words / sizeof *words; i++) all |= words[i];
  if (all & UINT64_C(0x8080808080808080)) return false;
  for (unsigned i = 1; i <= 8; i++) {
    memcpy(&later, p + i, sizeof later);
    if (later == words[0]) return false;
  }
  return true;
}

/* Where a window ends: between two bytes that merge late or never, and so are mostly in two tokens. */
static inline unsigned window_size(const fshm_vocabulary *v, const uint8_t *p, unsigned parts) {
  unsigned best = parts - 1;
  uint32_t latest = 0;
  for (unsigned i = parts - 1; i >= LEAST_WINDOW(parts); i--) {
    uint32_t merged = WORD(&v->bigrams[p[i - 1] << 8 | p[i]]);
    best = merged > latest ? i : best;
    latest = merged > latest ? merged : latest;
  }
  return best;
}

/* The tokens of what was merged, from its first byte on. */
static inline void put_hints(const fshm_vocabulary *v, uint32_t *to, merging_t *m, unsigned size) {
  for (uint64_t parts = m->parts; parts;) {
    unsigned at = (unsigned)__builtin_ctzll(parts);
    parts &= parts - 1;
    unsigned end = parts ? (unsigned)__builtin_ctzll(parts) : size;
    if (unlikely(m->tokens[at] >= v->header.tokens)) m->tokens[at] = 0; /* damaged */
    to[at] = (end - at) << 24 | m->tokens[at] | (parts ? 0 : FOUND_LAST);
  }
}

/* The last bit of `bits`, which has one. */
static inline unsigned last_of(uint64_t bits) { return 63 - (unsigned)__builtin_clzll(bits); }

/* Hints at which a window ends, n of them, by their places: where one stays apart from the next hint, the search goes on
 * there. */
static inline void join_windows(const fshm_vocabulary *v, hints_t *h, const uint32_t *places,
                                unsigned n, uint64_t *patience) {
  border_t borders[BORDERS_AT_ONCE];
  uint32_t *ends[BORDERS_AT_ONCE];
  unsigned asked = 0;
  for (unsigned i = 0; i < n; i++) {
    uint32_t *end = &h->tokens[places[i]], *next = end + FOUND_LENGTH(*end);
    if (!(*end & FOUND_LAST) || !*next) continue; /* another window, merged later, covers it */
    ends[asked] = end;
    borders[asked++] = border_between(FOUND_TOKEN(*end), FOUND_TOKEN(*next));
  }
  for (uint64_t apart = which_stay_apart(v, borders, asked, patience); apart; apart &= apart - 1)
    *ends[__builtin_ctzll(apart)] &= ~FOUND_LAST;
}

/* Two windows whose tokens do not stay apart: what is to be merged again, with two tokens of each. False: it is too long,
 * or one of them has fewer than four. */
static inline bool border_of(const merging_t *left, unsigned left_size, const merging_t *right,
                             unsigned *before, unsigned *size) {
  if (__builtin_popcountll(left->parts) < 4 || __builtin_popcountll(right->parts) < 4) return false;
  unsigned from = last_of(left->parts & ~(UINT64_C(1) << last_of(left->parts)));
  uint64_t behind = right->parts & (right->parts - 1);
  unsigned to = (unsigned)__builtin_ctzll(behind & (behind - 1));
  *before = left_size - from;
  *size = *before + to;
  return *size < FEWER_PARTS;
}

/* False: there are none. parts: a constant, for which it is compiled. */
static inline __attribute__((always_inline)) bool hint_windows_of(const fshm_vocabulary *v,
                                                                  const uint8_t *p, size_t place,
                                                                  size_t length, hints_t *h,
                                                                  uint64_t *patience,
                                                                  const unsigned parts) {
  merging_t merging[WINDOWS_AT_ONCE], again[WINDOWS_AT_ONCE];
  unsigned sizes[WINDOWS_AT_ONCE], begins[WINDOWS_AT_ONCE], again_sizes[WINDOWS_AT_ONCE];
  uint32_t ends[2 * WINDOWS_AT_ONCE];
  unsigned n = 0, at = 0, again_n = 0, joins = 0;
  for (; n < WINDOWS_AT_ONCE && is_window(p + place + at, length - place - at); n++) {
    sizes[n] = window_size(v, p + place + at, parts);
    at += sizes[n];
  }
  if (n < LEAST_WINDOWS) return false;
  h->from = place;
  h->until = place + at;
  p += place;
  memset(h->tokens, 0, at * sizeof *h->tokens);
  at = 0;
  for (unsigned i = 0; i < n; at += sizes[i++])
    merge_begin(v, &merging[i], p + at, sizes[i], parts);
  merge_all(v, merging, n, parts);
  at = 0;
  for (unsigned i = 0; i < n; at += sizes[i++]) {
    put_hints(v, &h->tokens[at], &merging[i], sizes[i]);
    ends[i] = at + last_of(merging[i].parts);
  }
  join_windows(v, h, ends, n - 1, patience);
  at = 0;
  for (unsigned i = 0; i + 1 < n; i++) {
    unsigned before, size, from = at;
    at += sizes[i];
    if (!(h->tokens[ends[i]] & FOUND_LAST) ||
        !border_of(&merging[i], sizes[i], &merging[i + 1], &before, &size))
      continue;
    begins[again_n] = at - before;
    again_sizes[again_n] = size;
    merge_begin(v, &again[again_n++], p + at - before, size, FEWER_PARTS);
    uint64_t kept = merging[i].parts & ((UINT64_C(1) << (sizes[i] - before)) - 1);
    ends[joins++] = from + last_of(kept);
    h->tokens[from + last_of(kept)] |= FOUND_LAST;
  }
  merge_all(v, again, again_n, FEWER_PARTS);
  for (unsigned i = 0; i < again_n; i++) {
    uint32_t *to = &h->tokens[begins[i]];
    memset(to, 0, again_sizes[i] * sizeof *to);
    put_hints(v, to, &again[i], again_sizes[i]);
    ends[joins++] = begins[i] + last_of(again[i].parts);
  }
  join_windows(v, h, ends, joins, patience);
  return true;
}

/* Long windows have fewer borders. But there must be some windows. */
static __attribute__((noinline)) bool hint_short_windows(const fshm_vocabulary *v, const uint8_t *p,
                                                         size_t place, size_t length, hints_t *h,
                                                         uint64_t *patience) {
  return hint_windows_of(v, p, place, length, h, patience, FEWER_PARTS);
}
static __attribute__((noinline)) bool hint_windows(const fshm_vocabulary *v, const uint8_t *p,
                                                   size_t place, size_t length, hints_t *h,
                                                   uint64_t *patience) {
  return hint_windows_of(v, p, place, length, h, patience, PARTS);
}

/* The search -------------------------------------------------------------------------------- */

/* A search on its way: n tokens are found, and they end at `place`. */
typedef struct {
  const fshm_vocabulary *v;
  const uint8_t *p;
  size_t length, place, n;
  uint32_t tried; /* the token that was tried first at this place, and does not fit */
  uint64_t patience;
  search_t *s;
} searching_t;

static inline uint32_t last_token(const searching_t *g) {
  return g->n ? FOUND_TOKEN(g->s->found[g->n - 1]) : NO_TOKEN;
}

static inline bool is_given_up(const searching_t *g, size_t place) {
  return g->s->given_up[place / 8] >> (place % 8) & 1;
}

/* Whether a token may come next. A place that was given up is never right: the tokens before it are the only ones that
 * fit, and nothing fitted behind them. So each place is tried once. */
static inline bool fits_next(searching_t *g, match_t next, uint32_t before) {
  return !is_given_up(g, g->place + next.length) &&
         (!g->n || stay_apart(g->v, before, next.token, &g->patience));
}

static inline void take_token(searching_t *g, uint32_t found) {
  g->s->found[g->n++] = found;
  g->place += FOUND_LENGTH(found);
}

/* The first of `next` and those shorter ones that it begins with that fits; NO_TOKEN: none. */
static inline match_t longest_fitting(searching_t *g, match_t next, uint32_t before) {
  while (next.token != NO_TOKEN && (next.token == g->tried || !fits_next(g, next, before)))
    next = shorter(g->v, next);
  return next;
}

static inline bool hint_next(searching_t *g, hints_t *h) {
  if (g->length - g->place < (size_t)LEAST_WINDOWS * PARTS)
    return hint_short_windows(g->v, g->p, g->place, g->length, h, &g->patience);
  return hint_windows(g->v, g->p, g->place, g->length, h, &g->patience);
}

/* Hints: characters ------------------------------------------------------------------------- */

/* A character above ASCII: what its bytes merge to by themselves; 0: it is not known. width: how many bytes. */
static inline uint64_t character_at_place(const searching_t *g, size_t place, unsigned *width) {
  if (g->length - place < 4) return 0;
  const uint8_t *p = g->p + place;
  unsigned second = p[1] ^ 0x80U, third = p[2] ^ 0x80U, fourth = p[3] ^ 0x80U, index;
  if (p[0] < FIRST_LEAD || second > 63) return 0;
  if (p[0] < 0xe0) {
    *width = 2;
    return WORD(&g->v->characters[(p[0] & 31U) << 6 | second]);
  }
  if (third > 63) return 0;
  if (p[0] < 0xf0) {
    *width = 3;
    index = (p[0] & 15U) << 12 | second << 6 | third;
    return index < 0x800 ? 0 : WORD(&g->v->characters[index]);
  }
  if (p[0] != 0xf0 || second != 31 || fourth > 63) return 0;
  *width = 4;
  return WORD(&g->v->characters[65536 + (third << 6 | fourth)]);
}

/* Take the tokens of the characters that follow, behind nothing or a byte above ASCII, as long as it is known of each that it merges with neither of its
 * neighbours. False: none was taken. */
static inline bool take_characters(searching_t *g) {
  unsigned width = 0, next_width = 0;
  uint64_t c = character_at_place(g, g->place, &width), next;
  bool apart = !g->n, any = false;
  for (; c; c = next, width = next_width) {
    apart |= (c & CHARACTER_FIRST) != 0; /* what is before is above ASCII too */
    next = g->length - g->place > width ? character_at_place(g, g->place + width, &next_width) : 0;
    if (!apart || !((c & CHARACTER_LAST) | (next & CHARACTER_FIRST))) return any;
    unsigned n = CHARACTER_COUNT(c), singles = 0, at = 0;
    uint32_t found[3];
    for (unsigned i = 0; i < n; i++) singles += CHARACTER_TOKEN(c, i) < 256;
    for (unsigned i = 0; i < n; i++) {
      uint32_t token = CHARACTER_TOKEN(c, i);
      uint32_t size = token < 256 ? 1 : (width - singles) / (n - singles);
      found[i] = size << 24 | FOUND_FIRST | token;
      at += size;
      if (unlikely(token >= g->v->header.tokens || !size)) return any; /* damaged */
      if (is_given_up(g, g->place + at)) return any;
    }
    if (unlikely(at != width)) return any; /* damaged */
    for (unsigned i = 0; i < n; i++) take_token(g, found[i]);
    apart = c & CHARACTER_LAST;
    any = true;
  }
  return any;
}

/* Take what is tried first at a place: the token before, if it comes again there, so that long runs of one character are
 * fast; or a hint, and then all others of its window. False: there is nothing, or it does not fit. */
static inline bool take_first(searching_t *g, hints_t *h) {
  uint32_t before = last_token(g);
  size_t place = g->place;
  g->tried = NO_TOKEN;
  if (g->p[place] >= FIRST_LEAD && (!place || g->p[place - 1] >= 0x80) && take_characters(g))
    return true;
  if (place >= h->until || place < h->from || !h->tokens[place - h->from]) {
    uint32_t size = g->n ? FOUND_LENGTH(g->s->found[g->n - 1]) : 0;
    if (size && comes_again(g->p, place, g->length, size)) {
      match_t again = {before, size};
      g->tried = before;
      if (!fits_next(g, again, before)) return false;
      take_token(g, size << 24 | FOUND_FIRST | before);
      return true;
    }
    if (place < h->until || g->length - place < LEAST_WINDOWED ||
        (g->p[place] | g->p[place + 1]) & 0x80)
      return false;
    if (!hint_next(g, h)) return false;
  }
  const uint32_t *hint = &h->tokens[place - h->from];
  match_t next = {FOUND_TOKEN(*hint), FOUND_LENGTH(*hint)};
  g->tried = next.token;
  if (!fits_next(g, next, before)) return false;
  for (;;) {
    uint32_t found = *hint;
    take_token(g, (found & ~FOUND_LAST) | FOUND_FIRST);
    hint += FOUND_LENGTH(found);
    if (found & FOUND_LAST || is_given_up(g, g->place + FOUND_LENGTH(*hint))) return true;
  }
}

/* Returns the number of tokens in s->found. 0: there are none, which only a damaged file can be the cause of. */
static inline size_t search_tokens(const fshm_vocabulary *v, const uint8_t *p, size_t length,
                                   search_t *s) {
  searching_t g = {v, p, length, 0, 0, NO_TOKEN, SEARCH_STEPS * ((uint64_t)length + 1), s};
  hints_t h;
  h.from = h.until = 0;
  while (g.place != length) {
    if (take_first(&g, &h)) continue;
    uint32_t before = last_token(&g);
    match_t next = longest_fitting(&g, longest_match(v, p + g.place, p + length), before);
    while (next.token == NO_TOKEN) { /* a step back */
      if (!g.n || !g.patience) return 0;
      s->given_up[g.place / 8] |= (uint8_t)(1U << (g.place % 8));
      uint32_t last = s->found[--g.n];
      g.tried = NO_TOKEN;
      g.place -= FOUND_LENGTH(last);
      before = last_token(&g);
      next = last & FOUND_FIRST ? longest_match(v, p + g.place, p + length)
                                : shorter(v, (match_t){FOUND_TOKEN(last), FOUND_LENGTH(last)});
      next = longest_fitting(&g, next, before);
    }
    take_token(&g, next.length << 24 | next.token);
  }
  return g.n;
}

#endif
