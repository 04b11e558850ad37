/* holds_names.c - what must hold of a name and its limits: the old set or the new one, whole; and the
 * next process can set them, as often as it likes. */
#include "crash.h"

#define NAME "names"

static bool same_limits(const fshm_limit *a, const fshm_limit *b, uint32_t count) {
  for (uint32_t i = 0; i < count; i++)
    if (a[i].n != b[i].n || a[i].kind != b[i].kind || a[i].strict != b[i].strict ||
        (a[i].kind != FSHM_PERMITS && a[i].per_ns != b[i].per_ns) ||
        (a[i].kind == FSHM_BUCKET && a[i].burst != b[i].burst))
      return false;
  return true;
}

/* Which limits the name has: 0 = none, 1 = the old, 2 = the new, -1 = others. */
static int limits_of_name(void) {
  fshm_limiter *l;
  fshm_limit limits[FSHM_MAX_LIMITS];
  uint64_t version;
  int status = fshm_limiter_find(world.s, NAME, strlen(NAME), &l);
  if (status == FSHM_E_NOT_FOUND) return 0;
  if (status != FSHM_OK) return -1;
  uint32_t count = (uint32_t)fshm_limiter_limits(l, limits, &version);
  fshm_limiter_close(l);
  if (count && count == op->next_count && same_limits(limits, op->next, count)) return 2;
  if (count && count == op->count && same_limits(limits, op->limits, count)) return 1;
  return -1;
}

static int set_limits(const fshm_limit *limits, uint32_t count) {
  fshm_limiter *l;
  int status = fshm_limiter_open_at(world.s, NAME, strlen(NAME), limits, count, world.now, &l);
  if (status == FSHM_OK) fshm_limiter_close(l);
  return status;
}

/* As fshm_limiter_open_at() does it, without the handle: the heap is not put back. */
static void publish_limits(outcome_t *out, const fshm_limit *limits, uint32_t count) {
  rule_t rules[FSHM_MAX_LIMITS];
  for (uint32_t i = 0; i < count; i++) rules[i] = rule_make(&limits[i]);
  out->status = publish(world.s, world.l->index, rules, count, world.now);
}
static void run_publish(outcome_t *out) { publish_limits(out, op->next, op->next_count); }

static void names_end(void) {
  if (told->status != op->status) broken("it answers %d, not %d", told->status, op->status);
  if (limits_of_name() != 2) broken("the limits are not the new ones");
}

static void check_known(void) {
  int which = limits_of_name();
  if (which < 0) broken("the limits are neither the old nor the new");
  if (!which && op->count) broken("the limits are gone");
  if (told->done && (told->status != op->status || which != 2))
    broken("T says %d, and the limits are not the new ones", told->status);
}

static void names_contend(void) {
  outcome_t mine = {0};
  check_known();
  op->run(&mine);
  if (mine.status != op->status) broken("S is answered %d, not %d", mine.status, op->status);
  if (limits_of_name() != 2) broken("S has set limits, and they are not there");
}

/* What the key had consumed stays consumed. */
static void check_consumed(const fshm_limit *limits) {
  fshm_limiter *l;
  uint64_t remaining[FSHM_MAX_LIMITS];
  if (!op->prior || fshm_limiter_find(world.s, NAME, strlen(NAME), &l) != FSHM_OK) return;
  if (fshm_remaining(l, KEY, strlen(KEY), NOW, remaining) < 1 ||
      remaining[0] != limits[0].n - op->prior)
    broken("%llu are left of %llu", (unsigned long long)remaining[0],
           (unsigned long long)limits[0].n);
  fshm_limiter_close(l);
}

static void names_survive(void) {
  fshm_limiter_info info;
  check_known();
  if (set_limits(op->next, op->next_count) != FSHM_OK) broken("S cannot set the limits");
  bool found = false;
  for (uint32_t i = 0; i < world.s->limiter_count; i++)
    found |= fshm_limiter_at(world.s, i, &info) == FSHM_OK && info.name_length == strlen(NAME) &&
             !memcmp(info.name, NAME, strlen(NAME));
  if (!found) broken("the name is not in the list");
  check_consumed(op->next);
  /* More often than there are slots for rules: what T has left there does not stay taken. */
  for (unsigned i = 0; i < 2 * RULES; i++) {
    const fshm_limit other = {77 + i, PER, 77, FSHM_WINDOW, 0};
    if (set_limits(&other, 1) != FSHM_OK) broken("S cannot change the limits");
    if (set_limits(op->next, op->next_count) != FSHM_OK || limits_of_name() != 2)
      broken("S cannot change the limits back");
  }
}

static void names_raced(const outcome_t *mine) {
  if (told->status != op->status || mine->status != op->status)
    broken("T and S are answered %d and %d", told->status, mine->status);
  if (limits_of_name() != 2) broken("both have set limits, and they are not there");
  check_invariants(false);
}

static const holds_t names = {NULL, names_end, names_contend, names_survive, names_raced, NULL};
