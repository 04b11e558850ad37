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

static PyObject
    *watch_hook; /* _shared/segment.py: given the address of a segment; NULL: none yet */

typedef struct {
  fshm_segment *segment; /* NULL: nothing is watched */
  uint32_t left,
      step; /* calls until the next event; and how many were to be between the last two */
  uint64_t at; /* the clock at the last event */
} watch_t;

static inline void watch_init(watch_t *w, fshm_segment *segment) {
  w->segment = segment;
  w->left = w->step = 1;
  w->at = 0;
}

/* Count a call. Nonzero: watch_event() is due, and sets `left` anew. Of two threads one may go uncounted. */
static inline int watch_due(watch_t *w) {
  uint32_t left = RELAXED_GET(w->left);
  if (likely(left > 1)) RELAXED_SET(w->left, left - 1);
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
  if (!before || !watch_hook) return 0; /* it was opened just now */
  PyObject *result = PyObject_CallFunction(watch_hook, "K", (unsigned long long)(uintptr_t)s);
  Py_XDECREF(result);
  return result ? 0 : -1;
}

static COLD int watch_event(watch_t *w, uint64_t now) {
  if (!w->segment) {
    RELAXED_SET(w->left, UINT32_MAX);
    return 0;
  }
  const uint64_t at = RELAXED_GET(w->at), took = now - at; /* huge, if another thread was first */
  uint64_t step = RELAXED_GET(w->step);
  if (at) step = took > WATCH_NS ? step * WATCH_NS / took : 2 * step;
  step = step < 1 ? 1 : min_u64(step, WATCH_CALLS);
  RELAXED_SET(w->at, now);
  RELAXED_SET(w->step, (uint32_t)step);
  RELAXED_SET(w->left, (uint32_t)step);
  return watch_look(w->segment, now);
}

/* For calls that are not measured (py_measure.h). */
static inline int watch_call(watch_t *w) {
  return unlikely(watch_due(w)) ? watch_event(w, fshm_clock()) : 0;
}

/* _on_look(hook): called with the address of a segment, every WATCH_NS at most. */
static PyObject *module_on_look(PyObject *module, PyObject *hook) {
  PyObject *old;
  ALONE_BEGIN(module);
  old = watch_hook;
  watch_hook = Py_NewRef(hook);
  ALONE_END();
  Py_XDECREF(old);
  Py_RETURN_NONE;
}

#endif
