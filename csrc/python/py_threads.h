/* py_threads.h - objects that several threads share without a GIL (free-threaded builds).
 *
 * Only one thread at a time is between ALONE_BEGIN(o) and ALONE_END() of an object. Each struct here that changes
 * after it was made is read and written there, or word by word with RELAXED_GET and RELAXED_SET where any of two
 * values will do. No Python runs in between, since it could let another thread in; so no reference is dropped there that
 * may be the last. With a GIL both are empty. DESIGN.md, "Threads without the GIL". */
#ifndef FSHM_PY_THREADS_H
#define FSHM_PY_THREADS_H

#include <Python.h>

#ifdef Py_GIL_DISABLED
#define ALONE_BEGIN(o) Py_BEGIN_CRITICAL_SECTION(o)
#define ALONE_END() Py_END_CRITICAL_SECTION()
#else
#define ALONE_BEGIN(o) \
  {                    \
    (void)(o)
#define ALONE_END() \
  }                 \
  (void)0
#endif

#define RELAXED_GET(word) __atomic_load_n(&(word), __ATOMIC_RELAXED)
#define RELAXED_SET(word, value) __atomic_store_n(&(word), (value), __ATOMIC_RELAXED)

/* A new reference to a dict's value. NULL: there is none, or an exception. */
static inline PyObject *dict_get(PyObject *dict, PyObject *key) {
  PyObject *found;
#ifdef Py_GIL_DISABLED
  (void)PyDict_GetItemRef(dict, key, &found);
#else
  found = PyDict_GetItemWithError(dict, key);
  Py_XINCREF(found);
#endif
  return found;
}

/* A new reference to an item of a list. NULL: an exception. */
static inline PyObject *list_get(PyObject *list, Py_ssize_t at) {
#ifdef Py_GIL_DISABLED
  return PyList_GetItemRef(list, at);
#else
  PyObject *found = PyList_GetItem(list, at);
  Py_XINCREF(found);
  return found;
#endif
}

#endif
