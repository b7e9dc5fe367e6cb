"""From a probe's text to plans: which instructions of which files, what is fetched there, in which processes.

Nothing is armed here, and no process is stopped. All methods read files and /proc and may take a while: call them in a
worker thread. Several may run at once.
"""

from __future__ import annotations

import functools
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace

import msgspec

from trapline.errors import (
    NoDebugInfo,
    NotFound,
    PermissionDenied,
    SpecError,
    TraplineError,
    Unsupported,
)
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
from trapline_agent.arch.x86_64.stepping import plan_step
from trapline_agent.capture import errno
from trapline_agent.capture.compiler import Site
from trapline_agent.capture.places import Memory
from trapline_agent.capture.program import (
    columns_of,
    compiled,
    explicit,
    lower_aggregate,
    merged,
    needs_scope,
    require_numbers,
)
from trapline_agent.debuginfo.model import DebugInfo, LinePlace
from trapline_agent.objects import Finder, FoundFile, scan
from trapline_agent.patterns import compile_pattern
from trapline_agent.plans import DEFAULT_MAX_KEYS, AggregatePlan, FetchPlan, FileKey, Program, SitePlan
from trapline_agent.points import (
    CODE_BYTES,
    Place,
    entry,
    inside,
    not_executable,
    read,
    require_boundary,
    symbol_places,
    usdt_arguments,
    usdt_places,
)
from trapline_agent.symbols.demangle import demangle, demangled
from trapline_agent.symbols.elf import ElfFile
from trapline_agent.symbols.index import IndexCache, Match, SymbolIndex
from trapline_agent.symbols.ranges import Range
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
_MAX_ALIASES = 20
_MAX_EXPORTERS = 200
"""Files that are asked for a symbol which another one imports."""
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
    aggregate: AggregatePlan | None = None
    """What becomes of hits in the place of rows."""
    where: dict[str, str] = field(default_factory=dict)
    """The selector as the tracer takes it: about processes only, users as numbers."""
    watch: list[str] = field(default_factory=list)
    """Basenames under which further files that are meant may be mapped."""
    resolved: list[ResolvedSite] = field(default_factory=list)
    """Every site, those that are refused too."""
    notes: list[str] = field(default_factory=list)
    """What was left out, in sentences."""

    def left_out(self) -> list[str]:
        """Returns the notes, and how many places were refused and why, most of a kind first."""
        refused = [site.refused for site in self.resolved if site.refused]
        if not refused:
            return list(self.notes)
        kinds = Counter(error.get("reason") or error["code"] for error in refused).most_common()
        why = ", ".join(f"{count} {kind}" for kind, count in kinds)
        said = f"{len(refused)} of {len(self.resolved)} places are not probed: {why}; the first: {refused[0]['detail']}"
        return [*self.notes, said]

    files: dict[FileKey, FoundFile] = field(default_factory=dict)
    """The files that ``plans`` are about, and who maps them."""


class Resolver:
    """Resolves probes and answers questions about this host; keeps the symbols of the files it has read."""

    def __init__(
        self,
        host_id: str,
        host_name: str,
        self_pids: Collection[int],
        tracer_pid: int,
        *,
        symbols: IndexCache | None = None,
        max_keys: int = DEFAULT_MAX_KEYS,
        debug: Callable[[FoundFile], DebugInfo | None] = lambda file: None,
        redact: Callable[[Collection[str]], bool] | None = None,
    ) -> None:
        """
        Args:
            host_id: the host's id, for answers.
            host_name: its name, for messages.
            self_pids: Trapline's own processes here; looked at anew at each call, so the caller may add to it.
            tracer_pid: the tracer, whose tracees can be probed; an attribute, since another tracer may take its place.
            symbols: keeps the symbols of files; None: one of its own, in memory.
            debug: returns the debug information of a file, or None where it has none.
            max_keys: rows that a probe's aggregate keeps apart here.
            redact: whether what has one of these names, or is of such a type, must not be captured.
        """
        self._max_keys = max_keys
        self._host_id = host_id
        self._host_name = host_name
        self._self_pids = self_pids
        self.tracer_pid = tracer_pid
        self._finder = Finder(host_name, IndexCache() if symbols is None else symbols)
        self._debug = debug
        self._redact = redact

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
            plan = self._plan(spec, dry=True)
        except TraplineError as e:
            return HostResolution(host=self._host_id, error=e.to_wire())
        answer = HostResolution(
            host=self._host_id, sites=plan.resolved, targets=self._targets(spec, plan), notes=plan.notes
        )
        if not plan.plans:
            answer.error = _first_refusal(plan).to_wire()
        return answer

    def _plan(self, spec: ProbeSpec, dry: bool = False) -> Plan:
        """Returns what a probe means now; ``dry``: with remarks that take a look into the debug information."""
        require_supported(spec)
        self._require_answerable(spec)
        plan = self._plan_of(spec, dry=dry, words=False)
        if _share_no_column(spec, plan):
            plan = self._plan_of(spec, dry=dry, words=True)
            plan.notes.append("the functions' values are of several types: they are shown as words, not as texts")
        return plan

    def _plan_of(self, spec: ProbeSpec, *, dry: bool, words: bool) -> Plan:
        """``words``: as in ``capture.compiler.Site``."""
        plan = Plan(where=with_numbers(spec.where, self._host_name))
        if spec.aggregate is not None:
            plan.aggregate = lower_aggregate(spec.aggregate, self._max_keys)
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
                self._add_file(plan, spec, file, dry=dry, words=words)
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
        if errors and errors[0].reason == "Imported":
            self._name_exporters(spec, files, errors[0])
        return errors[0] if errors else NotFound(f"nothing on {self._host_name} is meant by `{spec.text}`")

    def _require_answerable(self, spec: ProbeSpec) -> None:
        """Refuses what cannot be asked of any file here, before any is read."""
        point = spec.point
        if point.kind is PointKind.REGEX:
            try:
                compile_pattern(point.value)
            except SpecError as e:
                e.text, e.position = spec.text, max(0, spec.text.find(f"/{point.value}"))
                raise

    def _name_exporters(self, spec: ProbeSpec, files: list[FoundFile], error: TraplineError) -> None:
        """Adds to the error for an imported symbol where it is defined: in what the same processes map."""
        name = spec.point.value.partition("@")[0]
        pids = {pid for file in files for pid in file.mappings}
        own = {file.key for file in files}
        found: list[str] = []
        deadline = time.monotonic() + _SEARCH_S
        for file in list(scan(pids or None).values())[:_MAX_EXPORTERS]:
            if file.key in own:
                continue
            if time.monotonic() > deadline:
                break
            try:
                with file.open() as fd:
                    index = self._finder.index(file, fd)
                symbols = index.find_text(name) if spec.point.kind is PointKind.TEXT else index.find(name)
            except TraplineError:
                continue
            if any(s.bind != "local" for s in symbols):
                found.append(file.name)
        if found:
            names = list(dict.fromkeys(found))
            error.detail += f", {names[0]}" if len(names) == 1 else f": one of {', '.join(names[:5])}"
            quoted = f'"{name}"' if spec.point.kind is PointKind.TEXT else name
            error.suggestions = [f"{n}:{quoted}" for n in names[:5]]

    def _add_file(self, plan: Plan, spec: ProbeSpec, file: FoundFile, *, dry: bool, words: bool) -> None:
        with file.open() as fd:
            index = self._finder.index(file, fd)
            module = _shown(spec, file)
            for place in self._places(plan, spec, file, fd, index, module, dry):
                if len(plan.resolved) >= MAX_SITES:
                    note = f"more than {MAX_SITES} places match; the rest is left out"
                    if note not in plan.notes:
                        plan.notes.append(note)
                    break
                self._add_place(plan, file, fd, index, place, module, spec, words=words)

    def _places(
        self, plan: Plan, spec: ProbeSpec, file: FoundFile, fd: int, index: SymbolIndex, module: str, dry: bool
    ) -> Iterator[Place]:
        """Yields the places that a probe means in a file. Raises NotFound where it has none."""
        if spec.kind is ProbeKind.USDT:
            yield from usdt_places(spec, ElfFile(fd, index.path), index, module)
            return
        by_line = spec.point.kind is PointKind.LINE
        places = self._line_places(plan, spec, file, index, module) if by_line else symbol_places(spec, index, module)
        try:
            for place in places:
                if dry:
                    self._note_inlined(plan, spec, file, place)
                if spec.kind is ProbeKind.RETURN:
                    place = entry(fd, index, place, module, functools.partial(self._range, file, fd, index))
                yield place
        except NotFound as e:
            raise self._inlined_only(spec, file, e) from None

    def _line_places(
        self, plan: Plan, spec: ProbeSpec, file: FoundFile, index: SymbolIndex, module: str
    ) -> list[Place]:
        info = self._debug(file)
        if info is None:
            raise NoDebugInfo(
                f"{module} has no debug information, so its source lines are not known",
                hint="install its debug symbols' package, build it with -g, or use a symbol",
                reason="NoDebugInfo",
            )
        found: list[Place] = []
        for at in info.line(spec.point.value, spec.point.offset):
            shown = f"{os.path.basename(at.file)}:{at.line}"
            found.append(Place(at.offset, inside(index, at.offset), shown=shown, file=at.file, line=at.line))
            if at.line != spec.point.offset:
                note = f"line {spec.point.offset} has no code in {module}; line {at.line} is the next that has"
                if note not in plan.notes:
                    plan.notes.append(note)
        if not found:
            raise NotFound(f"no code in {module} is of {spec.point.value}:{spec.point.offset}", reason="NoSuchLine")
        return found

    def _inlined(self, file: FoundFile, function: str) -> list[LinePlace]:
        """Returns the inlined copies of a function. What is wrong with the debug information is told to who asks for it."""
        try:
            info = self._debug(file)
            return info.inlined(function) if info is not None else []
        except TraplineError:
            return []

    def _note_inlined(self, plan: Plan, spec: ProbeSpec, file: FoundFile, place: Place) -> None:
        """Says how many inlined copies of a function a probe does not cover."""
        symbol = place.symbol
        if not _names_one(spec) or symbol is None or place.symbol_offset:
            return
        (name,) = demangle([symbol.name], parameters=False)
        copies = self._inlined(file, name)
        if copies:
            plan.notes.append(
                f"{_count(copies)} of `{name}` in {file.name} {'is' if len(copies) == 1 else 'are'} not covered: "
                "a probe on a source line of it is in each of them"
            )

    def _inlined_only(self, spec: ProbeSpec, file: FoundFile, error: NotFound) -> NotFound:
        """Returns the error for a symbol that is not there: another one where the compiler put it into its callers."""
        name = spec.point.value
        if not _names_one(spec) or error.reason == "Imported":
            return error
        copies = self._inlined(file, name.partition("(")[0])
        if not copies:
            return error
        lines = dict.fromkeys(f"{spec.object}:{os.path.basename(c.file)}:{c.line}" for c in copies)
        return NotFound(
            f"no symbol `{name}` in {_shown(spec, file)}: it is there as {_count(copies)} in its callers",
            suggestions=list(lines)[:5],
            hint="a probe on a source line of it is in each of them",
            reason="Inlined",
        )

    def _range(self, file: FoundFile, fd: int, index: SymbolIndex, offset: int) -> Range | None:
        """Returns the code that a frame description is about, by the file's unwind table."""
        return self._finder.ranges(file, fd).at(ElfFile(fd, index.path), offset)

    def _add_place(
        self,
        plan: Plan,
        file: FoundFile,
        fd: int,
        index: SymbolIndex,
        place: Place,
        module: str,
        spec: ProbeSpec | None = None,
        *,
        words: bool = False,
    ) -> None:
        site = ResolvedSite(
            module=text(file.path),
            build_id=index.build_id,
            symbol=place.symbol.name if place.symbol else "",
            symbol_offset=place.symbol_offset,
            offset=place.offset,
            file=place.file,
            line=place.line,
            arguments=place.usdt.arguments if place.usdt else "",
        )
        if place.symbol is not None:
            site.demangled = demangled(place.symbol.name)
            site.aliases = [] if place.symbol_offset else index.aliases(place.symbol)[:_MAX_ALIASES]
        plan.resolved.append(site)
        try:
            if place.error is not None:
                raise place.error
            segment = index.segment_at(place.offset)
            if segment is None:
                raise not_executable(index, place.offset)
            require_boundary(fd, index, place, module, functools.partial(self._range, file, fd, index))
            code = read(fd, index, place.offset, min(CODE_BYTES, segment.end - place.offset))
            step = plan_step(code, place.offset - segment.offset + segment.vaddr)
            if index.is_relocated(place.offset, step.length):
                raise Unsupported(
                    f"the loader writes an address into `{step.text}` at {module}:{place.label} (text relocation), "
                    "so that it runs with other bytes than the file's",
                    reason="TextRelocation",
                    hint="probe another instruction of the function, or a build with -fPIC",
                )
            computed = None if spec is None else self._computed(plan, spec, file, index, place, module, words=words)
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
                semaphore=place.semaphore,
            )
        )

    def _computed(
        self,
        plan: Plan,
        spec: ProbeSpec,
        file: FoundFile,
        index: SymbolIndex,
        place: Place,
        module: str,
        *,
        words: bool,
    ) -> tuple[list[FetchPlan], Program | None]:
        """Returns the probe's columns so far, and what is computed at a place. Raises TraplineError, with the place in the
        probe's text."""
        segment = index.segment_at(place.offset)
        columns, aggregate = columns_of(spec), spec.aggregate is not None
        debug, scope, unread = None, None, None
        if self._redact is not None or needs_scope(columns, spec.condition, spec.kind, aggregate=aggregate):
            try:
                debug = self._debug(file)
                scope = None if debug is None else debug.scope(place.offset)
            except TraplineError as e:
                if self._redact is not None and (columns or spec.condition):
                    raise  # whether the policy lets these values go cannot be told
                unread = e  # it matters only where something is called by its name
        symbol = place.symbol.name if place.symbol else ""
        constants: dict[str, str | int] = {"host": self._host_name, "func": symbol, "buildid": index.build_id}
        if scope is not None:
            constants |= {"file": scope.file or scope.function.file, "line": scope.line or scope.function.line}
            constants["func"] = scope.function.name or symbol
        asks_errno = any("errno" in text for text in (*(c.text for c in columns), spec.condition))
        vaddr = place.offset + (segment.vaddr - segment.offset if segment else 0)
        is_go = place.go or (index.is_go and "." in symbol)
        try:
            fetches, program = compiled(
                columns,
                spec.condition,
                Site(
                    module=module,
                    kind=spec.kind,
                    entry=scope.entry if scope is not None else place.symbol is not None and not place.symbol_offset,
                    go=is_go and not place.symbol_offset,
                    vaddr=vaddr,
                    symbol=symbol,
                    scope=scope,
                    debug=debug,
                    constants=constants,
                    arguments=usdt_arguments(place.usdt) if place.usdt else None,
                    errno=self._errno(file, index, vaddr, spec.kind) if asks_errno else None,
                    words=words,
                    redact=self._redact or (lambda names: False),
                ),
                aggregate=aggregate,
            )
            if spec.aggregate is not None:
                require_numbers(spec.aggregate, fetches)
        except TraplineError as e:
            if isinstance(e, NoDebugInfo) and unread is not None:
                raise unread from e
            if e.text and e.position is not None:
                e.text, e.position = spec.text, place_of(spec, e.text) + e.position
            raise
        if not plan.plans or fetches == plan.fetches:
            return fetches, program
        both = merged(plan.fetches, fetches)
        if both != plan.fetches and _is_plain(plan.fetches):
            others = explicit(plan.fetches)
            plan.plans = [msgspec.structs.replace(p, program=p.program or others) for p in plan.plans]
        if both != fetches and _is_plain(fetches):
            program = program or explicit(fetches)
        return both, program

    def _errno(self, file: FoundFile, index: SymbolIndex, probed: int, kind: ProbeKind) -> Memory | None:
        """Returns where errno is, in the file that has it: the C library, or a program that is linked with it."""
        symbol = next(iter(index.find("__errno_location")), None)
        segment = index.segment_at(symbol.offset) if symbol is not None else None
        if symbol is None or segment is None:
            return None
        with file.open() as fd:
            code = read(fd, index, symbol.offset, errno.CODE_BYTES)
        at = symbol.offset - segment.offset + segment.vaddr
        return errno.errno_place(code, at, probed, at_return=kind is ProbeKind.RETURN)

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
            count, matches = index.search(q, limit)
            total += count
            best += (((m.rank, m.length, m.name), _symbol(m, file, index)) for m in matches)
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
                            self._add_place(plan, file, fd, index, Place(symbol.offset, symbol), file.name)
                except TraplineError:
                    continue  # later mappings are found by the other hooks
        return loaders.plans + [msgspec.structs.replace(p, unwinds=True) for p in unwinders.plans]


def _names_one(spec: ProbeSpec) -> bool:
    """Whether a probe names a function of a file: then it is worth a look into the debug information."""
    return spec.object != "*" and spec.point.kind in (PointKind.SYMBOL, PointKind.TEXT)


def _count(copies: list[LinePlace]) -> str:
    return f"{len(copies)} inlined {'copy' if len(copies) == 1 else 'copies'}"


def _shown(spec: ProbeSpec, file: FoundFile) -> str:
    """Returns a file's short name: the one that was asked for, where a name was."""
    if spec.object == "*" or spec.object.startswith("buildid="):
        return file.name
    return text(os.path.basename(spec.object)) or file.name


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


def _share_no_column(spec: ProbeSpec, plan: Plan) -> bool:
    """Whether places were refused since their values are of other types than those of the other places, or, where nothing
    was asked for, since a result is no number."""
    refused = [site.refused for site in plan.resolved if site.refused]
    return any(
        r.get("reason") == "CaptureType" or (not spec.captures and not spec.condition and r["code"] == SpecError.code)
        for r in refused
    )


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


def _symbol(match: Match, file: FoundFile, index: SymbolIndex) -> Symbol:
    symbol = match.symbol
    return Symbol(
        demangled=match.demangled,
        name=symbol.name if symbol.default else f"{symbol.name}@{symbol.version}",
        module=text(file.path),
        build_id=index.build_id,
        offset=symbol.offset,
        size=symbol.size,
        bind=symbol.bind,
    )
