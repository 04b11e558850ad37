/* test_hash.c - SipHash-1-3 against a plain implementation of the paper, and where it reads. */
#include "../../csrc/unity.c"

#include "check.h"

static uint64_t rotate(uint64_t x, int b) { return x << b | x >> (64 - b); }

static void sip_rounds(uint64_t v[4], int n) {
  while (n--) {
    v[0] += v[1], v[2] += v[3];
    v[1] = rotate(v[1], 13) ^ v[0], v[3] = rotate(v[3], 16) ^ v[2];
    v[0] = rotate(v[0], 32);
    v[2] += v[1], v[0] += v[3];
    v[1] = rotate(v[1], 17) ^ v[2], v[3] = rotate(v[3], 21) ^ v[0];
    v[2] = rotate(v[2], 32);
  }
}

/* SipHash-c-d, byte by byte as in section 2 of the paper. */
static uint64_t reference(int c, int d, uint64_t k0, uint64_t k1, const unsigned char *p,
                          uint64_t length) {
  uint64_t v[4] = {k0 ^ UINT64_C(0x736f6d6570736575), k1 ^ UINT64_C(0x646f72616e646f6d),
                   k0 ^ UINT64_C(0x6c7967656e657261), k1 ^ UINT64_C(0x7465646279746573)};
  uint64_t word = 0;
  for (uint64_t i = 0; i <= length; i++) {
    bool last = i == length;
    if (!last) word |= (uint64_t)p[i] << (i % 8 * 8);
    if (last) word |= (length & 255) << 56;
    if (!last && i % 8 != 7) continue;
    v[3] ^= word;
    sip_rounds(v, c);
    v[0] ^= word;
    word = 0;
  }
  v[2] ^= 0xff;
  sip_rounds(v, d);
  return v[0] ^ v[1] ^ v[2] ^ v[3];
}

/* The reference is right: vectors of the paper's authors for SipHash-2-4, key 00..0f, input 00.. */
static void test_reference(void) {
  unsigned char in[16];
  for (unsigned i = 0; i < sizeof in; i++) in[i] = (unsigned char)i;
  uint64_t k0 = UINT64_C(0x0706050403020100), k1 = UINT64_C(0x0f0e0d0c0b0a0908);
  CHECK(reference(2, 4, k0, k1, in, 0) == UINT64_C(0x726fdb47dd0e0e31));
  CHECK(reference(2, 4, k0, k1, in, 1) == UINT64_C(0x74f839c593dc67fd));
  CHECK(reference(2, 4, k0, k1, in, 15) == UINT64_C(0xa129ca6149be45e5));
}

/* The variant of 128 bits, with one round and three: as the authors' reference does it. */
static void reference128(int c, int d, uint64_t k0, uint64_t k1, const unsigned char *p,
                         uint64_t length, uint64_t out[2]) {
  uint64_t v[4] = {k0 ^ UINT64_C(0x736f6d6570736575), k1 ^ UINT64_C(0x646f72616e646f6d) ^ 0xee,
                   k0 ^ UINT64_C(0x6c7967656e657261), k1 ^ UINT64_C(0x7465646279746573)};
  uint64_t word = 0;
  for (uint64_t i = 0; i <= length; i++) {
    bool last = i == length;
    if (!last) word |= (uint64_t)p[i] << (i % 8 * 8);
    if (last) word |= (length & 255) << 56;
    if (!last && i % 8 != 7) continue;
    v[3] ^= word;
    sip_rounds(v, c);
    v[0] ^= word;
    word = 0;
  }
  v[2] ^= 0xee;
  sip_rounds(v, d);
  out[0] = v[0] ^ v[1] ^ v[2] ^ v[3];
  v[1] ^= 0xdd;
  sip_rounds(v, d);
  out[1] = v[0] ^ v[1] ^ v[2] ^ v[3];
}

static void test_128_bits(void) {
  unsigned char bytes[128];
  uint64_t out[2], should[2];
  for (unsigned i = 0; i < sizeof bytes; i++) bytes[i] = (unsigned char)i;
  uint64_t k0 = UINT64_C(0x0706050403020100), k1 = UINT64_C(0x0f0e0d0c0b0a0908);
  /* The reference is right: the authors' first vector of SipHash-2-4-128. */
  reference128(2, 4, k0, k1, bytes, 0, should);
  CHECK(should[0] == UINT64_C(0xe6a825ba047f81a3) && should[1] == UINT64_C(0x930255c71472f66d));
  for (int round = 0; round < 50; round++) {
    for (unsigned i = 0; i < sizeof bytes; i++) bytes[i] = (unsigned char)random_u64();
    k0 = random_u64(), k1 = random_u64();
    for (uint64_t length = 0; length <= 100; length++) {
      fshm_siphash128(k0, k1, bytes + round % 8, length, out);
      reference128(1, 3, k0, k1, bytes + round % 8, length, should);
      CHECK(out[0] == should[0] && out[1] == should[1]);
    }
  }
}

static void test_lengths_and_alignments(void) {
  unsigned char bytes[128];
  for (int round = 0; round < 200; round++) {
    for (unsigned i = 0; i < sizeof bytes; i++) bytes[i] = (unsigned char)random_u64();
    uint64_t k0 = random_u64(), k1 = random_u64();
    for (uint64_t length = 0; length <= 64; length++)
      for (unsigned start = 0; start < 8; start++)
        CHECK_EQ(fshm_siphash(k0, k1, bytes + start, length),
                 reference(1, 3, k0, k1, bytes + start, length));
  }
}

static void test_long(void) {
  uint64_t length = (1 << 20) + 3;
  unsigned char *bytes = malloc(length);
  for (uint64_t i = 0; i < length; i++) bytes[i] = (unsigned char)random_u64();
  CHECK_EQ(fshm_siphash(1, 2, bytes, length), reference(1, 3, 1, 2, bytes, length));
  free(bytes);
}

/* The input ends, or begins, where the next byte would be a fault. */
static void test_reads_only_its_input(void) {
  unsigned char *map = mmap(NULL, 3 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  CHECK(map != MAP_FAILED);
  unsigned char *page = map + PAGE;
  CHECK_EQ(mprotect(page, PAGE, PROT_READ | PROT_WRITE), 0);
  for (unsigned i = 0; i < PAGE; i++) page[i] = (unsigned char)random_u64();
  for (uint64_t length = 0; length <= 64; length++) {
    unsigned char *last = page + PAGE - length;
    CHECK_EQ(fshm_siphash(5, 6, last, length), reference(1, 3, 5, 6, last, length));
    CHECK_EQ(fshm_siphash(5, 6, page, length), reference(1, 3, 5, 6, page, length));
  }
  CHECK_EQ(munmap(map, 3 * PAGE), 0);
}

/* Every bit of key and input counts. */
static void test_every_bit_counts(void) {
  unsigned char in[24] = {0};
  for (uint64_t length = 1; length <= sizeof in; length++) {
    uint64_t plain = fshm_siphash(1, 2, in, length);
    for (unsigned bit = 0; bit < 8 * length; bit++) {
      in[bit / 8] ^= (unsigned char)(1u << bit % 8);
      CHECK(fshm_siphash(1, 2, in, length) != plain);
      in[bit / 8] = 0;
    }
    CHECK(fshm_siphash(1, 2, in, length - 1) != plain);
    for (unsigned bit = 0; bit < 64; bit++) {
      CHECK(fshm_siphash(1 ^ UINT64_C(1) << bit, 2, in, length) != plain);
      CHECK(fshm_siphash(1, 2 ^ UINT64_C(1) << bit, in, length) != plain);
    }
  }
}

int main(void) {
  test_reference();
  test_128_bits();
  test_lengths_and_alignments();
  test_long();
  test_reads_only_its_input();
  test_every_bit_counts();
  return done();
}
