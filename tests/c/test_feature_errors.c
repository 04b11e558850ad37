/* test_feature_errors.c - errors of features: counted exactly by several processes, and forgotten by a reset. */
#include "../../csrc/unity.c"

#include "check.h"

#define PARTIES 4
#define ERRORS 4000000 /* longer than a time slice: they must run side by side */

static const char *shared_name;

static void count_errors(int i, void *with) {
  fshm_segment *s;
  fshm_error e;
  CHECK_EQ(fshm_open(shared_name, 0, 0600, 0, &s, &e), FSHM_OK);
  meet(with, PARTIES, 1);
  for (int n = 0; n < ERRORS; n++) (void)fshm_feature_error(s, (uint32_t)(n + i) % 2);
  fshm_close(s);
}

int main(void) {
  fshm_segment *s = fresh_segment(10), *reader;
  fshm_error e;
  shared_name = segment_names[0];

  CHECK_EQ(fshm_feature_errors(s, 0), 0);
  CHECK_EQ(fshm_feature_error(s, 7), 1);
  CHECK_EQ(fshm_feature_error(s, 7), 2);
  CHECK_EQ(fshm_feature_words(s)[7], 2);
  fshm_feature_reset(s, 7);
  CHECK_EQ(fshm_feature_errors(s, 7), 0);

  const uint32_t none[] = {FEATURES, FEATURES + 1, UINT32_MAX};
  for (int i = 0; i < 3; i++) {
    CHECK_EQ(fshm_feature_error(s, none[i]), 0);
    CHECK_EQ(fshm_feature_errors(s, none[i]), 0);
    fshm_feature_reset(s, none[i]);
  }

  run_children(PARTIES, count_errors, shared_memory(sizeof(_Atomic uint64_t)));
  CHECK_EQ(fshm_feature_errors(s, 0), PARTIES / 2 * ERRORS);
  CHECK_EQ(fshm_feature_errors(s, 1), PARTIES / 2 * ERRORS);
  for (uint32_t i = 2; i < FEATURES; i++) CHECK_EQ(fshm_feature_errors(s, i), 0);

  CHECK_EQ(fshm_open(shared_name, 0, 0600, FSHM_OPEN_READ_ONLY, &reader, &e), FSHM_OK);
  CHECK_EQ(fshm_feature_errors(reader, 1),
           PARTIES / 2 * ERRORS); /* in this process: the same map */
  fshm_close(reader);
  fshm_close(s);
  CHECK_EQ(fshm_open(shared_name, 0, 0600, FSHM_OPEN_READ_ONLY, &reader, &e), FSHM_OK);
  CHECK_EQ(fshm_feature_error(reader, 0), 0);
  fshm_feature_reset(reader, 0);
  CHECK_EQ(fshm_feature_errors(reader, 0), PARTIES / 2 * ERRORS);
  fshm_close(reader);
  return done();
}
