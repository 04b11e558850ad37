/* py_budget.c - BudgetCore: the calls of a Budget; BudgetReservation: what it has reserved for one call.
 *
 * A reservation that Python drops is given back, as at the end of its block. */
#include <math.h>

#include "py_args.h"
#include "py_watch.h"

#define DOLLAR 1000000000 /* nano-dollars */
#define MOST_DOLLARS 1000000000

typedef struct {
  PyObject_HEAD
  PyObject *handle; /* owns the limiter */
  fshm_limiter *limiter;
  uint32_t flags; /* of fshm_budget_reserve() */
  double warn_at; /* a part of the limit; 0: never */
  watch_t watch;
} BudgetCore;

typedef struct {
  PyObject_HEAD
  PyObject *budget, *key;
  uint64_t amount;
  int allowed, open; /* open: neither settled nor given back */
  double again_after; /* seconds; 0: whoever grants the budget was asked, or need not be */
  fshm_budget held;
} BudgetReservation;

static PyTypeObject *budget_reservation_type;

/* Dollars of 0 or more as nano-dollars, a float rounded once, half to even. Others, and what is out of range: by the
 * Python method `_nanos`, which raises what there is to say. */
static int get_dollars(PyObject *budget, PyObject *value, const char *where, uint64_t *out) {
  if (Py_TYPE(value) == &PyFloat_Type) {
    const double dollars = PyFloat_AsDouble(value);
    if (dollars >= 0 && dollars <= MOST_DOLLARS) {
      int exponent;
      const double fraction = frexp(dollars, &exponent); /* 53 bits, below 1 */
      const double shifted = ldexp(fraction, 53);
      const uint64_t digits = (uint64_t)shifted;
      __extension__ typedef unsigned __int128 wide;
      const wide scaled = (wide)digits * DOLLAR; /* 83 bits */
      const int shift = 53 - exponent; /* 23 at least */
      if (shift > 100) {
        *out = 0;
        return 0;
      }
      const wide half = (wide)1 << (shift - 1), rest = scaled & ((half << 1) - 1);
      const uint64_t whole = (uint64_t)(scaled >> shift);
      *out = whole + (rest > half || (rest == half && (whole & 1)));
      return 0;
    }
  } else if (Py_TYPE(value) == &PyLong_Type) {
    int overflow;
    const long long dollars = PyLong_AsLongLongAndOverflow(value, &overflow);
    if (!overflow && dollars >= 0 && dollars <= MOST_DOLLARS) {
      *out = (uint64_t)dollars * DOLLAR;
      return 0;
    }
  }
  PyObject *found = PyObject_CallMethod(budget, "_nanos", "Os", value, where);
  if (!found) return -1;
  *out = PyLong_AsUnsignedLongLong(found);
  Py_DECREF(found);
  return PyErr_Occurred() ? -1 : 0;
}

static int budget_failed(PyObject *budget, int status) {
  return done(PyObject_CallMethod(budget, "_failed", "i", status));
}

/* The budget's _watch(key): it looks again, and warns if it is time. */
static int budget_watch(BudgetCore *self, PyObject *key, const fshm_budget *found) {
  const double warn_at = self->warn_at; /* set once, before any call */
  if (warn_at <= 0) return 0;
  if (found && (double)(found->spent + found->reserved) < warn_at * (double)found->limit) return 0;
  return done(PyObject_CallMethod((PyObject *)self, "_watch", "O", key));
}

static int budget_reservation_end(BudgetReservation *self, uint64_t actual) {
  BudgetCore *budget = (BudgetCore *)self->budget;
  key_arg k;
  int open, status = 0;
  ALONE_BEGIN(self);
  open = self->open; /* once, wherever an exception strikes */
  RELAXED_SET(self->open, 0);
  ALONE_END();
  if (!open) return 0;
  if (get_key(self->key, &k)) return -1;
  status = fshm_budget_settle(budget->limiter, k.bytes, (uint64_t)k.length, &self->held,
                              self->amount, actual, 0);
  Py_XDECREF(k.held);
  if (status < 0) return budget_failed(self->budget, status);
  /* _tend(key): its ledger grants what was spent beyond, or takes back what is left. */
  if (status == FSHM_ASK && done(PyObject_CallMethod(self->budget, "_tend", "O", self->key)))
    return -1;
  return actual > self->amount ? budget_watch(budget, self->key, NULL) : 0;
}

static PyObject *budget_reservation_settle(PyObject *o, PyObject *const *args, Py_ssize_t n,
                                           PyObject *kwnames) {
  static const char *const names[] = {"usd"};
  BudgetReservation *self = (BudgetReservation *)o;
  PyObject *found[1] = {NULL};
  uint64_t actual;
  if (parse("settle", args, n, kwnames, names, found, 1, 1) ||
      get_dollars(self->budget, found[0], "settle: usd", &actual) ||
      budget_reservation_end(self, actual))
    return NULL;
  Py_RETURN_NONE;
}

static PyObject *budget_reservation_release(PyObject *o, UNUSED PyObject *unused) {
  if (budget_reservation_end((BudgetReservation *)o, 0)) return NULL;
  Py_RETURN_NONE;
}
static PyObject *budget_reservation_enter(PyObject *o, UNUSED PyObject *unused) {
  return Py_NewRef(o);
}
static PyObject *budget_reservation_exit(PyObject *o, UNUSED PyObject *args) {
  return budget_reservation_release(o, NULL);
}
static int budget_reservation_bool(PyObject *o) { return ((BudgetReservation *)o)->allowed; }

static PyObject *budget_reservation_get_allowed(PyObject *o, UNUSED void *unused) {
  return PyBool_FromLong(((BudgetReservation *)o)->allowed);
}
static PyObject *budget_reservation_get_open(PyObject *o, UNUSED void *unused) {
  return PyBool_FromLong(RELAXED_GET(((BudgetReservation *)o)->open));
}
static PyObject *budget_reservation_get_denied_by(PyObject *o, UNUSED void *unused) {
  BudgetReservation *self = (BudgetReservation *)o;
  return Py_NewRef(self->allowed ? Py_None : self->budget);
}
static PyObject *budget_reservation_get_nanos(PyObject *o, UNUSED void *unused) {
  return PyLong_FromUnsignedLongLong(((BudgetReservation *)o)->amount);
}
static PyObject *budget_reservation_get_reason(PyObject *o, UNUSED void *unused) {
  BudgetReservation *self = (BudgetReservation *)o;
  if (self->allowed) return PyUnicode_FromString("Request allowed");
  PyObject *name = PyObject_GetAttrString(self->budget, "name");
  if (!name) return NULL;
  PyObject *reason = PyUnicode_FromFormat(
      self->again_after > 0 ? "Budget not granted (%U): its state file or server cannot be used"
                            : "Budget exceeded (%U)",
      name);
  Py_DECREF(name);
  return reason;
}
static PyObject *budget_reservation_get_retry_after(PyObject *o, UNUSED void *unused) {
  BudgetReservation *self = (BudgetReservation *)o;
  if (self->allowed || self->again_after > 0) return PyFloat_FromDouble(self->again_after);
  if (self->amount > self->held.limit || self->held.window == (1U << 28) - 1) Py_RETURN_NONE;
  return PyFloat_FromDouble((double)self->held.left_ns / 1e9);
}
static PyObject *budget_reservation_repr(PyObject *o) {
  BudgetReservation *self = (BudgetReservation *)o;
  const char *state = RELAXED_GET(self->open) ? "reserved" : self->allowed ? "over" : "denied";
  return PyUnicode_FromFormat("Reservation(%s, usd=%llu.%09llu)", state,
                              (unsigned long long)(self->amount / DOLLAR),
                              (unsigned long long)(self->amount % DOLLAR));
}

static void budget_reservation_dropped(BudgetReservation *self) {
  PyObject *error, *value, *trace;
  if (!self->open) return;
  PyErr_Fetch(&error, &value, &trace); /* an exception may be passing through us */
  if (budget_reservation_end(self, 0)) PyErr_WriteUnraisable(NULL);
  PyErr_Restore(error, value, trace);
}

static int budget_reservation_traverse(PyObject *o, visitproc visit, void *arg) {
  Py_VISIT(Py_TYPE(o));
  Py_VISIT(((BudgetReservation *)o)->budget);
  Py_VISIT(((BudgetReservation *)o)->key);
  return 0;
}
static void budget_reservation_dealloc(PyObject *o) {
  BudgetReservation *self = (BudgetReservation *)o;
  PyObject_GC_UnTrack(o);
  budget_reservation_dropped(self);
  Py_XDECREF(self->key);
  Py_XDECREF(self->budget);
  end_object(o, PyObject_GC_Del);
}

static PyMethodDef budget_reservation_methods[] = {
    {"settle", FAST(budget_reservation_settle), FLAGS,
     "settle(usd)\n--\n\nThe call is over, and cost this much: it is spent, also where that is more "
     "than the budget has left. A second call does nothing."},
    {"release", budget_reservation_release, METH_NOARGS,
     "release()\n--\n\nThe call cost nothing: give back what was reserved. After settle() it does "
     "nothing."},
    {"__enter__", budget_reservation_enter, METH_NOARGS, NULL},
    {"__exit__", budget_reservation_exit, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL}};
static PyGetSetDef budget_reservation_getset[] = {
    {"allowed", budget_reservation_get_allowed, NULL, "True: the amount was reserved.", NULL},
    {"denied_by", budget_reservation_get_denied_by, NULL, "The Budget that had no room; None.",
     NULL},
    {"reason", budget_reservation_get_reason, NULL, "\"Request allowed\", or which budget denied.",
     NULL},
    {"retry_after", budget_reservation_get_retry_after, NULL,
     "Seconds until the window ends in which it was denied, or until its state file or server may "
     "be asked again; None: it never fits.",
     NULL},
    {"_open", budget_reservation_get_open, NULL, NULL, NULL},
    {"_nanos", budget_reservation_get_nanos, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL}};
static PyType_Slot budget_reservation_slots[] = {
    {Py_tp_dealloc, (void *)budget_reservation_dealloc},
    {Py_tp_traverse, (void *)budget_reservation_traverse},
    {Py_tp_methods, budget_reservation_methods},
    {Py_tp_getset, budget_reservation_getset},
    {Py_tp_repr, (void *)budget_reservation_repr},
    {Py_nb_bool, (void *)budget_reservation_bool},
    {Py_tp_doc, DOC("What Budget.reserve() answers: true when the amount was reserved.")},
    {0, NULL}};

/* _bind(handle, address, flags, warn_at) */
static PyObject *budget_bind(PyObject *o, PyObject *args) {
  BudgetCore *self = (BudgetCore *)o;
  PyObject *handle;
  unsigned long long address;
  unsigned int flags;
  double warn_at;
  if (!PyArg_ParseTuple(args, "OKId", &handle, &address, &flags, &warn_at)) return NULL;
  if (self->handle) return PyErr_Format(PyExc_RuntimeError, "a budget is made once");
  self->limiter = (fshm_limiter *)(uintptr_t)address;
  self->flags = flags;
  self->warn_at = warn_at;
  watch_init(&self->watch, self->limiter->segment);
  self->handle = Py_NewRef(handle);
  Py_RETURN_NONE;
}

static PyObject *budget_take(BudgetCore *self, PyObject *key, uint64_t amount) {
  key_arg k;
  if (!self->handle)
    return PyErr_Format(PyExc_RuntimeError, "the budget's __init__ was not called");
  if (watch_call(&self->watch) || get_key(key, &k)) return NULL;
  /* Made before, since afterwards it might not be had. */
  BudgetReservation *r = PyObject_GC_New(BudgetReservation, budget_reservation_type);
  if (!r) {
    Py_XDECREF(k.held);
    return NULL;
  }
  r->budget = Py_NewRef((PyObject *)self);
  r->key = Py_NewRef(key);
  r->amount = amount;
  r->open = 0;
  r->again_after = 0;
  int status, asked = 0;
  while ((status = fshm_budget_reserve(self->limiter, k.bytes, (uint64_t)k.length, amount,
                                       self->flags, 0, &r->held)) == FSHM_ASK &&
         asked++ < 4) {
    /* Its ledger must grant more: _ask(key, nanos) says whether it did; a float: in so many seconds it may. */
    PyObject *granted =
        PyObject_CallMethod((PyObject *)self, "_ask", "OK", key, (unsigned long long)amount);
    const int later = granted && Py_TYPE(granted) == &PyFloat_Type;
    const int more = !granted ? -1 : later ? 0 : PyObject_IsTrue(granted);
    if (later) r->again_after = PyFloat_AsDouble(granted);
    Py_XDECREF(granted);
    if (more > 0) continue;
    if (more < 0)
      status = -1;
    else
      fshm_budget_denied(self->limiter, k.bytes, (uint64_t)k.length);
    break;
  }
  r->open = r->allowed = status == FSHM_ALLOWED;
  PyObject_GC_Track((PyObject *)r);
  Py_XDECREF(k.held);
  int raised = PyErr_Occurred() != NULL;
  if (!raised && status < 0) raised = budget_failed((PyObject *)self, status);
  if (!raised && r->allowed) raised = budget_watch(self, key, &r->held);
  if (raised) {
    Py_DECREF((PyObject *)r);
    return NULL;
  }
  return (PyObject *)r;
}

static PyObject *budget_reserve(PyObject *o, PyObject *const *args, Py_ssize_t n,
                                PyObject *kwnames) {
  static const char *const names[] = {"key", "usd", "also"};
  BudgetCore *self = (BudgetCore *)o;
  PyObject *found[3] = {NULL, NULL, NULL};
  uint64_t amount;
  if (n > 2) return PyErr_Format(PyExc_TypeError, "reserve() takes 2 positional arguments");
  if (parse("reserve", args, n, kwnames, names, found, 3, 2)) return NULL;
  if (found[2]) return PyObject_CallMethod(o, "_reserve_all", "OOO", found[0], found[1], found[2]);
  if (get_dollars(o, found[1], "reserve: usd", &amount)) return NULL;
  return budget_take(self, found[0], amount);
}

static int budget_traverse(PyObject *o, visitproc visit, void *arg) {
  Py_VISIT(Py_TYPE(o));
  Py_VISIT(((BudgetCore *)o)->handle);
  return 0;
}
static void budget_dealloc(PyObject *o) {
  PyObject_GC_UnTrack(o);
  Py_XDECREF(((BudgetCore *)o)->handle); /* it owns the limiter */
  end_derived(o);
}

static PyMethodDef budget_methods[] = {
    {"reserve", FAST(budget_reserve), FLAGS,
     "reserve(key, usd, *, also=())\n--\n\nReserve this much, if the budget has room, or say that "
     "it has not. also: pairs of another Budget and a key in it, that the same call must fit into: "
     "of a team, of an organization. If one of all has no room, nothing is reserved in any."},
    {"_bind", budget_bind, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL}};
static PyType_Slot budget_slots[] = {{Py_tp_dealloc, (void *)budget_dealloc},
                                     {Py_tp_traverse, (void *)budget_traverse},
                                     {Py_tp_methods, budget_methods},
                                     {Py_tp_new, (void *)PyType_GenericNew},
                                     {Py_tp_doc, DOC("The native part of a Budget.")},
                                     {0, NULL}};
