/* py_own_limits.h - the limits of a decision, without a GIL: a tuple of the thread.
 *
 * Each acquire() makes a Decision that refers to the tuple of limits. If all threads took references to one tuple, each
 * call would wait for the cache line of its count. So a thread copies the tuple once, and refers to its copy: CPython
 * counts the references of the thread that made an object apart, without a wait. The copies are kept in an object that the
 * state of the thread owns: they go with the thread. Included by py_rate_limiter.c. */
#ifndef FSHM_PY_OWN_LIMITS_H
#define FSHM_PY_OWN_LIMITS_H

#include "py_args.h"

#ifdef Py_GIL_DISABLED
#define OWN_LIMITS 16

typedef struct {
  PyObject_HEAD
  /* `source` is held too: no other tuple can have its address meanwhile. */
  struct {
    PyObject *source, *copy;
  } kept[OWN_LIMITS];
} OwnLimits;

static PyTypeObject *own_limits_type;
static _Thread_local OwnLimits *own_limits; /* NULL: none yet */

static void own_limits_dealloc(PyObject *o) {
  OwnLimits *self = (OwnLimits *)o;
  if (own_limits == self)
    own_limits = NULL; /* at the end of the program, another thread ends them all */
  for (int i = 0; i < OWN_LIMITS; i++) {
    Py_XDECREF(self->kept[i].source);
    Py_XDECREF(self->kept[i].copy);
  }
  end_object(o, PyObject_Free);
}
static PyType_Slot own_limits_slots[] = {{Py_tp_dealloc, (void *)own_limits_dealloc}, {0, NULL}};

static inline unsigned own_limits_at(const PyObject *source) {
  return (unsigned)((uint64_t)(uintptr_t)source * UINT64_C(0x9e3779b97f4a7c15) >> 60);
}
static_assert(OWN_LIMITS == 16, "own_limits_at() has 4 bits");

/* A new reference to this thread's copy of the tuple; NULL: there is none yet. The tuple may be gone: it is only compared. */
static inline PyObject *own_limits_find(const PyObject *source) {
  const OwnLimits *own = own_limits;
  if (unlikely(!own)) return NULL;
  const unsigned at = own_limits_at(source);
  return likely(own->kept[at].source == source) ? Py_NewRef(own->kept[at].copy) : NULL;
}

/* Of the state of this thread. NULL without an exception: it could not be made. */
static COLD OwnLimits *own_limits_make(void) {
  PyObject *state = PyThreadState_GetDict(); /* borrowed */
  OwnLimits *own = state ? PyObject_New(OwnLimits, own_limits_type) : NULL;
  if (own) {
    memset(own->kept, 0, sizeof own->kept);
    if (!PyDict_SetItemString(state, "fast_litellm_shm.OwnLimits", (PyObject *)own))
      own_limits = own;
    Py_DECREF((PyObject *)own);
  }
  if (PyErr_Occurred()) PyErr_Clear();
  return own_limits;
}

/* Takes over a reference to the tuple. Returns one to the copy that the thread has from now on, or else to the tuple. */
static COLD PyObject *own_limits_copy(PyObject *source) {
  OwnLimits *own = own_limits ? own_limits : own_limits_make();
  const Py_ssize_t count = PyTuple_Size(source);
  PyObject *copy = own ? PyTuple_New(count) : NULL;
  if (!copy) {
    PyErr_Clear();
    return source;
  }
  for (Py_ssize_t i = 0; i < count; i++)
    (void)PyTuple_SetItem(copy, i, Py_NewRef(PyTuple_GetItem(source, i)));
  const unsigned at = own_limits_at(source);
  PyObject *old[] = {own->kept[at].source, own->kept[at].copy};
  own->kept[at].source = source;
  own->kept[at].copy = Py_NewRef(copy);
  Py_XDECREF(old[0]); /* last: this may run any Python */
  Py_XDECREF(old[1]);
  return copy;
}
#endif

/* A new reference to the tuple, or to this thread's copy of it. The caller's object holds the tuple. */
static inline PyObject *own_limits_of(PyObject *source) {
#ifdef Py_GIL_DISABLED
  PyObject *found = own_limits_find(source);
  return likely(found != NULL) ? found : own_limits_copy(Py_NewRef(source));
#else
  return Py_NewRef(source);
#endif
}

#endif
