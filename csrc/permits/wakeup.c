/* wakeup.c - waiting for a permit, and waking a waiter. Argued in DESIGN.md, "Permits".
 *
 * Keys share the futex words by their hash. On one word, the futex's bit set separates 32 classes of keys; a tag in
 * the word separates the keys of a class:
 *   tag of the key of the last wake-up (16 bits) | wake-ups (15) | there may be waiters (1)
 * `wakeup`, 32 bits of the key's hash, gives the number of the word, the class, and the tag.
 */
#include <errno.h>
#include <time.h>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "semaphore.h"
#include "wakeup.h"

#define SENDS UINT32_C(0xfffe)
static uint32_t class_of(uint32_t wakeup) { return UINT32_C(1) << (wakeup / WAKEUPS % 32); }
static uint32_t tag_of(uint32_t wakeup) { return wakeup & UINT32_C(0xffff0000); }

#if defined(__linux__)
static long futex(_Atomic uint32_t *word, int op, uint32_t value, const struct timespec *until,
                  uint32_t classes) {
  /* Not FUTEX_PRIVATE: the word is shared. The kernel wakes in the order of arrival. */
  return syscall(SYS_futex, word, op, value, until, NULL, classes);
}
#endif

/* Wake one waiter of the class, if there may be one. The caller's swap comes before this load (a full barrier), and
 * a waiter arms before it looks at the permits: one of the two sees the other. If no waiter of the class sleeps, the
 * bit is cleared; other waiters on this word set it again. */
void wakeup_send(fshm_segment *s, uint32_t wakeup) {
  _Atomic uint32_t *b = &s->header->wakeups[wakeup % WAKEUPS];
  after_swap();
  uint32_t seen = load_relaxed(b), rung = seen;
  for (int tries = 0; tries < MAX_TRIES; tries++) {
    if (!(seen & 1)) return;
    rung = tag_of(wakeup) | ((seen + 2) & SENDS) | 1;
    if (atomic_compare_exchange_strong(b, &seen, rung)) break;
  }
#if defined(__linux__)
  if (futex(b, FUTEX_WAKE_BITSET, 1, NULL, class_of(wakeup)) > 0) return;
  if (atomic_compare_exchange_strong(b, &rung, rung & ~1U))
    (void)futex(b, FUTEX_WAKE_BITSET, INT32_MAX, NULL, UINT32_MAX);
#endif
}

void wakeup_send_all(fshm_segment *s) {
  for (uint32_t wakeup = 0; wakeup < WAKEUPS; wakeup++) {
    _Atomic uint32_t *b = &s->header->wakeups[wakeup];
    if (!(load_relaxed(b) & 1)) continue;
    (void)atomic_fetch_xor(b, 2); /* so that no waiter falls asleep on the old value */
#if defined(__linux__)
    (void)futex(b, FUTEX_WAKE_BITSET, INT32_MAX, NULL, UINT32_MAX);
#endif
  }
}

static uint64_t hash_of_key(const fshm_limiter *l, const void *key, uint64_t length) {
  return fshm_siphash(l->key[0], l->key[1], key, length);
}
static uint32_t key_wakeup(const fshm_limiter *l, const void *key, uint64_t length) {
  return wakeup_of(hash_of_key(l, key, length));
}

uint32_t fshm_wakeup_arm(fshm_limiter *l, const void *key, uint64_t length) {
  return atomic_fetch_or(&l->segment->header->wakeups[key_wakeup(l, key, length) % WAKEUPS], 1) | 1;
}

void fshm_wakeup_send(fshm_limiter *l, const void *key, uint64_t length) {
  wakeup_send(l->segment, key_wakeup(l, key, length));
}

static int sleep_until_woken(const fshm_limiter *l, uint32_t wakeup, uint32_t armed,
                             uint64_t timeout) {
  _Atomic uint32_t *b = &l->segment->header->wakeups[wakeup % WAKEUPS];
#if defined(__linux__)
  struct timespec until; /* FUTEX_WAIT_BITSET takes an instant of CLOCK_MONOTONIC */
  (void)clock_gettime(CLOCK_MONOTONIC, &until);
  timeout = min_u64(timeout, UINT64_C(1000000000) * 3600) + (uint64_t)until.tv_nsec;
  until.tv_sec += (time_t)(timeout / 1000000000);
  until.tv_nsec = (long)(timeout % 1000000000);
  if (futex(b, FUTEX_WAIT_BITSET, armed, &until, class_of(wakeup))) return errno == EAGAIN;
  /* Woken by another key's wake-up: pass it on to the next waiter of the class. Waiters that slept before it are
   * ahead of those that armed after it; these find the word as they armed it, and end the chain. */
  uint32_t now = load_relaxed(b);
  if (now != armed && tag_of(now) != tag_of(wakeup))
    (void)futex(b, FUTEX_WAKE_BITSET, 1, NULL, class_of(wakeup));
  return 1;
#else
  struct timespec slice = {0, 1000000};
  for (uint64_t slept = 0; slept < timeout; slept += 1000000) {
    if (load_relaxed(b) != armed) return 1;
    (void)nanosleep(&slice, NULL);
  }
  return 0;
#endif
}

/* 1: woken (or the word changed since arming). 0: the time is up, or a signal came; then the caller's next look is a
 * whole one, which finds the dead. */
int fshm_wakeup_wait(fshm_limiter *l, const void *key, uint64_t length, uint32_t armed,
                     uint64_t timeout) {
  const uint64_t hash = hash_of_key(l, key, length);
  int woken = sleep_until_woken(l, wakeup_of(hash), armed, timeout);
  if (!woken) semaphore_forget(l->segment, hash);
  return woken;
}
