"""Commands that talk to a service: probes, hits, hosts, processes, symbols."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import typer
from rich.text import Text

from trapline.cli.console import (
    Json,
    Overhead,
    Token,
    Url,
    microseconds,
    note,
    out,
    print_json,
    print_table,
    progress,
    read_budget,
    uncovered,
    unreturned,
)
from trapline.cli.rows import format_hit, plain
from trapline.cli.tables import NameFrame, folded_lines, lines, placed
from trapline.client import Client, Gap
from trapline.errors import NotFound, TraplineError
from trapline.model import AggregateTable, Hit, Phase, Probe, ProbeKind, Resolution, Target, TargetState

_MAX_FRAMES = 100_000
_MAX_ASKED = 10_000
"""Frames of one question (``trapline.model.Symbolize``)."""

probe_app = typer.Typer(help="Add, list, show and remove probes.", no_args_is_help=True)

ProbeText = Annotated[str, typer.Argument(metavar="PROBE", help="Such as 'redis-server:processCommand {arg0}'.")]
ProbeName = Annotated[str, typer.Argument(metavar="PROBE", help="A probe's name or id.")]


@probe_app.command("add")
def add(
    text: ProbeText,
    name: Annotated[str, typer.Option(help="Its name [default: the symbol].", show_default=False)] = "",
    ttl: Annotated[float, typer.Option(help="Minutes until it expires; 0 keeps it until it is removed.")] = 60.0,
    max_hits: Annotated[int | None, typer.Option("-n", "--max-hits", min=1, help="Take it out after so many.")] = None,
    overhead: Overhead = None,
    label: Annotated[list[str] | None, typer.Option(help="KEY=VALUE; may be given several times.")] = None,
    allow_offline: Annotated[bool, typer.Option(help="Accept it though no host for it is online.")] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Do not wait until it is armed.")] = False,
    json: Json = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Create a probe, and wait until it is armed."""
    labels = dict(_pair(item) for item in label or [])
    budget = read_budget(overhead)
    with Client(url, token) as client:
        with progress("resolving"):
            probe = client.create_probe(
                text,
                name=name,
                ttl_s=round(ttl * 60) or None,
                labels=labels,
                max_hits=max_hits,
                overhead=budget,
                allow_offline=allow_offline,
            )
        if not no_wait and not allow_offline:
            with progress("arming"):
                probe = client.wait(probe.id)
        if json:
            print_json(probe)
        else:
            _print_probes([probe])
            _print_conditions(probe)


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise typer.BadParameter(f"{text!r} is not KEY=VALUE")
    return key, value


@probe_app.command("list")
def list_(json: Json = False, url: Url = None, token: Token = None) -> None:
    """List the probes."""
    with Client(url, token) as client:
        probes = client.probes()
    if json:
        print_json(probes)
    elif probes:
        _print_probes(probes)
    else:
        note("no probes; add one with `trapline probe add PROBE`")


@probe_app.command("show")
def show(probe: ProbeName, json: Json = False, url: Url = None, token: Token = None) -> None:
    """Show a probe: its state, and every process it is armed in, or is not and why."""
    with Client(url, token) as client:
        found = client.probe(probe)
        targets = client.targets(found.id)
        names = {} if json else {host.id: host.facts.name for host in client.hosts()}
    if json:
        print_json({"probe": found.model_dump(mode="json"), "targets": [t.model_dump(mode="json") for t in targets]})
        return
    status = found.status
    counters = status.counters
    text = unreturned(counters.calls, counters.hits + counters.filtered + counters.limited, status.unreturned_by_reason)
    facts = [
        ("name", found.name),
        ("id", found.id),
        ("probe", found.spec.text),
        ("phase", status.phase.value),
        ("armed", f"{status.coverage.armed} of {status.coverage.eligible} processes"),
        (
            "hits",
            f"{counters.hits:,} ({counters.dropped:,} dropped{_reasons(status.dropped_by_reason)}"
            f"{uncovered(counters.uncovered_ms)})",
        ),
        *([("filtered", f"{counters.filtered:,}")] if found.spec.condition else []),
        *(
            [("calls", f"{counters.calls:,}" + (f" (not returned: {text})" if text else ""))]
            if found.spec.kind is ProbeKind.RETURN
            else []
        ),
        ("overhead", f"{microseconds(status.overhead_ns)} a hit"),
        ("created", f"{_time(found.created_at)}{f' by {found.created_by}' if found.created_by else ''}"),
        ("expires", _time(found.expires_at)),
    ]
    for key, value in facts:
        out.print(Text(f"{key:9}", "bold"), value, markup=False)
    _print_conditions(found)
    if targets:
        out.print()
        _print_targets(targets, names)


@probe_app.command("coverage")
def coverage(probe: ProbeName, json: Json = False, url: Url = None, token: Token = None) -> None:
    """Show when a probe was armed in which process, what told of the process, and where calls may have been missed."""
    with Client(url, token) as client:
        logs = client.coverage(probe)
        names = {} if json else {host.id: host.facts.name for host in client.hosts()}
    if json:
        print_json(logs)
        return
    rows = []
    for log in logs:
        name = names.get(log.host, log.host)
        if log.error:
            note(f"{name}: {log.error.get('detail', 'failed')}")
        if log.forgotten:
            note(f"{name}: {log.forgotten:,} older entries are no longer kept")
        rows += [
            (
                name,
                str(e.pid),
                plain(e.comm),
                e.symbol,
                _time(e.armed_at) if e.addr else "never",
                _time(e.disarmed_at) if e.disarmed_at else "armed",
                f"{e.cause.value} ({e.hook})",
                f"maybe: {e.message}" if e.may_have_missed else "none",
            )
            for e in log.entries
        ]
    if rows:
        print_table(("HOST", "PID", "COMM", "SYMBOL", "FROM", "TO", "CAUSE (HOOK)", "MISSED BEFORE"), rows)
    else:
        note("it was armed nowhere yet")


@probe_app.command("aggregate")
def aggregate(
    probe: ProbeName,
    top: Annotated[int, typer.Option(min=1, max=10_000, help="How many rows, those with the most hits.")] = 100,
    folded: Annotated[
        bool, typer.Option("--folded", help="Print stacks as flamegraph.pl and the like read them, all rows.")
    ] = False,
    json: Json = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Show what the hits of a probe with an aggregate add up to, so far."""
    with Client(url, token) as client:
        table = client.aggregate(probe, top=10_000 if folded else top)
        name = placed if json else _namer(client, table)
    if json:
        print_json(table)
    elif folded:
        for line in folded_lines(table, name):
            print(line)
    else:
        for line in lines(table, name):
            out.print(line, markup=False, soft_wrap=bool(table.frames))


def _namer(client: Client, table: AggregateTable) -> NameFrame:
    """Returns what names a table's frames: the hosts that they are from, one after another while some have no name."""
    names = {frame.model_dump_json(): list(placed(frame)) for frame in table.frames}
    unnamed = {frame.model_dump_json(): frame for frame in table.frames if frame.path and frame.path != "[anon]"}
    for host in table.hosts:
        asked = list(unnamed.items())
        for at in range(0, len(asked), _MAX_ASKED):
            some = asked[at : at + _MAX_ASKED]
            try:
                answers = client.symbolize(host, [frame for _, frame in some])
            except TraplineError:
                break  # it is away, or too old: the next may know
            for (key, frame), answer in zip(some, answers, strict=True):
                if answer != list(placed(frame)):
                    names[key] = answer
                    del unnamed[key]
    return lambda frame: names[frame.model_dump_json()]


@probe_app.command("rm")
def rm(
    probes: Annotated[list[str], typer.Argument(metavar="PROBE...", help="Names or ids.")],
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Do not wait until its breakpoints are out.")] = False,
    json: Json = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Remove probes, and wait until their breakpoints are out of every process."""
    with Client(url, token) as client:
        for name in probes:
            with progress(f"taking {name} out"):
                probe = client.delete_probe(name, wait=not no_wait)
            if json:
                print_json(probe)
            else:
                note(f"{probe.name}: {'leaving' if no_wait else 'removed'}, {probe.status.counters.hits:,} hits")


@probe_app.command("resolve")
def resolve(text: ProbeText, json: Json = False, url: Url = None, token: Token = None) -> None:
    """Say what a probe would do, and do nothing."""
    with Client(url, token) as client, progress("resolving"):
        resolution = client.resolve(text)
        names = {} if json else {host.id: host.facts.name for host in client.hosts()}
    if json:
        print_json(resolution)
    else:
        _print_resolution(resolution, names)


def hits(
    probes: Annotated[list[str] | None, typer.Argument(metavar="[PROBE]...", help="Names or ids; none: all.")] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Show hits as they come, until Ctrl-C.")] = False,
    limit: Annotated[int, typer.Option("-n", "--limit", min=1, help="So many recorded ones.")] = 20,
    host: Annotated[str, typer.Option(help="Of this host only.")] = "",
    json: Json = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Show recorded hits, or with --follow those that come."""
    with Client(url, token) as client:
        names = {p.id: p.name for p in client.probes()}
        functions = _Functions(client)
        wanted = probes or []
        for name in wanted:
            if name not in names and name not in names.values():
                names[client.probe(name).id] = name
        if not follow:
            found = [hit for name in wanted or [""] for hit in client.hits(name, host=host, limit=limit)]
            found.sort(key=lambda hit: int(hit.ts_ns))
            for hit in found[-limit:]:
                if json:
                    print_json(hit)
                else:
                    print(format_hit(hit, names.get(hit.probe, hit.probe), functions.of(hit)))
            return
        try:
            for item in client.stream(wanted or None, [host] if host else None):
                if json:
                    print_json({"gap" if isinstance(item, Gap) else "hit": item.model_dump(mode="json")})
                elif isinstance(item, Gap):
                    print(
                        f"... {item.count:,} hits of {names.get(item.probe, item.probe)} lost ({item.stage})",
                        flush=True,
                    )
                else:
                    if item.probe not in names:
                        names |= _name_of(client, item.probe)
                    print(format_hit(item, names.get(item.probe, item.probe), functions.of(item)), flush=True)
        except KeyboardInterrupt:
            return


class _Functions:
    """Names the frames of hits, asking the hits' host for those that are new."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._known: dict[tuple[str, str], list[str]] = {}
        """By host and frame."""

    def of(self, hit: Hit) -> dict[str, list[str]]:
        """Returns of each stack its functions; none where the host does not answer: then the hit's own text is shown."""
        frames = {f.model_dump_json(): f for stack in hit.stacks.values() for f in stack}
        new = {key: f for key, f in frames.items() if (hit.host, key) not in self._known}
        if len(self._known) + len(new) > _MAX_FRAMES:
            self._known.clear()
            new = frames
        try:
            found = self._client.symbolize(hit.host, list(new.values())) if new else []
        except TraplineError:
            return {}
        self._known |= {(hit.host, key): names for key, names in zip(new, found, strict=True)}
        named = {}
        for name, stack in hit.stacks.items():
            named[name] = [n for f in stack for n in self._known[hit.host, f.model_dump_json()]]
            if hit.status.get(name):
                named[name].append(str(hit.args[name]).rpartition(" <- ")[2])
        return named


def _name_of(client: Client, probe: str) -> dict[str, str]:
    try:
        return {probe: client.probe(probe).name}
    except NotFound:
        return {probe: probe}


def hosts(json: Json = False, url: Url = None, token: Token = None) -> None:
    """List the hosts and what can be done on each."""
    with Client(url, token) as client:
        found = client.hosts()
    if json:
        print_json(found)
        return
    if not found:
        note("no hosts; start an agent with `trapline agent`")
        return
    rows = [
        (
            host.facts.name,
            "online" if host.online else "offline",
            host.process_count,
            ", ".join(e.name for e in host.facts.engines if e.available) or "none",
            ", ".join(h.name for h in host.facts.hooks if h.available) or "none",
            f"{host.facts.kernel} {host.facts.arch}",
            host.facts.agent_user,
            host.id,
        )
        for host in found
    ]
    print_table(("HOST", "STATE", "PROCESSES", "ENGINES", "HOOKS", "KERNEL", "USER", "ID"), rows)
    for host in found:
        for hook in host.facts.hooks:
            if not hook.available:
                note(f"{host.facts.name}: no hook {hook.name}: {hook.reason}")


def processes(
    host: Annotated[str, typer.Argument(metavar="[HOST]", help="Its name or id; none: all hosts.")] = "",
    filter: Annotated[str, typer.Option(help="Text in name, command line, user or pid.")] = "",
    json: Json = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """List the processes of a host."""
    with Client(url, token) as client:
        wanted = [h for h in client.hosts() if h.online and host in ("", h.id, h.facts.name)]
        if host and not wanted:
            raise NotFound(f"no host {host} is online", hint="see `trapline hosts`")
        found = [(h, p) for h in wanted for p in client.processes(h.id, filter)]
    if json:
        for _, process in found:
            print_json(process)
        return
    rows = [
        (
            h.facts.name,
            str(p.pid),
            p.user or str(p.uid),
            p.threads,
            "yes" if p.eligible else p.reason,
            plain(p.cmdline[:80]) or f"[{plain(p.comm)}]",
        )
        for h, p in found
    ]
    print_table(("HOST", "PID", "USER", "THREADS", "ELIGIBLE", "COMMAND"), rows)


def symbols(
    query: Annotated[str, typer.Argument(metavar="QUERY", help="Part of a symbol's name.")],
    module: Annotated[str, typer.Option(help="Path or basename of a file; none: all that are mapped.")] = "",
    host: Annotated[str, typer.Option(help="On this host only.")] = "",
    limit: Annotated[int, typer.Option("-n", "--limit", min=1)] = 50,
    json: Json = False,
    url: Url = None,
    token: Token = None,
) -> None:
    """Search the symbols that a probe could name."""
    with Client(url, token) as client, progress("searching"):
        pages = client.symbols(query, module=module, host=host, limit=limit)
        names = {} if json else {host.id: host.facts.name for host in client.hosts()}
    if json:
        print_json(pages)
        return
    rows = [
        (plain(s.demangled or s.name), s.module, s.size, s.bind, names.get(page.host, page.host))
        for page in pages
        for s in page.symbols
    ]
    for page in pages:
        if page.error:
            note(f"{names.get(page.host, page.host)}: {page.error.get('detail', 'failed')}")
        elif page.note:
            note(f"{names.get(page.host, page.host)}: {page.note} (--module)")
    if rows:
        print_table(("SYMBOL", "MODULE", "SIZE", "BIND", "HOST"), rows)
    else:
        note(f"no symbol like {query!r}")


# --- how things look -------------------------------------------------------------------------------------------------


def _print_probes(probes: list[Probe]) -> None:
    rows = []
    for probe in probes:
        status = probe.status
        rows.append(
            (
                probe.name,
                status.phase.value,
                f"{status.coverage.armed}/{status.coverage.eligible}",
                status.counters.hits,
                status.counters.dropped,
                microseconds(status.overhead_ns),
                probe.spec.text,
            )
        )
    print_table(("NAME", "PHASE", "ARMED", "HITS", "DROPPED", "OVERHEAD", "PROBE"), rows)


def _print_conditions(probe: Probe) -> None:
    for condition in probe.status.conditions:
        if condition.message and (condition.status != "True" or probe.status.phase is Phase.ERROR):
            note(f"{condition.type}: {condition.message}")


def _print_targets(targets: list[Target], names: dict[str, str]) -> None:
    rows = [
        (
            names.get(t.host, t.host),
            str(t.pid),
            plain(t.comm),
            t.state.value if t.covered == 1 else f"{t.state.value} ({t.covered:.0%} seen)",
            f"{t.module}+{t.offset:#x}",
            f"{t.addr:#x}" if t.addr else "-",
            t.cause.value + (" (may have missed)" if t.may_have_missed else ""),
            t.message or t.reason,
        )
        for t in targets
    ]
    print_table(("HOST", "PID", "COMM", "STATE", "SITE", "ADDRESS", "CAUSE", "WHY NOT"), rows)


def _print_resolution(resolution: Resolution, names: dict[str, str]) -> None:
    out.print(Text("probe", "bold"), "", resolution.spec.text, markup=False)
    for host in resolution.hosts:
        out.print(Text("host", "bold"), " ", names.get(host.host, host.host), markup=False)
        if host.error:
            out.print(f"  {host.error.get('detail', 'failed')}", markup=False)
        for site in host.sites:
            why = site.refused.get("detail", "refused") if site.refused else f"{site.instruction}  ({site.step})"
            at = f"{site.symbol}+{site.symbol_offset:#x}" if site.symbol_offset else site.symbol
            out.print(f"  {site.module}:{at}  {site.offset:#x}  {why}", markup=False)
            for word, text in (
                ("is", site.demangled),
                ("at", f"{site.file}:{site.line}" if site.line else ""),
                ("also called", ", ".join(site.aliases)),
                ("arguments", site.arguments),
            ):
                if text:
                    out.print(f"    {word} {plain(text)}", markup=False)
        able = [t for t in host.targets if t.state is TargetState.ARMED]
        armed = f"{len(able)} {'process' if len(able) == 1 else 'processes'} would be armed"
        out.print(f"  {armed}, {len(host.targets) - len(able)} not" if len(host.targets) > len(able) else f"  {armed}")
        for target in host.targets:
            if target not in able:
                out.print(f"    {target.pid} {target.comm}: {target.message or target.reason}", markup=False)
        for remark in host.notes:
            out.print(f"  note: {plain(remark)}", markup=False)


def _time(moment: datetime | None) -> str:
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S") if moment else "never"


def _reasons(by_reason: dict[str, int]) -> str:
    return "".join(f", {count:,} {reason}" for reason, count in by_reason.items() if count)
