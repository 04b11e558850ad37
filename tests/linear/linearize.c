/* linearize.c - thousands of short histories of three and four processes, each checked to be linearisable.
 *
 *   linearize [-s SEED] [-k KIND] [-n HISTORIES of each kind] [-o HISTORY] [-f] [-e]
 *
 * -o repeats one history, as often as -n says: what is asked and the pauses come again, the race may. -f
 * ends at the first failure. -e also shows the histories that needed an exception. */
#include "kinds.h"
#include "checker.h"
#include "queue.h"

typedef struct {
  uint64_t histories, operations, exceptions, overlapping, deaths, lost_swaps, configs, failures,
      undecided;
} figures_t;

typedef struct {
  uint64_t seed, histories, only;
  const char *kind;
  bool one, first, exceptions;
} wish_t;

static search_t search;

static uint64_t overlapping(const history_t *h) {
  uint64_t count = 0;
  for (int a = 0; a < WORKERS; a++)
    for (uint32_t i = 0; i < h->count[a]; i++) {
      const op_t *x = &h->ops[a][i];
      bool any = false;
      for (int b = 0; b < WORKERS && !any; b++)
        for (uint32_t k = 0; k < h->count[b] && !any && b != a; k++) {
          const op_t *y = &h->ops[b][k];
          any = x->invoked < y->responded - 1 && y->invoked < x->responded - 1;
        }
      count += any;
    }
  return count;
}

/* Level 0: no exception was needed; above: one of those that model.h allows; -1: not linearisable. */
static int level_of(const history_t *h, enum answer *answer) {
  for (int level = 0; level < (h->limits > 1 ? 3 : 2); level++)
    if ((*answer = check_history(&search, h, level)) == LINEARISABLE) return level;
  return -1;
}

static void show(const wish_t *wish, const kind_t *k, uint64_t number, const char *what) {
  fprintf(stderr, "\n%s: history %" PRIu64 " of seed %" PRIu64 ": %s\n", k->name, number,
          wish->seed, what);
  print_history(&arena->history, stderr);
  if (search.furthest) print_attempt(&search, &arena->history, stderr);
  fprintf(stderr,
          "again: make linearize SEED=%" PRIu64 " KIND=%s HISTORY=%" PRIu64 " HISTORIES=2000\n",
          wish->seed, k->name, number);
}

/* False: do not go on with this kind. */
static bool one_history(const wish_t *wish, const kind_t *k, fshm_limiter *const *limiters,
                        uint64_t number, figures_t *f) {
  history_t *h = &arena->history;
  draw_history(k, limiters, wish->seed, number);
  (void)snprintf(arena->key[0], sizeof arena->key[0], "k%" PRIu64 "-", f->histories);
  if (k->real_clock) {
    atomic_store(&arena->clock, 0);
  } else { /* far enough on that whatever earlier histories left has expired */
    static uint64_t base;
    base += 10000 * MS;
    atomic_store(&arena->clock, base + random_below(1000 * MS));
  }
  if (k->changes) { /* back to the first */
    fshm_limiter *set;
    CHECK_EQ(fshm_limiter_open(segment, arena->limiter_name, strlen(arena->limiter_name),
                               arena->variants[0], h->counts[0] + (h->permits_of[0] > 0), &set),
             FSHM_OK);
    fshm_limiter_close(set);
  }
  fshm_limit any[FSHM_MAX_LIMITS];
  (void)fshm_limiter_limits(arena->limiter, any, &h->version);
  memset(h->in_force, 0, sizeof h->in_force);
  memset(h->changed, 0, sizeof h->changed);
  search.furthest = 0;
  if (!run_history(number % 32 == 5)) {
    failed++;
    kill_workers();
    show(wish, k, number, "a process did not come to its end");
    start_workers();
    return false;
  }
  enum answer answer;
  bool old_limits = false;
  sum_up_versions(h);
  for (int lane = 0; lane < LANES; lane++)
    for (uint32_t i = 0; i < h->count[lane]; i++)
      old_limits |= decided_by_old_limits(h, &h->ops[lane][i]);
  int level = level_of(h, &answer);
  f->histories++;
  f->exceptions += level > 0;
  f->deaths += arena->dies != 0;
  f->configs += search.count;
  f->overlapping += overlapping(h);
  for (int lane = 0; lane < LANES; lane++) f->operations += h->count[lane];
  if (level > 0 && wish->exceptions) show(wish, k, number, "needed a known exception");
  const turn_t *wrong = wrong_turn(h);
  if (wrong) {
    failed++;
    show(wish, k, number, "not served in order");
    print_stays(h, wrong, stderr);
    return !wish->first && ++f->failures < 3;
  }
  if (level >= 0 && !old_limits) return true;
  if (!old_limits &&
      answer ==
          UNDECIDED) { /* of none of the orders that were tried is it known that no other fits */
    show(wish, k, number, "too large to decide");
    f->undecided++;
    return true;
  }
  failed++;
  show(wish, k, number,
       old_limits ? "decided by limits that were no longer in force when it was asked"
                  : "not linearisable");
  return !wish->first && ++f->failures < 3;
}

static void run_kind(const wish_t *wish, const kind_t *k, figures_t *all) {
  fshm_limiter *limiters[6];
  figures_t f = {0};
  atomic_store(&arena->clock, 1000);
  atomic_store(&arena->lost_swaps, 0);
  segment = fresh_segment(k->slots ? 1 : 4096);
  (void)alarm(0); /* however many histories there are: wait_for() sees to it that none hangs */
  CHECK(!k->slots || segment->slot_count == k->slots);
  for (uint32_t set = 0; set < k->sets; set++) {
    char name[32];
    (void)snprintf(name, sizeof name, "limiter-%u", set);
    uint32_t count = k->count;
    while (k->changes && count < FSHM_MAX_LIMITS && k->limits[set][count].n) count++;
    limiters[set] = fresh_limiter(segment, name, k->limits[set], count);
  }
  start_workers();
  bool on = true;
  for (uint64_t i = 0; i < wish->histories && on; i++)
    on = one_history(wish, k, limiters, wish->one ? wish->only : i, &f);
  stop_workers();
  arena->limiter = NULL;
  for (uint32_t set = 0; set < k->sets; set++) fshm_limiter_close(limiters[set]);
  fshm_close(segment);
  f.lost_swaps = atomic_load(&arena->lost_swaps);
  printf("%-15s %6" PRIu64 " histories, %7" PRIu64 " operations, %2" PRIu64
         "%% overlapped, %6" PRIu64 " lost swaps, %5" PRIu64 " killed, %5" PRIu64
         " needed a known exception, %" PRIu64 " undecided, %6.1f steps\n",
         k->name, f.histories, f.operations, 100 * f.overlapping / (f.operations + 1), f.lost_swaps,
         f.deaths, f.exceptions, f.undecided, (double)f.configs / ((double)f.histories + 0.001));
  (void)fflush(stdout);
  all->histories += f.histories;
  all->operations += f.operations;
  all->exceptions += f.exceptions;
  all->undecided += f.undecided;
  CHECK(f.undecided <= 1 + f.histories / 1000); /* or next to nothing would be checked */
}

int main(int argc, char **argv) {
  wish_t wish = {.seed = (uint64_t)time(NULL) ^ (uint64_t)getpid() << 32, .histories = 1000};
  figures_t all = {0};
  for (int option; (option = getopt(argc, argv, "s:k:n:o:fe")) != -1;) {
    if (option == 's') wish.seed = strtoull(optarg, NULL, 10);
    if (option == 'k') wish.kind = optarg;
    if (option == 'n') wish.histories = strtoull(optarg, NULL, 10);
    if (option == 'o') wish.only = strtoull(optarg, NULL, 10), wish.one = true;
    if (option == 'f') wish.first = true;
    if (option == 'e') wish.exceptions = true;
    if (option == '?') return 2;
  }
  arena = shared_memory(sizeof *arena);
  printf("seed %" PRIu64 "\n", wish.seed);
  bool any = false;
  for (size_t i = 0; i < KINDS; i++) {
    if (wish.kind && strcmp(wish.kind, kinds[i].name) != 0) continue;
    any = true;
    run_kind(&wish, &kinds[i], &all);
    if (failed && wish.first) break;
  }
  search_end(&search);
  if (!any) {
    fprintf(stderr, "no kind is called %s\n", wish.kind);
    return 2;
  }
  passed = all.histories - min_u64(failed + all.undecided, all.histories);
  return done();
}
