/* py_module.c - adds the hand-written types to the module that cffi makes. */
#include "py_decision.c"
#include "py_permit.c"
#include "py_rate_limiter.c"
#include "py_pool.c"
#include "py_memo.c"
#include "py_recorder.c"
#include "py_router.c"
#include "py_counts.c"

/* _untrack(object): the garbage collector ignores it from now on, and counts its references as references from
 * outside. For objects that cannot be part of a cycle (_shared/native.py, owned()). */
static PyObject *module_untrack(PyObject *module, PyObject *o) {
  (void)module;
  if (PyObject_GC_IsTracked(o)) PyObject_GC_UnTrack(o);
  Py_RETURN_NONE;
}

static PyMethodDef module_methods[] = {{"_untrack", module_untrack, METH_O, NULL},
                                       {NULL, NULL, 0, NULL}};

static int install(PyObject *module) {
#ifdef Py_GIL_DISABLED
  if (PyUnstable_Module_SetGIL(module, Py_MOD_GIL_NOT_USED)) return -1;
#endif
  return PyModule_AddFunctions(module, module_methods) || install_decision(module) ||
         install_permit(module) || install_rate_limiter(module) || install_pool(module) ||
         install_memo(module) || install_recorder(module) || install_router(module) ||
         install_counts(module);
}

/* Python calls PyInit__native() on import. The code that cffi generates after this file defines it too: the macros
 * below make that definition the static function cffi_module(), which returns the module with `ffi` and `lib`. */
static PyObject *cffi_module(void);

PyMODINIT_FUNC PyInit__native(void);
PyMODINIT_FUNC PyInit__native(void) {
  PyObject *module = cffi_module();
  if (module && install(module)) {
    Py_DECREF(module);
    return NULL;
  }
  return module;
}

#undef PyMODINIT_FUNC
#define PyMODINIT_FUNC static PyObject *
#define PyInit__native cffi_module
