/* py_measure.h - the library's own calls, measured: one in `every`, recorded with that weight. */
#ifndef FSHM_PY_MEASURE_H
#define FSHM_PY_MEASURE_H

#include <Python.h>

#include "../core/internal.h"
#include "py_threads.h"
#include "py_watch.h"

typedef struct {
  watch_t watch; /* of the same calls: its events decide which are measured */
  uint32_t metric;
  uint32_t every, since; /* every 0: no call is measured. since: calls after the last that was */
} measure_t;

static inline void measure_init(measure_t *m, fshm_segment *segment, int metric, uint64_t every) {
  watch_init(&m->watch, segment);
  m->metric = metric < 0 ? 0 : (uint32_t)metric;
  m->every = metric < 0 || every > UINT32_MAX ? 0 : (uint32_t)every;
  m->since = 0;
}

static COLD int measure_event(measure_t *m, uint64_t *begun) {
  const uint64_t now = fshm_clock();
  const uint32_t counted = watch_countdown(&m->watch)->counted;
  if (watch_event(&m->watch, now)) return -1;
  if (!m->every) return 0;
  countdown_t *c = watch_countdown(&m->watch); /* anew: the hook may have called limiters */
  /* Of two threads at once, one may go uncounted. */
  uint64_t since = (uint64_t)RELAXED_GET(m->since) + counted;
  if (since >= m->every) {
    since = 0;
    *begun = now;
  }
  /* The next event is no later than the next call to measure. */
  const uint64_t next = min_u64(c->left, m->every - since);
  RELAXED_SET(m->since, (uint32_t)since);
  c->left = c->counted = (uint32_t)next;
  return 0;
}

/* begun: the time, if this call is one to measure; else 0. -1: an exception was raised, before anything was done. */
static inline int measure_begin(measure_t *m, uint64_t *begun) {
  *begun = 0;
  return unlikely(watch_due(&m->watch)) ? measure_event(m, begun) : 0;
}

/* A type's _measure(segment, metric, every): how often to record a call, and as what. */
static inline PyObject *measure_set(measure_t *m, PyObject *args) {
  unsigned long long segment, every;
  int metric;
  if (!PyArg_ParseTuple(args, "KiK", &segment, &metric, &every)) return NULL;
  measure_init(m, (fshm_segment *)(uintptr_t)segment, metric, every);
  Py_RETURN_NONE;
}

/* Rarely called: kept out of the calls that are measured. */
static COLD void measure_end(const measure_t *m, uint64_t begun, int success, uint64_t size) {
  uint64_t ended = fshm_clock();
  fshm_metric_record(m->watch.segment, m->metric, ended > begun ? ended - begun : 0, m->every,
                     success, size, 0);
}

/* A call that would block an event loop (MustAskError of limiters/waiting.py) does not count: it is made again in a
 * thread, and counts there. */
static inline int measure_counts(const PyObject *result) {
  return result || !PyErr_ExceptionMatches(PyExc_BlockingIOError);
}

/* Return the result of the call, and record its time if it is one to measure. A denial is not a failure. */
#define RETURN_MEASURED(measure, call)                                                     \
  uint64_t begun;                                                                          \
  if (measure_begin(measure, &begun)) return NULL;                                         \
  PyObject *result = call;                                                                 \
  if (unlikely(begun) && measure_counts(result)) measure_end(measure, begun, !!result, 0); \
  return result

#endif
