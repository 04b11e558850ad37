/* py_args.h - what the hand-written types share: their docstrings, errors, the arguments of their methods (keys, costs,
 * names), the end of their objects. */
#ifndef FSHM_PY_ARGS_H
#define FSHM_PY_ARGS_H

#include <Python.h>
#include <stdarg.h>

#include "../fast_shm.h"
#include "py_threads.h"

#define UNUSED __attribute__((unused))

/* A docstring, as the value of Py_tp_doc. */
#define DOC(text) ((void *)(uintptr_t)(text))

#define FAST(f) ((PyCFunction)(void (*)(void))(f))
#define FLAGS (METH_FASTCALL | METH_KEYWORDS)

/* The last step of a tp_dealloc. release: PyObject_Free, or PyObject_GC_Del. */
static inline void end_object(PyObject *o, freefunc release) {
  PyTypeObject *type = Py_TYPE(o);
  release(o);
  Py_DECREF(type);
}

/* The same, where the object may be of a derived class, which has a tp_free of its own. */
static void end_derived(PyObject *o) {
  end_object(o, (freefunc)PyType_GetSlot(Py_TYPE(o), Py_tp_free));
}

/* The end of a call whose result does not matter. 0, or -1: it raised. */
static inline int done(PyObject *result) {
  Py_XDECREF(result);
  return result ? 0 : -1;
}

/* PyErr_Format(), for calls that return an int: -1. */
static int fail(PyObject *kind, const char *format, ...) {
  va_list values;
  va_start(values, format);
  (void)PyErr_FormatV(kind, format, values);
  va_end(values);
  return -1;
}

typedef struct {
  const char *bytes;
  Py_ssize_t length;
  PyObject *held; /* to release, or NULL */
} key_arg;

static int get_bytes(PyObject *bytes, key_arg *k) {
  char *start = NULL;
  int failed = PyBytes_AsStringAndSize(bytes, &start, &k->length);
  k->bytes = start;
  return failed;
}

/* A str is its UTF-8 (cached in the str), bytes are themselves. Lone surrogates are keys too. */
static int get_key(PyObject *key, key_arg *k) {
  k->held = NULL;
  if (Py_TYPE(key) == &PyUnicode_Type || PyUnicode_Check(key)) { /* the first needs no call */
    k->bytes = PyUnicode_AsUTF8AndSize(key, &k->length);
    if (k->bytes) return 0;
    PyErr_Clear();
    k->held = PyUnicode_AsEncodedString(key, "utf-8", "surrogatepass");
    if (!k->held) return -1;
    return get_bytes(k->held, k);
  }
  if (PyBytes_Check(key)) return get_bytes(key, k);
  return fail(PyExc_TypeError, "key must be a str or bytes, not %R", key);
}

static int get_cost(PyObject *value, uint64_t *out) {
  PyObject *index = Py_TYPE(value) == &PyLong_Type ? Py_NewRef(value) : PyNumber_Index(value);
  if (!index)
    return fail(PyExc_TypeError, "cost must be an int, or one int for each limit, not %R", value);
  int overflow = 0;
  long long v = PyLong_AsLongLongAndOverflow(index, &overflow);
  Py_DECREF(index);
  if (v < 0 && !(v == -1 && overflow > 0))
    return fail(PyExc_ValueError, "cost must be 0 or more, not %R", value);
  *out = overflow > 0 ? UINT64_MAX : (uint64_t)v; /* more than can ever fit, either way */
  return 0;
}

/* One cost for all `count` limits, or a tuple or list with one for each. */
static int get_costs(Py_ssize_t count, PyObject *value, uint64_t *costs) {
  if (!PyTuple_Check(value) && !PyList_Check(value)) {
    if (get_cost(value, &costs[0])) return -1;
    for (int i = 1; i < FSHM_MAX_LIMITS; i++) costs[i] = costs[0];
    return 0;
  }
  if (count < 1 || count > FSHM_MAX_LIMITS || PySequence_Size(value) != count)
    return fail(PyExc_ValueError,
                "cost has %zd values, but the limiter has %zd limits: give one "
                "int, or one for each limit",
                PySequence_Size(value), count);
  for (Py_ssize_t i = 0; i < count; i++) {
    PyObject *item = PySequence_GetItem(value, i); /* its __index__() may shorten the list */
    int failed = !item || get_cost(item, &costs[i]);
    Py_XDECREF(item);
    if (failed) return -1;
  }
  /* Another process may have set more limits meanwhile. */
  for (Py_ssize_t i = count; i < FSHM_MAX_LIMITS; i++) costs[i] = costs[count - 1];
  return 0;
}

static int count_args(const char *name, Py_ssize_t n, Py_ssize_t wanted) {
  if (n == wanted) return 0;
  return fail(PyExc_TypeError, "%s() takes %zd arguments (%zd given)", name, wanted, n);
}

static int no_keywords(const char *name, PyObject *kwargs) {
  if (!kwargs || !PyDict_Size(kwargs)) return 0;
  return fail(PyExc_TypeError, "%s() takes no keyword arguments", name);
}

/* name(key, cost=1): positions or keywords, without the cost of a format string. */
static int parse(const char *name, PyObject *const *args, Py_ssize_t n, PyObject *kwnames,
                 const char *const *names, PyObject **out, Py_ssize_t most, Py_ssize_t least) {
  Py_ssize_t extra = kwnames ? PyTuple_Size(kwnames) : 0;
  if (n > most)
    return fail(PyExc_TypeError, "%s() takes at most %zd arguments (%zd given)", name, most, n);
  for (Py_ssize_t i = 0; i < n; i++) out[i] = args[i];
  for (Py_ssize_t i = 0; i < extra; i++) {
    PyObject *word = PyTuple_GetItem(kwnames, i);
    Py_ssize_t at = 0;
    while (at < most && PyUnicode_CompareWithASCIIString(word, names[at])) at++;
    if (at == most || out[at])
      return fail(PyExc_TypeError, "%s() got an unexpected or repeated argument %R", name, word);
    out[at] = args[n + i];
  }
  for (Py_ssize_t i = 0; i < least; i++) {
    if (!out[i]) return fail(PyExc_TypeError, "%s() missing the argument '%s'", name, names[i]);
  }
  return 0;
}

static const char *const key_cost[] = {"key", "cost", "max_wait_ns"};

/* py_decision.c, for the other types. Takes over the reference to limits. */
static PyObject *make_decision(PyObject *limits, const fshm_decision *d);

#endif
