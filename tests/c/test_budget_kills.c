/* Processes that reserve and settle, and are killed anywhere: what is spent is what they settled, never more than the
 * budget and what calls cost beyond their estimates; and nothing stays reserved by the dead.
 *
 *   test_budget_kills [KILLS [SEED]]
 */
#include "../../csrc/unity.c"

#include <time.h>

#include "check.h"

#define WORKERS 8
#define USD UINT64_C(1000000000)
#define LIMIT (3 * USD)
#define OWN 64 /* keys that one worker after the other has for itself */
#define SECOND UINT64_C(1000000000)
#define PATIENCE (30 * SECOND) /* of a busy machine */

/* What a worker says of itself. Each word is stored before what it allows for: whoever reads it after a kill knows at most
 * how much was spent. */
typedef struct {
  _Alignas(64) _Atomic uint64_t settled; /* by calls that have ended */
  _Atomic uint64_t open; /* at most what the present call has spent */
  _Atomic uint64_t beyond; /* what calls cost beyond their estimates */
  _Atomic uint64_t calls;
  _Atomic uint64_t wrong; /* it was admitted, and that does not fit */
} worker_t;

static fshm_segment *s;
static fshm_limiter *l;
static worker_t *workers; /* of each place; workers that follow one another add up */

static uint64_t own_name(int place, uint64_t round, char *out) {
  return (uint64_t)sprintf(out, "own-%d-%d", place, (int)(round % OWN));
}

static void call(worker_t *w, const char *key, uint64_t length, uint64_t most) {
  fshm_budget b;
  const uint64_t amount = 1 + random_below(most);
  const bool charge = random_below(4) == 0;
  const uint64_t actual =
      random_below(50) ? random_below(amount + 1) / 200 : amount + random_below(USD / 500);
  if (charge) store_relaxed(&w->open, amount);
  if (fshm_budget_reserve(l, key, length, amount, charge ? FSHM_BUDGET_CHARGE : 0, 0, &b) ==
      FSHM_ALLOWED) {
    if (b.spent + b.reserved > b.limit) store_relaxed(&w->wrong, load_relaxed(&w->wrong) + 1);
    if (actual > amount) store_relaxed(&w->beyond, load_relaxed(&w->beyond) + actual - amount);
    store_relaxed(&w->open, charge ? max_u64(amount, actual) : actual);
    if (random_below(4) == 0) (void)sched_yield(); /* a call takes its time, and is killed in it */
    (void)fshm_budget_settle(l, key, length, &b, amount, actual, 0);
    store_relaxed(&w->settled, load_relaxed(&w->settled) + actual);
  }
  store_relaxed(&w->open, 0);
}

static void work(int place, void *given) {
  worker_t *w = &workers[place];
  char own[32];
  const uint64_t round = *(const uint64_t *)given, length = own_name(place, round, own);
  random_state = round * WORKERS + (uint64_t)place;
  const pid_t parent = getppid();
  fshm_budget held;
  while (getppid() == parent) {
    for (int i = 0; i < 50; i++) call(w, "team", 4, USD);
    /* Of its own key it holds something for most of the time. */
    if (fshm_budget_reserve(l, own, length, 7, 0, 0, &held) != FSHM_ALLOWED || held.direct)
      continue;
    for (int i = 0; i < 50; i++) call(w, "team", 4, USD);
    (void)fshm_budget_settle(l, own, length, &held, 7, 0, 0);
    (void)atomic_fetch_add(&w->calls, 100);
  }
}

static fshm_budget view(const char *key, uint64_t length) {
  fshm_budget b;
  CHECK_EQ(fshm_budget_look(l, key, length, 0, &b), FSHM_OK);
  return b;
}

/* Keys of workers that were killed, from then on; until nothing is reserved of them. */
typedef struct {
  int place;
  uint64_t round, since;
} dead_t;
static dead_t dead[WORKERS * OWN];
static int dead_n;
static uint64_t longest;
static void look_at_the_dead(void) {
  char own[32];
  for (int i = 0; i < dead_n;) {
    const uint64_t length = own_name(dead[i].place, dead[i].round, own);
    const uint64_t before = segment_now(s);
    const bool free_again = !view(own, length).reserved;
    const uint64_t took = before - dead[i].since;
    if (free_again) {
      if (before > dead[i].since) raise_to((_Atomic uint64_t *)&longest, took);
      dead[i] = dead[--dead_n];
    } else {
      CHECK_OP(took, <=, PATIENCE); /* else the dead have something reserved */
      i++;
    }
  }
}

static uint64_t sum_of(size_t word) {
  uint64_t sum = 0;
  for (int i = 0; i < WORKERS; i++) sum += load_relaxed(&(&workers[i].settled)[word]);
  return sum;
}
enum { SETTLED, OPEN, BEYOND, CALLS, WRONG };

int main(int argc, char **argv) {
  const int kills = argc > 1 ? atoi(argv[1]) : fewer(250);
  if (argc > 2) random_state = strtoull(argv[2], NULL, 10);
  const fshm_limit limits[2] = {{LIMIT, YEAR_NS, 0, FSHM_MONEY, 0},
                                {MONEY_MOST, YEAR_NS, 0, FSHM_MONEY, 0}};
  pid_t pids[WORKERS] = {0};
  uint64_t rounds[WORKERS] = {0}, refunded = 0, lost = 0, most = 0, looks = 0;
  s = fresh_segment(5000);
  (void)alarm(argc > 1 ? 3600 : 300);
  l = fresh_limiter(s, "team", limits, 2);
  workers = shared_memory(WORKERS * sizeof *workers);
  (void)view("team", 4);
  for (int k = 0; k < kills && !failed; k++) {
    for (int i = 0; i < WORKERS; i++)
      if (!pids[i] && (pids[i] = start_child(work, i, &rounds[i])) < 0) abort();
    const uint64_t until = segment_now(s) + random_below(15000000);
    do {
      const fshm_budget b = view("team", 4);
      const uint64_t beyond = sum_of(BEYOND);
      CHECK_OP(b.spent, <=, LIMIT + beyond);
      raise_to((_Atomic uint64_t *)&most, b.spent + b.reserved);
      looks++;
      look_at_the_dead();
      if (b.spent > LIMIT / 2) { /* so that there is always something to compete for */
        CHECK_EQ(fshm_budget_add(l, "team", 4, 0, -(int64_t)(b.spent / 2), 0), FSHM_OK);
        refunded += b.spent / 2;
      }
      (void)usleep(500);
    } while (segment_now(s) < until);
    const int victim = (int)random_below(WORKERS);
    (void)kill(pids[victim], SIGKILL);
    (void)waitpid(pids[victim], NULL, 0);
    lost += load_relaxed(&workers[victim].open);
    store_relaxed(&workers[victim].open, 0);
    while (dead_n == WORKERS * OWN) look_at_the_dead();
    dead[dead_n++] = (dead_t){victim, rounds[victim]++, segment_now(s)};
    pids[victim] = 0;
  }
  for (int i = 0; i < WORKERS; i++)
    if (pids[i]) {
      (void)kill(pids[i], SIGKILL);
      (void)waitpid(pids[i], NULL, 0);
    }
  lost += sum_of(OPEN);
  const uint64_t ended = segment_now(s);
  while ((view("team", 4).reserved || dead_n) && segment_now(s) - ended < PATIENCE) {
    look_at_the_dead();
    (void)usleep(1000);
  }
  const fshm_budget b = view("team", 4);
  CHECK_EQ(sum_of(WRONG), 0);
  CHECK_EQ(b.reserved, 0);
  CHECK_EQ(dead_n, 0);
  /* What is spent is what was settled, and at most what the killed were about to settle. */
  CHECK_OP(b.spent + refunded, >=, sum_of(SETTLED));
  CHECK_OP(b.spent + refunded, <=, sum_of(SETTLED) + lost);
  fshm_budget all;
  const uint64_t left = minus(LIMIT, b.spent);
  CHECK_EQ(fshm_budget_reserve(l, "team", 4, left, 0, 0, &all), b.spent <= LIMIT);
  if (all.status == FSHM_ALLOWED) (void)fshm_budget_settle(l, "team", 4, &all, left, 0, 0);
  printf(
      "%d kills, %llu calls and more, %llu looks; settled %llu, about to be %llu, spent %llu; beyond "
      "estimates %llu; most at once %llu of %llu; free again after %llu us at most\n",
      kills, (unsigned long long)sum_of(CALLS), (unsigned long long)looks,
      (unsigned long long)sum_of(SETTLED), (unsigned long long)lost,
      (unsigned long long)(b.spent + refunded), (unsigned long long)sum_of(BEYOND),
      (unsigned long long)most, (unsigned long long)LIMIT, (unsigned long long)longest / 1000);
  return done();
}
