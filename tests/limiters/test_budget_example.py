"""examples/budgets under four workers: no key spends more than a dollar."""

from __future__ import annotations

import http.client
import json
import os
import signal
import threading
from collections import Counter
from contextlib import suppress
from decimal import Decimal

from support.served import ask, ask_of_several, served, uvicorn
from support.waiting import wait_until

from fast_litellm_shm import Segment
from fast_litellm_shm._shared import spending

KEY = {"X_Api_Key": "key-of-ann"}


def test_a_dollar_over_four_workers(segment_name: str) -> None:
    env = {"FAST_LITELLM_SHM_NAME": segment_name}
    with served("budgets", uvicorn("app:app"), ("fastapi", "uvicorn"), segment_name, env) as path:
        # 20 at once reserve 40 cents, and 40 others have spent 52: there is room for each.
        answers = ask_of_several(path, "/chat", 60, 20, **KEY)
        assert Counter(status for status, *_ in answers) == {200: 60}
        assert len({body for _, body, _ in answers}) > 1, "one worker alone has answered"
        # The rest one by one: calls at the same time may deny each other the last 2 cents.
        answers = [ask(path, "/chat", **KEY) for _ in range(20)]
        assert [status for status, *_ in answers] == [200] * 16 + [429] * 4
        _, body, headers = answers[-1]
        assert json.loads(body) == {"detail": "Budget exceeded (keys)"}
        assert 0 < int(headers["Retry-After"]) <= 25 * 3600
        status, body, _ = ask(path, "/spent", **KEY)
        assert status == 200
        assert (json.loads(body)["spent"], json.loads(body)["remaining"]) == ("0.988", "0.012")
        assert ask(path, "/chat", X_Api_Key="of nobody")[0] == 401
        assert ask(path, "/chat", X_Api_Key="key-of-bob")[0] == 200
        keys, teams = spending.spending(Segment(segment_name, create=False))
        assert (keys.name, str(keys.spent), keys.keys, keys.warned) == ("keys", "1.001", 2, 1)
        assert (teams.name, str(teams.spent), teams.keys) == ("teams", "1.001", 1)


def test_workers_that_are_killed_leave_nothing_reserved(segment_name: str) -> None:
    env = {"FAST_LITELLM_SHM_NAME": segment_name}
    stop = threading.Event()

    def send() -> None:
        while not stop.is_set():
            with suppress(OSError, http.client.HTTPException):  # of a worker that is killed
                ask(path, "/chat", **KEY)

    with served("budgets", uvicorn("app:app"), ("fastapi", "uvicorn"), segment_name, env) as path:
        segment = Segment(segment_name, create=False)

        def reserved() -> bool:
            return any(each.reserved for each in spending.spending(segment))

        senders = [threading.Thread(target=send) for _ in range(4)]
        for each in senders:
            each.start()
        try:
            for _ in range(5):
                pid = wait_until("a worker answers", lambda: _pid(path))
                wait_until("something is reserved", lambda: reserved() or _is_over(segment))
                os.kill(pid, signal.SIGKILL)
        finally:
            stop.set()
            for each in senders:
                each.join()
        wait_until("nothing is reserved", lambda: not reserved())
        keys, teams = spending.spending(segment)
        assert keys.spent == teams.spent <= 1
        assert keys.spent % Decimal("0.013") == 0


def _pid(path: str) -> int:
    with suppress(OSError, http.client.HTTPException):
        return int(ask(path, "/ready")[1])
    return 0


def _is_over(segment: Segment) -> bool:
    return any(each.used_up or each.spent > Decimal("0.97") for each in spending.spending(segment))
