"""``fast-shm state``: show, check, compact and copy the file of a segment's durable limits."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from fast_litellm_shm import exceptions, limits
from fast_litellm_shm.cli import files, render
from fast_litellm_shm.durable import records, settings
from fast_litellm_shm.limits import dollars


def run(args: argparse.Namespace) -> int:
    path = settings.default().place(args.name).path
    return {
        "show": _show, "check": _check, "compact": _compact, "export": _export,
        "import": _import, "claim": _claim,
    }[args.action](path, args)  # fmt: skip


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _name(raw: bytes | None, hashed: bytes) -> str:
    return f"({hashed.hex()[:16]})" if raw is None else render.escaped(raw)


def _show(path: str, args: argparse.Namespace) -> int:
    with records.opened(path) as db:
        about, keys = records.summary(db, path), list(records.keys(db))
        money = list(records.money(db))
    if args.json:
        print(json.dumps(_as_json(about, keys, money), indent=2))
        return 0
    out = render.console()
    lines = [
        f"state file   {render.escaped(about.path)}: {render.size(about.bytes)}, "
        f"{render.counted(about.keys, 'key')}",
        f"host         {render.escaped(about.host)}, last used {_when(about.last_used)}",
    ]
    if about.used_up_since is not None:
        lines.append(
            "damage       an earlier file was damaged: keys that are not listed count as used up "
            f"since {_when(about.used_up_since)}, until their periods have passed"
        )
    for line in lines:
        out.print(line, soft_wrap=True, markup=False, highlight=False)
    rows = [
        (
            render.escaped(key.limiter), _name(key.name, key.hash), limits.describe(state.limit),
            f"{state.used:,}", f"{state.remaining:,}", render.duration(state.left_ns / 1e9),
            "yes" if key.leased else "",
        )
        for key in keys for state in key.states if not state.taken_away
    ]  # fmt: skip
    columns = ("limiter", "key", "limit", ">used", ">left", ">over in", "leased")
    rows.sort(key=lambda row: (row[0], row[1]))
    shown = rows if args.top == 0 else rows[: args.top]
    out.print(render.table("", columns, shown, out))
    if len(shown) < len(rows):
        print(f"{len(rows) - len(shown):,} more: --top 0 shows all")
    if money:
        _show_money(money, args.top, out)
    return 0


def _show_money(money: list[records.Money], top: int, out: Any) -> None:
    rows = [
        (
            render.escaped(each.budget), _name(each.name, each.hash), _end(each),
            f"{dollars(each.granted)}", f"{dollars(each.added)}" if each.added else "",
        )
        for each in money
    ]  # fmt: skip
    shown = rows if top == 0 else rows[:top]
    columns = ("budget", "key", "window ends (UTC)", ">granted, $", ">added, $")
    out.print(render.table("", columns, shown, out))
    if len(shown) < len(rows):
        print(f"{len(rows) - len(shown):,} more: --top 0 shows all")


def _end(each: records.Money) -> str:
    if each.minute >= 2**28 - 1:
        return "never"
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(each.minute * 60))


def _as_json(
    about: records.Summary, keys: list[records.Key], money: list[records.Money]
) -> dict[str, Any]:
    return about._asdict() | {
        "budgets": [
            {
                "budget": each.budget.decode("utf-8", "backslashreplace"),
                "key": None if each.name is None else each.name.decode("utf-8", "backslashreplace"),
                "window_ends": None if each.minute >= 2**28 - 1 else each.minute * 60,
                "granted_usd": str(dollars(each.granted)), "added_usd": str(dollars(each.added)),
            }
            for each in money
        ],
        "keys": [
            {
                "limiter": key.limiter.decode("utf-8", "backslashreplace"),
                "key": None if key.name is None else key.name.decode("utf-8", "backslashreplace"),
                "leased": key.leased,
                "limits": [
                    {
                        "limit": limits.describe(state.limit), "used": state.used,
                        "remaining": state.remaining, "seconds": state.left_ns / 1e9,
                        "taken_away": state.taken_away,
                    }
                    for state in key.states
                ],
            }
            for key in keys
        ]
    }  # fmt: skip


def _check(path: str, args: argparse.Namespace) -> int:
    found = records.problems(path)
    for each in found:
        print(f"fast-shm: {render.escaped(each)}", file=sys.stderr)
    if found:
        print(
            f"fast-shm: state file {path!r} is damaged. The next worker that opens it puts it "
            "aside and begins a new one, in which all limits count as used up: `fast-shm state "
            "import` brings an export back",
            file=sys.stderr,
        )
        return 1
    print(f"State file {render.escaped(path)} is sound.")
    return 0


def _compact(path: str, args: argparse.Namespace) -> int:
    gone, before, after = records.compact(path)
    print(
        f"Removed {render.counted(gone, 'key')} that counted no more: "
        f"{render.size(before)} before, {render.size(after)} now."
    )
    return 0


def _export(path: str, args: argparse.Namespace) -> int:
    text = json.dumps(records.export(path), indent=1)
    if args.file in (None, "-"):
        print(text)
        return 0
    # For its owner alone: it has the names of keys, and the secret of their hashes.
    files.replace(args.file, text + "\n", 0o600)
    return 0


def _read(path: str) -> str:
    if path == "-":
        return sys.stdin.read()
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError as error:
        raise exceptions.StateFileError(
            f"cannot read {path!r}: {error.strerror}; give a file that `fast-shm state export` "
            "wrote"
        ) from error


def _import(path: str, args: argparse.Namespace) -> int:
    try:
        exported = json.loads(_read(args.file))
    except ValueError as error:
        raise exceptions.StateFileError(
            f"{args.file!r} was not imported: it is no JSON ({error}); give a file that "
            "`fast-shm state export` wrote"
        ) from error
    try:
        count = records.restore(path, exported, settings.default().timeout)
    except ValueError as error:
        raise exceptions.StateFileError(f"{args.file!r} was not imported: {error}") from error
    print(f"Imported {render.counted(count, 'key')} into state file {render.escaped(path)}.")
    return 0


def _claim(path: str, args: argparse.Namespace) -> int:
    other = records.claim(path)
    print(f"State file {render.escaped(path)}, last used by host {render.escaped(other)}, is free.")
    return 0
