"""How a path is read: what a request may mean to whatever routes it. Pure functions.

Servers and frameworks differ: Werkzeug takes ``//login`` for ``/login``, Litestar ``/login/`` too,
Quart ``http://x/login;y``, Starlette ``/login%0A``, Bottle ``/lo%FFgin`` (docs/web.md has a table).
A limit that knows one spelling of them is none. So a path has readings, and a request counts under
the rules of each.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple
from urllib.parse import unquote, urlparse

_SLASHES = re.compile("//+")
#: What nobody could decode: a framework may leave it out (Bottle does).
_UNDECODABLE = re.compile("[\ufffd\ud800-\udfff]")
#: A path in which none of these is found has one reading: itself.
_ODD = re.compile(r"//|/\.\.?(?![^/])|%[0-9A-Fa-f]{2}|\n\Z|\A(?!/)|[\ufffd\ud800-\udfff]")
_DECODED = 3  # times more than the server has: beyond that it is nothing that anybody does
_LONGEST_KEPT = 200  # characters. What clients write is not to fill the memory


class Readings(NamedTuple):
    """path: in the canonical form, below the mount point: ``/login``. routed: each path that may be
    the one by which the request is routed, the one that the server gave first; a request whose
    spelling is plain has one. aliases: other names of theirs, by which a rule may know them: with
    the mount point, and with a slash at the end or without."""

    path: str
    routed: tuple[str, ...]
    aliases: tuple[str, ...]


def read(path: str, mount: str = "", within: str | None = None, raw: str = "") -> Readings:
    """The readings of a path, decoded once, as servers do it.

    mount: where the application is, as ``SCRIPT_NAME`` or ``root_path`` tell. within: the path
    below it where the server tells that (``PATH_INFO``: frameworks go by that alone); None: it is
    part of ``path``, and frameworks differ in how they take it away. raw: as it was before it was
    decoded, where the server tells it."""
    if len(path) + len(mount) + len(raw) > _LONGEST_KEPT:
        return _read(path, mount, within, raw)
    return _read_kept(path, mount, within, raw)


def _read(path: str, mount: str, within: str | None, raw: str) -> Readings:
    mount = mount.rstrip("/")
    own = [path] if within is None else [within]
    if within is None and mount:
        own = _below(path, mount)
    if "%2f" in raw.lower():  # to a router that goes by the raw path this is no slash
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
        _canonical(own[0]) if odd else own[0],
        tuple(routed),
        tuple(each for each in known if each not in routed),
    )


_read_kept = functools.lru_cache(1024)(_read)


def _below(path: str, mount: str) -> list[str]:
    """What is left below the mount point; several where frameworks differ."""
    rest = path[len(mount) :]
    if path.startswith(mount) and (not rest or rest.startswith("/")):
        return [rest or "/"]
    if mount in path:  # Quart and Django mind no boundary; Litestar takes it away from anywhere
        return [path, path.split(mount, 1)[1] or "/"]
    return [path]  # written without it: Starlette takes both for the same


def _spellings(path: str) -> list[str]:
    """The path, and what it is to frameworks: after each step alone, and after each with those
    before it. At last what none does that we know, but a proxy or another server may."""
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


def _canonical(path: str) -> str:
    return _spellings(path)[-1]


def _absolute(path: str) -> str:
    """``GET http://x/login``: the absolute form, as Python's own parser has it (which Quart uses):
    it also ends the path at ``;``, ``?`` and ``#``, and leaves out blanks before it."""
    if path.startswith("/"):
        return path
    try:
        return urlparse(path).path or "/"
    except ValueError:  # an IPv6 address that is none
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
    """With a slash at its end, or without: to Litestar, and to others where they are told so, it
    is the same."""
    return path.rstrip("/") or "/" if path.endswith("/") else f"{path}/"
