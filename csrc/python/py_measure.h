/* py_measure.h - the library's own calls, measured: one in `every`, recorded with that weight. */
#ifndef FSHM_PY_MEASURE_H
#define FSHM_PY_MEASURE_H

#include <Python.h>

#include "../core/internal.h"
#include "py_threads.h"

typedef struct {
  fshm_segment *segment;
  uint32_t metric;
  uint32_t every, left; /* every 0: no call is measured */
} measure_t;

static inline void measure_init(measure_t *m, fshm_segment *segment, int metric, uint64_t every) {
  m->segment = segment;
  m->metric = metric < 0 ? 0 : (uint32_t)metric;
  m->every = m->left = metric < 0 || every > UINT32_MAX ? 0 : (uint32_t)every;
}

/* The time, if this call is one to measure; else 0. */
static inline uint64_t measure_begin(measure_t *m) {
  if (likely(!m->every)) return 0;
  uint32_t left = RELAXED_GET(m->left); /* of two concurrent threads one may go uncounted */
  RELAXED_SET(m->left, left > 1 ? left - 1 : m->every);
  return left > 1 ? 0 : fshm_clock();
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
  fshm_metric_record(m->segment, m->metric, ended > begun ? ended - begun : 0, m->every, success,
                     size, 0);
}

/* A call that would block an event loop (MustAskError of limiters/waiting.py) does not count: it is made again in a
 * thread, and counts there. */
static inline int measure_counts(const PyObject *result) {
  return result || !PyErr_ExceptionMatches(PyExc_BlockingIOError);
}

/* Return the result of the call, and record its time if it is one to measure. A denial is not a failure. */
#define RETURN_MEASURED(measure, call)                                                     \
  uint64_t begun = measure_begin(measure);                                                 \
  PyObject *result = call;                                                                 \
  if (unlikely(begun) && measure_counts(result)) measure_end(measure, begun, !!result, 0); \
  return result

#endif
