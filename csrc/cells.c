/* cells.c - the keyed table of cells: find, claim, reuse. Lock-free; argued in DESIGN.md.
 *
 * A key's candidates are two regions of REGION_LINES cache lines, at two places that its hash names
 * (all lines, in a table of up to two regions). A key is looked for in all of them, from its home
 * line outward; there is no early stop at an empty cell, since cells empty themselves by time.
 */
#include "internal.h"

#define CLOCKS_DIFFER 1000 /* ns, by which two processes' clocks may differ at most (clock.c) */
#define ROUNDS 64 /* of one claim: each lost round means that another process made progress */

static inline uint64_t scale(uint32_t part, uint64_t lines) {
  return ((uint64_t)part * lines) >> 32;
}

/* The i-th candidate line of a hash, i < candidate_lines(s). */
static inline uint64_t candidate_lines(const fshm_segment *s) {
  return s->lines <= 2 * REGION_LINES ? s->lines : 2 * REGION_LINES;
}
static inline uint64_t candidate_line(const fshm_segment *s, uint64_t hash, uint64_t i) {
  bool second = i >= REGION_LINES && s->lines > 2 * REGION_LINES;
  uint64_t base = scale((uint32_t)(second ? hash : hash >> 32), s->lines);
  uint64_t line = base + (second ? i - REGION_LINES : i);
  return line >= s->lines ? line - s->lines : line;
}

/* The i-th candidate cell of a hash, i < cells_candidates(s): for those who walk them from outside. */
uint64_t cells_candidates(const fshm_segment *s) { return candidate_lines(s) * CELLS_PER_LINE; }
uint64_t cells_candidate(const fshm_segment *s, uint64_t hash, uint64_t i) {
  return candidate_line(s, hash, i / CELLS_PER_LINE) * CELLS_PER_LINE + i % CELLS_PER_LINE;
}

/* Pairs: acquire, with the swap that wrote the cell. `who` alone is a hint: the pair decides. */
static inline bool confirmed_at(const fshm_segment *s, uint64_t cell, uint64_t who, pair_t *pair) {
  if (load_relaxed(&s->cells[cell].who) != who) return false;
  *pair = likely(!s->read_only) ? pair_load(&s->cells[cell]) : pair_peek(&s->cells[cell]);
  return pair->who == who && !IS_PENDING(pair->when);
}

void cells_find(const fshm_segment *s, uint64_t hash, uint64_t who, found_t *f) {
  uint64_t first = scale((uint32_t)(hash >> 32), s->lines) * CELLS_PER_LINE;
  for (unsigned k = 0; k < CELLS_PER_LINE; k++) {
    if (likely(confirmed_at(s, first + k, who, &f->pair))) {
      f->cell = first + k;
      return;
    }
  }
  if (s->lines > 2 * REGION_LINES)
    __builtin_prefetch(&s->cells[candidate_line(s, hash, REGION_LINES) * CELLS_PER_LINE], 1);
  for (uint64_t i = 1; i < candidate_lines(s); i++) {
    uint64_t cell = candidate_line(s, hash, i) * CELLS_PER_LINE;
    for (unsigned k = 0; k < CELLS_PER_LINE; k++) {
      if (confirmed_at(s, cell + k, who, &f->pair)) {
        f->cell = cell + k;
        return;
      }
    }
  }
  f->pair.who = 0;
}

typedef struct {
  bool confirmed, pending;
  found_t match;    /* the lowest pending match */
  found_t free;     /* the cell to take */
  bool has_free, has_stale;
  found_t stale;    /* another key's pending cell: the last resort */
} survey_t;

/* Look at all candidates once. Prefers the home region until it is three quarters full, then the
 * emptier one: below half load 98 % of keys lie in their home line, and a table filled to its
 * capacity refuses fewer than one key in 100,000 (simulated; tests/c/test_cells.c fills one). */
static survey_t survey(const fshm_segment *s, uint64_t hash, uint64_t who, uint64_t now) {
  survey_t v;
  memset(&v, 0, sizeof v);
  found_t free_in[2] = {{0, {0, 0}}, {0, {0, 0}}};
  unsigned used[2] = {0, 0}, seen[2] = {0, 0};
  for (uint64_t i = 0; i < candidate_lines(s); i++) {
    unsigned region = i >= REGION_LINES;
    uint64_t cell = candidate_line(s, hash, i) * CELLS_PER_LINE;
    for (unsigned k = 0; k < CELLS_PER_LINE; k++) {
      pair_t pair = pair_load(&s->cells[cell + k]);
      bool pending = IS_PENDING(pair.when);
      if (pair.who == who && !pending) {
        v.confirmed = true;
        return v;
      }
      if (pair.who == who) {
        if (!v.pending || cell + k < v.match.cell) v.match = (found_t){cell + k, pair};
        v.pending = true;
      } else if (pending && pair.who) {
        if (!v.has_stale) v.stale = (found_t){cell + k, pair};
        v.has_stale = true;
        used[region]++;
      } else if (!pair.who || state_expires(pair.when) <= minus(now, CLOCKS_DIFFER)) {
        if (!seen[region]) free_in[region] = (found_t){cell + k, pair};
        seen[region]++;
      } else {
        used[region]++;
      }
    }
  }
  unsigned region = 0;
  if (!seen[0] || (seen[1] && used[0] >= REGION_LINES * 3 && used[1] < used[0])) region = 1;
  v.has_free = seen[region] > 0;
  v.free = free_in[region];
  return v;
}

/* Steps 2 and 3 of the protocol, for the pending pair `mine`, which is ours or one that we help:
 * look again at all candidates, then confirm. Returns CLAIMED, or CLAIM_LOST. */
static int confirm(fshm_segment *s, uint64_t hash, found_t mine, first_state_t *first,
                   void *context, uint64_t *where) {
  pair_t empty = {0, 0}, pair, expect;
  int budget = ROUNDS;
again:
  /* Pairs with the same fence in every other claimer: of two published pendings of one key, the
   * later publisher's look comes after both publications. (x86's swap is a full barrier already.) */
  atomic_thread_fence(memory_order_seq_cst);
  for (uint64_t i = 0; i < candidate_lines(s); i++) {
    uint64_t cell = candidate_line(s, hash, i) * CELLS_PER_LINE;
    for (unsigned k = 0; k < CELLS_PER_LINE; k++) {
      if (cell + k == mine.cell) continue;
      while (load_relaxed(&s->cells[cell + k].who) == mine.pair.who) {
        pair = pair_load(&s->cells[cell + k]);
        if (pair.who != mine.pair.who) break;
        if (budget-- <= 0) return CLAIM_LOST;
        expect = mine.pair;
        if (!IS_PENDING(pair.when)) { /* confirmed elsewhere: that one counts */
          (void)pair_cas(&s->cells[mine.cell], &expect, empty);
          return CLAIM_LOST;
        }
        if (cell + k < mine.cell) { /* the lower place wins: help it */
          (void)pair_cas(&s->cells[mine.cell], &expect, empty);
          mine = (found_t){cell + k, pair};
          goto again;
        }
        expect = pair; /* a higher place: out; if it changed meanwhile, look at it again */
        if (pair_cas(&s->cells[cell + k], &expect, empty)) break;
      }
    }
  }
  /* The first state is as of an instant after the look: had we been stopped before it, the key might
   * have been charged, have expired and lost its cell meanwhile, and a state of before would forget
   * that. From the look on, nobody else can confirm a cell of this key without changing ours. */
  expect = mine.pair;
  pair_t confirmed = {mine.pair.who, first(context)};
  if (!pair_cas(&s->cells[mine.cell], &expect, confirmed)) return CLAIM_LOST;
  *where = mine.cell;
  return CLAIMED;
}

/* Give the key a cell whose first state is first(context). */
int cells_claim(fshm_segment *s, uint64_t hash, uint64_t who, uint64_t now, first_state_t *first,
                void *context, uint64_t *cell) {
  for (int round = 0; round < ROUNDS; round++) {
    survey_t v = survey(s, hash, who, now);
    if (v.confirmed) return CLAIM_LOST;
    if (!v.pending) {
      if (!v.has_free && !v.has_stale) return CLAIM_FULL;
      v.match = v.has_free ? v.free : v.stale;
      pair_t mine = {who, PENDING(add_relaxed(&s->header->ticket, 1))};
      /* step 1: publish. Fails where the cell changed since: look for another. */
      if (!pair_cas(&s->cells[v.match.cell], &v.match.pair, mine)) continue;
      v.match.pair = mine;
    }
    if (confirm(s, hash, v.match, first, context, cell) == CLAIMED) return CLAIMED;
  }
  return CLAIM_LOST;
}

/* Forget the key in this cell, if it is still its. One swap. */
void cells_clear(fshm_segment *s, uint64_t cell, uint64_t who) {
  pair_t empty = {0, 0};
  for (int i = 0; i < MAX_TRIES; i++) {
    pair_t seen = pair_load(&s->cells[cell]);
    if (seen.who != who || pair_cas(&s->cells[cell], &seen, empty)) return;
  }
}
