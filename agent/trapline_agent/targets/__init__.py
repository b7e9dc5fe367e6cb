"""What runs on this host: processes, their mappings, and the files behind them.

Also imported by the tracer: keep it light.
"""
