"""The tracer: the one process that holds traps. Small, no network, no DWARF; it speaks to its agent over a Unix socket.

``table`` has the uprobes and their consumers, ``hooks`` tell of later mappings, ``breaker`` keeps probes to their budgets
(``guard`` joins it to table and engine, ``meters`` and ``outages`` do its sums), ``loop`` joins them all, ``client`` is
the agent's end of the socket and the only module here that the agent process imports (with ``messages``).
"""
