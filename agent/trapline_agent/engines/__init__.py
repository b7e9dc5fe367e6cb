"""Engines arm sites and record hits; one protocol (``base``), one contract suite (tests/engines). They do not import one
another, nor the tracer."""
