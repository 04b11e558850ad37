/* zones.c - the time zones of a segment: what the tz database of the process that opened a limiter said of them.
 *
 * A limit names its zone by an index, and all processes go by the spans that lie there. A process with another tz
 * database finds other spans, so another index: then its limit is another one, and counts for all from when it is set.
 */
#include "../core/wall.h"
#include "limits.h"

/* The index of the zone with this name and these spans. FSHM_E_LIMITERS: the table is full. */
int fshm_zone(fshm_segment *s, const char *name, uint64_t length, const uint64_t *spans,
              uint64_t count) {
  struct {
    char name[ZONE_NAME];
    uint64_t spans[ZONE_SPANS];
  } of;
  memset(&of, 0, sizeof of);
  if (s->read_only) return FSHM_E_READ_ONLY;
  if (length < 1 || length > ZONE_NAME || count < 1 || count > ZONE_SPANS) return FSHM_E_ARGUMENT;
  memcpy(of.name, name, length);
  memcpy(of.spans, spans, count * sizeof *spans);
  uint64_t id = fshm_siphash(s->secret[0], s->secret[1] ^ 3, &of, sizeof of);
  id += !id;
  for (int index = 1; index < ZONES; index++) {
    zone_t *z = &s->zones[index];
    uint64_t seen = load_relaxed(&z->id);
    if (!seen && atomic_compare_exchange_strong_explicit(&z->id, &seen, id, memory_order_relaxed,
                                                         memory_order_relaxed))
      seen = id;
    if (seen != id) continue;
    for (uint64_t i = 0; i < ZONE_NAME / 8; i++) {
      uint64_t word;
      memcpy(&word, &of.name[i * 8], 8);
      store_relaxed(&z->name[i], word);
    }
    for (uint64_t i = 0; i < count; i++) store_relaxed(&z->spans[i], of.spans[i]);
    store_relaxed(&z->count, count);
    return index;
  }
  return FSHM_E_LIMITERS;
}

int fshm_zone_name(fshm_segment *s, uint32_t index, char *out, uint64_t size) {
  if (index < 1 || index >= ZONES || size <= ZONE_NAME || !load_relaxed(&s->zones[index].id))
    return 0;
  for (uint64_t i = 0; i < ZONE_NAME / 8; i++) {
    const uint64_t word = load_relaxed(&s->zones[index].name[i]);
    memcpy(&out[i * 8], &word, 8);
  }
  out[ZONE_NAME] = 0;
  return FSHM_OK;
}

uint64_t fshm_calendar_end(uint64_t per_ns, const uint64_t *spans, uint64_t count,
                           uint64_t minute) {
  zone_t zone = {.count = 0};
  if (count > ZONE_SPANS || !calendar_period(per_ns)) return 0;
  for (uint64_t i = 0; i < count; i++) store_relaxed(&zone.spans[i], spans[i]);
  store_relaxed(&zone.count, count);
  return calendar_end(per_ns, &zone, minute);
}
