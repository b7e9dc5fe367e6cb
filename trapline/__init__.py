"""Trapline's shared contract: models, wire messages, errors, the client and the command line.

What users import lives here; ``trapline_agent`` and ``trapline_service`` import this package and never each other.
"""

__version__ = "0.1.0"
