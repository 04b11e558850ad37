"""Exceptions at any instruction: those that a signal handler raises (Ctrl-C, Celery's time limits).

``at_each_instruction`` raises before each instruction of the package's Python in turn, so none is
missed. ``by_signals`` raises out of a real signal handler at random instants, so the interpreter's
own code is met too, wherever it looks for signals."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import CodeType, FrameType
from typing import Any

import fast_litellm_shm

_PACKAGE = os.path.dirname(fast_litellm_shm.__file__)
# Of each block. 100,000 by hand: FAST_SHM_TEST_RAISES=100000 (docs/reliability.md).
RAISES = int(os.environ.get("FAST_SHM_TEST_RAISES", "1500"))
# Of the thousands of instructions of a call on an event loop, each so many-th. Each by hand:
# FAST_SHM_TEST_EVERY=1.
EVERY = int(os.environ.get("FAST_SHM_TEST_EVERY", "5"))


class Interrupted(BaseException):
    """Nobody's ``except Exception`` is to stop it."""


def at_each_instruction(
    run: Callable[[], object], check: Callable[[str], object], every: int = 1
) -> int:
    """``run()`` again and again: an exception before its first instruction, its second, and so on,
    in ``run`` itself and in the package, until it ends by itself. check(where): called after each.
    every: 2 leaves out each second one, and so on. How many instructions there were."""
    at = 0
    while (where := _raise_at(run, at)) is not None:
        check(f"raised before instruction {at}: {where}")
        at += every
    check("ended by itself")
    return at


def _raise_at(run: Callable[[], object], at: int) -> str | None:
    """Where it raised; None: ``run`` has fewer instructions."""
    left, where, own = at, None, getattr(run, "__code__", None)
    thread = threading.get_ident()  # no signal handler runs in another one

    def reached(code: CodeType, line: int | None) -> None:
        nonlocal left, where
        if threading.get_ident() != thread:
            return
        if where is not None or not (code is own or code.co_filename.startswith(_PACKAGE)):
            return
        if left == 0:
            where = f"{os.path.basename(code.co_filename)}:{line} {code.co_name}"
            raise Interrupted
        left -= 1

    with suppress(Interrupted), _watched(reached):
        run()
    return where


@contextmanager
def _watched(reached: Callable[[CodeType, int | None], None]) -> Iterator[None]:
    """reached(code, line or offset): before each instruction."""
    if sys.version_info >= (3, 12):  # whose settrace() misses some
        tool, monitoring = 4, sys.monitoring
        monitoring.use_tool_id(tool, "interrupts")
        event = monitoring.events.INSTRUCTION
        monitoring.register_callback(tool, event, reached)
        monitoring.set_events(tool, event)
        try:
            yield
        finally:
            monitoring.set_events(tool, 0)
            monitoring.register_callback(tool, event, None)
            monitoring.free_tool_id(tool)
        return

    def look(frame: FrameType, event: str, _: object) -> Any:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            reached(frame.f_code, frame.f_lineno)
        return look

    before = sys.gettrace()
    sys.settrace(look)
    try:
        yield
    finally:
        sys.settrace(before)


def by_signals(
    run: Callable[[], object],
    raises: int,
    longest: float = 150e-6,
    check: Callable[[str], object] = str,
) -> None:
    """``run()`` again and again, while a signal's handler raises so many times, each at a random
    instant up to ``longest`` seconds after the one before. check(where): called after each."""
    chance, done, armed = random.Random(raises), 0, False

    def handler(*_: object) -> None:
        if armed:
            raise Interrupted

    before = signal.signal(signal.SIGALRM, handler)
    try:
        while done < raises:
            try:
                armed = True
                # Once more after that: a __del__ may have swallowed it.
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-6, longest), 0.01)
                while True:
                    run()
            except Interrupted:
                armed = False
                done += 1
            check(f"raise {done}")
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
