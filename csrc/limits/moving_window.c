/* moving_window.c - moving windows: exact, in bounded memory. Argued in DESIGN.md.
 *
 * At most n tokens in any interval of `per`: the key has n positions, each a slot of the table. A token takes a
 * position for `per` (a window of 1). The positions alone decide. Two tokens in one position are at least `per`
 * apart, so no interval holds more than n. A hit is denied only after each position was seen taken.
 *
 * The head, a slot of the key itself, makes this cheap: the positions are a ring buffer, and the head says which
 * position comes next (the oldest) and, in the first round, which were ever taken (none from `turn` on). It is moved
 * on before a position is taken, and outlives all that were taken.
 */
#include <stdlib.h>

#include "per_call.h"

/* A turn is kept in 22 bits: the head's end in units of 4 ms. */
#define FETCHED 8 /* positions that are fetched before they are looked at */
#define MOST_TURNS (UINT64_C(1) << 22)
static_assert(MOST_TURNS > 2 * (uint64_t)FSHM_MAX_MOVING, "a turn is below 2n");

typedef struct {
  keyed_t k;
  uint64_t n, per;
} moving_t;

/* turn: 0 = nothing taken; below n: positions 0 .. turn-1 have been taken, the next is turn; from n on: all
 * have been, the next is turn - n. */
typedef struct {
  found_t slot;
  uint64_t turn, end;
} head_t;

/* A token in a position, to be given back. */
typedef struct {
  uint32_t position, slot;
  uint64_t state;
} token_t;

static head_t head_look(const moving_t *m) {
  head_t h;
  table_find(m->k.s, m->k.hash, m->k.who, &h.slot);
  window_t w = window_read(h.slot.pair.who ? h.slot.pair.when : 0, m->k.now);
  h.turn = min_u64(w.count, MOST_TURNS - 1);
  h.end = w.end;
  return h;
}

static inline uint64_t next_position(const moving_t *m, uint64_t turn) {
  return turn < m->n ? turn : turn % m->n;
}

/* The i-th position from this one on, i below n. */
static inline uint64_t position_after(const moving_t *m, uint64_t from, uint64_t i) {
  return from + i < m->n ? from + i : from + i - m->n;
}

/* The turn after the `ahead`th position from next_position() is taken. */
static inline uint64_t turn_after(const moving_t *m, uint64_t turn, uint64_t ahead) {
  uint64_t next = next_position(m, turn) + ahead + 1;
  if (turn >= m->n) next += m->n;
  return next < 2 * m->n ? next : m->n + next % m->n;
}

/* A token blocks its position until the instant after `per`, so that a closed interval holds n at most. */
static inline uint64_t token_end(const moving_t *m, uint64_t now) {
  return plus_time(now, m->per + 1);
}
static uint64_t token_state(const moving_t *m, uint64_t now) {
  const rule_t one = {.kind = FSHM_WINDOW, .n = 1};
  return window_state(&one, (window_t){token_end(m, now), 1, 0});
}
static uint64_t head_state(uint64_t turn, uint64_t end) {
  const rule_t turns = {.kind = FSHM_WINDOW, .n = MOST_TURNS - 1};
  return window_state(&turns, (window_t){end, turn, 0});
}

/* A slot that is being claimed. */
typedef struct {
  const moving_t *m;
  uint64_t turn;
} head_claim_t;
typedef struct {
  const moving_t *m;
  uint64_t position, state; /* state: the one written */
  patience_t *left; /* for the whole call */
} token_claim_t;

static uint64_t first_head(void *context) {
  const head_claim_t *f = context;
  return head_state(f->turn, token_end(f->m, keyed_now(&f->m->k)));
}

static int head_put(const moving_t *m, head_t *h, uint64_t turn) {
  head_claim_t first = {m, turn};
  uint64_t next = head_state(turn, max_u64(h->end, token_end(m, m->k.now)));
  return keyed_put(&m->k, m->k.hash, &h->slot, m->k.who, next, first_head, &first);
}

/* A token is about to be written with a later time than the head's: the head must outlive it, and include its
 * position. False: the head is gone. */
static bool head_cover(const moving_t *m, uint64_t position, uint64_t end, patience_t *left) {
  fshm_segment *s = m->k.s;
  for (; patient(left); left->swaps--) {
    head_t h = head_look(m);
    if (!h.turn) return false;
    uint64_t turn = h.turn < m->n ? max_u64(h.turn, position + 1) : h.turn;
    if (turn == h.turn && h.end >= end) return true;
    pair_t seen = h.slot.pair, to = {seen.who, head_state(turn, max_u64(h.end, end))};
    if (pair_cas(&s->slots[h.slot.slot], &seen, to)) return true;
  }
  return false;
}

/* 0 ("never seen") if the head could not be extended for it. */
static uint64_t first_token(void *context) {
  token_claim_t *f = context;
  uint64_t now = keyed_now(&f->m->k);
  f->state = token_state(f->m, now);
  if (now != f->m->k.now && !head_cover(f->m, f->position, state_expires(f->state), f->left))
    f->state = 0;
  return f->state;
}

/* Each position has its own home line, unlike permits: with four to a line, a long window would find its probe
 * windows full in a table that is half empty. */
static inline uint64_t token_hash(const moving_t *m, uint64_t position) {
  return nth_hash(m->k.hash, (uint32_t)position * SLOTS_PER_LINE);
}

static inline uint64_t token_who(const moving_t *m, uint64_t position) {
  return side_who(nth_who(m->k.who, (uint32_t)position), m->k.index);
}

/* The end of the token in this position, whose hash is `home`; 0 = it is free. */
static inline uint64_t position_look_at(const moving_t *m, uint64_t position, uint64_t home,
                                        found_t *f) {
  table_find_inline(m->k.s, home, token_who(m, position), f);
  return window_read(f->pair.who ? f->pair.when : 0, m->k.now).end;
}
static inline uint64_t position_look(const moving_t *m, uint64_t position, found_t *f) {
  return position_look_at(m, position, token_hash(m, position), f);
}

static int position_put(const moving_t *m, uint64_t position, found_t *f, token_t *token,
                        patience_t *left) {
  token_claim_t first = {m, position, token_state(m, m->k.now), left};
  uint64_t home = token_hash(m, position);
  uint64_t who = token_who(m, position);
  int status = keyed_put(&m->k, home, f, who, first.state, first_token, &first);
  left->swaps--;
  left->claims -= !f->pair.who;
  *token = (token_t){(uint32_t)position, (uint32_t)f->slot, first.state};
  return status == CLAIMED && !first.state ? CLAIM_LOST : status;
}

/* Remove exactly these tokens. */
static void return_tokens(const moving_t *m, const token_t *tokens, uint64_t count) {
  fshm_segment *s = m->k.s;
  for (uint64_t i = 0; i < count; i++) {
    pair_t mine = {token_who(m, tokens[i].position), tokens[i].state}, empty = {0, 0};
    (void)pair_cas(&s->slots[tokens[i].slot], &mine, empty);
  }
}

/* Are `cost` positions free, in the order of the ring buffer? ahead: how far the first and the last of them are; f:
 * the last. */
static bool find_room(const moving_t *m, const head_t *h, uint64_t cost, uint64_t ahead[2],
                      found_t *f, patience_t *left) {
  uint64_t from = next_position(m, h->turn), found = 0, hashed = 0, home[FETCHED];
  for (uint64_t i = 0; i < m->n; i++) {
    uint64_t position = position_after(m, from, i);
    /* The first is free in most calls. Where it is not, most of the call is waiting for memory: fetch some ahead. */
    for (; hashed < m->n && hashed < (i ? i + FETCHED : 1); hashed++) {
      home[hashed % FETCHED] = token_hash(m, position_after(m, from, hashed));
      if (i) table_prefetch_read(m->k.s, home[hashed % FETCHED]);
    }
    left->swaps--;
    if (position_look_at(m, position, home[i % FETCHED], f)) continue;
    if (!found++) ahead[0] = i;
    ahead[1] = i;
    if (found == cost) return true;
    if (h->turn < m->n && h->turn + i + cost <= m->n) { /* never taken yet */
      ahead[1] = i + cost - 1;
      return true;
    }
  }
  return false;
}

/* One attempt. *count: how many tokens were taken. FSHM_DENIED, FSHM_ALLOWED, FSHM_FULL, or
 * FSHM_CONTENDED: look again. */
static int take_tokens(const moving_t *m, head_t *h, uint64_t cost, token_t *tokens,
                       uint64_t *count, patience_t *left) {
  uint64_t ahead[2] = {0, 0};
  found_t f;
  *count = 0;
  *h = head_look(m);
  uint64_t from = next_position(m, h->turn);
  if (!find_room(m, h, cost, ahead, &f, left)) return FSHM_DENIED;
  int status = head_put(m, h, turn_after(m, h->turn, ahead[1]));
  left->swaps--;
  left->claims -= !h->slot.pair.who;
  for (uint64_t i = ahead[0]; status == CLAIMED && i <= ahead[1] && *count < cost; i++) {
    uint64_t position = position_after(m, from, i);
    if (cost > 1 && position_look(m, position, &f)) continue;
    status = position_put(m, position, &f, &tokens[*count], left);
    *count += status == CLAIMED;
    if (status == CLAIM_LOST) break;
  }
  if (status == CLAIM_FULL) return FSHM_FULL;
  return *count == cost ? FSHM_ALLOWED : FSHM_CONTENDED;
}

static int moving_hit(const moving_t *m, head_t *h, uint64_t cost) {
  token_t few[32], *tokens = few;
  uint64_t count;
  /* A lost attempt may have looked at all n positions and taken all but one. With MAX_TRIES alone, a process that
   * scribbles on the slots could hold a call up for hours (I6). So each look counts, as each swap does. */
  patience_t left = patience(MAX_TRIES + min_u64(32 * m->n, 10000000));
  int status = FSHM_CONTENDED;
  if (cost > m->n) return FSHM_DENIED;
  if (token_end(m, m->k.now) == TIME_MAX) return FSHM_DENIED; /* the end of time */
  const bool many = cost > sizeof few / sizeof *few;
  if (many && !(tokens = malloc(cost * sizeof *tokens))) return FSHM_E_MEMORY;
  while (status == FSHM_CONTENDED && patient(&left)) {
    status = take_tokens(m, h, cost, tokens, &count, &left);
    if (status != FSHM_ALLOWED) return_tokens(m, tokens, count);
  }
  if (many) free(tokens);
  return status;
}

/* The number of tokens in the window, and when the first and the last of them leave it (0: there are none). */
typedef struct {
  uint64_t count, first, last;
} tokens_t;

static COLD tokens_t moving_look(const moving_t *m, const head_t *h) {
  tokens_t t = {0, 0, 0};
  found_t f;
  /* From the turn on, none can have a token in it. */
  for (uint64_t position = 0; position < min_u64(h->turn, m->n); position++) {
    uint64_t end = position_look(m, position, &f);
    if (!end) continue;
    t.count++;
    t.first = t.first ? min_u64(t.first, end) : end;
    t.last = max_u64(t.last, end);
  }
  return t;
}

void fshm_moving(fshm_limiter *l, const void *key, uint64_t key_length, const fshm_limit *limit,
                 uint64_t cost, uint64_t now, fshm_counted *out) {
  moving_t m = {.n = limit->n, .per = limit->per_ns};
  head_t h;
  memset(out, 0, sizeof *out);
  out->status = FSHM_E_ARGUMENT;
  if (!limit_valid(limit) || limit->kind != FSHM_WINDOW || limit->n > FSHM_MAX_MOVING) return;
  out->status = keyed_begin(&m.k, l, FSHM_WINDOW, key, key_length, now);
  if (unlikely(out->status != FSHM_OK)) return;
  h = head_look(&m);
  if (!cost) {
    tokens_t t = moving_look(&m, &h);
    out->count = t.count;
    out->left_ns = (int64_t)minus(t.first, m.k.now);
    return;
  }
  out->status = moving_hit(&m, &h, cost);
  keyed_tell(&m.k, &h.slot, key, key_length, out->status);
}

COLD int fshm_peek_counted(fshm_segment *s, uint64_t slot, const fshm_limit *limit, int moving,
                           uint64_t now, fshm_decision *out) {
  moving_t m = {.n = limit->n, .per = limit->per_ns};
  memset(out, 0, sizeof *out);
  if (!limit_valid(limit) || (limit->kind != FSHM_WINDOW && limit->kind != FSHM_SLIDING) ||
      (moving && (limit->kind != FSHM_WINDOW || limit->n > FSHM_MAX_MOVING)))
    return FSHM_E_ARGUMENT;
  if (!keyed_at(&m.k, s, slot, limit->kind, now)) return 0;
  if (!moving) {
    counted_peek(&m.k, limit, out);
    return FSHM_OK;
  }
  head_t h = head_look(&m);
  tokens_t t = moving_look(&m, &h);
  out->status = t.count < m.n ? FSHM_ALLOWED : FSHM_DENIED;
  out->remaining = minus(m.n, t.count);
  out->retry_after_ns = out->remaining ? 0 : (int64_t)minus(t.first, m.k.now);
  out->reset_after_ns = (int64_t)minus(t.last, m.k.now);
  return FSHM_OK;
}

/* The head last: if we are killed midway, the next call still finds the rest. */
int fshm_moving_clear(fshm_limiter *l, const void *key, uint64_t key_length) {
  moving_t m = {.n = FSHM_MAX_MOVING, .per = 0};
  found_t f;
  int status = keyed_begin(&m.k, l, FSHM_WINDOW, key, key_length, 0);
  if (status != FSHM_OK) return status;
  head_t h = head_look(&m);
  for (uint64_t position = 0; position < min_u64(h.turn, m.n); position++) {
    pair_t empty = {0, 0};
    fshm_segment *s = m.k.s;
    (void)position_look(&m, position, &f);
    /* One try: a lost swap means that another call has just taken a token, which is not to be forgotten. */
    if (f.pair.who) (void)pair_cas(&s->slots[f.slot], &f.pair, empty);
  }
  if (h.slot.pair.who) table_clear(m.k.s, h.slot.slot, h.slot.pair.who);
  return FSHM_OK;
}
