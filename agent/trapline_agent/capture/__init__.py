"""Captured values: from expressions to fetches, and from fetched words to values."""
