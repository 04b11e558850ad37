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
import tempfile
from dataclasses import asdict

from fast_litellm_shm import exceptions
from fast_litellm_shm.cli import render
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
    with contextlib.suppress(FileNotFoundError):
        return stat.S_IMODE(os.stat(path).st_mode)
    mask = os.umask(0)
    os.umask(mask)
    return 0o600 if keys else 0o666 & ~mask


def _write(path: str, text: str, keys: int) -> None:
    """Replace the file in one step: a reader sees the old file or the new one, whole."""
    folder, name = os.path.split(path)
    if os.path.isdir(path) or not name:
        raise exceptions.FastShmError(f"cannot write {path}: it is a directory; name a file in it")
    if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
        # The rename would replace /dev/null, a pipe or a link by a file.
        raise exceptions.FastShmError(
            f"cannot write {path}: it is not a regular file, but a link, a device or a pipe; name "
            "the file itself, or leave --output out to write to standard output"
        )
    try:
        # Its name does not end in .prom: the textfile collector would read it.
        file, temporary = tempfile.mkstemp(prefix=f".{name}.", suffix=".tmp", dir=folder or ".")
        try:
            with open(file, "w", encoding="utf-8") as out:
                out.write(text)
                os.fchmod(out.fileno(), _mode(path, keys))
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise exceptions.FastShmError(
            f"cannot write {path}: {error.strerror}; an existing file was not changed"
        ) from error


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
        _write(args.output, text, args.keys)
    return 0
