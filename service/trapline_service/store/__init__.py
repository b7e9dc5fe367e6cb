"""What is kept: tokens, probes, hosts, and recorded hits. SQL appears here only."""
