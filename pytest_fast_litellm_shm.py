"""The pytest plugin of fast_litellm_shm: ``docs/testing.md``.

It lies beside the package, since pytest imports each plugin that is installed: the package is
imported only where a test uses a fixture, or the setting ``shm_isolated`` is on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from fast_litellm_shm import Segment
    from fast_litellm_shm.testing import Clock, Session

_SESSION: pytest.StashKey[Session] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The setting ``shm_isolated``."""
    parser.addini(
        "shm_isolated",
        "fast_litellm_shm: the whole session uses a segment of its own, which is chosen before the "
        "tests are imported, and each test begins with nothing counted",
        type="bool",
        default=False,
    )


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Choose the segment of the session before any code of the user is imported."""
    if early_config.getini("shm_isolated"):
        from fast_litellm_shm.testing import Session

        early_config.stash[_SESSION] = Session()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Delete the segment of the session."""
    session = config.stash.get(_SESSION, None)
    if session is not None:
        del config.stash[_SESSION]
        session.end()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """The same: a worker of pytest-xdist may be ended before pytest_unconfigure()."""
    pytest_unconfigure(session.config)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """With shm_isolated: nothing is counted yet, and the clock runs."""
    session = item.config.stash.get(_SESSION, None)
    if session is not None:
        session.begin_test()


@pytest.fixture
def shm_segment() -> Iterator[Segment]:
    """A segment of this test alone, which limiters that are made in the test use."""
    from fast_litellm_shm.testing import isolated

    with isolated() as found:
        yield found.segment


@pytest.fixture
def _shm_segment_in_use(request: pytest.FixtureRequest) -> Segment:
    """That of the test, where it asks for one; else of the session, where that has one."""
    session = request.config.stash.get(_SESSION, None)
    if session is not None and "shm_segment" not in request.fixturenames:
        return session.segment
    found: Segment = request.getfixturevalue("shm_segment")
    return found


@pytest.fixture
def shm_clock(_shm_segment_in_use: Segment) -> Iterator[Clock]:
    """The clock of the test's segment. It stands still until the test moves it."""
    from fast_litellm_shm.testing import Clock

    clock = Clock(_shm_segment_in_use)
    clock.freeze()
    yield clock
    clock.run()


@pytest.fixture
def shm_reset(_shm_segment_in_use: Segment) -> Callable[[], None]:
    """A function: all limiters of the test's segment forget what was consumed."""
    from fast_litellm_shm.testing import reset

    reset(_shm_segment_in_use)
    return lambda: reset(_shm_segment_in_use)
