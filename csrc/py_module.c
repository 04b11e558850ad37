/* py_module.c - the hand-written types, put into the module that cffi makes. */
#include "py_decision.c"
#include "py_lease.c"
#include "py_core.c"
#include "py_pool.c"
#include "py_memo.c"
#include "py_metric.c"
#include "py_route.c"
#include "py_counted.c"

static int install(PyObject *module) {
  return install_decision(module) || install_lease(module) || install_core(module) ||
         install_pool(module) || install_memo(module) || install_metric(module) ||
         install_route(module) || install_counted(module);
}

/* Called once through cffi, which drops the GIL around it. `module`: the extension module's address. */
int fshm_py_install(void *module) {
  PyGILState_STATE state = PyGILState_Ensure();
  int failed = install((PyObject *)module);
  if (failed) PyErr_Print();
  PyGILState_Release(state);
  return failed ? FSHM_E_MEMORY : FSHM_OK;
}
