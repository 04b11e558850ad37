"""Names of test segments, and what is left of them."""

from __future__ import annotations

import glob
import itertools
import os
import re

from fast_litellm_shm._shared.native import ffi, lib
from fast_litellm_shm._shared.segment import path_of

_count = itertools.count()


def unique_name(label: str = "") -> str:
    """A segment name nobody else uses: ``t-<pid>-<counter>-<label>``."""
    label = re.sub(r"[^A-Za-z0-9._-]+", "-", label)
    return f"t-{os.getpid()}-{next(_count)}-{label}"[:64]


def remove(name: str) -> None:
    """Remove whatever stands under the name of a segment, ours or not, if anything does."""
    lib.fshm_remove(name.encode(), ffi.new("fshm_error *"))


def left_over(name: str) -> list[str]:
    """Files of the segment: itself, lock files, half-made ones."""
    path = path_of(name)
    return [found for found in glob.glob(f"{path}*") if found == path or found[len(path)] == "."]
