"""The probe language: text to ``ProbeSpec`` and back.

::

    probe    := [name "="] [kind ":"] object ":" point { clause }
    kind     := u | ur | usdt                     uprobe: and uretprobe: are understood
    object   := /path | basename | soname | "buildid=" hex | "*"
    point    := symbol ["+" off] | glob | /regex/ | 0xoff | file ":" line | "quoted"
    clause   := "@" key "=" pattern { "," key "=" pattern }      which processes
              | "if" condition | "{" [name "="] expression, ... "}" | "->" aggregate

Clauses come in any order, each once; the canonical text has them in the order above. Quotes (either kind, with
backslash escapes) settle ``::``, ``->``, spaces, colons and pattern characters. A quoted point is an exact symbol, or
``TEXT``, a name as its source language writes it, where it has ``::`` or a space.

Expressions are Python's, read by ``ast`` through a white list; nothing is evaluated here. ``parse_probe`` reads the
whole grammar; ``require_supported`` refuses what this release cannot do. The forms of perf (``p:name path:sym x=%di``)
and bpftrace (``uprobe:/path:sym``) are read where they mean the same thing, and explained where they do not.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator

from trapline.errors import Unsupported
from trapline.expressions import IF, WHITE_SPACE, ExpressionReader, string, word
from trapline.model import Capture, Point, PointKind, ProbeKind, ProbeSpec

MAX_TEXT = 4096
MAX_PID = 1 << 22
"""PID_MAX_LIMIT of Linux, include/linux/threads.h."""

WHERE_KEYS = ("pid", "tree", "comm", "exe", "uid", "container", "cgroup", "host", "label")

_KINDS = {
    "u": ProbeKind.ENTRY,
    "uprobe": ProbeKind.ENTRY,
    "ur": ProbeKind.RETURN,
    "uretprobe": ProbeKind.RETURN,
    "usdt": ProbeKind.USDT,
}
_KERNEL_KINDS = {"kprobe", "kretprobe", "tracepoint", "fentry", "fexit", "kfunc", "kretfunc", "rawtracepoint"}
_KEY_HINTS = {"name": "comm", "process": "comm", "user": "uid", "path": "exe", "ppid": "tree", "image": "container"}

_NAME = re.compile(r"([A-Za-z_][A-Za-z0-9_.-]*)[ \t\n\r\f\v]*=(?!=)[ \t\n\r\f\v]*")
_KIND = re.compile(r"([a-z]+):")
_PERF = re.compile(
    r"(?P<kind>[pr])(?::(?:[A-Za-z_]\w*/)?(?P<name>[A-Za-z_]\w*))?[ \t]+(?!if\b|->|[@{])(?=[^\s:]+:\S)", re.ASCII
)
_BARE_OBJECT = re.compile(r"[^\s:{}\"']+")
_BARE_POINT = re.compile(r"(?:(?!->|@[ \t\n\r\f\v]*[A-Za-z_]+[ \t\n\r\f\v]*=)[\w.$@*?\[\]!:~^+/-])+")
_BARE_VALUE = re.compile(r"(?:(?!->)[^\s,{}\"'])+")
_NUMBER = re.compile(r"0[xX][0-9a-fA-F]+|[0-9]+")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PERF_ARG = re.compile(
    r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<deref>\+(?:u?0|0x0)\()?(?P<at>[%$]\w+)(?P<close>\))?(?::(?P<type>\w+))?", re.ASCII
)

_SAFE_OBJECT = re.compile(r"/[A-Za-z0-9_.+~@%=,/-]*|[A-Za-z0-9_.+~-]+|buildid=[0-9a-f]+|\*")
_SAFE_SYMBOL = re.compile(r"[A-Za-z_.$][A-Za-z0-9_.$]*(?:@@?[A-Za-z0-9_.]+)?")
_SAFE_FILE = re.compile(r"[A-Za-z_][A-Za-z0-9_./]*")
_SAFE_VALUE = re.compile(r"[A-Za-z0-9_./*?\[\]!:+=-]+")
_RESERVED_OBJECTS = set(_KINDS) | _KERNEL_KINDS | {"p", "r"}


def parse_probe(text: str) -> ProbeSpec:
    """Reads a probe text.

    Args:
        text: at most 4096 characters.

    Returns:
        The spec, whose ``text`` is canonical: ``parse_probe(spec.text) == spec``.

    Raises:
        SpecError: it is not in the grammar; has the text and the position.
        Unsupported: a captured expression that is right but not in this release; has the text and the position.
    """
    return _Reader(text).probe()


def format_probe(spec: ProbeSpec) -> str:
    """Returns the canonical text of a spec, from its fields alone (``spec.text`` is not looked at)."""
    return "".join(piece for _, piece in _pieces(spec))


def require_supported(spec: ProbeSpec) -> None:
    """Refuses what the grammar has but this release does not.

    Raises:
        Unsupported: names the feature; reason ``NotInThisRelease``, with the canonical text and the position.
    """
    wanted: list[tuple[str, bool, str, str]] = [
        ("kind", spec.kind is ProbeKind.USDT, "USDT probes (`usdt:`)", "probe a function by its symbol"),
        (
            "point",
            spec.point.kind is PointKind.REGEX,
            "a regular expression over symbols",
            "use a glob, such as `foo*`",
        ),
        ("point", spec.point.kind is PointKind.LINE, "a source line", "use a symbol, or `symbol+offset`"),
        (
            "point",
            spec.point.kind is PointKind.TEXT,
            "a name as the source language writes it",
            "use the mangled symbol, as `nm` prints it",
        ),
        *(
            (f"where.{key}", key in spec.where, f"the selector `{key}`", "select by pid, tree, comm, exe, uid or host")
            for key in ("label", "container", "cgroup")
        ),
        ("aggregate", bool(spec.aggregate), "an aggregate (`->`)", "leave it out and aggregate the hits"),
    ]
    for label, present, feature, hint in wanted:
        if present:
            at = 0
            for piece_label, piece in _pieces(spec):
                if piece_label == label:
                    at += len(piece) - len(piece.lstrip())
                    break
                at += len(piece)
            raise Unsupported(
                f"not in this release: {feature}", hint=hint, reason="NotInThisRelease", text=spec.text, position=at
            )


def place_of(spec: ProbeSpec, expression: str) -> int:
    """Returns where an expression of a probe, captured or a condition, begins in its text."""
    at, spec = 0, parse_probe(spec.text)  # a selector may have been added since
    for label, piece in _pieces(spec):
        if label == "condition" and spec.condition == expression:
            return at + len(piece) - len(expression)
        if label == "captures":
            inside = at + len(" {")
            for capture in spec.captures:
                column = _column(capture)
                if capture.text == expression:
                    return inside + len(column) - len(expression)
                inside += len(column) + len(", ")
        at += len(piece)
    return 0


# --- canonical text -------------------------------------------------------------------------------------------------


def _quote(value: str) -> str:
    out = ['"']
    for c in value:
        if c in '"\\':
            out.append("\\" + c)
        elif c == "\n":
            out.append("\\n")
        elif c < " " or c == "\x7f":
            out.append(f"\\x{ord(c):02x}")
        else:
            out.append(c)
    out.append('"')
    return "".join(out)


def _bare_or_quoted(value: str, safe: re.Pattern[str]) -> str:
    return value if safe.fullmatch(value) else _quote(value)


def _point_text(point: Point, kind: ProbeKind) -> str:
    match point.kind:
        case PointKind.OFFSET:
            return f"0x{point.offset:x}"
        case PointKind.LINE:
            return f"{_bare_or_quoted(point.value, _SAFE_FILE)}:{point.offset}"
        case PointKind.GLOB:
            return point.value
        case PointKind.REGEX:
            return "/" + re.sub(r"\\.|/", lambda m: "\\/" if m[0] == "/" else m[0], point.value, flags=re.S) + "/"
        case PointKind.TEXT:
            symbol = _quote(point.value)
        case PointKind.SYMBOL:
            symbol = _bare_or_quoted(point.value, _SAFE_SYMBOL)
    return f"{symbol}+0x{point.offset:x}" if point.offset else symbol


def _column(capture: Capture) -> str:
    return capture.text if capture.name == capture.text else f"{capture.name}={capture.text}"


def _pieces(spec: ProbeSpec) -> Iterator[tuple[str, str]]:
    """Yields the canonical text in labelled pieces."""
    if spec.name:
        yield "name", f"{spec.name}="
    if spec.kind is not ProbeKind.ENTRY:
        yield "kind", f"{spec.kind.value}:"
    safe = _SAFE_OBJECT.fullmatch(spec.object) and spec.object not in _RESERVED_OBJECTS
    yield "object", spec.object if safe else _quote(spec.object)
    yield "colon", ":"
    yield "point", _point_text(spec.point, spec.kind)
    for i, (key, value) in enumerate(spec.where.items()):
        yield f"where.{key}", f"{', ' if i else ' @ '}{key}={_bare_or_quoted(value, _SAFE_VALUE)}"
    if spec.condition:
        yield "condition", f" if {spec.condition}"
    if spec.captures:
        yield "captures", f" {{{', '.join(map(_column, spec.captures))}}}"
    if spec.aggregate:
        yield "aggregate", f" -> {spec.aggregate}"


# --- reading --------------------------------------------------------------------------------------------------------


class _Reader(ExpressionReader):
    """A recursive-descent reader over one text; ``at`` is the index of the next character."""

    def probe(self) -> ProbeSpec:
        if len(self.text) > MAX_TEXT:
            self.text = self.text[:MAX_TEXT]
            self.fail(f"the probe text is longer than {MAX_TEXT} characters", MAX_TEXT)
        for i, c in enumerate(self.text):
            if c == "\0" or "\ud800" <= c <= "\udfff":
                self.text = self.text.encode("utf-8", "replace").decode()
                self.fail("the probe text has a character that is not text (NUL, or bytes that are not UTF-8)", i)
        self.skip()
        if self.at == len(self.text):
            self.fail("the probe text is empty", hint="write OBJECT:SYMBOL, such as `libc.so.6:malloc`")
        if perf := self.take(_PERF):
            return self._perf(perf)
        name = self._name()
        kind = self._kind()
        obj = self._object()
        point, kind = self._point(kind)
        self.returns = kind is ProbeKind.RETURN
        spec = ProbeSpec(text="", name=name, kind=kind, object=obj, point=point)
        self._clauses(spec)
        return self._finish(spec)

    # --- name, kind, object, point

    def _name(self) -> str:
        found = _NAME.match(self.text, self.at)
        if not found or found[1] == "buildid":
            return ""
        if len(found[1]) > 128:
            self.fail("the probe's name is longer than 128 characters")
        self.at = found.end()
        return found[1]

    def _kind(self) -> ProbeKind:
        found = _KIND.match(self.text, self.at)
        if found and found[1] in _KERNEL_KINDS:
            self.fail(
                f"`{found[1]}:` is a probe in the kernel; Trapline probes programs and libraries",
                hint="write OBJECT:SYMBOL, such as `libc.so.6:read`",
            )
        if not found or found[1] not in _KINDS:
            return ProbeKind.ENTRY
        self.at = found.end()
        if found[1] == "uprobe" and re.match(r"[^\s:]+:(0x|\d)", self.text[self.at :]):
            self.fail(
                "bpftrace's addresses are virtual addresses, Trapline's are file offsets",
                self.at + self.text[self.at :].index(":") + 1,
                hint="write `u:PATH:0xOFFSET` with the file offset, or `u:PATH:symbol+0xOFFSET`",
            )
        return _KINDS[found[1]]

    def _object(self) -> str:
        start = self.at
        if self.peek() in ("'", '"') and self.peek():
            obj = self.quoted()
        else:
            found = self.take(_BARE_OBJECT)
            if not found:
                self.fail("expected the object: a path, a program's or library's name, `buildid=HEX` or `*`")
            obj = found[0]
        if self.peek() != ":":
            word = self.text[start : self.at]
            if obj.startswith("*0x"):
                self.fail(
                    f"`{word}` is gdb's address; a place is named by its file",
                    start,
                    hint="write OBJECT:0xOFFSET with the offset in the file",
                )
            self.fail(
                f"`{word}` names no object: a probe is OBJECT:SYMBOL",
                start,
                hint="`*` is every mapped file that has the symbol, PROGRAM the name or path of a program or library",
                suggestions=[f"*:{word}", f"PROGRAM:{word}"],
            )
        self.at += 1
        if obj.startswith("buildid="):
            digits = obj.removeprefix("buildid=").lower()
            if not re.fullmatch(r"[0-9a-f]{4,128}", digits):
                self.fail(f"`{digits}` is not a build-id: 4 to 128 hex digits", start + len("buildid="))
            return f"buildid={digits}"
        if obj.startswith("/") or obj == "*":
            return obj
        if "/" in obj:
            self.fail(
                f"`{obj}` is a relative path, which means nothing on another host", start, hint="write it from `/` on"
            )
        if any(c in obj for c in "*?["):
            self.fail(
                f"`{obj}`: patterns over objects are not part of the grammar",
                start,
                hint="name one program or library, or `*` for every mapped file that has the symbol",
            )
        return obj

    def _number(self, digits: str, at: int) -> int:
        value = int(digits, 16) if digits[:2] in ("0x", "0X") else int(digits)
        if value >= 1 << 63:
            self.fail(f"`{digits}` is too large", at)
        return value

    def _point(self, kind: ProbeKind) -> tuple[Point, ProbeKind]:
        start = self.at
        c = self.peek()
        if c and c in "'\"":
            point = self._quoted_point(kind)
        elif c == "/":
            point = Point(kind=PointKind.REGEX, value=self._regex())
        elif found := self.take(_BARE_POINT):
            point = self._bare_point(found[0], start, kind)
        else:
            self.fail("expected a symbol, `0xOFFSET`, `file:line`, a glob or `/regex/` after the object")
        if self.text.startswith("%return", self.at) and kind is ProbeKind.ENTRY:
            self.at += len("%return")
            kind = ProbeKind.RETURN
        after = self.peek()
        if after and after not in WHITE_SPACE + "{@" and self.peek(2) != "->":
            self.fail(f"unexpected `{after}` in the point", hint='quote a symbol that has such characters: "..."')
        return point, kind

    def _quoted_point(self, kind: ProbeKind) -> Point:
        start = self.at
        value = self.quoted()
        if not value:
            self.fail("the quotes are empty", start)
        if kind is ProbeKind.USDT:
            return Point(kind=PointKind.SYMBOL, value=value)
        if self.peek() == ":":
            self.at += 1
            digits = self.take(_NUMBER)
            if not digits or not digits[0].isdecimal() or not int(digits[0]):
                self.fail("expected a line number from 1 on")
            return Point(kind=PointKind.LINE, value=value, offset=self._number(digits[0], digits.start()))
        offset = 0
        if self.peek() == "+":
            self.at += 1
            digits = self.take(_NUMBER)
            if not digits:
                self.fail("expected a number of bytes after `+`")
            offset = self._number(digits[0], digits.start())
        return Point(kind=_named(value), value=value, offset=offset)

    def _bare_point(self, token: str, start: int, kind: ProbeKind) -> Point:
        is_glob = any(c in token for c in "*?[")
        if kind is ProbeKind.USDT:
            return Point(kind=PointKind.GLOB if is_glob else PointKind.SYMBOL, value=token)
        if _NUMBER.fullmatch(token):
            if token.isdecimal():
                self.fail(
                    f"`{token}` may be a line or an offset",
                    start,
                    hint="write `OBJECT:FILE:LINE` for a source line, `OBJECT:0xOFFSET` for an offset in the file",
                )
            return Point(kind=PointKind.OFFSET, offset=self._number(token, start))
        if "::" not in token and (found := re.fullmatch(r"([^:]+):([0-9]+)", token)) and not is_glob:
            if not int(found[2]):
                self.fail("lines count from 1", start + found.start(2))
            return Point(kind=PointKind.LINE, value=found[1], offset=self._number(found[2], start + found.start(2)))
        symbol, plus, digits = token.rpartition("+")
        offset = 0
        if plus:
            if not symbol or not _NUMBER.fullmatch(digits):
                self.fail(
                    "expected SYMBOL+BYTES", start + len(symbol) + 1, hint="an offset is decimal or 0x and hex digits"
                )
            offset = self._number(digits, start + len(symbol) + 1)
        else:
            symbol = token
        if symbol[0].isdigit() or "+" in symbol:
            self.fail(f"`{symbol}` is neither a symbol nor an offset", start, hint="a file offset is 0x and hex digits")
        if is_glob:
            if offset:
                self.fail("an offset needs one symbol, not a pattern", start + len(symbol))
            return Point(kind=PointKind.GLOB, value=symbol)
        if ":" in symbol and "::" not in symbol:
            self.fail(
                f"`{symbol}` has a colon that is not followed by a line number",
                start + symbol.index(":"),
                hint='quote a symbol that has colons: "..."',
            )
        if "/" in symbol:
            self.fail(f"`{symbol}` has a slash: a path where the symbol should be", start, hint="write PATH:SYMBOL")
        return Point(kind=_named(symbol), value=symbol, offset=offset)

    def _regex(self) -> str:
        start = self.at
        out: list[str] = []
        self.at += 1
        while (c := self.peek()) != "/":
            if not c:
                self.fail("the regular expression has no closing `/`", start)
            pair = self.peek(2) if c == "\\" else c
            out.append("/" if pair == "\\/" else pair)
            self.at += len(pair)
        self.at += 1
        if not out:
            self.fail("the regular expression is empty", start)
        return "".join(out)

    # --- clauses

    def _clauses(self, spec: ProbeSpec) -> None:
        seen: set[str] = set()
        while True:
            self.skip()
            start = self.at
            if start == len(self.text):
                return
            if self.peek(2) == "->":
                clause, self.at = "->", start + 2
            elif self.peek() in "@{":
                clause, self.at = self.peek(), start + 1
            elif found := self.take(IF):
                clause = found[0]
            else:
                hint = "after the point come `@ key=pattern`, `if condition`, `{captures}` and `-> aggregate`"
                if self.peek() == "/":
                    hint = "bpftrace's filter is written `@ pid=N` or `if condition` here"
                self.fail(f"unexpected `{self.text[start : start + 20]}`", start, hint=hint)
            if clause in seen:
                self.fail(f"a second `{clause}`: each clause comes once", start)
            seen.add(clause)
            match clause:
                case "@":
                    spec.where = self._where()
                case "if":
                    spec.condition = self.condition()
                case "{":
                    spec.captures = self.captures()
                case _:
                    spec.aggregate = self.aggregate()

    def _where(self) -> dict[str, str]:
        where: dict[str, str] = {}
        while True:
            self.skip()
            start = self.at
            key = self.take(_IDENTIFIER)
            if not key:
                self.fail("expected `key=pattern`", hint=f"keys are {', '.join(WHERE_KEYS)}")
            if key[0] not in WHERE_KEYS:
                near = [_KEY_HINTS.get(k, k) for k in difflib.get_close_matches(key[0], (*WHERE_KEYS, *_KEY_HINTS))]
                self.fail(
                    f"unknown selector `{key[0]}`", start, suggestions=near, hint=f"keys are {', '.join(WHERE_KEYS)}"
                )
            if key[0] in where:
                self.fail(f"`{key[0]}` is there twice", start)
            self.skip()
            if self.peek() != "=":
                self.fail(f"expected `=` after `{key[0]}`")
            self.at += 1
            self.skip()
            at = self.at
            if self.peek() in ("'", '"') and self.peek():
                value = self.quoted()
            else:
                bare = self.take(_BARE_VALUE)
                value = bare[0] if bare else ""
            if not value:
                self.fail(f"expected a pattern after `{key[0]}=`", at)
            if key[0] in ("pid", "tree"):
                if not re.fullmatch(r"[0-9]{1,9}", value) or not 0 < int(value) <= MAX_PID:
                    self.fail(f"`{value}` is not a process number", at, hint="select by name with comm=PATTERN")
                value = str(int(value))
            elif key[0] == "uid" and not re.fullmatch(r"[0-9]{1,10}|[A-Za-z_][A-Za-z0-9_.-]*", value):
                self.fail(f"`{value}` is neither a user number nor a user name", at)
            where[key[0]] = value
            self.skip()
            if self.peek() != ",":
                return where
            self.at += 1

    def _finish(self, spec: ProbeSpec) -> ProbeSpec:
        spec.where = {key: spec.where[key] for key in WHERE_KEYS if key in spec.where}
        spec.text = format_probe(spec)
        if len(spec.text) > MAX_TEXT:
            self.fail(f"the probe's canonical text would be longer than {MAX_TEXT} characters", 0)
        return spec

    # --- perf

    def _perf(self, head: re.Match[str]) -> ProbeSpec:
        """Reads the rest of ``p[:[GROUP/]NAME] PATH:POINT [FETCHARG...]``, Documentation/trace/uprobetracer.rst."""
        kind = ProbeKind.RETURN if head["kind"] == "r" else ProbeKind.ENTRY
        obj = self._object()
        point, kind = self._point(kind)
        self.returns = kind is ProbeKind.RETURN
        captures: list[Capture] = []
        spec = ProbeSpec(text="", name=head["name"] or "", kind=kind, object=obj, point=point)
        while True:
            self.skip()
            at = self.at
            if at == len(self.text):
                break
            found = self.take(_PERF_ARG)
            if (
                not found
                or (self.peek() and self.peek() not in WHITE_SPACE)
                or bool(found["deref"]) != bool(found["close"])
            ):
                self.at = at
                if self.peek() in ("@", "{") or self.peek(2) == "->" or IF.match(self.text, at):
                    self._clauses(spec)
                    if captures and spec.captures:
                        self.fail("captured values are there both in perf's way and in braces", at)
                    break
                self.later("this argument of perf's", at, "understood are %reg, $argN and +0(%reg):string")
            if argument := re.fullmatch(r"\$arg([1-9][0-9]?)", found["at"]):
                operand = f"arg{int(argument[1]) - 1}"  # perf counts from 1
            elif found["at"] == "$retval":
                operand = "retval"
                self.at_its_time(operand, at, entry=False)
            elif found["at"][0] == "%":
                operand = self.register(found["at"][1:], at)
            else:
                self.later(f"`{found['at']}`", at, "understood are %reg, $argN and +0(%reg):string")
            # As Documentation/trace/uprobetracer.rst has it, $argN of a return probe is that of the entry.
            entry = self.returns and bool(argument)
            if found["deref"]:
                if found["type"] not in ("string", "ustring"):
                    self.later("reading memory other than strings", at, "understood is +0(%reg):string")
                capture = string(operand, entry=entry)
            elif found["type"] in (None, "u64", "x64"):
                capture = word(operand, entry=entry)
            else:
                self.later(f"the type `{found['type']}`", at, "words are u64")
            self.append_capture(captures, capture, found["name"] or "", at)
        spec.captures = captures or spec.captures
        return self._finish(spec)


def _named(value: str) -> PointKind:
    return PointKind.TEXT if "::" in value or re.search(r"\s", value) else PointKind.SYMBOL
