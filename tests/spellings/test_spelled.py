"""No way to write a request passes a limit: frameworks under servers, by raw sockets.

SPELLINGS=20000 SPELLINGS_SEED=7 make test-spellings: more of those at random, and others.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
from spellings.pairs import APPS, PLAIN, SERVERS, Server, running
from spellings.spelled import Spelling, at_random, spellings
from support.names import unique_name

EACH = int(os.environ.get("SPELLINGS", "300"))  # at random, of each server
SEED = int(os.environ.get("SPELLINGS_SEED", "1"))


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in SERVERS],
)
def served_by(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Server]]:
    """Each server is started once."""
    name = request.param
    with running(name, tmp_path_factory.mktemp("served"), unique_name(name)) as server:
        yield name, server


class Asked:
    """Each way is another client's, who asks in the plain way too: the limit of both is 1."""

    def __init__(self, name: str, server: Server) -> None:
        self._server = server
        self._command, self._kind, self._root = SERVERS[name]
        self._asked: dict[str, tuple[str, str, Spelling]] = {}
        self._counted: set[str] = set()

    def apps(self) -> dict[str, str]:
        """Names, and what stands before each path."""
        found = list(APPS[self._kind].items())
        if "--root-path" in self._command:  # which Falcon does not know
            found = [each for each in found if not each[0].startswith("falcon")]
        return {app: self._root + prefix for app, prefix in found}

    def ask(self, app: str, handler: str, spelling: Spelling) -> None:
        key = self._server.key()
        self._asked[key] = app, handler, spelling
        self._server.say(app, key, spelling.target, *spelling.headers, method=spelling.method)
        if self._server.say(app, key, self.apps()[app] + PLAIN[handler]) == 429:
            self._counted.add(key)

    def check(self, told: str) -> set[tuple[str, str]]:
        """Which handlers of which applications have served."""
        served = self._server.served()
        over = [
            f"{served[key][handler]} times: {app} {spelling}"
            for key, (app, handler, spelling) in self._asked.items()
            if served[key][handler] > 1
        ]
        reached = sum(
            served[key][handler] == 1
            for key, (_, handler, _) in self._asked.items()
            if key in self._counted
        )
        told += f": {len(self.apps())} applications, {len(self._asked)} ways, {reached} reach it"
        print(told)
        assert not over, f"{told}; {len(over)} pass the limit:\n" + "\n".join(over)
        assert reached >= len(self._asked) // 20, f"{told}: too few to say anything"
        return {asked[:2] for key, asked in self._asked.items() if served[key]}


def test_none_is_served_more_than_the_limit(served_by: tuple[str, Server]) -> None:
    name, server = served_by
    asked = Asked(name, server)
    for app, prefix in asked.apps().items():
        for each, (handler, path) in enumerate(PLAIN.items()):
            found = spellings(path, prefix)
            for spelling in found if not each else found[each::4]:  # the first handler by all
                asked.ask(app, handler, spelling)
    assert asked.check(name) == {(app, handler) for app in asked.apps() for handler in PLAIN}


#: What the client writes before the proxy adds the client's address: {n}, each time another.
WRITTEN = [
    ["X-Forwarded-For: 1.1.1.{n}, {client}"],
    ["X-Forwarded-For: 1.1.1.{n}", "X-Forwarded-For: {client}"],
    ["X-Forwarded-For: 127.0.0.1, 1.1.1.{n}, {client}, 127.0.0.2"],
    ["X-Forwarded-For: {client}", "Forwarded: for=1.1.1.{n}", "X-Real-IP: 1.1.1.{n}"],
    ["Forwarded: for=1.1.1.{n}, for={client}"],
    ["Forwarded: for=1.1.1.{n}", 'Forwarded: proto=http;for="{client}:{n}"'],
    ["Forwarded: for={client};host=1.1.1.{n}", "X-Forwarded-Host: 1.1.1.{n}"],
    ["X-Forwarded-For: {client}", "X_Forwarded_For: 1.1.1.{n}"],  # to WSGI, one variable
    ["X_Forwarded_For: 1.1.1.{n}", "X-Forwarded-For: {client}"],
    ["X-Forwarded_For: 1.1.1.{n}", "X-Forwarded-For: {client}"],
]


#: To which the last line counts, with underscores or not: no library within WSGI can tell them
#: apart, so docs/web.md says it.
TAKES_UNDERSCORES = ("granian-wsgi", "hypercorn-wsgi")


@pytest.mark.parametrize("number", range(len(WRITTEN)))
def test_no_client_is_another_by_what_it_writes(served_by: tuple[str, Server], number: int) -> None:
    """The server's peer is a proxy, which adds the client's address. Each way has clients of its
    own; a limit of 1."""
    server_name, server = served_by

    def ask(client: str, n: int) -> int:
        lines = [each.format(client=client, n=n) for each in WRITTEN[number]]
        name = lines[0].partition(":")[0].replace("_", "-")
        return server.say(f"by {name}", "-", "/ready", *lines)

    one, other = (f"198.51.{number}.{each}" for each in (1, 2))
    forged = server_name in TAKES_UNDERSCORES and "_" in WRITTEN[number][-1]
    assert [ask(one, n) for n in range(1, 6)] == [200, *[200 if forged else 429] * 4]
    assert ask(other, 9) == 200


def test_nor_at_random(served_by: tuple[str, Server]) -> None:
    name, server = served_by
    asked, chance = Asked(name, server), random.Random(f"{SEED} {name}")
    apps = list(asked.apps().items())
    for _ in range(EACH):
        app, prefix = chance.choice(apps)
        handler, path = chance.choice(list(PLAIN.items()))
        asked.ask(app, handler, at_random(path, prefix, chance))
    asked.check(f"{name}, seed {SEED}")
