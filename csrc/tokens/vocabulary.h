/* vocabulary.h - the file of a vocabulary, and the handle that a process has of it.
 *
 * In the file, a token is a number: its place in the order of ranks. So numbers compare as ranks do, and the 256
 * single bytes have the numbers 0 to 255 (the builder refuses other vocabularies).
 *
 * Sections, one behind the other, each aligned to a cache line:
 *   words     2^word_bits * 8 bytes: the tokens of up to 7 bytes, a hash table. The bytes themselves, zeros, and the
 *             length in the last byte; an empty entry is all zeros. The i-th place to look at is (home ^ i): the first
 *             eight of each key are one cache line
 *   keys      2^key_bits * 16: the same for tokens of 8 to 15 bytes
 *   word_ids  2^word_bits * 4: the number of the token in the same entry of words
 *   key_ids   2^key_bits * 4: and of keys
 *   nodes     cells * 8: a trie of all tokens, as a double array: see NODE_* below
 *   halves    tokens * 8: what each token is merged from
 *   prefixes  tokens * 4: the length of each token, and the longest other one that it begins with
 *   pairs     2^pair_bits * 8: which two tokens merge to which, a hash table with linear probing
 *   filter    2^(pair_bits + 2) bits: set where a pair that merges has its hash. Most pairs do not merge, and this is
 *             all that is read for them: it stays in the second-level cache
 *   bigrams   65,536 * 4: what each two bytes merge to, by 256 * the first + the second; NO_TOKEN: nothing
 *   characters  CHARACTERS * 8: what the bytes of a character merge to by themselves, see CHARACTER_*
 *   ranks     tokens * 4: the rank of each number, rising
 *   offsets   (tokens + special + 1) * 4: where the bytes of each token begin, and end
 *   special   special * 4: the ranks of the special tokens, rising
 *   bytes     of all tokens, then of the special ones
 *
 * A reader trusts none of it beyond the header, which it has copied: each number is compared with its bound or masked
 * before it is an index, and read once (cell_of() and the like), since the file may change under it; each walk has
 * fewer steps than a token can have bytes.
 */
#ifndef FSHM_VOCABULARY_H
#define FSHM_VOCABULARY_H

#include "../core/internal.h"
#include "tokens.h"

#define TOKENS_MAGIC UINT64_C(0x736e656b6f742d66) /* "f-tokens" */
#define NO_TOKEN UINT32_MAX
#define SHORT_PIECE 15 /* bytes of the longest piece that is its own key */
#define WORD_PIECE 7 /* and whose key is one word */
#define PROBES 64 /* of a hash table of the file, at most: the builder takes a larger one rather */

/* A cell of the trie: label (8 bits), used (1), base (24), 1 + number of the token that ends here (21), and whether it
 * is only found as a whole piece (1). The child for a byte c is the cell base ^ c, if its label is c. No two nodes
 * have the same base. */
#define NODE_USED UINT64_C(0x100)
#define NODE_BASE(cell) ((uint32_t)((cell) >> 9) & 0xffffff)
#define NODE_TOKEN(cell) ((uint32_t)((cell) >> 33) & 0x1fffff)
#define NODE_WHOLE_ONLY (UINT64_C(1) << 54)
#define BIGRAMS 65536

/* An entry of `characters`: up to three tokens (20 bits each), and how many (2; 0: there is none). CHARACTER_FIRST: behind
 * a byte above ASCII, its first token never merges with what is before it, whatever that is. CHARACTER_LAST: the same of
 * its last one, and of another character above ASCII behind it. The entries: U+0000 to U+FFFF, U+1F000 to U+1FFFF. */
#define FIRST_LEAD 0xc2 /* the least byte that begins a character above ASCII */
#define CHARACTERS (65536 + 4096)
#define CHARACTER_TOKEN(entry, i) ((uint32_t)((entry) >> 20 * (i)) & 0xfffff)
#define CHARACTER_COUNT(entry) ((unsigned)((entry) >> 60) & 3)
#define CHARACTER_FIRST (UINT64_C(1) << 62)
#define CHARACTER_LAST (UINT64_C(1) << 63)
#define MAX_CELLS (UINT64_C(1) << 24)

/* The two tokens that are merged last; NO_TOKEN where merging its bytes does not end with this token. Of a single
 * byte: both are itself. */
typedef struct {
  uint32_t left, right;
} halves_t;

/* An entry of `prefixes`: the length (8 bits), and the longest other token that it begins with and that merging can
 * yield (24; all ones: none). */
#define PREFIX_OF(entry) ((entry) & 0xffffff)
#define LENGTH_OF(entry) ((entry) >> 24)
#define NO_PREFIX_TOKEN 0xffffff

/* An entry of `pairs`: left (20 bits), right (20), the merged token (24); all ones: empty. */
#define PAIR_EMPTY UINT64_MAX

typedef struct {
  uint64_t magic;
  uint32_t version, byte_order;
  uint64_t size;
  uint32_t pattern, tokens, special, most_length;
  uint32_t word_bits, key_bits, pair_bits, cells, root; /* root: the base of the trie's root */
  uint32_t unused;
  uint64_t bytes; /* of the last section */
  uint64_t identity[2];
  uint64_t checksum; /* of everything behind the header */
  uint64_t check; /* of the header before it */
} vocabulary_header_t;

typedef struct {
  uint64_t words, keys, word_ids, key_ids, nodes, halves, prefixes, pairs, filter, bigrams,
      characters, ranks, offsets, special, bytes, size;
} vocabulary_layout_t;

/* The counts of pieces that took merges: like the memo of texts, lossy and of a fixed size (counting.c). */
#define CACHE_BITS 14
typedef struct {
  _Alignas(16) uint64_t who, when;
} cached_t;

struct fshm_vocabulary {
  const uint64_t *words, *keys;
  const uint32_t *word_ids, *key_ids;
  const uint64_t *nodes;
  const halves_t *halves;
  const uint32_t *prefixes;
  const uint64_t *pairs, *filter;
  const uint32_t *bigrams;
  const uint64_t *characters;
  const uint32_t *ranks, *offsets, *special;
  const uint8_t *bytes;
  cached_t *cache; /* two halves: of short pieces, and of longer ones; NULL: no memory for it */
  uint64_t secret[2];
  vocabulary_header_t header; /* the verified copy */
  const unsigned char *map;
  bool mapped;
};

/* vocabulary.c */
vocabulary_layout_t vocabulary_layout(const vocabulary_header_t *h);
uint64_t vocabulary_checksum(const void *data, uint64_t length);
uint64_t vocabulary_header_check(const vocabulary_header_t *h);
int vocabulary_adopt(const unsigned char *map, const vocabulary_header_t *h, bool mapped,
                     fshm_vocabulary **out, fshm_error *e);

/* The key of a piece of up to SHORT_PIECE bytes, and where its probing begins. */
typedef struct {
  uint64_t low, high;
} piece_key_t;

static inline uint64_t piece_hash(piece_key_t k) {
  uint64_t mixed = (k.low ^ (k.high >> 29)) * UINT64_C(0x9e3779b97f4a7c15) +
                   k.high * UINT64_C(0xc2b2ae3d27d4eb4f);
  return mixed;
}

static inline uint64_t word_hash(uint64_t key) { return key * UINT64_C(0x9e3779b97f4a7c15); }

static inline uint64_t pair_hash(uint64_t pair) {
  return (pair ^ pair >> 23) * UINT64_C(0x9e3779b97f4a7c15);
}

#endif
