"""Watch: ends an ASGI application when its client has gone, or after a time. asyncio alone."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]

GONE = ("http.disconnect", "websocket.disconnect")
_MOST = 65_536  # bytes of a body that are read before the application asks for them
_EACH = 1024  # bytes that a message counts for beside its body


class Ahead:
    """Receives for the application before it asks: so it is known that the client has gone, also
    where the application does not listen. It stops at 64 KiB that nobody has asked for."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._read = deque[Message]()
        self._error: BaseException | None = None
        self._size, self._ended = 0, False
        self._changed = asyncio.Condition()

    async def until_gone(self) -> None:
        """Returns when the client has gone; never, where the server fails to tell."""
        while not self._ended:
            try:
                message = await self._receive()
            except Exception as error:  # the application's, when it asks
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
        """As the server's own."""
        async with self._changed:
            await self._changed.wait_for(lambda: bool(self._read) or self._ended)
            if self._read:
                message = self._read.popleft()
                self._size -= _size(message)
                self._changed.notify_all()
                return message
        if self._error is not None:
            raise self._error
        return await self._receive()  # again, after the end: the server knows what it answers


def _size(message: Message) -> int:
    body = message.get("body") or message.get("bytes") or message.get("text") or b""
    return len(body) + _EACH


async def watched(
    app: Callable[[Receive], Awaitable[None]],
    receive: Receive,
    busy: Callable[[], bool],
    *,
    cancel: bool,
    seconds: float | None,
) -> bool:
    """Run the application, and cancel it when its client has gone (with ``cancel``) or so many
    seconds have passed, unless it is not ``busy`` any more: its answer has been sent. False: its
    time was up. It returns when the application has ended, however long that takes."""
    ahead = Ahead(receive) if cancel else None
    running = asyncio.ensure_future(app(receive if ahead is None else ahead.receive))
    tasks = [running]
    if ahead is not None:
        tasks.append(asyncio.ensure_future(ahead.until_gone()))
    try:
        done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        ended = running not in done and busy() and running.cancel()
        await asyncio.wait({running})  # here the server may cancel us, as anywhere
        if not (ended and running.cancelled()):
            running.result()  # what it raised
        return not ended or bool(done)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
