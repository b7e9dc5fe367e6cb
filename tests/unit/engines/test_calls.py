"""Calls and returns as code: what can be a return address, and where a Go function's body begins."""

from __future__ import annotations

import pytest

from trapline_agent.arch.x86_64.calls import go_body, may_be_returned_to

RET = "c3"


@pytest.mark.parametrize(
    "before",
    [
        "e8 00 00 00 00",  # call rel32
        "ff d0",  # call rax
        "41 ff d3",  # call r11
        "ff 10",  # call [rax]
        "ff 50 08",  # call [rax+8]
        "41 ff 54 24 18",  # call [r12+0x18]
        "ff 15 00 10 00 00",  # call [rip+0x1000]
        "ff 94 24 00 10 00 00",  # call [rsp+0x1000]
        "41 ff 94 c4 00 10 00 00",  # call [r12+rax*8+0x1000]
        "90",  # signal trampolines, goexit
    ],
)
def test_a_call_ends_before_a_return_address(before: str) -> None:
    assert may_be_returned_to(bytes.fromhex("55 48 89 e5" + before)[-9:], 0x401003)


@pytest.mark.parametrize("before", ["", "00", "48 89 e5", "c3", "e8 00 00", "eb fe"])
def test_elsewhere_none_does(before: str) -> None:
    code = bytes.fromhex("0f 0b 0f 0b 0f 0b" + before)[-9:]
    assert not may_be_returned_to(code, 0x401003)
    assert may_be_returned_to(code, 0x401010), "a function that was pushed by hand may begin there"


@pytest.mark.parametrize(
    ("code", "length"),
    [
        ("49 3b 66 10  76 59  48 83 ec 18", 6),  # cmp rsp, [r14+0x10]; jbe
        ("4c 8d a4 24 58 ff ff ff  4d 3b 66 10  0f 86 3e 01 00 00  48 81 ec 28 01 00 00", 18),  # lea r12, [rsp-0xa8]
        ("49 89 e4  49 81 ec 00 10 01 00  72 59  4d 3b 66 10  76 53  c3", 18),  # mov r12, rsp; sub; jb; cmp; jbe
        ("48 83 ec 18  c3", 0),  # nosplit
        ("49 3b 66 18  76 59", 0),  # another field
        ("49 3b 66 10  c3", 0),
        ("c3", 0),
        ("", 0),
    ],
)
def test_a_go_function_begins_behind_its_stack_check(code: str, length: int) -> None:
    assert go_body(bytes.fromhex(code.replace(" ", ""))) == length
