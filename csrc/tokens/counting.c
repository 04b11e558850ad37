/* counting.c - walks over the pieces of a text: counts, encodes, truncates; and decodes.
 *
 * Most pieces are ASCII and a token. Where a processor has SSE2, ASCII is split 63 bytes at a time (blocks.h), and each
 * piece looked up without a branch. Elsewhere, and for the last piece of a text, there is a short way here, from 16
 * bytes of text to one entry of the hash table, without a loop. Everything else goes through scanner.h, and a piece
 * that is no token through merging.h. Argued in DESIGN.md, "Counting tokens".
 */
#include "blocks.h"
#include "scanner.h"
#include "search.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

/* Bytes: a text is copied when fewer are left, so that a block and 16 bytes from its last piece on can be read. */
#define NEAR_END 80

/* The short way ----------------------------------------------------------------------------- */

/* Bit i: byte i of 16 is between first and last, of ASCII. any_case: two small letters, and capitals count too. */
static inline unsigned between(const uint8_t *p, uint8_t first, uint8_t last, bool any_case) {
#if defined(__SSE2__)
  __m128i bytes = _mm_loadu_si128((const __m128i *)(const void *)p);
  if (any_case) bytes = _mm_or_si128(bytes, _mm_set1_epi8(0x20));
  __m128i in = _mm_and_si128(_mm_cmpgt_epi8(bytes, _mm_set1_epi8((char)(first - 1))),
                             _mm_cmpgt_epi8(_mm_set1_epi8((char)(last + 1)), bytes));
  return (unsigned)_mm_movemask_epi8(in);
#else
  const uint64_t ones = UINT64_C(0x0101010101010101), high = ones << 7;
  unsigned out = 0;
  for (int half = 0; half < 2; half++) {
    uint64_t word;
    memcpy(&word, p + 8 * half, 8);
    uint64_t low = (any_case ? word | ones << 5 : word) & ~high;
    uint64_t in = (low + ones * (0x80U - first)) & ~(low + ones * (0x7fU - last)) & ~word & high;
    out |= (unsigned)((in >> 7) * UINT64_C(0x0102040810204080) >> 56) << 8 * half;
  }
  return out;
#endif
}

/* Bit i: byte i of 16 is not ASCII. */
static inline unsigned above_ascii(const uint8_t *p) {
#if defined(__SSE2__)
  return (unsigned)_mm_movemask_epi8(_mm_loadu_si128((const __m128i *)(const void *)p));
#else
  uint64_t word;
  unsigned out = 0;
  for (int half = 0; half < 2; half++) {
    memcpy(&word, p + 8 * half, 8);
    word = word >> 7 & UINT64_C(0x0101010101010101);
    out |= (unsigned)(word * UINT64_C(0x0102040810204080) >> 56) << 8 * half;
  }
  return out;
#endif
}

#define ONES_FROM(bits, i) ((unsigned)__builtin_ctz(~((bits) >> (i)))) /* set bits from bit i on */

#define DIGIT(byte) ((unsigned)(byte) - '0' < 10)

/* What a byte may be at the beginning of a piece: a table, since these are the branches that a processor cannot foresee.
 * IN_...: no word begins with it and a letter, in that pattern (or one may, but look closer: an apostrophe may
 * begin a contraction, and what is not ASCII anything). */
enum { IS_LETTER = 1, IS_DIGIT = 2, IN_R50K = 4, IN_CL100K = 8, IN_O200K = 16, IN_ALL = 28 };
#define FIRST(c)                                                                  \
  (((c) >= 'a' && (c) <= 'z') || ((c) >= 'A' && (c) <= 'Z') ? IS_LETTER           \
   : (c) >= '0' && (c) <= '9'                               ? IS_DIGIT | IN_ALL   \
   : (c) >= 0x80 || (c) == '\n' || (c) == '\r'              ? IN_ALL              \
   : (c) == '\''                                            ? IN_R50K | IN_CL100K \
   : (c) == ' '                                             ? 0                   \
                                                            : IN_R50K)
#define FIRST4(c) FIRST(c), FIRST((c) + 1), FIRST((c) + 2), FIRST((c) + 3)
#define FIRST16(c) FIRST4(c), FIRST4((c) + 4), FIRST4((c) + 8), FIRST4((c) + 12)
#define FIRST64(c) FIRST16(c), FIRST16((c) + 16), FIRST16((c) + 32), FIRST16((c) + 48)
static const uint8_t first_byte[256] = {FIRST64(0), FIRST64(64), FIRST64(128), FIRST64(192)};

/* The end of a piece that begins with a blank, a line end or a symbol of ASCII, and is no word; NULL: look closer. */
static inline const uint8_t *blank_or_symbols(unsigned pattern, const uint8_t *p,
                                              const uint8_t *end) {
  unsigned newlines = between(p, '\n', '\n', false) | between(p, '\r', '\r', false);
  unsigned spaces = between(p, '\t', '\r', false) | between(p, ' ', ' ', false);
  unsigned above = above_ascii(p);
  unsigned symbols = ~(between(p, 'a', 'z', true) | between(p, '0', '9', false) | spaces | above);
  unsigned blank = *p == ' ', length = blank + ONES_FROM(symbols & 0xffff, blank);
  if (length > blank) {
    unsigned after = pattern == FSHM_PATTERN_R50K    ? 0
                     : pattern == FSHM_PATTERN_O200K ? newlines | between(p, '/', '/', false)
                                                     : newlines;
    length += ONES_FROM(after, length);
    if (length > SHORT_PIECE || above >> length & 1) return NULL;
    return (size_t)(end - p) < length ? end : p + length; /* behind the end are zeros, as symbols */
  }
  length = ONES_FROM(spaces, 0);
  if (!length || length > SHORT_PIECE || above >> length & 1 || (size_t)(end - p) <= length)
    return NULL;
  if (pattern == FSHM_PATTERN_R50K) {
    if (length == 1 && blank && DIGIT(p[1])) return NULL;
  } else if (newlines & ((1U << length) - 1)) {
    return p + 32 - __builtin_clz(newlines & ((1U << length) - 1));
  }
  return p + length - (length > 1);
}

/* The end of the piece that begins at p: 16 bytes from any place before `end` can be read. */
static inline HOT const uint8_t *next_end(unsigned pattern, const uint8_t *p, const uint8_t *end) {
  const unsigned not_before = pattern == FSHM_PATTERN_R50K     ? IN_R50K
                              : pattern == FSHM_PATTERN_CL100K ? IN_CL100K
                                                               : IN_O200K;
  unsigned first = first_byte[*p], start = ~first & IS_LETTER, length;
  if (pattern == FSHM_PATTERN_O200K) {
    length = start + ONES_FROM(between(p, 'A', 'Z', false), start);
    length += ONES_FROM(between(p, 'a', 'z', false), length);
  } else {
    length = start + ONES_FROM(between(p, 'a', 'z', true), start);
  }
  if (!(first & not_before) && length > start) {
    if (unlikely(length > SHORT_PIECE || p[length] >= 0x80)) return piece_end(pattern, p, end);
    if (pattern == FSHM_PATTERN_O200K && unlikely(p[length] == '\''))
      return p + length + contraction(p + length, end, true);
    return p + length;
  }
  const uint8_t *to = NULL;
  if (first & IS_DIGIT) {
    if (pattern != FSHM_PATTERN_R50K && p[1] < 0x80 && p[2] < 0x80)
      to = p + 1 + (DIGIT(p[1]) ? 1 + DIGIT(p[2]) : 0);
  } else if (!((*p | p[1]) & 0x80) && (*p != '\'' || pattern == FSHM_PATTERN_O200K)) {
    to = blank_or_symbols(pattern, p, end);
  }
  return to ? to : piece_end(pattern, p, end);
}

/* The key of a piece of up to SHORT_PIECE bytes, of which 16 can be read. */
static inline piece_key_t piece_key(const uint8_t *p, size_t length) {
  static const uint64_t kept[SHORT_PIECE + 1] = {
      0,
      UINT64_C(0xff),
      UINT64_C(0xffff),
      UINT64_C(0xffffff),
      UINT64_C(0xffffffff),
      UINT64_C(0xffffffffff),
      UINT64_C(0xffffffffffff),
      UINT64_C(0xffffffffffffff),
      UINT64_MAX,
      UINT64_MAX,
      UINT64_MAX,
      UINT64_MAX,
      UINT64_MAX,
      UINT64_MAX,
      UINT64_MAX,
      UINT64_MAX,
  };
  piece_key_t k;
  memcpy(&k.low, p, 8);
  memcpy(&k.high, p + 8, 8);
  k.low &= kept[length];
  k.high &= length > 8 ? kept[length - 8] : 0;
  k.high |= (uint64_t)length << 56;
  return k;
}

/* The same of up to WORD_PIECE bytes, as one word. */
static inline uint64_t word_key(piece_key_t k) { return k.low | k.high; }

/* The entry of `words`, or of `keys`, that has a key; UINT64_MAX: none. */
static inline HOT uint64_t word_entry(const fshm_vocabulary *v, uint64_t key) {
  uint64_t home = word_hash(key) >> (64 - v->header.word_bits);
  for (uint64_t i = 0; i < PROBES; i++) {
    uint64_t seen = WORD(&v->words[home ^ i]);
    if (likely(seen == key)) return home ^ i;
    if (!seen) break;
  }
  return UINT64_MAX;
}

static inline HOT uint64_t key_entry(const fshm_vocabulary *v, piece_key_t k) {
  uint64_t home = piece_hash(k) >> (64 - v->header.key_bits);
  for (uint64_t i = 0; i < PROBES; i++) {
    const uint64_t *entry = &v->keys[2 * (home ^ i)];
    if (likely(entry[0] == k.low && entry[1] == k.high)) return home ^ i;
    if (!entry[1]) break;
  }
  return UINT64_MAX;
}

static inline HOT bool is_token(const fshm_vocabulary *v, piece_key_t k, size_t length) {
  return (length <= WORD_PIECE ? word_entry(v, word_key(k)) : key_entry(v, k)) != UINT64_MAX;
}

/* Pieces that are no token, or long --------------------------------------------------------- */

/* The counts of such pieces are kept, each in an entry of 16 bytes that is swapped whole, as in the memo of texts: it is
 * there or not, never torn. A lost swap is not tried again. Of a piece of up to SHORT_PIECE bytes, the entry is its key,
 * whose last byte has room for the count beside the length. Of a longer one, it is 112 bits of a hash under a secret of
 * this process, and the count. */
#define LONG_CACHED 512 /* bytes: longer pieces hardly come twice */
#define LONG_COUNT UINT64_C(0xffff)

static inline cached_t *cached_short(const fshm_vocabulary *v, uint64_t hash) {
  return &v->cache[hash >> (64 - CACHE_BITS)];
}

static inline cached_t *cached_long(const fshm_vocabulary *v, const uint64_t hash[2]) {
  return &v->cache[(hash[1] >> (64 - CACHE_BITS)) | UINT64_C(1) << CACHE_BITS];
}

/* The tokens of a piece by a search, each with its length in the upper 8 bits; see merging.h. */
typedef struct {
  search_t search;
  uint32_t near[NEAR_LENGTH];
  uint8_t near_bits[NEAR_LENGTH / 8 + 1];
  void *far; /* to be freed, or NULL */
} merged_t;

/* Of a piece that is no token. Returns their number; 0: there is no memory. */
static size_t find_tokens(const fshm_vocabulary *v, const uint8_t *p, size_t length,
                          merged_t *found) {
  size_t bits = length / 8 + 1;
  found->far = NULL;
  found->search = (search_t){found->near, found->near_bits};
  if (length > NEAR_LENGTH) {
    found->far = malloc(length * sizeof *found->near + bits);
    if (!found->far) return 0;
    found->search.found = found->far;
    found->search.given_up = (uint8_t *)(found->search.found + length);
  }
  memset(found->search.given_up, 0, bits);
  size_t n = search_tokens(v, p, length, &found->search);
  if (likely(n)) return n;
  for (size_t i = 0; i < length; i++) found->search.found[i] = 1U << 24; /* damaged: as bytes */
  return length;
}

static int64_t count_uncached(const fshm_vocabulary *v, const uint8_t *p, size_t length) {
  if (whole_token(v, p, length) != NO_TOKEN) return 1;
  merged_t found;
  size_t n = find_tokens(v, p, length, &found);
  free(found.far);
  return n ? (int64_t)n : FSHM_E_MEMORY;
}

/* Short pieces that are neither a token nor in the cache: they are merged together. */
typedef struct {
  merging_t merging[MERGED_AT_ONCE];
  struct {
    piece_key_t key;
    pair_t seen; /* in the cache */
  } pieces[MERGED_AT_ONCE];
  unsigned n;
} unmerged_t;

static __attribute__((noinline)) uint64_t merge_noted(const fshm_vocabulary *v, unmerged_t *u) {
  uint64_t count = 0;
  merge_all(v, u->merging, u->n, SHORT_PARTS);
  for (unsigned i = 0; i < u->n; i++) {
    unsigned tokens = (unsigned)__builtin_popcountll(u->merging[i].parts);
    piece_key_t k = u->pieces[i].key;
    count += tokens - 1;
    if (v->cache)
      (void)pair_cas(cached_short(v, piece_hash(k)), &u->pieces[i].seen,
                     (pair_t){k.low, k.high | (uint64_t)tokens << 60});
  }
  u->n = 0;
  return count;
}

/* How many tokens more than one a short piece has. Those of one that is not in the cache are counted later, by
 * merge_noted(). no_token: it is known to be none. */
static __attribute__((noinline)) uint64_t count_short(const fshm_vocabulary *v, piece_key_t k,
                                                      size_t length, bool no_token, unmerged_t *u) {
  pair_t seen = {0, 0};
  if (v->cache) {
    seen = pair_load(cached_short(v, piece_hash(k))); /* pairs with the swap in merge_noted() */
    if (seen.who == k.low && (seen.when & UINT64_MAX >> 4) == k.high) return (seen.when >> 60) - 1;
  }
  if (!no_token && is_token(v, k, length)) return 0;
  u->pieces[u->n].key = k;
  u->pieces[u->n].seen = seen;
  merge_begin(v, &u->merging[u->n], (const uint8_t *)&u->pieces[u->n].key, (unsigned)length,
              SHORT_PARTS);
  return ++u->n == MERGED_AT_ONCE ? merge_noted(v, u) : 0;
}

static __attribute__((noinline)) int64_t count_long(const fshm_vocabulary *v, const uint8_t *p,
                                                    size_t length) {
  if (!v->cache || length > LONG_CACHED) return count_uncached(v, p, length);
  uint64_t hash[2];
  fshm_siphash128(v->secret[0], v->secret[1], p, length, hash);
  cached_t *entry = cached_long(v, hash);
  pair_t seen = pair_load(entry); /* pairs with the swap below */
  if (seen.who == hash[0] && ((seen.when ^ hash[1]) & ~LONG_COUNT) == 0 && seen.when & LONG_COUNT)
    return (int64_t)(seen.when & LONG_COUNT);
  int64_t count = count_uncached(v, p, length);
  if (count > 0)
    (void)pair_cas(entry, &seen, (pair_t){hash[0], (hash[1] & ~LONG_COUNT) | (uint64_t)count});
  return count;
}

/* Walks ------------------------------------------------------------------------------------- */

/* Where a walk is. */
typedef struct {
  fshm_vocabulary *v;
  const uint8_t *at; /* a piece begins here */
  uint64_t count, most;
  int64_t failed; /* FSHM_E_MEMORY, or 0 */
} walk_t;

#if defined(__SSE2__)
static inline bool differs(const uint64_t *entry, piece_key_t k) {
  return ((entry[0] ^ k.low) | (entry[1] ^ k.high)) != 0;
}

/* Pieces that are still to be looked up. What a lookup reads is on its way meanwhile. */
#define NOTED 128 /* so many are looked up at once, and those of one more block */
typedef struct {
  const uint8_t *at;
  uint32_t length;
} piece_t;
typedef struct {
  uint64_t words[NOTED + BLOCK]; /* the keys of those of up to WORD_PIECE bytes */
  piece_t longer[NOTED + BLOCK];
  struct {
    piece_key_t key;
    piece_t piece; /* where it is: of one that is longer than SHORT_PIECE */
  } missed[NOTED + BLOCK]; /* of those before, what is in neither of the first two entries */
  unsigned words_n, longer_n, missed_n;
} noted_t;

/* Note the pieces that `starts` tells of, but for the last one, whose end it does not tell. Returns where that begins. */
static inline HOT const uint8_t *note_block(const fshm_vocabulary *v, const uint8_t *p,
                                            uint64_t starts, noted_t *noted) {
  unsigned from = 0, shift = 64 - v->header.word_bits;
  unsigned words = noted->words_n, longer = noted->longer_n;
  for (starts &= ~UINT64_C(1); starts; starts &= starts - 1) {
    unsigned to = (unsigned)__builtin_ctzll(starts), length = to - from;
    const bool is_word = length <= WORD_PIECE;
    uint64_t key;
    memcpy(&key, p + from, 8);
    /* Both are written, and one of them is kept: no branch. */
    key = (key & ((UINT64_C(1) << 8 * (length & 7)) - 1)) | (uint64_t)length << 56;
    noted->words[words] = key;
    noted->longer[longer] = (piece_t){p + from, length};
    __builtin_prefetch(&v->words[word_hash(key) >> shift]);
    words += is_word;
    longer += !is_word;
    from = to;
  }
  noted->words_n = words;
  noted->longer_n = longer;
  return p + from;
}

static int64_t count_missed(const fshm_vocabulary *v, piece_key_t k, const piece_t *piece,
                            unmerged_t *u) {
  if (piece->length > SHORT_PIECE) return count_long(v, piece->at, piece->length);
  return 1 + (int64_t)count_short(v, k, piece->length, false, u);
}

/* Which of the words that are noted are in neither of the first two entries. Returns how many. */
static inline HOT unsigned find_words(const fshm_vocabulary *v, const noted_t *noted,
                                      uint8_t *missed) {
  unsigned shift = 64 - v->header.word_bits, misses = 0;
  for (unsigned i = 0; i < noted->words_n; i++) {
    uint64_t key = noted->words[i], at = word_hash(key) >> shift;
    const bool first = v->words[at] != key, second = v->words[at ^ 1] != key;
    missed[misses] = (uint8_t)i;
    misses += first & second;
  }
  return misses;
}

/* The same of the longer pieces, whose keys these are. */
static inline HOT unsigned find_keys(const fshm_vocabulary *v, const piece_key_t *keys, unsigned n,
                                     uint8_t *missed) {
  unsigned shift = 64 - v->header.key_bits, misses = 0;
  for (unsigned i = 0; i < n; i++) {
    size_t at = piece_hash(keys[i]) >> shift;
    const bool first = differs(&v->keys[2 * at], keys[i]),
               second = differs(&v->keys[2 * (at ^ 1)], keys[i]);
    missed[misses] = (uint8_t)i;
    misses += first & second;
  }
  return misses;
}

/* Count all pieces that are noted, but for the missed ones: these are left for the next call, and their lines of the
 * cache asked for. */
static inline HOT void count_noted(walk_t *w, noted_t *noted, unmerged_t *u) {
  const fshm_vocabulary *v = w->v;
  piece_key_t keys[NOTED + BLOCK];
  uint8_t words[NOTED + BLOCK], longer[NOTED + BLOCK];
  for (unsigned i = 0; i < noted->longer_n; i++) {
    const piece_t *piece = &noted->longer[i];
    keys[i] = (piece_key_t){0, UINT64_MAX}; /* no entry has such a key */
    if (unlikely(piece->length > SHORT_PIECE)) continue;
    keys[i] = piece_key(piece->at, piece->length);
    __builtin_prefetch(&v->keys[2 * (piece_hash(keys[i]) >> (64 - v->header.key_bits))]);
  }
  unsigned words_n = find_words(v, noted, words);
  unsigned longer_n = find_keys(v, keys, noted->longer_n, longer);
  uint64_t count = w->count + noted->words_n + noted->longer_n;
  for (unsigned i = 0; i < noted->missed_n; i++) {
    int64_t tokens = count_missed(v, noted->missed[i].key, &noted->missed[i].piece, u);
    if (unlikely(tokens < 0))
      w->failed = tokens;
    else
      count += (uint64_t)tokens - 1;
  }
  w->count = count;
  unsigned n = 0;
  for (unsigned i = 0; i < words_n; i++, n++) {
    uint64_t key = noted->words[words[i]], length = UINT64_C(0xff) << 56;
    noted->missed[n].key = (piece_key_t){key & ~length, key & length};
    noted->missed[n].piece.length = (uint32_t)(key >> 56);
  }
  for (unsigned i = 0; i < longer_n; i++, n++) {
    noted->missed[n].key = keys[longer[i]];
    noted->missed[n].piece = noted->longer[longer[i]];
  }
  if (v->cache) {
    for (unsigned i = 0; i < n; i++)
      __builtin_prefetch(cached_short(v, piece_hash(noted->missed[i].key)));
  }
  noted->words_n = noted->longer_n = 0;
  noted->missed_n = n;
}

/* How many of the 63 bytes at p are of the text, and ASCII; 0: not even 16. */
static inline unsigned known_bytes(const uint8_t *p, const uint8_t *end) {
  unsigned known = end - p < BLOCK ? (unsigned)(end - p) : BLOCK - 1;
  if (known < 16 || above_ascii(p)) return 0;
  for (unsigned i = 16; i < known; i += 16) {
    unsigned above = above_ascii(p + i), first = above ? i + (unsigned)__builtin_ctz(above) : known;
    if (first < known) return first;
  }
  return known;
}
#endif

/* Count the pieces that begin before `until`; ones that end beyond it are counted too. */
static inline HOT void count_pieces(walk_t *w, unsigned pattern, const uint8_t *until,
                                    const uint8_t *end) {
  const fshm_vocabulary *v = w->v;
  const uint8_t *p = w->at;
  unmerged_t unmerged;
  unmerged.n = 0;
#if defined(__SSE2__)
  noted_t noted;
  noted.words_n = noted.longer_n = noted.missed_n = 0;
#endif
  while (p < until && w->count <= w->most) {
#if defined(__SSE2__)
    unsigned known = pattern == FSHM_PATTERN_R50K ? 0 : known_bytes(p, end);
    if (known) {
      const uint8_t *next = note_block(v, p, block_starts(pattern, p, known), &noted);
      if (noted.words_n + noted.longer_n >= NOTED) {
        count_noted(w, &noted, &unmerged);
        if (unlikely(w->failed)) break;
      }
      if (likely(next != p)) {
        p = next;
        continue;
      }
    }
#endif
    const uint8_t *next = next_end(pattern, p, end);
    size_t length = (size_t)(next - p);
    int64_t more = 1;
    if (likely(length <= SHORT_PIECE)) {
      piece_key_t k = piece_key(p, length);
      if (unlikely(!is_token(v, k, length)))
        more += (int64_t)count_short(v, k, length, true, &unmerged);
    } else {
      more = count_long(v, p, length);
    }
    if (unlikely(more < 0)) {
      w->failed = more;
      break;
    }
    w->count += (uint64_t)more;
    p = next;
  }
#if defined(__SSE2__)
  while ((noted.words_n || noted.longer_n || noted.missed_n) && !w->failed)
    count_noted(w, &noted, &unmerged);
#endif
  if (unmerged.n) w->count += merge_noted(v, &unmerged);
  w->at = p;
}

static void count_with(walk_t *w, const uint8_t *until, const uint8_t *end) {
  switch (w->v->header.pattern) { /* a loop for each pattern */
    case FSHM_PATTERN_R50K:
      count_pieces(w, FSHM_PATTERN_R50K, until, end);
      break;
    case FSHM_PATTERN_CL100K:
      count_pieces(w, FSHM_PATTERN_CL100K, until, end);
      break;
    default:
      count_pieces(w, FSHM_PATTERN_O200K, until, end);
      break;
  }
}

int64_t fshm_tokens_count(fshm_vocabulary *v, const void *text, uint64_t length, uint64_t most) {
  const uint8_t *from = text, *end = from + length;
  walk_t w = {v, from, 0, most, 0};
  if (length >= NEAR_END) count_with(&w, end - NEAR_END + 1, end);
  if (w.at != end && !w.failed && w.count <= most) {
    uint8_t tail[2 * NEAR_END] = {0};
    size_t left = (size_t)(end - w.at);
    memcpy(tail, w.at, left);
    w.at = tail;
    count_with(&w, tail + left, tail + left);
  }
  return w.failed ? w.failed : (int64_t)w.count;
}

/* The same for tokens themselves: the pieces in order, each with its tokens. */
static size_t piece_tokens(const fshm_vocabulary *v, const uint8_t *p, size_t length,
                           merged_t *found) {
  uint32_t token;
  if (length > SHORT_PIECE) {
    token = whole_token(v, p, length);
  } else {
    uint8_t copy[SHORT_PIECE + 1] = {0};
    memcpy(copy, p, length);
    piece_key_t k = piece_key(copy, length);
    const bool is_word = length <= WORD_PIECE;
    uint64_t entry = is_word ? word_entry(v, word_key(k)) : key_entry(v, k);
    token = entry == UINT64_MAX ? NO_TOKEN : WORD(&(is_word ? v->word_ids : v->key_ids)[entry]);
  }
  if (token >= v->header.tokens) return find_tokens(v, p, length, found);
  found->far = NULL;
  found->search.found = found->near;
  found->near[0] = (uint32_t)length << 24 | token;
  return 1;
}

int64_t fshm_tokens_encode(fshm_vocabulary *v, const void *text, uint64_t length, uint32_t *out) {
  const uint8_t *p = text, *end = p + length;
  uint64_t count = 0;
  merged_t found;
  while (p != end) {
    const uint8_t *next = piece_end(v->header.pattern, p, end);
    size_t n = piece_tokens(v, p, (size_t)(next - p), &found);
    if (!n) return FSHM_E_MEMORY; /* there is nothing to free */
    for (size_t i = 0; i < n; i++) out[count++] = v->ranks[FOUND_TOKEN(found.search.found[i])];
    free(found.far);
    p = next;
  }
  return (int64_t)count;
}

/* The end of the last of the first `most` tokens that ends where a character does; NULL: there is no memory. */
static const uint8_t *cut_at(const fshm_vocabulary *v, const uint8_t *p, const uint8_t *end,
                             uint64_t most) {
  merged_t found;
  while (p != end && most) {
    const uint8_t *next = piece_end(v->header.pattern, p, end);
    size_t n = piece_tokens(v, p, (size_t)(next - p), &found);
    const uint8_t *at = p, *cut = p;
    if (!n) return NULL; /* there is nothing to free */
    for (size_t i = 0; i < n && i < most; i++) {
      at += FOUND_LENGTH(found.search.found[i]);
      if (at == next || (*at & 0xc0) != 0x80) cut = at;
    }
    free(found.far);
    if (n > most) return cut;
    most -= n;
    p = next;
  }
  return p;
}

int64_t fshm_tokens_truncate(fshm_vocabulary *v, const void *text, uint64_t length, uint64_t most) {
  const uint8_t *from = text, *end = from + length;
  if (length <= most) return (int64_t)length; /* a token has a byte at least */
  for (uint64_t tokens = most;; tokens--) {
    const uint8_t *cut = cut_at(v, from, end, tokens);
    if (!cut) return FSHM_E_MEMORY;
    /* What remains is split without what followed it, so it may have more tokens than it had there. */
    int64_t count = fshm_tokens_count(v, from, (uint64_t)(cut - from), most);
    if (count < 0) return count;
    if ((uint64_t)count <= most || !tokens) return cut - from;
  }
}

/* Decoding ---------------------------------------------------------------------------------- */

/* Where a rank is in a rising sequence, or UINT64_MAX. */
static uint64_t place_of(const uint32_t *ranks, uint64_t count, uint32_t rank) {
  if (rank < count && WORD(&ranks[rank]) == rank) return rank;
  uint64_t low = 0, high = count;
  while (low < high) {
    uint64_t middle = (low + high) / 2;
    if (WORD(&ranks[middle]) < rank)
      low = middle + 1;
    else
      high = middle;
  }
  return low < count && WORD(&ranks[low]) == rank ? low : UINT64_MAX;
}

int64_t fshm_tokens_decode(const fshm_vocabulary *v, const uint32_t *ranks, uint64_t count,
                           void *out, uint64_t room, uint64_t *bad) {
  const vocabulary_header_t *h = &v->header;
  uint64_t length = 0;
  for (uint64_t i = 0; i < count; i++) {
    uint64_t at = place_of(v->ranks, h->tokens, ranks[i]);
    if (at == UINT64_MAX) {
      at = place_of(v->special, h->special, ranks[i]);
      if (at != UINT64_MAX) at += h->tokens;
    }
    uint64_t from = at == UINT64_MAX ? 1 : WORD(&v->offsets[at]);
    uint64_t to = at == UINT64_MAX ? 0 : WORD(&v->offsets[at + 1]);
    if (from > to || to > h->bytes) {
      *bad = i;
      return FSHM_E_ARGUMENT;
    }
    if (out && length + (to - from) <= room)
      memcpy((uint8_t *)out + length, v->bytes + from, to - from);
    length += to - from;
  }
  return (int64_t)length;
}
