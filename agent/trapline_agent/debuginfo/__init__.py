"""What debug information says of code: functions, lines, variables and where they are, types."""
