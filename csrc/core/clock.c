/* clock.c - the time in ns since boot, cheaper than the kernel's own call.
 *
 * Asking the kernel (vDSO) takes 24 ns, reading the processor's time stamp counter 10 ns. So a process asks the
 * kernel at most once in WINDOW_NS, and adds the counter's advance since. It does so only where the kernel itself
 * uses the counter as its clock source (x86-64, current_clocksource = tsc).
 *
 * The error. "Earlier" is as if the call had been preempted for so long between reading the clock and charging,
 * which every bound allows for. "Later" adds to the error of a bound (DESIGN.md, "The instant of a decision").
 * - The kernel's rate changes by less than 0.1 % (NTP changes it by 0.05 % at most): never later than the kernel's
 *   clock, and at most 0.3 us earlier. Not later: `time` is read before `ticks`, and ticks are converted at a rate
 *   0.1 % slower than measured; the error of the measurement is below 0.02 %. Not much earlier: a reading is only
 *   kept if the counter advanced by less than 0.2 us around it.
 * - The clock is slewed by percents (chrony: up to 8.3 %; the kernel allows 11 %): our rate is up to seconds old, so
 *   the error is the change of the rate in WINDOW_NS: at most 4 us later, 5.3 us earlier. The rate can change at any
 *   instant, so only a short window bounds the error.
 * - The counter jumps, stops or is set (suspend, migration to another host): if it is outside the window, we ask the
 *   kernel, so the time is never later than the kernel's clock by more than WINDOW_NS. A rate is used only once two
 *   measurements agree within what any slew allows. A measurement across a jump does not agree, or it is off by so
 *   little that the time is at most 12 us earlier, for a second.
 * - The kernel gives up the counter: its answer then takes a system call, longer than 0.2 us. No reading is kept,
 *   and each call asks.
 * So the clocks of two processes differ by less than CLOCKS_DIFFER (hash_table.c), and a caller's time goes backwards
 * by no more than that. tests/c/test_clock.c runs all this against a simulated kernel and counter.
 */
#include <stdio.h>
#include <time.h>

#include "internal.h"

/* This clock includes sleep, so a limit's minute is a minute of real time. */
#if defined(CLOCK_BOOTTIME)
#define THE_CLOCK CLOCK_BOOTTIME
#else
#define THE_CLOCK CLOCK_MONOTONIC /* macOS: also counts sleep */
#endif

static uint64_t kernel_clock(void) {
  struct timespec t;
  (void)clock_gettime(THE_CLOCK, &t);
  return (uint64_t)t.tv_sec * UINT64_C(1000000000) + (uint64_t)t.tv_nsec;
}

#if defined(__x86_64__) && defined(__linux__)
#include <x86intrin.h>

#define WINDOW_NS 20000
#define CALIBRATE_NS 10000000 /* least time between the two readings that give the rate */
#define RENEW_NS UINT64_C(1000000000)

static bool counter_trusted; /* set before main(), constant afterwards */

/* A reading: who = ticks, when = time. Read and written whole, by any thread. */
static _Alignas(16) pair_t last_reading, anchor;
/* window in ticks << 32 | ns per tick << 32; 0 = not measured yet. */
static _Atomic uint64_t rate;
static _Atomic uint64_t measured; /* ns per tick << 32, when it was last measured */

__attribute__((constructor)) static void clock_detect(void) {
  char name[16] = {0};
  FILE *f = fopen("/sys/devices/system/clocksource/clocksource0/current_clocksource", "re");
  if (!f) return;
  counter_trusted = fgets(name, sizeof name, f) && !strcmp(name, "tsc\n");
  (void)fclose(f);
}

static void store_reading(pair_t *to, pair_t value) {
  pair_t seen = pair_load(to);
  (void)pair_cas(to, &seen, value); /* lost: another thread's reading is as good */
}

static void measure_rate(pair_t reading) {
  pair_t from = pair_load(&anchor);
  uint64_t ticks = reading.who - from.who, ns = reading.when - from.when;
  if (!from.when || reading.who <= from.who || reading.when <= from.when || ns > 10 * RENEW_NS) {
    store_reading(&anchor, reading);
    return;
  }
  if (ns < (load_relaxed(&rate) ? RENEW_NS : CALIBRATE_NS)) return;
  pair_t seen = from;
  if (!pair_cas(&anchor, &seen, reading)) return; /* another thread measures from there */
  uint64_t per_tick = (uint64_t)(((wide_t)ns << 32) / ticks), slower = per_tick - per_tick / 1000;
  uint64_t window = (uint64_t)((wide_t)ticks * WINDOW_NS / ns);
  /* The kernel slews by 11 % at most, either way: of two measurements that differ by more than a quarter, one
   * was made across a jump. The exchange pairs with itself in another thread. */
  uint64_t other = atomic_exchange_explicit(&measured, per_tick, memory_order_relaxed);
  bool agree = per_tick <= other + other / 4 && other <= per_tick + per_tick / 4;
  bool fits = agree && slower && slower <= UINT32_MAX && window <= UINT32_MAX; /* above 1 GHz */
  store_relaxed(&rate, fits ? window << 32 | slower : 0);
}

/* Ask the kernel, and keep the answer if it came quickly. */
static UNGUARDED __attribute__((noinline)) uint64_t read_clock(void) {
  uint64_t before = __rdtsc(), time = kernel_clock(), after = __rdtsc();
  uint64_t window = load_relaxed(&rate) >> 32;
  if (after - before > (window ? window / (WINDOW_NS / 200) : 1000)) return time;
  pair_t reading = {after, time};
  if (window) store_reading(&last_reading, reading); /* before that: good enough for a rate alone */
  measure_rate(reading);
  return time;
}

UNGUARDED uint64_t fshm_clock(void) {
  if (unlikely(!counter_trusted)) return kernel_clock();
  uint64_t r = load_relaxed(&rate);
  pair_t last = pair_load(&last_reading);
  uint64_t ticks = __rdtsc() - last.who; /* wraps to a large number if the counter went back */
  if (unlikely(ticks >= r >> 32)) return read_clock();
  return last.when + ((ticks * (r & UINT32_MAX)) >> 32);
}

#else
uint64_t fshm_clock(void) { return kernel_clock(); }
#endif
