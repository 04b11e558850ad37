/* py_pool.c - the hot half of SimpleConnectionPool: take an idle connection of this process, and put it
 * back. Opening, closing and limits are pool.py's business (and lease.c's); ids map to connections here.
 *
 * Idle connections of an endpoint are a stack: the one used last is taken first. All under the GIL. */
#include "internal.h"
#include "py_args.h"
#include "py_measure.h"

typedef struct Connection {
  PyObject_HEAD
  PyObject *id; /* str */
  PyObject *endpoint; /* str */
  PyObject *object; /* what the user bound to it, or None */
  fshm_limiter *slots; /* of the pool */
  fshm_permit slot; /* of the endpoint */
  fshm_permit total; /* of the whole pool */
  uint64_t used_ns; /* fshm_clock() when last returned */
  int idle;
  struct Connection *below; /* in the idle stack; owned by it */
} Connection;

typedef struct {
  PyObject_HEAD
  PyObject *by_id; /* dict: id -> Connection, idle and in use */
  PyObject *stacks; /* dict: endpoint -> Stack */
  fshm_limiter *slots, *totals; /* kept alive by the Python subclass */
  uint64_t idle_ns; /* how long an idle connection may be used again */
  measure_t measure; /* get_connection() */
} PoolCore;

typedef struct {
  PyObject_HEAD
  Connection *top;
} Stack;

static PyTypeObject *connection_type, *stack_type;

static void connection_dealloc(PyObject *o) {
  Connection *c = (Connection *)o;
  PyTypeObject *type = Py_TYPE(o);
  Py_XDECREF(c->id);
  Py_XDECREF(c->endpoint);
  Py_XDECREF(c->object);
  Py_XDECREF((PyObject *)c->below);
  PyObject_Free(o);
  Py_DECREF(type);
}

static void stack_dealloc(PyObject *o) {
  PyTypeObject *type = Py_TYPE(o);
  for (Connection *c = ((Stack *)o)->top, *below; c; c = below) { /* not by recursion */
    below = c->below;
    c->below = NULL;
    Py_DECREF((PyObject *)c);
  }
  PyObject_Free(o);
  Py_DECREF(type);
}

static PyObject *connection_get(PyObject *o, void *which) {
  Connection *c = (Connection *)o;
  PyObject *fields[] = {c->id, c->endpoint, c->object};
  PyObject *out = fields[(uintptr_t)which];
  Py_INCREF(out);
  return out;
}
static PyObject *connection_idle(PyObject *o, void *unused) {
  (void)unused;
  return PyBool_FromLong(((Connection *)o)->idle);
}
static PyObject *connection_held(PyObject *o, void *unused) {
  (void)unused;
  return PyBool_FromLong(fshm_permit_held(((Connection *)o)->slots, &((Connection *)o)->slot));
}
static PyObject *connection_idle_seconds(PyObject *o, void *unused) {
  (void)unused;
  Connection *c = (Connection *)o;
  return PyFloat_FromDouble(c->idle ? (double)(fshm_clock() - c->used_ns) * 1e-9 : 0.0);
}

static PyGetSetDef connection_getset[] = {
    {"id", connection_get, NULL, "Unique for ever.", (void *)0},
    {"endpoint", connection_get, NULL, NULL, (void *)1},
    {"object", connection_get, NULL, "What connect() returned.", (void *)2},
    {"idle", connection_idle, NULL, NULL, NULL},
    {"held", connection_held, NULL, "False where an operator took its place back by force.", NULL},
    {"idle_seconds", connection_idle_seconds, NULL, "Since it was returned.", NULL},
    {NULL, NULL, NULL, NULL, NULL}};

static int unbound(const PoolCore *self) {
  if (self->by_id && self->stacks && self->slots) return 0;
  PyErr_SetString(PyExc_RuntimeError, "the pool's __init__ was not called");
  return 1;
}

/* Take the connection on top of an endpoint's stack, if it may still be used. Borrowed. */
static Connection *pop(PoolCore *self, PyObject *endpoint) {
  Stack *stack = (Stack *)PyDict_GetItemWithError(self->stacks, endpoint);
  if (!stack || !stack->top) return NULL;
  Connection *c = stack->top;
  if (fshm_clock() - c->used_ns > self->idle_ns) return NULL;
  /* Not ours (the parent's, after a fork), or an operator released it by force. */
  if (!fshm_permit_idle(self->slots, &c->slot, 0)) return NULL;
  stack->top = c->below; /* its reference moves to the stack */
  c->below = NULL;
  c->idle = 0;
  Py_DECREF((PyObject *)c); /* by_id holds another */
  return c;
}

/* _take(endpoint) -> id, or None: open another. */
static PyObject *pool_take(PyObject *o, PyObject *endpoint) {
  if (unbound((PoolCore *)o)) return NULL;
  Connection *c = pop((PoolCore *)o, endpoint);
  if (!c) {
    if (PyErr_Occurred()) return NULL;
    Py_RETURN_NONE;
  }
  Py_INCREF(c->id);
  return c->id;
}

/* get_connection(endpoint): an idle connection's id, else self._open(endpoint). */
static inline PyObject *get(PyObject *o, PyObject *const *args, Py_ssize_t n, PyObject *kwnames) {
  PyObject *endpoint = n == 1 && !kwnames ? args[0] : NULL;
  static const char *const names[] = {"endpoint"};
  if (!endpoint && parse("get_connection", args, n, kwnames, names, &endpoint, 1, 1)) return NULL;
  if (unbound((PoolCore *)o)) return NULL;
  Connection *c = pop((PoolCore *)o, endpoint);
  if (c) {
    Py_INCREF(c->id);
    return c->id;
  }
  if (PyErr_Occurred()) PyErr_Clear(); /* unhashable: _open() says what is wrong with it */
  return PyObject_CallMethod(o, "_open", "O", endpoint);
}

static PyObject *pool_get(PyObject *o, PyObject *const *args, Py_ssize_t n, PyObject *kwnames) {
  RETURN_MEASURED(&((PoolCore *)o)->measure, get(o, args, n, kwnames));
}

/* _measure(segment, metric, every): how often to record a call, and as what. */
static PyObject *pool_measure(PyObject *o, PyObject *args) {
  if (measure_args(&((PoolCore *)o)->measure, args)) return NULL;
  Py_RETURN_NONE;
}

/* return_connection(id): idle again. Unknown, foreign or returned ids: self._odd(id). */
static PyObject *pool_return(PyObject *o, PyObject *const *args, Py_ssize_t n, PyObject *kwnames) {
  PoolCore *self = (PoolCore *)o;
  PyObject *id = n == 1 && !kwnames ? args[0] : NULL;
  static const char *const names[] = {"connection_id"};
  if (!id && parse("return_connection", args, n, kwnames, names, &id, 1, 1)) return NULL;
  if (unbound(self)) return NULL;
  Connection *c = (Connection *)PyDict_GetItemWithError(self->by_id, id);
  if (!c || c->idle || !fshm_permit_idle(self->slots, &c->slot, 1)) {
    if (PyErr_Occurred()) PyErr_Clear();
    return PyObject_CallMethod(o, "_odd", "O", id);
  }
  Stack *stack = (Stack *)PyDict_GetItemWithError(self->stacks, c->endpoint);
  if (!stack) return NULL;
  c->used_ns = fshm_clock();
  c->idle = 1;
  c->below = stack->top;
  Py_INCREF((PyObject *)c);
  stack->top = c;
  Py_RETURN_NONE;
}

static PyObject *refusal(int status, const char *limit) {
  if (status == FSHM_E_DAMAGED) return PyUnicode_FromString("damaged");
  return PyUnicode_FromString(status == FSHM_DENIED ? limit : "full");
}

/* _add(id, endpoint, object): a connection in use, if both permits are to be had. Returns None, or the
 * name of the limit that was reached: "endpoint" or "pool"; "full" where the segment has no room;
 * "damaged". */
static PyObject *pool_add(PyObject *o, PyObject *args) {
  PoolCore *self = (PoolCore *)o;
  PyObject *id, *endpoint, *object;
  key_arg key;
  fshm_permit slot, total;
  fshm_decision d;
  uint32_t held;
  if (unbound(self) || !PyArg_ParseTuple(args, "UUO", &id, &endpoint, &object) ||
      get_key(endpoint, &key))
    return NULL;
  fshm_admit(self->slots, key.bytes, (uint64_t)key.length, NULL, 0, &slot, &d, &held);
  Py_XDECREF(key.held);
  if (d.status != FSHM_ALLOWED) return refusal(d.status, "endpoint");
  fshm_admit(self->totals, "", 0, NULL, 0, &total, &d, &held);
  if (d.status != FSHM_ALLOWED) {
    (void)fshm_permit_release(self->slots, &slot);
    return refusal(d.status, "pool");
  }
  Connection *c = PyObject_New(Connection, connection_type);
  PyObject *stack = c ? PyDict_GetItemWithError(self->stacks, endpoint) : NULL;
  if (c) {
    Py_INCREF(id);
    Py_INCREF(endpoint);
    Py_INCREF(object);
    c->id = id;
    c->endpoint = endpoint;
    c->object = object;
    c->slots = self->slots;
    c->slot = slot;
    c->total = total;
    c->used_ns = 0;
    c->idle = 0;
    c->below = NULL;
  }
  int failed = !c;
  if (!failed && !stack) {
    Stack *fresh = PyObject_New(Stack, stack_type);
    failed = !fresh;
    if (fresh) fresh->top = NULL;
    failed = failed || PyDict_SetItem(self->stacks, endpoint, (PyObject *)fresh);
    Py_XDECREF((PyObject *)fresh);
  }
  if (failed || PyDict_SetItem(self->by_id, id, (PyObject *)c)) {
    (void)fshm_permit_release(self->slots, &slot);
    (void)fshm_permit_release(self->totals, &total);
    Py_XDECREF((PyObject *)c);
    return NULL;
  }
  Py_DECREF((PyObject *)c);
  Py_RETURN_NONE;
}

/* _set_object(id, object): what connect() returned. */
static PyObject *pool_set_object(PyObject *o, PyObject *args) {
  PyObject *id, *object;
  if (unbound((PoolCore *)o)) return NULL;
  if (!PyArg_ParseTuple(args, "OO", &id, &object)) return NULL;
  Connection *c = (Connection *)PyDict_GetItemWithError(((PoolCore *)o)->by_id, id);
  if (!c) {
    if (!PyErr_Occurred()) PyErr_SetObject(PyExc_KeyError, id);
    return NULL;
  }
  PyObject *old = c->object;
  Py_INCREF(object);
  c->object = object;
  Py_DECREF(old);
  Py_RETURN_NONE;
}

static int unstack(PoolCore *self, Connection *c) {
  Stack *stack = (Stack *)PyDict_GetItemWithError(self->stacks, c->endpoint);
  for (Connection **at = stack ? &stack->top : NULL; at && *at; at = &(*at)->below) {
    if (*at != c) continue;
    *at = c->below;
    c->below = NULL;
    Py_DECREF((PyObject *)c);
    return 1;
  }
  return 0;
}

/* Take a connection out of the pool; its places stay taken until _release(), so that it can be closed
 * first. NULL without an exception: there is no such id. */
static PyObject *forget(PoolCore *self, PyObject *id, int only_idle) {
  if (!self->by_id) return NULL;
  Connection *c = (Connection *)PyDict_GetItemWithError(self->by_id, id);
  if (!c || (only_idle && !c->idle)) return NULL;
  Py_INCREF((PyObject *)c);
  (void)unstack(self, c);
  c->idle = 0;
  if (!PyDict_DelItem(self->by_id, id)) return (PyObject *)c;
  Py_DECREF((PyObject *)c);
  return NULL;
}

static PyObject *or_none(PyObject *found) {
  if (found || PyErr_Occurred()) return found;
  Py_RETURN_NONE;
}

/* _drop(id) -> the Connection, out of the pool; or None. */
static PyObject *pool_drop(PyObject *o, PyObject *id) {
  return or_none(forget((PoolCore *)o, id, 0));
}

/* _drop_idle(id): the same, unless it is in use (by now). */
static PyObject *pool_drop_idle(PyObject *o, PyObject *id) {
  return or_none(forget((PoolCore *)o, id, 1));
}

/* _release(connection): give its places back. */
static PyObject *pool_release(PyObject *o, PyObject *connection) {
  PoolCore *self = (PoolCore *)o;
  if (Py_TYPE(connection) != connection_type) {
    PyErr_SetString(PyExc_TypeError, "_release() takes a Connection");
    return NULL;
  }
  Connection *c = (Connection *)connection;
  if (self->slots && self->totals) {
    (void)fshm_permit_release(self->slots, &c->slot);
    (void)fshm_permit_release(self->totals, &c->total);
  }
  Py_RETURN_NONE;
}

/* _lookup(id) -> the Connection, or None. */
static PyObject *pool_lookup(PyObject *o, PyObject *id) {
  PoolCore *self = (PoolCore *)o;
  PyObject *c = self->by_id ? PyDict_GetItemWithError(self->by_id, id) : NULL;
  Py_XINCREF(c);
  return or_none(c);
}

/* _bind(slots address, totals address, idle_ns): also forgets all connections (a forked child's are its
 * parent's). */
static PyObject *pool_bind(PyObject *o, PyObject *args) {
  PoolCore *self = (PoolCore *)o;
  unsigned long long slots, totals, idle_ns;
  if (!PyArg_ParseTuple(args, "KKK", &slots, &totals, &idle_ns)) return NULL;
  PyObject *old_by_id = self->by_id, *old_stacks = self->stacks;
  self->by_id = PyDict_New();
  self->stacks = PyDict_New();
  self->slots = (fshm_limiter *)(uintptr_t)slots;
  self->totals = (fshm_limiter *)(uintptr_t)totals;
  self->idle_ns = idle_ns;
  int failed = !self->by_id || !self->stacks;
  Py_XDECREF(old_by_id); /* last: what they held may call the pool as it goes */
  Py_XDECREF(old_stacks);
  if (failed) return NULL;
  Py_RETURN_NONE;
}

static PyObject *pool_connections(PyObject *o, PyObject *unused) {
  (void)unused;
  PoolCore *self = (PoolCore *)o;
  return self->by_id ? PyDict_Copy(self->by_id) : PyDict_New();
}

static void pool_dealloc(PyObject *o) {
  PoolCore *self = (PoolCore *)o;
  PyTypeObject *type = Py_TYPE(o);
  Py_XDECREF(self->by_id);
  Py_XDECREF(self->stacks);
  freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
  release(o);
  Py_DECREF(type);
}

static PyMethodDef pool_methods[] = {
    {"get_connection", FAST(pool_get), FLAGS,
     "get_connection(endpoint)\n--\n\nThe id of a connection to the endpoint: an idle one of this "
     "process, else a new one; None when the endpoint or the pool is at its limit."},
    {"return_connection", FAST(pool_return), FLAGS,
     "return_connection(connection_id)\n--\n\nThe connection is idle again, for this process to reuse."},
    {"_take", pool_take, METH_O, NULL},
    {"_add", pool_add, METH_VARARGS, NULL},
    {"_drop", pool_drop, METH_O, NULL},
    {"_drop_idle", pool_drop_idle, METH_O, NULL},
    {"_release", pool_release, METH_O, NULL},
    {"_lookup", pool_lookup, METH_O, NULL},
    {"_set_object", pool_set_object, METH_VARARGS, NULL},
    {"_bind_core", pool_bind, METH_VARARGS, NULL},
    {"_measure", pool_measure, METH_VARARGS, NULL},
    {"_connections", pool_connections, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL}};

static char pool_doc[] = "Native base of SimpleConnectionPool.";
static PyType_Slot pool_slots[] = {{Py_tp_dealloc, (void *)pool_dealloc},
                                   {Py_tp_methods, pool_methods},
                                   {Py_tp_doc, pool_doc},
                                   {0, NULL}};
static PyType_Spec pool_spec = {"fast_litellm_shm._native.PoolCore", sizeof(PoolCore), 0,
                                Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, pool_slots};

static char connection_doc[] = "A pooled connection.";
static PyType_Slot connection_slots[] = {{Py_tp_dealloc, (void *)connection_dealloc},
                                         {Py_tp_getset, connection_getset},
                                         {Py_tp_doc, connection_doc},
                                         {0, NULL}};
static PyType_Spec connection_spec = {"fast_litellm_shm._native.Connection", sizeof(Connection), 0,
                                      Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
                                      connection_slots};

static PyType_Slot stack_slots[] = {{Py_tp_dealloc, (void *)stack_dealloc}, {0, NULL}};
static PyType_Spec stack_spec = {"fast_litellm_shm._native.Stack", sizeof(Stack), 0,
                                 Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
                                 stack_slots};

static int install_pool(PyObject *module) {
  PyObject *pool = PyType_FromSpec(&pool_spec);
  connection_type = (PyTypeObject *)PyType_FromSpec(&connection_spec);
  stack_type = (PyTypeObject *)PyType_FromSpec(&stack_spec);
  if (!pool || !connection_type || !stack_type) return -1;
  int failed = PyObject_SetAttrString(module, "PoolCore", pool) ||
               PyObject_SetAttrString(module, "Connection", (PyObject *)connection_type);
  Py_DECREF(pool);
  return failed;
}
