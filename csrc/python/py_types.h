/* py_types.h - what the native types share: their specs, the end of their objects, the results of calls. */
#ifndef FSHM_PY_TYPES_H
#define FSHM_PY_TYPES_H

#include <Python.h>

#define UNUSED __attribute__((unused))

/* Flags of a type: only C makes objects of it; or Python derives a class from it. */
#define INTERNAL (Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION)
#define BASE (Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE)

/* PyModule_AddType() adds the type to the module by its name. */
#define TYPE_SPEC(type, slots, flags) \
  {"fast_litellm_shm._native." #type, sizeof(type), 0, flags, slots}

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
