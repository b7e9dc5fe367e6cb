"""The golden vectors of the browser's codec are what the Python codec says today."""

from __future__ import annotations

import pytest

from tests.web import golden
from trapline.errors import ProtocolError
from trapline.protocol.hits import decode


def test_the_committed_vectors_are_current() -> None:
    assert golden.PATH.read_text() == golden.document(), "run `python -m tests.web.golden` and commit the result"


@pytest.mark.parametrize("name", golden.malformed())
def test_the_python_codec_refuses_what_the_browser_must_refuse(name: str) -> None:
    with pytest.raises(ProtocolError):
        decode(golden.malformed()[name])


def test_vectors_read_back() -> None:
    for batch in golden.batches().values():
        again = decode(batch.encode())
        assert list(again.hits()) == list(batch.hits())
