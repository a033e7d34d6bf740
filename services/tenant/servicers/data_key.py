"""DataKeyService on the wire. What it answers is never logged."""

from uuid import UUID

from mesh.tenant.v1 import data_key_service_pb2 as messages
from mesh.tenant.v1 import data_key_service_pb2_grpc
from services.kernel.ids import TenantId, parse_uuid
from services.kernel.paging import decode_page_token, encode_page_token
from services.kernel.request_context import current_tenant_id
from services.tenant.data_keys import DataKeyVault
from services.tenant.key_rotation import KeyRotation
from services.tenant.servicers.caller import acting_subject

_LISTING = "data_keys"
_FIRST = UUID(int=0)


class DataKeyServicer(data_key_service_pb2_grpc.DataKeyServiceServicer):
    """Hands out, rotates and rewraps."""

    def __init__(self, vault: DataKeyVault, rotation: KeyRotation) -> None:
        self._vault = vault
        self._rotation = rotation

    async def GetDataKeys(self, request: messages.GetDataKeysRequest, context: object) -> messages.GetDataKeysResponse:
        """Returns every live key."""
        keys = await self._vault.live(current_tenant_id())
        return messages.GetDataKeysResponse(keys=[messages.DataKey(version=key.version, key=key.key, active=key.active) for key in keys])

    async def RotateDataKey(self, request: messages.RotateDataKeyRequest, context: object) -> messages.RotateDataKeyResponse:
        """Rotates one tenant's key."""
        rotated = await self._rotation.rotate(TenantId(parse_uuid(request.tenant_id, "tenant_id")), acting_subject())
        return messages.RotateDataKeyResponse(active_version=rotated.active_version, resealed_count=rotated.resealed_count)

    async def RewrapDataKeys(self, request: messages.RewrapDataKeysRequest, context: object) -> messages.RewrapDataKeysResponse:
        """Rewraps a page of tenants."""
        position = decode_page_token(request.page_token, _LISTING, 1)
        after = _FIRST if position is None else parse_uuid(position[0], "page_token")
        page = await self._vault.rewrap(after)
        following = "" if page.last is None else encode_page_token(_LISTING, [str(page.last)])
        return messages.RewrapDataKeysResponse(rewrapped_count=page.count, unreadable_count=page.unreadable, next_page_token=following)
