/* scanner.h - splits a text into pieces as the patterns of tiktoken do, without a regular expression.
 *
 * Each scanner returns the end of the piece that begins at p. The pieces cover the text: where one ends, the next
 * begins, and what a piece is depends on nothing before it. So each is a function of (p, end) alone, and looks no
 * further than to the end of the run of characters that follows. Compared with tiktoken over every code point in
 * several contexts: tests/tokens/test_engine.py. The patterns themselves are in tokens/vocabulary.py.
 */
#ifndef FSHM_SCANNER_H
#define FSHM_SCANNER_H

#include "tokens.h"
#include "unicode_classes.h"

/* Classes as sets. */
#define SET(name) (1U << CLASS_##name)
#define LETTERS (SET(UPPER) | SET(LOWER) | SET(BOTH))
#define UPPERS (SET(UPPER) | SET(BOTH) | SET(MARK)) /* [\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}] */
#define LOWERS (SET(LOWER) | SET(BOTH) | SET(MARK)) /* [\p{Ll}\p{Lm}\p{Lo}\p{M}] */
#define SPACES (SET(SPACE) | SET(NEWLINE)) /* \s */
#define SYMBOLS (SET(OTHER) | SET(MARK)) /* [^\s\p{L}\p{N}] */

typedef struct {
  unsigned set; /* its class; 0: the text ends */
  unsigned width; /* bytes; 0: the text ends */
} character_t;

static inline unsigned class_in_block(unsigned block, unsigned last) {
  return block < sizeof class_block / sizeof *class_block
             ? class_blocks[class_block[block] * 64U + last]
             : CLASS_OTHER;
}

/* The character at p. A byte that begins no character is one of its own. */
static inline character_t character_at(const uint8_t *p, const uint8_t *end) {
  size_t left = (size_t)(end - p);
  if (!left) return (character_t){0, 0};
  unsigned c = *p;
  if (likely(c < 0x80)) return (character_t){1U << class_blocks[c], 1};
  if (c < 0xe0 && c >= 0xc2 && left >= 2)
    return (character_t){1U << class_in_block(c & 31, p[1] & 63), 2};
  if (c < 0xf0 && c >= 0xe0 && left >= 3)
    return (character_t){1U << class_in_block((c & 15) << 6 | (p[1] & 63), p[2] & 63), 3};
  if (c < 0xf8 && c >= 0xf0 && left >= 4) {
    unsigned block = (c & 7) << 12 | (p[1] & 63U) << 6 | (p[2] & 63);
    return (character_t){1U << class_in_block(block, p[3] & 63), 4};
  }
  return (character_t){SET(OTHER), 1};
}

/* The end of the run of characters of a set. */
static inline const uint8_t *run_of(unsigned set, const uint8_t *p, const uint8_t *end) {
  for (;;) {
    character_t c = character_at(p, end);
    if (!(c.set & set)) return p;
    p += c.width;
  }
}

/* The bytes of 's, 't, 're and so on at p; 0: it is none. In (?i:) a long s (U+017F) is an s. */
static inline unsigned contraction(const uint8_t *p, const uint8_t *end, bool any_case) {
  size_t left = (size_t)(end - p);
  if (left < 2 || *p != '\'') return 0;
  unsigned first = p[1], second = left > 2 ? p[2] : 0;
  if (any_case && first == 0xc5 && second == 0xbf) return 3;
  if (any_case) first |= first >= 'A' && first <= 'Z' ? 0x20 : 0;
  if (any_case) second |= second >= 'A' && second <= 'Z' ? 0x20 : 0;
  if (first == 's' || first == 'd' || first == 'm' || first == 't') return 2;
  if ((first == 'l' && second == 'l') || (first == 'v' && second == 'e') ||
      (first == 'r' && second == 'e'))
    return 3;
  return 0;
}

/* \s+(?!\S)|\s+, or with `newlines` \s*[\r\n]+|\s+(?!\S)|\s+: what begins with a space. whole_end: \s++$ comes first. */
static inline const uint8_t *spaces_end(const uint8_t *p, const uint8_t *end, bool newlines,
                                        bool whole_end) {
  const uint8_t *last = p, *newline = NULL, *at = p;
  for (;;) {
    character_t c = character_at(at, end);
    if (!(c.set & SPACES)) break;
    last = at;
    at += c.width;
    if (c.set & SET(NEWLINE)) newline = at;
  }
  if (at == end && whole_end) return at;
  if (newlines && newline) return newline;
  return at == end || last == p ? at : last; /* the last space goes to what follows */
}

/* \p{N}{1,3} */
static inline const uint8_t *three_numbers(const uint8_t *p, const uint8_t *end) {
  for (int i = 0; i < 3; i++) {
    character_t c = character_at(p, end);
    if (!(c.set & SET(NUMBER))) break;
    p += c.width;
  }
  return p;
}

/* ' ?[^\s\p{L}\p{N}]+'; p where there is none. */
static inline const uint8_t *symbols_end(const uint8_t *p, const uint8_t *end) {
  const uint8_t *from = p + (*p == ' '), *to = run_of(SYMBOLS, from, end);
  return to == from ? p : to;
}

static inline const uint8_t *scan_r50k(const uint8_t *p, const uint8_t *end) {
  unsigned length = contraction(p, end, false);
  if (length) return p + length;
  const uint8_t *from = p + (*p == ' ');
  character_t c = character_at(from, end);
  if (c.set & LETTERS) return run_of(LETTERS, from, end);
  if (c.set & SET(NUMBER)) return run_of(SET(NUMBER), from, end);
  if (c.set & SYMBOLS) return run_of(SYMBOLS, from, end);
  return spaces_end(p, end, false, true);
}

static inline const uint8_t *scan_cl100k(const uint8_t *p, const uint8_t *end) {
  unsigned length = contraction(p, end, true);
  if (length) return p + length;
  character_t c = character_at(p, end);
  if (c.set & LETTERS) return run_of(LETTERS, p + c.width, end);
  if (c.set & SET(NUMBER)) return three_numbers(p, end);
  if (!(c.set & SET(NEWLINE))) { /* [^\r\n\p{L}\p{N}]?+\p{L}++ */
    const uint8_t *word = p + c.width, *to = run_of(LETTERS, word, end);
    if (to != word) return to;
  }
  const uint8_t *to = symbols_end(p, end);
  if (to == p) return spaces_end(p, end, true, true);
  while (to != end && (*to == '\r' || *to == '\n')) to++;
  return to;
}

/* UPPERS* LOWERS+, or NULL. The regular expression takes all UPPERS, and gives back from the end until LOWERS can
 * match: up to the last character that is in both sets. */
static inline const uint8_t *lower_word(const uint8_t *p, const uint8_t *end) {
  const uint8_t *both = NULL;
  character_t c = character_at(p, end);
  for (; c.set & UPPERS; c = character_at(p, end)) {
    p += c.width;
    if (c.set & LOWERS) both = p;
  }
  return c.set & LOWERS ? run_of(LOWERS, p + c.width, end) : both;
}

/* The two alternatives of words, without the contraction; NULL: it is no word. */
static inline const uint8_t *o200k_word(const uint8_t *p, const uint8_t *end) {
  character_t c = character_at(p, end);
  if (c.set & LETTERS) { /* [^\r\n\p{L}\p{N}]? matches nothing */
    const uint8_t *to = lower_word(p, end);
    return to ? to : run_of(UPPERS, p, end);
  }
  if (c.set & (SET(NUMBER) | SET(NEWLINE))) return NULL;
  const uint8_t *word = p + c.width, *to = lower_word(word, end);
  if (to) return to;
  /* A mark is in both sets too, so that the first alternative matches without a prefix before the second is tried. */
  if (c.set & SET(MARK)) return word;
  to = run_of(UPPERS, word, end);
  return to == word ? NULL : to;
}

static inline const uint8_t *scan_o200k(const uint8_t *p, const uint8_t *end) {
  const uint8_t *to = o200k_word(p, end);
  if (to) return to + contraction(to, end, true);
  if (character_at(p, end).set & SET(NUMBER)) return three_numbers(p, end);
  to = symbols_end(p, end);
  if (to == p) return spaces_end(p, end, true, false);
  while (to != end && (*to == '\r' || *to == '\n' || *to == '/')) to++;
  return to;
}

/* The end of the piece that begins at p < end. */
static inline const uint8_t *piece_end(unsigned pattern, const uint8_t *p, const uint8_t *end) {
  if (pattern == FSHM_PATTERN_R50K) return scan_r50k(p, end);
  if (pattern == FSHM_PATTERN_O200K) return scan_o200k(p, end);
  return scan_cl100k(p, end);
}

#endif
