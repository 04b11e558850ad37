/* py_permit.c - Permit: one request in flight. True when it was admitted, also after its release.
 *
 * If Python drops a held permit without release(), it is released, with a ResourceWarning: it was a bug, but an
 * exception that skips a release should not cost a permit until the process dies. */
#include "py_args.h"

typedef struct {
  PyObject_HEAD
  PyObject *handle; /* owns the limiter */
  fshm_limiter *limiter;
  fshm_permit permit;
  int granted; /* it was held, and may be released by now */
  uint32_t in_flight; /* seen, when denied */
  fshm_decision d; /* of the rate limits and the permits together; few callers read it */
  PyObject *limits; /* of the decision */
} Permit;

static PyTypeObject *permit_type;

/* A permit that is not held yet: the caller takes it, and sets the fields that follow. It is made before, since
 * afterwards it might not be had. */
static Permit *make_permit(PyObject *handle, fshm_limiter *limiter) {
  Permit *o = PyObject_New(Permit, permit_type);
  if (!o) return NULL;
  o->handle = Py_NewRef(handle);
  o->limiter = limiter;
  o->permit.held = 0;
  o->granted = 0;
  o->limits = NULL;
  return o;
}

static int permit_is_held(Permit *self) {
  int held;
  ALONE_BEGIN(self);
  held = self->permit.held != 0;
  ALONE_END();
  return held;
}

static int give_back_permit(Permit *self) {
  int given_back;
  ALONE_BEGIN(self);
  given_back = fshm_permit_release(self->limiter, &self->permit);
  ALONE_END();
  return given_back;
}

static PyObject *permit_release(PyObject *o, UNUSED PyObject *unused) {
  return PyBool_FromLong(give_back_permit((Permit *)o));
}

static PyObject *permit_enter(PyObject *o, UNUSED PyObject *unused) { return Py_NewRef(o); }

static PyObject *permit_exit(PyObject *o, UNUSED PyObject *args) {
  (void)give_back_permit((Permit *)o);
  Py_RETURN_NONE;
}

static int permit_bool(PyObject *o) { return ((Permit *)o)->granted; }

static PyObject *permit_get_released(PyObject *o, UNUSED void *unused) {
  Permit *self = (Permit *)o;
  return PyBool_FromLong(self->granted && !permit_is_held(self));
}

static PyObject *permit_get_in_flight(PyObject *o, UNUSED void *unused) {
  return PyLong_FromUnsignedLong(((Permit *)o)->in_flight);
}

static PyObject *permit_get_decision(PyObject *o, UNUSED void *unused) {
  Permit *self = (Permit *)o;
  return make_decision(Py_NewRef(self->limits), &self->d);
}

static PyObject *permit_get_allowed(PyObject *o, UNUSED void *unused) {
  return PyBool_FromLong(((Permit *)o)->d.status == FSHM_ALLOWED);
}

static PyObject *permit_address(PyObject *o, UNUSED void *unused) {
  return PyLong_FromVoidPtr(&((Permit *)o)->permit);
}

static PyObject *permit_repr(PyObject *o) {
  Permit *self = (Permit *)o;
  if (permit_is_held(self)) return PyUnicode_FromString("Permit(held)");
  if (self->granted) return PyUnicode_FromString("Permit(released)");
  return PyUnicode_FromFormat("Permit(denied, in_flight=%u)", self->in_flight);
}

static void permit_dealloc(PyObject *o) {
  Permit *self = (Permit *)o;
  if (self->permit.held && give_back_permit(self)) {
    PyObject *error, *value, *trace;
    PyErr_Fetch(&error, &value, &trace); /* an exception may be passing through us */
    if (PyErr_ResourceWarning(NULL, 1,
                              "a permit was dropped without release(); it has been given back. Use "
                              "`with limiter.slot(key):`, or call release()"))
      PyErr_WriteUnraisable(NULL);
    PyErr_Restore(error, value, trace);
  }
  Py_XDECREF(self->limits);
  Py_XDECREF(self->handle); /* last: it owns the limiter */
  end_object(o, PyObject_Free);
}

static PyMethodDef permit_methods[] = {
    {"release", permit_release, METH_NOARGS,
     "release()\n--\n\nGive the permit back. True if it was held. A second call does nothing, and "
     "so does a call in a forked child: the permit is its parent's."},
    {"__enter__", permit_enter, METH_NOARGS, NULL},
    {"__exit__", permit_exit, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL}};

static PyGetSetDef permit_getset[] = {
    {"in_flight", permit_get_in_flight, NULL, "When denied: how many permits of the key were held.",
     NULL},
    {"released", permit_get_released, NULL, "True: it was admitted, and has been released.", NULL},
    {"_address", permit_address, NULL, NULL, NULL},
    {"allowed", permit_get_allowed, NULL, "True: all limits admitted it.", NULL},
    {"decision", permit_get_decision, NULL, "The Decision behind it.", NULL},
    {NULL, NULL, NULL, NULL, NULL}};

static PyType_Slot permit_slots[] = {
    {Py_tp_dealloc, (void *)permit_dealloc},
    {Py_tp_methods, permit_methods},
    {Py_tp_getset, permit_getset},
    {Py_tp_repr, (void *)permit_repr},
    {Py_nb_bool, (void *)permit_bool},
    {Py_tp_doc, DOC("One request in flight. True when admitted, also after its release.")},
    {0, NULL}};

/* Slot(limiter, key, timeout): calls limiter._slot(key, timeout) when a block is entered, and releases the permit
 * when the block ends. No Python instruction runs between the grant and this object: an exception out of a signal
 * handler finds the permit held here, and the end of the block, or of this object, releases it. */
typedef struct {
  PyObject_HEAD
  PyObject *limiter, *key, *timeout;
  Permit *permit; /* while the block runs */
} Slot;

static int slot_init(PyObject *o, PyObject *args, PyObject *kwargs) {
  Slot *self = (Slot *)o;
  PyObject *limiter, *key, *timeout;
  if (no_keywords("Slot", kwargs) || !PyArg_ParseTuple(args, "OOO", &limiter, &key, &timeout))
    return -1;
  if (self->limiter) return fail(PyExc_RuntimeError, "a slot is made once");
  self->key = Py_NewRef(key);
  self->timeout = Py_NewRef(timeout);
  self->limiter = Py_NewRef(limiter);
  return 0;
}

static PyObject *slot_enter(PyObject *o, UNUSED PyObject *unused) {
  Slot *self = (Slot *)o;
  int held;
  ALONE_BEGIN(self);
  held = self->permit != NULL;
  ALONE_END();
  if (!self->limiter || held)
    return PyErr_Format(PyExc_RuntimeError, self->limiter
                                                ? "the slot is held: call slot() for each block"
                                                : "the slot's __init__ was not called");
  PyObject *got = PyObject_CallMethod(self->limiter, "_slot", "OO", self->key, self->timeout);
  if (!got) return NULL;
  Permit *mine = Py_TYPE(got) == permit_type ? (Permit *)got : NULL;
  ALONE_BEGIN(self);
  if (mine && !self->permit)
    self->permit = mine;
  else
    mine = NULL;
  ALONE_END();
  if (!mine) {
    PyErr_SetString(PyExc_RuntimeError, "the slot is held, or was given no permit");
    Py_DECREF(got);
    return NULL;
  }
  return Py_NewRef(got);
}

static void slot_leave(Slot *self) {
  Permit *permit;
  ALONE_BEGIN(self);
  permit = self->permit;
  self->permit = NULL;
  ALONE_END();
  if (!permit) return;
  (void)give_back_permit(permit);
  Py_DECREF((PyObject *)permit);
}

static PyObject *slot_exit(PyObject *o, UNUSED PyObject *args) {
  slot_leave((Slot *)o);
  Py_RETURN_NONE;
}

static int slot_traverse(PyObject *o, visitproc visit, void *arg) {
  Py_VISIT(Py_TYPE(o));
  Py_VISIT(((Slot *)o)->limiter);
  Py_VISIT(((Slot *)o)->key);
  Py_VISIT(((Slot *)o)->timeout);
  return 0;
}

static void slot_dealloc(PyObject *o) {
  Slot *self = (Slot *)o;
  PyObject_GC_UnTrack(o);
  slot_leave(self);
  Py_XDECREF(self->limiter);
  Py_XDECREF(self->key);
  Py_XDECREF(self->timeout);
  end_derived(o);
}

static PyMethodDef slot_methods[] = {{"__enter__", slot_enter, METH_NOARGS, NULL},
                                     {"__exit__", slot_exit, METH_VARARGS, NULL},
                                     {NULL, NULL, 0, NULL}};
static PyType_Slot slot_slots[] = {
    {Py_tp_dealloc, (void *)slot_dealloc},  {Py_tp_traverse, (void *)slot_traverse},
    {Py_tp_methods, slot_methods},          {Py_tp_init, (void *)slot_init},
    {Py_tp_new, (void *)PyType_GenericNew}, {0, NULL}};
