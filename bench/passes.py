"""What several passes found, as one result.

A process is a little faster or slower for as long as it lives (where its memory came to lie, which
cores it was given), and so is a machine for some minutes. Rounds within one process do not show
that. So the whole run is passed through several times, each question in a new process each time,
and the spread is that of all rounds of all passes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

from bench.result import Ratio, Result, Row, Values

Note = str | float
Part = TypeVar("Part", Row, Ratio)


def _note(seen: Sequence[Note]) -> Note:
    """Of numbers the greatest; of words each that was said."""
    numbers = [each for each in seen if not isinstance(each, str)]
    return max(numbers) if len(numbers) == len(seen) else " / ".join(dict.fromkeys(map(str, seen)))


def _row(same: Sequence[Row]) -> Row:
    names = dict.fromkeys(name for row in same for name in row.notes)
    return dataclasses.replace(
        same[0],
        found=Values(value for row in same for value in row.found.values),
        notes={
            name: _note([row.notes[name] for row in same if name in row.notes]) for name in names
        },
    )


def _ratio(same: Sequence[Ratio]) -> Ratio:
    found = [each.found for each in same if each.found is not None]
    if not found:
        return same[0]
    values = [value for each in found for value in each.values]
    if same[0].worst:
        values = [min(values) if same[0].at_least else max(values)]
    return dataclasses.replace(same[0], found=Values(values), missing=None)


def _grouped(parts: Iterable[tuple[Hashable, Part]]) -> list[list[Part]]:
    groups: dict[Hashable, list[Part]] = {}
    for key, part in parts:
        groups.setdefault(key, []).append(part)
    return list(groups.values())


def merged(passes: Sequence[Result]) -> Result:
    """One result of all. Who was missing in some passes only is told with the number of those."""
    rows = _grouped(((r.group, r.name, r.x, r.who), r) for found in passes for r in found.rows)
    ratios = _grouped(((r.promise, r.name), r) for found in passes for r in found.ratios)
    missing: dict[str, str] = {}
    for who in dict.fromkeys(who for found in passes for who in found.missing):
        reasons = [found.missing[who] for found in passes if who in found.missing]
        some = f" (in {len(reasons)} of {len(passes)} passes)" if len(reasons) < len(passes) else ""
        missing[who] = reasons[0] + some
    failures = [found.failed for found in passes if found.failed]
    return dataclasses.replace(
        passes[0],
        rows=[_row(same) for same in rows],
        ratios=[_ratio(same) for same in ratios],
        missing=missing,
        plots=max((found.plots for found in passes), key=len),
        seconds=sum(found.seconds for found in passes),
        failed="; ".join(dict.fromkeys(failures)) or None,
    )
