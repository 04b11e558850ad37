"""The URL of a server: what it may contain, as arguments of the redis library, and without its
passwords."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

SERVER, SOCKET, NODES, SENTINEL = "server", "socket", "nodes", "sentinel"
# What the server is, and whether the connection is encrypted.
SCHEMES = {
    "redis": (SERVER, False),
    "rediss": (SERVER, True),
    "unix": (SOCKET, False),
    "redis+cluster": (NODES, False),
    "rediss+cluster": (NODES, True),
    "redis+sentinel": (SENTINEL, False),
    "rediss+sentinel": (SENTINEL, True),
}
_PORTS = {SERVER: 6379, NODES: 6379, SENTINEL: 26379}


def _number(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise ValueError("a whole number")
    return int(text)


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false", "yes", "no", "1", "0"):
        raise ValueError("true or false")
    return text.lower() in ("true", "yes", "1")


def _protocol(text: str) -> int:
    if text not in ("2", "3"):
        raise ValueError("2 or 3")
    return int(text)


def _verified(text: str) -> str:
    if text not in ("none", "optional", "required"):
        raise ValueError("none, optional or required")
    return text


_LOGIN: dict[str, Callable[[str], Any]] = {"username": str, "password": str}
_OF_ONE: dict[str, Callable[[str], Any]] = {
    "db": _number,
    "client_name": str,
    "protocol": _protocol,
    "max_connections": _number,
    "health_check_interval": _number,
    "socket_keepalive": _truth,
}
_TLS: dict[str, Callable[[str], Any]] = {
    "ssl_ca_certs": str,
    "ssl_ca_path": str,
    "ssl_certfile": str,
    "ssl_keyfile": str,
    "ssl_password": str,
    "ssl_cert_reqs": _verified,
    "ssl_check_hostname": _truth,
}
_OF_SENTINEL = {f"sentinel_{name}": read for name, read in _LOGIN.items()}
_SECRETS = ("password", "ssl_password", "sentinel_password")
_SHOWN = {*_LOGIN, *_OF_ONE, *_TLS, *_OF_SENTINEL} - {*_SECRETS}
_HIDDEN = "***"
_HOST = re.compile(r"(\[[^\[\]]*\]|[^:\[\]]*)(?::(\d{0,5}))?", re.ASCII)


class Url(NamedTuple):
    """addresses: of a server, or of nodes or Sentinels. options: of the redis library, for each
    connection to what keeps the limits; sentinel: for those to a Sentinel."""

    kind: str
    addresses: list[tuple[str, int]]
    path: str  # of a socket
    service: str  # that Sentinel watches
    options: dict[str, Any]
    sentinel: dict[str, Any]

    @property
    def secrets(self) -> list[str]:
        """Its passwords."""
        found = [self.options.get("password"), self.options.get("ssl_password")]
        return [each for each in (*found, self.sentinel.get("password")) if each]


def parsed(url: str) -> Url:
    """Raises ValueError, which shows no password."""
    try:
        parts = urlsplit(url)
    except ValueError:  # whose text may have the password in it
        raise _wrong(url, "cannot be read as a URL") from None
    if parts.scheme not in SCHEMES:
        schemes = ", ".join(f"{each}://" for each in SCHEMES)
        raise _wrong(url, f"must begin with one of {schemes}", ", not")
    kind, encrypted = SCHEMES[parts.scheme]
    if parts.fragment:
        raise _wrong(url, "must have no '#' (in a password or a path, write %23)")
    if not (parts.path if kind == SOCKET else parts.netloc):
        raise _wrong(url, "must name a socket's path" if kind == SOCKET else "must name a host")
    known = dict(_LOGIN)
    known.update({} if kind in (NODES, SENTINEL) else _OF_ONE)
    known.update(_TLS if encrypted else {})
    known.update(_OF_SENTINEL if kind == SENTINEL else {})
    options = _asked(url, parts.query, known)
    for name, given in (("username", parts.username), ("password", parts.password)):
        if given:
            options.setdefault(name, unquote(given))
    if encrypted:
        options["ssl"] = True
    addresses = [] if kind == SOCKET else _addresses(url, kind, parts.netloc)
    path = "" if kind == SOCKET else parts.path.strip("/")
    service, _, db = path.partition("/") if kind == SENTINEL else ("", "", path)
    if kind == SENTINEL and not service:
        raise _wrong(url, "must name the service that Sentinel watches, as in host:26379/mymaster")
    if db and not (db.isascii() and db.isdecimal()):
        raise _wrong(url, "must end with the number of a database")
    if db and kind != NODES:  # which have only one
        options.setdefault("db", int(db))
    own = {name.removeprefix("sentinel_"): options.pop(name, None) for name in _OF_SENTINEL}
    sentinel = {name: value for name, value in own.items() if value}
    sentinel.update({name: value for name, value in options.items() if name.startswith("ssl")})
    return Url(kind, addresses, unquote(parts.path), unquote(service), options, sentinel)


def _asked(url: str, query: str, known: dict[str, Callable[[str], Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if not all("=" in each for each in query.split("&") if each):
        raise _wrong(url, "has a part of its query that is no name=value")
    for name, text in parse_qsl(query, keep_blank_values=True):
        if name not in known:
            raise _wrong(url, _why_unknown(name, known))
        if name in found:
            raise _wrong(url, f"says {name}= twice")
        try:
            found[name] = known[name](text)
        except ValueError as error:
            raise _wrong(url, f"says {name}=, which must be {error}") from None
    return found


def _why_unknown(name: str, known: dict[str, Callable[[str], Any]]) -> str:
    why = f"says {name}=, which is not known there"
    if name in ("ssl", "tls") or name in _TLS:
        ours = ", ".join(scheme + "://" for scheme, (_, tls) in SCHEMES.items() if tls)
        return f"{why}: for TLS it must begin with {ours}"
    if "timeout" in name:
        return f"{why}: see timeout of Cluster"
    return f"{why}; known are {', '.join(known)}"


def _addresses(url: str, kind: str, netloc: str) -> list[tuple[str, int]]:
    found = []
    for each in netloc.rpartition("@")[2].split(","):
        matched = _HOST.fullmatch(each)
        port = int((matched and matched[2]) or _PORTS[kind])
        if matched is None or not 0 < port < 65_536:
            raise _wrong(url, "has a port that is none")
        found.append((matched[1].strip("[]") or "localhost", port))
    if kind == SERVER and len(found) > 1:
        raise _wrong(url, "must name one host, where it is no cluster and no Sentinel")
    return found


def _wrong(url: str, why: str, then: str = ":") -> ValueError:
    return ValueError(f"Cluster: url {why}{then} {shown(url)!r}")


def shown(url: str) -> str:
    """Without passwords, and without whatever could be one, also where the URL is wrong."""
    scheme, mark, rest = url.partition("://")
    if not mark:
        return _HIDDEN
    head, asks, query = rest.partition("?")
    login, at, place = head.rpartition("@")
    if at:
        head = f"{login.partition(':')[0]}:{_HIDDEN}@{place}"
    else:  # what stands where a port should may be a password whose host is missing
        netloc, slash, path = head.partition("/")
        hosts = (
            each if _HOST.fullmatch(each) else f"{each.partition(':')[0]}:{_HIDDEN}"
            for each in netloc.split(",")
        )  # fmt: skip
        head = ",".join(hosts) + slash + path
    return f"{scheme}://{head}{asks}{'&'.join(map(_shown_part, query.split('&')))}"


def _shown_part(part: str) -> str:
    name, equals, value = part.partition("=")
    if name in _SHOWN and "@" not in value:
        return part
    return f"{name}={_HIDDEN}" if equals and name.isidentifier() else _HIDDEN * bool(part)


def bare(url: str) -> str:
    """A URL that parsed() takes, without its passwords: it can be kept and sent."""
    parts = urlsplit(url)
    login, at, place = parts.netloc.rpartition("@")
    user = login.partition(":")[0]
    kept = [each for each in parse_qsl(parts.query, True) if each[0] not in _SECRETS]
    netloc = f"{user}@{place}" if at and user else place
    query = f"?{urlencode(kept, quote_via=quote, safe='/')}" if kept else ""
    return f"{parts.scheme}://{netloc}{parts.path}{query}"
