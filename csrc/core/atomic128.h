/* atomic128.h - the 16-byte atomic of the hash table: load and compare-and-swap.
 *
 * x86-64: lock cmpxchg16b, a full barrier. A plain 16-byte SSE load of an aligned address is atomic
 *   on every processor that has AVX (Intel SDM vol. 3A 9.1.1, AMD64 APM vol. 2 7.3.2); without AVX
 *   the load is a compare-and-swap of zero with zero.
 * aarch64: ldaxp/stlxp. Before ARMv8.4 a pair load alone is not single-copy atomic, so the load
 *   writes back what it read, and so proves it.
 * elsewhere: not supported (the compiler's 16-byte builtins may take a lock in libatomic).
 * under the thread sanitizer: those builtins, on any processor. The sanitizer does not see inline assembly:
 *   neither races with it, nor what it orders. Its runtime may emulate 16 bytes under a lock of its own: good
 *   for the threads of one process only.
 */
#ifndef FSHM_ATOMIC128_H
#define FSHM_ATOMIC128_H

#include <stdbool.h>
#include <stdint.h>

typedef struct {
  uint64_t who; /* keyed fingerprint, 0 = empty */
  uint64_t when; /* state: algorithms.h */
} pair_t;

#if defined(__SANITIZE_THREAD__) /* gcc */
#define FSHM_BUILTIN_PAIRS
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer) /* clang */
#define FSHM_BUILTIN_PAIRS
#endif
#endif

#if defined(__x86_64__)
extern bool fshm_wide_loads; /* set once by the library constructor: the processor has AVX */
#endif

#if defined(FSHM_BUILTIN_PAIRS)

__extension__ typedef unsigned __int128 __attribute__((may_alias)) pair_bits;

/* The orders are what the assembly below gives: no stronger, or the sanitizer would miss races. */
static inline bool pair_cas(void *slot, pair_t *seen, pair_t next) {
  pair_bits expected = (pair_bits)seen->when << 64 | seen->who;
  bool ok = __atomic_compare_exchange_n((pair_bits *)slot, &expected,
                                        (pair_bits)next.when << 64 | next.who, false,
                                        __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
  *seen = (pair_t){(uint64_t)expected, (uint64_t)(expected >> 64)};
  return ok;
}

static inline pair_t pair_load(const void *slot) {
  pair_bits bits = __atomic_load_n((const pair_bits *)slot, __ATOMIC_ACQUIRE);
  return (pair_t){(uint64_t)bits, (uint64_t)(bits >> 64)};
}

#elif defined(__x86_64__)
#include <emmintrin.h>

static inline bool pair_cas(void *slot, pair_t *seen, pair_t next) {
  bool ok;
  __asm__ __volatile__("lock cmpxchg16b %1"
                       : "=@ccz"(ok), "+m"(*(pair_t *)slot), "+a"(seen->who), "+d"(seen->when)
                       : "b"(next.who), "c"(next.when)
                       : "memory");
  return ok;
}

static inline pair_t pair_load(const void *slot) {
  pair_t out = {0, 0};
  if (__builtin_expect(fshm_wide_loads, 1)) {
    __m128i wide;
    __asm__ __volatile__("movdqa %1, %0" : "=x"(wide) : "m"(*(const __m128i *)slot) : "memory");
    out.who = (uint64_t)_mm_cvtsi128_si64(wide);
    out.when = (uint64_t)_mm_cvtsi128_si64(_mm_unpackhi_epi64(wide, wide));
    return out;
  }
  (void)pair_cas((void *)(uintptr_t)slot, &out, out);
  return out;
}

#elif defined(__aarch64__)

static inline bool pair_cas(void *slot, pair_t *seen, pair_t next) {
  uint64_t who, when;
  uint32_t failed;
  do {
    __asm__ __volatile__("ldaxp %0, %1, [%2]" : "=&r"(who), "=&r"(when) : "r"(slot) : "memory");
    bool same = who == seen->who && when == seen->when;
    uint64_t put_who = same ? next.who : who, put_when = same ? next.when : when;
    __asm__ __volatile__("stlxp %w0, %1, %2, [%3]"
                         : "=&r"(failed)
                         : "r"(put_who), "r"(put_when), "r"(slot)
                         : "memory");
    if (!failed) {
      seen->who = who;
      seen->when = when;
      return same;
    }
  } while (1); /* the store fails only where another processor's succeeded, or an interrupt came */
}

static inline pair_t pair_load(const void *slot) {
  pair_t out = {0, 0};
  (void)pair_cas((void *)(uintptr_t)slot, &out, out);
  return out;
}

#else
#error "fast_litellm_shm needs a 16-byte compare-and-swap: x86-64 or aarch64"
#endif

/* For inspection only: two plain loads, on read-only mappings. May be torn under constant change; no decision reads
 * it. */
static inline pair_t pair_peek(const void *slot) {
  const volatile pair_t *p = slot;
  pair_t out = {p->who, p->when};
  for (int i = 0; i < 8 && p->who != out.who; i++) out = (pair_t){p->who, p->when};
  return out;
}

#endif
