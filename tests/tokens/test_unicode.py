"""The table of Unicode classes is that of the installed tiktoken."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from fast_litellm_shm.tokens import vocabulary

_FOLDER = Path(__file__).parents[2] / "csrc" / "tokens"


@pytest.fixture(scope="module", name="generator")
def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generator", _FOLDER / "unicode_classes.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_tiktokens(generator: ModuleType) -> None:
    """Fails where tiktoken's regular expressions got newer tables: make unicode_classes.h again,
    and raise UNICODE_VERSION of vocabulary.py and FSHM_TOKENS_VERSION."""
    made = generator.header(generator.classes(), generator.unicode_version())
    assert (_FOLDER / "unicode_classes.h").read_text(encoding="utf-8") == made + "\n"


def test_the_version_is_told(generator: ModuleType) -> None:
    assert generator.unicode_version() == "{}.{}".format(*vocabulary.UNICODE_VERSION)


def test_another_version_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    import tiktoken

    ranks = {bytes([i]): i for i in range(256)}
    found = tiktoken.Encoding(
        "x", pat_str=next(iter(vocabulary.PATTERNS)), mergeable_ranks=ranks, special_tokens={}
    )
    assert vocabulary.compile_encoding(found) is not None
    for other in ((15, 0), (17, 0)):
        monkeypatch.setattr(vocabulary, "UNICODE_VERSION", other)
        assert vocabulary.compile_encoding(found) is None
