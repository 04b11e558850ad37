/* py_use.h - Use: a connection during a `with pool.connection()` block. Included by py_pool.c.
 *
 * The end of the block gives the connection back, or closes it after an exception. If the block never begins, or its
 * end is never reached, the end of the Use does this. */
#ifndef FSHM_PY_USE_H
#define FSHM_PY_USE_H

#include "py_args.h"

typedef struct {
  PyObject_HEAD
  PyObject *pool, *endpoint, *timeout;
  Connection *connection; /* our connection in use; NULL: none */
  int entered; /* the block may have begun: the connection's state is unknown */
  int over; /* no caller waits any more: a connection that a thread still finds is given back at once */
} Use;

static PyTypeObject *use_type;

/* _use(endpoint, timeout) -> a Use, without a connection yet. */
static PyObject *pool_use(PyObject *o, PyObject *args) {
  PyObject *endpoint, *timeout;
  if (unbound((PoolCore *)o) || !PyArg_ParseTuple(args, "OO", &endpoint, &timeout)) return NULL;
  Use *self = PyObject_GC_New(Use, use_type);
  if (!self) return NULL;
  self->pool = Py_NewRef(o);
  self->endpoint = Py_NewRef(endpoint);
  self->timeout = Py_NewRef(timeout);
  self->connection = NULL;
  self->entered = self->over = 0;
  PyObject_GC_Track((PyObject *)self);
  return (PyObject *)self;
}

/* Give the connection back. failed: take it out of the pool, and close it; an error of closing is not raised, so as
 * not to hide the first one. */
static int use_leave(Use *self, int failed) {
  PyObject *found = NULL;
  PoolCore *pool = (PoolCore *)self->pool;
  Connection *c, *wanted;
  ALONE_BEGIN(self);
  c = self->connection;
  self->connection = NULL;
  ALONE_END();
  if (!c) return 0;
  int ok = 1;
  if (failed) {
    found = forget(pool, c->id, c, 0);
    if (found) {
      (void)done(PyObject_CallMethod(self->pool, "_shut", "O", found));
      give_places_back((Connection *)found);
    }
    if (PyErr_Occurred() && PyErr_ExceptionMatches(PyExc_Exception)) PyErr_Clear();
    ok = !PyErr_Occurred();
  } else if (!put_back(pool, c->id, c, &wanted)) {
    ok = !done(PyObject_CallMethod(self->pool, "_odd", "O", c->id));
  } else {
    ok = !serve(self->pool, wanted);
  }
  Py_XDECREF(found);
  Py_DECREF((PyObject *)c);
  return ok ? 0 : -1;
}

/* Takes over the reference to the connection. 0: nobody waits for it any more, and it is idle. */
static int use_hold(Use *self, Connection *c) {
  int over;
  ALONE_BEGIN(self);
  over = self->over || self->connection;
  if (!over) self->connection = c;
  ALONE_END();
  if (!over) return 1;
  Connection *wanted;
  (void)put_back((PoolCore *)self->pool, c->id, c, &wanted);
  Py_DECREF((PyObject *)c);
  return serve(self->pool, wanted) ? -1 : 0;
}

/* The block begins: returns the bound object, or the id if there is none. */
static PyObject *use_begin(PyObject *o, UNUSED PyObject *unused) {
  Use *self = (Use *)o;
  Connection *c = NULL;
  PyObject *value = NULL, *connect = PyObject_GetAttrString(self->pool, "_connect");
  if (!connect) return NULL;
  ALONE_BEGIN(self);
  if ((c = self->connection)) {
    self->entered = 1;
    value = Py_NewRef(connect == Py_None ? c->id : c->object);
  }
  ALONE_END();
  Py_DECREF(connect);
  if (!value) PyErr_SetString(PyExc_RuntimeError, "no connection is held");
  return value;
}

static int use_once(const Use *self) {
  if (!self->entered && !self->connection && !self->over) return 0;
  return fail(PyExc_RuntimeError, "call connection() for each block");
}

/* Does any caller wait for a connection to the endpoint, or for room in the pool? */
static int use_waited(const Use *self) {
  PoolCore *pool = (PoolCore *)self->pool;
  key_arg key;
  int waited = -1;
  if (Py_TYPE(self->endpoint) == &PyUnicode_Type) {
    ALONE_BEGIN(pool);
    const Stack *stack = (Stack *)PyDict_GetItemWithError(pool->stacks, self->endpoint);
    if (stack && stack->top) waited = is_waited_for(stack->top);
    ALONE_END();
    if (waited >= 0) return waited;
  }
  if (!PyUnicode_Check(self->endpoint) || get_key(self->endpoint, &key)) {
    PyErr_Clear();
    return 0; /* _open() says what is wrong with it */
  }
  waited = fshm_is_waited_for(pool->permits, key.bytes, (uint64_t)key.length) ||
           fshm_is_waited_for(pool->totals, "", 0);
  Py_XDECREF(key.held);
  return waited;
}

static int use_failed(Use *self) {
  PyObject *error, *value, *trace;
  PyErr_Fetch(&error, &value, &trace);
  if (use_leave(self, 0)) PyErr_WriteUnraisable(NULL); /* the traceback may keep us */
  PyErr_Restore(error, value, trace);
  return -1;
}

/* A first try, where nobody waits. Else, or if it has found none, self._wait() does the rest. */
static int use_get(Use *self, PyObject *deadline) {
  Connection *c = use_waited(self) ? NULL : take_measured(self->pool, self->endpoint);
  if (c) return use_hold(self, c) < 0 ? -1 : 0;
  if (PyErr_Occurred()) return -1;
  return done(PyObject_CallMethod(self->pool, "_wait", "OOOO", self, self->endpoint, deadline,
                                  self->timeout));
}

static PyObject *use_enter(PyObject *o, PyObject *unused) {
  Use *self = (Use *)o;
  if (use_once(self)) return NULL;
  PyObject *deadline = PyObject_CallMethod(self->pool, "_deadline", "O", self->timeout);
  if (!deadline) return NULL;
  int failed = use_get(self, deadline);
  Py_DECREF(deadline);
  if (failed) {
    (void)use_failed(self);
    return NULL;
  }
  return use_begin(o, unused);
}

static PyObject *use_exit(PyObject *o, PyObject *args) {
  PyObject *kind, *error, *trace;
  if (!PyArg_ParseTuple(args, "OOO", &kind, &error, &trace)) return NULL;
  if (use_leave((Use *)o, kind != Py_None)) return NULL;
  Py_RETURN_NONE;
}

/* As a decorator: each call of the function is a block. */
static PyObject *use_call(PyObject *o, PyObject *args, PyObject *kw) {
  Use *self = (Use *)o;
  PyObject *function;
  if (kw && PyDict_Size(kw))
    return PyErr_Format(PyExc_TypeError, "connection() takes a function, and nothing by name");
  if (!PyArg_ParseTuple(args, "O", &function)) return NULL;
  return PyObject_CallMethod(self->pool, "_around", "OOO", self->endpoint, self->timeout, function);
}

/* For callers that wait. _idle(): hold an idle connection, if there is one. */
static PyObject *use_idle(PyObject *o, UNUSED PyObject *unused) {
  Use *self = (Use *)o;
  if (use_once(self)) return NULL;
  Connection *c = take_idle(self->pool, self->endpoint);
  int held = c ? use_hold(self, c) : 0;
  return held < 0 || PyErr_Occurred() ? NULL : PyBool_FromLong(held);
}

/* _hold(connection): add an opened connection to the pool, and hold it. False: the caller does not wait any more, and
 * the connection is idle. May be called in another thread. */
static PyObject *use_hold_opened(PyObject *o, PyObject *connection) {
  Use *self = (Use *)o;
  Connection *c = checked_connection(connection);
  if (!c || (!c->stack && add_opened((PoolCore *)self->pool, c))) return NULL;
  Py_INCREF(connection);
  int held = use_hold(self, c);
  return held < 0 ? NULL : PyBool_FromLong(held);
}

/* _over(): the caller does not wait any more. */
static PyObject *use_over(PyObject *o, UNUSED PyObject *unused) {
  Use *self = (Use *)o;
  int entered;
  ALONE_BEGIN(self);
  self->over = 1;
  entered = self->entered;
  ALONE_END();
  if (use_leave(self, entered)) return NULL;
  Py_RETURN_NONE;
}

static int use_traverse(PyObject *o, visitproc visit, void *arg) {
  Py_VISIT(Py_TYPE(o));
  Py_VISIT(((Use *)o)->pool);
  Py_VISIT(((Use *)o)->endpoint);
  Py_VISIT((PyObject *)((Use *)o)->connection);
  return 0;
}

static void use_dealloc(PyObject *o) {
  Use *self = (Use *)o;
  PyObject_GC_UnTrack(o);
  if (self->connection) {
    PyObject *error, *value, *trace;
    PyErr_Fetch(&error, &value, &trace); /* an exception may be passing through us */
    if (use_leave(self, self->entered)) PyErr_WriteUnraisable(NULL);
    PyErr_Restore(error, value, trace);
  }
  Py_DECREF(self->pool);
  Py_DECREF(self->endpoint);
  Py_DECREF(self->timeout);
  end_object(o, PyObject_GC_Del);
}

static PyMethodDef use_methods[] = {{"__enter__", use_enter, METH_NOARGS, NULL},
                                    {"__exit__", use_exit, METH_VARARGS, NULL},
                                    {"_begin", use_begin, METH_NOARGS, NULL},
                                    {"_idle", use_idle, METH_NOARGS, NULL},
                                    {"_hold", use_hold_opened, METH_O, NULL},
                                    {"_over", use_over, METH_NOARGS, NULL},
                                    {NULL, NULL, 0, NULL}};
static PyType_Slot use_slots[] = {{Py_tp_dealloc, (void *)use_dealloc},
                                  {Py_tp_traverse, (void *)use_traverse},
                                  {Py_tp_call, (void *)use_call},
                                  {Py_tp_methods, use_methods},
                                  {0, NULL}};

#endif
