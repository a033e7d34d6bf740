"""The rounds of the suite: everything is attacked over plaintext and over mutual TLS, the database also through PgBouncer.

A module that says nothing runs in the first two. What has nothing to do with a transport says so with `over`.
"""

import pytest

PLAIN = "plain"
MTLS = "mtls"
PGBOUNCER = "pgbouncer"
ROUNDS = (PLAIN, MTLS, PGBOUNCER)


def over(*rounds: str) -> pytest.MarkDecorator:
    """Names the rounds a module or a test runs in, as `pytestmark` or as a decorator."""
    return pytest.mark.parametrize("mesh", rounds, indirect=True, scope="session")
