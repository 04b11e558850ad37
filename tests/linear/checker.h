/* checker.h - is a history linearisable? The search of Wing and Gong ("Testing and verifying concurrent
 * objects", 1993), with the memoisation of Lowe ("Testing for linearizability", 2017).
 *
 * It looks for an order of the operations that keeps the order of those that did not overlap, and in which
 * the sequential model (model.h) gives every answer that was given. A configuration is what has been put in
 * order so far, together with the model's state; one that was visited before is not entered again. Since
 * the operations of a lane follow each other, "what has been put in order" is a position in each lane. An
 * operation that its process was killed in may be left out, or have taken effect. */
#ifndef CHECKER_H
#define CHECKER_H

#include <stdlib.h>

#include "model.h"

#define MOST_CONFIGS (1u << 21) /* of one history: 700 MB at most; ordinary ones need under 1,000 */

typedef struct {
  config_t *seen;
  uint32_t *table; /* open addressing: index into seen + 1 */
  uint32_t count, room, slots;
  uint32_t furthest; /* operations put in order, at most */
  config_t best; /* where that was */
} search_t;

enum answer { NOT_LINEARISABLE, LINEARISABLE, UNDECIDED };

static inline uint64_t config_hash(const config_t *c) {
  uint64_t h = UINT64_C(0xcbf29ce484222325), word;
  for (size_t i = 0; i + 8 <= sizeof *c; i += 8) {
    memcpy(&word, (const char *)c + i, 8);
    h = (h ^ word) * UINT64_C(0x9e3779b97f4a7c15);
    h ^= h >> 29;
  }
  return h;
}

static inline void table_put(search_t *s, uint32_t index) {
  uint32_t at = (uint32_t)config_hash(&s->seen[index]) & (s->slots - 1);
  while (s->table[at]) at = (at + 1) & (s->slots - 1);
  s->table[at] = index + 1;
}

static inline void search_grow(search_t *s) {
  s->room = s->room ? 2 * s->room : 4096;
  s->slots = 2 * s->room;
  s->seen = realloc(s->seen, s->room * sizeof *s->seen);
  free(s->table);
  s->table = calloc(s->slots, sizeof *s->table);
  if (!s->seen || !s->table) abort();
  for (uint32_t i = 0; i < s->count; i++) table_put(s, i);
}

/* True where it is new. Whole configurations are compared, not their hashes. */
static inline bool search_visit(search_t *s, const config_t *c) {
  if (s->count == s->room) search_grow(s);
  uint32_t at = (uint32_t)config_hash(c) & (s->slots - 1);
  for (; s->table[at]; at = (at + 1) & (s->slots - 1))
    if (!memcmp(&s->seen[s->table[at] - 1], c, sizeof *c)) return false;
  s->seen[s->count] = *c;
  s->table[at] = ++s->count;
  return true;
}

static inline void search_end(search_t *s) {
  free(s->seen);
  free(s->table);
  memset(s, 0, sizeof *s);
}

/* The next operation of a lane, NULL = none is left. */
static inline const op_t *next_op(const history_t *h, const config_t *c, int lane) {
  return c->at[lane] < h->count[lane] ? &h->ops[lane][c->at[lane]] : NULL;
}

/* What operations that have begun may have seen by now; and states that have expired for all that is left are all the
 * same (not with one limit: a cancellation compares them). */
static inline void settle(const history_t *h, config_t *c) {
  uint64_t bound = UINT64_MAX, earliest = UINT64_MAX;
  if (h->limits < 2 || h->changes) return;
  for (int lane = 0; lane < LANES; lane++) {
    for (uint32_t i = c->at[lane]; i < h->count[lane]; i++)
      for (uint32_t k = 0; k < h->ops[lane][i].reads; k++)
        earliest = min_u64(earliest, h->ops[lane][i].read[k]);
    const op_t *op = next_op(h, c, lane);
    if (op && !op_open(op)) bound = min_u64(bound, op->responded);
  }
  for (uint32_t i = 0; i < h->keys * h->limits; i++)
    if (state_expires(c->state[i]) <= earliest) c->state[i] = 0;
  for (int lane = 0; lane < LANES; lane++) {
    const op_t *op = next_op(h, c, lane);
    if (op && op->invoked <= bound) note_room(h, c, lane, op);
  }
}

static inline enum answer explore(search_t *s, const history_t *h, int level, const config_t *c) {
  const op_t *next[LANES];
  int order[LANES], lanes = 0;
  uint64_t bound = UINT64_MAX; /* whatever was invoked after it has to wait */
  uint32_t done = 0;
  bool complete = true;
  for (int lane = 0; lane < LANES; lane++) {
    const op_t *op = next[lane] = next_op(h, c, lane);
    done += c->at[lane];
    if (!op) continue;
    if (!op_open(op)) bound = min_u64(bound, op->responded), complete = false;
    int k = lanes++; /* those that responded first, first: mostly the right order */
    for (; k > 0 && next[order[k - 1]]->responded - 1 > op->responded - 1; k--)
      order[k] = order[k - 1];
    order[k] = lane;
  }
  if (complete) return LINEARISABLE;
  if (done >= s->furthest) s->furthest = done, s->best = *c;
  if (s->count >= MOST_CONFIGS) return UNDECIDED;
  for (int k = 0; k < lanes; k++) {
    int lane = order[k];
    if (next[lane]->invoked > bound) continue;
    for (unsigned branch = 0; branch < BRANCHES; branch++) {
      for (unsigned view = 0; view < views(next[lane]); view++) {
        config_t to = *c;
        if (!advance(h, level, &to, lane, next[lane], branch, view)) continue;
        settle(h, &to);
        if (!search_visit(s, &to)) continue;
        enum answer answer = explore(s, h, level, &to);
        if (answer != NOT_LINEARISABLE) return answer;
      }
    }
  }
  return NOT_LINEARISABLE;
}

/* Keeps its memory from one call to the next; search_end() frees it. */
static inline enum answer check_history(search_t *s, const history_t *h, int level) {
  config_t start;
  memset(&start, 0, sizeof start);
  if (s->slots > 1 << 16) search_end(s); /* after a large one: clearing it would take long */
  s->count = s->furthest = 0;
  if (s->slots) memset(s->table, 0, s->slots * sizeof *s->table);
  settle(h, &start);
  return explore(s, h, level, &start);
}

/* Where the best attempt ended. */
static inline void print_attempt(const search_t *s, const history_t *h, FILE *out) {
  (void)fprintf(out, "%u operations could be put in order; then none of these fits:\n",
                s->furthest);
  for (int lane = 0; lane < LANES; lane++) {
    const op_t *op = next_op(h, &s->best, lane);
    if (!op) continue;
    (void)fprintf(out, "  %s %d, operation %u: ", lane == TESTER ? "the test" : "process", lane,
                  s->best.at[lane] + 1);
    print_op(h, op, op->reads ? op->read[0] : 0, out);
  }
}

#endif
