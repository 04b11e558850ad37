"""What is shipped is built so that a fault in it is harder to use: the files themselves say."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import pytest

from fast_litellm_shm import _native

ROOT = Path(__file__).parents[2]
LOAD, DYNAMIC, STACK, RELRO, PROPERTY = 1, 2, 0x6474E551, 0x6474E552, 0x6474E553
STRTAB, SYMTAB, STRSZ, FLAGS, BIND_NOW, FLAGS_1 = 5, 6, 10, 30, 24, 0x6FFFFFFB
X86_FEATURES, SHADOW_STACK = 0xC0000002, 2  # GNU_PROPERTY_X86_FEATURE_1_AND

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files, as Linux has them"),
    pytest.mark.skipif(struct.calcsize("P") != 8, reason="of 64 bits"),
]


class Elf:
    """Of a little-endian 64-bit ELF file, what concerns us."""

    def __init__(self, path: Path) -> None:
        self._data = path.read_bytes()
        assert self._data[:6] == b"\x7fELF\x02\x01"
        self.type, self.machine = struct.unpack_from("<HH", self._data, 16)
        (start,) = struct.unpack_from("<Q", self._data, 32)
        size, count = struct.unpack_from("<HH", self._data, 54)
        self.segments = [
            struct.unpack_from("<IIQQQQQQ", self._data, start + i * size) for i in range(count)
        ]
        self.dynamic: dict[int, int] = {}
        (table,) = [each for each in self.segments if each[0] == DYNAMIC]
        for tag, value in struct.iter_unpack("<QQ", self._data[table[2] : table[2] + table[5]]):
            self.dynamic.setdefault(tag, value)

    def flags_of(self, kind: int) -> int | None:
        """Of the program header of a kind; None: there is none."""
        return next((each[1] for each in self.segments if each[0] == kind), None)

    def keeps_shadow_stack(self) -> bool:
        for kind, _, at, *_ in self.segments:
            if kind == PROPERTY:
                what, _, found = struct.unpack_from("<III", self._data, at + 16)
                return what == X86_FEATURES and bool(found & SHADOW_STACK)
        return False

    def imported(self) -> set[str]:
        """Names of the dynamic symbol table."""
        at = self._offset(self.dynamic[STRTAB])
        names = self._data[at : at + self.dynamic[STRSZ]]
        return {each.decode() for each in names.split(b"\0")}

    def _offset(self, address: int) -> int:
        for kind, _, offset, start, _, size, *_ in self.segments:
            if kind == LOAD and start <= address < start + size:
                return int(offset + address - start)
        raise AssertionError(f"no segment has {address:#x}")


@pytest.fixture(scope="module", params=["the extension module", "libfast_shm.so"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Elf:
    if request.param == "the extension module":
        return Elf(Path(_native.__file__))
    folder = tmp_path_factory.mktemp("lib")
    make = ["make", "--silent", "lib", f"BUILD={folder}"]
    subprocess.run(make, cwd=ROOT, check=True, timeout=120)
    return Elf(folder / "libfast_shm.so")


def test_what_the_linker_fills_in_is_read_only(built: Elf) -> None:
    """Full RELRO: all is bound when it is loaded, and then protected."""
    assert built.flags_of(RELRO) is not None
    now = BIND_NOW in built.dynamic or built.dynamic.get(FLAGS, 0) & 8
    assert now or built.dynamic.get(FLAGS_1, 0) & 1


def test_the_stack_holds_no_code(built: Elf) -> None:
    flags = built.flags_of(STACK)
    assert flags is not None and not flags & 1


def test_it_lies_anywhere(built: Elf) -> None:
    assert built.type == 3  # ET_DYN


def test_stack_frames_are_checked(built: Elf) -> None:
    assert {"__stack_chk_fail", "__stack_chk_guard"} & built.imported()


def test_calls_of_libc_are_checked(built: Elf) -> None:
    """FORTIFY: calls whose buffer's size the compiler knows, and not that it suffices."""
    assert {name for name in built.imported() if name.endswith("_chk")}


def test_return_addresses_can_be_kept_on_a_shadow_stack(built: Elf, tmp_path: Path) -> None:
    """Where the toolchain has that: a linker tells it only if all that it links does, and some
    distributions' start-up objects do not."""
    empty = tmp_path / "empty.so"
    flags = ["-fcf-protection=return", "-shared", "-fPIC", "-x", "c", "/dev/null", "-o", str(empty)]
    tried = subprocess.run(["cc", *flags], capture_output=True, check=False)
    if tried.returncode or not Elf(empty).keeps_shadow_stack():
        pytest.skip("this toolchain marks nothing for shadow stacks")
    assert built.keeps_shadow_stack()


def test_the_compiler_says_nothing(tmp_path: Path) -> None:
    """No flag is defined twice, nor unknown to it."""
    make = ["make", "--silent", "lib", f"BUILD={tmp_path}"]
    done = subprocess.run(make, cwd=ROOT, check=True, timeout=120, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "")
