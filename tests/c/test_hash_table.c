/* test_hash_table.c - the table of slots: find, claim, reuse; alone, after a death, and in a race. */
#include "../../csrc/unity.c"

#include "check.h"

#define LIVES(until) ((uint64_t)(until)) /* a bucket's state: lives until that instant */

typedef struct {
  uint64_t hash, who;
} key_id;

static key_id some_key(void) { return (key_id){random_u64(), random_u64() | 1}; }

static uint64_t state_found(fshm_segment *s, key_id k) {
  found_t f;
  table_find(s, k.hash, k.who, &f);
  return f.pair.who ? f.pair.when : 0;
}

/* Slots with this fingerprint, confirmed or pending. */
static unsigned count_slots(const fshm_segment *s, uint64_t who, bool pending) {
  unsigned n = 0;
  for (uint64_t i = 0; i < s->slot_count; i++) {
    pair_t pair = pair_load(&s->slots[i]);
    n += pair.who == who && IS_PENDING(pair.when) == pending;
  }
  return n;
}

static void set_slot(fshm_segment *s, uint64_t slot, uint64_t who, uint64_t when) {
  pair_t seen = pair_load(&s->slots[slot]);
  CHECK(pair_cas(&s->slots[slot], &seen, (pair_t){who, when}));
}

static uint64_t just(void *state) { return *(uint64_t *)state; }

/* A claim whose first state is known beforehand. */
static int claim(fshm_segment *s, key_id k, uint64_t state, uint64_t now, uint64_t *slot) {
  return table_claim(s, k.hash, k.who, now, just, &state, slot);
}

static void test_claim_find_clear(void) {
  fshm_segment *s = fresh_segment(1000);
  for (int i = 0; i < 500; i++) {
    key_id k = some_key();
    uint64_t slot, again;
    CHECK_EQ(state_found(s, k), 0);
    CHECK_EQ(claim(s, k, LIVES(1000 + i), 10, &slot), CLAIMED);
    CHECK_EQ(state_found(s, k), 1000 + i);
    CHECK_EQ(claim(s, k, LIVES(5), 10, &again), CLAIM_LOST); /* it has one */
    CHECK_EQ(state_found(s, k), 1000 + i);
    if (i % 2) continue;
    table_clear(s, slot, k.who ^ (UINT64_C(2) << 40)); /* not its: stays */
    CHECK_EQ(state_found(s, k), 1000 + i);
    table_clear(s, slot, k.who);
    CHECK_EQ(state_found(s, k), 0);
  }
  fshm_close(s);
}

/* A live key is never forgotten, an expired one makes room, and a table full of live keys says so. */
static void test_reuse(uint64_t capacity) {
  fshm_segment *s = fresh_segment(capacity);
  uint64_t slots = s->slot_count, slot, got = 0;
  key_id keys[64];
  for (uint64_t i = 0; i < slots; i++) {
    keys[i] = some_key();
    CHECK_EQ(claim(s, keys[i], LIVES(100 + i), 10, &slot), CLAIMED);
  }
  key_id late = some_key();
  CHECK_EQ(claim(s, late, LIVES(9000), 99 + CLOCKS_DIFFER, &slot), CLAIM_FULL);
  for (uint64_t i = 0; i < slots; i++) CHECK_EQ(state_found(s, keys[i]), 100 + i);
  for (uint64_t i = 0; i < slots; i++) { /* one expires at a time: that one goes, no other */
    key_id k = some_key();
    uint64_t now = 100 + i + CLOCKS_DIFFER; /* expired by everybody's clock */
    CHECK_EQ(claim(s, k, LIVES(9000), now, &slot), CLAIMED);
    CHECK_EQ(claim(s, late, LIVES(9000), now, &slot), CLAIM_FULL);
    CHECK_EQ(state_found(s, keys[i]), 0);
    for (uint64_t j = i + 1; j < slots; j++) CHECK_EQ(state_found(s, keys[j]), 100 + j);
    got += state_found(s, k) == 9000;
  }
  CHECK_EQ(got, slots);
  fshm_close(s);
}

/* Filled to its capacity, a table refuses almost none, and finds all others. */
static void test_fill(uint64_t capacity, uint64_t most_refused) {
  fshm_segment *s = fresh_segment(capacity);
  key_id *keys = malloc(capacity * sizeof *keys);
  uint64_t slot, refused = 0, lost = 0;
  for (uint64_t i = 0; i < capacity; i++) {
    keys[i] = some_key();
    if (claim(s, keys[i], LIVES(1000 + i), 10, &slot) == CLAIMED) continue;
    keys[i].who = 0;
    refused++;
  }
  for (uint64_t i = 0; i < capacity; i++)
    lost += keys[i].who && state_found(s, keys[i]) != LIVES(1000 + i);
  CHECK_OP(refused, <=, most_refused);
  CHECK_EQ(lost, 0);
  CHECK_EQ(fshm_live_slots(s, NULL, 10), capacity - refused);
  free(keys);
  fshm_close(s);
}

/* A process died between publishing its pending slot and confirming it. */
static void test_dead_inserter(void) {
  fshm_segment *s = fresh_segment(1);
  CHECK_EQ(s->slot_count, 4);
  key_id k = some_key();
  uint64_t slot;

  set_slot(s, 2, k.who, PENDING(7)); /* of the same key: carried on */
  CHECK_EQ(state_found(s, k), 0);
  CHECK_EQ(claim(s, k, LIVES(500), 10, &slot), CLAIMED);
  CHECK_EQ(slot, 2);
  CHECK_EQ(count_slots(s, k.who, false), 1);
  table_clear(s, slot, k.who);

  set_slot(s, 1, k.who, PENDING(8)); /* two of them: the lower is carried on, the higher goes */
  set_slot(s, 3, k.who, PENDING(9));
  CHECK_EQ(claim(s, k, LIVES(501), 10, &slot), CLAIMED);
  CHECK_EQ(slot, 1);
  CHECK_EQ(count_slots(s, k.who, true), 0);
  CHECK_EQ(count_slots(s, k.who, false), 1);

  set_slot(s, 0, k.who, PENDING(10)); /* beside a confirmed one it is worth nothing */
  CHECK_EQ(state_found(s, k), 501);
  CHECK_EQ(claim(s, k, LIVES(502), 10, &slot), CLAIM_LOST);
  CHECK_EQ(state_found(s, k), 501);
  fshm_close(s);

  s = fresh_segment(1); /* of other keys, everywhere: they make room, never a live one */
  set_slot(s, 0, 11, LIVES(900));
  for (uint64_t i = 1; i < 4; i++) set_slot(s, i, 100 + i, PENDING(i));
  for (uint64_t i = 0; i < 3; i++) {
    k = some_key();
    CHECK_EQ(claim(s, k, LIVES(500), 10, &slot), CLAIMED);
  }
  CHECK_EQ(count_slots(s, 11, false), 1);
  k = some_key();
  CHECK_EQ(claim(s, k, LIVES(500), 10, &slot), CLAIM_FULL);
  fshm_close(s);
}

/* Carrying on steps 2 and 3 for a pending slot that meanwhile is gone, or confirmed elsewhere. */
static int carry_on(fshm_segment *s, key_id k, found_t mine, uint64_t state, uint64_t *slot) {
  return confirm(s, k.hash, k.who, mine, just, &state, slot);
}

static void test_confirm(void) {
  fshm_segment *s = fresh_segment(1);
  key_id k = some_key();
  uint64_t slot;
  found_t mine = {1, {k.who, PENDING(1)}};
  CHECK_EQ(carry_on(s, k, mine, LIVES(500), &slot), CLAIM_LOST);
  CHECK_EQ(count_slots(s, k.who, false), 0);
  set_slot(s, 1, k.who, PENDING(2)); /* the same key, but another's ticket */
  CHECK_EQ(carry_on(s, k, mine, LIVES(500), &slot), CLAIM_LOST);
  CHECK_EQ(count_slots(s, k.who, true), 1);
  set_slot(s, 1, k.who, PENDING(1));
  set_slot(s, 0, k.who, LIVES(600));
  CHECK_EQ(carry_on(s, k, mine, LIVES(500), &slot), CLAIM_LOST);
  CHECK_EQ(count_slots(s, k.who, true), 0); /* taken back */
  CHECK_EQ(state_found(s, k), 600);
  fshm_close(s);
}

/* A claimer that is stopped between its look and the swap that confirms; meanwhile others go on. */
typedef struct {
  fshm_segment *s;
  key_id key;
  uint64_t now, asked;
  bool steal; /* another process claims the key, it expires, and its slot goes to another key */
} stopped_t;

static uint64_t while_stopped(void *context) {
  stopped_t *t = context;
  uint64_t slot;
  t->asked++;
  if (t->steal && t->asked == 1) {
    CHECK_EQ(claim(t->s, t->key, LIVES(t->now + 50), t->now, &slot), CLAIMED);
    CHECK_EQ(state_found(t->s, t->key), t->now + 50);
    table_clear(t->s, slot, t->key.who); /* expired, and reused for another key that left again */
  }
  return LIVES(t->now + 10 + t->asked);
}

/* The first state is asked for after the look, once for each try to confirm; and a state that was
 * computed before the key got a slot from another process is never put, though that slot is gone. */
static void test_first_state_is_of_after_the_look(void) {
  fshm_segment *s = fresh_segment(1);
  uint64_t slot;
  stopped_t t = {.s = s, .key = some_key(), .now = 1000};
  set_slot(s, 1, t.key.who, LIVES(t.now + 500)); /* it has a slot: not asked for */
  CHECK_EQ(table_claim(s, t.key.hash, t.key.who, t.now, while_stopped, &t, &slot), CLAIM_LOST);
  CHECK_EQ(t.asked, 0);
  table_clear(s, 1, t.key.who);
  CHECK_EQ(table_claim(s, t.key.hash, t.key.who, t.now, while_stopped, &t, &slot), CLAIMED);
  CHECK_EQ(t.asked, 1);
  CHECK_EQ(state_found(s, t.key), t.now + 11);
  table_clear(s, slot, t.key.who);
  t.steal = true;
  t.asked = 0;
  CHECK_EQ(table_claim(s, t.key.hash, t.key.who, t.now, while_stopped, &t, &slot), CLAIMED);
  CHECK_EQ(t.asked,
           2); /* the first was refused: the other's claim had taken the pending slot over */
  CHECK_EQ(state_found(s, t.key), t.now + 12);
  CHECK_EQ(count_slots(s, t.key.who, false), 1);
  CHECK_EQ(count_slots(s, t.key.who, true), 0);
  fshm_close(s);
}

/* races ---------------------------------------------------------------------------------------- */

#define KEYS 3
#define LIMIT 3
#define BETWEEN 1000000

typedef struct {
  _Atomic uint64_t arrivals;
  _Atomic uint64_t admitted[KEYS], full;
  uint64_t racers, rounds;
  fshm_limiter *limiter;
} race_t;

/* In each round the tenants of the round before are expiring: for some racers they have, for others
 * they have not yet. The keys of this round are inserted by all racers at once. */
static void racer(int me, void *with) {
  race_t *race = with;
  fshm_segment *s = race->limiter->segment;
  uint64_t met = 0;
  for (uint64_t round = 1; round <= race->rounds; round++) {
    meet(&race->arrivals, race->racers, ++met);
    for (int i = 0; i < LIMIT + 1; i++) {
      for (uint64_t k = 0; k < KEYS; k++) {
        uint64_t pick = (k + (uint64_t)me) % KEYS;
        char key[32];
        (void)snprintf(key, sizeof key, "%llu-%llu", (unsigned long long)(round % 2),
                       (unsigned long long)pick);
        uint64_t jitter = random_below(200);
        fshm_decision d = apply_at(race->limiter, FSHM_ACQUIRE, key, 1, round * BETWEEN + jitter);
        if (d.status == FSHM_ALLOWED) atomic_fetch_add(&race->admitted[pick], 1);
        if (d.status == FSHM_FULL) atomic_fetch_add(&race->full, 1);
        CHECK(d.status >= 0 || d.status == FSHM_FULL);
      }
    }
    meet(&race->arrivals, race->racers, ++met);
    if (me == 0) {
      for (int k = 0; k < KEYS; k++) {
        uint64_t got = atomic_exchange(&race->admitted[k], 0);
        CHECK_OP(got, <=, LIMIT);
        CHECK(got == LIMIT || atomic_load(&race->full)); /* only a full table denies too much */
      }
      atomic_store(&race->full, 0);
      for (uint64_t i = 0; i < s->slot_count; i++) {
        pair_t pair = pair_load(&s->slots[i]);
        if (pair.who && !IS_PENDING(pair.when)) CHECK_EQ(count_slots(s, pair.who, false), 1);
      }
    }
    meet(&race->arrivals, race->racers, ++met);
  }
}

static void test_race(uint64_t capacity, uint64_t lines, int racers, uint64_t rounds) {
  fshm_segment *s = fresh_segment(capacity);
  CHECK_EQ(s->lines, lines);
  race_t *race = shared_memory(sizeof *race);
  /* its slot can be reused within the 200 ns in which the racers come to the next round */
  fshm_limit l = {LIMIT, BETWEEN - CLOCKS_DIFFER - 100, 0, FSHM_WINDOW, 0};
  race->limiter = fresh_limiter(s, "race", &l, 1);
  race->racers = (uint64_t)racers;
  race->rounds = rounds;
  run_children(racers, racer, race);
  fshm_limiter_close(race->limiter);
  (void)munmap(race, sizeof *race);
  fshm_close(s);
}

int main(void) {
  test_claim_find_clear();
  test_reuse(1);
  test_reuse(4);
  test_reuse(40);
  test_fill(1, 0);
  test_fill(1000, 1);
  test_fill(200000, 2);
  test_dead_inserter();
  test_confirm();
  test_first_state_is_of_after_the_look();
  test_race(1, 1, 4, 1500);
  test_race(4, 2, 4, 1500);
  test_race(1, 1, 2, 30000); /* on two processors these two arrive within some ns */
  return done();
}
