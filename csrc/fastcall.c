/* fastcall.c - the hot calls, as CPython methods written by hand: cffi's wrappers cost 100 ns more and
 * drop the GIL at every call. Limited API 3.10. Everything else goes through cffi.
 *
 * Core is the base class of RateLimiter and SimpleRateLimiter; Decision is what acquire() returns.
 * No rule lives here: arguments in, fshm_apply(), objects out.
 */
#include <Python.h>

#include "fast_shm.h"

enum { ON_FULL_DENY = 0, ON_FULL_ALLOW = 1, ON_FULL_RAISE = 2 };

typedef struct {
  PyObject_HEAD
  fshm_limiter *limiter; /* owned by the Python object's segment keeper */
  PyObject *limits;      /* tuple of Limit, Window, SlidingWindow */
  PyObject *reasons;     /* tuple of str: what check() says when this limit denies */
  uint64_t version;      /* of limits and reasons */
  int on_full;
} Core;

typedef struct {
  PyObject_HEAD
  PyObject *limits;
  fshm_decision d;
} Decision;

static PyTypeObject *decision_type;
static PyObject *s_allowed, *s_reason, *s_remaining, *s_retry, *s_default, *s_ok, *s_full;
static PyObject *check_allowed, *check_denied; /* dicts to copy */

/* arguments ------------------------------------------------------------------------------------ */

typedef struct {
  const char *bytes;
  Py_ssize_t length;
  PyObject *held; /* to release, or NULL */
} key_arg;

/* A str is its UTF-8 (cached in the str), bytes are themselves. Lone surrogates are keys too. */
static int get_key(PyObject *key, key_arg *k) {
  k->held = NULL;
  if (Py_TYPE(key) == &PyUnicode_Type || PyUnicode_Check(key)) { /* the first needs no call */
    k->bytes = PyUnicode_AsUTF8AndSize(key, &k->length);
    if (k->bytes) return 0;
    PyErr_Clear();
    k->held = PyUnicode_AsEncodedString(key, "utf-8", "surrogatepass");
    if (!k->held) return -1;
    return PyBytes_AsStringAndSize(k->held, (char **)&k->bytes, &k->length);
  }
  if (PyBytes_Check(key)) return PyBytes_AsStringAndSize(key, (char **)&k->bytes, &k->length);
  PyErr_Format(PyExc_TypeError, "key must be a str or bytes, not %R", key);
  return -1;
}

static int get_cost(PyObject *value, uint64_t *out) {
  PyObject *index = PyNumber_Index(value);
  if (!index) {
    PyErr_Clear();
    PyErr_Format(PyExc_TypeError, "cost must be an int, or one int for each limit, not %R", value);
    return -1;
  }
  int overflow = 0;
  long long v = PyLong_AsLongLongAndOverflow(index, &overflow);
  Py_DECREF(index);
  if (v < 0 && !(v == -1 && overflow > 0)) {
    PyErr_Format(PyExc_ValueError, "cost must be 0 or more, not %R", value);
    return -1;
  }
  *out = overflow > 0 ? UINT64_MAX : (uint64_t)v; /* more than can ever fit, either way */
  return 0;
}

/* One cost for all limits, or a tuple or list with one for each. */
static int get_costs(const Core *self, PyObject *value, uint64_t *costs) {
  Py_ssize_t count = PyTuple_Size(self->limits);
  if (!PyTuple_Check(value) && !PyList_Check(value)) {
    if (get_cost(value, &costs[0])) return -1;
    for (int i = 1; i < FSHM_MAX_LIMITS; i++) costs[i] = costs[0];
    return 0;
  }
  if (PySequence_Size(value) != count) {
    PyErr_Format(PyExc_ValueError, "cost has %zd values, but the limiter has %zd limits: give one "
                 "int, or one for each limit", PySequence_Size(value), count);
    return -1;
  }
  for (Py_ssize_t i = 0; i < FSHM_MAX_LIMITS; i++) {
    PyObject *item = PySequence_GetItem(value, i < count ? i : count - 1);
    int failed = !item || get_cost(item, &costs[i]);
    Py_XDECREF(item);
    if (failed) return -1;
  }
  return 0;
}

/* name(key, cost=1): positions or keywords, without the cost of a format string. */
static int parse(const char *name, PyObject *const *args, Py_ssize_t n, PyObject *kwnames,
                 const char *const *names, PyObject **out, Py_ssize_t most, Py_ssize_t least) {
  Py_ssize_t extra = kwnames ? PyTuple_Size(kwnames) : 0;
  if (n > most) {
    PyErr_Format(PyExc_TypeError, "%s() takes at most %zd arguments (%zd given)", name, most, n);
    return -1;
  }
  for (Py_ssize_t i = 0; i < n; i++) out[i] = args[i];
  for (Py_ssize_t i = 0; i < extra; i++) {
    PyObject *word = PyTuple_GetItem(kwnames, i);
    Py_ssize_t at = 0;
    while (at < most && PyUnicode_CompareWithASCIIString(word, names[at])) at++;
    if (at == most || out[at]) {
      PyErr_Format(PyExc_TypeError, "%s() got an unexpected or repeated argument %R", name, word);
      return -1;
    }
    out[at] = args[n + i];
  }
  for (Py_ssize_t i = 0; i < least; i++) {
    if (out[i]) continue;
    PyErr_Format(PyExc_TypeError, "%s() missing the argument '%s'", name, names[i]);
    return -1;
  }
  return 0;
}

static const char *const key_cost[] = {"key", "cost", "max_wait_ns"};

/* the call ------------------------------------------------------------------------------------- */

static int call_void(PyObject *self, const char *method, int status) {
  PyObject *r = PyObject_CallMethod(self, method, "i", status);
  Py_XDECREF(r);
  return r ? 0 : -1;
}

/* Turn statuses that are neither yes nor no into the policy's answer or an exception, and notice
 * limits that changed. The Python methods named here live in limiter.py. */
static int settle(Core *self, fshm_decision *d) {
  if (d->status < 0) {
    int full = d->status == FSHM_FULL || d->status == FSHM_CONTENDED;
    if (!full || self->on_full == ON_FULL_RAISE)
      return call_void((PyObject *)self, "_failed", d->status) ? -1 : 0;
    d->status = self->on_full == ON_FULL_ALLOW ? FSHM_ALLOWED : FSHM_DENIED;
    if (d->status == FSHM_DENIED && !d->retry_after_ns) d->retry_after_ns = 1000000000;
    d->remaining = 0;
  }
  if (d->version != self->version) {
    self->version = d->version;
    if (call_void((PyObject *)self, "_limits_changed", 0)) return -1;
  }
  return 0;
}

static int decide(Core *self, uint32_t op, PyObject *key, PyObject *cost, uint64_t max_wait,
                  fshm_decision *d) {
  key_arg k;
  uint64_t costs[FSHM_MAX_LIMITS];
  if (!self->limiter) {
    PyErr_SetString(PyExc_RuntimeError, "the limiter's __init__ was not called");
    return -1;
  }
  if (get_key(key, &k)) return -1;
  if (cost && get_costs(self, cost, costs)) {
    Py_XDECREF(k.held);
    return -1;
  }
  fshm_apply(self->limiter, op, k.bytes, (uint64_t)k.length, cost ? costs : NULL, max_wait, 0, d);
  Py_XDECREF(k.held);
  if (d->status < 0 || d->version != self->version) return settle(self, d);
  return 0;
}

static PyObject *make_decision(Core *self, const fshm_decision *d) {
  Decision *o = PyObject_New(Decision, decision_type);
  if (!o) return NULL;
  Py_INCREF(self->limits);
  o->limits = self->limits;
  o->d = *d;
  return (PyObject *)o;
}

static PyObject *decision_call(PyObject *self, uint32_t op, const char *name,
                               PyObject *const *args, Py_ssize_t n, PyObject *kwnames,
                               Py_ssize_t least) {
  PyObject *in[2] = {NULL, NULL};
  fshm_decision d;
  if (n == 1 && !kwnames)
    in[0] = args[0];
  else if (parse(name, args, n, kwnames, key_cost, in, 2, least))
    return NULL;
  if (least == 2 && !in[1]) return NULL;
  if (decide((Core *)self, op, in[0], in[1], 0, &d)) return NULL;
  return make_decision((Core *)self, &d);
}

static PyObject *core_acquire(PyObject *self, PyObject *const *args, Py_ssize_t n, PyObject *kw) {
  return decision_call(self, FSHM_ACQUIRE, "acquire", args, n, kw, 1);
}
static PyObject *core_peek(PyObject *self, PyObject *const *args, Py_ssize_t n, PyObject *kw) {
  return decision_call(self, FSHM_PEEK, "peek", args, n, kw, 1);
}

static PyObject *core_force(PyObject *self, uint32_t op, const char *name, PyObject *const *args,
                            Py_ssize_t n, PyObject *kw) {
  PyObject *in[2] = {NULL, NULL};
  fshm_decision d;
  if (parse(name, args, n, kw, key_cost, in, 2, 2)) return NULL;
  if (decide((Core *)self, op, in[0], in[1], 0, &d)) return NULL;
  return make_decision((Core *)self, &d);
}
static PyObject *core_charge(PyObject *self, PyObject *const *args, Py_ssize_t n, PyObject *kw) {
  return core_force(self, FSHM_CHARGE, "charge", args, n, kw);
}
static PyObject *core_refund(PyObject *self, PyObject *const *args, Py_ssize_t n, PyObject *kw) {
  return core_force(self, FSHM_REFUND, "refund", args, n, kw);
}

/* _reserve(key, cost, max_wait_ns) -> (decision, ns to wait until it is ours): charge ahead. */
static PyObject *core_reserve(PyObject *self, PyObject *const *args, Py_ssize_t n, PyObject *kw) {
  PyObject *in[3] = {NULL, NULL, NULL};
  fshm_decision d;
  uint64_t most;
  if (parse("_reserve", args, n, kw, key_cost, in, 3, 3) || get_cost(in[2], &most)) return NULL;
  if (decide((Core *)self, FSHM_RESERVE, in[0], in[1], most, &d)) return NULL;
  long long wait = d.status == FSHM_ALLOWED ? d.retry_after_ns : 0;
  if (d.status == FSHM_ALLOWED) d.retry_after_ns = 0;
  return Py_BuildValue("NL", make_decision((Core *)self, &d), wait);
}

static int decide_default(PyObject *self, uint32_t op, const char *name, PyObject *const *args,
                          Py_ssize_t n, PyObject *kw, fshm_decision *d) {
  PyObject *in[1] = {NULL};
  if (n == 1 && !kw)
    in[0] = args[0];
  else if (parse(name, args, n, kw, key_cost, in, 1, 0))
    return -1;
  return decide((Core *)self, op, in[0] && in[0] != Py_None ? in[0] : s_default, NULL, 0, d);
}

static PyObject *core_is_allowed(PyObject *self, PyObject *const *args, Py_ssize_t n,
                                 PyObject *kw) {
  Core *core = (Core *)self;
  key_arg k;
  if (n == 1 && !kw && core->limiter && args[0] != Py_None) {
    if (get_key(args[0], &k)) return NULL;
    int status = fshm_is_allowed(core->limiter, k.bytes, (uint64_t)k.length);
    Py_XDECREF(k.held);
    if (status >= 0) {
      PyObject *out = status == FSHM_ALLOWED ? Py_True : Py_False;
      Py_INCREF(out);
      return out;
    }
    fshm_decision failed = {status, 0, core->version, 0, 0, 0};
    if (settle(core, &failed)) return NULL;
    return PyBool_FromLong(failed.status == FSHM_ALLOWED);
  }
  fshm_decision d;
  if (decide_default(self, FSHM_ACQUIRE, "is_allowed", args, n, kw, &d)) return NULL;
  return PyBool_FromLong(d.status == FSHM_ALLOWED);
}

static PyObject *core_get_remaining(PyObject *self, PyObject *const *args, Py_ssize_t n,
                                    PyObject *kw) {
  fshm_decision d;
  if (decide_default(self, FSHM_PEEK, "get_remaining", args, n, kw, &d)) return NULL;
  return PyLong_FromUnsignedLongLong(d.remaining);
}

static int set_item(PyObject *dict, PyObject *name, PyObject *value) {
  int failed = !value || PyDict_SetItem(dict, name, value);
  Py_XDECREF(value);
  return failed;
}

static PyObject *core_check(PyObject *self, PyObject *const *args, Py_ssize_t n, PyObject *kw) {
  fshm_decision d;
  if (decide_default(self, FSHM_ACQUIRE, "check", args, n, kw, &d)) return NULL;
  int allowed = d.status == FSHM_ALLOWED;
  PyObject *out = PyDict_Copy(allowed ? check_allowed : check_denied);
  if (!out) return NULL;
  int failed = set_item(out, s_remaining, PyLong_FromUnsignedLongLong(d.remaining));
  if (!failed && !allowed) {
    PyObject *reasons = ((Core *)self)->reasons;
    int known = (Py_ssize_t)d.limit_index < PyTuple_Size(reasons);
    failed = PyDict_SetItem(out, s_reason, known ? PyTuple_GetItem(reasons, d.limit_index) : s_full);
    if (!failed && d.retry_after_ns == FSHM_NEVER)
      failed = PyDict_SetItem(out, s_retry, Py_None);
    else if (!failed) /* rounded up: after that many milliseconds it fits */
      failed = set_item(out, s_retry, PyLong_FromLongLong((d.retry_after_ns + 999999) / 1000000));
  }
  if (!failed) return out;
  Py_DECREF(out);
  return NULL;
}

/* _acquire_many(keys, costs, allowed, remaining, retry): charge key by key in order; three bytearrays
 * to fill, of n, 8n and 8n bytes. costs: an int, or a list of n. */
static PyObject *core_acquire_many(PyObject *self, PyObject *const *args, Py_ssize_t n,
                                   PyObject *kw) {
  if (n != 5 || kw) {
    PyErr_SetString(PyExc_TypeError, "_acquire_many() takes 5 arguments");
    return NULL;
  }
  PyObject *keys = PySequence_Tuple(args[0]);
  if (!keys) return NULL;
  Py_ssize_t count = PyTuple_Size(keys);
  char *allowed = PyByteArray_AsString(args[2]);
  uint64_t *remaining = (uint64_t *)(void *)PyByteArray_AsString(args[3]);
  double *retry = (double *)(void *)PyByteArray_AsString(args[4]);
  int each = PyList_Check(args[1]);
  if ((each && PyList_Size(args[1]) != count) || PyByteArray_Size(args[2]) != count ||
      PyByteArray_Size(args[3]) != 8 * count || PyByteArray_Size(args[4]) != 8 * count) {
    PyErr_SetString(PyExc_ValueError, "keys and costs differ in length");
    goto failed;
  }
  for (Py_ssize_t i = 0; i < count; i++) {
    fshm_decision d;
    PyObject *cost = each ? PyList_GetItem(args[1], i) : args[1];
    if (decide((Core *)self, FSHM_ACQUIRE, PyTuple_GetItem(keys, i), cost, 0, &d)) goto failed;
    allowed[i] = d.status == FSHM_ALLOWED;
    remaining[i] = (uint64_t)d.remaining;
    retry[i] = d.retry_after_ns == FSHM_NEVER ? Py_HUGE_VAL : (double)d.retry_after_ns * 1e-9;
  }
  Py_DECREF(keys);
  Py_RETURN_NONE;
failed:
  Py_DECREF(keys);
  return NULL;
}

/* _bind(address, limits, reasons, version, on_full) */
static PyObject *core_bind(PyObject *o, PyObject *args) {
  Core *self = (Core *)o;
  PyObject *limits, *reasons;
  unsigned long long address, version;
  int on_full;
  if (!PyArg_ParseTuple(args, "KO!O!Ki", &address, &PyTuple_Type, &limits, &PyTuple_Type, &reasons,
                        &version, &on_full))
    return NULL;
  PyObject *old_limits = self->limits, *old_reasons = self->reasons;
  Py_INCREF(limits);
  Py_INCREF(reasons);
  self->limits = limits;
  self->reasons = reasons;
  Py_XDECREF(old_limits);
  Py_XDECREF(old_reasons);
  self->limiter = (fshm_limiter *)(uintptr_t)address;
  self->version = version;
  self->on_full = on_full;
  Py_RETURN_NONE;
}

static PyObject *core_get_limits(PyObject *o, void *unused) {
  (void)unused;
  Core *self = (Core *)o;
  uint64_t version = self->version;
  if (self->limiter) { /* somebody may have changed them */
    fshm_limit now[FSHM_MAX_LIMITS];
    if (fshm_limiter_limits(self->limiter, now, &version) > 0 && version != self->version) {
      self->version = version;
      if (call_void(o, "_limits_changed", 0)) return NULL;
    }
  }
  PyObject *limits = self->limits ? self->limits : Py_None;
  Py_INCREF(limits);
  return limits;
}

static void core_dealloc(PyObject *o) {
  Core *self = (Core *)o;
  PyTypeObject *type = Py_TYPE(o);
  Py_XDECREF(self->limits);
  Py_XDECREF(self->reasons);
  freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
  release(o);
  Py_DECREF(type);
}

/* Decision ------------------------------------------------------------------------------------- */

static PyObject *seconds(int64_t ns) { return PyFloat_FromDouble((double)ns * 1e-9); }

static PyObject *decision_allowed(PyObject *o, void *unused) {
  (void)unused;
  return PyBool_FromLong(((Decision *)o)->d.status == FSHM_ALLOWED);
}
static PyObject *decision_remaining(PyObject *o, void *unused) {
  (void)unused;
  return PyLong_FromUnsignedLongLong(((Decision *)o)->d.remaining);
}
static PyObject *decision_retry_after(PyObject *o, void *unused) {
  (void)unused;
  int64_t ns = ((Decision *)o)->d.retry_after_ns;
  if (ns == FSHM_NEVER) Py_RETURN_NONE;
  return seconds(ns);
}
static PyObject *decision_retry_after_ns(PyObject *o, void *unused) {
  (void)unused;
  int64_t ns = ((Decision *)o)->d.retry_after_ns;
  if (ns == FSHM_NEVER) Py_RETURN_NONE;
  return PyLong_FromLongLong(ns);
}
static PyObject *decision_reset_after(PyObject *o, void *unused) {
  (void)unused;
  return seconds(((Decision *)o)->d.reset_after_ns);
}
static PyObject *decision_limit(PyObject *o, void *unused) {
  (void)unused;
  Decision *d = (Decision *)o;
  Py_ssize_t i = (Py_ssize_t)d->d.limit_index;
  PyObject *limit = i < PyTuple_Size(d->limits) ? PyTuple_GetItem(d->limits, i) : Py_None;
  Py_XINCREF(limit);
  return limit;
}
static int decision_bool(PyObject *o) { return ((Decision *)o)->d.status == FSHM_ALLOWED; }

static PyObject *decision_repr(PyObject *o) {
  PyObject *retry = decision_retry_after(o, NULL), *reset = decision_reset_after(o, NULL);
  PyObject *limit = decision_limit(o, NULL), *out = NULL;
  if (retry && reset && limit)
    out = PyUnicode_FromFormat(
        "Decision(allowed=%s, remaining=%llu, retry_after=%R, reset_after=%R, limit=%R)",
        decision_bool(o) ? "True" : "False", (unsigned long long)((Decision *)o)->d.remaining,
        retry, reset, limit);
  Py_XDECREF(retry);
  Py_XDECREF(reset);
  Py_XDECREF(limit);
  return out;
}

static void decision_dealloc(PyObject *o) {
  PyTypeObject *type = Py_TYPE(o);
  Py_XDECREF(((Decision *)o)->limits);
  PyObject_Free(o);
  Py_DECREF(type);
}

/* types ---------------------------------------------------------------------------------------- */

#define FAST(f) ((PyCFunction)(void (*)(void))(f))
#define FLAGS (METH_FASTCALL | METH_KEYWORDS)

static PyMethodDef core_methods[] = {
    {"acquire", FAST(core_acquire), FLAGS,
     "acquire(key, cost=1)\n--\n\nCharge `cost` tokens if every limit has room; consume nothing "
     "otherwise. cost: an int, or one int for each limit. Returns a Decision, true when admitted."},
    {"peek", FAST(core_peek), FLAGS,
     "peek(key, cost=1)\n--\n\nWhat acquire() would answer now. Charges nothing."},
    {"charge", FAST(core_charge), FLAGS,
     "charge(key, cost)\n--\n\nCharge after the fact, room or not. May go into debt, which the next "
     "requests wait out. Returns how things are after it."},
    {"refund", FAST(core_refund), FLAGS,
     "refund(key, cost)\n--\n\nGive back tokens that were charged. Never below \"nothing consumed\"."},
    {"is_allowed", FAST(core_is_allowed), FLAGS,
     "is_allowed(key=None)\n--\n\nacquire(key) as a bool. None is the key \"default\"."},
    {"check", FAST(core_check), FLAGS,
     "check(key=None)\n--\n\nacquire(key) as a dict: allowed, reason, remaining_requests, and "
     "retry_after_ms when denied."},
    {"get_remaining", FAST(core_get_remaining), FLAGS,
     "get_remaining(key=None)\n--\n\nHow many requests would be admitted right now."},
    {"_reserve", FAST(core_reserve), FLAGS, NULL},
    {"_acquire_many", FAST(core_acquire_many), FLAGS, NULL},
    {"_bind", core_bind, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL}};

static PyGetSetDef core_getset[] = {
    {"limits", core_get_limits, NULL, "The limits in force, as a tuple.", NULL},
    {NULL, NULL, NULL, NULL, NULL}};

static PyType_Slot core_slots[] = {
    {Py_tp_dealloc, (void *)core_dealloc},
    {Py_tp_methods, core_methods},
    {Py_tp_getset, core_getset},
    {Py_tp_doc, (void *)"Native base of the limiters."},
    {0, NULL}};

static PyType_Spec core_spec = {"fast_litellm_shm._native.Core", sizeof(Core), 0,
                                Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, core_slots};

static PyGetSetDef decision_getset[] = {
    {"allowed", decision_allowed, NULL, "True when admitted.", NULL},
    {"remaining", decision_remaining, NULL,
     "Tokens that would still be admitted now; of the tightest limit.", NULL},
    {"retry_after", decision_retry_after, NULL,
     "Seconds until this cost fits; 0.0 when admitted; None: it never will.", NULL},
    {"retry_after_ns", decision_retry_after_ns, NULL, "The same in nanoseconds, exact.", NULL},
    {"reset_after", decision_reset_after, NULL, "Seconds until nothing is consumed any more.",
     NULL},
    {"limit", decision_limit, NULL, "The limit that denied, else the one with least left.", NULL},
    {NULL, NULL, NULL, NULL, NULL}};

static PyType_Slot decision_slots[] = {
    {Py_tp_dealloc, (void *)decision_dealloc},
    {Py_tp_getset, decision_getset},
    {Py_tp_repr, (void *)decision_repr},
    {Py_nb_bool, (void *)decision_bool},
    {Py_tp_doc, (void *)"The answer of a limiter. True when admitted."},
    {0, NULL}};

static PyType_Spec decision_spec = {"fast_litellm_shm._native.Decision", sizeof(Decision), 0,
                                    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
                                    decision_slots};

static int install(PyObject *module) {
  s_allowed = PyUnicode_InternFromString("allowed");
  s_reason = PyUnicode_InternFromString("reason");
  s_remaining = PyUnicode_InternFromString("remaining_requests");
  s_retry = PyUnicode_InternFromString("retry_after_ms");
  s_default = PyUnicode_InternFromString("default");
  s_ok = PyUnicode_InternFromString("Request allowed");
  s_full = PyUnicode_InternFromString("Rate limit exceeded");
  check_allowed = PyDict_New();
  check_denied = PyDict_New();
  if (!s_full || !check_allowed || !check_denied) return -1;
  if (PyDict_SetItem(check_allowed, s_allowed, Py_True) ||
      PyDict_SetItem(check_allowed, s_reason, s_ok) ||
      PyDict_SetItem(check_allowed, s_remaining, Py_None) ||
      PyDict_SetItem(check_denied, s_allowed, Py_False) ||
      PyDict_SetItem(check_denied, s_reason, s_full) ||
      PyDict_SetItem(check_denied, s_remaining, Py_None))
    return -1;
  PyObject *core = PyType_FromSpec(&core_spec);
  decision_type = (PyTypeObject *)PyType_FromSpec(&decision_spec);
  if (!core || !decision_type) return -1;
  int failed = PyObject_SetAttrString(module, "Core", core) ||
               PyObject_SetAttrString(module, "Decision", (PyObject *)decision_type);
  Py_DECREF(core);
  return failed ? -1 : 0;
}

/* Called once through cffi, which drops the GIL around it. `module`: the extension module's address. */
int fshm_py_install(void *module) {
  PyGILState_STATE state = PyGILState_Ensure();
  int failed = install((PyObject *)module);
  if (failed) PyErr_Print();
  PyGILState_Release(state);
  return failed ? FSHM_E_MEMORY : FSHM_OK;
}
