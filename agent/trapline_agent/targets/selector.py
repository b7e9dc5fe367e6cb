"""Which processes a probe means: the ``@ key=pattern`` part of its text."""

from __future__ import annotations

import os
import pwd
from collections.abc import Mapping
from fnmatch import fnmatchcase

from trapline.errors import NotFound
from trapline_agent.targets.process import ProcessFacts, descends_from, ppids

KEYS = ("pid", "tree", "comm", "exe", "uid")
"""What is decided per process here; ``host`` is the service's."""


def with_numbers(where: Mapping[str, str], host: str) -> dict[str, str]:
    """Returns the part of a selector that is about processes, with a user's name made a number.

    Raises:
        NotFound: no such user on this host.
    """
    numbered = {key: where[key] for key in KEYS if key in where}
    if "uid" in numbered:
        number = _user_number(numbered["uid"])
        if number < 0:
            raise NotFound(f"no user `{numbered['uid']}` on {host}")
        numbered["uid"] = str(number)
    return numbered


def _user_number(user: str) -> int:
    """Returns a user's number, or -1 where there is no such user."""
    if user.isdecimal():
        return int(user)
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        return -1


class Selector:
    """A selector, ready to be asked about processes; keys that are not about processes are passed over."""

    def __init__(self, where: Mapping[str, str]) -> None:
        self._pid = int(where.get("pid", 0))
        self._tree = int(where.get("tree", 0))
        self._uid = _user_number(where["uid"]) if "uid" in where else None
        self._comm = where.get("comm", "")
        self._exe = where.get("exe", "")

    def matches(self, process: ProcessFacts, parents: dict[int, int] | None = None) -> bool:
        """Says whether all keys match; patterns are the shell's.

        Args:
            process: the process.
            parents: a snapshot of ``ppids``, taken now where it is needed and not given.
        """
        if self._pid and process.pid != self._pid:
            return False
        if self._uid is not None and process.uid != self._uid:
            return False
        if self._comm and not fnmatchcase(process.comm, self._comm):
            return False
        if self._exe and not _matches_path(process.exe, self._exe):
            return False
        return not self._tree or descends_from(process.pid, self._tree, ppids() if parents is None else parents)


def _matches_path(path: str, pattern: str) -> bool:
    """A pattern without a slash is about the last part alone."""
    return fnmatchcase(path if "/" in pattern else os.path.basename(path), pattern)
