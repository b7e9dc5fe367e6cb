"""Hits as lines: for people like strace's, for programs NDJSON with the fields of ``trapline.model.Hit``.

Batches are turned into lines column by column, without an object per hit: a terminal command has to keep up with tens of
thousands of hits a second on the CPU that the traced programs run on too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from trapline.model import Hit
from trapline.protocol.hits import FIXED, INTERNED, STATUS_SUFFIX, HitBatch, JsonValue, ValueStatus, in_json
from trapline.protocol.stacks import Name, lines, place, unpack

_ADDRESS = 1 << 32
_BEYOND = {
    ValueStatus.NULL: "NULL",
    ValueStatus.FAULT: "<fault>",
    ValueStatus.OPTIMISED_OUT: "<optimised out>",
    ValueStatus.REDACTED: "<redacted>",
    ValueStatus.UNSUPPORTED: "<unsupported>",
}
_encode = msgspec.json.Encoder().encode


def quote(value: str) -> str:
    """Returns a string in quotes on one line, whatever is in it: no byte of a traced program reaches the terminal raw."""
    return '"' + "".join(c if c.isprintable() and c not in '"\\' else _escape(c) for c in value) + '"'


def _escape(c: str) -> str:
    return "\\" + c if c in '"\\' else repr(c)[1:-1]


def word(value: int) -> str:
    """Returns a captured word: what looks like an address in hex, anything else in decimal."""
    if value is True or value is False:
        return "true" if value else "false"
    return str(value) if value < _ADDRESS else hex(value)


def real(value: float) -> str:
    """Returns a floating-point number, as short as it can be without being another one."""
    return repr(value)


def _shown(kind: str, strings: Sequence[bytes]) -> Callable[[Any], str]:
    """Returns what makes a column's values what people are shown."""
    if kind in INTERNED:
        text = in_json(kind, strings)
        return [quote(str(text(i))) for i in range(len(strings))].__getitem__
    return {"f64": real, "bool": lambda value: word(bool(value))}.get(kind, word)


def plain(text: str) -> str:
    """Returns a name without what a terminal would take for a command."""
    return text if text.isprintable() else quote(text)[1:-1]


class Clock:
    """Wall clock times of hits in the local zone; a second's text is made once."""

    def __init__(self, convert: Callable[[int], time.struct_time] = time.localtime, form: str = "%H:%M:%S") -> None:
        self._convert = convert
        self._form = form
        self._second = -1
        self._text = ""

    def __call__(self, wall_ns: int) -> str:
        """Returns nanoseconds after 1970 as text with microseconds."""
        second, ns = divmod(wall_ns, 1_000_000_000)
        if second != self._second:
            self._second = second
            self._text = time.strftime(self._form, self._convert(second))
        return f"{self._text}.{ns // 1000:06}"


class Lines:
    """Turns batches into lines."""

    def __init__(self, name: Name | None = None, describe: Name | None = None) -> None:
        """
        Args:
            name: names the frames of stacks; by default they are shown as places in files.
            describe: the same where a frame has a line of its own.
        """
        self._name = name or (lambda frame: (place(frame),))
        self._describe = describe or self._name
        self._local = Clock()
        self._utc = Clock(time.gmtime, "%Y-%m-%dT%H:%M:%S")

    def text(self, batch: HitBatch, stop: int | None = None) -> str:
        """Returns the first ``stop`` hits of a batch (None: all) as lines for people."""
        h = batch.header
        ts, pids, tids, sites = (batch.columns[name][:stop].tolist() for name, _ in FIXED)
        comms = {pid: plain(comm) for pid, comm in h.comms.items()}
        labels = [plain(site) for site in h.sites]
        args = list(zip(*self._captured(batch, stop), strict=True)) or [()] * len(ts)
        frames = list(zip(*self._stacks(batch, stop), strict=True)) or [()] * len(ts)
        clock, offset = self._local, h.clock_offset
        out: list[str] = []
        for at, pid, tid, site, values, stacks in zip(ts, pids, tids, sites, args, frames, strict=True):
            who = f"{pid}" if pid == tid else f"{pid}/{tid}"
            label = labels[site] if site < len(labels) else "?"
            out.append(
                f"{clock(at + offset)} {who} {comms.get(pid, '')} {label}({', '.join(v for v in values if v)})\n"
            )
            out += stacks
        return "".join(out)

    def _stacks(self, batch: HitBatch, stop: int | None) -> Iterator[list[str]]:
        """Yields for each captured stack a column of its frames, a line each; empty for a single one (``caller``), which is
        shown as a value."""
        h = batch.header
        for column in h.columns[len(FIXED) :]:
            if column.type != "stack":
                continue
            which = batch.columns[column.name][:stop].tolist()
            found = {i: lines(unpack(h.strings[i], h.files), self._describe) for i in set(which)}
            texts = {i: "".join(f"        {plain(n)}\n" for n in names) for i, names in found.items() if len(names) > 1}
            yield [texts.get(i, "") for i in which]

    def _captured(self, batch: HitBatch, stop: int | None) -> Iterator[list[str]]:
        for column in batch.header.columns[len(FIXED) :]:
            if column.name.endswith(STATUS_SUFFIX):
                continue
            prefix = f"{column.name}="
            values = batch.columns[column.name][:stop].tolist()
            if column.type == "stack":
                h = batch.header
                found = {i: lines(unpack(h.strings[i], h.files), self._name) for i in set(values)}
                yield ["" if len(found[i]) > 1 else prefix + plain("".join(found[i])) for i in values]
                continue
            states = batch.columns[column.name + STATUS_SUFFIX][:stop].tolist()
            show = _shown(column.type, batch.header.strings)
            cells = []
            for value, state in zip(values, states, strict=True):
                if state > ValueStatus.TRUNCATED:
                    cells.append(prefix + _BEYOND.get(state, "<?>"))
                else:
                    cells.append(prefix + show(value) + ("..." if state else ""))
            yield cells

    def ndjson(self, batch: HitBatch, stop: int | None = None) -> str:
        """Returns the first ``stop`` hits of a batch (None: all) as JSON, one a line."""
        h = batch.header
        ts, pids, tids, sites = (batch.columns[name][:stop].tolist() for name, _ in FIXED)
        captured = [
            (
                column.name,
                in_json(column.type, h.strings, h.files, self._name),
                batch.columns[column.name][:stop].tolist(),
                batch.columns[column.name + STATUS_SUFFIX][:stop].tolist(),
            )
            for column in h.columns[len(FIXED) :]
            if not column.name.endswith(STATUS_SUFFIX)
        ]
        out = []
        for i, (at, pid, tid, site) in enumerate(zip(ts, pids, tids, sites, strict=True)):
            args: dict[str, JsonValue | None] = {}
            status: dict[str, str] = {}
            for name, convert, values, states in captured:
                value, state = values[i], states[i]
                if state:
                    status[name] = ValueStatus(state).text if state in _STATES else f"status-{state}"
                args[name] = None if state > ValueStatus.TRUNCATED else convert(value)
            wall = at + h.clock_offset
            hit = {
                "probe": h.probe,
                "host": h.host,
                "seq": h.seq + i,
                "ts": f"{self._utc(wall)}Z",
                "ts_ns": str(wall),
                "pid": pid,
                "tid": tid,
                "comm": h.comms.get(pid, ""),
                "site": h.sites[site] if site < len(h.sites) else "",
                "args": args,
                "status": status,
            }
            out.append(_encode(hit).decode())
        return "\n".join(out) + "\n"


_STATES = frozenset(ValueStatus)
_clock = Clock()


def format_hit(hit: Hit, probe: str, names: Mapping[str, Sequence[str]] | None = None) -> str:
    """Returns a hit as the API gives it as a line for people, stacks below it.

    Args:
        hit: the hit.
        probe: the probe's name.
        names: of each captured stack its functions, innermost first; by default shown as the hit has it.
    """
    values, below = [], []
    for name, value in hit.args.items():
        state = hit.status.get(name, "")
        if (stack := (names or {}).get(name)) is not None:
            if len(stack) == 1:
                values.append(f"{name}={plain(stack[0])}")
            else:
                below += [f"\n        {plain(n)}" for n in stack]
        elif value is None:
            values.append(f"{name}={'NULL' if state == 'null' else f'<{state}>'}")
        else:
            shown = real(value) if isinstance(value, float) else quote(value) if isinstance(value, str) else word(value)
            values.append(f"{name}={shown}{'...' if state else ''}")
    who = f"{hit.pid}" if hit.pid == hit.tid else f"{hit.pid}/{hit.tid}"
    site = plain(hit.site) or plain(probe)
    return f"{_clock(int(hit.ts_ns))} {who} {plain(hit.comm)} {site}({', '.join(values)}){''.join(below)}"
