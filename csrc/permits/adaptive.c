/* adaptive.c - limits of calls in flight that all processes learn together. The rules: adaptive_rules.h; a permit below
 * the limit: semaphore.c. Argued in DESIGN.md, "Limits that are learned".
 *
 * A key of the limiter `learned` has its limit in the slot of the key itself, and four words in slots of their own, which
 * share a line. Each is swapped by itself. Calls go by the limit and the pause alone; the others are statistics.
 */
#include "../limits/per_call.h"
#include "../stats/key_stats.h"
#include "adaptive_rules.h"
#include "semaphore.h"
#include "wait_queue.h"

#define PAUSE LEARNED_WORDS /* the number of the word after those */
#define PAUSE_SHIFT 18 /* 0.26 ms */
#define END_TRIES \
  32 /* of learning from one call: a sample that is lost to so many others is not missed */

typedef struct {
  keyed_t k;
  found_t at[LEARNED_WORDS];
  learned_t words;
} known_words_t;

static uint64_t word_who(const keyed_t *k, unsigned word) {
  return word == LEARNED_LIMIT ? k->who : side_who(nth_who(k->who, word), k->index);
}
/* Numbers 4 to 7 share a home line. */
static uint64_t word_home(const keyed_t *k, unsigned word) {
  return word == LEARNED_LIMIT ? k->hash
                               : nth_hash(k->hash, SLOTS_PER_LINE + word % SLOTS_PER_LINE);
}
static uint64_t word_look(const keyed_t *k, unsigned word, found_t *f) {
  table_find(k->s, word_home(k, word), word_who(k, word), f);
  return f->pair.who ? f->pair.when : 0;
}
static uint64_t first_given(void *context) { return *(uint64_t *)context; }

/* Swap in a word, or claim its slot. CLAIMED, CLAIM_LOST or CLAIM_FULL. */
static int word_put(const keyed_t *k, unsigned word, found_t *f, uint64_t next) {
  return keyed_put(k, word_home(k, word), f, word_who(k, word), next, first_given, &next);
}

static COLD void words_look(known_words_t *w) {
  for (unsigned i = 0; i < LEARNED_WORDS; i++) w->words.words[i] = word_look(&w->k, i, &w->at[i]);
}

/* pause: a window's state that ends with it */
static uint64_t pause_left(const keyed_t *k, uint64_t word) {
  return learned_has(word, PAUSE_SHIFT) ? minus(state_expires(word), k->now) : 0;
}

static COLD int pause_until(const keyed_t *k, uint64_t ns) {
  for (int tries = 0; tries < MAX_TRIES; tries += CLAIM_TRIES) {
    found_t f;
    const uint64_t word = word_look(k, PAUSE, &f);
    if (!f.pair.who && !ns) return FSHM_OK;
    /* Rounded up: a state's end is rounded down. */
    const uint64_t end =
        plus_time(plus_time(k->now, ns), ns ? (UINT64_C(1) << PAUSE_SHIFT) - 1 : 0);
    if (ns && pause_left(k, word) >= ns) return FSHM_OK;
    const int status = word_put(k, PAUSE, &f, ns ? learned_word(PAUSE_SHIFT, end, 1) : 0);
    if (status == CLAIMED) return FSHM_OK;
    if (status == CLAIM_FULL) return FSHM_FULL;
  }
  return FSHM_CONTENDED;
}

COLD int fshm_adaptive_pause(fshm_limiter *permits, fshm_limiter *learned, const void *key,
                             uint64_t length, uint64_t ns, uint64_t now) {
  keyed_t k;
  int status = keyed_begin(&k, learned, FSHM_LEASE, key, length, now);
  if (status == FSHM_OK) status = pause_until(&k, ns);
  if (status == FSHM_OK && !ns) fshm_wait_wake(permits, key, length);
  return status;
}

typedef struct {
  const keyed_t *k;
  uint32_t initial;
} first_limit_t;
static uint64_t first_limit(void *context) {
  const first_limit_t *first = context;
  return limit_word_first(first->initial, keyed_now(first->k));
}

/* Cold for the compiler, as fshm_permit_lease_admit() is. */
COLD int fshm_adaptive_admit(fshm_limiter *permits, fshm_limiter *learned, const fshm_adaptive *how,
                             const void *key, uint64_t length, uint64_t now, fshm_permit *permit,
                             fshm_decision *out, uint32_t *in_flight) {
  keyed_t k;
  found_t f;
  memset(permit, 0, sizeof *permit);
  memset(out, 0, sizeof *out);
  *in_flight = 0;
  if (!adaptive_valid(how)) return out->status = FSHM_E_ARGUMENT;
  int status = keyed_begin(&k, learned, FSHM_LEASE, key, length, now);
  if (status != FSHM_OK) return out->status = status;
  const uint64_t pause = pause_left(&k, word_look(&k, PAUSE, &f));
  status = FSHM_CONTENDED;
  for (int tries = 0; !pause && tries < MAX_TRIES; tries += CLAIM_TRIES) {
    const granted_t g = {k.hash, k.who, 0, 0, true};
    status =
        semaphore_take_learned(permits, key, length, &g, now, permit, &out->version, in_flight);
    if (status != FSHM_ASK) break;
    first_limit_t first = {&k, how->initial};
    table_find(k.s, k.hash, k.who, &f);
    if (f.pair.who && f.pair.when) continue;
    /* A slot of the limit without a word: another program wrote there. */
    const uint64_t word = f.pair.who ? first_limit(&first) : 0;
    const int claim = keyed_put(&k, k.hash, &f, k.who, word, first_limit, &first);
    if (claim == CLAIMED && !(k.s->names_mode & FSHM_NAMES_OFF))
      key_stats_remember(k.s, f.slot, key_stats_meta(k.index, k.who), key, length);
    if (claim == CLAIM_FULL) {
      status = FSHM_FULL;
      break;
    }
  }
  if (status == FSHM_ASK) status = FSHM_CONTENDED; /* each try met another call's word */
  if (pause) {
    status = FSHM_DENIED;
    out->retry_after_ns = (int64_t)pause;
  }
  if (status == FSHM_DENIED && !*in_flight) *in_flight = semaphore_count(permits, key, length, 0);
  if (status == FSHM_ALLOWED) out->remaining = INT64_MAX; /* as fshm_admit() of permits alone */
  return out->status = status;
}

/* The turn was made, and another call has moved the limit meanwhile. A refusal lowers that one, too. */
static COLD int limit_follow(known_words_t *w, uint32_t limit, bool refused) {
  for (int tries = 0; tries < MAX_TRIES; tries++) {
    found_t *f = &w->at[LEARNED_LIMIT];
    const uint64_t seen = word_look(&w->k, LEARNED_LIMIT, f);
    if (!f->pair.who || (refused && learned_limit(seen) <= limit)) return CLAIM_LOST;
    const uint64_t next = limit_word_moved(seen, limit, w->k.now);
    if (next == seen || word_put(&w->k, LEARNED_LIMIT, f, next) == CLAIMED) return CLAIMED;
  }
  return CLAIM_LOST;
}

/* Write the words that have changed. Of several calls that saw the same turn, or the same round, one swaps it: the others
 * have lost, and look again. *raised: the limit. False: nothing was written. */
static COLD bool words_put(known_words_t *w, const learned_t *next, bool refused, bool *raised) {
  static const unsigned order[] = {LEARNED_TURN, LEARNED_ROUND, LEARNED_LATENCY, LEARNED_LIMIT};
  const uint64_t *before = w->words.words;
  const uint32_t to = learned_limit(next->words[LEARNED_LIMIT]);
  bool any = false, turned = false;
  for (unsigned i = 0; i < LEARNED_WORDS; i++) {
    const unsigned word = order[i];
    if (next->words[word] == before[word]) continue;
    int status = word_put(&w->k, word, &w->at[word], next->words[word]);
    if (status == CLAIM_LOST && !any) return false;
    if (word == LEARNED_LIMIT && turned && status == CLAIM_LOST)
      status = limit_follow(w, to, refused);
    if (word == LEARNED_LIMIT && status == CLAIMED) *raised = to > learned_limit(before[word]);
    turned |= word == LEARNED_TURN && status == CLAIMED;
    any = true;
  }
  return true;
}

COLD int fshm_adaptive_end(fshm_limiter *permits, fshm_limiter *learned, const fshm_adaptive *how,
                           const void *key, uint64_t length, const fshm_sample *sample,
                           uint64_t pause, uint64_t now) {
  known_words_t w;
  bool raised = false;
  if (!adaptive_valid(how)) return FSHM_E_ARGUMENT;
  int status = keyed_begin(&w.k, learned, FSHM_LEASE, key, length, now);
  if (status == FSHM_OK && pause) status = pause_until(&w.k, pause);
  if (status != FSHM_OK) return status;
  for (int tries = 0; tries < END_TRIES; tries++) {
    words_look(&w);
    if (!w.at[LEARNED_LIMIT].pair.who) break; /* forgotten meanwhile */
    learned_t next = w.words;
    adaptive_next(how, &next, sample, w.k.now);
    if (words_put(&w, &next, sample->throttled != 0, &raised)) break;
    w.k.now = keyed_now(&w.k);
  }
  if (raised) fshm_wait_wake(permits, key, length);
  return FSHM_OK;
}

static COLD void learned_tell(known_words_t *w, fshm_learned *out) {
  memset(out, 0, sizeof *out);
  words_look(w);
  const uint64_t *words = w->words.words;
  found_t f;
  out->paused_ns = pause_left(&w->k, word_look(&w->k, PAUSE, &f));
  if (!words[LEARNED_LIMIT]) return;
  out->limit = learned_limit(words[LEARNED_LIMIT]);
  out->exact = learned_clean(words[LEARNED_LIMIT]);
  const learned_turn_t t = turn_read(words[LEARNED_TURN], out->limit);
  const learned_round_t r = round_read(words[LEARNED_ROUND], words[LEARNED_TURN]);
  out->best = t.best;
  out->phase = t.phase;
  out->turn_ns = t.since ? minus(w->k.now, t.since) + 1 : 0;
  out->calls = r.calls;
  out->rounds = r.rounds;
  const uint32_t mean = latency_mean(words[LEARNED_LATENCY]),
                 base = latency_base(words[LEARNED_LATENCY]);
  out->mean_ns = mean ? latency_of(mean) : 0;
  out->base_ns = base ? latency_of(base) : 0;
}

COLD int fshm_adaptive_look(fshm_limiter *learned, const void *key, uint64_t length, uint64_t now,
                            fshm_learned *out) {
  known_words_t w;
  memset(out, 0, sizeof *out);
  int status = keyed_begin(&w.k, learned, FSHM_LEASE, key, length, now);
  if (status == FSHM_OK) learned_tell(&w, out);
  return status;
}

COLD int fshm_adaptive_at(fshm_segment *s, uint64_t slot, uint64_t now, fshm_learned *out) {
  known_words_t w;
  memset(out, 0, sizeof *out);
  int status = keyed_at(&w.k, s, slot, FSHM_LEASE, now);
  if (status == FSHM_OK) learned_tell(&w, out);
  return status == FSHM_OK && !out->limit ? 0 : status;
}

COLD int fshm_adaptive_forget(fshm_limiter *permits, fshm_limiter *learned,
                              const fshm_adaptive *how, const void *key, uint64_t length) {
  known_words_t w;
  if (!adaptive_valid(how)) return FSHM_E_ARGUMENT;
  int status = keyed_begin(&w.k, learned, FSHM_LEASE, key, length, 0);
  if (status != FSHM_OK) return status;
  words_look(&w);
  for (unsigned i = LEARNED_TURN; i < LEARNED_WORDS; i++)
    if (w.at[i].pair.who) table_clear(w.k.s, w.at[i].slot, w.at[i].pair.who);
  /* Not cleared: a word of it may not come back while a call goes by it. */
  if (w.at[LEARNED_LIMIT].pair.who) (void)limit_follow(&w, how->initial, false);
  return fshm_adaptive_pause(permits, learned, key, length, 0, 0);
}
