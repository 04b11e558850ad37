"""What pyproject.toml cannot say: the extension module, and where this cannot run."""

import os
import sys
import sysconfig

if sys.platform == "win32":  # before anything is imported that may say it less clearly
    raise SystemExit(
        "fast_litellm_shm needs POSIX shared memory and does not run on Windows: "
        "use WSL 2 or Linux."
    )

if sys.implementation.name != "cpython":
    raise SystemExit(
        "fast_litellm_shm needs CPython and does not run on "
        f"{sys.implementation.name}: its types are written against CPython's own C API. "
        "Use CPython 3.10 or later."
    )

from setuptools import setup

# One wheel for 3.10 and all later ones; those without a GIL have one each. From 3.15 on these could
# share one too, of the ABI abi3t (PEP 803). PyObject is opaque there, and the structs of types of
# csrc/python begin with one: PyObject_GetTypeData() would have to find them, which 3.10 has not.
free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
one_wheel = {} if free_threaded else {"py_limited_api": "cp310"}

# The Makefile says so where the module that lies in the tree is of these sources: all CPythons but
# those without a GIL share it, and each of its environments would build it anew, in half a minute.
built = "FAST_SHM_BUILT" in os.environ and not free_threaded
if built and not os.path.exists("fast_litellm_shm/_native.abi3.so"):
    raise SystemExit(
        "FAST_SHM_BUILT is set, and fast_litellm_shm/_native.abi3.so is not there: unset it."
    )

setup(
    cffi_modules=[] if built else ["csrc/build.py:ffibuilder"],
    options={"bdist_wheel": one_wheel},
)
