"""A host's own rules: one that cannot be read forbids all."""

from __future__ import annotations

from pathlib import Path

import pytest

from trapline.errors import TraplineError
from trapline_agent import policy
from trapline_agent.policy import Policy, read_policy


def test_a_policy_is_read(tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_text('# ours\nredact = ["*password*", "struct secret"]\n')
    assert read_policy(file) == Policy(redact=("*password*", "struct secret"))


def test_the_default_need_not_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "DEFAULT_PATH", tmp_path / "policy.toml")
    assert read_policy() == Policy()
    (tmp_path / "policy.toml").write_text('redact = ["token"]')
    assert read_policy() == Policy(redact=("token",))


@pytest.mark.parametrize("text", ['redacted = ["token"]', 'redact = "token"', "redact = [1]", "redact = [", b"\xff"])
def test_what_is_no_policy_is_refused(tmp_path: Path, text: str | bytes) -> None:
    """A rule that is misspelt hides nothing, and nobody would know."""
    file = tmp_path / "policy.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(TraplineError, match=str(file)) as e:
        read_policy(file)
    assert "redact = " in e.value.hint


def test_one_that_was_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(TraplineError, match="does not exist"):
        read_policy(tmp_path / "none.toml")
