"""Cluster: the server that keeps limits for many hosts, and how it is used."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import Any, Literal
from urllib.parse import quote

from fast_litellm_shm import exceptions
from fast_litellm_shm._shared import settings
from fast_litellm_shm.cluster import url as urls

OLDEST = 6  # of the redis library
OUTAGE = ("local", "deny", "allow")
_COMMANDS = (
    "evalsha script|exists script|load get set time zadd zcard zremrangebyscore pexpire publish "
    "subscribe scan select"
)
_COMMANDS_OF_A_CLUSTER = "cluster|slots command asking"


@dataclasses.dataclass(frozen=True, repr=False)
class Cluster:
    """A Redis or Valkey that keeps limits for many hosts.

    url: ``redis://host:6379/0``, ``unix:///path?db=0``, ``redis+cluster://host:7000`` (a Redis
    Cluster; more nodes after commas), ``redis+sentinel://host:26379,host/service/0``; over TLS
    ``rediss://``, ``rediss+cluster://``, ``rediss+sentinel://``. User and password as in
    ``redis://user:password@host``, or the password apart: password. ``docs/cluster.md`` lists what
    else a URL may contain; anything else is refused.

    on_outage: what hosts do while it does not answer: ``"local"`` (each admits its share: the limit
    divided by the number of hosts last seen), ``"deny"`` or ``"allow"``. timeout: seconds that a
    call waits for the server at most, 0.001 .. 60. prefix: of the server's keys; hosts with
    different prefixes count apart.

    repr(), messages and pickles contain no password: a copy finds its own where it is unpickled.
    Raises ValueError or TypeError for bad arguments.
    """

    url: str
    on_outage: str = "local"
    timeout: float = 0.25
    prefix: str = "fast-shm"
    password: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("url", self.url), ("password", self.password or "")):
            if not isinstance(value, str):  # which is not shown: it may be a password as bytes
                raise TypeError(f"Cluster: {name} must be a str, not a {type(value).__name__}")
        if not isinstance(self.prefix, str):
            raise TypeError(f"Cluster: prefix must be a str, not {self.prefix!r}")
        login = self._parsed.options
        if self.password and "password" in login:
            raise ValueError(f"Cluster: url has a password, and another is given: {self.shown!r}")
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
        if self.secrets:
            _with_secrets[urls.bare(self.url)] = self.url, self.password

    @functools.cached_property
    def _parsed(self) -> urls.Url:
        return urls.parsed(self.url)

    def __repr__(self) -> str:
        return (
            f"Cluster({self.shown!r}, on_outage={self.on_outage!r}, timeout={self.timeout!r}, "
            f"prefix={self.prefix!r})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        bare = urls.bare(self.url)
        return restored, (bare, self.on_outage, self.timeout, self.prefix, bool(self.secrets))

    @property
    def shown(self) -> str:
        """The URL without its passwords, for messages."""
        return urls.shown(self.url)

    @property
    def secrets(self) -> list[str]:
        return [*self._parsed.secrets, *([self.password] if self.password else [])]

    def scrubbed(self, text: str) -> str:
        """The text without passwords: a server that does not know AUTH repeats what it received."""
        for secret in sorted(self.secrets, key=len, reverse=True):
            for each in {secret, repr(secret)[1:-1], quote(secret, safe="")}:
                text = text.replace(each, "***")
        return text

    def scrubbed_cause(self, error: BaseException) -> BaseException | None:
        """The error, to raise another one from; None: its text contains a password."""
        seen: BaseException | None = error
        while seen is not None:
            if self.scrubbed(said := f"{seen} {seen.args}") != said:
                return None
            seen = seen.__cause__ or seen.__context__
        return error

    @property
    def user(self) -> str:
        """The server's user."""
        return str(self._parsed.options.get("username") or "default")

    @property
    def rights(self) -> str:
        """What that user must be granted, as ACL SETUSER takes it."""
        commands = f"{_COMMANDS} {_COMMANDS_OF_A_CLUSTER}" if self.of_nodes else _COMMANDS
        granted = " ".join(f"+{each}" for each in commands.split())
        return f"~{self.prefix}:* &{self.prefix}:* {granted}"

    def keys_of(self, limiter: str, key: str | bytes) -> tuple[str, str]:
        """The server's keys for a key of a limiter: of its rates, and of its permits."""
        from fast_litellm_shm._shared.named_limiter import key_bytes
        from fast_litellm_shm.cluster import names

        name, raw = limiter.encode("utf-8", "surrogatepass"), key_bytes(key)
        both = (names.state_key(self.prefix, kind, name, raw) for kind in names.KINDS)
        rate, permits = (each.decode("utf-8", "backslashreplace") for each in both)
        return rate, permits

    @property
    def of_nodes(self) -> bool:
        """A Redis Cluster: each key is kept by one of several nodes."""
        return self._parsed.kind == urls.NODES

    @property
    def keeps_connections(self) -> bool:
        """Whether a process may keep connections to itself: there is one server, and no bound."""
        parts = self._parsed
        return parts.kind in (urls.SERVER, urls.SOCKET) and "max_connections" not in parts.options

    def check(self) -> None:
        """Raises ImportError: the redis library is missing or too old; ValueError: it cannot use
        the URL. Does not connect."""
        check_library()
        if self._parsed.kind in (urls.NODES, urls.SENTINEL):
            return  # these connect as they are made
        try:
            self.client().connection_pool.make_connection()
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"Cluster: url cannot be used: {self.shown!r}: {self.scrubbed(str(error))}"
            ) from self.scrubbed_cause(error)

    def client(self, timeout: float | None = None) -> Any:
        """A client of the redis library for it, whose calls wait at most ``timeout`` seconds."""
        redis = library("redis")
        wait = self.timeout if timeout is None else timeout
        waits: dict[str, Any] = {"socket_timeout": wait, "socket_connect_timeout": wait}
        parts = self._parsed
        options = {**parts.options, **waits}
        if self.password:
            options["password"] = self.password
        retry, at_once = library("redis.retry").Retry, library("redis.backoff").NoBackoff()
        if self.of_nodes:
            cluster = library("redis.cluster")
            nodes = [cluster.ClusterNode(*address) for address in parts.addresses]
            # The library's retries would wait in between, and repeat calls that timed out.
            return cluster.RedisCluster(startup_nodes=nodes, retry=retry(at_once, 0), **options)
        # A connection that the server has closed is noticed at its next use: so one retry. None
        # after a time-out: the server may yet do what it was asked.
        options["retry"] = retry(at_once, 1, (redis.exceptions.ConnectionError,))
        if parts.kind == urls.SENTINEL:
            sentinel = library("redis.sentinel").Sentinel(
                parts.addresses, sentinel_kwargs={**parts.sentinel, **waits}
            )
            return sentinel.master_for(parts.service, **options)
        if parts.kind == urls.SOCKET:
            return redis.Redis(unix_socket_path=parts.path, **options)
        host, port = parts.addresses[0]
        return redis.Redis(host=host, port=port, **options)


# The passwords of this process, by the URL without them: for copies.
_with_secrets: dict[str, tuple[str, str | None]] = {}


def restored(url: str, on_outage: str, timeout: float, prefix: str, secret: bool) -> Cluster:
    """A Cluster that is unpickled, without its password. Looks for one among the Clusters of this
    process, then in FAST_LITELLM_SHM_CLUSTER if that names the same server, then by
    :func:`~fast_litellm_shm._shared.settings.cluster_password`. Raises ClusterError: there is
    none."""
    options = (on_outage, timeout, prefix)
    if not secret:
        return Cluster(url, *options)
    if url in _with_secrets:
        whole, password = _with_secrets[url]
        return Cluster(whole, *options, password)
    named, password = settings.cluster_url(), settings.cluster_password()
    if named is not None and urls.bare(named) == url and Cluster(named).secrets:
        return Cluster(named, *options)
    if password is not None:
        return Cluster(url, *options, password)
    raise exceptions.ClusterError(
        f"a copy of the Cluster {urls.shown(url)!r} came without its password, which no pickle "
        "holds: set FAST_LITELLM_SHM_CLUSTER_PASSWORD_FILE or FAST_LITELLM_SHM_CLUSTER_PASSWORD "
        "for this process too, or FAST_LITELLM_SHM_CLUSTER to the whole URL"
    )


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


@functools.lru_cache(maxsize=64)
def _made(url: str, on_outage: str | None, timeout: float | None, password: str | None) -> Cluster:
    if password is not None and "password" in urls.parsed(url).options:
        password = None
    given: dict[str, Any] = {"password": password, "on_outage": on_outage, "timeout": timeout}
    return Cluster(url, **{name: value for name, value in given.items() if value is not None})


def found(given: Cluster | str | Literal[False] | None) -> Cluster | None:
    """The Cluster that a limiter was given, or that the environment names; None: there is neither,
    or False was given."""
    if given is False:
        return None
    if isinstance(given, Cluster):
        return given
    if given is not None and not isinstance(given, str):  # not shown: a URL as bytes, it may be
        raise TypeError(
            f"cluster must be a URL, a Cluster, False or None, not a {type(given).__name__}"
        )
    url = given or settings.cluster_url()
    if not url:
        return None
    return _made(
        url, settings.cluster_outage(), settings.cluster_timeout(), settings.cluster_password()
    )
