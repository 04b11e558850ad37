"""cffi lays out a struct at its first use, and where two threads meet there, the process dies.
Whoever imports the library does it for all threads."""

from __future__ import annotations

import subprocess
import sys

# What interns names holds the lock for which cffi leaves its critical section.
PROGRAM = """
import sys, threading
from fast_litellm_shm._shared.native import ffi

names = [name for name in ffi.list_types()[0] if ffi.typeof(name).kind == "struct"]
start, ended = threading.Barrier(4), threading.Event()

def use():
    for name in names:
        start.wait()
        try:
            ffi.sizeof(name)
        except ffi.error:  # opaque
            pass

def intern():
    i = 0
    while not ended.is_set():
        i += 1
        sys.intern(f"name {i % 100_000}")

users = [threading.Thread(target=use) for _ in range(4)]
others = [threading.Thread(target=intern) for _ in range(2)]
for thread in others + users:
    thread.start()
for thread in users:
    thread.join()
ended.set()
"""


def test_threads_that_use_a_struct_for_the_first_time() -> None:
    for _ in range(5):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            check=False,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert (done.returncode, done.stderr) == (0, "")
