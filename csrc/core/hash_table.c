/* hash_table.c - the hash table of slots: find, claim, reuse. Lock-free; argued in DESIGN.md.
 *
 * A probe window is a run of PROBE_LINES cache lines. The hash of a key names two lines, and the key may be in the
 * slots of the probe windows of both (in a table of up to two windows: in any slot). A look-up reads both windows
 * whole, from the home line on. It does not stop at an empty slot, since slots become empty by time.
 *
 * A limiter takes only its share of the slots of a probe window ("Shares" in DESIGN.md).
 */
#include "hash_table.h"

#define ROUNDS 64 /* of one claim; in each lost round another process made progress */
static_assert(2 * PROBE_LINES * SLOTS_PER_LINE - 1 <= ROUNDS, "a swap for each other slot");

/* The i-th slot of a hash's probe windows, i < table_probe_count(s): for callers that visit all of them. */
uint64_t table_probe_count(const fshm_segment *s) {
  return probe_windows(s) * probe_lines(s) * SLOTS_PER_LINE;
}
uint64_t table_probe(const fshm_segment *s, uint64_t hash, uint64_t i) {
  uint64_t n = i / SLOTS_PER_LINE, many = probe_lines(s);
  uint64_t line = probe_start(s, hash, n >= many);
  for (n %= many; n--;) line = line_after(s, line);
  return line * SLOTS_PER_LINE + i % SLOTS_PER_LINE;
}

/* The same, under whichever rule the state was written. */
static inline bool confirmed_for(const fshm_segment *s, uint64_t slot, uint64_t who, pair_t *pair) {
  if (!is_at(s, slot, who)) return false;
  *pair = likely(!s->read_only) ? pair_load(&s->slots[slot]) : pair_peek(&s->slots[slot]);
  return same_key(pair->who, who) && !IS_PENDING(pair->when);
}

/* The key is not in its home line: look in the rest of both windows. */
__attribute__((noinline)) void table_find_further(const fshm_segment *s, uint64_t hash,
                                                  uint64_t who, found_t *f) {
  if (probe_windows(s) == 2)
    __builtin_prefetch(&s->slots[probe_start(s, hash, 1) * SLOTS_PER_LINE], 1);
  for (unsigned window = 0; window < probe_windows(s); window++) {
    uint64_t line = probe_start(s, hash, window);
    for (uint64_t n = probe_lines(s); n--; line = line_after(s, line)) {
      uint64_t slot = line * SLOTS_PER_LINE;
      if (likely(!line_has(s, slot, who))) continue;
      for (unsigned k = 0; k < SLOTS_PER_LINE; k++) {
        if (confirmed_for(s, slot + k, who, &f->pair)) {
          f->slot = slot + k;
          return;
        }
      }
    }
  }
  f->pair.who = 0;
}

void table_find(const fshm_segment *s, uint64_t hash, uint64_t who, found_t *f) {
  table_find_inline(s, hash, who, f);
}

/* Find another slot of a key, near its slot `slot`, for a caller that does not know the hash. f->pair.who = 0: there
 * is none, or it is in the other probe window. */
COLD void table_near(const fshm_segment *s, uint64_t slot, uint64_t who, found_t *f) {
  uint64_t line = slot / SLOTS_PER_LINE;
  for (uint64_t n = probe_lines(s); n--; line = line_after(s, line)) {
    for (unsigned k = 0; k < SLOTS_PER_LINE; k++) {
      f->slot = line * SLOTS_PER_LINE + k;
      if (confirmed_for(s, f->slot, who, &f->pair)) return;
    }
  }
  f->pair.who = 0;
}

typedef struct {
  bool confirmed, pending;
  found_t match;    /* our key's pending slot with the lowest index */
  found_t free;     /* the slot to take */
  bool has_free, has_stale;
  found_t stale;    /* another key's pending slot: the last resort */
} survey_t;

/* May the limiter of this key take another slot of a probe window in which `room` are left? The fewer are left, the
 * fewer the limiter may have: the last one is for a limiter with none, the one before for one with at most two, then
 * six, then 14. So a flood on one limiter leaves four of 32 slots to others. The check uses what it reads:
 * DESIGN.md, "Shares". */
#define SCARCE 4
static_assert(SLOTS_PER_LINE * PROBE_LINES - SCARCE < 2U << SCARCE, "with more left, all may");
static COLD bool in_share(const fshm_segment *s, uint64_t line, uint64_t who, unsigned room,
                          uint64_t over) {
  /* The bits of `who` that name the limiter; of a `who` that ends in 0, the lowest seven of its number. */
  const uint64_t owner =
      who & 1 ? WHO_OF(MAX_LIMITERS - 1, 0, 0, 0) : WHO_TAG_OF(MAX_LIMITERS - 1) | 1;
  unsigned its = 0;
  for (uint64_t n = probe_lines(s); n--; line = line_after(s, line)) {
    const slot_t *slot = &s->slots[line * SLOTS_PER_LINE];
    /* The halves may be of two pairs: the count may be wrong by one. */
    for (unsigned k = 0; k < SLOTS_PER_LINE; k++) {
      uint64_t when = load_relaxed(&slot[k].when), its_who = load_relaxed(&slot[k].who);
      bool live = !IS_PENDING(when) && state_ends(s, its_who, when) > over;
      its += live && ((its_who ^ who) & owner) == 0;
    }
  }
  return its + 1 < 1U << room;
}

#define NEARLY_FULL (PROBE_LINES * SLOTS_PER_LINE * 3 / 4) /* slots of a window that are in use */
static_assert(PROBE_LINES * SLOTS_PER_LINE - NEARLY_FULL >= SCARCE, "below it, any limiter may");

/* Read all slots of both windows once. Prefers the home window until it is three quarters full, then the emptier
 * one. Below half load 98 % of keys are in their home line, and a table filled to its capacity refuses fewer than
 * one key in 100,000 (simulated; tests/c/test_hash_table.c fills one). */
static survey_t survey(const fshm_segment *s, uint64_t hash, uint64_t who, uint64_t now) {
  survey_t v;
  memset(&v, 0, sizeof v);
  unsigned used[2] = {0, 0}, seen[2] = {0, 0};
  found_t free_in[2] = {{0, {0, 0}}, {0, {0, 0}}};
  const uint64_t over = minus(now, CLOCKS_DIFFER);
  for (unsigned window = 0; window < probe_windows(s); window++) {
    uint64_t line = probe_start(s, hash, window);
    unsigned others = 0, room = 0, stale = 0;
    found_t unconfirmed = {0, {0, 0}};
    for (uint64_t n = probe_lines(s); n--; line = line_after(s, line)) {
      uint64_t slot = line * SLOTS_PER_LINE;
      for (unsigned k = 0; k < SLOTS_PER_LINE; k++) {
        if (room && !load_relaxed(&s->slots[slot + k].who)) { /* another empty slot */
          room++;
          continue;
        }
        pair_t pair = pair_load(&s->slots[slot + k]);
        bool pending = IS_PENDING(pair.when);
        bool ours = same_key(pair.who, who);
        if (ours && !pending) {
          v.confirmed = true;
          return v;
        }
        if (ours) {
          if (!v.pending || slot + k < v.match.slot) v.match = (found_t){slot + k, pair};
          v.pending = true;
        } else if (pending && pair.who) {
          if (!stale++) unconfirmed = (found_t){slot + k, pair};
          others++;
        } else if (!pair.who || state_ends(s, pair.who, pair.when) <= over) {
          if (!room++) free_in[window] = (found_t){slot + k, pair};
        } else {
          others++;
        }
      }
    }
    /* A pending slot counts as free here. A table of one window has no shares. */
    if (unlikely(room + stale <= SCARCE) && probe_windows(s) == 2 &&
        !in_share(s, line, who, room + stale, over))
      continue;
    used[window] = others;
    seen[window] = room;
    if (stale && !v.has_stale) v.stale = unconfirmed;
    v.has_stale |= stale > 0;
  }
  unsigned window = 0;
  if (!seen[0] || (seen[1] && used[0] >= NEARLY_FULL && used[1] < used[0])) window = 1;
  v.has_free = seen[window] > 0;
  v.free = free_in[window];
  return v;
}

/* An empty slot of the home line, in a window that is not nearly full: the survey would choose one of this line too, and
 * costs five times as much. What the key has elsewhere confirm() sees. False: survey. */
static bool home_has_room(const fshm_segment *s, uint64_t hash, found_t *free) {
  if (unlikely(probe_windows(s) != 2)) return false;
  uint64_t line = probe_start(s, hash, 0);
  const uint64_t home = line * SLOTS_PER_LINE;
  unsigned used = 0, k = 0;
  for (unsigned n = 0; n < PROBE_LINES; n++, line = line_after(s, line))
    used += line_used(s, line * SLOTS_PER_LINE);
  while (k < SLOTS_PER_LINE && load_relaxed(&s->slots[home + k].who)) k++;
  *free = (found_t){home + k, {0, 0}};
  return k < SLOTS_PER_LINE && used < NEARLY_FULL;
}

/* Steps 2 and 3 of the protocol, for the pending pair `mine`, which is ours or one that we help: look again at all
 * slots of both windows, then confirm. Returns CLAIMED, CLAIM_LOST, or CLAIM_NOT: not on what the caller knows. */
enum { CLAIM_NOT = -2 };
static int confirm(fshm_segment *s, uint64_t hash, uint64_t who, found_t mine, first_state_t *first,
                   void *context, uint64_t *where) {
  pair_t empty = {0, 0}, pair, expect;
  int budget = ROUNDS;
again:
  /* Pairs with the same fence in every other claimer: if two pending pairs of one key are published, the later
   * publisher looks after both publications. (x86's swap is a full barrier already.) */
  atomic_thread_fence(memory_order_seq_cst);
  for (unsigned window = 0; window < probe_windows(s); window++) {
    uint64_t line = probe_start(s, hash, window);
    for (uint64_t n = probe_lines(s); n--; line = line_after(s, line)) {
      uint64_t slot = line * SLOTS_PER_LINE;
      if (likely(!line_has(s, slot, who))) continue;
      for (unsigned k = 0; k < SLOTS_PER_LINE; k++) {
        if (slot + k == mine.slot) continue;
        while (is_at(s, slot + k, who)) {
          pair = pair_load(&s->slots[slot + k]);
          if (!same_key(pair.who, who)) break;
          if (budget-- <= 0) return CLAIM_LOST;
          expect = mine.pair;
          if (!IS_PENDING(pair.when)) { /* confirmed in another slot: that one counts */
            (void)pair_cas(&s->slots[mine.slot], &expect, empty);
            return CLAIM_LOST;
          }
          if (slot + k < mine.slot) { /* the lower index wins: help that claim */
            (void)pair_cas(&s->slots[mine.slot], &expect, empty);
            mine = (found_t){slot + k, pair};
            goto again;
          }
          expect = pair; /* a higher index: evict it; if it changed meanwhile, read it again */
          if (pair_cas(&s->slots[slot + k], &expect, empty)) break;
        }
      }
    }
  }
  /* The first state is computed after the look. If we were stopped in between, the key might have been charged, have
   * expired and lost its slot, and a state computed earlier would forget that. After the look no other process can
   * confirm a slot of this key without changing ours. */
  expect = mine.pair;
  pair_t confirmed = {who, first(context)};
  if (unlikely(confirmed.when == NO_STATE)) {
    (void)pair_cas(&s->slots[mine.slot], &expect, empty);
    return CLAIM_NOT;
  }
  if (!pair_cas(&s->slots[mine.slot], &expect, confirmed)) return CLAIM_LOST;
  *where = mine.slot;
  return CLAIMED;
}

/* Give the key a slot whose first state is first(context). */
int table_claim(fshm_segment *s, uint64_t hash, uint64_t who, uint64_t now, first_state_t *first,
                void *context, uint64_t *slot) {
  for (int round = 0; round < ROUNDS; round++) {
    found_t room;
    survey_t v = !round && home_has_room(s, hash, &room)
                     ? (survey_t){.has_free = true, .free = room}
                     : survey(s, hash, who, now);
    if (v.confirmed) return CLAIM_LOST;
    if (!v.pending) {
      if (!v.has_free && !v.has_stale) return CLAIM_FULL;
      v.match = v.has_free ? v.free : v.stale;
      pair_t mine = {who, PENDING(add_relaxed(&s->header->ticket, 1))};
      /* step 1: publish. Fails if the slot has changed: look for another one. */
      if (!pair_cas(&s->slots[v.match.slot], &v.match.pair, mine)) continue;
      v.match.pair = mine;
    }
    int status = confirm(s, hash, who, v.match, first, context, slot);
    if (status == CLAIMED) return CLAIMED;
    if (status == CLAIM_NOT) break;
  }
  return CLAIM_LOST;
}

/* Does the key have a slot, confirmed or pending? */
bool table_has(const fshm_segment *s, uint64_t hash, uint64_t who) {
  for (unsigned window = 0; window < probe_windows(s); window++) {
    uint64_t line = probe_start(s, hash, window);
    for (uint64_t n = probe_lines(s); n--; line = line_after(s, line)) {
      if (likely(!line_has(s, line * SLOTS_PER_LINE, who))) continue;
      for (unsigned k = 0; k < SLOTS_PER_LINE; k++)
        if (is_at(s, line * SLOTS_PER_LINE + k, who)) return true;
    }
  }
  return false;
}

/* Is there now a slot for the key, or one that it has? For a caller whose claim found none. */
bool table_room(const fshm_segment *s, uint64_t hash, uint64_t who, uint64_t now) {
  survey_t v = survey(s, hash, who, now);
  return v.confirmed || v.pending || v.has_free || v.has_stale;
}

/* Empty the slot if it still belongs to the key, under whichever rule. One swap. */
void table_clear(fshm_segment *s, uint64_t slot, uint64_t who) {
  pair_t empty = {0, 0};
  for (int i = 0; i < MAX_TRIES; i++) {
    pair_t seen = pair_load(&s->slots[slot]);
    if (!same_key(seen.who, who) || pair_cas(&s->slots[slot], &seen, empty)) return;
  }
}
