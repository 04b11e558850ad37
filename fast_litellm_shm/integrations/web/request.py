"""What a key or cost function is given: a request, the same for ASGI and WSGI."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_WITHOUT_PREFIX = ("CONTENT_TYPE", "CONTENT_LENGTH")  # of the headers in a WSGI environ


class Request:
    """method: in capitals; of a websocket ``WEBSOCKET``. path: decoded, with the mount point.
    client: the address of whoever holds the connection, None where the server knows none (a Unix
    socket). raw: the ASGI scope, the WSGI environ, or FastAPI's Request."""

    __slots__ = ("client", "method", "path", "raw")

    def __init__(self, method: str, path: str, client: str | None, raw: Any) -> None:
        self.method, self.path, self.client, self.raw = method, path, client, raw

    def header(self, name: str) -> str | None:
        """The header's value; of several lines all, joined by ``, ``; None: there is none."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.method} {self.path!r} from {self.client!r})"


class AsgiRequest(Request):
    """Of a scope of type ``http`` or ``websocket``."""

    __slots__ = ("_headers",)

    def __init__(self, scope: Mapping[str, Any], raw: Any = None) -> None:
        client = scope.get("client")
        super().__init__(
            scope.get("method", "WEBSOCKET").upper(),
            scope["path"],
            (client[0] or None) if client else None,
            scope if raw is None else raw,
        )
        self._headers: Iterable[tuple[bytes, bytes]] = scope["headers"]

    def header(self, name: str) -> str | None:
        wanted = name.lower().encode("latin-1", "replace")
        found = [value for each, value in self._headers if each.lower() == wanted]
        return b", ".join(found).decode("latin-1") if found else None


class WsgiRequest(Request):
    """Of an environ."""

    __slots__ = ()

    def __init__(self, environ: Mapping[str, Any]) -> None:
        path = environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")
        super().__init__(
            environ["REQUEST_METHOD"].upper(),
            path.encode("latin-1", "replace").decode("utf-8", "replace"),  # PEP 3333
            environ.get("REMOTE_ADDR") or None,
            environ,
        )

    def header(self, name: str) -> str | None:
        variable = name.upper().replace("-", "_")
        if variable not in _WITHOUT_PREFIX:
            variable = f"HTTP_{variable}"
        value = self.raw.get(variable)
        return None if value is None else str(value)
