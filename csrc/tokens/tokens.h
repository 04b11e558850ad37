/* tokens.h - counts the tokens of a text, exactly as tiktoken does, from tables that all processes of a host share.
 *
 * A vocabulary is what an encoding of tiktoken consists of: a pattern that splits a text into pieces, and a rank for
 * each token. It is compiled once for a host, into a file that each process maps read-only. A piece that is a token
 * counts 1; the bytes of any other piece are merged by rank.
 *
 * Units: a text is UTF-8, and its length is in bytes. What is not UTF-8 is counted as something, and harms nothing.
 * A token is named by its rank. Texts may have any length; memory is taken only for a piece of more than 4,096
 * bytes, four times its length.
 *
 * Threads: a vocabulary may be used by any number of threads at once, and closed when none uses it.
 *
 * Caveats
 * - Symptom: SIGBUS. Cause: a process of the same user truncated the file of a vocabulary that is mapped here. Cure:
 *   as for a segment: replace such a file by a rename, and never write into it.
 * - Symptom: wrong counts. Cause: a process of the same user wrote into the file after it was opened. It cannot crash
 *   or hang a reader.
 */
#ifndef FSHM_TOKENS_H
#define FSHM_TOKENS_H

#include "../fast_shm.h"

typedef struct fshm_vocabulary fshm_vocabulary;

/* The patterns there are scanners for, under the names of the encodings that brought them. */
enum fshm_pattern {
  FSHM_PATTERN_R50K = 1, /* r50k_base, p50k_base, p50k_edit, gpt2 */
  FSHM_PATTERN_CL100K = 2, /* cl100k_base */
  FSHM_PATTERN_O200K = 3 /* o200k_base, o200k_harmony */
};

#define FSHM_TOKENS_VERSION 4 /* of the file */
#define FSHM_MAX_TOKENS 1048575 /* tokens of a vocabulary */
#define FSHM_MAX_TOKEN_LENGTH 255 /* bytes */
#define FSHM_MAX_RANK 0xfffffffe

typedef struct {
  uint32_t pattern; /* enum fshm_pattern */
  uint32_t tokens, special; /* how many */
  uint32_t most_length; /* bytes of the longest token */
  uint64_t size; /* bytes of the file */
  uint64_t identity[2]; /* a hash of pattern, ranks and special tokens */
  uint32_t mapped; /* 1: it is a file that other processes share; 0: memory of this process */
} fshm_vocabulary_info;

/* Compile a vocabulary into memory of this process. `ranks` and `special` are records, one behind the other: length of
 * the token (1 byte, 1 to FSHM_MAX_TOKEN_LENGTH), its bytes, its rank (4 bytes, little endian). Takes 1 to 3 s.
 * FSHM_OK. FSHM_E_ARGUMENT: a record is cut off, a token or a rank comes twice, the 256 bytes are not the lowest ranks,
 * or a token ranks before one that it is merged from: what this engine cannot count exactly, it refuses.
 * FSHM_E_MEMORY. */
int fshm_vocabulary_build(const void *ranks, uint64_t length, const void *special,
                          uint64_t special_length, uint32_t pattern, fshm_vocabulary **out,
                          fshm_error *error);

/* Write it under a temporary name beside `path`, fsync, rename. Other users may read the file, none may write it. A
 * file of that name is replaced; who has it mapped keeps it. */
int fshm_vocabulary_save(const fshm_vocabulary *vocabulary, const char *path, fshm_error *error);

/* Map a file. Checked each time: it is a regular file of this user or of root that no other user may write, its size,
 * its header, and the checksum of its contents. FSHM_E_DAMAGED, FSHM_E_LAYOUT (another version or byte order),
 * FSHM_E_OWNER, FSHM_E_KIND, FSHM_E_LINK, FSHM_E_NOT_FOUND, FSHM_E_PERMISSION, FSHM_E_MEMORY, FSHM_E_SYSTEM. */
int fshm_vocabulary_open(const char *path, fshm_vocabulary **out, fshm_error *error);
void fshm_vocabulary_close(fshm_vocabulary *vocabulary);
void fshm_vocabulary_describe(const fshm_vocabulary *vocabulary, fshm_vocabulary_info *out);

/* The tokens of a text. Stops when there are more than `most`, and then returns any number above it (UINT64_MAX: all
 * are counted). FSHM_E_MEMORY. */
int64_t fshm_tokens_count(fshm_vocabulary *vocabulary, const void *text, uint64_t length,
                          uint64_t most);

/* The ranks of the tokens of a text, into `out`, which has room for `length` of them: a token has one byte at least.
 * Returns how many, or FSHM_E_MEMORY. */
int64_t fshm_tokens_encode(fshm_vocabulary *vocabulary, const void *text, uint64_t length,
                           uint32_t *out);

/* The length in bytes of the longest start of the text that ends where one of its first `most` tokens ends, and not
 * inside a character. Where such a start, by itself, has more than `most` tokens, a shorter one. FSHM_E_MEMORY. */
int64_t fshm_tokens_truncate(fshm_vocabulary *vocabulary, const void *text, uint64_t length,
                             uint64_t most);

/* The bytes of tokens, special ones too, into `out`, which has `room` bytes. Returns how many there are; where that
 * is more than `room`, nothing is written beyond it. FSHM_E_ARGUMENT: no token has the rank ranks[*bad]. */
int64_t fshm_tokens_decode(const fshm_vocabulary *vocabulary, const uint32_t *ranks, uint64_t count,
                           void *out, uint64_t room, uint64_t *bad);

/* The i-th special token, i < info.special: its rank, and its bytes (not terminated). FSHM_OK or FSHM_E_ARGUMENT. */
int fshm_vocabulary_special(const fshm_vocabulary *vocabulary, uint32_t i, uint32_t *rank,
                            const void **bytes, uint32_t *length);

#endif
