"""Hits as lines: for people like strace's, for programs NDJSON with the fields of ``trapline.model.Hit``.

Batches are turned into lines column by column, without an object per hit: a terminal command has to keep up with tens of
thousands of hits a second on the CPU that the traced programs run on too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec

from trapline.model import Hit
from trapline.protocol.hits import FIXED, STATUS_SUFFIX, HitBatch, ValueStatus
from trapline.protocol.stacks import Name, lines, place, text, unpack

_ADDRESS = 1 << 32
_JSON_EXACT = 2**53
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
    return str(value) if value < _ADDRESS else hex(value)


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

    def __init__(self, name: Name | None = None) -> None:
        """``name``: names the frames of stacks; by default they are shown as places in files."""
        self._name = name or (lambda frame: (place(frame),))
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
            found = {i: lines(unpack(h.strings[i], h.files), self._name) for i in set(which)}
            texts = {i: "".join(f"        {plain(n)}\n" for n in names) for i, names in found.items() if len(names) > 1}
            yield [texts.get(i, "") for i in which]

    def _captured(self, batch: HitBatch, stop: int | None) -> Iterator[list[str]]:
        strings = [quote(s.decode("utf-8", "backslashreplace")) for s in batch.header.strings]
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
            is_string = column.type == "str"
            cells = []
            for value, state in zip(values, states, strict=True):
                if state > ValueStatus.TRUNCATED:
                    cells.append(prefix + _BEYOND.get(state, "<?>"))
                elif is_string:
                    cells.append(prefix + strings[value] + ("..." if state else ""))
                else:
                    cells.append(prefix + word(value))
            yield cells

    def ndjson(self, batch: HitBatch, stop: int | None = None) -> str:
        """Returns the first ``stop`` hits of a batch (None: all) as JSON, one a line."""
        h = batch.header
        ts, pids, tids, sites = (batch.columns[name][:stop].tolist() for name, _ in FIXED)
        strings = [s.decode("utf-8", "backslashreplace") for s in h.strings]
        captured: list[tuple[str, Sequence[str] | Mapping[int, str] | None, list[int], list[int]]] = [
            (
                column.name,
                strings
                if column.type == "str"
                else self._texts(batch, column.name)
                if column.type == "stack"
                else None,
                batch.columns[column.name][:stop].tolist(),
                batch.columns[column.name + STATUS_SUFFIX][:stop].tolist(),
            )
            for column in h.columns[len(FIXED) :]
            if not column.name.endswith(STATUS_SUFFIX)
        ]
        out = []
        for i, (at, pid, tid, site) in enumerate(zip(ts, pids, tids, sites, strict=True)):
            args: dict[str, int | str | None] = {}
            status: dict[str, str] = {}
            for name, table, values, states in captured:
                value, state = values[i], states[i]
                if state:
                    status[name] = ValueStatus(state).text if state in _STATES else f"status-{state}"
                if state > ValueStatus.TRUNCATED:
                    args[name] = None
                elif table is not None:
                    args[name] = table[value]
                else:
                    args[name] = value if value <= _JSON_EXACT else str(value)
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

    def _texts(self, batch: HitBatch, column: str) -> dict[int, str]:
        h = batch.header
        which = set(batch.columns[column].tolist())
        return {i: text(unpack(h.strings[i], h.files), self._name) for i in which}


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
        elif isinstance(value, int):
            values.append(f"{name}={word(value)}")
        else:
            values.append(f"{name}={quote(value)}{'...' if state else ''}")
    who = f"{hit.pid}" if hit.pid == hit.tid else f"{hit.pid}/{hit.tid}"
    site = plain(hit.site) or plain(probe)
    return f"{_clock(int(hit.ts_ns))} {who} {plain(hit.comm)} {site}({', '.join(values)}){''.join(below)}"
