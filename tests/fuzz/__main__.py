"""Fuzzes one parser: ``python -m tests.fuzz NAME SECONDS [DIRECTORY]``.

What is found is kept in DIRECTORY (by default .fuzz/NAME) and is where the next run begins. An input that makes the parser
fail, or take longer than ten seconds or a GiB, ends the run with a status other than 0, and is kept there too.
"""

from __future__ import annotations

import sys
from hashlib import sha1
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["trapline", "trapline_agent"]):
    from tests.fuzz import harnesses

_MAX_INPUT_BYTES = 1 << 16
_INPUT_S = 10
_MEMORY_MB = 1024


def main(name: str, seconds: str, directory: str = "") -> None:
    kept = Path(directory or f".fuzz/{name}")
    corpus = kept / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in harnesses.ALL[name].seeds():
        (corpus / sha1(seed).hexdigest()).write_bytes(seed)
    options = (
        f"-max_total_time={int(seconds)}",
        f"-timeout={_INPUT_S}",
        f"-rss_limit_mb={_MEMORY_MB}",
        f"-max_len={_MAX_INPUT_BYTES}",
        f"-artifact_prefix={kept}/",
        "-print_final_stats=1",
    )
    atheris.Setup([sys.argv[0], *options, str(corpus)], lambda data: harnesses.run_one(name, data))
    atheris.Fuzz()


if __name__ == "__main__":
    if not 3 <= len(sys.argv) <= 4 or sys.argv[1] not in harnesses.ALL:
        sys.exit(f"{__doc__}\nNAME is one of {', '.join(harnesses.ALL)}")
    main(*sys.argv[1:])
