"""From a probe's text to plans: which instructions of which files, what is fetched there, in which processes.

Nothing is armed here, and no process is stopped. All methods read files and /proc and may take a while: call them in a
worker thread. Several may run at once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace

import msgspec

from trapline.errors import NoDebugInfo, NotFound, PermissionDenied, ResolveError, TraplineError, Unsupported
from trapline.model import (
    HostResolution,
    Module,
    PointKind,
    ProbeKind,
    ProbeSpec,
    ResolvedSite,
    Symbol,
    SymbolPage,
    Target,
    TargetState,
)
from trapline.spec import place_of, require_supported
from trapline_agent.arch.x86_64.calls import GO_CHECK_BYTES, go_body
from trapline_agent.arch.x86_64.stepping import plan_step
from trapline_agent.capture.compiler import Site
from trapline_agent.capture.program import compiled, explicit, merged, needs_scope
from trapline_agent.debuginfo.model import DebugInfo
from trapline_agent.objects import Finder, FoundFile, scan
from trapline_agent.plans import FetchPlan, FileKey, Program, SitePlan
from trapline_agent.symbols.boundaries import MAX_DECODED, instruction_over
from trapline_agent.symbols.index import IndexCache, SymbolAt, SymbolIndex
from trapline_agent.targets.process import (
    ProcessFacts,
    facts,
    ineligible,
    is_32_bit,
    ppids,
    require_process,
    text,
    thirty_two_bit,
)
from trapline_agent.targets.selector import Selector, with_numbers

MAX_SITES = 1000
MAX_TARGETS = 1000
_CODE_BYTES = 15
_BACK_BYTES = 4096
"""Where nothing says where a function begins, decoding so far before an offset is in step long before it is reached."""
_SEARCH_S = 6.0
"""Seconds after which a look into all files ends with what it has; what was read is remembered for the next."""
_LOADER_HOOK = "_dl_debug_state"
_LOADER_NAMES = ("ld-linux", "ld-musl", "ld-2.")
_C_LIBRARY_NAMES = ("libc.so", "libc-2.", "libc.musl", "ld-musl")
_UNWINDERS = ("longjmp", "_longjmp", "siglongjmp", "__longjmp_chk")
_LOADERS = ("/lib64/ld-linux-x86-64.so.2", "/lib/ld-musl-x86_64.so.1")


@dataclass
class Plan:
    """What a probe means on this host now."""

    sites: list[str] = field(default_factory=list)
    """Labels: ``libc.so.6:malloc``; ``SitePlan.site`` counts in them."""
    plans: list[SitePlan] = field(default_factory=list)
    """What can be armed."""
    fetches: list[FetchPlan] = field(default_factory=list)
    where: dict[str, str] = field(default_factory=dict)
    """The selector as the tracer takes it: about processes only, users as numbers."""
    watch: list[str] = field(default_factory=list)
    """Basenames under which further files that are meant may be mapped."""
    resolved: list[ResolvedSite] = field(default_factory=list)
    """Every site, those that are refused too."""
    notes: list[str] = field(default_factory=list)
    """What was left out, in sentences."""
    files: dict[FileKey, FoundFile] = field(default_factory=dict)
    """The files that ``plans`` are about, and who maps them."""


@dataclass(frozen=True)
class _Place:
    """One instruction that is asked for: an offset, and the symbol it is told by."""

    offset: int
    symbol: SymbolAt | None = None
    error: TraplineError | None = None
    go: bool = False
    """It is behind the stack check of a Go function."""

    @property
    def symbol_offset(self) -> int:
        return self.offset - self.symbol.offset if self.symbol else 0

    @property
    def label(self) -> str:
        if self.symbol is None:
            return f"0x{self.offset:x}"
        return f"{self.symbol.name}+0x{self.symbol_offset:x}" if self.symbol_offset else self.symbol.name


class Resolver:
    """Resolves probes and answers questions about this host; keeps the symbols of the files it has read."""

    def __init__(
        self,
        host_id: str,
        host_name: str,
        self_pids: Collection[int],
        tracer_pid: int,
        *,
        debug: Callable[[FoundFile], DebugInfo | None] = lambda file: None,
        redact: Callable[[Collection[str]], bool] | None = None,
    ) -> None:
        """
        Args:
            host_id: the host's id, for answers.
            host_name: its name, for messages.
            self_pids: Trapline's own processes here; looked at anew at each call, so the caller may add to it.
            tracer_pid: the tracer, whose tracees can be probed; an attribute, since another tracer may take its place.
            debug: finds a file's debug information.
            redact: whether what has one of these names, or is of such a type, must not be captured.
        """
        self._host_id = host_id
        self._host_name = host_name
        self._self_pids = self_pids
        self.tracer_pid = tracer_pid
        self._debug = debug
        self._redact = redact
        self._finder = Finder(host_name, IndexCache())

    # --- probes

    def resolve(self, spec: ProbeSpec) -> Plan:
        """Returns what a probe means now.

        Raises:
            NotFound, Ambiguous, ResolveError: nothing on this host is meant.
            Unsupported, PermissionDenied: something is, but no part of it can be probed.
        """
        plan = self._plan(spec)
        if not plan.plans:
            raise _first_refusal(plan)
        if "pid" in plan.where and (chosen := facts(int(plan.where["pid"]))) is not None:
            # What may not even be looked at can never be armed; other refusals the tracer tells of, and they may pass.
            refused = self._refusal(chosen)
            if refused is not None and refused[0] == "PermissionDenied":
                raise PermissionDenied(refused[1], reason="PermissionDenied")
        return plan

    def resolve_dry(self, spec: ProbeSpec) -> HostResolution:
        """Returns what a probe would do now; what is wrong is in ``error``."""
        try:
            plan = self._plan(spec)
        except TraplineError as e:
            return HostResolution(host=self._host_id, error=e.to_wire())
        answer = HostResolution(
            host=self._host_id, sites=plan.resolved, targets=self._targets(spec, plan), notes=plan.notes
        )
        if not plan.plans:
            answer.error = _first_refusal(plan).to_wire()
        return answer

    def _plan(self, spec: ProbeSpec) -> Plan:
        require_supported(spec)
        plan = Plan(where=with_numbers(spec.where, self._host_name))
        for key in ("pid", "tree"):
            if key in plan.where:
                require_process(int(plan.where[key]), self._host_name)
        if spec.object == "*" and spec.point.kind is PointKind.OFFSET:
            raise Unsupported(
                "an offset needs one file", hint="name a program or a library instead of `*`", reason="NoFile"
            )
        files = self._files(spec, plan.where)
        plan.watch = sorted({text(os.path.basename(spec.object)), *(f.name for f in files)} - {"*"})
        if spec.object.startswith("buildid="):
            plan.watch = sorted({f.name for f in files})
        errors: list[TraplineError] = []
        deadline = time.monotonic() + _SEARCH_S
        for i, file in enumerate(files):
            if spec.object == "*" and time.monotonic() > deadline:
                plan.notes.append(f"{len(files) - i} of {len(files)} files were not looked at yet")
                break
            try:
                self._add_file(plan, spec, file)
            except TraplineError as e:
                errors.append(e)
        if not plan.resolved:
            raise self._nothing(spec, files, errors)
        return plan

    def _files(self, spec: ProbeSpec, where: dict[str, str]) -> list[FoundFile]:
        """Returns the files that may be meant, preferring those of the one process that is selected."""
        if "pid" in where:
            own = scan([int(where["pid"])])
            if spec.object == "*":
                return self._finder.find("*", own)
            try:
                files = [f for f in self._finder.find(spec.object, own) if f.mappings]
            except TraplineError:
                files = []
            if files:
                return files
        mapped = scan()
        if spec.object == "*":
            others = [f for f in mapped.values() if any(pid not in self._self_pids for pid in f.mappings)]
            return sorted(others, key=lambda f: -len(f.mappings))
        return self._finder.find(spec.object, mapped)

    def _nothing(self, spec: ProbeSpec, files: list[FoundFile], errors: list[TraplineError]) -> TraplineError:
        """Returns the error for a probe that means no place in any file."""
        if spec.object == "*":
            near = list(dict.fromkeys(s for e in errors if isinstance(e, NotFound) for s in e.suggestions))
            return NotFound(
                f"no symbol `{spec.point.value}` in the {len(files)} files that are mapped on {self._host_name}",
                suggestions=near[:5],
            )
        # That a symbol is missing says more than that another file of the name could not be read.
        errors.sort(key=lambda e: not isinstance(e, NotFound))
        return errors[0] if errors else NotFound(f"nothing on {self._host_name} is meant by `{spec.text}`")

    def _add_file(self, plan: Plan, spec: ProbeSpec, file: FoundFile) -> None:
        with file.open() as fd:
            index = self._finder.index(file, fd)
            places = _places(spec, index, _shown(spec, file))
            if spec.kind is ProbeKind.RETURN:
                places = (_entry(fd, index, place, _shown(spec, file)) for place in places)
            for place in places:
                if len(plan.resolved) >= MAX_SITES:
                    note = f"more than {MAX_SITES} places match; the rest is left out"
                    if note not in plan.notes:
                        plan.notes.append(note)
                    break
                self._add_place(plan, file, fd, index, place, _shown(spec, file), spec)

    def _add_place(
        self,
        plan: Plan,
        file: FoundFile,
        fd: int,
        index: SymbolIndex,
        place: _Place,
        module: str,
        spec: ProbeSpec | None = None,
    ) -> None:
        site = ResolvedSite(
            module=text(file.path),
            build_id=index.build_id,
            symbol=place.symbol.name if place.symbol else "",
            symbol_offset=place.symbol_offset,
            offset=place.offset,
        )
        plan.resolved.append(site)
        try:
            if place.error is not None:
                raise place.error
            segment = index.segment_at(place.offset)
            if segment is None:
                raise _not_executable(index, place.offset)
            _require_boundary(fd, index, place, module)
            code = _read(fd, index, place.offset, min(_CODE_BYTES, segment.end - place.offset))
            step = plan_step(code, place.offset - segment.offset + segment.vaddr)
            if index.is_relocated(place.offset, step.length):
                raise Unsupported(
                    f"the loader writes an address into `{step.text}` at {module}:{place.label} (text relocation), "
                    "so that it runs with other bytes than the file's",
                    reason="TextRelocation",
                    hint="probe another instruction of the function, or a build with -fPIC",
                )
            computed = None if spec is None else self._computed(plan, spec, file, index, place, module)
        except TraplineError as e:
            site.refused = e.to_wire()
            return
        site.instruction, site.step = step.text, step.method
        if computed is not None:
            plan.fetches = computed[0]
        label = f"{module}:{place.label}"
        if label not in plan.sites:
            plan.sites.append(label)
        plan.files[file.key] = file
        plan.plans.append(
            SitePlan(
                site=plan.sites.index(label),
                file=file.key,
                path=text(file.path),
                offset=place.offset,
                code=code,
                slack_offset=segment.slack_offset,
                slack_len=segment.slack_len,
                go=place.go,
                program=computed[1] if computed is not None else None,
            )
        )

    def _computed(
        self, plan: Plan, spec: ProbeSpec, file: FoundFile, index: SymbolIndex, place: _Place, module: str
    ) -> tuple[list[FetchPlan], Program | None]:
        """Returns the probe's columns so far, and what is computed at a place. Raises TraplineError, with the place in the
        probe's text."""
        segment = index.segment_at(place.offset)
        debug, scope, unread = None, None, None
        if self._redact is not None or needs_scope(spec.captures, spec.condition, spec.kind):
            try:
                debug = self._debug(file)
                scope = None if debug is None else debug.scope(place.offset)
            except TraplineError as e:
                unread = e  # it matters only where something is called by its name
        symbol = place.symbol.name if place.symbol else ""
        constants: dict[str, str | int] = {"host": self._host_name, "func": symbol, "buildid": index.build_id}
        if scope is not None:
            constants |= {"file": scope.file or scope.function.file, "line": scope.line or scope.function.line}
            constants["func"] = scope.function.name or symbol
        is_go = place.go or (index.is_go and "." in symbol)
        try:
            fetches, program = compiled(
                spec.captures,
                spec.condition,
                Site(
                    module=module,
                    kind=spec.kind,
                    entry=scope.entry if scope is not None else place.symbol is not None and not place.symbol_offset,
                    go=is_go and not place.symbol_offset,
                    vaddr=place.offset + (segment.vaddr - segment.offset if segment else 0),
                    symbol=symbol,
                    scope=scope,
                    debug=debug,
                    constants=constants,
                    redact=self._redact or (lambda names: False),
                ),
            )
        except TraplineError as e:
            if isinstance(e, NoDebugInfo) and unread is not None:
                raise unread from e
            if e.text and e.position is not None:
                e.text, e.position = spec.text, place_of(spec, e.text) + e.position
            raise
        if not plan.plans or fetches == plan.fetches:
            return fetches, program
        columns = merged(plan.fetches, fetches)
        if columns != plan.fetches and _is_plain(plan.fetches):
            others = explicit(plan.fetches)
            plan.plans = [msgspec.structs.replace(p, program=p.program or others) for p in plan.plans]
        if columns != fetches and _is_plain(fetches):
            program = program or explicit(fetches)
        return columns, program

    # --- processes

    def _targets(self, spec: ProbeSpec, plan: Plan) -> list[Target]:
        """Returns the processes that are meant, map one of the files now, and whether each can be probed."""
        selector, parents = Selector(plan.where), ppids() if "tree" in plan.where else None
        targets: list[Target] = []
        seen: dict[int, tuple[ProcessFacts, tuple[str, str] | None]] = {}
        for site, file in ((p, plan.files[p.file]) for p in plan.plans):
            for pid, mappings in file.mappings.items():
                if pid not in seen:
                    found = facts(pid)
                    if found is None or not selector.matches(found, parents):
                        continue
                    seen[pid] = found, self._refusal(found)
                mapping = next((m for m in mappings if m.addr(site.offset) is not None), None)
                if mapping is None:
                    continue
                process, refused = seen[pid]
                if refused is None and (mapping.writable or mapping.shared):
                    refused = "WritableMapping", f"{site.path} is mapped writable or shared there ({mapping.prot})"
                target = _target(self._host_id, process, plan.sites[site.site], site, refused)
                target.addr = 0 if refused else mapping.addr(site.offset) or 0
                targets.append(target)
                if len(targets) == MAX_TARGETS:
                    plan.notes.append(f"more than {MAX_TARGETS} targets; the rest is left out")
                    return targets
        if "pid" in plan.where and not targets and plan.plans:
            chosen = facts(int(plan.where["pid"]))
            refused = self._refusal(chosen) if chosen else None
            if chosen and refused and selector.matches(chosen, parents):
                targets.append(_target(self._host_id, chosen, plan.sites[0], plan.plans[0], refused))
        if "pid" not in plan.where and all(t.reason == "Self" for t in targets):
            return []  # Trapline alone maps it: nobody asked for that, and others may come
        return targets

    def _refusal(self, process: ProcessFacts) -> tuple[str, str] | None:
        refused = ineligible(process, self._self_pids, self.tracer_pid)
        if refused is None and is_32_bit(process.pid):
            return thirty_two_bit(process.pid)
        return refused

    # --- questions

    def search_symbols(self, module: str, q: str, limit: int) -> SymbolPage:
        """Looks for symbols by part of their name.

        Args:
            module: as a probe's object; empty or ``*``: all files that processes other than Trapline's map.
            q: part of a name.
            limit: most symbols to return.

        Raises:
            NotFound, Ambiguous, ResolveError, PermissionDenied: there is no such file, or it cannot be read.
        """
        mapped = scan()
        if module in ("", "*"):
            files = [f for f in mapped.values() if any(pid not in self._self_pids for pid in f.mappings)]
            files.sort(key=lambda f: -len(f.mappings))
        else:
            files = self._finder.find(module, mapped)
        deadline = time.monotonic() + _SEARCH_S
        best: list[tuple[tuple[int, int, str], Symbol]] = []
        total = 0
        error: TraplineError | None = None
        note = ""
        for i, file in enumerate(files):
            if time.monotonic() > deadline:
                note = f"{len(files) - i} of {len(files)} files were not looked at yet; ask again, or name the file"
                break
            try:
                with file.open() as fd:
                    index = self._finder.index(file, fd)
            except TraplineError as e:
                error = error or e
                continue
            matches = index.search(q)
            total += len(matches)
            best += (((m.rank, m.length, m.name), _symbol(m.symbol, file, index)) for m in matches[:limit])
        if error is not None and len(files) == 1:
            raise error
        best.sort(key=lambda scored: scored[0])
        symbols = [symbol for _, symbol in best[:limit]]
        return SymbolPage(host=self._host_id, module=module, total=total, symbols=symbols, note=note)

    def modules(self, pid: int = 0) -> list[Module]:
        """Returns the files that a process (0: any but Trapline's own) maps executable, those of most processes first.

        Raises:
            NotFound: no such process.
            PermissionDenied: it may not be looked at.
        """
        if pid:
            process = require_process(pid, self._host_name)
            if process.hidden:
                raise PermissionDenied(f"process {pid} may not be looked at", hint="run the agent as root")
        found = scan([pid] if pid else None)
        modules = []
        for file in found.values():
            processes = [p for p in file.mappings if pid or p not in self._self_pids]
            if processes:
                modules.append(
                    Module(
                        path=text(file.path),
                        build_id=self._finder.identity(file)[1],
                        dev=file.key.dev,
                        inode=file.key.inode,
                        processes=len(processes),
                    )
                )
        return sorted(modules, key=lambda m: (-m.processes, m.path))

    def loaders(self) -> list[SitePlan]:
        """Returns where the dynamic loaders of this host report that they have mapped files, and where the C libraries'
        longjmp begins (``SitePlan.unwinds``)."""
        mapped = scan()
        files = {f.key: f for f in mapped.values() if f.name.startswith(_LOADER_NAMES)}
        for path in _LOADERS:
            try:
                files |= {f.key: f for f in self._finder.find(path, mapped)}
            except TraplineError:
                continue  # not on this host
        libraries = [f for f in mapped.values() if f.name.startswith(_C_LIBRARY_NAMES)]
        loaders, unwinders = Plan(), Plan()
        for plan, symbols, some in ((loaders, (_LOADER_HOOK,), files.values()), (unwinders, _UNWINDERS, libraries)):
            for file in some:
                try:
                    with file.open() as fd:
                        index = self._finder.index(file, fd)
                        for symbol in {s.offset: s for name in symbols for s in index.find(name)}.values():
                            self._add_place(plan, file, fd, index, _Place(symbol.offset, symbol), file.name)
                except TraplineError:
                    continue  # later mappings are found by the other hooks
        return loaders.plans + [msgspec.structs.replace(p, unwinds=True) for p in unwinders.plans]


# --- places in one file -----------------------------------------------------------------------------------------------


def _shown(spec: ProbeSpec, file: FoundFile) -> str:
    """Returns a file's short name: the one that was asked for, where a name was."""
    if spec.object == "*" or spec.object.startswith("buildid="):
        return file.name
    return text(os.path.basename(spec.object)) or file.name


def _places(spec: ProbeSpec, index: SymbolIndex, module: str) -> Iterator[_Place]:
    """Yields the places that a probe's point means in a file. Raises NotFound where it has none."""
    point = spec.point
    if point.kind is PointKind.OFFSET:
        symbol = index.at(point.offset)
        inside = symbol is not None and point.offset < index.end_of(symbol)
        yield _Place(point.offset, symbol if inside else None)
        return
    if point.kind is PointKind.GLOB:
        found = index.glob(point.value)
        if not found:
            raise NotFound(f"no symbol in {module} matches `{point.value}`")
    else:
        found = index.find(point.value)
        if not found:
            raise index.not_found(point.value, module)
    for symbol in found:
        yield _symbol_place(index, symbol, point.offset, module)


def _symbol_place(index: SymbolIndex, symbol: SymbolAt, offset: int, module: str) -> _Place:
    error: TraplineError | None = None
    size = index.end_of(symbol) - symbol.offset
    if symbol.ifunc:
        near = [s.name for s in index.glob(f"__{symbol.name}_*") if not s.ifunc and not s.name.endswith("_chk")]
        error = Unsupported(
            f"`{symbol.name}` in {module} is an indirect function: the code of that name only chooses the real one, once",
            hint="probe the implementation that is used on this processor",
            suggestions=sorted(near, key=len)[:5],
            reason="IndirectFunction",
        )
    elif offset and offset >= size:
        error = Unsupported(
            f"`{symbol.name}+0x{offset:x}` is beyond the end of `{symbol.name}`, which is 0x{size:x} bytes long",
            hint=f"for another place in {module} write its offset in the file: 0x{symbol.offset + offset:x}",
            reason="BeyondFunction",
        )
    return _Place(symbol.offset + offset, symbol, error)


def _entry(fd: int, index: SymbolIndex, place: _Place, module: str) -> _Place:
    """Returns the place where a return probe sees calls begin: a function's first instruction, where the return address is
    the word that the stack pointer leads to. In Go that is behind the stack check, which begins the function anew."""
    if place.error is not None:
        return place
    symbol = place.symbol
    if symbol is None:
        return place  # nothing says that it is not one: a stripped file
    if place.symbol_offset:
        error = Unsupported(
            f"{module}:{place.label} is inside of a function, and a return probe needs its first instruction",
            hint="a call's return address is where the stack pointer leads to only there",
            suggestions=[f"ur:{module}:{symbol.name}"],
            reason="NotAFunction",
        )
        return replace(place, error=error)
    check = 0
    if index.is_go:
        size = min(GO_CHECK_BYTES, max(0, index.end_of(symbol) - symbol.offset))
        check = go_body(_read(fd, index, place.offset, size))
    return replace(place, offset=place.offset + check, go=index.is_go)


def _read(fd: int, index: SymbolIndex, offset: int, size: int) -> bytes:
    try:
        return os.pread(fd, size, offset)
    except OSError as e:
        raise ResolveError(f"{index.path} cannot be read: {e.strerror}") from e


def _not_executable(index: SymbolIndex, offset: int) -> Unsupported:
    if offset >= index.size:
        why = f"it is beyond the end of the file, which is 0x{index.size:x} bytes long"
    else:
        spans = ", ".join(f"0x{s.offset:x} to 0x{s.end:x}" for s in index.segments) or "nowhere"
        why = f"code is at {spans}"
    return Unsupported(
        f"offset 0x{offset:x} of {index.path} is not in its code: {why}",
        hint="an offset is one in the file, not an address; `symbol+offset` is easier to get right",
        reason="NotExecutable",
    )


def _anchor(index: SymbolIndex, place: _Place) -> int:
    """Returns the nearest offset at or before a place where an instruction surely begins, or one from where decoding is
    in step in time."""
    segment = index.segment_at(place.offset)
    known = [start for start, size in index.code_sections if start <= place.offset < start + size]
    symbol = place.symbol or index.at(place.offset)
    if symbol is not None:
        known.append(symbol.offset)
    if index.entry is not None and index.entry <= place.offset:
        known.append(index.entry)
    start = max(known, default=segment.offset if segment else place.offset)
    return start if place.offset - start < MAX_DECODED else place.offset - _BACK_BYTES


def _require_boundary(fd: int, index: SymbolIndex, place: _Place, module: str) -> None:
    """Raises Unsupported where no instruction begins at a place."""
    if place.symbol is not None and not place.symbol_offset:
        return
    segment = index.segment_at(place.offset)
    to_addr = segment.vaddr - segment.offset if segment else 0
    start = _anchor(index, place)
    code = _read(fd, index, start, place.offset - start + _CODE_BYTES)
    over = instruction_over(code, start + to_addr, place.offset + to_addr)
    if over is None or over.addr == place.offset + to_addr:
        return
    begin = over.addr - to_addr
    near = [f"{module}:{_Place(o, place.symbol).label}" for o in (begin, begin + over.length)]
    raise Unsupported(
        f"{module}:{place.label} is in the middle of the instruction `{over.text}`",
        hint="a probe goes where an instruction begins",
        suggestions=near,
        reason="MidInstruction",
    )


# --- what is computed ---


def with_columns(plan: Plan, columns: list[FetchPlan]) -> Plan:
    """Returns a plan whose sites all fill these columns.

    Raises:
        Unsupported: its values are of other types.
    """
    own = plan.fetches
    if own == columns:
        return plan
    if _is_plain(columns) or [c.column for c in merged(columns, own)] != [c.column for c in columns]:
        raise Unsupported(
            "what the probe captures is of other types in files that have come since",
            hint="probe these files apart",
            reason="CaptureType",
        )
    plain = explicit(own) if _is_plain(own) else None
    plans = [msgspec.structs.replace(p, program=p.program or plain) for p in plan.plans]
    return replace(plan, plans=plans, fetches=columns)


def _is_plain(fetches: Iterable[FetchPlan]) -> bool:
    return all(f.register for f in fetches)


# --- answers ----------------------------------------------------------------------------------------------------------


def _first_refusal(plan: Plan) -> TraplineError:
    refused: Iterable[TraplineError] = (TraplineError.from_wire(s.refused) for s in plan.resolved if s.refused)
    return next(iter(refused))


def _target(host: str, process: ProcessFacts, label: str, site: SitePlan, refused: tuple[str, str] | None) -> Target:
    return Target(
        host=host,
        pid=process.pid,
        start_time=process.start_time,
        comm=process.comm,
        module=site.path,
        symbol=label.partition(":")[2],
        offset=site.offset,
        state=TargetState.REFUSED if refused else TargetState.ARMED,
        reason=refused[0] if refused else "",
        message=refused[1] if refused else "",
    )


def _symbol(symbol: SymbolAt, file: FoundFile, index: SymbolIndex) -> Symbol:
    return Symbol(
        name=symbol.name if symbol.default else f"{symbol.name}@{symbol.version}",
        module=text(file.path),
        build_id=index.build_id,
        offset=symbol.offset,
        size=symbol.size,
        bind=symbol.bind,
    )
