"""Every setting is documented, once, by the name it is set with."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic_settings import BaseSettings

from trapline_agent.config import AgentSettings
from trapline_service.config import Settings

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "settings.md"
CLASSES = [Settings, AgentSettings]
ELSEWHERE = {"TRAPLINE_URL", "TRAPLINE_TOKEN", "TRAPLINE_WEB", "TRAPLINE_TEST_STRICT", "TRAPLINE_TORTURE"}
"""Variables that belong to no settings class: the client's, the build's and the tests'."""


def names(settings: type[BaseSettings]) -> set[str]:
    prefix = settings.model_config["env_prefix"]
    return {f"{prefix}{field}".upper() for field in settings.model_fields}


def rows() -> list[str]:
    return re.findall(r"^\| `(TRAPLINE_[A-Z_]+)` \|", DOCUMENT.read_text(), re.M)


def test_the_table_has_every_setting_and_no_other() -> None:
    assert set(rows()) == set().union(*map(names, CLASSES)) | ELSEWHERE


def test_the_table_has_no_setting_twice() -> None:
    shared = names(Settings) & names(AgentSettings)
    assert not shared
    assert len(rows()) == len(set(rows()))


@pytest.mark.parametrize("settings", CLASSES)
def test_every_setting_says_what_it_is(settings: type[BaseSettings]) -> None:
    for name, field in settings.model_fields.items():
        assert field.description, name


@pytest.mark.parametrize("settings", CLASSES)
def test_the_documented_default_is_the_real_one(settings: type[BaseSettings]) -> None:
    text = DOCUMENT.read_text()
    for name, field in settings.model_fields.items():
        if field.default_factory is not None or not isinstance(field.default, int | float | str):
            continue
        variable = f"{settings.model_config['env_prefix']}{name}".upper()
        cell = re.search(rf"^\| `{variable}` \| ([^|]*) \|", text, re.M)
        assert cell, variable
        shown = f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
        assert cell[1].strip().strip("`").split(" ")[0] == shown, variable
