"""The tenant of the call in hand, as an id."""

from services.kernel.ids import TenantId
from services.kernel.request_context import current_tenant


def current_tenant_id() -> TenantId:
    """Returns the proven tenant's id. Raises: RuntimeError when there is none, which the method's policy rules out."""
    tenant_id = current_tenant().tenant_id
    if tenant_id is None:
        msg = "the call in hand names no tenant"
        raise RuntimeError(msg)
    return tenant_id
