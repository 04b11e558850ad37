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

/* Called once through cffi, which drops the GIL around it. `module`: the address of the extension module. */
int fshm_py_install(void *module) {
  PyGILState_STATE state = PyGILState_Ensure();
  int failed = install((PyObject *)module);
  if (failed) PyErr_Print();
  PyGILState_Release(state);
  return failed ? FSHM_E_MEMORY : FSHM_OK;
}
