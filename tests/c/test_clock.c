/* test_clock.c - the library's clock against a simulated kernel clock and counter.
 *
 * Nothing in clock.c is changed: its two ways to the outside world are wrapped. The kernel's clock runs fast and
 * slow beside the counter, by as much as the kernel lets anybody slew it, and the rate changes at any instant. */
#include <time.h>

#if defined(__x86_64__) && defined(__linux__)
#include <stdint.h>
#include <x86intrin.h>

static uint64_t simulated_counter(void);
static int simulated_gettime(clockid_t id, struct timespec *t);
#if defined(__clang__)
#pragma clang diagnostic ignored "-Wreserved-macro-identifier"
#endif
#define __rdtsc() simulated_counter()
#define clock_gettime(id, t) simulated_gettime(id, t)
#endif
#include "../../csrc/unity.c"
#undef clock_gettime

#include "check.h"

#if defined(__x86_64__) && defined(__linux__)
#undef __rdtsc

#define PROCESSES_HERE 3
#define MILLISECOND UINT64_C(1000000000) /* ps */
#define SECOND UINT64_C(1000000000000)
#define WINDOW (WINDOW_NS * UINT64_C(1000))

/* What clock.c and DESIGN.md, "The instant of a decision", promise; ns. */
#define EARLY 300           /* while the rate changes by less than 0.1 % */
#define LATE_SLEWED 4000    /* while the kernel slews its clock by up to 11 %, either way */
#define EARLY_SLEWED 5300
#define LATE_JUMPED WINDOW_NS /* whatever the counter does */
#define EARLY_JUMPED 12000

/* The world. */
static uint64_t mhz, ticks_ahead, ps; /* the counter: ps * mhz / 10^6 + ticks_ahead */
static wide_t kernel;                 /* its clock, in 10^-6 ps */
static int64_t slew, most_slew;       /* of the kernel's clock against the counter, millionths */
static uint64_t next_change, longest_steady;
static bool running; /* the kernel is asked: time passes */

static void pass(uint64_t more) {
  while (more) {
    uint64_t step = min_u64(more, next_change - ps);
    ps += step;
    more -= step;
    kernel += (wide_t)step * (uint64_t)(1000000 + slew);
    if (ps < next_change) continue;
    next_change = ps + random_scaled(1000000, longest_steady);
    const int64_t slews[] = {most_slew, -most_slew, 0,
                             (int64_t)random_below((uint64_t)most_slew * 2 + 1) - most_slew};
    slew = slews[random_below(4)];
  }
}

static uint64_t kernel_ns(void) { return (uint64_t)(kernel / 1000000000); }
static uint64_t counter(void) { return (uint64_t)((wide_t)ps * mhz / 1000000) + ticks_ahead; }

/* Some ns; seldom the thread is stopped. */
static void work(void) {
  pass(2000 + random_below(8000));
  if (!random_below(1000)) pass(random_scaled(1000, 20 * MILLISECOND));
}

static uint64_t simulated_counter(void) {
  work();
  return counter();
}

static int simulated_gettime(clockid_t id, struct timespec *t) {
  if (!running) return clock_gettime(id, t);
  work();
  t->tv_sec = (time_t)(kernel_ns() / 1000000000);
  t->tv_nsec = (long)(kernel_ns() % 1000000000);
  work();
  return 0;
}

/* Processes: what clock.c remembers, one for each. */
static struct {
  pair_t last, anchor;
  uint64_t rate, measured, told;
} of[PROCESSES_HERE];

/* The worst that was seen, ns. */
static int64_t late, early, apart, back;

static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

static uint64_t ask(unsigned p) {
  last_reading = of[p].last;
  anchor = of[p].anchor;
  store_relaxed(&rate, of[p].rate);
  store_relaxed(&measured, of[p].measured);
  uint64_t before = kernel_ns(), told = fshm_clock();
  of[p].last = last_reading;
  of[p].anchor = anchor;
  of[p].rate = load_relaxed(&rate);
  of[p].measured = load_relaxed(&measured);
  late = most(late, (int64_t)(told - kernel_ns()));
  early = most(early, (int64_t)(before - told));
  back = most(back, (int64_t)(of[p].told - told));
  of[p].told = told;
  return told;
}

static void begin_world(uint64_t at_mhz, int64_t millionths, uint64_t steady) {
  mhz = at_mhz;
  ticks_ahead = UINT64_C(1) << 50; /* it has run for long */
  ps = 0;
  kernel = (wide_t)SECOND * 1000000 * 1000;
  slew = 0;
  most_slew = millionths;
  longest_steady = steady;
  next_change = 1;
  late = early = apart = back = INT64_MIN;
  memset(of, 0, sizeof of);
  counter_trusted = true;
}

/* Asked so often that the next calls are within the window, or as seldom as once in 20 s. */
static void some_calls(int n) {
  for (int i = 0; i < n; i++) {
    switch (random_below(8)) {
      case 0:
        pass(random_scaled(1000, 20 * SECOND));
        break;
      case 1:
        pass(random_below(1000000));
        break;
      case 2:
        pass(WINDOW * 8 / 10 + random_below(WINDOW / 2));
        break;
      default:
        pass(random_below(WINDOW * 5 / 4));
    }
    unsigned p = (unsigned)random_below(PROCESSES_HERE);
    uint64_t told = ask(p);
    /* One after the other; the second may only be earlier by as much as clocks differ. */
    apart = most(apart, (int64_t)(told - ask((p + 1) % PROCESSES_HERE)));
  }
}

/* All know a rate: that of now. */
static void calibrate(void) {
  for (int i = 0; i < 8; i++) {
    pass(400 * MILLISECOND);
    for (unsigned p = 0; p < PROCESSES_HERE; p++) (void)ask(p);
  }
}

static int64_t worst[4];

static void keep_worst(void) {
  const int64_t seen[] = {late, early, apart, back};
  for (int i = 0; i < 4; i++) worst[i] = most(worst[i], seen[i]);
}

static void show(const char *what, int64_t millionths) {
  printf("%s, slewed by %lld millionths, ns: later %lld, earlier %lld, apart %lld, back %lld\n",
         what, (long long)millionths, (long long)worst[0], (long long)worst[1], (long long)worst[2],
         (long long)worst[3]);
  for (int i = 0; i < 4; i++) worst[i] = INT64_MIN;
}

static const uint64_t speeds[] = {1000, 1400, 2450, 3000, 3700, 5000};
#define SPEEDS (sizeof speeds / sizeof *speeds)

/* As NTP does it: by 500 millionths, and the kernel's own phase adjustment less than as much. */
static void test_disciplined(void) {
  for (size_t i = 0; i < SPEEDS; i++) {
    begin_world(speeds[i], 495, 4 * SECOND);
    some_calls(fewer(100000));
    CHECK_OP(late, <=, 0);
    CHECK_OP(early, <=, EARLY);
    CHECK_OP(apart, <=, EARLY);
    CHECK_OP(back, <=, EARLY);
    keep_worst();
  }
  show("disciplined", 495);
}

/* chrony slews by up to 83,333 millionths, adjtimex()'s tick allows 100,000, the kernel's clock source 110,000. */
static void test_slewed(void) {
  const int64_t slews[] = {83333, 100000, 110000};
  for (size_t k = 0; k < sizeof slews / sizeof *slews; k++) {
    for (size_t i = 0; i < SPEEDS; i++) {
      begin_world(speeds[i], slews[k], (i % 2 ? 20 : 3) * SECOND);
      some_calls(fewer(100000));
      CHECK_OP(late, <=, LATE_SLEWED);
      CHECK_OP(early, <=, EARLY_SLEWED);
      CHECK_OP(apart, <, CLOCKS_DIFFER);
      CHECK_OP(back, <=, EARLY_SLEWED);
      keep_worst();
    }
    show("slewed", slews[k]);
  }
}

/* Suspend: the kernel's clock goes on; the counter does too, or begins anew, or stood still, or was set to any
 * value. No process runs for some ms before and after it. */
static void test_suspended(void) {
  for (int i = 0; i < fewer(3000); i++) {
    begin_world(speeds[random_below(SPEEDS)], random_below(2) ? 495 : 110000, 4 * SECOND);
    calibrate();
    some_calls((int)random_below(40));
    uint64_t asleep = random_scaled(MILLISECOND, 10000 * SECOND);
    pass(5 * MILLISECOND);
    if (random_below(4)) {
      switch (random_below(3)) {
        case 0:
          ticks_ahead = random_below(2) ? 0 : ticks_ahead + random_scaled(1, UINT64_C(1) << 45);
          break;
        case 1:
          /* by little: by chance it might be as it was */
          ticks_ahead -= random_scaled(UINT64_C(1) << 33, UINT64_C(1) << 45);
          break;
        default:
          break; /* stood still */
      }
      kernel += (wide_t)asleep * 1000000;
    } else {
      pass(asleep);
    }
    pass(5 * MILLISECOND);
    some_calls(60);
    CHECK_OP(late, <=, LATE_JUMPED);
    CHECK_OP(early, <=, EARLY_JUMPED);
    CHECK_OP(apart, <, CLOCKS_DIFFER);
    keep_worst();
  }
  show("suspended", 110000);
}

/* The counter jumps ahead by less than the window, unnoticed. */
static void test_small_jumps(void) {
  for (int i = 0; i < fewer(3000); i++) {
    begin_world(speeds[random_below(SPEEDS)], 495, 4 * SECOND);
    calibrate();
    for (int k = 0; k < 20; k++) {
      ticks_ahead += random_below(WINDOW_NS * mhz / 1000);
      some_calls(1);
    }
    CHECK_OP(late, <=, LATE_JUMPED);
    CHECK_OP(early, <=, EARLY_JUMPED);
    CHECK_OP(apart, <, CLOCKS_DIFFER);
    keep_worst();
  }
  show("small jumps", 495);
}

/* Where the kernel does not trust the counter, or asking it takes a system call: it is asked each time. */
static void test_not_trusted(void) {
  begin_world(3000, 110000, SECOND);
  counter_trusted = false;
  some_calls(20000);
  CHECK_OP(late, <=, 0);
  CHECK_OP(early, <=, 0);
}

int main(void) {
  running = true;
  keep_worst();
  test_disciplined();
  test_slewed();
  test_suspended();
  test_small_jumps();
  test_not_trusted();
  return done();
}

#else

int main(void) {
  for (int i = 0; i < 1000; i++) {
    uint64_t before = kernel_clock(), told = fshm_clock();
    CHECK(before <= told && told <= kernel_clock());
  }
  return done();
}

#endif
