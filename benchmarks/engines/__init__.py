"""What a hit costs the traced program, per engine, beside other tools."""
