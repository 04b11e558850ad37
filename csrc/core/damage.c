/* damage.c - detects and remembers that a segment was written over, where that is certain.
 *
 * For people; no decision reads it. Certain means: no use of this library leads to such contents, with any number of
 * processes, killed at any instruction. Argued in DESIGN.md, "Hostile contents".
 */
#include <sys/stat.h>

#include "../limits/limits.h"
#include "../limits/shared_counters.h"
#include "internal.h"

#define DAMAGE_INDEX ((UINT64_C(1) << 56) - 1)

/* Only the first damage is kept. */
COLD void damage_note(fshm_segment *s, unsigned kind, uint64_t index) {
  uint64_t word = (uint64_t)kind << 56 | (index & DAMAGE_INDEX), none = 0;
  (void)atomic_compare_exchange_strong_explicit(&s->damage, &none, word, memory_order_relaxed,
                                                memory_order_relaxed);
  if (s->read_only || kind == FSHM_DAMAGE_SIZE) return; /* cut: the header may be gone */
  none = 0;
  (void)atomic_compare_exchange_strong_explicit(&s->header->damage, &none, word,
                                                memory_order_relaxed, memory_order_relaxed);
}

/* Called when the limits of a limiter could not be used. If they were replaced by good ones since, nothing is noted. */
COLD int damage_limits(fshm_segment *s, uint32_t index) {
  if (limits_wrong(s, index, true)) damage_note(s, FSHM_DAMAGE_LIMITS, index);
  return FSHM_E_DAMAGED;
}

/* The constant words of the header. */
static COLD void look_at_header(fshm_segment *s) {
  for (uint64_t at = 0; at < sizeof s->verified; at += 8) {
    uint64_t is = *(const volatile uint64_t *)(const void *)(s->map + at), was;
    memcpy(&was, s->verified + at, 8);
    if (is != was) damage_note(s, FSHM_DAMAGE_HEADER, at);
  }
}

COLD int fshm_damage(fshm_segment *s, uint64_t *index) {
  struct stat st;
  /* No descriptor is kept, so the size of a segment without its name is not known. */
  bool known = !lstat(s->path, &st) && (uint64_t)st.st_dev == s->dev && st.st_ino == s->ino;
  if (known && (uint64_t)st.st_size != s->size) {
    damage_note(s, FSHM_DAMAGE_SIZE, (uint64_t)st.st_size);
    *index = (uint64_t)st.st_size;
    return FSHM_DAMAGE_SIZE;
  }
  look_at_header(s);
  uint64_t word = load_relaxed(&s->header->damage);
  /* Written over itself. */
  if (word && (word >> 56 < FSHM_DAMAGE_SIZE || word >> 56 > FSHM_DAMAGE_SLOT))
    word = (uint64_t)FSHM_DAMAGE_HEADER << 56 | offsetof(header_t, damage);
  /* Kept in this process, if the segment loses it. */
  if (word) damage_note(s, (unsigned)(word >> 56), word);
  if (!word) word = load_relaxed(&s->damage);
  *index = word & DAMAGE_INDEX;
  return (int)(word >> 56);
}

static COLD void look_at_slots(fshm_segment *s) {
#if defined(__x86_64__)
  /* The two halves of a slot may be of different instants. */
  if (s->read_only && !fshm_wide_loads) return;
#else
  if (s->read_only) return;
#endif
  for (uint64_t i = 0; i < shared_slot(s, s->limiter_count, 0, 0); i++) {
    pair_t pair = pair_load(&s->slots[i]);
    bool wrong = pair.who ? !state_possible(pair.when) : pair.when != 0;
    if (wrong) damage_note(s, FSHM_DAMAGE_SLOT, i);
  }
}

COLD int fshm_check(fshm_segment *s, uint64_t *index) {
  int kind = fshm_damage(s, index);
  if (kind == FSHM_DAMAGE_SIZE) return kind; /* a read beyond the end means SIGBUS */
  for (uint32_t i = 0; i < s->limiter_count; i++) {
    if (limits_name_wrong(s, i)) damage_note(s, FSHM_DAMAGE_NAME, i);
    if (limits_wrong(s, i, false) || (load_relaxed(&s->limiters[i].most) & 0x1ffff) > MAX_PERMITS)
      damage_note(s, FSHM_DAMAGE_LIMITS, i);
  }
  look_at_slots(s);
  return fshm_damage(s, index);
}
