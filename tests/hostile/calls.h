/* calls.h - every call of fast_shm.h, on a segment that may hold anything, with checks of what comes back: here,
 * in grants.h, levels.h, plans.h, budgets.h and statistics.h. test_calls.py finds the one that is left out.
 *
 * Used by fuzz.c and scribble.c, after unity.c. Wrong answers are allowed; answers outside their range,
 * and writes beyond what a call was given, are not: both end the program with what and where. */
#ifndef CALLS_H
#define CALLS_H

#define MUST(condition)                                                       \
  do {                                                                        \
    if (!(condition)) {                                                       \
      fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
      abort();                                                                \
    }                                                                         \
  } while (0)

#define LIMITERS 6
enum {
  TOKEN_LEASES,
  REFUSED,
  PERMIT_LEASES,
  RATE_LIMITS,
  GRANTED
}; /* limiters for limits over many hosts */
#define PERMITS 4
#define QUEUE_PLACES 4

static const char *const limiter_names[LIMITERS] = {"bucket", "window", "sliding",
                                                    "three",  "quota",  "permits"};

/* What the limiter of this name has; variants differ in numbers, and in how many there are. */
static uint32_t limits_of(unsigned which, unsigned variant, fshm_limit *out) {
  const uint64_t n = 5 + variant, per = UINT64_C(1000000000) << variant % 3;
  const fshm_limit bucket = {n, per, 1 + variant % 5, FSHM_BUCKET, variant % 2};
  const fshm_limit window = {n, per, 0, FSHM_WINDOW, 0}, sliding = {n, per, 0, FSHM_SLIDING, 0};
  const fshm_limit permits = {variant % 8 == 7 ? 300 : 1 + variant % 4, 0, 0, FSHM_PERMITS, 0};
  const fshm_limit all[LIMITERS][FSHM_MAX_LIMITS] = {
      {bucket}, {window}, {sliding}, {bucket, window, sliding}, {window, bucket, permits},
      {permits}};
  const uint32_t counts[LIMITERS] = {1, 1, 1, 3, 3, 1};
  if (variant == 15) which = (which + 1) % LIMITERS; /* another's: other kinds, another count */
  memcpy(out, all[which], sizeof all[which]);
  return counts[which];
}

/* One user of the segment, as a worker process is. */
typedef struct {
  fshm_segment *s;
  fshm_limiter *limiters[LIMITERS], *granted[GRANTED], *budget;
  struct {
    fshm_permit permit;
    unsigned limiter; /* that it was taken from */
  } held[PERMITS];
  fshm_place places[QUEUE_PLACES]; /* in wait queues */
  uint64_t damaged; /* calls that said so */
} user_t;

static void check_status_at(user_t *u, int status, const char *file, int line) {
  const bool known = status <= FSHM_ALLOWED && status >= FSHM_E_LOCK_FILE;
  if (!known || status == FSHM_E_SYSTEM || status == FSHM_E_READ_ONLY || status == FSHM_E_MEMORY) {
    fprintf(stderr, "%s:%d: no status that the call may have: %d\n", file, line, status);
    abort();
  }
  u->damaged += status == FSHM_E_DAMAGED;
}
#define check_status(u, status) check_status_at(u, status, __FILE__, __LINE__)

static void check_decision(user_t *u, const fshm_decision *d) {
  check_status(u, d->status);
  MUST(d->limit_index < FSHM_MAX_LIMITS);
  MUST(d->retry_after_ns >= FSHM_NEVER && d->reset_after_ns >= 0);
}

static void open_limiter(user_t *u, unsigned which, unsigned variant, bool find) {
  const char *name = limiter_names[which];
  fshm_limit limits[FSHM_MAX_LIMITS];
  fshm_limiter *l;
  uint32_t count = limits_of(which, variant, limits);
  int status = find          ? fshm_limiter_find(u->s, name, strlen(name), &l)
               : variant & 8 ? fshm_limiter_open_beside(u->s, name, strlen(name), limits, count, &l)
               : variant & 4
                   ? fshm_limiter_open_at(u->s, name, strlen(name), limits, count, variant, &l)
                   : fshm_limiter_open(u->s, name, strlen(name), limits, count, &l);
  if (u->s->read_only) {
    MUST(status == FSHM_E_READ_ONLY && !l);
    return;
  }
  check_status(u, status);
  MUST((l != NULL) == (status == FSHM_OK));
  if (!l) return;
  fshm_limiter_close(u->limiters[which]);
  fshm_limiter_share(l, (which ^ variant) & 1);
  u->limiters[which] = l;
}

/* Arrays that a call fills, between words that it must leave alone. */
typedef struct {
  uint64_t before, values[FSHM_MAX_LIMITS], after;
} fenced_t;
typedef struct {
  uint64_t before;
  fshm_charged values[FSHM_MAX_LIMITS];
  uint64_t after;
} fenced_charges_t;
#define FENCE UINT64_C(0x0123456789abcdef)
static void check_fenced(const fenced_t *f) { MUST(f->before == FENCE && f->after == FENCE); }

#include "budgets.h"
#include "grants.h"
#include "levels.h"
#include "plans.h"
#include "statistics.h"

static void use_queue(user_t *u, fshm_limiter *l, const char *key, uint64_t n, uint64_t now,
                      unsigned what) {
  fshm_place *p = &u->places[what / 2 % QUEUE_PLACES];
  const fshm_waiter w = {.tenant = n,
                         .weight = (uint32_t)n,
                         .priority = (int32_t)(n >> 3),
                         .fd = what & 16 ? 0x7fffffff : -1}; /* no such descriptor */
  fshm_turn t = {0};
  fshm_waiter_info info;
  if (!p->key || what & 1) {
    fshm_wait_leave(l, p);
    int joined = fshm_wait_join(l, key, 1, &w, now, p);
    MUST(joined == 0 || (joined == 1 && p->owner));
  }
  MUST((unsigned)fshm_wait_turn(l, p, now, &t) <= 1);
  (void)fshm_wait_ahead(l, p, n, now);
  MUST((unsigned)fshm_wait_sleep(l, p, t.armed ^ (what & 1), 1000) <= 1);
  if (what & 2) fshm_wait_served(l, p, n, now);
  if (what & 4) fshm_wait_correct(l, p, (int64_t)n, now);
  if (what & 8) fshm_wait_requeue(l, p, n, what, now);
  if (what & 16) fshm_wait_count(l, p, what);
  fshm_wait_wake(l, key, 1);
  fshm_wait_ask(l, key, 1, (int)what & 1, p);
  MUST((unsigned)fshm_wait_asked(l, key, 1) <= 1);
  MUST((unsigned)fshm_wait_next(l, key, 1) <= FSHM_NEXT_OTHER);
  (void)fshm_wait_first(l, key, 1);
  MUST((unsigned)fshm_is_waited_for(l, key, 1) <= 1);
  fshm_waiting(l, key, 1, what & 1 ? &n : NULL, now, &t);
  fshm_wait_watch(u->s, 0);
  for (uint32_t i = 0; i < 16; i++)
    if (fshm_waiter_at(u->s, i ? (uint32_t)n + i : p->entry, &info))
      MUST(info.limiter < MAX_LIMITERS && info.key_hash < UINT64_C(1) << 52 && info.stale <= 1);
}

static void use_permits(user_t *u, unsigned which, const char *key, const uint64_t *costs,
                        uint64_t now, unsigned what) {
  fshm_limiter *l = u->limiters[which];
  fshm_permit *p = &u->held[what % PERMITS].permit;
  unsigned *owner = &u->held[what % PERMITS].limiter;
  fshm_decision d;
  uint32_t in_flight;
  if (p->held) {
    l = u->limiters[*owner];
    if (what & 8) (void)fshm_permit_idle(l, p, what & 16);
    (void)fshm_permit_held(l, p);
    check_status(u, fshm_settle(l, key, 1, costs, (uint64_t[]){1, 2, 3, 4}, p, now));
    if (!(what & 32)) (void)fshm_permit_release(l, p);
    p->held = 0; /* or forgotten: held by us for ever */
    return;
  }
  fshm_admit(l, key, 1, costs, now, p, &d, &in_flight);
  check_decision(u, &d);
  MUST(in_flight <= MAX_PERMITS && p->held == (p->held != 0) && p->slot < u->s->slot_count);
  *owner = which;
}

/* Limits that come with the call: whatever they are, and whatever the limiter is. */
static void use_counted(user_t *u, fshm_limiter *l, const char *key, uint64_t cost, uint64_t now,
                        unsigned what) {
  const fshm_limit limit = {what & 128 ? cost : 1 + what % 50, UINT64_C(1) << (10 + what % 30), 0,
                            what & 1 ? FSHM_WINDOW : FSHM_SLIDING, 0};
  fshm_counted out;
  if (what & 2)
    fshm_moving(l, key, 1, &limit, what & 4 ? 0 : cost, now, &out);
  else
    fshm_count(l, key, 1, &limit, what & 4 ? 0 : cost, now, &out);
  if (out.status == FSHM_E_MEMORY) return;
  check_status(u, out.status);
  MUST(out.left_ns >= 0 && !out.unused);
  if (what & 2) MUST(out.count <= FSHM_MAX_MOVING);
  if (what & 8) check_status(u, fshm_moving_clear(l, key, 1));
  if (what & 16) MUST(fshm_live_keys(l, now) <= u->s->slot_count);
}

static void look_in(user_t *u, uint64_t at) {
  fshm_segment *s = u->s;
  fshm_limiter_info limiter;
  fshm_process_info process;
  fshm_permit_info permit;
  fshm_geometry g;
  fshm_decision d;
  struct {
    char bytes[256];
    uint64_t after;
  } name = {"", FENCE};
  uint64_t slot = at < s->slot_count || at == UINT64_MAX ? at : at % s->slot_count, length;
  int status = fshm_limiter_at(s, (uint32_t)at, &limiter);
  MUST(status == FSHM_OK || !status || status == FSHM_E_ARGUMENT || status == FSHM_E_DAMAGED);
  MUST(limiter.name_length <= sizeof limiter.name && limiter.limits_count <= FSHM_MAX_LIMITS);
  MUST(limiter.counters <= FSHM_COUNTERS);
  uint64_t largest;
  for (uint32_t i = 0; i < limiter.limits_count; i++) /* or Python could not show it */
    MUST(fshm_limit_check(&limiter.limits[i], &largest) == FSHM_OK);
  status = fshm_process_at(s, (uint32_t)at, &process);
  MUST(status == FSHM_OK || status == FSHM_E_ARGUMENT);
  status = fshm_permit_at(s, slot, &permit);
  MUST(status == 0 || status == 1);
  MUST(permit.limiter == UINT32_MAX || permit.limiter < s->limiter_count);
  if (fshm_key_name(s, slot, name.bytes, sizeof name.bytes, &length)) MUST(length <= 201);
  if (fshm_key_name(s, slot, name.bytes, 8, &length)) MUST(length <= 8 || length == 201);
  MUST(name.after == FENCE);
  if (fshm_peek_slot(s, slot, at, &d) == FSHM_OK) check_decision(u, &d);
  const uint64_t numbers[FSHM_MAX_LIMITS] = {1 + at % 5, at & 1, 1, at & 2};
  if (fshm_peek_numbered(s, slot, numbers, at, &d) == FSHM_OK) check_decision(u, &d);
  fshm_limiter *numbered;
  const char *of = limiter_names[at % LIMITERS];
  if (fshm_limiter_find(s, of, strlen(of), &numbered) == FSHM_OK) {
    status = fshm_limiter_number(numbered, numbers, 1 + (uint32_t)at % FSHM_MAX_LIMITS);
    MUST(status == FSHM_OK || status == FSHM_E_ARGUMENT || status == FSHM_E_DAMAGED);
    uint64_t left[FSHM_MAX_LIMITS];
    MUST(fshm_remaining(numbered, "k", 1, at, left) <= FSHM_MAX_LIMITS);
    fshm_limiter_close(numbered);
  }
  const fshm_limit counted = {1 + at % 50, UINT64_C(1) << (10 + at % 30), 0,
                              at & 1 ? FSHM_WINDOW : FSHM_SLIDING, 0};
  if (fshm_peek_counted(s, slot, &counted, at & 1 && at & 2, at, &d) == FSHM_OK)
    check_decision(u, &d);
  fshm_describe(s, &g);
  MUST(g.size == s->size && g.capacity && g.slots == s->slot_count);
}

/* The counts of all slots, as `fast-shm inspect` reads them. */
static void look_at_counts(const fshm_segment *s) {
  const uint64_t n = s->slot_count;
  uint64_t *who = malloc(n * sizeof *who), *admitted = malloc(n * sizeof *admitted),
           *denied = malloc(n * sizeof *denied);
  uint32_t *meta = malloc(n * sizeof *meta);
  int64_t *places = malloc(n * sizeof *places);
  uint16_t *limiters = malloc(n * sizeof *limiters);
  uint8_t wanted[FSHM_KEY_OWNERS];
  MUST(who && admitted && denied && meta && places && limiters);
  memset(wanted, 1, sizeof wanted);
  fshm_key_stats(s, 0, UINT64_MAX, who, meta, admitted, denied);
  const uint64_t known = fshm_known_keys(who, meta, n, wanted, places, limiters);
  MUST(known <= n);
  for (uint64_t i = 0; i < known; i++)
    MUST((uint64_t)places[i] < n && limiters[i] < FSHM_KEY_OWNERS);
  free(who), free(admitted), free(denied), free(meta), free(places), free(limiters);
}

static void look_at_all(user_t *u) {
  fshm_segment *s = u->s;
  uint64_t index;
  uint8_t *live = malloc(s->slot_count);
  MUST(live);
  MUST(fshm_live_slots(s, live, 0) <= s->slot_count);
  free(live);
  look_at_counts(s);
  struct {
    fshm_counters all[FSHM_COUNTERS];
    fshm_permit_info permits[2];
    fshm_waiter_info waiters[2];
    fshm_budget_info budgets[2];
    uint64_t octaves[FSHM_OCTAVES], after;
  } sums = {.after = FENCE};
  uint64_t *keys = malloc((s->limiter_count + 1) * sizeof *keys);
  MUST(keys);
  keys[s->limiter_count] = FENCE;
  MUST(fshm_used(s, 0, keys) <= s->slot_count && keys[s->limiter_count] == FENCE);
  free(keys);
  fshm_counters_all(s, sums.all);
  MUST(fshm_permits(s, sums.permits, 2) <= s->slot_count);
  MUST(fshm_waiters(s, sums.waiters, 2, 1) <= WAITERS);
  MUST(fshm_budgets(s, 0, sums.budgets, 2) <=
       s->limiter_count + s->slot_count + UINT64_C(1) * PROCESSES * RESERVED);
  fshm_metric_octaves(s, (uint32_t[]){0, UINT32_MAX}, 2, sums.octaves);
  MUST(sums.after == FENCE);
  int kind = fshm_damage(s, &index), thorough = fshm_check(s, &index);
  MUST(!kind || thorough);
  kind = thorough;
  MUST(kind >= FSHM_DAMAGE_NONE && kind <= FSHM_DAMAGE_SLOT);
  (void)fshm_unlinked(s);
  for (uint64_t at = 0; at < s->slot_count || at < PROCESSES; at++) look_in(u, at);
}

enum { FIRST_GRANTED = 17, FIRST_WITHOUT_LIMITER = 21, CALLS = 27 };

static void call_without_limiter(user_t *u, unsigned call, uint64_t n, uint64_t now,
                                 unsigned what) {
  switch (call) {
    case 0:
      speak_for_host(u, what);
      fshm_process_note(u->s, (uint32_t)n);
      break;
    case 1:
      record_deployment(u, n, now, what);
      break;
    case 2:
      use_request(u, n, now, what);
      break;
    case 3:
      pick(u, n, now, what);
      break;
    case 4:
      use_memo(u, n, what);
      break;
    default:
      use_metric(u, n, what);
      use_feature(u, n, what);
  }
}

/* One call. `who`: limiter (by its remainder) and key; `what`: what it does with them; `n`: a cost, a
 * time or a place, as the call takes it. */
static void one_call(user_t *u, unsigned call, unsigned who, unsigned what, uint64_t n) {
  const unsigned which = who % LIMITERS;
  const char key[2] = {(char)('a' + who / LIMITERS % 8), 0};
  const uint64_t costs[FSHM_MAX_LIMITS] = {n, 1, what % 7, 0};
  const uint64_t now = what & 64 ? n : 0;
  fenced_t out = {FENCE, {0, 0, 0, 0}, FENCE};
  fenced_charges_t charges = {FENCE, {{n, what, who, now, n}}, FENCE};
  fshm_limit limits[FSHM_MAX_LIMITS];
  fshm_decision d;
  if (call % CALLS == 0) open_limiter(u, which, what % 16, what & 16);
  if (call % CALLS == 1) look_in(u, n);
  fshm_limiter *l = u->limiters[which];
  if (call % CALLS >= FIRST_WITHOUT_LIMITER) {
    call_without_limiter(u, call % CALLS - FIRST_WITHOUT_LIMITER, n, now, what);
    return;
  }
  if (!l) return;
  for (unsigned i = 0; call % CALLS >= FIRST_GRANTED && i < GRANTED; i++) {
    open_granted(u, i);
    if (!u->granted[i]) return;
  }
  switch (call % CALLS) {
    case 2:
    case 3:
      fshm_apply(l, what % 7, key, 1, call % CALLS == 2 ? costs : NULL, n, now, &d);
      check_decision(u, &d);
      break;
    case 4:
      check_status(u, fshm_is_allowed(l, key, 1));
      break;
    case 5:
      fshm_reserve(l, key, 1, costs, UINT64_C(1) << what % 64, now, &d, charges.values);
      check_decision(u, &d);
      if (what & 1) MUST(fshm_cancel(l, key, 1, costs, charges.values, now) <= FSHM_MAX_LIMITS);
      break;
    case 6:
    case 7:
      use_permits(u, which, key, costs, now, what);
      break;
    case 8:
      MUST(fshm_remaining(l, key, 1, now, out.values) <= FSHM_MAX_LIMITS);
      break;
    case 9:
      check_status(u, fshm_reset_key(l, key, 1));
      break;
    case 10:
      check_status(u, fshm_reset_all(l));
      break;
    case 11: {
      uint64_t version;
      int count = fshm_limiter_limits(l, limits, &version);
      MUST(count >= 0 && count <= FSHM_MAX_LIMITS);
      break;
    }
    case 12:
      MUST(fshm_in_flight(l, key, 1) <= MAX_PERMITS);
      fshm_count_call(l, key, 1, (int32_t)(what % 3) - 1);
      break;
    case 13:
      MUST(fshm_reap(u->s, what & 1 ? (uint32_t)n : 0) <= u->s->slot_count);
      break;
    case 14:
      use_queue(u, l, key, n, now, what);
      break;
    case 15:
      fshm_limiter_close(l);
      u->limiters[which] = NULL;
      for (unsigned i = 0; i < PERMITS; i++)
        if (u->held[i].limiter == which) u->held[i].permit.held = 0;
      (void)fshm_unique(u->s);
      (void)fshm_now(u->s);
      fshm_keyed_hash(u->s, key, sizeof key, (uint64_t[2]){0});
      break;
    case 16:
      use_counted(u, l, key, n, now, what);
      break;
    case FIRST_GRANTED:
      use_token_lease(u, l, key, n, now, what);
      break;
    case FIRST_GRANTED + 1:
      spend(u, l, key, costs, now, what);
      ask_server(u, l, key, costs, n, what);
      break;
    case FIRST_GRANTED + 2:
      be_told(u, l, key, n, now, what);
      use_budget(u, l, key, n, now, what);
      use_zones(u, key, n, now, what);
      use_plans(u, l, key, n, now, what);
      use_levels(u, key, n, now, what);
      use_learned(u, key, n, now, what);
      use_clock(u, n, what);
      break;
    case FIRST_GRANTED + 3:
      use_permit_lease(u, what & 16 || !u->limiters[5] ? l : u->limiters[5], key, n, now, what);
      break;
    default:
      break;
  }
  check_fenced(&out);
  MUST(charges.before == FENCE && charges.after == FENCE);
}

#endif
