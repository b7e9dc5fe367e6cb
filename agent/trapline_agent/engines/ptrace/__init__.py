"""The ptrace engine: int3 at the site, the hit is evaluated while the thread is stopped.

``engine`` is the ``Engine``: it has tracer threads, and gives them commands. One of these threads, from the outside inwards:

- ``loop`` waits for stops and says who serves them; ``commands`` is what the engine has it do;
- ``hits`` serves SIGTRAPs, and ``returns`` those of return probes; ``lifecycle`` serves births, execs and ends;
- ``arming`` brings a process to what is wanted in it; ``resuming`` lets threads go on;
- ``group`` has the processes that the thread follows, which ``tracee`` describes, and settles them;
- ``stepping`` takes a thread out of traps and slots, ``pages`` makes slots, ``memory`` is an address space with its
  breakpoints.

``attaching``, ``reaper`` and ``directory`` are between the engine and its threads.
"""
