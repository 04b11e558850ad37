"""The kept inputs of the fuzzer find nothing any more; and they are what seeds.py says."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess

import pytest

from .seeds import CORPUS, SEEDS

ROOT = pathlib.Path(__file__).parents[2]


def _builds(compiler: str, flags: list[str], folder: pathlib.Path) -> bool:
    """Some compilers come without their sanitizers."""
    (folder / "trial.c").write_text("int main(void) { return 0; }\n", encoding="utf-8")
    command = [compiler, *flags, "trial.c", "-o", "trial"]
    done = subprocess.run(command, cwd=folder, check=False, capture_output=True, timeout=120)
    return done.returncode == 0


@pytest.mark.parametrize("sanitized", [True, False], ids=["sanitized", "as-shipped"])
def test_kept_inputs(tmp_path: pathlib.Path, sanitized: bool) -> None:
    compiler = os.environ.get("CC", "cc").split()[0]
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g"]
    if not shutil.which(compiler) or (sanitized and not _builds(compiler, flags, tmp_path)):
        pytest.skip(f"{compiler} has no sanitizers here")
    program = tmp_path / "replay"
    given = [f"@{ROOT / 'csrc' / 'cflags'}", "-DREPLAY", *(flags if sanitized else [])]
    source = ROOT / "tests" / "hostile" / "fuzz.c"
    subprocess.run([compiler, *given, str(source), "-o", str(program)], check=True, timeout=300)
    inputs = sorted(str(path) for path in CORPUS.iterdir())
    done = subprocess.run(
        [program, *inputs], check=False, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout == f"{len(inputs)} passed, 0 failed\n"


def test_kept_inputs_are_those_in_words() -> None:
    for name, data in SEEDS.items():
        assert (CORPUS / name).read_bytes() == data, f"write them again: seeds.py ({name})"
