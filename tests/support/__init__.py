"""What the tests stand on: real children (`children`), real programs (`targets`), what a machine offers (`needs`)."""
