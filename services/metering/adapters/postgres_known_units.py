"""Which units of the product are known, over all tenants, as the jobs role."""

from collections.abc import Sequence

from services.kernel.tenant_database import JobsDatabase

_NAMED = """
SELECT t.unit FROM metering.event_types t
UNION
SELECT jsonb_array_elements(v.terms -> 'charges') ->> 0 FROM metering.billing_plan_versions v
"""
IS_NAMED = f"SELECT EXISTS (SELECT FROM ({_NAMED}) AS n (unit) WHERE n.unit = $1)"  # noqa: S608 - a constant
SELECT_NAMED = f"SELECT n.unit FROM ({_NAMED}) AS n (unit) WHERE n.unit NOT LIKE 'calls.%' ORDER BY n.unit LIMIT $1"  # noqa: S608 - a constant
# Reads the sums of every tenant's use until it finds one: asked for what nothing names, which is rare.
IS_USED = """
SELECT EXISTS (SELECT p.tenant_id FROM metering.usage_pending p WHERE p.product_unit = $1)
    OR EXISTS (SELECT u.tenant_id FROM metering.usage_rollups u WHERE u.product_unit = $1)
"""


class PostgresKnownUnits:
    """Implements KnownUnits."""

    def __init__(self, jobs: JobsDatabase) -> None:
        self._jobs = jobs

    async def is_known(self, unit: str) -> bool:
        """Tells whether a type of events counts the unit, a billing plan charges it or a tenant used it at its limits."""
        return bool(await self._jobs.fetch_value(IS_NAMED, unit) or await self._jobs.fetch_value(IS_USED, unit))

    async def known(self, most: int) -> Sequence[str]:
        """Returns up to so many units that types of events count or billing plans charge, by name."""
        return [row["unit"] for row in await self._jobs.call(SELECT_NAMED, most)]
