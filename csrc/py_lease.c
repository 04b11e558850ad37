/* py_lease.c - Permit: one request in flight. True while held; a denial is one that never was.
 *
 * A permit that Python drops without release() is given back, with a ResourceWarning: it was a bug, and
 * exceptions that skip a release should not cost a slot until the process dies. */
#include "py_args.h"

typedef struct {
  PyObject_HEAD
  PyObject *owner; /* the object that keeps the limiter and its segment alive */
  fshm_limiter *limiter;
  fshm_permit permit;
  uint32_t in_flight; /* seen, when denied */
  PyObject *decision; /* of the meters and permits together */
} Permit;

static PyTypeObject *permit_type;

static PyObject *make_permit(PyObject *owner, fshm_limiter *limiter, const fshm_permit *permit,
                             uint32_t in_flight, PyObject *limits, const fshm_decision *d) {
  PyObject *decision = make_decision(limits, d);
  Permit *o = decision ? PyObject_New(Permit, permit_type) : NULL;
  if (!o) {
    fshm_permit lost = *permit;
    (void)fshm_permit_release(limiter, &lost);
    Py_XDECREF(decision);
    return NULL;
  }
  Py_INCREF(owner);
  o->owner = owner;
  o->limiter = limiter;
  o->permit = *permit;
  o->in_flight = in_flight;
  o->decision = decision;
  return (PyObject *)o;
}

static PyObject *permit_release(PyObject *o, PyObject *unused) {
  (void)unused;
  Permit *self = (Permit *)o;
  return PyBool_FromLong(fshm_permit_release(self->limiter, &self->permit));
}

static PyObject *permit_enter(PyObject *o, PyObject *unused) {
  (void)unused;
  Py_INCREF(o);
  return o;
}

static PyObject *permit_exit(PyObject *o, PyObject *args) {
  (void)args;
  (void)fshm_permit_release(((Permit *)o)->limiter, &((Permit *)o)->permit);
  Py_RETURN_NONE;
}

static int permit_bool(PyObject *o) { return ((Permit *)o)->permit.held != 0; }

static PyObject *permit_get_in_flight(PyObject *o, void *unused) {
  (void)unused;
  return PyLong_FromUnsignedLong(((Permit *)o)->in_flight);
}

static PyObject *permit_get_decision(PyObject *o, void *unused) {
  (void)unused;
  PyObject *d = ((Permit *)o)->decision;
  Py_INCREF(d);
  return d;
}

static PyObject *permit_address(PyObject *o, void *unused) {
  (void)unused;
  return PyLong_FromVoidPtr(&((Permit *)o)->permit);
}

static PyObject *permit_repr(PyObject *o) {
  Permit *self = (Permit *)o;
  if (self->permit.held) return PyUnicode_FromString("Permit(held)");
  if (self->permit.who) return PyUnicode_FromString("Permit(released)");
  return PyUnicode_FromFormat("Permit(denied, in_flight=%u)", self->in_flight);
}

static void permit_dealloc(PyObject *o) {
  Permit *self = (Permit *)o;
  PyTypeObject *type = Py_TYPE(o);
  if (self->permit.held && fshm_permit_release(self->limiter, &self->permit)) {
    PyObject *error, *value, *trace;
    PyErr_Fetch(&error, &value, &trace); /* an exception may be on its way through us */
    if (PyErr_ResourceWarning(NULL, 1,
                              "a permit was dropped without release(); it has been given back. Use "
                              "`with limiter.slot(key):`, or call release()"))
      PyErr_WriteUnraisable(NULL);
    PyErr_Restore(error, value, trace);
  }
  Py_XDECREF(self->owner);
  Py_XDECREF(self->decision);
  PyObject_Free(o);
  Py_DECREF(type);
}

static PyMethodDef permit_methods[] = {
    {"release", permit_release, METH_NOARGS,
     "release()\n--\n\nGive the permit back. True if it was held; twice is harmless, and so is a "
     "forked child, which cannot free what is its parent's."},
    {"__enter__", permit_enter, METH_NOARGS, NULL},
    {"__exit__", permit_exit, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL}};

static PyGetSetDef permit_getset[] = {
    {"in_flight", permit_get_in_flight, NULL, "When denied: how many permits of the key were held.",
     NULL},
    {"_address", permit_address, NULL, NULL, NULL},
    {"decision", permit_get_decision, NULL, "The Decision behind it.", NULL},
    {NULL, NULL, NULL, NULL, NULL}};

static char permit_doc[] = "One request in flight. True while held.";
static PyType_Slot permit_slots[] = {{Py_tp_dealloc, (void *)permit_dealloc},
                                     {Py_tp_methods, permit_methods},
                                     {Py_tp_getset, permit_getset},
                                     {Py_tp_repr, (void *)permit_repr},
                                     {Py_nb_bool, (void *)permit_bool},
                                     {Py_tp_doc, permit_doc},
                                     {0, NULL}};

static PyType_Spec permit_spec = {"fast_litellm_shm._native.Permit", sizeof(Permit), 0,
                                  Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
                                  permit_slots};

static int install_lease(PyObject *module) {
  permit_type = (PyTypeObject *)PyType_FromSpec(&permit_spec);
  return permit_type ? PyObject_SetAttrString(module, "Permit", (PyObject *)permit_type) : -1;
}
