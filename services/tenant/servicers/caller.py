"""Who the call in hand acts for and as whom, in the words of the nouns."""

from services.kernel.ids import TenantId
from services.kernel.request_context import current_caller, current_peer_address, maybe_tenant, operator_reason
from services.kernel.rpc import metadata
from services.kernel.tenant_context import TenantContext
from services.tenant.actor import Actor


def acting_tenant(context: TenantContext) -> TenantId:
    """Returns the tenant. Raises: INVALID_METADATA for an operator who named none, which the method's policy refuses before."""
    if context.tenant_id is None:
        raise metadata.invalid(metadata.TENANT_ID, "must name the tenant the operator acts for")
    return context.tenant_id


def acting_subject() -> Actor:
    """Returns the actor for the audit log: the credential's subject, or the calling service."""
    context = maybe_tenant()
    subject = f"mesh:{current_caller()}" if context is None else context.subject
    return Actor(subject, operator_reason() if context is not None and context.operator else "", current_peer_address())
