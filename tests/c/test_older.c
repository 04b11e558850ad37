/* test_older.c - a process reads the clock, is stopped for up to 10 s, and goes on: a sliding window that has gone on
 * meanwhile forgets nothing.
 *
 * Nothing in the library is changed: reading the clock is wrapped where it is declared. The first reading of a call
 * may be old, as if the call had been stopped after it; those after it are not. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <stdbool.h>
#include <stdint.h>
#define segment_now library_segment_now
#include "../../csrc/core/internal.h"
#undef segment_now

static uint64_t clock_now, stopped_for;

static inline uint64_t segment_now(const fshm_segment *s) {
  (void)s;
  uint64_t now = clock_now - stopped_for;
  stopped_for = 0;
  return now;
}

#include "../../csrc/unity.c"

#include "check.h"

#define SECOND UINT64_C(1000000000)
static const char key[] = "key";
#define KEY key, sizeof key - 1

static uint64_t only_state(fshm_segment *s, uint64_t tag) {
  uint64_t found = 0;
  for (uint64_t i = 0; i < s->slot_count; i++)
    if (s->slots[i].who && TAG(s->slots[i].when) == tag) found = s->slots[i].when;
  return found;
}

static uint64_t count_of(uint64_t state) {
  return state & ((UINT64_C(1) << (((state >> 57) & 31) - 2)) - 1);
}

enum { ALONE, BESIDE_A_BUCKET, COUNTED, CHARGED, WAYS };

static int hit(fshm_limiter *l, const fshm_limit *limit, unsigned how) {
  fshm_counted counted;
  fshm_decision d;
  if (how == COUNTED) {
    fshm_count(l, KEY, limit, 1, 0, &counted);
    return counted.status;
  }
  fshm_apply(l, how == CHARGED ? FSHM_CHARGE : FSHM_ACQUIRE, KEY, NULL, 0, 0, &d);
  return d.status;
}

static uint64_t late; /* admitted with a reading from before the window that it counts in */

static void test_stopped(unsigned how, uint64_t per) {
  fshm_segment *s = fresh_segment(10);
  const fshm_limit sliding = {20, per, 0, FSHM_SLIDING, 0};
  const fshm_limit both[] = {{1000000, SECOND, 1000000, FSHM_BUCKET, 0}, sliding};
  fshm_limiter *l = how == BESIDE_A_BUCKET ? fresh_limiter(s, "two", both, 2)
                                           : fresh_limiter(s, "one", &sliding, 1);
  uint64_t before = 0;
  clock_now = 100 * SECOND;
  for (int i = 0; i < fewer(20000); i++) {
    clock_now += random_below(per / 8);
    stopped_for = random_below(3) ? 0 : random_scaled(1, 10 * SECOND);
    uint64_t was_stopped = stopped_for;
    if (state_expires(before) <= clock_now - stopped_for) before = 0;
    if (hit(l, &sliding, how) != FSHM_ALLOWED) continue;
    uint64_t state = only_state(s, FSHM_SLIDING);
    CHECK_OP(state_expires(state), >=, state_expires(before));
    if (state_expires(state) == state_expires(before)) {
      CHECK_EQ(count_of(state), count_of(before) + 1);
      late += was_stopped > per;
    }
    before = state;
  }
  fshm_limiter_close(l);
  fshm_close(s);
}

int main(void) {
  for (unsigned how = 0; how < WAYS; how++) {
    test_stopped(how, SECOND);
    test_stopped(how, 3 * SECOND + 12345);
    test_stopped(how, SECOND / 10);
    CHECK_OP(late, >, 0);
    late = 0;
  }
  return done();
}
