"""Passwords: over TLS alone where that is asked for, and in nothing that anybody reads."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis
from support import servers
from support.children import PATIENCE, run_one
from support.leases import connection_of
from support.waiting import wait_until

from fast_litellm_shm import ConcurrencyLimiter, Quota, RateLimiter, Segment, Window
from fast_litellm_shm._shared.segment import path_of
from fast_litellm_shm.cluster import Cluster
from fast_litellm_shm.cluster import url as urls
from fast_litellm_shm.cluster.settings import found
from fast_litellm_shm.exceptions import ClusterError

HOUR = 3600
SECRET = "s3cr@t/word"
WRITTEN = "s3cr%40t%2Fword"  # in a URL
FORMS = (SECRET, WRITTEN, "s3cr")
SLOTS = 16384


def assert_hidden(*texts: object) -> None:
    for text in texts:
        said = text.decode("latin-1") if isinstance(text, bytes) else str(text)
        assert not [form for form in FORMS if form in said], said


@pytest.fixture
def guarded() -> Iterator[servers.Server]:
    """A server that asks for the password, at a TCP port."""
    for kind in servers.KINDS:
        if servers.installed(kind):
            port = servers.free_port()
            with servers.Server(kind, "--requirepass", SECRET, port=port) as server:
                yield server
            return
    pytest.skip("there is neither redis-server nor valkey-server here")


def url_of(server: servers.Server, password: str = WRITTEN) -> str:
    return f"redis://:{password}@127.0.0.1:{server.port}/0"


# what a URL may say


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("redis://host?ssl=true", "says ssl=.*for TLS it must begin with rediss://"),
        ("redis+cluster://u:p@host?ssl=true", "says ssl=.*rediss\\+cluster://"),
        ("redis+sentinel://host/name?ssl=true", "says ssl=.*rediss\\+sentinel://"),
        ("redis+cluster://host?ssl_ca_certs=x", "says ssl_ca_certs=.*for TLS"),
        ("unix:///path?tls=1", "says tls=.*for TLS"),
        ("rediss://host?ssl=true", "says ssl=.*for TLS it must begin"),
        ("redis+cluster://host?db=1", "says db=, which is not known there"),
        ("redis://host?socket_timeout=9", "see timeout of Cluster"),
        ("redis://host?foo=bar", "says foo=, which is not known there; known are username"),
        ("redis://host?db=1&db=2", "says db= twice"),
        ("redis://host?db=one", "db=, which must be a whole number"),
        ("rediss://host?ssl_cert_reqs=maybe", "must be none, optional or required"),
        ("rediss://host?ssl_check_hostname=maybe", "must be true or false"),
        ("redis://u:p#x@host", "write %23"),
        ("redis://a,b", "must name one host"),
        ("redis://[::1/0", "cannot be read as a URL"),
    ],
)
def test_what_is_not_understood_is_refused(url: str, complaint: str) -> None:
    """And never ignored: who wrote it would send a password in clear."""
    with pytest.raises(ValueError, match=complaint):
        Cluster(url)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:s3cr@host:x/0", "redis://u:s3cr/x@host/y", "redis://u:s3cr#x@host",
        "redis://u:s3cr?x@host", "redis://:s3cr", "rediss://u@h?ssl_password=s3cr&foo=1",
        "redis://h?pass=s3cr", "redis://h?PASSWORD=s3cr", "redis://h?s3cr", "http://u:s3cr@h",
        "s3cr", "u:s3cr@host", "redis://u:s3cr℀@host", "redis+sentinel://:s3cr@h",
        "redis://u:x?db=s3cr@host", "redis://a,b:s3cr",
        "redis+sentinel://h/s/x?sentinel_password=s3cr",
    ],
)  # fmt: skip
def test_what_is_said_of_a_url_that_is_wrong(url: str) -> None:
    with pytest.raises(ValueError, match="Cluster: url ") as error:
        Cluster(url)
    assert_hidden("".join(traceback.format_exception(error.value)))


def test_what_is_said_of_other_types() -> None:
    for make in (
        lambda: Cluster(b"redis://:s3cr@h"),  # type: ignore[arg-type]
        lambda: Cluster("redis://h", password=b"s3cr"),  # type: ignore[arg-type]
        lambda: RateLimiter(Window(1), cluster=b"redis://:s3cr@h"),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError) as error:
            make()
        assert_hidden(error.value)


def test_what_the_library_is_told() -> None:
    both = urls.parsed(
        "rediss+sentinel://u:p%40@a,b:7/name/3?ssl_ca_certs=/x&ssl_check_hostname=no"
        "&sentinel_username=su&sentinel_password=sp"
    )
    tls = {"ssl": True, "ssl_ca_certs": "/x", "ssl_check_hostname": False}
    assert both.addresses == [("a", 26379), ("b", 7)] and both.service == "name"
    assert both.options == {"username": "u", "password": "p@", "db": 3, **tls}
    assert both.sentinel == {"username": "su", "password": "sp", **tls}
    assert both.secrets == ["p@", "sp"]
    assert urls.parsed("unix://:p@/path?db=3").options == {"password": "p", "db": 3}
    assert urls.parsed("redis://[::1]:7/2").addresses == [("::1", 7)]


# where a password does not stand


def test_no_password_in_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """They find it where they are made; in another process, if that has it."""
    bare = "rediss://u@host?ssl_ca_certs=/x"
    made = [
        Cluster(f"rediss://u:{WRITTEN}@host?ssl_ca_certs=/x", "deny", 0.5, "p"),
        Cluster(f"rediss://host?username=u&password={WRITTEN}"),
        Cluster("rediss://u@other", password=SECRET),
        Cluster(f"rediss+sentinel://host/s?sentinel_password={WRITTEN}&ssl_password={WRITTEN}"),
    ]
    for each in made:
        assert_hidden(each, repr(each), each.shown, pickle.dumps(each), f"{each}")
        assert pickle.loads(pickle.dumps(each)) == copy.deepcopy(each) == each
    monkeypatch.setattr("fast_litellm_shm.cluster.settings._with_secrets", {})  # as elsewhere
    for variable in ("", "_PASSWORD", "_PASSWORD_FILE"):
        monkeypatch.delenv(f"FAST_LITELLM_SHM_CLUSTER{variable}", raising=False)
    sent = pickle.dumps(made[0])
    with pytest.raises(ClusterError, match="came without its password, which no pickle holds"):
        pickle.loads(sent)
    monkeypatch.setenv("FAST_LITELLM_SHM_CLUSTER_PASSWORD", SECRET)
    restored = pickle.loads(sent)
    assert (restored.password, restored.on_outage, restored.prefix) == (SECRET, "deny", "p")
    monkeypatch.delenv("FAST_LITELLM_SHM_CLUSTER_PASSWORD")
    monkeypatch.setattr("fast_litellm_shm.cluster.settings._with_secrets", {})
    monkeypatch.setenv("FAST_LITELLM_SHM_CLUSTER", made[0].url)
    assert pickle.loads(sent) == made[0]
    assert urls.bare(made[0].url) == bare


def _consume(limiter: RateLimiter, quota: Quota) -> list[bool]:
    return [bool(limiter.acquire("key")), bool(quota.admit("key"))]


def test_limiters_go_to_other_processes_without_it(
    guarded: servers.Server, segment: Segment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "password"
    file.write_text(f"{SECRET}\n", encoding="utf-8")
    monkeypatch.setenv("FAST_LITELLM_SHM_CLUSTER_PASSWORD_FILE", str(file))
    limiter = RateLimiter(Window(9, HOUR), name="a", segment=segment, cluster=url_of(guarded))
    quota = Quota(rpm=9, name="q", segment=segment, cluster=url_of(guarded))
    permits = ConcurrencyLimiter(2, name="c", segment=segment, cluster=url_of(guarded))
    for each in (limiter, quota, permits):
        assert_hidden(repr(each), pickle.dumps(each), vars(each))
    assert run_one(_consume, limiter, quota) == [True, True]  # spawned


@pytest.mark.parametrize("given", ["a variable", "a file", "an argument"])
def test_a_password_beside_the_url(
    guarded: servers.Server,
    segment: Segment,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    given: str,
) -> None:
    """No command line, no URL and no configuration of an application need hold it."""
    cluster: Cluster | str = f"redis://127.0.0.1:{guarded.port}/0"
    if given == "a variable":
        monkeypatch.setenv("FAST_LITELLM_SHM_CLUSTER_PASSWORD", SECRET)
    elif given == "a file":
        (tmp_path / "password").write_text(f"{SECRET}\n", encoding="utf-8")
        monkeypatch.setenv("FAST_LITELLM_SHM_CLUSTER_PASSWORD_FILE", str(tmp_path / "password"))
    else:
        cluster = Cluster(str(cluster), password=SECRET)
    monkeypatch.setenv("FAST_LITELLM_SHM_CLUSTER_OUTAGE", "deny")
    assert RateLimiter(Window(9), name="api", segment=segment, cluster=cluster).acquire("key")


def test_passwords_beside_the_url_that_are_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="url has a password, and another is given") as error:
        Cluster("redis://:s3cr@host", password="s3cr2")
    assert_hidden(error.value)
    monkeypatch.setenv("FAST_LITELLM_SHM_CLUSTER_PASSWORD_FILE", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="PASSWORD_FILE: cannot read"):
        found("redis://host")
    (tmp_path / "none").touch()
    with pytest.raises(ValueError, match="is empty"):
        found("redis://host")
    monkeypatch.setenv("FAST_LITELLM_SHM_CLUSTER_PASSWORD", "x")
    with pytest.raises(ValueError, match="are both set"):
        found("redis://host")


def _all_that_is_said(segment: Segment) -> str:
    said = []
    for arguments in (
        ["inspect"], ["inspect", "--json", "--top", "0"], ["inspect", "--processes"],
        *(["export", "--format", each] for each in ("prometheus", "json", "csv")),
    ):  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "fast_litellm_shm.cli", *arguments, "--name", segment.name],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        said.append(done.stdout + done.stderr)
    assert any("api" in each for each in said)
    return "".join(said)


def _failures(limiter: RateLimiter, permits: ConcurrencyLimiter) -> list[BaseException]:
    raised: list[BaseException] = []
    calls: list[Callable[[], Any]] = [
        lambda: limiter.reset("key"),
        limiter.reset,
        lambda: connection_of(limiter).cluster.client().ping(),
        lambda: connection_of(limiter).call([]),
    ]
    for call in calls:
        try:
            call()
        except Exception as error:
            raised.append(error)
    return raised


class Unready(servers.Server):
    """That needs no HELLO."""

    def client(self) -> Any:
        return redis.Redis(unix_socket_path=self.path, protocol=2)


@pytest.mark.parametrize("trouble", ["wrong", "gone", "no AUTH"])
def test_no_password_where_it_fails(
    trouble: str,
    segment: Segment,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A wrong password, a server that is gone, and one that does not know AUTH: that one says
    what it was told, word by word."""
    port = servers.free_port()
    monkeypatch.setattr("fast_litellm_shm._shared.settings.segment_name", lambda: segment.name)
    with ExitStack() as stack:
        if trouble != "gone":
            need("redis")
            without = ("--rename-command", "AUTH", "", "--rename-command", "HELLO", "")
            more = ("--requirepass", "other") if trouble == "wrong" else without
            stack.enter_context(Unready("redis", *more, port=port))
        caplog.set_level(logging.DEBUG)
        monkeypatch.setenv("FAST_LITELLM_SHM_CLUSTER_OUTAGE", "deny")
        url = f"redis://:{WRITTEN}@127.0.0.1:{port}/0?protocol=2"
        if trouble == "no AUTH":  # beside what is refused by the library itself
            with pytest.raises(redis.RedisError, match="s3cr"):
                Cluster(url).client().ping()
        limiter = RateLimiter(Window(9), name="api", segment=segment, cluster=url)
        permits = ConcurrencyLimiter(2, name="calls", segment=segment, cluster=url)
        assert not limiter.acquire("key") and not permits.acquire("key")
        link = connection_of(limiter)
        wait_until("it is missed", lambda: (limiter.acquire("x"), link.outage is not None)[1])
        raised = _failures(limiter, permits)
        told = [each for each in raised if not isinstance(each, redis.RedisError)]
        assert len(told) >= 3
        for each in told:
            assert_hidden(repr(each), each.args, "".join(traceback.format_exception(each)))
        wait_until("it is tried again", lambda: len(caplog.records) > 0)
        assert_hidden(_all_that_is_said(segment), link.outage, link, limiter, permits)
    out, err = capfd.readouterr()
    assert_hidden(caplog.text, out, err)
    for record in caplog.records:
        if record.name.startswith("fast_litellm_shm"):
            assert_hidden(record.getMessage(), record.args, record.exc_text)


def need(kind: str) -> None:
    if not servers.installed(kind):
        pytest.skip(f"there is no {kind}-server here: apt-get install {kind}-server")


def test_no_password_in_the_segment_and_its_views(
    guarded: servers.Server, segment: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAST_LITELLM_SHM_CLUSTER", url_of(guarded))
    limiter = RateLimiter(Window(9, HOUR), name="api", segment=segment)
    assert limiter.acquire("key")
    assert_hidden(_all_that_is_said(segment))
    done = subprocess.run(
        [sys.executable, "-m", "fast_litellm_shm.cli", "reset", "--name", segment.name, "key"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0
    assert_hidden(done.stdout, done.stderr, " ".join(done.args))
    assert_hidden(Path(path_of(segment.name)).read_bytes())


# TLS


def _tls(url: str, certificate: Path) -> Cluster:
    mark = "&" if "?" in url else "?"
    whole = f"{url}{mark}ssl_ca_certs={certificate}"
    return Cluster(whole, on_outage="deny", timeout=servers.SLOWEST)


def _is_complete(client: Any) -> bool:
    return b"cluster_state:ok" in client.execute_command("CLUSTER", "INFO")


@pytest.mark.filterwarnings("ignore:unclosed <ssl:ResourceWarning")
@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
def test_a_cluster_of_nodes_over_tls(kind: str, certificate: Path, segment: Segment) -> None:
    """Three nodes that speak nothing else, and ask for a password."""
    need(kind)
    with ExitStack() as stack:
        ports, nodes = [], []
        for _ in range(3):
            port = servers.free_port(servers.HIGHEST_OF_A_CLUSTER)
            options = servers.encrypted(kind, port, certificate)
            more = ("--cluster-enabled", "yes", "--tls-cluster", "yes", "--tls-replication", "yes")
            nodes.append(stack.enter_context(servers.Server(kind, *options, *more)))
            ports.append(port)
        for i, node in enumerate(nodes):
            with node.client() as client:
                first, last = i * SLOTS // 3, (i + 1) * SLOTS // 3 - 1
                client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, last)
                client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", i + 1)
                for port in ports[:i]:
                    client.execute_command("CLUSTER", "MEET", "127.0.0.1", port)
        for node in nodes:
            with node.client() as client:
                wait_until("the nodes find each other", partial(_is_complete, client))
                client.execute_command(
                    "ACL", "SETUSER", "limits", "on", f">{SECRET}", "~*", "&*", "+@all"
                )
        url = f"rediss+cluster://limits:{WRITTEN}@127.0.0.1:{ports[0]},127.0.0.1:{ports[1]}"
        limiter = RateLimiter(
            Window(10, HOUR), name="api", segment=segment, cluster=_tls(url, certificate)
        )
        for i in range(20):
            assert limiter.acquire(f"key {i}", 6) and not limiter.acquire(f"key {i}", 6)
        for node in nodes:
            with node.client() as client:
                assert client.dbsize() > 0
        with pytest.raises(redis.exceptions.RedisClusterException, match="CERTIFICATE_VERIFY_FAIL"):
            Cluster(url).client()  # who is told of none to trust
        with pytest.raises(redis.exceptions.RedisClusterException):  # nor is it served in clear
            Cluster(url.replace("rediss", "redis")).client()
        connection_of(limiter).client().close()
    gc.collect()  # while the warning is ignored: the library leaves the socket to the collector


@pytest.mark.filterwarnings("ignore:unclosed <ssl:ResourceWarning")
@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
def test_sentinel_over_tls(certificate: Path, segment: Segment) -> None:
    """Sentinel and what it watches, each with a password of its own."""
    need("redis")
    ports = [servers.free_port() for _ in range(2)]
    options = servers.encrypted("redis", ports[0], certificate)
    master = servers.Server("redis", *options, "--tls-replication", "yes", "--requirepass", SECRET)
    sentinel = servers.Server("redis")
    config = (
        f"tls-port {ports[1]}\ntls-cert-file {certificate}\ntls-ca-cert-file {certificate}\n"
        f"tls-key-file {certificate.with_name('key.pem')}\ntls-auth-clients no\n"
        f"tls-replication yes\nrequirepass {SECRET}\n"
        f"sentinel monitor limits 127.0.0.1 {ports[0]} 1\nsentinel auth-pass limits {SECRET}\n"
    )
    path = Path(f"{sentinel.path}.conf")
    path.write_text(config, encoding="ascii")
    with master, sentinel.sentinel(str(path)):
        url = f"rediss+sentinel://:{WRITTEN}@127.0.0.1:{ports[1]}/limits/0?sentinel_password={WRITTEN}"
        cluster = _tls(url, certificate)
        limiter = RateLimiter(Window(3, HOUR), name="api", segment=segment, cluster=cluster)
        wait_until("Sentinel knows it", lambda: limiter.acquire("other"), every=0.05)
        assert [bool(limiter.acquire("key")) for _ in range(4)] == [True] * 3 + [False]
        with pytest.raises(redis.RedisError):
            Cluster(url).client().ping()
        assert_hidden(cluster, pickle.dumps(cluster))
    gc.collect()
