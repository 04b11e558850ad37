"""``fast-shm inspect``: one segment, read without disturbing it."""

from __future__ import annotations

import argparse
import itertools
import json
import signal
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fast_litellm_shm import exceptions
from fast_litellm_shm._shared.inspection import Inspection, KeyRow, open_for_reading
from fast_litellm_shm._shared.native import ffi, lib
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.cli import held, keytable, listing, render
from fast_litellm_shm.cluster.state import away_state, cluster_state, problem

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_TOP = 20
_CHUNK = 1000  # rows written at once: a million keys are never held as text
_WARN_AT = 0.8  # of capacity
_ROWS, _ROWS_WATCHED = 50, 8  # of each table above the keys, on a terminal
_KEYS_WATCHED = 8  # so many at least, before other tables take the room
_SORTED = {"busiest": "calls", "admitted": "admitted", "denied": "denied", "key": "name"}
_KEY_COLUMNS = ("key", "limiter", ">admitted", ">denied", ">remaining", ">wait")


def processes_of(segment: Segment) -> list[dict[str, Any]]:
    """The living processes, with what the system knows of them; None where it knows nothing (in
    another pid namespace)."""
    from fast_litellm_shm._shared.dependencies import psutil

    out: list[dict[str, Any]] = []
    for process in segment.processes():
        command, memory = None, None
        try:
            system = psutil.Process(process["pid"])
            command = " ".join(system.cmdline()) or system.name()
            memory = system.memory_info().rss
        except psutil.Error:
            pass  # ended since, in another pid namespace, or not ours to look at
        out.append({**process, "command": command, "memory_bytes": memory})
    return out


def warnings_of(
    stats: dict[str, Any], processes: list[dict[str, Any]], segment: Segment
) -> list[str]:
    """What somebody should do something about: damage, removal, a table that is (nearly) full, a
    server that is away."""
    out = []
    away = away_state(segment)
    if away is not None:
        out.append(problem(away))
    if stats["damaged"]:
        out.append(f"{stats['damaged']}. What is shown may be wrong")
    if stats["unlinked"]:
        pids = ", ".join(str(process["pid"]) for process in processes) or "none"
        out.append(
            "this segment was removed: new processes will not meet it and count apart; restart the "
            f"processes that are still attached (pids: {pids})"
        )
    elif stats["liveness_unknown"]:
        out.append(f"{stats['liveness_unknown']}. Dead processes are listed as alive here")
    unseen = _unseen(segment)
    if unseen:
        out.append(
            "of these processes it cannot be seen here whether they dump core (they are in another "
            "pid namespace, or /proc is not to be read): until that is done, what they hold would "
            f"stay held (pids, as they have them: {', '.join(map(str, unseen))})"
        )
    larger = (
        f"stop the workers, `fast-shm rm --name {stats['name']}`, and start them with "
        f"FAST_LITELLM_SHM_CAPACITY={2 * stats['capacity']}; or use shorter periods"
    )
    for name in _sharing(segment):
        out.append(
            f"limiter {render.escaped(name)}: new keys find no room and share counters, so honest "
            "ones may be denied. If a client makes keys up: limit by something that it cannot "
            f"choose. If not: {larger}"
        )
    if stats["occupancy"] >= _WARN_AT:
        out.append(
            f"{stats['occupancy']:.0%} of the capacity is used; a full table treats new keys by "
            f"on_full (share, deny, allow or raise). To make room: {larger}"
        )
    refused = sum(process["refused_full"] for process in processes)
    if refused:
        out.append(f"{refused:,} calls met a full table. To make room: {larger}")
    return out


def _sharing(segment: Segment) -> list[str]:
    """The limiters whose keys have found no room of late."""
    info = ffi.new("fshm_limiter_info *")
    found = []
    for place in range(segment.geometry().limiters):
        if lib.fshm_limiter_at(segment._handle, place, info) == lib.FSHM_OK and info.shared_ns:
            raw: bytes = ffi.buffer(info.name, info.name_length)[:]
            found.append(raw.decode("utf-8", "replace"))
    return found


def _unseen(segment: Segment) -> list[int]:
    """The pids of living processes that only the lock file tells of."""
    info = ffi.new("fshm_process_info *")
    found = []
    for slot in range(segment.geometry().processes):
        lib.fshm_process_at(segment._handle, slot, info)
        if info.alive == lib.FSHM_ALIVE_BY_LOCK:
            found.append(info.pid)
    return found


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
    out: list[RenderableType] = [
        Text.assemble((f"{label:9}", "dim"), (value, "bold" if label == "segment" else ""))
        for label, value in lines
    ]
    out += [Text(f"WARNING  {text}", style="bold yellow") for text in warnings]
    return [*out, Text()]


def _cluster_lines(cluster: dict[str, Any]) -> list[RenderableType]:
    from rich.text import Text

    hosts = "1 host" if cluster["hosts"] == 1 else f"{cluster['hosts'] or '?'} hosts"
    leader = f"pid {cluster['leader']}" if cluster["leader"] else "nobody"
    rate = cluster.get("round_trips_per_second")
    second = f"{rate:,.1f} a second, " if rate is not None else ""
    times = f"{cluster['lost']:,} time{'s' * (cluster['lost'] != 1)}"
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
        told = f"this host may hold {allowed:,} permit{'s' * (allowed != 1)}, "
        lines.append(("", told + f"of {keys:,} key{'s' * (keys != 1)}"))
    return [Text.assemble((f"{label:9}", "dim"), (value, "")) for label, value in lines]


def _clock(age: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() - age))


def _process_cells(process: dict[str, Any]) -> tuple[str, ...]:
    memory, command = process["memory_bytes"], process["command"]
    return (
        str(process["pid"]),
        "?" if memory is None else render.size(memory),
        f"{process['admitted']:,}",
        f"{process['denied']:,}",
        render.duration(process["attached_seconds"]),
        "? (not to be seen from here)" if command is None else render.escaped(command),
    )


def _process_table(
    processes: list[dict[str, Any]], out: Console, most: int | None
) -> list[RenderableType]:
    from rich.text import Text

    if not processes:
        return [Text("No process is attached."), Text()]
    columns = (">pid", ">memory", ">admitted", ">denied", ">attached", "command")
    rows, more = render.limited(sorted(processes, key=lambda p: p["pid"]), most)
    cells = [_process_cells(process) for process in rows]
    return [render.table(f"Processes ({len(processes)})", columns, cells, out), *more, Text()]


def _limiter_table(
    limiters: list[dict[str, Any]], out: Console, most: int | None
) -> list[RenderableType]:
    from rich.text import Text

    if not limiters:
        return [Text("No limiter has been made in it."), Text()]
    rows, more = render.limited(sorted(limiters, key=lambda limiter: -limiter["keys"]), most)
    cells = [
        (
            render.escaped(limiter["name"])
            + (" (keys share counters)" if limiter["shared_seconds"] else ""),
            " + ".join(limiter["limits"]),
            f"{limiter['keys']:,}",
        )
        for limiter in rows
    ]
    columns = ("limiter", "limits", ">keys")
    return [render.table(f"Limiters ({len(limiters)})", columns, cells, out), *more, Text()]


def _key_cells(row: KeyRow) -> tuple[str, ...]:
    return (
        keytable.shown_name(row.key, row.raw),
        render.escaped(row.limiter),
        f"{row.admitted:,}",
        f"{row.denied:,}",
        "?" if row.remaining is None else f"{row.remaining:,}",
        "?" if row.remaining is None else render.waiting(row.retry_after),
    )


def _key_tables(rows: Iterator[KeyRow], title: str, out: Console) -> Iterator[RenderableType]:
    """Tables of at most _CHUNK rows each, the first with a head; the others as wide as it was."""
    from rich.text import Text

    widths: list[int] | None = None
    while chunk := [_key_cells(row) for row in itertools.islice(rows, _CHUNK)]:
        made = render.table("" if widths else title, _KEY_COLUMNS, chunk, out, widths)
        names = [column.lstrip(">") for column in _KEY_COLUMNS]
        widths = widths or render.column_widths(names, chunk)
        for cells, row in zip(chunk, made.rows, strict=True):
            row.style = "" if cells[-1] in ("-", "?") else "red"
        yield made
    if widths is None:
        yield Text("No key to show.")


class _Look:
    """One look at a segment: what was asked for, and what was found. before: the last one, where
    this is not the first: rates are what has come since."""

    def __init__(
        self, segment: Segment, args: argparse.Namespace, before: _Look | None = None
    ) -> None:
        self._at = time.monotonic()
        self.inspection = Inspection(segment)
        self.stats = segment.stats()
        self.processes = processes_of(segment)
        self.cluster = cluster_state(segment, self.inspection)
        then = before.cluster if before is not None else None
        if self.cluster is not None and before is not None and then is not None:
            more = self.cluster["round_trips"] - then["round_trips"]
            self.cluster["round_trips_per_second"] = max(more, 0) / (self._at - before._at)
        self.limiters = self.inspection.limiters()
        self._args = args
        names = [limiter["name"] for limiter in self.limiters]
        if args.limiter is not None and args.limiter not in names:
            raise listing.no_such_limiter(args.limiter, segment, names)
        self.permits, self.pools = held.held(self.inspection, args.limiter, args.match)

    def keys(self, top: int | None) -> Iterator[KeyRow]:
        args = self._args
        return self.inspection.keys(
            sort=args.sort, top=top or None, match=args.match, limiter=args.limiter
        )

    def head(self, out: Console, most: int | None = None) -> list[RenderableType]:
        """Everything above the keys. most: rows of each table; 0: their numbers alone."""
        from rich.text import Text

        warnings = warnings_of(self.stats, self.processes, self.inspection.segment)
        head = _head(self.stats, warnings)
        if self.cluster is not None:
            head[-1:] = [*_cluster_lines(self.cluster), Text()]
        if most == 0:
            counts = f"{len(self.processes)} processes, {len(self.limiters)} limiters"
            if self.permits or self.pools:
                counts += f", {len(self.permits) + len(self.pools)} keys with permits"
            return [*head, Text(f"{counts}: a taller terminal shows them", style="dim"), Text()]
        return [
            *head,
            *_process_table(self.processes, out, most),
            *_limiter_table(self.limiters, out, most),
            *held.tables(self.permits, self.pools, out, most),
        ]

    def key_tables(self, top: int, out: Console) -> Iterator[RenderableType]:
        total, sort = self.inspection.keys_total, self._args.sort
        title = f"Keys ({total:,}; {'sorted by' if sort == 'key' else 'most'} {_SORTED[sort]})"
        return _key_tables(self.keys(top), title, out)

    def write_json(self) -> None:
        """Top level: segment, cluster (where limits are kept for many hosts), limiters,
        processes, permits, pools, keys. Written as it is read."""
        write = sys.stdout.write
        for name, value in (
            ("segment", self.stats),
            *([("cluster", self.cluster)] if self.cluster is not None else []),
            ("limiters", self.limiters),
            ("processes", self.processes),
            ("permits", self.permits),
            ("pools", self.pools),
        ):
            write(f'{"{" if name == "segment" else " "}"{name}": {json.dumps(value)},\n')
        write(' "keys": [')
        sys.stdout.flush()
        rows, separator = self.keys(self._args.top), "\n  "
        while chunk := [_key_json(row) for row in itertools.islice(rows, _CHUNK)]:
            write(separator + ",\n  ".join(chunk))
            separator = ",\n  "
        write("\n ]}\n")
        sys.stdout.flush()


def _key_json(row: KeyRow) -> str:
    found = row.as_dict()
    if "\ufffd" in row.key:  # perhaps bytes that JSON cannot hold
        try:
            row.raw.decode()
        except UnicodeDecodeError:
            found["key_hex"] = row.raw.hex()
    return json.dumps(found)


def _print(out: Console, look: _Look, top: int) -> None:
    head = look.head(out, _ROWS if out.is_terminal else None)
    for part in itertools.chain(head, look.key_tables(top, out)):
        out.print(part)


def _frame(out: Console, look: _Look, top: int) -> RenderableType:
    """What fits on the screen: the rest of it belongs to the keys."""
    from rich.console import Group
    from rich.text import Text

    wanted = min(top or _TOP, look.inspection.keys_total, _KEYS_WATCHED)
    foot = Text(f"{time.strftime('%H:%M:%S')}  Ctrl-C ends", style="dim")
    for most in (_ROWS_WATCHED, 3, 0):
        head = Group(*look.head(out, most))
        left = out.height - len(out.render_lines(head, pad=False)) - 4  # title, head, rule, foot
        if left >= wanted:
            break
    rows = min(max(left, 1), top or max(left, 1))
    return Group(head, *look.key_tables(rows, out), foot)


def _newest(segment: Segment, args: argparse.Namespace) -> Segment:
    """The segment that has the name now. While there is none, the removed one, whose processes may
    still be attached."""
    if not segment.unlinked:
        return segment
    try:
        return open_for_reading(args.name, args.allow_other_owner)
    except exceptions.SegmentNotFoundError:
        return segment


def _watch(segment: Segment, args: argparse.Namespace, top: int) -> int:
    from rich.live import Live

    out = render.console()
    try:
        if args.json or not out.is_terminal or out.is_dumb_terminal:
            look = None
            while True:
                look = _Look(segment, args, look)
                if args.json:
                    look.write_json()
                else:
                    _print(out, look, top)
                    out.print()
                sys.stdout.flush()
                time.sleep(args.watch)
                segment = _newest(segment, args)
        # A killed watcher must not leave the terminal on its second screen.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        look = _Look(segment, args)
        first = _frame(out, look, top)
        with Live(first, console=out, screen=True, auto_refresh=False) as live:
            live.refresh()
            while True:
                time.sleep(args.watch)
                segment = _newest(segment, args)
                look = _Look(segment, args, look)
                live.update(_frame(out, look, top), refresh=True)
    except KeyboardInterrupt:
        return 0


def run(args: argparse.Namespace) -> int:
    """Show it."""
    segment = open_for_reading(args.name, args.allow_other_owner)
    top = _TOP if args.top is None else args.top
    if args.watch is not None:
        return _watch(segment, args, top)
    look = _Look(segment, args)
    if args.json:
        look.write_json()
    else:
        _print(render.console(), look, top)
    return 0
