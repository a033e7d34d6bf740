"""SecretService on the wire. A key goes in, and comes out to inference alone."""

from mesh.tenant.v1 import secret_service_pb2 as messages
from mesh.tenant.v1 import secret_service_pb2_grpc
from services.kernel.request_context import current_tenant_id
from services.kernel.timestamps import to_timestamp
from services.tenant.provider_keys import ProviderKeyInfo, ProviderKeys
from services.tenant.servicers.caller import acting_subject


class SecretServicer(secret_service_pb2_grpc.SecretServiceServicer):
    """The provider key of the call's tenant."""

    def __init__(self, provider_keys: ProviderKeys) -> None:
        self._provider_keys = provider_keys

    async def PutProviderKey(self, request: messages.PutProviderKeyRequest, context: object) -> messages.PutProviderKeyResponse:
        """Stores a key."""
        info = await self._provider_keys.put(current_tenant_id(), request.api_key, acting_subject())
        return messages.PutProviderKeyResponse(info=_info(info))

    async def DeleteProviderKey(self, request: messages.DeleteProviderKeyRequest, context: object) -> messages.DeleteProviderKeyResponse:
        """Removes it."""
        await self._provider_keys.delete(current_tenant_id(), acting_subject())
        return messages.DeleteProviderKeyResponse()

    async def GetProviderKeyInfo(self, request: messages.GetProviderKeyInfoRequest, context: object) -> messages.GetProviderKeyInfoResponse:
        """Tells which it is."""
        return messages.GetProviderKeyInfoResponse(info=_info(await self._provider_keys.info(current_tenant_id())))

    async def GetProviderKey(self, request: messages.GetProviderKeyRequest, context: object) -> messages.GetProviderKeyResponse:
        """Hands it to inference."""
        return messages.GetProviderKeyResponse(api_key=await self._provider_keys.open(current_tenant_id()))


def _info(info: ProviderKeyInfo) -> messages.ProviderKeyInfo:
    return messages.ProviderKeyInfo(fingerprint=info.fingerprint, update_time=to_timestamp(info.update_time))
