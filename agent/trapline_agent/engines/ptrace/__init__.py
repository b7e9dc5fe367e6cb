"""The ptrace engine: int3 at the site, the hit is evaluated while the thread is stopped.

``engine`` is the ``Engine``; ``loop`` one tracer thread and its tracees; ``memory`` an address space with its breakpoints
and slots.
"""
