"""Cancellation of an ASGI application whose client has gone, or whose time is up; and of a request
that waits, whose client has gone. asyncio alone."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from typing import Any, TypeAlias

from fast_litellm_shm.limiters.grantors import Held

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]

GONE = ("http.disconnect", "websocket.disconnect")
_MOST = 65_536  # bytes of a body that are read before the application receives them
_EACH = 1024  # bytes that a message counts for beside its body


class ReadAhead:
    """Receives messages before the application does. So it learns that the client has gone, even if
    the application does not call receive(). It stops when 64 KiB are waiting for the
    application."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._read = deque[Message]()
        self._error: BaseException | None = None
        self._size, self._ended = 0, False
        self._changed = asyncio.Condition()

    async def until_gone(self) -> None:
        """Returns when the client has gone; never, if the server's receive() fails."""
        while not self._ended:
            try:
                message = await self._receive()
            except Exception as error:  # for the application, when it receives
                self._error, self._ended = error, True
            else:
                self._ended = message["type"] in GONE
                self._size += _size(message)
                self._read.append(message)
            async with self._changed:
                self._changed.notify_all()
                await self._changed.wait_for(lambda: self._ended or self._size < _MOST)
        if self._error is not None:
            await asyncio.get_running_loop().create_future()

    async def receive(self) -> Message:
        """For the application, in place of the server's."""
        async with self._changed:
            await self._changed.wait_for(lambda: bool(self._read) or self._ended)
            if self._read:
                message = self._read.popleft()
                self._size -= _size(message)
                self._changed.notify_all()
                return message
        if self._error is not None:
            raise self._error
        return await self._receive()  # once more after the end: the server defines what it returns


def _size(message: Message) -> int:
    body = message.get("body") or message.get("bytes") or message.get("text") or b""
    return len(body) + _EACH


class ClientGoneError(Exception):
    """The client of a request that waited for its turn has gone. No caller of the package sees
    it."""


class Client:
    """The client of a request that may wait. receive: for the application, in place of the
    server's."""

    def __init__(self, receive: Receive) -> None:
        self.receive = self._receive = receive
        self._gone: asyncio.Task[None] | None = None

    async def wait_with(self, waiting: Coroutine[Any, Any, Held]) -> Held:
        """Await what waits for a permit. Raises ClientGoneError where the client goes first; then
        nothing is held, and no place in a queue."""
        if self._gone is None:
            ahead = ReadAhead(self._receive)
            self.receive, self._gone = ahead.receive, asyncio.ensure_future(ahead.until_gone())
        task = asyncio.ensure_future(waiting)
        try:
            await asyncio.wait({task, self._gone}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
        except BaseException:  # the server may cancel us here, as at any await
            await _cancel(task)
            raise
        await _cancel(task)
        raise ClientGoneError

    async def close(self) -> None:
        """The request is over."""
        if self._gone is not None:
            self._gone.cancel()
            await asyncio.gather(self._gone, return_exceptions=True)


async def _cancel(task: asyncio.Task[Held]) -> None:
    """Cancel what waits for a permit, and give that back where it came all the same."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled() and task.exception() is None:
        task.result().release()


async def run_cancellable(
    app: Callable[[Receive], Awaitable[None]],
    receive: Receive,
    busy: Callable[[], bool],
    *,
    cancel: bool,
    seconds: float | None,
) -> bool:
    """Run the application. Cancel it when its client has gone (with ``cancel``), or when
    ``seconds`` have passed, if it is still ``busy``: its response has not been sent to the end.
    False: its time was up. Returns when the application has ended, however long that takes."""
    ahead = ReadAhead(receive) if cancel else None
    running = asyncio.ensure_future(app(receive if ahead is None else ahead.receive))
    tasks = [running]
    if ahead is not None:
        tasks.append(asyncio.ensure_future(ahead.until_gone()))
    try:
        done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        ended = running not in done and busy() and running.cancel()
        await asyncio.wait({running})  # the server may cancel us here, as at any await
        if not (ended and running.cancelled()):
            running.result()  # raises what the application raised
        return not ended or bool(done)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
