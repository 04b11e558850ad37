/* py_hierarchy.c - HierarchyCore, the base class of HierarchyLimiter: one call for all levels. The keys of the levels
 * become one path, of which each level's key is the beginning; then fshm_levels_apply(). */
#include "py_args.h"
#include "py_measure.h"

typedef struct {
  PyObject_HEAD
  Py_ssize_t count;
  PyObject *cores[FSHM_MAX_LEVELS]; /* Core; set once, by _bind() */
  PyObject *levels[FSHM_MAX_LEVELS]; /* str: their names */
  PyObject *name; /* for errors */
  int leased; /* a server or a file grants: Python makes the calls */
  measure_t measure;
} HierarchyCore;

static const char *const keys_cost[] = {"keys", "cost"};

/* The path of a call: the keys of its levels, outermost first, joined by '/'. In a key, '/' becomes "\/" and '\' becomes
 * "\\", and "\-" stands for a level that is left out; so no two calls have the same path. */
typedef struct {
  char *bytes, room[256];
  size_t length, size;
  size_t ends[FSHM_MAX_LEVELS]; /* of the key of each level of the call */
  Py_ssize_t of[FSHM_MAX_LEVELS]; /* and which level that is */
  uint32_t count;
} path_t;

static void path_begin(path_t *p) {
  p->bytes = p->room;
  p->size = sizeof p->room;
  p->length = 0;
  p->count = 0;
}

static void path_end(path_t *p) {
  if (p->bytes != p->room) PyMem_Free(p->bytes);
}

static int path_grow(path_t *p, size_t more) {
  if (likely(more <= p->size - p->length)) return 0;
  if (more > PY_SSIZE_T_MAX / 2 - p->length) return done(PyErr_NoMemory());
  const size_t size = 2 * (p->length + more);
  char *bytes = p->bytes == p->room ? PyMem_Malloc(size) : PyMem_Realloc(p->bytes, size);
  if (!bytes) return done(PyErr_NoMemory());
  if (p->bytes == p->room) memcpy(bytes, p->room, p->length);
  p->bytes = bytes;
  p->size = size;
  return 0;
}

static int path_gap(path_t *p) {
  if (path_grow(p, 3)) return -1;
  memcpy(p->bytes + p->length, "\\-/", 3);
  p->length += 3;
  return 0;
}

/* The key of one level. */
static int path_add(path_t *p, const HierarchyCore *self, Py_ssize_t level, PyObject *key) {
  key_arg k;
  if (unlikely(!PyUnicode_Check(key) && !PyBytes_Check(key)))
    return fail(PyExc_TypeError,
                "limiter %R: the key of level %R must be a str or bytes, not %R; to leave a level "
                "out, give a mapping without it",
                self->name, self->levels[level], key);
  if (get_key(key, &k)) return -1;
  if (unlikely((size_t)k.length > PY_SSIZE_T_MAX / 4)) {
    Py_XDECREF(k.held);
    return done(PyErr_NoMemory());
  }
  if (path_grow(p, 2 * (size_t)k.length + 1)) { /* each byte may become two, and a '/' follows */
    Py_XDECREF(k.held);
    return -1;
  }
  char *out = p->bytes + p->length;
  for (Py_ssize_t i = 0; i < k.length; i++) {
    if (unlikely(k.bytes[i] == '/' || k.bytes[i] == '\\')) *out++ = '\\';
    *out++ = k.bytes[i];
  }
  Py_XDECREF(k.held);
  p->length = (size_t)(out - p->bytes);
  p->ends[p->count] = p->length;
  p->of[p->count++] = level;
  p->bytes[p->length++] = '/';
  return 0;
}

/* The names of the levels, for errors. */
static PyObject *level_names(const HierarchyCore *self) {
  PyObject *names = PyTuple_New(self->count), *comma = PyUnicode_FromString(", "), *out = NULL;
  for (Py_ssize_t i = 0; names && i < self->count; i++)
    if (PyTuple_SetItem(names, i, Py_NewRef(self->levels[i]))) Py_CLEAR(names);
  if (names && comma) out = PyUnicode_Join(comma, names);
  Py_XDECREF(names);
  Py_XDECREF(comma);
  return out;
}

static int fail_with_names(const HierarchyCore *self, const char *format, PyObject *what) {
  PyObject *names = level_names(self);
  if (!names) return -1;
  (void)PyErr_Format(PyExc_ValueError, format, self->name, what, names);
  Py_DECREF(names);
  return -1;
}

/* Raises for a name in the dict that is none of a level. */
static int only_levels(const HierarchyCore *self, PyObject *dict) {
  PyObject *given = PyDict_Keys(dict);
  Py_ssize_t count = given ? PyList_Size(given) : 0;
  int failed = !given;
  for (Py_ssize_t i = 0; !failed && i < count; i++) {
    PyObject *name = PySequence_GetItem(given, i);
    int known = name ? 0 : -1;
    for (Py_ssize_t n = 0; known == 0 && n < self->count; n++)
      known = PyObject_RichCompareBool(name, self->levels[n], Py_EQ);
    if (known == 0)
      failed = fail_with_names(self, "limiter %R has no level %R; its levels are %U", name);
    if (known < 0) failed = -1;
    Py_XDECREF(name);
  }
  Py_XDECREF(given);
  return failed;
}

static int path_of_dict(path_t *p, const HierarchyCore *self, PyObject *keys) {
  if (only_levels(self, keys)) return -1;
  Py_ssize_t left = PyDict_Size(keys);
  for (Py_ssize_t i = 0; left > 0 && i < self->count; i++) {
    PyObject *key = dict_get(keys, self->levels[i]);
    if (!key && PyErr_Occurred()) return -1;
    int failed = key ? path_add(p, self, i, key) : path_gap(p);
    left -= key != NULL;
    Py_XDECREF(key);
    if (failed) return -1;
  }
  return 0;
}

/* A mapping as a dict, a list as a tuple: a new reference. NULL: it is none of them, or an exception. */
static PyObject *plain(PyObject *o) {
  if (PyDict_Check(o) || PyTuple_Check(o)) return Py_NewRef(o);
  if (PyList_Check(o)) return PySequence_Tuple(o);
  if (PyUnicode_Check(o) || PyBytes_Check(o) || !PyMapping_Check(o)) return NULL;
  PyObject *dict = PyDict_New();
  if (dict && !PyDict_Update(dict, o)) return dict;
  Py_XDECREF(dict);
  return NULL;
}

/* keys: a tuple or a list with one key for each level, outermost first, or of the first levels only; or a mapping. */
static int path_of(path_t *p, const HierarchyCore *self, PyObject *keys) {
  if (unlikely(!self->count))
    return fail(PyExc_RuntimeError, "the limiter's __init__ was not called");
  PyObject *held = NULL;
  if (unlikely(!PyTuple_Check(keys))) {
    if (!(held = plain(keys))) {
      if (PyErr_Occurred()) PyErr_Clear();
      return fail(PyExc_TypeError,
                  "limiter %R: keys must be a tuple with a key for each level, outermost first, or "
                  "a mapping from level to key, not %R",
                  self->name, keys);
    }
    keys = held;
  }
  int failed = 0;
  if (PyTuple_Check(keys)) {
    const Py_ssize_t count = PyTuple_Size(keys);
    if (unlikely(count > self->count))
      failed =
          fail_with_names(self, "limiter %R: %R has more keys than levels; these are %U", keys);
    for (Py_ssize_t i = 0; !failed && i < count; i++)
      failed = path_add(p, self, i, PyTuple_GetItem(keys, i));
  } else {
    failed = path_of_dict(p, self, keys);
  }
  if (unlikely(!failed && !p->count))
    failed = fail_with_names(self, "limiter %R: %R names no level; its levels are %U", keys);
  Py_XDECREF(held);
  return failed;
}

/* cost: an int, or a mapping from level to what RateLimiter takes; levels that it leaves out cost 1. */
static int costs_of(const HierarchyCore *self, const path_t *p, PyObject *cost,
                    uint64_t costs[][FSHM_MAX_LIMITS], fshm_level *levels) {
  PyObject *held = PyLong_Check(cost) ? NULL : plain(cost);
  if (!held && PyErr_Occurred()) return -1;
  if (!held) {
    if (get_costs(0, cost, costs[0])) return -1;
    for (uint32_t i = 0; i < p->count; i++) levels[i].costs = costs[0];
    return 0;
  }
  int failed = 0;
  if (PyTuple_Check(held))
    failed = fail(PyExc_TypeError,
                  "limiter %R: cost must be an int, or a mapping from level to cost, not %R",
                  self->name, cost);
  else
    failed = only_levels(self, held);
  for (uint32_t i = 0; !failed && i < p->count; i++) {
    PyObject *given = dict_get(held, self->levels[p->of[i]]);
    if (given) {
      failed = core_costs((Core *)self->cores[p->of[i]], given, costs[i]);
      levels[i].costs = costs[i];
      Py_DECREF(given);
    } else if (PyErr_Occurred()) {
      failed = -1;
    }
  }
  Py_DECREF(held);
  return failed;
}

/* Turn other statuses than allowed and denied into the policy's answer or an exception, and notice limits that changed:
 * settle() of each level. */
static COLD int settle_levels(HierarchyCore *self, const path_t *p, fshm_level *levels,
                              uint32_t decides, fshm_decision *d) {
  if (d->status < 0) return settle((Core *)self->cores[p->of[decides]], d);
  for (uint32_t i = 0; i < p->count; i++)
    if (settle((Core *)self->cores[p->of[i]], &levels[i].decision)) return -1;
  return 0;
}

/* The call. `levels`: what each level says; out: the decision. Returns the index in `levels` of the one that decides, or
 * -1: it raised. */
static int hierarchy_decide(HierarchyCore *self, uint32_t op, const path_t *p, PyObject *cost,
                            fshm_level *levels, fshm_decision *d) {
  uint64_t costs[FSHM_MAX_LEVELS][FSHM_MAX_LIMITS];
  for (uint32_t i = 0; i < p->count; i++) {
    const Core *core = (const Core *)self->cores[p->of[i]];
    levels[i].limiter = core->limiter;
    levels[i].key = p->bytes;
    levels[i].key_length = p->ends[i];
    levels[i].costs = NULL;
    levels[i].passes_full = core->on_full == ON_FULL_ALLOW;
  }
  if (cost && costs_of(self, p, cost, costs, levels)) return -1;
  uint32_t decides = fshm_levels_apply(levels, p->count, op, 0, d);
  int odd_one = d->status < 0;
  for (uint32_t i = 0; i < p->count; i++)
    odd_one |= odd((Core *)self->cores[p->of[i]], &levels[i].decision);
  if (unlikely(odd_one) && settle_levels(self, p, levels, decides, d)) return -1;
  return (int)decides;
}

static PyObject *level_decision(const HierarchyCore *self, Py_ssize_t level,
                                const fshm_decision *d) {
  PyObject *o = make_decision(limits_of((Core *)self->cores[level]), d);
  if (o && d->status != FSHM_ALLOWED) ((Decision *)o)->level = Py_NewRef(self->levels[level]);
  return o;
}

/* status_only: the answer is a bool, and no Decision is made. */
static PyObject *hierarchy_ask(HierarchyCore *self, uint32_t op, PyObject *keys, PyObject *cost,
                               int status_only) {
  fshm_level levels[FSHM_MAX_LEVELS];
  fshm_decision d;
  path_t p;
  PyObject *out = NULL;
  path_begin(&p);
  if (!path_of(&p, self, keys)) {
    if (unlikely(self->leased)) {
      out =
          PyObject_CallMethod((PyObject *)self, "_leased", "IOO", op, keys, cost ? cost : Py_None);
    } else {
      int decides = hierarchy_decide(self, op, &p, cost, levels, &d);
      if (decides >= 0)
        out = status_only ? PyBool_FromLong(d.status == FSHM_ALLOWED)
                          : level_decision(self, p.of[decides], &d);
    }
  }
  path_end(&p);
  return out;
}

static PyObject *hierarchy_call(PyObject *o, uint32_t op, const char *name, PyObject *const *args,
                                Py_ssize_t n, PyObject *kwnames, Py_ssize_t least) {
  PyObject *in[2] = {NULL, NULL};
  if (n == 1 && !kwnames && least == 1)
    in[0] = args[0];
  else if (parse(name, args, n, kwnames, keys_cost, in, 2, least))
    return NULL;
  return hierarchy_ask((HierarchyCore *)o, op, in[0], in[1], 0);
}

#define HIERARCHY_MEASURED(self, call) RETURN_MEASURED(&((HierarchyCore *)(self))->measure, call)

static PyObject *hierarchy_acquire(PyObject *o, PyObject *const *args, Py_ssize_t n, PyObject *kw) {
  HIERARCHY_MEASURED(o, hierarchy_call(o, FSHM_ACQUIRE, "acquire", args, n, kw, 1));
}
static PyObject *hierarchy_peek(PyObject *o, PyObject *const *args, Py_ssize_t n, PyObject *kw) {
  return hierarchy_call(o, FSHM_PEEK, "peek", args, n, kw, 1);
}
static PyObject *hierarchy_charge(PyObject *o, PyObject *const *args, Py_ssize_t n, PyObject *kw) {
  return hierarchy_call(o, FSHM_CHARGE, "charge", args, n, kw, 2);
}
static PyObject *hierarchy_refund(PyObject *o, PyObject *const *args, Py_ssize_t n, PyObject *kw) {
  return hierarchy_call(o, FSHM_REFUND, "refund", args, n, kw, 2);
}

static PyObject *is_allowed_at_all(PyObject *o, PyObject *keys) {
  PyObject *found = hierarchy_ask((HierarchyCore *)o, FSHM_ACQUIRE, keys, NULL, 1);
  if (!found || PyBool_Check(found)) return found;
  PyObject *out = PyBool_FromLong(PyObject_IsTrue(found) > 0); /* a Decision */
  Py_DECREF(found);
  return out;
}
static PyObject *hierarchy_is_allowed(PyObject *o, PyObject *keys) {
  HIERARCHY_MEASURED(o, is_allowed_at_all(o, keys));
}

/* _paths(keys) -> tuple of (number of the level, its key as bytes), outermost first. */
static PyObject *hierarchy_paths(PyObject *o, PyObject *keys) {
  path_t p;
  PyObject *out = NULL;
  path_begin(&p);
  if (!path_of(&p, (HierarchyCore *)o, keys) && (out = PyTuple_New(p.count))) {
    for (uint32_t i = 0; out && i < p.count; i++) {
      PyObject *key = PyBytes_FromStringAndSize(p.bytes, (Py_ssize_t)p.ends[i]);
      PyObject *item = key ? Py_BuildValue("nN", p.of[i], key) : NULL;
      if (!item || PyTuple_SetItem(out, i, item)) Py_CLEAR(out);
    }
  }
  path_end(&p);
  return out;
}

/* _remaining(keys) -> tuple of (number of the level, tokens left). */
static PyObject *hierarchy_remaining(PyObject *o, PyObject *keys) {
  HierarchyCore *self = (HierarchyCore *)o;
  fshm_level levels[FSHM_MAX_LEVELS];
  fshm_decision d;
  path_t p;
  PyObject *out = NULL;
  path_begin(&p);
  if (!path_of(&p, self, keys) && hierarchy_decide(self, FSHM_PEEK, &p, NULL, levels, &d) >= 0) {
    out = PyTuple_New(p.count);
    for (uint32_t i = 0; out && i < p.count; i++) {
      PyObject *item =
          Py_BuildValue("nK", p.of[i], (unsigned long long)levels[i].decision.remaining);
      if (!item || PyTuple_SetItem(out, i, item)) Py_CLEAR(out);
    }
  }
  path_end(&p);
  return out;
}

/* _joined(decisions, numbers of their levels, denied) -> Decision: one of several levels that were asked one by one.
 * denied: the index of the one that decides; -1: all admit, and the one with the least left decides. */
static PyObject *hierarchy_joined(PyObject *o, PyObject *args) {
  HierarchyCore *self = (HierarchyCore *)o;
  PyObject *decisions, *numbers;
  Py_ssize_t denied;
  if (!PyArg_ParseTuple(args, "O!O!n", &PyTuple_Type, &decisions, &PyTuple_Type, &numbers, &denied))
    return NULL;
  const Py_ssize_t count = PyTuple_Size(decisions);
  if (!count || PyTuple_Size(numbers) != count || denied >= count)
    return PyErr_Format(PyExc_ValueError, "_joined() takes as many levels as decisions");
  fshm_decision all = {0};
  Py_ssize_t decides = denied < 0 ? 0 : denied;
  uint64_t least = UINT64_MAX;
  int64_t reset = 0;
  for (Py_ssize_t i = 0; i < count; i++) {
    PyObject *item = PyTuple_GetItem(decisions, i);
    if (Py_TYPE(item) != decision_type)
      return PyErr_Format(PyExc_TypeError, "_joined() takes Decisions, not %R", item);
    const fshm_decision *d = &((Decision *)item)->d;
    if (d->remaining < least && denied < 0) decides = i;
    least = d->remaining < least ? d->remaining : least;
    if (d->reset_after_ns > reset) reset = d->reset_after_ns;
  }
  const Decision *of = (const Decision *)PyTuple_GetItem(decisions, decides);
  Py_ssize_t level = PyLong_AsSsize_t(PyTuple_GetItem(numbers, decides));
  if (level < 0 || level >= self->count)
    return PyErr_Format(PyExc_ValueError, "_joined(): there is no level %zd", level);
  all = of->d;
  all.remaining = least;
  all.reset_after_ns = reset;
  all.status = denied < 0 ? FSHM_ALLOWED : FSHM_DENIED;
  PyObject *out = make_decision(Py_NewRef(of->limits), &all);
  if (out && denied >= 0) ((Decision *)out)->level = Py_NewRef(self->levels[level]);
  return out;
}

/* _bind(name, levels, cores, leased): once. levels: their names; cores: a Core for each. */
static PyObject *hierarchy_bind(PyObject *o, PyObject *args) {
  HierarchyCore *self = (HierarchyCore *)o;
  PyObject *name, *levels, *cores;
  int leased;
  if (!PyArg_ParseTuple(args, "UO!O!p", &name, &PyTuple_Type, &levels, &PyTuple_Type, &cores,
                        &leased))
    return NULL;
  const Py_ssize_t count = PyTuple_Size(levels);
  if (self->count) return PyErr_Format(PyExc_RuntimeError, "a limiter is bound once");
  if (count < 1 || count > FSHM_MAX_LEVELS || PyTuple_Size(cores) != count)
    return PyErr_Format(PyExc_ValueError, "_bind() takes 1 to %d levels, and a Core for each",
                        FSHM_MAX_LEVELS);
  for (Py_ssize_t i = 0; i < count; i++) {
    PyObject *core = PyTuple_GetItem(cores, i);
    if (!PyObject_TypeCheck(core, core_type) || bound((Core *)core))
      return PyErr_Format(PyExc_TypeError, "_bind() takes Cores that are bound");
    if (!PyUnicode_Check(PyTuple_GetItem(levels, i)))
      return PyErr_Format(PyExc_TypeError, "_bind() takes names");
  }
  self->name = Py_NewRef(name);
  for (Py_ssize_t i = 0; i < count; i++) {
    self->cores[i] = Py_NewRef(PyTuple_GetItem(cores, i));
    self->levels[i] = Py_NewRef(PyTuple_GetItem(levels, i));
  }
  self->leased = leased;
  self->count = count;
  Py_RETURN_NONE;
}

static PyObject *hierarchy_measure(PyObject *o, PyObject *args) {
  return measure_set(&((HierarchyCore *)o)->measure, args);
}

/* No tp_clear: as of Core. */
static int hierarchy_traverse(PyObject *o, visitproc visit, void *arg) {
  HierarchyCore *self = (HierarchyCore *)o;
  Py_VISIT(Py_TYPE(o));
  for (Py_ssize_t i = 0; i < self->count; i++) Py_VISIT(self->cores[i]);
  return 0;
}

static void hierarchy_dealloc(PyObject *o) {
  HierarchyCore *self = (HierarchyCore *)o;
  PyObject_GC_UnTrack(o);
  for (Py_ssize_t i = 0; i < self->count; i++) {
    Py_DECREF(self->cores[i]);
    Py_DECREF(self->levels[i]);
  }
  Py_XDECREF(self->name);
  end_derived(o);
}

static PyMethodDef hierarchy_methods[] = {
    {"acquire", FAST(hierarchy_acquire), FLAGS,
     "acquire(keys, cost=1)\n--\n\nCharge every level that `keys` names, if every limit of each has "
     "room; consume nothing otherwise. keys: a tuple with one key for each level, outermost first, "
     "or of the first levels only; or a mapping from level to key. cost: an int, or one from level "
     "to cost, each as of RateLimiter; a level that it leaves out costs 1. Returns a Decision, true "
     "when admitted; its `level` says which level denied."},
    {"peek", FAST(hierarchy_peek), FLAGS,
     "peek(keys, cost=1)\n--\n\nWhat acquire() would answer now. Charges nothing."},
    {"charge", FAST(hierarchy_charge), FLAGS,
     "charge(keys, cost)\n--\n\nCharge all levels without a check, for example when the actual cost "
     "is known. Keys may go into debt: they are denied until that is paid. Returns the Decision "
     "after it."},
    {"refund", FAST(hierarchy_refund), FLAGS,
     "refund(keys, cost)\n--\n\nGive back tokens that were charged, in each level at most all that "
     "is consumed."},
    {"is_allowed", hierarchy_is_allowed, METH_O,
     "is_allowed(keys)\n--\n\nacquire(keys) as a bool."},
    {"_paths", hierarchy_paths, METH_O, NULL},
    {"_remaining", hierarchy_remaining, METH_O, NULL},
    {"_joined", hierarchy_joined, METH_VARARGS, NULL},
    {"_bind", hierarchy_bind, METH_VARARGS, NULL},
    {"_measure", hierarchy_measure, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL}};

static PyType_Slot hierarchy_slots[] = {{Py_tp_dealloc, (void *)hierarchy_dealloc},
                                        {Py_tp_traverse, (void *)hierarchy_traverse},
                                        {Py_tp_methods, hierarchy_methods},
                                        {Py_tp_doc, DOC("Native base of HierarchyLimiter.")},
                                        {0, NULL}};
