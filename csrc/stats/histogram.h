/* histogram.h - a histogram of durations: the bucket of a duration, and the duration of a quantile. Pure.
 *
 * Seven buckets an octave, from 64 ns to 1,100 s. Their bounds are 2^(k/7) apart, so the middle of a bucket is
 * within 5 % of any duration in it: (r-1)/(r+1) with r = 2^(1/7). (Log-linear buckets would need ten an octave for
 * that.) Source of the idea: Masson, Rim and Lee, "DDSketch", VLDB 2019.
 */
#ifndef FSHM_METRIC_H
#define FSHM_METRIC_H

#include <stdint.h>

#include "../core/layout.h"

#define AN_OCTAVE 7
#define SHORTEST_BITS 6 /* 64 ns */

/* 2^31 * 2^(k/7) */
static const uint32_t octave_bounds[AN_OCTAVE] = {
    2147483648U, 2371014176U, 2617811889U, 2890298655U, 3191148436U, 3523313525U, 3890053517U};

static inline uint32_t duration_bucket(uint64_t ns) {
  unsigned bits = bit_length(ns);
  if (bits <= SHORTEST_BITS) return 0;
  uint32_t mantissa = (uint32_t)(ns << (64 - bits) >> 32), k = AN_OCTAVE - 1;
  while (mantissa < octave_bounds[k]) k--; /* bounds[0] is the least mantissa */
  uint32_t bucket = (bits - SHORTEST_BITS - 1) * AN_OCTAVE + k;
  return bucket < DURATIONS ? bucket : DURATIONS - 1;
}

/* Where a bucket begins, in ns. */
static inline double bucket_begins(uint32_t bucket) {
  return (double)octave_bounds[bucket % AN_OCTAVE] / 2147483648.0 *
         (double)(UINT64_C(1) << (SHORTEST_BITS + bucket / AN_OCTAVE));
}

/* The duration (ns) that a share q of the calls did not exceed; 0 if there are no calls. */
static inline double duration_quantile(const uint64_t *buckets, uint64_t calls, double least,
                                       double most, double q) {
  double rank = q * (double)calls;
  uint64_t before = 0;
  for (uint32_t i = 0; i < DURATIONS && calls; i++) {
    before += buckets[i];
    if (!buckets[i] || (double)before < rank) continue;
    double low = bucket_begins(i), high = bucket_begins(i + 1);
    double middle = 2 * low * high / (low + high);
    return middle < least ? least : middle > most ? most : middle;
  }
  return calls ? most : 0;
}

#endif
