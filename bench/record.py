"""What does it cost to record one duration, and to ask for a feature, beside fast-litellm?

fast-litellm's sums are private to the process; ours are the host's. All in one process,
interleaved.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from bench import peers
from bench.result import OURS, Plot, Ratio, Result, Row, Settings, asked
from bench.timing import Loop, interleaved
from fast_litellm_shm import is_enabled, record_performance

TARGETS = {"ours record_performance": 150.0, "ours is_enabled": 300.0}  # ns


def _recording(record: Callable[[str, str, float], Any]) -> Loop:
    def loop(calls: int) -> None:
        for _ in range(calls):
            record("component", "operation", 1.5)

    return loop


def _asking(ask: Callable[[str], Any]) -> Loop:
    def loop(calls: int) -> None:
        for _ in range(calls):
            ask("rust_routing")

    return loop


def run(settings: Settings) -> Result:
    """Measure in the default segment of a name of its own."""
    result = asked(__doc__)
    with peers.Place() as place:
        os.environ["FAST_LITELLM_SHM_NAME"] = place.segment_name
        loops = {
            "ours record_performance": _recording(record_performance),
            "ours is_enabled": _asking(is_enabled),
        }
        try:
            peer = peers.need("fast_litellm")
            loops["fast-litellm record_performance"] = _recording(peer.record_performance)
            loops["fast-litellm is_enabled"] = _asking(peer.is_enabled)
        except peers.MissingError as error:
            result.missing["fast-litellm"] = str(error)
        for name, found in interleaved(loops, settings).items():
            who = OURS if name.startswith("ours") else "fast-litellm"
            result.rows.append(Row(name, "ns", found, who, "record"))
            if name in TARGETS:
                result.ratios.append(Ratio(name, found, TARGETS[name], False, "ns"))
    result.plots.append(
        Plot(
            "record",
            "bars",
            "One duration recorded, one feature asked for",
            ("record",),
            "nanoseconds a call",
        )
    )
    return result
