"""httpx's own tests, with a SharedLimitTransport around every transport of every client.

Usage: python tests/peers/httpx_tests.py [PYTEST ARGUMENT...]. Its wheel leaves the tests out: the
sdist of the version that is installed is fetched from PyPI into build/peers, once. Needs anyio,
chardet, trio, trustme, uvicorn and the extras brotli, http2, socks and zstd of httpx. (As a pytest
plugin, ``-p peers.httpx_tests``, it does the wrapping alone.)
"""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import subprocess
import sys
import tarfile
from typing import Any

import httpx

ROOT = pathlib.Path(__file__).resolve().parents[2]
TIMEOUT = 300  # s; it takes about ten
# Those that go through a transport.
FILES = ("tests/client", "tests/test_api.py", "tests/test_asgi.py", "tests/test_timeouts.py")
_INSIDE = "it looks for the HTTPTransport, or its pool of connections, that is within ours"
_CHARDET = "it fails without us too: it knows the names that chardet 5.2 had for encodings"
# Whatever else fails, and whatever passes although it stands here, is an error.
FAILS: dict[str, str] = {}
# Not run, whatever its parameters are.
LEFT_OUT: dict[str, str] = {
    "tests/client/test_proxies.py::test_proxies_environ": _INSIDE,
    "tests/client/test_proxies.py::test_proxy_with_mounts": _INSIDE,
    "tests/client/test_proxies.py::test_socks_proxy": _INSIDE,
    "tests/client/test_proxies.py::test_transport_for_request": _INSIDE,
    "tests/client/test_client.py::test_client_decode_text_using_autodetect": _CHARDET,
    "tests/client/test_client.py::test_client_decode_text_using_explicit_encoding": _CHARDET,
    "tests/test_timeouts.py::test_write_timeout[trio]": (
        "it fails without us too, with trio 0.35: a ResourceWarning"
    ),
}


def _wrap(client: type[Any], kind: type[Any]) -> None:
    from fast_litellm_shm import Limit

    own = client.__init__

    def wrapped(transport: Any) -> Any:
        if transport is None:  # a mount that stands for no proxy
            return None
        return kind(transport, name="httpx's own", max_in_flight=1000, limits=Limit(10**6, per=1))

    def __init__(self: Any, *arguments: Any, **named: Any) -> None:
        own(self, *arguments, **named)
        self._transport = wrapped(self._transport)
        self._mounts = {url: wrapped(each) for url, each in self._mounts.items()}

    client.__init__ = __init__


def pytest_configure() -> None:
    from fast_litellm_shm.integrations.httpx import AsyncSharedLimitTransport, SharedLimitTransport

    _wrap(httpx.Client, SharedLimitTransport)
    _wrap(httpx.AsyncClient, AsyncSharedLimitTransport)


def _fetched() -> pathlib.Path:
    name = f"httpx-{importlib.metadata.version('httpx')}"
    folder = ROOT / "build" / "peers"
    if not (folder / name).is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary"]
        wanted = name.replace("httpx-", "httpx==")
        subprocess.run([*pip, ":all:", "--dest", str(folder), wanted], check=True)
        with tarfile.open(folder / f"{name}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    return folder / name


def main(arguments: list[str]) -> int:
    from support.names import remove, unique_name

    segment, source = unique_name("httpx"), _fetched()
    paths = [str(ROOT / "tests"), str(ROOT), str(source)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "peers.httpx_tests", "-rA"]
    command += ["-m", "not network", *(f"--deselect={test}" for test in LEFT_OUT)]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "FAST_LITELLM_SHM_NAME": segment}
    try:
        done = subprocess.run(
            [*command, "--tb=short", "-p", "no:cacheprovider", *(arguments or FILES)],
            cwd=source,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
    finally:
        remove(segment)
    return _told(done.stdout, done.returncode, whole=not arguments)


def _told(output: str, status: int, *, whole: bool) -> int:
    ended: dict[str, set[str]] = {"PASSED": set(), "FAILED": set(), "ERROR": set()}
    for line in output.splitlines():
        word, _, test = line.partition(" ")
        if word in ended and "::" in test:
            ended[word].add(test.split(" - ")[0])
    failed = ended["FAILED"] | ended["ERROR"]
    for test in sorted(failed & FAILS.keys()):
        print(f"fails by design: {test}: {FAILS[test]}")
    for test, why in LEFT_OUT.items():
        print(f"left out: {test}: {why}")
    print("left out: tests that need the Internet, as httpx marks them")
    wrong = [f"fails: {test}" for test in sorted(failed - FAILS.keys())]
    wrong += [
        f"passes, and is said to fail: {test}" for test in sorted(ended["PASSED"] & FAILS.keys())
    ]
    if whole:
        missing = FAILS.keys() - failed - ended["PASSED"]
        wrong += [f"is no test any more: {test}" for test in sorted(missing)]
    if wrong or status not in (0, 1) or not ended["PASSED"]:
        print(output)
        print(*wrong, f"pytest ended with {status}", sep="\n")
        return 1
    print(f"{len(ended['PASSED'])} passed, {len(failed)} fail by design")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))
    sys.exit(main(sys.argv[1:]))
