"""Commands that run Trapline on this machine: up, serve, agent, demo."""

from __future__ import annotations

import logging
import sys
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from pydantic import SecretStr, ValidationError

from trapline.cli.console import note, print_json, run
from trapline.errors import TraplineError, Unavailable
from trapline.state import Access, read_access, write_access

if TYPE_CHECKING:
    from trapline_agent.config import AgentSettings
    from trapline_service.config import Settings
    from trapline_service.server import Server

S = TypeVar("S")

Port = Annotated[
    int | None, typer.Option(min=0, max=65535, help="TCP port; 0 takes a free one [default: 8470].", show_default=False)
]
Host = Annotated[str | None, typer.Option(help="Address to listen on [default: 127.0.0.1].", show_default=False)]
StateDir = Annotated[
    Path | None,
    typer.Option(help="Where it is kept [default: $TRAPLINE_STATE_DIR or the usual place].", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print what a program needs to connect as one line of JSON.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Log more.")]


def settings_from(make: Callable[..., S], **options: object) -> S:
    """Returns settings from the environment and the options that were given. Raises TraplineError where one is wrong."""
    try:
        return make(**{key: value for key, value in options.items() if value is not None})
    except ValidationError as e:
        first = e.errors(include_url=False, include_input=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        raise TraplineError(f"setting {name}: {first['msg']}", hint="docs/settings.md has them all") from e


def _service_settings(**options: object) -> Settings:
    try:
        from trapline_service.config import Settings
    except ModuleNotFoundError as e:
        raise _no_server(e) from e
    return settings_from(Settings, **options)


def _no_server(error: ModuleNotFoundError) -> TraplineError:
    return Unavailable(
        f"the service's dependencies are not installed ({error.name})", hint="pip install 'trapline[server]'"
    )


def _server_class() -> type[Server]:
    try:
        from trapline_service.server import Server
    except ModuleNotFoundError as e:
        raise _no_server(e) from e
    return Server


def _log(level: str, verbose: bool) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else level,
        format="%(asctime)s %(name)s %(levelname)s %(message)s",
        stream=sys.stderr,
        force=True,
    )
    for noisy in ("websockets", "asyncio", "httpx", "httpcore", "uvicorn"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def token_of(server: Server, settings: Settings) -> str | None:
    """Returns the admin token of a service that has just started: the new one, the one that was set, or the one that
    this machine's clients use; and writes it down for them."""
    known = read_access(settings.state_dir)
    given = settings.admin_token.get_secret_value() if settings.admin_token else None
    token = server.new_token or given or (known.token if known else None)
    if token:
        write_access(settings.state_dir, Access(server.url, token))
    return token


def dashboard_url(url: str, token: str) -> str:
    """Returns the dashboard's address; a fragment never reaches a server or its log."""
    return f"{url}/#token={token}"


def announce(url: str, token: str | None, new: bool, *, json: bool) -> None:
    """Says where the service is."""
    if json:
        print_json({"url": url, "token": token})
        return
    if token is None:
        note(f"Trapline is at {url}")
        note("Its token is not known here; it was shown when it was made. TRAPLINE_ADMIN_TOKEN sets another one.")
        return
    note(f"Dashboard   {dashboard_url(url, token)}")
    if new:
        note(f"Token       {token}   (shown this once; stored hashed)")


def serve(
    host: Host = None,
    port: Port = None,
    state_dir: StateDir = None,
    json: Json = False,
    verbose: Verbose = False,
) -> int:
    """Run the service alone; agents connect to it. All settings: TRAPLINE_*."""
    settings = _service_settings(host=host, port=port, state_dir=state_dir)
    _server_class()
    from trapline_service.server import run as run_service

    _log(settings.log_level, verbose)

    def ready(server: Server) -> None:
        announce(server.url, token_of(server, settings), server.new_token is not None, json=json)

    run_service(settings, on_ready=ready)
    return 0


def agent(
    server: Annotated[str | None, typer.Option("--server", help="URL of the service.", show_default=False)] = None,
    token: Annotated[str | None, typer.Option("--token", help="Its token.", show_default=False)] = None,
    name: Annotated[str | None, typer.Option("--name", help="This host's name.", show_default=False)] = None,
    tracer_socket: Annotated[
        Path | None,
        typer.Option(help="Join the tracer that listens there [default: start one].", show_default=False),
    ] = None,
    state_dir: StateDir = None,
    verbose: Verbose = False,
) -> int:
    """Run this host's agent: it dials out to the service, and opens no port. All settings: TRAPLINE_AGENT_*."""
    from trapline_agent.__main__ import serve as serve_agent
    from trapline_agent.config import AgentSettings

    settings = settings_from(
        AgentSettings,
        server=server,
        token=SecretStr(token) if token else None,
        host_name=name,
        tracer_socket=tracer_socket,
        state_dir=state_dir,
    )
    if not settings.token.get_secret_value():
        known = read_access(settings.state_dir)
        if known is not None and known.url.rstrip("/") == settings.server:
            settings.token = SecretStr(known.token)
    _log(settings.log_level, verbose)
    note(f"agent of {settings.host_name}, for {settings.server}; Ctrl-C takes every breakpoint out")
    run(lambda: serve_agent(settings), handle_signals=False)
    return 0


def up(
    host: Host = None,
    port: Port = None,
    state_dir: StateDir = None,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Do not open the dashboard in a browser.")] = False,
    json: Json = False,
    verbose: Verbose = False,
) -> int:
    """Run everything on this machine: service, agent and tracer, until Ctrl-C, which leaves every process as it was."""
    settings = _service_settings(host=host, port=port, state_dir=state_dir)
    _server_class()
    _log(settings.log_level if verbose else "WARNING", verbose)

    async def work() -> None:
        from trapline_agent.agent import Agent

        async with _server_class()(settings) as server:
            token = token_of(server, settings)
            if token is None:
                raise Unavailable(
                    f"the service in {settings.state_dir} has a token that this machine does not know",
                    hint="set TRAPLINE_ADMIN_TOKEN to a new one, or give another --state-dir",
                )
            async with Agent(agent_settings(server.url, token, settings)) as this_host:
                await this_host.linked.wait()
                announce(server.url, token, server.new_token is not None, json=json)
                if not json:
                    note("Ctrl-C ends it and leaves every process as it was.")
                if not no_browser and sys.stderr.isatty():
                    webbrowser.open(dashboard_url(server.url, token))
                try:
                    await server.wait()
                finally:
                    note("taking every breakpoint out")

    run(work)
    return 0


def agent_settings(url: str, token: str, settings: Settings, **options: Any) -> AgentSettings:
    """Returns the settings of an agent that runs beside its service."""
    from trapline_agent.config import AgentSettings

    return settings_from(AgentSettings, server=url, token=SecretStr(token), state_dir=settings.state_dir, **options)


def demo(
    seconds: Annotated[
        float | None, typer.Option("--seconds", min=0.1, help="End after so long, with a summary.", show_default=False)
    ] = None,
    port: Port = None,
    json: Annotated[bool, typer.Option("--json", help="Print hits and the summary as NDJSON.")] = False,
) -> int:
    """Show it working: real programs, probes on them over HTTP, hits here and in the dashboard."""
    _server_class()
    from trapline.cli.demo import run_demo

    return run_demo(seconds=seconds, port=port, json=json)
