"""Without its extra, an integration says how to get it; those without one need nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

HIDDEN = "fastapi starlette httpx flask django rest_framework celery rq"
HIDE = f"import sys; sys.modules.update(dict.fromkeys({HIDDEN.split()}));"


def imported(module: str) -> subprocess.CompletedProcess[str]:
    code = f"{HIDE} import fast_litellm_shm.integrations.{module}"
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("module", ["fastapi", "httpx", "django", "rest_framework", "celery", "rq"])
def test_what_is_missing_is_said(module: str) -> None:
    done = imported(module)
    assert done.returncode == 1
    assert (
        f'pip install "fast-litellm-shm[{module.replace("_", "-")}]"'
        in done.stderr.splitlines()[-1]
    )


@pytest.mark.parametrize("module", ["asgi", "wsgi", "web", "_httpx_upstream", "_tasks"])
def test_what_needs_nothing(module: str) -> None:
    assert imported(module).returncode == 0
