"""fast-shm top and dashboard where they cannot run: what is said."""

from __future__ import annotations

import os
import pathlib

import pytest

from fast_litellm_shm import Segment

from .conftest import Command, environment


def without(tmp_path: pathlib.Path, *modules: str) -> dict[str, str]:
    """An environment in which these packages are not to be found."""
    names = ", ".join(repr(module) for module in modules)
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util, sys\n"
        f"for name in ({names},):\n"
        "    sys.modules[name] = None\n"
        "find = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda n, *a: None if n in ({names},) else find(n, *a)\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    return environment(PYTHONPATH=path)


def test_without_the_extras(fast_shm: Command, segment: Segment, tmp_path: pathlib.Path) -> None:
    hidden = without(tmp_path, "textual", "starlette", "uvicorn")
    done = fast_shm("top", "--name", segment.name, env=hidden)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        'fast-shm: top needs textual, which is not installed: pip install "fast-litellm-shm[top]". '
        "`fast-shm inspect --watch` works without it\n"
    )
    done = fast_shm("dashboard", "--name", segment.name, env=hidden)
    assert (done.returncode, done.stdout) == (1, "")
    assert 'needs starlette and uvicorn: pip install "fast-litellm-shm[dashboard]"' in done.stderr
    assert fast_shm("inspect", "--name", segment.name, env=hidden).returncode == 0


def test_top_without_a_terminal(fast_shm: Command, segment: Segment) -> None:
    pytest.importorskip("textual", reason="not installed: textual")
    done = fast_shm("top", "--name", segment.name)
    assert done.returncode == 1 and "top needs a terminal" in done.stderr
    assert "inspect --watch" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["top", "--every", "0"], "must be seconds, 0.1 to 86400, not '0'"),
        (["top", "--name", "a/b"], "'a/b'"),
        (["dashboard", "--port", "65536"], "must be a port, 0 to 65535, not '65536'"),
        (["dashboard", "shop"], "a segment is named by --name"),
    ],
)
def test_wrong_usage(fast_shm: Command, arguments: list[str], said: str) -> None:
    done = fast_shm(*arguments)
    assert done.returncode == 2 and said in done.stderr
