/* py_recorder.c - Recorder: record(component, operation, duration_ms, ...) without a Python frame.
 *
 * The first call finds the segment: it calls _bind() of the Python subclass, which calls _set().
 */
#include "../core/layout.h"
#include "py_args.h"

/* The values of _set(). A call holds references to them, since another thread may replace them meanwhile. */
typedef struct {
  fshm_segment *segment; /* NULL = not bound yet */
  PyObject *handle; /* owns it */
  PyObject *metrics; /* dict: component -> dict: operation -> int */
} bound_t;

typedef struct {
  PyObject_HEAD
  bound_t bound;
} Recorder;

static const char *const record_names[] = {"component",  "operation",   "duration_ms", "success",
                                           "input_size", "output_size", "metadata"};

/* The index of (component, operation), from the dicts, else from the segment. Only exact strs are looked up:
 * comparing them runs no Python, which could replace the dicts. Names that are summed as "(other)" are not kept, so
 * that endless names take no memory. */
static long metric_number(const bound_t *b, PyObject *component, PyObject *operation) {
  PyObject *by_operation = NULL, *number = NULL;
  int exact = PyUnicode_CheckExact(component) && PyUnicode_CheckExact(operation);
  if (!PyUnicode_Check(component))
    return fail(PyExc_TypeError, "component must be a str, not %R", component);
  if (!PyUnicode_Check(operation))
    return fail(PyExc_TypeError, "operation must be a str, not %R", operation);
  if (exact) by_operation = dict_get(b->metrics, component);
  if (by_operation) number = dict_get(by_operation, operation);
  long found = number ? PyLong_AsLong(number) : -1;
  key_arg c = {NULL, 0, NULL}, o = {NULL, 0, NULL};
  if (number || PyErr_Occurred() || get_key(component, &c) || get_key(operation, &o)) goto end;
  found = fshm_metric_open(b->segment, c.bytes, (uint64_t)c.length, o.bytes, (uint64_t)o.length);
  if (!exact || found == METRICS - 1) goto end;
  if (!by_operation) by_operation = PyDict_New();
  number = PyLong_FromLong(found);
  if (!by_operation || !number || PyDict_SetItem(by_operation, operation, number) ||
      PyDict_SetItem(b->metrics, component, by_operation))
    found = -1;
end:
  Py_XDECREF(c.held);
  Py_XDECREF(o.held);
  Py_XDECREF(number);
  Py_XDECREF(by_operation);
  return found;
}

static bound_t get_bound(Recorder *self) {
  bound_t b;
  ALONE_BEGIN(self);
  b = self->bound;
  Py_XINCREF(b.handle);
  Py_XINCREF(b.metrics);
  ALONE_END();
  return b;
}

static void end_bound(const bound_t *b) {
  Py_XDECREF(b->handle);
  Py_XDECREF(b->metrics);
}

/* Sums have 64 bits: room for 18,000 calls of the longest duration (11 days), and 2,000 of the largest size. */
#define LONGEST_MS 1e9
#define GREATEST_SIZE 0x1p53

/* A number of 0 or more and below `most`; not NaN, not a str. */
static int get_number(const char *name, PyObject *value, double most, double *out) {
  *out = PyFloat_AsDouble(value);
  if (*out >= 0 && *out < most) return 0;
  PyObject *kind = PyExc_ValueError;
  if (PyErr_Occurred()) {
    if (PyErr_ExceptionMatches(PyExc_TypeError))
      kind = PyExc_TypeError;
    else if (!PyErr_ExceptionMatches(PyExc_OverflowError))
      return -1;
  }
  if (*out >= most)
    return fail(kind, "%s must be a number of 0 or more, and below %llu, not %R", name,
                (unsigned long long)most, value);
  return fail(kind, "%s must be a number of 0 or more, not %R", name, value);
}

static int get_size(const char *name, PyObject *value, uint64_t *out) {
  *out = 0;
  if (!value || value == Py_None) return 0;
  double size;
  if (get_number(name, value, GREATEST_SIZE, &size)) return -1;
  *out = (uint64_t)size;
  return 0;
}

static PyObject *recorder_record(PyObject *o, PyObject *const *args, Py_ssize_t n,
                                 PyObject *kwnames) {
  Recorder *self = (Recorder *)o;
  PyObject *in[7] = {NULL};
  uint64_t sizes[2];
  if (parse("record_performance", args, n, kwnames, record_names, in, 7, 3)) return NULL;
  double ms;
  if (get_number("duration_ms", in[2], LONGEST_MS, &ms)) return NULL;
  int success = in[3] && in[3] != Py_None ? PyObject_IsTrue(in[3]) : 1;
  if (success < 0 || get_size("input_size", in[4], &sizes[0]) ||
      get_size("output_size", in[5], &sizes[1]))
    return NULL;
  bound_t b = get_bound(self);
  if (!b.segment) {
    end_bound(&b);
    if (done(PyObject_CallMethod(o, "_bind", NULL))) return NULL;
    b = get_bound(self);
  }
  long metric = 0;
  if (b.segment) { /* else there is none, and _bind() has reported it */
    metric = metric_number(&b, in[0], in[1]);
    if (metric >= 0)
      fshm_metric_record(b.segment, (uint32_t)metric, (uint64_t)(ms * 1e6), 1, success, sizes[0],
                         sizes[1]);
  }
  end_bound(&b);
  if (metric < 0) return NULL;
  Py_RETURN_NONE;
}

/* _set(handle, address): the owner of the segment, and its address. None, 0: call _bind() again. */
static PyObject *recorder_set(PyObject *o, PyObject *args) {
  Recorder *self = (Recorder *)o;
  unsigned long long address;
  bound_t fresh, old;
  if (!PyArg_ParseTuple(args, "OK", &fresh.handle, &address)) return NULL;
  fresh.segment = (fshm_segment *)(uintptr_t)address;
  fresh.metrics = PyDict_New();
  if (!fresh.metrics) return NULL;
  Py_INCREF(fresh.handle);
  ALONE_BEGIN(self);
  old = self->bound;
  self->bound = fresh;
  ALONE_END();
  end_bound(&old);
  Py_RETURN_NONE;
}

static void recorder_dealloc(PyObject *o) {
  end_bound(&((Recorder *)o)->bound);
  end_derived(o);
}

static PyMethodDef recorder_methods[] = {
    {"record", FAST(recorder_record), FLAGS,
     "record(component, operation, duration_ms, success=True, input_size=None, "
     "output_size=None, metadata=None)\n--\n\nAdd one call to the host's sums of (component, "
     "operation).\n\nduration_ms: 0 or more, below 1e9. input_size, output_size: numbers of 0 or more, in the "
     "caller's unit. metadata is accepted and not kept. The host keeps 31 pairs; further ones are "
     "summed as '(other)'. Raises TypeError or ValueError that names the argument."},
    {"_set", recorder_set, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL}};

static PyType_Slot recorder_slots[] = {{Py_tp_dealloc, (void *)recorder_dealloc},
                                       {Py_tp_methods, recorder_methods},
                                       {Py_tp_new, (void *)PyType_GenericNew},
                                       {0, NULL}};
