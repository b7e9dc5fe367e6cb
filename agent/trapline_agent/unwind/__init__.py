"""User stacks: tables made of .eh_frame (agent), the walk at the trap by them (tracer), names for frames (reader).

``eh_frame``, ``tables`` and ``names`` read ELF files and belong to the agent; ``table`` and ``walk`` are the tracer's, and
parse nothing but a table that was made here and the text of /proc/PID/maps. docs/adr/0014 says why it is done so.
"""
