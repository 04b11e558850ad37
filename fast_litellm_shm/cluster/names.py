"""The server's keys: their names, and the sealed names of hosts that keep no names of keys."""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import re
from typing import Any

from fast_litellm_shm._shared.native import ffi, lib
from fast_litellm_shm._shared.segment import Segment

KINDS = RATES, PERMITS = b"rates", b"permits"
BUDGETS = b"budgets"
_TAG, _IV = 16, 16  # bytes
_LONGEST = 512  # a sealed name stands in the state of a key, once for each host


def source(script: str) -> str:
    """The text of a script of this folder, with what all of them need before it."""
    folder = importlib.resources.files(__package__)
    return "".join(folder.joinpath(each).read_text("utf-8") for each in ("values.lua", script))


@functools.lru_cache(maxsize=4096)
def start(prefix: str, kind: bytes, limiter: bytes) -> bytes:
    """The prefix of all keys of this limiter, and of no other. In the limiter's name ``:`` and
    braces are written ``%3A``, ``%7B``, ``%7D``, so a name can be split from the right, whatever
    the prefix is."""
    escaped = re.sub(rb"[%:{}]", lambda found: b"%%%02X" % found[0][0], limiter)
    return b"%b:%b:%b:{" % (prefix.encode(), kind, escaped)


def state_key(prefix: str, kind: bytes, limiter: bytes, key: bytes) -> bytes:
    """In a Redis Cluster, the text in braces decides the slot. It is a hash, so no client chooses
    the slot by how its key is spelled, and the server does not learn the key. The hash includes the
    prefix: clients that do not know it cannot search for keys of one slot."""
    hashed = hash_of(prefix, limiter).copy()
    hashed.update(key)
    return b"%b%b}" % (start(prefix, kind, limiter), hashed.hexdigest().encode())


@functools.lru_cache(maxsize=4096)
def hash_of(prefix: str, limiter: bytes) -> Any:
    """The hash of its keys, to be copied and gone on with."""
    secret = prefix.encode()
    if len(secret) > 64:  # more than a key of BLAKE2 may have
        secret = hashlib.blake2b(secret).digest()
    return hashlib.blake2b(b"%d:%b:" % (len(limiter), limiter), digest_size=_TAG, key=secret)


class Seal:
    """Encrypts names of keys for hosts whose segment keeps none (``names=hashed|off``). The server
    sends such a name back when other hosts want something back. The secret is the segment's, so all
    processes of the host can read it, and no other program. Equal names are sealed the same."""

    def __init__(self, segment: Segment) -> None:
        self._secret = b""
        for half in (b"names of keys 0", b"names of keys 1"):
            out = ffi.new("uint64_t[2]")
            lib.fshm_keyed_hash(segment._handle, half, len(half), out)
            self._secret += bytes(ffi.buffer(out))

    def seal(self, name: bytes) -> bytes:
        """Empty: the name is too long, and other hosts cannot ask for what this host has of it."""
        if len(name) > _LONGEST:
            return b""
        iv = hashlib.blake2b(name, digest_size=_IV, key=self._secret).digest()
        return iv + self._masked(iv, name)

    def unseal(self, sealed: bytes) -> bytes | None:
        """None: it was not sealed by this host."""
        name = self._masked(sealed[:_IV], sealed[_IV:])
        return name if self.seal(name) == sealed else None

    def _masked(self, iv: bytes, text: bytes) -> bytes:
        mask = hashlib.shake_256(self._secret + iv).digest(len(text))
        return bytes(a ^ b for a, b in zip(text, mask, strict=True))
