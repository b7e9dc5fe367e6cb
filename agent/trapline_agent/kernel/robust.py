"""Learning at once that a process is being killed: robust mutexes in shared memory (pthread_mutexattr_setrobust(3)).

When a thread dies that holds one, the kernel marks it and wakes whoever waits for it (kernel/futex/core.c,
exit_robust_list), and does so when the thread gives up its memory: before it lets its tracees go (exit_ptrace), and long
before its descriptors are closed or its pidfd is readable, which wait until the whole address space is torn down.

Several threads hold one each, since all are killed at once and nobody knows which of them is first to get to a CPU.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from typing import Final

COUNT: Final = 32
"""Threads that can hold one at a time."""
BYTES: Final = 64 * COUNT
"""Of shared memory that they take."""
_STRIDE: Final = 64
"""sizeof(pthread_mutex_t) is 40 on x86-64 (glibc, musl); a cache line each."""
_SHARED, _ROBUST = 1, 1
_WAITERS: Final = 0x8000_0000
_OWNER_DIED: Final = 0x4000_0000
_NR_FUTEX, _NR_FUTEX_WAITV = 202, 449
_FUTEX_WAIT, _FUTEX_32 = 0, 2
_WORD = struct.Struct("=I")
_WAITV = struct.Struct("=QQII")
_libc = ctypes.CDLL(None, use_errno=True)


class DeathWatch:
    """``COUNT`` mutexes at a place in memory that two processes share. ``arm`` and what follows in the one that may be
    killed, ``wait`` in the other."""

    def __init__(self, memory: mmap.mmap, offset: int) -> None:
        """
        Args:
            memory: mapped shared and writable; must stay mapped for the life of each thread that holds one.
            offset: multiple of 64.
        """
        self._memory = memory
        self._offset = offset
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(memory, offset))
        self._free = list(range(COUNT))

    def create(self) -> None:
        """Makes the mutexes; nobody may hold or wait for one. Raises OSError where libc has none of the kind."""
        attributes = ctypes.create_string_buffer(64)
        _check(_libc.pthread_mutexattr_init(attributes))
        _check(_libc.pthread_mutexattr_setpshared(attributes, _SHARED))
        _check(_libc.pthread_mutexattr_setrobust(attributes, _ROBUST))
        for number in range(COUNT):
            self._memory[self._at(number) : self._at(number) + _STRIDE] = bytes(_STRIDE)
            _check(_libc.pthread_mutex_init(self._mutex(number), attributes))

    def hold(self) -> int | None:
        """Has the calling thread's death told, until ``let_go``; returns what to give that, None where all are taken."""
        try:
            number = self._free.pop()
        except IndexError:
            return None
        _check(_libc.pthread_mutex_lock(self._mutex(number)))
        # Who waits does so without locking; the kernel wakes only where it is said that somebody does.
        at = self._at(number)
        _WORD.pack_into(self._memory, at, _WORD.unpack_from(self._memory, at)[0] | _WAITERS)
        return number

    def let_go(self, number: int | None) -> None:
        """The calling thread is about to end in good order."""
        if number is not None:
            _check(_libc.pthread_mutex_unlock(self._mutex(number)))
            self._free.append(number)

    def died(self) -> bool:
        """Whether a thread died that held one."""
        return any(word & _OWNER_DIED for word in self._words())

    def wait(self) -> None:
        """Waits until a thread dies that holds one. Raises OSError where that cannot be."""
        while True:
            words = self._words()
            if any(word & _OWNER_DIED for word in words):
                return
            wanted = b"".join(
                _WAITV.pack(word, self._base + _STRIDE * number, _FUTEX_32, 0) for number, word in enumerate(words)
            )
            if _libc.syscall(_NR_FUTEX_WAITV, wanted, COUNT, 0, None, 0) >= 0:
                continue
            if ctypes.get_errno() == errno.ENOSYS:  # before Linux 5.16: the first that is held
                first = COUNT - 1
                if _libc.syscall(_NR_FUTEX, self._mutex(first), _FUTEX_WAIT, words[first], None, None, 0) >= 0:
                    continue
            if ctypes.get_errno() not in (errno.EAGAIN, errno.EINTR):
                _check(ctypes.get_errno())

    def _words(self) -> list[int]:
        return [_WORD.unpack_from(self._memory, self._at(number))[0] for number in range(COUNT)]

    def _at(self, number: int) -> int:
        return self._offset + _STRIDE * number

    def _mutex(self, number: int) -> ctypes.c_void_p:
        return ctypes.c_void_p(self._base + _STRIDE * number)


def _check(code: int) -> None:
    """The pthread functions return their errno."""
    if code:
        raise OSError(code, os.strerror(code))
