/* test_tokens.c - the engine that counts tokens, against merging done byte by byte, on vocabularies of its own. */
#include "../../csrc/unity.c"
#include "../../csrc/tokens/engine.c"

#include "check.h"
#include "tokens.h"

/* Letters of a small alphabet: long pieces, with many merges that compete. */
static void test_merging(void) {
  static uint8_t text[600];
  for (unsigned alphabet = 1; alphabet <= 4; alphabet++) {
    for (int round = 0; round < 6; round++) {
      vocabulary_t t =
          fresh_vocabulary(FSHM_PATTERN_CL100K, alphabet, 1 + (unsigned)random_below(200));
      for (int i = 0; i < 300; i++) {
        size_t length = random_below(i % 100 ? 40 : sizeof text);
        for (size_t at = 0; at < length; at++) text[at] = (uint8_t)('a' + random_below(alphabet));
        check_text(&t, text, length, random_below(length + 2));
      }
      free_vocabulary(&t);
    }
  }
}

/* Pieces long enough for hints: letters, of which windows are merged, and characters above ASCII. */
static void test_hints(void) {
  static uint8_t text[500];
  for (int round = 0; round < 24; round++) {
    bool wide = round % 2;
    unsigned alphabet = wide ? 0 : 2 + (unsigned)random_below(5), used = alphabet;
    vocabulary_t t = fresh_vocabulary(FSHM_PATTERN_CL100K, alphabet, (unsigned)random_below(300));
    for (int i = 0, n = fewer(20); i < n; i++) {
      size_t length = 100 + random_below(sizeof text - 100);
      if (wide) {
        length = wide_text(text, length, 1 + (unsigned)random_below(WIDE_CHARACTERS));
      } else {
        if (!random_below(4))
          used = 1 + (unsigned)random_below(alphabet); /* then letters rarely merge, too */
        for (size_t at = 0; at < length; at++)
          text[at] = (uint8_t)('a' + random_below(random_below(99) ? used : 26));
      }
      check_text(&t, text, length, random_below(length));
    }
    free_vocabulary(&t);
  }
}

/* Any bytes, also such as are no UTF-8: each byte belongs to one piece. */
static void test_any_bytes(void) {
  static uint8_t text[600];
  for (uint32_t pattern = FSHM_PATTERN_R50K; pattern <= FSHM_PATTERN_O200K; pattern++) {
    vocabulary_t t = fresh_vocabulary(pattern, 4, 100);
    for (int i = 0; i < 3000; i++) {
      size_t length = random_below(i % 10 ? 40 : sizeof text);
      for (size_t at = 0; at < length; at++) text[at] = (uint8_t)random_u64();
      check_text(&t, text, length, random_below(length + 2));
    }
    free_vocabulary(&t);
  }
}

/* Alphabets in which each rule of the patterns comes often, and a long one. */
static const char *const ascii_alphabets[] = {
    "ab \n",
    "aB ",
    "aAsStTlLvVeErRdDmM''''' ",
    "a \t\n\r\n ",
    ".!\n\r/ a//",
    "0123456789 a.",
    "a. ",
    "a\n  \t\v\f.",
    " ",
    "aAbB'sll .,-/0123\n\t\x1c\xc3\xa9\xc5\xbf\xe4\xb8\xad",
    "etaoinshrdlu etaoinshrdlu ETAOIN SHRDLU   ..,,''()-_\"=/:;#\n\n\t0123456789"};

static size_t ascii_text(uint8_t *text, size_t most) {
  const char *from =
      ascii_alphabets[random_below(sizeof ascii_alphabets / sizeof *ascii_alphabets)];
  size_t letters = strlen(from), length = random_below(most);
  bool words = random_below(2);
  for (size_t at = 0; at < length; at++)
    text[at] =
        (uint8_t)from[words && random_below(4) ? random_below(2) % letters : random_below(letters)];
  return length;
}

/* Texts of ASCII, mostly: what is split many pieces at a time. */
static void test_ascii(void) {
  static uint8_t text[600];
  for (uint32_t pattern = FSHM_PATTERN_R50K; pattern <= FSHM_PATTERN_O200K; pattern++) {
    vocabulary_t t = fresh_vocabulary(pattern, 3, 60);
    int rounds = fewer(3000);
    for (int i = 0; i < rounds; i++) {
      size_t length = ascii_text(text, i % 20 ? 160 : sizeof text);
      check_text(&t, text, length, random_below(length + 2));
    }
    free_vocabulary(&t);
  }
}

#if defined(__SSE2__)
/* What begins in a block, from any beginning of a piece on, is what pieces are one by one: none is left out. */
static void test_blocks(void) {
  static uint8_t text[4 * BLOCK];
  int rounds = fewer(300000);
  uint64_t found = 0;
  for (int i = 0; i < rounds; i++) {
    uint32_t pattern = i % 2 ? FSHM_PATTERN_CL100K : FSHM_PATTERN_O200K;
    size_t length = ascii_text(text, sizeof text - BLOCK);
    const uint8_t *end = text + length;
    for (const uint8_t *p = text; end - p >= 16; p = piece_end(pattern, p, end)) {
      unsigned known = 0;
      while (known < BLOCK - 1 && p + known < end && p[known] < 0x80) known++;
      if (known < 4) continue;
      uint64_t starts = block_starts(pattern, p, known), pieces = 1;
      for (const uint8_t *at = p; at - p < BLOCK && BIT(at - p) <= starts && at != end;
           at = piece_end(pattern, at, end))
        pieces |= BIT(at - p);
      found += starts != 1;
      if (starts == pieces) continue;
      CHECK_EQ(starts, pieces);
      (void)fprintf(stderr, "pattern %u, %u of: %.*s\n", pattern, known, (int)(end - p),
                    (const char *)p);
    }
  }
  CHECK_OP(found, >, rounds);
}
#endif

typedef struct {
  uint32_t pattern;
  const char *text, *pieces; /* with | between them */
} split_t;

static void test_pieces(void) {
  static const split_t splits[] = {
      {1, "it's 123456 'tis\n\n  x  ", "it|'s| 123456| '|tis|\n\n | x|  "},
      {1, "IT'S", "IT|'|S"},
      {2, "IT'S 1234567 a\r\n\n  b\n  ", "IT|'S| |123|456|7| a|\r\n\n| | b|\n  "},
      {2, "x'\u017f!\n\n/y", "x|'\u017f|!\n\n|/y"},
      {2, "\u00a0\u00e9t\u00e9 \u4e2d\u6587\u3002", "\u00a0\u00e9t\u00e9| \u4e2d\u6587|\u3002"},
      {3, "HTTPServer's iPhone", "HTTPServer's| i|Phone"},
      {3, "\u4e2dABC d", "\u4e2d|ABC| d"},
      {3, "\u0301ABC", "\u0301|ABC"},
      {3, "!\u0301a //\n/x\n  ", "!\u0301a| //\n/|x|\n|  "},
      {3, "don'T '\u017f 12345", "don'T| '|\u017f| |123|45"},
  };
  for (size_t i = 0; i < sizeof splits / sizeof *splits; i++) {
    const uint8_t *p = (const uint8_t *)splits[i].text, *end = p + strlen(splits[i].text);
    char got[200];
    size_t at = 0;
    while (p != end) {
      const uint8_t *next = piece_end(splits[i].pattern, p, end);
      CHECK_OP(next, >, p);
      if (next <= p) break;
      if (at) got[at++] = '|';
      memcpy(got + at, p, (size_t)(next - p));
      at += (size_t)(next - p);
      p = next;
    }
    got[at] = 0;
    CHECK_EQ(strcmp(got, splits[i].pieces), 0);
    if (strcmp(got, splits[i].pieces) != 0) (void)fprintf(stderr, "got %s\n", got);
  }
}

/* A vocabulary that the engine could not count exactly with is refused. */
static void test_refused(void) {
  static const struct {
    const char *extra;
    uint32_t length;
  } bad[] = {
      {"\2ab\0\1\0", 6}, /* cut off */
      {"\0\0\1\0\0", 5}, /* an empty token */
      {"\2ab\0\1\0\0\2ab\1\1\0\0", 14}, /* a token twice */
      {"\2ab\0\1\0\0\2bc\0\1\0\0", 14}, /* a rank twice */
      {"\1a\0\1\0\0", 6}, /* a byte twice */
      {"\3abc\0\1\0\0\2ab\1\1\0\0", 15}, /* abc ranks before ab, of which it is merged */
      {"\2ab\1\0\0\0", 7}, /* the rank of a byte */
      {"\2ab\xff\xff\xff\xff", 7}, /* a rank that is none */
  };
  fshm_error e;
  fshm_vocabulary *v;
  for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
    vocabulary_t t = make_vocabulary(0, 0);
    memcpy(t.records + t.length, bad[i].extra, bad[i].length);
    int status = fshm_vocabulary_build(t.records, t.length + bad[i].length, "", 0,
                                       FSHM_PATTERN_R50K, &v, &e);
    CHECK_EQ(status, FSHM_E_ARGUMENT);
    fshm_vocabulary_close(v);
    free(t.records);
  }
  vocabulary_t t = make_vocabulary(0, 0);
  CHECK_EQ(fshm_vocabulary_build(t.records, t.length - 6, "", 0, 1, &v, &e), FSHM_E_ARGUMENT);
  CHECK_EQ(fshm_vocabulary_build(t.records, t.length, "", 0, 0, &v, &e), FSHM_E_ARGUMENT);
  CHECK_EQ(fshm_vocabulary_build(t.records, t.length, "", 0, 4, &v, &e), FSHM_E_ARGUMENT);
  free(t.records);
}

static void test_special(void) {
  vocabulary_t t = fresh_vocabulary(FSHM_PATTERN_O200K, 2, 10);
  uint32_t rank = 0, length = 0, ranks[3] = {100000, 'a', 200000};
  const void *bytes = NULL;
  uint64_t bad = 9;
  uint8_t out[64];
  CHECK_EQ(fshm_vocabulary_special(t.v, 0, &rank, &bytes, &length), FSHM_OK);
  CHECK_EQ(rank, 100000);
  CHECK_EQ(length, 7);
  CHECK_EQ(memcmp(bytes, "<|end|>", 7), 0);
  CHECK_EQ(fshm_vocabulary_special(t.v, 2, &rank, &bytes, &length), FSHM_E_ARGUMENT);
  CHECK_EQ(fshm_tokens_decode(t.v, ranks, 2, out, sizeof out, &bad), 8);
  CHECK_EQ(memcmp(out, "<|end|>a", 8), 0);
  CHECK_EQ(fshm_tokens_decode(t.v, ranks, 2, out, 3, &bad),
           8); /* its length, where it does not fit */
  CHECK_EQ(fshm_tokens_decode(t.v, ranks, 3, out, sizeof out, &bad), FSHM_E_ARGUMENT);
  CHECK_EQ(bad, 2);
  free_vocabulary(&t);
}

/* Files ------------------------------------------------------------------------------------- */

static char file_path[64];

static int open_status(void) {
  fshm_vocabulary *v = NULL;
  fshm_error e;
  int status = fshm_vocabulary_open(file_path, &v, &e);
  CHECK_EQ(v != NULL, status == FSHM_OK);
  fshm_vocabulary_close(v);
  return status;
}

static void write_at(uint64_t at, const void *bytes, size_t length) {
  int fd = open(file_path, O_WRONLY | O_CLOEXEC);
  CHECK_OP(fd, >=, 0);
  CHECK_EQ(pwrite(fd, bytes, length, (off_t)at), (ssize_t)length);
  (void)close(fd);
}

static vocabulary_t saved_vocabulary(void) {
  vocabulary_t t = fresh_vocabulary(FSHM_PATTERN_CL100K, 3, 50);
  fshm_error e;
  CHECK_EQ(fshm_vocabulary_save(t.v, file_path, &e), FSHM_OK);
  return t;
}

static void test_file(void) {
  vocabulary_t t = saved_vocabulary();
  fshm_vocabulary *mapped = NULL, *built = t.v;
  fshm_vocabulary_info a, b;
  fshm_error e;
  CHECK_EQ(fshm_vocabulary_open(file_path, &mapped, &e), FSHM_OK);
  fshm_vocabulary_describe(built, &a);
  fshm_vocabulary_describe(mapped, &b);
  CHECK_EQ(a.mapped, 0);
  CHECK_EQ(b.mapped, 1);
  CHECK_EQ(a.identity[0], b.identity[0]);
  CHECK_EQ(b.pattern, FSHM_PATTERN_CL100K);
  CHECK_EQ(b.special, 2);
  t.v = mapped;
  check_text(&t, (const uint8_t *)"abcabcaabbcc aab", 16, 4);
  /* Written anew, and removed: who has it mapped keeps it. */
  CHECK_EQ(fshm_vocabulary_save(built, file_path, &e), FSHM_OK);
  CHECK_EQ(unlink(file_path), 0);
  check_text(&t, (const uint8_t *)"abcabcaabbcc aab", 16, 4);
  CHECK_EQ(open_status(), FSHM_E_NOT_FOUND);
  CHECK_EQ(fshm_vocabulary_save(built, "/nowhere/at/all", &e), FSHM_E_NOT_FOUND);
  fshm_vocabulary_close(built);
  free_vocabulary(&t);
}

/* Each byte of the header, and some of the contents, with another value. */
static void test_damaged(void) {
  vocabulary_t t = saved_vocabulary();
  uint64_t size = t.v->header.size;
  for (uint64_t i = 0; i < sizeof(vocabulary_header_t) + 300; i++) {
    uint64_t at = i < sizeof(vocabulary_header_t) ? i : random_below(size);
    uint8_t was = t.v->map[at], other = (uint8_t)(was ^ (1 + random_below(255)));
    bool padding = at >= sizeof(vocabulary_header_t) && at < in_lines(sizeof(vocabulary_header_t));
    write_at(at, &other, 1);
    int status = open_status();
    bool said =
        status == FSHM_E_DAMAGED || status == FSHM_E_LAYOUT || (padding && status == FSHM_OK);
    if (!said) CHECK_EQ(at, UINT64_MAX);
    write_at(at, &was, 1);
  }
  CHECK_EQ(open_status(), FSHM_OK);
  CHECK_EQ(truncate(file_path, (off_t)size - 64), 0);
  CHECK_EQ(open_status(), FSHM_E_DAMAGED);
  CHECK_EQ(truncate(file_path, 10), 0);
  CHECK_EQ(open_status(), FSHM_E_DAMAGED);
  CHECK_EQ(unlink(file_path), 0);
  free_vocabulary(&t);
}

static void test_foreign(void) {
  vocabulary_t t = saved_vocabulary();
  CHECK_EQ(chmod(file_path, 0664), 0);
  CHECK_EQ(open_status(), FSHM_E_OWNER);
  CHECK_EQ(chmod(file_path, 0646), 0);
  CHECK_EQ(open_status(), FSHM_E_OWNER);
  CHECK_EQ(unlink(file_path), 0);
  CHECK_EQ(symlink("/dev/zero", file_path), 0);
  CHECK_EQ(open_status(), FSHM_E_LINK);
  CHECK_EQ(unlink(file_path), 0);
  CHECK_EQ(mkfifo(file_path, 0600), 0);
  CHECK_EQ(open_status(), FSHM_E_KIND);
  CHECK_EQ(unlink(file_path), 0);
  free_vocabulary(&t);
}

/* A file with a good header and checksum, and anything in it: no crash, no hang, some count. */
static void test_hostile(void) {
  static uint8_t text[400];
  vocabulary_t t = saved_vocabulary();
  uint64_t size = t.v->header.size, begin = vocabulary_layout(&t.v->header).words;
  static uint32_t out[sizeof text];
  static uint8_t back[1 << 16];
  for (int round = 0; round < 200; round++) {
    unsigned char *map = aligned_alloc(LINE, size);
    memcpy(map, t.v->map, size);
    uint64_t changes = random_below(4) ? random_below(200) : size / 16;
    for (uint64_t i = 0; i < changes; i++) {
      uint64_t word = random_below(3)   ? random_u64()
                      : random_below(2) ? UINT64_MAX
                                        : random_below(512);
      memcpy(map + begin + random_below((size - begin) / 4) * 4, &word, 4);
    }
    fshm_vocabulary *v;
    fshm_error e;
    CHECK_EQ(vocabulary_adopt(map, &t.v->header, false, &v, &e), FSHM_OK);
    for (int i = 0; i < 20; i++) {
      size_t length = random_below(sizeof text);
      for (size_t at = 0; at < length; at++)
        text[at] = i % 2 ? (uint8_t)('a' + random_below(3)) : (uint8_t)random_u64();
      int64_t n = fshm_tokens_count(v, text, length, UINT64_MAX);
      CHECK_OP(n, >=, 0);
      CHECK_OP(n, <=, (int64_t)length);
      n = fshm_tokens_encode(v, text, length, out);
      CHECK_OP(n, <=, (int64_t)length);
      int64_t cut = fshm_tokens_truncate(v, text, length, random_below(length + 1));
      CHECK_OP(cut, <=, (int64_t)length);
      uint64_t bad;
      (void)fshm_tokens_decode(v, out, (uint64_t)n, back, sizeof back, &bad);
    }
    fshm_vocabulary_close(v);
  }
  CHECK_EQ(unlink(file_path), 0);
  free_vocabulary(&t);
}

/* Any bits of a file turned, also of its header, and its length changed, but with checksums that fit. */
static void test_hostile_files(void) {
  static _Alignas(LINE) uint8_t image[MOST_FILE];
  static uint8_t text[400];
  vocabulary_t t = fresh_vocabulary(FSHM_PATTERN_O200K, 3, 50);
  uint64_t size = t.v->header.size, opened = 0;
  int rounds = fewer(3000);
  for (int round = 0; round < rounds; round++) {
    uint64_t length = size;
    if (!random_below(4))
      length = random_below(2) ? random_below(2 * size) : size - 64 + random_below(128);
    memset(image, 0, length);
    memcpy(image, t.v->map, length < size ? length : size);
    for (uint64_t i = random_below(4) ? random_below(6) : random_below(2000); i; i--) {
      uint64_t at =
          random_below(3) ? random_below(length + 1) : random_below(sizeof(vocabulary_header_t));
      if (at < length) image[at] ^= (uint8_t)(1U << random_below(8));
    }
    /* Sizes of sections, within their bounds: the file is as long as they say. */
    vocabulary_header_t *h = (vocabulary_header_t *)(void *)image;
    uint32_t *numbers[] = {&h->tokens,    &h->special, &h->word_bits, &h->key_bits,
                           &h->pair_bits, &h->cells,   &h->root,      &h->most_length};
    bool fit = random_below(2);
    if (fit && length >= sizeof *h)
      *numbers[random_below(8)] =
          (uint32_t)(random_below(2) ? random_below(30) : random_below(16) * 256);
    if (fit && length >= sizeof *h && !random_below(4)) h->bytes = random_below(1 << 12);
    size_t letters = ascii_text(text, sizeof text);
    opened += use_file(image, make_right(image, length, fit), text, letters) == FSHM_OK;
  }
  CHECK_OP(opened, >, rounds / 10);
  free_vocabulary(&t);
}

/* Threads --------------------------------------------------------------------------------- */

#define WORKERS 4
static vocabulary_t shared_vocabulary;

/* Longer ones, of many pieces: what the cache says, after others wrote to it, is what a search finds. */
static void use_long_text(uint64_t state) {
  uint8_t text[500];
  uint32_t tokens[sizeof text];
  uint64_t bad = 0;
  size_t length = 300 + (state >> 50) % 200;
  for (size_t at = 0; at < length; at++)
    text[at] = (uint8_t)"ab ba\xc3\xa9\n"[(state >> at % 57) % (at % 40 < 30 ? 2 : 8)];
  fshm_vocabulary *v = shared_vocabulary.v;
  int64_t n = fshm_tokens_encode(v, text, length, tokens);
  uint8_t back[sizeof text];
  bool right =
      fshm_tokens_count(v, text, length, UINT64_MAX) == n &&
      fshm_tokens_count(v, text, length, 3) > 3 &&
      fshm_tokens_truncate(v, text, length, 3) < (int64_t)length &&
      fshm_tokens_decode(v, tokens, (uint64_t)n, back, sizeof back, &bad) == (int64_t)length;
  if (!right) CHECK_EQ(state, 0);
}

/* All count texts that fall on few entries of the cache: each count is right. */
static void *count_texts(void *with) {
  uint8_t text[24];
  uint32_t want[sizeof text];
  uint64_t state = (uint64_t)(uintptr_t)with;
  for (int i = 0; i < 30000; i++) {
    state = state * UINT64_C(6364136223846793005) + 1442695040888963407U;
    size_t length = 4 + (state >> 60);
    for (size_t at = 0; at < length; at++) text[at] = (uint8_t)('a' + (state >> (at + 20)) % 2);
    size_t n = reference_encode(&shared_vocabulary, text, length, want);
    if (fshm_tokens_count(shared_vocabulary.v, text, length, UINT64_MAX) != (int64_t)n)
      CHECK_EQ(i, -1);
    if (i % 16 == 0) use_long_text(state);
  }
  return NULL;
}

static void test_threads(void) {
  pthread_t threads[WORKERS];
  shared_vocabulary = fresh_vocabulary(FSHM_PATTERN_CL100K, 2, 6);
  for (uintptr_t i = 0; i < WORKERS; i++)
    CHECK_EQ(pthread_create(&threads[i], NULL, count_texts, (void *)(i + 1)), 0);
  for (int i = 0; i < WORKERS; i++) CHECK_EQ(pthread_join(threads[i], NULL), 0);
  free_vocabulary(&shared_vocabulary);
}

/* With any argument: test_threads() alone, for the thread sanitizer. */
int main(int argc, char **argv) {
  (void)argv;
  if (argc > 1) {
    test_threads();
    return done();
  }
  (void)snprintf(file_path, sizeof file_path, "/tmp/test_tokens.%d", (int)getpid());
  test_merging();
  test_hints();
  test_any_bytes();
#if defined(__SSE2__)
  test_blocks();
#endif
  test_ascii();
  test_pieces();
  test_refused();
  test_special();
  test_file();
  test_damaged();
  test_foreign();
  test_hostile();
  test_hostile_files();
  test_threads();
  return done();
}
