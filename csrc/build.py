"""Builds fast_litellm_shm._native with cffi: one abi3 module from unity.c with py_module.c, and
engine.c. A free-threaded Python has no stable ABI to keep to: a module for that one version is
built there.

The cdef is the marked section of fast_shm.h, so that the declarations exist once; the compiler
flags are those of ``make lib``, in csrc/cflags and csrc/hardening. FAST_SHM_CFLAGS and
FAST_SHM_LDFLAGS add more.
"""

import os
import pathlib
import re
import sysconfig

import cffi

FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
CSRC = pathlib.Path(__file__).resolve().parent


def cdef() -> str:
    header = (CSRC / "fast_shm.h").read_text(encoding="utf-8")
    marked = re.search(r"/\* \[cdef begin\] \*/(.*)/\* \[cdef end\] \*/", header, re.DOTALL)
    if marked is None:
        raise SystemExit("csrc/fast_shm.h: the marks [cdef begin] and [cdef end] are gone")
    return re.sub(r"/\*.*?\*/", "", marked.group(1), flags=re.DOTALL)  # cffi knows no comments


def flags(variable: str) -> list[str]:
    return os.environ.get(variable, "").split()


def of_file(name: str) -> list[str]:
    return (CSRC / name).read_text(encoding="utf-8").split()


# Of what is built for, which may be another machine: _PYTHON_HOST_PLATFORM names it.
PLATFORM = sysconfig.get_platform()
LINUX = PLATFORM.startswith("linux")
SANITIZED = "-fsanitize" in os.environ.get("FAST_SHM_CFLAGS", "")  # which has checks of its own
HARDENING = [] if SANITIZED else of_file("hardening")
if HARDENING and LINUX and PLATFORM.endswith(("-x86_64", "-i686")):
    HARDENING.append("-fcf-protection=return")  # a shadow stack, where the kernel has one
# Whatever the linker fills in is bound as it is loaded, and read-only from then on.
LINKED = ["-Wl,-z,relro,-z,now,-z,noexecstack"] if LINUX else []


ffibuilder = cffi.FFI()
ffibuilder.cdef(cdef())
ffibuilder.set_source(
    "fast_litellm_shm._native",
    '#include "unity.c"\n#include "python/py_module.c"\n',
    sources=["csrc/tokens/engine.c"],
    include_dirs=["csrc"],
    # Relative: setuptools wants it so, and runs in the folder of setup.py.
    depends=[
        "csrc/cflags",
        "csrc/hardening",
        *sorted(f"csrc/{path.relative_to(CSRC)}" for path in CSRC.rglob("*.[ch]")),
    ],
    # The other one keeps cffi from defining the first itself.
    define_macros=[
        ("_CFFI_NO_LIMITED_API", None) if FREE_THREADED else ("Py_LIMITED_API", "0x030A0000")
    ],
    extra_compile_args=[*of_file("cflags"), *HARDENING, *flags("FAST_SHM_CFLAGS")],
    # -pthread: pthread_atfork, in glibc before 2.34
    extra_link_args=["-pthread", *LINKED, *flags("FAST_SHM_LDFLAGS")],
    py_limited_api=not FREE_THREADED,
)
