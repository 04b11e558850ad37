"""A real LiteLLM proxy, with its workers, on the loopback interface."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from fast_litellm_shm import Segment, SegmentNotFoundError
from support.waiting import PATIENCE, wait_until

WORKERS = 4
STARTS_WITHIN = 180.0  # seconds; four spawned workers import LiteLLM at once

# What a key may is in the key itself: sk-NAME-rpm=10-tpm=1000-parallel=4, and a model's limit as
# m1.rpm=5 (with _ for - in its name), a budget as usd=1 or m1.usd=1. A file beside it changes that,
# for all workers, without a restart.
AUTH = """
import json
import os

from litellm.proxy._types import UserAPIKeyAuth

FIELDS = {"rpm": "rpm_limit", "tpm": "tpm_limit", "parallel": "max_parallel_requests",
          "user_rpm": "user_rpm_limit", "team_rpm": "team_rpm_limit",
          "usd": "max_budget", "team_usd": "team_max_budget", "spent": "spend"}


async def user_api_key_auth(request, api_key):
    found = {"api_key": api_key, "user_id": "u1", "team_id": "t1", "metadata": {}}
    path = os.path.join(os.path.dirname(__file__), "limits.json")
    changed = json.load(open(path)) if os.path.exists(path) else {}
    for part in changed.get(api_key, api_key).split("-")[2:]:
        name, value = part.split("=")
        model, _, kind = name.rpartition(".")
        if model and kind == "usd":
            budget = {"budget_limit": float(value), "time_period": "30d"}
            found.setdefault("model_max_budget", {})[model.replace("_", "-")] = budget
        elif name in ("usd", "team_usd", "spent"):
            found[FIELDS[name]] = float(value)
        elif model:
            found["metadata"]["model_" + kind + "_limit"] = {model.replace("_", "-"): int(value)}
        else:
            found[FIELDS[name]] = int(value)
    return UserAPIKeyAuth(**found)
"""

PLUGIN = "fast_litellm_shm.integrations.litellm.limiter"

CONFIG = """
model_list:
  - model_name: m1
    litellm_params: {{model: openai/fake, api_key: sk-none, mock_response: "hello"}}
  - model_name: slow
    litellm_params: {{model: openai/slow, api_key: sk-none, mock_response: "hello", mock_delay: 1}}
  - model_name: slower
    litellm_params: {{model: openai/slow, api_key: sk-none, mock_response: "hello", mock_delay: 5}}
  - model_name: slowest
    litellm_params: {{model: openai/slow, api_key: sk-none, mock_response: "hello", mock_delay: 30}}
  - model_name: deployed
    litellm_params: {{model: openai/deployed, api_key: sk-none, mock_response: "hello", rpm: 10}}
  - model_name: tokened
    litellm_params:
      model: openai/tokened
      api_key: sk-none
      mock_response: "hello"
      tpm: 300
      max_parallel_requests: 100
  - model_name: claude-sonnet-latest
    litellm_params: {{model: openai/latest, api_key: sk-none, mock_response: "hello"}}
  - model_name: narrow
    litellm_params:
      {{model: openai/narrow, api_key: sk-none, api_base: "{upstream}", max_parallel_requests: 2}}
  - model_name: upstream
    litellm_params: {{model: openai/up, api_key: sk-none, api_base: "{upstream}"}}
{models}router_settings:
  num_retries: {retries}
  disable_cooldowns: true
  optional_pre_call_checks: ["enforce_model_rate_limits"]
general_settings:
  custom_auth: my_auth.user_api_key_auth
  pass_through_endpoints: [{{path: "/through", target: "{upstream}", auth: true}}]
litellm_settings:
{settings}
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


class Proxy:
    """One that runs. segment: the name that its workers share by."""

    def __init__(
        self,
        directory: Path,
        port: int,
        process: subprocess.Popen[bytes],
        segment: str,
        count: int,
    ) -> None:
        self.directory, self.port, self.process = directory, port, process
        self.segment, self._count = segment, count
        self.url = f"http://127.0.0.1:{port}"

    def log(self) -> str:
        return (self.directory / "log").read_text(errors="replace")

    def ask(
        self, key: str, model: str = "m1", headers: Mapping[str, str] | None = None, **body: Any
    ) -> httpx.Response:
        """One request over a connection of its own, so that the kernel spreads them."""
        return httpx.post(
            f"{self.url}/v1/chat/completions",
            headers={
                "Authorization": f"Bearer {key}",
                "Connection": "close",
                **(headers or {}),
            },
            json={"model": model, "messages": [{"role": "user", "content": "hi"}], **body},
            timeout=PATIENCE,
            trust_env=False,
            verify=False,  # it is plain HTTP: reading the authorities takes longer than the request
        )

    def ask_many(
        self, n: int, key: str, at_once: int = 8, apart: float = 0.0, **body: Any
    ) -> list[httpx.Response]:
        """n requests, ``at_once`` of them in flight. apart: seconds between their starts, so that
        the kernel has the time to spread them."""

        def one(index: int) -> httpx.Response:
            time.sleep(apart * (index % at_once))
            return self.ask(key, **body)

        with ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(one, range(n)))

    def opened(self) -> Segment:
        """Its segment, for reading."""
        return Segment(self.segment, _read_only=True)

    def workers(self) -> set[int]:
        """Process ids of those that have joined the segment."""
        try:
            return {found["pid"] for found in self.opened().processes()}
        except SegmentNotFoundError:
            return set()

    def wait(self, until: Callable[[], Any], what: str, within: float = PATIENCE) -> Any:
        """Until it is true, or raise with the proxy's log."""

        def looked() -> Any:
            ended = self.process.poll()
            assert ended is None, f"the proxy ended: {ended}; its log:\n{self.log()[-4000:]}"
            return until()

        def said() -> str:
            return f"{what}; the proxy's log:\n{self.log()[-4000:]}"

        return wait_until(said, looked, seconds=within, every=0.02)

    def wait_for_workers(self) -> None:
        """Until each of them has served a request."""

        def answers() -> bool:
            try:
                return self.ask("sk-warm-rpm=1000000").status_code == 200
            except httpx.HTTPError:
                return False

        def all_answer() -> bool:
            if answers():
                several = 2 * self._count
                self.ask_many(several, "sk-warm-rpm=1000000", at_once=several)
            return len(self.workers()) >= self._count

        self.wait(answers, "the proxy answers", STARTS_WITHIN)
        self.wait(all_answer, "all workers answer", STARTS_WITHIN)

    def stop(self) -> None:
        for sent in (signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is None:
                os.killpg(self.process.pid, sent)
                try:
                    self.process.wait(20)
                except subprocess.TimeoutExpired:
                    continue
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(5)


@contextmanager
def proxy(
    directory: Path,
    segment: str,
    *,
    workers: int = WORKERS,
    gunicorn: bool = False,
    settings: str = "",
    retries: int = 0,
    upstream: str = "http://127.0.0.1:9",
    models: str = "",
    environment: Mapping[str, str] | None = None,
) -> Iterator[Proxy]:
    """Start it, and wait until each of its workers serves. models: more lines of its model_list."""
    chosen = [f"  callbacks: {PLUGIN}"]
    if settings:
        chosen.append(f"  fast_litellm_shm: {settings}")
    text = CONFIG.format(
        settings="\n".join(chosen), retries=retries, upstream=upstream, models=models
    )
    (directory / "config.yaml").write_text(text)
    (directory / "my_auth.py").write_text(AUTH)
    port = free_port()
    command = [
        str(Path(sys.executable).with_name("litellm")),
        *("--config", str(directory / "config.yaml")),
        *("--host", "127.0.0.1", "--port", str(port), "--num_workers", str(workers)),
        *(["--run_gunicorn"] if gunicorn else []),
    ]
    passed = {
        **os.environ,
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "NO_DOCS": "True",
        # Imports the codec before LiteLLM's master has a thread that does: a worker that is forked
        # while that thread holds the import's lock waits for it for ever.
        "PYTHONIOENCODING": "ascii:backslashreplace",
        "LITELLM_MASTER_KEY": f"sk-{secrets.token_hex(24)}",
        "FAST_LITELLM_SHM_NAME": segment,
        **(environment or {}),
    }
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=passed, start_new_session=True, cwd=directory
        )
    started = Proxy(directory, port, process, segment, workers)
    try:
        started.wait_for_workers()
        yield started
    finally:
        started.stop()
