"""``trapline trace``: probes on this machine, hits on this terminal; no service, no agent, one tracer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trapline.cli.console import Json, Overhead, read_budget


def trace(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PROBE] [-- COMMAND [ARG]...]",
            help="The probe, such as 'libc.so.6:malloc {arg0}' (unless given with -e), and a command to trace.",
        ),
    ] = None,
    probes: Annotated[
        list[str] | None, typer.Option("-e", "--probe", help="A probe; may be given several times.")
    ] = None,
    pid: Annotated[int | None, typer.Option("-p", "--pid", min=1, help="Only in this process.")] = None,
    name: Annotated[str, typer.Option(help="Only in processes of such a name, a shell pattern.")] = "",
    max_hits: Annotated[int | None, typer.Option("-n", "--max-hits", min=1, help="End after so many hits.")] = None,
    duration: Annotated[float | None, typer.Option(min=0.0, help="End after so many seconds.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="With --pid: wait until it maps the file.")] = False,
    overhead: Overhead = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the hits to this file.")] = None,
    json: Json = False,
    folded: Annotated[
        bool,
        typer.Option(
            "--folded", help="At the end, print how often each stack was met, for flamegraph.pl and the like."
        ),
    ] = False,
) -> int:
    """Trace programs of this machine: hits as they come, and a summary at the end. No service is needed.

    With a COMMAND, starts it, traces it and what it starts, and ends with it and its exit status.
    Otherwise runs until Ctrl-C, which leaves every process as it was.
    """
    from trapline.cli.tracer_session import Options, run_session

    given = list(arguments or [])
    texts = list(probes or [])
    if not texts:
        if not given:
            raise typer.BadParameter("name a probe, such as `trapline trace 'libc.so.6:malloc'`")
        texts.append(given.pop(0))
    if given and pid is not None:
        raise typer.BadParameter("either --pid or a command, not both")
    options = Options(
        texts=texts,
        command=given,
        pid=pid,
        name=name,
        max_hits=max_hits,
        duration_s=duration,
        wait=wait,
        overhead=read_budget(overhead),
        output=output,
        json=json,
        folded=folded,
    )
    return run_session(options)
