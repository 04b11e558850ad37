"""Power cuts: what a disk may have after each write and sync that tests/durable/cut_recorder.c has
noted. What was synced is there; of what was not, anything may be."""

from __future__ import annotations

import itertools
import os
import random
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).parents[1] / "durable" / "cut_recorder.c"
SECTOR = 512


def recorder(folder: Path) -> str:
    """The library, compiled."""
    made = str(folder / "cut_recorder.so")
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-o", made, str(SOURCE),
         "-ldl"],
        check=True,
    )  # fmt: skip
    return made


class Record(NamedTuple):
    kind: str
    name: str
    offset: int
    data: bytes


def records(log: Path) -> Iterator[Record]:
    raw, at = log.read_bytes(), 0
    while at < len(raw):
        kind, named, offset, length = struct.unpack_from("<cIQQ", raw, at)
        at += 21
        name, data = raw[at : at + named], raw[at + named : at + named + length]
        at += named + length
        yield Record(kind.decode(), name.decode(), offset, data)


def _written(content: bytes, each: Record) -> bytes:
    if each.kind == "t":
        return content[: each.offset].ljust(each.offset, b"\0")
    content = content.ljust(each.offset, b"\0")
    return content[: each.offset] + each.data + content[each.offset + len(each.data) :]


@dataclass
class File:
    synced: bytes = b""
    pending: list[Record] = field(default_factory=list)

    def content(self, kept: list[Record]) -> bytes:
        found = self.synced
        for each in kept:
            found = _written(found, each)
        return found


@dataclass
class Disk:
    """names: as they are now; synced: as they are on the disk."""

    names: dict[str, File] = field(default_factory=dict)
    synced: dict[str, File] = field(default_factory=dict)

    def play(self, each: Record) -> None:
        if each.kind == "c":
            self.names[each.name] = File()
        elif each.kind in "wt":
            self.names.setdefault(each.name, File()).pending.append(each)
        elif each.kind == "s":
            file = self.names[each.name]
            file.synced, file.pending = file.content(file.pending), []
        elif each.kind == "u":
            self.names.pop(each.name, None)
        elif each.kind == "r":
            self.names[each.data.decode()] = self.names.pop(each.name)
        elif each.kind == "d":
            self.synced = dict(self.names)

    def is_at_rest(self) -> bool:
        return self.names == self.synced and not any(f.pending for f in self.names.values())

    def cuts(self, seed: int, some: int) -> Iterator[dict[str, bytes]]:
        """What the disk may have now: nothing of what is not synced, all of it, all but one, one
        alone, the last one torn; and ``some`` more by chance."""
        pending = [each for file in self.names.values() for each in file.pending]
        chance = random.Random(seed)
        choices: list[list[Record]] = [[], pending]
        if len(pending) > 1:
            choices += [[each for each in pending if each is not one] for one in pending]
            choices += [[one] for one in pending]
        torn = [each for each in pending[-1:] if len(each.data) > SECTOR]
        for last in torn:
            cut = SECTOR * chance.randrange(1, -(-len(last.data) // SECTOR))
            choices.append([*pending[:-1], last._replace(data=last.data[:cut])])
        for _ in range(some if len(pending) > 2 else 0):
            choices.append([each for each in pending if chance.random() < 0.5])
        for names, kept in itertools.product(self._names(), choices):
            yield {
                name: file.content([each for each in kept if each.name == name])
                for name, file in names.items()
            }

    def _names(self) -> Iterator[dict[str, File]]:
        yield self.names
        if self.names.keys() != self.synced.keys():
            yield self.synced
            for name in self.names.keys() ^ self.synced.keys():
                yield {each: f for each, f in (self.synced | self.names).items() if each != name}


def put(files: dict[str, bytes], folder: Path) -> None:
    """Make the folder what the disk has. What is in memory alone (mapped files) is gone."""
    for old in folder.iterdir():
        old.unlink()
    for name, content in files.items():
        if not name.endswith(("-shm", ".lock")) and os.sep not in name:
            (folder / name).write_bytes(content)


def played(log: Path) -> Iterator[tuple[int, Record, Disk]]:
    """The disk after each record. It is the same object, which goes on."""
    disk = Disk()
    for number, each in enumerate(records(log)):
        disk.play(each)
        yield number, each, disk


__all__ = ["Disk", "played", "put", "recorder"]
