"""Every exception of the package. Each message says what happened, to what, and what to do."""

from __future__ import annotations

__all__ = [
    "FastShmError",
    "RateLimitExceeded",
    "PermitTimeoutError",
    "PlanError",
    "QueueFullError",
    "ClusterError",
    "StateFileError",
    "StateFileDamagedError",
    "StateFileFullError",
    "StateFileHostError",
    "StateFileLockedError",
    "StateFileReadOnlyError",
    "SegmentError",
    "SegmentCapacityError",
    "SegmentClockError",
    "SegmentDamagedError",
    "SegmentFullError",
    "SegmentLayoutError",
    "SegmentLinkError",
    "SegmentNotFoundError",
    "SegmentOwnerError",
    "SegmentPermissionError",
    "SegmentSpaceError",
    "EncodingUnavailableError",
    "MissingPackageError",
    "PriceFileError",
    "UnknownModelError",
]


class FastShmError(Exception):
    """Base of all errors of this package, except ValueError and TypeError for bad arguments."""


class PlanError(FastShmError):
    """The plan of a key could not be found: ``plan_of`` failed, or named a plan that there is
    not."""


class SegmentError(FastShmError):
    """A shared-memory segment cannot be used."""


class SegmentNotFoundError(SegmentError):
    """No segment has that name."""


class SegmentSpaceError(SegmentError):
    """The shared-memory file system is full."""


class SegmentPermissionError(SegmentError):
    """The operating system denies access to the segment."""


class SegmentLinkError(SegmentError):
    """The name is a symbolic link or not a regular file. Another program put it there."""


class SegmentOwnerError(SegmentError):
    """The segment belongs to another user."""


class SegmentDamagedError(SegmentError):
    """The file is not a segment of this library, or its contents are inconsistent."""


class SegmentLayoutError(SegmentError):
    """The segment has another layout version or byte order."""


class SegmentCapacityError(SegmentError):
    """The segment exists with another capacity."""


class SegmentClockError(SegmentError):
    """The segment was made before the last boot, or in another time namespace."""


class SegmentFullError(SegmentError):
    """No room for another key (only with ``on_full="raise"``), another limiter, or another process
    that wants a permit."""


class RateLimitExceeded(FastShmError):
    """A call was not admitted. ``retry_after``: seconds until it would be; None: never.
    ``http_status``: what a web application answers."""

    http_status = 429

    def __init__(self, message: str, retry_after: float | None) -> None:
        super().__init__(message, retry_after)
        self.retry_after = retry_after

    def __str__(self) -> str:
        return str(self.args[0])


class PermitTimeoutError(FastShmError, TimeoutError):
    """No permit, or no pooled connection, became free in time. ``retry_after``: seconds until one
    can be had; 0.0: when one is released, and it is not known when."""

    retry_after: float = 0.0


class QueueFullError(PermitTimeoutError):
    """The call would not wait: ``max_waiting`` callers are before it. ``place``: what its place in
    the queue would have been; 1: the next. ``retry_after``: seconds until a caller that came now
    would be served; an estimate."""

    def __init__(self, message: str, retry_after: float, place: int) -> None:
        super().__init__(message, retry_after, place)
        self.retry_after, self.place = retry_after, place

    def __str__(self) -> str:
        return str(self.args[0])


class ClusterError(FastShmError):
    """The server of the limits over many hosts did not answer, or answered with an error."""


class StateFileError(FastShmError):
    """The file of the durable limits cannot be used."""


class StateFileFullError(StateFileError):
    """The disk of the state file is full."""


class StateFileReadOnlyError(StateFileError):
    """The state file, or its folder, cannot be written."""


class StateFileLockedError(StateFileError):
    """Another process has held the state file locked for longer than ``timeout``."""


class StateFileDamagedError(StateFileError):
    """The state file is not one of this library, or its contents are inconsistent."""


class StateFileHostError(StateFileError):
    """The state file belongs to another host."""


class EncodingUnavailableError(FastShmError, OSError):
    """The file of a tiktoken encoding is not on this machine and cannot be downloaded."""


class UnknownModelError(FastShmError, LookupError):
    """The price map does not have the model, or has no price per token for it."""


class PriceFileError(FastShmError, ValueError):
    """The file that FAST_LITELLM_PRICES names cannot be read as a price map."""


class MissingPackageError(FastShmError, ImportError):
    """A call needs numpy, psutil, rich or tiktoken, and the package is not installed."""
