"""Where the limits of all hosts are kept, and how they are asked for: :class:`Cluster`."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from fast_litellm_shm import settings

OLDEST = 6  # of the redis library
OUTAGE = ("local", "deny", "allow")
SCHEMES = ("redis", "rediss", "unix", "redis+cluster", "redis+sentinel")
_COMMANDS = (
    "evalsha script|exists script|load get set time zadd zcard zremrangebyscore pexpire publish "
    "subscribe scan select"
)
_COMMANDS_OF_A_CLUSTER = "cluster|slots command asking"


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A Redis or Valkey that keeps limits for many hosts.

    url: ``redis://host:6379/0``, ``rediss://`` (TLS), ``unix:///path?db=0``,
    ``redis+cluster://host:7000`` (a Redis Cluster; more nodes after commas),
    ``redis+sentinel://host:26379,host/service/0``. User and password as in
    ``redis://user:password@host``.

    on_outage: what hosts do while it does not answer: ``"local"`` (each admits its share: the limit
    divided by the number of hosts that were last seen), ``"deny"`` or ``"allow"``. timeout: seconds
    that a call waits for the server at most, 0.001 .. 60. prefix: of its keys there; hosts with
    another one count apart.

    Raises ValueError or TypeError for bad arguments.
    """

    url: str
    on_outage: str = "local"
    timeout: float = 0.25
    prefix: str = "fast-shm"

    def __post_init__(self) -> None:
        for name, value in (("url", self.url), ("prefix", self.prefix)):
            if not isinstance(value, str):
                raise TypeError(f"Cluster: {name} must be a str, not {value!r}")
        self._check_url()
        if self.on_outage not in OUTAGE:
            raise ValueError(
                f"Cluster: on_outage must be one of {', '.join(OUTAGE)}, not {self.on_outage!r}"
            )
        number = isinstance(self.timeout, (int, float)) and not isinstance(self.timeout, bool)
        if not number:
            raise TypeError(f"Cluster: timeout must be a number of seconds, not {self.timeout!r}")
        if not 0.001 <= self.timeout <= 60:
            raise ValueError(f"Cluster: timeout must be 0.001 to 60 seconds, not {self.timeout!r}")
        if not self.prefix or "{" in self.prefix or "}" in self.prefix:
            raise ValueError(f"Cluster: prefix must be text without braces, not {self.prefix!r}")

    def _check_url(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in SCHEMES:
            raise ValueError(
                f"Cluster: url must begin with one of {', '.join(s + '://' for s in SCHEMES)}, "
                f"not {self.shown!r}"
            )
        if not (parts.path if parts.scheme == "unix" else parts.netloc):
            where = "a socket's path" if parts.scheme == "unix" else "a host"
            raise ValueError(f"Cluster: url must name {where}: {self.shown!r}")
        if parts.scheme == "redis+sentinel" and not parts.path.strip("/"):
            raise ValueError(
                "Cluster: url must name the service that Sentinel watches, as in "
                f"redis+sentinel://host:26379/mymaster, not {self.shown!r}"
            )
        if parts.scheme == "unix":
            return
        many = parts.scheme in ("redis+cluster", "redis+sentinel")
        try:
            ports = [port for _, port in _addresses(parts.netloc, 6379)] if many else [parts.port]
        except ValueError:
            ports = [0]
        if not all(port is None or 0 < port < 65_536 for port in ports):
            raise ValueError(f"Cluster: url has a port that is none: {self.shown!r}")
        path = parts.path.strip("/")
        db = path.partition("/")[2] if parts.scheme == "redis+sentinel" else path
        if db and not (db.isascii() and db.isdecimal()):
            raise ValueError(f"Cluster: url must end with the number of a database: {self.shown!r}")

    @property
    def shown(self) -> str:
        """The URL without its passwords, for messages."""
        url = re.sub(r"([?&]\w*password=)[^&]*", r"\1***", self.url)
        head, at, tail = url.rpartition("@")
        scheme, _, user = head.partition("://")
        return f"{scheme}://{user.partition(':')[0]}:***@{tail}" if at and user else url

    @property
    def user(self) -> str:
        """As whom it is asked there."""
        return unquote(urlsplit(self.url).username or "") or "default"

    @property
    def rights(self) -> str:
        """What its user there must be granted, as ACL SETUSER takes it."""
        commands = _COMMANDS
        if self.of_nodes:
            commands += f" {_COMMANDS_OF_A_CLUSTER}"
        granted = " ".join(f"+{each}" for each in commands.split())
        return f"~{self.prefix}:* &{self.prefix}:* {granted}"

    @property
    def of_nodes(self) -> bool:
        """A Redis Cluster: each key is kept by one of several nodes."""
        return urlsplit(self.url).scheme == "redis+cluster"

    def check(self) -> None:
        """Raises ImportError where the redis library is missing or too old, ValueError where it
        cannot use the URL. Connects to nobody."""
        check_library()
        if urlsplit(self.url).scheme in ("redis+cluster", "redis+sentinel"):
            return  # these connect as they are made
        try:
            self.client().connection_pool.make_connection()
        except (TypeError, ValueError) as error:
            raise ValueError(f"Cluster: url cannot be used: {self.shown!r}: {error}") from error

    def client(self, timeout: float | None = None) -> Any:
        """A client of the redis library for it, whose calls wait at most ``timeout`` seconds."""
        redis = library("redis")
        wait = self.timeout if timeout is None else timeout
        options: dict[str, Any] = {"socket_timeout": wait, "socket_connect_timeout": wait}
        parts = urlsplit(self.url)
        named = (("username", parts.username), ("password", parts.password))
        login = {name: unquote(given) for name, given in named if given}
        retry, at_once = library("redis.retry").Retry, library("redis.backoff").NoBackoff()
        if self.of_nodes:
            cluster = library("redis.cluster")
            nodes = [cluster.ClusterNode(*address) for address in _addresses(parts.netloc, 6379)]
            # Its retries would wait between them, and try again what took too long.
            return cluster.RedisCluster(
                startup_nodes=nodes, retry=retry(at_once, 0), **options, **login
            )
        # A connection that the server has closed is only seen when it is used: try once more. But
        # not what took too long, which the server may yet do.
        once_more = retry(at_once, 1, (redis.exceptions.ConnectionError,))
        if parts.scheme == "redis+sentinel":
            service, _, db = parts.path.strip("/").partition("/")
            sentinel = library("redis.sentinel").Sentinel(
                _addresses(parts.netloc, 26379), sentinel_kwargs=options
            )
            return sentinel.master_for(
                service, db=int(db or 0), retry=once_more, **options, **login
            )
        if parts.scheme == "unix":
            del options["socket_connect_timeout"]
        return redis.Redis.from_url(self.url, retry=once_more, **options)


def library(name: str) -> Any:
    """A module of the redis library. (Not by `import`: its types differ between releases.)"""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            'limits over many hosts need the redis library: pip install "fast-litellm-shm[cluster]"'
        ) from error


def check_library() -> None:
    """Raises ImportError, which says what to install."""
    found = library("redis").__version__
    if int(found.partition(".")[0]) < OLDEST:
        raise ImportError(
            f"limits over many hosts need the redis library from version {OLDEST} on, not {found}, "
            "which knows no time-out on unix sockets: "
            'pip install "fast-litellm-shm[cluster]"'
        )


def _addresses(netloc: str, port: int) -> list[tuple[str, int]]:
    found = []
    for each in netloc.rpartition("@")[2].split(","):
        host, _, given = each.rpartition(":") if ":" in each else (each, "", "")
        found.append((host.strip("[]"), int(given or port)))
    return found


@functools.lru_cache(maxsize=64)
def _made(url: str, on_outage: str | None, timeout: float | None) -> Cluster:
    given = {"on_outage": on_outage, "timeout": timeout}
    return Cluster(url, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]


def found(given: Cluster | str | Literal[False] | None) -> Cluster | None:
    """The cluster that a limiter was given, or that the environment names; None: neither, or
    False was given."""
    if given is False:
        return None
    if isinstance(given, Cluster):
        return given
    if given is not None and not isinstance(given, str):
        raise TypeError(f"cluster must be a URL, a Cluster, False or None, not {given!r}")
    url = given or settings.cluster_url()
    return _made(url, settings.cluster_outage(), settings.cluster_timeout()) if url else None
