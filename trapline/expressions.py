"""Expressions of the probe language: Python's, read by ``ast`` through a white list. Nothing is evaluated here.

What is checked here needs no file: the grammar, the functions and what they take, registers, what is known when. Names and
types are checked where the files are (``trapline_agent.capture``).
"""

from __future__ import annotations

import ast
import difflib
import re
from typing import NoReturn

from trapline import tree
from trapline.errors import SpecError, Unsupported
from trapline.model import Aggregate, Capture
from trapline.protocol.stacks import MAX_DEPTH
from trapline.tree import Call, Constant, Field, Index, Name, Operation, Tree

MAX_CAPTURES = 32
MAX_STRING_BYTES = 4096
DEFAULT_STRING_BYTES = 64
REGISTERS = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "eflags",
)  # fmt: skip
"""Names that ``reg.NAME`` takes; which of them exist on a host is the agent's to know."""
ARGUMENT = re.compile(r"arg(0|[1-9][0-9]?)")
XMM = re.compile(r"xmm([0-9]|1[0-5])")
_AGGREGATE_FORMS = {
    "count": "", "sum": "x", "min": "x", "max": "x", "avg": "x", "hist": "x", "lhist": "x, low, high, step",
    "quantiles": "x", "topk": "x, k", "distinct": "x",
}  # fmt: skip
_AGGREGATE_HINTS = {
    "count": "it counts hits; rows are kept apart with `count() by (expression, ...)`",
    "hist": "x is an expression such as `arg0`; at a return `latency` or `retval`",
    "lhist": "such as `lhist(arg0, 0, 1000, 100)`",
}
AGGREGATES = tuple(_AGGREGATE_FORMS)
DEFAULT_TOP = 10
MAX_TOP = 100
MAX_STEPS = 1000
MAX_KEYS = 8
"""Expressions to group by."""
WHITE_SPACE = " \t\n\r\f\v"
_RESERVED_COLUMNS = {"ts", "pid", "tid", "site"}
AT_RETURN = ("retval", "latency")
"""What only a return probe has."""
CONTEXT = (
    "pid", "tid", "comm", "exe", "uid", "cgroup", "container", "cpu", "ts", "host", "func", "file", "line", "buildid",
    "caller", "errno", "traceparent",
)  # fmt: skip
"""What a name means that is neither a parameter nor a variable there; ``ctx.NAME`` means it in any case."""
STACKS = ("caller", "ctx.caller")
"""What is a stack of one frame."""
_INTEGER = (1, 1, "an address")
FUNCTIONS = {
    "str": (1, 2, "a pointer and, if wanted, the most bytes to read: str(arg0, 128)"),
    "buf": (2, 2, "an address and a number of bytes: buf(arg0, 16)"),
    **dict.fromkeys(("u8", "u16", "u32", "u64", "i8", "i16", "i32", "i64", "f32", "f64"), _INTEGER),
    "len": (1, 1, "a text: len(str(arg0))"),
    "startswith": (2, 2, "a text and its beginning: startswith(str(arg0), '/etc')"),
    "endswith": (2, 2, "a text and its end: endswith(str(arg0), '.so')"),
    "matches": (2, 2, "a text and a quoted regular expression: matches(str(arg0), '^/etc/.*')"),
    "cast": (2, 2, "a value and a quoted type: cast(arg0, 'struct foo *')"),
    "entry": (1, 1, "one value, as it was when the function was entered: entry(arg0)"),
    "ip": (0, 1, "an internet address, or a pointer to one: ip(addr); ip() is the probed instruction's address"),
    "sym": (1, 1, "an address of code: sym(handler)"),
    "ustack": (0, 1, "the most frames, if anything: ustack(20)"),
}
"""Least and most arguments, and what they are."""
_LATER_FUNCTIONS = {
    "kstack": "Trapline looks at programs, not at the kernel",
}
_FLOATS = re.compile(r"[xyz]mm[0-9]+|st[0-7]?")
_ARROW = re.compile(r"->\s*([A-Za-z_]\w*)")
IF = re.compile(r"if(?![\w])")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", '"': '"', "'": "'"}
_EXPRESSION_NODES = (
    ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.BinOp, ast.operator, ast.UnaryOp, ast.unaryop, ast.Compare,
    ast.cmpop, ast.Call, ast.Name, ast.Load, ast.Attribute, ast.Subscript, ast.Slice, ast.Constant, ast.IfExp,
    ast.Tuple, ast.List, ast.keyword,
)  # fmt: skip
_BLANKS = str.maketrans(dict.fromkeys(WHITE_SPACE, " "))


class ExpressionReader:
    """A cursor over one probe text, and what reads expressions from it; ``at`` is the index of the next character."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.returns = False
        """Whether the probe is one of a function's return: set when its kind is known."""

    def fail(
        self, detail: str, at: int | None = None, *, hint: str = "", suggestions: list[str] | None = None
    ) -> NoReturn:
        """Raises SpecError, with the caret at ``at`` (default: here)."""
        raise SpecError(
            detail,
            hint=hint,
            suggestions=suggestions or (),
            text=self.text,
            position=min(self.at if at is None else at, len(self.text)),
        )

    def later(self, feature: str, at: int, hint: str) -> NoReturn:
        """Raises Unsupported for what the language has but this release has not."""
        raise Unsupported(
            f"not in this release: {feature}", hint=hint, reason="NotInThisRelease", text=self.text, position=at
        )

    def skip(self) -> None:
        """Passes over white space."""
        while self.at < len(self.text) and self.text[self.at] in WHITE_SPACE:
            self.at += 1

    def take(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """Passes over what a pattern matches here, if it does."""
        if found := pattern.match(self.text, self.at):
            self.at = found.end()
        return found

    def peek(self, n: int = 1) -> str:
        """Returns the next characters; fewer, or none, at the end."""
        return self.text[self.at : self.at + n]

    def quoted(self) -> str:
        """Reads a quoted text of the grammar (not of an expression) and returns what it stands for."""
        start, quote = self.at, self.peek()
        out: list[str] = []
        self.at += 1
        while (c := self.peek()) != quote:
            if not c:
                self.fail("the quotes are not closed", start)
            self.at += 1
            if c != "\\":
                out.append(c)
                continue
            escape = self.peek()
            self.at += 1
            if escape in _ESCAPES:
                out.append(_ESCAPES[escape])
            elif escape == "x" and re.fullmatch(r"[0-9a-fA-F]{2}", self.peek(2)) and self.peek(2) != "00":
                out.append(chr(int(self.peek(2), 16)))
                self.at += 2
            else:
                self.fail("unknown escape", self.at - 2, hint=r"known are \\ \" \' \n \t \r \xHH")
        self.at += 1
        return "".join(out)

    def _scan(self, stops: tuple[str, ...], *, stop_at_if: bool = False) -> tuple[str, int]:
        """Takes an expression up to one of ``stops`` outside strings and brackets.

        Returns:
            The source with all white space made blanks, not stripped, and where it begins.
        """
        start = self.at
        closers: list[str] = []
        while self.at < len(self.text):
            c = self.text[self.at]
            if c in "'\"":
                self._string_literal()
                continue
            if not closers and self.text.startswith(stops, self.at):
                break
            at_if = stop_at_if and self.text[self.at - 1] in WHITE_SPACE + ")" and IF.match(self.text, self.at)
            if not closers and at_if:
                break
            if c in "([{":
                closers.append({"(": ")", "[": "]", "{": "}"}[c])
            elif c in ")]}":
                if not closers or closers.pop() != c:
                    self.fail(f"unexpected `{c}`")
            elif c == "#":
                self.fail("unexpected `#`")
            self.at += 1
        if closers:
            self.fail(f"expected `{closers[-1]}`")
        return self.text[start : self.at].translate(_BLANKS), start

    def _string_literal(self) -> None:
        start, quote = self.at, self.peek()
        self.at += 1
        while (c := self.peek()) != quote:
            if not c:
                self.fail("the quotes are not closed", start)
            self.at += 2 if c == "\\" else 1
        self.at += 1

    def _tree(self, source: str, start: int, what: str) -> ast.expr:
        """Parses an expression of the language; ``start`` is where ``source`` begins in the text."""
        lead = len(source) - len(source.lstrip())
        source, start = source.strip(), start + lead
        if not source:
            self.fail(f"expected {what}", start)

        def fail(detail: str, at: int, hint: str = "") -> NoReturn:
            if arrow := _ARROW.search(source):
                self._told_arrow(start + arrow.start(), arrow[1])
            if star := re.match(r"\*\s*(\w+)$", source):
                hint = f"what a pointer points to is written `{star[1]}[0]`"
            self.fail(detail, start + at, hint=hint)

        body = tree.body_of(source, fail, what)
        stack: list[ast.AST] = [body]
        while stack:
            node = stack.pop()
            if not isinstance(node, _EXPRESSION_NODES):
                at = start + tree.column(source, node if isinstance(node, ast.expr) else body)
                self.fail(f"{type(node).__name__} is not part of the expression language", at)
            stack.extend(ast.iter_child_nodes(node))
        return body

    def condition(self) -> str:
        """Reads what follows ``if``."""
        source, start = self._scan(("->", "{", "@"))
        if self.peek(2) == "->" and (arrow := _ARROW.match(self.text, self.at)) and arrow[1] not in AGGREGATES:
            self._told_arrow(self.at, arrow[1])
        return self.expression(source, start, "a condition")

    def _told_arrow(self, at: int, member: str) -> NoReturn:
        self.fail("`->` is C's; `.` follows pointers here", at, suggestions=[f".{member}"])

    def aggregate(self) -> Aggregate:
        """Reads what follows ``->``: a call, and ``by (expressions)`` if wanted."""
        source, start = self._scan(("->", "{", "@"), stop_at_if=True)
        lead = len(source) - len(source.lstrip())
        source, start = source.strip(), start + lead
        # "by" is no Python: a call, then `by` and a parenthesised list.
        end = _call_end(source)
        call, rest = source[:end], source[end:]
        node = self._tree(call, start, "an aggregate such as `count()`")
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            self.fail("an aggregate is a call, such as `count()`", start)
        function = node.func.id
        if function not in AGGREGATES:
            near = difflib.get_close_matches(function, AGGREGATES)
            self.fail(
                f"unknown aggregate `{function}`", start, suggestions=near, hint=f"known are {', '.join(AGGREGATES)}"
            )
        value, parameters = self._aggregated(function, node, call, start)
        shown = parameters if parameters != [DEFAULT_TOP] else []
        text = f"{function}({', '.join([*([value] if value else []), *map(str, shown)])})"
        by = self._keys(rest, start + end)
        if by:
            text += f" by ({', '.join(by)})"
        return Aggregate.model_validate(
            {"text": text, "function": function, "value": value, "parameters": parameters, "by": by}
        )

    def _aggregated(self, function: str, node: ast.Call, call: str, start: int) -> tuple[str, list[int]]:
        """Returns the text of what an aggregate is of, and its parameters."""
        if node.keywords:
            self.fail(f"{function} takes no named parameters", start + tree.column(call, node.keywords[0].value))
        form = _AGGREGATE_FORMS[function]
        wanted = form.count(",") + 1 if form else 0
        if not (len(node.args) == wanted or (function == "topk" and len(node.args) == 1)):
            example = f"{function}({form})"
            self.fail(f"expected `{example}`", start, hint=_AGGREGATE_HINTS.get(function, ""))
        if not node.args:
            return "", []
        first, *others = node.args
        value = self._value(first, call, start)
        if is_stack(value) and value != "caller":  # that may be a variable
            self.fail(
                "a stack is grouped by, and nothing can be computed of it",
                start + tree.column(call, first),
                hint=f"how often each was met: `-> count() by ({value})`",
            )
        parameters = [self._parameter(other, call, start) for other in others]
        if function == "topk":
            parameters = parameters or [DEFAULT_TOP]
            if not 1 <= parameters[0] <= MAX_TOP:
                self.fail(f"topk is of 1 to {MAX_TOP} values", start + tree.column(call, others[0]))
        if function == "lhist":
            low, high, step = parameters
            if step < 1 or high <= low:
                self.fail("a linear histogram goes up, in steps of 1 or more: lhist(x, 0, 100, 10)", start)
            if (high - low + step - 1) // step > MAX_STEPS:
                self.fail(f"a linear histogram has {MAX_STEPS} steps at most", start, hint="take larger steps")
        return value, parameters

    def _parameter(self, node: ast.expr, source: str, start: int) -> int:
        negative = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
        number = node.operand if isinstance(node, ast.UnaryOp) and negative else node
        if not isinstance(number, ast.Constant) or type(number.value) is not int or number.value >= 1 << 63:
            self.fail("expected a whole number", start + tree.column(source, node))
        return -number.value if negative else number.value

    def _keys(self, rest: str, start: int) -> list[str]:
        """Reads ``by (expression, ...)``, or nothing."""
        if not rest.strip():
            return []
        found = re.match(r" *by(?!\w) *", rest)
        if not found:
            self.fail(
                f"unexpected `{rest.strip()[:20]}` after the aggregate",
                start + len(rest) - len(rest.lstrip()),
                hint="rows are kept apart with `by (expression, ...)`",
            )
        source, start = rest[found.end() :].rstrip(), start + found.end()
        if not source.startswith("("):
            self.fail("expected `by (expression, ...)`", start)
        listed = self._tree(source, start, "an expression to group by")
        nodes = listed.elts if isinstance(listed, ast.Tuple) else [listed]
        if not nodes:
            self.fail("expected an expression to group by", start)
        if len(nodes) > MAX_KEYS:
            self.fail(f"more than {MAX_KEYS} expressions to group by", start)
        return [self._value(node, source, start) for node in nodes]

    def _value(self, node: ast.expr, source: str, start: int) -> str:
        """Returns the canonical text of a value that is aggregated, or grouped by; ``source`` has ``node`` in it."""
        segment = ast.get_source_segment(source, node) or ""
        return self.expression(segment, start + tree.column(source, node), "a value")

    def captures(self) -> list[Capture]:
        """Reads what follows ``{``, and the ``}``."""
        captures: list[Capture] = []
        while True:
            self.skip()
            if not captures and self.peek() == "}":
                self.fail("expected a value to capture", hint="such as `arg0`, `reg.rdi` or `str(arg1)`")
            source, start = self._scan((",", "}"))
            self._add_capture(captures, source, start)
            if not self.peek():
                self.fail("expected `}`")
            self.at += 1
            if self.text[self.at - 1] == "}":
                return captures

    def _add_capture(self, captures: list[Capture], source: str, start: int) -> None:
        name = ""
        if named := re.match(r" *([A-Za-z_][A-Za-z0-9_]*) *=(?!=)", source):
            name = named[1]
            source, start = source[named.end() :], start + named.end()
        at = start + len(source) - len(source.lstrip())
        if register := re.fullmatch(r" *[%$]([a-z0-9]+) *", source):  # perf's %di and gdb's $rdi
            text = self.register(register[1], at)
        else:
            text = self.expression(source, start, "a value to capture")
        self.append_capture(captures, Capture(text=text, name=text), name, at)

    def append_capture(self, captures: list[Capture], capture: Capture, name: str, at: int) -> None:
        """Adds a column, called ``name`` or after its expression; its text is at ``at``."""
        if name:
            if len(name) > 64:
                self.fail("the column's name is longer than 64 characters", at)
            capture.name = name
        if capture.name in _RESERVED_COLUMNS:
            self.fail(f"`{capture.name}` is a column that every hit has", at, hint="choose another name: `other=...`")
        if any(c.name == capture.name for c in captures):
            self.fail(f"two captured values are called `{capture.name}`", at, hint="name one: `other=...`")
        if len(captures) == MAX_CAPTURES:
            self.fail(f"more than {MAX_CAPTURES} captured values", at)
        captures.append(capture)

    def expression(self, source: str, start: int, what: str) -> str:
        """Reads and checks an expression, as far as that can be done without the files that it is about.

        Args:
            source: one line, with white space around it.
            start: where it begins in the text.
            what: what it is, for messages.

        Returns:
            Its canonical text.
        """
        body = self._tree(source, start, what)
        lead = len(source) - len(source.lstrip())
        source, start = source.strip(), start + lead

        def fail(detail: str, at: int, hint: str = "") -> NoReturn:
            self.fail(detail, start + at, hint=hint)

        self._check(tree.read(body, source, fail), start, entry=False)
        return tree.show(body, source)

    def _check(self, node: Tree, start: int, *, entry: bool) -> None:
        """Refuses what is wrong wherever the probe is; ``entry``: it stands inside of ``entry(...)``."""
        at = start + node.at
        match node:
            case Name(id=name):
                self.at_its_time(name, at, entry=entry)
                if name in REGISTERS:
                    self.fail(f"`{name}` is a register", at, suggestions=[f"reg.{name}"])
            case Field(of=Name(id="reg"), name=name):
                if name not in REGISTERS and not XMM.fullmatch(name):
                    self._no_register(name, at)
            case Field(of=Name(id="ctx"), name=name):
                if name not in CONTEXT:
                    near = [f"ctx.{n}" for n in difflib.get_close_matches(name, CONTEXT)]
                    hint = f"known are {', '.join(CONTEXT)}"
                    self.fail(f"`ctx` has no `{name}`", at, suggestions=near, hint=hint)
            case Field(of=of):
                self._check(of, start, entry=entry)
            case Index(of=of, index=index):
                self._check(of, start, entry=entry)
                self._check(index, start, entry=entry)
            case Operation(of=some):
                for one in some:
                    self._check(one, start, entry=entry)
            case Call():
                self._check_call(node, start, entry=entry)

    def _check_call(self, call: Call, start: int, *, entry: bool) -> None:
        function, arguments, at = call.function, call.arguments, start + call.at
        if function in _LATER_FUNCTIONS:
            self.later(f"`{function}()`", at, _LATER_FUNCTIONS[function])
        if function in AGGREGATES:
            self.fail(f"`{function}` is an aggregate", at, hint=f"it comes after `->`: `-> {function}(...)`")
        if function not in FUNCTIONS:
            near = difflib.get_close_matches(function, FUNCTIONS)
            hint = f"known are {', '.join(FUNCTIONS)}; functions of the program are never called"
            self.fail(f"no function `{function}` in the language", at, suggestions=near, hint=hint)
        least, most, usage = FUNCTIONS[function]
        if not least <= len(arguments) <= most:
            self.fail(f"{function} takes {usage}", at)
        match function, arguments:
            case "entry", _:
                if entry:
                    self.fail("entry(...) inside of entry(...)", at)
                if not self.returns:
                    near = [call.written[0]]
                    self.fail("a probe at a function's entry has the values of the entry anyway", at, suggestions=near)
                entry = True
            case "str", (_, limit):
                if not isinstance(limit, Constant) or type(limit.value) is not int:
                    hint = f"write a number from 1 to {MAX_STRING_BYTES}; `buf(p, n)` takes a computed one"
                    self.fail("a string's length is a plain number", start + limit.at, hint=hint)
            case "ustack", _ if entry:
                self.fail("a stack is taken where the probe is, at the return", at, suggestions=["ustack()"])
            case "sym", _ if entry:
                near = [f"sym(entry({call.written[0]}))"] if arguments else []
                self.fail("an address is named where the probe is, at the return", at, suggestions=near)
            case "ustack", (depth,):
                frames = depth.value if isinstance(depth, Constant) else None
                if type(frames) is not int or not 1 <= frames <= MAX_DEPTH:
                    self.fail(f"a stack has 1 to {MAX_DEPTH} frames: ustack(20)", at)
            case (("matches" | "cast"), (_, literal)):
                if not isinstance(literal, Constant) or not isinstance(literal.value, bytes):
                    self.fail(f"{function} takes {usage}", start + literal.at)
        if function in ("str", "buf") and len(arguments) == 2:
            size = arguments[1]
            if isinstance(size, Constant) and not 1 <= size.value <= MAX_STRING_BYTES:  # type: ignore[operator]
                self.fail(f"its length is from 1 to {MAX_STRING_BYTES} bytes", start + size.at)
        for one in arguments:
            self._check(one, start, entry=entry)

    def _no_register(self, name: str, at: int) -> NoReturn:
        if _FLOATS.fullmatch(name):
            self.later(f"this floating-point register (`{name}`)", at, "reg.xmm0 to reg.xmm15 are there")
        whole = register_named(name)
        near = [whole] if whole else difflib.get_close_matches(name, REGISTERS)
        hint = f"known are {', '.join(REGISTERS)} and xmm0 to xmm15"
        self.fail(f"no register `{name}`", at, suggestions=[f"reg.{r}" for r in near], hint=hint)

    def at_its_time(self, name: str, at: int, *, entry: bool) -> None:
        """Refuses an operand that is not there when the probe fetches it."""
        if name in AT_RETURN and not self.returns:
            self.fail(
                f"`{name}` is known when the function returns",
                at,
                hint="probe its return: `ur:` before the object, such as `ur:libc.so.6:malloc {retval}`",
            )
        if name in AT_RETURN and entry:
            self.fail(f"`{name}` is not known yet at the function's entry", at, suggestions=[name])
        if ARGUMENT.fullmatch(name) and self.returns and not entry:
            self.fail(
                f"the register of `{name}` has another value when the function returns",
                at,
                suggestions=[f"entry({name})"],
            )

    def register(self, name: str, at: int) -> str:
        """Returns the operand for a register as perf or gdb name it."""
        register = register_named(name)
        if not register:
            self.fail(f"no register `{name}`", at, hint=f"known are {', '.join(REGISTERS)}")
        return f"reg.{register}"


def _call_end(source: str) -> int:
    """Returns the index behind the parenthesis that closes the first one; all of it, where there is none."""
    depth = 0
    quote = ""
    at = 0
    while at < len(source):
        c = source[at]
        if quote:
            at += c == "\\"
            quote = "" if c == quote else quote
        elif c in "'\"":
            quote = c
        elif c in "([":
            depth += 1
        elif c in ")]":
            depth -= 1
            if not depth:
                return at + 1
        at += 1
    return len(source)


def is_stack(text: str) -> bool:
    """Whether a captured value, by its canonical text, is a stack."""
    return text.startswith("ustack(") or text in STACKS


def word(operand: str, *, entry: bool = False) -> Capture:
    """Returns the capture of an operand as it is, or at a return as it was at the entry."""
    text = f"entry({operand})" if entry else operand
    return Capture(text=text, name=text)


def string(operand: str, *, entry: bool = False) -> Capture:
    """Returns the capture of the string that an operand points to, or at a return pointed to at the entry."""
    return word(f"str({operand})", entry=entry)


def register_named(name: str) -> str:
    """Returns the 64-bit register that ``name`` is all or the low part of, without a prefix: ``di`` gives ``rdi``."""
    name = name.lower()
    if name in REGISTERS:
        return name
    if name in ("flags", "rflags"):
        return "eflags"
    if name == "ip":
        return "rip"
    if re.fullmatch(r"r([89]|1[0-5])[dwb]", name):
        return name[:-1]
    if re.fullmatch(r"e?(ax|bx|cx|dx|si|di|bp|sp)", name):
        return "r" + name[-2:]
    return ""
