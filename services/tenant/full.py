"""The refusal of one more of something a tenant may only have so many of."""

from mesh.common.v1 import error_reason_pb2
from services.kernel.errors import LimitExceeded, QuotaViolation
from services.kernel.ids import TenantId


def too_many(tenant_id: TenantId, rule: str, things: str, limit: int, advice: str = "remove one first") -> LimitExceeded:
    """Builds the refusal; `rule` is what callers branch on, `things` what people read."""
    message = f"the tenant has {limit} {things}, the most it may have; {advice}"
    return LimitExceeded(
        error_reason_pb2.ERROR_REASON_PLAN_LIMIT,
        message,
        None,
        [QuotaViolation(f"tenant:{tenant_id}", message)],
        rule=rule,
        limit=str(limit),
        used=str(limit),
        remaining="0",
    )
