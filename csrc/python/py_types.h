/* py_types.h - what the native types share: their docstrings, the end of their objects, the results of calls. */
#ifndef FSHM_PY_TYPES_H
#define FSHM_PY_TYPES_H

#include <Python.h>

#define UNUSED __attribute__((unused))

/* A docstring, as the value of Py_tp_doc. */
#define DOC(text) ((void *)(uintptr_t)(text))

/* The last step of a tp_dealloc. release: PyObject_Free, or PyObject_GC_Del. */
static inline void end_object(PyObject *o, freefunc release) {
  PyTypeObject *type = Py_TYPE(o);
  release(o);
  Py_DECREF(type);
}

/* The same, where the object may be of a derived class, which has a tp_free of its own. */
static void end_derived(PyObject *o) {
  end_object(o, (freefunc)PyType_GetSlot(Py_TYPE(o), Py_tp_free));
}

/* The end of a call whose result does not matter. 0, or -1: it raised. */
static inline int done(PyObject *result) {
  Py_XDECREF(result);
  return result ? 0 : -1;
}

#endif
