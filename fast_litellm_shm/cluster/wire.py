"""Calls of scripts, as a server reads them. The redis library makes the connections (it finds the
server, encrypts, logs in) and reads the replies; what its commands do beside that costs several
times as much, and is left out."""

from __future__ import annotations

import functools
import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from fast_litellm_shm.cluster.settings import library


def bulks(parts: Iterable[bytes]) -> bytes:
    """Strings, each after its length."""
    return b"".join([b"$%d\r\n%b\r\n" % (len(each), each) for each in parts])


@functools.cache
def evalsha(source: str) -> bytes:
    """The begin of each call of a script, after the number of its parts."""
    digest = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()
    return b"$7\r\nEVALSHA\r\n$40\r\n%b\r\n" % digest.encode()


class Call(NamedTuple):
    """Of a script: packed as the command that the server reads. again: makes what is sent in its
    place where it may have been heard, and its reply is lost, or raises; None: the same once
    more."""

    source: str
    packed: bytes
    again: Callable[[], Call] | None = None

    def repeated(self) -> Call:
        return self if self.again is None else self.again()


def call(source: str, keys: Sequence[bytes], arguments: Sequence[bytes]) -> Call:
    parts = (b"%d" % len(keys), *keys, *arguments)
    return Call(source, b"*%d\r\n%b%b" % (2 + len(parts), evalsha(source), bulks(parts)))


class Wire:
    """The connections of one client to a server that is no Redis Cluster. keeps: those that are not
    in use are kept here; else they go back to the client, which may be allowed so many of them, or
    may learn that they lead to a server that is no longer the right one."""

    def __init__(self, client: Any, keeps: bool) -> None:
        self._client, self._pool, self._keeps = client, client.connection_pool, keeps
        self._idle = deque[Any]()
        errors = library("redis").exceptions
        self._refusals, self._unknown = errors.ResponseError, errors.NoScriptError
        self._lost = errors.ConnectionError

    def run(self, calls: Iterable[Call]) -> list[Any]:
        """The replies, in one round trip. Raises what the redis library raises: where several calls
        are refused, the first error. What an iterator still has to make, the server does not wait
        for: it works on those before."""
        sent: list[Call] = []
        found = self._replies(sent, iter(calls))
        again = [i for i, each in enumerate(found) if isinstance(each, self._unknown)]
        if again:  # the server did nothing for these
            for source in {sent[i].source for i in again}:
                self._client.script_load(source)
            replies = self._replies([sent[i] for i in again], iter(()))
            for i, each in zip(again, replies, strict=True):
                found[i] = each
        for each in found:
            if isinstance(each, Exception):
                raise each
        return found

    def one(self, call: Call) -> Any:
        """run() of one call, without what only several need."""
        try:
            connection = self._idle.pop()
        except IndexError:
            return self.run((call,))[0]
        try:
            connection.send_packed_command((call.packed,))
            return connection.read_response()
        except self._unknown:
            return self.run((call,))[0]
        except self._refusals:
            raise
        except self._lost:  # as in _replies()
            connection.disconnect()
            return self._once_more(connection, call.repeated())
        except BaseException:
            connection.disconnect()
            raise
        finally:
            self._idle.append(connection)

    def _once_more(self, connection: Any, call: Call) -> Any:
        (found,) = self._exchange(connection, [call], ())
        if isinstance(found, self._unknown):  # a server that has started anew
            return self.run((call,))[0]
        if isinstance(found, Exception):
            raise found
        return found

    def _replies(self, sent: list[Call], calls: Iterable[Call]) -> list[Any]:
        """To those that are to be sent, and those that the iterator makes, which are added to them.
        An error in the place of a reply, where the server refused a call."""
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._pool.get_connection()
        try:
            try:
                return self._exchange(connection, sent, calls)
            except self._lost:
                # A connection that the server has closed is noticed at its next use: once more.
                sent[:] = [each.repeated() for each in sent]
                return self._exchange(connection, sent, calls)
        finally:
            if self._keeps:
                self._idle.append(connection)
            else:
                self._pool.release(connection)

    def _exchange(self, connection: Any, sent: list[Call], calls: Iterable[Call]) -> list[Any]:
        send, first = connection.send_packed_command, True
        try:
            for each in sent:
                send((each.packed,), check_health=first)
                first = False  # a PING would read the reply to a call
            for each in calls:
                sent.append(each)
                send((each.packed,), check_health=first)
                first = False
            return [self._reply(connection) for _ in sent]
        except BaseException:  # or the next call would read what is left of the replies
            connection.disconnect()
            raise

    def _reply(self, connection: Any) -> Any:
        try:
            return connection.read_response()
        except self._refusals as error:
            return error
