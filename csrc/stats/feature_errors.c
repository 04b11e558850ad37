/* feature_errors.c - counts of the errors of each feature on the host. The caller defines what a feature is and how
 * many errors are too many. One word each: a kill leaves an error counted or not. */
#include "../core/internal.h"

/* Count an error. Returns the number of errors; 0: there is no such feature, or the segment is read-only. */
uint64_t fshm_feature_error(fshm_segment *s, uint32_t feature) {
  if (feature >= FEATURES || s->read_only) return 0;
  return add_relaxed(&s->header->feature_errors[feature], 1) + 1;
}

uint64_t fshm_feature_errors(fshm_segment *s, uint32_t feature) {
  return feature < FEATURES ? load_relaxed(&s->header->feature_errors[feature]) : 0;
}

/* For readers that cannot afford a call: an aligned word is read whole. */
const uint64_t *fshm_feature_words(fshm_segment *s) {
  return (const uint64_t *)(uintptr_t)s->header->feature_errors;
}

void fshm_feature_reset(fshm_segment *s, uint32_t feature) {
  if (feature < FEATURES && !s->read_only) store_relaxed(&s->header->feature_errors[feature], 0);
}
