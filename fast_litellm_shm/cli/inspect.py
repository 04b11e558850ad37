"""``fast-shm inspect``: print one segment. It reads only, and writes nothing to the segment."""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import json
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from fast_litellm_shm._shared import spending
from fast_litellm_shm._shared.inspection import Inspection, KeyRow, open_for_reading
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm._shared.spending import SpendingRow
from fast_litellm_shm.cli import (
    budgets,
    learned,
    permits_and_pools,
    problems,
    render,
    segments,
    vocabularies,
)
from fast_litellm_shm.cluster.state import cluster_state
from fast_litellm_shm.durable.state import durable_state
from fast_litellm_shm.metrics.source import newest

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_TOP = 20
_CHUNK = 1000  # rows written at a time: a million keys are never held as text
_ROWS, _ROWS_WATCHED = 50, 8  # of each table above the keys, on a terminal
_KEYS_WATCHED = 8  # rows of keys that come first, before other tables
_SORTED = {"busiest": "calls", "admitted": "admitted", "denied": "denied", "key": "name"}
_PROCESS_COLUMNS = (">pid", ">memory", ">admitted", ">denied", ">attached", "command")
_LIMITER_COLUMNS = ("limiter", "limits", ">keys")
_OVERRIDE_COLUMNS = ("key", "limiter", "limits of its own")
_KEY_COLUMNS = ("key", "limiter", ">admitted", ">denied", ">remaining", ">wait")


def _head(stats: dict[str, Any], warnings: list[str]) -> list[RenderableType]:
    from rich.text import Text

    gone = "  REMOVED" if stats["unlinked"] else ""
    gone += "  DAMAGED" if stats["damaged"] else ""
    lines = (
        ("segment", f"{stats['name']}{gone}"),
        ("path", stats["path"]),
        ("size", render.size(stats["size_bytes"])),
        (
            "used",
            f"{stats['used']:,} of a capacity of {stats['capacity']:,} ({stats['occupancy']:.1%})",
        ),
        ("age", f"{render.duration(stats['age_seconds'])}, made {_clock(stats['age_seconds'])}"),
        ("calls", f"{stats['admitted']:,} admitted, {stats['denied']:,} denied"),
        ("layout", f"{stats['layout_version']}, key names {stats['names']}"),
    )
    out = _labelled(lines)
    out += [Text(f"WARNING  {text}", style="bold yellow") for text in warnings]
    return [*out, Text()]


def _labelled(lines: Iterable[tuple[str, str]]) -> list[RenderableType]:
    from rich.text import Text

    return [
        Text.assemble((f"{label:9}", "dim"), (value, "bold" if label == "segment" else ""))
        for label, value in lines
    ]


def _cluster_lines(cluster: dict[str, Any]) -> list[RenderableType]:
    hosts = render.counted(cluster["hosts"], "host") if cluster["hosts"] else "? hosts"
    leader = f"pid {cluster['leader']}" if cluster["leader"] else "no process"
    rate = cluster.get("round_trips_per_second")
    second = f"{rate:,.1f} a second, " if rate is not None else ""
    times = render.counted(cluster["lost"], "time")
    lost = f"; the server was lost {times}" if cluster["lost"] else ""
    lines = [
        (
            "cluster",
            f"{hosts}, {leader} leads this one; a round trip takes "
            f"{cluster['lag_p50_ms']:.2f} ms (99 %: {cluster['lag_p99_ms']:.2f})",
        ),
        (
            "",
            f"{cluster['round_trips']:,} round trips ({second}{cluster['failed']:,} failed), "
            f"{cluster['calls_saved']:,} saved; {cluster['granted']:,} tokens granted, "
            f"{cluster['given_back']:,} given back{lost}",
        ),
    ]
    permits = cluster["permits"]
    if permits["round_trips"]:
        allowed, keys = permits["allowed"], permits["keys"]
        lines.append(
            (
                "",
                f"this host may hold {render.counted(allowed, 'permit')}, "
                f"of {render.counted(keys, 'key')}",
            )
        )
    return _labelled(lines)


def _encodings_line(in_use: list[dict[str, Any]]) -> list[RenderableType]:
    """Which vocabulary files the processes map; those of another tiktoken apart."""
    pids: dict[str, set[int]] = {}
    versions = {each["tiktoken"] for each in in_use}
    for each in in_use:
        name = render.escaped(each["encoding"])
        name += f" of tiktoken {render.escaped(each['tiktoken'])}" if len(versions) > 1 else ""
        pids.setdefault(name, set()).update(each["pids"])
    counts = (f"{name} in {render.counted(len(its), 'process')}" for name, its in pids.items())
    return _labelled([("tokens", ", ".join(counts))])


def _durable_lines(durable: dict[str, Any]) -> list[RenderableType]:
    times = render.counted(durable["lost"], "time")
    lost = f"; the state file was lost {times}" if durable["lost"] else ""
    return _labelled(
        [
            (
                "durable",
                f"{durable['transactions']:,} transactions ({durable['failed']:,} failed), each "
                f"{durable['lag_p50_ms']:.2f} ms (99 %: {durable['lag_p99_ms']:.2f}); "
                f"{durable['granted']:,} tokens granted, {durable['given_back']:,} given back"
                f"{lost}",
            )
        ]
    )


def _clock(age: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() - age))


def _process_cells(process: dict[str, Any]) -> tuple[str, ...]:
    memory = process["memory_bytes"]
    return (
        str(process["pid"]),
        "?" if memory is None else render.size(memory),
        f"{process['admitted']:,}",
        f"{process['denied']:,}",
        render.duration(process["attached_seconds"]),
        render.command(process["command"]),
    )


def _limiter_cells(limiter: dict[str, Any]) -> tuple[str, ...]:
    shared = " (keys share counters)" if limiter["shared_seconds"] else ""
    name, limits = render.escaped(limiter["name"]) + shared, " + ".join(limiter["limits"])
    return (name, limits, f"{limiter['keys']:,}")


def _override_cells(row: dict[str, Any]) -> tuple[str, ...]:
    return render.escaped(row["key"]), render.escaped(row["limiter"]), " + ".join(row["limits"])


def _key_cells(row: KeyRow) -> tuple[str, ...]:
    return (
        render.shown_name(row.key, row.raw),
        render.escaped(row.limiter),
        f"{row.admitted:,}",
        f"{row.denied:,}",
        "?" if row.remaining is None else render.left(row.remaining, row.usd),
        "?" if row.remaining is None else render.waiting(row.retry_after),
    )


def _key_tables(rows: Iterator[KeyRow], title: str, out: Console) -> Iterator[RenderableType]:
    """Tables of at most _CHUNK rows each. The first has a head, and its widths hold for all."""
    from rich.text import Text

    widths: list[int] | None = None
    while chunk := [_key_cells(row) for row in itertools.islice(rows, _CHUNK)]:
        made = render.table("" if widths else title, _KEY_COLUMNS, chunk, out, widths)
        widths = widths or render.column_widths(_KEY_COLUMNS, chunk)
        for cells, row in zip(chunk, made.rows, strict=True):
            row.style = "" if cells[-1] in ("-", "?") else "red"
        yield made
    if widths is None:
        yield Text("No key to show.")


class _Sample:
    """What a segment holds at one moment, as the arguments select it. before: the last sample, from
    which rates are computed."""

    def __init__(
        self, segment: Segment, args: argparse.Namespace, before: _Sample | None = None
    ) -> None:
        self._at = time.monotonic()
        self.inspection = Inspection(segment)
        self.stats = segment._stats(self.inspection.damaged)
        self.processes = segments.processes_of(segment)
        self.cluster = cluster_state(segment, self.inspection)
        self.durable = durable_state(segment)
        if self.cluster and before and before.cluster:
            more = self.cluster["round_trips"] - before.cluster["round_trips"]
            self.cluster["round_trips_per_second"] = max(more, 0) / (self._at - before._at)
        self.vocabularies = vocabularies.in_use(process["pid"] for process in self.processes)
        self.limiters = self.inspection.limiters()
        self.removed_users = segments.removed_users(segment.name)
        self._args = args
        names = [limiter["name"] for limiter in self.limiters]
        if args.limiter is not None and args.limiter not in names:
            raise segments.no_such_limiter(args.limiter, segment, names)
        self.permits, self.pools = permits_and_pools.held(self.inspection, args.limiter, args.match)
        self.waiting = permits_and_pools.waiting(self.inspection, args.limiter, args.match)
        self.learned = learned.rows(self.inspection, args.limiter, args.match)

    def _overrides(self) -> list[dict[str, Any]]:
        wanted, match = self._args.limiter, self._args.match
        return [
            row
            for row in self.inspection.overrides()
            if wanted in (None, row["limiter"])
            and (match is None or fnmatch.fnmatchcase(row["key"], match))
        ]

    def keys(self, top: int | None) -> Iterator[KeyRow]:
        args = self._args
        return self.inspection.keys(
            sort=args.sort, top=top or None, match=args.match, limiter=args.limiter
        )

    def head(self, out: Console, most: int | None = None) -> list[RenderableType]:
        """Everything above the keys. most: rows of each table; 0: only how many there are."""
        from rich.text import Text

        warnings = problems.warnings_of(
            self.stats,
            self.processes,
            self.limiters,
            self.inspection.segment,
            self.removed_users,
        )
        head = _head(self.stats, warnings)
        if self.cluster is not None:
            head[-1:] = [*_cluster_lines(self.cluster), Text()]
        if self.vocabularies:
            head[-1:] = [*_encodings_line(self.vocabularies), Text()]
        if self.durable is not None:
            head[-1:] = [*_durable_lines(self.durable), Text()]
        if most == 0:
            counts = f"{len(self.processes)} processes, {len(self.limiters)} limiters"
            if self.permits or self.pools:
                counts += f", {len(self.permits) + len(self.pools)} keys with permits"
            if self.waiting:
                callers = sum(row["callers"] for row in self.waiting)
                counts += f", {render.counted(callers, 'caller')} waiting"
            if spent := sum(each.keys for each in self.inspection.spending):
                counts += f", {render.counted(spent, 'key')} with spending"
            return [*head, Text(f"{counts}: a taller terminal shows them", style="dim"), Text()]
        processes = sorted(self.processes, key=lambda process: process["pid"])
        title = f"Processes ({len(processes)})"
        head += render.section(title, _PROCESS_COLUMNS, processes, _process_cells, out, most)
        if not processes:
            head += [Text("No process uses it now."), Text()]
        limiters = sorted(self.limiters, key=lambda limiter: -limiter["keys"])
        title = f"Limiters ({len(limiters)})"
        head += render.section(title, _LIMITER_COLUMNS, limiters, _limiter_cells, out, most)
        if not limiters:
            head += [Text("It has no limiter yet."), Text()]
        if found := self._overrides():
            title = f"Overrides ({len(found)})"
            head += render.section(title, _OVERRIDE_COLUMNS, found, _override_cells, out, most)
        head += learned.table(self.learned, out, most)
        args, top = self._args, _TOP if self._args.top is None else self._args.top or None
        rows = top if most is None or top is None else min(most, top)
        head += budgets.table(self.inspection, out, rows, args.limiter, args.match)
        return head + permits_and_pools.tables(self.permits, self.pools, self.waiting, out, most)

    def key_tables(self, top: int, out: Console) -> Iterator[RenderableType]:
        total, sort = self.inspection.keys_total, self._args.sort
        title = f"Keys ({total:,}; {'sorted by' if sort == 'key' else 'most'} {_SORTED[sort]})"
        return _key_tables(self.keys(top), title, out)

    def write_json(self) -> None:
        """Top level: segment, removed_users and vocabularies (only if there are any), cluster (only
        with limits over many hosts), durable (only with durable limits), limiters, processes,
        permits, pools, waiting, learned and overrides (only if there are any), budgets and spending
        (only if there are budgets), keys. Each key is written as it is read."""
        parts: dict[str, Any] = {"segment": self.stats}
        if self.removed_users:
            parts["removed_users"] = self.removed_users
        if self.cluster is not None:
            parts["cluster"] = self.cluster
        if self.vocabularies:
            parts["vocabularies"] = self.vocabularies
        if self.durable is not None:
            parts["durable"] = self.durable
        for name in ("limiters", "processes", "permits", "pools", "waiting"):
            parts[name] = getattr(self, name)
        if self.learned:
            parts["learned"] = self.learned
        args, write, found = self._args, sys.stdout.write, self.inspection.spending
        found = [each for each in found if args.limiter in (None, each.name)]
        if overrides := self._overrides():
            parts["overrides"] = overrides
        if found:
            parts["budgets"] = [each.as_dict() for each in found]
        write("{" + "".join(f'"{name}": {json.dumps(part)},\n ' for name, part in parts.items()))
        if found:
            segment, top = self.inspection.segment, args.top or None
            spent = spending.rows(segment, found, top, args.match)
            _write_rows("spending", map(_row_json, spent))
            write(",\n ")
        _write_rows("keys", map(_row_json, self.keys(args.top)))
        write("}\n")
        sys.stdout.flush()


def _write_rows(name: str, rows: Iterator[str]) -> None:
    """A member of the document, a line for each row, written as it is read."""
    sys.stdout.write(f'"{name}": [')
    sys.stdout.flush()
    separator = "\n  "
    while chunk := list(itertools.islice(rows, _CHUNK)):
        sys.stdout.write(separator + ",\n  ".join(chunk))
        separator = ",\n  "
    sys.stdout.write("\n ]")


def _row_json(row: KeyRow | SpendingRow) -> str:
    found = row.as_dict()
    if "\ufffd" in row.key:  # perhaps bytes that JSON cannot hold
        try:
            row.raw.decode()
        except UnicodeDecodeError:
            found["key_hex"] = row.raw.hex()
    return json.dumps(found)


def _print(out: Console, sample: _Sample, top: int) -> None:
    head = sample.head(out, _ROWS if out.is_terminal else None)
    for part in itertools.chain(head, sample.key_tables(top, out)):
        out.print(part)


def _frame(out: Console, sample: _Sample, top: int) -> RenderableType:
    """As much as fits on the screen; keys get what the other tables leave."""
    from rich.console import Group
    from rich.text import Text

    wanted = min(top or _TOP, sample.inspection.keys_total, _KEYS_WATCHED)
    foot = Text(f"{time.strftime('%H:%M:%S')}  Ctrl-C ends", style="dim")
    for most in (_ROWS_WATCHED, 3, 0):
        head = Group(*sample.head(out, most))
        left = out.height - len(out.render_lines(head, pad=False)) - 4  # title, head, rule, foot
        if left >= wanted:
            break
    rows = min(max(left, 1), top or max(left, 1))
    return Group(head, *sample.key_tables(rows, out), foot)


def _samples(segment: Segment, args: argparse.Namespace) -> Iterator[_Sample]:
    """One sample; with --watch, one after the other."""
    sample = None
    while True:
        sample = _Sample(segment, args, sample)
        yield sample
        if args.watch is None:
            return
        time.sleep(args.watch)
        segment = newest(segment, args.name, args.allow_other_owner)


def _show(samples: Iterator[_Sample], args: argparse.Namespace) -> None:
    top = _TOP if args.top is None else args.top
    if args.json:
        for sample in samples:
            sample.write_json()
        return
    if args.watch is None:
        render.import_ahead()
        for sample in samples:
            _print(render.console(), sample, top)
        return
    out = render.console()
    if not out.is_terminal or out.is_dumb_terminal:
        for sample in samples:
            _print(out, sample, top)
            out.print()
            sys.stdout.flush()
        return
    from rich.live import Live

    # SIGTERM must not leave the terminal on its alternate screen.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    first = _frame(out, next(samples), top)
    with Live(first, console=out, screen=True, auto_refresh=False) as live:
        live.refresh()
        for sample in samples:
            live.update(_frame(out, sample, top), refresh=True)


def run(args: argparse.Namespace) -> int:
    """Print the segment; with --watch, again and again."""
    segment = open_for_reading(args.name, args.allow_other_owner)
    try:
        _show(_samples(segment, args), args)
    except KeyboardInterrupt:
        if args.watch is None:
            raise
    return 0
