"""Files that ``fast-shm`` writes."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile

from fast_litellm_shm import exceptions


def replace(path: str, text: str, mode: int) -> None:
    """Replace the file in one step: a reader sees the old file or the new one, whole; after a power
    cut too. mode: of the new file. Where it fails, nothing is left. Raises FastShmError."""
    folder, name = os.path.split(path)
    if os.path.isdir(path) or not name:
        raise exceptions.FastShmError(f"cannot write {path}: it is a directory; name a file in it")
    if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
        # The rename would replace /dev/null, a pipe or a link by a file.
        raise exceptions.FastShmError(
            f"cannot write {path}: it is not a regular file, but a link, a device or a pipe; name "
            "the file itself, or write to standard output"
        )
    try:
        # Its name does not end in .prom: the textfile collector would read it.
        file, temporary = tempfile.mkstemp(prefix=f".{name}.", suffix=".tmp", dir=folder or ".")
        try:
            with open(file, "w", encoding="utf-8") as out:
                os.fchmod(out.fileno(), mode)
                out.write(text)
                out.flush()
                os.fsync(out.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise exceptions.FastShmError(
            f"cannot write {path}: {error.strerror}; an existing file was not changed"
        ) from error
