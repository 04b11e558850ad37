/* py_rate_limiter.c - Core, the base class of RateLimiter and SimpleRateLimiter: the hot calls, as CPython methods
 * written by hand. cffi's wrappers take 100 ns more, and drop the GIL at every call. Limited API 3.10. Everything
 * else goes through cffi.
 *
 * There is no logic of limits here: arguments in, fshm_apply(), objects out.
 */
#include "../limits/limiter.h"
#include "../limits/limits.h"
#include "py_args.h"
#include "py_cluster.h"
#include "py_measure.h"
#include "py_own_limits.h"
#include "py_plans.h"

enum { ON_FULL_DENY = 0, ON_FULL_ALLOW = 1, ON_FULL_RAISE = 2, ON_FULL_SHARE = 3 };

/* Of a limit that is learned. Set once, by _bind_adaptive(). */
typedef struct {
  fshm_limiter *learned; /* NULL: the limit is the name's */
  PyObject *handle; /* owns it */
  fshm_adaptive settings;
} adaptive_t;

typedef struct {
  PyObject_HEAD
  fshm_limiter *limiter; /* set once, by _bind() */
  /* Owns it (_shared/native.py, owned()), until we are freed: __del__()s of a garbage cycle, and permits in it, may
   * still call us. */
  PyObject *handle;
  PyObject *limits; /* tuple of Limit, Window, SlidingWindow. It may be replaced: limits_of() */
  PyObject *reasons; /* tuple of str: what check() says when this limit denies */
  /* Bytes that each key ends in, for calls that take a permit or settle; NULL: none. */
  PyObject *tail;
  uint64_t version; /* of limits and reasons */
  int on_full;
  uint64_t warned; /* clock: the time of the last warning about shared counters */
  cluster_t cluster;
  adaptive_t adaptive;
  measure_t measure; /* is_allowed(), check(), acquire() */
  plans_t plans;
  uint32_t plan; /* of a plan: 1 + its number in the limiter that has plans */
} Core;

static PyTypeObject *core_type;

static PyObject *s_allowed, *s_reason, *s_remaining, *s_retry, *s_default, *s_full, *s_admitted,
    *s_one;
static PyObject *check_allowed, *check_denied; /* dicts to copy */

/* the call ------------------------------------------------------------------------------------- */

/* A new reference to the tuple of the present limits. */
static PyObject *limits_itself(Core *self) {
  PyObject *limits;
  ALONE_BEGIN(self);
  limits = Py_NewRef(self->limits);
  ALONE_END();
  return limits;
}

/* A new reference to the present limits, for a decision. */
static PyObject *limits_of(Core *self) {
#ifdef Py_GIL_DISABLED
  PyObject *found = own_limits_find(RELAXED_GET(self->limits));
  return likely(found != NULL) ? found : own_limits_copy(limits_itself(self));
#else
  return limits_itself(self);
#endif
}

static Py_ssize_t limit_count(Core *self) {
  PyObject *limits = limits_itself(self);
  Py_ssize_t count = PyTuple_Size(limits);
  Py_DECREF(limits);
  return count;
}

static int core_costs(Core *self, PyObject *cost, uint64_t *costs) {
  const int each = PyTuple_Check(cost) || PyList_Check(cost);
  return get_costs(each ? limit_count(self) : 0, cost, costs);
}

static int call_void(PyObject *self, const char *method, int status) {
  return done(PyObject_CallMethod(self, method, "i", status));
}

#define WARN_NS UINT64_C(60000000000)
static int warn_of_shared(Core *self) {
  uint64_t now = fshm_clock(), warned = RELAXED_GET(self->warned);
  if (warned && now - warned < WARN_NS) return 0;
  RELAXED_SET(self->warned, now);
  return call_void((PyObject *)self, "_shares", 0);
}

/* Turn other statuses than allowed and denied into the policy's answer or an exception, and notice limits that
 * changed. The Python methods named here are in limiters/rate.py. */
static int settle(Core *self, fshm_decision *d) {
  if (d->shared && warn_of_shared(self)) return -1;
  if (d->status < 0) {
    int full = d->status == FSHM_FULL || d->status == FSHM_CONTENDED;
    if (!full || self->on_full == ON_FULL_RAISE)
      return call_void((PyObject *)self, "_failed", d->status) ? -1 : 0;
    d->status = self->on_full == ON_FULL_ALLOW ? FSHM_ALLOWED : FSHM_DENIED;
    if (d->status == FSHM_DENIED && !d->retry_after_ns) d->retry_after_ns = 1000000000;
    d->remaining = 0;
  }
  if (d->version != RELAXED_GET(self->version)) {
    RELAXED_SET(self->version, d->version);
    if (call_void((PyObject *)self, "_limits_changed", 0)) return -1;
  }
  return 0;
}

static inline int odd(Core *self, const fshm_decision *d) {
  return d->status < 0 || d->shared || d->version != RELAXED_GET(self->version);
}

static int bound(const Core *self) {
  if (self->limiter) return 0;
  return fail(PyExc_RuntimeError, "the limiter's __init__ was not called");
}

static int decide(Core *self, uint32_t op, PyObject *key, PyObject *cost, uint64_t max_wait,
                  fshm_decision *d) {
  key_arg k;
  uint64_t costs[FSHM_MAX_LIMITS];
  if (bound(self) || get_key(key, &k)) return -1;
  if (cost && core_costs(self, cost, costs)) {
    Py_XDECREF(k.held);
    return -1;
  }
  if (self->cluster.leases)
    d->status = cluster_decide((PyObject *)self, &self->cluster, self->limiter, op, key, &k, cost,
                               cost ? costs : NULL, d, RELAXED_GET(self->version));
  else
    fshm_apply(self->limiter, op, k.bytes, (uint64_t)k.length, cost ? costs : NULL, max_wait, 0, d);
  Py_XDECREF(k.held);
  if (d->status == FSHM_ASK) return -1;
  return odd(self, d) ? settle(self, d) : 0;
}

static PyObject *decision_call(PyObject *self, uint32_t op, const char *name, PyObject *const *args,
                               Py_ssize_t n, PyObject *kwnames, Py_ssize_t least) {
  PyObject *in[2] = {NULL, NULL};
  fshm_decision d;
  if (n == 1 && !kwnames && least == 1)
    in[0] = args[0];
  else if (parse(name, args, n, kwnames, key_cost, in, 2, least))
    return NULL;
  if (decide((Core *)self, op, in[0], in[1], 0, &d)) return NULL;
  return make_decision(limits_of((Core *)self), &d);
}

#define MEASURED(self, call) RETURN_MEASURED(&((Core *)(self))->measure, call)

/* A limiter whose keys have plans: the Core that answers for the key, a new reference. NULL: an exception. */
static PyObject *plan_core(Core *self, PyObject *key) {
  key_arg k;
  if (get_key(key, &k)) return NULL;
  const uint64_t hash = limiter_fetch(self->limiter, k.bytes, (uint64_t)k.length);
  const uint32_t plan = plan_now(&self->plans, self->limiter, hash);
  Py_XDECREF(k.held);
  return plan != NO_PLAN ? Py_NewRef(self->plans.plans[plan].core)
                         : PyObject_CallMethod((PyObject *)self, "_answering", "O", key);
}

/* The same call, of that Core. */
typedef PyObject *core_call(PyObject *, PyObject *const *, Py_ssize_t, PyObject *);
static __attribute__((noinline)) PyObject *by_plan(PyObject *self, PyObject *const *args,
                                                   Py_ssize_t n, PyObject *kw, core_call *call) {
  PyObject *key = n ? args[0] : NULL;
  for (Py_ssize_t i = 0; !key && kw && i < PyTuple_Size(kw); i++)
    if (!PyUnicode_CompareWithASCIIString(PyTuple_GetItem(kw, i), "key")) key = args[n + i];
  if (!key || key == Py_None) key = s_default; /* where it has to be given, the call says so */
  PyObject *core = plan_core((Core *)self, key);
  if (!core) return NULL;
  PyObject *out = call(core, args, n, kw);
  Py_DECREF(core);
  return out;
}
#define BY_PLAN(call) \
  if (unlikely(((Core *)self)->plans.entries)) return by_plan(self, args, n, kw, call)

/* The usual call of such a limiter: its own Core is touched, and no other. 0: by_plan(). -1: an exception. */
static inline int plan_decides(Core *self, PyObject *const *args, Py_ssize_t n, PyObject *kw,
                               fshm_decision *d, uint32_t *out) {
  key_arg k;
  if (unlikely(n != 1 || kw || !PyUnicode_Check(args[0]))) return 0;
  if (get_key(args[0], &k)) return -1;
  const uint64_t hash = limiter_fetch(self->limiter, k.bytes, (uint64_t)k.length);
  __builtin_prefetch(plan_line(&self->plans, hash));
  const uint32_t number = *out = plan_now(&self->plans, self->limiter, hash);
  const rule_t *packed = number == NO_PLAN ? NULL : &self->plans.packed[number];
  if (unlikely(k.held || !packed || !packed->den)) {
    Py_XDECREF(k.held);
    return 0;
  }
  limiter_acquire_plan(self->limiter, packed, hash, k.bytes, (uint64_t)k.length, d);
  if (likely(!odd(self, d))) return 1;
  PyObject *core = Py_NewRef(self->plans.plans[number].core);
  int failed = settle((Core *)core, d);
  Py_DECREF(core);
  return failed ? -1 : 1;
}
static PyObject *core_acquire(PyObject *self, PyObject *const *args, Py_ssize_t n, PyObject *kw);
static PyObject *core_is_allowed(PyObject *self, PyObject *const *args, Py_ssize_t n, PyObject *kw);
static PyObject *acquire_by_plan(PyObject *self, PyObject *const *args, Py_ssize_t n,
                                 PyObject *kw) {
  fshm_decision d;
  uint32_t plan;
  int known = plan_decides((Core *)self, args, n, kw, &d, &plan);
  if (known > 0) return make_decision(own_limits_of(((Core *)self)->plans.plans[plan].limits), &d);
  return known ? NULL : by_plan(self, args, n, kw, core_acquire);
}
static PyObject *is_allowed_by_plan(PyObject *self, PyObject *const *args, Py_ssize_t n,
                                    PyObject *kw) {
  fshm_decision d;
  uint32_t plan;
  int known = plan_decides((Core *)self, args, n, kw, &d, &plan);
  if (known > 0) return PyBool_FromLong(d.status == FSHM_ALLOWED);
  return known ? NULL : by_plan(self, args, n, kw, core_is_allowed);
}

static PyObject *core_acquire(PyObject *self, PyObject *const *args, Py_ssize_t n, PyObject *kw) {
  if (unlikely(((Core *)self)->plans.entries)) {
    MEASURED(self, acquire_by_plan(self, args, n, kw));
  }
  MEASURED(self, decision_call(self, FSHM_ACQUIRE, "acquire", args, n, kw, 1));
}
static PyObject *core_peek(PyObject *self, PyObject *const *args, Py_ssize_t n, PyObject *kw) {
  BY_PLAN(core_peek);
  return decision_call(self, FSHM_PEEK, "peek", args, n, kw, 1);
}
static PyObject *core_charge(PyObject *self, PyObject *const *args, Py_ssize_t n, PyObject *kw) {
  BY_PLAN(core_charge);
  return decision_call(self, FSHM_CHARGE, "charge", args, n, kw, 2);
}
static PyObject *core_refund(PyObject *self, PyObject *const *args, Py_ssize_t n, PyObject *kw) {
  BY_PLAN(core_refund);
  return decision_call(self, FSHM_REFUND, "refund", args, n, kw, 2);
}

/* Reservation: a place in a bucket's queue. A waiter keeps it when its turn comes. If the wait ends in another way,
 * even by an exception between two instructions, the object is dropped and gives the place back. */
typedef struct {
  PyObject_HEAD
  PyObject *handle; /* owns the limiter */
  fshm_limiter *limiter;
  PyObject *key; /* bytes */
  uint64_t costs[FSHM_MAX_LIMITS];
  fshm_charged reserved[FSHM_MAX_LIMITS];
  int held; /* neither used nor given back */
} Reservation;

static PyTypeObject *reservation_type;

/* In how many limits it was given back; in the others there is a later reservation. */
static int reservation_end(Reservation *self, int keep) {
  int held;
  ALONE_BEGIN(self);
  held = self->held;
  self->held = 0;
  ALONE_END();
  if (!held || keep) return 0;
  return fshm_cancel(self->limiter, PyBytes_AsString(self->key), (uint64_t)PyBytes_Size(self->key),
                     self->costs, self->reserved, 0);
}

static PyObject *reservation_keep(PyObject *o, UNUSED PyObject *unused) {
  (void)reservation_end((Reservation *)o, 1);
  Py_RETURN_NONE;
}

static PyObject *reservation_cancel(PyObject *o, UNUSED PyObject *unused) {
  return PyLong_FromLong(reservation_end((Reservation *)o, 0));
}

static void reservation_dealloc(PyObject *o) {
  Reservation *self = (Reservation *)o;
  (void)reservation_end(self, 0);
  Py_XDECREF(self->key);
  Py_XDECREF(self->handle);
  end_object(o, PyObject_Free);
}

static PyMethodDef reservation_methods[] = {{"keep", reservation_keep, METH_NOARGS, NULL},
                                            {"cancel", reservation_cancel, METH_NOARGS, NULL},
                                            {NULL, NULL, 0, NULL}};
static PyType_Slot reservation_slots[] = {
    {Py_tp_dealloc, (void *)reservation_dealloc}, {Py_tp_methods, reservation_methods}, {0, NULL}};

/* _reserve(key, cost, max_wait_ns) -> (decision, ns to wait until it is ours, the Reservation). */
static PyObject *core_reserve(PyObject *o, PyObject *const *args, Py_ssize_t n, PyObject *kw) {
  Core *self = (Core *)o;
  PyObject *in[3] = {NULL, NULL, NULL};
  fshm_decision d;
  key_arg k;
  uint64_t most;
  if (parse("_reserve", args, n, kw, key_cost, in, 3, 3) || get_cost(in[2], &most)) return NULL;
  Reservation *r = PyObject_New(Reservation, reservation_type);
  if (!r) return NULL;
  r->key = r->handle = NULL;
  r->held = 0;
  if (bound(self) || core_costs(self, in[1], r->costs) || get_key(in[0], &k)) {
    Py_DECREF((PyObject *)r);
    return NULL;
  }
  r->key = PyBytes_FromStringAndSize(k.bytes, k.length);
  r->handle = Py_NewRef(self->handle);
  r->limiter = self->limiter;
  if (r->key)
    fshm_reserve(self->limiter, k.bytes, (uint64_t)k.length, r->costs, most, 0, &d, r->reserved);
  r->held = r->key && d.status == FSHM_ALLOWED;
  Py_XDECREF(k.held);
  if (!r->key || (odd(self, &d) && settle(self, &d))) {
    Py_DECREF((PyObject *)r);
    return NULL;
  }
  long long wait = d.status == FSHM_ALLOWED ? d.retry_after_ns : 0;
  if (d.status == FSHM_ALLOWED) d.retry_after_ns = 0;
  return Py_BuildValue("NLN", make_decision(limits_of(self), &d), wait, r);
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

static inline PyObject *is_allowed(PyObject *self, PyObject *const *args, Py_ssize_t n,
                                   PyObject *kw) {
  Core *core = (Core *)self;
  key_arg k;
  if (n == 1 && !kw && core->limiter && args[0] != Py_None) {
    if (get_key(args[0], &k)) return NULL;
    int status = likely(!core->cluster.leases)
                     ? limiter_is_allowed(core->limiter, k.bytes, (uint64_t)k.length)
                     : cluster_decide(self, &core->cluster, core->limiter, FSHM_ACQUIRE, args[0],
                                      &k, NULL, NULL, NULL, RELAXED_GET(core->version));
    Py_XDECREF(k.held);
    if (status == FSHM_ASK) return NULL;
    if (status >= 0) {
      PyObject *out = status == FSHM_ALLOWED ? Py_True : Py_False;
      return Py_NewRef(out);
    }
    fshm_decision failed = {status, 0, 0, RELAXED_GET(core->version), 0, 0, 0};
    if (status <= SHARED_DENIED) {
      failed.shared = 1;
      failed.status = status == SHARED_ALLOWED ? FSHM_ALLOWED : FSHM_DENIED;
    }
    if (settle(core, &failed)) return NULL;
    return PyBool_FromLong(failed.status == FSHM_ALLOWED);
  }
  fshm_decision d;
  if (decide_default(self, FSHM_ACQUIRE, "is_allowed", args, n, kw, &d)) return NULL;
  return PyBool_FromLong(d.status == FSHM_ALLOWED);
}

static PyObject *core_is_allowed(PyObject *self, PyObject *const *args, Py_ssize_t n,
                                 PyObject *kw) {
  if (unlikely(((Core *)self)->plans.entries)) {
    MEASURED(self, is_allowed_by_plan(self, args, n, kw));
  }
  MEASURED(self, is_allowed(self, args, n, kw));
}

static PyObject *core_get_remaining(PyObject *self, PyObject *const *args, Py_ssize_t n,
                                    PyObject *kw) {
  fshm_decision d;
  BY_PLAN(core_get_remaining);
  if (decide_default(self, FSHM_PEEK, "get_remaining", args, n, kw, &d)) return NULL;
  return PyLong_FromUnsignedLongLong(d.remaining);
}

static int set_item(PyObject *dict, PyObject *name, PyObject *value) {
  int failed = !value || PyDict_SetItem(dict, name, value);
  Py_XDECREF(value);
  return failed;
}

/* The dict of check(), but for the numbers. Without a GIL it is made anew: a copy would wait for the lock of the dict that
 * all threads copy. */
static PyObject *check_dict(int allowed) {
#ifdef Py_GIL_DISABLED
  PyObject *out = PyDict_New();
  if (out && (PyDict_SetItem(out, s_allowed, allowed ? Py_True : Py_False) ||
              PyDict_SetItem(out, s_reason, allowed ? s_admitted : s_full) ||
              PyDict_SetItem(out, s_remaining, Py_None)))
    Py_CLEAR(out);
  return out;
#else
  return PyDict_Copy(allowed ? check_allowed : check_denied);
#endif
}

static PyObject *check(PyObject *self, PyObject *const *args, Py_ssize_t n, PyObject *kw) {
  fshm_decision d;
  if (decide_default(self, FSHM_ACQUIRE, "check", args, n, kw, &d)) return NULL;
  int allowed = d.status == FSHM_ALLOWED;
  PyObject *out = check_dict(allowed);
  if (!out) return NULL;
  int failed = set_item(out, s_remaining, PyLong_FromUnsignedLongLong(d.remaining));
  if (!failed && !allowed) {
    PyObject *reasons;
    ALONE_BEGIN(self);
    reasons = Py_NewRef(((Core *)self)->reasons);
    ALONE_END();
    int known = (Py_ssize_t)d.limit_index < PyTuple_Size(reasons);
    failed =
        PyDict_SetItem(out, s_reason, known ? PyTuple_GetItem(reasons, d.limit_index) : s_full);
    Py_DECREF(reasons);
    if (!failed && d.retry_after_ns == FSHM_NEVER)
      failed = PyDict_SetItem(out, s_retry, Py_None);
    else if (!failed) /* rounded up: after so many milliseconds it fits */
      failed = set_item(out, s_retry, PyLong_FromLongLong((d.retry_after_ns + 999999) / 1000000));
  }
  if (!failed) return out;
  Py_DECREF(out);
  return NULL;
}

static PyObject *core_check(PyObject *self, PyObject *const *args, Py_ssize_t n, PyObject *kw) {
  if (unlikely(((Core *)self)->plans.entries)) {
    MEASURED(self, by_plan(self, args, n, kw, core_check));
  }
  MEASURED(self, check(self, args, n, kw));
}

/* A key, with the tail that this object's keys have. */
static int get_own_key(const Core *self, PyObject *key, key_arg *k) {
  key_arg tail;
  if (get_key(key, k)) return -1;
  if (likely(!self->tail)) return 0;
  char *start = NULL;
  PyObject *whole = NULL;
  if (!get_bytes(self->tail, &tail) &&
      (whole = PyBytes_FromStringAndSize(NULL, k->length + tail.length)) &&
      (start = PyBytes_AsString(whole))) {
    memcpy(start, k->bytes, (size_t)k->length);
    memcpy(start + k->length, tail.bytes, (size_t)tail.length);
  }
  Py_XDECREF(k->held);
  k->held = whole;
  return start ? get_bytes(whole, k) : -1;
}

/* _end_keys_in(tail): once, before the object is used. */
static PyObject *core_end_keys_in(PyObject *o, PyObject *tail) {
  Core *self = (Core *)o;
  if (!PyBytes_Check(tail) || self->tail)
    return PyErr_Format(PyExc_TypeError, "_end_keys_in() takes bytes, once");
  self->tail = Py_NewRef(tail);
  Py_RETURN_NONE;
}

/* _admit(key, cost=1) -> Permit: a permit and all other limits, or a false one. */
static PyObject *core_admit(PyObject *o, PyObject *const *args, Py_ssize_t n, PyObject *kw) {
  Core *self = (Core *)o;
  PyObject *in[2] = {NULL, NULL};
  key_arg k;
  uint64_t costs[FSHM_MAX_LIMITS];
  int failed = 0;
  if (n == 1 && !kw)
    in[0] = args[0];
  else if (parse("acquire", args, n, kw, key_cost, in, 2, 1))
    return NULL;
  if (bound(self) || watch_call(&self->measure.watch)) return NULL;
  if (in[1] && core_costs(self, in[1], costs)) return NULL;
  Permit *p = make_permit(self->handle, self->limiter);
  if (!p) return NULL;
  if (get_own_key(self, in[0], &k)) {
    Py_DECREF((PyObject *)p);
    return NULL;
  }
  if (self->cluster.keys)
    failed = cluster_admit(o, &self->cluster, self->limiter, in[0], &k, &p->permit, &p->d,
                           &p->in_flight);
  else if (self->adaptive.learned)
    fshm_adaptive_admit(self->limiter, self->adaptive.learned, &self->adaptive.settings, k.bytes,
                        (uint64_t)k.length, 0, &p->permit, &p->d, &p->in_flight);
  else
    fshm_admit(self->limiter, k.bytes, (uint64_t)k.length, in[1] ? costs : NULL, 0, &p->permit,
               &p->d, &p->in_flight);
  Py_XDECREF(k.held);
  if (failed || (odd(self, &p->d) && settle(self, &p->d))) {
    (void)fshm_permit_release(self->limiter, &p->permit);
    Py_DECREF((PyObject *)p);
    return NULL;
  }
  p->granted = p->permit.held != 0;
  p->limits = limits_of(self);
  return (PyObject *)p;
}

/* The answer to a caller that waited, and whose turn has not come: denied, whatever room there is.
 * _refused(key, cost) -> Decision, _refused_permit(key, cost) -> Permit. */
static PyObject *core_refused(PyObject *o, PyObject *args) {
  PyObject *key, *cost;
  fshm_decision d;
  if (!PyArg_ParseTuple(args, "OO", &key, &cost)) return NULL;
  if (decide((Core *)o, FSHM_PEEK, key, cost, 0, &d)) return NULL;
  d.status = FSHM_DENIED;
  return make_decision(limits_of((Core *)o), &d);
}
static PyObject *core_refused_permit(PyObject *o, PyObject *args) {
  Core *self = (Core *)o;
  PyObject *key, *cost;
  uint64_t costs[FSHM_MAX_LIMITS];
  key_arg k;
  if (!PyArg_ParseTuple(args, "OO", &key, &cost) || bound(self) || core_costs(self, cost, costs) ||
      get_own_key(self, key, &k))
    return NULL;
  fshm_decision d;
  fshm_apply(self->limiter, FSHM_PEEK, k.bytes, (uint64_t)k.length, costs, 0, 0, &d);
  uint32_t in_flight = fshm_in_flight(self->limiter, k.bytes, (uint64_t)k.length);
  Py_XDECREF(k.held);
  uint16_t last = (uint16_t)(limit_count(self) - 1);
  if (d.status == FSHM_E_ARGUMENT && !last) { /* it has no rates */
    memset(&d, 0, sizeof d);
  } else {
    if (odd(self, &d) && settle(self, &d)) return NULL;
    if (d.status == FSHM_ALLOWED && in_flight) { /* as fshm_admit() has it */
      d.limit_index = last;
      d.remaining = 0;
    }
  }
  d.status = FSHM_DENIED;
  Permit *p = make_permit(self->handle, self->limiter);
  if (!p) return NULL;
  memset(&p->permit, 0, sizeof p->permit);
  p->in_flight = in_flight;
  p->d = d;
  p->limits = limits_of(self);
  return (PyObject *)p;
}

/* _remaining(key) -> tuple: what each limit still admits of the key now. */
static PyObject *core_remaining(PyObject *o, PyObject *key) {
  Core *self = (Core *)o;
  key_arg k;
  uint64_t left[FSHM_MAX_LIMITS];
  if (bound(self) || get_own_key(self, key, &k)) return NULL;
  int count = fshm_remaining(self->limiter, k.bytes, (uint64_t)k.length, 0, left);
  Py_XDECREF(k.held);
  if (count < 0) return PyObject_CallMethod(o, "_failed", "i", count);
  PyObject *out = PyTuple_New(count);
  for (int i = 0; out && i < count; i++) {
    PyObject *n = PyLong_FromUnsignedLongLong(left[i]);
    if (n && !PyTuple_SetItem(out, i, n)) continue; /* which takes over the reference */
    Py_DECREF(out);
    return NULL;
  }
  return out;
}

/* _in_flight(key) -> int: permits of the key that living processes hold. */
static PyObject *core_in_flight(PyObject *o, PyObject *key) {
  Core *self = (Core *)o;
  key_arg k;
  if (bound(self) || get_own_key(self, key, &k)) return NULL;
  uint32_t held = fshm_in_flight(self->limiter, k.bytes, (uint64_t)k.length);
  Py_XDECREF(k.held);
  return PyLong_FromUnsignedLong(held);
}

/* _settle(key, charged, actual, permit): charge what was used instead of what was estimated; a tuple each, with a
 * number for each limit. permit: of the call. */
static PyObject *core_settle(PyObject *o, PyObject *const *args, Py_ssize_t n) {
  Core *self = (Core *)o;
  key_arg k;
  uint64_t charged[FSHM_MAX_LIMITS], actual[FSHM_MAX_LIMITS];
  if (n != 4 || Py_TYPE(args[3]) != permit_type || !PyTuple_Check(args[1]) ||
      !PyTuple_Check(args[2]))
    return PyErr_Format(PyExc_TypeError, "_settle() takes a key, two tuples and a Permit");
  if (bound(self) || get_costs(PyTuple_Size(args[1]), args[1], charged) ||
      get_costs(PyTuple_Size(args[1]), args[2], actual) || get_own_key(self, args[0], &k))
    return NULL;
  int status = fshm_settle(self->limiter, k.bytes, (uint64_t)k.length, charged, actual,
                           &((Permit *)args[3])->permit, 0);
  Py_XDECREF(k.held);
  if (status != FSHM_ALLOWED) return PyObject_CallMethod(o, "_failed", "i", status);
  Py_RETURN_NONE;
}

#define AHEAD 8 /* keys: enough to cover a cache miss, and few enough to be still in the cache */

typedef struct {
  key_arg key; /* bytes NULL: read when it is its turn */
  fshm_limiter *limiter; /* whose hash it is */
  uint64_t hash;
} fetched_key;

/* Hash a key and prefetch its lines, if reading the key runs no Python. */
static void fetch(const Core *self, PyObject *key, fetched_key *k) {
  k->key = (key_arg){NULL, 0, NULL};
  k->limiter = self->limiter;
  if (PyUnicode_Check(key))
    k->key.bytes = PyUnicode_AsUTF8AndSize(key, &k->key.length);
  else if (PyBytes_Check(key))
    (void)get_bytes(key, &k->key);
  if (k->key.bytes)
    k->hash = limiter_fetch(k->limiter, k->key.bytes, (uint64_t)k->key.length);
  else
    PyErr_Clear();
}

/* One key of many, by the limiter's present state: a change of the limits, or a cost's __index__(), may have changed
 * it. */
static int decide_fetched(Core *self, PyObject *key, fetched_key *k, const uint64_t *costs,
                          fshm_decision *d) {
  bool other = k->limiter != self->limiter || !k->key.bytes;
  if (!k->key.bytes && get_key(key, &k->key)) return -1;
  const char *bytes = k->key.bytes;
  uint64_t length = (uint64_t)k->key.length;
  if (other) k->hash = limiter_fetch(self->limiter, bytes, length);
  limiter_acquire_fetched(self->limiter, k->hash, bytes, length, costs, d);
  Py_XDECREF(k->key.held);
  return odd(self, d) ? settle(self, d) : 0;
}

/* Where to write the next answers; computed for each, since a cost's __index__() may have resized the bytearray. */
static void *answers(PyObject *array, Py_ssize_t size) {
  if (PyByteArray_Size(array) == size) return PyByteArray_AsString(array);
  return PyErr_Format(PyExc_ValueError, "keys and costs differ in length");
}

/* keys: a tuple; args: as of _acquire_many(). With many keys, most of a call is waiting for memory, so their lines are
 * prefetched some keys ahead. */
static int acquire_many(Core *self, PyObject *keys, PyObject *const *args) {
  Py_ssize_t count = PyTuple_Size(keys), ahead = 0;
  int each = PyList_Check(args[1]);
  uint64_t costs[FSHM_MAX_LIMITS];
  fetched_key ring[AHEAD];
  for (int i = 2; i < 5; i++)
    if (!PyByteArray_Check(args[i]))
      return fail(PyExc_TypeError, "_acquire_many() fills bytearrays");
  if (each && PyList_Size(args[1]) != count)
    return fail(PyExc_ValueError, "keys and costs differ in length");
  if (!answers(args[2], count) || !answers(args[3], 8 * count) || !answers(args[4], 8 * count))
    return -1;
  for (Py_ssize_t i = 0; i < count; i++) {
    fshm_decision d;
    for (; ahead < count && ahead < i + AHEAD; ahead++)
      fetch(self, PyTuple_GetItem(keys, ahead), &ring[ahead % AHEAD]);
    if (each || !i) { /* held: its __index__() may take it out of the list */
      PyObject *cost = each ? PySequence_GetItem(args[1], i) : args[1];
      if (!each) Py_INCREF(cost);
      int wrong = !cost || core_costs(self, cost, costs);
      Py_XDECREF(cost);
      if (wrong) return -1;
    }
    if (decide_fetched(self, PyTuple_GetItem(keys, i), &ring[i % AHEAD], costs, &d)) return -1;
    char *allowed = answers(args[2], count);
    uint64_t *remaining = answers(args[3], 8 * count);
    double *retry = answers(args[4], 8 * count);
    if (!allowed || !remaining || !retry) return -1;
    allowed[i] = (char)(d.status == FSHM_ALLOWED);
    remaining[i] = d.remaining;
    retry[i] = d.retry_after_ns == FSHM_NEVER ? Py_HUGE_VAL : (double)d.retry_after_ns / 1e9;
  }
  return 0;
}

/* _acquire_many(keys, costs, allowed, remaining, retry): charge key by key, in order, and fill three bytearrays of
 * n, 8n and 8n bytes. costs: an int, or a list of n. */
static PyObject *core_acquire_many(PyObject *o, PyObject *const *args, Py_ssize_t n, PyObject *kw) {
  Core *self = (Core *)o;
  if (n != 5 || kw) return PyErr_Format(PyExc_TypeError, "_acquire_many() takes 5 arguments");
  if (bound(self) || watch_call(&self->measure.watch)) return NULL;
  PyObject *keys = PySequence_Tuple(args[0]);
  int failed = !keys || acquire_many(self, keys, args);
  Py_XDECREF(keys);
  if (failed) return NULL;
  Py_RETURN_NONE;
}

/* _bind(handle, address, limits, reasons, version, on_full). handle: the owner of the limiter. */
static PyObject *core_bind(PyObject *o, PyObject *args) {
  Core *self = (Core *)o;
  PyObject *handle, *limits, *reasons;
  unsigned long long address, version;
  int on_full;
  if (!PyArg_ParseTuple(args, "OKO!O!Ki", &handle, &address, &PyTuple_Type, &limits, &PyTuple_Type,
                        &reasons, &version, &on_full))
    return NULL;
  if (self->handle && self->handle != handle) /* a call may be inside it */
    return PyErr_Format(PyExc_RuntimeError, "a limiter is bound once");
  PyObject *old_limits, *old_reasons;
  ALONE_BEGIN(self);
  old_limits = self->limits;
  old_reasons = self->reasons;
  RELAXED_SET(self->limits, Py_NewRef(limits));
  self->reasons = Py_NewRef(reasons);
  if (!self->handle) {
    self->handle = Py_NewRef(handle);
    self->limiter = (fshm_limiter *)(uintptr_t)address;
    self->on_full = on_full;
    if (on_full == ON_FULL_SHARE) fshm_limiter_share(self->limiter, 1);
  }
  RELAXED_SET(self->version, version);
  ALONE_END();
  Py_XDECREF(old_limits);
  Py_XDECREF(old_reasons);
  Py_RETURN_NONE;
}

/* _bind_cluster(leases, address, refused, address, keys=None): the owners of the limiters and their addresses; for
 * permits, also the dict of the keys in use. */
static PyObject *core_bind_cluster(PyObject *o, PyObject *args) {
  unsigned long long leases, refused;
  PyObject *keys = NULL, *leases_handle, *refused_handle;
  cluster_t *c = &((Core *)o)->cluster;
  if (!PyArg_ParseTuple(args, "OKOK|O!", &leases_handle, &leases, &refused_handle, &refused,
                        &PyDict_Type, &keys))
    return NULL;
  if (c->leases) return PyErr_Format(PyExc_RuntimeError, "a limiter is bound once");
  c->keys = Py_XNewRef(keys);
  c->leases_handle = Py_NewRef(leases_handle);
  c->refused_handle = Py_NewRef(refused_handle);
  c->refused = (fshm_limiter *)(uintptr_t)refused;
  c->leases = (fshm_limiter *)(uintptr_t)leases;
  fshm_limiter_share(((Core *)o)->limiter, 0); /* the server has its states */
  Py_RETURN_NONE;
}

/* _bind_plans(age): the keys of this object have plans. age: s, after which an answer is asked for again. */
static PyObject *core_bind_plans(PyObject *o, PyObject *age) {
  Core *self = (Core *)o;
  const double seconds = PyFloat_AsDouble(age);
  if (PyErr_Occurred()) return NULL;
  if (bound(self)) return NULL;
  if (self->plans.entries) return PyErr_Format(PyExc_RuntimeError, "plans are bound once");
  const double ns = seconds > 0 ? seconds * 1e9 : 0; /* nor NaN */
  self->plans.age = ns > 1e18 ? UINT64_MAX >> 25 : (uint64_t)ns >> 20;
  if (!plans_make(&self->plans)) return PyErr_NoMemory();
  self->plans.overrides = fshm_overrides(self->limiter);
  Py_RETURN_NONE;
}

/* The hash of a key, of an object whose keys have plans. */
static int get_plan_key(Core *self, PyObject *key, uint64_t *hash) {
  key_arg k;
  if (!self->plans.entries)
    return fail(PyExc_RuntimeError, "the keys of this limiter have no plans");
  if (get_key(key, &k)) return -1;
  *hash = limiter_fetch(self->limiter, k.bytes, (uint64_t)k.length);
  Py_XDECREF(k.held);
  return 0;
}

/* _plan_begin() -> int: the time, for _plan_found(). Before the plan of a key is looked for. */
static PyObject *core_plan_begin(PyObject *o, UNUSED PyObject *unused) {
  Core *self = (Core *)o;
  uint64_t now;
  ALONE_BEGIN(self);
  plans_look(&self->plans, self->limiter);
  now = max_u64(plan_clock(), self->plans.since);
  ALONE_END();
  return PyLong_FromUnsignedLongLong(now);
}

/* _plan_found(key, core, begun): from `begun` on, the key has the plan whose Core this is. */
static PyObject *core_plan_found(PyObject *o, PyObject *args) {
  Core *self = (Core *)o, *plan;
  PyObject *key, *core;
  unsigned long long begun;
  uint64_t hash = 0;
  if (!PyArg_ParseTuple(args, "OOK", &key, &core, &begun) || get_plan_key(self, key, &hash))
    return NULL;
  if (!PyObject_TypeCheck(core, core_type) || bound((Core *)core)) return NULL;
  plan = (Core *)core;
  ALONE_BEGIN(self);
  if (!plan->plan && self->plans.count < MOST_PLANS) {
    const uint32_t number = self->plans.count;
    self->plans.plans[number] = (plan_t){Py_NewRef(core), Py_NewRef(plan->limits)};
    if (!plan->cluster.leases && plan->limiter->own)
      (void)plan_pack(plan->limiter->own, &self->plans.packed[number]);
    plan->plan = number + 1;
    /* release: with the acquire of plan_there() */
    __atomic_store_n(&self->plans.count, number + 1, __ATOMIC_RELEASE);
  }
  if (plan->plan) plan_remember(&self->plans, hash, plan->plan - 1, begun);
  ALONE_END();
  Py_RETURN_NONE;
}

/* _plan_known(key, fresh) -> Core or None. fresh: only if it counts now. */
static PyObject *core_plan_known(PyObject *o, PyObject *args) {
  Core *self = (Core *)o;
  PyObject *key;
  int fresh;
  uint64_t hash = 0, when;
  if (!PyArg_ParseTuple(args, "Op", &key, &fresh) || get_plan_key(self, key, &hash)) return NULL;
  const uint32_t plan =
      fresh ? plan_now(&self->plans, self->limiter, hash) : plan_there(&self->plans, hash, &when);
  return Py_NewRef(plan != NO_PLAN ? self->plans.plans[plan].core : Py_None);
}

/* _bind_adaptive(learned, address, initial, least, most, algorithm, tolerance): the limiter that keeps what is learned, and
 * its address. */
static PyObject *core_bind_adaptive(PyObject *o, PyObject *args) {
  unsigned long long learned;
  PyObject *handle;
  adaptive_t *a = &((Core *)o)->adaptive;
  fshm_adaptive *s = &a->settings;
  if (!PyArg_ParseTuple(args, "OKIIIII", &handle, &learned, &s->initial, &s->least, &s->most,
                        &s->algorithm, &s->tolerance))
    return NULL;
  if (a->learned) return PyErr_Format(PyExc_RuntimeError, "a limiter is bound once");
  a->handle = Py_NewRef(handle);
  a->learned = (fshm_limiter *)(uintptr_t)learned;
  Py_RETURN_NONE;
}

static PyObject *core_measure(PyObject *o, PyObject *args) {
  return measure_set(&((Core *)o)->measure, args);
}

static PyObject *core_get_limits(PyObject *o, UNUSED void *unused) {
  Core *self = (Core *)o;
  uint64_t version;
  if (!self->limiter) Py_RETURN_NONE;
  if (limiter_version(self->limiter) == RELAXED_GET(self->version)) return limits_itself(self);
  fshm_limit now[FSHM_MAX_LIMITS]; /* another process has changed them */
  if (fshm_limiter_limits(self->limiter, now, &version) > 0 &&
      version != RELAXED_GET(self->version)) {
    RELAXED_SET(self->version, version);
    if (call_void(o, "_limits_changed", 0)) return NULL;
  }
  return limits_itself(self);
}

/* No tp_clear: a __del__() must find a working object, and dicts break the cycles. */
static int core_traverse(PyObject *o, visitproc visit, void *arg) {
  Core *self = (Core *)o;
  Py_VISIT(Py_TYPE(o));
  Py_VISIT(self->limits);
  Py_VISIT(self->reasons);
  for (uint32_t i = 0; i < self->plans.count; i++) Py_VISIT(self->plans.plans[i].core);
  Py_VISIT(self->cluster.keys);
  return 0;
}

static void core_dealloc(PyObject *o) {
  Core *self = (Core *)o;
  PyObject_GC_UnTrack(o);
  Py_XDECREF(self->limits);
  Py_XDECREF(self->reasons);
  Py_XDECREF(self->tail);
  plans_free(&self->plans);
  Py_XDECREF(self->cluster.keys);
  Py_XDECREF(self->cluster.leases_handle);
  Py_XDECREF(self->cluster.refused_handle);
  Py_XDECREF(self->adaptive.handle);
  Py_XDECREF(self->handle);
  end_derived(o);
}

/* types ---------------------------------------------------------------------------------------- */

static PyMethodDef core_methods[] = {
    {"acquire", FAST(core_acquire), FLAGS,
     "acquire(key, cost=1)\n--\n\nCharge `cost` tokens if every limit has room; consume nothing "
     "otherwise. cost: an int, or one int for each limit. Returns a Decision, true when admitted."},
    {"peek", FAST(core_peek), FLAGS,
     "peek(key, cost=1)\n--\n\nWhat acquire() would answer now. Charges nothing."},
    {"charge", FAST(core_charge), FLAGS,
     "charge(key, cost)\n--\n\nCharge without a check, for example when the actual cost is known. "
     "The key may go into debt: it is denied until that is paid. Returns the Decision after it."},
    {"refund", FAST(core_refund), FLAGS,
     "refund(key, cost)\n--\n\nGive back tokens that were charged, at most all that is consumed."},
    {"is_allowed", FAST(core_is_allowed), FLAGS,
     "is_allowed(key=None)\n--\n\nacquire(key) as a bool. None is the key \"default\"."},
    {"check", FAST(core_check), FLAGS,
     "check(key=None)\n--\n\nacquire(key) as a dict: allowed, reason, remaining_requests, and "
     "retry_after_ms when denied."},
    {"get_remaining", FAST(core_get_remaining), FLAGS,
     "get_remaining(key=None)\n--\n\nHow many requests would be admitted right now."},
    {"_reserve", FAST(core_reserve), FLAGS, NULL},
    {"_admit", FAST(core_admit), FLAGS, NULL},
    {"_end_keys_in", core_end_keys_in, METH_O, NULL},
    {"_refused", core_refused, METH_VARARGS, NULL},
    {"_refused_permit", core_refused_permit, METH_VARARGS, NULL},
    {"_in_flight", core_in_flight, METH_O, NULL},
    {"_remaining", core_remaining, METH_O, NULL},
    {"_settle", FAST(core_settle), METH_FASTCALL, NULL},
    {"_acquire_many", FAST(core_acquire_many), FLAGS, NULL},
    {"_bind", core_bind, METH_VARARGS, NULL},
    {"_bind_cluster", core_bind_cluster, METH_VARARGS, NULL},
    {"_bind_plans", core_bind_plans, METH_O, NULL},
    {"_plan_begin", core_plan_begin, METH_NOARGS, NULL},
    {"_plan_found", core_plan_found, METH_VARARGS, NULL},
    {"_plan_known", core_plan_known, METH_VARARGS, NULL},
    {"_bind_adaptive", core_bind_adaptive, METH_VARARGS, NULL},
    {"_measure", core_measure, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL}};

static PyGetSetDef core_getset[] = {
    {"limits", core_get_limits, NULL, "The limits in force, as a tuple.", NULL},
    {NULL, NULL, NULL, NULL, NULL}};

static PyType_Slot core_slots[] = {{Py_tp_dealloc, (void *)core_dealloc},
                                   {Py_tp_traverse, (void *)core_traverse},
                                   {Py_tp_methods, core_methods},
                                   {Py_tp_getset, core_getset},
                                   {Py_tp_doc, DOC("Native base of the limiters.")},
                                   {0, NULL}};

static int make_constants(void) {
  s_allowed = PyUnicode_InternFromString("allowed");
  s_reason = PyUnicode_InternFromString("reason");
  s_remaining = PyUnicode_InternFromString("remaining_requests");
  s_retry = PyUnicode_InternFromString("retry_after_ms");
  s_default = PyUnicode_InternFromString("default");
  s_full = PyUnicode_InternFromString("Rate limit exceeded");
  s_admitted = PyUnicode_InternFromString("Request allowed");
  s_one = PyLong_FromLong(1);
  if (!s_allowed || !s_reason || !s_remaining || !s_retry || !s_default || !s_full || !s_admitted ||
      !s_one)
    return -1;
  check_allowed =
      Py_BuildValue("{OOOOOO}", s_allowed, Py_True, s_reason, s_admitted, s_remaining, Py_None);
  check_denied =
      Py_BuildValue("{OOOOOO}", s_allowed, Py_False, s_reason, s_full, s_remaining, Py_None);
  return check_allowed && check_denied ? 0 : -1;
}
