/* py_threads.h - objects that several threads share, where no GIL keeps them apart (free-threaded builds).
 *
 * What is between ALONE_BEGIN(o) and ALONE_END() one thread does at a time for an object: each struct here
 * that changes after it was made is read and written there, or word by word with RELAXED_GET and RELAXED_SET
 * where any of two values will do. No Python runs in between: that could let another thread in. With a GIL
 * both are nothing. */
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

/* A dict's value, which is the caller's; NULL where there is none, or after an exception. */
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

#endif
