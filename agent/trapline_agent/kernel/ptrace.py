"""ptrace(2): python-ptrace's request numbers and register layout, and what it lacks by ctypes.

python-ptrace is GPL-2.0-only; this is the one module that imports it, and only the tracer process imports this module
(docs/adr/0004). Its ``ptrace()`` wrapper and its debugger are not used: the one costs several times the system call, the
other calls ``waitpid(-1)``, has no SEIZE and drops foreign SIGTRAPs.

Every call must come from the thread that seized the tracee; ptrace answers ESRCH to any other (ptrace(2), "Notes").
Requests on a stopped tracee do not block, so they keep the interpreter lock (PyDLL), which saves giving it up and fighting
for it again several times a hit. SEIZE can block (on cred_guard_mutex while the tracee is in execve) and gives it up, as
waiting does; so does kcmp, which waits for an execve that closes its files (kernel/kcmp.c, exec_update_lock).
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Sequence
from typing import Final

from ptrace.binding.func import (
    PTRACE_CONT,
    PTRACE_DETACH,
    PTRACE_EVENT_CLONE,
    PTRACE_EVENT_EXEC,
    PTRACE_EVENT_FORK,
    PTRACE_EVENT_VFORK,
    PTRACE_GETEVENTMSG,
    PTRACE_GETREGS,
    PTRACE_GETSIGINFO,
    PTRACE_O_TRACECLONE,
    PTRACE_O_TRACEEXEC,
    PTRACE_O_TRACEFORK,
    PTRACE_O_TRACEVFORK,
    PTRACE_PEEKDATA,
    PTRACE_POKEDATA,
    PTRACE_POKEUSER,
    PTRACE_SETREGS,
    PTRACE_SETSIGINFO,
    PTRACE_SINGLESTEP,
    PTRACE_SYSCALL,
    REGISTER_NAMES,
    ptrace_registers_t,
)

__all__ = ["PTRACE_EVENT_CLONE", "PTRACE_EVENT_EXEC", "PTRACE_EVENT_FORK", "PTRACE_EVENT_VFORK", "REGISTER_NAMES"]

PTRACE_SEIZE: Final = 0x4206
PTRACE_INTERRUPT: Final = 0x4207
PTRACE_LISTEN: Final = 0x4208
PTRACE_GETSIGMASK: Final = 0x420A
PTRACE_SETSIGMASK: Final = 0x420B
PTRACE_EVENT_STOP: Final = 128

FOLLOW: Final[int] = PTRACE_O_TRACEFORK | PTRACE_O_TRACEVFORK | PTRACE_O_TRACECLONE | PTRACE_O_TRACEEXEC
"""Children and new images are followed; PTRACE_O_EXITKILL is not set: our death is not to kill a target."""

WALL: Final = 0x40000000
WNOTHREAD: Final = 0x20000000
SI_KERNEL: Final = 0x80
"""si_code of the SIGTRAP that int3 raises (arch/x86/kernel/traps.c, do_int3_user -> force_sig)."""

REGISTERS_BYTES: Final[int] = ctypes.sizeof(ptrace_registers_t)
SIGINFO_BYTES: Final = 128

_holding = ctypes.PyDLL(None, use_errno=True)
_fast = _holding.ptrace
# Without `argtypes`, whose conversions take as long as the system call. So a number is passed as a C int: what may be
# longer, an address or a register, has to be a ``Pointer``, made beforehand where it is needed at each hit.
_fast.restype = ctypes.c_long
Pointer = ctypes.c_void_p
_libc = ctypes.CDLL(None, use_errno=True)
_slow = _libc.ptrace
_slow.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_slow.restype = ctypes.c_long
_waitpid = _libc.waitpid
_syscall = _libc.syscall


def _fail(what: str, tid: int) -> OSError:
    code = ctypes.get_errno()
    if code == errno.ESRCH:
        return ProcessLookupError(code, os.strerror(code), f"{what} {tid}")
    return OSError(code, f"{os.strerror(code)} ({what} {tid})")


def seize(tid: int, options: int = FOLLOW) -> None:
    """Attaches to a thread without stopping it (PTRACE_SEIZE). Raises OSError: EPERM (not allowed, or traced already),
    ESRCH (gone)."""
    if _slow(PTRACE_SEIZE, tid, None, options) < 0:
        raise _fail("PTRACE_SEIZE", tid)


def interrupt(tid: int) -> None:
    """Asks for a PTRACE_EVENT_STOP. A blocking system call may return EINTR to the target: use it on running threads."""
    if _fast(PTRACE_INTERRUPT, tid, None, None) < 0:
        raise _fail("PTRACE_INTERRUPT", tid)


def cont(tid: int, signal: int = 0) -> None:
    """Lets a stopped thread go on, with a signal delivered to it. Raises ProcessLookupError when it was killed meanwhile."""
    if _fast(PTRACE_CONT, tid, None, signal or None) < 0:
        raise _fail("PTRACE_CONT", tid)


def listen(tid: int) -> None:
    """Keeps a group-stopped thread stopped as if it were not traced, until SIGCONT (PTRACE_LISTEN)."""
    if _fast(PTRACE_LISTEN, tid, None, None) < 0:
        raise _fail("PTRACE_LISTEN", tid)


def single_step(tid: int) -> None:
    """Runs one instruction; ends in a SIGTRAP stop."""
    if _fast(PTRACE_SINGLESTEP, tid, None, None) < 0:
        raise _fail("PTRACE_SINGLESTEP", tid)


def to_system_call(tid: int) -> None:
    """Lets a stopped thread go on until it enters or leaves a system call (PTRACE_SYSCALL)."""
    if _fast(PTRACE_SYSCALL, tid, None, None) < 0:
        raise _fail("PTRACE_SYSCALL", tid)


def detach(tid: int, signal: int = 0) -> None:
    """Lets a stopped thread go for good."""
    if _fast(PTRACE_DETACH, tid, None, signal or None) < 0:
        raise _fail("PTRACE_DETACH", tid)


def event_message(tid: int) -> int:
    """Returns what the last PTRACE_EVENT stop has to tell: the new child's id, or at exec the caller's former tid."""
    value = ctypes.c_ulong()
    if _fast(PTRACE_GETEVENTMSG, tid, None, ctypes.byref(value)) < 0:
        raise _fail("PTRACE_GETEVENTMSG", tid)
    return value.value


def signal_mask(tid: int) -> int:
    """Returns a stopped thread's blocked signals, bit n-1 for signal n (PTRACE_GETSIGMASK)."""
    mask = ctypes.c_uint64()
    if _fast(PTRACE_GETSIGMASK, tid, 8, ctypes.byref(mask)) < 0:
        raise _fail("PTRACE_GETSIGMASK", tid)
    return mask.value


def set_signal_mask(tid: int, mask: int) -> None:
    """Sets a stopped thread's blocked signals (PTRACE_SETSIGMASK)."""
    value = ctypes.c_uint64(mask)
    if _fast(PTRACE_SETSIGMASK, tid, 8, ctypes.byref(value)) < 0:
        raise _fail("PTRACE_SETSIGMASK", tid)


class RegisterFile:
    """A buffer for one thread's registers, used again for each stop; ``words`` is a view of u64 words by
    ``arch`` index. Not to be shared between threads."""

    def __init__(self) -> None:
        self._buffer = (ctypes.c_ubyte * REGISTERS_BYTES)()
        self._address = Pointer(ctypes.addressof(self._buffer))
        self._info = (ctypes.c_ubyte * SIGINFO_BYTES)()
        self._info_address = Pointer(ctypes.addressof(self._info))
        self._code = ctypes.c_int.from_buffer(self._info, 8)
        self._signo = ctypes.c_int.from_buffer(self._info, 0)
        self.words = memoryview(self._buffer).cast("B").cast("Q")

    def load(self, tid: int) -> None:
        """PTRACE_GETREGS into ``words``."""
        if _fast(PTRACE_GETREGS, tid, None, self._address) < 0:
            raise _fail("PTRACE_GETREGS", tid)

    def store(self, tid: int) -> None:
        """PTRACE_SETREGS from ``words``."""
        if _fast(PTRACE_SETREGS, tid, None, self._address) < 0:
            raise _fail("PTRACE_SETREGS", tid)

    def signal_code(self, tid: int) -> int:
        """PTRACE_GETSIGINFO; returns si_code. Raises OSError EINVAL in a group-stop."""
        if _fast(PTRACE_GETSIGINFO, tid, None, self._info_address) < 0:
            raise _fail("PTRACE_GETSIGINFO", tid)
        return self._code.value

    def signal_info(self, tid: int) -> bytes:
        """Returns the siginfo_t of the signal the thread is stopped for."""
        self.signal_code(tid)
        return bytes(self._info)

    def set_signal_info(self, tid: int, info: bytes) -> None:
        """Replaces the siginfo_t, before ``cont`` delivers that signal."""
        ctypes.memmove(self._info_address, info, SIGINFO_BYTES)
        if _fast(PTRACE_SETSIGINFO, tid, None, self._info_address) < 0:
            raise _fail("PTRACE_SETSIGINFO", tid)


_PTRACE_GETFPREGS: Final = 14
_FPREGS_BYTES: Final = 512
_XMM_OFFSET: Final = 160
"""``xmm_space`` in ``struct user_fpregs_struct`` (sys/user.h); the request's number is in sys/ptrace.h."""
_XMM_BYTES: Final = 256


def floating_registers(tid: int) -> bytes:
    """Returns xmm0 to xmm15 of a stopped thread, 16 bytes each. To be called by the thread that traces it."""
    buffer = ctypes.create_string_buffer(_FPREGS_BYTES)
    if _fast(_PTRACE_GETFPREGS, tid, None, Pointer(ctypes.addressof(buffer))) < 0:
        raise _fail("PTRACE_GETFPREGS", tid)
    return buffer.raw[_XMM_OFFSET : _XMM_OFFSET + _XMM_BYTES]


_MAX_POINTERS: Final = 4096
_pointers: dict[int, Pointer] = {}
"""Made once for each value: an instruction pointer is set to the same few at every hit."""


def poke_user(tid: int, offset: int, value: int) -> None:
    """Sets one word of ``struct user`` (a register at eight times its index)."""
    pointer = _pointers.get(value)
    if pointer is None:
        if len(_pointers) >= _MAX_POINTERS:
            _pointers.clear()
        pointer = _pointers[value] = Pointer(value)
    if _fast(PTRACE_POKEUSER, tid, offset, pointer) < 0:
        raise _fail("PTRACE_POKEUSER", tid)


WORD: Final = 8


def peek(tid: int, addr: int) -> bytes:
    """Returns 8 bytes of a stopped thread's memory (PTRACE_PEEKDATA). Raises OSError EIO where nothing is mapped."""
    ctypes.set_errno(0)
    word = int(_fast(PTRACE_PEEKDATA, tid, Pointer(addr), None))
    if word == -1 and ctypes.get_errno():
        raise _fail("PTRACE_PEEKDATA", tid)
    return (word & 2**64 - 1).to_bytes(WORD, "little")


def poke(tid: int, addr: int, word: bytes) -> None:
    """Writes 8 bytes to a stopped thread's memory, code too (PTRACE_POKEDATA). Raises OSError: EIO, nothing is mapped."""
    if _fast(PTRACE_POKEDATA, tid, Pointer(addr), Pointer(int.from_bytes(word, "little"))) < 0:
        raise _fail("PTRACE_POKEDATA", tid)


class Waiter:
    """waitpid(-1, __WALL | __WNOTHREAD) for one thread's tracees, which a signal interrupts.

    ``os.waitpid`` begins again after EINTR in every thread but the main one, so it cannot be woken for commands.
    """

    def __init__(self) -> None:
        self._status = ctypes.c_int()
        self._address = ctypes.byref(self._status)

    def wait(self, tid: int = -1, *, block: bool = True) -> tuple[int, int]:
        """Waits for a change of state of a tracee.

        Returns:
            (tid, wait status); (0, 0) where nothing changed and ``block`` is false, or after a signal; (-1, 0) where this
            thread has no tracees.
        """
        pid = _waitpid(tid, self._address, WALL | WNOTHREAD | (0 if block else os.WNOHANG))
        if pid > 0:
            return pid, self._status.value
        if pid == 0 or ctypes.get_errno() == errno.EINTR:
            return 0, 0
        return -1, 0


_SYS_KCMP: Final = 312
_KCMP_VM: Final = 1


NO_KCMP: Final = frozenset((errno.ESRCH, errno.ENOSYS, errno.EPERM))
"""errno of kcmp where it says nothing: one is gone, the kernel has no kcmp, seccomp forbids it."""


def same_address_space(a: int, b: int) -> bool:
    """True where both processes share one mm (kcmp(2), KCMP_VM). Raises OSError, ENOSYS where the kernel lacks it."""
    result = int(_syscall(_SYS_KCMP, a, b, _KCMP_VM, 0, 0))
    if result < 0:
        raise _fail("kcmp", b)
    return result == 0


def sharers(task: int, others: Sequence[int]) -> tuple[list[int], list[int]]:
    """Compares a live thread's address space with others'.

    Returns:
        (those that have the same, those of which kcmp says nothing: ended, not ours to ask).

    Raises:
        OSError: it cannot be known now.
    """
    found, unknown = [], []
    for other in others:
        result = _syscall(_SYS_KCMP, task, other, _KCMP_VM, 0, 0)
        if result == 0:
            found.append(other)
        elif result < 0:
            if ctypes.get_errno() not in NO_KCMP:
                raise _fail("kcmp", other)
            unknown.append(other)
    return found, unknown


_SYS_TGKILL: Final = 234


def thread_kill(pid: int, tid: int, signal: int) -> None:
    """Sends a signal to one thread (tgkill(2)). Raises ProcessLookupError where it has ended."""
    if _syscall(_SYS_TGKILL, pid, tid, signal) < 0:
        raise _fail("tgkill", tid)
