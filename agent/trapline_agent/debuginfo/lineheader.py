"""The file names in the headers of .debug_line: DWARF 5, section 6.2.4 (and 6.2.4 of DWARF 4).

libdw reads a unit's whole table to tell the names, and keeps it: for a large program that is gigabytes. So the headers
are read here.
"""

from __future__ import annotations

import posixpath
import struct
from collections.abc import Callable

_MAX_FILES = 100_000
_DW_LNCT_PATH, _DW_LNCT_DIRECTORY = 1, 2
_STRING, _LINE_STRP, _STRP, _UDATA, _DATA16, _BLOCK = 0x08, 0x1F, 0x0E, 0x0F, 0x1E, 0x09
_FIXED = {0x0B: 1, 0x05: 2, 0x06: 4, 0x07: 8}
"""DW_FORM_data1, 2, 4, 8."""


class Malformed(ValueError):
    """The header is not one."""


def file_names(header: bytes, string: Callable[[int, bool], str], directory: str) -> list[str]:
    """Returns the paths of the files of a line table, by their number; empty where there is no file of a number.

    Args:
        header: the table's bytes from its beginning on; what is behind the header does not matter.
        string: returns the string at an offset of .debug_line_str (True) or .debug_str (False).
        directory: the unit's, DW_AT_comp_dir.

    Raises:
        Malformed: it ends too early, or is of a form that is not known.
    """
    try:
        return [posixpath.normpath(path) if path else "" for path in _Reader(header, string, directory).read()]
    except (struct.error, IndexError) as e:
        raise Malformed("the header is cut short") from e


class _Reader:
    def __init__(self, data: bytes, string: Callable[[int, bool], str], directory: str) -> None:
        self._data = data
        self._directory = directory
        self._at = 0
        self._string = string
        self._wide = False

    def read(self) -> list[str]:
        if self._unsigned(4) == 0xFFFF_FFFF:
            self._wide = True
            self._unsigned(8)
        version = self._unsigned(2)
        if not 2 <= version <= 5:
            raise Malformed(f"version {version}")
        if version >= 5:
            self._unsigned(2)  # the sizes of an address and of a segment selector
        self._unsigned(8 if self._wide else 4)
        self._unsigned(1 if version < 4 else 2)  # the least instruction length, operations in one
        self._unsigned(3)  # default_is_stmt, line_base, line_range
        opcodes = self._unsigned(1)
        self._at += opcodes - 1  # their lengths
        return self._entries_5() if version >= 5 else self._entries_2()

    def _entries_2(self) -> list[str]:
        directories = [self._directory]
        while name := self._zero_ended():
            directories.append(posixpath.join(self._directory, name))
            self._bound(len(directories))
        files = [""]  # the first has the number 1
        while name := self._zero_ended():
            directory = self._leb()
            self._leb()
            self._leb()
            files.append(posixpath.join(directories[directory] if directory < len(directories) else "", name))
            self._bound(len(files))
        return files

    def _entries_5(self) -> list[str]:
        directories = [path for path, _ in self._table()]
        own = directories[0] if directories else self._directory  # the unit's is the first
        directories = [posixpath.join(own, path) if i else own for i, path in enumerate(directories)]
        return [
            posixpath.join(directories[directory] if directory < len(directories) else "", path)
            for path, directory in self._table()
        ]

    def _table(self) -> list[tuple[str, int]]:
        formats = [(self._leb(), self._leb()) for _ in range(self._unsigned(1))]
        count = self._leb()
        self._bound(count)
        if count and not formats:
            raise Malformed("entries without a format")
        rows = []
        for _ in range(count):
            path, directory = "", 0
            for content, form in formats:
                value = self._value(form)
                if content == _DW_LNCT_PATH and isinstance(value, str):
                    path = value
                elif content == _DW_LNCT_DIRECTORY and isinstance(value, int):
                    directory = value
            rows.append((path, directory))
        return rows

    def _value(self, form: int) -> str | int:
        if form == _STRING:
            return self._zero_ended()
        if form in (_LINE_STRP, _STRP):
            return self._string(self._unsigned(8 if self._wide else 4), form == _LINE_STRP)
        if form == _UDATA:
            return self._leb()
        if form in _FIXED:
            return self._unsigned(_FIXED[form])
        if form == _DATA16:
            self._at += 16
            return 0
        if form == _BLOCK:
            size = self._leb()
            self._at += size
            return 0
        raise Malformed(f"form {form:#x}")

    def _bound(self, count: int) -> None:
        if count > _MAX_FILES:
            raise Malformed(f"{count} files")

    def _unsigned(self, size: int) -> int:
        data = self._data[self._at : self._at + size]
        if len(data) != size:
            raise Malformed("the header is cut short")
        self._at += size
        return int.from_bytes(data, "little")

    def _leb(self) -> int:
        value = shift = 0
        while True:
            byte = self._data[self._at]
            self._at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise Malformed("a number does not end")

    def _zero_ended(self) -> str:
        end = self._data.find(b"\0", self._at)
        if end < 0:
            raise Malformed("a name does not end")
        data = self._data[self._at : end]
        self._at = end + 1
        return data.decode("utf-8", "backslashreplace")
