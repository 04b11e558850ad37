/* question.c - a question about a key's tokens, for the server that grants them, and what its answer changes here. Each
 * is some calls of this library in one, for the caller's sake: the steps are theirs, in the order in which
 * fast_litellm_shm/cluster/token_lease.py makes them for limits that need more than this.
 */
#include "../core/internal.h"

/* Of a limit, in a question and in an answer; and before those in an answer: algorithms.lua. */
#define NUMBERS 6
#define ANSWERED 7
#define HEAD 6
#define LARGEST_WHOLE ((UINT64_C(1) << 53) - 1)

int fshm_question_begin(const fshm_asked *a, const void *key, uint64_t length,
                        const uint64_t *costs, int ahead, fshm_question *q) {
  uint64_t have[FSHM_MAX_LIMITS], used[FSHM_MAX_LIMITS], left[FSHM_MAX_LIMITS], ns[FSHM_MAX_LIMITS];
  fshm_decision decision;
  uint32_t held, i = 0;
  if (ahead) {
    (void)fshm_token_lease_look(a->leases, key, length, 0, 0, have, ns);
    while (i < a->count && costs[i] <= have[i]) i++;
    if (i == a->count) return FSHM_DENIED;
    (void)fshm_token_lease_look(a->refused, key, length, 0, 0, have, ns);
    if (ns[0]) return FSHM_DENIED;
  }
  fshm_admit(a->asking, key, length, NULL, 0, &q->permit, &decision, &held);
  if (decision.status != FSHM_ALLOWED) return decision.status;
  (void)fshm_known(a->limits, key, length, 0, used, left);
  (void)fshm_token_lease_look(a->leases, key, length, !ahead, 0, have, ns);
  q->sent_ns = fshm_now(a->limits->segment);
  double *of = q->numbers;
  for (i = 0; i < a->count; i++, of += NUMBERS) {
    of[0] = (double)costs[i];
    of[1] = ahead ? (double)have[i] : 0;
    of[2] = ahead ? 0 : (double)have[i];
    of[3] = (double)used[i];
    of[4] = 0;
    const uint64_t rest = min_u64(a->buckets >> i & 1 ? left[i] : left[i] / 1000, LARGEST_WHOLE);
    of[5] = (double)rest;
  }
  return FSHM_ALLOWED;
}

static uint64_t whole(double x) {
  return x > 0 ? (uint64_t)(x < (double)LARGEST_WHOLE ? x : (double)LARGEST_WHOLE) : 0;
}

int fshm_question_end(const fshm_asked *a, const void *key, uint64_t length, const uint64_t *costs,
                      const fshm_question *q, const double *answer, fshm_decision *out) {
  uint64_t used[FSHM_MAX_LIMITS] = {0}, left[FSHM_MAX_LIMITS] = {0}, ns[FSHM_MAX_LIMITS];
  fshm_token_lease batch[FSHM_MAX_LIMITS] = {{0, 0, 0}};
  const double *of = answer + HEAD;
  uint32_t i, low;
  for (i = 0; i < a->count; i++, of += ANSWERED) {
    used[i] = whole(of[0]);
    left[i] = a->buckets >> i & 1 ? whole(of[1]) : whole(of[1]) * 1000; /* a bucket's are ns */
    batch[i].tokens = whole(answer[1]) * costs[i];
    batch[i].kept = of[3] > 0 ? whole(q->numbers[NUMBERS * i + 1]) : 0;
    batch[i].until_ns = q->sent_ns + whole(of[2]) * 1000;
  }
  (void)fshm_learn(a->limits, key, length, used, left, q->sent_ns);
  int status = fshm_token_lease_put(a->leases, key, length, batch, 0);
  if (!out) return status;
  memset(out, 0, sizeof *out);
  out->status = answer[0] > 0 ? FSHM_ALLOWED : FSHM_DENIED;
  /* for the statistics of the key: these tokens were granted, not spent from a lease */
  const uint64_t none[FSHM_MAX_LIMITS] = {0};
  if (out->status == FSHM_ALLOWED)
    (void)fshm_spend(a->leases, a->refused, a->limits, key, length, none, 0, NULL, &low);
  uint64_t have[FSHM_MAX_LIMITS], here;
  (void)fshm_token_lease_look(a->leases, key, length, 0, 0, have, ns);
  out->remaining = UINT64_MAX;
  for (i = 0; i < a->count; i++) {
    here = (used[i] < a->most[i] ? a->most[i] - used[i] : 0) + have[i];
    if (here < out->remaining) {
      out->remaining = here;
      out->limit_index = (uint16_t)i;
    }
    if (left[i] > (uint64_t)out->reset_after_ns) out->reset_after_ns = (int64_t)left[i];
  }
  if (out->status == FSHM_DENIED) {
    out->limit_index = (uint16_t)whole(answer[4]);
    out->retry_after_ns = answer[2] < 0 ? FSHM_NEVER : (int64_t)whole(answer[2]) * 1000;
  }
  return status;
}

void fshm_question_drop(fshm_limiter *asking, fshm_question *q) {
  (void)fshm_permit_release(asking, &q->permit);
}
