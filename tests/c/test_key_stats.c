/* test_key_stats.c - what people look at: counts over processes, names in their ring. */
#include "../../csrc/unity.c"

#include "check.h"

#define NOW UINT64_C(1000000)

static const fshm_limit generous = {1000000, UINT64_C(1) << 40, 0, FSHM_WINDOW, 0};

static uint64_t slot_of(fshm_limiter *l, const char *key, uint64_t length) {
  call_t c;
  found_t f;
  c.hash = fshm_siphash(l->key[0], l->key[1], key, length);
  CHECK(limits_load(l->segment, l->index, &c.snapshot));
  table_find(l->segment, c.hash, fingerprint(&c, 0), &f);
  CHECK(f.pair.who);
  return f.slot;
}

/* A key's counts, as a reader sums them: the key statistics and all per-process statistics. */
static void counts_of(fshm_segment *s, uint64_t slot, uint64_t *admitted, uint64_t *denied) {
  uint64_t mine = (slot + 1) << 32 | s->key_stats[slot].meta;
  *admitted = s->key_stats[slot].admitted;
  *denied = s->key_stats[slot].denied;
  for (unsigned process = 0; process < PROCESSES; process++) {
    process_stat_t *e = &s->process_stats[process].entries[slot & (PROCESS_STATS - 1)];
    if (e->key != mine) continue;
    *admitted += e->admitted;
    *denied += e->denied;
  }
}

static uint64_t total_admitted(fshm_segment *s, uint64_t *denied) {
  fshm_counters all[FSHM_COUNTERS];
  uint64_t sum = *denied = 0;
  fshm_counters_all(s, all);
  for (unsigned i = 0; i < FSHM_COUNTERS; i++) {
    sum += all[i].admitted;
    *denied += all[i].denied;
  }
  return sum;
}

#define WORKERS 6
#define CALLS 6000
#define KEYS 7

static void count_some(int me, void *with) {
  fshm_limiter *l = with;
  for (int i = 0; i < CALLS; i++) {
    char key[16];
    (void)snprintf(key, sizeof key, "key %d", (i + me) % KEYS);
    (void)apply_at(l, FSHM_ACQUIRE, key, i % 3 ? 1 : 2000000, NOW); /* a third can never fit */
  }
}

/* Summed over processes, living and dead, no call is missing and none is counted twice. */
static void test_counts_are_exact(void) {
  fshm_segment *s = fresh_segment(1000);
  fshm_limiter *l = fresh_limiter(s, "a", &generous, 1);
  uint64_t denied, admitted = 0, refused = 0;
  for (int i = 0; i < KEYS; i++) { /* so that the first denial has a slot to be counted in */
    char key[16];
    (void)snprintf(key, sizeof key, "key %d", i);
    CHECK_EQ(apply_at(l, FSHM_ACQUIRE, key, 1, NOW).status, FSHM_ALLOWED);
  }
  for (int round = 1; round <= 3; round++) {
    run_children(WORKERS, count_some, l);
    CHECK_EQ(total_admitted(s, &denied), round * WORKERS * CALLS * 2 / 3 + KEYS);
    CHECK_EQ(denied, round * WORKERS * CALLS / 3);
  }
  for (int i = 0; i < KEYS; i++) {
    char key[16];
    uint64_t a, d;
    (void)snprintf(key, sizeof key, "key %d", i);
    counts_of(s, slot_of(l, key, strlen(key)), &a, &d);
    admitted += a;
    refused += d;
  }
  CHECK_EQ(admitted, 3 * WORKERS * CALLS * 2 / 3 + KEYS);
  CHECK_EQ(refused, 3 * WORKERS * CALLS / 3);
  fshm_limiter_close(l);
  fshm_close(s);
}

static bool name_is(fshm_segment *s, uint64_t slot, const char *key, uint64_t length) {
  char name[256];
  uint64_t got;
  if (!fshm_key_name(s, slot, name, sizeof name, &got)) return false;
  uint64_t stored = min_u64(length, NAME_STORED);
  return got == (length > NAME_STORED ? NAME_STORED + 1 : length) && !memcmp(name, key, stored);
}

static void test_names(void) {
  fshm_segment *s = fresh_segment(1000);
  fshm_limiter *l = fresh_limiter(s, "a", &generous, 1);
  char key[300];
  for (uint64_t i = 0; i < sizeof key; i++) key[i] = (char)random_u64(); /* NUL and all */
  for (uint64_t length = 0; length <= sizeof key; length++) {
    fshm_decision d;
    fshm_apply(l, FSHM_ACQUIRE, key, length, NULL, 0, NOW, &d);
    CHECK_EQ(d.status, FSHM_ALLOWED);
    CHECK(name_is(s, slot_of(l, key, length), key, length));
  }
  char small[8];
  uint64_t got, slot = slot_of(l, key, 100);
  CHECK_EQ(fshm_key_name(s, slot, small, sizeof small, &got), 0); /* not enough room: none */
  CHECK_EQ(fshm_key_name(s, s->slot_count, key, sizeof key, &got), 0);
  fshm_limiter_close(l);
  fshm_close(s);
}

/* The ring overwrites the oldest; a key in use writes its name again before that. */
static void test_ring(void) {
  fshm_segment *s = fresh_segment(100); /* 512 words */
  fshm_limiter *l = fresh_limiter(s, "a", &generous, 1);
  char key[32];
  (void)apply_at(l, FSHM_ACQUIRE, "busy", 1, NOW);
  (void)apply_at(l, FSHM_ACQUIRE, "idle", 1, NOW);
  uint64_t busy = slot_of(l, "busy", 4), idle = slot_of(l, "idle", 4), unnamed = 0;
  for (uint64_t i = 0; i < 2000; i++) {
    (void)snprintf(key, sizeof key, "passer-by %llu", (unsigned long long)i);
    uint64_t now = NOW + (i << 41); /* each has expired when the next comes */
    s->slots[idle].when = s->slots[busy].when = TIME_MAX; /* but not these two */
    (void)apply_at(l, FSHM_ACQUIRE, key, 1, now);
    unnamed += !name_is(s, slot_of(l, key, strlen(key)), key, strlen(key));
    /* by hand what every 4,096th call of the key does */
    key_stats_remember(s, busy, s->key_stats[busy].meta, "busy", 4);
    CHECK(name_is(s, busy, "busy", 4));
    if (i < 50) CHECK(name_is(s, idle, "idle", 4));
    if (i > 200) CHECK(!name_is(s, idle, "idle", 4));
  }
  CHECK_OP(unnamed, <=,
           1); /* one in 2^20 passes for the key that had its slot before: 20 bits are kept */
  fshm_limiter_close(l);
  fshm_close(s);
}

/* Any word of a record torn or scribbled over, or the position wrong: no name, rather than another. */
static void test_torn(void) {
  fshm_segment *s = fresh_segment(100);
  fshm_limiter *l = fresh_limiter(s, "a", &generous, 1);
  const char *key = "a name of some forty-three bytes, six words";
  (void)apply_at(l, FSHM_ACQUIRE, key, 1, NOW);
  uint64_t slot = slot_of(l, key, strlen(key)), head = s->header->names_head;
  for (uint64_t i = 0; i < head; i++) {
    for (int bit = 0; bit < 64; bit++) {
      s->names[i] ^= UINT64_C(1) << bit;
      char name[256];
      uint64_t length;
      if (fshm_key_name(s, slot, name, sizeof name, &length)) /* a bit that is not the name's */
        CHECK(!memcmp(name, key, strlen(key)));
      else
        passed++;
      s->names[i] ^= UINT64_C(1) << bit;
    }
  }
  CHECK(name_is(s, slot, key, strlen(key)));
  for (int i = 0; i < 100000; i++) { /* any garbage at all */
    s->key_stats[slot].name = (uint32_t)random_u64();
    s->header->names_head = random_u64() >> random_below(64);
    s->names[random_below(s->names_words)] = random_u64() >> random_below(64);
    char name[256];
    uint64_t length;
    (void)fshm_key_name(s, slot, name, sizeof name, &length);
    (void)apply_at(l, FSHM_ACQUIRE, key, 1, NOW);
  }
  fshm_limiter_close(l);
  fshm_close(s);
}

/* Segments that keep no names, or no key statistics at all. */
static void test_modes(void) {
  for (int off = 0; off < 2; off++) {
    fshm_segment *s;
    fshm_error e;
    CHECK_EQ(fshm_open(fresh_name(), 100, 0600,
                       FSHM_OPEN_CREATE | (off ? FSHM_NAMES_OFF : FSHM_NAMES_HASHED), &s, &e),
             FSHM_OK);
    fshm_limiter *l = fresh_limiter(s, "a", &generous, 1);
    const char *key = "secret-api-key-0123456789";
    for (int i = 0; i < 5000; i++)
      CHECK_EQ(apply_at(l, FSHM_ACQUIRE, key, 1, NOW).status, FSHM_ALLOWED);
    char name[256];
    uint64_t got, admitted, denied;
    CHECK_EQ(fshm_key_name(s, slot_of(l, key, strlen(key)), name, sizeof name, &got), 0);
    CHECK(!memmem(s->map, s->size, "secret-api", 10)); /* nowhere in the segment */
    counts_of(s, slot_of(l, key, strlen(key)), &admitted, &denied);
    CHECK_EQ(admitted, off ? 0 : 5000);
    CHECK_EQ(total_admitted(s, &denied), 5000);
    fshm_limiter_close(l);
    fshm_close(s);
  }
}

/* Counts stay at their largest value instead of beginning again. */
static void test_saturation(void) {
  fshm_segment *s = fresh_segment(100);
  _Atomic uint32_t *count = &s->key_stats[0].admitted;
  *count = UINT32_MAX - 5;
  add_saturating(count, 3);
  CHECK_EQ(*count, UINT32_MAX - 2);
  add_saturating(count, 3);
  CHECK_EQ(*count, UINT32_MAX);
  add_saturating(count, UINT32_MAX);
  CHECK_EQ(*count, UINT32_MAX);
  fshm_close(s);
}

/* What `fast-shm inspect` reads at once: each key of the limiters that it asks for, and no slot beyond the table. */
static void test_read_at_once(void) {
  enum { SLOTS = 4096 };
  static uint64_t who[SLOTS], admitted[SLOTS], denied[SLOTS];
  static uint32_t meta[SLOTS];
  static int64_t slots[SLOTS];
  static uint16_t limiters[SLOTS];
  static uint8_t wanted[FSHM_KEY_OWNERS];
  fshm_segment *s = fresh_segment(1000);
  fshm_limiter *one = fresh_limiter(s, "one", &generous, 1);
  fshm_limiter *other = fresh_limiter(s, "other", &generous, 1);
  for (int i = 0; i < 300; i++) {
    char key[16];
    (void)snprintf(key, sizeof key, "key %d", i);
    (void)apply_at(i % 3 ? one : other, FSHM_ACQUIRE, key, 1, NOW);
  }
  CHECK_OP(s->slot_count, <=, SLOTS);
  who[s->slot_count - 1] = 77;
  fshm_key_stats(s, 0, s->slot_count - 1, who, meta, admitted, denied);
  CHECK_EQ(who[s->slot_count - 1], 77);
  fshm_key_stats(s, s->slot_count - 1, UINT64_MAX, who, meta, admitted, denied);
  CHECK_EQ(who[s->slot_count - 1], s->slots[s->slot_count - 1].who);
  for (int both = 0; both < 2; both++) {
    wanted[one->index] = 1;
    wanted[other->index] = (uint8_t)both;
    uint64_t n = fshm_known_keys(who, meta, s->slot_count, wanted, slots, limiters);
    CHECK_EQ(n, both ? 300 : 200);
    for (uint64_t i = 0; i < n; i++) {
      CHECK(!i || slots[i] > slots[i - 1]);
      CHECK_EQ(meta[slots[i]], key_stats_meta(limiters[i], s->slots[slots[i]].who));
      CHECK(wanted[limiters[i]]);
    }
  }
  meta[slots[0]] ^= 1; /* of another key */
  CHECK_EQ(fshm_known_keys(who, meta, s->slot_count, wanted, slots, limiters), 299);
  fshm_limiter_close(other);
  fshm_limiter_close(one);
  fshm_close(s);
}

int main(void) {
  test_read_at_once();
  test_counts_are_exact();
  test_names();
  test_ring();
  test_torn();
  test_modes();
  test_saturation();
  return done();
}
