"""What pyproject.toml cannot say: the extension module, and where this cannot run."""

import sys

if sys.platform == "win32":  # before anything is imported that may say it less clearly
    raise SystemExit(
        "fast_litellm_shm needs POSIX shared memory and does not run on Windows: "
        "use WSL 2 or Linux."
    )

from setuptools import setup

setup(
    cffi_modules=["csrc/build.py:ffibuilder"],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},  # one wheel for 3.10 and all later ones
)
