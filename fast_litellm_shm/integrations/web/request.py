"""Request: the argument of key and cost functions, the same for ASGI and WSGI."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fast_litellm_shm.integrations.web.paths import Readings, read

_SOCKET = "WEBSOCKET"
_WITHOUT_PREFIX = ("CONTENT_TYPE", "CONTENT_LENGTH")  # of the headers in a WSGI environ


def verb(said: str) -> str:
    """The method, but never ``WEBSOCKET``: a client may send that word as its method, and rules for
    websockets must not match it."""
    found = said.upper()
    return found.lower() if found == _SOCKET else found


_VERBS = {each: each for each in ("GET", "POST", "PUT", "HEAD", "DELETE", "PATCH", "OPTIONS")}


class Request:
    """method: in capitals; of a websocket ``WEBSOCKET``. path: in its canonical form, below the
    mount point: ``/login``, however the client wrote it. mount: where the application is mounted
    (``root_path``, ``SCRIPT_NAME``). client: the address of the connection's peer, None where the
    server knows none (a Unix socket). raw: the ASGI scope, the WSGI environ, or FastAPI's Request.
    readings: all that the path may mean; rules match these."""

    __slots__ = ("client", "method", "mount", "path", "raw", "readings")

    def __init__(
        self,
        method: str,
        path: str,
        client: str | None,
        raw: Any,
        *,
        mount: str = "",
        readings: Readings | None = None,
    ) -> None:
        self.method, self.client, self.raw = method, client, raw
        self.mount = mount
        self.readings = read(path, mount) if readings is None else readings
        self.path = self.readings.path

    def header(self, name: str) -> str | None:
        """The header's value; several lines are joined by a comma; None: there is none."""
        raise NotImplementedError

    def repeats(self, name: str) -> bool:
        """Does the header have several lines, of which a framework may read any? In WSGI never: the
        server has joined them."""
        return False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.method} {self.path!r} from {self.client!r})"


class AsgiRequest(Request):
    """Of a scope of type ``http`` or ``websocket``. root_path: given where an inner application
    sets it itself."""

    __slots__ = ("_headers",)

    def __init__(self, scope: Mapping[str, Any], raw: Any = None, root_path: str = "") -> None:
        client, kept = scope.get("client"), scope.get("raw_path") or b""
        kept = kept.decode("latin-1").partition("?")[0] if b"%2" in kept else ""
        # What super().__init__() does, without the call.
        said = scope.get("method")
        self.method = _SOCKET if said is None else _VERBS.get(said) or verb(said)
        self.client = (client[0] or None) if client else None
        self.raw = scope if raw is None else raw
        self.mount = mount = root_path or scope.get("root_path") or ""
        self.readings = found = read(
            scope["path"], mount, None, kept if "%2f" in kept.lower() else ""
        )
        self.path = found.path
        self._headers: Iterable[tuple[bytes, bytes]] = scope["headers"]

    def _lines(self, name: str) -> list[bytes]:
        wanted = name.lower().encode("latin-1", "replace")
        return [value for each, value in self._headers if each.lower() == wanted]

    def header(self, name: str) -> str | None:
        found = self._lines(name)
        return b", ".join(found).decode("latin-1") if found else None

    def repeats(self, name: str) -> bool:
        return len(self._lines(name)) > 1


def _decoded(found: str) -> str:
    """Of an environ: UTF-8, as Latin-1 has it (PEP 3333)."""
    return found.encode("latin-1", "replace").decode("utf-8", "replace")


class WsgiRequest(Request):
    """Of an environ."""

    __slots__ = ()

    def __init__(self, environ: Mapping[str, Any]) -> None:
        mount, path = environ.get("SCRIPT_NAME") or "", environ.get("PATH_INFO") or ""
        if not (mount.isascii() and path.isascii()):
            mount, path = _decoded(mount), _decoded(path)
        # What super().__init__() does, without the call.
        said = environ["REQUEST_METHOD"]
        self.method = _VERBS.get(said) or verb(said)
        self.client = environ.get("REMOTE_ADDR") or None
        self.raw, self.mount = environ, mount
        self.readings = found = read(mount + path, mount, path)
        self.path = found.path

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
            "",
            request.remote or None,
            request,
            readings=read(url.path, "", None, kept if "%2f" in kept.lower() else ""),
        )

    def header(self, name: str) -> str | None:
        found = self.raw.headers.getall(name, None)
        return ", ".join(found) if found else None

    def repeats(self, name: str) -> bool:
        return len(self.raw.headers.getall(name, ())) > 1
