"""Each call of fast_shm.h is made on hostile segments, and by threads on one mapping."""

from __future__ import annotations

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
HOSTILE = sorted((ROOT / "tests" / "hostile").glob("*.[ch]"))
THREADS = sorted((ROOT / "tests" / "c").glob("*threads*.[ch]"))


def _calls(text: str) -> set[str]:
    return set(re.findall(r"\b(fshm_\w+)\(", re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)))


@pytest.mark.parametrize("sources", [HOSTILE, THREADS], ids=["hostile", "threads"])
def test_each_call_is_made(sources: list[pathlib.Path]) -> None:
    promised = _calls((ROOT / "csrc" / "fast_shm.h").read_text(encoding="utf-8"))
    made = _calls("".join(path.read_text(encoding="utf-8") for path in sources))
    assert len(promised) > 80
    assert promised - made == set()
