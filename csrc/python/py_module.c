/* py_module.c - adds the hand-written types to the module that cffi makes. */
#include "py_decision.c"
#include "py_permit.c"
#include "py_rate_limiter.c"
#include "py_hierarchy.c"
#include "py_pool.c"
#include "py_recorder.c"
#include "py_router.c"
#include "py_counts.c"
#include "py_tokens.c"
#include "py_memo.c"
#include "py_budget.c"
#include "py_fields.c"

/* _untrack(object): the garbage collector ignores it from now on, and counts its references as references from
 * outside. For objects that cannot be part of a cycle (_shared/native.py, owned()). */
static PyObject *module_untrack(UNUSED PyObject *module, PyObject *o) {
  if (PyObject_GC_IsTracked(o)) PyObject_GC_UnTrack(o);
  Py_RETURN_NONE;
}

static PyMethodDef module_methods[] = {{"_untrack", module_untrack, METH_O, NULL},
                                       {"_on_look", module_on_look, METH_O, NULL},
                                       {"open_vocabulary", vocabulary_open, METH_O, NULL},
                                       {"build_vocabulary", vocabulary_build, METH_VARARGS, NULL},
                                       {NULL, NULL, 0, NULL}};

/* Flags of a type: only C makes objects of it; or Python derives a class from it. */
#define INTERNAL (Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION)
#define BASE (Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE)

/* PyModule_AddType() adds the type to the module by its name. */
#define SPEC(type, slots, flags) {"fast_litellm_shm._native." #type, sizeof(type), 0, flags, slots}

/* kept: where C has the type, to make or to check objects of it; NULL: nowhere. */
static struct {
  PyType_Spec spec;
  PyTypeObject **kept;
} types[] = {{SPEC(Decision, decision_slots, INTERNAL), &decision_type},
             {SPEC(Permit, permit_slots, INTERNAL), &permit_type},
             {SPEC(Slot, slot_slots, BASE | Py_TPFLAGS_HAVE_GC), NULL},
             {SPEC(Core, core_slots, BASE | Py_TPFLAGS_HAVE_GC), &core_type},
             {SPEC(HierarchyCore, hierarchy_slots, BASE | Py_TPFLAGS_HAVE_GC), NULL},
             {SPEC(Reservation, reservation_slots, INTERNAL), &reservation_type},
             {SPEC(PoolCore, pool_slots, BASE | Py_TPFLAGS_HAVE_GC), NULL},
             {SPEC(Connection, connection_slots, INTERNAL | Py_TPFLAGS_HAVE_GC), &connection_type},
             {SPEC(Stack, stack_slots, INTERNAL | Py_TPFLAGS_HAVE_GC), &stack_type},
             {SPEC(Use, use_slots, INTERNAL | Py_TPFLAGS_HAVE_GC), &use_type},
             {SPEC(Memo, memo_slots, BASE | Py_TPFLAGS_HAVE_GC), NULL},
             {SPEC(Recorder, recorder_slots, BASE), NULL},
             {SPEC(RouterCore, router_slots, BASE | Py_TPFLAGS_HAVE_GC), NULL},
             {SPEC(Counts, counts_slots, BASE), NULL},
             {SPEC(Fields, fields_slots, Py_TPFLAGS_DEFAULT), NULL},
             {SPEC(BudgetCore, budget_slots, BASE | Py_TPFLAGS_HAVE_GC), NULL},
             {SPEC(BudgetReservation, budget_reservation_slots, INTERNAL | Py_TPFLAGS_HAVE_GC),
              &budget_reservation_type},
#ifdef Py_GIL_DISABLED
             {SPEC(OwnLimits, own_limits_slots, INTERNAL), &own_limits_type},
#endif
             {SPEC(Vocabulary, vocabulary_slots, INTERNAL), &vocabulary_type}};

/* Each object has a reference to its type. CPython 3.14 counts them by thread, 3.13 in one word that all threads write;
 * unless the type is immortal, as the types of classes in Python are there. Ours are never freed anyway. */
static void count_no_references(PyTypeObject *type) {
#if defined(Py_GIL_DISABLED) && PY_VERSION_HEX < 0x030E0000
  PyObject *o = (PyObject *)type; /* no other thread has it yet */
  PyObject_GC_UnTrack(o);
  o->ob_tid = _Py_UNOWNED_TID;
  o->ob_ref_local = _Py_IMMORTAL_REFCNT_LOCAL;
  o->ob_ref_shared = 0;
#else
  (void)type;
#endif
}

static int add_types(PyObject *module) {
  for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
    PyTypeObject *type = (PyTypeObject *)PyType_FromSpec(&types[i].spec);
    if (!type || PyModule_AddType(module, type)) return -1;
    count_no_references(type);
    if (types[i].kept)
      *types[i].kept = type;
    else
      Py_DECREF((PyObject *)type);
  }
  return 0;
}

static int install(PyObject *module) {
#ifdef Py_GIL_DISABLED
  if (PyUnstable_Module_SetGIL(module, Py_MOD_GIL_NOT_USED)) return -1;
#endif
  return PyModule_AddFunctions(module, module_methods) || make_constants() || make_router_names() ||
         find_is_ascii() || add_types(module);
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
