"""From texts to plans, on compiled programs and on this machine's own python and libc."""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import sys
from pathlib import Path

import pytest

from tests.support import needs
from tests.support.children import Child, python
from tests.unit.symbols.programs import BUILDS, VERSIONED, build, strip
from tests.unit.symbols.test_elf import libc
from trapline.errors import Ambiguous, NoDebugInfo, NotFound, PermissionDenied, ResolveError, Unsupported
from trapline.model import TargetState
from trapline.spec import parse_probe
from trapline_agent import resolve as module
from trapline_agent.plans import FetchPlan
from trapline_agent.resolve import Plan, Resolver
from trapline_agent.targets.files import file_key
from trapline_agent.targets.maps import mappings_of

READY = "print('ready', flush=True); input()"


@pytest.fixture
def resolver() -> Resolver:
    return Resolver("hst_1", "box", {os.getpid()}, 0)


def plan_of(resolver: Resolver, text: str) -> Plan:
    return resolver.resolve(parse_probe(text))


# --- places


@needs.gcc
@pytest.mark.parametrize("how", BUILDS)
def test_a_symbol_of_a_running_program(resolver: Resolver, tmp_path: Path, how: str) -> None:
    path = build(tmp_path, *BUILDS[how])
    code = path.read_bytes()
    with Child([path]) as child:
        plan = plan_of(resolver, f"{path}:visible {{arg0, s=str(reg.rsi, 9)}} @ pid={child.pid}")
        (site,) = plan.plans
        assert plan.sites == ["program:visible"]
        assert site.file == file_key(str(path))
        assert code[site.offset : site.offset + 15].startswith(site.code)
        assert plan.fetches == [FetchPlan("arg0", "rdi"), FetchPlan("s", "rsi", string=True, max_bytes=9)]
        assert plan.where == {"pid": str(child.pid)}
        answer = resolver.resolve_dry(parse_probe(f"{path}:visible"))
        assert answer.error is None
        (target,) = answer.targets
        (mapping,) = mappings_of(child.pid, [site.file])
        assert (target.pid, target.addr) == (child.pid, mapping.start + site.offset - mapping.offset)
        with open(f"/proc/{child.pid}/mem", "rb") as memory:
            memory.seek(target.addr)
            assert memory.read(len(site.code)) == site.code
        if site.slack_len:
            slack = mapping.start + site.slack_offset - mapping.offset
            assert mapping.start <= slack < slack + site.slack_len <= mapping.end


@needs.gcc
def test_offsets_are_checked_by_decoding(resolver: Resolver, tmp_path: Path) -> None:
    path = build(tmp_path)  # nobody runs it
    label = plan_of(resolver, f"{path}:asm_label").plans[0].offset  # movabs, 10 bytes; ret
    assert plan_of(resolver, f"{path}:asm_label+10").sites == ["program:asm_label+0xa"]
    assert plan_of(resolver, f"{path}:0x{label + 10:x}").sites == ["program:asm_label+0xa"]
    for text in (f"{path}:asm_label+3", f"{path}:0x{label + 3:x}"):
        with pytest.raises(Unsupported) as e:
            plan_of(resolver, text)
        assert e.value.reason == "MidInstruction"
        assert "1122334455667788" in e.value.detail
        assert e.value.suggestions == ["program:asm_label", "program:asm_label+0xa"]


@needs.gcc
@needs.binutils
def test_offsets_in_a_stripped_program(resolver: Resolver, tmp_path: Path) -> None:
    path = build(tmp_path)
    label = plan_of(resolver, f"{path}:asm_label").plans[0].offset
    stripped = strip(path)
    assert plan_of(resolver, f"{stripped}:0x{label:x}").sites == [f"program-stripped:0x{label:x}"]
    with pytest.raises(Unsupported) as e:
        plan_of(resolver, f"{stripped}:0x{label + 3:x}")
    assert e.value.reason == "MidInstruction"
    with pytest.raises(NotFound, match="no symbol `visible` in program-stripped"):
        plan_of(resolver, f"{stripped}:visible")


@needs.gcc
@pytest.mark.parametrize("offset", ["0x0", "0x10", "end", "0x7fffffffffffffff"])
def test_offsets_that_are_no_code(resolver: Resolver, tmp_path: Path, offset: str) -> None:
    path = build(tmp_path)
    with pytest.raises(Unsupported) as e:
        plan_of(resolver, f"{path}:{hex(path.stat().st_size) if offset == 'end' else offset}")
    assert e.value.reason == "NotExecutable"


@needs.gcc
def test_beyond_a_function(resolver: Resolver, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="beyond the end of `visible`") as e:
        plan_of(resolver, f"{build(tmp_path)}:visible+0x1000")
    assert e.value.reason == "BeyondFunction"


@needs.gcc
def test_indirect_functions_are_refused_but_hide_no_others(resolver: Resolver, tmp_path: Path) -> None:
    path = build(tmp_path)
    with pytest.raises(Unsupported, match="indirect function") as e:
        plan_of(resolver, f"{path}:chosen")
    assert e.value.reason == "IndirectFunction"
    plan = plan_of(resolver, f"{path}:[cv]*s*")  # visible, chosen, chosen_one or choose
    sites = {s.symbol: s for s in plan.resolved}
    assert sites["visible"].refused is None
    assert sites["visible"].step in ("emulated", "boosted")
    assert any(s.refused is not None for s in sites.values())
    assert len(plan.plans) == sum(s.refused is None for s in plan.resolved)
    assert all(plan.sites[p.site] for p in plan.plans)


@needs.gcc
def test_a_refused_instruction_is_the_sites_own_refusal(resolver: Resolver, tmp_path: Path) -> None:
    path = build(tmp_path)
    offset = plan_of(resolver, f"{path}:asm_label").plans[0].offset
    data = bytearray(path.read_bytes())
    data[offset] = 0xCC
    path.write_bytes(data)
    answer = resolver.resolve_dry(parse_probe(f"{path}:asm_label"))
    assert answer.sites[0].refused == answer.error
    assert answer.error is not None
    assert answer.error["code"] == "unsupported"
    both = plan_of(resolver, f"{path}:*[bm][ela]*")  # visible, main, asm_label
    assert "program:visible" in both.sites
    assert "program:asm_label" not in both.sites


@needs.gcc
def test_globs_are_bounded_and_say_so(resolver: Resolver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SITES", 2)
    answer = resolver.resolve_dry(parse_probe(f"{build(tmp_path)}:*"))
    assert len(answer.sites) == 2
    assert answer.notes == ["more than 2 places match; the rest is left out"]
    with pytest.raises(NotFound, match="matches `zz"):
        plan_of(resolver, f"{tmp_path / 'program'}:zz*")


@needs.gcc
def test_versions(resolver: Resolver, tmp_path: Path) -> None:
    (tmp_path / "versions").write_text("V1 { global: f; };\nV2 { global: f; } V1;\n")
    flags = ("-shared", "-fPIC", f"-Wl,--version-script={tmp_path / 'versions'}")
    path = build(tmp_path, *flags, name="libv.so", source=VERSIONED)
    plain, new, old = (plan_of(resolver, f"{path}:{f}").plans[0].offset for f in ("f", "f@V2", "f@@V1"))
    assert plain == new != old


def test_unknown_symbols_suggest(resolver: Resolver) -> None:
    with pytest.raises(NotFound) as e:
        plan_of(resolver, f"{libc()}:getpidd")
    assert e.value.suggestions[0] == "getpid"
    with pytest.raises(NotFound) as e:
        plan_of(resolver, "*:getpidd_of_nobody")
    assert "files that are mapped on box" in e.value.detail


def test_not_in_this_release_is_refused_here_too(resolver: Resolver) -> None:
    with pytest.raises(Unsupported, match="not in this release"):
        plan_of(resolver, f"usdt:{libc()}:malloc")
    with pytest.raises(Unsupported, match="one file"):
        plan_of(resolver, "*:0x1000")


# --- returns


@needs.gcc
def test_a_return_probe_is_of_a_function(resolver: Resolver, tmp_path: Path) -> None:
    path = build(tmp_path)
    plan = plan_of(resolver, f"ur:{path}:asm_label")
    assert [(f.name, f.register, f.entry) for f in plan.fetches] == [
        ("retval", "rax", False),
        ("latency", "latency", False),
    ]
    assert not plan.plans[0].go
    for text in (f"ur:{path}:asm_label+10", f"ur:{path}:0x{plan.plans[0].offset + 10:x}"):
        with pytest.raises(Unsupported) as e:
            plan_of(resolver, text)
        assert e.value.reason == "NotAFunction"
        assert e.value.suggestions == ["ur:program:asm_label"]
    plan = plan_of(resolver, f"ur:{path}:asm_label {{a=entry(arg1), b=str(entry(reg.r8), 9), c=entry(str(arg0))}}")
    assert plan.fetches == [
        FetchPlan("a", "rsi", entry=True),
        FetchPlan("b", "r8", string=True, max_bytes=9, entry=True, late=True),
        FetchPlan("c", "rdi", string=True, entry=True),
    ]


def test_longjmp_is_found_for_return_probes(resolver: Resolver) -> None:
    with python(READY):
        plans = [p for p in resolver.loaders() if p.unwinds]
    assert plans
    assert all("libc" in p.path or "musl" in p.path for p in plans)


# --- objects


@needs.gcc
def test_basenames_sonames_and_build_ids(resolver: Resolver, tmp_path: Path) -> None:
    source = "int trapline_test_function(int a) { return a + 1; }"
    library = build(
        tmp_path, "-shared", "-fPIC", "-Wl,-soname,libtraplinetest.so.7", name="libtraplinetest.so.7.1", source=source
    )
    load = f"import ctypes; ctypes.CDLL({str(library)!r}); "
    build_id = ""
    with python(load + READY) as child:
        for name in ("libtraplinetest.so.7.1", "libtraplinetest.so.7", str(library), "*"):
            answer = resolver.resolve_dry(parse_probe(f"{name}:trapline_test_function"))
            assert answer.error is None, name
            assert [s.module for s in answer.sites] == [str(library)]
            assert [t.pid for t in answer.targets] == [child.pid]
            build_id = answer.sites[0].build_id
        (site,) = plan_of(resolver, f"buildid={build_id[:12]}:trapline_test_function").resolved
        assert site.module == str(library)
        assert "libtraplinetest.so.7.1" in plan_of(resolver, "libtraplinetest.so.7:trapline_test_function").watch
        with pytest.raises(NotFound) as e:
            plan_of(resolver, "libtraplinetest.so.8.1:f")
        assert "libtraplinetest.so.7.1" in e.value.suggestions
    with pytest.raises(NotFound, match="no process on box maps"):
        plan_of(resolver, "libtraplinetest.so.7:trapline_test_function")
    with pytest.raises(NotFound, match="build-id"):
        plan_of(resolver, f"buildid={build_id}:trapline_test_function")


@needs.gcc
def test_build_ids_that_begin_alike(resolver: Resolver, tmp_path: Path) -> None:
    paths = [build(tmp_path, f"-Wl,--build-id=0xabcdef0123450{i}", name=f"p{i}") for i in (1, 2)]
    with Child([paths[0]]), Child([paths[1]]):
        with pytest.raises(Ambiguous) as e:
            plan_of(resolver, "buildid=abcdef01:main")
        assert e.value.suggestions == ["buildid=abcdef01234501", "buildid=abcdef01234502"]
        assert plan_of(resolver, "buildid=abcdef01234502:main").resolved[0].module == str(paths[1])


@needs.gcc
def test_a_name_in_path_leads_to_what_it_points_to(
    resolver: Resolver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build(tmp_path, name="tool3.11")
    (tmp_path / "tool3").symlink_to("tool3.11")
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "tool3").write_text("#!/bin/sh\n")
    monkeypatch.setenv("PATH", f"{scripts}:{tmp_path}:/usr/bin:/bin")
    before = plan_of(resolver, "tool3:main")  # nobody runs it: found on disk, the script passed over
    assert before.plans[0].path == str(path)
    assert before.sites == ["tool3:main"]
    with Child([path]) as child:
        answer = resolver.resolve_dry(parse_probe("tool3:main"))
        assert [t.pid for t in answer.targets] == [child.pid]
        assert plan_of(resolver, "tool3:main").watch == ["tool3", "tool3.11"]


@needs.gcc
@needs.root
def test_a_deleted_program_and_its_successor_are_both_meant(resolver: Resolver, tmp_path: Path) -> None:
    path = build(tmp_path)
    old = file_key(str(path))
    with Child([path]) as child:
        path.unlink()
        plan = plan_of(resolver, f"{path}:visible")
        assert [p.file for p in plan.plans] == [old]
        build(tmp_path, "-O2")
        files = {p.file for p in plan_of(resolver, f"{path}:visible").plans}
        assert files == {old, file_key(str(path))}
        answer = resolver.resolve_dry(parse_probe(f"program:visible @ pid={child.pid}"))
        assert [t.state for t in answer.targets] == [TargetState.ARMED]


@needs.gcc
@needs.root
def test_the_same_path_in_another_mount_namespace(resolver: Resolver, tmp_path: Path) -> None:
    here = build(tmp_path)
    (tmp_path / "other").mkdir()
    there = build(tmp_path / "other", "-O2")
    script = f"mount --make-rprivate / && mount --bind {there} {here} && exec {here}"
    with Child([here]) as one, Child([shutil.which("unshare") or "unshare", "-m", "sh", "-c", script]) as two:
        answer = resolver.resolve_dry(parse_probe(f"{here}:visible"))
        assert answer.error is None
        assert {t.pid for t in answer.targets} == {one.pid, two.pid}
        assert {p.file for p in plan_of(resolver, f"{here}:visible").plans} == {
            file_key(str(here)),
            file_key(str(there)),
        }
        (own,) = plan_of(resolver, f"{here}:visible @ pid={two.pid}").plans
        assert own.file == file_key(str(there))


def test_paths_that_lead_nowhere(resolver: Resolver, tmp_path: Path) -> None:
    (tmp_path / "server").touch()
    with pytest.raises(NotFound) as e:
        plan_of(resolver, f"{tmp_path}/sever:main")
    assert e.value.suggestions == [f"{tmp_path}/server"]
    with pytest.raises(NotFound):
        plan_of(resolver, "/nowhere/at/all:main")
    with pytest.raises(ResolveError, match="cannot be mapped"):
        plan_of(resolver, f"{tmp_path}/server:main")
    with pytest.raises(ResolveError, match="not a file"):
        plan_of(resolver, f"{tmp_path}:main")
    (tmp_path / "script").write_text("#!/bin/sh\n")
    with pytest.raises(ResolveError, match="not an ELF file"):
        plan_of(resolver, f"{tmp_path}/script:main")


@needs.gcc
def test_code_for_another_processor(resolver: Resolver, tmp_path: Path) -> None:
    path = build(tmp_path)
    data = bytearray(path.read_bytes())
    struct.pack_into("<H", data, 18, 183)
    path.write_bytes(data)
    answer = resolver.resolve_dry(parse_probe(f"{path}:main"))
    assert answer.error is not None
    assert (answer.error["code"], answer.error["reason"]) == ("unsupported", "Architecture")


# --- processes


def test_processes_that_are_not_there(resolver: Resolver) -> None:
    child = Child([sys.executable, "-c", READY])
    child.kill()
    for key in ("pid", "tree"):
        with pytest.raises(NotFound, match=f"no process {child.pid} on box"):
            plan_of(resolver, f"{libc()}:malloc @ {key}={child.pid}")
    with pytest.raises(NotFound, match="no user"):
        plan_of(resolver, f"{libc()}:malloc @ uid=nobody-of-that-name")


def test_a_tree_is_a_process_and_its_descendants(resolver: Resolver) -> None:
    spawn = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {READY!r}]); p.wait()"
    with python(spawn) as parent, python(READY) as other:
        answer = resolver.resolve_dry(parse_probe(f"{libc()}:malloc @ tree={parent.pid}"))
        found = {t.pid for t in answer.targets}
        assert parent.pid in found
        assert len(found) == 2
        assert other.pid not in found
        parent.send("")  # the grandchild reads it and ends, and then the child
        assert parent.wait() == 0


def test_trapline_itself_is_refused(resolver: Resolver) -> None:
    answer = resolver.resolve_dry(parse_probe(f"{libc()}:malloc @ pid={os.getpid()}"))
    assert [(t.state, t.reason, t.addr) for t in answer.targets] == [(TargetState.REFUSED, "Self", 0)]


@needs.gcc
def test_what_trapline_alone_maps_is_no_refusal(tmp_path: Path) -> None:
    path = build(tmp_path)
    with Child([path]) as child:
        answer = Resolver("hst_1", "box", {child.pid}, 0).resolve_dry(parse_probe(f"{path}:main"))
        assert answer.error is None
        assert answer.targets == []


@needs.ptrace
def test_a_process_that_another_debugger_holds(resolver: Resolver) -> None:
    ptrace = ctypes.CDLL(None, use_errno=True).ptrace
    ptrace.argtypes = [ctypes.c_long] * 4
    with python(READY) as child:
        assert ptrace(0x4206, child.pid, 0, 0) == 0  # PTRACE_SEIZE
        answer = resolver.resolve_dry(parse_probe(f"{libc()}:malloc @ pid={child.pid}"))
        # This process is Trapline for the resolver; a stranger sees its tracee as another's.
        assert [t.state for t in answer.targets] == [TargetState.ARMED]
        answer = Resolver("hst_1", "box", set(), 0).resolve_dry(parse_probe(f"{libc()}:malloc @ pid={child.pid}"))
        assert [(t.state, t.reason) for t in answer.targets] == [(TargetState.REFUSED, "TracedByOther")]
        assert answer.error is None


@needs.root
def test_kernel_threads(resolver: Resolver) -> None:
    kernel = next((p for p in os.listdir("/proc") if p.isdigit() and _is_kernel_thread(p)), None)
    if kernel is None:
        answer = resolver.resolve_dry(parse_probe(f"{libc()}:malloc"))  # a pid namespace of its own: there are none
        assert all(t.reason != "KernelThread" for t in answer.targets)
        return
    answer = resolver.resolve_dry(parse_probe(f"{libc()}:malloc @ pid={kernel}"))
    assert [(t.state, t.reason) for t in answer.targets] == [(TargetState.REFUSED, "KernelThread")]


def _is_kernel_thread(pid: str) -> bool:
    return bool(int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[6]) & 0x200000)


@needs.gcc
def test_writable_mappings_are_refused(resolver: Resolver, tmp_path: Path) -> None:
    path = build(tmp_path)
    offset = plan_of(resolver, f"{path}:visible").plans[0].offset
    code = f"""
import mmap, os
fd = os.open({str(path)!r}, os.O_RDONLY)
m = mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
"""
    with python(code + READY) as child:
        answer = resolver.resolve_dry(parse_probe(f"{path}:0x{offset:x}"))
        assert [(t.pid, t.state, t.reason) for t in answer.targets] == [
            (child.pid, TargetState.REFUSED, "WritableMapping")
        ]


# --- questions


def test_symbol_search(resolver: Resolver) -> None:
    page = resolver.search_symbols(str(libc()), "getpid", 3)
    assert page.host == "hst_1"
    assert page.symbols[0].name == "getpid"
    assert page.total >= len(page.symbols)
    assert len(page.symbols) <= 3
    with python(READY):
        everywhere = resolver.search_symbols("", "getpid", 50)
        assert "getpid" in [s.name for s in everywhere.symbols]
        assert len(everywhere.symbols) <= 50
    with pytest.raises(NotFound):
        resolver.search_symbols("no-such-module-anywhere", "x", 5)
    with pytest.raises(ResolveError):
        resolver.search_symbols("/etc/passwd", "x", 5)


@needs.gcc
def test_modules(resolver: Resolver, tmp_path: Path) -> None:
    path = build(tmp_path)
    with Child([path]) as one, Child([path]):
        (own,) = [m for m in resolver.modules(one.pid) if m.path == str(path)]
        assert (own.processes, len(own.build_id)) == (1, 40)
        assert (own.dev, own.inode) == (file_key(str(path)).dev, path.stat().st_ino)
        (all_of_them,) = [m for m in resolver.modules() if m.path == str(path)]
        assert all_of_them.processes == 2
        counts = [m.processes for m in resolver.modules()]
        assert counts == sorted(counts, reverse=True)
    with pytest.raises((NotFound, PermissionDenied)):
        resolver.modules(one.pid)


def test_loaders(resolver: Resolver) -> None:
    with python(READY) as child:
        plans = resolver.loaders()
        assert plans
        maps = Path(f"/proc/{child.pid}/maps").read_text()
        assert any(f" {p.file.dev} {p.file.inode} " in maps for p in plans)


def test_what_a_file_without_debug_information_cannot_say_is_refused(resolver: Resolver, tmp_path: Path) -> None:
    path = build(tmp_path)
    text = f"{path}:visible {{a=arg0, b=size + 1}} if arg0 > 3"
    with pytest.raises(NoDebugInfo) as e:
        plan_of(resolver, text)
    assert e.value.reason == "NoDebugInfo"
    assert e.value.position is not None
    assert e.value.text[e.value.position :] == "size + 1}"


@needs.gcc
def test_files_that_end_under_the_reader(resolver: Resolver, tmp_path: Path) -> None:
    path = build(tmp_path)
    whole = path.read_bytes()
    for size in (0, 10, 64, 500, 4096, 5000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        try:
            plan = plan_of(resolver, f"{path}:visible")
        except (ResolveError, Unsupported):
            continue  # any other exception is a crash
        assert whole.startswith(plan.plans[0].code, plan.plans[0].offset)
    path.write_bytes(whole)
    assert plan_of(resolver, f"{path}:visible").plans
