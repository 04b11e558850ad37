"""``fast-shm cache``: list, make and remove the files that tokens are counted with."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time

from fast_litellm_shm import exceptions
from fast_litellm_shm.cli import render, rm, vocabularies
from fast_litellm_shm.tokens import encoding, vocabulary

_BUILT = ("cl100k_base", "o200k_base")  # without a name: those of the models in use

# What a state means, and what to do.
_NOTES = {
    vocabularies.OLD: "old: made for another version of tiktoken or of this library, and used by "
    "no new worker. `fast-shm cache rm --old` removes it.",
    vocabularies.UNFINISHED: "unfinished: the process that wrote it was killed. "
    "`fast-shm cache rm --old` removes it.",
    vocabularies.WRITING: "being written: a process is making it at this moment.",
    vocabularies.DELETED: "deleted: it was removed or replaced while processes use it. They count "
    "right, and share it among them until they end.",
}
_REFUSED = (
    "{}: no worker uses it, as it is. The first one that needs it replaces it, or "
    "`fast-shm cache build`."
)


def _print(files: list[vocabularies.Found], folder: str) -> None:
    def cells(each: vocabularies.Found) -> tuple[str, ...]:
        return (
            each.encoding,
            each.tiktoken,
            "" if each.size is None else render.size(each.size),
            "" if each.age is None else render.brief(each.age),
            str(len(each.pids)),
            each.state,
        )

    out = render.console()
    columns = ("encoding", "tiktoken", ">size", ">age", ">processes", "state")
    out.print(folder, style="bold", soft_wrap=True)
    out.print(render.table("", columns, [cells(each) for each in files], out))
    for state in sorted({each.state for each in files} - {vocabularies.WHOLE}):
        out.print(_NOTES.get(state, _REFUSED.format(state)), style="yellow", soft_wrap=True)


def _list(args: argparse.Namespace) -> int:
    folder = vocabularies.cache_folder()
    files = vocabularies.found(folder)
    if args.json:
        rows = [
            {
                "encoding": each.encoding,
                "tiktoken": each.tiktoken,
                "path": each.path,
                "size_bytes": each.size,
                "age_seconds": each.age,
                "pids": each.pids,
                "state": each.state or None,
            }
            for each in files
        ]
        print(json.dumps({"folder": folder, "files": rows}, indent=1))
    elif files:
        _print(files, render.escaped(folder))
    else:
        print(
            f"No file in {render.escaped(folder)}: the first process that counts tokens makes one, "
            "or `fast-shm cache build`."
        )
    return 0


# build -------------------------------------------------------------------------------------------


def _make_folder(folder: str) -> None:
    """Other users may read it, so that root can make the files of an image."""
    try:
        os.makedirs(folder, mode=0o755, exist_ok=True)
        why = "" if os.access(folder, os.W_OK | os.X_OK) else "this user may not write there"
    except OSError as error:
        why = error.strerror or str(error)
    if why:
        raise exceptions.FastShmError(
            f"cannot write to {render.escaped(folder)}: {why}. Set FAST_LITELLM_SHM_CACHE to a "
            "folder that this user may write"
        )


def _build_one(name: str) -> None:
    names = encoding.names()
    if name not in names:
        raise exceptions.FastShmError(
            f"there is no encoding '{render.escaped(name)}'; there are {', '.join(sorted(names))}"
        )
    path = vocabulary.path_of(name)
    if path is None:
        raise exceptions.FastShmError(
            f"no file of {name} can be kept: tiktoken has no *.dist-info that tells its version. "
            "Install it with pip"
        )
    path = os.path.abspath(path)
    shown, before = render.escaped(path), ""
    if os.path.lexists(path):
        before = vocabularies.refusal(path)
        if not before:
            print(f"{name} is there: {shown} ({render.size(os.path.getsize(path))}).", flush=True)
            return
    begun = time.monotonic()
    _make_folder(os.path.dirname(path))
    made = vocabulary.compile_encoding(encoding.load(name))
    if made is None:
        raise exceptions.FastShmError(
            f"no file of {name} was made: the engine does not know its pattern, or this version of "
            "tiktoken. Workers count with tiktoken itself"
        )
    try:
        made.save(path)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", "something else lies there: a folder, or a device")
        raise exceptions.FastShmError(f"cannot write {shown}: {why}") from error
    if after := vocabularies.refusal(path):  # a file system that does as it likes with owners
        raise exceptions.FastShmError(f"{shown} was written, but no worker would use it: {after}")
    took = render.duration(time.monotonic() - begun)
    again = f" (there was one: {before})" if before else ""
    print(f"Built {name} in {took}{again}: {shown} ({render.size(made.size)}).", flush=True)


def _closed_to_others(folder: str) -> str | None:
    """The folder on the way there that keeps other users out."""
    while True:
        if not os.stat(folder).st_mode & 0o001:
            return folder
        if folder == os.path.dirname(folder):
            return None
        folder = os.path.dirname(folder)


def _build(args: argparse.Namespace) -> int:
    failed = False
    for name in dict.fromkeys(args.encoding or _BUILT):
        try:
            _build_one(name)
        except exceptions.FastShmError as error:
            failed = True
            print(f"fast-shm: {error}", file=sys.stderr)
    folder = vocabularies.cache_folder()
    closed = _closed_to_others(folder) if os.geteuid() == 0 and os.path.isdir(folder) else None
    if closed and not failed:
        print(
            f"Only root's processes can use them: {render.escaped(closed)} keeps other users out. "
            "If workers run as another user, set FAST_LITELLM_SHM_CACHE to a folder elsewhere."
        )
    return 1 if failed else 0


# rm ----------------------------------------------------------------------------------------------


def _chosen(args: argparse.Namespace, folder: str) -> list[vocabularies.Found]:
    files = [each for each in vocabularies.found(folder) if each.state != vocabularies.DELETED]
    there = dict.fromkeys(each.encoding for each in files)
    for name in args.encoding:
        if name not in there:
            raise exceptions.FastShmError(
                f"there is no file of '{render.escaped(name)}' in {render.escaped(folder)}; there "
                f"are files of {', '.join(there) or 'no encoding'}"
            )
    return [
        each
        for each in files
        if (not args.encoding or each.encoding in args.encoding)
        and (each.is_left_over or not args.old)
    ]


def _is_confirmed(used: list[vocabularies.Found]) -> bool:
    for each in used:
        pids = ", ".join(map(str, each.pids))
        print(
            f"{each.encoding} is in use by {render.counted(len(each.pids), 'process')}: {pids}",
            file=sys.stderr,
        )
    print(
        "They would go on with the removed file. New processes would make and share another one.",
        file=sys.stderr,
    )
    return rm.is_agreed()


def _remove(args: argparse.Namespace) -> int:
    folder = vocabularies.cache_folder()
    chosen = _chosen(args, folder)
    for each in chosen:
        if each.state == vocabularies.WRITING:
            print(f"Left alone: {render.escaped(each.path)}, which a process is writing now.")
    chosen = [each for each in chosen if each.state != vocabularies.WRITING]
    if not chosen:
        print(f"Nothing to remove in {render.escaped(folder)}.")
        return 0
    used = [each for each in chosen if each.pids]
    if used and not args.yes and not _is_confirmed(used):
        return 1
    removed = rm.unlink([each.path for each in chosen])
    print(f"Removed {render.counted(removed, 'file')} from {render.escaped(folder)}.")
    return 0 if removed == len(chosen) else 1


def run(args: argparse.Namespace) -> int:
    """List, make or remove the files."""
    if args.action == "build":
        return _build(args)
    try:
        return _remove(args) if args.action == "rm" else _list(args)
    except OSError as error:
        folder = render.escaped(vocabularies.cache_folder())
        raise exceptions.FastShmError(f"cannot read {folder}: {error.strerror}") from error
