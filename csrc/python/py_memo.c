/* py_memo.c - Memo: a function that counts tokens, with the segment's memo in front. Limited API 3.10.
 *
 * memo(text) is compute(text) for one encoding, but a text that any process has counted takes only a hash. With a
 * tenant: a text that any process has counted for this tenant. An object that is not a plain str (a subclass may
 * differ from its UTF-8), or a str without UTF-8 (lone surrogates), goes to compute as it is.
 */
#include "py_args.h"
#include "py_measure.h"

#define REPORT_EVERY 64 /* hits and misses are added to the shared sums in batches of so many */
#define ASK_EVERY 32 /* `enabled` is asked once in so many calls */
#define LONG_TEXT 65536 /* bytes; hashing takes 30 us, so other threads run meanwhile */

typedef struct {
  PyObject_HEAD
  fshm_segment *segment;
  PyObject *owner; /* keeps the segment open until we are freed and our counts are reported */
  uint64_t encoding;
  PyObject *compute; /* NULL: __init__ was not called */
  PyObject *encode; /* NULL, or returns a list for a text with UTF-8; its length is the count */
  PyObject *enabled; /* NULL, or says whether to use the memo */
  int off; /* its last answer */
  uint32_t asked; /* calls until the next question */
  uint32_t hits, misses; /* not reported yet */
  measure_t measure;
} Memo;

static void report_counts(Memo *self) {
  fshm_memo_count(self->segment, __atomic_exchange_n(&self->hits, 0, __ATOMIC_RELAXED),
                  __atomic_exchange_n(&self->misses, 0, __ATOMIC_RELAXED));
}

/* NOLINTNEXTLINE(readability-non-const-parameter): it is stored to */
static void count_one(Memo *self, uint32_t *which) {
  uint32_t now = RELAXED_GET(*which) + 1; /* of two concurrent threads one may go uncounted */
  RELAXED_SET(*which, now);
  if (now >= REPORT_EVERY) report_counts(self);
}

static int memo_ready(const Memo *self) {
  if (!self->compute) PyErr_SetString(PyExc_RuntimeError, "the memo's __init__ was not called");
  return self->compute != NULL;
}

/* The UTF-8 (cached in the str). NULL, without an exception: the memo cannot have this text. */
static const char *memo_bytes(PyObject *text, Py_ssize_t *length) {
  const char *bytes = PyUnicode_CheckExact(text) ? PyUnicode_AsUTF8AndSize(text, length) : NULL;
  if (!bytes) PyErr_Clear();
  return bytes;
}

static int64_t memo_known(const Memo *self, uint64_t encoding, const char *bytes, Py_ssize_t length,
                          uint64_t hash[2]) {
  if (length < LONG_TEXT) {
    fshm_memo_hash(self->segment, encoding, bytes, (uint64_t)length, hash);
  } else {
    Py_BEGIN_ALLOW_THREADS fshm_memo_hash(self->segment, encoding, bytes, (uint64_t)length, hash);
    Py_END_ALLOW_THREADS
  }
  return fshm_memo_known(self->segment, hash);
}

/* The number of the encoding for a tenant. None, or NULL: for all callers without a tenant. */
static int memo_encoding(const Memo *self, PyObject *tenant, uint64_t *encoding) {
  key_arg k;
  *encoding = self->encoding;
  if (!tenant || tenant == Py_None) return 0;
  if (!PyUnicode_Check(tenant) && !PyBytes_Check(tenant))
    return fail(PyExc_TypeError, "tenant must be a str, bytes or None, not %R", tenant);
  if (get_key(tenant, &k)) return -1;
  *encoding = fshm_memo_tenant(self->segment, self->encoding, k.bytes, (uint64_t)k.length);
  Py_XDECREF(k.held);
  return 0;
}

/* 1 or 0; -1: it raised. */
static int memo_enabled(Memo *self) {
  if (!self->enabled) return 1;
  uint32_t asked = RELAXED_GET(self->asked);
  RELAXED_SET(self->asked, asked ? asked - 1 : 0);
  if (!asked) {
    PyObject *answer = PyObject_CallFunctionObjArgs(self->enabled, NULL);
    int on = answer ? PyObject_IsTrue(answer) : -1;
    Py_XDECREF(answer);
    RELAXED_SET(self->asked, on < 0 ? 0 : ASK_EVERY - 1);
    if (on < 0) return -1;
    RELAXED_SET(self->off, !on);
  }
  return !RELAXED_GET(self->off);
}

/* Returns a new reference; *count: the count if it can be stored, else -1. */
static PyObject *memo_compute(const Memo *self, PyObject *text, long long *count) {
  PyObject *found =
      PyObject_CallFunctionObjArgs(self->encode ? self->encode : self->compute, text, NULL);
  *count = -1;
  if (!found) return NULL;
  if (self->encode) {
    *count = PyList_Size(found); /* raises if it is not a list */
    Py_DECREF(found);
    return *count < 0 ? NULL : PyLong_FromLongLong(*count);
  }
  if (PyLong_CheckExact(found)) *count = PyLong_AsLongLong(found);
  PyErr_Clear(); /* a number beyond 63 bits is not stored */
  return found;
}

static PyObject *count_text(Memo *self, PyObject *text, uint64_t encoding) {
  Py_ssize_t length = 0;
  uint64_t hash[2];
  long long count;
  int on = memo_enabled(self);
  const char *bytes = on > 0 ? memo_bytes(text, &length) : NULL;
  if (!bytes) return on < 0 ? NULL : PyObject_CallFunctionObjArgs(self->compute, text, NULL);
  uint64_t begun = measure_begin(&self->measure);
  int64_t known = memo_known(self, encoding, bytes, length, hash);
  if (known >= 0) {
    count_one(self, &self->hits);
    if (begun) measure_end(&self->measure, begun, 1, (uint64_t)length);
    return PyLong_FromLongLong(known);
  }
  PyObject *counted = memo_compute(self, text, &count);
  count_one(self, &self->misses);
  if (begun) measure_end(&self->measure, begun, counted != NULL, (uint64_t)length);
  if (counted && count >= 0) fshm_memo_keep(self->segment, hash, (uint64_t)count);
  return counted;
}

static PyObject *memo_count(PyObject *o, PyObject *text) {
  Memo *self = (Memo *)o;
  return memo_ready(self) ? count_text(self, text, self->encoding) : NULL;
}

/* (text, tenant): the tenant's encoding, or -1. */
static int memo_pair(const Memo *self, const char *name, PyObject *const *args, Py_ssize_t n,
                     uint64_t *encoding) {
  if (!memo_ready(self) || count_args(name, n, 2)) return -1;
  return memo_encoding(self, args[1], encoding);
}

static PyObject *memo_count_for(PyObject *o, PyObject *const *args, Py_ssize_t n) {
  Memo *self = (Memo *)o;
  uint64_t encoding;
  if (memo_pair(self, "count_for", args, n, &encoding)) return NULL;
  return count_text(self, args[0], encoding);
}

/* For callers that count many texts: the count if it is known, or None. */
static PyObject *get_text(Memo *self, PyObject *text, uint64_t encoding) {
  Py_ssize_t length;
  uint64_t hash[2];
  const char *bytes = memo_bytes(text, &length);
  int64_t known = bytes ? memo_known(self, encoding, bytes, length, hash) : -1;
  if (known < 0) Py_RETURN_NONE;
  count_one(self, &self->hits);
  return PyLong_FromLongLong(known);
}

static PyObject *memo_get(PyObject *o, PyObject *text) {
  Memo *self = (Memo *)o;
  return memo_ready(self) ? get_text(self, text, self->encoding) : NULL;
}

static PyObject *memo_get_for(PyObject *o, PyObject *const *args, Py_ssize_t n) {
  Memo *self = (Memo *)o;
  uint64_t encoding;
  if (memo_pair(self, "get_for", args, n, &encoding)) return NULL;
  return get_text(self, args[0], encoding);
}

/* For a text that memo_get() did not know. */
static PyObject *memo_put(PyObject *o, PyObject *args) {
  Memo *self = (Memo *)o;
  PyObject *text, *tenant = NULL;
  Py_ssize_t length;
  long long count;
  uint64_t encoding;
  if (!PyArg_ParseTuple(args, "UL|O", &text, &count, &tenant) || !memo_ready(self)) return NULL;
  if (count < 0) return PyErr_Format(PyExc_ValueError, "count must be 0 or more, not %lld", count);
  if (memo_encoding(self, tenant, &encoding)) return NULL;
  const char *bytes = memo_bytes(text, &length);
  if (bytes) {
    fshm_memo_put(self->segment, encoding, bytes, (uint64_t)length, (uint64_t)count);
    count_one(self, &self->misses);
  }
  Py_RETURN_NONE;
}

static PyObject *memo_call(PyObject *o, PyObject *args, PyObject *kwargs) {
  static char text_name[] = "text";
  static char *names[] = {text_name, NULL};
  PyObject *text;
  return PyArg_ParseTupleAndKeywords(args, kwargs, "O", names, &text) ? memo_count(o, text) : NULL;
}

static int memo_init(PyObject *o, PyObject *args, PyObject *kwargs) {
  Memo *self = (Memo *)o;
  unsigned long long segment, encoding, every = 0;
  int metric = -1;
  PyObject *owner, *compute, *encode = Py_None, *enabled = Py_None;
  if (no_keywords("Memo", kwargs) ||
      !PyArg_ParseTuple(args, "OKKO|iKOO", &owner, &segment, &encoding, &compute, &metric, &every,
                        &encode, &enabled))
    return -1;
  if (self->compute) /* a call may be inside it */
    return fail(PyExc_RuntimeError, "a memo is made once");
  self->owner = Py_NewRef(owner);
  self->compute = Py_NewRef(compute);
  self->encode = Py_XNewRef(encode == Py_None ? NULL : encode);
  self->enabled = Py_XNewRef(enabled == Py_None ? NULL : enabled);
  self->segment = (fshm_segment *)(uintptr_t)segment;
  self->encoding = encoding;
  measure_init(&self->measure, self->segment, metric, every);
  return 0;
}

static int memo_traverse(PyObject *o, visitproc visit, void *arg) {
  Memo *self = (Memo *)o;
  Py_VISIT(Py_TYPE(o));
  Py_VISIT(self->compute);
  Py_VISIT(self->encode);
  Py_VISIT(self->enabled);
  Py_VISIT(self->owner);
  return 0;
}

static void memo_dealloc(PyObject *o) {
  Memo *self = (Memo *)o;
  PyObject_GC_UnTrack(o);
  if (self->compute && (self->hits || self->misses)) report_counts(self);
  Py_XDECREF(self->compute);
  Py_XDECREF(self->encode);
  Py_XDECREF(self->enabled);
  Py_XDECREF(self->owner); /* last: it keeps the segment open */
  end_derived(o);
}

static PyMethodDef memo_methods[] = {
    {"count", memo_count, METH_O, "count(text)\n--\n\nThe count: remembered, else computed."},
    {"count_for", FAST(memo_count_for), METH_FASTCALL,
     "count_for(text, tenant)\n--\n\nThe count: remembered for this tenant, else computed."},
    {"get", memo_get, METH_O, "get(text)\n--\n\nThe count, or None where it is not known."},
    {"get_for", FAST(memo_get_for), METH_FASTCALL,
     "get_for(text, tenant)\n--\n\nThe same, of what is remembered for this tenant."},
    {"put", memo_put, METH_VARARGS, "put(text, count, tenant=None)\n--\n\nRemember a count."},
    {NULL, NULL, 0, NULL}};

static PyType_Slot memo_slots[] = {{Py_tp_init, (void *)memo_init},
                                   {Py_tp_dealloc, (void *)memo_dealloc},
                                   {Py_tp_call, (void *)memo_call},
                                   {Py_tp_methods, memo_methods},
                                   {Py_tp_new, (void *)PyType_GenericNew},
                                   {Py_tp_traverse, (void *)memo_traverse},
                                   {0, NULL}};
