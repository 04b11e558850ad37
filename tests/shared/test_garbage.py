"""No sequence of Python calls crashes the interpreter: destructors in garbage cycles call whatever
they like, so do keys and costs, at its end too. In processes of their own, which may crash."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from fast_litellm_shm import Segment

# Makes one of each, and calls all that a class offers, with odd arguments too.
_SCENE = """
import faulthandler, gc, os, random, sys, threading
faulthandler.enable()
faulthandler.dump_traceback_later(100, exit=True)
sys.unraisablehook = bool  # a destructor's error is its own
from fast_litellm_shm import *
from fast_litellm_shm._shared import performance as monitoring
from fast_litellm_shm.tokens import counter as tokens
from fast_litellm_shm.integrations.limits import ShmStorage
from fast_litellm_shm._shared.native import Memo, address

NAME = os.environ["FAST_LITELLM_SHM_NAME"]

def storage(s):
    try:
        return ShmStorage(f"shm://{NAME}")
    except Exception:
        return None

def make(s, n):
    pool = SimpleConnectionPool(f"p{n}", segment=s)
    pool.bind(lambda _: Mine(), lambda each: each.close())
    limiter = RateLimiter(Limit(10, per=1), Window(20, per=2), name=f"l{n}", segment=s)
    slots = ConcurrencyLimiter(3, name=f"c{n}", segment=s)
    quota = Quota(rpm=10, tpm=100, max_parallel=2, name=f"q{n}", segment=s)
    router = AdvancedRouter("least_busy", name=f"r{n}", segment=s)
    memo = Memo((s, s._handle), address(s._handle), 7, len)
    recorder = monitoring._DefaultRecorder()
    recorder.bind(s)
    return [s, pool, limiter, slots, quota, router, memo, recorder, storage(s),
            limiter.acquire("k"), slots.acquire("k"), slots.slot("k", 0), slots.slot_async("k", 0),
            quota.admit("k"), pool.connection("https://a.example"), router.track("d"),
            pool._lookup(pool.get_connection("https://a.example")),
            limiter._reserve("k", 1, 10**9)[2]]

class Mine:
    def close(self): touch(self)

ODD = ["k", b"k", "https://a.example", "\\udc80", 1, 0, -1, None, 2**70, (1, 1), [1, 1], ["k", "j"],
       {}, "d", 0.0, "https://b.example"]
SKIP = {"__class__", "__init_subclass__", "__subclasshook__", "__new__", "__init__", "__reduce__",
        "__reduce_ex__", "__del__", "__dir__", "__getstate__", "__setattr__", "__delattr__"}
# Addresses, and threads of other tests, are no arguments.
INNER = ("_set", "_bind", "_bind_core", "_bind_cluster", "_measure", "_address", "_leave")
chance = random.Random(SEED)

def touch(objects, calls=1):
    for o in objects if isinstance(objects, list) else [objects]:
        for name in dir(type(o)):
            if name in SKIP or name in INNER or (name == "remove" and chance.random() < 0.9):
                continue
            for _ in range(calls):
                try:
                    found = getattr(o, name)
                    if callable(found):
                        given = chance.choices(ODD, k=chance.randrange(4))
                        if name in ("wait", "slot"):  # nobody else would end it
                            last = found(*given[:1], timeout=chance.choice([0.001, 0, -1, "k"]))
                        else:
                            last = found(*given)
                        if hasattr(last, "send"):
                            last.close()
                        elif hasattr(last, "__enter__") and chance.random() < 0.5:
                            last.__enter__()
                except BaseException:
                    pass

class Ghost:
    def __init__(self, objects):
        self.objects, self.me = objects, self
        for o in objects:
            try:
                o.ghost = self
            except Exception:
                pass
    def __del__(self):
        touch(self.objects)
        chance.shuffle(self.objects)
        while self.objects and chance.random() < 0.7:
            self.objects.pop()
            touch(self.objects)
"""

_ONE = """
class Uses:
    def __init__(self, limiter):
        self.limiter, limiter.back = limiter, self
    def __del__(self):
        for _ in range(1000):
            self.limiter.acquire("k")
for n in range(ROUNDS):
    Uses(RateLimiter(Limit(10, per=1), name=f"n{n % 3}", segment=Segment(NAME)))
    gc.collect()
"""

_CYCLES = """
for n in range(ROUNDS):
    s = Segment(NAME)
    ghost = Ghost(make(s, n % 3))
    twin = Ghost(list(ghost.objects[: chance.randrange(len(ghost.objects))]))
    twin.other, ghost.other = ghost, twin
    if n % 5 == 4:
        s.remove()
    del s, ghost, twin
    gc.collect()
"""

_KEYS = """
class Evil(str):
    target = ()
    deep, left = 0, 0
    def _strike(self):
        if Evil.deep < 2 and Evil.left > 0:
            Evil.deep += 1
            Evil.left -= 1
            try:
                touch(list(self.target))
            finally:
                Evil.deep -= 1
    def __hash__(self):
        self._strike()
        return str.__hash__(self)
    def __eq__(self, other):
        self._strike()
        return str.__eq__(self, other)
    def __str__(self):
        self._strike()
        return "k"
    def encode(self, *a):
        self._strike()
        return b"k"
class Number:
    def __init__(self, target): self.target = target
    def __index__(self):
        Evil._strike(self)
        for frame in iter_frames():
            for value in frame.f_locals.values():
                if isinstance(value, bytearray): value.clear()
                if isinstance(value, list) and value and value is not self.target: del value[-1:]
        return 1
    __float__ = __index__
def iter_frames():
    frame = sys._getframe(1)
    while frame:
        yield frame
        frame = frame.f_back
for n in range(ROUNDS):
    s = Segment(NAME)
    objects = make(s, n % 3)
    Evil.target, Evil.left = objects, 15
    ODD[:3] = [Evil("k"), Evil("https://a.example"), Number(objects)]
    touch(objects, 2)
    Evil.left = 15
    for cost in (Number(objects), [Number(objects)] * 40):
        try:
            objects[2].acquire_many(["k"] * 40, cost)
        except BaseException:
            pass
    Evil.target = ()
    del s, objects
    gc.collect()
"""

_THREADS = """
def work():
    touch(shared, 3)
for n in range(ROUNDS // 4):
    shared = make(Segment(NAME), n % 3)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    Ghost(shared)
    del shared
    gc.collect()
"""

_AT_EXIT = """
import atexit
kept = [Ghost(make(Segment(NAME), n)) for n in range(3)]
kept.append(Ghost([kept, Segment.default()]))
sys.modules["fast_litellm_shm"].ghost = kept
threading.Thread(target=lambda: touch(make(Segment(NAME), 4), 50), daemon=True).start()
atexit.register(touch, kept[0].objects)
"""


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "story",
    [_ONE, _CYCLES, _KEYS, _THREADS, _AT_EXIT],
    ids=["one", "cycles", "keys", "threads", "at-exit"],
)
def test_nothing_crashes(segment: Segment, story: str, seed: int) -> None:
    constants = f"SEED, ROUNDS = {seed}, 25\n"
    run = subprocess.run(
        [sys.executable, "-c", constants + textwrap.dedent(_SCENE) + story],
        env={
            **os.environ,
            "FAST_LITELLM_SHM_NAME": segment.name,
            "FAST_LITELLM_SHM_CAPACITY": "1000",
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, f"{run.returncode}: {run.stdout[-2000:]}{run.stderr[-4000:]}"
