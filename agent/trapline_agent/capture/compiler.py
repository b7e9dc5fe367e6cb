"""From an expression and what is known of one site to what is computed there: names become places, places fetches."""

from __future__ import annotations

import difflib
import socket
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import TypeVar

import msgspec

from trapline.errors import NoDebugInfo, NotFound, SpecError, TraplineError, Unsupported
from trapline.expressions import ARGUMENT, AT_RETURN, CONTEXT, XMM, register_named
from trapline.model import ProbeKind
from trapline.protocol.hits import ValueStatus
from trapline.protocol.stacks import DEFAULT_DEPTH
from trapline.tree import Call, Constant, Field, Index, Name, Operation, Tree, parse
from trapline_agent.arch.x86_64 import ARGUMENT_REGISTERS, GO_REGISTERS, REGISTERS, RESULT_REGISTER
from trapline_agent.capture import abi
from trapline_agent.capture.compute import fits
from trapline_agent.capture.places import Memory, Place, add, entered, entry, in_word, of_location, split
from trapline_agent.capture.typed import (
    DEFAULT_STRING_BYTES,
    MAX_STRING_BYTES,
    Thing,
    Types,
    described,
    element,
    followed,
    is_character,
    is_scalar,
    kind_of_number,
    length,
    members,
    number,
    of_word,
    redacted,
    shown,
    smart,
    text,
)
from trapline_agent.capture.typed import field as field_of
from trapline_agent.debuginfo.model import DebugInfo, Function, Location, Scope, Type, TypeRef, Variable
from trapline_agent.patterns import steps
from trapline_agent.plans import (
    Bits,
    Bytes,
    Const,
    Context,
    Frames,
    Here,
    Load,
    Missing,
    Names,
    Op,
    Register,
    Symbol,
    Text,
    Value,
    Xmm,
)

_T = TypeVar("_T")
_AT_HIT = ("pid", "tid", "comm", "exe", "uid", "cgroup", "container", "cpu", "ts")
_TEXTS = ("comm", "exe", "cgroup", "container")
_NOT_YET = {
    "traceparent": "capture what the program keeps it in",
}
_INTERNET = ("in_addr", "in6_addr")
_ALONE = "a stack is captured whole: nothing can be computed of it"
_SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}
_INT = Type("base", "int", 4, encoding="signed")
_SOCKADDR_IN, _SOCKADDR_IN6 = 16, 28
_U64 = Type("base", "u64", 8)
_CLONES = (".isra.", ".constprop.", ".part.")
"""Of symbols: gcc gave the function other parameters than it was written with (gcc, -fipa-sra, -fipa-cp)."""


@dataclass(frozen=True)
class Site:
    """What is known of the place of a probe."""

    module: str = "the file"
    """The file's short name, for messages."""
    kind: ProbeKind = ProbeKind.ENTRY
    entry: bool = True
    """Whether it is a function's first instruction: arguments are as the ABI has them."""
    go: bool = False
    """Whether it is in a Go function, where the registers still are as at its entry."""
    vaddr: int = 0
    """The instruction's address in its file."""
    symbol: str = ""
    scope: Scope | None = None
    debug: DebugInfo | None = None
    constants: dict[str, str | int] = field(default_factory=dict)
    """``host func file line buildid``, as far as they are known."""
    arguments: tuple[tuple[Type, Location], ...] | None = None
    """Of a USDT probe, as its note has them; None: a function's, by the ABI."""
    errno: Memory | None = None
    """Where the thread's errno is: known in the C library's own file."""
    words: bool = False
    """Texts and numbers of several functions share a column: what has no explicit type there is captured as a word."""
    redact: Callable[[Collection[str]], bool] = lambda names: False
    """Whether a value that is called so, or is of a type that is called so, must not leave the host."""


@dataclass(frozen=True)
class Plain:
    """A value that has no type of the program: ``kind`` is a column type, or ``bytes``."""

    kind: str
    value: Value


Operand = Plain | Thing
_MAX_STEPS = 1 << 20
"""Of regular expressions at a trap: about 10 ms, for the worst pattern in the worst text."""
_NUMBERS = ("u64", "i64", "f64", "bool")


class Compiler:
    """Compiles expressions for one site. Raises TraplineError with the expression's text and the place in it."""

    def __init__(self, site: Site) -> None:
        self._site = site
        scope = site.scope
        variables = () if scope is None else (*scope.function.parameters, *scope.variables)
        self._types = Types(site.debug, [v.type for v in variables])
        self._entry = False
        """Inside of ``entry(...)``."""
        self._steps = 0
        """That all regular expressions of a hit may take."""

    # --- what is asked for

    def column(self, expression: str, name: str = "") -> tuple[str, Value]:
        """Returns a captured value: its column type and what computes it."""
        kind, value = self._checked(expression, lambda tree: _sendable(*self._column(tree)))
        if name and self._site.redact((name,)):
            return kind, Missing(ValueStatus.REDACTED)
        return kind, value

    def _column(self, tree: Tree) -> tuple[str, Value]:
        match tree:
            case Call(function="ustack", arguments=arguments):
                (depth,) = [a.value for a in arguments if isinstance(a, Constant)] or [DEFAULT_DEPTH]
                return "stack", Frames(int(depth))
            case Call(function="sym", arguments=(address,)):
                return "stack", Symbol(self._address(self._operand(address)))
            case Field(of=Name(id="ctx"), name="caller"):
                return "stack", self._caller()
            case Name(id="caller") if self._variable("caller") is None:
                return "stack", self._caller()
        return self._shown(self._operand(tree))

    def _caller(self) -> Frames:
        # At a return the thread stands in the caller.
        return Frames(1, int(self._site.kind is ProbeKind.ENTRY))

    def condition(self, expression: str) -> Value:
        """Returns a condition: a bool."""
        return self._checked(expression, lambda tree: _sendable("bool", self._truth(self._operand(tree)))[1])

    def _checked(self, expression: str, compile_: Callable[[Tree], _T]) -> _T:
        self._at = 0
        try:
            return compile_(parse(expression))
        except TraplineError as e:
            if not e.text:
                e.text, e.position = expression, self._at
            raise
        except RecursionError:
            raise SpecError("the expression is too complex", text=expression, position=0) from None

    # --- trees

    def _operand(self, tree: Tree) -> Operand:
        operand = self._compiled(tree)
        if any(not fits(v) for v in _values(operand)):
            # (An index or a condition is needed at several places of what is made of it, and that multiplies.)
            raise SpecError("what this would compute at each hit is too much", hint="capture parts of it")
        self._at = tree.at  # what is said of the operand from here on is said of it as a whole
        return operand

    def _compiled(self, tree: Tree) -> Operand:
        self._at = tree.at
        match tree:
            case Constant(value=value):
                return _constant(value)
            case Name(id=name):
                return self._named(name)
            case Field(of=Name(id="reg"), name=name):
                return self._register(name)
            case Field(of=Name(id="ctx"), name=name):
                return self._context(name)
            case Field(of=of, name=name):
                outer = self._typed(self._operand(of), f".{name}")
                found = field_of(outer, name, self._types)
                of_what = followed(outer, self._types).type
                return self._seen(name, found, of_what.name, of_what.alias)
            case Index(of=of, index=index):
                outer = self._typed(self._operand(of), "[...]")
                at = self._integer(self._operand(index))
                self._at = tree.at
                return self._seen("", element(outer, at, self._types))
            case Call(function=function, arguments=arguments):
                return self._call(function, arguments)
            case Operation(op=op, of=of2):
                return self._operation(op, of2)
        raise SpecError("this is not part of the expression language")

    def _typed(self, operand: Operand, what: str) -> Thing:
        if isinstance(operand, Thing):
            return operand
        raise SpecError(
            f"{what} is of what has a type, and this is a plain {_in_words(operand.kind)}",
            hint='say what it points to: `cast(arg0, "struct foo *")`, or `cast(arg0, "u32 *")[1]`',
        )

    def _seen(self, name: str, thing: Thing, *others: str) -> Thing:
        """Applies the redaction rules: a value's names are its own, its type's and that of what it is a part of."""
        names = {name, thing.type.name, thing.type.alias, *others} - {""}
        return redacted(thing) if self._site.redact(names) else thing

    # --- names

    def _named(self, name: str) -> Operand:
        # At a return variables are gone, and what is called so is the language's.
        gone = self._site.kind is ProbeKind.RETURN and not self._entry and name in (*AT_RETURN, *CONTEXT)
        if not gone and (variable := self._variable(name)) is not None:
            return variable
        if (number_ := ARGUMENT.fullmatch(name)) is not None:
            return self._argument(int(number_[1]))
        if name == "retval":
            return self._retval()
        if name == "latency":
            return Plain("u64", Context("latency"))
        if name in CONTEXT:
            return self._context(name)
        if self._site.debug is not None and (found := self._site.debug.variable(name)) is not None:
            place = of_location(found.location, self._site.vaddr)
            if self._site.kind is ProbeKind.RETURN:
                place = entered(place)  # where the file is mapped is known from the entry's address
            return self._seen(name, Thing(self._types.of(found.type), place))
        raise self._unknown(name)

    def _variable(self, name: str) -> Thing | None:
        scope = self._site.scope
        if scope is None:
            return None
        at_return = self._site.kind is ProbeKind.RETURN
        for variable, place in self._variables(scope):
            if variable.name != name:
                continue
            if at_return and not self._entry:
                raise SpecError(
                    f"where `{name}` was kept holds something else when the function returns",
                    suggestions=[f"entry({name})"],
                )
            return self._seen(name, Thing(self._types.of(variable.type), place()))
        return None

    def _variables(self, scope: Scope) -> list[tuple[Variable, Callable[[], Place]]]:
        """Returns what can be named, and where it is."""
        site = self._site
        by_abi: dict[str, Place] = {}
        if scope.entry and not site.go and scope.function.language != "go" and not _is_clone(site.symbol):
            by_abi = self._by_abi(scope.function)

        def where(variable: Variable) -> Callable[[], Place]:
            known = by_abi.get(variable.name) if variable.parameter else None
            if known is not None and variable.location.kind != "register":
                return lambda: known
            return lambda: of_location(variable.location, site.vaddr)

        ordered = (*scope.variables, *scope.function.parameters) if not scope.inlined_into else scope.variables
        return [(v, where(v)) for v in ordered]

    def _by_abi(self, function: Function) -> dict[str, Place]:
        types = [None if v.type is None else self._types.of(v.type) for v in function.parameters]
        references = [
            t is not None and function.language == "c++" and _by_reference(t, v, self._types)
            for t, v in zip(types, function.parameters, strict=True)
        ]
        returned = None if function.returns is None else self._types.of(function.returns)
        hidden = returned is not None and (
            abi.in_memory(returned, self._type_of, function.language)
            or (function.language == "c++" and _never_copied(returned, self._types))
        )
        places = abi.arguments(types, self._type_of, function.language, references, hidden=hidden)
        return {v.name: place for v, place in zip(function.parameters, places, strict=True) if v.name}

    def _type_of(self, ref: TypeRef) -> Type:
        return self._types.of(ref)

    def _argument(self, n: int) -> Operand:
        site = self._site
        if site.arguments is not None:
            if n >= len(site.arguments):
                raise SpecError(f"the USDT probe has {len(site.arguments)} arguments, from `arg0` on")
            type_, location = site.arguments[n]
            return Plain(
                kind_of_number(type_), self._unless_hidden(number(Thing(type_, of_location(location, site.vaddr))))
            )
        registers = GO_REGISTERS if site.go else ARGUMENT_REGISTERS
        if n < len(registers):
            return Plain("u64", self._unless_hidden(Register(registers[n])))
        if not site.entry or site.go:
            raise SpecError(f"`arg{n}` is passed on the stack, and known at a function's first instruction alone")
        return Plain("u64", self._unless_hidden(Load(Register("rsp"), 8 * (n - len(registers) + 1), 8)))

    def _unless_hidden(self, word: Value) -> Value:
        """Returns a word, or nothing where debug information says that it is a value that must not be seen."""
        scope = self._site.scope
        if self._site.kind is ProbeKind.RETURN and not self._entry and word in self._hidden_result():
            return Missing(ValueStatus.REDACTED)
        # (Also at a return: what a short function was given is often there still.)
        for variable, where in self._variables(scope) if scope is not None else ():
            known = self._types.of(variable.type)
            if self._site.redact({variable.name, known.name, known.alias} - {""}):
                place = where()
                if isinstance(place, Memory):
                    held = isinstance(word, Load) and (place.base, place.offset) == (word.base, word.offset)
                else:
                    held = any(one == word for _, _, one in place.words)
                if held:
                    return Missing(ValueStatus.REDACTED)
        return word

    def _hidden_result(self) -> list[Value]:
        """Returns the registers of a result that must not be seen."""
        scope = self._site.scope
        if scope is None or scope.function.returns is None:
            return [Register(RESULT_REGISTER)] if self._site.redact(("retval",)) else []
        type_ = self._types.of(scope.function.returns)
        if not self._site.redact({"retval", type_.name, type_.alias} - {""}):
            return []
        place = abi.result(type_, self._type_of, scope.function.language)
        return [] if isinstance(place, Memory) else [word for _, _, word in place.words]

    def _retval(self) -> Operand:
        scope = self._site.scope
        if self._site.redact(("retval",)):
            return Plain("u64", Missing(ValueStatus.REDACTED))
        if scope is None or scope.function.returns is None:
            return Plain("u64", Register(RESULT_REGISTER))
        type_ = self._types.of(scope.function.returns)
        language = scope.function.language
        if language == "c++" and _never_copied(type_, self._types):
            return Thing(type_, Memory(Register(RESULT_REGISTER)))
        return self._seen("", Thing(type_, abi.result(type_, self._type_of, language)))

    def _context(self, name: str) -> Operand:
        if name in _AT_HIT:
            return Plain("str" if name in _TEXTS else "u64", Context(name))
        if name == "caller":
            raise SpecError(_ALONE, hint="capture `caller` as it is")
        if name == "errno":
            if self._site.errno is None:
                raise Unsupported(
                    f"`errno` is known in the functions of the C library, and not in {self._site.module}",
                    hint="probe the function that sets it, at its return: `ur:libc.so.6:open {retval, errno}`",
                    reason="NoErrno",
                )
            return Thing(_INT, self._site.errno)
        if name in _NOT_YET:
            raise Unsupported(
                f"not in this release: the value `{name}`", hint=_NOT_YET[name], reason="NotInThisRelease"
            )
        known = self._site.constants.get(name)
        if known is None:
            raise NoDebugInfo(
                f"`{name}` of this place is not known: {self._site.module} has no debug information for it"
            )
        return _constant(known if isinstance(known, int) else known.encode())

    def _register(self, name: str) -> Operand:
        if XMM.fullmatch(name):
            return Plain("f64", Bits(self._unless_hidden(Xmm(int(name.removeprefix("xmm")))), 0, 64, "f"))
        if name not in REGISTERS:
            raise Unsupported(f"`reg.{name}` cannot be captured on x86-64", reason="Operand")
        return Plain("u64", self._unless_hidden(Register(name)))

    def _unknown(self, name: str) -> TraplineError:
        site = self._site
        if name == "NULL":
            return SpecError("no `NULL` in the language", suggestions=["0"])
        there = [v.name for v, _ in self._variables(site.scope) if v.name] if site.scope else []
        if site.debug is None:
            hint = f"install the debug information of {site.module}, or write arg0 to arg5"
            if (register := register_named(name)) != "":
                hint = f"the register is `reg.{register}`"
            return NoDebugInfo(
                f"{site.module} has no debug information, so that `{name}` says nothing",
                hint=hint,
                reason="NoDebugInfo",
            )
        near = difflib.get_close_matches(name, dict.fromkeys((*there, *CONTEXT)), cutoff=0.5)
        if register := register_named(name):
            near.append(f"reg.{register}")
        where = site.scope.function.name if site.scope else site.symbol
        hint = f"there are {', '.join(dict.fromkeys(there))}" if there else "no variable is known there"
        return NotFound(f"no `{name}` in {where or site.module}", suggestions=near, hint=hint)

    # --- calls

    def _call(self, function: str, arguments: tuple[Tree, ...]) -> Operand:
        here = self._at
        if function == "entry":
            return self._entered(arguments[0])
        if function == "ustack":
            raise SpecError(_ALONE, hint="capture `ustack()` as it is")
        if function == "sym":
            raise SpecError("a symbol is captured whole: nothing can be computed of it", hint="compare the address")
        if function == "ip" and not arguments:
            return Plain("u64", Here(0))
        operands = [self._operand(a) for a in arguments]
        match function:
            case "ip":
                self._at = arguments[0].at
                return Plain("str", self._internet(operands[0]))
            case "str":
                limit = DEFAULT_STRING_BYTES
                if len(operands) == 2 and isinstance(arguments[1], Constant):
                    limit = int(arguments[1].value)
                self._at = arguments[0].at
                return Plain("str", self._text(operands[0], limit, says=True))
            case "buf":
                self._at = arguments[1].at
                size = self._integer(operands[1])
                limit = size.value if isinstance(size, Const) and isinstance(size.value, int) else MAX_STRING_BYTES
                self._at = arguments[0].at
                return Plain("bytes", Bytes(self._address(operands[0]), size, max(1, min(limit, MAX_STRING_BYTES))))
            case "len":
                return self._length(operands[0])
            case "startswith" | "endswith":
                second = self._text(operands[1], MAX_STRING_BYTES, says=True)
                enough = MAX_STRING_BYTES
                if function == "startswith" and isinstance(second, Const) and isinstance(second.value, bytes):
                    enough = max(DEFAULT_STRING_BYTES, len(second.value))
                self._at = arguments[0].at
                return Plain("bool", Op(function, (self._text(operands[0], enough, says=True), second)))
            case "matches":
                pattern = arguments[1]
                assert isinstance(pattern, Constant)
                assert isinstance(pattern.value, bytes)
                self._at = pattern.at
                steps(pattern.value, 0)  # whether it is one is said first
                self._at = arguments[0].at
                subject = self._text(operands[0], MAX_STRING_BYTES, says=True)
                self._at = pattern.at
                self._steps += steps(pattern.value, subject.limit if isinstance(subject, Text) else MAX_STRING_BYTES)
                if self._steps > _MAX_STEPS:
                    raise SpecError(
                        "looking for this in so long a text may stop the thread for too long",
                        hint="a shorter pattern, or less of the text: `matches(str(p, 200), ...)`",
                        reason="Regex",
                    )
                return Plain("bool", Op("matches", (subject, Const(pattern.value))))
            case "cast":
                wanted = arguments[1]
                assert isinstance(wanted, Constant)
                assert isinstance(wanted.value, bytes)
                self._at = wanted.at
                type_ = self._types.named(wanted.value.decode(errors="replace"))
                self._at = arguments[0].at
                if not is_scalar(type_):
                    raise SpecError(f"a value is cast to a number or a pointer, not to {described(type_)}")
                return of_word(self._integer(operands[0]), type_)
        self._at = arguments[0].at
        base, offset = split(self._address(operands[0]))
        self._at = here
        letter, size_ = function[0], _SIZES[function[1:]]
        kind = {"u": "u64", "i": "i64", "f": "f64"}[letter]
        return Plain(kind, Load(base, offset, size_, letter))

    def _entered(self, tree: Tree) -> Operand:
        self._entry = True
        try:
            operand = self._operand(tree)
        finally:
            self._entry = False
        if _uses(operand.value if isinstance(operand, Plain) else operand.place, Context):
            raise SpecError(
                "what a hit knows is captured as it is: of the entry only what the program has there can be asked",
                hint="write it without `entry(...)`",
            )
        if isinstance(operand, Plain):
            if _uses(operand.value, Xmm):
                raise Unsupported(
                    "not in this release: a floating-point argument at the return", reason="NotInThisRelease"
                )
            return Plain(operand.kind, entry(operand.value))
        if _uses(operand.place, Xmm):
            raise Unsupported("not in this release: a floating-point argument at the return", reason="NotInThisRelease")
        if is_scalar(operand.type):
            return Thing(operand.type, in_word(entry(number(operand))), before=operand)
        return replace(operand, place=entered(operand.place), before=operand)

    def _length(self, operand: Operand) -> Operand:
        if isinstance(operand, Thing) and (known := length(operand, self._types)) is not None:
            return Plain("i64", known)
        return Plain("u64", Op("len", (self._text(operand, MAX_STRING_BYTES, says=True),)))

    # --- operations

    def _operation(self, op: str, trees: tuple[Tree, ...]) -> Operand:
        here = self._at
        if op in ("all", "any", "not"):
            truths = tuple(self._truth(self._operand(t)) for t in trees)
            return Plain("bool", Op(op, truths))
        if op == "if":
            return self._choice(trees)
        operands = [self._operand(t) for t in trees]
        if op in ("in", "notin"):
            self._at = here
            texts = [self._text(o, MAX_STRING_BYTES, says=True) for o in operands]
            found: Value = Op("in", (texts[0], texts[1]))
            return Plain("bool", found if op == "in" else Op("not", (found,)))
        if op in ("eq", "ne", "lt", "le", "gt", "ge"):
            self._at = here
            return Plain("bool", Op(op, self._compared(operands[0], operands[1])))
        if op in ("neg", "pos", "invert"):
            kind, value = self._number(operands[0])
            if op == "invert" and kind == "f64":
                raise SpecError("`~` is of integers")
            if op == "pos":
                return Plain(kind, value)
            return Plain("f64" if kind == "f64" else "i64", Op(op, (value,)))
        left, right = operands
        if (moved := self._moved(op, left, right)) is not None:
            return moved
        self._at = trees[0].at
        (left_kind, left_value) = self._number(left)
        self._at = trees[1].at
        (right_kind, right_value) = self._number(right)
        self._at = here
        kinds = (left_kind, right_kind)
        if op in ("and", "or", "xor", "shl", "shr") and "f64" in kinds:
            raise SpecError("this operator is of integers")
        if op == "div" or "f64" in kinds:
            kind = "f64"
        elif op == "sub" or "i64" in (kinds[:1] if op in ("shl", "shr") else kinds):
            kind = "i64"
        else:
            kind = "u64"
        return Plain(kind, Op(op, (left_value, right_value)))

    def _moved(self, op: str, left: Operand, right: Operand) -> Operand | None:
        """Pointer arithmetic, in units of what is pointed to, as in C; None where it is none."""
        if op == "add" and isinstance(right, Thing) and right.type.kind in ("pointer", "array"):
            left, right = right, left
        if op not in ("add", "sub") or not isinstance(left, Thing) or left.type.kind not in ("pointer", "array"):
            return None
        target = self._types.of(left.type.target)
        if isinstance(right, Thing) and right.type.kind in ("pointer", "array"):
            size = max(1, target.size)
            apart = Op("sub", (self._address(left), self._address(right)))
            return Plain("i64", Op("floordiv", (apart, Const(size))) if size > 1 else apart)
        if not target.size and target.kind != "void":
            raise SpecError(f"{described(target)} is only declared: its size is not known")
        kind, steps = self._number(right)
        if kind == "f64":
            raise SpecError("a pointer is moved by integers")
        size = max(1, target.size)
        base = self._address(left)
        pointer = left.type if left.type.kind == "pointer" else self._types.pointer_to(target)
        if isinstance(steps, Const) and isinstance(steps.value, int):
            return of_word(add(base, steps.value * size * (1 if op == "add" else -1)), pointer)
        far = Op("mul", (steps, Const(size)))
        return of_word(Op("address", (Op(op, (base, far)),)), pointer)

    def _compared(self, left: Operand, right: Operand) -> tuple[Value, Value]:
        if isinstance(right, Thing) and not isinstance(left, Thing):
            first, second = self._compared(right, left)
            return second, first
        if _is_text(right) and isinstance(left, Thing) and left.type.kind == "enum":
            assert isinstance(right, Plain)
            wanted = right.value.value if isinstance(right.value, Const) else None
            known = {name.encode(): n for name, n in left.type.enumerators}
            if not isinstance(wanted, bytes):
                raise SpecError("an enumerator is compared with a quoted name, or with a number")
            if wanted not in known:
                near = difflib.get_close_matches(wanted.decode(errors="replace"), [n for n, _ in left.type.enumerators])
                raise NotFound(f"{described(left.type)} has no such name", suggestions=[f"'{n}'" for n in near])
            return number(left), Const(known[wanted])
        if isinstance(left, Thing) and is_character(left.type) and (letter := _letter_of(right)) is not None:
            return number(left), Const(letter)
        if _is_text(left) or _is_text(right):
            # One byte more than the other has is enough to know.
            fixed = [o.value.value for o in (left, right) if isinstance(o, Plain) and isinstance(o.value, Const)]
            enough = max((len(v) + 1 for v in fixed if isinstance(v, bytes)), default=0)
            limit = min(MAX_STRING_BYTES, max(DEFAULT_STRING_BYTES, enough))
            return self._text(left, limit), self._text(right, limit)
        return self._number(left)[1], self._number(right)[1]

    def _choice(self, trees: tuple[Tree, ...]) -> Operand:
        here = self._at
        test = self._truth(self._operand(trees[0]))
        then_kind, then = self._shown(self._operand(trees[1]))
        other_kind, other = self._shown(self._operand(trees[2]))
        self._at = here
        kind = unified(then_kind, other_kind)
        if kind is None:
            raise SpecError(f"one value is a {_in_words(then_kind)}, the other a {_in_words(other_kind)}")
        return Plain(kind, Op("if", (test, then, other)))

    # --- as what it is used

    def _shown(self, operand: Operand) -> tuple[str, Value]:
        if isinstance(operand, Plain):
            return operand.kind, operand.value
        return self._word(operand) if self._site.words else shown(operand, self._types)

    def _word(self, thing: Thing) -> tuple[str, Value]:
        """Returns what is in the register or the memory, whatever it means; of what is no word, where it is."""
        if thing.before is not None:
            kind, value = self._word(thing.before)
            return kind, entry(value)
        if is_scalar(thing.type):
            kind = kind_of_number(thing.type)
            return ("u64", Missing(ValueStatus.UNSUPPORTED)) if kind == "f64" else (kind, number(thing))
        return "u64", thing.place.address() or Missing(ValueStatus.UNSUPPORTED)

    def _number(self, operand: Operand) -> tuple[str, Value]:
        if isinstance(operand, Thing):
            if operand.type.kind == "reference":
                operand = followed(operand, self._types)
            if operand.type.kind == "array":
                return "u64", self._address(operand)
            operand = smart(operand, self._types) or operand
            if not is_scalar(operand.type):
                raise SpecError(f"{described(operand.type)} is no number")
            return kind_of_number(operand.type), number(operand)
        if operand.kind not in _NUMBERS:
            raise SpecError(f"a number belongs here, and this is a {_in_words(operand.kind)}")
        return operand.kind, operand.value

    def _integer(self, operand: Operand) -> Value:
        kind, value = self._number(operand)
        if kind == "f64":
            raise SpecError("an integer belongs here, and this is a floating-point number")
        return value

    def _address(self, operand: Operand) -> Value:
        """Returns an address: of a pointer where it points to, of an array or a struct where it is."""
        if isinstance(operand, Thing):
            operand = smart(operand, self._types) or operand
        if isinstance(operand, Thing) and operand.type.kind not in ("base", "enum", "pointer", "reference"):
            place = operand.place
            if isinstance(place, Memory):
                return place.address()
            raise SpecError(f"{described(operand.type)} is in registers there: it has no address")
        return self._integer(operand)

    def _internet(self, operand: Operand) -> Value:
        """Returns the text of an internet address: by the type, or of what has none by the family that a sockaddr has."""
        if isinstance(operand, Thing):
            outer = followed(operand, self._types)
            place, size = outer.place, outer.type.size
            if outer.type.kind == "base" and size == 4:
                return Op("ip", (number(outer),))
            if outer.type.name == "in_addr" and not isinstance(place, Memory):
                return Op("ip", (place.fetch(4, "u"),))
            if (
                isinstance(place, Memory)
                and (outer.type.kind == "array" or outer.type.name in _INTERNET)
                and size in (4, 16)
            ):
                return Op("ip", (Bytes(place.address(), Const(size), size),))
            if isinstance(place, Memory) and outer.type.name.startswith("sockaddr"):
                return _sockaddr(place)
            if operand.type.kind == "pointer" and outer.type.kind == "void":
                return _sockaddr(Memory(number(operand)))
            raise SpecError(
                f"{described(outer.type)} is no internet address",
                hint="of the 4 or 16 bytes at an address: `ip(buf(p, 4))`",
            )
        if operand.kind in ("str", "bytes"):
            return Op("ip", (operand.value,))
        if isinstance(operand.value, Load) and operand.value.size == 4:
            return Op("ip", (operand.value,))
        return _sockaddr(Memory(*split(self._integer(operand))))

    def _text(self, operand: Operand, limit: int, *, says: bool = False) -> Value:
        if isinstance(operand, Plain):
            if operand.kind in ("str", "bytes"):
                return operand.value
            if says and operand.kind in ("u64", "i64"):
                return Text(operand.value, limit)
            raise SpecError(f"a text belongs here, and this is a {_in_words(operand.kind)}")
        found = text(operand, self._types, limit)
        if found is not None:
            return found
        if operand.type.kind == "enum":
            return Names(number(operand), tuple((n, name.encode()) for name, n in operand.type.enumerators))
        if says and operand.type.kind in ("pointer", "array"):
            return Text(self._address(operand), limit)
        if says and is_scalar(operand.type) and kind_of_number(operand.type) == "u64" and operand.type.size == 8:
            return Text(number(operand), limit)
        raise SpecError(f"{described(operand.type)} is no text")

    def _truth(self, operand: Operand) -> Value:
        if isinstance(operand, Plain):
            if operand.kind == "bool":
                return operand.value
            zero: bool | int | float | bytes = b"" if operand.kind in ("str", "bytes") else 0
            return Op("ne", (operand.value, Const(zero)))
        if is_scalar(operand.type) or smart(operand, self._types) is not None:
            kind, value = self._number(operand)
            return value if kind == "bool" else Op("ne", (value, Const(0)))
        return Op("ne", (self._text(operand, 1), Const(b"")))


def _sendable(kind: str, value: Value) -> tuple[str, Value]:
    """Returns them, where all numbers in the value are of 64 bits."""
    if fits(value):
        try:
            msgspec.msgpack.encode(value)
        except OverflowError:
            raise SpecError("it leads to an offset that does not fit 64 bits") from None
    return kind, value


def unified(one: str, other: str) -> str | None:
    """Returns the column type that holds values of both; None where there is none."""
    if one == other:
        return one
    kinds = {one, other}
    if kinds <= {"u64", "i64", "bool"}:
        return "i64" if "i64" in kinds else "u64"
    if kinds <= set(_NUMBERS):
        return "f64"
    return None


def _sockaddr(place: Memory) -> Value:
    """Returns the text of the address in a sockaddr: the family says how much of it there is (ip(7), ipv6(7))."""
    is_v4 = Op("eq", (place.fetch(2, "u"), Const(socket.AF_INET)))
    size = Op("if", (is_v4, Const(_SOCKADDR_IN), Const(_SOCKADDR_IN6)))
    return Op("sockaddr", (Bytes(place.address(), size, _SOCKADDR_IN6),))


def _constant(value: bool | int | float | bytes) -> Plain:
    if isinstance(value, bool):
        return Plain("bool", Const(value))
    if isinstance(value, int):
        return Plain("i64" if value < 0 else "u64", Const(value))
    return Plain("f64" if isinstance(value, float) else "str", Const(value))


def _in_words(kind: str) -> str:
    return {"str": "text", "bytes": "buffer", "bool": "truth value", "f64": "floating-point number"}.get(kind, "number")


def _is_text(operand: Operand) -> bool:
    return isinstance(operand, Plain) and operand.kind in ("str", "bytes")


def _letter_of(operand: Operand) -> int | None:
    """Returns the number of a text of one byte, to compare a character with."""
    if isinstance(operand, Plain) and isinstance(operand.value, Const) and isinstance(operand.value.value, bytes):
        return operand.value.value[0] if len(operand.value.value) == 1 else None
    return None


def _is_clone(symbol: str) -> bool:
    return any(mark in symbol for mark in _CLONES)


_NEVER_COPIED = (
    "basic_string<", "vector<", "map<", "set<", "list<", "deque<", "function<", "unique_ptr<", "shared_ptr<", "any",
    "unordered_", "basic_ostringstream<", "thread", "path", "string",
)  # fmt: skip


def _never_copied(type_: Type, types: Types) -> bool:
    """Whether a C++ class has a destructor or a constructor of its own that the ABI heeds (Itanium C++ ABI, 3.1.1), as far
    as that can be told: the standard library's, and what has one of these as a member."""
    if type_.kind not in ("class", "struct"):
        return False
    for i, (member, _) in enumerate(((None, 0), *members(type_, types))):
        one = type_ if member is None else types.of(member.type)
        if i > 64 or one.kind not in ("class", "struct"):
            continue
        name = (one.name or one.alias).removeprefix("std::").removeprefix("__cxx11::").removeprefix("__1::")
        if name.startswith(_NEVER_COPIED) and "basic_string_view" not in name:
            return True
        if any(m.name.startswith("_vptr") for m in one.members):
            return True
    return False


def _by_reference(type_: Type, variable: Variable, types: Types) -> bool:
    """Whether a C++ parameter is passed by a pointer that is not written in the source."""
    if type_.kind not in ("class", "struct"):
        return False
    if _never_copied(type_, types):
        return True
    ops = variable.location.ops
    return variable.location.kind == "memory" and bool(ops) and ops[-1][0] == "deref"


def _values(operand: Operand) -> list[Value]:
    """Returns what an operand, or its place, is computed of."""
    if isinstance(operand, Plain):
        return [operand.value]
    place = operand.place
    return [place.base] if isinstance(place, Memory) else [word for _, _, word in place.words]


def _uses(value: object, kind: type) -> bool:
    """Whether a fetch of some kind is anywhere in a value or a place."""
    if isinstance(value, kind):
        return True
    if isinstance(value, tuple):
        return any(_uses(one, kind) for one in value)
    fields = getattr(value, "__struct_fields__", ()) or getattr(value, "__dataclass_fields__", ())
    return any(_uses(getattr(value, name), kind) for name in fields)
