"""Parsers of foreign bytes, fuzzed with coverage by atheris (libFuzzer): ``make fuzz``, and for seconds in ``make test``."""
