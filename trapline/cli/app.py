"""The command tree and its entry."""

from __future__ import annotations

import os
import sys

import typer

import trapline
from trapline.cli import local, remote, tracing
from trapline.cli.console import EXIT_ERROR, Json, first_error, note, out, print_error, print_json
from trapline.errors import TraplineError

app = typer.Typer(
    name="trapline",
    help="Uprobes as a service: dynamic tracing of running programs over HTTP, live in the browser.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("up")(local.up)
app.command("demo")(local.demo)
app.command("trace")(tracing.trace)
app.add_typer(remote.probe_app, name="probe")
app.command("hits")(remote.hits)
app.command("hosts")(remote.hosts)
app.command("processes")(remote.processes)
app.command("symbols")(remote.symbols)
app.command("serve")(local.serve)
app.command("agent")(local.agent)


@app.command("version")
def version(json: Json = False) -> None:
    """Print the release."""
    if json:
        print_json({"version": trapline.__version__})
    else:
        out.print(f"trapline {trapline.__version__}")


# typer carries a copy of click in newer releases and imports it in older ones; this is its base of all usage errors.
_UsageError: type[BaseException] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def main() -> int:
    """Runs the command line of this process; returns the exit status."""
    try:
        result = app(standalone_mode=False)
    except TraplineError as e:
        print_error(e)
        return EXIT_ERROR
    except BaseExceptionGroup as group:
        error = first_error(group)
        if not isinstance(error, TraplineError):
            raise
        print_error(error)
        return EXIT_ERROR
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except typer.Exit as e:
        return int(e.exit_code)
    except BrokenPipeError:
        # Whoever read us has enough; nothing more is to be written at exit either (Python's own advice, library/signal).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as e:
        note(f"trapline: {e.strerror or e}{f': {e.filename}' if e.filename else ''}")
        return EXIT_ERROR
    except _UsageError as e:
        message = str(e.format_message() if hasattr(e, "format_message") else e)
        if message:
            note(f"trapline: {message[:1].lower()}{message[1:].rstrip('.')}; see `trapline --help`")
        return EXIT_ERROR
    return result if isinstance(result, int) else 0
