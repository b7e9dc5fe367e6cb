"""What a host's owner allows on it, whatever the service says: a file of the agent's own."""

from __future__ import annotations

from pathlib import Path

import msgspec

from trapline.errors import TraplineError

DEFAULT_PATH = Path("/etc/trapline/policy.toml")


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The rules."""

    redact: tuple[str, ...] = ()
    """Names that are never captured, as shell patterns: see ``capture.redaction``."""


def read_policy(path: Path | None = None) -> Policy:
    """Reads a policy, which is TOML.

    Args:
        path: the file; None: ``DEFAULT_PATH``, and where that is not there nothing is forbidden.

    Raises:
        TraplineError: it cannot be read, or says what no policy says. Nothing may be captured then.
    """
    file = path or DEFAULT_PATH
    try:
        return msgspec.toml.decode(file.read_bytes(), type=Policy)
    except FileNotFoundError:
        if path is None:
            return Policy()
        why = "it does not exist"
    except OSError as e:
        why = e.strerror or str(e)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        why = str(e)
    raise TraplineError(
        f"the policy {file} cannot be read: {why}",
        hint='a policy is TOML, such as `redact = ["*password*", "struct secret"]`; nothing is captured without it',
    )
