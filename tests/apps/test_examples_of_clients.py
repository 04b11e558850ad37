"""The examples of clients, four workers of each: all together send exactly what one would."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter

import pytest
from apps.model_server import model_server
from integrations.httpx.server import upstream_server
from support.served import EXAMPLES
from support.waiting import PATIENCE

WORKERS, EACH, LIMIT = 4, 12, 20
# The workers are forked when the libraries are loaded: to load them four times takes 20 s.
DRIVER = f"""
import os, runpy, sys
path, *sys.argv[1:] = sys.argv[1:]
runpy.run_path(path)
for _ in range({WORKERS}):
    if not os.fork():
        runpy.run_path(path, run_name="__main__")
        sys.exit()
sys.exit(max(os.wait()[1] for _ in range({WORKERS})))
"""


def answers_of_workers(name: str, segment_name: str, *args: str, **env: str) -> Counter[str]:
    """What the workers print, added up."""
    path = str(EXAMPLES / "clients" / name)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore:This process", "-c", DRIVER, path, *args],
        env=os.environ
        | {"FAST_LITELLM_SHM_NAME": segment_name, "LANGSMITH_TRACING": "false"}
        | env,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [Counter(json.loads(each)) for each in re.findall(r"{.*?}", done.stdout)]
    assert [sum(each.values()) for each in found] == [EACH] * WORKERS
    return sum(found, Counter[str]())


@pytest.mark.parametrize("name", ["requests_client.py", "aiohttp_client.py"])
def test_of_http(name: str, segment_name: str) -> None:
    with upstream_server() as server:
        found = answers_of_workers(name, segment_name, server.origin, str(EACH))
        assert found == {"200": LIMIT, "not sent": WORKERS * EACH - LIMIT}
        assert server.asked == LIMIT
        assert server.most <= 2, "never more than two in flight, over all workers"


@pytest.mark.parametrize("name", ["openai", "anthropic"])
def test_of_sdks(name: str, segment_name: str) -> None:
    with model_server() as server:
        variables = {
            f"{name.upper()}_BASE_URL": server.origin,
            f"{name.upper()}_API_KEY": "key",
        }
        found = answers_of_workers(f"{name}_client.py", segment_name, str(EACH), **variables)
        assert found == {"answered": LIMIT, "refused": WORKERS * EACH - LIMIT}
        assert server.asked == LIMIT, "a refused call sends nothing, and is not tried again"
        assert server.most <= 2


@pytest.mark.parametrize("name", ["langchain_model.py", "llama_index_model.py"])
def test_of_frameworks(name: str, segment_name: str) -> None:
    found = answers_of_workers(name, segment_name, str(EACH))
    assert found == {"answered": LIMIT, "refused": WORKERS * EACH - LIMIT}
