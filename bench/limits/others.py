"""How others limit rates on the same Redis, asked for as many rules. Neither does the same: no hold that is settled later, no rebuild.

`limits` decides rule by rule, so a refusal by the last one has used up the others. Fixed windows let twice the limit pass at their edge.
"""

import time
from urllib.parse import urlsplit

from limits import RateLimitItemPerDay, RateLimitItemPerMinute, RateLimitItemPerMonth
from limits.aio.storage import RedisStorage
from limits.aio.strategies import MovingWindowRateLimiter

from bench.limits.demands import DEMAND, LIMIT, Shape, subject
from bench.limits.raw_redis import RawPool, packed

# The entries that the library keeps for one counter: its logs are as long as the limit.
_WINDOW_LIMIT = 1_000
_SECONDS = {"minute": 60, "day": 86_400, "month": 31 * 86_400}


class MovingWindows:
    """The `limits` library: a moving window of requests for each rule, one after another."""

    def __init__(self, url: str, shape: Shape) -> None:
        # Its limiter asks by address, and the password is part of it.
        parts = urlsplit(url)
        self._storage = RedisStorage(f"async+{parts.geturl()}", implementation="redispy", max_connections=256)
        self._limiter = MovingWindowRateLimiter(self._storage)
        self._tenants = [str(tenant_id) for tenant_id in shape.tenant_ids]
        kinds = (RateLimitItemPerMinute, RateLimitItemPerMinute, RateLimitItemPerDay, RateLimitItemPerMonth, RateLimitItemPerMinute)
        self._items = [(kinds[number % len(kinds)](_WINDOW_LIMIT), f"rule-{number}") for number in range(shape.rule_count)]

    async def decide(self, number: int) -> None:
        """One decision: every rule, until one refuses."""
        tenant, user = self._tenants[number % len(self._tenants)], subject(number).user
        for item, name in self._items:
            if not await self._limiter.hit(item, tenant, user, name):
                return

    async def close(self) -> None:
        """Nothing of it stays but its keys."""
        await self._storage.reset()


class FixedWindows:
    """As Envoy's reference service does: INCRBY and EXPIRE for each rule, all in one pipeline, and the answer compared."""

    def __init__(self, pool: RawPool, shape: Shape) -> None:
        self._pool = pool
        self._tenants = [str(tenant_id) for tenant_id in shape.tenant_ids]
        windows = [*_SECONDS] * shape.rule_count
        self._rules = [(f"rule-{number}", _SECONDS[windows[number]]) for number in range(shape.rule_count)]

    async def decide(self, number: int) -> None:
        """One decision: all rules at once."""
        tenant, user, now = self._tenants[number % len(self._tenants)], subject(number).user, int(time.monotonic())
        commands = []
        for name, seconds in self._rules:
            key = f"envoy_{tenant}_{user}_{name}_{now // seconds * seconds}"
            commands += [packed(("INCRBY", key, DEMAND.amounts.tokens)), packed(("EXPIRE", key, seconds))]
        replies = await self._pool.exchange(b"".join(commands), len(commands))
        if any(used > LIMIT for used in replies[::2] if isinstance(used, int)):
            raise RuntimeError("nothing here is to be refused")
