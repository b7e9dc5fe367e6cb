"""The service: probes as resources over HTTP, the agents' link, and the fan-out of hits to whoever looks on."""
