"""Every test has a segment of its own, and leaves nothing in the shared-memory directory or the
user's cache."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator

import pytest
from support.names import left_over, remove, unique_name

from fast_litellm_shm import Segment
from fast_litellm_shm._shared import features, segment, settings
from fast_litellm_shm._shared import performance as monitoring
from fast_litellm_shm.fast_litellm import simple
from fast_litellm_shm.pools import connection_pool as pool
from fast_litellm_shm.routing import router as routing

# eventlet imports dnspython, that imports trio where it is installed, and that cannot be patched.
os.environ["EVENTLET_NO_GREENDNS"] = "yes"

# No test measures time: on a busy machine an example may take longer than hypothesis' 200 ms.
with contextlib.suppress(ImportError):  # an environment whose tests need no hypothesis
    import hypothesis

    hypothesis.settings.register_profile(
        "untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("untimed")

# A shell without job control starts background jobs with SIGINT ignored, and children inherit that:
# tests of Ctrl-C would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SETTINGS = (
    "FAST_LITELLM_SHM_NAME",
    "FAST_LITELLM_SHM_CAPACITY",
    "FAST_LITELLM_SHM_MODE",
    "FAST_LITELLM_SHM_NAMES",
    "FAST_LITELLM_SHM_ALLOW_OTHER_OWNER",
    "FAST_LITELLM_SHM_CLUSTER",
    "FAST_LITELLM_SHM_CLUSTER_OUTAGE",
    "FAST_LITELLM_SHM_CLUSTER_TIMEOUT",
    "FAST_LITELLM_SHM_STATE",
    "FAST_LITELLM_SHM_STATE_OUTAGE",
    "FAST_LITELLM_SHM_STATE_TIMEOUT",
    "FAST_LITELLM_SHM_TEST_CLOCK",
    "FAST_LITELLM_POOL_MAX_PER_ENDPOINT",
    "FAST_LITELLM_POOL_MAX_TOTAL",
    "FAST_LITELLM_POOL_IDLE_TIMEOUT",
    "FAST_LITELLM_FEATURE_CONFIG",
    "FAST_LITELLM_ENABLED",
    "FAST_LITELLM_PRICES",
    "FAST_LITELLM_TOKENIZER_DOWNLOAD",
    "FAST_LITELLM_SHM_CACHE",
    *(f"FAST_LITELLM_{name.upper()}" for name in features.FEATURES),
)


_CACHE = "FAST_LITELLM_TESTS_CACHE"  # the cache folder of all processes of this session


def pytest_configure(config: pytest.Config) -> None:
    """The tables for counting tokens are made once for all tests, and never for the user."""
    if not hasattr(config, "workerinput"):  # else the process that started this one has done it
        os.environ[_CACHE] = tempfile.mkdtemp(prefix="fast-shm-tests-")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Removes what pytest_configure() made."""
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop(_CACHE), ignore_errors=True)


def _remove_and_check(name: str) -> None:
    remove(name)
    left = left_over(name)
    for path in left:  # so that one test's fault is reported once
        os.unlink(path)
    assert not left, f"left behind: {left}"


@pytest.fixture(scope="session", autouse=True)
def _nothing_left() -> Iterator[None]:
    """Segments of tests carry the pid of the test process: a worker of xdist sees its own only."""
    yield
    left = glob.glob(f"{os.path.dirname(segment.path_of('x'))}/*.t-{os.getpid()}-*")
    assert not left, f"left behind by some test: {left}"


def _forget() -> None:
    """What the package keeps of the default segment and the environment."""
    segment._default.clear()
    simple._limiter.cache_clear()
    pool._default = None
    monitoring._recorder.bind(None)
    monitoring._kept.clear()
    routing._routers.clear()
    features.reload()
    for messages in features._messages.values():
        messages.clear()
    settings._warned.clear()
    link = sys.modules.get("fast_litellm_shm.cluster.link")
    if link is not None:
        link.close_all()


@pytest.fixture(autouse=True)
def _own_default_segment() -> Iterator[None]:
    """``Segment.default()`` and everything that uses it: never the user's. Not monkeypatch, which
    Hypothesis would take for a fixture that its examples share."""
    before = {name: os.environ.pop(name, None) for name in SETTINGS}
    name = os.environ["FAST_LITELLM_SHM_NAME"] = unique_name("default")
    os.environ["FAST_LITELLM_SHM_CACHE"] = os.environ[_CACHE]
    _forget()
    yield
    _forget()
    for setting, value in before.items():
        os.environ.pop(setting, None)
        if value is not None:
            os.environ[setting] = value
    _remove_and_check(name)


@pytest.fixture
def segment_name(request: pytest.FixtureRequest) -> Iterator[str]:
    """A name that no segment has; what the test makes of it is removed."""
    name = unique_name(request.node.name)
    yield name
    _remove_and_check(name)


@pytest.fixture(name="segment")
def _segment(segment_name: str) -> Segment:
    """A fresh segment that holds 1,000 keys."""
    return Segment(segment_name, capacity=1000)
