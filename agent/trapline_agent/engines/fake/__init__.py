"""The fake engine: the rules of an engine over simulated processes, in memory, for tests and for work without privileges.

``world`` is the simulated host, ``engine`` the ``Engine``. It is a *verified* fake: the contract suite of tests/engines runs
over it as over the others. Its processes run on their caller's thread: a call is one call of ``World.call``.
"""

from trapline_agent.engines.fake.engine import FakeEngine
from trapline_agent.engines.fake.world import World

__all__ = ["FakeEngine", "World"]
