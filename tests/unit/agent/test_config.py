"""The agent's settings and its host's identity."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from trapline.errors import Conflict
from trapline_agent.config import AgentSettings, instance_id


@pytest.mark.parametrize(
    ("server", "url"),
    [
        ("http://127.0.0.1:8470", "ws://127.0.0.1:8470/api/v1/agents/link"),
        ("https://traces.example/", "wss://traces.example/api/v1/agents/link"),
    ],
)
def test_the_link_follows_the_server(server: str, url: str) -> None:
    assert AgentSettings(server=server).link_url == url


@pytest.mark.parametrize("server", ["", "traces.example", "ws://traces.example", "http://"])
def test_a_server_that_is_no_url_is_refused(server: str) -> None:
    with pytest.raises(ValidationError, match="must be http"):
        AgentSettings(server=server)


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAPLINE_AGENT_LEASE_S", "7")
    monkeypatch.setenv("TRAPLINE_AGENT_TOKEN", "tlp_secret")
    settings = AgentSettings()
    assert settings.lease_s == 7
    assert "tlp_secret" not in repr(settings)


def test_a_host_keeps_its_id(tmp_path: Path) -> None:
    first = instance_id(tmp_path / "new")
    assert first.startswith("hst_")
    assert instance_id(tmp_path / "new") == first
    assert instance_id(tmp_path / "other") != first


def test_an_id_that_was_damaged_is_not_replaced_silently(tmp_path: Path) -> None:
    (tmp_path / "instance-id").write_text("hst_short\n")
    with pytest.raises(Conflict, match="does not hold"):
        instance_id(tmp_path)
    assert (tmp_path / "instance-id").read_text() == "hst_short\n"
