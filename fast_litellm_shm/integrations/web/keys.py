"""Key functions: whom a request counts for.

A key function is given a :class:`Request` and returns a ``str`` or ``bytes``, or None where the
request is not limited. In ASGI it may be ``async``.
"""

from __future__ import annotations

import functools
import hashlib
import ipaddress
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from fast_litellm_shm import settings
from fast_litellm_shm.integrations.web.request import Request

Key: TypeAlias = str | bytes | None
KeyFunction: TypeAlias = Callable[[Request], Key | Awaitable[Key]]

_IPV6_PREFIX = 64  # bits. Whoever has one IPv6 address commonly has all of its /64
_LONGEST = 100  # characters of an address. What clients can write is not to fill the memory
NOBODY = "unknown"


@functools.lru_cache(4096)  # reading an address takes longer than counting it
def _read(text: str) -> str | None:
    bare = text.strip().strip('"')
    if bare.startswith("["):  # [::1]:1234
        bare = bare[1:].partition("]")[0]
    elif bare.count(":") == 1:  # 127.0.0.1:1234
        bare = bare.partition(":")[0]
    try:
        address = ipaddress.ip_address(bare.partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    network = ipaddress.ip_network((address, _IPV6_PREFIX), strict=False)
    return str(network)


def _grouped(text: str) -> str | None:
    """The key of an address, without its port and zone; None: it is no address."""
    return _read(text) if len(text) <= _LONGEST else None


def client_address(request: Request) -> str:
    """The address of whoever holds the connection; of IPv6 its /64, since one client has many.

    Behind a proxy that is the proxy, and all its clients are one: use :func:`forwarded_for`, or
    have the server put the client's address there (uvicorn's ``--forwarded-allow-ips``, Werkzeug's
    ``ProxyFix``). Where the server knows no address, on a Unix socket, all count as ``unknown``.
    """
    if request.client is None:
        settings.warn_once(
            "rate limits by client_address: the server tells no address (it listens on a Unix "
            "socket?), so all clients count as one; use forwarded_for() behind a proxy, or "
            "another key function"
        )
        return NOBODY
    return _grouped(request.client) or request.client


def forwarded_for(
    trusted_proxies: int, *, name: str = "X-Forwarded-For"
) -> Callable[[Request], str]:
    """A key function: the client's address as the outermost of your own proxies saw it.

    trusted_proxies: how many proxies of yours a request passes, 1 or more. Each adds to the header
    the address it was reached from, so the client's is that many from the **right**; whatever
    stands further left came from the client, who may write there what he likes. A request with
    fewer addresses has not passed all of them, and one that is no address was not written by them:
    both count for the address that holds the connection.
    """
    if isinstance(trusted_proxies, bool) or not isinstance(trusted_proxies, int):
        raise TypeError(f"forwarded_for: trusted_proxies must be an int, not {trusted_proxies!r}")
    if trusted_proxies < 1:
        raise ValueError(
            f"forwarded_for: trusted_proxies must be at least 1, not {trusted_proxies}; with no "
            "proxy use client_address"
        )

    def key(request: Request) -> str:
        hops = (request.header(name) or "").split(",")
        found = _grouped(hops[-trusted_proxies]) if len(hops) >= trusted_proxies else None
        return client_address(request) if found is None else found

    return key


def header(
    name: str, *, hashed: bool = False, missing: KeyFunction = client_address
) -> Callable[[Request], Key | Awaitable[Key]]:
    """A key function: the value of a header, such as an API key.

    hashed: keep a hash of it (128 bits of BLAKE2) in place of a secret, which ``fast-shm inspect``
    would show. missing: the key function of requests without it.

    Only for headers that something before the limit has checked: a client that may send any value
    gets a fresh limit with each.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"header: name must be the name of a header, not {name!r}")

    def key(request: Request) -> Key | Awaitable[Key]:
        value = request.header(name)
        if not value:
            return missing(request)
        if hashed:
            raw = value.encode("utf-8", "surrogatepass")
            value = hashlib.blake2b(raw, digest_size=16).hexdigest()
        return f"{name.lower()}={value}"  # never to be taken for an address

    return key
