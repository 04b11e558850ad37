"""The vocabulary file of an encoding: the tables that the engine in C counts with.

It is compiled from tiktoken's own ranks and pattern, once for a host, into the cache folder
(FAST_LITELLM_SHM_CACHE). Each process maps it. So a worker that finds it needs neither tiktoken nor
memory of its own for the tables.
"""

from __future__ import annotations

import contextlib
import functools
import os
import struct
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fast_litellm_shm import _native
from fast_litellm_shm._shared import greenlets, log, settings
from fast_litellm_shm._shared.native import lib
from fast_litellm_shm.tokens import encoding

if TYPE_CHECKING:
    import tiktoken

FILE_VERSION = 4  # FSHM_TOKENS_VERSION of csrc/tokens/tokens.h
UNICODE_VERSION = (16, 0)  # of csrc/tokens/unicode_classes.h

# The patterns that the engine has a scanner for (enum fshm_pattern), as tiktoken spells them. They
# are the same from 0.8 on. With any other, tiktoken counts.
PATTERNS = {
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""": 1,
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"""
    r"""|\s++$|\s*[\r\n]|\s+(?!\S)|\s""": 2,
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"""
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
    r"""|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"""
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
    r"""|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+""": 3,
}

_TEMPORARY = ".tmp"  # the end of the names that Vocabulary.save() writes under
_LEFT = 600.0  # seconds: an older temporary file is one that a killed process left
_PATIENCE = 20.0  # seconds to wait for a process that builds: it may be stopped

# What a child runs to build a file: the name of the encoding, the path, then our sys.path.
_CHILD = (
    "import sys; name, path, sys.path[:] = sys.argv[1], sys.argv[2], sys.argv[3:]; "
    "from fast_litellm_shm.tokens import vocabulary; vocabulary.build(name, path)"
)
_CHILD_PATIENCE = 60.0  # seconds

_lock = greenlets.Lock()  # held over a download
_opened: dict[str, _native.Vocabulary | None] = {}
_warned: set[str] = set()


@functools.cache
def installed_version() -> str:
    """The version of tiktoken, without importing it or importlib.metadata, which takes longer than
    to open a vocabulary. "" where it cannot be told."""
    for package in encoding.folders_of("tiktoken"):
        for entry in os.listdir(os.path.dirname(package)):
            if entry.startswith("tiktoken-") and entry.endswith(".dist-info"):
                return entry.removeprefix("tiktoken-").removesuffix(".dist-info")
    return ""


def path_of(name: str) -> str | None:
    """Where the file of an encoding lies. None where the version of tiktoken cannot be told: then
    there is no file."""
    version = installed_version()
    if not version:
        return None
    return os.path.join(settings.cache_folder(), f"{name}-{version}-{FILE_VERSION}.vocabulary")


def _records(tokens: dict[bytes, int]) -> bytes:
    """What fshm_vocabulary_build() takes: for each token its length, its bytes and its rank."""
    return b"".join(
        b"%c%b%b" % (len(token), token, struct.pack("<I", rank)) for token, rank in tokens.items()
    )


def _knows_unicode(major: int, minor: int) -> bool:
    from fast_litellm_shm._shared.dependencies import tiktoken

    ranks = {bytes([i]): i for i in range(256)}
    pattern = rf"\p{{Age={major}.{minor}}}"
    try:
        tiktoken.Encoding("probe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    except ValueError:
        return False
    return True


def _pattern_of(found: tiktoken.Encoding) -> int | None:
    """The engine's number for the pattern of an encoding; None where tiktoken must count."""
    major, minor = UNICODE_VERSION
    pattern = PATTERNS.get(found._pat_str)
    if pattern is None or not _knows_unicode(major, minor) or _knows_unicode(major + 1, 0):
        return None
    return pattern


def compile_encoding(found: tiktoken.Encoding) -> _native.Vocabulary | None:
    """The vocabulary of an encoding, in memory of this process; takes 1 to 3 s. None where the
    engine cannot count exactly as tiktoken does: the pattern, the ranks or the installed tiktoken's
    version of Unicode are others than those it knows."""
    pattern = _pattern_of(found)
    if pattern is None:
        return None
    special = {text.encode(): rank for text, rank in found._special_tokens.items()}
    try:
        return _native.build_vocabulary(
            _records(found._mergeable_ranks), _records(special), pattern
        )
    except (ValueError, OverflowError, struct.error):  # also a token of more than 255 bytes
        return None


def _save(vocabulary: _native.Vocabulary, path: str) -> _native.Vocabulary:
    """Write the file, and map it in place of the memory. Where that cannot be done, the vocabulary
    stays as it is, with one warning."""
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        vocabulary.save(path)
        return _native.open_vocabulary(path)
    except (OSError, ValueError) as error:
        folder = os.path.dirname(path)
        if folder not in _warned:
            _warned.add(folder)
            log.warning(
                "the tables for counting tokens cannot be shared: no file can be kept in %s (%s); "
                "each worker compiles its own, which takes 1 to 3 s and %d MB; set "
                "FAST_LITELLM_SHM_CACHE to a folder that this user may write",
                folder,
                error,
                vocabulary.size >> 20,
            )
        return vocabulary


def _open(path: str) -> tuple[_native.Vocabulary | None, str]:
    """The file, if it is whole; else None, and why not: "" where there is none."""
    try:
        return _native.open_vocabulary(path), ""
    except FileNotFoundError:
        return None, ""
    except ValueError as error:
        status = error.args[0]
        return None, {
            lib.FSHM_E_OWNER: "it belongs to another user, or others may write it",
            lib.FSHM_E_KIND: "it is not a regular file",
            lib.FSHM_E_LAYOUT: "it is of another version or byte order",
        }.get(status, "it is damaged")
    except OSError as error:
        return None, str(error)


def _remove_left(folder: str) -> None:
    """Remove the temporary files of processes that were killed while they wrote."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            if not (entry.name.endswith(_TEMPORARY) and ".vocabulary." in entry.name):
                continue
            with contextlib.suppress(OSError):  # another process has removed it
                if time.time() - entry.stat(follow_symlinks=False).st_mtime > _LEFT:
                    os.unlink(entry.path)


def _wait_for(descriptor: int) -> None:
    """Lock the folder, for at most _PATIENCE: who has the lock may be stopped. The kernel frees the
    lock of one that dies. OSError where the file system has no locks."""
    import fcntl

    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.02)
        else:
            return


@contextlib.contextmanager
def _turn(folder: str) -> Iterator[None]:
    """Wait until no other process builds a file there: eight workers that start at once would each
    build one, and map eight. Without a lock it goes on, too: two that build do no harm."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # where nothing can be kept, _save() says so
            os.makedirs(folder, mode=0o700, exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, descriptor)
            _wait_for(descriptor)
        yield


def _load(name: str) -> _native.Vocabulary | None:
    path = path_of(name)
    if path is None:
        return compile_encoding(encoding.load(name))
    folder = os.path.dirname(path)
    _remove_left(folder)
    found, why = _open(path)
    if found is not None:
        return found
    if why:
        log.warning("%s is not used: %s; it is built again", path, why)
    with _turn(folder):
        found, _ = _open(path)  # another process may have built it
        # Where nothing can be kept, a child would compile in vain.
        if found is None and not encoding.is_loaded(name) and os.access(folder, os.W_OK):
            found = _build_apart(name, path)
        return found or build(name, path)


def build(name: str, path: str) -> _native.Vocabulary | None:
    """Compile an encoding, write the file, and map it. None where tiktoken itself must count."""
    found = compile_encoding(encoding.load(name))
    return found and _save(found, path)


def _build_apart(name: str, path: str) -> _native.Vocabulary | None:
    """The file, built by a child: a process that loads tiktoken's tables keeps some 70 MB for each
    encoding. None where no child can be had, or it failed: then this process builds the file, and
    meets the same error."""
    if not os.path.basename(sys.executable or "").startswith(("python", "pypy")):
        return None  # a server that has Python built in: uWSGI
    import subprocess

    with contextlib.suppress(OSError, subprocess.SubprocessError):
        subprocess.run(
            [sys.executable, "-c", _CHILD, name, path, *sys.path],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_CHILD_PATIENCE,
            check=False,
        )
    return _open(path)[0]


def find(name: str) -> _native.Vocabulary | None:
    """The vocabulary of an encoding, where its file is there already; else None. Builds nothing."""
    found = _opened.get(name)
    if found is None and name not in _opened:
        path = path_of(name)
        found = _open(path)[0] if path else None
        if found is not None:
            found = _opened.setdefault(name, found)
    return found


def load(name: str) -> _native.Vocabulary | None:
    """The vocabulary of an encoding. Maps its file; builds it first where there is none. None where
    tiktoken itself must count: see :func:`compile_encoding`.

    Raises what encoding.load() raises, where there is no file yet."""
    try:
        return _opened[name]
    except KeyError:
        pass
    with _lock:
        if name not in _opened:
            _opened[name] = _load(name)
        return _opened[name]


def _renew_lock() -> None:
    global _lock
    _lock = greenlets.Lock()  # the thread that held it does not live in the child


os.register_at_fork(after_in_child=_renew_lock)
