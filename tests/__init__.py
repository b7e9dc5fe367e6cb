"""The tests; a package, so that `tests.support` is this one and no other on the path."""
