"""Routes: under which rules a request counts. Rules that cannot match are not asked."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Generic, TypeVar

from fast_litellm_shm.integrations.web.paths import Readings
from fast_litellm_shm.integrations.web.request import Request
from fast_litellm_shm.integrations.web.rules import Rule

_T = TypeVar("_T")
_KEPT = 1024  # answers
_LONGEST_KEPT = 200  # characters: clients choose them, and must not fill the memory


class Routes(Generic[_T]):
    """rules: in their order, each with what is found for it; None: it exempts its requests."""

    def __init__(self, rules: Iterable[tuple[Rule, _T | None]]) -> None:
        index = _Index(rules)  # without a reference to us: no cycle
        self._find = index.find
        self._kept = functools.lru_cache(_KEPT)(index.find)

    def find(self, request: Request) -> tuple[_T, ...]:
        """For each path by which the request may be routed: the first rule that matches it, and the
        rules with limits before it that match another name of that path."""
        method, readings = request.method, request.readings
        long = len(method) + len(readings.routed[0]) > _LONGEST_KEPT
        return (self._find if long else self._kept)(method, readings)


class _Index(Generic[_T]):
    """Finds the rules by how their paths begin: ``/v1/users/`` of ``/v1/users/{id}``."""

    def __init__(self, rules: Iterable[tuple[Rule, _T | None]]) -> None:
        self._rules = tuple(rules)
        self._beginnings: dict[str, list[int]] = {}
        for place, (rule, _) in enumerate(self._rules):
            self._beginnings.setdefault(rule.beginning, []).append(place)
        self._lengths = sorted({len(each) for each in self._beginnings})

    def find(self, method: str, readings: Readings) -> tuple[_T, ...]:
        _, routed, aliases = readings
        found = []
        for place in self._places((*routed, *aliases)):
            rule, opened = self._rules[place]
            if not rule.takes(method):
                continue
            left = tuple(path for path in routed if not rule.has(path))
            if opened is not None and (
                left != routed or any(map(rule.may_have, routed)) or any(map(rule.has, aliases))
            ):
                found.append(opened)
            routed = left
            if not routed:
                break
        return tuple(found)

    def _places(self, paths: Iterable[str]) -> list[int]:
        """Of the rules that may match one of the paths, in their order."""
        found: set[int] = set()
        for path in paths:
            for length in self._lengths:
                if length > len(path):
                    break
                found.update(self._beginnings.get(path[:length], ()))
        return sorted(found)
