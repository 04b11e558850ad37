"""The examples with FastAPI, Flask and Django under four workers: exactly their limits, and permits
of streaming answers that come back from clients that go away and workers that are killed."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from contextlib import ExitStack
from typing import Any

import pytest
from support.served import Stream, ask, ask_of_several, gunicorn, opened, served, uvicorn

LIMIT, REQUESTS, STREAMS = 100, 400, 3
SERVERS: dict[str, tuple[Any, ...]] = {
    "asgi": (uvicorn("app:app"), ("fastapi", "uvicorn")),
    "wsgi": (gunicorn("app:app", "--threads", "4", "--preload"), ("flask", "gunicorn")),
    "django": (gunicorn("app:application"), ("django", "gunicorn")),
}


def streams_come_back(path: str) -> None:
    with ExitStack() as stack:

        def keep(stream: Stream) -> Stream:
            stack.callback(stream.close)
            return stream

        streams = [keep(Stream(path)) for _ in range(STREAMS)]
        assert [each.status for each in streams] == [200] * STREAMS
        status, body, headers = ask(path, "/stream")
        assert (status, headers["Retry-After"]) == (503, "1")
        assert json.loads(body)["violated-policies"] == ["/stream"]
        streams[0].close()  # the client goes
        streams[0] = keep(opened(path))
        assert ask(path, "/stream")[0] == 503, "more than one came back"
        killed = streams[0].pid
        os.kill(killed, signal.SIGKILL)
        lost = sum(each.pid == killed for each in streams)
        again = [keep(opened(path)) for _ in range(lost)]
        assert killed not in {each.pid for each in again}
        assert ask(path, "/stream")[0] == 503, "more came back than it held"


@pytest.mark.parametrize("name", SERVERS)
def test_four_workers(name: str, segment_name: str) -> None:
    command, needs = SERVERS[name]
    env = {"FAST_LITELLM_SHM_NAME": segment_name}
    with served(name, command, needs, segment_name, env) as path:
        answers = ask_of_several(path, "/", REQUESTS, LIMIT // 2, X_Api_Key="key-of-ann")
        assert Counter(status for status, _, _ in answers) == {200: LIMIT, 429: REQUESTS - LIMIT}
        admitted_by = {body for status, body, _ in answers if status == 200}
        assert len(admitted_by) > 1, "one worker alone has answered: nothing was shared"
        left = sorted(
            int(headers["X-RateLimit-Remaining"]) for status, _, headers in answers if status == 200
        )
        assert left == list(range(LIMIT)), "each number of what is left is told once"
        assert ask(path, "/", X_Api_Key="key-of-bob")[0] == 200
        made_up = [ask(path, "/", X_Api_Key=f"made up {i}")[0] for i in range(LIMIT + 1)]
        assert Counter(made_up) == {200: LIMIT, 429: 1}, "each is a fresh limit"
        if name == "asgi":
            found = [ask(path, "/search", X_Api_Key="key-of-ann")[0] for _ in range(8)]
            assert Counter(found) == {200: 5, 429: 3}
        if name != "django":
            streams_come_back(path)
