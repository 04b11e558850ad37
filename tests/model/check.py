"""Check the models (claim.pml, shared.pml) with spin: what holds, and what is caught.

usage: check.py [--long] [--list] [NAME ...]

Each run is exhaustive: all interleavings, all choices. A planted fault must be caught, and by the
property that is named here. The exit status is 0 when every verdict is the expected one.
"""

from __future__ import annotations

import argparse
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

HERE = Path(__file__).parent
HOLDS = "holds"
DEADLINE = 7200  # seconds for one run: against a hang, not a measure
MEGABYTES = {False: 3500, True: 14000}  # of one run at most, in the bounded and in the long form
DEPTH = 1_000_000  # of the search; a run that would need more says so, and fails


@dataclass(frozen=True)
class Run:
    name: str
    what: str
    defines: str
    expected: str = HOLDS
    long: bool = False
    same_states_as: str = ""
    model: str = "claim.pml"


TWO = "SLOTS=2 SYMMETRY"
THREE = "SLOTS=3 LAST_TICK=3 SYMMETRY"
PLANT = "SLOTS=2 LAST_TICK=3"
RUNS = [
    Run("one_key", "3 processes claim one key, 2 slots", f"{TWO} THIRD_KEY=A"),
    Run(
        "tso",
        "the same with store buffers: all stores are locked, so nothing is added",
        f"{TWO} THIRD_KEY=A TSO",
        same_states_as="one_key",
    ),
    Run("burst", "a limit of 2 in a period: charges of a live slot", f"{TWO} BURST=2 LAST_TICK=3"),
    Run(
        "two_keys_alone",
        "3 processes, 2 keys; from every state, one that is alone finishes",
        f"{TWO} LAST_TICK=3 ALONE",
    ),
    Run(
        "three_slots",
        "3 processes, 2 keys, 3 slots, few starts",
        "SLOTS=3 LAST_TICK=2 SYMMETRY FEW_STARTS",
    ),
    # the longer form
    Run("two_keys", "3 processes, 2 keys, 2 slots, one tick more", TWO, long=True),
    Run("three_slots_a_tick_more", "the same, and one tick more", f"{THREE} FEW_STARTS", long=True),
    Run("three_slots_two_keys", "3 slots, all starts", THREE, long=True),
    Run("three_slots_one_key", "3 slots, all starts", f"{THREE} THIRD_KEY=A", long=True),
    Run("three_slots_alone", "3 slots, alone", f"{THREE} FEW_STARTS ALONE", long=True),
    Run("dead_claimers", "the key's own claimers died", f"{TWO} DEAD_CLAIMERS ALONE", long=True),
    Run(
        "other_home",
        "the key's first candidate is the second slot",
        f"{THREE} FEW_STARTS HOME_OF_A=1 HOME_OF_B=2",
        long=True,
    ),
    Run("hints", "`who` is loaded before the pair", f"{TWO} HINTS LAST_TICK=3", long=True),
    Run("two_calls", "2 calls each", f"{TWO} CALLS=2 LAST_TICK=3 FEW_STARTS", long=True),
    Run(
        "calls_for_ever",
        "2 processes call for ever",
        "SLOTS=2 PROCESSES=2 CALLS=0 LAST_TICK=5 SYMMETRY",
        long=True,
    ),
    Run("shared", "a key leaves the counter that it shares", "FAULT=0", model="shared.pml"),
    # planted faults
    *(
        Run(name, what, f"FAULT={fault}", "charge_lost", model="shared.pml")
        for fault, (name, what) in enumerate(
            (
                ("shared_no_look", "the counter is charged without a look for the key's slot"),
                ("shared_no_write", "who leaves the counter does not write it"),
                ("shared_no_word", "nothing says that the counter is in use"),
                ("shared_early_look", "the look comes before the counter is read"),
            ),
            1,
        )
    ),
    Run("no_look", "confirm without the second look", f"{PLANT} NO_LOOK", "two_confirmed_slots"),
    Run(
        "state_of_the_call",
        "first state as of the beginning of the call",
        f"{PLANT} STATE_OF_THE_CALL",
        "limit_exceeded",
    ),
    Run(
        "state_at_publication",
        "first state computed before the look",
        f"{PLANT} STATE_AT_PUBLICATION SYMMETRY",
        "limit_exceeded",
    ),
    Run(
        "no_ticket",
        "pendings of one key are the same value",
        f"{PLANT} NO_TICKET THIRD_KEY=A",
        "two_confirmed_slots",
    ),
    Run(
        "stop_at_empty",
        "looks stop at an empty slot",
        f"{THREE} FEW_STARTS THIRD_KEY=A STOP_AT_EMPTY",
        "two_confirmed_slots",
    ),
    Run(
        "evict_once",
        "an eviction that failed is not looked at again",
        f"{PLANT} EVICT_ONCE",
        "two_confirmed_slots",
    ),
    Run(
        "evict_confirmed",
        "a confirmed slot in a higher place is evicted",
        f"{PLANT} EVICT_CONFIRMED",
        "live_key_forgotten",
    ),
    Run("take_live", "a live slot is the last resort", f"{PLANT} TAKE_LIVE", "live_key_forgotten"),
    Run(
        "no_clocks_differ",
        "a slot is free as soon as it expired",
        f"{PLANT} NO_CLOCKS_DIFFER",
        "limit_exceeded",
    ),
    Run(
        "compare_who_only",
        "the swap compares half of the pair",
        f"{PLANT} COMPARE_WHO_ONLY",
        "limit_exceeded",
    ),
    Run(
        "plain_publication",
        "x86-TSO: published by a plain store",
        f"{PLANT} PLAIN_PUBLICATION",
        "limit_exceeded",
    ),
    Run(
        "buffered_publication",
        "x86-TSO: published by a swap that is not a barrier",
        f"{PLANT} BUFFERED_PUBLICATION",
        "two_confirmed_slots",
    ),
    Run(
        "no_fence",
        "a swap that later loads may pass, and no fence",
        f"{PLANT} NO_FENCE",
        "two_confirmed_slots",
    ),
    Run(
        "no_last_resort",
        "a stale pending slot is never taken",
        f"{PLANT} NO_LAST_RESORT ALONE",
        "hindered_by_the_dead",
    ),
    Run(
        "wait_for_pending",
        "wait until a pending slot is confirmed",
        f"{PLANT} WAIT_FOR_PENDING ALONE",
        "hindered_by_the_dead",
    ),
]


@dataclass(frozen=True)
class Result:
    verdict: str
    states: int
    seconds: float
    problem: str = ""


def commands(run: Run, long: bool) -> list[list[str]]:
    optimise = (
        "-O2" if long and run.expected == HOLDS else "-O1" if run.expected == HOLDS else "-O0"
    )
    return [
        ["spin", "-a", *(f"-D{d}" for d in run.defines.split()), str(HERE / run.model)],
        [
            "gcc",
            optimise,
            "-w",
            "-DSAFETY",
            "-DNOREDUCE",
            "-DCOLLAPSE",
            f"-DMEMLIM={MEGABYTES[long]}",
            "-o",
            "pan",
            "pan.c",
        ],
        ["./pan", f"-m{DEPTH}", "-w24"],
    ]


def read_verdict(output: str) -> str:
    if found := re.search(r"assertion violated\s+(.*?) \(at depth", output):
        return found[1].strip("!() ")
    if "errors: 0" in output and "max search depth too small" not in output:
        return HOLDS if "Search not completed" not in output else "not completed"
    return "not completed"


def check(run: Run, long: bool) -> Result:
    used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    with tempfile.TemporaryDirectory() as where:
        for command in commands(run, long):
            done = subprocess.run(
                command, cwd=where, capture_output=True, text=True, timeout=DEADLINE, check=False
            )
            output = done.stdout + done.stderr
            if done.returncode and command[0] != "./pan":
                return Result("not made", 0, 0, f"{' '.join(command)}\n{output}")
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - used
    states = re.search(r"(\d+) states, stored", output)
    verdict = read_verdict(output)
    return Result(verdict, int(states[1]) if states else 0, seconds, output)


def judge(run: Run, result: Result, earlier: dict[str, Result]) -> bool:
    if result.verdict != run.expected:
        return False
    same = earlier.get(run.same_states_as)
    return same is None or same.states == result.states


def report(chosen: list[Run], long: bool) -> int:
    results: dict[str, Result] = {}
    failed = 0
    began = time.monotonic()
    print(f"{'run':<22} {'states':>11} {'cpu s':>7}  {'verdict':<22} {'expected':<22}")
    for run in chosen:
        result = results[run.name] = check(run, long)
        good = judge(run, result, results)
        failed += not good
        print(
            f"{run.name:<22} {result.states:>11,} {result.seconds:>7.1f}  {result.verdict:<22}"
            f" {run.expected:<22} {'' if good else 'FAILED'}",
            flush=True,
        )
        if not good:
            print(f"  {run.what}. {result.problem[-2000:]}\n  To repeat, and to see the steps:")
            plain = replace(
                run, defines=run.defines.replace(" SYMMETRY", "")
            )  # spin -t cannot sort
            make_and_run = commands(plain, long)
            show = ["spin", "-p", "-k", f"{run.model}.trail", *make_and_run[0][2:]]
            for command in (*make_and_run, show):
                print(f"    {' '.join(command)}")
    cpu = sum(r.seconds for r in results.values())
    print(f"{time.monotonic() - began:.0f} s, of which {cpu:.0f} s of processor time")
    print(f"{len(chosen) - failed} passed, {failed} failed")
    return int(failed > 0)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--long", action="store_true", help="the longer form")
    parser.add_argument("--list", action="store_true", help="list the runs")
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these runs")
    options = parser.parse_args()
    chosen = (
        [r for r in RUNS if r.name in options.names]
        if options.names
        else [r for r in RUNS if options.long or not r.long]
    )
    if options.list:
        for run in chosen:
            print(f"{run.name:<22} {run.what}")
        return 0
    for tool in ("spin", "gcc"):
        if not shutil.which(tool):
            print(f"there is no {tool}: apt-get install spin gcc")
            return 2
    return report(chosen, options.long)


if __name__ == "__main__":
    sys.exit(main())
