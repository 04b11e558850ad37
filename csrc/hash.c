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

uint64_t fshm_siphash(uint64_t k0, uint64_t k1, const void *data, uint64_t length) {
  const unsigned char *p = data;
  uint64_t v0 = k0 ^ UINT64_C(0x736f6d6570736575), v1 = k1 ^ UINT64_C(0x646f72616e646f6d);
  uint64_t v2 = k0 ^ UINT64_C(0x6c7967656e657261), v3 = k1 ^ UINT64_C(0x7465646279746573);
  uint64_t word, rest = length;
  for (; rest >= 8; rest -= 8, p += 8) {
    memcpy(&word, p, 8);
    v3 ^= word;
    ROUND;
    v0 ^= word;
  }
  word = length << 56;
  if (rest >= 4) { /* the tail, in two loads that may overlap, without reading outside */
    uint32_t low, high;
    memcpy(&low, p, 4);
    memcpy(&high, p + rest - 4, 4);
    word |= (uint64_t)low | (uint64_t)high << (8 * (rest - 4));
  } else if (rest) {
    word |= (uint64_t)p[0] | (uint64_t)p[rest / 2] << (8 * (rest / 2)) |
            (uint64_t)p[rest - 1] << (8 * (rest - 1));
  }
  v3 ^= word;
  ROUND;
  v0 ^= word;
  v2 ^= 0xff;
  ROUND;
  ROUND;
  ROUND;
  return v0 ^ v1 ^ v2 ^ v3;
}
