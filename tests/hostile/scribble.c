/* scribble.c - write over a segment in use, at random and without end, under working processes.
 *
 *     scribble [SECONDS [SEED]]
 *
 * Rounds of a fresh segment each: WORKERS processes make every call of fast_shm.h (calls.h), and join anew,
 * while one writes over everything: words, bytes, bits, lines, copies, nothing and all ones. Wrong answers
 * are allowed. A worker that ends by itself or by a signal, a call that takes longer than DEADLINE, and an
 * answer out of range (MUST) are faults; they are printed with the seed, which repeats the round as far as
 * the scheduler lets it.
 */
#include <stdint.h>
#include <sys/resource.h>

#include "guard.h"

/* Fewer than a segment has otherwise. */
#define PROCESSES 320
#define HOME_PROCESSES 256
#include "../../csrc/unity.c"
#undef mmap
#undef munmap

#include "check.h"

#include "calls.h"

#define WORKERS 4
#ifndef DEADLINE
#define DEADLINE 30 /* s, of one call; it takes microseconds, and 0.1 s with 100,000 permits */
#endif
#define ROUND_NS UINT64_C(1500000000)

typedef struct {
  _Atomic uint64_t calls, damaged, began; /* of the call under way: CLOCK_MONOTONIC, ns; 0 = none */
  _Atomic uint64_t call, longest, longest_call; /* longest: processor time, ns */
} worker_t;

static worker_t *workers;
static _Atomic uint64_t *stop;
static uint64_t told; /* rounds after which the segment said that it was damaged */

static uint64_t posix_clock(clockid_t id) {
  struct timespec t;
  (void)clock_gettime(id, &t);
  return (uint64_t)t.tv_sec * UINT64_C(1000000000) + (uint64_t)t.tv_nsec;
}
static uint64_t monotonic(void) { return posix_clock(CLOCK_MONOTONIC); }

/* A number as calls.h takes them: small, a place, a time, or odd. */
static uint64_t any_number(void) {
  const uint64_t odd[] = {0, UINT64_MAX, TIME_MAX, TIME_MAX - 1, UINT64_C(1) << 63};
  return random_below(8) ? random_u64() >> random_below(64) : odd[random_below(5)];
}

static void work(int me, void *with) {
  worker_t *w = &workers[me];
  user_t u = {.s = with};
  struct rlimit no_core = {0, 0};
  (void)setrlimit(RLIMIT_CORE, &no_core);
  while (!load_relaxed(stop)) {
    unsigned call = (unsigned)(random_below(8) ? random_below(CALLS) : CALLS),
             who = (unsigned)random_below(48);
    unsigned what = (unsigned)random_below(128), which = who % LIMITERS;
    store_relaxed(&w->call, (uint64_t)call << 32 | what << 8 | who);
    store_relaxed(&w->began, monotonic());
    uint64_t took = posix_clock(CLOCK_THREAD_CPUTIME_ID);
    if (call == CALLS) /* more often than any other: it reads the most */
      look_at_all(&u);
    else if (!u.limiters[which] && call > 1)
      open_limiter(&u, which, random_below(4) ? 0 : (unsigned)random_below(16), random_below(2));
    else
      one_call(&u, call, who, what, any_number());
    took = posix_clock(CLOCK_THREAD_CPUTIME_ID) - took;
    if (took > load_relaxed(&w->longest)) {
      store_relaxed(&w->longest, took);
      store_relaxed(&w->longest_call, load_relaxed(&w->call));
    }
    store_relaxed(&w->began, 0);
    add_relaxed(&w->calls, 1);
    store_relaxed(&w->damaged, u.damaged);
    if (!random_below(2000)) { /* as a new process: join again */
      store_relaxed(&u.s->fork_page->joined, 0);
      store_relaxed(&u.s->fork_page->joining, 0);
    }
  }
}

/* One stroke. `map`: of the writer's own. */
static void stroke(unsigned char *map, const fshm_segment *s, uint64_t from, uint64_t to) {
  const uint64_t bytes = to - from, at = from + random_below(bytes), word = at / 8 * 8;
  const uint64_t line = at / LINE * LINE;
  uint64_t *there = (uint64_t *)(void *)(map + word);
  switch (random_below(9)) {
    case 0:
      *there = random_u64();
      break;
    case 1:
      *there = random_u64() >> random_below(64);
      break;
    case 2:
      map[at] = (unsigned char)random_u64();
      break;
    case 3:
      *there ^= UINT64_C(1) << random_below(64);
      break;
    case 4:
      for (uint64_t i = line; i < line + LINE; i += 8)
        *(uint64_t *)(void *)(map + i) = random_u64();
      break;
    case 5: /* a copy of what is elsewhere: the hardest to tell from the real */
      memcpy(map + line, map + random_below(s->size / LINE) * LINE, LINE);
      break;
    case 6:
      memset(map + line, random_below(2) ? 0 : 0xff, LINE);
      break;
    case 7:
      *there += random_below(2) ? 1 : UINT64_MAX;
      break;
    default:
      *(uint32_t *)(void *)there = (uint32_t)random_u64();
  }
}

/* Everything, but what is small and decides much more often than what is large. */
static void scribble_somewhere(unsigned char *map, const fshm_segment *s) {
  const uint64_t limiters = (uint64_t)((unsigned char *)s->limiters - s->map);
  const uint64_t processes = (uint64_t)((unsigned char *)s->processes - s->map);
  const uint64_t process_stats = (uint64_t)((unsigned char *)s->process_stats - s->map);
  const uint64_t slots = (uint64_t)((unsigned char *)s->slots - s->map);
  const uint64_t key_stats = (uint64_t)((unsigned char *)s->key_stats - s->map);
  const uint64_t metrics = (uint64_t)((unsigned char *)s->metrics - s->map);
  const uint64_t deployments = (uint64_t)((unsigned char *)s->deployments - s->map);
  switch (random_below(9)) {
    case 0:
      stroke(map, s, 0, sizeof(header_t));
      break;
    case 1:
      stroke(map, s, limiters, limiters + (LIMITERS + GRANTED + 1) * sizeof(limiter_entry_t));
      break;
    case 2:
      stroke(map, s, processes, process_stats);
      break;
    case 3:
    case 4:
      stroke(map, s, slots, key_stats);
      break;
    case 5:
      stroke(map, s, key_stats, s->size);
      break;
    case 6:
      stroke(map, s, random_below(2) ? metrics : deployments, s->size);
      break;
    default:
      stroke(map, s, random_below(2) ? process_stats : limiters, s->size);
  }
}

/* One word that calls read and then use, to and fro for some ms: what is read twice will differ. */
static void flicker(const fshm_segment *s) {
  const uint64_t slot = random_below(s->slot_count);
  limiter_entry_t *e = &s->limiters[random_below(LIMITERS + GRANTED + 1)];
  _Atomic uint64_t *const words[] = {
      &e->current,
      &e->set,
      &e->owners[random_below(RULES)],
      &e->rules[SET_RULE(load_relaxed(&e->set), 0)][random_below(RULE_WORDS)],
      &s->slots[slot].who,
      (_Atomic uint64_t *)(void *)&e->name_length,
      &s->names[load_relaxed(&s->key_stats[slot].name) % s->names_words],
      (_Atomic uint64_t *)(void *)&s->key_stats[slot].meta,
      &s->slots[slot].when,
      &s->processes[random_below(PROCESSES)].incarnation,
      &s->process_stats[random_below(PROCESSES)].entries[slot % PROCESS_STATS].key,
      (_Atomic uint64_t *)(void *)&s->metrics[random_below(4)].name_length,
      &s->requests[random_below(PROCESSES)].incarnation,
  };
  _Atomic uint64_t *word = words[random_below(sizeof words / sizeof *words)];
  const uint64_t was = load_relaxed(word), other = any_number();
  for (int i = 0; i < 20000; i++) {
    store_relaxed(word, other);
    for (int k = 0; k < i % 16; k++) (void)load_relaxed(word);
    store_relaxed(word, was);
  }
}

/* Put back a part of what was good, so that calls get far again. */
static void mend(unsigned char *map, const unsigned char *good, const fshm_segment *s) {
  uint64_t upto = random_below(3) ? (uint64_t)((unsigned char *)s->processes - s->map) : s->size;
  memcpy(map, good, upto);
}

static bool late(uint64_t *since) {
  for (int i = 0; i < WORKERS; i++) {
    uint64_t began = load_relaxed(&workers[i].began), now = monotonic();
    if (!began || now < began + DEADLINE * UINT64_C(1000000000)) continue;
    fprintf(stderr, "worker %d: call %#llx hangs since %llu s\n", i,
            (unsigned long long)load_relaxed(&workers[i].call),
            (unsigned long long)((now - began) / 1000000000));
    *since = began;
    return true;
  }
  return false;
}

/* One round. Returns the strokes made. */
static uint64_t round_of(uint64_t seed, uint64_t ends) {
  pid_t pids[WORKERS];
  uint64_t strokes = 0, since;
  int ended = 0;
  random_state = seed;
  memset(workers, 0, WORKERS * sizeof *workers);
  store_relaxed(stop, 0);
  fshm_segment *s = fresh_segment(1 + random_below(random_below(2) ? 40 : 400));
  user_t u = {.s = s};
  for (unsigned i = 0; i < LIMITERS; i++) open_limiter(&u, i, (unsigned)random_below(15), false);
  for (unsigned i = 0; i < GRANTED; i++) open_granted(&u, i);
  open_budget(&u);
  unsigned char *good = malloc(s->size), *map;
  MUST(good);
  memcpy(good, s->map, s->size);
  for (unsigned i = 0; i < LIMITERS; i++) fshm_limiter_close(u.limiters[i]);
  close_granted(&u);
  for (int i = 0; i < WORKERS; i++) pids[i] = start_child(work, i, s);
  map = s->map;
  /* Seldom enough that calls get far, or as fast as it goes. */
  const uint64_t gentle = random_below(4) ? random_below(200000) : 0;
  while (monotonic() < ends && !late(&since)) {
    for (uint64_t i = 1 + random_below(16); i; i--, strokes++) scribble_somewhere(map, s);
    if (!random_below(20)) mend(map, good, s);
    if (!random_below(8)) flicker(s);
    struct timespec pause = {0, (long)gentle};
    if (gentle) (void)nanosleep(&pause, NULL);
    for (int i = 0; i < WORKERS; i++)
      ended += pids[i] && waitpid(pids[i], NULL, WNOHANG) == pids[i];
    if (ended) break;
  }
  CHECK_EQ(ended, 0); /* by a signal, or by MUST, which has said why */
  store_relaxed(stop, 1);
  while (!ended && !late(&since)) { /* all end when they are asked to */
    struct timespec pause = {0, 5000000};
    (void)nanosleep(&pause, NULL);
    int status = 0, left = 0;
    for (int i = 0; i < WORKERS; i++) {
      if (!pids[i]) continue;
      if (waitpid(pids[i], &status, WNOHANG) != pids[i]) {
        left++;
        continue;
      }
      pids[i] = 0;
      CHECK_EQ(status, 0);
    }
    if (!left) break;
  }
  CHECK(ended || !late(&since));
  for (int i = 0; i < WORKERS; i++) {
    if (pids[i]) (void)kill(pids[i], SIGKILL);
    if (pids[i]) (void)waitpid(pids[i], NULL, 0);
  }
  uint64_t index;
  memcpy(map, good, sizeof s->verified); /* the header, so that the segment's files are found */
  told += fshm_check(s, &index) != FSHM_DAMAGE_NONE; /* not so, where all was mended in the end */
  fshm_close(s);
  remove_segments();
  segments_made = 0;
  free(good);
  return strokes;
}

int main(int count, char **arguments) {
  const uint64_t seconds = count > 1 ? strtoull(arguments[1], NULL, 0) : 20;
  uint64_t seed = count > 2 ? strtoull(arguments[2], NULL, 0) : monotonic(), strokes = 0, calls = 0,
           damaged = 0, rounds = 0, longest = 0, longest_call = 0;
  (void)signal(SIGABRT, SIG_DFL);
  workers = shared_memory(WORKERS * sizeof *workers);
  stop = shared_memory(sizeof *stop);
  const uint64_t ends = monotonic() + seconds * UINT64_C(1000000000);
  while (monotonic() < ends && !failed) {
    (void)alarm((unsigned)seconds + 300);
    strokes += round_of(seed, min_u64(ends, monotonic() + ROUND_NS));
    for (int i = 0; i < WORKERS; i++) {
      calls += workers[i].calls;
      damaged += workers[i].damaged;
      if (workers[i].longest < longest) continue;
      longest = workers[i].longest;
      longest_call = workers[i].longest_call;
    }
    rounds++;
    if (failed)
      fprintf(stderr, "to repeat: scribble %llu %llu\n", (unsigned long long)seconds,
              (unsigned long long)seed);
    else
      seed = random_u64();
  }
  printf("%llu rounds (%llu told), the last with seed %llu\n", (unsigned long long)rounds,
         (unsigned long long)told, (unsigned long long)seed);
  printf(
      "%llu strokes under %llu calls, of which %llu said damaged; the longest (%#llx) took %llu ms\n",
      (unsigned long long)strokes, (unsigned long long)calls, (unsigned long long)damaged,
      (unsigned long long)longest_call, (unsigned long long)(longest / 1000000));
  return done();
}
