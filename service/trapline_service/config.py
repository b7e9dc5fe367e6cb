"""The service's settings.

Every setting is an environment variable ``TRAPLINE_*``; what ``trapline serve`` offers as an option overrides it.
"""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from trapline.state import DEFAULT_PORT, state_dir

TOKEN_PATTERN = re.compile(r"tlp_[A-Za-z0-9_-]{40,200}\Z")
"""What an admin token looks like: 40 characters of base64url hold 240 bits."""


class Settings(BaseSettings):
    """Settings of one service process."""

    model_config = SettingsConfigDict(env_prefix="TRAPLINE_", extra="ignore", use_attribute_docstrings=True)

    host: str = "127.0.0.1"
    """Address to listen on. Beyond loopback, put a TLS-terminating proxy in front: tokens cross this socket."""
    port: int = Field(default=DEFAULT_PORT, ge=0, le=65535)
    """TCP port to listen on; 0 takes a free one."""
    state_dir: Path = Field(default_factory=state_dir)
    """Directory of the embedded database, made with mode 0700."""
    admin_token: SecretStr | None = None
    """The admin token to accept: ``tlp_`` and at least 40 random characters of A-Z a-z 0-9 _ -. It replaces the one that
    is stored, which is also the way back in when that one is lost. None: one is made at the first start."""
    allowed_origins: list[str] = Field(default_factory=list)
    """Further origins, such as ``https://traces.example``, whose pages may open WebSockets; a JSON list. The service's own
    origin always may."""
    heartbeat_s: float = Field(default=10.0, gt=0)
    """Seconds between two heartbeats on an agent's link; after three silent ones the host counts as offline."""
    request_timeout_s: float = Field(default=10.0, gt=0)
    """Seconds that an agent has to answer a question (resolve, symbols, modules)."""
    ticket_ttl_s: float = Field(default=30.0, gt=0)
    """Seconds for which a stream ticket can be redeemed, once."""
    subscriber_queue_bytes: int = Field(default=1024 * 1024, ge=1024)
    """Bytes that may wait for one slow subscriber; beyond it its oldest batches are dropped, with a gap notice."""
    recorder_queue_bytes: int = Field(default=64 * 1024 * 1024, ge=1024)
    """Bytes that may wait for a slow disk before the oldest batches go unrecorded."""
    retention_bytes: int = Field(default=256 * 1024 * 1024, ge=0)
    """Bytes of recorded hits (compressed) that are kept, and as many of aggregates over time; the oldest go first."""
    retention_s: float = Field(default=24 * 3600.0, gt=0)
    """Seconds for which recorded hits, aggregates over time, and probes that ended, are kept."""
    aggregate_keys: int = Field(default=10_000, ge=1, le=1_000_000)
    """Rows that a probe's aggregate keeps apart over all hosts; hits of further keys count in one row for all of them."""
    log_level: str = "INFO"
    """``DEBUG``, ``INFO``, ``WARNING`` or ``ERROR``."""

    @field_validator("admin_token")
    @classmethod
    def _strong(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not value.get_secret_value():
            return None  # an empty variable in a compose file means that it was not given
        if value is not None and not TOKEN_PATTERN.match(value.get_secret_value()):
            raise ValueError("must be `tlp_` and at least 40 characters of A-Z a-z 0-9 _ -")
        return value
