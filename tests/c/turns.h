/* turns.h - threads that take turns: each stops before an access of the limits or of a slot, and goes on when its turn comes.
 *
 * A schedule says before which of its accesses each stops. So a race of two or three callers, of which one is stopped for
 * as long as the others like, is the same in every run, and all of them are tried within seconds. The library is the real
 * one (unity.c); its loads and swaps are wrapped where they are declared. Include this first. */
#ifndef TURNS_H
#define TURNS_H

#include <stdatomic.h>
#include <stdbool.h>

static void access_of(const volatile void *at, bool swap);

#undef atomic_load_explicit
#undef atomic_store_explicit
#undef atomic_compare_exchange_strong
#undef atomic_compare_exchange_strong_explicit
#ifdef __clang__
#define atomic_load_explicit(p, order) (access_of((p), false), __c11_atomic_load((p), (order)))
#define atomic_store_explicit(p, value, order) \
  (access_of((p), false), __c11_atomic_store((p), (value), (order)))
#define atomic_compare_exchange_strong_explicit(p, seen, next, good, bad) \
  (access_of((p), true), __c11_atomic_compare_exchange_strong((p), (seen), (next), (good), (bad)))
#else
#define atomic_load_explicit(p, order) (access_of((p), false), __atomic_load_n((p), (int)(order)))
#define atomic_store_explicit(p, value, order) \
  (access_of((p), false), __atomic_store_n((p), (value), (int)(order)))
#define atomic_compare_exchange_strong_explicit(p, seen, next, good, bad) \
  (access_of((p), true),                                                  \
   __atomic_compare_exchange_n((p), (seen), (next), 0, (int)(good), (int)(bad)))
#endif
#define atomic_compare_exchange_strong(p, seen, next)                                \
  atomic_compare_exchange_strong_explicit((p), (seen), (next), memory_order_seq_cst, \
                                          memory_order_seq_cst)

#define pair_load library_pair_load
#define pair_cas library_pair_cas
#define segment_now library_segment_now
#include "core/internal.h"
#undef pair_load
#undef pair_cas
#undef segment_now

static inline bool pair_cas(void *slot, pair_t *seen, pair_t next) {
  access_of(slot, true);
  return library_pair_cas(slot, seen, next);
}
static inline pair_t pair_load(const void *slot) {
  access_of(slot, false);
  return library_pair_load(slot);
}
static uint64_t time_is; /* of calls that are given none; 0 = the library's own clock */
static inline uint64_t segment_now(const fshm_segment *s) {
  return time_is ? time_is : library_segment_now(s);
}

#include "unity.c"

#include "check.h"

#include <semaphore.h>

#define ROLES 3
#define TO_THE_END UINT64_MAX

typedef struct {
  void (*task)(void);
  pthread_t thread;
  sem_t go;
  uint64_t left; /* accesses, before it stops at the next; TO_THE_END: it does not */
  bool ended;
} role_t;

static role_t roles[ROLES];
static sem_t back; /* whose turn it was has stopped, or ended */
static _Thread_local role_t *mine;
static bool (*stops_at)(const volatile void *at, bool swap); /* which accesses count */
static void (*meanwhile)(const volatile void *at); /* or this is done at each of them */

static void access_of(const volatile void *at, bool swap) {
  role_t *me = mine;
  if (!me || !stops_at(at, swap)) return;
  if (meanwhile) {
    mine = NULL;
    meanwhile(at);
    mine = me;
  }
  while (!me->left) {
    (void)sem_post(&back);
    while (sem_wait(&me->go)) continue;
  }
  if (me->left != TO_THE_END) me->left--;
}

static void *role_thread(void *with) {
  role_t *me = with;
  for (;;) {
    while (sem_wait(&me->go)) continue;
    if (!me->task) return NULL;
    mine = me;
    me->task();
    mine = NULL;
    me->ended = true;
    (void)sem_post(&back);
  }
}

static void start_roles(void) {
  (void)sem_init(&back, 0, 0);
  for (int i = 0; i < ROLES; i++) {
    (void)sem_init(&roles[i].go, 0, 0);
    if (pthread_create(&roles[i].thread, NULL, role_thread, &roles[i])) abort();
  }
}

static void end_roles(void) {
  for (int i = 0; i < ROLES; i++) {
    roles[i].task = NULL;
    (void)sem_post(&roles[i].go);
    (void)pthread_join(roles[i].thread, NULL);
  }
}

/* It goes on for so many accesses, or to its end. */
static void go_on(role_t *r, uint64_t accesses) {
  if (r->ended) return;
  r->left = accesses;
  (void)sem_post(&r->go);
  while (sem_wait(&back)) continue;
}

/* What a schedule begins with: slots and limits, and what handles know. */
static fshm_segment *s;
static fshm_limiter *l;
static unsigned char *slots_then, *limits_then;
static uint64_t time_then;
static void (*also_put_back)(void); /* what else a test changes; or NULL */

static void keep_state(void) {
  free(slots_then);
  free(limits_then);
  slots_then = malloc(s->slot_count * sizeof(slot_t));
  limits_then = malloc(sizeof(limiter_entry_t));
  if (!slots_then || !limits_then) abort();
  memcpy(slots_then, (void *)s->slots, s->slot_count * sizeof(slot_t));
  memcpy(limits_then, (void *)&s->limiters[0], sizeof(limiter_entry_t));
  time_then = time_is;
}

static void put_back_state(void) {
  memcpy((void *)s->slots, slots_then, s->slot_count * sizeof(slot_t));
  memcpy((void *)&s->limiters[0], limits_then, sizeof(limiter_entry_t));
  l->beyond = 0;
  l->frontier = l->released = 0;
  time_is = time_then;
  if (also_put_back) also_put_back();
  for (int i = 0; i < ROLES; i++) roles[i].ended = false;
}

#define STEPS 5

/* Every schedule of these steps: in each, a role goes on for some accesses and stops. Then they go to their ends, in the
 * order of `ends`. False: a check has failed. */
static uint64_t schedules;
/* From one stop of a step to the next it goes up to so many accesses on, at random; a third of that, where there are
 * only two steps. */
static uint64_t leaps = 1;
static void (*always)(void); /* checked when a thread has stopped or ended; or NULL */
static bool every_schedule(const char *steps, const char *ends, void (*verify)(void)) {
  const size_t count = strlen(steps);
  const uint64_t failures = failed;
  uint64_t stop[STEPS] = {0};
  for (;;) {
    bool ended[STEPS];
    put_back_state();
    for (size_t i = 0; i < count; i++) {
      role_t *r = &roles[steps[i] - '0'];
      go_on(r, stop[i]);
      ended[i] = r->ended;
      if (always) always();
    }
    for (const char *end = ends; *end; end++) {
      go_on(&roles[*end - '0'], TO_THE_END);
      if (always) always();
    }
    schedules++;
    verify();
    if (failed > failures) {
      fprintf(stderr, "  steps %s, then %s, of so many accesses:", steps, ends);
      for (size_t i = 0; i < count; i++) fprintf(stderr, " %llu", (unsigned long long)stop[i]);
      fprintf(stderr, "\n");
      return false;
    }
    size_t last = count; /* the next one: of the last step that was not its role's end */
    while (last && ended[last - 1]) stop[--last] = 0;
    if (!last) return true;
    stop[last - 1] += 1 + random_u64() % (count > 2 ? leaps : (leaps + 2) / 3);
  }
}

#endif
