"""How a path is read: which paths a router may take it for. Pure functions.

Servers and frameworks differ: Werkzeug takes ``//login`` for ``/login``, Litestar ``/login/`` too,
Quart ``http://x/login;y``, Starlette ``/login%0A``, Bottle ``/lo%FFgin`` (docs/web.md has a table).
A client could evade a limit that knows one spelling only. So a path has several readings, and a
request counts under the rules of each.
"""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import unquote, urlparse

_SLASHES = re.compile("//+")
#: Characters that could not be decoded: a framework may leave them out (Bottle does).
_UNDECODABLE = re.compile("[\ufffd\ud800-\udfff]")
#: A path in which none of these is found has one reading: itself.
_ODD = re.compile(r"//|/\.\.?(?![^/])|%[0-9A-Fa-f]{2}|\n\Z|\A(?!/)|[\ufffd\ud800-\udfff]")
_DECODED = 3  # more times than the server did: no known software decodes more often


class Readings(NamedTuple):
    """path: in the canonical form, below the mount point: ``/login``. routed: the paths by which a
    framework may route the request; the server's own is the first; a plain path is the only one.
    aliases: other names of these, which a rule may use: with the mount point, and with a slash at
    the end or without."""

    path: str
    routed: tuple[str, ...]
    aliases: tuple[str, ...]


def read(path: str, mount: str = "", within: str | None = None, raw: str = "") -> Readings:
    """The readings of a path, decoded once, as servers do it.

    mount: where the application is mounted, by ``SCRIPT_NAME`` or ``root_path``. within: the path
    below it, where the server has it (``PATH_INFO``: frameworks route by that alone); None: it is
    part of ``path``, and frameworks differ in how they remove the mount point. raw: the path before
    it was decoded, where the server has it."""
    mount = mount.rstrip("/")
    if not mount and not raw and within in (None, path) and not _ODD.search(path):
        other = _toggled(path)  # as below, for the usual path
        return Readings(path, (path,), (other,) if other != path else ())
    own = [path] if within is None else [within]
    if within is None and mount:
        own = _below(path, mount)
    if "%2f" in raw.lower():  # no slash to a router that uses the raw path
        kept = unquote(re.sub("%2[fF]", "%252F", raw))
        own += _below(kept, mount) if within is None and mount else [kept]
    routed = dict.fromkeys(own)
    if odd := any(map(_ODD.search, own)):
        for each in own:
            routed.update(dict.fromkeys(_spellings(each)))
        if within is None and mount:
            for each in [below for known in list(routed) for below in _below(known, mount)]:
                routed.update(dict.fromkeys((_slashed(each), _merged(_slashed(each)))))
    known = dict.fromkeys(_spellings(path) if mount else ())
    known.update(routed)
    known.update(dict.fromkeys([_toggled(each) for each in known]))
    return Readings(
        _spellings(own[0])[-1] if odd else own[0],
        tuple(routed),
        tuple(each for each in known if each not in routed),
    )


def _below(path: str, mount: str) -> list[str]:
    """The path below the mount point; several where frameworks differ."""
    rest = path[len(mount) :]
    if path.startswith(mount) and (not rest or rest.startswith("/")):
        return [rest or "/"]
    if mount in path:  # Quart and Django cut within a segment, Litestar anywhere in the path
        return [path, path.split(mount, 1)[1] or "/"]
    return [path]  # written without the mount point: Starlette routes it alike


def _spellings(path: str) -> list[str]:
    """The path, and what frameworks make of it: after each step alone, and after each step together
    with the steps before it. No known framework combines steps, but a proxy or server before it
    may. The last is the canonical form."""
    if not _ODD.search(path):
        return [path]
    found, whole = [path], path
    for step in _STEPS:
        whole = step(whole)
        found += step(path), whole
    whole = resolved(whole)
    found += resolved(_cut(path)), whole
    for _ in range(_DECODED):
        decoded = unquote(whole)
        if decoded == whole:
            break
        whole = resolved(_merged(_cut(_decodable(decoded))))
        found += decoded, whole
    return found


def _absolute(path: str) -> str:
    """``GET http://x/login``: the absolute form, as Python's parser reads it (Quart uses that): it
    also ends the path at ``;``, ``?`` and ``#``, and drops blanks before it."""
    if path.startswith("/"):
        return path
    try:
        return urlparse(path).path or "/"
    except ValueError:  # an invalid IPv6 address
        return path


def _slashed(path: str) -> str:
    """With one slash at its beginning: Werkzeug and Falcon."""
    return "/" + path.lstrip("/")


def _decodable(path: str) -> str:
    return _UNDECODABLE.sub("", path)


def _cut(path: str) -> str:
    """An expression that ends in ``$`` matches before a newline at the end too: Starlette."""
    return path.removesuffix("\n")


def _merged(path: str) -> str:
    """Without repeated slashes: Litestar."""
    return _SLASHES.sub("/", path)


_STEPS = (_absolute, _slashed, _decodable, _cut, _merged)


def resolved(path: str) -> str:
    """Without dot segments: RFC 3986, 5.2.4."""
    if "/." not in path:
        return path
    out: list[str] = []
    segments = path.split("/")[1:]
    for segment in segments:
        if segment == "..":
            del out[-1:]
        elif segment != ".":
            out.append(segment)
    if segments[-1] in (".", ".."):
        out.append("")
    return "/" + "/".join(out)


def _toggled(path: str) -> str:
    """With a slash at its end, or without: Litestar takes both for the same, and others can be
    configured to."""
    return path.rstrip("/") or "/" if path.endswith("/") else f"{path}/"
