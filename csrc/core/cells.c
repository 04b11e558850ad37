/* cells.c - the keyed table of cells: find, claim, reuse. Lock-free; argued in DESIGN.md.
 *
 * The table is made of regions of REGION_LINES cache lines. A key's candidates are the cells of two of them, those of
 * the two lines that its hash names (all lines, in a table of up to two regions). A key is looked for in all of them,
 * from its home line on; there is no early stop at an empty cell, since cells empty themselves by time.
 *
 * A limiter takes cells of a region up to its share of it only ("Shares" in DESIGN.md).
 */
#include "internal.h"

#define ROUNDS 64 /* of one claim: each lost round means that another process made progress */
static_assert(2 * REGION_LINES * CELLS_PER_LINE - 1 <= ROUNDS, "a swap for each other candidate");

static inline uint64_t scale(uint32_t part, uint64_t lines) {
  return ((uint64_t)part * lines) >> 32;
}

/* A key's regions: how many, of how many lines, and in which line the key begins to look. */
static inline unsigned regions(const fshm_segment *s) {
  return s->lines <= 2 * REGION_LINES ? 1 : 2;
}
static inline uint64_t region_lines(const fshm_segment *s) {
  return s->lines <= 2 * REGION_LINES ? s->lines : REGION_LINES;
}
static inline uint64_t region_start(const fshm_segment *s, uint64_t hash, unsigned region) {
  return scale((uint32_t)(region ? hash : hash >> 32), s->lines);
}
static inline uint64_t line_after(const fshm_segment *s, uint64_t line) { /* of the same region */
  return line ^ (((line + 1) ^ line) & s->region_mask);
}

/* The i-th candidate cell of a hash, i < cells_candidates(s): for those who walk them from outside. */
uint64_t cells_candidates(const fshm_segment *s) {
  return regions(s) * region_lines(s) * CELLS_PER_LINE;
}
uint64_t cells_candidate(const fshm_segment *s, uint64_t hash, uint64_t i) {
  uint64_t n = i / CELLS_PER_LINE, many = region_lines(s);
  uint64_t line = region_start(s, hash, n >= many);
  for (n %= many; n--;) line = line_after(s, line);
  return line * CELLS_PER_LINE + i % CELLS_PER_LINE;
}

/* May a cell of this line be the key's? Each is looked at once, in any order; and all in one branch, since
 * a look through all candidates is mostly a look at other keys'. */
static inline unsigned is_at(const fshm_segment *s, uint64_t cell, uint64_t who) {
  return same_key(load_relaxed(&s->cells[cell].who), who);
}
static inline bool line_has(const fshm_segment *s, uint64_t first, uint64_t who) {
  static_assert(CELLS_PER_LINE == 4, "four are looked at");
  return is_at(s, first, who) | is_at(s, first + 1, who) | is_at(s, first + 2, who) |
         is_at(s, first + 3, who);
}

/* Pairs: acquire, with the swap that wrote the cell. `who` alone is a hint: the pair decides. */
static inline HOT bool confirmed_at(const fshm_segment *s, uint64_t cell, uint64_t who,
                                    pair_t *pair) {
  if (load_relaxed(&s->cells[cell].who) != who) return false;
  *pair = likely(!s->read_only) ? pair_load(&s->cells[cell]) : pair_peek(&s->cells[cell]);
  return pair->who == who && !IS_PENDING(pair->when);
}

/* The same, whatever rule the state was written under. */
static inline bool confirmed_for(const fshm_segment *s, uint64_t cell, uint64_t who, pair_t *pair) {
  if (!is_at(s, cell, who)) return false;
  *pair = likely(!s->read_only) ? pair_load(&s->cells[cell]) : pair_peek(&s->cells[cell]);
  return same_key(pair->who, who) && !IS_PENDING(pair->when);
}

/* Beyond the home line: another line of the home region, or the second one; or nowhere. */
static __attribute__((noinline)) void find_further(const fshm_segment *s, uint64_t hash,
                                                   uint64_t who, found_t *f) {
  if (regions(s) == 2) __builtin_prefetch(&s->cells[region_start(s, hash, 1) * CELLS_PER_LINE], 1);
  for (unsigned region = 0; region < regions(s); region++) {
    uint64_t line = region_start(s, hash, region);
    for (uint64_t n = region_lines(s); n--; line = line_after(s, line)) {
      uint64_t cell = line * CELLS_PER_LINE;
      if (likely(!line_has(s, cell, who))) continue;
      for (unsigned k = 0; k < CELLS_PER_LINE; k++) {
        if (confirmed_for(s, cell + k, who, &f->pair)) {
          f->cell = cell + k;
          return;
        }
      }
    }
  }
  f->pair.who = 0;
}

static inline HOT void cells_find_inline(const fshm_segment *s, uint64_t hash, uint64_t who,
                                         found_t *f) {
  uint64_t first = region_start(s, hash, 0) * CELLS_PER_LINE;
  for (unsigned k = 0; k < CELLS_PER_LINE; k++) {
    if (likely(confirmed_at(s, first + k, who, &f->pair))) {
      f->cell = first + k;
      return;
    }
  }
  find_further(s, hash, who, f);
}
void cells_find(const fshm_segment *s, uint64_t hash, uint64_t who, found_t *f) {
  cells_find_inline(s, hash, who, f);
}

/* A cell of the key whose other cell this one is, for who does not know its hash: near that cell. f->pair.who = 0: there
 * is none, or it is in the other region. */
static COLD void cells_near(const fshm_segment *s, uint64_t cell, uint64_t who, found_t *f) {
  uint64_t line = cell / CELLS_PER_LINE;
  for (uint64_t n = region_lines(s); n--; line = line_after(s, line)) {
    for (unsigned k = 0; k < CELLS_PER_LINE; k++) {
      f->cell = line * CELLS_PER_LINE + k;
      if (confirmed_for(s, f->cell, who, &f->pair)) return;
    }
  }
  f->pair.who = 0;
}

/* The line where the key most likely is. */
static inline void cells_fetch(const fshm_segment *s, uint64_t hash) {
  __builtin_prefetch(&s->cells[region_start(s, hash, 0) * CELLS_PER_LINE], 1);
}
/* The call will count its key there: that line on its way while the cells are looked at. */
static inline void cells_fetch_ledger(const fshm_segment *s, uint64_t hash) {
  __builtin_prefetch(&s->ledger[region_start(s, hash, 0) * CELLS_PER_LINE], 1);
}

typedef struct {
  bool confirmed, pending;
  found_t match;    /* the lowest pending match */
  found_t free;     /* the cell to take */
  bool has_free, has_stale;
  found_t stale;    /* another key's pending cell: the last resort */
} survey_t;

/* May the limiter of this key take another cell of a region, where so many are left? Each that is left doubles what it
 * may have there: the last one is for who has none, the one before for who has two at most, then six, then 14. So a
 * flood on one limiter leaves four cells of 32 to others. A look that decides by what is there: DESIGN.md, "Shares". */
#define SCARCE 4
static_assert(CELLS_PER_LINE * REGION_LINES - SCARCE < 2U << SCARCE, "with more left, all may");
static COLD bool in_share(const fshm_segment *s, uint64_t line, uint64_t who, unsigned room,
                          uint64_t over) {
  /* The bits of `who` that name a limiter: of cells that end in 0, the lowest seven of its number. */
  const uint64_t owner =
      who & 1 ? WHO_OF(MAX_LIMITERS - 1, 0, 0, 0) : WHO_TAG_OF(MAX_LIMITERS - 1) | 1;
  unsigned its = 0;
  for (uint64_t n = region_lines(s); n--; line = line_after(s, line)) {
    const cell_t *cell = &s->cells[line * CELLS_PER_LINE];
    for (unsigned k = 0; k < CELLS_PER_LINE; k++) { /* halves of two pairs: counted wrong by one */
      uint64_t when = load_relaxed(&cell[k].when);
      bool live = !IS_PENDING(when) && state_expires(when) > over;
      its += live && ((load_relaxed(&cell[k].who) ^ who) & owner) == 0;
    }
  }
  return its + 1 < 1U << room;
}

/* Look at all candidates once. Prefers the home region until it is three quarters full, then the
 * emptier one: below half load 98 % of keys lie in their home line, and a table filled to its
 * capacity refuses fewer than one key in 100,000 (simulated; tests/c/test_cells.c fills one). */
static survey_t survey(const fshm_segment *s, uint64_t hash, uint64_t who, uint64_t now) {
  survey_t v;
  memset(&v, 0, sizeof v);
  unsigned used[2] = {0, 0}, seen[2] = {0, 0};
  found_t free_in[2] = {{0, {0, 0}}, {0, {0, 0}}};
  const uint64_t over = minus(now, CLOCKS_DIFFER);
  for (unsigned region = 0; region < regions(s); region++) {
    uint64_t line = region_start(s, hash, region);
    unsigned others = 0, room = 0, stale = 0;
    found_t unconfirmed = {0, {0, 0}};
    for (uint64_t n = region_lines(s); n--; line = line_after(s, line)) {
      uint64_t cell = line * CELLS_PER_LINE;
      for (unsigned k = 0; k < CELLS_PER_LINE; k++) {
        if (room && !load_relaxed(&s->cells[cell + k].who)) { /* one more that is empty */
          room++;
          continue;
        }
        pair_t pair = pair_load(&s->cells[cell + k]);
        bool pending = IS_PENDING(pair.when);
        bool ours = same_key(pair.who, who);
        if (ours && !pending) {
          v.confirmed = true;
          return v;
        }
        if (ours) {
          if (!v.pending || cell + k < v.match.cell) v.match = (found_t){cell + k, pair};
          v.pending = true;
        } else if (pending && pair.who) {
          if (!stale++) unconfirmed = (found_t){cell + k, pair};
          others++;
        } else if (!pair.who || state_expires(pair.when) <= over) {
          if (!room++) free_in[region] = (found_t){cell + k, pair};
        } else {
          others++;
        }
      }
    }
    /* A cell that somebody is taking is not taken yet. In a table of one region there is nothing to share. */
    if (unlikely(room + stale <= SCARCE) && regions(s) == 2 &&
        !in_share(s, line, who, room + stale, over))
      continue;
    used[region] = others;
    seen[region] = room;
    if (stale && !v.has_stale) v.stale = unconfirmed;
    v.has_stale |= stale > 0;
  }
  unsigned region = 0;
  if (!seen[0] || (seen[1] && used[0] >= REGION_LINES * 3 && used[1] < used[0])) region = 1;
  v.has_free = seen[region] > 0;
  v.free = free_in[region];
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
  for (unsigned region = 0; region < regions(s); region++) {
    uint64_t line = region_start(s, hash, region);
    for (uint64_t n = region_lines(s); n--; line = line_after(s, line)) {
      uint64_t cell = line * CELLS_PER_LINE;
      if (likely(!line_has(s, cell, who))) continue;
      for (unsigned k = 0; k < CELLS_PER_LINE; k++) {
        if (cell + k == mine.cell) continue;
        while (is_at(s, cell + k, who)) {
          pair = pair_load(&s->cells[cell + k]);
          if (!same_key(pair.who, who)) break;
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
  }
  /* The first state is as of an instant after the look: had we been stopped before it, the key might
   * have been charged, have expired and lost its cell meanwhile, and a state of before would forget
   * that. From the look on, nobody else can confirm a cell of this key without changing ours. */
  expect = mine.pair;
  pair_t confirmed = {who, first(context)};
  if (unlikely(confirmed.when == NO_STATE)) {
    (void)pair_cas(&s->cells[mine.cell], &expect, empty);
    return CLAIM_NOT;
  }
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
    int status = confirm(s, hash, who, v.match, first, context, cell);
    if (status == CLAIMED) return CLAIMED;
    if (status == CLAIM_NOT) break;
  }
  return CLAIM_LOST;
}

/* Has the key a cell, confirmed or pending? */
bool cells_has(const fshm_segment *s, uint64_t hash, uint64_t who) {
  for (unsigned region = 0; region < regions(s); region++) {
    uint64_t line = region_start(s, hash, region);
    for (uint64_t n = region_lines(s); n--; line = line_after(s, line))
      if (unlikely(line_has(s, line * CELLS_PER_LINE, who))) return true;
  }
  return false;
}

/* Is there, after all, a cell that the key could have, or has? For a caller whose claim found none. */
bool cells_room(const fshm_segment *s, uint64_t hash, uint64_t who, uint64_t now) {
  survey_t v = survey(s, hash, who, now);
  return v.confirmed || v.pending || v.has_free || v.has_stale;
}

/* Forget the key in this cell, if it is still its, under whatever rule. One swap. */
void cells_clear(fshm_segment *s, uint64_t cell, uint64_t who) {
  pair_t empty = {0, 0};
  for (int i = 0; i < MAX_TRIES; i++) {
    pair_t seen = pair_load(&s->cells[cell]);
    if (!same_key(seen.who, who) || pair_cas(&s->cells[cell], &seen, empty)) return;
  }
}
