"""Worker processes with a real ``litellm.Router`` each, and an upstream within the process.

A request is held at the upstream until the test lets it go, so nothing hangs on how long anything
takes.
"""

from __future__ import annotations

import asyncio
import datetime
import multiprocessing
import os
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import litellm
from litellm.exceptions import InternalServerError
from litellm.integrations.custom_logger import CustomLogger
from litellm.router import Router

from support.children import PATIENCE

CALLBACKS = (  # LiteLLM's lists of them
    "callbacks",
    "input_callback",
    "success_callback",
    "failure_callback",
    "_async_success_callback",
    "_async_failure_callback",
)
GROUP = "group"
MESSAGES = [{"role": "user", "content": "x"}]
TOKENS = 7
_ANSWER = {
    "id": "x",
    "object": "chat.completion",
    "created": 1,
    "model": "x",
    "choices": [
        {"index": 0, "message": {"role": "assistant", "content": "y"}, "finish_reason": "stop"}
    ],
    "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": TOKENS},
}


def deployment(deployment_id: str, group: str = GROUP, **params: Any) -> dict[str, Any]:
    """An entry of a model list; its requests go to a host of its name."""
    return {
        "model_name": group,
        "litellm_params": {
            "model": "openai/x",
            "api_key": "x",
            "api_base": f"http://{deployment_id}.invalid",
            **params,
        },
        "model_info": {"id": deployment_id},
    }


def router(*ids: str, params: dict[str, Any] | None = None, **settings: Any) -> Any:
    """A router of one group. settings: those of litellm.Router."""
    settings = {"num_retries": 0, **settings}
    return Router(model_list=[deployment(i, **(params or {})) for i in ids], **settings)


class _Heard(CustomLogger):  # type: ignore[misc]
    """Comes after LiteLLM's own callbacks: what they do of a call is done."""

    def __init__(self) -> None:
        self.calls: asyncio.Queue[bool] = asyncio.Queue()

    async def async_log_success_event(
        self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any
    ) -> None:
        self.calls.put_nowait(True)

    async def async_log_failure_event(
        self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any
    ) -> None:
        self.calls.put_nowait(False)


class Caller:
    """Calls a router, and is the upstream. Made within a running event loop."""

    def __init__(self, router: Any) -> None:
        self.router = router
        self.failing: set[str] = set()
        self._holding = False
        self._gate = asyncio.Event()
        self._arrived: asyncio.Queue[str] = asyncio.Queue()
        self._tasks: list[asyncio.Task[Any]] = []
        self._heard = _Heard()
        litellm.callbacks.append(self._heard)
        transport = httpx.MockTransport(self._upstream)
        litellm.aclient_session = httpx.AsyncClient(transport=transport)
        litellm.client_session = httpx.Client(transport=httpx.MockTransport(self._answer))

    async def _upstream(self, request: httpx.Request) -> httpx.Response:
        self._arrived.put_nowait(request.url.host.removesuffix(".invalid"))
        if self._holding:
            await self._gate.wait()
        return self._answer(request)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        deployment_id = request.url.host.removesuffix(".invalid")
        if deployment_id in self.failing:
            return httpx.Response(500, json={"error": {"message": "no"}})
        return httpx.Response(200, json=_ANSWER | {"id": deployment_id})

    async def call(self, model: str = GROUP, **kwargs: Any) -> str:
        """One call; returns whom it reached, or the error's name where it reached nobody."""
        try:
            await self.router.acompletion(model, MESSAGES, **kwargs)
        except InternalServerError:
            pass
        except Exception as error:
            if self._arrived.empty():
                return type(error).__name__
        await self._heard.calls.get()
        return await self._arrived.get()

    async def calls(self, count: int) -> list[str]:
        return [await self.call() for _ in range(count)]

    def call_sync(self) -> str:
        return str(self.router.completion(GROUP, MESSAGES).id)

    async def hold(self) -> str:
        """Begin a call that stays at the upstream; returns whose."""
        self._holding = True
        self._gate.clear()
        self._tasks.append(asyncio.create_task(self.router.acompletion(GROUP, MESSAGES)))
        return await self._arrived.get()

    async def release(self) -> None:
        """Let the held ones go, and wait for their end."""
        self._holding = False
        self._gate.set()
        for task in self._tasks:
            await asyncio.gather(task, return_exceptions=True)
            await self._heard.calls.get()
        self._tasks.clear()

    async def cancel(self) -> None:
        """The client of the last held one has left."""
        task = self._tasks.pop()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    def fail(self, *ids: str) -> None:
        self.failing = set(ids)


# processes ---------------------------------------------------------------------------------------


class Worker:
    """A forked process that makes a router with ``make()`` and obeys: ``do("hold")`` and what else
    a Caller can. Calls of ``extra`` are ``function(caller, *arguments)``."""

    def __init__(self, make: Callable[[], Any], extra: Sequence[Callable[..., Any]] = ()) -> None:
        self._end, theirs = multiprocessing.Pipe()
        functions = {function.__name__: function for function in extra}
        context: Any = multiprocessing.get_context("fork")
        self.process = context.Process(target=_work, args=(theirs, make, functions))
        self.process.start()
        theirs.close()

    def do(self, name: str, *arguments: Any) -> Any:
        self.begin(name, *arguments)
        return self.result()

    def begin(self, name: str, *arguments: Any) -> None:
        self._end.send((name, arguments))

    def result(self) -> Any:
        assert self._end.poll(PATIENCE), "the worker hangs"
        result, failed = self._end.recv()
        assert failed is None, failed
        return result

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


class Workers:
    """Several, which are gone at the end of the ``with`` block."""

    def __init__(
        self, count: int, make: Callable[[], Any], extra: Sequence[Callable[..., Any]] = ()
    ) -> None:
        self._workers = [Worker(make, extra) for _ in range(count)]

    def __enter__(self) -> list[Worker]:
        return self._workers

    def __exit__(self, *exc: object) -> None:
        for worker in self._workers:
            worker.kill()
            worker._end.close()


def _work(end: Any, make: Callable[[], Any], extra: dict[str, Callable[..., Any]]) -> None:
    asyncio.run(_obey(end, make, extra))
    os._exit(0)


async def _obey(end: Any, make: Callable[[], Any], extra: dict[str, Callable[..., Any]]) -> None:
    for name in ("callbacks", "input_callback", "success_callback", "failure_callback"):
        setattr(litellm, name, [])  # those of the parent's routers are not this process's
    caller = Caller(make())
    loop = asyncio.get_running_loop()
    while True:
        try:
            name, arguments = await loop.run_in_executor(None, end.recv)
        except EOFError:
            return
        try:
            if name in extra:
                result = extra[name](caller, *arguments)
            else:
                result = getattr(caller, name)(*arguments)
            if asyncio.iscoroutine(result):
                result = await result
            end.send((result, None))
        except BaseException as error:
            end.send((None, f"{type(error).__name__}: {error}"))


class NoonDatetime(datetime.datetime):
    """A clock that stands, so that no minute of it ends during a test."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> NoonDatetime:
        return cls(2030, 1, 1, 12, 0, 30, tzinfo=tz)
