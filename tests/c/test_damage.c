/* test_damage.c - damage is detected, and honest use is never reported as damage (damage.c). */
#include "../../csrc/unity.c"

#include "check.h"

static const fshm_limit kinds[] = {{5, 60000000000, 5, FSHM_BUCKET, 0},
                                   {7, 60000000000, 0, FSHM_WINDOW, 0},
                                   {9, 60000000000, 0, FSHM_SLIDING, 0},
                                   {3, 0, 0, FSHM_PERMITS, 0}};

static void check_none(fshm_segment *s) {
  uint64_t index = 1;
  CHECK_EQ(fshm_check(s, &index), FSHM_DAMAGE_NONE);
  CHECK_EQ(index, 0);
}

/* One look by a handle that may not write, as `fast-shm inspect` has. */
static int checked_by_reader(fshm_segment *s, uint64_t *index) {
  fshm_segment *reader;
  fshm_error e;
  const char *name = strrchr(s->path, '.') + 1;
  /* attach() would hand out the writing handle of this process */
  fshm_segment *others = open_segments;
  open_segments = NULL;
  int status = fshm_open(name, 0, 0, FSHM_OPEN_READ_ONLY, &reader, &e);
  open_segments = others;
  CHECK_EQ(status, FSHM_OK);
  if (status != FSHM_OK) return -1;
  CHECK(reader->read_only);
  int kind = fshm_check(reader, index);
  (void)munmap(reader->map, reader->size);
  (void)munmap(reader->fork_page, sizeof *reader->fork_page);
  free_handle(reader);
  return kind;
}

/* honest use ----------------------------------------------------------------------------------- */

static int change(fshm_segment *s, const char *name, const fshm_limit *l, uint32_t count) {
  fshm_limiter *out;
  int status = fshm_limiter_open(s, name, strlen(name), l, count, &out);
  fshm_limiter_close(out);
  return status;
}

static void any_call(fshm_segment *s) {
  const char name[] = {(char)('a' + random_below(4)), 0},
             key[] = {(char)('k' + random_below(9)), 0};
  fshm_limit l[FSHM_MAX_LIMITS];
  uint32_t count = 0;
  for (uint32_t kind = (uint32_t)random_below(4); kind < 4; kind += 1 + (uint32_t)random_below(3)) {
    l[count] = kinds[kind];
    l[count].n = 1 + random_below(50);
    l[count].burst = kind ? 0 : 1 + random_below(l[count].n);
    count++;
  }
  fshm_limiter *limiter;
  int status = fshm_limiter_open(s, name, 1, l, count, &limiter);
  CHECK(status == FSHM_OK || status == FSHM_CONTENDED);
  if (!limiter) return;
  for (int i = 0; i < 20; i++) {
    const uint64_t costs[] = {random_below(9), 1, 2, 3};
    fshm_charged reserved[FSHM_MAX_LIMITS] = {{0, 0, 0, 0, 0}};
    fshm_decision d = {0};
    fshm_permit permit;
    uint32_t held;
    switch (random_below(7)) {
      case 0:
        fshm_admit(limiter, key, 1, costs, 0, &permit, &d, &held);
        if (d.status == FSHM_ALLOWED) {
          (void)fshm_settle(limiter, key, 1, costs, (uint64_t[]){2, 2, 2, 2}, &permit, 0);
          (void)fshm_permit_idle(limiter, &permit, 1);
          if (i % 2) (void)fshm_permit_release(limiter, &permit);
        }
        break;
      case 1:
        fshm_reserve(limiter, key, 1, costs, UINT64_C(1) << 40, 0, &d, reserved);
        if (d.status == FSHM_ALLOWED) (void)fshm_cancel(limiter, key, 1, costs, reserved, 0);
        break;
      case 2:
        if (i == 0) CHECK_EQ(fshm_reset_all(limiter), FSHM_OK);
        CHECK_EQ(fshm_reset_key(limiter, key, 1), FSHM_OK);
        break;
      default:
        d = apply_at(limiter, (uint32_t)random_below(6), key, costs[0], 0);
    }
    CHECK_OP(d.status, !=, FSHM_E_DAMAGED);
  }
  fshm_limiter_close(limiter);
}

static _Noreturn void work_until_killed(int me, void *with) {
  (void)me;
  for (;;) {
    any_call(with);
    if (failed) _exit(1);
  }
}

/* Workers of all kinds of calls, killed wherever they are; and the segment is looked at all the time. */
static void test_kills_are_no_damage(void) {
  fshm_segment *s = fresh_segment(40);
  uint64_t index;
  pid_t pids[4];
  for (int i = 0; i < 4; i++) pids[i] = start_child(work_until_killed, i, s);
  for (int kill_no = 0; kill_no < 120; kill_no++) {
    int status, which = (int)random_below(4);
    struct timespec pause = {0, (long)random_below(10000000)};
    (void)nanosleep(&pause, NULL);
    check_none(s);
    CHECK_EQ(checked_by_reader(s, &index), FSHM_DAMAGE_NONE);
    (void)kill(pids[which], SIGKILL);
    CHECK_EQ(waitpid(pids[which], &status, 0), pids[which]);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL); /* not: ended by a failure */
    check_none(s);
    pids[which] = start_child(work_until_killed, kill_no, s);
  }
  for (int i = 0; i < 4; i++) {
    (void)kill(pids[i], SIGKILL);
    (void)waitpid(pids[i], NULL, 0);
  }
  (void)fshm_reap(s, 0);
  check_none(s);
  fshm_close(s);
}

/* Killed in the first call of a name: an id, with or without its name, and no limits. */
static void test_half_made_limiters(void) {
  fshm_segment *s = fresh_segment(100);
  fshm_limiter_info info;
  fshm_limiter *l;
  uint32_t at;
  CHECK_EQ(entry_of(s, "whole name", 10, true, 0, &at), FSHM_OK);
  CHECK_EQ(entry_of(s, "no name", 7, true, 0, &at), FSHM_OK);
  CHECK_EQ(at, 1);
  store_relaxed(&s->limiters[1].name_length, 0);
  store_relaxed(&s->limiters[1].name[0], 0);
  CHECK_EQ(entry_of(s, "half a name", 11, true, 0, &at), FSHM_OK);
  store_relaxed(&s->limiters[2].name_length, 0);
  for (uint32_t i = 0; i < 3; i++) CHECK_EQ(fshm_limiter_at(s, i, &info), 0);
  CHECK_EQ(fshm_limiter_find(s, "no name", 7, &l), FSHM_E_NOT_FOUND);
  check_none(s);
  CHECK_EQ(change(s, "new", kinds, 4), FSHM_OK);
  CHECK_EQ(change(s, "no name", kinds, 4), FSHM_OK);
  CHECK_EQ(fshm_limiter_at(s, 1, &info), FSHM_OK);
  CHECK_EQ(info.name_length, 7);
  check_none(s);
  fshm_close(s);
}

/* Each state that an algorithm writes, for any limits and times, counts as possible. */
static void test_states_that_are_written(void) {
  const fshm_limit first = {10, 1000000, 5, FSHM_BUCKET, 0};
  rule_t last = rule_make(&first);
  for (int i = 0; i < 200000; i++) {
    fshm_limit l = {0};
    l.kind = (uint32_t)random_below(3);
    l.per_ns = random_scaled(SLIDING_MIN_PER, BUCKET_MAX_PER);
    l.n = random_scaled(1, limit_largest_n(l.kind, l.per_ns));
    l.burst = random_scaled(1, l.n);
    l.strict = (uint32_t)random_below(2);
    if (!limit_valid(&l)) continue;
    rule_t r = rule_make(&l);
    CHECK(rule_genuine(&r));
    rule_t other = last; /* that of the round before: the limits change to it */
    last = r;
    uint64_t state = 0, put = 0, now = random_scaled(1, TIME_MAX - 1);
    for (int k = 0; k < 12; k++) {
      uint64_t cost = random_scaled(1, i % 2 ? l.n : UINT64_MAX) - random_below(2);
      verdict_t v = rule_take(&r, state, now, now, cost);
      const fshm_charged charge = charged_by(&r, put, now, 0);
      if (k % 3 == 0) put = state = v.retry ? state : v.next;
      if (k % 3 == 1) state = rule_charge(&r, state, now, cost);
      if (k % 3 == 2)
        state = rule_refund(&r, state, now, cost, random_below(2) && put ? &charge : NULL);
      if (k == 5) {
        uint64_t moved = rule_convert(&other, &r, state, now);
        if (moved != NO_STATE) state = moved, r = other;
      }

      if (!state_possible(state)) {
        fprintf(stderr, "kind %u n %llu per %llu: %llx\n", l.kind, (unsigned long long)l.n,
                (unsigned long long)l.per_ns, (unsigned long long)state);
        CHECK(false);
        return;
      }
      now = min_u64(now + random_scaled(1, l.per_ns * 2), TIME_MAX - 1);
    }
  }
  CHECK(state_possible(PENDING(0)) && state_possible(UINT64_MAX >> 4 | UINT64_C(6) << 61));
  CHECK(!state_possible(1ULL << 58) && !state_possible(UINT64_MAX)); /* no time; slot 131,071 */
}

/* damage --------------------------------------------------------------------------------------- */

/* Write a word at an address, and see what is reported: by the writer, then by a reader that finds it without
 * the note. Then all is put back as it was. */
static void told(fshm_segment *s, void *address, uint64_t word, int kind, uint64_t which) {
  uint64_t *at = address, was = *at, index;
  check_none(s);
  *at = word;
  CHECK_EQ(checked_by_reader(s, &index), kind);
  CHECK_EQ(index, which);
  CHECK_EQ(load_relaxed(&s->header->damage), 0); /* it could not write it down */
  CHECK_EQ(fshm_check(s, &index), kind);
  CHECK_EQ(index, which);
  *at = was;
  CHECK_EQ(fshm_damage(s, &index), kind); /* stays so, for readers too */
  CHECK_EQ(index, which);
  CHECK_EQ(checked_by_reader(s, &index), kind);
  store_relaxed(&s->header->damage, 0);
  store_relaxed(&s->damage, 0);
}

static void test_told(void) {
  fshm_segment *s = fresh_segment(100);
  fshm_limiter *l = fresh_limiter(s, "ab", kinds, 4);
  CHECK_EQ(change(s, "other", kinds + 1, 1), FSHM_OK);
  CHECK_EQ(change(s, "ab", kinds, 3), FSHM_OK);
  CHECK_EQ(change(s, "ab", kinds, 4), FSHM_OK);
  fshm_decision d = apply_at(l, FSHM_ACQUIRE, "k", 1, 0);
  CHECK_EQ(d.status, FSHM_ALLOWED);
  header_t *h = s->header;
  limiter_entry_t *e = &s->limiters[0];
  uint64_t current = load_relaxed(&e->current);
  uint64_t set = load_relaxed(&e->set);
  _Atomic uint64_t *rule = e->rules[SET_RULE(set, 0)]; /* words: algorithms.h, rule_t */

  for (unsigned at = 0; at < sizeof s->verified; at += 8) { /* any of them: readers cannot attach */
    uint64_t index, *word = (uint64_t *)(void *)(s->map + at);
    *word ^= 1;
    CHECK_EQ(fshm_damage(s, &index), FSHM_DAMAGE_HEADER);
    CHECK_EQ(index, at);
    *word ^= 1;
    store_relaxed(&h->damage, 0);
    store_relaxed(&s->damage, 0);
  }
  told(s, &e->current, current & ~CURRENT_VERSION(UINT64_MAX), FSHM_DAMAGE_LIMITS, 0);
  told(s, &e->set, set & ~UINT64_C(15), FSHM_DAMAGE_LIMITS, 0);
  told(s, &e->set, (set & ~UINT64_C(15)) | 5, FSHM_DAMAGE_LIMITS, 0);
  told(s, &e->set, set | UINT64_C(15) << 4, FSHM_DAMAGE_LIMITS, 0); /* a rule that no call wrote */
  told(s, &e->set, (set & ~(UINT64_C(15) << 8)) | (set << 4 & UINT64_C(15) << 8),
       FSHM_DAMAGE_LIMITS, 0); /* one twice */
  told(s, &e->owners[RULES - 1], RULE_USED | 1, FSHM_DAMAGE_LIMITS, 0);
  told(s, &rule[0], 3, FSHM_DAMAGE_LIMITS, 0); /* permits that are not the last */
  for (unsigned k = 1; k < RULE_WORDS; k++) {
    told(s, &rule[k], 0, FSHM_DAMAGE_LIMITS, 0);
    told(s, &rule[k], rule[k] + 1, FSHM_DAMAGE_LIMITS, 0);
  }
  told(s, &e->id, 77, FSHM_DAMAGE_NAME, 0);
  told(s, &e->id, 0, FSHM_DAMAGE_NAME, 0);
  told(s, &e->name[0], 0x4141, FSHM_DAMAGE_NAME, 0);
  told(s, &e->name_length, 3, FSHM_DAMAGE_NAME, 0);
  told(s, &s->limiters[9].name_length, 97, FSHM_DAMAGE_NAME, 9);
  told(s, &e->most, 100001, FSHM_DAMAGE_LIMITS, 0);
  told(s, &s->slots[3].when, 55, FSHM_DAMAGE_SLOT, 3);
  for (uint64_t i = 0; i < s->slot_count; i++) {
    if (!load_relaxed(&s->slots[i].who)) continue;
    told(s, &s->slots[i].when, UINT64_C(2) << 62 | UINT64_C(3) << 57 | 99, FSHM_DAMAGE_SLOT, i);
    told(s, &s->slots[i].when, UINT64_C(1) << 62 | 99, FSHM_DAMAGE_SLOT, i);
    told(s, &s->slots[i].when, UINT64_MAX, FSHM_DAMAGE_SLOT, i);
    told(s, &s->slots[i].who, 0, FSHM_DAMAGE_SLOT, i);
  }
  /* The note itself: whatever is written there, damage it is. */
  store_relaxed(&h->damage, UINT64_MAX);
  uint64_t index;
  CHECK_EQ(fshm_damage(s, &index), FSHM_DAMAGE_HEADER);
  CHECK_EQ(index, offsetof(header_t, damage));
  store_relaxed(&h->damage, 0);
  CHECK_EQ(fshm_damage(s, &index), FSHM_DAMAGE_HEADER); /* kept here, though it is gone there */
  CHECK_EQ(index, offsetof(header_t, damage));
  store_relaxed(&s->damage, 0);
  check_none(s);
  fshm_limiter_close(l);
  fshm_close(s);
}

/* Each process that meets damage gets an answer of its own, and leaves the note; the first one stays. */
static void test_met(void) {
  fshm_segment *s = fresh_segment(100);
  (void)change(s, "first", kinds, 1);
  fshm_limiter *l = fresh_limiter(s, "second", kinds, 4), *again;
  limiter_entry_t *e = &s->limiters[1];
  uint64_t current = load_relaxed(&e->current), index, version, each[FSHM_MAX_LIMITS] = {0};
  uint64_t set = load_relaxed(&e->set);
  fshm_limit got[FSHM_MAX_LIMITS];
  fshm_limiter_info info;
  fshm_permit permit;
  fshm_decision d;
  uint32_t held;
  for (int call = 0; call < 14; call++) {
    int status = FSHM_E_DAMAGED;
    store_relaxed(&e->current, call % 2 ? current : 0);
    store_relaxed(&e->set, call % 2 ? set | 15 : set);
    memset(&permit, 0, sizeof permit);
    if (call < 6) status = apply_at(l, (uint32_t)call, "k", 1, 0).status;
    if (call == 6) status = fshm_is_allowed(l, "k", 1);
    if (call == 7) status = fshm_limiter_at(s, 1, &info);
    if (call == 8) fshm_admit(l, "k", 1, each, 0, &permit, &d, &held), status = d.status;
    if (call == 9) status = fshm_cancel(l, "k", 1, each, (fshm_charged[4]){{0, 0, 0, 0, 0}}, 0);
    if (call == 10) status = fshm_settle(l, "k", 1, each, each, &permit, 0);
    if (call == 11) status = fshm_remaining(l, "k", 1, 0, each);
    if (call == 12) status = fshm_reset_key(l, "k", 1);
    if (call == 13) status = fshm_reset_all(l);
    CHECK_EQ(status, FSHM_E_DAMAGED);
    CHECK_EQ(fshm_damage(s, &index), FSHM_DAMAGE_LIMITS);
    CHECK_EQ(index, 1);
    store_relaxed(&s->header->damage, 0);
    store_relaxed(&s->damage, 0);
  }
  store_relaxed(&e->current, current);
  store_relaxed(&e->set, set | 15);
  CHECK_EQ(fshm_limiter_limits(l, got, &version), 0);
  CHECK_EQ(fshm_in_flight(l, "k", 1), 0);
  /* Limits set anew over damaged ones would leave those who have what was consumed. */
  CHECK_EQ(fshm_limiter_open(s, "second", 6, kinds, 4, &again), FSHM_E_DAMAGED);
  CHECK_EQ(fshm_limiter_find(s, "second", 6, &again), FSHM_E_DAMAGED);
  store_relaxed(&e->set, set);
  CHECK_EQ(apply_at(l, FSHM_ACQUIRE, "k", 1, 0).status, FSHM_ALLOWED);
  store_relaxed(&s->limiters[0].id, 1); /* another name's */
  CHECK_EQ(fshm_limiter_find(s, "second", 6, &again), FSHM_OK);
  fshm_limiter_close(again);
  CHECK_EQ(fshm_limiter_find(s, "third", 5, &again), FSHM_E_NOT_FOUND);
  CHECK_EQ(fshm_damage(s, &index), FSHM_DAMAGE_LIMITS);
  fshm_limiter_close(l);
  fshm_close(s);
}

/* An id that was written over must not make new processes count apart from those that have the entry. */
static void test_lost_ids(void) {
  const uint64_t ids[] = {1, 0};
  for (int i = 0; i < 2; i++) {
    fshm_segment *s = fresh_segment(100);
    fshm_limiter *l;
    uint64_t index;
    (void)change(s, "before", kinds, 1);
    (void)change(s, "name", kinds, 1);
    (void)change(s, "after", kinds, 1);
    store_relaxed(&s->limiters[1].id, ids[i]);
    CHECK_EQ(change(s, "before", kinds, 1), FSHM_OK);
    CHECK_EQ(change(s, "name", kinds, 1), FSHM_E_DAMAGED);
    CHECK_EQ(fshm_limiter_find(s, "name", 4, &l), FSHM_E_DAMAGED);
    CHECK_EQ(change(s, "after", kinds, 1), ids[i] ? FSHM_OK : FSHM_E_DAMAGED);
    CHECK_EQ(load_relaxed(&s->limiters[3].id), 0);
    CHECK_EQ(fshm_damage(s, &index), FSHM_DAMAGE_NAME);
    CHECK_EQ(index, 1);
    fshm_close(s);
  }
}

/* A slot that names an earlier rule of its limiter, and holds what that rule cannot have written: to this key, nothing
 * has happened. */
static void test_states_that_their_rule_cannot_have(void) {
  const fshm_limit limits[] = {kinds[0], kinds[1], kinds[2], {8, 0, 0, FSHM_LEASE, 0}, kinds[3]};
  const uint64_t states[] = {TIME_MAX, UINT64_C(1) << 62 | UINT64_C(4) << 57 | 0xffff1,
                             UINT64_C(2) << 62 | UINT64_C(9) << 57 | 0xfff80001, UINT64_C(7) << 61,
                             NO_STATE};
  const uint64_t times[] = {148, TIME_MAX - 1};
  for (int i = 0; i < 5 * 4; i++) {
    fshm_segment *s = fresh_segment(100);
    fshm_limiter *l = fresh_limiter(s, "a", &limits[i % 5], 1);
    const unsigned label = SET_RULE(load_relaxed(&s->limiters[0].set), 0);
    fshm_limit other = limits[i / 5];
    snapshot_t snapshot;
    rule_t old;
    other.n++;
    CHECK_EQ(change(s, "a", &other, 1), FSHM_OK);
    CHECK(limits_load(s, 0, &snapshot));
    if (!limits_rule(s, 0, label, &old)) old = snapshot.rules[0];
    const uint64_t hash = key_hash(l, "k", 1), slot = table_probe(s, hash, 0),
                   who = (snapshot_who(&snapshot, 0, hash) & ~WHO_LABELS) |
                         WHO_OF(0, 0, label, CURRENT_EPOCH(snapshot.current));
    for (int k = 0; k < 5 * 2 * 8; k++) {
      const uint64_t state = states[k % 5], now = times[k / 5 % 2];
      const uint32_t op = (uint32_t)k / 10;
      fshm_decision met, never = apply_at(l, FSHM_PEEK, "never", 1, now);
      if (state_is_of(&old, state)) continue;
      s->slots[slot].who = who;
      s->slots[slot].when = state;
      s->key_stats[slot].meta = key_stats_meta(0, who);
      if (op <= FSHM_BLOCK)
        met = apply_at(l, op, "k", 1, now);
      else
        CHECK_EQ(fshm_peek_slot(s, slot, now, &met), FSHM_OK);
      CHECK(met.reset_after_ns >= 0 && met.reset_after_ns <= (int64_t)TIME_MAX);
      if (op != FSHM_PEEK && op <= FSHM_BLOCK) continue;
      CHECK_EQ(met.status, never.status);
      CHECK_EQ(met.remaining, never.remaining);
      CHECK_EQ(met.retry_after_ns, never.retry_after_ns);
      CHECK_EQ(met.reset_after_ns, never.reset_after_ns);
    }
    fshm_limiter_close(l);
    fshm_close(s);
  }
}

static void test_cut(void) {
  fshm_segment *s = fresh_segment(100);
  uint64_t index;
  CHECK_EQ(truncate(s->path, 8192), 0); /* from now on, a touch beyond that is SIGBUS */
  CHECK_EQ(fshm_damage(s, &index), FSHM_DAMAGE_SIZE);
  CHECK_EQ(index, 8192);
  CHECK_EQ(fshm_check(s, &index), FSHM_DAMAGE_SIZE);
  CHECK_EQ(truncate(s->path, 0), 0);
  CHECK_EQ(fshm_check(s, &index), FSHM_DAMAGE_SIZE);
  fshm_close(s);
}

/* Another process gives the name permits alone, while a charge is under way: no damage. */
static void test_other_limits_meanwhile(void) {
  fshm_segment *s = fresh_segment(100);
  fshm_limiter *l = fresh_limiter(s, "a", kinds, 1);
  call_t c;
  look_t looks[FSHM_MAX_LIMITS];
  for (uint32_t op = FSHM_ACQUIRE; op <= FSHM_REFUND; op += FSHM_CHARGE) {
    CHECK_EQ(change(s, "a", kinds, 1), FSHM_OK);
    CHECK(limits_load(s, l->index, &c.snapshot));
    begin(&c, l, "k", 1, 0);
    c.stale = true; /* met a state that was written under newer limits */
    CHECK_EQ(change(s, "a", kinds + 3, 1), FSHM_OK);
    int status = op == FSHM_ACQUIRE ? take_one(&c, op, looks) : force_all(&c, op, looks);
    CHECK_EQ(status, FSHM_E_ARGUMENT);
  }
  check_none(s);
  fshm_limiter_close(l);
  fshm_close(s);
}

/* Likewise, limits that are damaged meanwhile: the call goes on with none of them. */
static void test_damaged_meanwhile(void) {
  fshm_segment *s = fresh_segment(100);
  fshm_limiter *l = fresh_limiter(s, "a", kinds, 3);
  call_t c;
  look_t looks[FSHM_MAX_LIMITS];
  fshm_decision d;
  for (uint32_t op = FSHM_ACQUIRE; op <= FSHM_BLOCK; op++) {
    CHECK(limits_load(s, l->index, &c.snapshot));
    begin(&c, l, "k", 1, 0);
    c.stale = true;
    const limiter_entry_t *e = &s->limiters[0];
    _Atomic uint64_t *rule = s->limiters[0].rules[SET_RULE(load_relaxed(&e->set), 1)];
    uint64_t was[RULE_WORDS];
    for (unsigned k = 0; k < RULE_WORDS; k++) /* 0: would divide by zero */
      was[k] = atomic_exchange(&rule[k], 0);
    memset(looks, 0, sizeof looks);
    int status = op >= FSHM_CHARGE ? force_all(&c, op, looks) : take_all(&c, op, looks);
    CHECK_EQ(status, FSHM_E_DAMAGED);
    CHECK_EQ(c.snapshot.count, 0);
    report(&c, looks, false, false, &d);
    for (unsigned k = 0; k < RULE_WORDS; k++) store_relaxed(&rule[k], was[k]);
  }
  fshm_limiter_close(l);
  fshm_close(s);
}

int main(void) {
  test_kills_are_no_damage();
  test_half_made_limiters();
  test_states_that_are_written();
  test_told();
  test_met();
  test_lost_ids();
  test_states_that_their_rule_cannot_have();
  test_cut();
  test_other_limits_meanwhile();
  test_damaged_meanwhile();
  return done();
}
