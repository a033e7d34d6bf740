"""The tenant of the call in hand, for methods whose policy requires one."""

from services.kernel.ids import TenantId
from services.kernel.request_context import current_tenant


def own_tenant_id() -> TenantId:
    """Returns the proven tenant. The policy interceptor has refused calls without one."""
    tenant_id = current_tenant().tenant_id
    if tenant_id is None:
        msg = "the method's policy lets callers without a tenant pass"
        raise RuntimeError(msg)
    return tenant_id
