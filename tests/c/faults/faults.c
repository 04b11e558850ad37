/* faults.c - commits the one fault that its argument names, each of a kind that a tool must report: so
 * that a tool which reports nothing is known to have looked (expect.sh). */
#include "../../../csrc/unity.c"

#include "../check.h"

static volatile int zero;
static slot_t racy_slot;
static uint64_t shared_word;

static void overflow(void) {
  volatile char *p = malloc(8);
  p[8 + zero] = 1;
  free((void *)(uintptr_t)p);
}

static void use_after_free(void) {
  const fshm_limit limit = {1, 1000000, 1, FSHM_BUCKET, 0};
  fshm_limiter *l = fresh_limiter(fresh_segment(10), "a", &limit, 1);
  remove_segments(); /* now: the sanitizer ends the process where it stands */
  fshm_limiter_close(l);
  CHECK_EQ(fshm_is_allowed(l, "k", 1), FSHM_ALLOWED);
}

static void leak(void) {
  const fshm_limit limit = {1, 1000000, 1, FSHM_BUCKET, 0};
  fshm_segment *s = fresh_segment(10);
  for (int i = 0; i < 10; i++) (void)fresh_limiter(s, "a", &limit, 1);
  fshm_close(s);
}

static void uninitialised(void) {
  uint64_t *cost = malloc(sizeof *cost);
  const rule_t r = {.kind = FSHM_BUCKET, .n = 10, .burst = 10, .num = 10, .den = 1};
  if (bucket_room(&r, *cost & 7)) (void)puts("room");
  free(cost);
}

static void shift(void) { (void)printf("%d\n", 1 << (40 + zero)); }
static void division(void) { (void)printf("%f\n", 1.0 / zero); }

/* Without a start line the second thread may come when the first has gone: still a race, since nothing
 * orders them. */
static void two_threads(void *(*one)(void *), void *(*other)(void *)) {
  pthread_t threads[2];
  if (pthread_create(&threads[0], NULL, one, NULL) ||
      pthread_create(&threads[1], NULL, other, NULL))
    abort();
  for (int i = 0; i < 2; i++) (void)pthread_join(threads[i], NULL);
}

static void *write_word(void *unused) {
  shared_word++;
  return unused;
}
static void *swap_slot(void *unused) {
  pair_t seen = {0, 0};
  (void)pair_cas(&racy_slot, &seen, (pair_t){1, 2});
  return unused;
}
/* A plain write of what others swap. (Of a 16-byte atomic the thread sanitizer watches the first half.) */
static void *scribble(void *unused) {
  *(volatile uint64_t *)(uintptr_t)&racy_slot.who = 3;
  return unused;
}

/* Not a fault: what is written before a swap may be read by whoever loads what was swapped in. */
static void *hand_over(void *unused) {
  shared_word = 7;
  return swap_slot(unused);
}
static void *take_over(void *unused) {
  for (int i = 0; i < 1000000 && !pair_load(&racy_slot).who; i++) (void)sched_yield();
  CHECK_EQ(pair_load(&racy_slot).who, 1);
  if (pair_load(&racy_slot).who) CHECK_EQ(shared_word, 7);
  return unused;
}

static void race(void) { two_threads(write_word, write_word); }
static void race_with_a_swap(void) { two_threads(swap_slot, scribble); }
static void ordered_by_a_swap(void) { two_threads(hand_over, take_over); }

int main(int argc, char **argv) {
  static const struct {
    const char *name;
    void (*commit)(void);
  } faults[] = {{"overflow", overflow},
                {"use-after-free", use_after_free},
                {"leak", leak},
                {"uninitialised", uninitialised},
                {"shift", shift},
                {"division", division},
                {"race", race},
                {"race-with-a-swap", race_with_a_swap},
                {"none-but-ordered-by-a-swap", ordered_by_a_swap}};
  for (size_t i = 0; argc == 2 && i < sizeof faults / sizeof *faults; i++) {
    if (strcmp(argv[1], faults[i].name)) continue;
    faults[i].commit();
    return done();
  }
  fprintf(stderr, "usage: faults NAME\n");
  return 2;
}
