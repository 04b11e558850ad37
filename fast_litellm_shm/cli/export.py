"""``fast-shm export``: write the metrics of a segment, as Prometheus text, JSON or CSV."""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import os
import stat
import sys
from dataclasses import asdict

from fast_litellm_shm.cli import files, render
from fast_litellm_shm.metrics import DURATION_BOUNDS, Snapshot
from fast_litellm_shm.metrics.families import FAMILIES, Row, collected
from fast_litellm_shm.metrics.prometheus_text import prometheus_text, samples
from fast_litellm_shm.metrics.source import Source

_LABELS = ("segment", *dict.fromkeys(label for each in FAMILIES for label in each.labels), "le")


def _json(found: Snapshot) -> str:
    """A JSON object, with a line for each member."""
    parts = {"duration_bounds_seconds": DURATION_BOUNDS, **asdict(found)}
    lines = (f'"{name}": {json.dumps(part)}' for name, part in parts.items())
    return "{" + ",\n ".join(lines) + "}\n"


def _cell(text: str) -> str:
    """A label that is safe in a spreadsheet and on a terminal. Clients choose keys, and some would
    be formulas there, or move the cursor."""
    text = render.escaped(text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def _csv(found: Snapshot) -> str:
    """A row for each number: metric, kind, unit, labels (empty if it has none), value."""
    out = io.StringIO()
    writer = csv.DictWriter(
        out, ("metric", "kind", "unit", *_LABELS, "value"), restval="", lineterminator="\n"
    )
    writer.writeheader()
    for family, rows in collected([(found.segment.name, found)]):
        safe: list[Row] = [(tuple(map(_cell, values)), value) for values, value in rows]
        for name, labels, value in samples(family, safe):
            row = {"metric": name, "kind": family.kind, "unit": family.unit, **labels}
            writer.writerow({**row, "value": value})
    return out.getvalue()


def _mode(path: str, keys: int) -> int:
    """The mode of the new file: that of the file it replaces. If there is none: by the umask, since
    a collector is another user; but for its owner alone if the file has keys of clients."""
    with contextlib.suppress(OSError):  # replace() says it, if it cannot be written
        return stat.S_IMODE(os.stat(path).st_mode)
    mask = os.umask(0)
    os.umask(mask)
    return 0o600 if keys else 0o666 & ~mask


def run(args: argparse.Namespace) -> int:
    """Read the segment, and write its metrics."""
    found = Source(args.name, keys=args.keys, allow_other_owner=args.allow_other_owner).read()
    if args.format == "prometheus":
        text = prometheus_text([(found.segment.name, found)])
    else:
        text = _json(found) if args.format == "json" else _csv(found)
    if args.output is None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8")  # as the formats demand, in any locale
        if sys.stdout.isatty():
            text = "".join(f"{render.escaped(line)}\n" for line in text.split("\n")[:-1])
        sys.stdout.write(text)
    else:
        files.replace(args.output, text, _mode(args.output, args.keys))
    return 0
