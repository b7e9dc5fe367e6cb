"""``python -m trapline_agent``: an agent with settings from the environment alone."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys

from pydantic import ValidationError

from trapline.errors import TraplineError
from trapline_agent.agent import Agent
from trapline_agent.config import AgentSettings


async def serve(settings: AgentSettings) -> None:
    """Runs an agent until SIGINT, SIGTERM or SIGHUP, then takes every breakpoint out.

    Raises:
        TraplineError: in an exception group: it cannot go on.
    """
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with Agent(settings):
        await stop.wait()


def log_to_stderr(level: str) -> None:
    """Sets up logging as the agent's settings say. Raises ValueError where there is no such level."""
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(name)s %(levelname)s %(message)s", stream=sys.stderr, force=True
    )
    for noisy in ("websockets", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def main() -> int:
    """Runs this process; returns the exit status."""
    try:
        settings = AgentSettings()
        log_to_stderr(settings.log_level)
        asyncio.run(serve(settings))
    except* TraplineError as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        print(f"trapline-agent: {error}", file=sys.stderr)
        return_status = 2
    except* (ValidationError, ValueError) as group:
        print(f"trapline-agent: {group.exceptions[0]}", file=sys.stderr)
        return_status = 2
    else:
        return_status = 0
    return return_status


if __name__ == "__main__":
    sys.exit(main())
