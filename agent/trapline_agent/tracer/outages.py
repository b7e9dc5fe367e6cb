"""How long the targets of a probe were not seen, since the breaker had left them out.

What happened there meanwhile nobody counted: the time is all that can be said of it, so it is said.
"""

from __future__ import annotations

from dataclasses import dataclass

from trapline_agent.tracer.coverage import Key


@dataclass
class _Span:
    began_ns: int
    """When its present state began."""
    out_since_ns: int = 0
    """0 while it is in."""
    out_ns: int = 0
    """Before ``out_since_ns``, in its present state."""
    before_ns: int = 0
    """In its earlier states."""

    def out(self, now_ns: int) -> int:
        return self.out_ns + (now_ns - self.out_since_ns if self.out_since_ns else 0)


class Outages:
    """Of one probe. Times are CLOCK_MONOTONIC ns. The caller locks."""

    def __init__(self) -> None:
        self._spans: dict[Key, _Span] = {}
        self._ended_ns = 0

    def __bool__(self) -> bool:
        return bool(self._spans)

    def __contains__(self, key: Key) -> bool:
        return key in self._spans

    def keys(self) -> list[Key]:
        """Targets that are, or were, left out, and have not ended."""
        return list(self._spans)

    def mark(self, key: Key, *, out: bool, since_ns: int) -> None:
        """Says that a target has been out, or in, since then."""
        span = self._spans.setdefault(key, _Span(since_ns))
        if out and not span.out_since_ns:
            span.out_since_ns = since_ns
        elif not out and span.out_since_ns:
            span.out_ns += since_ns - span.out_since_ns
            span.out_since_ns = 0

    def begin(self, key: Key, now_ns: int) -> None:
        """A target's next state begins: its share is of the time from now on."""
        span = self._spans.setdefault(key, _Span(now_ns))
        span.before_ns += span.out(now_ns)
        span.out_ns = 0
        span.began_ns = now_ns
        if span.out_since_ns:
            span.out_since_ns = now_ns

    def end(self, key: Key, now_ns: int) -> None:
        """A target is gone."""
        span = self._spans.pop(key, None)
        if span is not None:
            self._ended_ns += span.before_ns + span.out(now_ns)

    def covered(self, key: Key, now_ns: int) -> float:
        """Returns the share of its present state's time in which a target was in: 0 to 1."""
        span = self._spans.get(key)
        if span is None or now_ns <= span.began_ns:
            return 1.0
        return max(0.0, 1.0 - span.out(now_ns) / (now_ns - span.began_ns))

    def uncovered_ns(self, key: Key, now_ns: int) -> int:
        """Returns how long a target was out, ever."""
        span = self._spans.get(key)
        return 0 if span is None else span.before_ns + span.out(now_ns)

    def total_ns(self, now_ns: int) -> int:
        """Returns the same for all targets together, those that are gone too. Never goes back."""
        return self._ended_ns + sum(s.before_ns + s.out(now_ns) for s in self._spans.values())
