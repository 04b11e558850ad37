/* fuzz_tokens.c - libFuzzer over the engine that counts tokens.
 *
 * Input: one byte, of which two bits choose the pattern, three the vocabulary, and the highest one what is done:
 *   0: the rest is a text. Count, encode, truncate and decode agree with the plain reference (tests/c/tokens.h);
 *   1: a byte with a number of edits, each of 3 bytes of place and 4 of a word, of the contents of a vocabulary's file
 *      behind a good header; then a text. Nothing but a crash, a hang or a read outside can be wrong then. With the
 *      next bit, the edits may be anywhere in the file, two bytes say by how much it is longer or shorter, and it is
 *      opened as a file, whose checksums were made right.
 * The vocabularies are the same in every run, so that inputs can be kept.
 */
#include "../../csrc/unity.c"
#include "../../csrc/tokens/engine.c"

#include "../c/check.h"
#include "../c/tokens.h"

enum { VOCABULARIES = 8 };
static vocabulary_t made[FSHM_PATTERN_O200K][VOCABULARIES];

int LLVMFuzzerInitialize(int *count, char ***arguments);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerInitialize(int *count, char ***arguments) {
  (void)count;
  (void)arguments;
  for (uint32_t pattern = 0; pattern < FSHM_PATTERN_O200K; pattern++)
    for (unsigned i = 0; i < VOCABULARIES; i++)
      made[pattern][i] = fresh_vocabulary(pattern + 1, 1 + i % 4, 10 + 40 * i);
  return 0;
}

static void count_hostile(const vocabulary_t *t, const uint8_t *data, size_t size) {
  static uint32_t out[LONGEST_TEXT];
  static uint8_t back[1 << 16];
  const vocabulary_header_t *h = &t->v->header;
  uint64_t begin = vocabulary_layout(h).words, bad = 0;
  unsigned char *map = aligned_alloc(LINE, h->size); /* its end is guarded by the sanitizer */
  if (!map) abort();
  memcpy(map, t->v->map, h->size);
  for (size_t edits = size ? *data++ : 0, left = size ? --size : 0; edits && left >= 7;
       edits--, left -= 7, size -= 7, data += 7) {
    uint64_t place = (data[0] | (uint64_t)data[1] << 8 | (uint64_t)data[2] << 16) * 4;
    memcpy(map + begin + place % (h->size - begin - 4), data + 3, 4);
  }
  fshm_vocabulary *v;
  fshm_error e;
  if (vocabulary_adopt(map, h, false, &v, &e) != FSHM_OK) abort();
  uint8_t *text = malloc(size + 1);
  if (!text) abort();
  memcpy(text, data, size);
  CHECK_OP(fshm_tokens_count(v, text, size, UINT64_MAX), <=, (int64_t)size);
  int64_t n = fshm_tokens_encode(v, text, size, out);
  CHECK_OP(n, <=, (int64_t)size);
  CHECK_OP(fshm_tokens_truncate(v, text, size, size / 2), <=, (int64_t)size);
  (void)fshm_tokens_decode(v, out, (uint64_t)n, back, sizeof back, &bad);
  free(text);
  fshm_vocabulary_close(v);
}

/* fit: the length follows the header, not the header the length. */
static void use_hostile(const vocabulary_t *t, const uint8_t *data, size_t size, bool fit) {
  static uint8_t image[MOST_FILE];
  if (size < 3) return;
  uint64_t length = t->v->header.size + data[1] + 256U * data[2];
  length = length < 1 << 15 ? 0 : length - (1 << 15);
  memset(image, 0, length);
  memcpy(image, t->v->map, length < t->v->header.size ? length : t->v->header.size);
  size_t edits = data[0];
  for (data += 3, size -= 3; edits && size >= 7 && length > 4; edits--, size -= 7, data += 7) {
    uint64_t place = (data[0] | (uint64_t)data[1] << 8 | (uint64_t)(data[2] & 127) << 16) * 4;
    /* Every other one in the header: there are few places that decide anything. */
    place %= data[2] & 128 ? sizeof(vocabulary_header_t) : length - 4;
    memcpy(image + place, data + 3, 4);
  }
  (void)use_file(image, make_right(image, length, fit), data, size);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  if (!size || size > LONGEST_TEXT / 2) return 0;
  vocabulary_t *t = &made[(data[0] & 3) % FSHM_PATTERN_O200K][data[0] >> 2 & 7];
  if ((data[0] & 0xc0) == 0xc0) {
    use_hostile(t, data + 1, size - 1, data[0] & 0x20);
  } else if (data[0] & 0x80) {
    count_hostile(t, data + 1, size - 1);
  } else {
    uint8_t *text = malloc(size); /* of exactly its size: the sanitizer sees reads behind it */
    if (!text) abort();
    memcpy(text, data + 1, size - 1);
    check_text(t, text, size - 1, (data[0] >> 5 & 3) * (size - 1) / 3);
    free(text);
  }
  if (failed) abort();
  return 0;
}
