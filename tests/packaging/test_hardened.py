"""What is shipped is built so that a fault in it is harder to use: the files themselves say."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import pytest
from support.elf import Elf

from fast_litellm_shm import _native

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files, as Linux has them"),
    pytest.mark.skipif(struct.calcsize("P") != 8, reason="of 64 bits"),
]


@pytest.fixture(scope="module", params=["the extension module", "libfast_shm.so"])
def built(request: pytest.FixtureRequest, lib_folder: Path) -> Elf:
    if request.param == "the extension module":
        return Elf(Path(_native.__file__).read_bytes())
    return Elf((lib_folder / "libfast_shm.so").read_bytes())


def test_what_the_linker_fills_in_is_read_only(built: Elf) -> None:
    assert built.is_bound_at_load()


def test_the_stack_holds_no_code(built: Elf) -> None:
    assert built.stack_holds_no_code()


def test_it_lies_anywhere(built: Elf) -> None:
    assert built.lies_anywhere()


def test_stack_frames_are_checked(built: Elf) -> None:
    assert built.checks_stack_frames()


def test_calls_of_libc_are_checked(built: Elf) -> None:
    assert built.checks_calls_of_libc()


def test_return_addresses_can_be_kept_on_a_shadow_stack(built: Elf, tmp_path: Path) -> None:
    """Where the toolchain has that: a linker tells it only if all that it links does, and some
    distributions' start-up objects do not."""
    empty = tmp_path / "empty.so"
    flags = ["-fcf-protection=return", "-shared", "-fPIC", "-x", "c", "/dev/null", "-o", str(empty)]
    tried = subprocess.run(["cc", *flags], capture_output=True, check=False)
    if tried.returncode or not Elf(empty.read_bytes()).keeps_shadow_stack():
        pytest.skip("this toolchain marks nothing for shadow stacks")
    assert built.keeps_shadow_stack()


def test_the_compiler_says_nothing(lib_folder: Path) -> None:
    """No flag is defined twice, nor unknown to it."""
    assert (lib_folder / "said").read_text() == ""
