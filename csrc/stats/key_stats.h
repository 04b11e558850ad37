/* key_stats.h - counting a call of a key. */
#ifndef FSHM_KEY_STATS_H
#define FSHM_KEY_STATS_H

#include "../core/internal.h"

#define NAME_STORED 200 /* bytes of a key's name that are kept */
uint32_t key_stats_meta(uint32_t limiter, uint64_t who);
void key_stats_miss(fshm_segment *s, uint32_t process, uint64_t slot, uint32_t meta,
                    const void *key, uint64_t length, bool admitted);
void key_stats_flush_process(fshm_segment *s, uint32_t process);
void key_stats_remember(fshm_segment *s, uint64_t slot, uint32_t meta, const void *key,
                        uint64_t length);

/* Count one call for the key in `slot`, in this process's own statistics. The slow path: another key has the entry,
 * or, every 4,096th time, the key's name is checked in the ring buffer. */
static inline void key_stats_count(fshm_segment *s, uint32_t process, uint64_t slot, uint32_t meta,
                                   const void *key, uint64_t length, bool admitted) {
  if (likely(process < PROCESSES)) {
    process_stat_t *e = &s->process_stats[process].entries[slot & (PROCESS_STATS - 1)];
    if (likely(load_relaxed(&e->key) == ((slot + 1) << 32 | meta))) {
      uint32_t before = add_relaxed(admitted ? &e->admitted : &e->denied, 1);
      if (likely((before & 4095) != 4095)) return;
    }
  }
  key_stats_miss(s, process, slot, meta, key, length, admitted);
}

#endif
