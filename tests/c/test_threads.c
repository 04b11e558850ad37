/* test_threads.c - all calls of fast_shm.h by several threads of one process on one mapping, for the thread
 * sanitizer (make tsan); what must hold of the answers is checked with or without it.
 *
 *   test_threads [rounds [threads [seed]]]
 */
#include "../../csrc/unity.c"

#include "check.h"

#include <glob.h>

#define MOST_THREADS 16
#define HOUR UINT64_C(3600000000000)
#define FIXED_BURST 3000 /* admitted once, and never again within the test */
#define PERMITS 3 /* of each key */
#define MOVING 20 /* the same, of a moving window */
#define KEYS 4 /* of the limiters that all threads share */

static void check_known(int status) {
  if (status == FSHM_FULL) return;
  CHECK_OP(status, >=, FSHM_DENIED);
  CHECK_OP(status, <=, FSHM_ALLOWED);
}

#include "threads_budgets.h"
#include "threads_grants.h"
#include "threads_learned.h"
#include "threads_plans.h"
#include "threads_statistics.h"

typedef struct {
  fshm_segment *s, *tiny;
  grants_t grants;
  budgets_t budgets;
  statistics_t statistics;
  plans_of_threads_t plans;
  learners_t learned;
  fshm_limiter *fixed, *several, *places, *changing, *brief, *forced, *counted;
  const char *name, *churned;
  uint64_t rounds, seed;
  uint64_t began; /* segment time */
  _Atomic uint64_t admitted; /* by `fixed` */
  _Atomic uint64_t moved; /* into the moving window of `counted` that lasts */
  _Atomic int64_t holders[KEYS]; /* of `places` */
  _Atomic int removing;
} scene_t;

typedef struct {
  scene_t *scene;
  uint64_t number;
} worker_t;

static const char *const keys[KEYS] = {"a", "b", "c", "a longer key, of more than a word"};

static const fshm_limit fixed_limits[] = {{FIXED_BURST, 4000 * HOUR, FIXED_BURST, FSHM_BUCKET, 0}};
static const fshm_limit several_limits[] = {{1000, 100000000, 100, FSHM_BUCKET, 0},
                                            {500, 50000000, 0, FSHM_WINDOW, 0},
                                            {100, 20000000, 0, FSHM_SLIDING, 0}};
static const fshm_limit places_limits[] = {{100000, 100000000, 100000, FSHM_BUCKET, 0},
                                           {PERMITS, 0, 0, FSHM_PERMITS, 0}};
static const fshm_limit brief_limits[] = {{1, 20000, 1, FSHM_BUCKET, 0}};
static const fshm_limit forced_limits[] = {{2, 0, 0, FSHM_PERMITS, 0}};
static const fshm_limit changing_limits[][2] = {
    {{1000, 1000000000, 1000, FSHM_BUCKET, 0}, {2, 0, 0, FSHM_PERMITS, 0}},
    {{70, 3000000, 7, FSHM_BUCKET, 1}, {1, 0, 0, FSHM_PERMITS, 0}},
    {{50, 1000000, 0, FSHM_SLIDING, 0}, {3, 0, 0, FSHM_PERMITS, 0}},
    {{1000, 1000000000, 1000, FSHM_BUCKET, 0}, {50, 1000000, 0, FSHM_WINDOW, 0}}};

static const char *any_key(void) { return keys[random_below(KEYS)]; }

/* One limit, charged and never given back: the sum is checked at the end. */
static void admit_fixed(scene_t *scene) {
  if (random_below(2)) {
    int status = fshm_is_allowed(scene->fixed, "k", 1);
    CHECK(status == FSHM_ALLOWED || status == FSHM_DENIED);
    if (status == FSHM_ALLOWED) atomic_fetch_add(&scene->admitted, 1);
  } else {
    uint64_t cost = 1 + random_below(3);
    fshm_decision d = apply_at(scene->fixed, FSHM_ACQUIRE, "k", cost, 0);
    CHECK(d.status == FSHM_ALLOWED || d.status == FSHM_DENIED);
    if (d.status == FSHM_ALLOWED) atomic_fetch_add(&scene->admitted, cost);
  }
}

/* Several limits: every operation, and reservations that are cancelled. */
static void apply_several(scene_t *scene) {
  const char *key = any_key();
  uint64_t length = strlen(key), remaining[FSHM_MAX_LIMITS];
  fshm_charged reserved[FSHM_MAX_LIMITS];
  const uint64_t costs[FSHM_MAX_LIMITS] = {1, random_below(3), 2, 1};
  fshm_decision d;
  for (uint32_t op = FSHM_ACQUIRE; op <= FSHM_BLOCK; op++) {
    fshm_apply(scene->several, op, key, length, costs, 1000, 0, &d);
    check_known(d.status);
  }
  memset(reserved, 0, sizeof reserved);
  fshm_reserve(scene->several, key, length, costs, 0, 0, &d, reserved);
  check_known(d.status);
  if (d.status == FSHM_ALLOWED)
    CHECK_OP(fshm_cancel(scene->several, key, length, costs, reserved, 0), <=, 3);
  CHECK_EQ(fshm_remaining(scene->several, key, length, 0, remaining), 3);
  for (int i = 0; i < 3; i++) CHECK_OP(remaining[i], <=, several_limits[i].n);
}

static void reset(scene_t *scene) {
  const char *key = any_key();
  CHECK_EQ(fshm_reset_key(scene->several, key, strlen(key)), FSHM_OK);
  if (!random_below(20)) CHECK_EQ(fshm_reset_all(scene->several), FSHM_OK);
}

/* Never more than PERMITS hold one key's permit. */
static void hold_place(scene_t *scene) {
  uint64_t k = random_below(KEYS), length = strlen(keys[k]);
  const uint64_t charged[] = {5, 0, 0, 0}, actual[] = {random_below(10), 0, 0, 0};
  fshm_permit permit;
  fshm_decision d;
  uint32_t in_flight;
  fshm_admit(scene->places, keys[k], length, charged, 0, &permit, &d, &in_flight);
  CHECK(d.status == FSHM_ALLOWED || d.status == FSHM_DENIED);
  CHECK_EQ(permit.held, d.status == FSHM_ALLOWED);
  if (d.status != FSHM_ALLOWED) return;
  CHECK_OP(atomic_fetch_add(&scene->holders[k], 1), <, PERMITS);
  CHECK_EQ(fshm_permit_held(scene->places, &permit), 1);
  CHECK_EQ(fshm_permit_idle(scene->places, &permit, 1), 1);
  CHECK_OP(fshm_in_flight(scene->places, keys[k], length), <=, PERMITS);
  CHECK_EQ(fshm_reap(scene->s, 0), 0); /* no process has died */
  CHECK_EQ(fshm_permit_idle(scene->places, &permit, 0), 1);
  CHECK_EQ(fshm_settle(scene->places, keys[k], length, charged, actual, &permit, 0), FSHM_OK);
  (void)atomic_fetch_sub(&scene->holders[k], 1);
  CHECK_EQ(fshm_permit_release(scene->places, &permit), 1);
  CHECK_EQ(fshm_permit_release(scene->places, &permit), 0);
}

/* Limits that change under those who use them, by handles of their own. */
static void change_limits(scene_t *scene) {
  const char *key = any_key();
  uint64_t length = strlen(key), version;
  fshm_limit now[FSHM_MAX_LIMITS];
  fshm_limiter *mine;
  fshm_permit permit;
  fshm_decision d;
  uint32_t in_flight;
  const fshm_limit *to = changing_limits[random_below(4)];
  int status = random_below(2) ? fshm_limiter_open(scene->s, "changing", 8, to, 2, &mine)
                               : fshm_limiter_open_at(scene->s, "changing", 8, to, 2, 0, &mine);
  CHECK(status == FSHM_OK || status == FSHM_CONTENDED); /* others are changing it right now */
  if (status != FSHM_OK) return;
  for (int i = 0; i < 5; i++) {
    fshm_admit(random_below(2) ? mine : scene->changing, key, length, NULL, 0, &permit, &d,
               &in_flight);
    check_known(d.status);
    if (permit.held) CHECK_EQ(fshm_permit_release(mine, &permit), 1);
  }
  CHECK_EQ(fshm_limiter_limits(mine, now, &version), 2);
  fshm_limiter_close(mine);
  CHECK_EQ(fshm_limiter_find(scene->s, "changing", 8, &mine), FSHM_OK);
  fshm_limiter_close(mine);
}

/* More keys than slots, each forgotten after 20 us: slots are claimed and reused all the time. */
static void reuse_slots(scene_t *scene) {
  for (int i = 0; i < 8; i++) {
    uint64_t key = random_below(40);
    check_known(fshm_is_allowed(scene->brief, &key, sizeof key));
  }
}

/* Permits that others take back by force. */
static void take_by_force(scene_t *scene) {
  fshm_permit permit;
  fshm_decision d;
  uint32_t in_flight;
  fshm_admit(scene->forced, "k", 1, NULL, 0, &permit, &d, &in_flight);
  check_known(d.status);
  if (!random_below(4)) (void)fshm_reap(scene->tiny, (uint32_t)getpid());
  if (permit.held) (void)fshm_permit_release(scene->forced, &permit); /* may be gone by now */
}

static void look_at_queue(scene_t *scene, const char *key, uint64_t length, fshm_place *p) {
  fshm_limiter *l = scene->places;
  const uint64_t tenant = random_below(3);
  fshm_waiter_info infos[2];
  fshm_turn turn;
  CHECK_OP(fshm_wait_ahead(l, p, p->since, 0), <=, 1000);
  fshm_wait_count(l, p, 1);
  fshm_wait_ask(l, key, length, 0, p);
  CHECK_OP((unsigned)fshm_wait_asked(l, key, length), <=, 1);
  CHECK_OP((unsigned)fshm_wait_next(l, key, length), <=, FSHM_NEXT_OTHER);
  CHECK_OP(fshm_wait_first(l, key, length), >, 0);
  CHECK_EQ(fshm_is_waited_for(l, key, length), 1); /* it stands there itself */
  fshm_waiting(l, key, length, random_below(2) ? &tenant : NULL, 0, &turn);
  CHECK_OP(turn.callers, <=, 1000);
  fshm_wait_wake(l, key, length);
  CHECK_OP((unsigned)fshm_wait_watch(scene->s, 0), <=, 1);
  CHECK_OP((unsigned)fshm_waiter_at(scene->s, p->entry, infos), <=, 1);
  CHECK_OP(fshm_waiters(scene->s, infos, 2, 0), <=, WAITERS);
}

static void stand_in_the_queue(scene_t *scene) {
  const char *key = any_key();
  uint64_t length = strlen(key);
  const fshm_waiter w = {.tenant = random_below(3), .priority = (int32_t)random_below(3), .fd = -1};
  fshm_place p;
  fshm_turn turn;
  CHECK_EQ(fshm_wait_join(scene->places, key, length, &w, 0, &p), 1);
  for (uint64_t tries = random_below(4); tries--;) {
    int first = fshm_wait_turn(scene->places, &p, 0, &turn);
    CHECK_EQ(first, turn.ahead == 0);
    if (first) fshm_wait_served(scene->places, &p, random_below(100), 0);
    if (first) fshm_wait_correct(scene->places, &p, (int64_t)random_below(100) - 50, 0);
    if (random_below(2)) fshm_wait_requeue(scene->places, &p, fshm_now(scene->s), 2, 0);
    int woken = fshm_wait_sleep(scene->places, &p, turn.armed, 20000);
    CHECK(woken == 0 || woken == 1);
    look_at_queue(scene, key, length, &p);
  }
  fshm_wait_leave(scene->places, &p);
}

/* Of one slot, as `fast-shm inspect` reads those of all. */
static void look_at_counts(const fshm_segment *s, uint64_t slot) {
  uint64_t *numbers = calloc(3 * s->slot_count, sizeof *numbers);
  uint32_t *meta = calloc(s->slot_count, sizeof *meta);
  uint64_t *who = numbers, *admitted = who + s->slot_count, *denied = admitted + s->slot_count;
  static const uint8_t wanted[FSHM_KEY_OWNERS] = {1, 1};
  int64_t place;
  uint16_t limiter;
  fshm_key_stats(s, slot, slot + 1, who, meta, admitted, denied);
  if (fshm_known_keys(who + slot, meta + slot, 1, wanted, &place, &limiter)) CHECK_EQ(place, 0);
  free(numbers);
  free(meta);
}

static void inspect(scene_t *scene) {
  fshm_segment *s = random_below(2) ? scene->s : scene->tiny;
  uint64_t slot = random_below(s->slot_count), length, largest;
  uint8_t *live = malloc(s->slot_count);
  char text[256];
  fshm_limiter_info limiter;
  fshm_process_info process;
  fshm_permit_info permit;
  fshm_decision d;
  fshm_geometry g;
  fshm_describe(s, &g);
  CHECK_EQ(g.slots, s->slot_count);
  CHECK_OP(fshm_live_slots(s, live, 0), <=, s->slot_count);
  free(live);
  look_at_counts(s, slot);
  CHECK_OP(fshm_key_name(s, slot, text, sizeof text, &length), >=, 0);
  const uint64_t numbers[FSHM_MAX_LIMITS] = {1, 1, 1, 1};
  CHECK_OP(fshm_peek_slot(s, slot, 0, &d), >=, 0);
  CHECK_OP(fshm_peek_numbered(s, slot, numbers, 0, &d), >=, 0);
  CHECK_OP(fshm_permit_at(s, slot, &permit), >=, 0);
  CHECK_OP(fshm_limiter_at(s, (uint32_t)random_below(4), &limiter), >=, 0);
  CHECK_EQ(fshm_process_at(s, (uint32_t)random_below(PROCESSES), &process), FSHM_OK);
  CHECK(!process.alive || process.pid == (uint32_t)getpid());
  CHECK_EQ(fshm_unlinked(s), 0);
  CHECK_EQ(fshm_limit_check(&several_limits[0], &largest), FSHM_OK);
  CHECK_EQ(fshm_path(scene->name, text, sizeof text), FSHM_OK);
  CHECK_OP(fshm_size_for(200), ==, scene->s->size);
  CHECK_OP(fshm_memory_for(200), <=, scene->s->size);
  if (s == scene->s) CHECK_OP(fshm_now(s), >=, scene->began);
  (void)fshm_unique(s);
}

/* The mapping that all share, opened once more; and one that is mapped, joined, removed and unmapped by
 * the thread that comes first or last. */
static void open_and_close(scene_t *scene) {
  fshm_segment *s;
  fshm_limiter *l, *beside;
  fshm_error e;
  fshm_process_info process;
  uint32_t flags = random_below(2) ? FSHM_OPEN_READ_ONLY : 0;
  CHECK_EQ(fshm_open(scene->name, 0, 0600, flags, &s, &e), FSHM_OK);
  CHECK(s == scene->s);
  fshm_close(s);
  CHECK_EQ(fshm_open(scene->churned, 20, 0600, FSHM_OPEN_CREATE, &s, &e), FSHM_OK);
  if (random_below(2)) CHECK_EQ(fshm_process_at(s, 0, &process), FSHM_OK);
  CHECK_EQ(fshm_limiter_open(s, "l", 1, forced_limits, 1, &l), FSHM_OK);
  for (int i = 0; l && i < 3; i++) {
    fshm_permit permit;
    fshm_decision d;
    uint32_t in_flight;
    fshm_admit(l, "k", 1, NULL, 0, &permit, &d, &in_flight);
    /* No permit can be owned in a segment that was removed before this process joined it. */
    if (d.status != FSHM_E_LOCK_FILE || !fshm_unlinked(s)) check_known(d.status);
    if (permit.held) CHECK_EQ(fshm_permit_release(l, &permit), 1);
    fshm_count_call(l, "k", 1, FSHM_DENIED);
  }
  fshm_limiter_close(l);
  CHECK_EQ(fshm_limiter_open_beside(s, "l (beside)", 10, forced_limits, 1, &beside), FSHM_OK);
  fshm_limiter_share(beside, 1);
  const uint64_t numbers[FSHM_MAX_LIMITS] = {1, 1, 1, 1};
  const int numbered = fshm_limiter_number(beside, numbers, 1);
  CHECK(numbered == FSHM_OK || numbered == FSHM_E_ARGUMENT);
  (void)fshm_is_allowed(beside, "k", 1);
  fshm_limiter_close(beside);
  fshm_process_note(s, (uint32_t)random_below(1000));
  /* One at a time: two could remove another than they looked at, and leave that one's lock file. */
  if (!random_below(4) && !atomic_exchange(&scene->removing, 1)) {
    (void)fshm_remove(scene->churned, &e);
    atomic_store(&scene->removing, 0);
  }
  fshm_close(s);
}

/* Limits that come with the call; a moving window that is never cleared, and some that are. */
static void count_and_move(scene_t *scene) {
  const fshm_limit lasting = {MOVING, 4000 * HOUR, 0, FSHM_WINDOW, 0};
  const fshm_limit brief = {5, 20000, 0, FSHM_WINDOW, 0};
  const char *key = any_key();
  fshm_counted out;
  uint64_t cost = 1 + random_below(2);
  fshm_moving(scene->counted, "lasting", 7, &lasting, cost, 0, &out);
  check_known(out.status);
  if (out.status == FSHM_ALLOWED) atomic_fetch_add(&scene->moved, cost);
  fshm_moving(scene->counted, key, strlen(key), &brief, cost, 0, &out);
  check_known(out.status);
  fshm_moving(scene->counted, key, strlen(key), &brief, 0, 0, &out);
  CHECK_OP(out.count, <=, 5);
  if (!random_below(10)) CHECK_EQ(fshm_moving_clear(scene->counted, key, strlen(key)), FSHM_OK);
  fshm_count(scene->counted, key, strlen(key), &brief, random_below(3), 0, &out);
  check_known(out.status);
  CHECK_OP(fshm_live_keys(scene->counted, 0), <=, scene->s->slot_count);
}

static void look_at_all(scene_t *scene) {
  fshm_segment *s = random_below(2) ? scene->s : scene->tiny;
  const fshm_limit brief = {5, 20000, 0, FSHM_WINDOW, 0};
  const uint64_t slot = random_below(s->slot_count);
  uint64_t used[MAX_LIMITERS], index;
  fshm_counters counters[FSHM_COUNTERS];
  fshm_permit_info permits[2];
  fshm_budget_info budgets[2];
  fshm_decision d;
  CHECK_OP(fshm_budgets(s, 0, budgets, 2), <=, s->limiter_count + s->slot_count);
  CHECK_OP(fshm_used(s, 0, used), <=, s->slot_count);
  CHECK_OP(fshm_permits(s, permits, 2), <=, s->slot_count);
  CHECK_OP(fshm_peek_counted(s, slot, &brief, (int)random_below(2), 0, &d), >=, 0);
  fshm_counters_all(s, counters);
  CHECK_EQ(fshm_damage(s, &index), FSHM_DAMAGE_NONE);
  if (!random_below(4)) CHECK_EQ(fshm_check(s, &index), FSHM_DAMAGE_NONE);
  CHECK(fshm_directory()[0] == '/');
}

static void granted(scene_t *scene) { use_token_leases(&scene->grants, any_key()); }
static void allowed(scene_t *scene) { use_permit_leases(&scene->grants, any_key()); }
static void spends(scene_t *scene) { spend_each(&scene->budgets, scene->s, any_key()); }
static void spends_together(scene_t *scene) { spend_together(&scene->budgets); }
static void plans(scene_t *scene) { use_plans(&scene->plans, scene->s, any_key()); }
static void plans_together(scene_t *scene) { share_plans(&scene->plans); }
static void learns(scene_t *scene) { learn(&scene->learned, scene->s); }
static void passes_levels(scene_t *scene) { admit_by_levels(&scene->learned, any_key()); }
static void opens_again(scene_t *scene) { open_for_a_group(scene->s, scene->name); }
static void leads(scene_t *scene) { lead(scene->s); }
static void routes(scene_t *scene) { route(&scene->statistics, scene->s); }
static void memoizes(scene_t *scene) { memoize(scene->s, any_key()); }
static void measures(scene_t *scene) { measure(&scene->statistics, scene->s, any_key()); }

static void *work(void *with) {
  static void (*const calls[])(scene_t *) = {
      admit_fixed,   apply_several,  hold_place,     reset,
      change_limits, reuse_slots,    take_by_force,  stand_in_the_queue,
      inspect,       open_and_close, count_and_move, look_at_all,
      granted,       allowed,        leads,          routes,
      memoizes,      measures,       spends,         spends_together,
      plans,         plans_together, learns,         passes_levels,
      opens_again};
  const worker_t *me = with;
  random_state = me->scene->seed + me->number * 7919;
  for (uint64_t i = 0; i < me->scene->rounds; i++)
    calls[random_below(sizeof calls / sizeof *calls)](me->scene);
  return NULL;
}

static void run(scene_t *scene, uint64_t threads) {
  pthread_t ids[MOST_THREADS];
  worker_t workers[MOST_THREADS];
  for (uint64_t i = 0; i < threads; i++) {
    workers[i] = (worker_t){scene, i};
    if (pthread_create(&ids[i], NULL, work, &workers[i])) abort();
  }
  for (uint64_t i = 0; i < threads; i++) (void)pthread_join(ids[i], NULL);
}

static uint64_t argument(int argc, char **argv, int i, uint64_t otherwise) {
  return i < argc ? strtoull(argv[i], NULL, 10) : otherwise;
}

int main(int argc, char **argv) {
  scene_t scene = {.rounds = argument(argc, argv, 1, 2000), .seed = argument(argc, argv, 3, 1)};
  uint64_t threads = min_u64(argument(argc, argv, 2, 6), MOST_THREADS);
  printf("rounds %llu, threads %llu, seed %llu\n", (unsigned long long)scene.rounds,
         (unsigned long long)threads, (unsigned long long)scene.seed);
  scene.s = fresh_segment(200);
  scene.name = segment_names[segments_made - 1];
  scene.tiny = fresh_segment(8);
  scene.churned = fresh_name();
  scene.fixed = fresh_limiter(scene.s, "fixed", fixed_limits, 1);
  scene.several = fresh_limiter(scene.s, "several", several_limits, 3);
  scene.places = fresh_limiter(scene.s, "places", places_limits, 2);
  scene.changing = fresh_limiter(scene.s, "changing", changing_limits[0], 2);
  scene.brief = fresh_limiter(scene.tiny, "brief", brief_limits, 1);
  scene.forced = fresh_limiter(scene.tiny, "forced", forced_limits, 1);
  const fshm_limit counted = {WINDOW_MAX_N, HOUR, 0, FSHM_WINDOW, 0};
  scene.counted = fresh_limiter(scene.s, "counted", &counted, 1);
  grants_begin(&scene.grants, scene.s);
  budgets_begin(&scene.budgets, scene.s);
  plans_begin(&scene.plans, scene.s);
  learned_begin(&scene.learned, scene.s);
  statistics_begin(&scene.statistics, scene.s);
  scene.began = fshm_now(scene.s);
  run(&scene, threads);
  CHECK_OP(scene.admitted, <=,
           FIXED_BURST); /* the first token comes back after more than an hour */
  CHECK_OP(scene.moved, <=, MOVING);
  for (int k = 0; k < KEYS; k++) {
    CHECK_EQ(scene.holders[k], 0);
    CHECK_EQ(fshm_in_flight(scene.places, keys[k], strlen(keys[k])), 0);
  }
  grants_end(&scene.grants);
  budgets_end(&scene.budgets);
  plans_end(&scene.plans);
  learned_end(&scene.learned);
  statistics_end(&scene.statistics, scene.s);
  fshm_limiter *all[] = {scene.fixed, scene.several, scene.places, scene.changing,
                         scene.brief, scene.forced,  scene.counted};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) fshm_limiter_close(all[i]);
  fshm_close(scene.tiny);
  fshm_close(scene.s);
  char pattern[512]; /* a lock file of a segment that was removed meanwhile */
  glob_t left;
  fshm_error e;
  (void)fshm_remove(scene.churned, &e);
  CHECK_EQ(fshm_path(scene.churned, pattern, 300), FSHM_OK);
  (void)strcat(pattern, "*");
  CHECK_EQ(glob(pattern, 0, NULL, &left), GLOB_NOMATCH);
  globfree(&left);
  return done();
}
