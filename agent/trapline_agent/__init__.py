"""What runs on a traced host: the agent process and the tracer process (docs/architecture/overview.md)."""
