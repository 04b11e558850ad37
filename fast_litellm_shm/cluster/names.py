"""What keys are called at the server, and how a host that keeps no names speaks of them there."""

from __future__ import annotations

import hashlib
import importlib.resources
import re

from fast_litellm_shm._shared.native import ffi, lib
from fast_litellm_shm._shared.segment import Segment

KINDS = RATES, PERMITS = b"rates", b"permits"
_TAG, _IV = 16, 16  # bytes
_LONGEST = 512  # a sealed name stands in the state of a key, once for each host


def source(script: str) -> str:
    """A script of this folder, after what all of them need."""
    folder = importlib.resources.files(__package__)
    return "".join(folder.joinpath(each).read_text("utf-8") for each in ("values.lua", script))


def start(prefix: str, kind: bytes, limiter: bytes) -> bytes:
    """What the names of all keys of a limiter begin with, and those of no other. In the limiter's
    name ``:`` and braces are written ``%3A``, ``%7B``, ``%7D``: so the parts can be told apart from
    the right, whatever the prefix is."""
    escaped = re.sub(rb"[%:{}]", lambda found: b"%%%02X" % found[0][0], limiter)
    return b"%b:%b:%b:{" % (prefix.encode(), kind, escaped)


def state_key(prefix: str, kind: bytes, limiter: bytes, key: bytes) -> bytes:
    """Of a Redis Cluster, the text in braces decides the slot. It is a hash, so no client chooses
    it by how its key is spelled; and no client's key stands there. The prefix is part of it: with
    one that clients do not know, they cannot look for keys of one slot either."""
    told = b"%d:%b:%b" % (len(limiter), limiter, key)
    tag = hashlib.blake2b(told, digest_size=_TAG, key=_fitting(prefix.encode())).hexdigest()
    return b"%b%b}" % (start(prefix, kind, limiter), tag.encode())


def _fitting(key: bytes) -> bytes:
    return key if len(key) <= 64 else hashlib.blake2b(key).digest()


class Seal:
    """Names that a host is told again by the server when others want something back, and that
    nobody else can read: of segments that keep no names (``names=hashed|off``). Under a secret of
    the segment, so all processes of the host read them. The same name is sealed the same."""

    def __init__(self, segment: Segment) -> None:
        halves = []
        for half in (b"names of keys 0", b"names of keys 1"):
            out = ffi.new("uint64_t[2]")
            lib.fshm_keyed_hash(segment._handle, half, len(half), out)
            halves.append(bytes(ffi.buffer(out)))
        self._secret = b"".join(halves)

    def seal(self, name: bytes) -> bytes:
        """Empty: it is too long, and what the host has of it is not asked for."""
        if len(name) > _LONGEST:
            return b""
        iv = hashlib.blake2b(name, digest_size=_IV, key=self._secret).digest()
        return iv + self._masked(iv, name)

    def unseal(self, sealed: bytes) -> bytes | None:
        """None: it was not sealed here."""
        name = self._masked(sealed[:_IV], sealed[_IV:])
        return name if self.seal(name) == sealed else None

    def _masked(self, iv: bytes, text: bytes) -> bytes:
        mask = hashlib.shake_256(self._secret + iv).digest(len(text))
        return bytes(a ^ b for a, b in zip(text, mask, strict=True))
