/* builder.c - compiles the ranks of an encoding into the image of a vocabulary's file. Called once for a host.
 *
 * It also proves what the counting relies on (DESIGN.md, "Merging"), for this vocabulary: the single bytes rank
 * lowest, and no token ranks before the two that it is merged from.
 */
#include <stdlib.h>

#include "vocabulary.h"

typedef struct {
  const uint8_t *bytes;
  uint32_t length, rank;
} record_t;

/* A node of the trie that is still to be placed: the tokens [from, to) of the sorted order share `depth` bytes. */
typedef struct {
  uint32_t cell, from, to, depth, prefix;
} pending_t;

typedef struct {
  record_t *tokens, *special; /* by rank */
  uint64_t count, special_count;
  uint32_t *by_bytes; /* hash table of numbers; NO_TOKEN: empty */
  uint64_t mask;
  halves_t *halves;
  uint32_t *prefixes;
  uint32_t *sorted; /* the numbers, in the order of their bytes */
  /* The trie. */
  uint64_t *cells;
  uint32_t *next, *previous; /* the free cells, in a ring that begins and ends at cell 0 */
  uint8_t *base_used;
  uint64_t cell_count, cell_room;
  pending_t *pending;
  uint64_t pending_count, pending_room;
  /* The hash tables. */
  uint64_t *words, *keys, *pairs, *filter;
  uint32_t *word_ids, *key_ids;
  uint32_t word_bits, key_bits, pair_bits;
} builder_t;

static void builder_free(builder_t *b) {
  void *all[] = {b->tokens, b->special, b->by_bytes, b->halves,    b->prefixes, b->sorted,
                 b->cells,  b->next,    b->previous, b->base_used, b->pending,  b->words,
                 b->keys,   b->pairs,   b->filter,   b->word_ids,  b->key_ids};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

/* Records ----------------------------------------------------------------------------------- */

static int by_rank(const void *a, const void *b) {
  uint32_t x = ((const record_t *)a)->rank, y = ((const record_t *)b)->rank;
  return (x > y) - (x < y);
}

/* Two special tokens may have one rank, as in o200k_harmony. */
static int parse_records(const uint8_t *from, uint64_t length, bool special, record_t **out,
                         uint64_t *count) {
  uint64_t n = 0, at = 0;
  for (; at < length; n++) {
    if (!from[at] || length - at < from[at] + UINT64_C(5)) return FSHM_E_ARGUMENT;
    at += from[at] + UINT64_C(5);
  }
  if (n > FSHM_MAX_TOKENS) return FSHM_E_ARGUMENT;
  *out = calloc(n + 1, sizeof **out);
  *count = n;
  if (!*out) return FSHM_E_MEMORY;
  at = 0;
  for (uint64_t i = 0; i < n; i++) {
    record_t *r = &(*out)[i];
    *r = (record_t){from + at + 1, from[at], 0};
    const uint8_t *rank = r->bytes + r->length;
    r->rank = rank[0] | (uint32_t)rank[1] << 8 | (uint32_t)rank[2] << 16 | (uint32_t)rank[3] << 24;
    at += r->length + UINT64_C(5);
  }
  qsort(*out, n, sizeof **out, by_rank);
  for (uint64_t i = 0; i < n; i++) {
    if ((*out)[i].rank > FSHM_MAX_RANK || (i && !special && (*out)[i].rank == (*out)[i - 1].rank))
      return FSHM_E_ARGUMENT;
  }
  return FSHM_OK;
}

static uint32_t number_of(const builder_t *b, const uint8_t *bytes, uint64_t length) {
  uint64_t at = fshm_siphash(0, 0, bytes, length) & b->mask;
  for (; b->by_bytes[at] != NO_TOKEN; at = (at + 1) & b->mask) {
    const record_t *r = &b->tokens[b->by_bytes[at]];
    if (r->length == length && !memcmp(r->bytes, bytes, length)) break;
  }
  return b->by_bytes[at];
}

static int index_bytes(builder_t *b) {
  b->mask = (UINT64_C(1) << bit_length(b->count * 2)) - 1;
  b->by_bytes = malloc((b->mask + 1) * sizeof *b->by_bytes);
  if (!b->by_bytes) return FSHM_E_MEMORY;
  memset(b->by_bytes, 0xff, (b->mask + 1) * sizeof *b->by_bytes);
  for (uint32_t i = 0; i < b->count; i++) {
    const record_t *r = &b->tokens[i];
    if ((r->length == 1) != (i < 256)) return FSHM_E_ARGUMENT; /* single bytes rank lowest */
    if (number_of(b, r->bytes, r->length) != NO_TOKEN) return FSHM_E_ARGUMENT;
    uint64_t at = fshm_siphash(0, 0, r->bytes, r->length) & b->mask;
    while (b->by_bytes[at] != NO_TOKEN) at = (at + 1) & b->mask;
    b->by_bytes[at] = i;
  }
  return b->count >= 256 ? FSHM_OK : FSHM_E_ARGUMENT;
}

/* Merges ------------------------------------------------------------------------------------ */

/* Merge n bytes by rank, as tiktoken does, until there are no more than `most` parts. Returns how many there are; starts:
 * where each begins, and the end. */
static uint32_t merge_by_rank(const builder_t *b, const uint8_t *bytes, uint32_t n, uint32_t most,
                              uint32_t *starts) {
  uint32_t ranks[FSHM_MAX_TOKEN_LENGTH + 1];
  for (uint32_t i = 0; i <= n; i++) starts[i] = i;
  for (uint32_t i = 0; i + 1 < n; i++) ranks[i] = number_of(b, bytes + i, 2);
  while (n > most) {
    uint32_t least = 0;
    for (uint32_t i = 1; i + 1 < n; i++)
      if (ranks[i] < ranks[least]) least = i;
    if (ranks[least] == NO_TOKEN) break;
    memmove(&starts[least + 1], &starts[least + 2], (n - least - 1) * sizeof *starts);
    memmove(&ranks[least], &ranks[least + 1], (n - least - 2) * sizeof *ranks);
    n--;
    for (uint32_t i = least ? least - 1 : 0; i <= least && i + 1 < n; i++)
      ranks[i] = number_of(b, bytes + starts[i], starts[i + 2] - starts[i]);
  }
  return n;
}

/* Which two parts a token is merged from last. */
static void find_halves(const builder_t *b, uint32_t token, halves_t *out) {
  const record_t *r = &b->tokens[token];
  uint32_t starts[FSHM_MAX_TOKEN_LENGTH + 1];
  if (merge_by_rank(b, r->bytes, r->length, 2, starts) != 2) return;
  out->left = number_of(b, r->bytes, starts[1]);
  out->right = number_of(b, r->bytes + starts[1], r->length - starts[1]);
}

static int find_merges(builder_t *b) {
  b->halves = malloc(b->count * sizeof *b->halves);
  if (!b->halves) return FSHM_E_MEMORY;
  for (uint32_t i = 0; i < b->count; i++) {
    b->halves[i] = i < 256 ? (halves_t){i, i} : (halves_t){NO_TOKEN, NO_TOKEN};
    if (i >= 256) find_halves(b, i, &b->halves[i]);
  }
  for (uint32_t i = 256; i < b->count; i++) {
    const halves_t *m = &b->halves[i];
    if (m->left != NO_TOKEN && (i < m->left || i < m->right)) return FSHM_E_ARGUMENT;
  }
  return FSHM_OK;
}

/* The trie ---------------------------------------------------------------------------------- */

static uint64_t larger_room(uint64_t room, uint64_t needed) { return max_u64(needed, room * 2); }

/* 256 more cells, at the end of the ring of free ones. */
static int add_block(builder_t *b) {
  if (b->cell_count + 256 > MAX_CELLS) return FSHM_E_ARGUMENT;
  if (b->cell_count + 256 > b->cell_room) {
    uint64_t room = larger_room(b->cell_room, b->cell_count + 256);
    uint64_t *cells = realloc(b->cells, room * sizeof *cells);
    if (cells) b->cells = cells;
    uint32_t *next = realloc(b->next, room * sizeof *next);
    if (next) b->next = next;
    uint32_t *previous = realloc(b->previous, room * sizeof *previous);
    if (previous) b->previous = previous;
    uint8_t *base_used = realloc(b->base_used, room);
    if (base_used) b->base_used = base_used;
    if (!cells || !next || !previous || !base_used) return FSHM_E_MEMORY;
    b->cell_room = room;
  }
  for (uint64_t i = b->cell_count; i < b->cell_count + 256; i++) {
    b->cells[i] = 0;
    b->base_used[i] = 0;
    if (!b->cell_count) continue; /* the first block has no children: the base of a leaf is 0 */
    b->next[i] = 0;
    b->previous[i] = b->previous[0];
    b->next[b->previous[0]] = (uint32_t)i;
    b->previous[0] = (uint32_t)i;
  }
  if (!b->cell_count) b->next[0] = b->previous[0] = 0;
  b->cell_count += 256;
  return FSHM_OK;
}

static bool base_fits(const builder_t *b, uint32_t base, const uint8_t *labels, unsigned n) {
  if (base < 256 || b->base_used[base]) return false;
  for (unsigned i = 0; i < n; i++)
    if (b->cells[base ^ labels[i]]) return false;
  return true;
}

#define BASE_TRIES 2000

static int find_base(builder_t *b, const uint8_t *labels, unsigned n, uint32_t *base) {
  unsigned tries = 0;
  for (uint32_t at = b->next[0]; at && tries < BASE_TRIES; at = b->next[at], tries++) {
    *base = at ^ labels[0];
    if (base_fits(b, *base, labels, n)) return FSHM_OK;
  }
  *base = (uint32_t)b->cell_count;
  return add_block(b);
}

static void take_cell(builder_t *b, uint32_t cell, uint8_t label) {
  b->next[b->previous[cell]] = b->next[cell];
  b->previous[b->next[cell]] = b->previous[cell];
  b->cells[cell] = NODE_USED | label;
}

static int later(builder_t *b, pending_t node) {
  if (b->pending_count == b->pending_room) {
    uint64_t room = larger_room(b->pending_room, 1024);
    pending_t *pending = realloc(b->pending, room * sizeof *pending);
    if (!pending) return FSHM_E_MEMORY;
    b->pending = pending;
    b->pending_room = room;
  }
  b->pending[b->pending_count++] = node;
  return FSHM_OK;
}

/* Place the children of a node. `cell`: of the node; 0: the root. */
static int place_children(builder_t *b, pending_t node) {
  uint8_t labels[256];
  uint32_t starts[257];
  unsigned n = 0;
  uint64_t token = 0;
  if (b->tokens[b->sorted[node.from]].length == node.depth) { /* the shortest comes first */
    uint32_t id = b->sorted[node.from++];
    bool whole_only = b->halves[id].left == NO_TOKEN;
    token = (uint64_t)(id + 1) << 33 | (whole_only ? NODE_WHOLE_ONLY : 0);
    b->prefixes[id] = b->tokens[id].length << 24 | (node.prefix & NO_PREFIX_TOKEN);
    if (!whole_only) node.prefix = id;
  }
  for (uint32_t i = node.from; i < node.to; i++) {
    uint8_t label = b->tokens[b->sorted[i]].bytes[node.depth];
    if (n && labels[n - 1] == label) continue;
    starts[n] = i;
    labels[n++] = label;
  }
  starts[n] = node.to;
  uint32_t base = 0;
  int status = n ? find_base(b, labels, n, &base) : FSHM_OK;
  if (status != FSHM_OK) return status;
  if (base) b->base_used[base] = 1;
  b->cells[node.cell] |= token | (uint64_t)base << 9;
  for (unsigned i = 0; i < n && status == FSHM_OK; i++) {
    take_cell(b, base ^ labels[i], labels[i]);
    status = later(
        b, (pending_t){base ^ labels[i], starts[i], starts[i + 1], node.depth + 1, node.prefix});
  }
  return status;
}

static const record_t *sorted_tokens; /* for qsort(): one builder at a time, see build_lock */

static int by_bytes(const void *a, const void *b) {
  const record_t *x = &sorted_tokens[*(const uint32_t *)a];
  const record_t *y = &sorted_tokens[*(const uint32_t *)b];
  uint32_t least = x->length < y->length ? x->length : y->length;
  int order = memcmp(x->bytes, y->bytes, least);
  return order ? order : (x->length > y->length) - (x->length < y->length);
}

static int build_trie(builder_t *b) {
  b->sorted = malloc(b->count * sizeof *b->sorted);
  b->prefixes = malloc(b->count * sizeof *b->prefixes);
  if (!b->sorted || !b->prefixes) return FSHM_E_MEMORY;
  for (uint32_t i = 0; i < b->count; i++) b->sorted[i] = i;
  sorted_tokens = b->tokens;
  qsort(b->sorted, b->count, sizeof *b->sorted, by_bytes);
  int status = add_block(b);
  if (status == FSHM_OK) status = later(b, (pending_t){0, 0, (uint32_t)b->count, 0, NO_TOKEN});
  /* Breadth first: the cells near the root, which every walk reads, are beside each other. */
  for (uint64_t i = 0; i < b->pending_count && status == FSHM_OK; i++)
    status = place_children(b, b->pending[i]);
  return status;
}

/* Hash tables ------------------------------------------------------------------------------- */

static piece_key_t key_of(const uint8_t *bytes, uint32_t length) {
  uint64_t words[2] = {0, 0};
  memcpy(words, bytes, length);
  return (piece_key_t){words[0], words[1] | (uint64_t)length << 56};
}

/* The same of up to WORD_PIECE bytes: it ends with the length, and zeros are between. */
static uint64_t word_of(piece_key_t key) { return key.low | key.high; }

/* False: PROBES entries are taken. */
static bool insert_word(builder_t *b, uint32_t token) {
  uint64_t key = word_of(key_of(b->tokens[token].bytes, b->tokens[token].length));
  uint64_t home = word_hash(key) >> (64 - b->word_bits);
  for (uint64_t i = 0; i < PROBES; i++) {
    if (b->words[home ^ i]) continue;
    b->words[home ^ i] = key;
    b->word_ids[home ^ i] = token;
    return true;
  }
  return false;
}

static bool insert_key(builder_t *b, uint32_t token) {
  piece_key_t key = key_of(b->tokens[token].bytes, b->tokens[token].length);
  uint64_t home = piece_hash(key) >> (64 - b->key_bits);
  for (uint64_t i = 0; i < PROBES; i++) {
    uint64_t at = home ^ i;
    if (b->keys[2 * at + 1]) continue;
    b->keys[2 * at] = key.low;
    b->keys[2 * at + 1] = key.high;
    b->key_ids[at] = token;
    return true;
  }
  return false;
}

static bool insert_pair(builder_t *b, uint32_t token) {
  uint64_t pair = (uint64_t)b->halves[token].left << 20 | b->halves[token].right;
  uint64_t hash = pair_hash(pair), bit = hash >> (62 - b->pair_bits);
  uint64_t at = hash >> (64 - b->pair_bits), mask = (UINT64_C(1) << b->pair_bits) - 1;
  b->filter[bit / 64] |= UINT64_C(1) << (bit % 64);
  for (int i = 0; i < PROBES; i++, at = (at + 1) & mask) {
    if (b->pairs[at] != PAIR_EMPTY) continue;
    b->pairs[at] = pair << 24 | token;
    return true;
  }
  return false;
}

#define FILTER_BYTES(b) (UINT64_C(1) << ((b)->pair_bits + 2 - 3))

/* The most frequent tokens rank lowest and are entered first: those lie where their probing begins. */
static bool fill_tables(builder_t *b) {
  memset(b->words, 0, UINT64_C(8) << b->word_bits);
  memset(b->keys, 0, UINT64_C(16) << b->key_bits);
  memset(b->pairs, 0xff, UINT64_C(8) << b->pair_bits);
  memset(b->filter, 0, FILTER_BYTES(b));
  for (uint32_t i = 0; i < b->count; i++) {
    uint32_t length = b->tokens[i].length;
    if (length <= SHORT_PIECE && !(length <= WORD_PIECE ? insert_word : insert_key)(b, i))
      return false;
    if (i >= 256 && b->halves[i].left != NO_TOKEN && !insert_pair(b, i)) return false;
  }
  return true;
}

/* At most five of eight entries are taken: a small table stays in the caches of a processor. */
static uint32_t table_bits(uint64_t entries) {
  uint32_t bits = 8;
  while (entries * 8 > UINT64_C(5) << bits) bits++;
  return bits;
}

static void free_tables(builder_t *b) {
  void *all[] = {b->words, b->keys, b->word_ids, b->key_ids, b->pairs, b->filter};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

static int build_tables(builder_t *b) {
  uint64_t words = 0, keys = 0;
  for (uint32_t i = 0; i < b->count; i++) {
    words += b->tokens[i].length <= WORD_PIECE;
    keys += b->tokens[i].length <= SHORT_PIECE;
  }
  b->word_bits = table_bits(words);
  b->key_bits = table_bits(keys - words);
  b->pair_bits = (uint32_t)max_u64(bit_length(b->count * 2 - 1), 8);
  for (; b->word_bits <= 24 && b->pair_bits <= 24; b->word_bits++, b->key_bits++, b->pair_bits++) {
    free_tables(b);
    b->words = malloc(UINT64_C(8) << b->word_bits);
    b->keys = malloc(UINT64_C(16) << b->key_bits);
    b->word_ids = calloc(UINT64_C(1) << b->word_bits, sizeof *b->word_ids);
    b->key_ids = calloc(UINT64_C(1) << b->key_bits, sizeof *b->key_ids);
    b->pairs = malloc(UINT64_C(8) << b->pair_bits);
    b->filter = malloc(FILTER_BYTES(b));
    if (!b->words || !b->keys || !b->word_ids || !b->key_ids || !b->pairs || !b->filter)
      return FSHM_E_MEMORY;
    if (fill_tables(b)) return FSHM_OK;
  }
  return FSHM_E_ARGUMENT;
}

/* A token of two bytes is merged from these. */
static void put_bigrams(const builder_t *b, uint32_t *bigrams) {
  memset(bigrams, 0xff, sizeof *bigrams * BIGRAMS);
  for (uint32_t i = 256; i < b->count; i++) {
    const record_t *r = &b->tokens[i];
    if (r->length == 2) bigrams[r->bytes[0] << 8 | r->bytes[1]] = i;
  }
}

/* Characters -------------------------------------------------------------------------------- */

/* Of each token, whether it may merge with what is before it, if that ends above ASCII, or with what is behind it, if that
 * begins a character above ASCII: itself, or what merging it begins or ends with. */
enum { MERGES_BEFORE = 1, MERGES_BEHIND = 2 };
static void find_merging(const builder_t *b, uint8_t *merging) {
  for (uint32_t i = 256; i < b->count; i++) {
    const halves_t *h = &b->halves[i];
    if (h->left == NO_TOKEN) continue;
    const record_t *left = &b->tokens[h->left], *right = &b->tokens[h->right];
    if (left->bytes[left->length - 1] >= 0x80) merging[h->right] |= MERGES_BEFORE;
    if (right->bytes[0] >= FIRST_LEAD) merging[h->left] |= MERGES_BEHIND;
  }
  for (uint32_t i = 256; i < b->count; i++) { /* halves have lower numbers */
    const halves_t *h = &b->halves[i];
    if (h->left == NO_TOKEN) continue;
    merging[i] |= (merging[h->left] & MERGES_BEFORE) | (merging[h->right] & MERGES_BEHIND);
  }
}

static uint64_t character_entry(const builder_t *b, const uint8_t *merging, const uint8_t *bytes,
                                uint32_t length) {
  uint32_t starts[8], n = merge_by_rank(b, bytes, length, 1, starts), tokens[4];
  uint64_t entry = (uint64_t)n << 60;
  if (n > 3) return 0;
  for (uint32_t i = 0; i < n; i++) {
    tokens[i] = number_of(b, bytes + starts[i], starts[i + 1] - starts[i]);
    entry |= (uint64_t)tokens[i] << 20 * i;
  }
  if (!(merging[tokens[0]] & MERGES_BEFORE)) entry |= CHARACTER_FIRST;
  if (!(merging[tokens[n - 1]] & MERGES_BEHIND)) entry |= CHARACTER_LAST;
  return entry;
}

static int put_characters(const builder_t *b, uint64_t *characters) {
  uint8_t *merging = calloc(b->count, 1);
  if (!merging) return FSHM_E_MEMORY;
  find_merging(b, merging);
  for (uint32_t i = 0x80; i < CHARACTERS; i++) {
    uint32_t c = i < 0x10000 ? i : 0x1f000 + (i - 0x10000);
    uint8_t last = (uint8_t)(0x80 | (c & 63)), middle = (uint8_t)(0x80 | (c >> 6 & 63));
    uint8_t two[] = {(uint8_t)(0xc0 | c >> 6), last},
            three[] = {(uint8_t)(0xe0 | c >> 12), middle, last},
            four[] = {0xf0, (uint8_t)(0x80 | c >> 12), middle, last};
    characters[i] = c < 0x800     ? character_entry(b, merging, two, 2)
                    : c < 0x10000 ? character_entry(b, merging, three, 3)
                                  : character_entry(b, merging, four, 4);
  }
  free(merging);
  return FSHM_OK;
}

/* The image --------------------------------------------------------------------------------- */

static void fill_header(const builder_t *b, vocabulary_header_t *h, uint32_t pattern) {
  h->magic = TOKENS_MAGIC;
  h->version = FSHM_TOKENS_VERSION;
  h->byte_order = FSHM_BYTE_ORDER;
  h->pattern = pattern;
  h->tokens = (uint32_t)b->count;
  h->special = (uint32_t)b->special_count;
  h->word_bits = b->word_bits;
  h->key_bits = b->key_bits;
  h->pair_bits = b->pair_bits;
  h->cells = (uint32_t)b->cell_count;
  h->root = NODE_BASE(b->cells[0]);
  h->most_length = 1;
  for (uint64_t i = 0; i < b->count; i++) {
    h->bytes += b->tokens[i].length;
    if (b->tokens[i].length > h->most_length) h->most_length = b->tokens[i].length;
  }
  for (uint64_t i = 0; i < b->special_count; i++) h->bytes += b->special[i].length;
  h->size = vocabulary_layout(h).size;
}

static void put_tokens(const builder_t *b, unsigned char *map, const vocabulary_layout_t *l) {
  uint32_t *ranks = (uint32_t *)(void *)(map + l->ranks);
  uint32_t *offsets = (uint32_t *)(void *)(map + l->offsets);
  uint32_t *special = (uint32_t *)(void *)(map + l->special), at = 0;
  for (uint64_t i = 0; i < b->count + b->special_count; i++) {
    const record_t *r = i < b->count ? &b->tokens[i] : &b->special[i - b->count];
    *(i < b->count ? &ranks[i] : &special[i - b->count]) = r->rank;
    offsets[i] = at;
    memcpy(map + l->bytes + at, r->bytes, r->length);
    at += r->length;
  }
  offsets[b->count + b->special_count] = at;
}

static int make_image(const builder_t *b, vocabulary_header_t *h, fshm_vocabulary **out,
                      fshm_error *e) {
  vocabulary_layout_t l = vocabulary_layout(h);
  unsigned char *map = aligned_alloc(LINE, l.size);
  if (!map) return image_fail(e, FSHM_E_MEMORY);
  memset(map, 0, l.size);
  memcpy(map + l.words, b->words, UINT64_C(8) << b->word_bits);
  memcpy(map + l.keys, b->keys, UINT64_C(16) << b->key_bits);
  memcpy(map + l.word_ids, b->word_ids, UINT64_C(4) << b->word_bits);
  memcpy(map + l.key_ids, b->key_ids, UINT64_C(4) << b->key_bits);
  memcpy(map + l.nodes, b->cells, UINT64_C(8) * b->cell_count);
  memcpy(map + l.halves, b->halves, sizeof *b->halves * b->count);
  memcpy(map + l.prefixes, b->prefixes, sizeof *b->prefixes * b->count);
  memcpy(map + l.pairs, b->pairs, UINT64_C(8) << b->pair_bits);
  memcpy(map + l.filter, b->filter, FILTER_BYTES(b));
  put_bigrams(b, (uint32_t *)(void *)(map + l.bigrams));
  if (put_characters(b, (uint64_t *)(void *)(map + l.characters)) != FSHM_OK) {
    free(map);
    return image_fail(e, FSHM_E_MEMORY);
  }
  put_tokens(b, map, &l);
  h->checksum = vocabulary_checksum(map + l.words, l.size - l.words);
  h->check = vocabulary_header_check(h);
  memcpy(map, h, sizeof *h);
  int status = vocabulary_adopt(map, h, false, out, e);
  if (status != FSHM_OK) free(map);
  return status;
}

static _Atomic uint32_t build_lock;

int fshm_vocabulary_build(const void *ranks, uint64_t length, const void *special,
                          uint64_t special_length, uint32_t pattern, fshm_vocabulary **out,
                          fshm_error *e) {
  builder_t b = {0};
  vocabulary_header_t h = {0};
  memset(e, 0, sizeof *e);
  *out = NULL;
  if (pattern < FSHM_PATTERN_R50K || pattern > FSHM_PATTERN_O200K)
    return image_fail(e, FSHM_E_ARGUMENT);
  threads_lock(&build_lock);
  int status = parse_records(ranks, length, false, &b.tokens, &b.count);
  if (status == FSHM_OK)
    status = parse_records(special, special_length, true, &b.special, &b.special_count);
  if (status == FSHM_OK) status = index_bytes(&b);
  if (status == FSHM_OK) status = find_merges(&b);
  if (status == FSHM_OK) status = build_trie(&b);
  if (status == FSHM_OK) status = build_tables(&b);
  if (status == FSHM_OK) {
    fill_header(&b, &h, pattern);
    uint64_t hash[2];
    fshm_siphash128(pattern, special_length, ranks, length, hash);
    fshm_siphash128(hash[0], hash[1], special, special_length, h.identity);
    status = make_image(&b, &h, out, e);
  } else {
    (void)image_fail(e, status);
  }
  builder_free(&b);
  threads_unlock(&build_lock);
  return status;
}
