/* py_router.c - RouterCore: picks a deployment. Limited API 3.10.
 *
 * _plan() of the Python subclass reads a list of deployments (which ones fit the model, the index of their
 * statistics, weights, prices, names). The result, a plan, is kept here for PLAN_NS. A plan is used for an equal
 * model and a list of the same objects, or of dicts that have the same in all that the plan was made of. A change
 * inside the objects is noticed when the next plan is made.
 */
#include "py_args.h"
#include "py_measure.h"

#define PLANS 8 /* plans kept; a router has a few models */
#define PLAN_NS UINT64_C(100000000)
#define FEW 4 /* blocked names that are compared one by one */

enum { WEIGHTS = 3, PRICES = 2, FIELDS = 2 * PRICES };

/* What a plan was made of, of one deployment; new references, or NULL where it has none. name: its exact str; NULL:
 * the deployment can be compared by its address alone. */
typedef struct {
  PyObject *name; /* model_name; alone, where the deployment is of another model */
  PyObject *params, *info; /* the dicts themselves: theirs is the rest */
  PyObject *model, *id;
  PyObject *fields[FIELDS]; /* weights; or prices, of params and of info */
} read_deployment;

static PyObject *s_model_name, *s_params, *s_info, *s_model, *s_id, *s_weights[WEIGHTS],
    *s_prices[PRICES];

/* The plan of one list and model. Holds references to all objects that it compares by address. A call holds the plan
 * that it uses: comparing names may run any Python, which may replace the plan. */
typedef struct {
  uint32_t users;
  uint64_t made; /* fshm_clock() */
  PyObject *model; /* exact str */
  Py_ssize_t length, count; /* of the list; of candidates */
  PyObject **items; /* [length] */
  read_deployment *read; /* [length] */
  int deciding; /* how many of the weights decide */
  Py_ssize_t *at; /* [count] in the list */
  uint32_t *deployments; /* [count] fshm_deployment_open() */
  double *weights, *prices; /* [count] */
  PyObject **names; /* [count] tuples of str: names by which it may be blocked */
  unsigned char *blocked; /* [count] room for a call */
  fshm_deployment_info *found; /* [count] room for a look */
} plan_of_list;

typedef struct {
  PyObject_HEAD
  fshm_segment *segment; /* set once, by _set() */
  PyObject *handle; /* owns it, until we are freed */
  uint32_t strategy, next;
  uint64_t random; /* state of splitmix64 */
  measure_t measure;
  plan_of_list *plans[PLANS];
} RouterCore;

static void forget_read(read_deployment *r) {
  Py_XDECREF(r->name);
  Py_XDECREF(r->params);
  Py_XDECREF(r->info);
  Py_XDECREF(r->model);
  Py_XDECREF(r->id);
  for (int i = 0; i < FIELDS; i++) Py_XDECREF(r->fields[i]);
  *r = (read_deployment){0};
}

static void plan_free(plan_of_list *p) {
  for (Py_ssize_t i = 0; i < p->length; i++) {
    Py_XDECREF(p->items[i]);
    forget_read(&p->read[i]);
  }
  for (Py_ssize_t i = 0; i < p->count; i++) Py_XDECREF(p->names[i]);
  Py_XDECREF(p->model);
  free(p);
}

/* A plan without contents. Its arrays follow it in the same allocation, those of 8-byte words first. */
static plan_of_list *plan_room(size_t length, size_t count) {
  plan_of_list *p;
  const size_t candidate = sizeof(PyObject *) + sizeof *p->found + sizeof *p->at +
                           sizeof *p->weights + sizeof *p->prices + sizeof *p->deployments +
                           sizeof *p->blocked;
  p = calloc(1, sizeof *p + length * (sizeof *p->read + sizeof(PyObject *)) + count * candidate);
  if (!p) return (void *)PyErr_NoMemory();
  p->users = 1;
  p->read = (read_deployment *)(p + 1);
  p->items = (PyObject **)(p->read + length);
  p->names = p->items + length;
  p->found = (fshm_deployment_info *)(p->names + count);
  p->at = (Py_ssize_t *)(p->found + count);
  p->weights = (double *)(p->at + count);
  p->prices = p->weights + count;
  p->deployments = (uint32_t *)(p->prices + count);
  p->blocked = (unsigned char *)(p->deployments + count);
  return p;
}

/* Of objects whose comparison runs no Python. */
static int is_same(PyObject *a, PyObject *b) {
  if (a == b) return 1;
  if (!a || !b || Py_TYPE(a) != Py_TYPE(b)) return 0;
  if (PyUnicode_CheckExact(a)) return !PyUnicode_Compare(a, b);
  return (PyLong_CheckExact(a) || PyFloat_CheckExact(a)) && PyObject_RichCompareBool(a, b, Py_EQ);
}

/* Is dict[key] the same value? */
static int has_same(PyObject *dict, PyObject *key, PyObject *value) {
  PyObject *found = dict_get(dict, key);
  int same = is_same(found, value);
  Py_XDECREF(found);
  return same;
}

/* dict[key] as an exact str, a new reference. NULL: it is none. */
static PyObject *text_of(PyObject *dict, PyObject *key) {
  PyObject *found = dict_get(dict, key);
  if (found && PyUnicode_CheckExact(found)) return found;
  Py_XDECREF(found);
  return NULL;
}

static PyObject *dict_of(PyObject *dict, PyObject *key) {
  PyObject *found = dict_get(dict, key);
  if (found && PyDict_CheckExact(found)) return found;
  Py_XDECREF(found);
  return NULL;
}

/* The fields that the strategy reads. */
static void read_fields(uint32_t strategy, read_deployment *r) {
  if (strategy == FSHM_ROUTE_SHUFFLE)
    for (int i = 0; i < WEIGHTS; i++) r->fields[i] = dict_get(r->params, s_weights[i]);
  if (strategy == FSHM_ROUTE_COST) {
    for (int i = 0; i < PRICES; i++) r->fields[i] = dict_get(r->params, s_prices[i]);
    for (int i = 0; i < PRICES && r->info; i++)
      r->fields[PRICES + i] = dict_get(r->info, s_prices[i]);
  }
}

/* Read a deployment for a later has_read(). What has an id is known by it; what has none, by all its parameters. */
static void read_one(uint32_t strategy, PyObject *model, PyObject *item, read_deployment *r) {
  if (!PyDict_CheckExact(item) || !(r->name = text_of(item, s_model_name))) return;
  if (!is_same(r->name, model)) return;
  r->params = dict_of(item, s_params);
  r->info = dict_of(item, s_info);
  r->id = r->info ? text_of(r->info, s_id) : NULL;
  r->model = r->params ? text_of(r->params, s_model) : NULL;
  if (!r->model || !r->id)
    forget_read(r);
  else
    read_fields(strategy, r);
}

/* How many of the weights decide: all up to the first one that a deployment has. */
static int deciding_weights(const plan_of_list *p) {
  for (int n = 0; n < WEIGHTS; n++)
    for (Py_ssize_t i = 0; i < p->length; i++) {
      PyObject *weight = p->read[i].fields[n];
      if (weight && (PyLong_CheckExact(weight) || PyFloat_CheckExact(weight)) &&
          PyObject_IsTrue(weight) > 0)
        return n + 1;
    }
  return WEIGHTS;
}

/* Would the plan be the same with this deployment in place of the one that was read? blocked: its names matter. */
static int has_read(const plan_of_list *p, uint32_t strategy, const read_deployment *r,
                    PyObject *item, int blocked) {
  if (!r->name || !PyDict_CheckExact(item) || !has_same(item, s_model_name, r->name)) return 0;
  if (!r->id) return 1; /* of another model */
  PyObject *params = dict_of(item, s_params), *info = dict_of(item, s_info);
  int same = params && info;
  if (same && params != r->params) {
    const int weights = strategy == FSHM_ROUTE_SHUFFLE ? p->deciding : 0;
    const int prices = strategy == FSHM_ROUTE_COST ? PRICES : 0;
    if (blocked) same = has_same(params, s_model, r->model);
    for (int i = 0; i < weights && same; i++) same = has_same(params, s_weights[i], r->fields[i]);
    for (int i = 0; i < prices && same; i++) same = has_same(params, s_prices[i], r->fields[i]);
  }
  if (same && info != r->info) {
    int prices = strategy == FSHM_ROUTE_COST ? PRICES : 0;
    same = has_same(info, s_id, r->id);
    if (prices && same && PyDict_Size(info) == 1) { /* the id alone: it has no prices */
      same = !r->fields[PRICES] && !r->fields[PRICES + 1];
      prices = 0;
    }
    for (int i = 0; i < prices && same; i++)
      same = has_same(info, s_prices[i], r->fields[PRICES + i]);
  }
  Py_XDECREF(params);
  Py_XDECREF(info);
  return same;
}

/* rows: list or tuple of (position, place, weight, price, names) */
static plan_of_list *plan_of(uint32_t strategy, PyObject *list, PyObject *model, PyObject *rows) {
  Py_ssize_t length = PyList_Size(list), count = PySequence_Size(rows);
  plan_of_list *p = length < 0 || count < 0 ? NULL : plan_room((size_t)length, (size_t)count);
  if (!p) return NULL;
  for (Py_ssize_t i = 0; i < length; i++) {
    p->items[i] = PyList_GetItem(list, i);
    Py_XINCREF(p->items[i]);
    p->length = i + 1;
    read_one(strategy, model, p->items[i], &p->read[i]);
    PyErr_Clear(); /* of a key that cannot be compared */
  }
  p->deciding = deciding_weights(p);
  p->model = Py_NewRef(model);
  for (Py_ssize_t i = 0; i < count; i++) {
    PyObject *row = PySequence_GetItem(rows, i), *names = NULL;
    int ok = row && PyTuple_Check(row) &&
             PyArg_ParseTuple(row, "nIddO!", &p->at[i], &p->deployments[i], &p->weights[i],
                              &p->prices[i], &PyTuple_Type, &names);
    Py_XINCREF(names);
    p->names[i] = names;
    p->count = i + 1;
    Py_XDECREF(row);
    if (ok && p->at[i] >= 0 && p->at[i] < length) continue;
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "_plan() gave a wrong row");
    plan_free(p);
    return NULL;
  }
  return p;
}

/* Is it a plan of such a list? */
static int plan_may_fit(const plan_of_list *p, PyObject *model, Py_ssize_t length, uint64_t now) {
  if (!p || p->length != length || now - p->made > PLAN_NS) return 0;
  return p->model == model || !PyUnicode_Compare(p->model, model);
}

/* The deployment at this place of the list, a new reference. NULL, without an exception: it is not the plan's, or a key
 * cannot be compared. */
static PyObject *item_of_plan(const plan_of_list *p, uint32_t strategy, PyObject *list,
                              Py_ssize_t at, int blocked) {
  PyObject *item = list_get(list, at); /* NULL: the list has got shorter */
  if (item && (item == p->items[at] || has_read(p, strategy, &p->read[at], item, blocked)) &&
      !PyErr_Occurred())
    return item;
  PyErr_Clear();
  Py_XDECREF(item);
  return NULL;
}

static int plan_fits(const plan_of_list *p, uint32_t strategy, PyObject *list, int blocked) {
  for (Py_ssize_t i = 0; i < p->length; i++) {
    PyObject *item = item_of_plan(p, strategy, list, i, blocked);
    Py_XDECREF(item);
    if (!item) return 0;
  }
  return 1;
}

/* splitmix64, with the time mixed in, so that forked workers do not pick in step. */
static uint64_t random_bits(RouterCore *self, uint64_t now) {
  uint64_t x = self->random += UINT64_C(0x9e3779b97f4a7c15) ^ now;
  x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
  x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
  return x ^ x >> 31;
}

/* Mark the blocked deployments. blocked: a list, or a frozenset of the same. */
static int mark_blocked(plan_of_list *p, PyObject *blocked) {
  for (Py_ssize_t i = 0; i < p->count; i++) {
    int found = 0;
    for (Py_ssize_t n = 0; n < PyTuple_Size(p->names[i]) && !found; n++)
      found = PySequence_Contains(blocked, PyTuple_GetItem(p->names[i], n));
    if (found < 0) return -1;
    p->blocked[i] = (unsigned char)found;
  }
  return 0;
}

static void plan_done(RouterCore *self, plan_of_list *p) {
  int last;
  if (!p) return;
  ALONE_BEGIN(self);
  last = !--p->users;
  ALONE_END();
  if (last) plan_free(p); /* which may run any Python */
}

/* The place in the list of the one picked; -1: there is none; below: an exception. */
static Py_ssize_t pick(RouterCore *self, plan_of_list *p, PyObject *blocked, uint64_t now) {
  if (blocked && mark_blocked(p, blocked)) return -2;
  int64_t best = fshm_deployment_pick(self->segment, self->strategy, p->deployments, p->weights,
                                      p->prices, blocked ? p->blocked : NULL, (uint32_t)p->count,
                                      random_bits(self, now), p->found);
  return best < 0 ? -1 : p->at[best];
}

/* Are they plans of the same deployments, as far as pointers and ids say? */
static int plan_replaces(const plan_of_list *p, const plan_of_list *old) {
  for (Py_ssize_t i = 0; i < p->length; i++) {
    const read_deployment *a = &p->read[i], *b = &old->read[i];
    if (p->items[i] == old->items[i] ||
        (a->name && is_same(a->name, b->name) && is_same(a->id, b->id)))
      continue;
    return 0;
  }
  return 1;
}

/* Have Python make a plan; the caller is its first user. NULL without an error: routing is switched off. The plan of
 * a list is kept; that of a tuple is for this call. */
static plan_of_list *make_plan(RouterCore *self, PyObject *list, PyObject *model, uint64_t now) {
  PyObject *rows = PyObject_CallMethod((PyObject *)self, "_plan", "OO", list, model);
  plan_of_list *p = NULL;
  if (rows && rows != Py_None) p = plan_of(self->strategy, list, model, rows);
  if (p && PyList_Check(rows)) {
    plan_of_list *old;
    ALONE_BEGIN(self);
    plan_of_list **kept = &self->plans[self->next++ % PLANS];
    for (int i = 0; i < PLANS; i++) /* preferably the plan that this one replaces */
      if (self->plans[i] && plan_may_fit(self->plans[i], model, p->length, self->plans[i]->made) &&
          plan_replaces(p, self->plans[i]))
        kept = &self->plans[i];
    old = *kept;
    p->made = now;
    p->users++;
    *kept = p;
    ALONE_END();
    plan_done(self, old);
  }
  Py_XDECREF(rows);
  return p;
}

/* The names as a list or frozenset of exact strs, whose comparison runs no Python: two threads share the plan's
 * room. *out NULL: there are none. */
static int get_blocked(PyObject *given, PyObject **out) {
  *out = NULL;
  if (!given || given == Py_None) return 0;
  PyObject *list = PyUnicode_Check(given) || PyBytes_Check(given) ? NULL : PySequence_List(given);
  if (!list) return fail(PyExc_TypeError, "blocked_models must be a list of names, not %R", given);
  Py_ssize_t count = PyList_Size(list);
  for (Py_ssize_t i = 0; i < count; i++) {
    PyObject *name = PyList_GetItem(list, i), *exact = NULL;
    if (PyUnicode_CheckExact(name)) continue;
    if (PyUnicode_Check(name))
      exact = PyUnicode_FromObject(name);
    else
      PyErr_Format(PyExc_TypeError, "blocked_models[%zd] must be a str, not %R", i, name);
    if (exact && !PyList_SetItem(list, i, exact)) continue;
    Py_DECREF(list);
    return -1;
  }
  *out = count > FEW ? PyFrozenSet_New(list) : count ? list : NULL;
  if (*out != list) Py_DECREF(list);
  return count > FEW && !*out ? -1 : 0;
}

/* A kept plan of this list, with the caller as a user. */
static plan_of_list *kept_plan(RouterCore *self, PyObject *list, PyObject *model, int blocked,
                               uint64_t now) {
  Py_ssize_t length = PyList_Size(list);
  for (int i = 0; i < PLANS; i++) {
    plan_of_list *p;
    ALONE_BEGIN(self);
    p = plan_may_fit(self->plans[i], model, length, now) ? self->plans[i] : NULL;
    if (p) p->users++;
    ALONE_END();
    if (p && plan_fits(p, self->strategy, list, blocked)) return p;
    plan_done(self, p);
  }
  return NULL;
}

static Py_ssize_t pick_alone(RouterCore *self, plan_of_list *p, PyObject *blocked, uint64_t now) {
  Py_ssize_t at;
  ALONE_BEGIN(self);
  at = pick(self, p, blocked, now);
  ALONE_END();
  return at;
}

/* By a plan that is made now, of a copy of the list: no other thread can change that. */
static PyObject *route_anew(RouterCore *self, PyObject *list, PyObject *model, PyObject *blocked,
                            uint64_t now) {
  PyObject *copy = PyList_GetSlice(list, 0, PY_SSIZE_T_MAX), *picked = NULL;
  plan_of_list *p = copy ? make_plan(self, copy, model, now) : NULL;
  if (p) {
    Py_ssize_t at = pick_alone(self, p, blocked, now);
    if (at >= -1) picked = at < 0 ? Py_NewRef(Py_None) : list_get(copy, at);
    plan_done(self, p);
  } else if (copy && !PyErr_Occurred()) {
    picked = PyObject_CallMethod((PyObject *)self, "_plain", "OOO", copy, model,
                                 blocked ? blocked : Py_None);
  }
  Py_XDECREF(copy);
  return picked;
}

static PyObject *route(RouterCore *self, PyObject *list, PyObject *model, PyObject *blocked) {
  uint64_t now = fshm_clock();
  plan_of_list *p = kept_plan(self, list, model, blocked != NULL, now);
  if (!p) return route_anew(self, list, model, blocked, now);
  Py_ssize_t at = pick_alone(self, p, blocked, now);
  PyObject *picked = NULL;
  if (at == -1) picked = Py_NewRef(Py_None);
  /* The caller's own list may have changed since it was compared: another thread, or what compares keys. */
  if (at >= 0) picked = item_of_plan(p, self->strategy, list, at, blocked != NULL);
  plan_done(self, p);
  return picked || at < 0 ? picked : route_anew(self, list, model, blocked, now);
}

static const char *const pick_names[] = {"model_list", "model", "blocked_models"};

static PyObject *router_pick(PyObject *o, PyObject *const *args, Py_ssize_t n, PyObject *kwnames) {
  RouterCore *self = (RouterCore *)o;
  PyObject *in[3] = {NULL}, *blocked;
  if (parse("get_available_deployment", args, n, kwnames, pick_names, in, 3, 2)) return NULL;
  if (!self->segment)
    return PyErr_Format(PyExc_RuntimeError, "the router's __init__ was not called");
  if (!PyUnicode_Check(in[1]))
    return PyErr_Format(PyExc_TypeError, "model must be a str, not %R", in[1]);
  uint64_t begun;
  if (measure_begin(&self->measure, &begun)) return NULL;
  int odd = PyUnicode_Check(in[0]) || PyBytes_Check(in[0]) || PyDict_Check(in[0]);
  PyObject *list = odd ? NULL : in[0], *model = PyUnicode_FromObject(in[1]); /* an exact str */
  if (list && PyList_CheckExact(list))
    Py_INCREF(list);
  else if (list)
    list = PySequence_List(list);
  if (!list)
    PyErr_Format(PyExc_TypeError, "model_list must be a list of deployments, not %R", in[0]);
  PyObject *picked = NULL;
  if (list && model && !get_blocked(in[2], &blocked)) {
    picked = route(self, list, model, blocked);
    Py_XDECREF(blocked);
  }
  Py_XDECREF(list);
  Py_XDECREF(model);
  if (begun) measure_end(&self->measure, begun, picked != NULL, 0);
  return picked;
}

/* _set(handle, segment, strategy, seed, metric, every). handle: the owner of the segment. */
static PyObject *router_set(PyObject *o, PyObject *args) {
  RouterCore *self = (RouterCore *)o;
  unsigned long long segment, seed, every;
  unsigned int strategy;
  int metric;
  PyObject *handle;
  if (!PyArg_ParseTuple(args, "OKIKiK", &handle, &segment, &strategy, &seed, &metric, &every))
    return NULL;
  if (self->handle)
    return PyErr_Format(PyExc_RuntimeError, "a router is bound once"); /* a call may be inside it */
  self->handle = Py_NewRef(handle);
  self->strategy = strategy;
  self->segment = (fshm_segment *)(uintptr_t)segment;
  self->random = seed;
  measure_init(&self->measure, self->segment, metric, every);
  Py_RETURN_NONE;
}

static int router_traverse(PyObject *o, visitproc visit, void *arg) {
  Py_VISIT(Py_TYPE(o));
  for (int i = 0; i < PLANS; i++) {
    const plan_of_list *p = ((RouterCore *)o)->plans[i];
    for (Py_ssize_t n = 0; p && n < p->length; n++) {
      Py_VISIT(p->items[n]);
      Py_VISIT(p->read[n].params);
      Py_VISIT(p->read[n].info);
      for (int f = 0; f < FIELDS; f++) Py_VISIT(p->read[n].fields[f]);
    }
    for (Py_ssize_t n = 0; p && n < p->count; n++) Py_VISIT(p->names[n]);
  }
  return 0;
}

static void router_dealloc(PyObject *o) {
  RouterCore *self = (RouterCore *)o;
  PyObject_GC_UnTrack(o);
  for (int i = 0; i < PLANS; i++) plan_done(self, self->plans[i]);
  Py_XDECREF(self->handle);
  end_derived(o);
}

static int make_router_names(void) {
  static const struct {
    PyObject **at;
    const char *text;
  } names[] = {{&s_model_name, "model_name"},
               {&s_params, "litellm_params"},
               {&s_info, "model_info"},
               {&s_model, "model"},
               {&s_id, "id"},
               {&s_weights[0], "weight"},
               {&s_weights[1], "rpm"},
               {&s_weights[2], "tpm"},
               {&s_prices[0], "input_cost_per_token"},
               {&s_prices[1], "output_cost_per_token"}};
  for (size_t i = 0; i < sizeof names / sizeof *names; i++)
    if (!(*names[i].at = PyUnicode_InternFromString(names[i].text))) return -1;
  return 0;
}

static PyMethodDef router_methods[] = {
    {"get_available_deployment", FAST(router_pick), FLAGS,
     "get_available_deployment(model_list, model, blocked_models=None)\n--\n\nOne of the "
     "deployments whose model_name is `model`, by the router's strategy: the very object of the "
     "list. None where there is none, all are blocked, or all cool down after "
     "failures.\n\nblocked_models: names not to use: model_name, litellm_params.model, or "
     "model_info.id. What is changed inside a deployment (its weight, say) is seen within 0.1 s. "
     "Raises TypeError or ValueError that names the deployment's position and the field."},
    {"_set", router_set, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL}};

static PyType_Slot router_slots[] = {{Py_tp_dealloc, (void *)router_dealloc},
                                     {Py_tp_traverse, (void *)router_traverse},
                                     {Py_tp_methods, router_methods},
                                     {Py_tp_new, (void *)PyType_GenericNew},
                                     {Py_tp_doc, DOC("Native base of AdvancedRouter.")},
                                     {0, NULL}};
