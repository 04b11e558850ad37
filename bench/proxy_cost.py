"""What does a request through LiteLLM's whole proxy cost, with its own limiter and with the plugin?

The real proxy with one worker and answers of its own (mock_response), asked by 4 connections for a
key without limits, for one with limits of requests, tokens and parallel requests, and for one with
a budget besides: alone, with Redis, and with the plugin. The three proxies are started anew in each
pass, and are asked in turn. Processor time is that of the proxy's processes, by the kernel's count,
without the client's, and without that of Redis. Requests a second would say little: the client
takes a core's time too.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import pathlib
import random
import secrets
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass

from bench import peers
from bench.result import OURS, REFERENCE, Plot, Result, Row, Settings, Values, asked

CONNECTIONS = 4
STARTS_WITHIN, ANSWERS_WITHIN = 240.0, 60.0
_AUTH = """
from litellm.proxy._types import UserAPIKeyAuth

LIMITS = {"rpm_limit": 10**7, "tpm_limit": 10**9, "max_parallel_requests": 1000}
KEYS = {"sk-none": {}, "sk-limits": LIMITS, "sk-budget": {**LIMITS, "max_budget": 1e6}}


async def user_api_key_auth(request, api_key):
    return UserAPIKeyAuth(api_key=api_key, user_id="u", metadata={}, **KEYS[api_key])
"""
_CONFIG = """
model_list:
  - model_name: m
    litellm_params:
      model: openai/fake
      api_key: sk-none
      mock_response: "hello"
      input_cost_per_token: 0.000001
      output_cost_per_token: 0.000001
router_settings: {num_retries: 0, disable_cooldowns: true}
general_settings: {custom_auth: bench_auth.user_api_key_auth}
litellm_settings:
  drop_params: true
"""
_PLUGIN = "  callbacks: fast_litellm_shm.integrations.litellm.limiter\n"
_REDIS = "  cache: true\n  cache_params: {type: redis, mode: default_off}\n"
PARTS = ("processor time", "p50", "p99")
NONE, LIMITS, BUDGET = "sk-none", "sk-limits", "sk-budget"


@dataclass(frozen=True)
class _Asked:
    """A row: whose proxy is asked, and for which key."""

    proxy: str
    key: str
    who: str


ROWS = {
    "no limits": _Asked("alone", NONE, REFERENCE),
    "no limits, the plugin": _Asked("plugin", NONE, OURS),
    "LiteLLM's own limiter": _Asked("alone", LIMITS, "litellm"),
    "LiteLLM's own limiter, Redis": _Asked("redis", LIMITS, "litellm"),
    "the plugin": _Asked("plugin", LIMITS, OURS),
    "LiteLLM's own limiter and budget": _Asked("alone", BUDGET, "litellm"),
    "LiteLLM's own limiter and budget, Redis": _Asked("redis", BUDGET, "litellm"),
    "the plugin with budgets": _Asked("plugin", BUDGET, OURS),
}
_BODY = json.dumps(
    {"model": "m", "messages": [{"role": "user", "content": "words of a prompt " * 20}]}
).encode()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


class _Proxy:
    def __init__(self, place: peers.Place, kind: str) -> None:
        folder = pathlib.Path(place.path())
        folder.mkdir()
        text = _CONFIG + {"plugin": _PLUGIN, "redis": _REDIS}.get(kind, "")
        (folder / "config.yaml").write_text(text, encoding="utf-8")
        (folder / "bench_auth.py").write_text(_AUTH, encoding="utf-8")
        self.port, self._log = _free_port(), folder / "log"
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("REDIS", "FAST_LITELLM"))},
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "NO_DOCS": "True",
            "LITELLM_MASTER_KEY": f"sk-{secrets.token_hex(24)}",
            "FAST_LITELLM_SHM_NAME": place.segment_name,
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        if kind == "redis":
            environment["REDIS_URL"] = f"unix://{place.redis()}"
        command = [
            str(pathlib.Path(sys.executable).with_name("litellm")),
            *("--config", "config.yaml", "--host", "127.0.0.1"),
            *("--port", str(self.port), "--num_workers", "1"),
        ]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True, cwd=folder
            )

    def wait(self) -> None:
        deadline = time.monotonic() + STARTS_WITHIN
        while True:
            if self._process.poll() is not None or time.monotonic() > deadline:
                log = self._log.read_text(errors="replace")
                raise RuntimeError(f"LiteLLM's proxy did not start: {log[-500:]}")
            with contextlib.suppress(OSError):
                asyncio.run(_load(self.port, NONE, CONNECTIONS))
                return
            time.sleep(0.2)

    def seconds(self) -> float:
        """Processor time so far, of all its processes."""
        mine, ticks = str(self._process.pid), 0
        for each in pathlib.Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if not each.name.isdigit():
                    continue
                fields = (each / "stat").read_text().rpartition(")")[2].split()
                if each.name == mine or fields[3] == mine:  # its session
                    ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        for sent in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, sent)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(20)
        self._process.wait(20)


async def _load(port: int, key: str, requests: int) -> list[float]:
    """What each request took, sorted, in ms."""
    took: list[float] = []
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\nauthorization: Bearer {key}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(_BODY)}\r\n\r\n"
    ).encode()

    async def connection(count: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(count):
            begun = time.perf_counter_ns()
            writer.write(head + _BODY)
            answer = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(answer.partition(b"content-length:")[2].partition(b"\r\n")[0])
            body = await reader.readexactly(length)
            if not answer.startswith(b"http/1.1 200"):
                raise RuntimeError(f"answered {answer[:40]!r} {body[:200]!r}")
            took.append((time.perf_counter_ns() - begun) / 1e6)
        writer.close()

    each = [connection(requests // CONNECTIONS) for _ in range(CONNECTIONS)]
    await asyncio.wait_for(asyncio.gather(*each), ANSWERS_WITHIN)
    return sorted(took)


def _started(place: peers.Place, kinds: list[str], found: dict[str, _Proxy]) -> None:
    for kind in random.sample(kinds, len(kinds)):
        found[kind] = _Proxy(place, kind)
    for proxy in found.values():
        proxy.wait()


def _measure(
    proxies: dict[str, _Proxy], rows: dict[str, _Asked], rounds: int, requests: int
) -> dict[str, dict[str, list[float]]]:
    """By part, then by row."""
    found: dict[str, dict[str, list[float]]] = {part: {name: [] for name in rows} for part in PARTS}
    for each in rows.values():  # the first requests load much
        asyncio.run(_load(proxies[each.proxy].port, each.key, requests))
    for _ in range(rounds):
        for name in random.sample(list(rows), len(rows)):
            proxy = proxies[rows[name].proxy]
            before = proxy.seconds()
            took = asyncio.run(_load(proxy.port, rows[name].key, requests))
            spent = (proxy.seconds() - before) / len(took) * 1e6
            middle, tail = took[len(took) // 2], took[len(took) * 99 // 100]
            for part, value in zip(PARTS, (spent, middle, tail), strict=True):
                found[part][name].append(value)
    return found


def run(settings: Settings) -> Result:
    """Measure; nothing where LiteLLM's proxy is not installed."""
    result = asked(__doc__)
    try:
        peers.need("litellm.proxy.proxy_cli")
        peers.need("fastapi_sso")  # one of those that the proxy needs, and litellm alone has not
    except peers.MissingError as error:
        result.missing["LiteLLM's proxy"] = str(error)
        return result
    rows = dict(ROWS)
    if importlib.util.find_spec("fast_litellm_shm.integrations.litellm.budgets") is None:
        result.missing["the plugin with budgets"] = "this plugin keeps no budgets"
        del rows["the plugin with budgets"]
    with peers.Place() as place:
        try:
            peers.need("redis")
            place.redis()
        except peers.MissingError as error:
            result.missing["Redis"] = str(error)
            rows = {name: each for name, each in rows.items() if each.proxy != "redis"}
        proxies: dict[str, _Proxy] = {}
        try:
            _started(place, list({each.proxy for each in rows.values()}), proxies)
            found = _measure(proxies, rows, *settings.pick((settings.rounds // 3, 400), (3, 100)))
        finally:
            for proxy in proxies.values():
                proxy.stop()
    for part in PARTS:
        unit = "µs" if part == "processor time" else "ms"
        for name, each in rows.items():
            result.rows.append(Row(name, unit, Values(found[part][name]), each.who, part))
    result.plots += [
        Plot("proxy_cost", "bars", "A request through LiteLLM's proxy", ("processor time",),
             "microseconds a request", log_value=False),
        Plot("proxy_latency", "bars", "A request through LiteLLM's proxy", ("p50", "p99"),
             "milliseconds a request", log_value=False),
    ]  # fmt: skip
    return result
