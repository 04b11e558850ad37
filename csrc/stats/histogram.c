/* histogram.c - durations of operations, summed over all processes of the host. No decision reads them.
 *
 * A metric is a pair (component, operation). Its sums are in METRIC_SHARDS shards. A process adds to the shard of
 * its process index, so that workers seldom write the same cache line. There are only relaxed adds: the sums are
 * exact unless a process is killed in the middle of a record, which then is in part lost. DESIGN.md, "Histograms".
 */
#include "histogram.h"
#include "../core/internal.h"

static const char full_table[] = "(other)\0(other)";

static int metric_claim(fshm_segment *s, uint32_t index, uint64_t id, const char *name,
                        uint64_t length, uint64_t component_length) {
  metric_t *m = &s->metrics[index];
  uint64_t seen = load_relaxed(&m->id);
  if (!seen && !s->read_only &&
      atomic_compare_exchange_strong_explicit(&m->id, &seen, id, memory_order_relaxed,
                                              memory_order_relaxed))
    seen = id;
  if (seen != id) return 0;
  if (load_relaxed(&m->name_length)) return 1;
  for (uint64_t i = 0; i < length; i++) store_relaxed(&m->name[i], (unsigned char)name[i]);
  store_relaxed(&m->component_length, (uint32_t)component_length);
  /* release: a reader that sees the length sees the name. Pairs with the acquire in fshm_metric_at(). */
  atomic_store_explicit(&m->name_length, (uint32_t)length, memory_order_release);
  return 1;
}

int fshm_metric_open(fshm_segment *s, const char *component, uint64_t component_length,
                     const char *operation, uint64_t operation_length) {
  char name[METRIC_NAME];
  uint64_t hash[2];
  /* The whole names identify a metric; the part that fits is shown. */
  hash[0] = fshm_siphash(s->secret[0], s->secret[1] ^ 6, component, component_length);
  hash[1] = fshm_siphash(s->secret[0], s->secret[1] ^ 7, operation, operation_length);
  uint64_t id = fshm_siphash(s->secret[0], s->secret[1] ^ 8, hash, sizeof hash);
  uint64_t first = min_u64(component_length, METRIC_NAME / 2 - 1);
  uint64_t second = min_u64(operation_length, METRIC_NAME / 2);
  memcpy(name, component, first);
  name[first] = 0;
  memcpy(name + first + 1, operation, second);
  for (uint32_t i = 0; i < METRICS - 1; i++)
    if (metric_claim(s, i, id + !id, name, first + 1 + second, first)) return (int)i;
  (void)metric_claim(s, METRICS - 1, 1, full_table, sizeof full_table - 1, 7);
  return METRICS - 1;
}

/* weight: how many calls this one stands for, if only some are measured. */
void fshm_metric_record(fshm_segment *s, uint32_t metric, uint64_t ns, uint64_t weight, int success,
                        uint64_t size_in, uint64_t size_out) {
  if (metric >= METRICS || s->read_only) return;
  uint32_t shard = process_index(s) & (METRIC_SHARDS - 1);
  histogram_t *h = &s->histograms[metric * METRIC_SHARDS + shard];
  (void)add_relaxed(&h->buckets[duration_bucket(ns)], weight);
  (void)add_relaxed(&h->sum, ns * weight);
  if (unlikely(!success)) (void)add_relaxed(&h->errors, weight);
  if (size_in) (void)add_relaxed(&h->sizes[0], size_in * weight);
  if (size_out) (void)add_relaxed(&h->sizes[1], size_out * weight);
  if (unlikely(ns > load_relaxed(&h->most))) raise_to(&h->most, ns);
  if (unlikely(~ns > load_relaxed(&h->least))) raise_to(&h->least, ~ns);
}

/* Several metrics added up, without the names. Indexes of no metric are ignored. */
void fshm_metric_sum(fshm_segment *s, const uint32_t *metrics, uint32_t count,
                     fshm_metric_info *out) {
  uint64_t buckets[DURATIONS] = {0}, least = 0;
  out->calls = out->errors = out->sum_ns = out->size_in = out->size_out = out->most_ns = 0;
  for (uint64_t n = 0; n < (uint64_t)count * METRIC_SHARDS; n++) {
    if (metrics[n / METRIC_SHARDS] >= METRICS) continue;
    const histogram_t *h =
        &s->histograms[(uint64_t)metrics[n / METRIC_SHARDS] * METRIC_SHARDS + n % METRIC_SHARDS];
    for (uint32_t i = 0; i < DURATIONS; i++) {
      uint64_t calls = load_relaxed(&h->buckets[i]);
      buckets[i] += calls;
      out->calls += calls;
    }
    out->errors += load_relaxed(&h->errors);
    out->sum_ns += load_relaxed(&h->sum);
    out->size_in += load_relaxed(&h->sizes[0]);
    out->size_out += load_relaxed(&h->sizes[1]);
    out->most_ns = max_u64(out->most_ns, load_relaxed(&h->most));
    least = max_u64(least, load_relaxed(&h->least));
  }
  out->least_ns = out->calls && least ? ~least : 0;
  double low = (double)out->least_ns, high = (double)out->most_ns;
  out->p50_ns = duration_quantile(buckets, out->calls, low, high, 0.50);
  out->p95_ns = duration_quantile(buckets, out->calls, low, high, 0.95);
  out->p99_ns = duration_quantile(buckets, out->calls, low, high, 0.99);
}

static_assert(DURATIONS == FSHM_OCTAVES * AN_OCTAVE, "a histogram is so many octaves");

void fshm_metric_octaves(fshm_segment *s, const uint32_t *metrics, uint32_t count,
                         uint64_t *calls) {
  memset(calls, 0, FSHM_OCTAVES * sizeof *calls);
  for (uint64_t n = 0; n < (uint64_t)count * METRIC_SHARDS; n++) {
    if (metrics[n / METRIC_SHARDS] >= METRICS) continue;
    const histogram_t *h =
        &s->histograms[(uint64_t)metrics[n / METRIC_SHARDS] * METRIC_SHARDS + n % METRIC_SHARDS];
    for (uint32_t i = 0; i < DURATIONS; i++) calls[i / AN_OCTAVE] += load_relaxed(&h->buckets[i]);
  }
}

int fshm_metric_at(fshm_segment *s, uint32_t metric, fshm_metric_info *out) {
  memset(out, 0, sizeof *out);
  if (metric >= METRICS) return FSHM_E_ARGUMENT;
  const metric_t *m = &s->metrics[metric];
  uint32_t length = atomic_load_explicit(&m->name_length, memory_order_acquire);
  uint32_t component = load_relaxed(&m->component_length);
  if (!load_relaxed(&m->id) || !length || length > METRIC_NAME || component >= length) return 0;
  out->name_length = length;
  out->component_length = component;
  for (uint32_t i = 0; i < length; i++) out->name[i] = (char)load_relaxed(&m->name[i]);
  fshm_metric_sum(s, &metric, 1, out);
  return FSHM_OK;
}
