/* py_counts.c - Counts: limits that come with the call, as PyPI's `limits` calls its storages (a key that names its
 * own limit, a period in seconds, an amount). The base class of the storage in integrations/limits.py. */
#include "py_args.h"
#include "py_watch.h"

enum { COUNT_FIXED, COUNT_SLIDING, COUNT_MOVING, COUNT_KINDS };

typedef struct {
  PyObject_HEAD
  fshm_limiter *limiters[COUNT_KINDS]; /* set once, by _bind() */
  PyObject *handles; /* tuple of their owners, until we are freed */
  watch_t watch;
} Counts;

/* limits' key_for() ends a key with /amount/multiples/granularity, and 60 is a minute wherever it says so. */
static const struct {
  const char *name;
  uint64_t seconds;
} granularities[] = {{"second", 1},  {"minute", 60},     {"hour", 3600},
                     {"day", 86400}, {"month", 2592000}, {"year", 31104000}};

/* The number that ends before `end`, and where it begins after its slash; false where there is none. */
static int number_before(const char *bytes, Py_ssize_t *end, uint64_t *out) {
  Py_ssize_t at = *end;
  uint64_t value = 0, digit = 1;
  while (at > 0 && bytes[at - 1] >= '0' && bytes[at - 1] <= '9' && *end - at < 18) {
    value += digit * (uint64_t)(bytes[--at] - '0');
    digit *= 10;
  }
  if (at == *end || !at || bytes[at - 1] != '/') return 0;
  *end = at - 1;
  *out = value;
  return 1;
}

/* The limit that the key names, if it names the same period as the call; else none: UINT64_MAX. For a key of another
 * origin this can only be a coincidence, if it ends in three such words. */
static uint64_t limit_in(const key_arg *k, uint64_t period_ns) {
  uint64_t multiples, amount;
  for (size_t i = 0; i < sizeof granularities / sizeof *granularities; i++) {
    Py_ssize_t length = (Py_ssize_t)strlen(granularities[i].name), end = k->length - length - 1;
    if (end <= 0 || k->bytes[end] != '/' ||
        memcmp(k->bytes + end + 1, granularities[i].name, (size_t)length) != 0)
      continue;
    if (!number_before(k->bytes, &end, &multiples) || !number_before(k->bytes, &end, &amount))
      return UINT64_MAX;
    if (multiples > UINT64_C(1) << 30) return UINT64_MAX;
    return multiples * granularities[i].seconds * 1000000000 == period_ns ? amount : UINT64_MAX;
  }
  return UINT64_MAX;
}

static int get_period(PyObject *value, uint64_t *ns) {
  double seconds = PyFloat_AsDouble(value);
  if (PyErr_Occurred()) return -1;
  *ns = seconds > 0 && seconds < 1e9 ? (uint64_t)(seconds * 1e9 + 0.5) : 0;
  return 0; /* 0, and whatever else is out of range: fshm_count() says so */
}

/* What a hit costs: an int, or another number, which _whole() of the Python class rounds. */
static int get_amount(PyObject *o, PyObject *value, uint64_t *out) {
  if (likely(Py_TYPE(value) == &PyLong_Type)) return get_cost(value, out);
  PyObject *whole = PyObject_CallMethod(o, "_whole", "O", value);
  int failed = !whole || get_cost(whole, out);
  Py_XDECREF(whole);
  return failed;
}

/* (key, limit, expiry, amount). NULL for `limit` or `amount`: the call has none. */
typedef struct {
  fshm_limiter *limiter;
  key_arg key;
  fshm_limit limit;
  uint64_t amount;
  int which;
} counted_call;

static int begin_call(PyObject *o, int which, PyObject *key, PyObject *limit, PyObject *expiry,
                      PyObject *amount, counted_call *c) {
  c->which = which;
  c->limiter = ((Counts *)o)->limiters[which];
  c->limit = (fshm_limit){FSHM_MAX_MOVING, 1000000000, 0, FSHM_WINDOW, 0};
  c->limit.kind = which == COUNT_SLIDING ? FSHM_SLIDING : FSHM_WINDOW;
  c->amount = 0;
  if (!c->limiter) return fail(PyExc_RuntimeError, "_bind() was not called");
  if (limit && get_cost(limit, &c->limit.n)) return -1;
  if (expiry && get_period(expiry, &c->limit.per_ns)) return -1;
  if (amount && (get_amount(o, amount, &c->amount) || watch_call(&((Counts *)o)->watch))) return -1;
  return get_key(key, &c->key);
}

/* Charge `cost`, and end the call. -1: an exception was set, by the Python method that has the messages. */
static int make_call(PyObject *o, const counted_call *c, uint64_t cost, fshm_counted *found) {
  if (c->which == COUNT_MOVING)
    fshm_moving(c->limiter, c->key.bytes, (uint64_t)c->key.length, &c->limit, cost, 0, found);
  else
    fshm_count(c->limiter, c->key.bytes, (uint64_t)c->key.length, &c->limit, cost, 0, found);
  Py_XDECREF(c->key.held);
  if (found->status >= 0) return 0;
  if (!done(PyObject_CallMethod(o, "_refused", "iiKK", c->which, found->status,
                                (unsigned long long)c->limit.n,
                                (unsigned long long)c->limit.per_ns)))
    PyErr_SetString(PyExc_SystemError, "_refused() must raise");
  return -1;
}

static const char *const incr_names[] = {"key", "expiry", "amount"};
static const char *const acquire_names[] = {"key", "limit", "expiry", "amount"};

/* incr(key, expiry, amount=1): the count; or, if it would exceed the key's own limit, the count that it would be. */
static PyObject *counts_incr(PyObject *o, PyObject *const *args, Py_ssize_t n, PyObject *kw) {
  counted_call c;
  fshm_counted found;
  PyObject *in[3] = {NULL};
  if (parse("incr", args, n, kw, incr_names, in, 3, 2) ||
      begin_call(o, COUNT_FIXED, in[0], NULL, in[1], in[2] ? in[2] : s_one, &c))
    return NULL;
  const uint64_t most = (UINT64_C(1) << 31) - 1, limit = limit_in(&c.key, c.limit.per_ns);
  uint64_t charge = c.amount;
  c.limit.n = limit < most ? limit : most;
  if (!c.limit.n) { /* a limit of 0 admits nothing: only look */
    c.limit.n = 1;
    charge = 0;
  }
  if (make_call(o, &c, charge, &found)) return NULL;
  if (found.status == FSHM_DENIED || !charge) found.count += c.amount;
  return PyLong_FromUnsignedLongLong(found.count);
}

static int look_at(PyObject *o, int which, PyObject *key, PyObject *limit, PyObject *expiry,
                   fshm_counted *found) {
  counted_call c;
  if (begin_call(o, which, key, limit, expiry, NULL, &c)) return -1;
  if (which == COUNT_SLIDING) c.limit.n = 1;
  return make_call(o, &c, 0, found);
}

static PyObject *counts_get(PyObject *o, PyObject *key) {
  fshm_counted found;
  if (look_at(o, COUNT_FIXED, key, NULL, NULL, &found)) return NULL;
  return PyLong_FromUnsignedLongLong(found.count);
}

static PyObject *counts_left(PyObject *o, PyObject *key) {
  fshm_counted found;
  if (look_at(o, COUNT_FIXED, key, NULL, NULL, &found)) return NULL;
  return PyFloat_FromDouble((double)found.left_ns / 1e9);
}

static PyObject *counts_sliding(PyObject *o, PyObject *const *args, Py_ssize_t n) {
  fshm_counted found;
  if (count_args("sliding", n, 2)) return NULL;
  if (look_at(o, COUNT_SLIDING, args[0], NULL, args[1], &found)) return NULL;
  return Py_BuildValue("KKd", (unsigned long long)found.previous, (unsigned long long)found.count,
                       (double)found.left_ns / 1e9);
}

static PyObject *counts_moving(PyObject *o, PyObject *const *args, Py_ssize_t n) {
  fshm_counted found;
  if (count_args("moving", n, 3)) return NULL;
  if (look_at(o, COUNT_MOVING, args[0], args[1], args[2], &found)) return NULL;
  return Py_BuildValue("Kd", (unsigned long long)found.count, (double)found.left_ns / 1e9);
}

/* (key, limit, expiry, amount=1): whether they were admitted. */
static PyObject *acquire_counted(PyObject *o, int which, const char *name, PyObject *const *args,
                                 Py_ssize_t n, PyObject *kw) {
  counted_call c;
  fshm_counted found;
  PyObject *in[4] = {NULL};
  if (parse(name, args, n, kw, acquire_names, in, 4, 3) ||
      begin_call(o, which, in[0], in[1], in[2], in[3] ? in[3] : s_one, &c))
    return NULL;
  if (c.amount > c.limit.n) { /* under any limit, also 0 */
    Py_XDECREF(c.key.held);
    Py_RETURN_FALSE;
  }
  if (make_call(o, &c, c.amount, &found)) return NULL;
  return PyBool_FromLong(found.status != FSHM_DENIED);
}

static PyObject *counts_acquire_sliding(PyObject *o, PyObject *const *args, Py_ssize_t n,
                                        PyObject *kw) {
  return acquire_counted(o, COUNT_SLIDING, "acquire_sliding_window_entry", args, n, kw);
}
static PyObject *counts_acquire_moving(PyObject *o, PyObject *const *args, Py_ssize_t n,
                                       PyObject *kw) {
  return acquire_counted(o, COUNT_MOVING, "acquire_entry", args, n, kw);
}

/* _bind(handles, fixed, sliding, moving): a tuple of the owners of the limiters, and their addresses. */
static PyObject *counts_bind(PyObject *o, PyObject *args) {
  unsigned long long at[COUNT_KINDS];
  PyObject *handles;
  if (!PyArg_ParseTuple(args, "O!KKK", &PyTuple_Type, &handles, &at[0], &at[1], &at[2]))
    return NULL;
  if (((Counts *)o)->handles) /* a call may be inside it */
    return PyErr_Format(PyExc_RuntimeError, "a storage is bound once");
  ((Counts *)o)->handles = Py_NewRef(handles);
  for (int i = 0; i < COUNT_KINDS; i++)
    ((Counts *)o)->limiters[i] = (fshm_limiter *)(uintptr_t)at[i];
  watch_init(&((Counts *)o)->watch, ((Counts *)o)->limiters[0]->segment);
  Py_RETURN_NONE;
}

static void counts_dealloc(PyObject *o) {
  Py_XDECREF(((Counts *)o)->handles);
  end_derived(o);
}

static PyMethodDef counts_methods[] = {
    {"incr", FAST(counts_incr), FLAGS, NULL},
    {"get", counts_get, METH_O, NULL},
    {"left", counts_left, METH_O, NULL},
    {"sliding", FAST(counts_sliding), METH_FASTCALL, NULL},
    {"moving", FAST(counts_moving), METH_FASTCALL, NULL},
    {"acquire_sliding_window_entry", FAST(counts_acquire_sliding), FLAGS, NULL},
    {"acquire_entry", FAST(counts_acquire_moving), FLAGS, NULL},
    {"_bind", counts_bind, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL}};

static PyType_Slot counts_slots[] = {{Py_tp_dealloc, (void *)counts_dealloc},
                                     {Py_tp_methods, counts_methods},
                                     {Py_tp_new, (void *)PyType_GenericNew},
                                     {0, NULL}};
