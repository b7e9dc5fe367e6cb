"""What an expression of the probe language says: a small tree, made from Python's own (``ast``) through a white list.

Nothing is evaluated here and no name is looked up: what names stand for is known where the traced files are, at the agent
(``trapline_agent.capture``).
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from typing import NoReturn

import msgspec

from trapline.errors import SpecError

MAX_NODES = 256
MAX_DEPTH = 40
MAX_TEXT_BYTES = 1024
"""Of a string in an expression."""


class Tree(msgspec.Struct, frozen=True):
    at: int
    """Index of its first character in the expression's text."""


class Constant(Tree, frozen=True):
    value: int | float | bool | bytes
    """Text is UTF-8. Integers fit 64 bits."""


class Name(Tree, frozen=True):
    id: str


class Field(Tree, frozen=True):
    """``of.name``; ``of`` may be a pointer."""

    of: Tree
    name: str


class Index(Tree, frozen=True):
    """``of[index]``: of an array, or as in C from where a pointer points to."""

    of: Tree
    index: Tree


class Call(Tree, frozen=True):
    function: str
    arguments: tuple[Tree, ...]
    written: tuple[str, ...]
    """The arguments' text."""


class Operation(Tree, frozen=True):
    """An operator or a comparison.

    ``op`` is one of ``neg pos not invert`` (one operand), ``add sub mul div floordiv mod and or xor shl shr`` and ``eq ne lt
    le gt ge`` (two), ``in notin`` (a text in a text), ``all any`` (as many as there are, left to right as far as needed) and
    ``if`` (the test, the value where it holds, the other one).
    """

    op: str
    of: tuple[Tree, ...]


_UNARY: dict[type[ast.unaryop], str] = {ast.USub: "neg", ast.UAdd: "pos", ast.Not: "not", ast.Invert: "invert"}
_BINARY: dict[type[ast.operator], str] = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.Div: "div",
    ast.FloorDiv: "floordiv",
    ast.Mod: "mod",
    ast.BitAnd: "and",
    ast.BitOr: "or",
    ast.BitXor: "xor",
    ast.LShift: "shl",
    ast.RShift: "shr",
}
_COMPARED: dict[type[ast.cmpop], str] = {
    ast.Eq: "eq",
    ast.NotEq: "ne",
    ast.Lt: "lt",
    ast.LtE: "le",
    ast.Gt: "gt",
    ast.GtE: "ge",
    ast.In: "in",
    ast.NotIn: "notin",
}

Fail = Callable[[str, int, str], NoReturn]
"""(what is wrong, index in the expression, hint): raises."""


def column(source: str, node: ast.expr) -> int:
    """Returns where a node begins: ast counts UTF-8 bytes, a caret counts characters. ``source`` is one line."""
    return len(source.encode()[: node.col_offset].decode(errors="ignore"))


def read(body: ast.expr, source: str, fail: Fail) -> Tree:
    """Returns the tree of a parsed expression; ``fail`` raises what is wrong in it."""
    return _Reader(source, fail).tree(body, 0)


def parse(text: str) -> Tree:
    """Reads an expression that stands alone.

    Raises:
        SpecError: it is not in the language; has the text and the position.
    """

    def fail(detail: str, at: int, hint: str = "") -> NoReturn:
        raise SpecError(detail, hint=hint, text=text, position=min(at, len(text)))

    return read(body_of(text, fail), text, fail)


def body_of(source: str, fail: Fail, what: str = "an expression") -> ast.expr:
    """Parses one line by Python's grammar; ``fail`` raises what is wrong."""
    try:
        return ast.parse(source, mode="eval").body
    except SyntaxError as e:
        fail(f"{what}: {e.msg}", min((e.offset or len(source) + 1) - 1, len(source)), "")
    except (ValueError, RecursionError, MemoryError):
        fail(f"{what} is too complex", 0, "")


class _Reader:
    def __init__(self, source: str, fail: Fail) -> None:
        self._source = source
        self._fail = fail
        self._nodes = 0

    def tree(self, node: ast.expr, depth: int) -> Tree:
        at = column(self._source, node)
        self._nodes += 1
        if depth > MAX_DEPTH or self._nodes > MAX_NODES:
            self._fail("the expression is too complex", at, "")
        deeper = depth + 1
        match node:
            case ast.Constant(value=value):
                return Constant(at, self._constant(value, at))
            case ast.Name(id=name):
                return Name(at, name)
            case ast.Attribute(value=of, attr=name):
                return Field(at, self.tree(of, deeper), name)
            case ast.Subscript(value=of, slice=ast.Slice() as part):
                start = column(self._source, part) if part.lower or part.upper else at
                self._fail("a part of an array (`[a:b]`)", start, "take one element, or `buf(p, n)` for n bytes")
            case ast.Subscript(value=of, slice=index):
                return Index(at, self.tree(of, deeper), self.tree(index, deeper))
            case ast.UnaryOp(op=op, operand=of):
                return self._unary(_UNARY[type(op)], self.tree(of, deeper), at)
            case ast.BinOp(left=left, op=op2, right=right):
                if type(op2) not in _BINARY:
                    sign = {ast.Pow: "**", ast.MatMult: "@"}[type(op2)]
                    self._fail(f"the operator `{sign}` is not part of the expression language", at, "")
                return Operation(at, _BINARY[type(op2)], (self.tree(left, deeper), self.tree(right, deeper)))
            case ast.BoolOp(op=op3, values=values):
                return Operation(at, "all" if isinstance(op3, ast.And) else "any", self._trees(values, deeper))
            case ast.Compare():
                return self._comparison(node, at, deeper)
            case ast.IfExp(test=test, body=then, orelse=other):
                return Operation(at, "if", self._trees([test, then, other], deeper))
            case ast.Call(func=function, args=arguments, keywords=keywords):
                if keywords:
                    self._fail("arguments have no names here", column(self._source, keywords[0].value), "")
                if not isinstance(function, ast.Name):
                    hint = "functions of the program are never called"
                    self._fail(f"`{ast.unparse(function)}()` is no function of the language", at, hint)
                written = tuple(ast.get_source_segment(self._source, a) or "" for a in arguments)
                return Call(at, function.id, self._trees(arguments, deeper), written)
        self._fail(f"{type(node).__name__} is not part of the expression language here", at, "")

    def _trees(self, nodes: list[ast.expr], depth: int) -> tuple[Tree, ...]:
        return tuple(self.tree(n, depth) for n in nodes)

    def _constant(self, value: object, at: int) -> int | float | bool | bytes:
        if isinstance(value, bool | float):
            return value
        if isinstance(value, int):
            if not 0 <= value < 1 << 64:
                self._fail("the number does not fit 64 bits", at, "")
            return value
        if isinstance(value, str | bytes):
            data = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
            if len(data) > MAX_TEXT_BYTES:
                self._fail(f"the text is longer than {MAX_TEXT_BYTES} bytes", at, "")
            return data
        self._fail(f"`{value}` is not part of the expression language", at, "")

    def _unary(self, op: str, of: Tree, at: int) -> Tree:
        if op == "neg" and isinstance(of, Constant) and isinstance(of.value, int | float) and of.value is not True:
            if isinstance(of.value, int) and of.value > 1 << 63:
                self._fail("the number does not fit 64 bits", at, "")
            return Constant(at, -of.value)
        return Operation(at, op, (of,))

    def _comparison(self, node: ast.Compare, at: int, depth: int) -> Tree:
        """Chains become ``all``: ``a < b < c`` is ``a < b and b < c``."""
        parts: list[Tree] = []
        left = self.tree(node.left, depth)
        for op, right_node in zip(node.ops, node.comparators, strict=True):
            if type(op) not in _COMPARED:
                self._fail("`is` is not part of the expression language", at, "write `==`")
            name = _COMPARED[type(op)]
            if name in ("in", "notin") and isinstance(right_node, ast.Tuple | ast.List | ast.Set):
                of_one = [Operation(at, "eq", (left, self.tree(e, depth))) for e in right_node.elts]
                one: Tree = Operation(at, "any", tuple(of_one)) if of_one else Constant(at, False)
                parts.append(one if name == "in" else Operation(at, "not", (one,)))
                break
            right = self.tree(right_node, depth)
            parts.append(Operation(at, name, (left, right)))
            left = right
        return parts[0] if len(parts) == 1 else Operation(at, "all", tuple(parts))


def walk(tree: Tree) -> Iterator[Tree]:
    """Yields a tree's nodes, itself first."""
    yield tree
    match tree:
        case Field(of=of):
            yield from walk(of)
        case Index(of=of, index=index):
            yield from walk(of)
            yield from walk(index)
        case Call(arguments=some) | Operation(of=some):
            for one in some:
                yield from walk(one)


class _Hex(ast.NodeTransformer):
    """Has integers unparsed as they were written: an address in hex stays so."""

    def __init__(self, source: str) -> None:
        self._source = source

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        if type(node.value) is int and (written := ast.get_source_segment(self._source, node)):
            return ast.Name(written)
        return node


def show(body: ast.expr, source: str) -> str:
    """Returns the canonical text of a parsed expression: Python's own way to write it."""
    return ast.unparse(_Hex(source).visit(body))
