"""As whom the call in hand acts, in the words of the nouns."""

from services.kernel.request_context import current_caller, current_peer_address, maybe_tenant, operator_reason
from services.tenant.actor import Actor


def acting_subject() -> Actor:
    """Returns the actor for the audit log: the credential's subject, or the calling service."""
    context = maybe_tenant()
    subject = f"mesh:{current_caller()}" if context is None else context.subject
    return Actor(subject, operator_reason() if context is not None and context.operator else "", current_peer_address())
