"""Without its extra, an integration says how to get it; those without one need nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

HIDDEN = [
    *("fastapi", "starlette", "flask", "httpx", "httpx2", "requests", "aiohttp"),
    *("langchain_core", "llama_index"),
    *("django", "rest_framework", "celery", "rq"),
]
HIDE = f"import sys; sys.modules.update(dict.fromkeys({HIDDEN}));"
EXTRAS = {
    **{name: name for name in ("fastapi", "httpx", "httpx2", "requests", "aiohttp", "langchain")},
    "aiohttp_server": "aiohttp",
    "llama_index": "llama-index",
    **{name: name.replace("_", "-") for name in ("django", "rest_framework", "celery", "rq")},
}


def imported(module: str) -> subprocess.CompletedProcess[str]:
    code = f"{HIDE} import fast_litellm_shm.integrations.{module}"
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("module", EXTRAS)
def test_what_is_missing_is_said(module: str) -> None:
    done = imported(module)
    assert done.returncode == 1
    assert f'pip install "fast-litellm-shm[{EXTRAS[module]}]"' in done.stderr.splitlines()[-1]


NEEDS_NOTHING = ["asgi", "wsgi", "web", "_httpx_upstream", "_httpx_transports", "_turns", "_tasks"]


@pytest.mark.parametrize("module", NEEDS_NOTHING)
def test_what_needs_nothing(module: str) -> None:
    assert imported(module).returncode == 0
