"""What a run found, as JSON, as a Markdown report that begins with the targets, and as plots."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
from collections.abc import Iterable, Sequence
from typing import Any

from bench import installing, seed
from bench.result import EMPTY_CALL, OURS, Ratio, Result, Row, Settings, Values, number

# The table of targets, in its order; a ratio names the row that it belongs to.
PROMISES = (
    "`is_allowed(key)`, admitted",
    "`check(key)` with its dict, admitted",
    "the C call against bare clock + one swap",
    "two processes, one hot key, admitted/s",
    "two threads without the GIL / one, own keys",
    "bytes a key, `SimpleRateLimiter`",
    "first check of a new key",
    "check at 10 million keys against 1,000",
    "fast-shm inspect of 2 million keys",
    "pool get + return",
    "callers that wait",
    "routing, 20 deployments",
    "counting new text, against tiktoken, cl100k_base",
    "counting new text, against tiktoken, o200k_base",
    "counting new text, against the best peer, cl100k_base",
    "counting new text, against the best peer, o200k_base",
    "token count, text seen before, 1,000+ characters",
    "the slowest text of a million characters",
    "a second worker that counts in two encodings",
    "private memory of 8 workers that count in two encodings",
    "LiteLLM plugin, all hooks of a request",
    "a budget's reserve + settle inside a lease",
)


#: ns of an empty call of a Python function on the machine that the targets in ns and µs are for.
_EMPTY_CALL_THERE = 17.5


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return found.group(1) if found else platform.machine()


def where(anonymous: bool) -> dict[str, Any]:
    """The machine; anonymous: without the names of its processor and kernel."""
    return {
        "processor": platform.machine() if anonymous else _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "load": os.getloadavg()[0],
        "system": platform.system()
        if anonymous
        else f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
    }


def as_json(
    results: dict[str, Result],
    settings: Settings,
    now: datetime.datetime,
    where: dict[str, Any],
) -> dict[str, Any]:
    """Everything that was found, and where."""
    return {
        "schema": 1,
        "when": now.isoformat(timespec="seconds"),
        "quick": settings.quick,
        "rounds": settings.rounds,
        "passes": settings.passes,
        "where": where,
        "packages": {name: _version(name) for name in ("fast-litellm-shm", *installing.names())},
        "seconds": sum(result.seconds for result in results.values()),
        "questions": {name: result.as_json() for name, result in results.items()},
    }


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The first column to the left, the others to the right unless they are words."""
    out = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return out + ["| " + " | ".join(row) + " |" for row in rows] + [""]


def _spread(low: float, high: float) -> str:
    return f"{number(low)} – {number(high)}"


def empty_call(results: dict[str, Result]) -> Values | None:
    """ns of an empty call of a Python function on this machine."""
    rows = (row for result in results.values() for row in result.rows)
    return next((row.found for row in rows if (row.name, row.unit) == (EMPTY_CALL, "ns")), None)


def _verdict(ratio: Ratio, here: Values | None) -> str:
    """here: of empty_call(). A target in ns or µs is one for a machine: a row that misses it says
    what other machine this is."""
    if here is None or ratio.reached is not False or ratio.unit not in ("ns", "µs"):
        return ratio.verdict
    there = f"{_EMPTY_CALL_THERE:g} where the target was set"
    return f"{ratio.verdict} (an empty Python call: {number(here.median)} ns here, {there})"


def _target_row(first: str, ratio: Ratio, here: Values | None) -> list[str]:
    found = ratio.found
    verdict = _verdict(ratio, here)
    return [
        first,
        ratio.name,
        ratio.aim,
        f"{number(found.median)} {ratio.unit}" if found else "–",
        _spread(found.low, found.high) if found else "–",
        verdict if verdict in ("reached", "no target") else f"**{verdict}**",
    ]


_TARGETS = ("", "compared", "target", "measured", "spread", "verdict")


def targets(results: dict[str, Result]) -> list[str]:
    """The table of targets; a row that nothing was measured for says so."""
    ratios = [ratio for result in results.values() for ratio in result.ratios]
    rows, here = [], empty_call(results)
    for promise in PROMISES:
        found = [ratio for ratio in ratios if ratio.promise == promise]
        if not found:
            rows.append([promise, "–", "–", "–", "–", "**not measured in this run**"])
        for i, ratio in enumerate(found):
            rows.append(_target_row("" if i else promise, ratio, here))
    unmet = sum(1 for ratio in ratios if ratio.promise and ratio.reached is False)
    unmeasured = sum(1 for row in rows if "not measured" in row[-1])
    said = f"{unmet} not reached, {unmeasured} not measured, of {len(rows)}."
    return [*_table(_TARGETS, rows), said, ""]


def _note(note: str | float) -> str:
    return note if isinstance(note, str) else number(note)


def _rows_of(rows: Sequence[Row]) -> list[str]:
    """A table of one group."""
    keys = list(dict.fromkeys(key for row in rows for key in row.notes))
    out = []
    for row in rows:
        bold = "**" if row.who == OURS else ""
        notes = [_note(row.notes.get(key, "")) for key in keys]
        found = row.found
        out.append(
            [
                f"{bold}{row.name}{bold}",
                f"{number(found.median)} {row.unit}",
                _spread(found.low, found.high),
                *notes,
            ]
        )
    return _table((rows[0].group or "measured", "median", "10 – 90 %", *keys), out)


def _question(
    name: str,
    result: Result,
    pictures: list[str],
    folder: str,
    here: Values | None = None,
) -> list[str]:
    out = [
        f"## {result.title}",
        "",
        f"{result.how} (`bench/{name}.py`, {result.seconds:.0f} s)",
        "",
    ]
    if result.failed:
        out += [f"**FAILED: {result.failed}**", ""]
    for who, why in result.missing.items():
        out += [f"- missing: **{who}**: {why}"]
    out += [""] if result.missing else []
    for picture in pictures:
        out += [f"![{picture.replace('_', ' ')}]({folder}/{picture}.svg)", ""]
    if result.ratios:
        rows = [_target_row("", ratio, here)[1:] for ratio in result.ratios]
        out += _table(_TARGETS[1:], rows)
    for group in dict.fromkeys(row.group for row in result.rows):
        out += _rows_of([row for row in result.rows if row.group == group])
    return out


def markdown(
    results: dict[str, Result], found: dict[str, Any], pictures: dict[str, list[str]], folder: str
) -> str:
    """The report. folder: where its pictures are, from where it is."""
    where, here = found["where"], empty_call(results)
    out = [
        f"# Measured on {found['when'][:10]}",
        "",
        "Medians of interleaved rounds, with their spread from the 10th to the 90th percentile. In "
        "each pass all questions are asked again, in new processes, so that what differs from one "
        "process to the next, and from one minute to the next, is in the spread"
        f"{'; here there was one pass' if found['passes'] == 1 else ''}. "
        "Compare within a table: machines differ, and ratios hold better than times. A ratio is "
        "the median over rounds of the ratio within a round.",
        "",
        f"{where['processor']}, {where['cores']} cores, load {where['load']:.1f} at the end; "
        f"{where['system']}; CPython {where['python']}; "
        f"{found['passes']} × {found['rounds']} rounds{', quick' if found['quick'] else ''}; "
        f"{found['seconds']:.0f} s.",
        "",
        "## Targets",
        "",
        *targets(results),
        "## What fast-litellm's guide claims",
        "",
        *_table(seed.HEADER, seed.rows(results, number)),
    ]
    for name, result in results.items():
        out += _question(name, result, pictures.get(name, []), folder, here)
    out += ["## Versions", ""]
    out += _table(("package", "version"), ([k, v] for k, v in found["packages"].items()))
    return "\n".join(out)


def free_stem(out: pathlib.Path, now: datetime.datetime) -> str:
    """The date; with the time, where the folder has a report of that date, which stays."""
    stems = [f"{now:{form}}" for form in ("%Y-%m-%d", "%Y-%m-%d-%H%M", "%Y-%m-%d-%H%M%S")]
    taken = {path.stem for path in out.glob("*") if path.suffix in (".json", ".md")}
    return next((stem for stem in stems if stem not in taken), stems[-1])


def write(
    results: dict[str, Result], found: dict[str, Any], out: pathlib.Path, stem: str
) -> pathlib.Path:
    """STEM.json, STEM.md and the folder STEM of plots; says where, and shows the targets."""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False)
    (out / f"{stem}.json").write_text(text + "\n", encoding="utf-8")
    pictures: dict[str, list[str]] = {}
    try:
        from bench import plots

        pictures = plots.draw(results, out / stem)
    except ImportError as error:
        print(f"no plots: matplotlib is not installed ({error})")
    report = out / f"{stem}.md"
    report.write_text(markdown(results, found, pictures, stem), encoding="utf-8")
    _show(results)
    print(f"\nreport: {report}\nfigures: {out / f'{stem}.json'}")
    return report


def _show(results: dict[str, Result]) -> None:
    """The targets and what is missing, on the terminal."""
    from rich.console import Console
    from rich.table import Table

    here = empty_call(results)
    table = Table(title="Targets", show_lines=False)
    for column in ("compared", "target", "measured", "verdict"):
        table.add_column(column, justify="left" if column in ("compared", "verdict") else "right")
    for result in results.values():
        for ratio in result.ratios:
            if ratio.target is None:
                continue
            row = _target_row("", ratio, here)
            style = "" if ratio.reached else "bold red"
            table.add_row(row[1], row[2], row[3], _verdict(ratio, here), style=style)
    console = Console()
    console.print(table)
    for name, result in results.items():
        for who, why in result.missing.items():
            console.print(f"{name}: {who} is missing: {why}", markup=False)
        if result.failed:
            console.print(f"{name} FAILED: {result.failed}", markup=False, style="bold red")
