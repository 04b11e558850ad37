/* holds_permit_leases.c - what must hold of permits that were granted to this host: the valid ones are no more than
 * were allowed or reported, and all that are allowed can be taken, whichever process dies or stops where. */
#include "crash.h"

#define ALONE 3 /* permits that this host may hold without the grantor */

static int take_granted(fshm_permit *permit, uint32_t alone) {
  fshm_decision d;
  uint32_t held;
  return fshm_permit_lease_admit(world.l, world.permit_leases, NULL, KEY, strlen(KEY), alone,
                                 world.now, permit, &d, &held);
}

static fshm_permit_lease lease_now(bool open) {
  fshm_permit_lease a;
  if (fshm_permit_lease_look(world.l, world.permit_leases, KEY, strlen(KEY), open, world.now, &a) !=
      FSHM_OK)
    broken("the lease cannot be read");
  return a;
}

/* op->before is allowed, and S holds op->prior; op->full: then it is lowered to that. */
static void start_leases(void) {
  static const fshm_limit granted = {20, 0, 0, FSHM_LEASE, 0};
  fshm_permit permits[MOST_TAKEN];
  open_segment();
  world.now = NOW;
  world.l = named("permits", op->limits, op->count);
  world.permit_leases = named("allowances", &granted, 1);
  (void)apply_at(world.others, FSHM_ACQUIRE, "beside", 1, NOW);
  if (!op->before) return;
  (void)fshm_permit_lease_put(world.l, world.permit_leases, KEY, strlen(KEY), lease_now(true).word,
                              op->before, NOW + PER, NOW);
  uint32_t all = op->flags & LOW_FREED ? op->before : op->prior;
  for (uint32_t i = 0; i < all; i++)
    if (take_granted(&permits[i], 0) != FSHM_ALLOWED) broken("no permit to begin with");
  for (uint32_t i = 0; i + op->prior < all; i++) (void)fshm_permit_release(world.l, &permits[i]);
  fshm_permit_lease a;
  if (op->full)
    (void)fshm_permit_lease_lower(world.l, world.permit_leases, KEY, strlen(KEY), op->full, NOW,
                                  &a);
  if (op->op == LEASE_ALONE && take_granted(&permits[0], 1) == FSHM_ALLOWED)
    (void)fshm_permit_release(world.l, &permits[0]); /* what was allowed is dropped */
}

static void run_lease_take(outcome_t *out) { out->status = take_granted(&out->permit, 0); }
static void run_lease_alone(outcome_t *out) { out->status = take_granted(&out->permit, ALONE); }
static void run_lease_lower(outcome_t *out) {
  fshm_permit_lease a;
  out->status = fshm_permit_lease_lower(world.l, world.permit_leases, KEY, strlen(KEY), op->cost,
                                        world.now, &a);
  out->number = a.reported;
}
static void run_lease_put(outcome_t *out) {
  fshm_permit_lease a = lease_now(true);
  out->number = a.reported;
  out->status = fshm_permit_lease_put(world.l, world.permit_leases, KEY, strlen(KEY), a.word,
                                      op->cost, NOW + 2 * PER, world.now);
}
/* Lowered, reported, and stored again: clean, if no valid permit is beyond it. */
static void run_lease_shrink(outcome_t *out) {
  fshm_permit_lease a;
  (void)fshm_permit_lease_lower(world.l, world.permit_leases, KEY, strlen(KEY), op->cost, world.now,
                                &a);
  out->number = a.reported;
  out->status = fshm_permit_lease_put(world.l, world.permit_leases, KEY, strlen(KEY), a.word,
                                      op->cost, NOW + 2 * PER, world.now);
}
static void begin_beyond(void) { /* its first look is at the third slot */
  world.l->released = 0;
  world.l->frontier = 2;
}

/* S takes what it may, beside what is held, and gives it back. Returns how many are held then. */
static uint32_t lease_exhaust_by(uint32_t alone) {
  fshm_permit permits[MOST_TAKEN];
  uint32_t taken = 0;
  while (taken < MOST_TAKEN && take_granted(&permits[taken], alone) == FSHM_ALLOWED) taken++;
  uint32_t held = held_alive(world.l, KEY);
  for (uint32_t i = 0; i < taken; i++)
    if (!fshm_permit_release(world.l, &permits[i])) broken("a permit cannot be released");
  return held;
}

static uint32_t lease_exhaust(void) { return lease_exhaust_by(0); }

static void leases_begin(void) { held_at_start = held_alive(world.l, KEY); }
static void leases_end(void) {
  if (told->status != op->status) broken("it answers %d, not %d", told->status, op->status);
}

static void leases_contend(void) {
  outcome_t mine = {0};
  uint64_t leased = lease_now(false).leased;
  uint32_t held = held_alive(world.l, KEY);
  op->run(&mine);
  if (op->op == LEASE_TAKE) {
    bool fits = held < leased;
    if (fits != (mine.status == FSHM_ALLOWED))
      broken("%u of %u are held, and S is answered %d", held, (unsigned)leased, mine.status);
    return;
  }
  if (op->op == LEASE_DROP) {
    bool fits = held < ALONE;
    if (fits != (mine.status == FSHM_ALLOWED))
      broken("%u are held, and S is answered %d", held, mine.status);
    if (lease_now(false).leased) broken("S is alone, and something is allowed");
    return;
  }
  if (mine.status != FSHM_OK) broken("S is answered %d", mine.status);
  if (lease_now(false).leased != op->cost) broken("S has not set it");
  if (mine.number < held) broken("%u are held, and S tells %u", held, (unsigned)mine.number);
  uint32_t most = lease_exhaust();
  if (most > max_u64(op->cost, held)) broken("then %u can be held", most);
}

static void leases_survive(void) {
  fshm_permit_lease a = lease_now(false);
  if (a.held != op->prior) broken("%u count as held, not %u", (unsigned)a.held, op->prior);
  if (a.leased != (op->full ? op->full : op->before) && a.leased != op->cost)
    broken("%u are allowed", (unsigned)a.leased);
  if (told->done && told->status != op->status) broken("T says %d", told->status);
  if (told->done && op->op != LEASE_TAKE && a.leased != op->cost)
    broken("T says that it is done, and %u are allowed", (unsigned)a.leased);
  uint32_t most = lease_exhaust();
  if (most != max_u64(a.leased, op->prior))
    broken("%u can be held, and %u are allowed", most, (unsigned)a.leased);
  if (op->op == LEASE_DROP && (most = lease_exhaust_by(ALONE)) != ALONE)
    broken("alone, %u can be held", most);
  check_invariants(true);
}

static void leases_raced(const outcome_t *mine) {
  uint32_t held = held_alive(world.l, KEY);
  if (op->op == LEASE_TAKE) {
    uint32_t both = (told->status == FSHM_ALLOWED) + (mine->status == FSHM_ALLOWED);
    if (held != held_at_start + both) broken("%u are held after both", held);
    if (held > lease_now(false).leased) broken("%u are held, more than are allowed", held);
    if (both != min_u64(2, lease_now(false).leased - held_at_start))
      broken("%u of T and S were admitted", both);
  } else if (op->op == LEASE_DROP) {
    uint32_t both = (told->status == FSHM_ALLOWED) + (mine->status == FSHM_ALLOWED);
    if (held != held_at_start + both) broken("%u are held after both", held);
    if (both != min_u64(2, ALONE - held_at_start)) broken("%u of T and S were admitted", both);
    if (lease_now(false).leased) broken("they are alone, and something is allowed");
  } else {
    if (told->status != FSHM_OK && mine->status != FSHM_OK) broken("neither has set it");
    if (lease_now(false).leased != op->cost) broken("it is not what was set");
  }
  check_invariants(false);
}

static const holds_t leases = {leases_begin,   leases_end,   leases_contend,
                               leases_survive, leases_raced, NULL};
