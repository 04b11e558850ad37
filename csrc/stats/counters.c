/* counters.c - the numbers of admitted, denied and refused calls, by limiter and in all. For monitoring; no decision
 * reads them.
 *
 * Each call is one relaxed add to a word that is never reset, whichever process owns the index. So the sums are
 * exact at any time, however processes are killed or stopped, and a later sum is never less than an earlier one:
 * tools that compute rates need that. DESIGN.md, "Counters".
 */
#include "../core/wall.h"
#include "counters.h"
#include "key_stats.h"

static void add_counters(const counters_t *row, uint32_t counters, fshm_counters *out) {
  for (uint32_t lane = 0; lane < COUNTER_LANES; lane++) {
    const limiter_counters_t *t = &row->of[lane][counters];
    out->admitted += load_relaxed(&t->admitted);
    out->denied += load_relaxed(&t->denied);
    out->refused += load_relaxed(&t->refused);
    out->shared += load_relaxed(&t->shared);
  }
}

void counters_of_process(const fshm_segment *s, uint32_t process, fshm_counters *out) {
  memset(out, 0, sizeof *out);
  for (uint32_t i = 0; i < COUNTERS; i++) add_counters(&s->counters[process], i, out);
}

void fshm_counters_all(const fshm_segment *s, fshm_counters *out) {
  memset(out, 0, COUNTERS * sizeof *out);
  for (uint32_t i = 0; i < COUNTERS; i++) add_counters(s->outsiders, i, &out[i]);
  for (uint32_t process = 0; process < PROCESSES; process++)
    for (uint32_t i = 0; i < COUNTERS && process_joined(s, process); i++)
      add_counters(&s->counters[process], i, &out[i]);
}

/* A slot counts for its key's limiter if the key statistics know the key. */
uint64_t fshm_used(const fshm_segment *s, uint64_t now, uint64_t *keys) {
  uint64_t used = 0;
  if (!now) now = segment_now(s);
  for (uint32_t i = 0; i < s->limiter_count; i++) keys[i] = 0;
  for (uint64_t i = 0; i < s->slot_count; i++) {
    uint64_t who = load_relaxed(&s->slots[i].who), when = load_relaxed(&s->slots[i].when);
    if (!who || IS_PENDING(when) || state_ends(s, who, when) <= now) continue;
    used++;
    uint32_t meta = load_relaxed(&s->key_stats[i].meta), limiter = meta >> 20;
    if (limiter < s->limiter_count && meta == key_stats_meta(limiter, who)) keys[limiter]++;
  }
  return used;
}
