"""Identifiers: a prefix that says what is named, and a UUIDv7, so that ids sort by the time they were made."""

from __future__ import annotations

import os
import time
import uuid


def new_id(prefix: str) -> str:
    """Returns ``prefix_`` and a new UUIDv7 in hex (RFC 9562, section 5.7): 48 bits of Unix milliseconds, 74 random bits."""
    millis = time.time_ns() // 1_000_000
    rand = int.from_bytes(os.urandom(10), "big")
    value = (millis & (2**48 - 1)) << 80 | 0x7 << 76 | (rand >> 68) << 64 | 0b10 << 62 | rand & (2**62 - 1)
    return f"{prefix}_{uuid.UUID(int=value).hex}"
