"""Builds fast_litellm_shm._native with cffi: one abi3 module from unity.c and fastcall.c.

The cdef is the marked section of fast_shm.h, so that the declarations exist once.
"""

import os
import pathlib
import re

import cffi

CSRC = pathlib.Path(__file__ if "__file__" in globals() else "csrc/build.py").resolve().parent


def cdef() -> str:
    header = (CSRC / "fast_shm.h").read_text(encoding="utf-8")
    marked = re.search(r"/\* \[cdef begin\] \*/(.*)/\* \[cdef end\] \*/", header, re.S)
    assert marked, "fast_shm.h has lost its cdef marks"
    return re.sub(r"/\*.*?\*/", "", marked.group(1), flags=re.S)


flags = ["-std=c11", "-O3", "-fvisibility=hidden", "-fno-semantic-interposition"]
ffibuilder = cffi.FFI()
ffibuilder.cdef(cdef())
ffibuilder.set_source(
    "fast_litellm_shm._native",
    '#include "unity.c"\n#include "fastcall.c"\n',
    include_dirs=["csrc"],
    depends=sorted(str(p.relative_to(CSRC.parent)) for p in CSRC.glob("*.[ch]")),
    define_macros=[("Py_LIMITED_API", "0x030A0000"), ("_GNU_SOURCE", None)],
    extra_compile_args=flags + os.environ.get("FAST_SHM_CFLAGS", "").split(),
    extra_link_args=os.environ.get("FAST_SHM_LDFLAGS", "").split(),
    py_limited_api=True,
)
