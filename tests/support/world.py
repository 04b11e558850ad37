"""A process in a world that has something wrong with it: file systems, users, system calls.

All of it is real (mount namespaces, setuid, seccomp), set up by a forked child for itself. Where
the system does not allow that, the test is skipped, and says what was refused.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fast_litellm_shm import ConcurrencyLimiter

from .children import PATIENCE, run_one

NEWNS, NEWTIME = 0x20000, 0x80
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
O_TMPFILE_BIT = 0x400000
_NUMBERS = {
    "x86_64": {"openat": 257, "linkat": 265, "renameat2": 316, "fallocate": 285},
    "aarch64": {"openat": 56, "linkat": 37, "renameat2": 276, "fallocate": 47},
}

_libc = ctypes.CDLL(None, use_errno=True)


class Missing(Exception):
    """Something that the test needs is not to be had here."""


def _check(what: str, status: int) -> None:
    if status:
        raise Missing(f"{what}: {os.strerror(ctypes.get_errno())}")


def mount(
    where: str, kind: str | None, flags: int, options: str = "", source: str = "none"
) -> None:
    """mount(2)."""
    given = (source.encode(), where.encode(), kind and kind.encode(), flags, options.encode())
    _check(f"mount of {kind or 'something'} on {where}", _libc.mount(*given))


def unmount(where: str) -> None:
    """umount2(2), at once though somebody uses it."""
    _check(f"umount of {where}", _libc.umount2(where.encode(), 2))


def own_mounts() -> None:
    """From here on, what this process mounts is its own and its children's."""
    _check("a mount namespace", _libc.unshare(NEWNS))
    mount("/", None, MS_REC | MS_PRIVATE)


def own_shm(options: str = "size=2m,mode=1777") -> None:
    """A /dev/shm of its own."""
    own_mounts()
    mount("/dev/shm", "tmpfs", 0, options)


def read_only_shm() -> None:
    """From here on, /dev/shm is read-only for this process, and for others what it was."""
    own_mounts()
    mount("/dev/shm", None, MS_BIND, source="/dev/shm")
    mount("/dev/shm", None, MS_REMOUNT | MS_BIND | MS_RDONLY)


def become(uid: int, *groups: int) -> None:
    """Another user, for good. groups: the primary one first."""
    try:
        os.setgroups(groups)
        os.setresgid(*(groups[0],) * 3)
        os.setresuid(uid, uid, uid)
    except PermissionError as error:
        raise Missing(f"to become uid {uid}: {error.strerror}") from None


def refuse(call: str, number: int | None, only_tmpfile: bool = False) -> None:
    """From here on, the system call fails with the errno value; None: it kills the process."""
    numbers = _NUMBERS.get(platform.machine())
    if numbers is None:
        raise Missing(f"system call numbers of {platform.machine()} are not known here")
    action = 0x80000000 if number is None else 0x00050000 | number
    program = [(0x20, 0, 0, 0), (0x15, 0, 3 if only_tmpfile else 1, numbers[call])]
    if only_tmpfile:  # the low half of the flags
        program += [(0x20, 0, 0, 32), (0x45, 0, 1, O_TMPFILE_BIT)]
    program += [(0x06, 0, 0, action), (0x06, 0, 0, 0x7FFF0000)]
    code = b"".join(struct.pack("=HBBI", *line) for line in program)
    held = ctypes.create_string_buffer(code)
    filtering = ctypes.create_string_buffer(
        struct.pack("@HP", len(program), ctypes.addressof(held))
    )
    _check("prctl(PR_SET_NO_NEW_PRIVS)", _libc.prctl(38, 1, 0, 0, 0))
    _check("prctl(PR_SET_SECCOMP)", _libc.prctl(22, 2, filtering, 0, 0))


def _guarded(target: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[str, Any]:
    try:
        return "", target(*arguments)
    except Missing as missing:
        return str(missing), None


def in_child(target: Callable[..., Any], *arguments: Any) -> Any:
    """``target(*arguments)`` in a forked child; skips the test where it raises Missing."""
    missing, result = run_one(_guarded, target, arguments, method="fork")
    if missing:
        pytest.skip(f"not allowed here: {missing}")
    return result


def failure(call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """What a call raises, as ``Kind: message``; "" where it does not."""
    try:
        call(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def takes(limiter: ConcurrencyLimiter, key: str) -> bool:
    """Whether a permit is to be had; gives it back."""
    with limiter.acquire(key) as permit:
        return bool(permit)


def fast_shm(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, in the world that its caller is in. Plain text, full lines."""
    return subprocess.run(
        [sys.executable, "-m", "fast_litellm_shm.cli", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


@contextlib.contextmanager
def forked(task: Callable[[], Any]) -> Iterator[int]:
    """A child that did the task, which returns what to keep, and lives until the end, or until it
    is killed; its pid."""
    ready, done = os.pipe()
    pid = os.fork()
    if not pid:
        with contextlib.suppress(BaseException):
            os.close(ready)
            kept: list[Any] = []  # until the end: a limiter that nobody refers to leaves
            said = failure(lambda: kept.append(task())) or ("ready" if kept[0] else "failed")
            os.write(done, said.encode())
            os.close(done)
            while True:
                _libc.pause()
        os._exit(1)
    os.close(done)
    try:
        with open(ready, "rb") as end:
            said = end.read().decode()
        assert said == "ready", said
        yield pid
    finally:
        kill(pid)


def kill(pid: int) -> None:
    """Kill a child of ours, and wait for its end. Harmless where that was done already."""
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def fill(path: str) -> None:
    """A file that takes the file system's last byte."""
    with open(path, "wb", buffering=0) as filler:
        try:
            while filler.write(b"x" * 4096):
                pass
        except OSError as error:
            assert error.errno == errno.ENOSPC
