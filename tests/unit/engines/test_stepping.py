"""What is decided about an instruction before it is displaced. That it then runs right is the contract suite's matter
(tests/engines, ``test_h3_every_kind_of_first_instruction``), with the processor itself as the oracle."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from iced_x86 import Decoder, Mnemonic

from trapline.errors import Unsupported
from trapline_agent.arch.x86_64.stepping import SLOT_BYTES, plan_step

ADDR, SLOT = 0x5555_5555_1000, 0x5555_5556_0FC0


@given(st.binary(min_size=0, max_size=15))
def test_any_bytes_are_planned_or_refused(code: bytes) -> None:
    try:
        step = plan_step(code)
    except Unsupported as e:
        if e.reason in ("InvalidInstruction", "CannotDisplace"):
            return
        raise
    assert 1 <= step.length <= len(code)
    next_ip = step.next_ip(ADDR)
    if next_ip is not None:
        assert 0 <= next_ip([0] * 27) < 2**64
        return
    slot = step.slot(ADDR, SLOT)
    assert len(slot.code) <= SLOT_BYTES
    assert slot.starts[0] == (ADDR, 0)


@given(st.binary(min_size=15, max_size=15))
def test_a_slot_leads_back_behind_the_original(code: bytes) -> None:
    """Whatever falls through the copy arrives at the instruction after the original."""
    try:
        step = plan_step(code)
    except Unsupported:
        return
    if step.method == "emulated":
        return
    slot = step.slot(ADDR, SLOT)
    ends = {original for original, _ in slot.starts.values()} - {ADDR}
    assert ends <= {ADDR + step.length}
    decoded = list(Decoder(64, slot.code, ip=SLOT))
    jumps = [i for i in decoded if i.mnemonic == Mnemonic.JMP and i.near_branch_target == ADDR + step.length]
    assert jumps or ends == set()


@pytest.mark.parametrize(
    ("code", "method"),
    [
        ("55", "boosted"),
        ("f30f1efa", "emulated"),
        ("90", "emulated"),
        ("eb10", "emulated"),
        ("7405", "emulated"),
        ("e800100000", "boosted"),
        ("488b0510000000", "boosted"),
        ("c3", "boosted"),
    ],
)
def test_methods(code: str, method: str) -> None:
    assert plan_step(bytes.fromhex(code)).method == method


@pytest.mark.parametrize("code", ["0f05", "cd80", "cc", "f1", "f4", "c7f800000000", "ff542408", "cb", "ffd4"])
def test_what_cannot_be_displaced_is_refused_by_name(code: str) -> None:
    with pytest.raises(Unsupported) as caught:
        plan_step(bytes.fromhex(code) + b"\x90" * 8)
    assert caught.value.reason == "CannotDisplace"
    assert "`" in caught.value.detail


def test_out_of_reach() -> None:
    with pytest.raises(Unsupported, match="out of reach"):
        plan_step(b"\x55").slot(0x1000, 0x1000 + 2**31)
