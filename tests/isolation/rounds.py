"""The rounds of the suite: over which transport callers come, and in which kind of place the attacked tenant lives.

The transport decides how callers prove who they are; the place decides which tables, databases and collections stand behind a call. They
meet nowhere in the code, so not every pair is tried: each place is attacked over plaintext, and each transport with one place or two. Over
mutual TLS that is a silo, whose content is sealed as well; through PgBouncer the pool and a bridge, whose tenant and search path are
settings that a session could keep. A silo's connections do not go through the cell's pooler.
"""

import pytest

PLAIN = "plain"
MTLS = "mtls"
PGBOUNCER = "pgbouncer"
ROUNDS = (PLAIN, MTLS, PGBOUNCER)
POOL = "pool"
BRIDGE = "bridge"
SILO = "silo"
EVERYWHERE = ((PLAIN, POOL), (PLAIN, BRIDGE), (PLAIN, SILO), (MTLS, SILO), (PGBOUNCER, POOL), (PGBOUNCER, BRIDGE))


def over(*rounds: str) -> pytest.MarkDecorator:
    """Names the transports a module or a test runs over, as `pytestmark` or as a decorator; the attacked tenant is the usual one."""
    return pytest.mark.parametrize("mesh", rounds, indirect=True, scope="session")


def against(*pairs: tuple[str, str]) -> pytest.MarkDecorator:
    """Names the pairs of transport and place that a test attacks; all that are worth trying when none is named."""
    return pytest.mark.parametrize(("mesh", "victim"), pairs or EVERYWHERE, indirect=True, scope="session")
