/* hash_table.c - the keyed table of slots: find, claim, reuse. Lock-free; argued in DESIGN.md.
 *
 * The table is made of probe windows of PROBE_LINES cache lines. A key's candidates are the slots of two of them, those of
 * the two lines that its hash names (all lines, in a table of up to two probe windows). A key is looked for in all of them,
 * from its home line on; there is no early stop at an empty slot, since slots empty themselves by time.
 *
 * A limiter takes slots of a probe window up to its share of it only ("Shares" in DESIGN.md).
 */
#include "hash_table.h"

#define ROUNDS 64 /* of one claim: each lost round means that another process made progress */
static_assert(2 * PROBE_LINES * SLOTS_PER_LINE - 1 <= ROUNDS, "a swap for each other candidate");

/* The i-th candidate slot of a hash, i < table_probe_count(s): for those who walk them from outside. */
uint64_t table_probe_count(const fshm_segment *s) {
  return probe_windows(s) * probe_lines(s) * SLOTS_PER_LINE;
}
uint64_t table_probe(const fshm_segment *s, uint64_t hash, uint64_t i) {
  uint64_t n = i / SLOTS_PER_LINE, many = probe_lines(s);
  uint64_t line = probe_start(s, hash, n >= many);
  for (n %= many; n--;) line = line_after(s, line);
  return line * SLOTS_PER_LINE + i % SLOTS_PER_LINE;
}

/* The same, whatever rule the state was written under. */
static inline bool confirmed_for(const fshm_segment *s, uint64_t slot, uint64_t who, pair_t *pair) {
  if (!is_at(s, slot, who)) return false;
  *pair = likely(!s->read_only) ? pair_load(&s->slots[slot]) : pair_peek(&s->slots[slot]);
  return same_key(pair->who, who) && !IS_PENDING(pair->when);
}

/* Beyond the home line: another line of the home probe window, or the second one; or nowhere. */
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

/* A slot of the key whose other slot this one is, for who does not know its hash: near that slot. f->pair.who = 0: there
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
  found_t match;    /* the lowest pending match */
  found_t free;     /* the slot to take */
  bool has_free, has_stale;
  found_t stale;    /* another key's pending slot: the last resort */
} survey_t;

/* May the limiter of this key take another slot of a probe window, where so many are left? Each that is left doubles what it
 * may have there: the last one is for who has none, the one before for who has two at most, then six, then 14. So a
 * flood on one limiter leaves four slots of 32 to others. A look that decides by what is there: DESIGN.md, "Shares". */
#define SCARCE 4
static_assert(SLOTS_PER_LINE * PROBE_LINES - SCARCE < 2U << SCARCE, "with more left, all may");
static COLD bool in_share(const fshm_segment *s, uint64_t line, uint64_t who, unsigned room,
                          uint64_t over) {
  /* The bits of `who` that name a limiter: of slots that end in 0, the lowest seven of its number. */
  const uint64_t owner =
      who & 1 ? WHO_OF(MAX_LIMITERS - 1, 0, 0, 0) : WHO_TAG_OF(MAX_LIMITERS - 1) | 1;
  unsigned its = 0;
  for (uint64_t n = probe_lines(s); n--; line = line_after(s, line)) {
    const slot_t *slot = &s->slots[line * SLOTS_PER_LINE];
    for (unsigned k = 0; k < SLOTS_PER_LINE; k++) { /* halves of two pairs: counted wrong by one */
      uint64_t when = load_relaxed(&slot[k].when);
      bool live = !IS_PENDING(when) && state_expires(when) > over;
      its += live && ((load_relaxed(&slot[k].who) ^ who) & owner) == 0;
    }
  }
  return its + 1 < 1U << room;
}

/* Look at all candidates once. Prefers the home probe window until it is three quarters full, then the
 * emptier one: below half load 98 % of keys lie in their home line, and a table filled to its
 * capacity refuses fewer than one key in 100,000 (simulated; tests/c/test_hash_table.c fills one). */
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
        if (room && !load_relaxed(&s->slots[slot + k].who)) { /* one more that is empty */
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
        } else if (!pair.who || state_expires(pair.when) <= over) {
          if (!room++) free_in[window] = (found_t){slot + k, pair};
        } else {
          others++;
        }
      }
    }
    /* A slot that somebody is taking is not taken yet. In a table of one probe window there is nothing to share. */
    if (unlikely(room + stale <= SCARCE) && probe_windows(s) == 2 &&
        !in_share(s, line, who, room + stale, over))
      continue;
    used[window] = others;
    seen[window] = room;
    if (stale && !v.has_stale) v.stale = unconfirmed;
    v.has_stale |= stale > 0;
  }
  unsigned window = 0;
  if (!seen[0] || (seen[1] && used[0] >= PROBE_LINES * 3 && used[1] < used[0])) window = 1;
  v.has_free = seen[window] > 0;
  v.free = free_in[window];
  return v;
}

/* Steps 2 and 3 of the protocol, for the pending pair `mine`, which is ours or one that we help:
 * look again at all candidates, then confirm. Returns CLAIMED, CLAIM_LOST, or CLAIM_NOT: not with what the caller
 * knows. */
enum { CLAIM_NOT = -2 };
static int confirm(fshm_segment *s, uint64_t hash, uint64_t who, found_t mine, first_state_t *first,
                   void *context, uint64_t *where) {
  pair_t empty = {0, 0}, pair, expect;
  int budget = ROUNDS;
again:
  /* Pairs with the same fence in every other claimer: of two published pendings of one key, the
   * later publisher's look comes after both publications. (x86's swap is a full barrier already.) */
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
          if (!IS_PENDING(pair.when)) { /* confirmed elsewhere: that one counts */
            (void)pair_cas(&s->slots[mine.slot], &expect, empty);
            return CLAIM_LOST;
          }
          if (slot + k < mine.slot) { /* the lower place wins: help it */
            (void)pair_cas(&s->slots[mine.slot], &expect, empty);
            mine = (found_t){slot + k, pair};
            goto again;
          }
          expect = pair; /* a higher place: out; if it changed meanwhile, look at it again */
          if (pair_cas(&s->slots[slot + k], &expect, empty)) break;
        }
      }
    }
  }
  /* The first state is as of an instant after the look: had we been stopped before it, the key might
   * have been charged, have expired and lost its slot meanwhile, and a state of before would forget
   * that. From the look on, nobody else can confirm a slot of this key without changing ours. */
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
    survey_t v = survey(s, hash, who, now);
    if (v.confirmed) return CLAIM_LOST;
    if (!v.pending) {
      if (!v.has_free && !v.has_stale) return CLAIM_FULL;
      v.match = v.has_free ? v.free : v.stale;
      pair_t mine = {who, PENDING(add_relaxed(&s->header->ticket, 1))};
      /* step 1: publish. Fails where the slot changed since: look for another. */
      if (!pair_cas(&s->slots[v.match.slot], &v.match.pair, mine)) continue;
      v.match.pair = mine;
    }
    int status = confirm(s, hash, who, v.match, first, context, slot);
    if (status == CLAIMED) return CLAIMED;
    if (status == CLAIM_NOT) break;
  }
  return CLAIM_LOST;
}

/* Has the key a slot, confirmed or pending? */
bool table_has(const fshm_segment *s, uint64_t hash, uint64_t who) {
  for (unsigned window = 0; window < probe_windows(s); window++) {
    uint64_t line = probe_start(s, hash, window);
    for (uint64_t n = probe_lines(s); n--; line = line_after(s, line))
      if (unlikely(line_has(s, line * SLOTS_PER_LINE, who))) return true;
  }
  return false;
}

/* Is there, after all, a slot that the key could have, or has? For a caller whose claim found none. */
bool table_room(const fshm_segment *s, uint64_t hash, uint64_t who, uint64_t now) {
  survey_t v = survey(s, hash, who, now);
  return v.confirmed || v.pending || v.has_free || v.has_stale;
}

/* Forget the key in this slot, if it is still its, under whatever rule. One swap. */
void table_clear(fshm_segment *s, uint64_t slot, uint64_t who) {
  pair_t empty = {0, 0};
  for (int i = 0; i < MAX_TRIES; i++) {
    pair_t seen = pair_load(&s->slots[slot]);
    if (!same_key(seen.who, who) || pair_cas(&s->slots[slot], &seen, empty)) return;
  }
}
