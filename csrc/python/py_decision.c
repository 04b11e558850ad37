/* py_decision.c - Decision: the result of a check. Each acquire() makes one, so its fields become Python objects
 * only when read. */
#include "py_args.h"

typedef struct {
  PyObject_HEAD
  PyObject *limits;
  PyObject *level; /* str: of a hierarchy, the level that denied; else NULL */
  fshm_decision d;
} Decision;

static PyTypeObject *decision_type;

/* Takes over the reference to limits. */
static PyObject *make_decision(PyObject *limits, const fshm_decision *d) {
  Decision *o = PyObject_New(Decision, decision_type);
  if (!o) {
    Py_DECREF(limits);
    return NULL;
  }
  o->limits = limits;
  o->level = NULL;
  o->d = *d;
  return (PyObject *)o;
}

static PyObject *seconds(int64_t ns) { return PyFloat_FromDouble((double)ns / 1e9); }

static PyObject *decision_allowed(PyObject *o, UNUSED void *unused) {
  return PyBool_FromLong(((Decision *)o)->d.status == FSHM_ALLOWED);
}
static PyObject *decision_remaining(PyObject *o, UNUSED void *unused) {
  return PyLong_FromUnsignedLongLong(((Decision *)o)->d.remaining);
}
static PyObject *decision_retry_after(PyObject *o, UNUSED void *unused) {
  int64_t ns = ((Decision *)o)->d.retry_after_ns;
  if (ns == FSHM_NEVER) Py_RETURN_NONE;
  return seconds(ns);
}
static PyObject *decision_retry_after_ns(PyObject *o, UNUSED void *unused) {
  int64_t ns = ((Decision *)o)->d.retry_after_ns;
  if (ns == FSHM_NEVER) Py_RETURN_NONE;
  return PyLong_FromLongLong(ns);
}
static PyObject *decision_reset_after(PyObject *o, UNUSED void *unused) {
  return seconds(((Decision *)o)->d.reset_after_ns);
}
/* Borrowed. */
static PyObject *limit_of(const Decision *d) {
  Py_ssize_t i = (Py_ssize_t)d->d.limit_index;
  return i < PyTuple_Size(d->limits) ? PyTuple_GetItem(d->limits, i) : Py_None;
}
static PyObject *decision_limit(PyObject *o, UNUSED void *unused) {
  return Py_XNewRef(limit_of((Decision *)o));
}
static PyObject *decision_limit_index(PyObject *o, UNUSED void *unused) {
  return PyLong_FromUnsignedLong(((Decision *)o)->d.limit_index);
}
static PyObject *decision_level(PyObject *o, UNUSED void *unused) {
  PyObject *level = ((Decision *)o)->level;
  return Py_NewRef(level ? level : Py_None);
}
static PyObject *decision_shared(PyObject *o, UNUSED void *unused) {
  return PyBool_FromLong(((Decision *)o)->d.shared);
}
static int decision_bool(PyObject *o) { return ((Decision *)o)->d.status == FSHM_ALLOWED; }

static PyObject *decision_repr(PyObject *o) {
  PyObject *retry = decision_retry_after(o, NULL), *reset = decision_reset_after(o, NULL);
  PyObject *limit = decision_limit(o, NULL), *out = NULL;
  PyObject *level = ((Decision *)o)->level;
  if (retry && reset && limit)
    out = PyUnicode_FromFormat(
        "Decision(allowed=%s, remaining=%llu, retry_after=%R, reset_after=%R, limit=%R%s%V%s)",
        decision_bool(o) ? "True" : "False", (unsigned long long)((Decision *)o)->d.remaining,
        retry, reset, limit, level ? ", level='" : "", level, "", level ? "'" : "");
  Py_XDECREF(retry);
  Py_XDECREF(reset);
  Py_XDECREF(limit);
  return out;
}

static void decision_dealloc(PyObject *o) {
  Py_XDECREF(((Decision *)o)->limits);
  Py_XDECREF(((Decision *)o)->level);
  end_object(o, PyObject_Free);
}

static PyGetSetDef decision_getset[] = {
    {"allowed", decision_allowed, NULL, "True when admitted.", NULL},
    {"remaining", decision_remaining, NULL,
     "Tokens that would still be admitted now; of the tightest limit.", NULL},
    {"retry_after", decision_retry_after, NULL,
     "Seconds until this cost fits; 0.0 when admitted; None: it never will.", NULL},
    {"retry_after_ns", decision_retry_after_ns, NULL, "The same in nanoseconds, exact.", NULL},
    {"reset_after", decision_reset_after, NULL, "Seconds until nothing is consumed any more.",
     NULL},
    {"limit_index", decision_limit_index, NULL, "Its place among the limiter's limits.", NULL},
    {"limit", decision_limit, NULL, "The limit that denied, else the one with least left.", NULL},
    {"level", decision_level, NULL,
     "The level that denied, of a HierarchyLimiter; None: admitted, or of another limiter.", NULL},
    {"shared", decision_shared, NULL,
     "True when a counter decided that keys without room in the segment share.", NULL},
    {NULL, NULL, NULL, NULL, NULL}};

static PyType_Slot decision_slots[] = {
    {Py_tp_dealloc, (void *)decision_dealloc},
    {Py_tp_getset, decision_getset},
    {Py_tp_repr, (void *)decision_repr},
    {Py_nb_bool, (void *)decision_bool},
    {Py_tp_doc, DOC("The answer of a limiter. True when admitted.")},
    {0, NULL}};
