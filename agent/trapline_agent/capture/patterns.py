"""Regular expressions over captured text: re2, whose time is linear in the text, whatever the pattern is."""

from __future__ import annotations

from collections.abc import Callable

import re2

from trapline.errors import SpecError

_MAX_BYTES = 1 << 20


def compile_pattern(pattern: bytes) -> Callable[[bytes], object]:
    """Returns what searches a text for a regular expression: None where it does not match anywhere.

    Raises:
        SpecError: it is none, or one that takes more than a MiB of memory.
    """
    options = re2.Options()
    options.max_mem = _MAX_BYTES
    options.log_errors = False
    options.encoding = re2.Options.Encoding.LATIN1
    try:
        search: Callable[[bytes], object] = re2.compile(pattern, options).search
    except re2.error as e:
        why = e.args[0] if e.args else b""
        why = why.decode(errors="replace") if isinstance(why, bytes) else str(why)
        raise SpecError(
            f"not a regular expression: {why}", hint="github.com/google/re2/wiki/Syntax has what is one"
        ) from None
    return search
