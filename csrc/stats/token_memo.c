/* token_memo.c - a cache of the token counts of texts, for all processes. It may forget any entry at any time.
 *
 * A text is identified by a 128-bit hash under the segment's secret, so a text that passes for another one cannot be
 * prepared. 104 bits of the hash are in the entry, and the rest chooses the line (two texts of one line that agree
 * in 104 bits: never, at 2^52 texts). An entry has 16 bytes and is swapped whole: it is there or not, never torn.
 * Argued in DESIGN.md, "Token memo".
 */
#include "../core/internal.h"

#define COUNT_BITS 24
#define COUNT_MASK ((UINT64_C(1) << COUNT_BITS) - 1)

/* The line where a text may be, and the words of its entry. */
typedef struct {
  memo_t *line;
  uint64_t who, when; /* `when` with a count of 0 */
} memo_line_t;

static memo_line_t line_of(const fshm_segment *s, const uint64_t hash[2]) {
  uint64_t line = ((hash[1] & UINT32_MAX) * s->memo_lines) >> 32;
  return (memo_line_t){&s->memo[line * MEMO_WAYS], hash[0] + !hash[0], hash[1] & ~COUNT_MASK};
}

static inline pair_t entry_at(const fshm_segment *s, const memo_t *entry) {
  return likely(!s->read_only) ? pair_load(entry) : pair_peek(entry);
}

/* The name of an encoding as a number, for the calls below. */
uint64_t fshm_memo_encoding(fshm_segment *s, const char *name, uint64_t length) {
  return fshm_siphash(s->secret[0], s->secret[1] ^ 5, name, length);
}

/* Keyed, so that a tenant cannot choose a name with another tenant's number. */
uint64_t fshm_memo_tenant(fshm_segment *s, uint64_t encoding, const void *tenant, uint64_t length) {
  return fshm_siphash(s->secret[0] ^ encoding, s->secret[1] ^ 10, tenant, length);
}

void fshm_memo_hash(fshm_segment *s, uint64_t encoding, const void *text, uint64_t length,
                    uint64_t hash[2]) {
  fshm_siphash128(s->secret[0] ^ encoding, s->secret[1] ^ 4, text, length, hash);
}

int64_t fshm_memo_known(fshm_segment *s, const uint64_t hash[2]) {
  memo_line_t p = line_of(s, hash);
  for (unsigned way = 0; way < MEMO_WAYS; way++) {
    /* Pairs with the swap in fshm_memo_keep(): the pair is read whole. */
    pair_t seen = entry_at(s, &p.line[way]);
    if (seen.who == p.who && (seen.when & ~COUNT_MASK) == p.when)
      return (int64_t)(seen.when & COUNT_MASK);
  }
  return -1;
}

/* One swap into an empty entry, else over one of the four entries of the line, chosen by their contents, which is as
 * good as random. A lost swap is not tried again: another text took the entry, which is as useful. */
void fshm_memo_keep(fshm_segment *s, const uint64_t hash[2], uint64_t count) {
  if (count > COUNT_MASK || s->read_only) return;
  memo_line_t p = line_of(s, hash);
  pair_t seen[MEMO_WAYS];
  uint64_t mixed = p.who;
  unsigned to = MEMO_WAYS;
  for (unsigned way = 0; way < MEMO_WAYS && to == MEMO_WAYS; way++) {
    seen[way] = pair_load(&p.line[way]);
    if (!seen[way].who || (seen[way].who == p.who && (seen[way].when & ~COUNT_MASK) == p.when))
      to = way;
    mixed += seen[way].who;
  }
  if (to == MEMO_WAYS) to = (unsigned)(mixed >> 32) % MEMO_WAYS;
  pair_t mine = {p.who, p.when | count};
  (void)pair_cas(&p.line[to], &seen[to], mine);
}

UNGUARDED int64_t fshm_memo_get(fshm_segment *s, uint64_t encoding, const void *text,
                                uint64_t length) {
  uint64_t hash[2];
  fshm_memo_hash(s, encoding, text, length, hash);
  return fshm_memo_known(s, hash);
}

void fshm_memo_put(fshm_segment *s, uint64_t encoding, const void *text, uint64_t length,
                   uint64_t count) {
  uint64_t hash[2];
  fshm_memo_hash(s, encoding, text, length, hash);
  fshm_memo_keep(s, hash, count);
}

void fshm_memo_count(fshm_segment *s, uint64_t hits, uint64_t misses) {
  if (s->read_only) return;
  (void)add_relaxed(&s->header->memo_hits, hits);
  (void)add_relaxed(&s->header->memo_misses, misses);
}

void fshm_memo_at(fshm_segment *s, fshm_memo_info *out) {
  memset(out, 0, sizeof *out);
  out->entries = s->memo_lines * MEMO_WAYS;
  out->hits = load_relaxed(&s->header->memo_hits);
  out->misses = load_relaxed(&s->header->memo_misses);
  for (uint64_t i = 0; i < out->entries; i++) out->texts += load_relaxed(&s->memo[i].who) != 0;
}
