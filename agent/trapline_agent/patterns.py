"""Regular expressions of users over symbols and over captured text: re2, whose time is linear in the text, whatever the
pattern is (docs/adr/0015)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import re2

from trapline.errors import SpecError

_MAX_BYTES = 1 << 20


def compile_pattern(pattern: str | bytes) -> Callable[[bytes], object]:
    """Returns what searches a text for a regular expression: None where it does not match anywhere.

    Args:
        pattern: str for texts in UTF-8; bytes where each byte is a character.

    Raises:
        SpecError: it is none, or one that takes more than a MiB of memory.
    """
    search: Callable[[bytes], object] = _compiled(pattern).search
    return search


def steps(pattern: bytes, size: int) -> int:
    """Returns how many steps searching a text of so many bytes can take, at most: each instruction of the program for each
    byte (what re2 falls back to where its automaton would have too many states); a step takes up to 10 ns. Raises
    SpecError, as ``compile_pattern``."""
    return int(_compiled(pattern).programsize) * size


def _compiled(pattern: str | bytes) -> Any:
    options = re2.Options()
    options.max_mem = _MAX_BYTES
    options.log_errors = False
    if isinstance(pattern, bytes):
        options.encoding = re2.Options.Encoding.LATIN1
    try:
        return re2.compile(pattern, options)
    except re2.error as e:
        why = e.args[0] if e.args else b""
        why = why.decode("utf-8", "replace") if isinstance(why, bytes) else str(why)
        shown = pattern.decode("utf-8", "replace") if isinstance(pattern, bytes) else pattern
        raise SpecError(
            f"`/{shown}/` is not a regular expression: {why}",
            hint="the syntax is RE2's, github.com/google/re2/wiki/Syntax: without look-around and back references",
            reason="Regex",
        ) from None
