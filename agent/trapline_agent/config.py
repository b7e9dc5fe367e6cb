"""The agent's settings, and the identity it keeps.

Every setting is an environment variable ``TRAPLINE_AGENT_*`` and, where it is of use there, an option of
``trapline agent``.
"""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from trapline.errors import Conflict
from trapline.ids import new_id
from trapline.state import DEFAULT_PORT, state_dir
from trapline_agent.outbox import DEFAULT_CAPACITY_BYTES
from trapline_agent.plans import DEFAULT_MAX_KEYS
from trapline_agent.tracer.messages import DEFAULT_BUDGETS, Budgets

_INSTANCE_FILE = "instance-id"
_INSTANCE = re.compile(r"hst_[0-9a-f]{32}\Z")


class AgentSettings(BaseSettings):
    """Settings of one agent process."""

    model_config = SettingsConfigDict(env_prefix="TRAPLINE_AGENT_", extra="ignore", use_attribute_docstrings=True)

    server: str = f"http://127.0.0.1:{DEFAULT_PORT}"
    """URL of the service: ``http(s)://HOST:PORT``. The agent dials out; no port is open on this host."""
    token: SecretStr = SecretStr("")
    """The service's token for this agent."""
    state_dir: Path = Field(default_factory=state_dir)
    """Where the host's instance id is kept, unwind tables (512 MiB at most), and the socket of a tracer that the agent
    starts: an agent that was killed finds that tracer again when it is back before the lease ends. One agent at a time."""
    host_name: str = Field(default_factory=socket.gethostname)
    """The host's name as users see it and as ``where host=`` matches it."""
    tracer_socket: Path | None = None
    """Socket of a tracer that runs already (a unit of its own, a container's main process); none: start one."""
    tracer_args: list[str] = Field(default_factory=list)
    """Further arguments for a tracer that the agent starts, as a JSON list."""
    tracer_log: Path | None = None
    """File for the log of a tracer that the agent starts; none: the agent's standard error."""
    lease_s: float = Field(default=30.0, gt=0)
    """Seconds after which the tracer takes every breakpoint out when it does not hear of the agent."""
    outbox_bytes: int = Field(default=DEFAULT_CAPACITY_BYTES, ge=64 * 1024)
    """Bound of the hits kept while the service is away or slow; beyond it the oldest are dropped and counted."""
    aggregate_keys: int = Field(default=DEFAULT_MAX_KEYS, ge=1, le=65_536)
    """Rows that a probe's aggregate keeps apart on this host; hits of further keys count in one row for all of them."""
    overhead_probe: float = Field(default=DEFAULT_BUDGETS.probe, ge=0)
    """Share of one CPU's time that each probe may add to the time of programs; beyond it the probe is throttled, then
    taken out for a while. 0: no such budget. A probe's own limit `overhead` takes its place."""
    overhead_process: float = Field(default=DEFAULT_BUDGETS.process, ge=0)
    """The same for all probes in one process."""
    overhead_host: float = Field(default=DEFAULT_BUDGETS.host, ge=0)
    """The same for all probes together, with the tracer's own work for them."""
    overhead_burst_s: float = Field(default=DEFAULT_BUDGETS.burst_s, ge=0.1)
    """Seconds of a CPU's time that may be added beyond these shares for a while: a burst that fits costs no hit."""
    process_interval_s: float = Field(default=2.0, gt=0)
    """Seconds between two looks at the host's processes."""
    resolve_interval_s: float = Field(default=5.0, gt=0)
    """Seconds between two looks for further files that a probe's basename stands for."""
    reconnect_max_s: float = Field(default=15.0, gt=0)
    """The longest pause between two attempts to reach the service."""
    debuginfod_urls: str = Field(default_factory=lambda: os.environ.get("DEBUGINFOD_URLS", ""))
    """URLs of debuginfod servers, separated by spaces, that are asked for debug information which this host lacks; what they
    send is kept in the state directory."""
    policy: Path | None = None
    """File with this host's own rules; none: `/etc/trapline/policy.toml`, where there is one. An agent does not start with
    one that it cannot read."""
    log_level: str = "INFO"
    """``DEBUG``, ``INFO``, ``WARNING`` or ``ERROR``."""

    @field_validator("server")
    @classmethod
    def _http_url(cls, value: str) -> str:
        if not re.match(r"https?://[^/]", value):
            raise ValueError("must be http://HOST:PORT or https://HOST:PORT")
        return value.rstrip("/")

    @property
    def budgets(self) -> Budgets:
        """What probes may add to the time of programs."""
        return Budgets(
            probe=self.overhead_probe,
            process=self.overhead_process,
            host=self.overhead_host,
            burst_s=self.overhead_burst_s,
        )

    @property
    def link_url(self) -> str:
        """The link's WebSocket URL."""
        return "ws" + self.server.removeprefix("http") + "/api/v1/agents/link"


def instance_id(directory: Path) -> str:
    """Returns the id that names this host for ever; makes it at the first start.

    Raises:
        Conflict: the file holds something else, and a new id would make the service take this host for another one.
        OSError: the directory cannot be written to.
    """
    path = directory / _INSTANCE_FILE
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        text = path.read_text().strip()
        if not _INSTANCE.match(text):
            raise Conflict(
                f"{path} does not hold a host's instance id",
                hint="remove the file to be known to the service as a new host",
            ) from None
        return text
    new = new_id("hst")
    with os.fdopen(fd, "w") as file:
        file.write(new + "\n")
    return new
