from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.system.stack import Stack


@pytest.fixture(scope="session")
def stack() -> Iterator[Stack]:
    """One whole Trapline for all tests that leave it as they found it."""
    with Stack() as stack:
        yield stack
