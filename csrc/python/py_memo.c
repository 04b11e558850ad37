/* py_memo.c - Memo: a function that counts tokens, with the segment's memo in front. Limited API 3.10.
 *
 * memo(text) is compute(text) for one encoding, but a text that any process has counted takes only a hash. With a
 * tenant: a text that any process has counted for this tenant. An object that is not a plain str (a subclass may
 * differ from its UTF-8), or a str without UTF-8 (lone surrogates), goes to compute as it is.
 *
 * With a vocabulary, that counts every str, and compute only what it is not wanted for. It takes less for a short text
 * than a line of the memo that is not in the processor's cache: such a text is not remembered. DESIGN.md, "Which texts
 * are remembered".
 */
#include "py_args.h"
#include "py_measure.h"

#define REPORT_EVERY 64 /* hits and misses are added to the shared sums in batches of so many */
#define ASK_EVERY 32 /* `enabled` is asked once in so many calls */
#define LONG_TEXT 65536 /* bytes; hashing takes 30 us, so other threads run meanwhile */
#define LEAST_REMEMBERED 256 /* bytes, where a vocabulary counts */

typedef struct {
  PyObject_HEAD
  fshm_segment *segment;
  PyObject *owner; /* keeps the segment open until we are freed and our counts are reported */
  uint64_t encoding;
  PyObject *compute; /* NULL: __init__ was not called */
  PyObject *vocabulary; /* NULL, or counts in place of compute */
  PyObject *enabled; /* NULL, or says whether to use the memo and the vocabulary */
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

/* The UTF-8 of a text. To be released: k->held. 0, without an exception: the memo cannot have this text. */
static int memo_text(const Memo *self, PyObject *text, key_arg *k) {
  int failed = self->vocabulary             ? get_utf8(text, k)
               : PyUnicode_CheckExact(text) ? get_strict_utf8(text, k)
                                            : -1;
  if (failed) PyErr_Clear();
  return !failed;
}

static int64_t memo_known(const Memo *self, uint64_t encoding, const key_arg *k, uint64_t hash[2]) {
  if (k->length < LONG_TEXT) {
    fshm_memo_hash(self->segment, encoding, k->bytes, (uint64_t)k->length, hash);
  } else {
    Py_BEGIN_ALLOW_THREADS fshm_memo_hash(self->segment, encoding, k->bytes, (uint64_t)k->length,
                                          hash);
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

/* Returns a new reference; *count: the count if it can be stored, else negative. */
static PyObject *memo_compute(const Memo *self, PyObject *text, const key_arg *k,
                              long long *count) {
  if (self->vocabulary) {
    *count = count_bytes((Vocabulary *)self->vocabulary, k, UINT64_MAX);
    return no_memory(*count) ? NULL : PyLong_FromLongLong(*count);
  }
  PyObject *found = PyObject_CallFunctionObjArgs(self->compute, text, NULL);
  *count = -1;
  if (found && PyLong_CheckExact(found)) *count = PyLong_AsLongLong(found);
  if (found) PyErr_Clear(); /* a number beyond 63 bits is not stored */
  return found;
}

static PyObject *remembered(Memo *self, PyObject *text, const key_arg *k, uint64_t encoding) {
  uint64_t hash[2];
  long long count;
  int64_t known = memo_known(self, encoding, k, hash);
  if (known >= 0) {
    count_one(self, &self->hits);
    return PyLong_FromLongLong(known);
  }
  PyObject *counted = memo_compute(self, text, k, &count);
  count_one(self, &self->misses);
  if (counted && count >= 0) fshm_memo_keep(self->segment, hash, (uint64_t)count);
  return counted;
}

static PyObject *count_text(Memo *self, PyObject *text, uint64_t encoding) {
  key_arg k;
  long long count;
  int on = memo_enabled(self);
  if (on < 0) return NULL;
  if (!on || !memo_text(self, text, &k))
    return PyObject_CallFunctionObjArgs(self->compute, text, NULL);
  uint64_t begun;
  PyObject *counted = NULL;
  if (measure_begin(&self->measure, &begun)) goto end;
  counted = self->vocabulary && k.length < LEAST_REMEMBERED ? memo_compute(self, text, &k, &count)
                                                            : remembered(self, text, &k, encoding);
  if (begun) measure_end(&self->measure, begun, counted != NULL, (uint64_t)k.length);
end:
  Py_XDECREF(k.held);
  return counted;
}

static PyObject *memo_count(PyObject *o, PyObject *text) {
  Memo *self = (Memo *)o;
  return memo_ready(self) ? count_text(self, text, self->encoding) : NULL;
}

static PyObject *memo_count_for(PyObject *o, PyObject *const *args, Py_ssize_t n) {
  Memo *self = (Memo *)o;
  uint64_t encoding;
  if (!memo_ready(self) || count_args("count_for", n, 2) || memo_encoding(self, args[1], &encoding))
    return NULL;
  return count_text(self, args[0], encoding);
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
  PyObject *owner, *compute, *vocabulary = Py_None, *enabled = Py_None;
  if (no_keywords("Memo", kwargs) ||
      !PyArg_ParseTuple(args, "OKKO|iKOO", &owner, &segment, &encoding, &compute, &metric, &every,
                        &vocabulary, &enabled))
    return -1;
  if (vocabulary != Py_None && Py_TYPE(vocabulary) != vocabulary_type)
    return fail(PyExc_TypeError, "vocabulary must be a Vocabulary or None, not %R", vocabulary);
  if (self->compute) /* a call may be inside it */
    return fail(PyExc_RuntimeError, "a memo is made once");
  self->owner = Py_NewRef(owner);
  self->compute = Py_NewRef(compute);
  self->vocabulary = Py_XNewRef(vocabulary == Py_None ? NULL : vocabulary);
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
  Py_VISIT(self->enabled);
  Py_VISIT(self->owner);
  return 0;
}

static void memo_dealloc(PyObject *o) {
  Memo *self = (Memo *)o;
  PyObject_GC_UnTrack(o);
  if (self->compute && (self->hits || self->misses)) report_counts(self);
  Py_XDECREF(self->compute);
  Py_XDECREF(self->vocabulary);
  Py_XDECREF(self->enabled);
  Py_XDECREF(self->owner); /* last: it keeps the segment open */
  end_derived(o);
}

static PyMethodDef memo_methods[] = {
    {"count", memo_count, METH_O, "count(text)\n--\n\nThe count: remembered, else computed."},
    {"count_for", FAST(memo_count_for), METH_FASTCALL,
     "count_for(text, tenant)\n--\n\nThe count: remembered for this tenant, else computed."},
    {NULL, NULL, 0, NULL}};

static PyType_Slot memo_slots[] = {{Py_tp_init, (void *)memo_init},
                                   {Py_tp_dealloc, (void *)memo_dealloc},
                                   {Py_tp_call, (void *)memo_call},
                                   {Py_tp_methods, memo_methods},
                                   {Py_tp_new, (void *)PyType_GenericNew},
                                   {Py_tp_traverse, (void *)memo_traverse},
                                   {0, NULL}};
