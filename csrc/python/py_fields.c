/* py_fields.c - Fields: the header fields that a web response has of one limit, as str or, for ASGI, as bytes. What is
 * the same for all requests is rendered when it is made. The class of that name in integrations/web/responses.py says
 * what the fields are. */
#include <math.h>

#include "py_args.h"

typedef struct {
  PyObject_HEAD
  PyObject *rate_limit, *quoted, *limit, *remaining, *reset; /* see fields_init() */
  double longest; /* s; 0: a limit of permits */
} Fields;

#define MOST_FIELD UINT64_C(999999999999999) /* of an Integer in a structured field */

/* Write a number; where it ends. */
static char *put_number(char *at, uint64_t number) {
  char digits[20], *first = digits + sizeof digits;
  do *--first = (char)('0' + number % 10);
  while (number /= 10);
  const size_t count = (size_t)(digits + sizeof digits - first);
  memcpy(at, first, count);
  return at + count;
}

/* text, then the number of left, and ";t=" with whole if that is not 0; a new str, or bytes. NULL: it raised. */
static PyObject *field_value(int raw, PyObject *text, uint64_t left, uint64_t whole) {
  char few[512], *all = few;
  key_arg head = {"", 0, NULL};
  if (text && get_key(text, &head)) return NULL;
  const size_t room = (size_t)head.length + 64;
  if (room > sizeof few && !(all = malloc(room))) return PyErr_NoMemory();
  memcpy(all, head.bytes, (size_t)head.length);
  char *end = put_number(all + head.length, left);
  if (whole) {
    memcpy(end, ";t=", 3);
    end = put_number(end + 3, whole);
  }
  PyObject *out =
      raw ? PyBytes_FromStringAndSize(all, end - all) : PyUnicode_FromStringAndSize(all, end - all);
  if (all != few) free(all);
  Py_XDECREF(head.held);
  return out;
}

/* Append (name, value) to the list. Takes over the reference to value. */
static int add_field(PyObject *list, PyObject *name, PyObject *value) {
  PyObject *field = value ? PyTuple_Pack(2, name, value) : NULL;
  int failed = !field || PyList_Append(list, field);
  Py_XDECREF(field);
  Py_XDECREF(value);
  return failed;
}

/* Whole seconds, at least 1. */
static uint64_t whole_seconds(double seconds) {
  double whole = ceil(seconds);
  return whole < 1 ? 1 : whole < 1e15 ? (uint64_t)whole : MOST_FIELD;
}

/* Append the fields to a list. now: Unix time in seconds. */
static int append_fields(const Fields *self, PyObject *list, const fshm_decision *d, uint64_t left,
                         double until, double now) {
  if (left > MOST_FIELD) left = MOST_FIELD;
  int raw = PyBytes_Check(self->rate_limit);
  if (self->longest <= 0)
    return add_field(list, self->rate_limit, field_value(raw, self->quoted, left, 0));
  if (d->status != FSHM_ALLOWED)
    until = d->retry_after_ns == FSHM_NEVER ? self->longest : (double)d->retry_after_ns / 1e9;
  else if (until > self->longest)
    until = self->longest;
  const uint64_t whole = whole_seconds(until);
  return add_field(list, self->rate_limit, field_value(raw, self->quoted, left, whole)) ||
         PyList_Append(list, self->limit) ||
         add_field(list, self->remaining, field_value(raw, NULL, left, 0)) ||
         add_field(list, self->reset, field_value(raw, NULL, whole_seconds(now) + whole, 0));
}

static double until_reset(const fshm_decision *d) { return (double)d->reset_after_ns / 1e9; }

/* add(fields, decision, left, until_all, now): append the fields to a list. left, until_all: None: the decision's.
 * now: Unix time in seconds. */
static PyObject *fields_add(PyObject *o, PyObject *const *args, Py_ssize_t n) {
  Fields *self = (Fields *)o;
  if (count_args("add", n, 5)) return NULL;
  if (!self->reset || !PyList_Check(args[0]) || Py_TYPE(args[1]) != decision_type)
    return PyErr_Format(PyExc_TypeError, "add() takes a list and a Decision, not %R", args[1]);
  const fshm_decision *d = &((Decision *)args[1])->d;
  uint64_t left = d->remaining;
  double until = until_reset(d), now = PyFloat_AsDouble(args[4]);
  if (args[2] != Py_None && get_cost(args[2], &left)) return NULL;
  if (args[3] != Py_None) until = PyFloat_AsDouble(args[3]);
  if (PyErr_Occurred() || append_fields(self, args[0], d, left, until, now)) return NULL;
  Py_RETURN_NONE;
}

/* Whether the name of a field may be one of ours: they begin with x or r. */
static int may_be_ours(PyObject *name) {
  key_arg k = {"", 0, NULL};
  if (PyBytes_Check(name) ? get_bytes(name, &k)
                          : !(k.bytes = PyUnicode_AsUTF8AndSize(name, &k.length))) {
    PyErr_Clear(); /* neither UTF-8 nor bytes; k.length is -1 from 3.13 on */
    return 0;
  }
  return k.length && (*k.bytes == 'x' || *k.bytes == 'X' || *k.bytes == 'r' || *k.bytes == 'R');
}

/* Whether a field, a pair of name and value, has a name out of ours; all are str, or all bytes. -1: it raised. */
static int any_of(PyObject *fields, PyObject *ours) {
  int found = 0;
  const Py_ssize_t count = PyList_Size(fields);
  for (Py_ssize_t i = 0; i < count && !found; i++) {
    PyObject *name = PySequence_GetItem(PyList_GetItem(fields, i), 0), *lower = NULL;
    if (!name || may_be_ours(name)) {
      if (name) lower = PyObject_CallMethod(name, "lower", NULL);
      found = lower ? PySequence_Contains(ours, lower) : -1;
      Py_XDECREF(lower);
    }
    Py_XDECREF(name);
  }
  return found;
}

/* all_with(ours, policy, limit, present, decision, now): a new list: of present, a list of fields; then policy, a field;
 * then what add() appends. None: the decision is none, is a denial, or names another limit; or present has a field whose
 * name is in ours, a frozenset in lower case. */
static PyObject *fields_all_with(PyObject *o, PyObject *const *args, Py_ssize_t n) {
  Fields *self = (Fields *)o;
  if (count_args("all_with", n, 6)) return NULL;
  if (!self->reset || !PyList_Check(args[3]))
    return PyErr_Format(PyExc_TypeError, "all_with() takes a list of fields, not %R", args[3]);
  if (Py_TYPE(args[4]) != decision_type) Py_RETURN_NONE;
  const fshm_decision *d = &((Decision *)args[4])->d;
  if (d->status != FSHM_ALLOWED || limit_of((Decision *)args[4]) != args[2]) Py_RETURN_NONE;
  double now = PyFloat_AsDouble(args[5]);
  if (PyErr_Occurred()) return NULL;
  PyObject *all = PyList_GetSlice(args[3], 0, PY_SSIZE_T_MAX); /* no other thread can change it */
  int found = all ? any_of(all, args[0]) : -1;
  if (!found && (PyList_Append(all, args[1]) ||
                 append_fields(self, all, d, d->remaining, until_reset(d), now)))
    found = -1;
  if (!found) return all;
  Py_XDECREF(all);
  return found < 0 ? NULL : Py_NewRef(Py_None);
}

/* Fields(rate_limit, quoted, limit, remaining, reset, longest): the names of three fields, all str or all bytes;
 * quoted: how the value of the first begins; limit: the whole of another; longest: seconds that the limit lasts, 0
 * for one of permits. */
static int fields_init(PyObject *o, PyObject *args, PyObject *kwargs) {
  Fields *self = (Fields *)o;
  PyObject *in[5];
  double longest;
  if (no_keywords("Fields", kwargs) ||
      !PyArg_ParseTuple(args, "OOO!OOd", &in[0], &in[1], &PyTuple_Type, &in[2], &in[3], &in[4],
                        &longest))
    return -1;
  if (self->reset) return fail(PyExc_RuntimeError, "the fields of a limit are made once");
  self->rate_limit = Py_NewRef(in[0]);
  self->quoted = Py_NewRef(in[1]);
  self->limit = Py_NewRef(in[2]);
  self->remaining = Py_NewRef(in[3]);
  self->reset = Py_NewRef(in[4]);
  self->longest = longest;
  return 0;
}

static void fields_dealloc(PyObject *o) {
  Fields *self = (Fields *)o;
  Py_XDECREF(self->rate_limit);
  Py_XDECREF(self->quoted);
  Py_XDECREF(self->limit);
  Py_XDECREF(self->remaining);
  Py_XDECREF(self->reset);
  end_derived(o);
}

static PyMethodDef fields_methods[] = {{"add", FAST(fields_add), METH_FASTCALL, NULL},
                                       {"all_with", FAST(fields_all_with), METH_FASTCALL, NULL},
                                       {NULL, NULL, 0, NULL}};

static PyType_Slot fields_slots[] = {{Py_tp_dealloc, (void *)fields_dealloc},
                                     {Py_tp_methods, fields_methods},
                                     {Py_tp_init, (void *)fields_init},
                                     {Py_tp_new, (void *)PyType_GenericNew},
                                     {0, NULL}};
