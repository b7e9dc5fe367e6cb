"""Where Trapline keeps things on this machine, and the token that a client on it may use.

``$TRAPLINE_STATE_DIR`` names the directory; without it root uses ``/var/lib/trapline`` and anybody else
``$XDG_STATE_HOME/trapline`` (XDG base directory specification 0.8: ``~/.local/state``). The service, the agent and the
command line agree on it, so that ``trapline probe list`` on the machine that ``trapline up`` runs on needs no setting.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

DEFAULT_PORT = 8470
_ACCESS_FILE = "client.json"


def state_dir() -> Path:
    """Returns the directory; it need not exist yet."""
    if given := os.environ.get("TRAPLINE_STATE_DIR"):
        return Path(given)
    if os.geteuid() == 0:
        return Path("/var/lib/trapline")
    base = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(base) / "trapline"


@dataclass(frozen=True)
class Access:
    """How a client on this machine reaches the service that runs here."""

    url: str
    token: str


def write_access(directory: Path, access: Access) -> Path:
    """Writes the file that clients of the same user read, with mode 0600 from its first byte on; returns its path."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = directory / _ACCESS_FILE
    temporary = directory / f".{_ACCESS_FILE}.{os.getpid()}"
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "w") as file:
        json.dump({"url": access.url, "token": access.token}, file)
    temporary.replace(path)
    return path


def read_access(directory: Path) -> Access | None:
    """Returns what ``write_access`` left there, or None where there is nothing that can be read."""
    try:
        fields = json.loads((directory / _ACCESS_FILE).read_text())
        return Access(str(fields["url"]), str(fields["token"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_loopback(url: str) -> bool:
    """Says whether a URL means this very machine, so that no proxy of the environment may come between."""
    host = urlsplit(url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
