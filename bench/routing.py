"""What does it cost to pick one of 20 deployments, beside fast-litellm and beside plain Python?

fast-litellm picks at random whatever the strategy; plain Python does what the strategy says, on
statistics that are private to the process. And from lists that are new in each call, such as those
that a program reads from JSON. All in one process, interleaved.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from typing import Any

from bench import peers
from bench.result import OURS, REFERENCE, Plot, Result, Row, Settings, asked, ratio
from bench.timing import Loop, interleaved
from fast_litellm_shm import AdvancedRouter, get_available_deployment
from fast_litellm_shm.routing.router import STRATEGIES

DEPLOYMENTS = 20
NEW = 200  # lists of new dicts
TARGET_PEER, TARGET_PLAIN, TARGET_NEW = 2.0, 1.0, 1.0
Pick = Callable[[list[dict[str, Any]], str], Any]


def model_list() -> list[dict[str, Any]]:
    """20 deployments of one model."""
    return [
        {
            "model_name": "m",
            "litellm_params": {"model": f"openai/x{i}", "weight": 1 + i % 3},
            "model_info": {"id": f"d{i}"},
        }
        for i in range(DEPLOYMENTS)
    ]


def plainly(strategy: str) -> Pick:
    """What one would write without a library."""
    known = {f"d{i}": random.random() for i in range(DEPLOYMENTS)}

    def shuffle(listed: list[dict[str, Any]], model: str) -> Any:
        fit = [d for d in listed if d["model_name"] == model]
        return random.choices(fit, [d["litellm_params"]["weight"] for d in fit])[0]

    def least(listed: list[dict[str, Any]], model: str) -> Any:
        fit = [d for d in listed if d["model_name"] == model]
        return min(fit, key=lambda d: known[d["model_info"]["id"]])

    return shuffle if strategy == "simple_shuffle" else least


def _loop(pick: Pick, listed: list[dict[str, Any]]) -> Loop:
    def loop(calls: int) -> None:
        for _ in range(calls):
            pick(listed, "m")

    return loop


def _loop_of_new(pick: Pick, lists: list[list[dict[str, Any]]]) -> Loop:
    def loop(calls: int) -> None:
        for i in range(calls):
            pick(lists[i % NEW], "m")

    return loop


def run(settings: Settings) -> Result:
    """Measure."""
    result, listed, peer = asked(__doc__), model_list(), None
    try:
        peer = peers.need("fast_litellm")
    except peers.MissingError as error:
        result.missing["fast-litellm"] = str(error)
    loops: dict[str, tuple[str, str, Loop]] = {}
    with peers.Place() as place:
        os.environ["FAST_LITELLM_SHM_NAME"] = place.segment_name  # for the module's function
        segment = place.segment()
        text = json.dumps(listed)
        new = [json.loads(text) for _ in range(NEW)]
        for strategy in STRATEGIES:
            router = AdvancedRouter(strategy, segment=segment)
            # Of its own: a router may take a list for one of these, which costs it the comparison.
            of_new = AdvancedRouter(strategy, segment=segment)
            for i in range(DEPLOYMENTS):
                router.record(f"d{i}", 10 + i, cost=0.1 + i)
            ours = _loop(router.get_available_deployment, listed)
            loops[f"ours, {strategy}"] = (OURS, strategy, ours)
            plain = _loop(plainly(strategy), listed)
            loops[f"plain Python, {strategy}"] = (REFERENCE, strategy, plain)
            if peer is not None:
                theirs = peer.AdvancedRouter(strategy).get_available_deployment
                loops[f"fast-litellm, {strategy}"] = (
                    "fast-litellm",
                    strategy,
                    _loop(theirs, listed),
                )
            news = f"{strategy}, new dicts"
            loops[f"ours, {news}"] = (
                OURS,
                news,
                _loop_of_new(of_new.get_available_deployment, new),
            )
            if peer is not None:
                loops[f"fast-litellm, {news}"] = ("fast-litellm", news, _loop_of_new(theirs, new))
        ours = _loop(get_available_deployment, listed)
        loops["ours, function"] = (OURS, "function", ours)
        if peer is not None:
            theirs = _loop(peer.get_available_deployment, listed)
            loops["fast-litellm, function"] = ("fast-litellm", "function", theirs)
        found = interleaved({name: loop for name, (_, _, loop) in loops.items()}, settings)
    for name, (who, group, _) in loops.items():
        result.rows.append(Row(name, "ns", found[name], who, group))
    result.ratios = [
        ratio(
            result.rows,
            f"{who}, {what}",
            f"ours, {what}",
            target,
            promise="routing, 20 deployments",
        )
        for what in (*STRATEGIES, "function")
        for who, target in (("fast-litellm", TARGET_PEER), ("plain Python", TARGET_PLAIN))
        if (who, what) != ("plain Python", "function")
    ] + [
        ratio(
            result.rows,
            f"fast-litellm, {strategy}, new dicts",
            f"ours, {strategy}, new dicts",
            TARGET_NEW,
            promise="routing, lists of new dicts",
        )
        for strategy in STRATEGIES
    ]
    result.plots.append(
        Plot(
            "routing",
            "bars",
            "One of 20 deployments picked, by strategy",
            (*STRATEGIES, "function"),
            "nanoseconds a pick",
        )
    )
    return result
