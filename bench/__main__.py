"""``python -m bench``: every question beside its peers, in one run. ``make bench`` installs the
peers first. Writes DATE.json, DATE.md (the targets first) and plots, of a second run on one day
DATE-HHMM; peers that are missing are named."""

from __future__ import annotations

import argparse
import datetime
import json
import pathlib
import sys

from bench import report
from bench.questions import APART, QUESTIONS, ask_all
from bench.result import Settings

ROUNDS, QUICK_ROUNDS, LEAST_ROUNDS = 41, 11, 5
PASSES = 5  # of a whole run; a quick one has one
HERE = pathlib.Path(__file__).resolve().parent


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in (*QUESTIONS, *APART):
            raise argparse.ArgumentTypeError(
                f"{name!r} is none of {', '.join((*QUESTIONS, *APART))}"
            )
    return names


def _rounds(text: str) -> int:
    try:
        rounds = int(text)
    except ValueError:
        rounds = 0
    if rounds < LEAST_ROUNDS:
        raise argparse.ArgumentTypeError(f"must be an int of {LEAST_ROUNDS} or more, not {text!r}")
    return rounds


def main() -> int:
    """Exit status 1 where a question failed to run; a target that is not reached is no failure."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--iterations",
        type=_rounds,
        metavar="N",
        help=f"rounds behind each median, {LEAST_ROUNDS} or more (default {ROUNDS}; {QUICK_ROUNDS} "
        "with --quick)",
    )
    parser.add_argument("--quick", action="store_true", help="under 2 minutes: fewer, shorter")
    parser.add_argument(
        "--only", type=_names, metavar="NAME[,NAME]", help=f"of {', '.join((*QUESTIONS, *APART))}"
    )
    parser.add_argument("--json", action="store_true", help="the JSON to stdout; writes no files")
    parser.add_argument(
        "--out", type=pathlib.Path, default=HERE / "results", help="folder (default bench/results)"
    )
    parser.add_argument(
        "--anonymous",
        action="store_true",
        help="leave out which processor and kernel this is: for a report that is published",
    )
    options = parser.parse_args()
    rounds = options.iterations or (QUICK_ROUNDS if options.quick else ROUNDS)
    passes = 1 if options.quick else PASSES
    settings = Settings(-(-rounds // passes), options.quick, passes)

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    results = ask_all(options.only or QUESTIONS, settings, tell)
    now = datetime.datetime.now().astimezone()
    found = report.as_json(results, settings, now, report.where(options.anonymous))
    if options.json:
        print(json.dumps(found, indent=1, allow_nan=False))
    else:
        report.write(results, found, options.out, report.free_stem(options.out, now))
    return 1 if any(result.failed for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
