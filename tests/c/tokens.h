/* tokens.h - a plain reference for the engine that counts tokens, and vocabularies made at random. Slow and simple on
 * purpose: the patterns are matched as a regular expression is, with backtracking, and bytes are merged one pair at a
 * time. Includes nothing: check.h comes before it. */
#ifndef TEST_TOKENS_H
#define TEST_TOKENS_H

typedef struct {
  uint8_t *records; /* as fshm_vocabulary_build() takes them */
  uint64_t length;
  const uint8_t *bytes[1024]; /* the token of each rank, in `records` */
  unsigned lengths[1024], count;
  uint32_t pattern;
  fshm_vocabulary *v;
} vocabulary_t;

static const char special_records[] =
    "\7<|end|>\xa0\x86\1\0\5<|x|>\xa1\x86\1\0"; /* 100000, 100001 */

/* Patterns ---------------------------------------------------------------------------------- */

enum {
  BLANK = 1 << 8,
  SLASH = 1 << 9,
  ANY = (1 << 10) - 1
}; /* beside the classes, for ' ' and '/' */
enum { IN_SET, POSSESSIVE, CONTRACTION, NOT_BEFORE_TEXT, AT_END, MATCHED };
#define MANY 1000000
#define LONGEST_TEXT 4096 /* bytes */

typedef struct {
  int kind;
  unsigned set;
  int least, most;
} atom_t;

typedef struct {
  unsigned set, code, offset; /* offset: where it begins */
} letter_t;

#define NEITHER (ANY & ~(LETTERS | SET(NUMBER) | SET(NEWLINE)))

static const atom_t r50k[][6] = {
    {{CONTRACTION, 0, 1, 0}, {MATCHED, 0, 0, 0}},
    {{IN_SET, BLANK, 0, 1}, {POSSESSIVE, LETTERS, 1, MANY}, {MATCHED, 0, 0, 0}},
    {{IN_SET, BLANK, 0, 1}, {POSSESSIVE, SET(NUMBER), 1, MANY}, {MATCHED, 0, 0, 0}},
    {{IN_SET, BLANK, 0, 1}, {POSSESSIVE, SYMBOLS, 1, MANY}, {MATCHED, 0, 0, 0}},
    {{POSSESSIVE, SPACES, 1, MANY}, {AT_END, 0, 0, 0}, {MATCHED, 0, 0, 0}},
    {{IN_SET, SPACES, 1, MANY}, {NOT_BEFORE_TEXT, 0, 0, 0}, {MATCHED, 0, 0, 0}},
    {{IN_SET, SPACES, 1, 1}, {MATCHED, 0, 0, 0}}};
static const atom_t cl100k[][6] = {
    {{CONTRACTION, 0, 1, 1}, {MATCHED, 0, 0, 0}},
    {{POSSESSIVE, NEITHER, 0, 1}, {POSSESSIVE, LETTERS, 1, MANY}, {MATCHED, 0, 0, 0}},
    {{POSSESSIVE, SET(NUMBER), 1, 3}, {MATCHED, 0, 0, 0}},
    {{IN_SET, BLANK, 0, 1},
     {POSSESSIVE, SYMBOLS, 1, MANY},
     {POSSESSIVE, SET(NEWLINE), 0, MANY},
     {MATCHED, 0, 0, 0}},
    {{POSSESSIVE, SPACES, 1, MANY}, {AT_END, 0, 0, 0}, {MATCHED, 0, 0, 0}},
    {{IN_SET, SPACES, 0, MANY}, {IN_SET, SET(NEWLINE), 1, 1}, {MATCHED, 0, 0, 0}},
    {{IN_SET, SPACES, 1, MANY}, {NOT_BEFORE_TEXT, 0, 0, 0}, {MATCHED, 0, 0, 0}},
    {{IN_SET, SPACES, 1, 1}, {MATCHED, 0, 0, 0}}};
static const atom_t o200k[][6] = {
    {{IN_SET, NEITHER, 0, 1},
     {IN_SET, UPPERS, 0, MANY},
     {IN_SET, LOWERS, 1, MANY},
     {CONTRACTION, 0, 0, 1},
     {MATCHED, 0, 0, 0}},
    {{IN_SET, NEITHER, 0, 1},
     {IN_SET, UPPERS, 1, MANY},
     {IN_SET, LOWERS, 0, MANY},
     {CONTRACTION, 0, 0, 1},
     {MATCHED, 0, 0, 0}},
    {{IN_SET, SET(NUMBER), 1, 3}, {MATCHED, 0, 0, 0}},
    {{IN_SET, BLANK, 0, 1},
     {IN_SET, SYMBOLS, 1, MANY},
     {IN_SET, SET(NEWLINE) | SLASH, 0, MANY},
     {MATCHED, 0, 0, 0}},
    {{IN_SET, SPACES, 0, MANY}, {IN_SET, SET(NEWLINE), 1, MANY}, {MATCHED, 0, 0, 0}},
    {{IN_SET, SPACES, 1, MANY}, {NOT_BEFORE_TEXT, 0, 0, 0}, {MATCHED, 0, 0, 0}},
    {{IN_SET, SPACES, 1, MANY}, {MATCHED, 0, 0, 0}}};

static int folded(unsigned code, bool any_case) {
  if (any_case && code == 0x17f) return 's';
  if (any_case && code >= 'A' && code <= 'Z') return (int)code + 32;
  return (int)code;
}

/* The letters of the contraction at i; 0: there is none. */
static int reference_contraction(const letter_t *text, int i, int n, bool any_case) {
  static const char *const all[] = {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"};
  for (size_t k = 0; k < sizeof all / sizeof *all; k++) {
    int length = (int)strlen(all[k]), same = 0;
    while (same < length && i + same < n && folded(text[i + same].code, any_case) == all[k][same])
      same++;
    if (same == length) return length;
  }
  return 0;
}

/* The end of a match at i, or -1. */
static int match_atoms(const atom_t *a, const letter_t *text, int i, int n) {
  if (a->kind == MATCHED) return i;
  if (a->kind == AT_END) return i == n ? match_atoms(a + 1, text, i, n) : -1;
  if (a->kind == NOT_BEFORE_TEXT)
    return i == n || text[i].set & SPACES ? match_atoms(a + 1, text, i, n) : -1;
  if (a->kind == CONTRACTION) {
    int length = reference_contraction(text, i, n, a->most);
    return length >= a->least ? match_atoms(a + 1, text, i + length, n) : -1;
  }
  int taken = 0;
  while (taken < a->most && i + taken < n && text[i + taken].set & a->set) taken++;
  for (; taken >= a->least; taken--) {
    int end = match_atoms(a + 1, text, i + taken, n);
    if (end >= 0 || a->kind == POSSESSIVE) return end;
  }
  return -1;
}

static int reference_piece(uint32_t pattern, const letter_t *text, int i, int n) {
  const atom_t(*alternatives)[6] = pattern == FSHM_PATTERN_R50K     ? r50k
                                   : pattern == FSHM_PATTERN_CL100K ? cl100k
                                                                    : o200k;
  int end = -1, count = pattern == FSHM_PATTERN_CL100K ? 8 : 7;
  for (int k = 0; k < count && end < 0; k++) end = match_atoms(alternatives[k], text, i, n);
  return end;
}

/* The characters of a text, and one more where it ends. A byte that begins none is one. */
static int reference_letters(const uint8_t *p, size_t length, letter_t *out) {
  static const unsigned widths[16] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 3, 4};
  int n = 0;
  for (size_t at = 0; at < length; n++) {
    unsigned width = p[at] == 0xc0 || p[at] == 0xc1 || p[at] >= 0xf8 ? 1 : widths[p[at] >> 4];
    if (width > length - at) width = 1;
    unsigned code = p[at];
    if (width > 1) code &= 0x7fU >> width;
    for (unsigned i = 1; i < width; i++) code = code << 6 | (p[at + i] & 63U);
    unsigned class = CLASS_OTHER;
    if (code < 0x110000 && (width > 1 || code < 0x80))
      class = class_blocks[class_block[code / 64] * 64U + code % 64];
    out[n] = (letter_t){1U << class | (code == ' ' && width == 1 ? BLANK : 0) |
                            (code == '/' && width == 1 ? SLASH : 0),
                        width == 1 && code >= 0x80 ? 0xfffd : code, (unsigned)at};
    at += width;
  }
  out[n].offset = (unsigned)length;
  return n;
}

/* Merges ------------------------------------------------------------------------------------ */

static uint32_t reference_rank(const vocabulary_t *t, const uint8_t *p, size_t length) {
  for (uint32_t rank = 0; rank < t->count; rank++)
    if (t->lengths[rank] == length && !memcmp(t->bytes[rank], p, length)) return rank;
  return UINT32_MAX;
}

/* Merge the pair of the lowest rank, the leftmost first, until there is none. Returns the number of parts; the ends of
 * the parts are in ends. */
static size_t reference_merge(const vocabulary_t *t, const uint8_t *p, size_t length,
                              uint32_t *ends) {
  size_t n = length;
  for (size_t i = 0; i < n; i++) ends[i] = (uint32_t)i + 1;
  for (;;) {
    size_t at = 0;
    uint32_t least = UINT32_MAX;
    for (size_t i = 0; i + 1 < n; i++) {
      uint32_t from = i ? ends[i - 1] : 0, rank = reference_rank(t, p + from, ends[i + 1] - from);
      if (rank >= least) continue;
      least = rank;
      at = i;
    }
    if (least == UINT32_MAX) return n;
    memmove(&ends[at], &ends[at + 1], (n - at - 1) * sizeof *ends);
    n--;
  }
}

static size_t reference_encode(const vocabulary_t *t, const uint8_t *p, size_t length,
                               uint32_t *out) {
  static _Thread_local letter_t text[LONGEST_TEXT + 1];
  static _Thread_local uint32_t ends[LONGEST_TEXT];
  size_t count = 0;
  int n = reference_letters(p, length, text);
  for (int i = 0; i < n;) {
    int to = reference_piece(t->pattern, text, i, n);
    if (to <= i) abort();
    const uint8_t *piece = p + text[i].offset;
    size_t size = text[to].offset - text[i].offset;
    uint32_t whole = reference_rank(t, piece, size);
    size_t parts = whole == UINT32_MAX ? reference_merge(t, piece, size, ends) : 0;
    if (!parts) out[count++] = whole;
    for (size_t k = 0; k < parts; k++) {
      uint32_t from = k ? ends[k - 1] : 0;
      out[count++] = reference_rank(t, piece + from, ends[k] - from);
    }
    i = to;
  }
  return count;
}

/* Vocabularies ------------------------------------------------------------------------------ */

static void add_token(vocabulary_t *t, const uint8_t *bytes, unsigned length) {
  uint8_t *at = t->records + t->length;
  at[0] = (uint8_t)length;
  memcpy(at + 1, bytes, length);
  uint32_t rank = t->count;
  for (int i = 0; i < 4; i++) at[1 + length + (unsigned)i] = (uint8_t)(rank >> 8 * i);
  t->bytes[rank] = at + 1;
  t->lengths[rank] = length;
  t->count++;
  t->length += length + 5U;
}

/* Characters above ASCII, some of which begin or end alike. */
static const char *const wide_characters[] = {
    "\xc3\xa9",     "\xc4\xa9",     "\xe4\xb8\xad",     "\xe4\xb8\x80",     "\xe4\xb9\xad",
    "\xe3\x80\x82", "\xe2\x80\x8d", "\xf0\x9f\x98\x80", "\xf0\x9f\x98\x82", "\xf0\x9f\x99\x80"};

#define WIDE_CHARACTERS ((unsigned)(sizeof wide_characters / sizeof *wide_characters))

/* Of the first `most` of these, and sometimes a letter. Returns the length, up to `size`. */
static inline size_t wide_text(uint8_t *text, size_t size, unsigned most) {
  size_t at = 0;
  for (;;) {
    const char *next = random_below(20) ? wide_characters[random_below(most)] : "a";
    size_t length = strlen(next);
    if (at + length > size) return at;
    memcpy(text + at, next, length);
    at += length;
  }
}

/* The 256 bytes, and then as training does it: two neighbours that a text is merged to become a token. alphabet:
 * letters from a on, a blank, and the bytes of some characters; 0: characters above ASCII. One more token is none that
 * merging yields, often. */
static vocabulary_t make_vocabulary(unsigned alphabet, unsigned merges) {
  static const char others[] = " \n'\xc3\xa9\xe4\xb8\xad";
  vocabulary_t t = {.records = calloc(1, 1 << 17), .pattern = FSHM_PATTERN_CL100K};
  uint8_t text[64];
  uint32_t ends[64];
  for (unsigned i = 0; i < 256; i++) add_token(&t, (uint8_t[]){(uint8_t)i}, 1);
  for (unsigned i = 0; i < merges; i++) {
    for (size_t at = 0; at < sizeof text; at++)
      text[at] = random_below(8) && alphabet ? (uint8_t)('a' + random_below(alphabet))
                                             : (uint8_t)others[random_below(sizeof others - 1)];
    if (!alphabet) {
      size_t length = wide_text(text, sizeof text, WIDE_CHARACTERS);
      memset(text + length, 'a', sizeof text - length);
    }
    size_t n = reference_merge(&t, text, sizeof text, ends), at = n > 2 ? random_below(n - 2) : n;
    if (at == n || ends[at + 2] - ends[at] > 40) continue;
    add_token(&t, text + ends[at], ends[at + 2] - ends[at]);
  }
  if (merges && reference_rank(&t, text, 7) == UINT32_MAX) add_token(&t, text, 7);
  return t;
}

/* Checks ------------------------------------------------------------------------------------ */

static inline vocabulary_t fresh_vocabulary(uint32_t pattern, unsigned alphabet, unsigned merges) {
  vocabulary_t t = make_vocabulary(alphabet, merges);
  fshm_error e;
  t.pattern = pattern;
  CHECK_EQ(fshm_vocabulary_build(t.records, t.length, special_records, sizeof special_records - 1,
                                 pattern, &t.v, &e),
           FSHM_OK);
  return t;
}

static inline void free_vocabulary(vocabulary_t *t) {
  fshm_vocabulary_close(t->v);
  free(t->records);
}

/* Count, encode, fits, truncate and decode agree with the reference on one text. most: tokens. */
static inline void check_text(vocabulary_t *t, const uint8_t *text, size_t length, uint64_t most) {
  static uint32_t got[LONGEST_TEXT], want[LONGEST_TEXT];
  CHECK_OP(length, <, LONGEST_TEXT);
  size_t n = reference_encode(t, text, length, want);
  CHECK_EQ(fshm_tokens_encode(t->v, text, length, got), (int64_t)n);
  CHECK_EQ(memcmp(got, want, n * sizeof *got), 0);
  CHECK_EQ(fshm_tokens_count(t->v, text, length, UINT64_MAX), (int64_t)n);
  CHECK_EQ(fshm_tokens_count(t->v, text, length, UINT64_MAX), (int64_t)n); /* from the cache */
  int64_t counted = fshm_tokens_count(t->v, text, length, most);
  CHECK_EQ(counted > (int64_t)most, n > most);
  int64_t cut = fshm_tokens_truncate(t->v, text, length, most);
  CHECK_OP(cut, >=, 0);
  CHECK_OP(cut, <=, (int64_t)length);
  CHECK_OP(fshm_tokens_count(t->v, text, (uint64_t)cut, UINT64_MAX), <=, (int64_t)most);
  uint64_t bad = 0;
  static uint8_t back[LONGEST_TEXT];
  CHECK_EQ(fshm_tokens_decode(t->v, got, n, back, sizeof back, &bad), (int64_t)length);
  CHECK_EQ(memcmp(back, text, length), 0);
}

/* Hostile files ----------------------------------------------------------------------------- */

#define MOST_FILE (UINT64_C(1) << 22) /* bytes */

/* A file's image, `size` bytes with room for MOST_FILE, made such that opening believes it: the header's check and the
 * checksum fit, where the header's numbers are within their bounds. as_large: the image gets the length that the header
 * asks for, with zeros, or is cut off there; else the header is given the length that the image has. Returns the
 * length. */
static inline uint64_t make_right(uint8_t *image, uint64_t size, bool as_large) {
  vocabulary_header_t h;
  if (size < sizeof h) return size;
  memcpy(&h, image, sizeof h);
  if (within_bounds(&h)) {
    vocabulary_layout_t l = vocabulary_layout(&h);
    if (as_large && l.size <= MOST_FILE) {
      if (l.size > size) memset(image + size, 0, l.size - size);
      size = l.size;
    }
    h.size = size;
    if (size >= l.words) h.checksum = vocabulary_checksum(image + l.words, size - l.words);
  }
  h.check = vocabulary_header_check(&h);
  memcpy(image, &h, sizeof h);
  return size;
}

/* Open such a file, and use all there is of it on a text of up to LONGEST_TEXT bytes. No count, no text can be wrong
 * then, but none is beyond its bounds. Returns the status of opening. */
static inline int use_file(const uint8_t *image, uint64_t size, const uint8_t *text,
                           size_t length) {
  static uint32_t out[LONGEST_TEXT];
  static uint8_t back[1 << 16];
  static int fd = -1;
  fshm_vocabulary *v = NULL;
  fshm_error e = {0};
  if (fd < 0) fd = memfd_create("test_tokens", MFD_CLOEXEC);
  if (fd < 0 || fchmod(fd, 0600) || ftruncate(fd, 0) || pwrite(fd, image, size, 0) != (ssize_t)size)
    abort();
  int status = open_fd(fd, &v, &e);
  CHECK_EQ(v != NULL, status == FSHM_OK);
  if (!v) {
    CHECK_EQ(status == FSHM_E_DAMAGED || status == FSHM_E_LAYOUT, 1);
    return status;
  }
  uint64_t bad = 0;
  int64_t n = fshm_tokens_count(v, text, length, UINT64_MAX);
  CHECK_EQ(n >= 0 && n <= (int64_t)length, 1);
  n = fshm_tokens_encode(v, text, length, out);
  CHECK_EQ(n >= 0 && n <= (int64_t)length, 1);
  int64_t cut = fshm_tokens_truncate(v, text, length, length / 3);
  CHECK_EQ(cut >= 0 && cut <= (int64_t)length, 1);
  (void)fshm_tokens_decode(v, out, (uint64_t)n, back, sizeof back, &bad);
  for (uint32_t i = 0; i < 8; i++) { /* special ones, and ranks that are none */
    uint32_t rank = 0, size_of = 0;
    const void *bytes = NULL;
    if (fshm_vocabulary_special(v, i, &rank, &bytes, &size_of) == FSHM_OK && size_of)
      back[0] = ((const uint8_t *)bytes)[size_of - 1];
    (void)fshm_tokens_decode(v, &rank, 1, back, sizeof back, &bad);
  }
  fshm_vocabulary_close(v);
  return status;
}

#endif
