/* py_pool.c - PoolCore, the hot half of SimpleConnectionPool: take an idle connection of this process, and put it
 * back. pools/connection_pool.py opens and closes connections; semaphore.c has the limits; this file maps ids to
 * connections.
 *
 * The idle connections of an endpoint are a stack: the one used last is taken first. All code runs under the GIL, or
 * with the pool locked. Ids and endpoints are exact strs here, so comparing them runs no Python.
 *
 * Each thing taken belongs to an object that gives it back when it is freed: a Connection has its permits, a Use has
 * a connection in use. So an exception between any two instructions of Python, out of a signal handler, leaks
 * neither. */
#include "../core/internal.h"
#include "../permits/wait_queue.h"
#include "py_args.h"
#include "py_measure.h"

typedef struct Connection {
  PyObject_HEAD
  PyObject *id; /* str */
  PyObject *endpoint; /* str */
  PyObject *object; /* the object that connect() returned, or None */
  PyObject *handles; /* own the limiters */
  fshm_limiter *permits, *totals; /* of the pool */
  fshm_permit permit; /* of the endpoint */
  fshm_permit total; /* of the whole pool */
  const _Atomic uint64_t *queues[2]; /* of callers that wait for either permit: wait_queue_of() */
  uint64_t used_ns; /* fshm_clock() when last returned */
  int idle;
  struct Connection *below; /* it is in the idle stack, which owns it */
  struct Stack *stack; /* of its endpoint, borrowed: by_id has us only while `stacks` has it */
} Connection;

typedef struct {
  PyObject_HEAD
  PyObject *by_id; /* dict: id -> Connection, idle and in use */
  PyObject *stacks; /* dict: endpoint -> Stack */
  PyObject *handles; /* tuple of the owners of the limiters, until we are freed */
  fshm_limiter *permits, *totals;
  uint64_t idle_ns; /* an idle connection may be used again for so long */
  measure_t measure; /* get_connection() */
} PoolCore;

typedef struct Stack {
  PyObject_HEAD
  Connection *top;
} Stack;

static PyTypeObject *connection_type, *stack_type;

static void give_places_back(Connection *c) {
  ALONE_BEGIN(c);
  (void)fshm_permit_release(c->permits, &c->permit);
  (void)fshm_permit_release(c->totals, &c->total);
  ALONE_END();
}

static void connection_dealloc(PyObject *o) {
  Connection *c = (Connection *)o;
  PyObject_GC_UnTrack(o);
  Py_XDECREF(c->object); /* first: or the endpoint would see more than the limit */
  give_places_back(c);
  Py_XDECREF(c->id);
  Py_XDECREF(c->endpoint);
  Py_XDECREF((PyObject *)c->below);
  Py_XDECREF(c->handles);
  end_object(o, PyObject_GC_Del);
}

/* Traversed, so that a pool whose connections refer to it is collected. None has a tp_clear: their dicts break the
 * cycles, and a __del__() must find working objects. */
static int connection_traverse(PyObject *o, visitproc visit, void *arg) {
  Py_VISIT(Py_TYPE(o));
  Py_VISIT(((Connection *)o)->object);
  Py_VISIT((PyObject *)((Connection *)o)->below);
  return 0;
}

static void stack_dealloc(PyObject *o) {
  PyObject_GC_UnTrack(o);
  for (Connection *c = ((Stack *)o)->top, *below; c; c = below) { /* not by recursion */
    below = c->below;
    c->below = NULL;
    Py_DECREF((PyObject *)c);
  }
  end_object(o, PyObject_GC_Del);
}

static int stack_traverse(PyObject *o, visitproc visit, void *arg) {
  Py_VISIT(Py_TYPE(o));
  Py_VISIT((PyObject *)((Stack *)o)->top);
  return 0;
}

static PyObject *connection_get(PyObject *o, void *which) {
  Connection *c = (Connection *)o;
  PyObject *out;
  ALONE_BEGIN(o); /* the object is set once it is there */
  PyObject *fields[] = {c->id, c->endpoint, c->object};
  out = Py_NewRef(fields[(uintptr_t)which]);
  ALONE_END();
  return out;
}
static PyObject *connection_idle(PyObject *o, UNUSED void *unused) {
  return PyBool_FromLong(RELAXED_GET(((Connection *)o)->idle));
}
static PyObject *connection_held(PyObject *o, UNUSED void *unused) {
  int held;
  ALONE_BEGIN(o);
  held = fshm_permit_held(((Connection *)o)->permits, &((Connection *)o)->permit);
  ALONE_END();
  return PyBool_FromLong(held);
}
static PyObject *connection_idle_seconds(PyObject *o, UNUSED void *unused) {
  Connection *c = (Connection *)o;
  uint64_t used = RELAXED_GET(c->used_ns);
  return PyFloat_FromDouble(RELAXED_GET(c->idle) ? (double)(fshm_clock() - used) * 1e-9 : 0.0);
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
  if (self->by_id && self->stacks && self->permits) return 0;
  return fail(PyExc_RuntimeError, "the pool's __init__ was not called");
}

/* An exact str, whose comparison runs no Python. NULL without an exception: it is not a str. */
static PyObject *exact(PyObject *text) {
  if (likely(Py_TYPE(text) == &PyUnicode_Type)) return Py_NewRef(text);
  return PyUnicode_Check(text) ? PyUnicode_FromObject(text) : NULL;
}

/* Take the connection on top of an endpoint's stack, if it may still be used; else set *stale. The caller owns it. */
static UNGUARDED Connection *pop(PoolCore *self, PyObject *endpoint, int *stale) {
  Connection *c = NULL;
  *stale = 0;
  ALONE_BEGIN(self);
  /* Borrowed: the pool's dicts change only under its own lock, or the GIL. */
  Stack *stack = (Stack *)PyDict_GetItemWithError(self->stacks, endpoint);
  Connection *top = stack ? stack->top : NULL;
  /* Not idle: it is the parent's, after a fork, or an operator released it by force. */
  if (top && fshm_clock() - top->used_ns <= self->idle_ns &&
      fshm_permit_idle(top->permits, &top->permit, 0)) {
    stack->top = top->below; /* its reference moves to the stack, and the stack's to the caller */
    top->below = NULL;
    RELAXED_SET(top->idle, 0);
    c = top;
  } else {
    *stale = top != NULL;
  }
  ALONE_END();
  return c;
}

/* Does any caller wait for the connection's endpoint, or for room in the pool? */
static inline int is_waited_for(const Connection *c) {
  return (uint32_t)(load_relaxed(c->queues[0]) | load_relaxed(c->queues[1])) != 0;
}

/* Mark the pool's connection of this id as idle. 0: it is not `meant` (NULL: any will do), or it is idle already.
 * *wanted: the connection, if a caller may wait for it or for its permits; or NULL. */
static int put_back(PoolCore *self, PyObject *id, const Connection *meant, Connection **wanted) {
  int done = 0;
  *wanted = NULL;
  ALONE_BEGIN(self);
  Connection *c = (Connection *)PyDict_GetItemWithError(self->by_id, id); /* borrowed, as above */
  if (c && (!meant || c == meant) && !c->idle && fshm_permit_idle(c->permits, &c->permit, 1)) {
    RELAXED_SET(c->used_ns, fshm_clock());
    RELAXED_SET(c->idle, 1);
    c->below = c->stack->top;
    Py_INCREF((PyObject *)c);
    c->stack->top = c;
    done = 1;
    /* After the swap in fshm_permit_idle(). A caller that waits has joined the queue before it looks at the permits, and
     * at this stack under this lock: it sees the idle connection, or we see it in the queue. */
    after_swap();
    if (unlikely(is_waited_for(c))) *wanted = (Connection *)Py_NewRef((PyObject *)c);
  }
  ALONE_END();
  return done;
}

/* After put_back(): serve who waits, for the endpoint or for room in the pool: who came first. One of this process is woken. For one of another process, the connection is closed. */
static int serve(PyObject *pool, Connection *wanted) {
  if (likely(!wanted)) return 0;
  key_arg key;
  int failed = get_key(wanted->endpoint, &key);
  if (!failed) {
    int next = FSHM_NEXT_NONE;
    if (fshm_wait_first(wanted->permits, key.bytes, (uint64_t)key.length) <=
        fshm_wait_first(wanted->totals, "", 0))
      next = fshm_wait_next(wanted->permits, key.bytes, (uint64_t)key.length);
    if (next == FSHM_NEXT_NONE) next = fshm_wait_next(wanted->totals, "", 0);
    Py_XDECREF(key.held);
    if (next == FSHM_NEXT_OTHER)
      failed = done(PyObject_CallMethod(pool, "_give_up", "O", wanted->endpoint));
  }
  Py_DECREF((PyObject *)wanted);
  return failed;
}

/* Add an opened connection to the pool. */
static int add_opened(PoolCore *self, Connection *c) {
  int failed;
  ALONE_BEGIN(self);
  Stack *stack = (Stack *)dict_get(self->stacks, c->endpoint);
  if (!stack && !PyErr_Occurred() && (stack = PyObject_GC_New(Stack, stack_type))) {
    stack->top = NULL;
    PyObject_GC_Track((PyObject *)stack);
    if (PyDict_SetItem(self->stacks, c->endpoint, (PyObject *)stack)) {
      Py_DECREF((PyObject *)stack);
      stack = NULL;
    }
  }
  c->stack = stack;
  failed = !stack || PyDict_SetItem(self->by_id, c->id, (PyObject *)c);
  Py_XDECREF((PyObject *)stack);
  ALONE_END();
  return failed ? -1 : 0;
}

/* An idle connection of this process. NULL: there is none, or an exception. */
static UNGUARDED Connection *take_idle(PyObject *o, PyObject *endpoint) {
  PoolCore *self = (PoolCore *)o;
  PyObject *text = exact(endpoint), *r;
  Connection *c = NULL;
  for (int more = text != NULL; more > 0 && !(c = pop(self, text, &more)) && more;) {
    r = PyObject_CallMethod(o, "_close_stale", "O", text);
    more = r ? PyObject_IsTrue(r) : -1; /* there may be others beneath */
    Py_XDECREF(r);
  }
  Py_XDECREF(text);
  return c;
}

/* Get a connection for the caller: an idle one, else one that self._open(endpoint) opens. NULL without an exception:
 * no permit is free. */
static UNGUARDED Connection *take(PyObject *o, PyObject *endpoint) {
  PoolCore *self = (PoolCore *)o;
  Connection *c = take_idle(o, endpoint);
  if (c || PyErr_Occurred()) return c;
  PyObject *r = PyObject_CallMethod(o, "_open", "O", endpoint);
  if (!r || Py_TYPE(r) != connection_type) {
    Py_XDECREF(r);
    return NULL;
  }
  if (!add_opened(self, (Connection *)r)) return (Connection *)r;
  Py_DECREF(r);
  return NULL;
}

static UNGUARDED Connection *take_measured(PyObject *o, PyObject *endpoint) {
  measure_t *measure = &((PoolCore *)o)->measure;
  uint64_t begun;
  if (measure_begin(measure, &begun)) return NULL;
  Connection *c = take(o, endpoint);
  if (unlikely(begun)) measure_end(measure, begun, c || !PyErr_Occurred(), 0);
  return c;
}

/* get_connection(endpoint): the id of a connection in use; None at the limits. */
static UNGUARDED PyObject *pool_get(PyObject *o, PyObject *const *args, Py_ssize_t n,
                                    PyObject *kwnames) {
  PyObject *endpoint = n == 1 && !kwnames ? args[0] : NULL;
  static const char *const names[] = {"endpoint"};
  if (!endpoint && parse("get_connection", args, n, kwnames, names, &endpoint, 1, 1)) return NULL;
  if (unbound((PoolCore *)o)) return NULL;
  Connection *c = take_measured(o, endpoint);
  if (!c) {
    if (PyErr_Occurred()) return NULL;
    Py_RETURN_NONE;
  }
  PyObject *id = Py_NewRef(c->id);
  Py_DECREF((PyObject *)c); /* by_id holds another */
  return id;
}

static PyObject *pool_measure(PyObject *o, PyObject *args) {
  return measure_set(&((PoolCore *)o)->measure, args);
}

/* return_connection(id): idle again. Unknown, foreign or returned ids: self._odd(id). */
static PyObject *pool_return(PyObject *o, PyObject *const *args, Py_ssize_t n, PyObject *kwnames) {
  PoolCore *self = (PoolCore *)o;
  PyObject *id = n == 1 && !kwnames ? args[0] : NULL;
  static const char *const names[] = {"connection_id"};
  if (!id && parse("return_connection", args, n, kwnames, names, &id, 1, 1)) return NULL;
  if (unbound(self)) return NULL;
  PyObject *text = exact(id);
  Connection *wanted = NULL;
  int idle = text && put_back(self, text, NULL, &wanted);
  Py_XDECREF(text);
  if (!idle) return PyErr_Occurred() ? NULL : PyObject_CallMethod(o, "_odd", "O", id);
  if (serve(o, wanted)) return NULL;
  Py_RETURN_NONE;
}

static PyObject *refusal(int status, const char *limit) {
  if (status == FSHM_E_DAMAGED) return PyUnicode_FromString("damaged");
  return PyUnicode_FromString(status == FSHM_DENIED ? limit : "full");
}

/* _add(id, endpoint, behind): a Connection with both its permits, to be added to the pool once opened; or the name of
 * the limit that was reached ("endpoint" or "pool"); "full": the segment has no free slot; "damaged". behind: "pool"
 * also where others wait for room in the whole pool. */
static PyObject *pool_add(PyObject *o, PyObject *args) {
  PoolCore *self = (PoolCore *)o;
  PyObject *id, *endpoint;
  int behind = 0;
  key_arg key;
  fshm_decision d;
  uint32_t held;
  if (unbound(self) || !PyArg_ParseTuple(args, "UU|p", &id, &endpoint, &behind)) return NULL;
  Connection *c = PyObject_GC_New(Connection, connection_type);
  if (!c) return NULL;
  memset((char *)c + sizeof(PyObject), 0, sizeof *c - sizeof(PyObject));
  c->permits = self->permits;
  c->totals = self->totals;
  c->handles = Py_NewRef(self->handles);
  c->object = Py_NewRef(Py_None);
  PyObject_GC_Track((PyObject *)c);
  c->id = exact(id);
  c->endpoint = exact(endpoint);
  if (!c->id || !c->endpoint || get_key(c->endpoint, &key)) {
    Py_DECREF((PyObject *)c);
    return NULL;
  }
  const char *limit = "endpoint";
  fshm_admit(self->permits, key.bytes, (uint64_t)key.length, NULL, 0, &c->permit, &d, &held);
  Py_XDECREF(key.held);
  if (d.status == FSHM_ALLOWED) {
    limit = "pool";
    c->queues[0] = wait_queue_of(self->permits->segment, &c->permit);
    if (behind && fshm_is_waited_for(self->totals, "", 0))
      d.status = FSHM_DENIED;
    else
      fshm_admit(self->totals, "", 0, NULL, 0, &c->total, &d, &held);
  }
  if (d.status == FSHM_ALLOWED) {
    c->queues[1] = wait_queue_of(self->totals->segment, &c->total);
    return (PyObject *)c;
  }
  Py_DECREF((PyObject *)c);
  return refusal(d.status, limit);
}

static Connection *checked_connection(PyObject *o) {
  if (Py_TYPE(o) == connection_type) return (Connection *)o;
  PyErr_Format(PyExc_TypeError, "not a Connection: %R", o);
  return NULL;
}

/* _set_object(connection, object): the object that connect() returned. */
static PyObject *pool_set_object(UNUSED PyObject *o, PyObject *args) {
  PyObject *connection, *object, *old;
  if (!PyArg_ParseTuple(args, "OO", &connection, &object)) return NULL;
  Connection *c = checked_connection(connection);
  if (!c) return NULL;
  ALONE_BEGIN(c);
  old = c->object;
  c->object = Py_NewRef(object);
  ALONE_END();
  Py_DECREF(old);
  Py_RETURN_NONE;
}

static void unstack(PoolCore *self, Connection *c) {
  Stack *stack = (Stack *)dict_get(self->stacks, c->endpoint);
  for (Connection **at = stack ? &stack->top : NULL; at && *at; at = &(*at)->below) {
    if (*at != c) continue;
    *at = c->below;
    c->below = NULL;
    Py_DECREF((PyObject *)c); /* by_id holds another */
    break;
  }
  Py_XDECREF((PyObject *)stack);
}

/* Take a connection out of the pool. Its permits stay held until _release(), so that it can be closed first. NULL
 * without an exception: there is no such id, or the connection is not `only`. */
static PyObject *forget(PoolCore *self, PyObject *id, const Connection *only, int only_idle) {
  Connection *c = NULL;
  int gone = 0;
  PyObject *text = self->by_id ? exact(id) : NULL;
  if (!text) return NULL;
  ALONE_BEGIN(self);
  c = (Connection *)dict_get(self->by_id, text);
  if (c && (!only || c == only) && (!only_idle || c->idle)) {
    unstack(self, c);
    RELAXED_SET(c->idle, 0);
    gone = !PyDict_DelItem(self->by_id, text);
  }
  ALONE_END();
  Py_DECREF(text);
  if (gone) return (PyObject *)c;
  Py_XDECREF((PyObject *)c);
  return NULL;
}

static PyObject *or_none(PyObject *found) {
  if (found || PyErr_Occurred()) return found;
  Py_RETURN_NONE;
}

/* _drop(id) -> the Connection, out of the pool; or None. */
static PyObject *pool_drop(PyObject *o, PyObject *id) {
  return or_none(forget((PoolCore *)o, id, NULL, 0));
}

/* _drop_idle(id): the same, unless it is in use (by now). */
static PyObject *pool_drop_idle(PyObject *o, PyObject *id) {
  return or_none(forget((PoolCore *)o, id, NULL, 1));
}

/* _release(connection): release its permits. */
static PyObject *pool_release(UNUSED PyObject *o, PyObject *connection) {
  Connection *c = checked_connection(connection);
  if (!c) return NULL;
  give_places_back(c);
  Py_RETURN_NONE;
}

/* _lookup(id) -> the Connection, or None. */
static PyObject *pool_lookup(PyObject *o, PyObject *id) {
  PoolCore *self = (PoolCore *)o;
  PyObject *c = NULL, *text = self->by_id ? exact(id) : NULL;
  if (!text) return or_none(NULL);
  ALONE_BEGIN(self);
  c = dict_get(self->by_id, text);
  ALONE_END();
  Py_DECREF(text);
  return or_none(c);
}

/* _bind_core(handles, permits address, totals address, idle_ns): also forgets all connections (in a forked child
 * they are the parent's). handles: a tuple of the owners of the limiters. */
static PyObject *pool_bind(PyObject *o, PyObject *args) {
  PoolCore *self = (PoolCore *)o;
  unsigned long long permits, totals, idle_ns;
  PyObject *handles, *by_id, *stacks, *old[2];
  if (!PyArg_ParseTuple(args, "O!KKK", &PyTuple_Type, &handles, &permits, &totals, &idle_ns))
    return NULL;
  by_id = PyDict_New();
  stacks = PyDict_New();
  if (!by_id || !stacks) {
    Py_XDECREF(by_id);
    Py_XDECREF(stacks);
    return NULL;
  }
  ALONE_BEGIN(self);
  old[0] = self->by_id;
  old[1] = self->stacks;
  self->by_id = by_id;
  self->stacks = stacks;
  if (!self->handles) { /* a call may be inside them: they stay */
    self->handles = Py_NewRef(handles);
    self->permits = (fshm_limiter *)(uintptr_t)permits;
    self->totals = (fshm_limiter *)(uintptr_t)totals;
    self->idle_ns = idle_ns;
  }
  ALONE_END();
  Py_XDECREF(old[0]); /* last: the objects in them may call the pool */
  Py_XDECREF(old[1]);
  Py_RETURN_NONE;
}

static PyObject *pool_connections(PyObject *o, UNUSED PyObject *unused) {
  PoolCore *self = (PoolCore *)o;
  PyObject *copy;
  ALONE_BEGIN(self);
  copy = self->by_id ? PyDict_Copy(self->by_id) : PyDict_New();
  ALONE_END();
  return copy;
}

static int pool_traverse(PyObject *o, visitproc visit, void *arg) {
  Py_VISIT(Py_TYPE(o));
  Py_VISIT(((PoolCore *)o)->by_id);
  Py_VISIT(((PoolCore *)o)->stacks);
  return 0;
}

#include "py_use.h"

static void pool_dealloc(PyObject *o) {
  PoolCore *self = (PoolCore *)o;
  PyObject_GC_UnTrack(o);
  Py_XDECREF(self->by_id);
  Py_XDECREF(self->stacks);
  Py_XDECREF(self->handles);
  end_derived(o);
}

static PyMethodDef pool_methods[] = {
    {"get_connection", FAST(pool_get), FLAGS,
     "get_connection(endpoint)\n--\n\nThe id of a connection to the endpoint: an idle one of this "
     "process, else a new one; None when the endpoint or the pool is at its limit."},
    {"return_connection", FAST(pool_return), FLAGS,
     "return_connection(connection_id)\n--\n\nThe connection is idle again, for this process to reuse."},
    {"_use", pool_use, METH_VARARGS, NULL},
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

static PyType_Slot pool_slots[] = {{Py_tp_dealloc, (void *)pool_dealloc},
                                   {Py_tp_traverse, (void *)pool_traverse},
                                   {Py_tp_methods, pool_methods},
                                   {Py_tp_doc, DOC("Native base of SimpleConnectionPool.")},
                                   {0, NULL}};

static PyType_Slot connection_slots[] = {{Py_tp_dealloc, (void *)connection_dealloc},
                                         {Py_tp_traverse, (void *)connection_traverse},
                                         {Py_tp_getset, connection_getset},
                                         {Py_tp_doc, DOC("A pooled connection.")},
                                         {0, NULL}};

static PyType_Slot stack_slots[] = {
    {Py_tp_dealloc, (void *)stack_dealloc}, {Py_tp_traverse, (void *)stack_traverse}, {0, NULL}};
