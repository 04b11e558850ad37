"""The heartbeat of permits: whatever process holds some tells the server, and gives back what is
unused. A host that is not heard any more loses what it was granted."""

from __future__ import annotations

import os
import threading
import time
import weakref
from typing import TYPE_CHECKING

from fast_litellm_shm.cluster import link as links

if TYPE_CHECKING:
    from fast_litellm_shm.cluster.lease import Leases

_BEAT = 1.0  # seconds
_MOST = 200  # keys in one pipeline


class Beat:
    """Of one link, in one process."""

    def __init__(self, link: links.Link) -> None:
        self._link = link
        self._leases: weakref.WeakSet[Leases] = weakref.WeakSet()
        threading.Thread(target=self._run, name="fast-shm-cluster-beat", daemon=True).start()

    def add(self, leases: Leases) -> None:
        self._leases.add(leases)

    def _run(self) -> None:
        while True:
            time.sleep(_BEAT)
            try:
                if self._link.away is None:
                    self._say()
            except links.AwayError:
                pass  # what is held is told before anything is asked again
            except Exception:
                links._log.exception("telling the server what is held failed")

    def _say(self) -> None:
        for leases in list(self._leases):
            keys = list(leases.keys)
            for start in range(0, len(keys), _MOST):
                found = [leases.due(key) for key in keys[start : start + _MOST]]
                due = [each for each in found if each is not None]
                if due:
                    answers = self._link.call([request for request, _ in due])
                    for (request, lease), answer in zip(due, answers, strict=True):
                        leases.put(request, lease, answer)


_beats: dict[int, Beat] = {}
_lock = threading.Lock()


def ensure(link: links.Link) -> Beat:
    """The heartbeat of a link in this process."""
    known = _beats.get(id(link))
    if known is None:
        with _lock:
            known = _beats.get(id(link))
            if known is None:
                known = _beats[id(link)] = Beat(link)
    return known


def _forked() -> None:
    """A child holds nothing yet: what its parent holds is its parent's."""
    global _lock
    _lock = threading.Lock()
    for each in _beats.values():
        for leases in list(each._leases):
            leases.keys.clear()
    _beats.clear()


os.register_at_fork(after_in_child=_forked)
