"""Run the tests of the peers' own repositories against this package: ``make test-peers``.

Their wheels leave them out: the sdists are fetched from PyPI into ``build/peers``, once. What fails
by design, what is not run, and why: by_design.py. Usage: python -m peers.run [SUITE...], with
tests/ in PYTHONPATH.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

from support.names import remove
from support.sdists import ROOT, fetched, installed_apart

HERE = pathlib.Path(__file__).resolve().parent
FAST_LITELLM = "0.1.10"
# The last without the function that is accelerated, the first with it, and what `pip install
# litellm[proxy]` chooses. 1.110.2 is in all other tests. Never 1.82.7 or 1.82.8: malicious.
LITELLM = ("1.101.6", "1.102.0", "1.108.7")
TIMEOUT = 120  # seconds for each suite, which takes 2 to 20; only a hang reaches it


def _pytest(cwd: pathlib.Path, arguments: Sequence[str], **env: str) -> int:
    paths = [str(ROOT / "tests"), str(ROOT), str(cwd)]
    name = f"t-{os.getpid()}-peers"
    options = [
        "-c",
        str(HERE / "peers.ini"),
        f"--rootdir={cwd}",
        f"--confcutdir={cwd}",
        "-q",
        *arguments,
    ]
    with subprocess.Popen(
        [sys.executable, "-m", "pytest", *options],
        cwd=cwd,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "FAST_LITELLM_SHM_NAME": name,
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            **env,
        },
        start_new_session=True,
    ) as running:
        status = _ended(running)
    remove(name)
    return status


def _ended(running: subprocess.Popen[bytes]) -> int:
    """Its exit status; 1, and where its threads are, where it hangs."""
    try:
        return running.wait(TIMEOUT)
    except subprocess.TimeoutExpired:
        print(f"no end after {TIMEOUT} s: killed", flush=True)
        running.send_signal(signal.SIGABRT)  # pytest has faulthandler print all threads' stacks
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        return 1


def _clock() -> dict[str, str]:
    built = ROOT / "build" / "peers" / "ahead.so"
    built.parent.mkdir(parents=True, exist_ok=True)
    compiler = [os.environ.get("CC", "cc").split()[0], "-O1", "-shared", "-fPIC"]
    subprocess.run([*compiler, str(HERE / "ahead.c"), "-o", str(built), "-ldl"], check=True)
    return {"LD_PRELOAD": str(built)}


def flask_limiter() -> int:
    """Its own tests, all that need no server of another kind."""
    source = fetched("flask-limiter", importlib.metadata.version("flask-limiter"), "peers")
    plugins = ["-p", "peers.flask_limiter_tests", "-p", "peers.table"]
    return _pytest(source, [*plugins, "tests"], PEER="flask-limiter", COLUMNS="200", **_clock())


def slowapi() -> int:
    """Ours: its sdist has no tests."""
    return _pytest(ROOT, ["tests/peers/slowapi_tests.py"], **_clock())


def fast_litellm() -> int:
    """Its own tests (those that are no benchmarks), and its names and arguments against ours."""
    source = fetched("fast-litellm", FAST_LITELLM, "peers", backend=HERE / "backend")
    files = ["tests/test_rust_acceleration.py", "tests/test_rust_code_paths.py"]
    plugins = ["-p", "peers.fast_litellm_tests", "-p", "peers.table"]
    failed = _pytest(source, [*plugins, *files], PEER="fast-litellm")
    theirs = str(installed_apart("fast-litellm", FAST_LITELLM, "peers"))
    return failed | _pytest(ROOT, ["tests/peers/fast_litellm_names.py"], FAST_LITELLM=theirs)


def litellm() -> int:
    """The acceleration, with several releases."""
    failed = 0
    for version in LITELLM:
        print(f"litellm {version}")
        path = str(installed_apart("litellm", version, "peers"))
        arguments = ["tests/peers/litellm_versions.py"]
        failed |= _pytest(ROOT, arguments, LITELLM_PATH=path, LITELLM_VERSION=version)
    return failed


def httpx() -> int:
    """Its own tests, with a SharedLimitTransport around each transport; its table is there."""
    command = [sys.executable, str(HERE / "httpx_tests.py")]
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True) as running:
        return _ended(running)


SUITES: Mapping[str, Callable[[], int]] = {
    "flask-limiter": flask_limiter,
    "slowapi": slowapi,
    "fast-litellm": fast_litellm,
    "litellm": litellm,
    "httpx": httpx,
}


def main() -> int:
    failed = []
    for name in sys.argv[1:] or SUITES:
        begun = time.monotonic()
        print(f"\n== {name}: {SUITES[name].__doc__}", flush=True)
        if SUITES[name]():
            failed.append(name)
        print(f"== {name}: {time.monotonic() - begun:.0f} s", flush=True)
    print(f"\nfailed: {', '.join(failed)}" if failed else "\nall as expected")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
