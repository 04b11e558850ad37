/* plans.c - handles with a plan, the records of their limits, and overrides. Argued in DESIGN.md, "Plans". */
#include <stdlib.h>

#include "../stats/key_stats.h"
#include "limiter.h"
#include "plans.h"

/* records -------------------------------------------------------------------------------------- */

#define RECORD_WORDS(l) \
  {(l)->n, (l)->per_ns | (uint64_t)(l)->strict << 56, (l)->burst | (uint64_t)(l)->kind << 56}

static COLD bool record_room(fshm_segment *s, uint32_t record) {
  const uint64_t blocks = record / RECORD_BLOCK + 1;
  if (load_relaxed(&s->header->record_blocks) >= blocks) return true;
  if (image_grow_records(s, record)) return false;
  raise_to(&s->header->record_blocks, blocks);
  return true;
}

static void record_write(limit_record_t *r, const uint64_t words[3]) {
  store_relaxed(&r->n, words[0]);
  store_relaxed(&r->per, words[1]);
  store_relaxed(&r->burst, words[2]);
}

/* The record of a limit, made if there is none. FSHM_OK, or FSHM_E_RECORDS. Two processes that make the same contend for
 * the same entry, and both write it. A process that is killed before it has written its entry leaves an id that only
 * processes with the same limit take, and those write it. */
static COLD int record_of(fshm_segment *s, const fshm_limit *l, uint32_t *out) {
  const uint64_t words[3] = RECORD_WORDS(l);
  uint64_t id[2];
  fshm_siphash128(s->secret[0], s->secret[1] ^ 11, words, sizeof words, id);
  id[0] += !id[0];
  const uint32_t most = (uint32_t)min_u64(record_count(s->capacity), LIMIT_RECORDS);
  for (uint32_t i = 0; i < most; i++) {
    limit_record_t *r = &s->records[i];
    uint64_t seen = 0;
    if (!record_room(s, i)) return FSHM_E_RECORDS;
    seen = load_relaxed(&r->id);
    if (!seen && atomic_compare_exchange_strong_explicit(&r->id, &seen, id[0], memory_order_relaxed,
                                                         memory_order_relaxed))
      seen = id[0];
    if (seen != id[0]) continue;
    /* Before the swap of a slot that names the record (release). Who reads that slot (acquire) finds them. */
    record_write(r, words);
    *out = i;
    return FSHM_OK;
  }
  return FSHM_E_RECORDS;
}

/* False: a record that no call has written. */
static bool record_limit(const fshm_segment *s, uint32_t record, fshm_limit *out) {
  /* What is not allocated must not be touched. */
  if (record >= LIMIT_RECORDS || record / RECORD_BLOCK >= load_relaxed(&s->header->record_blocks) ||
      record >= record_count(s->capacity))
    return false;
  const limit_record_t *r = &s->records[record];
  const uint64_t per = load_relaxed(&r->per), burst = load_relaxed(&r->burst);
  const uint64_t low = (UINT64_C(1) << 56) - 1;
  *out = (fshm_limit){load_relaxed(&r->n), per & low, burst & low, (uint32_t)(burst >> 56),
                      (uint32_t)(per >> 56)};
  return limit_valid(out);
}

COLD bool record_rule(const fshm_segment *s, uint32_t record, rule_t *out, uint64_t *slack) {
  fshm_limit l;
  if (!record_limit(s, record, &l) || l.kind != FSHM_BUCKET) return false;
  *out = planned_rule(&l, record, slack);
  return true;
}

/* plans ---------------------------------------------------------------------------------------- */

static bool may_plan(const fshm_limit *l) {
  return limit_valid(l) && (l->kind <= FSHM_SLIDING || l->kind == FSHM_CALENDAR);
}

/* What tells the slots of a key's limits apart: kind and period; of a calendar also its zone. `nth`: of several alike. */
static uint64_t shape_of(const fshm_limit *l, uint64_t nth) {
  const uint64_t zone = l->kind == FSHM_CALENDAR ? l->strict : 0;
  return spread(l->per_ns ^ (uint64_t)l->kind << 56 ^ spread(zone << 8 | nth)) << WHO_BITS;
}

COLD int fshm_plan_open(fshm_segment *s, const char *name, uint64_t name_length,
                        const fshm_limit *limits, uint32_t count, fshm_limiter **out) {
  const fshm_limit planned = {1, 0, 0, FSHM_PLANNED, 0};
  *out = NULL;
  if (count < 1 || count > FSHM_MAX_LIMITS) return FSHM_E_ARGUMENT;
  for (uint32_t i = 0; i < count; i++)
    if (!may_plan(&limits[i])) return FSHM_E_ARGUMENT;
  fshm_limiter *l;
  int status = fshm_limiter_open(s, name, name_length, &planned, 1, &l);
  if (status != FSHM_OK) return status;
  own_t *own = calloc(1, sizeof *own);
  if (!own) status = FSHM_E_MEMORY;
  for (uint32_t i = 0; i < count && status == FSHM_OK; i++) {
    uint64_t nth = 0;
    for (uint32_t k = 0; k < i; k++) nth += shape_of(&limits[k], nth) == shape_of(&limits[i], nth);
    own->planned = true;
    own->count = count;
    own->of[i].rule = rule_make(&limits[i]);
    own->of[i].rule.place = PLACE_NONE;
    own->of[i].tail = shape_of(&limits[i], nth) | WHO_OF(l->index, 0, 0, 0);
    if (limits[i].kind != FSHM_BUCKET) { /* one record for all of its shape: plan_reset_key() */
      fshm_limit shape = limits[i];
      shape.n = 1;
      status = record_of(s, &shape, &own->of[i].record);
      own->of[i].record = 0;
      continue;
    }
    status = record_of(s, &limits[i], &own->of[i].record);
    own->of[i].rule = planned_rule(&limits[i], own->of[i].record, &own->of[i].slack);
    own->of[i].tail |= record_tail(own->of[i].record);
  }
  if (status != FSHM_OK) {
    free(own);
    fshm_limiter_close(l);
    return status;
  }
  limiter_owns(l, own);
  *out = l;
  return FSHM_OK;
}

__attribute__((noinline)) void plan_load(fshm_segment *s, const own_t *own, snapshot_t *p) {
  p->count = own->count;
  for (uint32_t i = 0; i < own->count; i++) {
    p->rules[i] = own->of[i].rule;
    p->tail[i] = own->of[i].tail | WHO_OF(0, planned_place(p->current), 0, 0);
    if (unlikely(own->of[i].rule.kind == FSHM_CALENDAR)) calendar_ready(s, &p->rules[i]);
  }
}

COLD void plan_reset_key(fshm_segment *s, uint32_t index, uint64_t hash) {
  const uint32_t most = (uint32_t)min_u64(load_relaxed(&s->header->record_blocks) * RECORD_BLOCK,
                                          min_u64(record_count(s->capacity), LIMIT_RECORDS));
  uint64_t last = 0;
  for (uint32_t i = 0; i < most && load_relaxed(&s->records[i].id); i++) {
    fshm_limit l;
    snapshot_t p;
    if (!record_limit(s, i, &l) || !may_plan(&l)) continue;
    if (shape_of(&l, 0) == last) continue; /* as the one before */
    last = shape_of(&l, 0);
    if (!limits_load(s, index, &p)) return;
    for (uint64_t nth = 0; nth < FSHM_MAX_LIMITS; nth++) {
      found_t f;
      p.tail[0] = shape_of(&l, nth) | WHO_OF(index, planned_place(p.current), 0, 0);
      table_find(s, hash, snapshot_who(&p, 0, hash), &f);
      if (f.pair.who) table_clear(s, f.slot, f.pair.who);
    }
  }
}

COLD void plan_forget(fshm_segment *s, uint32_t index, uint64_t slot, uint64_t current) {
  pair_t pair = pair_load(&s->slots[slot]), empty = {0, 0};
  if (!(pair.who & 1) || WHO_LIMITER(pair.who) != index || IS_PERMIT(pair.when)) return;
  if (WHO_PLACE(pair.who) == PLACE_NONE || WHO_PLACE(pair.who) == planned_place(current)) return;
  /* Asked after the slot was read (which acquires): no later reset has begun states at this place. The states of before
   * have another salt, so their pairs never come back. */
  if (entry_current(s, index) == current) (void)pair_cas(&s->slots[slot], &pair, empty);
}

/* A bucket's rule has no use for `strict` and `place` once it is made: there is the number of its record. */
COLD bool plan_pack(const own_t *own, rule_t *out) {
  if (!own->planned || own->count != 1) return false;
  *out = own->of[0].rule;
  if (out->kind == FSHM_BUCKET) {
    out->strict = (uint16_t)own->of[0].record;
    out->place = (uint16_t)(own->of[0].record >> 16);
  }
  return true;
}

void plan_unpack(uint32_t index, const rule_t *packed, own_t *out) {
  struct own_limit *of = &out->of[0];
  of->rule = *packed;
  of->record = 0;
  of->slack = 0;
  out->planned = true;
  out->count = 1;
  uint64_t tail = 0;
  if (packed->kind == FSHM_BUCKET) {
    of->record = packed->strict | (uint32_t)packed->place << 16;
    of->rule.strict = 0;
    of->rule.place = PLACE_NONE;
    const uint64_t u = UINT64_C(1) << tier_of_record(of->record)->shift;
    if (u > 1 && packed->den == 1 && packed->num >= COARSE) of->slack = u - 1; /* planned_rule() */
    tail = record_tail(of->record);
  }
  const fshm_limit shape = {1, packed->per, 0, packed->kind, of->rule.strict};
  of->tail = shape_of(&shape, 0) | WHO_OF(index, 0, 0, 0) | tail;
}

/* overrides ------------------------------------------------------------------------------------ */

/* The slot of an override. No reset of the limiter forgets it: its fingerprint has no salt. Its state is that of money,
 * which never ends at this place (wall.c): 17 bits for each limit, the number of its record + 1. */
static uint64_t override_who(const fshm_limiter *l, uint64_t hash) {
  const snapshot_t p = {
      .tail = {spread(UINT64_MAX) << WHO_BITS | WHO_OF(l->index, PLACE_NONE, 0, 0)}};
  return snapshot_who(&p, 0, hash);
}
static uint64_t first_override(void *context) { return *(uint64_t *)context; }

static COLD uint32_t override_read(const fshm_segment *s, uint64_t state, fshm_limit *out) {
  uint32_t count = 0;
  if (!IS_MONEY(state)) return 0;
  for (uint32_t i = 0; i < FSHM_MAX_OVERRIDE; i++) {
    const uint32_t record = (uint32_t)(state >> (i * RECORD_BITS)) & LIMIT_RECORDS;
    if (!record) break;
    if (!record_limit(s, record - 1, &out[count]) || !may_plan(&out[count])) return 0;
    count++;
  }
  return count;
}

COLD int fshm_override_set(fshm_limiter *l, const void *key, uint64_t length,
                           const fshm_limit *limits, uint32_t count) {
  fshm_segment *s = l->segment;
  const uint64_t hash = limiter_fetch(l, key, length), who = override_who(l, hash);
  uint64_t state = MONEY_STATE(0);
  snapshot_t p;
  if (count > FSHM_MAX_OVERRIDE || !limits_load(s, l->index, &p) || !snapshot_is_planned(&p))
    return FSHM_E_ARGUMENT;
  for (uint32_t i = 0; i < count; i++) {
    uint32_t record;
    if (!may_plan(&limits[i])) return FSHM_E_ARGUMENT;
    int status = record_of(s, &limits[i], &record);
    if (status != FSHM_OK) return status;
    state |= (uint64_t)(record + 1) << (i * RECORD_BITS);
  }
  int status = CLAIM_LOST;
  found_t f;
  for (int tries = 0; status == CLAIM_LOST && tries < MAX_TRIES / CLAIM_TRIES; tries++) {
    table_find(s, hash, who, &f);
    if (f.pair.who) { /* one swap: an older override, or none, is never seen half */
      pair_t seen = f.pair, to = {count ? who : 0, count ? state : 0};
      status = pair_cas(&s->slots[f.slot], &seen, to) ? CLAIMED : CLAIM_LOST;
    } else if (!count) {
      status = CLAIMED;
    } else {
      status = table_claim(s, hash, who, segment_now(s), first_override, &state, &f.slot);
    }
  }
  if (status != CLAIMED) return status == CLAIM_FULL ? FSHM_FULL : FSHM_CONTENDED;
  if (count && !(s->names_mode & FSHM_NAMES_OFF))
    key_stats_remember(s, f.slot, key_stats_meta(l->index, who), key, length);
  fshm_overrides_changed(l);
  return FSHM_OK;
}

/* After the swap of an override (release; with the acquire of fshm_overrides()): who reads this number finds it. */
void fshm_overrides_changed(fshm_limiter *l) {
  (void)atomic_fetch_add_explicit(&l->segment->limiters[l->index].overrides, 1,
                                  memory_order_release);
}

COLD int fshm_override_get(fshm_limiter *l, const void *key, uint64_t length, fshm_limit *out) {
  fshm_segment *s = l->segment;
  const uint64_t hash = limiter_fetch(l, key, length), who = override_who(l, hash);
  found_t f;
  table_find(s, hash, who, &f);
  if (!f.pair.who) return 0;
  /* Its name may have been written over by those of new keys. */
  if (!s->read_only && !(s->names_mode & FSHM_NAMES_OFF))
    key_stats_remember(s, f.slot, key_stats_meta(l->index, who), key, length);
  return (int)override_read(s, f.pair.when, out);
}

uint32_t fshm_overrides(fshm_limiter *l) {
  return atomic_load_explicit(&l->segment->limiters[l->index].overrides, memory_order_acquire);
}

/* inspection ----------------------------------------------------------------------------------- */

COLD int fshm_plan_at(fshm_segment *s, uint64_t slot, uint64_t now, fshm_plan_info *out) {
  memset(out, 0, sizeof *out);
  if (slot >= s->slot_count) return FSHM_E_ARGUMENT;
  const pair_t pair = s->read_only ? pair_peek(&s->slots[slot]) : pair_load(&s->slots[slot]);
  if (!now) now = segment_now(s);
  out->limiter = WHO_LIMITER(pair.who);
  snapshot_t p;
  if (!(pair.who & 1) || out->limiter >= s->limiter_count || IS_PENDING(pair.when) ||
      IS_PERMIT(pair.when) || !limits_load(s, out->limiter, &p) || !snapshot_is_planned(&p))
    return 0;
  if (WHO_PLACE(pair.who) != PLACE_NONE && WHO_PLACE(pair.who) != planned_place(p.current))
    return 0; /* of before a reset */
  if (WHO_PLACE(pair.who) == PLACE_NONE) {
    out->is_override = 1;
    out->count = override_read(s, pair.when, out->limits);
    return out->count ? FSHM_OK : 0;
  }
  const uint64_t ends = state_ends(s, pair.who, pair.when);
  out->left_ns = minus(ends, now); /* 0: all is back, and the key is still known */
  if (IS_PLANNED(pair.when)) {
    rule_t rule;
    uint64_t slack;
    if (!record_rule(s, planned_record(pair), &rule, &slack)) return 0;
    out->kind = FSHM_BUCKET;
    out->count = 1;
    out->limits[0] = rule_limit(&rule);
    out->used = rule_used(&rule, planned_arrival(pair.when, slack), now);
  } else if (IS_CALENDAR(pair.when)) {
    out->kind = FSHM_CALENDAR;
    out->used = pair.when & CALENDAR_COUNT;
  } else if (TAG(pair.when) == FSHM_WINDOW) {
    out->kind = FSHM_WINDOW;
    out->used = window_read(pair.when, now).count;
  } else if (TAG(pair.when) == FSHM_SLIDING) {
    out->kind =
        FSHM_SLIDING; /* tokens of its present window; what the one before weighs needs its period */
    const unsigned bits = (((unsigned)(pair.when >> 57) & 31) + 10) - 12;
    out->used = bits < 42 ? pair.when & ((UINT64_C(1) << bits) - 1) : 0;
  }
  if (!out->left_ns) out->used = 0;
  return FSHM_OK;
}
