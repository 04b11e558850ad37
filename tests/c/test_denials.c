/* test_denials.c - a denial by a semaphore, and a count of its permits, look at all permits once: after that, at what
 * has changed. What they answer is as if they had looked. */
#include "../../csrc/unity.c"

#include "check.h"

#define SECOND UINT64_C(1000000000)

static fshm_limiter *permit_limiter(fshm_segment *s, const char *name, uint64_t n) {
  const fshm_limit l = {n, 0, 0, FSHM_PERMITS, 0};
  return fresh_limiter(s, name, &l, 1);
}

static int admit(fshm_limiter *l, const char *key, fshm_permit *p, uint32_t *held) {
  fshm_decision d;
  fshm_admit(l, key, strlen(key), NULL, 0, p, &d, held);
  CHECK_EQ(p->held, d.status == FSHM_ALLOWED);
  return d.status;
}

/* Free a permit behind the library's back: only a look at it can find that. */
static void free_unsaid(fshm_segment *s, const fshm_permit *p) {
  pair_t seen = {p->who, p->when}, idle = {p->who, 0};
  CHECK(pair_cas(&s->slots[p->slot], &seen, idle));
}

/* What is remembered counts for long enough for a test on a busy machine. */
static void keep_looks(fshm_limiter *l) {
  fshm_segment *s = l->segment;
  const uint64_t hash = fshm_siphash(l->key[0], l->key[1], "k", 1);
  for (int i = 0; i < 2; i++) {
    const uint64_t of = hash ^ (i ? LOOK_COUNTED : 0);
    uint64_t w[LOOK_WORDS];
    for (int k = 0; k < LOOK_WORDS; k++) w[k] = load_relaxed(&look_entry(s, of)->words[k]);
    w[LOOK_UNTIL] = fshm_now(s) + LOOK_NS;
    if (load_relaxed(&look_entry(s, of)->hash) == of) look_store(s, of, w);
  }
}

#define MANY 20000

static void test_one_look(void) {
  fshm_segment *s = fresh_segment(3 * MANY);
  fshm_limiter *l = permit_limiter(s, "a", MANY);
  fshm_permit *held = calloc(MANY, sizeof *held), p;
  uint32_t in_flight;
  for (int i = 0; i < MANY; i++) CHECK_EQ(admit(l, "k", &held[i], &in_flight), FSHM_ALLOWED);
  CHECK_EQ(admit(l, "k", &p, &in_flight), FSHM_DENIED);
  CHECK_EQ(in_flight, MANY);
  CHECK_EQ(fshm_in_flight(l, "k", 1), MANY);
  keep_looks(l);
  free_unsaid(s, &held[77]);
  CHECK_EQ(admit(l, "k", &p, &in_flight), FSHM_DENIED);
  CHECK_EQ(in_flight, MANY);
  CHECK_EQ(fshm_in_flight(l, "k", 1), MANY);
  /* What a release says is enough: one permit is looked at, not the one that was freed in silence. */
  const uint32_t number = PERMIT_NUMBER(held[MANY / 2].when);
  CHECK_EQ(fshm_permit_release(l, &held[MANY / 2]), 1);
  store_relaxed(&l->released, 0); /* as another process */
  CHECK_EQ(admit(l, "k", &held[MANY / 2], &in_flight), FSHM_ALLOWED);
  CHECK_EQ(PERMIT_NUMBER(held[MANY / 2].when), number);
  CHECK_EQ(admit(l, "k", &p, &in_flight), FSHM_DENIED);
  /* The others are looked at in time, as for dead processes. */
  const uint64_t end = fshm_now(s) + 30 * SECOND;
  while (admit(l, "k", &held[77], &in_flight) == FSHM_DENIED && fshm_now(s) < end)
    (void)usleep(1000);
  CHECK(held[77].held);
  CHECK_EQ(fshm_in_flight(l, "k", 1), MANY);
  free_unsaid(s, &held[5]);
  while (fshm_in_flight(l, "k", 1) == MANY && fshm_now(s) < end) (void)usleep(1000);
  CHECK_EQ(fshm_in_flight(l, "k", 1), MANY - 1);
  free(held);
  fshm_limiter_close(l);
  fshm_close(s);
}

/* A limit lowered below what is held: the first n may be free, and yet more than n are held. */
static void test_lowered_looks_once(void) {
  fshm_segment *s = fresh_segment(3 * MANY);
  fshm_limiter *l = permit_limiter(s, "a", MANY);
  fshm_permit *held = calloc(MANY, sizeof *held), p;
  uint32_t in_flight;
  for (int i = 0; i < MANY; i++) CHECK_EQ(admit(l, "k", &held[i], &in_flight), FSHM_ALLOWED);
  fshm_limiter_close(permit_limiter(s, "a", 100));
  uint32_t left = MANY;
  for (int i = 0; i < MANY; i++)
    if (PERMIT_NUMBER(held[i].when) < 100) left -= (uint32_t)fshm_permit_release(l, &held[i]);
  CHECK_EQ(left, MANY - 100);
  CHECK_EQ(admit(l, "k", &p, &in_flight), FSHM_DENIED);
  CHECK_EQ(in_flight, left);
  keep_looks(l);
  uint32_t unsaid = 0;
  for (int i = 0; i < MANY && unsaid < left; i++) {
    if (!held[i].held) continue;
    free_unsaid(s, &held[i]);
    unsaid++;
  }
  CHECK_EQ(admit(l, "k", &p, &in_flight), FSHM_DENIED); /* by what was counted */
  const uint64_t end = fshm_now(s) + 30 * SECOND;
  while (admit(l, "k", &p, &in_flight) == FSHM_DENIED && fshm_now(s) < end) (void)usleep(1000);
  CHECK(p.held);
  free(held);
  fshm_limiter_close(l);
  fshm_close(s);
}

/* sequential stories ----------------------------------------------------------------------------- */

/* Actors are processes that do as they are told, one at a time: each admission is known beforehand. */
enum { TAKE_ONE, RELEASE_ONE, COUNT, SET_LIMIT, LEAVE };
#define ACTORS 3
#define KEYS 4
#define MOST 12

typedef struct {
  _Atomic uint32_t turn; /* of this actor + 1; 0: of the parent */
  uint32_t what, key;
  uint64_t limit;
  int status;
  uint32_t in_flight;
} story_t;

typedef struct {
  fshm_segment *s;
  story_t *story;
  char keys[KEYS][16];
} stage_t;

static void act(int me, void *with) {
  const stage_t *stage = with;
  story_t *story = stage->story;
  fshm_permit mine[KEYS][MOST + 1];
  uint32_t has[KEYS] = {0};
  fshm_limiter *l = permit_limiter(stage->s, "a", MOST);
  for (;;) {
    while (atomic_load(&story->turn) != (uint32_t)me + 1) (void)usleep(1);
    const uint32_t k = story->key;
    if (story->what == TAKE_ONE) {
      story->status = admit(l, stage->keys[k], &mine[k][has[k]], &story->in_flight);
      has[k] += story->status == FSHM_ALLOWED;
    } else if (story->what == RELEASE_ONE) {
      const uint64_t i = has[k] ? random_below(has[k]) : 0;
      story->status = has[k] ? fshm_permit_release(l, &mine[k][i]) : 0;
      if (story->status) mine[k][i] = mine[k][--has[k]];
    } else if (story->what == COUNT) {
      story->in_flight = fshm_in_flight(l, stage->keys[k], strlen(stage->keys[k]));
    } else if (story->what == SET_LIMIT) {
      fshm_limiter_close(permit_limiter(stage->s, "a", story->limit));
    }
    const bool leave = story->what == LEAVE;
    atomic_store(&story->turn, 0);
    if (leave) break;
  }
  fshm_limiter_close(l);
}

static void tell(story_t *story, int actor, uint32_t what, uint32_t key) {
  story->what = what;
  story->key = key;
  atomic_store(&story->turn, (uint32_t)actor + 1);
  while (atomic_load(&story->turn)) (void)usleep(1);
}

/* Keys of which two share their words of changes. */
static void make_keys(stage_t *stage, const fshm_limiter *l) {
  uint32_t first = 0, made = 0;
  for (int i = 0; made < KEYS; i++) {
    char *key = stage->keys[made];
    (void)snprintf(key, sizeof stage->keys[0], "k%d", i);
    uint32_t word =
        changes_index(fshm_siphash(l->key[0], l->key[1], key, strlen(key))) % CHANGE_WORDS;
    if (!made) first = word;
    if (made == 0 || (made == 1 ? word == first : word != first)) made++;
  }
}

static void test_stories(int steps) {
  fshm_segment *s = fresh_segment(500);
  stage_t *stage = shared_memory(sizeof *stage);
  stage->s = s;
  stage->story = shared_memory(sizeof *stage->story);
  fshm_limiter *l = permit_limiter(s, "a", MOST);
  make_keys(stage, l);
  pid_t pids[ACTORS];
  uint32_t held[ACTORS][KEYS] = {{0}}, sum[KEYS] = {0};
  uint64_t limit = MOST;
  unsigned denied = 0;
  for (int i = 0; i < ACTORS; i++) pids[i] = start_child(act, i, stage);
  for (int i = 0; i < ACTORS; i++) tell(stage->story, i, COUNT, 0); /* all have opened it */
  stage->story->limit = limit;
  tell(stage->story, 0, SET_LIMIT, 0);
  for (int step = 0; step < steps; step++) {
    const int actor = (int)random_below(ACTORS);
    const uint32_t k = (uint32_t)random_below(KEYS), what = (uint32_t)random_below(20);
    if (what < 12) {
      tell(stage->story, actor, TAKE_ONE, k);
      CHECK_EQ(stage->story->status, sum[k] < limit ? FSHM_ALLOWED : FSHM_DENIED);
      if (stage->story->status == FSHM_ALLOWED) {
        held[actor][k]++;
        sum[k]++;
      } else {
        CHECK_OP(stage->story->in_flight, >=, limit); /* of a lowered limit: at least so many */
        CHECK_OP(stage->story->in_flight, <=, sum[k]);
        denied++;
      }
    } else if (what < 16) {
      tell(stage->story, actor, RELEASE_ONE, k);
      CHECK_EQ(stage->story->status, held[actor][k] > 0);
      held[actor][k] -= (uint32_t)stage->story->status;
      sum[k] -= (uint32_t)stage->story->status;
    } else if (what < 19 || random_below(10)) {
      tell(stage->story, actor, COUNT, k);
      CHECK_EQ(stage->story->in_flight, sum[k]);
    } else {
      stage->story->limit = limit = 1 + random_below(MOST);
      tell(stage->story, actor, SET_LIMIT, k);
    }
  }
  CHECK_OP(denied, >, (unsigned)steps / 20);
  for (int i = 0; i < ACTORS; i++) {
    tell(stage->story, i, LEAVE, 0);
    end_child(pids[i]);
  }
  (void)munmap(stage->story, sizeof *stage->story);
  (void)munmap(stage, sizeof *stage);
  fshm_limiter_close(l);
  fshm_close(s);
}

/* races ------------------------------------------------------------------------------------------ */

typedef struct {
  fshm_limiter *limiter;
  _Atomic uint32_t released, taken;
  uint32_t rounds;
} relay_t;

/* Who has seen that a release is over is admitted, however many denials it has had just before. */
static void run_relay(int me, void *with) {
  relay_t *r = with;
  fshm_permit p;
  uint32_t in_flight;
  for (uint32_t round = (uint32_t)me; round < r->rounds; round += 2) {
    while (atomic_load(&r->taken) < round) (void)usleep(1); /* the other's turn first */
    for (bool over = false;; over = atomic_load(&r->released) >= round) {
      if (admit(r->limiter, "k", &p, &in_flight) == FSHM_ALLOWED) break;
      CHECK(!over);
      if (over) return;
    }
    atomic_store(&r->taken, round + 1);
    for (uint64_t i = random_below(200); i; i--) (void)fshm_now(r->limiter->segment);
    CHECK_EQ(fshm_permit_release(r->limiter, &p), 1);
    atomic_store(&r->released, round + 1);
  }
}

static void test_relay(uint32_t rounds) {
  fshm_segment *s = fresh_segment(100);
  relay_t *r = shared_memory(sizeof *r);
  r->limiter = permit_limiter(s, "a", 1);
  r->rounds = rounds;
  run_children(2, run_relay, r);
  CHECK_EQ(fshm_in_flight(r->limiter, "k", 1), 0);
  fshm_limiter_close(r->limiter);
  (void)munmap(r, sizeof *r);
  fshm_close(s);
}

/* deaths ----------------------------------------------------------------------------------------- */

typedef struct {
  fshm_limiter *limiter;
  uint32_t n;
  _Atomic int ready;
} hold_t;

static __attribute__((noreturn)) void hold_all(int me, void *with) {
  hold_t *h = with;
  fshm_permit p;
  uint32_t in_flight;
  (void)me;
  for (uint32_t i = 0; i < h->n; i++)
    CHECK_EQ(admit(h->limiter, "k", &p, &in_flight), FSHM_ALLOWED);
  atomic_store(&h->ready, 1);
  for (;;) (void)pause();
}

/* A caller that is next, and whose sleep is over, looks at all permits, whatever is remembered: it is not denied twice
 * for a dead process. One that was woken goes by what is remembered. */
static void test_waiter_finds_the_dead(void) {
  fshm_segment *s = fresh_segment(3 * MANY);
  hold_t *h = shared_memory(sizeof *h);
  h->limiter = permit_limiter(s, "a", MANY);
  h->n = MANY;
  fshm_permit p;
  uint32_t in_flight;
  pid_t pid = start_child(hold_all, 0, h);
  while (!atomic_load(&h->ready)) (void)usleep(500);
  CHECK_EQ(admit(h->limiter, "k", &p, &in_flight), FSHM_DENIED);
  CHECK_EQ(kill(pid, SIGKILL), 0);
  CHECK_EQ(waitpid(pid, NULL, 0), pid);
  keep_looks(h->limiter);
  CHECK_EQ(admit(h->limiter, "k", &p, &in_flight), FSHM_DENIED); /* by what is remembered */
  const fshm_waiter waiter = {.fd = -1};
  fshm_place place;
  fshm_turn turn;
  const uint64_t now = fshm_now(s);
  CHECK_EQ(fshm_wait_join(h->limiter, "k", 1, &waiter, now, &place), 1);
  CHECK_EQ(fshm_wait_turn(h->limiter, &place, now, &turn), 1);
  CHECK_EQ(admit(h->limiter, "k", &p, &in_flight), FSHM_DENIED);
  fshm_wait_wake(h->limiter, "k", 1);
  CHECK_EQ(fshm_wait_turn(h->limiter, &place, now + FSHM_WAIT_BEAT_NS, &turn), 1);
  CHECK_EQ(admit(h->limiter, "k", &p, &in_flight), FSHM_DENIED);
  CHECK_EQ(fshm_wait_turn(h->limiter, &place, now + 2 * FSHM_WAIT_BEAT_NS, &turn), 1);
  CHECK_EQ(admit(h->limiter, "k", &p, &in_flight), FSHM_ALLOWED);
  fshm_wait_leave(h->limiter, &place);
  const uint64_t end = fshm_now(s) + 30 * SECOND;
  while (fshm_in_flight(h->limiter, "k", 1) != 1 && fshm_now(s) < end) (void)usleep(1000);
  CHECK_EQ(fshm_in_flight(h->limiter, "k", 1), 1);
  fshm_limiter_close(h->limiter);
  (void)munmap(h, sizeof *h);
  fshm_close(s);
}

int main(void) {
  test_one_look();
  test_lowered_looks_once();
  test_stories(fewer(8000));
  test_relay((uint32_t)fewer(4000));
  test_waiter_finds_the_dead();
  return done();
}
