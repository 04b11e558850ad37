/* invariants.c - what must hold of a segment at any instant when no process works on it. */
#include "crash.h"

static void queue_overtake(void); /* holds_queue.c: S releases there */

#define MOST_NUMBERED 8 /* of a key, in all operations */

/* Slots that no operation under test may touch (I7). */
static pair_t protected_slots[4096];
static size_t protected_count;

/* Note all live slots but those of the key's limits, and permits of the dead. */
static void protect_others(void) {
  uint64_t own[FSHM_MAX_LIMITS] = {0}, word = 0; /* word: of what the key is granted */
  call_t c;
  liveness_t liveness = {0};
  protected_count = 0;
  if (!world.s) return;
  if (world.l && limits_load_of(world.l, &c.snapshot)) {
    begin(&c, world.l, KEY, strlen(KEY), NOW);
    for (uint32_t i = 0; i < c.snapshot.count; i++) own[i] = fingerprint(&c, i);
  }
  for (uint32_t i = 0; op->levels && i < LEVELS; i++) {
    if (!limits_load(world.s, world.limiters[i]->index, &c.snapshot)) continue;
    begin(&c, world.limiters[i], KEY, strlen(KEY), NOW);
    own[i] = fingerprint(&c, 0);
  }
  if (world.permit_leases) word = side_of(world.permit_leases, KEY).who;
  if (op->side || op->op == HIT || op->op == CLEAR) own[0] = side_of(world.l, KEY).who;
  for (uint64_t i = 0; i < world.s->slot_count; i++) {
    pair_t pair = pair_load(&world.s->slots[i]);
    bool ours = word && same_key(pair.who, word);
    for (uint32_t k = 0; k < FSHM_MAX_LIMITS; k++) ours |= own[k] && same_key(pair.who, own[k]);
    /* its keys' states are brought under other rules: holds_changes.c looks after them */
    ours |= op->overtake && pair.who & 1 && WHO_LIMITER(pair.who) == world.l->index;
    for (unsigned k = LEARNED_TURN; k <= PAUSE && word; k++) {
      const keyed_t of_key = side_of(world.permit_leases, KEY);
      ours |= pair.who == word_who(&of_key, k);
    }
    for (uint32_t k = 0; k < MOST_NUMBERED && op->op == CLEAR; k++)
      ours |= pair.who == side_who(nth_who(own[0], k), world.l->index);
    /* the key's override: run_override() looks after it */
    ours |= op->flags & PLANNED && pair.who & 1 && WHO_PLACE(pair.who) == PLACE_NONE;
    if (!pair.who || ours || IS_PENDING(pair.when) || state_expires(pair.when) <= now_or_clock())
      continue;
    if (IS_PERMIT(pair.when) && !owner_alive(world.s, pair.when, &liveness)) continue;
    protected_slots[protected_count++] = pair;
  }
}

static void check_slots(void) {
  for (uint64_t i = 0; i < world.s->slot_count; i++) {
    pair_t a = pair_load(&world.s->slots[i]);
    for (uint64_t k = i + 1; k < world.s->slot_count && a.who && !IS_PENDING(a.when); k++) {
      pair_t b = pair_load(&world.s->slots[k]);
      if (same_key(a.who, b.who) && !IS_PENDING(b.when))
        broken("one key has two confirmed slots, %d and %d", (int)i, (int)k);
    }
  }
  for (size_t p = 0; p < protected_count && !position.later; p++) {
    uint64_t who = protected_slots[p].who;
    bool found =
        (op->op == RELEASE && (who == world.permit.who || who == world.total.who)) /* S's own */
        || ((op->op == REAP_BY_FORCE || (op->holds && op->holds->overtake == queue_overtake)) &&
            IS_PERMIT(protected_slots[p].when)); /* a pair has no holds */
    for (uint64_t i = 0; i < world.s->slot_count && !found; i++) {
      pair_t pair = pair_load(&world.s->slots[i]);
      found = pair.who == protected_slots[p].who && pair.when == protected_slots[p].when;
    }
    if (!found) broken("another key's live slot has changed, or is gone");
  }
}

/* How many permits of the key the living hold, wherever the library would look for them. */
static uint32_t held_alive(fshm_limiter *l, const char *key) {
  liveness_t liveness = {0};
  uint32_t held = 0;
  uint64_t hash = fshm_siphash(l->key[0], l->key[1], key, strlen(key));
  for (uint32_t number = 0; number < MOST_NUMBERED; number++)
    for (uint64_t i = 0; i < world.s->slot_count; i++) {
      pair_t pair = pair_load(&world.s->slots[i]);
      held += pair.who == permit_who(l->index, hash, number) && IS_PERMIT(pair.when) &&
              owner_alive(world.s, pair.when, &liveness);
    }
  return held;
}

static void check_names(bool alone) {
  fshm_limiter_info info;
  for (uint32_t i = 0; i < world.s->limiter_count; i++) {
    limiter_entry_t *e = &world.s->limiters[i];
    int status = fshm_limiter_at(world.s, i, &info);
    if (status != FSHM_OK && load_relaxed(&e->current)) broken("limits are named, but damaged");
    if (!load_relaxed(&e->id)) {
      if (load_relaxed(&e->current)) broken("a free entry has limits");
      continue;
    }
    for (unsigned k = 0; alone && k < RULES; k++) {
      uint64_t owner = load_relaxed(&e->owners[k]);
      if (owner && !(owner & RULE_USED) && owner_lives(world.s, owner))
        broken("a rule index has a living owner");
    }
    uint64_t set = load_relaxed(&e->set);
    for (uint32_t k = 0; load_relaxed(&e->current) && k < SET_COUNT(set); k++)
      if (!(load_relaxed(&e->owners[SET_RULE(set, k)]) & RULE_USED))
        broken("a rule is named, and its index is not in use");
  }
}

/* Each state of a limiter's key lives under a rule that is there, and that counts in this very slot. */
static void check_labels(void) {
  for (uint64_t i = 0; i < world.s->slot_count; i++) {
    const pair_t pair = pair_load(&world.s->slots[i]);
    if (!(pair.who & 1) || IS_PENDING(pair.when) || IS_PERMIT(pair.when)) continue;
    if (state_expires(pair.when) <= minus(now_or_clock(), CLOCKS_DIFFER)) continue;
    const limiter_entry_t *e = &world.s->limiters[WHO_LIMITER(pair.who)];
    rule_t rule;
    uint64_t owner;
    unsigned label = WHO_LABEL(pair.who), place = WHO_PLACE(pair.who);
    if (WHO_LIMITER(pair.who) >= world.s->limiter_count)
      broken("slot %d is of limiter %u", (int)i, WHO_LIMITER(pair.who));
    else if (IS_PLANNED(pair.when) || WHO_PLACE(pair.who) == PLACE_NONE || op->flags & PLANNED) {
      uint64_t slack; /* a bucket's names a record */
      if (IS_PLANNED(pair.when) && !record_rule(world.s, planned_record(pair), &rule, &slack))
        broken("slot %d is under record %u, which is none", (int)i, planned_record(pair));
    } else if (!read_used(e, label, &rule, &owner))
      broken("slot %d is under rule %u, whose index is free", (int)i, label);
    else if (rule.place != place)
      broken("slot %d is of place %u, under rule %u of place %u", (int)i, place, label, rule.place);
  }
}

/* What people look at: it must not misbehave, whatever was left half done. */
static void check_looking_in(void) {
  char name[256];
  uint64_t length;
  fshm_decision d;
  fshm_permit_info permit;
  fshm_process_info process;
  int damage = fshm_check(world.s, &length);
  if (damage) broken("it counts as damaged: %d, at %llu", damage, (unsigned long long)length);
  for (uint64_t i = 0; i < world.s->slot_count; i++) {
    if (fshm_key_name(world.s, i, name, sizeof name, &length) && length > 201)
      broken("a key's name is too long");
    if (fshm_peek_slot(world.s, i, now_or_clock(), &d) < 0) broken("a slot cannot be looked at");
    if (fshm_permit_at(world.s, i, &permit) && permit.alive > 1) broken("a permit is odd");
  }
  for (uint32_t i = 0; i < PROCESSES; i++) {
    if (!process_joined(world.s, i)) continue;
    const process_t *p = &world.s->processes[i];
    if (!load_relaxed(&p->pid) && !load_relaxed(&p->incarnation)) continue;
    if (fshm_process_at(world.s, i, &process) != FSHM_OK) broken("a process index is unreadable");
  }
}

/* alone: only S lives. */
static void check_invariants(bool alone) {
  if (!world.s) return;
  check_slots();
  check_names(alone);
  check_labels();
  check_looking_in();
}
