"""One address space with its breakpoints and slots: what bytes are written, where, and how they are taken back.

Belongs to the tracer thread that follows the process. All writes go through /proc/PID/mem, which needs no stop and writes
to private read-only mappings by copy on write (mm/gup.c, FOLL_FORCE); a descriptor of it stays with the address space it
was opened on, across exec and the death of the process that was asked.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from trapline.errors import Unsupported
from trapline_agent.arch.x86_64.registers import BREAKPOINT
from trapline_agent.arch.x86_64.stepping import SLOT_BYTES, Registers, Slot, StepPlan, plan_step
from trapline_agent.engines.base import ReturnSink, Sink, SiteRequest, Tally
from trapline_agent.engines.frames import Frames
from trapline_agent.engines.journal import Space
from trapline_agent.engines.ptrace.semaphores import Semaphores
from trapline_agent.kernel import procfs, ptrace
from trapline_agent.plans import SitePlan
from trapline_agent.targets import maps

log = logging.getLogger(__name__)

AREA_BYTES = 1 << 16
"""Of the slot pages that a process maps at once, where its files have no room."""
AREA_HEADER = b"trapline\0slots 1".ljust(SLOT_BYTES, b"\0")
"""What slot pages begin with, in place of a first slot: a name, and by it a later tracer knows them."""
_HLT = b"\xf4"
"""Fills what is free in slot pages: whoever gets there faults at once, whichever byte it begins with, as where nothing is
mapped. (int3 would look like a breakpoint; zeros are instructions that write.)"""
_PAGE = 4096
_TRIES = 3
"""How often memory is asked again that does not answer: a page may have to come from swap first, and memory be short."""
SWEEP_FROM = 4096
"""Calls in flight from which on it is looked for abandoned ones."""
_MAX_REFUSED = 4096
_MAX_FORMER = 65_536
"""A library that comes and goes is at another address each time; who hit the oldest of them has been served long ago."""


@dataclass(eq=False)
class Calls:
    """What return probes know of one address space: see ``engines.ptrace.returns``."""

    frames: Frames = field(default_factory=Frames)
    refused: dict[int, str] = field(default_factory=dict)
    """Addresses that calls return to and that cannot be armed, with the reason."""
    sweep_at: int = field(default_factory=lambda: SWEEP_FROM)
    refuse_next: int = 0
    """Calls that are refused before it is looked again whether there are too many still."""

    def refuse(self, addr: int, reason: str) -> str:
        """Remembers a reason, and returns it."""
        if len(self.refused) >= _MAX_REFUSED:
            self.refused.clear()
        self.refused[addr] = reason
        return reason


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
    paged: bool = False
    """Its slot is in slot pages, or is to be from its first hit on. The program may unmap those: each hit makes sure."""
    tally: Tally = field(default_factory=Tally)
    returns: tuple[ReturnSink, ...] = ()
    unwinds: bool = False
    awaiting: set[int] = field(default_factory=set)
    """Addresses of the entries whose calls return here; without any it is no return point."""
    original: bytes = field(init=False)

    def __post_init__(self) -> None:
        self.original = self.plan.code[:1]

    @property
    def armed(self) -> bytes:
        """The instruction as it is in memory while it is armed."""
        return BREAKPOINT + self.plan.code[1 : self.step.length]


class AddressSpace:
    """Breakpoints and slots of one mm; shared by processes that share it (vfork, CLONE_VM)."""

    uses_slack: ClassVar[bool] = True
    """Tests turn it off: no file has room behind its code then."""

    def __init__(self, pid: int) -> None:
        """Opens the memory of a process. Raises ProcessLookupError, PermissionError."""
        self.fd = procfs.open_memory(pid)
        self.sites: dict[int, Site] = {}
        self.former: dict[int, Site] = {}
        """Sites that were taken out; a thread may have hit one just before, and a child forked then may have its byte."""
        self.slots: dict[int, tuple[Site, Slot]] = {}
        """By slot address; kept until no thread can be inside."""
        self.areas: set[int] = set()
        """Addresses of slot pages."""
        self.unmappable: Unsupported | None = None
        """Why the kernel does not let the process map slot pages, once it has been asked."""
        self.users = 1
        self.written: list[tuple[int, bytes, Site]] = []
        """(address, bytes, site) of each write since ``undo_strays``."""
        self.records: Space | None = None
        """Its part of the journal; None without one."""
        self.foreign: set[int] = set()
        """Addresses of breakpoints that were looked into and are the program's own, or another tool's."""
        self.calls = Calls()
        self.semaphores = Semaphores(self)

    def reopen(self, pid: int) -> None:
        """Opens the memory that a process has now, where nothing has been written yet. Not after the last ``close``."""
        if self.fd < 0:
            raise ProcessLookupError(errno.ESRCH, "the last process of this memory is gone", str(pid))
        fresh = procfs.open_memory(pid)
        os.close(self.fd)
        self.fd = fresh
        if self.records is not None:
            self.records.fd = fresh

    def close(self) -> None:
        """Gives up the descriptor when the last process that shares the address space is gone."""
        self.users -= 1
        if self.users == 0:
            if self.records is not None:
                self.records.close()
            # A number that is used again would lead a late write into another process.
            fd, self.fd = self.fd, -1
            os.close(fd)

    def journal(self, records: Space) -> None:
        """Notes in the journal what is written from now on, and what came from a parent's memory."""
        self.records = records
        try:
            for site in self.sites.values():
                self._note(site)
            self.semaphores.journal()
        except OSError:
            # That was not written by us: it is there, and is served.
            log.exception("the journal has no room for what a child has of its parent's breakpoints")

    def belongs_to(self, pid: int, start_time: int) -> None:
        """Notes which process has this memory, when one of those that share it is gone."""
        if self.records is not None:
            self.records.belongs_to(pid, start_time)

    def _note(self, site: Site) -> None:
        if self.records is not None:
            file = site.plan.file
            self.records.enter(site.addr, file.dev, file.inode, site.plan.offset, site.plan.code, BREAKPOINT)

    def _forget(self, site: Site) -> None:
        if self.records is not None:
            self.records.clear(site.addr)

    # --- breakpoints -------------------------------------------------------------------------------------------------

    def arm(self, request: SiteRequest, no_pages: Callable[[Site], Unsupported | None] = lambda site: None) -> Site:
        """Writes a breakpoint. The instruction in memory must be the file's (semantics R14).

        Args:
            request: what is wanted.
            no_pages: says why a site cannot be given a slot at its first hit either, for one that can have none now. What
                that does not know shows at that hit.

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
        site = Site(addr, plan, step, request.sinks, request.is_hook, tally=request.tally, returns=request.returns)
        site.unwinds = request.unwinds
        site.next_ip = step.next_ip(addr)
        if site.next_ip is None:
            site.slot = self._place(site, request.slack_addr)
            if not site.slot and step.computed is None:
                site.paged = True
                if not self.place_in_area(site) and (refusal := no_pages(site)) is not None:
                    raise refusal
        try:
            self._note(site)
        except OSError as e:
            raise Unsupported(
                f"the tracer's journal has no room: {e.strerror or e}",
                reason="NoJournal",
                hint="make room where the tracer's socket is",
            ) from e
        try:
            os.pwrite(self.fd, BREAKPOINT, addr)
        except OSError:
            self._forget(site)
            raise
        self.written.append((addr, BREAKPOINT, site))
        self.sites[addr] = site
        if site.slot and not self._keeps_slot(site.slot):
            # The file was mapped anew between the two writes. Who has hit it waits for us, and goes back.
            self.disarm(site)
            raise Unsupported(f"the mapping at {addr:#x} changed meanwhile", reason="Unmapped")
        self.former.pop(addr, None)
        return site

    def disarm(self, site: Site, *, mapped: bool = True) -> bool:
        """Takes a breakpoint out. Returns False where it is there and cannot be written: then it stays one of ``sites``, of
        no consumer, so that whoever runs into it goes on (semantics R7).

        Args:
            site: one of ``sites``.
            mapped: whether the file is still mapped there. If not, its bytes went with the mapping, and what is there now is
                ours only where it is the very instruction with our byte: a program that moved its text to other memory
                (large pages) took that along.
        """
        if self.has(site.addr, BREAKPOINT if mapped else site.armed):
            # It may be unmapped meanwhile, or the address space gone with its last process.
            if not self.put(site.addr, site.original) and self.has(site.addr, site.armed):
                site.sinks = site.returns = ()
                site.awaiting.clear()
                return False
            self.written.append((site.addr, site.original, site))
        if site.slot and not self._keeps_slot(site.slot):
            self.slots.pop(site.slot, None)
        del self.sites[site.addr]
        self._forget(site)
        self.former.pop(site.addr, None)
        self.former[site.addr] = site
        if len(self.former) > _MAX_FORMER:
            del self.former[next(iter(self.former))]
        return True

    def settle_written(self) -> None:
        """Notes that what was written so far met what it was meant for."""
        self.written.clear()
        self.semaphores.written.clear()

    def undo_strays(self, still_mapped: Callable[[int, SitePlan], bool], pid: int) -> list[Site]:
        """Replaces what was written and met another mapping by what that has there: its file's bytes, or zeros in anonymous
        memory. What a program itself may have put there in the microsecond before our write cannot be known.

        Nobody may run in this memory meanwhile.

        Args:
            still_mapped: by the mappings as they are now.
            pid: a process that has this memory.

        Returns:
            Sites that are no more.
        """
        gone = []
        written, self.written = self.written, []
        for addr, content, site in written:
            if still_mapped(site.addr, site.plan):
                continue
            if addr == site.addr and self.has(addr + 1, site.plan.code[1:]):
                self.put(addr, site.original)  # the code itself, in other memory: a program that moves its text
            elif self.has(addr, content):
                with contextlib.suppress(OSError):
                    if (own := maps.content_at(pid, addr, len(content))) is not None:
                        self.put(addr, own)
            self.slots.pop(addr, None)
            if self.sites.get(site.addr) is site:
                del self.sites[site.addr]
                self._forget(site)
                gone.append(site)
        return gone

    def has_breakpoint(self, addr: int) -> bool:
        """Whether an int3 is in memory at an address now; False where nothing is mapped."""
        return self.has(addr, BREAKPOINT)

    def stands(self, site: Site) -> bool:
        """Whether a site is as it was armed: mapped anew, its file is there again without our bytes."""
        # (A slot in pages is looked for at each hit.)
        return self.has_breakpoint(site.addr) and (site.paged or not site.slot or self._keeps_slot(site.slot))

    def take_back(self, plan: SitePlan, addr: int, moved: Callable[[Site], bool]) -> bool:
        """Takes out a breakpoint of ours that came to an address with the memory it was written to (mremap).

        Args:
            plan: of the instruction that is mapped there.
            addr: where it is now; no site of ours.
            moved: whether a site's own address has the instruction no more.
        """
        for site in (*self.sites.values(), *self.former.values()):
            same = site.plan.file == plan.file and site.plan.offset == plan.offset and site.addr != addr
            if same and self.has(addr, site.armed) and moved(site) and self.put(addr, site.original):
                # A thread may have hit it there already.
                self.former[addr] = Site(addr, site.plan, site.step, (), site.is_hook)
                return True
        return False

    def restored(self, site: Site) -> bool:
        """Whether a former site's place holds no breakpoint of ours; puts one right that came back with moved text."""
        if not self.has_breakpoint(site.addr):
            return True
        return self.has(site.addr, site.armed) and self.put(site.addr, site.original)

    def has(self, addr: int, content: bytes) -> bool:
        """Whether these bytes are at an address now; False where nothing is mapped."""
        for _ in range(_TRIES):
            with contextlib.suppress(OSError):
                return os.pread(self.fd, len(content), addr) == content
        return False

    def read(self, addr: int, length: int) -> bytes:
        """Returns what is at an address; nothing, or less, where that is not mapped."""
        for _ in range(_TRIES):
            with contextlib.suppress(OSError):
                return os.pread(self.fd, length, addr)
        return b""

    def put(self, addr: int, content: bytes) -> bool:
        """Writes; returns whether that could be done."""
        for _ in range(_TRIES):
            with contextlib.suppress(OSError):
                return os.pwrite(self.fd, content, addr) == len(content)
        return False

    def inherit(self, parent: AddressSpace) -> None:
        """Takes over what a forked child's memory has of its parent's breakpoints and slots.

        The parent's may have changed between the fork and now: the child's memory decides, not the parent's tables.
        """
        pages: dict[int, bytes] = {}
        for site in (*parent.former.values(), *parent.sites.values()):
            copy = Site(site.addr, site.plan, site.step, (), site.is_hook, site.slot, site.next_ip, site.paged)
            copy.awaiting = set(site.awaiting)
            page, at = divmod(site.addr, _PAGE)
            if page not in pages:
                pages[page] = self.read(page * _PAGE, _PAGE)
            there = pages[page][at : at + 1] == BREAKPOINT
            (self.sites if there else self.former)[site.addr] = copy
        self.semaphores.inherit(parent.semaphores, self.sites)
        for addr, (site, slot) in parent.slots.items():
            if self.has(addr, slot.code):
                self.slots[addr] = (self.sites.get(site.addr, site), slot)
        # (A paged slot may have been placed after the fork; that is seen at the first hit.)
        self.areas = {area for area in parent.areas if self.has(area, AREA_HEADER)}

    def purge_child(self, tid: int) -> None:
        """Takes out of a stopped child's memory, which is a copy of this one, what it has of our breakpoints and slots, by
        ptrace alone: for one whose memory cannot be opened."""
        for site in (*self.former.values(), *self.sites.values()):
            with contextlib.suppress(OSError):
                word = ptrace.peek(tid, site.addr)
                if word.startswith(site.armed[: len(word)]):
                    self.semaphores.purge_child(tid, site.addr)
                    ptrace.poke(tid, site.addr, site.original + word[1:])
        for addr, (_, slot) in self.slots.items():
            with contextlib.suppress(OSError):
                for at in range(0, len(slot.code), ptrace.WORD):
                    part = slot.code[at : at + ptrace.WORD]
                    word = ptrace.peek(tid, addr + at)
                    if word.startswith(part):
                        ptrace.poke(tid, addr + at, self._blank(addr, len(part)) + word[len(part) :])

    # --- slots -------------------------------------------------------------------------------------------------------

    def _place(self, site: Site, slack_addr: int) -> int:
        """Writes the displaced copy into the module's unused bytes; returns its address, 0 where there is no room."""
        for addr, (owner, _) in list(self.slots.items()):
            if owner.addr == site.addr and owner.plan == site.plan:
                if self._keeps_slot(addr):
                    site.paged = self._is_paged(addr)
                    return addr
                del self.slots[addr]  # it went with its mapping, and the file was mapped there anew
                break
        if not slack_addr or not self.uses_slack:
            return 0
        first = -(-slack_addr // 16) * 16
        for addr in range(first, slack_addr + site.plan.slack_len - SLOT_BYTES + 1, SLOT_BYTES):
            if addr in self.slots:
                continue
            try:
                slot = site.step.slot(site.addr, addr)
            except Unsupported:
                return 0
            found = os.pread(self.fd, SLOT_BYTES, addr)
            if found not in (bytes(SLOT_BYTES), slot.code.ljust(SLOT_BYTES, b"\0")):
                # Somebody else's: a hot patch. (The very copy that is to be there may have moved here with the code, or
                # be the remains of a tracer that was killed.)
                continue
            os.pwrite(self.fd, slot.code, addr)
            self.written.append((addr, slot.code, site))
            self.slots[addr] = (site, slot)
            return addr
        return 0

    def place_in_area(self, site: Site) -> bool:
        """Writes the displaced copy into slot pages that are there already. Returns whether there is a slot now."""
        for area in sorted(self.areas, key=lambda a: abs(a - site.addr)):
            if not self.has(area, AREA_HEADER):
                self._lose_area(area)
                continue
            content = procfs.tried(lambda a=area: os.pread(self.fd, AREA_BYTES, a))  # type: ignore[misc]
            for at in range(SLOT_BYTES, AREA_BYTES - SLOT_BYTES + 1, SLOT_BYTES):
                addr = area + at
                if addr in self.slots:
                    continue
                try:
                    slot = site.step.slot(site.addr, addr)
                except Unsupported:
                    break
                # What is neither may be the remains of a tracer that was killed, with a thread inside that stands still.
                full = slot.code.ljust(SLOT_BYTES, _HLT)
                if content[at : at + SLOT_BYTES] in (_HLT * SLOT_BYTES, full) and self.put(addr, full):
                    self.slots[addr] = (site, slot)
                    site.slot = addr
                    return True
        return False

    def add_area(self, area: int) -> bool:
        """Makes slot pages of fresh memory. Returns whether it could be written."""
        if not self.put(area, AREA_HEADER.ljust(AREA_BYTES, _HLT)):
            return False
        self.areas.add(area)
        return True

    def runs_paged(self, site: Site) -> bool:
        """Whether the slot of a paged site is (still) there."""
        return site.slot != 0 and self._keeps_slot(site.slot)

    def _lose_area(self, area: int) -> None:
        """The program unmapped slot pages, or put something else there."""
        self.areas.discard(area)
        for addr in [a for a in self.slots if area <= a < area + AREA_BYTES]:
            del self.slots[addr]

    def _is_paged(self, slot: int) -> bool:
        return any(area <= slot < area + AREA_BYTES for area in self.areas)

    def _blank(self, slot: int, length: int) -> bytes:
        """What is in a slot before and after its use."""
        return length * (_HLT if self._is_paged(slot) else b"\0")

    def slot_at(self, ip: int) -> tuple[int, Site, Slot] | None:
        """Returns (address, site, slot) of the slot that an instruction pointer is in."""
        for addr, (site, slot) in self.slots.items():
            if addr <= ip < addr + len(slot.code) and self._keeps_slot(addr):
                return addr, site, slot
        return None

    def _keeps_slot(self, addr: int) -> bool:
        """Whether a slot's bytes are there still, and did not go with a mapping."""
        return self.has(addr, self.slots[addr][1].code) if addr in self.slots else False

    def wipe_slots(self) -> None:
        """Puts back what was there. Only when no thread can be inside, and no site uses them.

        Slot pages stay: unmapping them would take another stop at a breakpoint, and they serve again.
        """
        for addr, (site, slot) in self.slots.items():
            blank = self._blank(addr, len(slot.code))
            if self.has(addr, slot.code) and self.put(addr, blank) and not self._is_paged(addr):
                self.written.append((addr, blank, site))
        self.slots.clear()
