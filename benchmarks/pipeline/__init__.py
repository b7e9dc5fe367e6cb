"""How many hits a second the way from host to subscriber carries."""
