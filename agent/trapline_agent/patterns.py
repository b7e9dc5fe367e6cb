"""Regular expressions of users over symbols and over captured text: re2, whose time is linear in the text, whatever the
pattern is (docs/adr/0015)."""

from __future__ import annotations

from collections.abc import Callable

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
    options = re2.Options()
    options.max_mem = _MAX_BYTES
    options.log_errors = False
    if isinstance(pattern, bytes):
        options.encoding = re2.Options.Encoding.LATIN1
    try:
        search: Callable[[bytes], object] = re2.compile(pattern, options).search
    except re2.error as e:
        why = e.args[0] if e.args else b""
        why = why.decode("utf-8", "replace") if isinstance(why, bytes) else str(why)
        shown = pattern.decode("utf-8", "replace") if isinstance(pattern, bytes) else pattern
        raise SpecError(
            f"`/{shown}/` is not a regular expression: {why}",
            hint="the syntax is RE2's, github.com/google/re2/wiki/Syntax: without look-around and back references",
            reason="Regex",
        ) from None
    return search
