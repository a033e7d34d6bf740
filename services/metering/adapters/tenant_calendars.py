"""A tenant's time zone and billing cycle, out of its configuration at the tenant service."""

from datetime import UTC

from services.kernel.tenant_config import TenantConfigCache
from services.kernel.tenant_context import TenantContext
from services.kernel.timestamps import from_timestamp
from services.metering.usage_calendar import TenantCalendar, known_zone


class TenantCalendars:
    """Answers from memory while the configuration's version is known."""

    def __init__(self, configs: TenantConfigCache) -> None:
        self._configs = configs

    async def of(self, context: TenantContext) -> TenantCalendar:
        """Returns the calendar of the context's tenant.

        Raises: NotFound when the tenant is gone; Unavailable when its configuration is not known here and cannot be had.
        """
        rules = (await self._configs.get(context)).limit_rules
        zone = known_zone(rules.time_zone)
        anchor_day = 1
        if rules.HasField("cycle_anchor_time"):
            anchor_day = from_timestamp(rules.cycle_anchor_time).astimezone(zone).day
        return TenantCalendar("" if zone is UTC else rules.time_zone, zone, anchor_day)
