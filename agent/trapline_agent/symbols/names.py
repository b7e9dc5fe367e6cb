"""Millions of names in little memory: their bytes one after another, found by a search through the bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import overload

import numpy as np
import numpy.typing as npt

CHUNK = 50_000
"""Names that are taken out together."""


class Names:
    """An immutable sequence of names; what is no UTF-8 is told with backslashes, such as ``\\xff``."""

    def __init__(self, blob: bytes) -> None:
        """``blob``: each name in UTF-8, with a NUL behind it; less than 4 GiB."""
        self.blob = blob
        self._ends = np.flatnonzero(np.frombuffer(blob, np.uint8) == 0).astype(np.uint32)

    @staticmethod
    def of(names: list[str]) -> Names:
        return Names("".join(f"{n}\0" for n in names).encode("utf-8", "backslashreplace"))

    @staticmethod
    def gather(strings: bytes, starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]) -> Names:
        """Returns the names at ``[start, end)`` of a string table; there are no NULs in between."""
        out: list[bytes] = []
        for at in range(0, len(starts), CHUNK):
            spans = zip(starts[at : at + CHUNK].tolist(), ends[at : at + CHUNK].tolist(), strict=True)
            piece = b"".join([strings[a:b] + b"\0" for a, b in spans])
            try:
                piece.decode()
            except UnicodeDecodeError:
                piece = piece.decode("utf-8", "backslashreplace").encode()
            out.append(piece)
        return Names(b"".join(out))

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, which: int) -> str: ...
    @overload
    def __getitem__(self, which: slice) -> list[str]: ...
    def __getitem__(self, which: int | slice) -> str | list[str]:
        """Returns a name, or the list of a slice (without a step)."""
        if isinstance(which, slice):
            first, last, _ = which.indices(len(self))
            if first >= last:
                return []
            start = int(self._ends[first - 1]) + 1 if first else 0
            return self.blob[start : int(self._ends[last - 1])].decode().split("\0")
        return self.raw(which).decode()

    def raw(self, which: int) -> bytes:
        """Returns the bytes of a name."""
        return self.blob[int(self._ends[which - 1]) + 1 if which else 0 : int(self._ends[which])]

    def lengths(self) -> npt.NDArray[np.uint32]:
        """Returns the length of each name in bytes."""
        if not len(self._ends):
            return self._ends
        return np.diff(self._ends, prepend=np.uint32(0xFFFF_FFFF)) - np.uint32(1)

    def find(self, name: str) -> list[int]:
        """Returns where a name is; ascending."""
        try:
            wanted = name.encode() + b"\0"
        except UnicodeEncodeError:
            return []
        if b"\0" in wanted[:-1]:
            return []
        found = [0] if self.blob.startswith(wanted) else []
        wanted = b"\0" + wanted
        at = self.blob.find(wanted)
        while at >= 0:
            found.append(self._index(at + 1))
            at = self.blob.find(wanted, at + len(wanted) - 1)
        return found

    def containing(self, part: bytes, blob: bytes | None = None) -> list[int]:
        """Returns which names have some bytes in them; ascending.

        Args:
            part: without a NUL, not empty.
            blob: what to look through in place of the names: the same in other letters, such as lower case.
        """
        blob = self.blob if blob is None else blob
        found: list[int] = []
        at = blob.find(part)
        while at >= 0:
            which = self._index(at)
            found.append(which)
            at = blob.find(part, int(self._ends[which]) + 1)
        return found

    def chunks(self) -> Iterator[tuple[int, list[str]]]:
        """Yields all names: the index of the first of a chunk, and the chunk."""
        for at in range(0, len(self), CHUNK):
            yield at, self[at : at + CHUNK]

    def _index(self, position: int) -> int:
        return int(np.searchsorted(self._ends, position))
