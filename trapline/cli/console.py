"""What all commands say and how: results on standard output, everything else on standard error.

A result is a table for people, or with ``--json`` one JSON document (one a line for streams). An error is one line that
says what happened, to what, and what to do next; below it the probe text with a caret where there is one.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import typer
from pydantic import BaseModel
from rich.console import Console

from trapline.errors import TraplineError

T = TypeVar("T")
Budget = float | Literal["off"] | None

EXIT_ERROR = 2
ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What ends a command in good order: Ctrl-C, a supervisor, a terminal that closes."""

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON, one document a line where there are several.")]
Url = Annotated[
    str | None,
    typer.Option(
        "--url", envvar="TRAPLINE_URL", help="The service [default: the one on this machine].", show_default=False
    ),
]
Token = Annotated[
    str | None,
    typer.Option(
        "--token", envvar="TRAPLINE_TOKEN", help="Its token [default: this machine's own].", show_default=False
    ),
]

Overhead = Annotated[
    str | None,
    typer.Option(
        "--overhead",
        metavar="PERCENT|off",
        help="How much of a CPU's time it may add to programs [default: the agent's, 10%].",
        show_default=False,
    ),
]


def print_json(value: object) -> None:
    """Writes one line of JSON on standard output."""
    sys.stdout.buffer.write(msgspec.json.encode(_plain(value)) + b"\n")
    sys.stdout.buffer.flush()


def _plain(value: object) -> object:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def print_table(headings: Sequence[str], rows: Sequence[Sequence[object]], *, console: Console = out) -> None:
    """Writes columns, as wide as they need to be: never folded, so that other programs can read them. Numbers are
    right-aligned."""
    numeric = [bool(rows) and all(isinstance(row[i], int) for row in rows) for i in range(len(headings))]
    cells = [[f"{value:,}" if isinstance(value, int) else str(value) for value in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(headings), *cells]) for i in range(len(headings))]
    for number, line in enumerate([list(headings), *cells]):
        padded = (c.rjust(w) if right else c.ljust(w) for c, w, right in zip(line, widths, numeric, strict=True))
        # Names come from other people's programs: their brackets are not markup.
        console.print("  ".join(padded).rstrip(), style=None if number else "bold", markup=False)


def note(text: str) -> None:
    """Writes a line for people on standard error."""
    print(text, file=sys.stderr, flush=True)


def print_error(error: TraplineError) -> None:
    """Writes an error as its one line, and the place in the probe text."""
    note(f"trapline: {error}")
    if caret := error.caret():
        note("\n".join(f"  {line}" for line in caret.splitlines()))


@contextlib.contextmanager
def progress(text: str) -> Iterator[Callable[[str], None]]:
    """Shows that something takes its time, on standard error, where that is a terminal.

    Yields:
        A function that changes the text.
    """
    if not err.is_terminal:
        yield lambda _: None
        return
    with err.status(text) as status:
        yield lambda new: status.update(new)


def read_budget(text: str | None) -> Budget:
    """Returns an option ``--overhead`` as a share: ``5%`` or ``5`` is 0.05. Raises typer.BadParameter."""
    if text is None or text == "off":
        return text  # type: ignore[return-value] # mypy does not narrow str to a literal by ==
    try:
        share = float(text.removesuffix("%")) / 100
    except ValueError:
        share = 0.0
    if not 0 < share <= 16:
        raise typer.BadParameter(f"{text!r} is neither a percentage of a CPU's time, such as 5%, nor 'off'")
    return share


def unreturned(calls: int, returned: int, reasons: Mapping[str, int]) -> str:
    """Returns what a return probe has not seen return, for people; empty where it has seen all.

    Args:
        calls: that began.
        returned: those that returned.
        reasons: those that will not be seen to return.
    """
    parts = [f"{count:,} {reason}" for reason, count in sorted(reasons.items()) if count]
    if (in_flight := calls - returned - sum(reasons.values())) > 0:
        parts.append(f"{in_flight:,} in flight")
    return ", ".join(parts)


def uncovered(ms: int) -> str:
    """Returns for how long targets were not seen as the tail of a sentence; empty for not at all."""
    return f", not seen for {ms / 1000:,.1f} s in all: OverBudget" if ms else ""


def microseconds(ns: float | None) -> str:
    """Returns nanoseconds as text in microseconds; ``-`` for None or nothing."""
    return f"{ns / 1000:.1f} us" if ns else "-"


def run(work: Callable[[], Coroutine[Any, Any, T]], *, handle_signals: bool = True) -> T | None:
    """Runs a coroutine until it ends, or until SIGINT, SIGTERM or SIGHUP cancels it; then its own clean-up ends first.

    Args:
        work: makes the coroutine.
        handle_signals: False where it sees to them itself.

    Returns:
        Its result, or None where a signal ended it.

    Raises:
        TraplineError: as the coroutine did, alone or in a group.
    """

    async def body() -> T | None:
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(work())
        interrupted = False

        def interrupt() -> None:
            # Once is enough: a second signal must not cut short what restores the traced programs.
            nonlocal interrupted
            if not interrupted:
                interrupted = True
                task.cancel()

        for number in ENDS if handle_signals else ():
            loop.add_signal_handler(number, interrupt)
        try:
            return await task
        except asyncio.CancelledError:
            if interrupted:
                return None
            raise

    try:
        return asyncio.run(body())
    except BaseExceptionGroup as group:
        raise first_error(group) from group


def first_error(group: BaseException) -> BaseException:
    """Returns the first error of a group that we can explain, or else the first."""
    leaves = list(_leaves(group))
    return next((e for e in leaves if isinstance(e, TraplineError)), leaves[0])


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error
