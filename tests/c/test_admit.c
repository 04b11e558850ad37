/* test_admit.c - permits together with rate limits; settlement, waiting and wake-ups, idle marks, resets. */
#include "../../csrc/unity.c"

#include "check.h"

#define SECOND UINT64_C(1000000000)
#define NOW (UINT64_C(1000000) * SECOND)

static const fshm_limit window = {5, 60 * SECOND, 0, FSHM_WINDOW, 0};
static const fshm_limit bucket = {10, 10 * SECOND, 10, FSHM_BUCKET, 0}; /* one a second */
static const fshm_limit sliding = {20, 60 * SECOND, 0, FSHM_SLIDING, 0};
static const fshm_limit two_permits = {2, 0, 0, FSHM_PERMITS, 0};

static fshm_decision admit(fshm_limiter *l, const uint64_t *costs, uint64_t now, fshm_permit *p) {
  fshm_decision d;
  uint32_t in_flight;
  fshm_admit(l, "k", 1, costs, now, p, &d, &in_flight);
  CHECK_EQ(p->held, d.status == FSHM_ALLOWED);
  return d;
}

static pair_t *all_slots(const fshm_segment *s) {
  pair_t *copy = calloc(s->slot_count, sizeof *copy);
  for (uint64_t i = 0; i < s->slot_count; i++) copy[i] = pair_load(&s->slots[i]);
  return copy;
}

static bool slots_are(const fshm_segment *s, pair_t *copy) {
  pair_t *now = all_slots(s);
  bool same = !memcmp(now, copy, s->slot_count * sizeof *now);
  free(now);
  free(copy);
  return same;
}

/* If a rate limit or the permits deny, no bit of any slot changes. */
static void test_all_or_nothing(void) {
  fshm_segment *s = fresh_segment(100);
  const fshm_limit limits[4] = {bucket, window, sliding, two_permits};
  fshm_limiter *l = fresh_limiter(s, "a", limits, 4);
  fshm_permit p[2], none;
  for (int i = 0; i < 2; i++) CHECK_EQ(admit(l, NULL, NOW, &p[i]).status, FSHM_ALLOWED);
  pair_t *before = all_slots(s);
  fshm_decision d = admit(l, NULL, NOW, &none);
  CHECK_EQ(d.status, FSHM_DENIED);
  CHECK_EQ(d.limit_index, 3);
  CHECK_EQ(d.retry_after_ns, 0); /* not known */
  CHECK(slots_are(s, before));
  CHECK_EQ(fshm_permit_release(l, &p[0]), 1);
  for (uint32_t which = 0; which < 3; which++) {
    uint64_t costs[FSHM_MAX_LIMITS] = {1, 1, 1, 1};
    costs[which] = limits[which].n - 1; /* two are used */
    before = all_slots(s);
    d = admit(l, costs, NOW, &none);
    CHECK_EQ(d.status, FSHM_DENIED);
    CHECK_EQ(d.limit_index, which);
    CHECK_OP(d.retry_after_ns, >, 0);
    CHECK(slots_are(s, before));
    CHECK_EQ(fshm_in_flight(l, "k", 1), 1);
  }
  CHECK_EQ(apply_at(l, FSHM_ACQUIRE, "k", 1, NOW).status,
           FSHM_ALLOWED); /* the rate limits, no permit */
  CHECK_EQ(fshm_in_flight(l, "k", 1), 1);
  fshm_limiter_close(l);
  fshm_close(s);
}

static uint64_t left_of(fshm_limiter *l, uint32_t i, uint64_t now) {
  uint64_t left[FSHM_MAX_LIMITS];
  CHECK_OP(fshm_remaining(l, "k", 1, now, left), >, i);
  return left[i];
}

/* The actual costs instead of those that were charged; once the charge no longer counts, nothing. */
static void test_settle(void) {
  const fshm_limit kinds[3] = {bucket, window, sliding};
  for (int kind = 0; kind < 3; kind++) {
    fshm_segment *s = fresh_segment(100);
    const fshm_limit limits[2] = {kinds[kind], two_permits};
    fshm_limiter *l = fresh_limiter(s, "a", limits, 2);
    const uint64_t n = limits[0].n, now = NOW / limits[0].per_ns * limits[0].per_ns;
    const uint64_t charged[4] = {3, 0, 0, 0}, less[4] = {1, 0, 0, 0}, more[4] = {4, 0, 0, 0};
    const uint64_t debt[4] = {3 + n, 0, 0, 0};
    fshm_permit p;
    CHECK_EQ(admit(l, charged, now, &p).status, FSHM_ALLOWED);
    CHECK_EQ(left_of(l, 0, now), n - 3);
    CHECK_EQ(fshm_settle(l, "k", 1, charged, charged, &p, now), FSHM_ALLOWED);
    CHECK_EQ(left_of(l, 0, now), n - 3);
    CHECK_EQ(fshm_settle(l, "k", 1, charged, more, &p, now), FSHM_ALLOWED);
    CHECK_EQ(left_of(l, 0, now), n - 4);
    CHECK_EQ(fshm_settle(l, "k", 1, charged, less, &p, now), FSHM_ALLOWED);
    CHECK_EQ(left_of(l, 0, now), n - 2);
    CHECK_EQ(fshm_permit_release(l, &p), 1);
    CHECK_EQ(fshm_reset_key(l, "k", 1), FSHM_OK);

    CHECK_EQ(admit(l, charged, now, &p).status, FSHM_ALLOWED);
    uint64_t later = now + 3 * limits[0].per_ns; /* drained, faded, over: another window */
    CHECK_EQ(apply_at(l, FSHM_ACQUIRE, "k", 4, later).status, FSHM_ALLOWED);
    CHECK_EQ(fshm_settle(l, "k", 1, charged, less, &p, later), FSHM_ALLOWED);
    CHECK_EQ(left_of(l, 0, later), n - 4);
    CHECK_EQ(fshm_settle(l, "k", 1, charged, debt, &p, later), FSHM_ALLOWED);
    CHECK_EQ(left_of(l, 0, later), 0);
    CHECK_OP(apply_at(l, FSHM_PEEK, "k", 1, later).retry_after_ns, >, 0);
    fshm_limiter_close(l);
    fshm_close(s);
  }
}

static fshm_permit_info info_of(fshm_segment *s, const fshm_permit *p) {
  fshm_permit_info info;
  (void)fshm_permit_at(s, p->slot, &info);
  return info;
}

static void test_idle_mark(void) {
  fshm_segment *s = fresh_segment(100);
  fshm_limiter *l = fresh_limiter(s, "a", &two_permits, 1);
  fshm_permit p, q;
  CHECK_EQ(admit(l, NULL, 0, &p).status, FSHM_ALLOWED);
  CHECK_EQ(admit(l, NULL, 0, &q).status, FSHM_ALLOWED);
  CHECK_EQ(info_of(s, &p).pid, getpid());
  CHECK_EQ(info_of(s, &p).alive, 1);
  CHECK_EQ(info_of(s, &p).limiter, l->index);
  CHECK(info_of(s, &p).number != info_of(s, &q).number);
  for (int idle = 1; idle >= 0; idle--) {
    CHECK_EQ(fshm_permit_idle(l, &p, idle), 1);
    CHECK_EQ(info_of(s, &p).idle, idle);
    CHECK_EQ(info_of(s, &q).idle, 0);
    CHECK_EQ(fshm_in_flight(l, "k", 1), 2); /* idle or not, it is held */
  }
  CHECK_EQ(fshm_permit_idle(l, &p, 1), 1);
  CHECK_EQ(fshm_permit_release(l, &p), 1);
  CHECK_EQ(fshm_permit_idle(l, &p, 1), 0);
  fshm_permit_info info;
  CHECK_EQ(fshm_permit_at(s, p.slot, &info), 0);
  CHECK_EQ(fshm_permit_at(s, s->slot_count, &info), 0);
  CHECK_OP(fshm_unique(s), <, fshm_unique(s));
  fshm_limiter_close(l);
  fshm_close(s);
}

/* A reset forgets what was counted; it never frees a permit that is held. */
static void test_reset_leaves_permits(void) {
  fshm_segment *s = fresh_segment(100);
  const fshm_limit limits[2] = {window, two_permits};
  fshm_limiter *a = fresh_limiter(s, "a", limits, 2), *b = fresh_limiter(s, "b", limits, 2);
  fshm_permit of_a, of_b, p;
  CHECK_EQ(admit(a, NULL, 0, &of_a).status, FSHM_ALLOWED);
  CHECK_EQ(admit(b, NULL, 0, &of_b).status, FSHM_ALLOWED);
  for (int all = 0; all < 2; all++) {
    CHECK_EQ(all ? fshm_reset_all(a) : fshm_reset_key(a, "k", 1), FSHM_OK);
    CHECK_EQ(left_of(a, 0, 0), window.n);
    CHECK_EQ(left_of(b, 0, 0), window.n - 1);
    CHECK_EQ(fshm_in_flight(a, "k", 1), 1);
    CHECK_EQ(fshm_in_flight(b, "k", 1), 1);
  }
  CHECK_EQ(admit(a, NULL, 0, &p).status, FSHM_ALLOWED);
  CHECK_EQ(admit(a, NULL, 0, &p).status, FSHM_DENIED);
  CHECK_EQ(fshm_permit_release(a, &of_a), 1);
  CHECK_EQ(fshm_permit_release(b, &of_b), 1);
  fshm_limiter_close(a);
  fshm_limiter_close(b);
  fshm_close(s);
}

static void admit_key(fshm_limiter *l, const char *key, uint64_t tokens, int32_t expected,
                      uint32_t by, fshm_permit *p) {
  const uint64_t costs[FSHM_MAX_LIMITS] = {1, tokens, 1, 1};
  fshm_decision d;
  uint32_t in_flight;
  fshm_admit(l, key, strlen(key), costs, NOW, p, &d, &in_flight);
  CHECK_EQ(d.status, expected);
  if (expected == FSHM_DENIED) CHECK_EQ(d.limit_index, by);
}

/* One name, any number of different limits: each key has the numbers of the handle that asks for it. */
static void test_numbers_of_a_handle(void) {
  fshm_segment *s = fresh_segment(2000);
  const uint64_t minute = 60 * SECOND, most = WINDOW_MAX_N;
  const fshm_limit limits[3] = {{most, minute, 0, FSHM_WINDOW, 0},
                                {most, minute, 0, FSHM_WINDOW, 0},
                                {MAX_PERMITS, 0, 0, FSHM_PERMITS, 0}};
  fshm_permit p[8];
  for (uint64_t n = 1; n <= 4; n++) {
    fshm_limiter *l = fresh_limiter(s, "one", limits, 3);
    const uint64_t numbers[] = {n + 1, 100 * n, n};
    const char key[] = {'k', (char)('0' + n), 0};
    uint64_t left[FSHM_MAX_LIMITS];
    CHECK_EQ(fshm_limiter_number(l, numbers, 3), FSHM_OK);
    for (uint64_t i = 0; i < n; i++) admit_key(l, key, 10, FSHM_ALLOWED, 0, &p[i]);
    admit_key(l, key, 10, FSHM_DENIED, 2, &p[n]); /* the permits */
    CHECK_EQ(fshm_in_flight(l, key, 2), n);
    for (uint64_t i = 0; i < n; i++) CHECK_EQ(fshm_permit_release(l, &p[i]), 1);
    admit_key(l, key, 100 * n - 10 * n + 1, FSHM_DENIED, 1, &p[0]); /* the tokens */
    CHECK_EQ(fshm_remaining(l, key, 2, NOW, left), 2);
    CHECK_EQ(left[0], 1);
    CHECK_EQ(left[1], 90 * n);
    admit_key(l, key, 0, FSHM_ALLOWED, 0, &p[0]);
    CHECK_EQ(fshm_permit_release(l, &p[0]), 1);
    admit_key(l, key, 0, FSHM_DENIED, 0, &p[1]); /* the requests */
    /* Into debt, and out of it: by the key's own number, or the window would be over too soon. */
    const uint64_t charged[] = {1, 0, 1}, much[] = {1, 290 * n, 1};
    CHECK_EQ(fshm_settle(l, key, 2, charged, much, &p[0], NOW), FSHM_ALLOWED);
    (void)fshm_remaining(l, key, 2, NOW + 100 * SECOND, left);
    CHECK_EQ(left[1], 0);
    (void)fshm_remaining(l, key, 2, NOW + 240 * SECOND, left);
    CHECK_EQ(left[1], 100 * n);
    /* For people */
    const uint64_t four[FSHM_MAX_LIMITS] = {n + 1, 100 * n, n};
    uint64_t shown = 0;
    for (uint64_t slot = 0; slot < s->slot_count; slot++) {
      fshm_decision d;
      char name[8] = "";
      uint64_t length;
      if (!fshm_key_name(s, slot, name, sizeof name, &length) || memcmp(name, key, 2) != 0)
        continue;
      if (fshm_peek_numbered(s, slot, four, NOW, &d) != FSHM_OK) continue;
      CHECK_EQ(d.remaining, 0);
      shown++;
    }
    CHECK_OP(shown, >=, 1);
    fshm_limiter_close(l);
  }
  fshm_close(s);
}

static void test_numbers_that_cannot_be(void) {
  fshm_segment *s = fresh_segment(100);
  const fshm_limit limits[2] = {window, two_permits}, other[2] = {bucket, two_permits};
  const uint64_t numbers[][2] = {{5, 2}, {6, 2}, {0, 2}, {5, 3}, {5, 0}};
  fshm_limiter *l = fresh_limiter(s, "a", limits, 2), *b = fresh_limiter(s, "b", other, 2);
  for (int i = 0; i < 5; i++)
    CHECK_EQ(fshm_limiter_number(l, numbers[i], 2), i ? FSHM_E_ARGUMENT : FSHM_OK);
  CHECK_EQ(fshm_limiter_number(l, numbers[0], 1), FSHM_E_ARGUMENT);
  CHECK_EQ(fshm_limiter_number(b, numbers[0], 2), FSHM_E_ARGUMENT); /* a bucket */
  fshm_limiter_close(l);
  fshm_limiter_close(b);
  fshm_close(s);
}

int main(void) {
  test_all_or_nothing();
  test_numbers_of_a_handle();
  test_numbers_that_cannot_be();
  test_settle();
  test_idle_mark();
  test_reset_leaves_permits();
  return done();
}
