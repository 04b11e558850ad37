"""The Pythons that wheels are tried with.

x86-64 with glibc: those of this host. aarch64 with glibc: Debian's, under qemu. musl: CPython as
Debian has its source, compiled here by zig; that takes some minutes, once. All of it is kept in
build/pythons, and nothing is installed on the host.
"""

from __future__ import annotations

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

ROOT = pathlib.Path(__file__).parents[2]
KEPT = ROOT / "build" / "pythons"
DEBIAN, VERSION = "trixie", "3.13"  # the release, and its Python
DEBIAN_ARCHITECTURE = {"aarch64": "arm64", "x86_64": "amd64"}
HALF_AN_HOUR = 1800


@dataclass(frozen=True)
class Python:
    """command: what starts it, made when it is asked for."""

    name: str
    libc: str  # as in the tag of a wheel: manylinux or musllinux
    machine: str
    version: str
    command: Callable[[], list[str]]
    is_here: bool = False  # installed on this host

    @property
    def platform(self) -> str:
        """As uv calls it."""
        return f"{self.machine}-unknown-linux-{'gnu' if self.libc == 'manylinux' else 'musl'}"


def _version(path: str) -> str | None:
    """None: it does not start. (A version manager may have a python3.12 that only says so.)"""
    say = "import sys; print(sys.implementation.name, '%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run([path, "-c", say], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    name, version = done.stdout.split()
    return version if name == "cpython" else None


def of_this_host() -> list[Python]:
    """Those of the environment variable PYTHONS; if it is empty, what this is run by, and every
    python3.10 and later that is found."""
    asked = os.environ.get("PYTHONS", "").split()
    found: dict[str, str] = {}
    for path in asked or [sys.executable, *(f"python3.{minor}" for minor in range(10, 16))]:
        version = _version(path)
        if version is None and asked:
            raise RuntimeError(f"PYTHONS: {path} is no CPython that starts")
        if version is not None:
            found.setdefault(version, path)
    machine = os.uname().machine
    return [
        Python(f"{version}-{machine}", "manylinux", machine, version, partial(list, [path]), True)
        for version, path in sorted(found.items(), key=lambda each: int(each[0].split(".")[1]))
    ]


def _run(command: list[str], folder: pathlib.Path, **env: str) -> None:
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=HALF_AN_HOUR,
        check=False,
    )
    if done.returncode:
        said = done.stdout[-4000:]
        raise RuntimeError(f"{said}\nexit {done.returncode} of {shlex.join(command)}")


def _needed(command: str, package: str) -> str:
    path = shutil.which(command)
    if path is None:
        raise RuntimeError(f"there is no {command}: apt-get install {package}")
    return path


def _once(make: Callable[[pathlib.Path], None], name: str) -> pathlib.Path:
    """A folder of KEPT, made by a function which is not called again."""
    folder = KEPT / name
    if not (folder / ".made").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        make(folder)
        (folder / ".made").touch()
    return folder


def _apt(folder: pathlib.Path, architecture: str) -> dict[str, str]:
    """The environment of an apt-get with state of its own, in a folder: as on an empty host of that
    architecture."""
    _needed("apt-get", "apt")
    for name in ("state/lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True)
    (folder / "status").touch()
    archive = (
        "[signed-by=/usr/share/keyrings/debian-archive-keyring.pgp] http://deb.debian.org/debian"
    )
    (folder / "sources.list").write_text(
        "".join(f"{kind} {archive} {DEBIAN} main\n" for kind in ("deb", "deb-src"))
    )
    (folder / "apt.conf").write_text(
        f'APT::Architecture "{architecture}"; APT::Architectures {{ "{architecture}"; }};\n'
        f'Dir::State "{folder}/state"; Dir::State::status "{folder}/status";\n'
        f'Dir::Cache "{folder}/cache"; Dir::Etc::sourcelist "{folder}/sources.list";\n'
        'Dir::Etc::sourceparts "-"; Dir::Etc::preferencesparts "-"; Debug::NoLocking "1";\n'
        f'APT::Sandbox::User "{os.environ.get("USER", "root")}";\n'
    )
    env = {"APT_CONFIG": str(folder / "apt.conf")}
    _run(["apt-get", "-qq", "update"], folder, **env)
    return env


def _debian(architecture: str, *packages: str) -> pathlib.Path:
    """A folder with these packages and what they need, unpacked and not configured."""

    def make(folder: pathlib.Path) -> None:
        env = _apt(folder / "apt", architecture)
        get = ["apt-get", "-qq", "install", "--download-only", "--no-install-recommends"]
        _run([*get, *packages], folder, **env)
        (folder / "root/usr/lib").mkdir(parents=True)
        (folder / "root/lib").symlink_to("usr/lib")  # as Debian has it
        for package in (folder / "apt/cache/archives").glob("*.deb"):
            _run(["dpkg-deb", "-x", str(package), "root"], folder)

    return _once(make, f"debian-{architecture}-{packages[0]}") / "root"


def debian_aarch64() -> list[str]:
    qemu = _needed("qemu-aarch64", "qemu-user")
    root = _debian("arm64", f"python{VERSION}")
    return [qemu, "-L", str(root), str(root / f"usr/bin/python{VERSION}")]


def _source() -> pathlib.Path:
    def make(folder: pathlib.Path) -> None:
        env = _apt(folder / "apt", "amd64")
        _run(["apt-get", "-qq", "source", "--download-only", f"python{VERSION}"], folder, **env)
        (archive,) = folder.glob("*.orig.tar.xz")
        with tarfile.open(archive) as opened:
            opened.extractall(folder, filter="data")

    (found,) = _once(make, "source").glob("Python-*")
    return found


def musl(machine: str) -> list[str]:
    """CPython for musl, and Debian's musl to run it with."""
    source = _source()
    system = f"{machine}-linux-musl"

    def make(folder: pathlib.Path) -> None:
        same = _needed(f"python{VERSION}", f"python{VERSION}")
        zig = f"{sys.executable} -m ziglang"
        configure = [
            str(source / "configure"),
            "--quiet",
            f"--host={system}",
            f"--build={os.uname().machine}-linux-gnu",
            f"--with-build-python={same}",
            "--disable-test-modules",
            "--without-ensurepip",
            "--with-pkg-config=no",
            f"CC={zig} cc -target {system}",
            f"AR={zig} ar",
            # PIC: a copy of environ in the program is one that musl does not set.
            "CFLAGS=-O1 -g0 -fPIC -fno-sanitize=undefined -Wno-date-time",
            "LDFLAGS=-dynamic -pie",
            "ac_cv_file__dev_ptmx=yes",
            "ac_cv_file__dev_ptc=no",
            "ac_cv_buggy_getaddrinfo=no",
        ]
        _run(configure, folder, MODULE_BUILDTYPE="static")
        # configure knows no such system by name, and names of other modules end in it.
        abi = f"SOABI=cpython-{VERSION.replace('.', '')}-{system}"
        _run(["make", f"-j{os.cpu_count()}", abi, "python", "pybuilddir.txt"], folder)

    built = _once(make, f"musl-{machine}")
    root = _debian(DEBIAN_ARCHITECTURE[machine], "musl")
    loader = root / f"lib/ld-musl-{machine}.so.1"
    qemu = [] if machine == os.uname().machine else [_needed("qemu-aarch64", "qemu-user")]
    return [*qemu, str(loader.resolve()), str(built / "python")]


def all_of_them() -> list[Python]:
    return [
        *of_this_host(),
        Python(f"{VERSION}-aarch64-qemu", "manylinux", "aarch64", VERSION, debian_aarch64),
        *(
            Python(
                f"{VERSION}-{machine}-musl", "musllinux", machine, VERSION, partial(musl, machine)
            )
            for machine in DEBIAN_ARCHITECTURE
        ),
    ]


def main() -> None:
    """Make them all, and say what each is."""
    for python in all_of_them():
        say = "import platform, sys; print(platform.machine(), sys.version)"
        done = subprocess.run(
            [*python.command(), "-c", say], capture_output=True, text=True, check=True
        )
        print(python.name, re.sub(r"\s+", " ", done.stdout))


if __name__ == "__main__":
    main()
