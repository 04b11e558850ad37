"""What pyproject.toml cannot say: the extension module, and where this cannot run."""

import sys
import sysconfig

if sys.platform == "win32":  # before anything is imported that may say it less clearly
    raise SystemExit(
        "fast_litellm_shm needs POSIX shared memory and does not run on Windows: "
        "use WSL 2 or Linux."
    )

from setuptools import setup

# One wheel for 3.10 and all later ones; those without a GIL have one each.
one_wheel = {} if sysconfig.get_config_var("Py_GIL_DISABLED") else {"py_limited_api": "cp310"}

setup(cffi_modules=["csrc/build.py:ffibuilder"], options={"bdist_wheel": one_wheel})
