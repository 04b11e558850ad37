/* holds_learned.c - what must hold of calls that overwrite a state: what the server reported of a key's limits,
 * what was refused of late, and that a feature's errors are forgotten. Each limit's is as before or as after it,
 * in order, and the next process can store what it knows. */
#include "crash.h"

/* Of each limit: tokens used, or the least cost that was refused; and for how long, ns. */
typedef struct {
  uint64_t tokens[FSHM_MAX_LIMITS], left_ns[FSHM_MAX_LIMITS];
} known_of_key_t;

static known_of_key_t known_before, known_after;

static known_of_key_t known_at(uint64_t now) {
  known_of_key_t out = {{0}, {0}};
  if (op->op == FEATURE_RESET)
    out.tokens[0] = fshm_feature_errors(world.s, FEATURE);
  else if (op->op == LEARN)
    (void)fshm_known(world.l, KEY, strlen(KEY), now, out.tokens, out.left_ns);
  else
    (void)fshm_token_lease_look(world.l, KEY, strlen(KEY), 0, now, out.tokens, out.left_ns);
  return out;
}

static void start_told(void) {
  if (op->limits[0].kind == FSHM_LEASE)
    start_token_lease();
  else
    start_rate_limits();
  for (uint32_t i = 0; op->op == FEATURE_RESET && i < op->before; i++)
    (void)fshm_feature_error(world.s, FEATURE);
}

static bool same_known(const known_of_key_t *a, const known_of_key_t *b) {
  return !memcmp(a, b, sizeof *a);
}

static void expect_after(const char *who) {
  const known_of_key_t is = known_at(world.now);
  if (!same_known(&is, &known_after))
    broken("after %s, %llu for %llu ns", who, (unsigned long long)is.tokens[0],
           (unsigned long long)is.left_ns[0]);
}

/* Before or after, in order. */
static void expect_known(void) {
  const known_of_key_t is = known_at(world.now);
  bool changed = true; /* all limits up to here */
  for (uint32_t i = 0; i < FSHM_MAX_LIMITS; i++) {
    bool before =
        is.tokens[i] == known_before.tokens[i] && is.left_ns[i] == known_before.left_ns[i];
    bool after = is.tokens[i] == known_after.tokens[i] && is.left_ns[i] == known_after.left_ns[i];
    if ((!before && !after) || (after && !before && !changed))
      broken("limit %u: %llu for %llu ns", i, (unsigned long long)is.tokens[i],
             (unsigned long long)is.left_ns[i]);
    changed &= after;
  }
}

/* It means what it says: what was refused is denied, and what is less, asked for. */
static void expect_refused(void) {
  if (op->op != REFUSE) return;
  const uint64_t hash = fshm_siphash(world.l->key[0], world.l->key[1], KEY, strlen(KEY));
  for (uint64_t cost = 1; cost < 5; cost++) {
    const uint64_t costs[FSHM_MAX_LIMITS] = {cost};
    bool refused = token_lease_refused_ns(world.l, hash, costs, world.now);
    if (refused != (op->cost && cost >= op->cost))
      broken("a cost of %llu is%s refused", (unsigned long long)cost, refused ? "" : " not");
  }
}

static void told_begin(void) {
  static unsigned char *saved;
  segment_save(&saved);
  known_before = known_at(world.now);
  segment_restore(saved); /* who looks leaves the key's name where it was not known */
  if (known_before.tokens[0] != op->before)
    broken("before it, %llu", (unsigned long long)known_before.tokens[0]);
}

static void told_end(void) {
  if (told->status != op->status) broken("it answers %d, not %d", told->status, op->status);
  known_after = known_at(world.now);
  if (known_after.tokens[0] != op->after)
    broken("after it, %llu", (unsigned long long)known_after.tokens[0]);
  expect_refused();
}

static void told_again(void) {
  outcome_t mine = {0};
  op->run(&mine);
  if (mine.status != op->status) broken("S is answered %d, not %d", mine.status, op->status);
  expect_after("S");
  expect_refused();
}

static void told_contend(void) {
  expect_known();
  told_again();
}

static void told_survive(void) {
  expect_known();
  if (told->done && told->status != op->status)
    broken("T says %d, not %d", told->status, op->status);
  if (told->done) expect_after("T, as it says");
  told_again();
  check_invariants(true);
  if (op->op == FEATURE_RESET) return;
  position.later = true;
  const known_of_key_t later = known_at(LATER), nothing = {{0}, {0}};
  if (!same_known(&later, &nothing)) broken("it is over, and still known");
}

static void told_raced(const outcome_t *mine) {
  if (told->status != op->status || mine->status != op->status)
    broken("T and S are answered %d and %d", told->status, mine->status);
  expect_after("both");
  check_invariants(false);
}

static const holds_t telling = {told_begin, told_end, told_contend, told_survive, told_raced, NULL};
