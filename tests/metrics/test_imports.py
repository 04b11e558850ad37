"""Without the extra, an integration says which one is missing; the package itself needs none."""

from __future__ import annotations

import subprocess
import sys

import pytest
from support.children import PATIENCE

_IMPORT = """
import sys
sys.modules[sys.argv[1]] = None  # as if it were not installed
import fast_litellm_shm.cli.export
try:
    __import__("fast_litellm_shm.integrations." + sys.argv[2])
except ImportError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("needs", "name", "extra"),
    [("prometheus_client", "prometheus", "prometheus"), ("opentelemetry", "opentelemetry", "otel")],
)
def test_the_error_names_the_extra(needs: str, name: str, extra: str) -> None:
    said = subprocess.run(
        [sys.executable, "-c", _IMPORT, needs, name],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    assert f'pip install "fast-litellm-shm[{extra}]"' in said.stdout
