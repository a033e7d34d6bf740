"""What calls took of provider accounts and did not use, out of messages."""

from mesh.ratelimit.v1 import rate_limit_service_pb2 as messages
from services.kernel.ids import TenantId, uuid_from_bytes
from services.ratelimit.provider_share import AccountUse, TakenShare


def returned(message: messages.ReturnedShare) -> tuple[TakenShare, AccountUse]:
    """A share as it was taken, and what of it was not used. The store gives back no more than the tenant has there."""
    unused = AccountUse(int(message.request_unsent), message.input_tokens, message.output_tokens)
    tenant_id = TenantId(uuid_from_bytes(message.tenant_id, "tenant_id"))
    return TakenShare(message.account, tenant_id, message.take_time.ToMicroseconds(), unused), unused
