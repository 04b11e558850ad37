"""Sources of metrics: a segment, or several, that are read again and again."""

from __future__ import annotations

import logging
import time
from collections.abc import Container, Iterable, Mapping

from fast_litellm_shm import exceptions
from fast_litellm_shm._shared import settings
from fast_litellm_shm._shared.inspection import open_for_reading
from fast_litellm_shm._shared.segment import Segment, path_of
from fast_litellm_shm.metrics import Snapshot
from fast_litellm_shm.metrics.snapshot import snapshot

MOST_KEYS = 1000


def newest(known: Segment | None, name: str, allow_other_owner: bool) -> Segment:
    """The segment that has the name now. If there is none, the known one: its processes may still
    use it. Raises SegmentError if neither can be read."""
    if known is not None and not known.unlinked:
        return known
    try:
        return open_for_reading(name, allow_other_owner)
    except exceptions.SegmentNotFoundError:
        if known is None:
            raise
        return known


class Source:
    """A segment that is read again and again. If it is removed and made again, the new one is read.

    segment: a Segment or a name; None: the default segment. It need not exist yet. keys: how many
    of the busiest keys to include, 0 .. 1000; that reads the counts of all keys, under the
    interpreter's lock. deployments: names of deployments by name of their router; the segment has
    only hashes, and others are shown as those. Raises ValueError or TypeError for bad arguments.
    """

    def __init__(
        self,
        segment: Segment | str | None = None,
        *,
        keys: int = 0,
        deployments: Mapping[str, Iterable[str]] | None = None,
        allow_other_owner: bool = False,
    ) -> None:
        if isinstance(segment, Segment):
            self.name = segment.name
            allow_other_owner |= bool(segment._arguments["allow_other_owner"])
        elif segment is None or isinstance(segment, str):
            self.name = settings.segment_name() if segment is None else segment
            path_of(self.name)  # raises for a bad name
        else:
            raise TypeError(f"segment must be a Segment, its name or None, not {segment!r}")
        if isinstance(keys, bool) or not isinstance(keys, int):
            raise TypeError(f"keys must be an int, not {keys!r}")
        if not 0 <= keys <= MOST_KEYS:
            raise ValueError(f"keys must be between 0 and {MOST_KEYS}, not {keys}")
        self._keys, self._other_owner = keys, allow_other_owner
        self._deployments = _names_of(deployments)
        self._segment: Segment | None = None

    def read(self) -> Snapshot:
        """The present numbers. Raises a SegmentError if the segment cannot be read."""
        begun = time.perf_counter()
        # Of two threads that open a new segment at the same time, each reads its own mapping.
        found = self._segment = newest(self._segment, self.name, self._other_owner)
        return snapshot(found, keys=self._keys, deployments=self._deployments, begun=begun)


class Sources:
    """Several segments, or one, for scrapes and collections: reading does not raise.

    segment: a Segment, a name, several of either, or None for the default segment. keys,
    deployments: as for :class:`Source`, for each of them."""

    def __init__(
        self,
        segment: Segment | str | Iterable[Segment | str] | None = None,
        *,
        keys: int = 0,
        deployments: Mapping[str, Iterable[str]] | None = None,
    ) -> None:
        several = (segment,) if segment is None or isinstance(segment, (Segment, str)) else segment
        if not isinstance(several, Iterable):
            raise TypeError(
                f"segment must be a Segment, its name, several of either or None, not {segment!r}"
            )
        named = [Source(each, keys=keys, deployments=deployments) for each in several]
        self._sources = {source.name: source for source in named}  # each once
        self._said: dict[str, str] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the segments."""
        return tuple(self._sources)

    def read(self, only: Container[str] | None = None) -> list[tuple[str, Snapshot | None]]:
        """Each segment's name and snapshot. None: it cannot be read; the log says why, once a
        reason. only: the names of the segments to read. Never raises."""
        return [
            (name, self._read(name, source))
            for name, source in self._sources.items()
            if only is None or name in only
        ]

    def _read(self, name: str, source: Source) -> Snapshot | None:
        try:
            found = source.read()
        except Exception as error:  # other processes write its contents, and may break anything
            said = f"{type(error).__name__}: {error}"
            if self._said.get(name) != said:
                self._said[name] = said
                logging.getLogger("fast_litellm_shm").warning(
                    "no metrics of segment %r: %s", name, said
                )
            return None
        self._said.pop(name, None)
        return found


def _names_of(given: Mapping[str, Iterable[str]] | None) -> dict[bytes, tuple[str, str]]:
    """What the segment has hashed, and what is shown for it."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise TypeError(f"deployments must be names by router, as a dict, not {given!r}")
    out = {}
    for router, names in given.items():
        if isinstance(names, str) or not isinstance(names, Iterable):
            raise TypeError(f"deployments[{router!r}] must be a list of names, not {names!r}")
        for name in names:
            if not isinstance(name, str) or not isinstance(router, str):
                raise TypeError(f"deployments must be named by str, not {router!r}: {name!r}")
            # without surrogates: they could not be encoded in a scrape
            shown = [each.encode("utf-8", "replace").decode() for each in (router, name)]
            out[f"{router}\0{name}".encode("utf-8", "surrogatepass")] = shown[0], shown[1]
    return out
