"""Request: the argument of key and cost functions, the same for ASGI and WSGI."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from fast_litellm_shm.integrations.web.paths import Readings, read

_SOCKET = "WEBSOCKET"
_WITHOUT_PREFIX = ("CONTENT_TYPE", "CONTENT_LENGTH")  # of the headers in a WSGI environ


def verb(said: str) -> str:
    """The method, but never ``WEBSOCKET``: a client may send that word as its method, and rules for
    websockets must not match it."""
    found = said.upper()
    return found.lower() if found == _SOCKET else found


_VERBS = {each: each for each in ("GET", "POST", "PUT", "HEAD", "DELETE", "PATCH", "OPTIONS")}


KEPT = 1024  # targets
_LONGEST_KEPT = 200  # characters: clients choose them, and must not fill the memory

#: What a request asks for: method (None: of a websocket), path, mount, within and raw, of
#: :func:`read`.
Asked: TypeAlias = "tuple[str | None, str, str, str | None, str]"


class Target:
    """What a request asks for, as far as rules match it. kept: equal requests nearly always have
    this very object."""

    __slots__ = ("kept", "method", "mount", "path", "readings")

    def __init__(
        self, method: str | None, path: str, mount: str, within: str | None, raw: str
    ) -> None:
        self.method = _SOCKET if method is None else _VERBS.get(method) or verb(method)
        self.mount, self.kept = mount, False
        self.readings = read(path, mount, within, raw)
        self.path = self.readings.path


@functools.lru_cache(KEPT)
def _kept(method: str | None, path: str, mount: str, within: str | None, raw: str) -> Target:
    found = Target(method, path, mount, within, raw)
    found.kept = True
    return found


def target(
    method: str | None, path: str, mount: str = "", within: str | None = None, raw: str = ""
) -> Target:
    """The target of what is :data:`Asked`."""
    long = len(path) + len(mount) + len(raw) + len(method or "") > _LONGEST_KEPT
    return (Target if long else _kept)(method, path, mount, within, raw)


class Request:
    """method: in capitals; of a websocket ``WEBSOCKET``. path: in its canonical form, below the
    mount point: ``/login``, however the client wrote it. mount: where the application is mounted
    (``root_path``, ``SCRIPT_NAME``). client: the address of the connection's peer, None where the
    server knows none (a Unix socket). raw: the ASGI scope, the WSGI environ, or FastAPI's Request.
    readings: all that the path may mean; rules match these."""

    __slots__ = ("client", "raw", "target")

    def __init__(
        self,
        method: str,
        path: str,
        client: str | None,
        raw: Any,
        *,
        mount: str = "",
        within: str | None = None,
        raw_path: str = "",
    ) -> None:
        """method: of a client, what :func:`verb` makes of it. within and raw_path: as :func:`read`
        has them."""
        self.client, self.raw = client, raw
        said = None if method == _SOCKET else method
        self.target = target(said, path, mount, within, raw_path)

    @property
    def method(self) -> str:
        return self.target.method

    @property
    def path(self) -> str:
        return self.target.path

    @property
    def mount(self) -> str:
        return self.target.mount

    @property
    def readings(self) -> Readings:
        return self.target.readings

    def header(self, name: str) -> str | None:
        """The header's value; several lines are joined by a comma; None: there is none."""
        raise NotImplementedError

    def repeats(self, name: str) -> bool:
        """Does the header have several lines, of which a framework may read any? In WSGI never: the
        server has joined them."""
        return False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.method} {self.path!r} from {self.client!r})"


def asgi_asked(scope: Mapping[str, Any], root_path: str) -> Asked:
    """What a scope asks for. root_path: given where an inner application sets it itself."""
    raw_path = scope.get("raw_path")
    return (
        scope.get("method"),
        scope["path"],
        root_path or scope.get("root_path") or "",
        None,
        # find(): `in` takes twice as long, for it first asks whether b"%2" is an int.
        _with_slashes(raw_path) if raw_path and raw_path.find(b"%2") >= 0 else "",
    )


class AsgiRequest(Request):
    """Of a scope of type ``http`` or ``websocket``. root_path: given where an inner application
    sets it itself."""

    __slots__ = ("_scope",)

    def __init__(self, scope: Mapping[str, Any], raw: Any = None, root_path: str = "") -> None:
        # What super().__init__() does, without the call.
        client = scope.get("client")
        self.client = (client[0] or None) if client else None
        self.raw = scope if raw is None else raw
        self._scope = scope
        self.target = target(*asgi_asked(scope, root_path))

    def _lines(self, name: str) -> list[bytes]:
        wanted = name.lower().encode("latin-1", "replace")
        headers: Iterable[tuple[bytes, bytes]] = self._scope["headers"]
        return [value for each, value in headers if each.lower() == wanted]

    def header(self, name: str) -> str | None:
        found = self._lines(name)
        return b", ".join(found).decode("latin-1") if found else None

    def repeats(self, name: str) -> bool:
        return len(self._lines(name)) > 1


def _with_slashes(raw_path: bytes) -> str:
    """The path before it was decoded, where it has an encoded slash."""
    found = raw_path.decode("latin-1").partition("?")[0]
    return found if "%2f" in found.lower() else ""


def _decoded(found: str) -> str:
    """Of an environ: UTF-8, as Latin-1 has it (PEP 3333)."""
    return found.encode("latin-1", "replace").decode("utf-8", "replace")


def wsgi_asked(environ: Mapping[str, Any]) -> Asked:
    """What an environ asks for."""
    mount, path = environ.get("SCRIPT_NAME") or "", environ.get("PATH_INFO") or ""
    if not (mount.isascii() and path.isascii()):
        mount, path = _decoded(mount), _decoded(path)
    return environ["REQUEST_METHOD"], mount + path, mount, path, ""


class WsgiRequest(Request):
    """Of an environ."""

    __slots__ = ()

    def __init__(self, environ: Mapping[str, Any]) -> None:
        # What super().__init__() does, without the call.
        self.client = environ.get("REMOTE_ADDR") or None
        self.raw = environ
        self.target = target(*wsgi_asked(environ))

    def header(self, name: str) -> str | None:
        variable = name.upper().replace("-", "_")
        if variable not in _WITHOUT_PREFIX:
            variable = f"HTTP_{variable}"
        value = self.raw.get(variable)
        return None if value is None else str(value)


class AiohttpRequest(Request):
    """Of a request to aiohttp's server."""

    __slots__ = ()

    def __init__(self, request: Any) -> None:
        url = request.rel_url
        kept = url.raw_path
        super().__init__(
            verb(request.method),
            url.path,
            request.remote or None,
            request,
            raw_path=kept if "%2f" in kept.lower() else "",
        )

    def header(self, name: str) -> str | None:
        found = self.raw.headers.getall(name, None)
        return ", ".join(found) if found else None

    def repeats(self, name: str) -> bool:
        return len(self.raw.headers.getall(name, ())) > 1
