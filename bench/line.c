/* line.c - what a cache line that two cores write costs, for bench/scaling.py: JSON, ns.
 *
 * Two threads, pinned to the first two processors that this process may use. Of each figure the least and
 * the median of the rounds: a round in which something else ran on one of the two is too long.
 *   line [ROUNDS]
 */
#include "../csrc/unity.c"

#include "../tests/c/check.h"

#define TIMES 200000

static struct {
  _Alignas(128) pair_t pair; /* swapped */
  _Alignas(128) _Atomic uint64_t turn; /* passed to and fro */
  _Alignas(128) _Atomic uint64_t gate;
} shared;

static fshm_segment *s;
static fshm_limiter *limiter;
static int processors[2];
static double took[2]; /* ns a call, of each thread */
static uint64_t lost[2]; /* swaps, of TIMES that succeeded */

static void pin(int to) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(processors[to], &set);
  (void)sched_setaffinity(0, sizeof set, &set);
}

static void swap(int me) {
  for (uint64_t i = 0; i < TIMES; i++) {
    pair_t seen = pair_load(&shared.pair), next;
    do {
      next = (pair_t){seen.who + 1, seen.when ^ i};
      lost[me]++;
    } while (!pair_cas(&shared.pair, &seen, next));
    lost[me]--;
  }
}
static void check(int me) {
  (void)me;
  for (uint64_t i = 0; i < TIMES; i++) (void)fshm_is_allowed(limiter, "hot", 3);
}
/* The line there and back, once for two calls: ns a way. */
static void pass(int me) {
  for (uint64_t i = 0; i < TIMES / 2; i++) {
    uint64_t mine = 2 * i + (uint64_t)me;
    while (atomic_load_explicit(&shared.turn, memory_order_acquire) != mine) continue;
    atomic_store_explicit(&shared.turn, mine + 1, memory_order_release);
  }
}

typedef struct {
  int me, together;
  void (*work)(int);
} task_t;

static void *run(void *with) {
  const task_t *t = with;
  pin(t->me);
  (void)atomic_fetch_add(&shared.gate, 1);
  while (t->together && atomic_load(&shared.gate) < 2) continue;
  uint64_t begun = kernel_clock();
  t->work(t->me);
  took[t->me] = (double)(kernel_clock() - begun) / TIMES;
  return NULL;
}

/* ns a call of one thread, alone or beside another that does the same. */
static double once(void (*work)(int), int threads) {
  pthread_t other;
  task_t tasks[2] = {{0, threads == 2, work}, {1, threads == 2, work}};
  atomic_store(&shared.gate, 0);
  atomic_store(&shared.turn, 0);
  lost[0] = lost[1] = 0;
  if (threads == 2 && pthread_create(&other, NULL, run, &tasks[1])) exit(1);
  (void)run(&tasks[0]);
  if (threads == 2) (void)pthread_join(other, NULL);
  return threads == 2 ? (took[0] + took[1]) / 2 : took[0];
}

static int by_size(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}
static void show(const char *name, double *values, uint64_t n, const char *end) {
  qsort(values, n, sizeof *values, by_size);
  printf("\"%s\": [%.3f, %.3f]%s", name, values[0], values[n / 2], end);
}

int main(int argc, char **argv) {
  static const struct {
    const char *name;
    void (*work)(int);
    int threads;
  } figures[] = {{"swap alone", swap, 1},
                 {"swap of two", swap, 2},
                 {"one way", pass, 2},
                 {"check alone", check, 1},
                 {"check of two", check, 2}};
  enum { FIGURES = sizeof figures / sizeof *figures };
  uint64_t rounds = argc > 1 ? strtoull(argv[1], NULL, 10) : 31;
  cpu_set_t set;
  CPU_ZERO(&set);
  int found = 0;
  if (!rounds || sched_getaffinity(0, sizeof set, &set)) return 1;
  for (int i = 0; i < CPU_SETSIZE && found < 2; i++)
    if (CPU_ISSET(i, &set)) processors[found++] = i;
  if (found < 2) {
    (void)fprintf(stderr, "needs two processors\n");
    return 1;
  }
  const fshm_limit wide = {1000000000, UINT64_C(1000000000), 1000000000, FSHM_BUCKET, 0};
  s = fresh_segment(1000);
  limiter = fresh_limiter(s, "hot", &wide, 1);
  double *values = calloc((FIGURES + 1) * rounds, sizeof *values);
  if (!values) return 1;
  for (uint64_t r = 0; r < rounds; r++) {
    for (int f = 0; f < FIGURES; f++) {
      values[(uint64_t)f * rounds + r] = once(figures[f].work, figures[f].threads);
      if (f == 1) values[FIGURES * rounds + r] = (double)(lost[0] + lost[1]) / (2.0 * TIMES);
    }
  }
  printf("{");
  for (int f = 0; f < FIGURES; f++)
    show(figures[f].name, &values[(uint64_t)f * rounds], rounds, ", ");
  show("lost swaps of two, each that succeeds", &values[FIGURES * rounds], rounds, "}\n");
  free(values);
  fshm_close(s);
  return 0;
}
