"""How many instructions does each hot path of the core take, and is that more than it was?

``make instructions`` counts them with callgrind (``bench/hot.c``, 1,000 calls of each path) and
compares with ``bench/instructions.json``; it fails where a path takes more. Instructions, not
seconds: the counts are the same in every run, however busy the machine is. Not counted: the
kernel's clock, since how often it is asked depends on the time that passes.

Another compiler or other flags make other instructions. What the committed counts were made with
stands beside them; where that differs, it is said, and the margin is wider. To renew them, after a
change that is worth its instructions: ``make instructions INSTRUCTIONS=--renew``.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

COMMITTED = Path(__file__).with_suffix(".json")
CALLS = 1000  # of each path: CALLS in hot.c
MARGIN = 0.03  # made alike: the rest is where an allocator or a linker put things
WIDER = 0.25  # made by another compiler: gcc 12 and clang 14 differ by up to 23 %
LEAST = 5  # instructions: fewer are no finding, however short the path

PATH = re.compile(r"^desc: Trigger: Client Request: (.+)$", re.M)
TOTAL = re.compile(r"^totals: (\d+)$", re.M)


def count(program: str) -> dict[str, float]:
    """Instructions a call, by path."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            ["valgrind", "-q", "--tool=callgrind", "--collect-atstart=no"]
            + [f"--callgrind-out-file={folder}/out", program],
            check=True,
        )
        dumps = [path.read_text(encoding="utf-8") for path in Path(folder).iterdir()]
    found = ((PATH.search(dump), TOTAL.search(dump)) for dump in dumps)
    return {
        path[1]: round(int(total[1]) / CALLS, 1)
        for path, total in sorted(found, key=lambda pair: pair[0][1] if pair[0] else "")
        if path and total
    }


def compare(
    counts: dict[str, float], committed: dict[str, float], margin: float
) -> list[tuple[str, float, float, str]]:
    """Rows of path, committed, counted and what is to be said of it; "" where it is as it was."""
    rows = []
    for name in sorted(counts.keys() | committed.keys()):
        was, now = committed.get(name, 0.0), counts.get(name, 0.0)
        more = now - was
        said = ""
        if name not in counts or name not in committed:
            said = "ONLY COMMITTED" if name in committed else "NOT COMMITTED"
        elif more > LEAST and more > was * margin:
            said = "MORE"
        elif -more > LEAST and -more > was * margin:
            said = "fewer: renew, so that it stays so"
        rows.append((name, was, now, said))
    return rows


def made_with(compiler: str) -> dict[str, str]:
    """What the counts depend on, apart from the sources."""
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True)
    files = Path("csrc/cflags"), Path("csrc/hardening")
    flags = " ".join(each.read_text(encoding="utf-8").strip() for each in files)
    return {
        "compiler": re.sub(r"^cc\b", "gcc", version.stdout.splitlines()[0]),
        "flags": flags,
        "machine": platform.machine(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="make instructions", description=__doc__)
    parser.add_argument("program", help="bench/hot.c, compiled")
    parser.add_argument("compiler", help="by this compiler")
    parser.add_argument("--renew", action="store_true", help="commit what is counted now")
    asked = parser.parse_args()
    made, counts = made_with(asked.compiler), count(asked.program)
    if asked.renew:
        COMMITTED.write_text(json.dumps({"made_with": made, "counts": counts}, indent=2) + "\n")
        print(f"{COMMITTED}: {len(counts)} paths")
        return 0
    committed: dict[str, Any] = json.loads(COMMITTED.read_text(encoding="utf-8"))
    was = committed["made_with"]
    if made["machine"] != was["machine"]:
        print(f"the counts are of {was['machine']}: nothing to compare with on {made['machine']}")
        return 0
    margin = MARGIN if made == was else WIDER
    for what in made:
        if made[what] != was[what]:
            print(f"{what}: {made[what]}; the committed counts: {was[what]}")
    print(f"instructions a call; {margin:.0%} more is a failure\n")
    print(f"{'':40} {'committed':>10} {'now':>8}")
    rows = compare(counts, committed["counts"], margin)
    for name, before, now, said in rows:
        print(f"{name:40} {before:10.1f} {now:8.1f}  {said}")
    if any(said.isupper() for *_, said in rows):
        print("\nMore instructions than committed: find out why, or see --renew in " + __file__)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
