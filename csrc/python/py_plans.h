/* py_plans.h - a limiter whose keys have plans: which plan a key has, as this process remembers it.
 *
 * Beside the object lies a table from the hash of a key to the number of a plan, and when that was found. It has a fixed
 * size. A key is in one of two lines, in the second where the first is full; when both are, they forget their oldest key.
 * So a flood of keys takes no memory, and a usual call takes one more cache line, which is fetched together with those of
 * the segment. Python finds the plan of a key that is not there, or is there for too long: _answering() of
 * limiters/plans.py. That takes 30 times as long as a call, so few keys may be forgotten for want of a place: with one
 * line for a key, 100,000 keys lost 3 % of them.
 */
#ifndef FSHM_PY_PLANS_H
#define FSHM_PY_PLANS_H

#include <stdlib.h>
#include <sys/mman.h>

#include "../limits/limiter.h"
#include "py_args.h"

#define PLAN_LINES \
  (UINT64_C(1) << 16) /* of 4 keys: 4 MB, of which a program with few keys touches little */
#define PLAN_WAYS 4
#define MOST_PLANS (1U << 20) /* numbers of plans: 20 bits of 24 */

/* A plan of the limiter: its Core, and its limits. */
typedef struct {
  PyObject *core, *limits;
} plan_t;

/* key: hash of the key ^ found. found: when (40 bits, of 2^20 ns) | number of the plan (24). 0: free. So two words that were
 * not written together fit no key: threads without a GIL need no lock. */
typedef struct {
  uint64_t key, found;
} plan_entry_t;

typedef struct {
  plan_entry_t *entries; /* NULL: the keys of this Core have no plans */
  plan_t *plans;
  /* By the number of the plan: a cache line each, plan_pack(). den 0: the Core decides itself, since it has several limits,
   * or a server grants them. */
  rule_t *packed;
  void *mapped, *allocated; /* where entries and packed lie */
  uint32_t count;
  uint32_t overrides; /* fshm_overrides(): answers before `since` were found by an older number */
  uint64_t since, age; /* of 2^20 ns */
} plans_t;

static inline uint64_t plan_clock(void) { return fshm_clock() >> 20; }

static inline plan_entry_t *plan_line(const plans_t *p, uint64_t hash) {
  return &p->entries[(hash & (PLAN_LINES - 1)) * PLAN_WAYS];
}
static inline plan_entry_t *plan_second_line(const plans_t *p, uint64_t hash) {
  return plan_line(p, hash >> 32);
}
static inline bool plan_is_of(const plan_entry_t *entry, uint64_t hash, uint64_t found) {
  return found && (RELAXED_GET(entry->key) ^ found) == hash;
}

#define NO_PLAN UINT32_MAX
/* The plan of the key, whenever it was found; NO_PLAN: not there. when: of 2^20 ns. */
static inline uint32_t plan_there(const plans_t *p, uint64_t hash, uint64_t *when) {
  const plan_entry_t *line = plan_line(p, hash);
  for (unsigned i = 0; i < 2 * PLAN_WAYS; i++) {
    if (i == PLAN_WAYS) line = plan_second_line(p, hash) - PLAN_WAYS;
    const uint64_t found = RELAXED_GET(line[i].found);
    if (!plan_is_of(&line[i], hash, found)) continue;
    const uint32_t number = (uint32_t)(found & 0xffffff);
    *when = found >> 24;
    return number < __atomic_load_n(&p->count, __ATOMIC_ACQUIRE) ? number : NO_PLAN;
  }
  return NO_PLAN;
}
/* The plan that counts now; NO_PLAN: it has to be found. */
static inline uint32_t plan_now(const plans_t *p, const fshm_limiter *l, uint64_t hash) {
  uint64_t when;
  const uint32_t plan = plan_there(p, hash, &when);
  /* acquire: with the release of plans_look(), so that `since` is not older than the number */
  const uint32_t overrides = __atomic_load_n(&p->overrides, __ATOMIC_ACQUIRE);
  if (unlikely(plan == NO_PLAN || when < RELAXED_GET(p->since) ||
               (int64_t)(plan_clock() - when) > (int64_t)p->age ||
               fshm_overrides((fshm_limiter *)(uintptr_t)l) != overrides))
    return NO_PLAN;
  return plan;
}

/* Overrides have changed: forget when all answers were found. */
static void plans_look(plans_t *p, const fshm_limiter *l) {
  const uint32_t now = fshm_overrides((fshm_limiter *)(uintptr_t)l);
  if (now == RELAXED_GET(p->overrides)) return;
  RELAXED_SET(p->since, plan_clock() + 1);
  __atomic_store_n(&p->overrides, now, __ATOMIC_RELEASE);
}

/* Where the key is; else the first free place; else that of the oldest. */
static plan_entry_t *plan_place(const plans_t *p, uint64_t hash) {
  plan_entry_t *lines[2] = {plan_line(p, hash), plan_second_line(p, hash)}, *best = lines[0];
  for (unsigned i = 0; i < 2 * PLAN_WAYS; i++) {
    plan_entry_t *entry = &lines[i / PLAN_WAYS][i % PLAN_WAYS];
    const uint64_t found = RELAXED_GET(entry->found);
    if (plan_is_of(entry, hash, found)) return entry;
    if (found >> 24 < RELAXED_GET(best->found) >> 24) best = entry;
  }
  return best;
}
static void plan_remember(plans_t *p, uint64_t hash, uint32_t number, uint64_t when) {
  plan_entry_t *entry = plan_place(p, hash);
  const uint64_t found = when << 24 | number;
  RELAXED_SET(entry->found, found);
  RELAXED_SET(entry->key, hash ^ found);
}

#define PLAN_BYTES (PLAN_LINES * PLAN_WAYS * sizeof(plan_entry_t))
#define HUGE_PAGE (UINT64_C(2) << 20)
/* In huge pages where the system gives them on request: keys lie anywhere in the 4 MB, and a page that is not in the TLB
 * costs as much as the line. Zeroed. */
static plan_entry_t *plan_entries(void **mapped) {
  void *at = mmap(NULL, PLAN_BYTES + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                  -1, 0);
  *mapped = at == MAP_FAILED ? NULL : at;
  if (!*mapped) return NULL;
  at = (void *)(((uintptr_t)at + HUGE_PAGE - 1) & ~(uintptr_t)(HUGE_PAGE - 1));
#if defined(MADV_HUGEPAGE)
  (void)madvise(at, PLAN_BYTES, MADV_HUGEPAGE);
#endif
  return at;
}
static bool plans_make(plans_t *p) {
  p->plans = calloc(MOST_PLANS, sizeof *p->plans); /* untouched pages take no memory */
  p->allocated = calloc(MOST_PLANS + 1, sizeof *p->packed);
  plan_entry_t *entries = plan_entries(&p->mapped);
  if (!p->plans || !p->allocated || !entries) return false;
  p->packed = (rule_t *)(void *)(((uintptr_t)p->allocated + 63) & ~(uintptr_t)63);
  p->entries = entries;
  return true;
}

static void plans_free(plans_t *p) {
  for (uint32_t i = 0; i < p->count; i++) {
    Py_DECREF(p->plans[i].core);
    Py_DECREF(p->plans[i].limits);
  }
  if (p->mapped) (void)munmap(p->mapped, PLAN_BYTES + HUGE_PAGE);
  free(p->allocated);
  free(p->plans);
}

#endif
