/* py_tokens.c - Vocabulary: counts, encodes, decodes and truncates as tiktoken's encoding of the same tables does.
 * Limited API 3.10.
 *
 * A str of ASCII is read where it lies. Of any other, PyUnicode_AsUTF8AndSize() would leave a second copy in the str
 * for as long as it lives: so its UTF-8 is made in a bytes object that lives as long as the call. Lone surrogates are
 * replaced as tiktoken does.
 */
#include "../tokens/tokens.h"
#include "py_args.h"

#define LONG_WORK 4096 /* bytes, about 20 us: other threads run meanwhile */

typedef struct {
  PyObject_HEAD
  fshm_vocabulary *v;
} Vocabulary;

static PyTypeObject *vocabulary_type;

/* str.isascii() without a call through Python: the limited API has no other way to ask. NULL: not as expected here,
 * so that every str is copied. */
static PyCFunction is_ascii;

static int find_is_ascii(void) {
  PyObject *text = PyUnicode_FromString(""),
           *bound = text ? PyObject_GetAttrString(text, "isascii") : NULL;
  if (bound && PyCFunction_Check(bound) && PyCFunction_GetFlags(bound) == METH_NOARGS)
    is_ascii = PyCFunction_GetFunction(bound);
  Py_XDECREF(bound);
  Py_XDECREF(text);
  return bound ? 0 : -1;
}

static int get_replaced(PyObject *text, key_arg *k) {
  if (!PyErr_ExceptionMatches(PyExc_UnicodeEncodeError)) return -1;
  PyErr_Clear();
  PyObject *wide = PyUnicode_AsEncodedString(text, "utf-16-le", "surrogatepass");
  PyObject *replaced = wide ? PyUnicode_FromEncodedObject(wide, "utf-16-le", "replace") : NULL;
  k->held = replaced ? PyUnicode_AsUTF8String(replaced) : NULL;
  Py_XDECREF(wide);
  Py_XDECREF(replaced);
  return k->held ? get_bytes(k->held, k) : -1;
}

/* The UTF-8 of a str that has one. To be released: k->held. */
static int get_strict_utf8(PyObject *text, key_arg *k) {
  k->held = NULL;
  PyObject *ascii = is_ascii ? is_ascii(text, NULL) : Py_NewRef(Py_False);
  if (!ascii) return -1;
  Py_DECREF(ascii); /* True and False do not go away */
  if (ascii == Py_True) {
    k->bytes = PyUnicode_AsUTF8AndSize(text, &k->length);
    return k->bytes ? 0 : -1;
  }
  k->held = PyUnicode_AsUTF8String(text);
  return k->held ? get_bytes(k->held, k) : -1;
}

/* The same of any str. */
static int get_utf8(PyObject *text, key_arg *k) {
  if (!PyUnicode_Check(text)) return fail(PyExc_TypeError, "text must be a str, not %R", text);
  return get_strict_utf8(text, k) ? get_replaced(text, k) : 0;
}

static int get_most(PyObject *value, uint64_t *out) {
  int overflow = 0;
  long long most = PyLong_AsLongLongAndOverflow(value, &overflow);
  if (most == -1 && PyErr_Occurred()) return -1;
  if (most < 0 && overflow <= 0)
    return fail(PyExc_ValueError, "max_tokens must be 0 or more, not %R", value);
  *out = overflow > 0 ? INT64_MAX : (uint64_t)most;
  return 0;
}

static int no_memory(int64_t result) {
  if (result >= 0) return 0;
  (void)PyErr_NoMemory();
  return -1;
}

static int64_t count_bytes(const Vocabulary *self, const key_arg *k, uint64_t most) {
  int64_t count;
  if (k->length < LONG_WORK) return fshm_tokens_count(self->v, k->bytes, (uint64_t)k->length, most);
  Py_BEGIN_ALLOW_THREADS count = fshm_tokens_count(self->v, k->bytes, (uint64_t)k->length, most);
  Py_END_ALLOW_THREADS return count;
}

/* The tokens of a text, or a number above `most`; -1: it raised. */
static int64_t count_str(const Vocabulary *self, PyObject *text, uint64_t most) {
  key_arg k;
  if (get_utf8(text, &k)) return -1;
  int64_t count = count_bytes(self, &k, most);
  Py_XDECREF(k.held);
  return no_memory(count) ? -1 : count;
}

static PyObject *tokens_count(PyObject *o, PyObject *text) {
  int64_t count = count_str((Vocabulary *)o, text, UINT64_MAX);
  return count < 0 ? NULL : PyLong_FromLongLong(count);
}

static PyObject *tokens_count_batch(PyObject *o, PyObject *texts) {
  if (!PyList_Check(texts))
    return PyErr_Format(PyExc_TypeError, "texts must be a list of str, not %R", texts);
  Py_ssize_t n = PyList_Size(texts);
  PyObject *out = PyList_New(n);
  for (Py_ssize_t i = 0; out && i < n; i++) {
    /* Another thread may shorten the list during a long text. */
    PyObject *text = PySequence_GetItem(texts, i);
    int64_t count = -1;
    if (text && !PyUnicode_Check(text))
      (void)fail(PyExc_TypeError, "texts[%zd] must be a str, not %R", i, text);
    else if (text)
      count = count_str((Vocabulary *)o, text, UINT64_MAX);
    Py_XDECREF(text);
    PyObject *number = count < 0 ? NULL : PyLong_FromLongLong(count);
    if (!number || PyList_SetItem(out, i, number)) Py_CLEAR(out);
  }
  return out;
}

static PyObject *tokens_fits(PyObject *o, PyObject *const *args, Py_ssize_t n) {
  uint64_t most = 0;
  if (count_args("fits", n, 2) || get_most(args[1], &most)) return NULL;
  int64_t count = count_str((Vocabulary *)o, args[0], most);
  return count < 0 ? NULL : PyBool_FromLong((uint64_t)count <= most);
}

static PyObject *tokens_truncate(PyObject *o, PyObject *const *args, Py_ssize_t n) {
  const Vocabulary *self = (Vocabulary *)o;
  uint64_t most = 0;
  key_arg k;
  if (count_args("truncate", n, 2) || get_most(args[1], &most) || get_utf8(args[0], &k))
    return NULL;
  int64_t kept;
  Py_BEGIN_ALLOW_THREADS kept = fshm_tokens_truncate(self->v, k.bytes, (uint64_t)k.length, most);
  Py_END_ALLOW_THREADS PyObject *out = NULL;
  if (!no_memory(kept))
    out = kept == k.length ? Py_NewRef(args[0]) : PyUnicode_DecodeUTF8(k.bytes, kept, "replace");
  Py_XDECREF(k.held);
  return out;
}

static PyObject *list_of(const uint32_t *ranks, int64_t count) {
  PyObject *out = PyList_New(count);
  for (int64_t i = 0; out && i < count; i++) {
    PyObject *rank = PyLong_FromUnsignedLong(ranks[i]);
    if (!rank || PyList_SetItem(out, i, rank)) Py_CLEAR(out);
  }
  return out;
}

static PyObject *tokens_encode(PyObject *o, PyObject *text) {
  const Vocabulary *self = (Vocabulary *)o;
  key_arg k;
  if (get_utf8(text, &k)) return NULL;
  uint32_t *ranks = PyMem_Malloc(((size_t)k.length + 1) * sizeof *ranks);
  int64_t count = -1;
  if (ranks) {
    Py_BEGIN_ALLOW_THREADS count = fshm_tokens_encode(self->v, k.bytes, (uint64_t)k.length, ranks);
    Py_END_ALLOW_THREADS
  }
  PyObject *out = no_memory(count) ? NULL : list_of(ranks, count);
  PyMem_Free(ranks);
  Py_XDECREF(k.held);
  return out;
}

/* The ranks of a list; NULL: it raised, what tiktoken raises. To be freed with PyMem_Free(). */
static uint32_t *get_ranks(PyObject *list, Py_ssize_t n) {
  uint32_t *ranks = PyMem_Malloc(((size_t)n + 1) * sizeof *ranks);
  if (!ranks) (void)PyErr_NoMemory();
  for (Py_ssize_t i = 0; ranks && i < n; i++) {
    PyObject *item = PyList_GetItem(list, i), /* borrowed: the list is ours */
        *number = item ? PyNumber_Index(item) : NULL; /* numpy's integers too */
    unsigned long long rank = number ? PyLong_AsUnsignedLongLong(number) : 0;
    Py_XDECREF(number);
    if (!PyErr_Occurred() && rank <= UINT32_MAX) {
      ranks[i] = (uint32_t)rank;
      continue;
    }
    if (!PyErr_Occurred() || PyErr_ExceptionMatches(PyExc_OverflowError)) {
      PyErr_Clear();
      (void)fail(PyExc_OverflowError, "tokens[%zd] is %R; tokens are numbers from 0 to 2**32 - 1",
                 i, item);
    }
    PyMem_Free(ranks);
    ranks = NULL;
  }
  return ranks;
}

static PyObject *tokens_decode(PyObject *o, PyObject *tokens) {
  const Vocabulary *self = (Vocabulary *)o;
  PyObject *list = PySequence_List(tokens), *out = NULL;
  Py_ssize_t n = list ? PyList_Size(list) : 0;
  uint32_t *ranks = list ? get_ranks(list, n) : NULL;
  if (ranks) {
    uint64_t bad = 0;
    int64_t length = fshm_tokens_decode(self->v, ranks, (uint64_t)n, NULL, 0, &bad);
    if (length < 0)
      (void)fail(PyExc_KeyError, "tokens[%llu] is %u, which is no token of this encoding",
                 (unsigned long long)bad, (unsigned)ranks[bad]);
    else
      out = PyBytes_FromStringAndSize(NULL, length);
    if (out)
      (void)fshm_tokens_decode(self->v, ranks, (uint64_t)n, PyBytes_AsString(out), (uint64_t)length,
                               &bad);
  }
  PyMem_Free(ranks);
  Py_XDECREF(list);
  return out;
}

static PyObject *tokens_special(PyObject *o, UNUSED PyObject *unused) {
  const Vocabulary *self = (Vocabulary *)o;
  PyObject *out = PyDict_New();
  uint32_t rank, length;
  const void *bytes;
  for (uint32_t i = 0;
       out && fshm_vocabulary_special(self->v, i, &rank, &bytes, &length) == FSHM_OK; i++) {
    PyObject *name = PyUnicode_DecodeUTF8(bytes, length, "replace"),
             *number = PyLong_FromUnsignedLong(rank);
    if (!name || !number || PyDict_SetItem(out, name, number)) Py_CLEAR(out);
    Py_XDECREF(name);
    Py_XDECREF(number);
  }
  return out;
}

/* Files ------------------------------------------------------------------------------------- */

/* What went wrong with a file: an OSError of the system, or a ValueError (status, found, wanted). */
static PyObject *file_error(const fshm_error *e, PyObject *path) {
  int system = e->code == FSHM_E_NOT_FOUND || e->code == FSHM_E_SPACE ||
               e->code == FSHM_E_PERMISSION || e->code == FSHM_E_SYSTEM || e->code == FSHM_E_LINK;
  if (e->code == FSHM_E_MEMORY) return PyErr_NoMemory();
  if (system && e->sys_errno) {
    errno = e->sys_errno;
    return PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, path);
  }
  PyObject *values =
      Py_BuildValue("iKK", e->code, (unsigned long long)e->found, (unsigned long long)e->wanted);
  if (values) PyErr_SetObject(PyExc_ValueError, values);
  Py_XDECREF(values);
  return NULL;
}

static PyObject *make_vocabulary(fshm_vocabulary *v) {
  Vocabulary *o = PyObject_New(Vocabulary, vocabulary_type);
  if (o)
    o->v = v;
  else
    fshm_vocabulary_close(v);
  return (PyObject *)o;
}

/* open_vocabulary(path) */
static PyObject *vocabulary_open(UNUSED PyObject *module, PyObject *path) {
  PyObject *encoded = NULL;
  fshm_vocabulary *v = NULL;
  fshm_error e;
  if (!PyUnicode_FSConverter(path, &encoded)) return NULL;
  const char *name = PyBytes_AsString(encoded);
  Py_BEGIN_ALLOW_THREADS(void) fshm_vocabulary_open(name, &v, &e);
  Py_END_ALLOW_THREADS Py_DECREF(encoded);
  return v ? make_vocabulary(v) : file_error(&e, path);
}

/* build_vocabulary(ranks, special, pattern): bytes as fshm_vocabulary_build() takes them. */
static PyObject *vocabulary_build(UNUSED PyObject *module, PyObject *args) {
  PyObject *objects[2];
  key_arg ranks, special;
  int pattern;
  fshm_vocabulary *v = NULL;
  fshm_error e;
  if (!PyArg_ParseTuple(args, "SSi", &objects[0], &objects[1], &pattern) ||
      get_bytes(objects[0], &ranks) || get_bytes(objects[1], &special))
    return NULL;
  Py_BEGIN_ALLOW_THREADS(void)
      fshm_vocabulary_build(ranks.bytes, (uint64_t)ranks.length, special.bytes,
                            (uint64_t)special.length, (uint32_t)pattern, &v, &e);
  Py_END_ALLOW_THREADS return v ? make_vocabulary(v) : file_error(&e, Py_None);
}

static PyObject *tokens_save(PyObject *o, PyObject *path) {
  const Vocabulary *self = (Vocabulary *)o;
  PyObject *encoded = NULL;
  fshm_error e;
  int status;
  if (!PyUnicode_FSConverter(path, &encoded)) return NULL;
  const char *name = PyBytes_AsString(encoded);
  Py_BEGIN_ALLOW_THREADS status = fshm_vocabulary_save(self->v, name, &e);
  Py_END_ALLOW_THREADS Py_DECREF(encoded);
  if (status != FSHM_OK) return file_error(&e, path);
  Py_RETURN_NONE;
}

static fshm_vocabulary_info info_of_vocabulary(PyObject *o) {
  fshm_vocabulary_info info;
  fshm_vocabulary_describe(((Vocabulary *)o)->v, &info);
  return info;
}
static PyObject *tokens_shared(PyObject *o, UNUSED void *unused) {
  return PyBool_FromLong(info_of_vocabulary(o).mapped);
}
static PyObject *tokens_size(PyObject *o, UNUSED void *unused) {
  return PyLong_FromUnsignedLongLong(info_of_vocabulary(o).size);
}
static PyObject *tokens_pattern(PyObject *o, UNUSED void *unused) {
  return PyLong_FromUnsignedLong(info_of_vocabulary(o).pattern);
}
static PyObject *tokens_tokens(PyObject *o, UNUSED void *unused) {
  return PyLong_FromUnsignedLong(info_of_vocabulary(o).tokens);
}
static PyObject *tokens_identity(PyObject *o, UNUSED void *unused) {
  fshm_vocabulary_info info = info_of_vocabulary(o);
  char text[33];
  (void)PyOS_snprintf(text, sizeof text, "%016llx%016llx", (unsigned long long)info.identity[0],
                      (unsigned long long)info.identity[1]);
  return PyUnicode_FromString(text);
}

static void tokens_dealloc(PyObject *o) {
  fshm_vocabulary_close(((Vocabulary *)o)->v);
  end_object(o, PyObject_Free);
}

static PyMethodDef tokens_methods[] = {
    {"count", tokens_count, METH_O, "count(text)\n--\n\nThe number of tokens of a text."},
    {"count_batch", tokens_count_batch, METH_O,
     "count_batch(texts)\n--\n\nThe number of tokens of each text of a list."},
    {"encode", tokens_encode, METH_O,
     "encode(text)\n--\n\nThe tokens of a text; the text of a special token is ordinary text."},
    {"decode", tokens_decode, METH_O,
     "decode(tokens)\n--\n\nThe bytes of tokens, special ones too. KeyError for what is none."},
    {"fits", FAST(tokens_fits), METH_FASTCALL,
     "fits(text, max_tokens)\n--\n\nWhether a text has at most so many tokens. Stops where there "
     "are more."},
    {"truncate", FAST(tokens_truncate), METH_FASTCALL,
     "truncate(text, max_tokens)\n--\n\nThe text, up to the end of one of its first max_tokens "
     "tokens, and not inside a character. What is returned fits max_tokens."},
    {"special_tokens", tokens_special, METH_NOARGS,
     "special_tokens()\n--\n\nThe special tokens, by their text."},
    {"save", tokens_save, METH_O, "save(path)\n--\n\nWrite the file of the vocabulary."},
    {NULL, NULL, 0, NULL}};

static PyGetSetDef tokens_getset[] = {
    {"shared", tokens_shared, NULL, "True: mapped from a file that other processes share.", NULL},
    {"size", tokens_size, NULL, "Bytes of the file.", NULL},
    {"pattern", tokens_pattern, NULL, "The number of its pattern.", NULL},
    {"tokens", tokens_tokens, NULL, "How many tokens there are, without the special ones.", NULL},
    {"identity", tokens_identity, NULL, "A hash of pattern, ranks and special tokens.", NULL},
    {NULL, NULL, NULL, NULL, NULL}};

static PyType_Slot vocabulary_slots[] = {
    {Py_tp_dealloc, (void *)tokens_dealloc},
    {Py_tp_methods, tokens_methods},
    {Py_tp_getset, tokens_getset},
    {Py_tp_doc,
     DOC("The tables of one encoding. Made by open_vocabulary() or build_vocabulary().")},
    {0, NULL}};
