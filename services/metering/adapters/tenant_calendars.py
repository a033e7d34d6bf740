"""A tenant's time zone and billing cycle, out of its configuration at the tenant service."""

from datetime import UTC

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from services.kernel.change_feed import ChangeFeed
from services.kernel.errors import MeshError, NotFound
from services.kernel.ids import TenantId
from services.kernel.tenant_config import CONFIG_CHANGES, TenantConfigCache
from services.kernel.tenant_context import TenantContext
from services.kernel.timed_cache import TimedCache
from services.kernel.timestamps import from_timestamp
from services.metering.adapters.tenant_plans_client import RemoteTenantPlans
from services.metering.usage_calendar import TenantCalendar, known_zone

# A change is told by the feed; who does not hear it asks again after this.
REMEMBERED_SECONDS = 60.0
_CAPACITY = 10_000


class TenantCalendars:
    """Answers from memory while the configuration's version is known."""

    def __init__(self, configs: TenantConfigCache) -> None:
        self._configs = configs

    async def of(self, context: TenantContext) -> TenantCalendar:
        """Returns the calendar of the context's tenant.

        Raises: NotFound when the tenant is gone; Unavailable when its configuration is not known here and cannot be had.
        """
        rules = (await self._configs.get(context)).limit_rules
        return _calendar(rules.time_zone, rules.cycle_anchor_time if rules.HasField("cycle_anchor_time") else None)


class RememberedCalendars:
    """Answers for any tenant, as loops need it that no tenant calls."""

    def __init__(self, plans: RemoteTenantPlans, feed: ChangeFeed) -> None:
        self._plans = plans
        self._known: TimedCache[TenantId, TenantCalendar] = TimedCache(_CAPACITY, REMEMBERED_SECONDS)
        feed.forget_on(CONFIG_CHANGES, self._known.forget)

    async def of_tenant(self, tenant_id: TenantId) -> TenantCalendar:
        """Returns the tenant's calendar. Raises: NotFound when the tenant is gone; Unavailable."""
        return await self._known.get(tenant_id, lambda: self._ask(tenant_id))

    async def _ask(self, tenant_id: TenantId) -> TenantCalendar:
        try:
            told = await self._plans.get(tenant_id)
        except MeshError as error:
            raise (NotFound("tenant") if error.code is grpc.StatusCode.NOT_FOUND else error) from None
        return _calendar(told.time_zone, told.cycle_anchor_time if told.HasField("cycle_anchor_time") else None)


def _calendar(zone_name: str, anchor_time: Timestamp | None) -> TenantCalendar:
    zone = known_zone(zone_name)
    anchor_day = 1 if anchor_time is None else from_timestamp(anchor_time).astimezone(zone).day
    return TenantCalendar("" if zone is UTC else zone_name, zone, anchor_day)
