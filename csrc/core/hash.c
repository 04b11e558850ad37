/* hash.c - SipHash-1-3: keyed, so that keys chosen by an attacker cannot be made to collide.
 * Source: Aumasson and Bernstein, "SipHash: a fast short-input PRF", 2012; the 1-3 variant is what
 * CPython and Rust use for their hash tables. */
#include "internal.h"

#define ROTL(x, b) (((x) << (b)) | ((x) >> (64 - (b))))
#define ROUND          \
  do {                 \
    v0 += v1;          \
    v1 = ROTL(v1, 13); \
    v1 ^= v0;          \
    v0 = ROTL(v0, 32); \
    v2 += v3;          \
    v3 = ROTL(v3, 16); \
    v3 ^= v2;          \
    v0 += v3;          \
    v3 = ROTL(v3, 21); \
    v3 ^= v0;          \
    v2 += v1;          \
    v1 = ROTL(v1, 17); \
    v1 ^= v2;          \
    v2 = ROTL(v2, 32); \
  } while (0)

/* Fixed sizes, which need none of FORTIFY's checks. Its wrapper of memcpy counts as more code to inline: it takes 10
 * instructions of a call, and 80 of a Quota's. */
#define LOAD __builtin_memcpy

/* All but the finalisation's output. `wide`: 0, or 0xee for the variant of 128 bits. */
static inline HOT void absorb(uint64_t v[4], uint64_t k0, uint64_t k1, uint64_t wide,
                              const void *data, uint64_t length) {
  const unsigned char *p = data;
  uint64_t v0 = k0 ^ UINT64_C(0x736f6d6570736575), v1 = k1 ^ UINT64_C(0x646f72616e646f6d);
  v1 ^= wide;
  uint64_t v2 = k0 ^ UINT64_C(0x6c7967656e657261), v3 = k1 ^ UINT64_C(0x7465646279746573);
  uint64_t word, rest = length;
  for (; rest >= 8; rest -= 8, p += 8) {
    LOAD(&word, p, 8);
    v3 ^= word;
    ROUND;
    v0 ^= word;
  }
  word = length << 56;
  if (rest >= 4) { /* the tail, in two loads that may overlap, without reading outside */
    uint32_t low, high;
    LOAD(&low, p, 4);
    LOAD(&high, p + rest - 4, 4);
    word |= (uint64_t)low | (uint64_t)high << (8 * (rest - 4));
  } else if (rest) {
    word |= (uint64_t)p[0] | (uint64_t)p[rest / 2] << (8 * (rest / 2)) |
            (uint64_t)p[rest - 1] << (8 * (rest - 1));
  }
  v3 ^= word;
  ROUND;
  v0 ^= word;
  v2 ^= wide ? wide : 0xff;
  ROUND;
  ROUND;
  ROUND;
  v[0] = v0;
  v[1] = v1;
  v[2] = v2;
  v[3] = v3;
}

uint64_t fshm_siphash(uint64_t k0, uint64_t k1, const void *data, uint64_t length) {
  uint64_t v[4];
  absorb(v, k0, k1, 0, data, length);
  return v[0] ^ v[1] ^ v[2] ^ v[3];
}

/* The variant of 128 bits, as its authors' reference has it. */
void fshm_siphash128(uint64_t k0, uint64_t k1, const void *data, uint64_t length, uint64_t out[2]) {
  uint64_t v[4];
  absorb(v, k0, k1, 0xee, data, length);
  out[0] = v[0] ^ v[1] ^ v[2] ^ v[3];
  uint64_t v0 = v[0], v1 = v[1] ^ 0xdd, v2 = v[2], v3 = v[3];
  ROUND;
  ROUND;
  ROUND;
  out[1] = v0 ^ v1 ^ v2 ^ v3;
}
