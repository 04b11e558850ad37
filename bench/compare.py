"""``python -m bench.compare A.json B.json``: do two runs agree within their spread?

Ratio by ratio: they agree where the spreads, from the 10th to the 90th percentile, overlap. Exit
status 1 where one does not. For two runs of one state, or to see what a change made of it.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.result import number


def ratios(report: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """What was measured, by question and name."""
    return {
        (question, each["name"]): each["found"]
        for question, result in report["questions"].items()
        for each in result["ratios"]
        if each["found"] is not None
    }


def apart(one: dict[str, Any], two: dict[str, Any]) -> bool:
    """Whether the spreads have nothing in common."""
    return bool(one["high"] < two["low"] or two["high"] < one["low"])


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    for name in ("first", "second"):
        parser.add_argument(name, type=pathlib.Path, metavar=f"{name.upper()}.json")
    parser.add_argument("--all", action="store_true", help="those that agree, too")
    options = parser.parse_args()
    one, two = (
        ratios(json.loads(path.read_text(encoding="utf-8")))
        for path in (options.first, options.second)
    )
    both = [key for key in one if key in two]
    differ = [key for key in both if apart(one[key], two[key])]
    table = Table("question", "compared", "first", "spread", "second", "spread")
    for key in both if options.all else differ:
        cells = [
            text
            for found in (one[key], two[key])
            for text in (
                number(found["median"]),
                f"{number(found['low'])} – {number(found['high'])}",
            )
        ]
        table.add_row(*key, *cells, style="bold red" if key in differ else "")
    console = Console()
    if table.row_count:
        console.print(table)
    console.print(f"{len(both) - len(differ)} of {len(both)} ratios agree within their spread")
    for which, mine, other in (("first", one, two), ("second", two, one)):
        alone = [f"{question}: {name}" for question, name in mine if (question, name) not in other]
        if alone:
            console.print(f"only in the {which}: {'; '.join(alone)}", markup=False)
    return 1 if differ or not both else 0


if __name__ == "__main__":
    sys.exit(main())
