/* blocks.h - splits ASCII, many pieces at a time: each rule of a pattern is an operation on masks of 64 bits, in which
 * bit i tells of byte i. The result is what scan_cl100k() and scan_o200k() of scanner.h say one by one:
 * tests/c/test_tokens.c compares them. For machines with SSE2.
 */
#ifndef FSHM_BLOCKS_H
#define FSHM_BLOCKS_H

#include "scanner.h"

#if defined(__SSE2__)
#include <emmintrin.h>

#define BLOCK \
  64 /* bytes that are looked at together; of the last one, nothing is taken to be known */
#define BIT(i) (UINT64_C(1) << (i))

/* Which bytes of a block are of that kind. */
typedef struct {
  uint64_t letters, capitals, digits, spaces, controls, newlines, slashes, apostrophes;
} kinds_t;

static inline HOT __m128i in_range(__m128i bytes, uint8_t first, uint8_t last) {
  return _mm_cmpgt_epi8(_mm_add_epi8(bytes, _mm_set1_epi8((char)(127 - last))),
                        _mm_set1_epi8((char)(126 - (last - first))));
}

static inline HOT __m128i equal_to(__m128i bytes, char c) {
  return _mm_cmpeq_epi8(bytes, _mm_set1_epi8(c));
}

static inline HOT uint64_t bits_at(__m128i found, int i) {
  return (uint64_t)(unsigned)_mm_movemask_epi8(found) << i;
}

static inline HOT kinds_t kinds_of(unsigned pattern, const uint8_t *p) {
  kinds_t k = {0};
  for (int i = 0; i < BLOCK; i += 16) {
    __m128i bytes = _mm_loadu_si128((const __m128i *)(const void *)(p + i));
    k.letters |= bits_at(in_range(_mm_or_si128(bytes, _mm_set1_epi8(0x20)), 'a', 'z'), i);
    k.digits |= bits_at(in_range(bytes, '0', '9'), i);
    k.spaces |= bits_at(equal_to(bytes, ' '), i);
    k.controls |= bits_at(in_range(bytes, '\t', '\r'), i);
    k.newlines |= bits_at(_mm_or_si128(equal_to(bytes, '\n'), equal_to(bytes, '\r')), i);
    k.apostrophes |= bits_at(equal_to(bytes, '\''), i);
    if (pattern == FSHM_PATTERN_O200K) {
      k.capitals |= bits_at(in_range(bytes, 'A', 'Z'), i);
      k.slashes |= bits_at(equal_to(bytes, '/'), i);
    }
  }
  return k;
}

/* \s*[\r\n]+|\s+(?!\S)|\s: up to the last line end; up to the last character; that one. all: the known bytes. */
static inline HOT uint64_t space_starts(uint64_t white, uint64_t newlines, uint64_t all) {
  uint64_t blanks = white & ~newlines, behind = blanks & (white & newlines) << 1;
  uint64_t starts = (white & ~(white << 1)) | (blanks & ~(white >> 1)) | behind;
  /* Adding the first bit of a run sets the one behind it: there is a line end, so the one before the blanks was not the
   * last; or what there is is not known. */
  uint64_t later = (blanks + behind) & ~blanks & (newlines | (all + 1));
  for (; unlikely(later); later &= later - 1)
    starts &= ~BIT(63 - __builtin_clzll(behind & ((later & -later) - 1)));
  return starts;
}

/* \p{N}{1,3} */
static inline HOT uint64_t digit_starts(uint64_t digits) {
  uint64_t starts = digits & ~(digits << 1), pairs = digits & digits << 1;
  uint64_t fourth = pairs & pairs << 2, next = starts << 3 & fourth;
  for (; unlikely(next); next = next << 3 & fourth) starts |= next;
  return starts;
}

/* '(?i:[sdmt]|ll|ve|re), a piece of its own. maybe: apostrophes with which a piece begins. */
static inline HOT uint64_t contraction_starts(uint64_t maybe, const uint8_t *p, unsigned known) {
  uint64_t starts = 0;
  for (; unlikely(maybe); maybe &= maybe - 1) {
    unsigned at = (unsigned)__builtin_ctzll(maybe);
    unsigned length = contraction(p + at, p + known, true);
    if (length) starts |= BIT((at + length) & 63);
  }
  return starts;
}

/* The same as the end of a word. maybe: apostrophes behind a letter. */
static inline HOT uint64_t with_contractions(uint64_t starts, uint64_t maybe, const uint8_t *p,
                                             unsigned known) {
  unsigned ended = 0; /* where the last one ended: an apostrophe there is behind no word */
  for (; unlikely(maybe); maybe &= maybe - 1) {
    unsigned at = (unsigned)__builtin_ctzll(maybe);
    unsigned length = at == ended ? 0 : contraction(p + at, p + known, true);
    if (!length) continue;
    ended = at + length;
    starts = (starts & ~((BIT(length) - 1) << at)) | BIT(ended & 63);
  }
  return starts;
}

/* Where pieces begin in a block, of which a piece begins at p and the first `known` bytes, from 4 to BLOCK - 1, are ASCII
 * and of the text. None is left out before the last one that is told of. */
static inline HOT uint64_t block_starts(unsigned pattern, const uint8_t *p, unsigned known) {
  kinds_t k = kinds_of(pattern, p);
  uint64_t all = BIT(known) - 1;
  uint64_t letters = k.letters & all, digits = k.digits & all, newlines = k.newlines & all;
  uint64_t white = (k.spaces | k.controls) & all, symbols = all & ~(letters | digits | white);
  /* Symbols take the blank before them, and line ends behind them. */
  uint64_t runs = symbols & ~(symbols << 1), begin = runs & ~(k.spaces << 1);
  uint64_t taken = newlines & ~(newlines + (newlines & symbols << 1));
  white &= ~taken;
  /* A word takes the blank before it, or the symbol that is alone. */
  uint64_t alone = begin & ~(symbols >> 1);
  uint64_t words = letters & ~(letters << 1) & ~(((white & ~newlines) | alone) << 1);
  uint64_t starts = 1 | begin | words | digit_starts(digits) | space_starts(white, newlines, all);
  /* What begins at the end of what is known may be otherwise. */
  if (pattern == FSHM_PATTERN_CL100K)
    return (starts | contraction_starts(k.apostrophes & alone & letters >> 1, p, known)) & all >> 1;
  starts |= k.capitals & letters & (letters & ~k.capitals) << 1;
  starts = with_contractions(starts, k.apostrophes & letters << 1 & letters >> 1, p, known);
  uint64_t more = k.slashes & taken << 1; /* [\r\n/]*: rare, so left to the scanner */
  if (unlikely(more)) starts &= (more & -more) - 1;
  return starts & all >> 2;
}
#endif

#endif
