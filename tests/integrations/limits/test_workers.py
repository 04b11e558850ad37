"""The examples with Flask-Limiter and SlowAPI, under four workers: exactly their limit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from support.children import PATIENCE
from support.served import EXAMPLES, ask, ask_of_several, gunicorn, served, uvicorn

from fast_litellm_shm import Segment

LIMIT, REQUESTS = 100, 400
STRATEGIES = ["fixed-window", "sliding-window-counter", "moving-window"]
SERVERS = {
    "flask_limiter": (gunicorn("app:app"), ("flask_limiter", "gunicorn")),
    "flask_limiter preloaded": (gunicorn("app:app", "--preload"), ("flask_limiter", "gunicorn")),
    "slowapi": (uvicorn("app:app"), ("slowapi", "fastapi", "uvicorn")),
}


@contextmanager
def running(name: str, segment: str, strategy: str) -> Iterator[str]:
    command, needs = SERVERS[name]
    env = {"STORAGE_URI": f"shm://{segment}", "STRATEGY": strategy}
    with served(name.split(maxsplit=1)[0], command, needs, segment, env) as path:
        yield path


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", SERVERS)
def test_four_workers_admit_exactly_the_limit(name: str, strategy: str, segment_name: str) -> None:
    with running(name, segment_name, strategy) as path:
        answers = ask_of_several(path, "/", REQUESTS, LIMIT // 2)
        assert Counter(status for status, _, _ in answers) == {200: LIMIT, 429: REQUESTS - LIMIT}
        admitted_by = {body for status, body, _ in answers if status == 200}
        assert len(admitted_by) > 1, "one worker alone has answered: nothing was shared"
        if name.startswith("flask_limiter"):
            assert ask(path, "/")[2]["X-RateLimit-Remaining"] == "0"
    # It outlives them: who comes after a restart finds the limit used up.
    with running(name, segment_name, strategy) as path:
        assert ask(path, "/")[0] == 429
    assert Segment(segment_name, create=False).stats()["admitted"] == LIMIT


@pytest.mark.parametrize(
    "arguments", [["config"], ["limits", "--key", "k"], ["clear", "--key", "k", "-y"]]
)
def test_the_command_line_of_flask_limiter(arguments: list[str], segment_name: str) -> None:
    pytest.importorskip("flask_limiter", reason="not installed: flask_limiter")
    done = subprocess.run(
        [sys.executable, "-m", "flask", "--app", "app:app", "limiter", *arguments],
        cwd=EXAMPLES / "flask_limiter",
        env={**os.environ, "STORAGE_URI": f"shm://{segment_name}", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if arguments == ["config"]:
        assert f"Segment('{segment_name}', capacity=" in done.stdout
        assert "OK" in done.stdout
    else:
        assert "100 per 1 year" in done.stdout
