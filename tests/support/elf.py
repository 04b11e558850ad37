"""Of ELF files, which Linux has: how a shared library was linked, and what it asks for."""

from __future__ import annotations

import struct

LOAD, DYNAMIC, STACK, RELRO, PROPERTY = 1, 2, 0x6474E551, 0x6474E552, 0x6474E553
STRTAB, SYMTAB, STRSZ, FLAGS, BIND_NOW, FLAGS_1 = 5, 6, 10, 30, 24, 0x6FFFFFFB
RPATH, RUNPATH = 15, 29
X86_FEATURES, SHADOW_STACK = 0xC0000002, 2  # GNU_PROPERTY_X86_FEATURE_1_AND


class Elf:
    """Of a little-endian 64-bit ELF file, what concerns us."""

    def __init__(self, data: bytes) -> None:
        self._data = data
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

    def is_bound_at_load(self) -> bool:
        """Full RELRO: what the linker fills in is bound at load, and then read-only."""
        now = BIND_NOW in self.dynamic or self.dynamic.get(FLAGS, 0) & 8
        return self.flags_of(RELRO) is not None and bool(now or self.dynamic.get(FLAGS_1, 0) & 1)

    def stack_holds_no_code(self) -> bool:
        flags = self.flags_of(STACK)
        return flags is not None and not flags & 1

    def lies_anywhere(self) -> bool:
        return bool(self.type == 3)  # ET_DYN

    def checks_stack_frames(self) -> bool:
        return bool({"__stack_chk_fail", "__stack_chk_guard"} & self.imported())

    def checks_calls_of_libc(self) -> bool:
        """FORTIFY: calls whose buffer's size the compiler knows, and not that it suffices."""
        return any(name.endswith("_chk") for name in self.imported())

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
