/* stored.c - states of limits outside a segment, which outlive it: the same arithmetic, on a few plain integers.
 * DESIGN.md, "Durable limits".
 *
 * A stored state keeps the limit that it was counted under, and instants of a clock that goes on over reboots. So it
 * depends on no layout version and on no epoch. For a call it becomes a state of algorithms.h, with an epoch just long
 * enough before `now`, and is read back afterwards. Of a window of the calendar the end is a time of day; the caller
 * keeps its zone.
 */
#include "../core/internal.h"
#include "algorithms.h"

/* Ends of windows are kept in units of 2^31 ns at most. An epoch that is a multiple of that moves none of them. */
#define STORED_UNIT (UINT64_C(1) << 31)
/* ns before `now` at which the epoch lies. After `now`, a bucket has 2^56 ns, and a window its `per` and its debt. */
#define STORED_BEFORE (UINT64_C(1) << 55)

/* Permits and leases are of the living. Money: durable/books.py. */
static bool stored_kind(uint32_t kind) { return kind <= FSHM_SLIDING || kind == FSHM_CALENDAR; }

/* from: where a window of a sliding limit begins or ends. Its windows begin at multiples of `per` after the epoch. */
static uint64_t stored_epoch(const rule_t *r, uint64_t now, uint64_t from) {
  if (r->kind != FSHM_SLIDING) return minus(now, STORED_BEFORE) / STORED_UNIT * STORED_UNIT;
  const uint64_t epoch = minus(now, 2 * r->per); /* the previous window lies after it */
  const uint64_t phase = minus(from, epoch) % r->per;
  return minus(epoch, (r->per - phase) % r->per);
}

static uint64_t stored_read(const rule_t *r, const fshm_stored *stored, uint64_t epoch) {
  if (r->kind == FSHM_CALENDAR)
    return stored->end ? calendar_state((dated_t){stored->end, stored->used}) : 0;
  const uint64_t end = min_u64(minus(stored->end, epoch), TIME_MAX);
  if (!end) return 0;
  if (r->kind == FSHM_BUCKET) return end;
  if (r->kind == FSHM_WINDOW) return window_state(r, (window_t){end, stored->used, 0});
  const uint64_t most = UINT64_C(1) << 40; /* more than any state counts; it saturates there */
  return sliding_state(r, (sliding_t){minus(end / r->per, 1), min_u64(stored->previous, most),
                                      min_u64(stored->used, most), 0});
}

static fshm_stored stored_write(const rule_t *r, uint64_t state, uint64_t epoch, uint64_t now) {
  const rule_t bare = rule_bare(r);
  fshm_stored stored = {.limit = rule_limit(&bare)};
  state = state_for(r, state);
  if (r->kind == FSHM_CALENDAR) {
    const dated_t w = calendar_read(r, state, now);
    if (w.count) {
      stored.end = w.end;
      stored.used = w.count;
    }
  } else if (r->kind == FSHM_BUCKET) {
    if (state > now) stored.end = epoch + state;
  } else if (r->kind == FSHM_WINDOW) {
    const window_t w = window_open(r, state, now);
    if (w.count) {
      stored.end = epoch + w.end;
      stored.used = w.count;
    }
  } else {
    const sliding_t s = sliding_read(r, state, now);
    if (s.count || s.previous) {
      stored.end = epoch + (s.index + 1) * r->per;
      stored.used = s.count;
      stored.previous = s.previous;
    }
  }
  return stored;
}

typedef struct {
  rule_t present, own; /* own: the rule of the state */
  uint64_t state, now;
} stored_call_t;

static bool stored_alike(const rule_t *a, const rule_t *b) {
  const rule_t one = rule_bare(a), other = rule_bare(b);
  return !memcmp(one.words, other.words, sizeof one.words);
}

/* The state goes on under the present rule, if what is used fits, or is over no later. */
static void stored_settle(stored_call_t *c) {
  uint64_t moved;
  if (stored_alike(&c->own, &c->present) ||
      !rule_settles(&c->present, &c->own, c->state, c->now, &moved))
    return;
  c->state = moved;
  c->own = c->present;
}

/* As look_former() of limiter.c. */
static verdict_t stored_look(stored_call_t *c, uint64_t cost) {
  const rule_t *r = &c->present;
  if (stored_alike(&c->own, r)) return rule_take(r, c->state, c->now, c->now, cost);
  const uint64_t most = rule_capacity(r), used = rule_used(&c->own, c->state, c->now);
  const uint64_t moved = rule_convert(r, &c->own, c->state, c->now);
  verdict_t v;
  if (moved != NO_STATE) {
    v = rule_take(r, moved, c->now, c->now, cost);
    if (cost > most) return v;
    if ((!v.retry && cost) || rule_over(r, moved) <= rule_over(&c->own, c->state)) {
      c->state = moved;
      c->own = *r;
      return v;
    }
  }
  if (!cost && (r->kind != FSHM_BUCKET || used <= most)) return (verdict_t){.next = c->state};
  const rule_t capped = rule_capped(&c->own, most + !cost);
  v = rule_take(&capped, c->state, c->now, c->now, cost + !cost);
  if (c->own.kind == FSHM_BUCKET || r->kind == FSHM_BUCKET) v.retry = plus_time(v.retry, 3);
  if (!v.retry) v.retry = 1; /* what is left by both is a rounding */
  return v;
}

static uint64_t stored_refund(const stored_call_t *c, uint64_t cost, const fshm_stored *charged,
                              uint64_t epoch) {
  if (!charged) return rule_refund(&c->own, c->state, c->now, cost, NULL);
  const rule_t by = rule_make(&charged->limit);
  if (!charged->end || !stored_kind(charged->limit.kind) || !limit_valid(&charged->limit) ||
      !stored_alike(&by, &c->own))
    return c->state;
  fshm_stored one = *charged;
  one.used = 1;
  const fshm_charged put = charged_by(&c->own, stored_read(&c->own, &one, epoch), c->now, 0);
  return rule_refund(&c->own, c->state, c->now, cost, &put);
}

static void stored_tell(const stored_call_t *c, int64_t retry, fshm_stored_answer *out) {
  const rule_t *r = &c->present;
  const bool own = stored_alike(&c->own, r);
  const uint64_t expires = c->state ? rule_over(&c->own, c->state) : 0;
  out->retry_ns = retry;
  out->used = rule_used(&c->own, c->state, c->now);
  out->over_ns = minus(expires, c->now);
  out->left_ns = out->over_ns;
  if (r->kind == FSHM_BUCKET) {
    const uint64_t ns = own ? minus(c->state & TIME_MAX, c->now) : bucket_increment(r, out->used);
    out->remaining = verdict_remaining(r, ns);
    out->left_ns = min_u64(ns, TIME_MAX);
    return;
  }
  out->remaining = minus(r->n, out->used);
  if (r->kind == FSHM_SLIDING) {
    out->window_ns = r->per - c->now % r->per;
    out->left_ns = out->used ? out->window_ns : 0;
  } else if (c->own.kind == FSHM_WINDOW) {
    out->window_ns = minus(window_open(&c->own, c->state, c->now).end, c->now);
  } else if (c->own.kind == FSHM_CALENDAR) {
    out->window_ns = out->over_ns;
  }
}

/* What the arithmetic of the calendar needs, as calendar_ready() has it of a segment. */
static void stored_ready(rule_t *r, const fshm_stored_time *at, uint64_t now, const zone_t *zone) {
  if (r->kind != FSHM_CALENDAR) return;
  r->base = minus(at->wall_ns, now);
  r->floor = at->wall_ns;
  r->zone = zone;
}

int fshm_stored_apply(uint32_t op, const fshm_limit *limit, fshm_stored *stored, uint64_t cost,
                      const fshm_stored *charged, const fshm_stored_time *at,
                      fshm_stored_answer *out) {
  memset(out, 0, sizeof *out);
  const uint64_t now_ns = at->now_ns;
  const bool known = stored->limit.n != 0;
  if (!limit_valid(limit) || !stored_kind(limit->kind)) return FSHM_E_ARGUMENT;
  if (limit->kind == FSHM_CALENDAR && (limit->strict || at->span_count > ZONE_SPANS))
    return FSHM_E_ARGUMENT;
  if (known && (!limit_valid(&stored->limit) || !stored_kind(stored->limit.kind)))
    return FSHM_E_DAMAGED;
  stored_call_t c = {.present = rule_make(limit)};
  c.own = known ? rule_make(&stored->limit) : c.present;
  const uint64_t epoch = stored_epoch(&c.own, now_ns, stored->end ? stored->end : now_ns);
  c.now = now_ns - epoch;
  zone_t zone = {.count = 0};
  if (c.present.kind == FSHM_CALENDAR) {
    for (uint64_t i = 0; i < at->span_count; i++) store_relaxed(&zone.spans[i], at->spans[i]);
    store_relaxed(&zone.count, at->span_count);
  }
  stored_ready(&c.present, at, c.now, &zone);
  stored_ready(&c.own, at, c.now, &zone); /* a window of its own zone has begun, and goes on */
  c.state = stored_read(&c.own, stored, epoch);
  if (rule_ends(&c.own, c.state) <= c.now) c.state = 0;
  if (!c.state) c.own = c.present;
  int64_t retry = 0;
  out->status = FSHM_ALLOWED;
  if (op == FSHM_ACQUIRE || op == FSHM_PEEK) {
    const verdict_t v = stored_look(&c, cost);
    if (v.retry) {
      out->status = FSHM_DENIED;
      retry = v.retry >= TIME_MAX ? FSHM_NEVER : (int64_t)v.retry;
      if (cost > rule_capacity(&c.present)) retry = FSHM_NEVER;
    } else if (op == FSHM_ACQUIRE) {
      c.state = v.next;
    }
  } else if (op == FSHM_CHARGE) {
    stored_settle(&c);
    c.state = rule_charge(&c.own, c.state, c.now, cost);
  } else if (op == FSHM_REFUND) {
    if (!charged) stored_settle(&c); /* else it goes back under the limit that it was charged to */
    c.state = stored_refund(&c, cost, charged, epoch);
  } else if (op == FSHM_BLOCK) {
    stored_settle(&c);
    const rule_t capped = rule_capped(&c.own, rule_capacity(&c.present));
    if (c.own.kind == FSHM_BUCKET && c.present.kind == FSHM_BUCKET && cost)
      c.state = bucket_block(&capped, c.state, plus_time(c.now, cost));
  } else {
    return FSHM_E_ARGUMENT;
  }
  stored_tell(&c, retry, out);
  if (op != FSHM_PEEK) *stored = stored_write(&c.own, c.state, epoch, c.now);
  return FSHM_OK;
}
