/* py_watch.h - has the segment been removed or damaged under this process? Looked for in calls, every few seconds.
 *
 * Other processes and the system remove segments, and tell nobody: only a look at the file says it. A call counts down,
 * and one in WATCH_CALLS asks the clock; in a process with few calls, fewer are counted. So a call pays for a decrement,
 * and a process looks once in WATCH_NS: two or three system calls. No thread does it: it would be there at a fork. */
#ifndef FSHM_PY_WATCH_H
#define FSHM_PY_WATCH_H

#include <Python.h>

#include "../core/internal.h"
#include "py_threads.h"

#define WATCH_NS UINT64_C(5000000000)
#define WATCH_CALLS 100

/* _shared/segment.py: given the address of a segment; NULL: none yet. Never freed: a thread may be calling it. */
static PyObject *watch_hook;

/* The countdown of one thread. */
typedef struct {
  uint32_t left; /* calls until the next event */
  uint32_t counted; /* py_measure.h: calls between the last event and the next */
  uint32_t of; /* without a GIL: watch_t.number. 0: none */
} countdown_t;

typedef struct {
  fshm_segment *segment; /* NULL: nothing is watched */
  uint64_t at; /* the clock at the last event */
  uint32_t step; /* how many calls were to be between the last two */
#ifdef Py_GIL_DISABLED
  uint32_t number; /* no other object has it, or had it */
#else
  countdown_t countdown;
#endif
} watch_t;

#ifdef Py_GIL_DISABLED
/* Each thread counts for itself, or each call would wait for a cache line that the others write. An object whose number
 * meets another's here has an event, and begins anew. */
#define COUNTDOWNS 64
static _Thread_local countdown_t countdowns[COUNTDOWNS];
static inline countdown_t *watch_countdown(watch_t *w) {
  countdown_t *c = &countdowns[w->number % COUNTDOWNS];
  if (unlikely(c->of != w->number)) *c = (countdown_t){1, 1, w->number};
  return c;
}
#else
static inline countdown_t *watch_countdown(watch_t *w) { return &w->countdown; }
#endif

static inline void watch_init(watch_t *w, fshm_segment *segment) {
  *w = (watch_t){.segment = segment, .step = 1};
#ifdef Py_GIL_DISABLED
  static uint32_t numbers;
  w->number = __atomic_add_fetch(&numbers, 1, __ATOMIC_RELAXED);
#else
  w->countdown = (countdown_t){1, 1, 0};
#endif
}

/* Count a call. Nonzero: watch_event() is due, and sets `left` anew. */
static inline int watch_due(watch_t *w) {
  countdown_t *c = watch_countdown(w);
  const uint32_t left = c->left;
  if (likely(left > 1)) c->left = left - 1;
  return left <= 1;
}

/* -1: the hook raised, such as an exception out of a signal handler. */
static COLD int watch_look(fshm_segment *s, uint64_t now) {
  uint64_t before = load_relaxed(&s->watched);
  if (before && now - before < WATCH_NS) return 0;
  /* Before the hook is called: a handler of the log may call a limiter. Of several threads, one looks. */
  if (!atomic_compare_exchange_strong_explicit(&s->watched, &before, now, memory_order_relaxed,
                                               memory_order_relaxed))
    return 0;
  PyObject *hook = __atomic_load_n(&watch_hook, __ATOMIC_ACQUIRE);
  if (!before || !hook) return 0; /* it was opened just now */
  PyObject *result = PyObject_CallFunction(hook, "K", (unsigned long long)(uintptr_t)s);
  Py_XDECREF(result);
  return result ? 0 : -1;
}

static COLD int watch_event(watch_t *w, uint64_t now) {
  countdown_t *c = watch_countdown(w);
  if (!w->segment) {
    c->left = UINT32_MAX;
    return 0;
  }
  const uint64_t at = RELAXED_GET(w->at), took = now - at; /* huge, if another thread was first */
  uint64_t step = RELAXED_GET(w->step);
  if (at) step = took > WATCH_NS ? step * WATCH_NS / took : 2 * step;
  step = step < 1 ? 1 : min_u64(step, WATCH_CALLS);
  RELAXED_SET(w->at, now);
  RELAXED_SET(w->step, (uint32_t)step);
  c->left = (uint32_t)step;
  return watch_look(w->segment, now);
}

/* For calls that are not measured (py_measure.h). */
static inline int watch_call(watch_t *w) {
  return unlikely(watch_due(w)) ? watch_event(w, fshm_clock()) : 0;
}

/* _on_look(hook): called with the address of a segment, every WATCH_NS at most. */
static PyObject *module_on_look(UNUSED PyObject *module, PyObject *hook) {
  __atomic_store_n(&watch_hook, Py_NewRef(hook), __ATOMIC_RELEASE);
  Py_RETURN_NONE;
}

#endif
