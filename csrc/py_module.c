/* py_module.c - the hand-written types, put into the module that cffi makes. */
#include "py_decision.c"
#include "py_lease.c"
#include "py_core.c"
#include "py_pool.c"

static int install(PyObject *module) {
  return install_decision(module) || install_lease(module) || install_core(module) ||
         install_pool(module);
}

/* Called once through cffi, which drops the GIL around it. `module`: the extension module's address. */
int fshm_py_install(void *module) {
  PyGILState_STATE state = PyGILState_Ensure();
  int failed = install((PyObject *)module);
  if (failed) PyErr_Print();
  PyGILState_Release(state);
  return failed ? FSHM_E_MEMORY : FSHM_OK;
}
