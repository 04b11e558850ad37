"""Key functions: whom a request counts for.

A key function takes a :class:`Request` and returns a ``str`` or ``bytes``; or None: then the
request is not limited, not even by later rules. In ASGI it may be ``async``.
"""

from __future__ import annotations

import functools
import hashlib
import ipaddress
import re
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeAlias

from fast_litellm_shm._shared import settings
from fast_litellm_shm.integrations.web.request import Request

Key: TypeAlias = str | bytes | None
KeyFunction: TypeAlias = Callable[[Request], Key | Awaitable[Key]]
_Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
_Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

IPV6_PREFIX = 64  # bits: a client with one IPv6 address commonly has all of its /64
LONGEST = 100  # characters of an address: clients can write them, and must not fill the memory
_LEAST_TRUSTED = {4: 8, 6: 16}  # bits: no organization owns a larger network
_UNIX = "unix:"
NOBODY = "unknown"

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_PAIR = rf'({_TOKEN})=({_TOKEN}|"(?:[^"\\]|\\.)*")'
_FORWARDED_PAIR = re.compile(rf"[ \t]*(?:{_PAIR}[ \t]*)?(;|,|\Z)", re.DOTALL)


@functools.lru_cache(4096)  # to parse an address takes longer than to check a limit
def _read(text: str) -> _Address | None:
    bare = text.strip().strip('"')
    if bare.startswith("["):  # [::1]:1234
        bare = bare[1:].partition("]")[0]
    elif bare.count(":") == 1:  # 127.0.0.1:1234
        bare = bare.partition(":")[0]
    try:
        address = ipaddress.ip_address(bare.partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def _address(text: str) -> _Address | None:
    """An address, without its port and zone; None: the text is no address."""
    return _read(text) if len(text) <= LONGEST else None


@functools.lru_cache(4096)
def key_of(text: str, prefix: int) -> str:
    """The key of a connection's peer; its own text, where that is no address."""
    found = _read(text)
    return text if found is None else _grouped(found, prefix)


@functools.lru_cache(4096)
def _grouped(address: _Address, prefix: int) -> str:
    """The key of an address."""
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    return str(ipaddress.ip_network((address, prefix), strict=False))


def _prefix(function: str, bits: int) -> int:
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise TypeError(f"{function}: ipv6_prefix must be an int, not {bits!r}")
    if not 16 <= bits <= 128:
        raise ValueError(
            f"{function}: ipv6_prefix must be 16 to 128 bits, not {bits}; 64 is what one customer "
            "commonly has, 48 an organization"
        )
    return bits


def client_address(request: Request) -> str:
    """The address of the connection's peer; for an IPv6 address its /64, because one client has
    many addresses. (:func:`client_network` takes another length.)

    Behind a proxy, the peer is the proxy, and all its clients count as one: use
    :func:`forwarded_for` with the addresses of your proxies. Some servers can set the client's
    address themselves, from the same addresses (``uvicorn --forwarded-allow-ips 10.0.0.5``). Never
    give them ``*``: a client may then write any address into ``X-Forwarded-For``. If the server
    knows no address (on a Unix socket), all clients count as ``unknown``.
    """
    client = request.client
    if client is None or len(client) > LONGEST:
        return _connected(request, IPV6_PREFIX)
    return key_of(client, IPV6_PREFIX)


def client_network(*, ipv6_prefix: int) -> Callable[[Request], str]:
    """A key function: as :func:`client_address`, but with ``ipv6_prefix`` bits of an IPv6 address.
    An organization or a tunnel commonly has a /48, that is 65,536 networks of /64. A second limit,
    by /48, stops a client that uses them in turn. Make it large enough for many clients."""
    bits = _prefix("client_network", ipv6_prefix)
    return lambda request: _connected(request, bits)


def _connected(request: Request, bits: int) -> str:
    if request.client is None:
        settings.warn_once(
            "rate limits by client_address: the server knows no address (it listens on a "
            "Unix socket?), so all clients count as one; use forwarded_for() behind a proxy, or "
            "another key function"
        )
        return NOBODY
    client = request.client
    return key_of(client, bits) if len(client) <= LONGEST else client


def forwarded_for(
    trusted_proxies: int | str | Iterable[str],
    *,
    name: str = "X-Forwarded-For",
    ipv6_prefix: int = IPV6_PREFIX,
) -> Callable[[Request], str]:
    """A key function: the client's address as the outermost of your own proxies saw it.

    trusted_proxies: addresses and networks of your proxies, such as ``["10.0.0.5",
    "2001:db8:7::/64"]``, ``"unix:"`` for one on a Unix socket. Each proxy appends to the header
    the address of its peer, so the client's address is the **rightmost that is none of them**. The
    client may have written anything further left. The header of a connection that does not come
    from one of them is ignored. A hop that is no address, such as ``unknown``, counts for the proxy
    that wrote it.

    Or a number of proxies, 1 or more, that every request passes. With 2, the client's address is
    the second from the right. A client that reaches the application without them writes the header
    itself: prefer addresses.

    name: the header that your proxies write: ``X-Forwarded-For``, one of the same format, or
    ``Forwarded`` (RFC 7239). They may pass on any other header as the client wrote it.
    ipv6_prefix: bits of an IPv6 address that are one client.

    Raises ValueError for networks that no organization owns (``*``, ``0.0.0.0/0``).
    """
    bits = _prefix("forwarded_for", ipv6_prefix)
    hops_of = _forwarded if name.lower() == "forwarded" else _listed
    if not isinstance(trusted_proxies, int):
        return _by_network(_trusted(trusted_proxies), name, hops_of, bits)
    if isinstance(trusted_proxies, bool):
        raise TypeError(f"forwarded_for: trusted_proxies must be an int, not {trusted_proxies!r}")
    if trusted_proxies < 1:
        raise ValueError(
            f"forwarded_for: trusted_proxies must be at least 1, not {trusted_proxies}; with no "
            "proxy use client_address"
        )

    def key(request: Request) -> str:
        hops = hops_of(request.header(name) or "")
        found = _address(hops[-trusted_proxies]) if len(hops) >= trusted_proxies else None
        return _connected(request, bits) if found is None else _grouped(found, bits)

    return key


def _by_network(
    trusted: tuple[bool, list[_Network]],
    name: str,
    hops_of: Callable[[str], list[str]],
    bits: int,
) -> Callable[[Request], str]:
    unix, networks = trusted

    def is_trusted(address: _Address) -> bool:
        return any(address in network for network in networks)

    def key(request: Request) -> str:
        if request.client is None:
            last, believed = None, unix
        else:
            last = _address(request.client)
            believed = last is not None and is_trusted(last)
        if not believed:
            return _connected(request, bits)
        for hop in reversed(hops_of(request.header(name) or "")):
            found = _address(hop)
            if found is None:
                break
            last = found
            if not is_trusted(found):
                break
        return _connected(request, bits) if last is None else _grouped(last, bits)

    return key


def _trusted(proxies: str | Iterable[str]) -> tuple[bool, list[_Network]]:
    """Whether proxies on Unix sockets are trusted, and the networks that are."""
    if not isinstance(proxies, Iterable):
        raise TypeError(
            "forwarded_for: trusted_proxies must be addresses and networks, or a number of "
            f"proxies, not {proxies!r}"
        )
    listed = [proxies] if isinstance(proxies, str) else list(proxies)
    networks: list[_Network] = []
    for each in listed:
        if each == _UNIX:
            continue
        try:
            network = ipaddress.ip_network(each)
        except ValueError as error:
            raise ValueError(
                f"forwarded_for: {each!r} in trusted_proxies is no address or network of your "
                f'proxies, such as "10.0.0.5" or "10.0.0.0/24" ({error})'
            ) from None
        if network.prefixlen < _LEAST_TRUSTED[network.version]:
            raise ValueError(
                f"forwarded_for: {each!r} in trusted_proxies is everybody: any client could "
                "write the header; name the networks of your proxies"
            )
        networks.append(network)
    if not listed:
        raise ValueError(
            "forwarded_for: trusted_proxies is empty; with no proxy use client_address"
        )
    return _UNIX in listed, networks


def _listed(value: str) -> list[str]:
    return value.split(",")


def _forwarded(value: str) -> list[str]:
    """The ``for=`` of each element, empty where it has none. No element at all where the header is
    not valid (RFC 7239): a quote that a client left open would swallow what proxies wrote."""
    hops, found, at = [], "", 0
    while True:
        match = _FORWARDED_PAIR.match(value, at)
        if match is None:
            return []
        name, text, end = match.groups()
        if name is not None and name.lower() == "for":
            found = re.sub(r"\\(.)", r"\1", text[1:-1]) if text[0] == '"' else text
        if end != ";":
            hops.append(found)
            found = ""
        if not end:
            return hops
        at = match.end()


def header(
    name: str,
    *,
    hashed: bool = False,
    secret: str | bytes | None = None,
    missing: KeyFunction = client_address,
) -> Callable[[Request], Key | Awaitable[Key]]:
    """A key function: the value of a header, such as an API key.

    secret: 16 bytes or more, the same in all workers and hosts. The segment, which ``fast-shm
    inspect`` and exports show, then has a keyed hash of the value (128 bits of BLAKE2). hashed: the
    same without a secret; a reader of such a hash can try out guesses. missing: the key function of
    requests without the header. A request that has several lines of the header (ASGI) counts for
    the client's address, because each framework reads one of them, and not all read the same one.

    Use it only for headers that are checked before the limit: a client that may send any value gets
    a fresh limit with each. For API keys that your own code checks, see "Keys" in docs/web.md.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"header: name must be the name of a header, not {name!r}")
    code = b""
    if secret is not None:
        if not isinstance(secret, (str, bytes)):
            raise TypeError("header: secret must be a str or bytes")  # without its value
        raw = secret.encode("utf-8", "surrogatepass") if isinstance(secret, str) else secret
        if len(raw) < 16:
            raise ValueError(
                f"header: secret must have 16 bytes or more, not {len(raw)}; such as of "
                "python3 -c 'import secrets; print(secrets.token_hex())'"
            )
        code = hashlib.blake2b(raw, digest_size=32, person=b"fast-shm header").digest()
    elif hashed:
        settings.warn_once(
            f"header({name!r}, hashed=True) without a secret: a reader of the hashes can try out "
            "guesses; use header(..., secret=...), the same in all workers"
        )
    hashed = hashed or secret is not None

    def key(request: Request) -> Key | Awaitable[Key]:
        value = request.header(name)
        if not value:
            return missing(request)
        if request.repeats(name):  # perhaps one that was checked, and one that is new each time
            return client_address(request)
        if hashed:
            raw = value.encode("utf-8", "surrogatepass")
            value = hashlib.blake2b(raw, digest_size=16, key=code).hexdigest()
        return f"{name.lower()}={value}"  # cannot equal an address

    return key
