"""A server for each test, and a second host; what is asked of the package's links dies with the
test's processes."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import servers
from support.names import remove, unique_name

from fast_litellm_shm import Segment


@pytest.fixture(autouse=True)
def _no_server_is_away_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAST_LITELLM_SHM_CLUSTER_TIMEOUT", str(servers.SLOWEST))


@pytest.fixture(params=servers.KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """redis and valkey, where they are installed."""
    found = str(request.param)
    if not servers.installed(found):
        pytest.skip(f"there is no {found}-server here: apt-get install {found}-server")
    return found


@pytest.fixture
def server() -> Iterator[servers.Server]:
    """A Redis, or a Valkey where there is none."""
    for found in servers.KINDS:
        if servers.installed(found):
            with servers.Server(found) as started:
                yield started
            return
    pytest.skip("there is neither redis-server nor valkey-server here")


@pytest.fixture
def other(request: pytest.FixtureRequest) -> Segment:
    """The segment of another host than ``segment``."""
    name = unique_name("other")
    request.addfinalizer(lambda: remove(name))
    return Segment(name, capacity=1000)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of localhost, signed by itself; its key stands beside it."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl here: apt-get install openssl")
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
            "-keyout", str(folder / "key.pem"), "-out", str(folder / "certificate.pem"),
            "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
        ],
        check=True,
        capture_output=True,
    )  # fmt: skip
    return folder / "certificate.pem"
