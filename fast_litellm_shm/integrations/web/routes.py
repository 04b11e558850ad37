"""Routes: under which rules a request counts. Rules that cannot match are not asked."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Generic, TypeVar

from fast_litellm_shm.integrations.web.request import KEPT, Target
from fast_litellm_shm.integrations.web.rules import Rule

_T = TypeVar("_T")


class Routes(Generic[_T]):
    """rules: in their order, each with what is found for it; None: it exempts its requests."""

    def __init__(self, rules: Iterable[tuple[Rule, _T | None]]) -> None:
        #: For each path by which the request may be routed: the first rule that matches it, and the
        #: rules with limits before it that match another name of that path.
        self.find = _Index(rules).find  # without a reference to us: no cycle
        #: find() of a target that is kept.
        self.kept = functools.lru_cache(KEPT)(self.find)


class _Index(Generic[_T]):
    """Finds the rules by how their paths begin: ``/v1/users/`` of ``/v1/users/{id}``."""

    def __init__(self, rules: Iterable[tuple[Rule, _T | None]]) -> None:
        self._rules = tuple(rules)
        self._beginnings: dict[str, list[int]] = {}
        for place, (rule, _) in enumerate(self._rules):
            self._beginnings.setdefault(rule.beginning, []).append(place)
        self._lengths = sorted({len(each) for each in self._beginnings})

    def find(self, target: Target) -> tuple[_T, ...]:
        method, (_, routed, aliases) = target.method, target.readings
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
