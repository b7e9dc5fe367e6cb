"""The command line, ``trapline``. Each command imports what it needs when it runs: ``trapline probe list`` needs neither
the agent nor the service."""

from __future__ import annotations

from trapline.cli.app import main

__all__ = ["main"]
