"""StateFile: where the file of durable limits lies, and how it is used."""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import NamedTuple

from fast_litellm_shm._shared import settings
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.cluster.settings import OUTAGE


class Place(NamedTuple):
    """The state file of one segment, and how it is used."""

    path: str
    on_outage: str
    timeout: float

    @property
    def shown(self) -> str:
        return f"state file {self.path!r}"


@dataclasses.dataclass(frozen=True)
class StateFile:
    """A file that keeps durable limits over reboots, one for each segment.

    folder: on a disk of this host; default: FAST_LITELLM_SHM_STATE, else the folder
    fast_litellm_shm in the user's state folder (XDG_STATE_HOME, else ~/.local/state). on_outage:
    what limits do while the file cannot be used: ``"local"`` (the segment counts on: exact, but
    forgotten by a reboot; what is left of a key that cannot be read is denied), ``"deny"`` or
    ``"allow"``. timeout: seconds that a call waits for other processes that write, 0.001 .. 60.

    Raises ValueError or TypeError for bad arguments.
    """

    folder: str = dataclasses.field(default_factory=settings.state_folder)
    on_outage: str = "local"
    timeout: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.folder, (str, os.PathLike)):
            raise TypeError(f"StateFile: folder must be a path, not {self.folder!r}")
        object.__setattr__(self, "folder", os.path.abspath(os.fspath(self.folder)))
        if self.on_outage not in OUTAGE:
            raise ValueError(
                f"StateFile: on_outage must be one of {', '.join(OUTAGE)}, not {self.on_outage!r}"
            )
        if isinstance(self.timeout, bool) or not isinstance(self.timeout, (int, float)):
            raise TypeError(f"StateFile: timeout must be a number of seconds, not {self.timeout!r}")
        if not 0.001 <= self.timeout <= 60:
            raise ValueError(
                f"StateFile: timeout must be 0.001 to 60 seconds, not {self.timeout!r}"
            )

    def of(self, segment: Segment) -> Place:
        return self.place(segment.name)

    def place(self, segment_name: str) -> Place:
        return Place(
            os.path.join(self.folder, f"{segment_name}.db"), self.on_outage, float(self.timeout)
        )


@functools.lru_cache(maxsize=64)
def _made(folder: str, on_outage: str | None, timeout: float | None) -> StateFile:
    given = {"on_outage": on_outage, "timeout": timeout}
    return StateFile(folder, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]


def found(given: StateFile | bool | None) -> StateFile | None:
    """The StateFile that a limiter was given; True: the environment's. None: it is not durable."""
    if isinstance(given, StateFile):
        return given
    if given is not None and not isinstance(given, bool):
        raise TypeError(f"durable must be True, False or a StateFile, not {given!r}")
    return default() if given else None


def default() -> StateFile:
    """What the environment says."""
    return _made(settings.state_folder(), settings.state_outage(), settings.state_timeout())
