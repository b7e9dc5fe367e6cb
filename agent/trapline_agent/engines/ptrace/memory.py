"""One address space with its breakpoints and slots: what bytes are written, where, and how they are taken back.

Belongs to the tracer thread that follows the process. All writes go through /proc/PID/mem, which needs no stop and writes
to private read-only mappings by copy on write (mm/gup.c, FOLL_FORCE); a descriptor of it stays with the address space it
was opened on, across exec and the death of the process that was asked.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, field

from trapline.errors import Unsupported
from trapline_agent.arch.x86_64.registers import BREAKPOINT
from trapline_agent.arch.x86_64.stepping import SLOT_BYTES, Registers, Slot, StepPlan, plan_step
from trapline_agent.engines.base import Sink, SiteRequest, Tally
from trapline_agent.kernel import procfs
from trapline_agent.plans import SitePlan


@dataclass(eq=False)
class Site:
    """A breakpoint in one address space."""

    addr: int
    plan: SitePlan
    step: StepPlan
    sinks: tuple[Sink, ...]
    is_hook: bool
    slot: int = 0
    """Address of its displaced copy; 0 without one."""
    next_ip: Callable[[Registers], int] | None = None
    """For emulated instructions."""
    tally: Tally = field(default_factory=Tally)
    original: bytes = field(init=False)

    def __post_init__(self) -> None:
        self.original = self.plan.code[:1]

    @property
    def armed(self) -> bytes:
        """The instruction as it is in memory while it is armed."""
        return BREAKPOINT + self.plan.code[1 : self.step.length]


class AddressSpace:
    """Breakpoints and slots of one mm; shared by processes that share it (vfork, CLONE_VM)."""

    def __init__(self, pid: int) -> None:
        """Opens the memory of a process. Raises ProcessLookupError, PermissionError."""
        self.fd = _open(pid)
        self.sites: dict[int, Site] = {}
        self.former: dict[int, Site] = {}
        """Sites that were taken out; a thread may have hit one just before, and a child forked then may have its byte."""
        self.slots: dict[int, tuple[Site, Slot]] = {}
        """By slot address; kept until no thread can be inside."""
        self.users = 1

    def reopen(self, pid: int) -> None:
        """Opens the memory that a process has now, where nothing has been written yet. Not after the last ``close``."""
        if self.fd < 0:
            raise ProcessLookupError(errno.ESRCH, "the last process of this memory is gone", str(pid))
        fresh = _open(pid)
        os.close(self.fd)
        self.fd = fresh

    def close(self) -> None:
        """Gives up the descriptor when the last process that shares the address space is gone."""
        self.users -= 1
        if self.users == 0:
            # A number that is used again would lead a late write into another process.
            fd, self.fd = self.fd, -1
            os.close(fd)

    # --- breakpoints -------------------------------------------------------------------------------------------------

    def arm(self, request: SiteRequest) -> Site:
        """Writes a breakpoint. The instruction in memory must be the file's (semantics R14).

        Raises:
            Unsupported: with the reason; nothing was written.
            OSError: EIO, the page is not there (any more).
        """
        addr, plan = request.addr, request.plan
        if request.refusal is not None:
            raise Unsupported(request.refusal[1], reason=request.refusal[0])
        step = plan_step(plan.code)
        expected = plan.code[: step.length]
        found = os.pread(self.fd, step.length, addr)
        if found != expected:
            if found[:1] == BREAKPOINT:
                raise Unsupported(
                    f"another tool has a breakpoint at {addr:#x}",
                    reason="BreakpointPresent",
                    hint="take that breakpoint out first",
                )
            raise Unsupported(
                f"the code at {addr:#x} is not the file's: {found.hex(' ')} instead of {expected.hex(' ')}",
                reason="TextDiffers",
                hint="the program changed its own code (text relocation, hot patch); probe another instruction",
            )
        site = Site(addr, plan, step, request.sinks, request.is_hook, tally=request.tally)
        site.next_ip = step.next_ip(addr)
        if site.next_ip is None:
            site.slot = self._place(site, request.slack_addr)
            if not site.slot and step.computed is None:
                raise Unsupported(
                    f"`{step.text}` needs room for a displaced copy, and the file has none behind its code",
                    reason="NoRoom",
                    hint="probe another instruction of the function",
                )
        os.pwrite(self.fd, BREAKPOINT, addr)
        self.sites[addr] = site
        self.former.pop(addr, None)
        return site

    def disarm(self, site: Site, *, mapped: bool = True) -> None:
        """Takes a breakpoint out.

        Args:
            site: one of ``sites``.
            mapped: whether the file is still mapped there. If not, its bytes went with the mapping, and what is there now is
                ours only where it is the very instruction with our byte: a program that moved its text to other memory
                (large pages) took that along.
        """
        del self.sites[site.addr]
        if self._has(site.addr, BREAKPOINT if mapped else site.armed):
            # EIO and the like: unmapped meanwhile, or the address space is gone with its last process
            with contextlib.suppress(OSError):
                os.pwrite(self.fd, site.original, site.addr)
        elif not mapped and site.slot:
            self.slots.pop(site.slot, None)
        self.former[site.addr] = site

    def has_breakpoint(self, addr: int) -> bool:
        """Whether an int3 is in memory at an address now; False where nothing is mapped."""
        return self._has(addr, BREAKPOINT)

    def restored(self, site: Site) -> bool:
        """Whether a former site's place holds no breakpoint of ours; puts one right that came back with moved text."""
        if not self.has_breakpoint(site.addr):
            return True
        if self._has(site.addr, site.armed):
            with contextlib.suppress(OSError):
                os.pwrite(self.fd, site.original, site.addr)
                return True
        return False

    def _has(self, addr: int, content: bytes) -> bool:
        try:
            return os.pread(self.fd, len(content), addr) == content
        except OSError:
            return False

    def inherit(self, parent: AddressSpace) -> None:
        """Takes over what a forked child's memory has of its parent's breakpoints and slots.

        The parent's may have changed between the fork and now: the child's memory decides, not the parent's tables.
        """
        for site in (*parent.former.values(), *parent.sites.values()):
            if self.has_breakpoint(site.addr):
                copy = Site(site.addr, site.plan, site.step, (), site.is_hook, site.slot, site.next_ip)
                self.sites[site.addr] = copy
        for addr, (site, slot) in parent.slots.items():
            if self._has(addr, slot.code):
                self.slots[addr] = (self.sites.get(site.addr, site), slot)

    # --- slots -------------------------------------------------------------------------------------------------------

    def _place(self, site: Site, slack_addr: int) -> int:
        """Writes the displaced copy into the module's unused bytes; returns its address, 0 where there is no room."""
        for addr, (owner, _) in self.slots.items():
            if owner.addr == site.addr and owner.plan == site.plan:
                return addr
        if not slack_addr:
            return 0
        first = -(-slack_addr // 16) * 16
        for addr in range(first, slack_addr + site.plan.slack_len - SLOT_BYTES + 1, SLOT_BYTES):
            if addr in self.slots:
                continue
            if os.pread(self.fd, SLOT_BYTES, addr) != bytes(SLOT_BYTES):
                continue  # somebody else's: a hot patch, or the remains of a tracer that was killed
            try:
                slot = site.step.slot(site.addr, addr)
            except Unsupported:
                return 0
            os.pwrite(self.fd, slot.code, addr)
            self.slots[addr] = (site, slot)
            return addr
        return 0

    def slot_at(self, ip: int) -> tuple[int, Site, Slot] | None:
        """Returns (address, site, slot) of the slot that an instruction pointer is in."""
        for addr, (site, slot) in self.slots.items():
            if addr <= ip < addr + len(slot.code):
                return addr, site, slot
        return None

    def wipe_slots(self) -> None:
        """Puts the zeros back. Only when no thread can be inside, and no site uses them."""
        for addr, (_, slot) in self.slots.items():
            try:
                if self._has(addr, slot.code):
                    os.pwrite(self.fd, bytes(len(slot.code)), addr)
            except OSError:
                continue  # unmapped, or the process is gone
        self.slots.clear()


def _open(pid: int) -> int:
    try:
        return os.open(f"/proc/{pid}/task/{procfs.live_task(pid)}/mem", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError as e:
        raise ProcessLookupError(e.errno, "no such process", str(pid)) from e
