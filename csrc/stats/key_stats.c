/* key_stats.c - key statistics: names and counts of keys, for people. Lossy by design; no decision reads them.
 *
 * Each process has a small direct-mapped cache of (slot, counts), its process statistics: the counts of a hot key
 * are there, and move to the key statistics when another key needs the entry. Readers add up the key statistics and
 * the process statistics of all processes. (Sums over keys are counted separately and exactly: counters.c.) Names
 * are in a ring buffer, where new names overwrite old ones. A key in use writes its name again before that: every
 * 4,096 calls it checks how far the ring buffer has come.
 */
#include "key_stats.h"

uint32_t key_stats_meta(uint32_t limiter, uint64_t who) {
  /* 4095: index, and the permit bit. The top of `who`: the bits that stay when its label changes. */
  return (limiter & 4095) << 20 | (uint32_t)(who >> 44);
}

static void add_saturating(_Atomic uint32_t *count, uint32_t more) {
  uint32_t seen = load_relaxed(count);
  for (int i = 0; more && i < MAX_TRIES; i++) {
    uint32_t next = seen > UINT32_MAX - more ? UINT32_MAX : seen + more;
    if (atomic_compare_exchange_weak_explicit(count, &seen, next, memory_order_relaxed,
                                              memory_order_relaxed))
      return;
  }
}

/* Move the counts of the owner's entry to the key statistics, if the key still has the slot. */
static void flush_entry(fshm_segment *s, process_stat_t *e) {
  uint64_t key = load_relaxed(&e->key);
  uint64_t slot = (key >> 32) - 1;
  uint32_t admitted = atomic_exchange_explicit(&e->admitted, 0, memory_order_relaxed);
  uint32_t denied = atomic_exchange_explicit(&e->denied, 0, memory_order_relaxed);
  if (!key || slot >= s->slot_count) return;
  key_stats_t *l = &s->key_stats[slot];
  if (load_relaxed(&l->meta) != (uint32_t)key) return; /* the slot went to another key */
  add_saturating(&l->admitted, admitted);
  add_saturating(&l->denied, denied);
}

void key_stats_flush_process(fshm_segment *s, uint32_t process) {
  for (uint32_t i = 0; i < PROCESS_STATS; i++) {
    flush_entry(s, &s->process_stats[process].entries[i]);
    store_relaxed(&s->process_stats[process].entries[i].key, 0);
  }
}

/* names ---------------------------------------------------------------------------------------- */

static uint32_t name_check(uint64_t meta, const void *name, uint64_t length) {
  return (uint32_t)fshm_siphash(meta, length, name, length);
}

/* A record: a word of check (32) | 1: the name was cut (16) | stored length (16), then the bytes. */
static void name_write(fshm_segment *s, key_stats_t *l, uint32_t meta, const void *key,
                       uint64_t length) {
  uint64_t stored = min_u64(length, NAME_STORED), words = 1 + (stored + 7) / 8;
  if (words >= s->names_words) return;
  uint64_t at = add_relaxed(&s->header->names_head, words);
  uint64_t head =
      (uint64_t)name_check(meta, key, stored) << 32 | (uint64_t)(length > stored) << 16 | stored;
  store_relaxed(&s->names[at % s->names_words], head);
  for (uint64_t i = 1; i < words; i++) {
    uint64_t word = 0;
    memcpy(&word, (const char *)key + 8 * (i - 1), min_u64(8, stored - 8 * (i - 1)));
    store_relaxed(&s->names[(at + i) % s->names_words], word);
  }
  store_relaxed(&l->name, (uint32_t)at);
}

/* How many words ago the name was written; UINT64_MAX: it was overwritten. */
static uint64_t name_age(const fshm_segment *s, const key_stats_t *l) {
  uint64_t age =
      (uint32_t)((uint32_t)load_relaxed(&s->header->names_head) - load_relaxed(&l->name));
  return age > s->names_words ? UINT64_MAX : age;
}

void key_stats_remember(fshm_segment *s, uint64_t slot, uint32_t meta, const void *key,
                        uint64_t length) {
  key_stats_t *l = &s->key_stats[slot];
  if (load_relaxed(&l->meta) != meta) { /* the slot is new to this key */
    store_relaxed(&l->admitted, 0);
    store_relaxed(&l->denied, 0);
    store_relaxed(&l->meta, meta);
    if (!s->names_mode) name_write(s, l, meta, key, length);
  } else if (!s->names_mode && name_age(s, l) > s->names_words - s->names_words / 4) {
    name_write(s, l, meta, key, length);
  }
}

/* The key has no entry in the process statistics, or its name is due for a check. */
void key_stats_miss(fshm_segment *s, uint32_t process, uint64_t slot, uint32_t meta,
                    const void *key, uint64_t length, bool admitted) {
  key_stats_remember(s, slot, meta, key, length);
  if (process >= PROCESSES) {
    add_saturating(admitted ? &s->key_stats[slot].admitted : &s->key_stats[slot].denied, 1);
    return;
  }
  process_stat_t *e = &s->process_stats[process].entries[slot & (PROCESS_STATS - 1)];
  uint64_t mine = (slot + 1) << 32 | meta;
  if (load_relaxed(&e->key) == mine) { /* the caller has counted it; keep far from overflow */
    if (load_relaxed(&e->admitted) >> 31 || load_relaxed(&e->denied) >> 31) flush_entry(s, e);
    return;
  }
  flush_entry(s, e);
  store_relaxed(&e->key, mine);
  (void)add_relaxed(admitted ? &e->admitted : &e->denied, 1);
}

/* The name of the key in a slot. Returns 1; 0: it is not known, or not any more. *length is the stored length, or
 * NAME_STORED + 1 if the name was cut. */
int fshm_key_name(fshm_segment *s, uint64_t slot, char *out, uint64_t size, uint64_t *length) {
  if (slot >= s->slot_count || s->names_mode || s->names_words < 2) return 0;
  const key_stats_t *l = &s->key_stats[slot];
  if (name_age(s, l) == UINT64_MAX) return 0;
  uint32_t meta = load_relaxed(&l->meta), at32 = load_relaxed(&l->name);
  uint64_t head = load_relaxed(&s->header->names_head);
  uint64_t at = head - (uint32_t)((uint32_t)head - at32);
  uint64_t word = load_relaxed(&s->names[at % s->names_words]);
  uint64_t stored = word & 0xffff;
  if (stored > NAME_STORED || stored > size) return 0;
  for (uint64_t i = 0; i < stored; i += 8) {
    uint64_t bytes = load_relaxed(&s->names[(at + 1 + i / 8) % s->names_words]);
    memcpy(out + i, &bytes, min_u64(8, stored - i));
  }
  if (name_check(meta, out, stored) != (uint32_t)(word >> 32)) return 0; /* torn or overwritten */
  *length = stored + (word >> 16 & 1 ? NAME_STORED + 1 - stored : 0);
  return 1;
}

/* Relaxed: a reader may see a key's new counts with its old name, or the other way round. Who needs both together compares
 * `who` and meta (fshm_known_keys), and reads again where a process moved counts meanwhile. */
void fshm_key_stats(const fshm_segment *s, uint64_t from, uint64_t until, uint64_t *who,
                    uint32_t *meta, uint64_t *admitted, uint64_t *denied) {
  for (uint64_t i = from; i < until && i < s->slot_count; i++) {
    const key_stats_t *of = &s->key_stats[i];
    who[i] = load_relaxed(&s->slots[i].who);
    meta[i] = load_relaxed(&of->meta);
    admitted[i] = load_relaxed(&of->admitted);
    denied[i] = load_relaxed(&of->denied);
  }
}

uint64_t fshm_known_keys(const uint64_t *who, const uint32_t *meta, uint64_t count,
                         const uint8_t *of_limiter, int64_t *places, uint16_t *limiters) {
  uint64_t known = 0;
  for (uint64_t i = 0; i < count; i++) {
    const uint32_t limiter = meta[i] >> 20;
    places[known] = (int64_t)i;
    limiters[known] = (uint16_t)limiter;
    known += who[i] && of_limiter[limiter] && meta[i] == key_stats_meta(limiter, who[i]);
  }
  return known;
}
