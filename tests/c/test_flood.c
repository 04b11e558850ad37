/* test_flood.c - floods of keys: what one limiter's flood leaves to others, and to the keys that were there. */
#include "../../csrc/unity.c"

#include "check.h"

#define NOW 1000000000
#define PER UINT64_C(3600000000000)

static const fshm_limit window = {3, PER, 0, FSHM_WINDOW, 0};
static const fshm_limit bucket = {3, PER, 3, FSHM_BUCKET, 0};

static const char *named(char *key, const char *what, uint64_t i) {
  (void)snprintf(key, 32, "%s %llu", what, (unsigned long long)i);
  return key;
}

static int hit(fshm_limiter *l, const char *what, uint64_t i) {
  char key[32];
  return apply_at(l, FSHM_ACQUIRE, named(key, what, i), 1, NOW).status;
}

/* Keys that no one has asked for before, as many as asked for. How many found room. */
static uint64_t flood(fshm_limiter *l, uint64_t from, uint64_t keys) {
  uint64_t admitted = 0;
  for (uint64_t i = from; i < from + keys; i++) {
    int status = hit(l, "flood", i);
    CHECK(status == FSHM_ALLOWED || status == FSHM_FULL);
    admitted += status == FSHM_ALLOWED;
  }
  return admitted;
}

/* Each key is admitted exactly as often as the limit says, less what it has used. */
static void exact(fshm_limiter *l, const char *what, uint64_t keys, int left) {
  uint64_t wrong = 0;
  for (uint64_t i = 0; i < keys; i++)
    for (int k = 0; k <= left; k++)
      wrong += hit(l, what, i) != (k < left ? FSHM_ALLOWED : FSHM_DENIED);
  CHECK_EQ(wrong, 0);
}

/* A flood on one limiter: others admit as before, to the last request, and so do keys that were there. */
static void test_others(uint64_t capacity, uint64_t keys, const fshm_limit *limit, uint64_t some) {
  fshm_segment *s = fresh_segment(capacity);
  fshm_limiter *flooded = fresh_limiter(s, "flooded", limit, 1);
  fshm_limiter *other = fresh_limiter(s, "other", limit, 1);
  for (uint64_t i = 0; i < some; i++) {
    CHECK_EQ(hit(flooded, "there", i), FSHM_ALLOWED);
    CHECK_EQ(hit(other, "there", i), FSHM_ALLOWED);
  }
  uint64_t got = flood(flooded, 0, capacity - some), more = flood(flooded, capacity, keys);
  CHECK_OP(got + some, >=, capacity - capacity / 1000); /* it has what was promised to it */
  CHECK_OP(got + more + some, <=, s->cell_count / 8 * 7);
  exact(flooded, "there", some, 2);
  exact(other, "there", some, 2);
  exact(other, "new", some, 3);
  fshm_limiter_close(flooded);
  fshm_limiter_close(other);
  fshm_close(s);
}

/* Several floods at once, on that many limiters: there is room for another one's keys yet. */
static void test_several(uint64_t capacity, uint32_t limiters) {
  fshm_segment *s = fresh_segment(capacity);
  fshm_limiter *flooded[32], *other = fresh_limiter(s, "other", &bucket, 1);
  char name[32];
  for (uint32_t i = 0; i < limiters; i++)
    flooded[i] = fresh_limiter(s, named(name, "flooded", i), &window, 1);
  for (uint64_t i = 0; i < 2 * s->cell_count; i++) (void)flood(flooded[i % limiters], i, 1);
  uint64_t full = 0;
  for (uint64_t i = 0; i < s->lines / REGION_LINES; i++) { /* whatever the keys are */
    unsigned left = 0;
    for (uint64_t k = 0; k < REGION_LINES * CELLS_PER_LINE; k++)
      left += !load_relaxed(&s->cells[i * REGION_LINES * CELLS_PER_LINE + k].who);
    CHECK_OP(left, >=, limiters < 2 ? SCARCE : 0);
    full += !left;
  }
  /* Two cannot fill a region. More of them can where one has no cell when a single one is left. */
  CHECK_OP(full, <=, limiters < 3 ? 0 : 2);
  exact(other, "new", 1, 3); /* the first of its limiter in a region: there is a place for one */
  for (uint32_t i = 0; i < limiters; i++) fshm_limiter_close(flooded[i]);
  fshm_limiter_close(other);
  fshm_close(s);
}

/* Permits of keys that were there: their slots have a share of their own. */
static void test_permits(void) {
  fshm_segment *s = fresh_segment(2000);
  const fshm_limit both[2] = {window, {2, 0, 0, FSHM_PERMITS, 0}};
  fshm_limiter *l = fresh_limiter(s, "flooded", both, 2);
  const uint64_t one[FSHM_MAX_LIMITS] = {1, 1, 1, 1};
  fshm_permit permit;
  fshm_decision d;
  uint32_t held;
  CHECK_EQ(hit(l, "there", 1), FSHM_ALLOWED);
  (void)flood(l, 0, 20000);
  for (int i = 0; i < 3; i++) {
    fshm_admit(l, "there 1", 7, one, NOW, &permit, &d, &held);
    CHECK_EQ(d.status, i < 2 ? FSHM_ALLOWED : FSHM_DENIED);
    if (d.status == FSHM_ALLOWED) CHECK_EQ(fshm_permit_release(l, &permit), 1);
  }
  fshm_limiter_close(l);
  fshm_close(s);
}

int main(void) {
  test_permits();
  test_others(1000, 20000, &window, 10);
  test_others(200000, 1000000, &bucket, 1000);
  for (uint32_t i = 1; i <= 4; i++) test_several(2000, i);
  return done();
}
