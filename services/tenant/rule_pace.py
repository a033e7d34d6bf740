"""How often a tenant may change its own rules: each change may make the limits count anew, which costs the ledger sums. Pure."""

from collections.abc import Sequence

from mesh.common.v1 import error_reason_pb2
from services.kernel.errors import LimitExceeded, QuotaViolation
from services.kernel.ids import TenantId

MOST_CHANGES = 30
PERIOD_SECONDS = 60.0
RULE = "limit_rule_changes_per_minute"


def refuse_hurry(tenant_id: TenantId, ages_seconds: Sequence[float]) -> None:
    """Refuses one more change of a tenant's rules, `ages_seconds` after the earlier ones. Raises: LimitExceeded(PLAN_LIMIT)."""
    recent = sorted(age for age in ages_seconds if age < PERIOD_SECONDS)
    if len(recent) < MOST_CHANGES:
        return
    retry_after_seconds = PERIOD_SECONDS - recent[MOST_CHANGES - 1]
    message = (
        f"the tenant changed its own rules {len(recent)} times within {PERIOD_SECONDS:.0f} s, and {MOST_CHANGES} are allowed: "
        f"try again in {retry_after_seconds:.3f} s, and put many rules with one call"
    )
    raise LimitExceeded(
        error_reason_pb2.ERROR_REASON_PLAN_LIMIT,
        message,
        retry_after_seconds,
        [QuotaViolation(f"tenant:{tenant_id}", message)],
        rule=RULE,
        limit=str(MOST_CHANGES),
        used=str(len(recent)),
        remaining="0",
    )
