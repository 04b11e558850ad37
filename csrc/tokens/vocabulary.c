/* vocabulary.c - the file of a vocabulary: layout, verification, mapping, writing.
 *
 * A file is complete or not there: it is written under a temporary name, flushed, and renamed. It never changes
 * afterwards. Verification works on a private copy of the header and computes the layout from it.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "vocabulary.h"

static uint64_t in_lines(uint64_t bytes) { return (bytes + LINE - 1) / LINE * LINE; }

/* No number of an honest header overflows: vocabulary_open() has compared them with their bounds. */
vocabulary_layout_t vocabulary_layout(const vocabulary_header_t *h) {
  vocabulary_layout_t l;
  l.words = in_lines(sizeof *h);
  l.keys = l.words + (UINT64_C(8) << h->word_bits);
  l.word_ids = l.keys + (UINT64_C(16) << h->key_bits);
  l.key_ids = l.word_ids + in_lines(UINT64_C(4) << h->word_bits);
  l.nodes = l.key_ids + in_lines(UINT64_C(4) << h->key_bits);
  l.halves = l.nodes + in_lines(UINT64_C(8) * h->cells);
  l.prefixes = l.halves + in_lines(sizeof(halves_t) * h->tokens);
  l.pairs = l.prefixes + in_lines(UINT64_C(4) * h->tokens);
  l.filter = l.pairs + in_lines(UINT64_C(8) << h->pair_bits);
  l.bigrams = l.filter + in_lines(UINT64_C(1) << (h->pair_bits + 2 - 3));
  l.characters = l.bigrams + sizeof(uint32_t) * BIGRAMS;
  l.ranks = l.characters + sizeof(uint64_t) * CHARACTERS;
  l.offsets = l.ranks + in_lines(UINT64_C(4) * h->tokens);
  l.special = l.offsets + in_lines(UINT64_C(4) * (h->tokens + h->special + 1));
  l.bytes = l.special + in_lines(UINT64_C(4) * h->special);
  l.size = l.bytes + in_lines(h->bytes);
  return l;
}

/* Four sums side by side, so that it runs at the speed of memory. It finds accidents, not forgery. */
uint64_t vocabulary_checksum(const void *data, uint64_t length) {
  const unsigned char *p = data;
  uint64_t sums[4] = {1, 2, 3, 4}, words[4];
  for (; length >= sizeof words; length -= sizeof words, p += sizeof words) {
    memcpy(words, p, sizeof words);
    for (int i = 0; i < 4; i++) {
      sums[i] = (sums[i] ^ words[i]) * UINT64_C(0x9e3779b97f4a7c15);
      sums[i] ^= sums[i] >> 32;
    }
  }
  uint64_t rest = fshm_siphash(sums[0], sums[1], p, length);
  return fshm_siphash(sums[2], sums[3], &rest, sizeof rest);
}

uint64_t vocabulary_header_check(const vocabulary_header_t *h) {
  return fshm_siphash(TOKENS_MAGIC, FSHM_TOKENS_VERSION, h, offsetof(vocabulary_header_t, check));
}

/* Opening ----------------------------------------------------------------------------------- */

/* Make the handle of a verified mapping or image, which is the handle's from then on. */
int vocabulary_adopt(const unsigned char *map, const vocabulary_header_t *h, bool mapped,
                     fshm_vocabulary **out, fshm_error *e) {
  fshm_vocabulary *v = calloc(1, sizeof *v);
  if (!v) return image_fail(e, FSHM_E_MEMORY);
  vocabulary_layout_t l = vocabulary_layout(h);
  v->header = *h;
  v->map = map;
  v->mapped = mapped;
  v->words = (const uint64_t *)(const void *)(map + l.words);
  v->keys = (const uint64_t *)(const void *)(map + l.keys);
  v->word_ids = (const uint32_t *)(const void *)(map + l.word_ids);
  v->key_ids = (const uint32_t *)(const void *)(map + l.key_ids);
  v->nodes = (const uint64_t *)(const void *)(map + l.nodes);
  v->halves = (const halves_t *)(const void *)(map + l.halves);
  v->prefixes = (const uint32_t *)(const void *)(map + l.prefixes);
  v->filter = (const uint64_t *)(const void *)(map + l.filter);
  v->bigrams = (const uint32_t *)(const void *)(map + l.bigrams);
  v->characters = (const uint64_t *)(const void *)(map + l.characters);
  v->pairs = (const uint64_t *)(const void *)(map + l.pairs);
  v->ranks = (const uint32_t *)(const void *)(map + l.ranks);
  v->offsets = (const uint32_t *)(const void *)(map + l.offsets);
  v->special = (const uint32_t *)(const void *)(map + l.special);
  v->bytes = map + l.bytes;
  image_random(v->secret, sizeof v->secret);
  /* Not allocated before it is used: pages that no piece comes to take no memory. */
  void *cache = mmap(NULL, sizeof(cached_t) << (CACHE_BITS + 1), PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  v->cache = cache == MAP_FAILED ? NULL : cache;
  *out = v;
  return FSHM_OK;
}

static bool within_bounds(const vocabulary_header_t *h) {
  return h->pattern >= FSHM_PATTERN_R50K && h->pattern <= FSHM_PATTERN_O200K && h->tokens >= 256 &&
         h->tokens <= FSHM_MAX_TOKENS && h->special <= FSHM_MAX_TOKENS && h->most_length >= 1 &&
         h->most_length <= FSHM_MAX_TOKEN_LENGTH && h->word_bits >= 8 && h->word_bits <= 24 &&
         h->key_bits >= 8 && h->key_bits <= 24 && h->pair_bits >= 8 && h->pair_bits <= 24 &&
         h->cells >= 512 && h->cells <= MAX_CELLS && h->cells % 256 == 0 &&
         h->root <= h->cells - 256 && h->root % 256 == 0 && h->bytes <= UINT64_C(1) << 29;
}

/* Everything but the contents. */
static int verify(int fd, vocabulary_header_t *h, fshm_error *e) {
  struct stat st;
  if (fstat(fd, &st)) return image_fail_errno(e);
  errno = 0;
  if (!S_ISREG(st.st_mode)) return image_fail(e, FSHM_E_KIND);
  /* Who may write the file decides what is counted here, and can end this process (SIGBUS). */
  if ((st.st_uid != geteuid() && st.st_uid != 0) || st.st_mode & (S_IWGRP | S_IWOTH)) {
    e->found = st.st_uid;
    e->wanted = geteuid();
    return image_fail(e, FSHM_E_OWNER);
  }
  e->found = (uint64_t)st.st_size;
  e->wanted = sizeof *h;
  if ((uint64_t)st.st_size < sizeof *h || pread(fd, h, sizeof *h, 0) != (ssize_t)sizeof *h)
    return image_fail(e, FSHM_E_DAMAGED);
  if (h->magic != TOKENS_MAGIC) return image_fail(e, FSHM_E_DAMAGED);
  if (h->version != FSHM_TOKENS_VERSION || h->byte_order != FSHM_BYTE_ORDER) {
    e->found = h->version;
    e->wanted = FSHM_TOKENS_VERSION;
    return image_fail(e, FSHM_E_LAYOUT);
  }
  if (h->check != vocabulary_header_check(h) || !within_bounds(h))
    return image_fail(e, FSHM_E_DAMAGED);
  e->wanted = vocabulary_layout(h).size;
  if (h->size != e->wanted || h->size != e->found) return image_fail(e, FSHM_E_DAMAGED);
  return FSHM_OK;
}

static int open_fd(int fd, fshm_vocabulary **out, fshm_error *e) {
  vocabulary_header_t h;
  int status = verify(fd, &h, e);
  if (status != FSHM_OK) return status;
  int flags = MAP_SHARED;
#if defined(MAP_POPULATE)
  flags |= MAP_POPULATE; /* all pages in one call: the checksum reads them anyway */
#endif
  void *map = mmap(NULL, h.size, PROT_READ, flags, fd, 0);
  if (map == MAP_FAILED) return image_fail_errno(e);
  vocabulary_layout_t l = vocabulary_layout(&h);
  if (vocabulary_checksum((unsigned char *)map + l.words, h.size - l.words) != h.checksum)
    status = image_fail(e, FSHM_E_DAMAGED);
  if (status == FSHM_OK) status = vocabulary_adopt(map, &h, true, out, e);
  if (status != FSHM_OK) (void)munmap(map, h.size);
  return status;
}

static int keep_path(const char *path, fshm_error *e) {
  memset(e, 0, sizeof *e);
  int n = snprintf(e->path, sizeof e->path, "%s", path);
  return n < 0 ? FSHM_E_SYSTEM : FSHM_OK; /* cut off, if it is longer: it is for the message */
}

int fshm_vocabulary_open(const char *path, fshm_vocabulary **out, fshm_error *e) {
  *out = NULL;
  if (keep_path(path, e) != FSHM_OK) return image_fail(e, FSHM_E_SYSTEM);
  int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
  if (fd < 0) return image_fail_errno(e);
  int status = open_fd(fd, out, e);
  (void)close(fd);
  return status;
}

void fshm_vocabulary_close(fshm_vocabulary *v) {
  if (!v) return;
  if (v->cache) (void)munmap(v->cache, sizeof(cached_t) << (CACHE_BITS + 1));
  if (v->mapped)
    (void)munmap((void *)(uintptr_t)v->map, v->header.size);
  else
    free((void *)(uintptr_t)v->map);
  free(v);
}

void fshm_vocabulary_describe(const fshm_vocabulary *v, fshm_vocabulary_info *out) {
  const vocabulary_header_t *h = &v->header;
  *out = (fshm_vocabulary_info){.pattern = h->pattern,
                                .tokens = h->tokens,
                                .special = h->special,
                                .most_length = h->most_length,
                                .size = h->size,
                                .identity = {h->identity[0], h->identity[1]},
                                .mapped = v->mapped};
}

/* Writing ----------------------------------------------------------------------------------- */

static int write_all(int fd, const unsigned char *from, uint64_t size) {
  for (uint64_t at = 0; at < size;) {
    ssize_t n = write(fd, from + at, size - at);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return -1;
    at += (uint64_t)n;
  }
  return 0;
}

/* After a power cut the name must not stand for a file whose contents were not written: so flush, then rename. That
 * the rename itself may be lost only means that the file is built again. */
static int write_file(int fd, const fshm_vocabulary *v, const char *temporary, const char *path,
                      fshm_error *e) {
  if (write_all(fd, v->map, v->header.size) || fchmod(fd, 0644) || fsync(fd) ||
      rename(temporary, path))
    return image_fail_errno(e);
  return FSHM_OK;
}

int fshm_vocabulary_save(const fshm_vocabulary *v, const char *path, fshm_error *e) {
  uint64_t nonce;
  struct rlimit most;
  if (keep_path(path, e) != FSHM_OK) return image_fail(e, FSHM_E_SYSTEM);
  e->wanted = v->header.size;
  /* Growing beyond the limit raises SIGXFSZ, which ends the program. */
  if (!getrlimit(RLIMIT_FSIZE, &most) && most.rlim_cur < v->header.size) {
    errno = EFBIG;
    e->found = most.rlim_cur;
    return image_fail_errno(e);
  }
  size_t room = strlen(path) + 32;
  char *temporary = malloc(room);
  if (!temporary) return image_fail(e, FSHM_E_MEMORY);
  image_random(&nonce, sizeof nonce);
  (void)snprintf(temporary, room, "%s.%016llx.tmp", path, (unsigned long long)nonce);
  int fd = open(temporary, O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC | O_NOFOLLOW, 0600);
  int status = fd < 0 ? image_fail_errno(e) : write_file(fd, v, temporary, path, e);
  if (fd >= 0) {
    if (status != FSHM_OK) (void)unlink(temporary);
    (void)close(fd);
  }
  free(temporary);
  return status;
}

int fshm_vocabulary_special(const fshm_vocabulary *v, uint32_t i, uint32_t *rank,
                            const void **bytes, uint32_t *length) {
  if (i >= v->header.special) return FSHM_E_ARGUMENT;
  uint32_t id = v->header.tokens + i;
  uint32_t from = v->offsets[id], to = v->offsets[id + 1];
  if (from > to || to > v->header.bytes) return FSHM_E_ARGUMENT;
  *rank = v->special[i];
  *bytes = v->bytes + from;
  *length = to - from;
  return FSHM_OK;
}
