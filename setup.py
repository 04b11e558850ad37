import sys

from setuptools import setup

if sys.platform == "win32":
    raise SystemExit(
        "fast_litellm_shm needs POSIX shared memory and does not run on Windows; use WSL 2 or Linux."
    )

setup(
    cffi_modules=["csrc/build.py:ffibuilder"],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
