"""Key functions: whom a request counts for.

A key function is given a :class:`Request` and returns a ``str`` or ``bytes``, or None where the
request is not limited. In ASGI it may be ``async``.
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

_IPV6_PREFIX = 64  # bits. Whoever has one IPv6 address commonly has all of its /64
_LONGEST = 100  # characters of an address. What clients can write is not to fill the memory
_LEAST_TRUSTED = {4: 8, 6: 16}  # bits of a network that somebody may own: below, it is "everybody"
_UNIX = "unix:"
NOBODY = "unknown"

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_PAIR = rf'({_TOKEN})=({_TOKEN}|"(?:[^"\\]|\\.)*")'
_FORWARDED_PAIR = re.compile(rf"[ \t]*(?:{_PAIR}[ \t]*)?(;|,|\Z)", re.DOTALL)


@functools.lru_cache(4096)  # reading an address takes longer than counting it
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
    """An address, without its port and zone; None: it is none."""
    return _read(text) if len(text) <= _LONGEST else None


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
    """The address of whoever holds the connection; of IPv6 its /64, since one client has many.
    (:func:`client_network` takes another length.)

    Behind a proxy that is the proxy, and all its clients are one: use :func:`forwarded_for` with
    the addresses of your proxies. A server may also put the client's address there, told the same
    (``uvicorn --forwarded-allow-ips 10.0.0.5``). It must never be told ``*``, which believes
    whatever a client writes into ``X-Forwarded-For``. Where the server knows no address, on a Unix
    socket, all count as ``unknown``.
    """
    return _connected(request, _IPV6_PREFIX)


def client_network(*, ipv6_prefix: int) -> Callable[[Request], str]:
    """A key function: as :func:`client_address`, of IPv6 the network of so many bits. A second
    limit by /48, which is what an organization or a tunnel commonly has (65,536 of /64), stops who
    goes through them; give it room for many clients."""
    bits = _prefix("client_network", ipv6_prefix)
    return lambda request: _connected(request, bits)


def _connected(request: Request, bits: int) -> str:
    if request.client is None:
        settings.warn_once(
            "rate limits by client_address: the server tells no address (it listens on a Unix "
            "socket?), so all clients count as one; use forwarded_for() behind a proxy, or "
            "another key function"
        )
        return NOBODY
    found = _address(request.client)
    return request.client if found is None else _grouped(found, bits)


def forwarded_for(
    trusted_proxies: int | str | Iterable[str],
    *,
    name: str = "X-Forwarded-For",
    ipv6_prefix: int = _IPV6_PREFIX,
) -> Callable[[Request], str]:
    """A key function: the client's address as the outermost of your own proxies saw it.

    trusted_proxies: addresses and networks of your proxies, such as ``["10.0.0.5",
    "2001:db8:7::/64"]``, ``"unix:"`` for one on a Unix socket. Each proxy adds to the header the
    address it was reached from, so the client's is the **rightmost that is none of them**; whatever
    stands further left came from the client, who may write there what he likes. The header of a
    connection that does not come from one of them is not read at all. What is no address, such as
    ``unknown``, counts for the proxy that wrote it.

    Or a number of proxies, 1 or more, that every request passes: then the client's address is that
    many from the right. Who reaches the application past them writes the header himself: prefer
    addresses.

    name: the header: ``X-Forwarded-For``, one that is written in the same way, or ``Forwarded``
    (RFC 7239). Name the one that your proxies write: they may pass on another as the client wrote
    it.
    ipv6_prefix: bits of an IPv6 address that are one client.

    Raises ValueError for networks that are everybody's (``*``, ``0.0.0.0/0``).
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
    """Whether Unix sockets are, and the networks that are."""
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
                f"forwarded_for: {each!r} in trusted_proxies is everybody, who then writes the "
                "header as he likes; name the networks of your proxies"
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
    """The ``for=`` of each element, empty where it has none. No element at all where the whole is
    not as RFC 7239 has it: a quote that a client left open would swallow what proxies wrote."""
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

    secret: keep a keyed hash of the value (128 bits of BLAKE2) in the segment, where ``fast-shm
    inspect`` and exports would show it: the same secret in all workers and hosts, 16 bytes or more,
    from where you keep others. hashed: keep a hash of it; without a secret whoever sees that can
    try out guesses. missing: the key function of requests without the header. A header of several
    lines (ASGI) counts for the client's address: frameworks read one of them, not always the same.

    Only for headers that something before the limit has checked: a client that may send any value
    gets a fresh limit with each. For API keys that your own code checks, see "Keys" in docs/web.md.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"header: name must be the name of a header, not {name!r}")
    code = b""
    if secret is not None:
        if not isinstance(secret, (str, bytes)):
            raise TypeError("header: secret must be a str or bytes")  # and is not shown
        raw = secret.encode("utf-8", "surrogatepass") if isinstance(secret, str) else secret
        if len(raw) < 16:
            raise ValueError(
                f"header: secret must have 16 bytes or more, not {len(raw)}; such as of "
                "python3 -c 'import secrets; print(secrets.token_hex())'"
            )
        code = hashlib.blake2b(raw, digest_size=32, person=b"fast-shm header").digest()
    elif hashed:
        settings.warn_once(
            f"header({name!r}, hashed=True) without a secret: whoever sees the hashes can try out "
            "guesses; say header(..., secret=...), the same in all workers"
        )
    hashed = hashed or secret is not None

    def key(request: Request) -> Key | Awaitable[Key]:
        value = request.header(name)
        if not value:
            return missing(request)
        if request.repeats(name):  # one that was checked, say, and one that is new each time
            return client_address(request)
        if hashed:
            raw = value.encode("utf-8", "surrogatepass")
            value = hashlib.blake2b(raw, digest_size=16, key=code).hexdigest()
        return f"{name.lower()}={value}"  # never to be taken for an address

    return key
