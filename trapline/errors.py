"""Every error that Trapline raises on purpose.

::

    TraplineError
    ├── SpecError               the probe's text is wrong; carries the text and the place
    ├── ResolveError            the text is right, but what it names cannot be probed
    │   ├── NotFound            no such symbol, file, process, host or resource; carries suggestions
    │   ├── Ambiguous           more than one thing answers to that name
    │   └── NoDebugInfo         the file lacks the information that was asked for
    ├── EngineError             the host could not do it
    │   ├── Unsupported         refused, because it could not be done correctly
    │   ├── PermissionDenied    the kernel or the host's policy said no
    │   └── TargetGone          the process ended meanwhile
    ├── ProtocolError           a peer sent bytes that mean nothing
    ├── Conflict                the request contradicts what is there
    ├── Unavailable             the part that must answer is away (agent offline, tracer gone)
    └── AuthError               no credential, a wrong one, or one that may not do this

``code`` is stable and part of the API; ``detail`` says what happened and to what; ``hint`` says what to do next.
The mapping to HTTP is in ``service/trapline_service/api/errors.py`` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar


class TraplineError(Exception):
    """Base of all. ``str(error)`` is one line: detail, suggestions, hint."""

    code: ClassVar[str] = "error"
    registry: ClassVar[dict[str, type[TraplineError]]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        TraplineError.registry[cls.code] = cls

    def __init__(
        self,
        detail: str,
        *,
        hint: str = "",
        reason: str = "",
        suggestions: Sequence[str] = (),
        pointer: str = "",
        text: str = "",
        position: int | None = None,
    ) -> None:
        """
        Args:
            detail: what happened, and to what; a sentence without its full stop.
            hint: what to do next.
            reason: a stable CamelCase word for one cause among those of this code, such as ``MidInstruction``.
            suggestions: names near the one that was not found, best first.
            pointer: JSON pointer (RFC 6901) to the place in a request body.
            text: the probe text the error is about.
            position: index into ``text``, for the caret.
        """
        super().__init__(detail)
        self.detail = detail
        self.hint = hint
        self.reason = reason
        self.suggestions = list(suggestions)
        self.pointer = pointer
        self.text = text
        self.position = position

    def __str__(self) -> str:
        parts = [self.detail]
        if self.suggestions:
            names = ", ".join(f"`{s}`" for s in self.suggestions[:3])
            parts.append(f"did you mean {names}?")
        if self.hint:
            parts.append(self.hint)
        return "; ".join(parts)

    def caret(self) -> str:
        """Returns the probe text and a caret under the place, on two lines, or an empty string where there is none."""
        if not self.text or self.position is None:
            return ""
        return f"{self.text}\n{' ' * min(self.position, len(self.text))}^"

    def to_wire(self) -> dict[str, Any]:
        """Returns what ``from_wire`` needs to make this error again on another host; empty fields are left out."""
        fields = {
            "code": self.code,
            "detail": self.detail,
            "hint": self.hint,
            "reason": self.reason,
            "suggestions": self.suggestions,
            "pointer": self.pointer,
            "text": self.text,
            "position": self.position,
        }
        return {k: v for k, v in fields.items() if v not in ("", [], None)}

    @staticmethod
    def from_wire(fields: dict[str, Any]) -> TraplineError:
        """Returns the error that ``to_wire`` described; a code of a newer peer becomes a plain ``TraplineError``."""
        known = ("detail", "hint", "reason", "suggestions", "pointer", "text", "position")
        cls = TraplineError.registry.get(str(fields.get("code", "")), TraplineError)
        kwargs = {k: fields[k] for k in known if k in fields}
        kwargs.setdefault("detail", "unknown error")
        return cls(**kwargs)


class SpecError(TraplineError):
    code = "spec-invalid"


class ResolveError(TraplineError):
    code = "resolve-failed"


class NotFound(ResolveError):
    code = "not-found"


class Ambiguous(ResolveError):
    code = "ambiguous"


class NoDebugInfo(ResolveError):
    code = "no-debug-info"


class EngineError(TraplineError):
    code = "engine-failed"


class Unsupported(EngineError):
    code = "unsupported"


class PermissionDenied(EngineError):
    code = "permission-denied"


class TargetGone(EngineError):
    code = "target-gone"


class ProtocolError(TraplineError):
    code = "protocol-error"


class Conflict(TraplineError):
    code = "conflict"


class Unavailable(TraplineError):
    code = "unavailable"


class AuthError(TraplineError):
    code = "unauthorized"


TraplineError.registry[TraplineError.code] = TraplineError
