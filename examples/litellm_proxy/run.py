"""make demo-litellm: LiteLLM's real proxy with four workers, without the plugin and with it.

Every answer is a mock, and nothing leaves this machine. Each proxy gets a new random
LITELLM_MASTER_KEY, since LiteLLM does not start without one. Exits with status 1 where the proxy
with the plugin admits another number than is configured.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import httpx
from rich.console import Console
from rich.table import Table

from fast_litellm_shm import Segment, SegmentNotFoundError

HERE = Path(__file__).parent
WORKERS = 4
STARTS_WITHIN = 120.0  # seconds
PLUGIN = "callbacks: fast_litellm_shm.integrations.litellm.limiter"
TOKENS = 30  # of a mock answer: 10 in, 20 out

console = Console(highlight=False)


class Case(NamedTuple):
    """requests: to the model, with the key; at_once of them at a time, begun ``apart`` seconds
    apart. per_answer: what one answer counts."""

    what: str
    configured: int
    key: str
    model: str
    requests: int
    at_once: int
    apart: float = 0.0
    per_answer: int = 1


CASES = (
    Case("requests a minute of a key", 10, "sk-requests", "quick", 100, 8),
    Case("tokens a minute of a key", 1000, "sk-tokens", "quick", 200, 8, per_answer=TOKENS),
    Case("parallel requests of a key", 4, "sk-parallel", "slow", 40, 40, apart=0.03),
    Case("requests a minute of a deployment", 10, "sk-free", "deployed", 100, 8),
)


class ProxyError(Exception):
    """The proxy did not start, or answered with a status other than 200 and 429."""


def ask(url: str, key: str, model: str) -> int:
    """One request over a connection of its own: the kernel spreads them over the workers."""
    return httpx.post(
        f"{url}/v1/chat/completions",
        headers={"Authorization": f"Bearer {key}", "Connection": "close"},
        json={"model": model, "messages": [{"role": "user", "content": "hi"}]},
        timeout=60,
        trust_env=False,
        verify=False,  # plain HTTP: reading the authorities takes longer than the request
    ).status_code


def admitted(url: str, case: Case) -> int:
    def one(index: int) -> int:
        time.sleep(case.apart * (index % case.at_once))
        return ask(url, case.key, case.model)

    with ThreadPoolExecutor(case.at_once) as pool:
        found = list(pool.map(one, range(case.requests)))
    others = set(found) - {200, 429}
    if others:
        raise ProxyError(f"{case.what}: the proxy answered {sorted(others)}")
    return found.count(200) * case.per_answer


def config(directory: Path, plugin: bool) -> None:
    text = (HERE / "config.yaml").read_text()
    if not plugin:
        text = text.replace(PLUGIN, "drop_params: true")
    (directory / "config.yaml").write_text(text)
    (directory / "auth.py").write_text((HERE / "auth.py").read_text())


@contextlib.contextmanager
def proxy(segment: str, plugin: bool) -> Iterator[str]:
    """Its URL, once all workers serve."""
    with tempfile.TemporaryDirectory() as name, socket.socket() as taken:
        directory = Path(name)
        config(directory, plugin)
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
        taken.close()
        with (directory / "log").open("wb") as log:
            process = subprocess.Popen(
                [
                    str(Path(sys.executable).with_name("litellm")),
                    *("--config", str(directory / "config.yaml"), "--host", "127.0.0.1"),
                    *("--port", port, "--num_workers", str(WORKERS), "--run_gunicorn"),
                ],
                stdout=log,
                stderr=log,
                cwd=directory,
                start_new_session=True,
                env={
                    **os.environ,
                    "FAST_LITELLM_SHM_NAME": segment,
                    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
                    "LITELLM_MASTER_KEY": f"sk-{secrets.token_hex(24)}",
                    "NO_DOCS": "True",
                    "PYTHONIOENCODING": "ascii:backslashreplace",  # docs/litellm.md: Watch
                },
            )
        try:
            _until_started(process, f"http://127.0.0.1:{port}", directory / "log")
            yield f"http://127.0.0.1:{port}"
        finally:
            for sent in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, sent)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)


def _until_started(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    end = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            ask(url, "sk-free", "quick")
            if log.read_text(errors="replace").count("Application startup complete") >= WORKERS:
                return
        time.sleep(0.2)
    raise ProxyError(f"no start within {STARTS_WITHIN:.0f} s:\n{log.read_text()[-3000:]}")


def run(segment: str, plugin: bool) -> list[int]:
    console.print(
        f"starting LiteLLM's proxy with {WORKERS} workers and a random LITELLM_MASTER_KEY, "
        f"{'with' if plugin else 'without'} the plugin (10 to 40 s)"
    )
    with proxy(segment, plugin) as url:
        return [admitted(url, case) for case in CASES]


def show(without: list[int], with_plugin: list[int]) -> bool:
    """True where the plugin admitted what is configured."""
    table = Table("limit", "configured", "admitted without", "admitted with the plugin")
    for column in table.columns[1:]:
        column.justify = "right"
    exact = True
    for case, bare, ours in zip(CASES, without, with_plugin, strict=True):
        well = abs(ours - case.configured) < case.per_answer
        exact &= well
        table.add_row(
            case.what, str(case.configured), str(bare), f"[{'green' if well else 'red'}]{ours}[/]"
        )
    console.print(table)
    console.print(f"(tokens: an answer has {TOKENS}; the last one that fits is admitted)")
    return exact


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, as Ctrl-C does
    segment = f"demo-litellm-{os.getpid()}"
    try:
        return 0 if show(run(segment, False), run(segment, True)) else 1
    except ProxyError as problem:
        console.print(f"[red]the demo failed:[/] {problem}")
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; the proxy is stopped and the segment removed")
        return 130
    finally:
        with contextlib.suppress(SegmentNotFoundError):  # the proxy failed before
            Segment(segment, create=False).remove()


if __name__ == "__main__":
    sys.exit(main())
