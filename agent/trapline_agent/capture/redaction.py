"""What must not leave the host: values by what they are called, or by what their type is called."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Collection, Sequence

_KINDS = re.compile(r"(?:struct|class|union|enum) ")


def redaction(patterns: Sequence[str]) -> Callable[[Collection[str]], bool] | None:
    """Returns whether one of some names matches one of the patterns of a policy; None where there is no policy.

    Args:
        patterns: shell patterns; upper and lower case are the same.
    """
    if not patterns:
        return None
    plain = (_KINDS.sub("", p.strip().lower()) for p in patterns)
    matches = re.compile("|".join(fnmatch.translate(p) for p in plain)).match
    return lambda names: any(matches(name.lower()) for name in names)
