"""Semaphores of USDT probes in one address space: counters in a program's data that say whether somebody looks at a probe.

The counter is raised by one for each site that wants it, when its breakpoint is in, and lowered by one before that is taken
out. So a copy of the memory that has no breakpoint of ours has no raise of ours either: that is how it is known of a child
of a fork, and after the death of a tracer (``engines.restoring``). Others raise it too (the kernel's uprobes, for example:
kernel/events/uprobes.c, update_ref_ctr), so it is added to and subtracted from, never set.

Whatever is in doubt is left raised: the program then works out arguments that nobody looks at. One that is lowered once
too often switches off the probe of somebody else.

Belongs to the tracer thread that follows the process, as all of its memory does.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from trapline.errors import Unsupported
from trapline_agent.engines.base import Counter
from trapline_agent.kernel import ptrace
from trapline_agent.plans import SEMAPHORE_BYTES

if TYPE_CHECKING:
    from trapline_agent.engines.ptrace.memory import AddressSpace

log = logging.getLogger(__name__)

MAX = 0xFFFF
_MAX_KNOWN = 65_536

Holds = Callable[[Counter], bool]
"""Whether a counter lies in its file's own writable private mapping."""


class Semaphores:
    """See the module."""

    def __init__(self, memory: AddressSpace) -> None:
        self._memory = memory
        self.raised: dict[int, Counter] = {}
        """By the address of the site that they are raised for."""
        self._known: dict[int, Counter] = {}
        """The same of sites that were taken out, too: a child that was forked before has their raises."""
        self.written: list[tuple[int, Counter, int, int]] = []
        """(site's address, counter, value before, value written) since ``undo_strays``."""

    def lift(self, site: int, counter: Counter, holds: Holds) -> None:
        """Raises a counter for a site, whose breakpoint is in; once, however often it is called.

        Raises:
            Unsupported: it is not mapped (yet), or as high as it can be; nothing was written.
        """
        before = self.raised.get(site)
        if before == counter:
            return
        if before is not None:
            self.lower(site, holds)
        self.require(counter, holds)
        value = self.value(counter)
        if value is None or value == MAX or not self._put(site, counter, value, value + 1):
            why = "cannot be written" if value is None or value < MAX else "is as high as it can be"
            raise Unsupported(f"the semaphore at {counter.addr:#x} {why}", reason="Semaphore")
        self.raised[site] = counter
        self._known.pop(site, None)
        self._known[site] = counter
        if len(self._known) > _MAX_KNOWN:
            del self._known[next(iter(self._known))]
        self._note(site, counter)

    @staticmethod
    def require(counter: Counter, holds: Holds) -> None:
        """Raises Unsupported where a counter is not mapped (yet)."""
        if not holds(counter):
            raise Unsupported(
                f"the semaphore at {counter.addr:#x} is not in a mapping of its file's data",
                hint="a library's is mapped after its code: it is looked at again when its loader is done",
                reason="Semaphore",
            )

    def lower(self, site: int, holds: Holds) -> None:
        """Takes back what ``lift`` did for a site, if anything. To be called before its breakpoint is taken out.

        What went with its mapping is only forgotten: where our breakpoint is no more, or the counter's file is not mapped,
        nothing is written.
        """
        counter = self.raised.pop(site, None)
        if counter is None:
            return
        self._forget(site)
        if not self._memory.has_breakpoint(site) or not holds(counter):
            return
        value = self.value(counter)
        if value == 0:
            log.warning("the semaphore at %#x was raised, and is 0: somebody else has lowered it", counter.addr)
        elif value is None or not self._put(site, counter, value, value - 1):
            log.warning("the semaphore at %#x cannot be lowered, and stays raised", counter.addr)

    def value(self, counter: Counter) -> int | None:
        """Returns what a counter is now; None where nothing is mapped."""
        found = self._memory.read(counter.addr, SEMAPHORE_BYTES)
        return int.from_bytes(found, "little") if len(found) == SEMAPHORE_BYTES else None

    def _put(self, site: int, counter: Counter, before: int, value: int) -> bool:
        if not self._memory.put(counter.addr, value.to_bytes(SEMAPHORE_BYTES, "little")):
            return False
        self.written.append((site, counter, before, value))
        return True

    def undo_strays(self, holds: Holds) -> bool:
        """Takes back what was written and met another mapping: puts there what was found there before. As
        ``AddressSpace.undo_strays``, nobody may run in this memory meanwhile.

        Args:
            holds: by the mappings as they are now.

        Returns:
            Whether there was anything.
        """
        strays = False
        written, self.written = self.written, []
        for site, counter, before, value in reversed(written):
            if holds(counter):
                continue
            strays = True
            if self.value(counter) == value:
                self._memory.put(counter.addr, before.to_bytes(SEMAPHORE_BYTES, "little"))
            if self.raised.get(site) == counter:
                del self.raised[site]
                self._forget(site)
        return strays

    def journal(self) -> None:
        """Notes in the journal what came from a parent's memory."""
        for site, counter in self.raised.items():
            self._note(site, counter)

    def _note(self, site: int, counter: Counter) -> None:
        if self._memory.records is not None:
            try:
                self._memory.records.raised(site, counter.addr)
            except OSError:
                log.exception("the journal has no room for a semaphore, which stays raised if the tracer is killed")

    def _forget(self, site: int) -> None:
        if self._memory.records is not None:
            self._memory.records.lowered(site)

    # --- children ----------------------------------------------------------------------------------------------------

    def inherit(self, parent: Semaphores, sites: Iterable[int]) -> None:
        """Takes over what a forked child's memory has of its parent's raises.

        The parent's may have been raised or lowered between the fork and now. By how much shows in how far the two differ:
        others do so in all of a file's processes alike.

        Args:
            parent: of the parent, as it is now.
            sites: addresses of those of which the child has the breakpoint. None else was raised.
        """
        mine: dict[Counter, list[int]] = {}
        for site in sites:
            if (counter := parent._known.get(site)) is not None:
                mine.setdefault(counter, []).append(site)
        for counter, addrs in mine.items():
            there, above = self.value(counter), parent.value(counter)
            if there is None:
                continue
            count = sum(other == counter for other in parent.raised.values())
            if above is not None:
                count += there - above
            addrs.sort(key=lambda addr: addr not in parent.raised)
            for addr in addrs[: max(0, min(count, there))]:
                self.raised[addr] = self._known[addr] = counter

    def purge_child(self, tid: int, site: int) -> None:
        """Lowers what a stopped child, whose memory is a copy of this one, has of a site's raise; by ptrace alone."""
        counter = self.raised.get(site)
        if counter is None:
            return
        at, inside = counter.addr & -ptrace.WORD, counter.addr % ptrace.WORD
        with contextlib.suppress(OSError):
            word = ptrace.peek(tid, at)
            value = int.from_bytes(word[inside : inside + SEMAPHORE_BYTES], "little")
            if value:
                lowered = (value - 1).to_bytes(SEMAPHORE_BYTES, "little")
                ptrace.poke(tid, at, word[:inside] + lowered + word[inside + SEMAPHORE_BYTES :])
