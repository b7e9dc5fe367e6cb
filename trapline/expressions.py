"""Expressions of the probe language: Python's, read by ``ast`` through a white list. Nothing is evaluated here.

In this release a captured value is an argument, a register, or the string that one points to, at a return also ``retval``,
``latency`` and ``entry(...)``; the rest of the language is read and refused by name. Conditions and aggregates are checked
and kept as text.
"""

from __future__ import annotations

import ast
import difflib
import re
from typing import NoReturn

from trapline.errors import SpecError, Unsupported
from trapline.model import Capture, CaptureKind
from trapline.protocol.stacks import DEFAULT_DEPTH, MAX_DEPTH

CALLER = "caller"
"""The innermost frame but one."""
MAX_CAPTURES = 32
MAX_STRING_BYTES = 4096
DEFAULT_STRING_BYTES = 64
REGISTERS = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "eflags",
)  # fmt: skip
"""Names that ``reg.NAME`` takes; which of them exist on a host is the agent's to know."""
ARGUMENTS = tuple(f"arg{i}" for i in range(6))
AGGREGATES = ("count", "sum", "min", "max", "avg", "hist", "lhist", "quantiles", "topk", "distinct")
WHITE_SPACE = " \t\n\r\f\v"
_RESERVED_COLUMNS = {"ts", "pid", "tid", "site"}
AT_RETURN = ("retval", "latency")
"""What only a return probe has."""
_FLOATS = re.compile(r"[xyz]mm[0-9]+|st[0-7]?")
_LATER_NAMES = {
    "pid", "tid", "comm", "exe", "uid", "cgroup", "container", "cpu", "ts", "host",
    "func", "file", "line", "buildid", "traceparent", "errno", "ctx",
}  # fmt: skip
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
        try:
            body = ast.parse(source, mode="eval").body
        except SyntaxError as e:
            self.fail(f"{what}: {e.msg}", start + min((e.offset or len(source) + 1) - 1, len(source)))
        except (ValueError, RecursionError, MemoryError):
            self.fail(f"{what} is too complex", start)
        stack: list[ast.AST] = [body]
        while stack:
            node = stack.pop()
            if not isinstance(node, _EXPRESSION_NODES):
                at = start + _column(source, node if isinstance(node, ast.expr) else body)
                self.fail(f"{type(node).__name__} is not part of the expression language", at)
            stack.extend(ast.iter_child_nodes(node))
        return body

    def condition(self) -> str:
        """Reads what follows ``if``."""
        source, start = self._scan(("->", "{", "@"))
        self._tree(source, start, "a condition")
        return source.strip()

    def aggregate(self) -> str:
        """Reads what follows ``->``: a call, and ``by (expressions)`` if wanted."""
        source, start = self._scan(("->", "{", "@"), stop_at_if=True)
        # "by" is no Python: a call, then `by` and a parenthesised list.
        found = re.search(r"\)\s*by\b", source)
        call, by = (source[: found.start() + 1], source[found.end() :]) if found else (source, None)
        tree = self._tree(call, start, "an aggregate such as `count()`")
        at = start + len(source) - len(source.lstrip())
        if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name):
            self.fail("an aggregate is a call, such as `count()`", at)
        if tree.func.id not in AGGREGATES:
            near = difflib.get_close_matches(tree.func.id, AGGREGATES)
            hint = f"known are {', '.join(AGGREGATES)}"
            self.fail(f"unknown aggregate `{tree.func.id}`", at, suggestions=near, hint=hint)
        if found and by is not None:
            if not by.strip().startswith("("):
                self.fail("expected `by (expression, ...)`", start + found.end())
            self._tree(by, start + found.end(), "an expression to group by")
        return source.strip()

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
            capture = word(self.register(register[1], at))
        else:
            capture = self._lower(self._tree(source, start, "a value to capture"), source.strip(), at)
        self.append_capture(captures, capture, name, at)

    def append_capture(self, captures: list[Capture], capture: Capture, name: str, at: int) -> None:
        """Adds a column, called ``name`` or after its expression; its text is at ``at``."""
        if name:
            if len(name) > 64:
                self.fail("the column's name is longer than 64 characters", at)
            if name in _RESERVED_COLUMNS:
                self.fail(f"`{name}` is a column that every hit has", at, hint="choose another name")
            capture.name = name
        if any(c.name == capture.name for c in captures):
            self.fail(f"two captured values are called `{capture.name}`", at, hint="name one: `other=...`")
        if len(captures) == MAX_CAPTURES:
            self.fail(f"more than {MAX_CAPTURES} captured values", at)
        captures.append(capture)

    def _lower(self, tree: ast.expr, source: str, start: int, *, entry: bool = False) -> Capture:
        """Returns the capture of an expression; ``entry``: it stands inside of ``entry(...)``."""
        at = start + _column(source, tree)
        if isinstance(tree, ast.Call):
            function = tree.func.id if isinstance(tree.func, ast.Name) else ast.unparse(tree.func)
            if function == "entry":
                return self._lower(self._entry(tree, at, entry), source, start, entry=True)
            if function == "ustack":
                if entry:
                    self.fail("a stack is taken where the probe is, at the return", at, suggestions=["ustack()"])
                return stack(self._depth(tree, at))
            if function != "str":
                self.later(f"`{function}()`", at, "captured are arg0 to arg5, reg.NAME and str(...) of them")
            if tree.keywords or not 1 <= len(tree.args) <= 2:
                self.fail("str takes a pointer and, if wanted, the most bytes to read: str(arg0, 128)", at)
            pointer, late = tree.args[0], False
            if isinstance(pointer, ast.Call) and isinstance(pointer.func, ast.Name) and pointer.func.id == "entry":
                pointer, late = self._entry(pointer, start + _column(source, pointer), entry), True
            operand = self._operand(pointer, source, start, entry=entry or late)
            size = DEFAULT_STRING_BYTES
            if len(tree.args) == 2:
                limit, limit_at = tree.args[1], start + _column(source, tree.args[1])
                if not isinstance(limit, ast.Constant) or type(limit.value) is not int:
                    self.later("a computed length", limit_at, f"write a number from 1 to {MAX_STRING_BYTES}")
                if not 1 <= limit.value <= MAX_STRING_BYTES:
                    self.fail(f"a string's length is from 1 to {MAX_STRING_BYTES} bytes", limit_at)
                size = limit.value
            return string(operand, size, entry=entry or late, late=late)
        if isinstance(tree, ast.Name) and tree.id == CALLER:
            if entry:
                self.fail(f"`{CALLER}` is who is returned to, at a return too", at, suggestions=[CALLER])
            return Capture(text=CALLER, name=CALLER, kind=CaptureKind.STACK, operand=CALLER, frames=1)
        return word(self._operand(tree, source, start, entry=entry), entry=entry)

    def _depth(self, call: ast.Call, at: int) -> int:
        """Returns how many frames ``ustack(...)`` is of."""
        if call.keywords or len(call.args) > 1:
            self.fail("ustack takes the most frames, if anything: ustack(20)", at)
        if not call.args:
            return DEFAULT_DEPTH
        limit = call.args[0]
        if not isinstance(limit, ast.Constant) or type(limit.value) is not int or not 1 <= limit.value <= MAX_DEPTH:
            self.fail(f"a stack has 1 to {MAX_DEPTH} frames: ustack(20)", at)
        return limit.value

    def _entry(self, call: ast.Call, at: int, inside: bool) -> ast.expr:
        """Returns what ``entry(...)`` is of."""
        if call.keywords or len(call.args) != 1:
            self.fail("entry takes one value, as it was when the function was entered: entry(arg0)", at)
        if inside:
            self.fail("entry(...) inside of entry(...)", at)
        if not self.returns:
            inner = ast.unparse(call.args[0])
            self.fail("a probe at a function's entry has the values of the entry anyway", at, suggestions=[inner])
        return call.args[0]

    def _operand(self, tree: ast.expr, source: str, start: int, *, entry: bool = False) -> str:
        at = start + _column(source, tree)
        if isinstance(tree, ast.Name):
            self.at_its_time(tree.id, at, entry=entry)
            if tree.id in AT_RETURN:
                return tree.id
        if isinstance(tree, ast.Attribute) and isinstance(tree.value, ast.Name) and tree.value.id == "reg":
            if _FLOATS.fullmatch(tree.attr):
                self.later(
                    f"floating-point values (`{tree.attr}`)", at, "captured are integers and pointers, and strings"
                )
            if tree.attr not in REGISTERS:
                whole = register_named(tree.attr)
                near = [whole] if whole else difflib.get_close_matches(tree.attr, REGISTERS)
                hint = f"known are {', '.join(REGISTERS)}"
                self.fail(f"no register `{tree.attr}`", at, suggestions=[f"reg.{r}" for r in near], hint=hint)
            return f"reg.{tree.attr}"
        if isinstance(tree, ast.Name):
            if tree.id in ARGUMENTS:
                return tree.id
            if re.fullmatch(r"arg[0-9]+", tree.id):
                self.later(f"`{tree.id}`, which is passed on the stack", at, "arg0 to arg5 come in registers")
            if tree.id in _LATER_NAMES:
                self.later(f"the value `{tree.id}`", at, "every hit has its time, pid, tid, comm and site")
            if register := register_named(tree.id):
                self.fail(f"`{tree.id}` is a register", at, suggestions=[f"reg.{register}"])
            self.later(f"an argument by its name (`{tree.id}`)", at, "write arg0 to arg5")
        self.later(
            "a value other than a register, an argument or a string",
            at,
            "captured are arg0 to arg5, reg.NAME and str(...) of them",
        )

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
        if name in ARGUMENTS and self.returns and not entry:
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


def word(operand: str, *, entry: bool = False) -> Capture:
    """Returns the capture of an operand as it is."""
    text = f"entry({operand})" if entry else operand
    return Capture(text=text, name=text, operand=operand, entry=entry)


def string(operand: str, size: int = DEFAULT_STRING_BYTES, *, entry: bool = False, late: bool = False) -> Capture:
    """Returns the capture of the string that an operand points to; ``entry`` and ``late`` as in ``Capture``."""
    pointer = f"entry({operand})" if late else operand
    text = f"str({pointer})" if size == DEFAULT_STRING_BYTES else f"str({pointer}, {size})"
    text = f"entry({text})" if entry and not late else text
    return Capture(
        text=text, name=text, kind=CaptureKind.STRING, operand=operand, entry=entry, late=late, max_bytes=size
    )


def stack(depth: int = DEFAULT_DEPTH) -> Capture:
    """Returns the capture of the innermost frames of the thread's stack."""
    text = "ustack()" if depth == DEFAULT_DEPTH else f"ustack({depth})"
    return Capture(text=text, name=text, kind=CaptureKind.STACK, operand="ustack", frames=depth)


def _column(source: str, node: ast.expr) -> int:
    """ast counts UTF-8 bytes; the caret counts characters. ``source`` is one line."""
    return len(source.encode()[: node.col_offset].decode(errors="ignore"))


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
