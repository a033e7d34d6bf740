"""ApiKeyService on the wire."""

from datetime import datetime, timedelta

from mesh.tenant.v1 import api_key_service_pb2 as messages
from mesh.tenant.v1 import api_key_service_pb2_grpc
from services.kernel.ids import parse_uuid
from services.kernel.request_context import current_tenant, current_tenant_id
from services.kernel.timestamps import parse_timestamp, to_timestamp
from services.tenant.api_key_record import ApiKeyRecord
from services.tenant.key_change import KeyChange, expand_mask
from services.tenant.key_ring import DEFAULT_OVERLAP_SECONDS, KeyRing, NewKeyTerms, RotationWish
from services.tenant.servicers.caller import acting_subject


class ApiKeyServicer(api_key_service_pb2_grpc.ApiKeyServiceServicer):
    """Makes, lists, changes, rotates and revokes the keys of the call's tenant."""

    def __init__(self, key_ring: KeyRing) -> None:
        self._key_ring = key_ring

    async def CreateApiKey(self, request: messages.CreateApiKeyRequest, context: object) -> messages.CreateApiKeyResponse:
        """Makes a key."""
        caller = current_tenant()
        record, text = await self._key_ring.create(current_tenant_id(), caller.tier, caller.scopes, _terms(request), acting_subject())
        return messages.CreateApiKeyResponse(key=_key(record), api_key=str(text))

    async def ListApiKeys(self, request: messages.ListApiKeysRequest, context: object) -> messages.ListApiKeysResponse:
        """Lists keys, newest first."""
        keys, following = await self._key_ring.list(current_tenant_id(), request.page_size, request.page_token)
        return messages.ListApiKeysResponse(keys=[_key(key) for key in keys], next_page_token=following)

    async def UpdateApiKey(self, request: messages.UpdateApiKeyRequest, context: object) -> messages.UpdateApiKeyResponse:
        """Changes what the mask names."""
        change = KeyChange(
            expand_mask(request.update_mask.paths), request.display_name, _expire_time(request), tuple(request.allowed_cidrs)
        )
        record, paths = await self._key_ring.update(current_tenant_id(), current_tenant().scopes, request.key_id, change, acting_subject())
        return messages.UpdateApiKeyResponse(key=_key(record), changed_paths=paths)

    async def RotateApiKey(self, request: messages.RotateApiKeyRequest, context: object) -> messages.RotateApiKeyResponse:
        """Replaces a key by a successor."""
        caller = current_tenant()
        overlap = request.overlap_seconds if request.HasField("overlap_seconds") else DEFAULT_OVERLAP_SECONDS
        wish = RotationWish(request.key_id, timedelta(seconds=overlap), parse_uuid(request.request_id, "request_id"))
        rotation, text = await self._key_ring.rotate(current_tenant_id(), caller.tier, caller.scopes, wish, acting_subject())
        return messages.RotateApiKeyResponse(
            key=_key(rotation.successor), api_key=str(text) if rotation.text_is_kept else "", replaced=_key(rotation.replaced)
        )

    async def RevokeApiKey(self, request: messages.RevokeApiKeyRequest, context: object) -> messages.RevokeApiKeyResponse:
        """Revokes a key."""
        record = await self._key_ring.revoke(current_tenant_id(), request.key_id, acting_subject())
        return messages.RevokeApiKeyResponse(key=_key(record))


def _terms(request: messages.CreateApiKeyRequest) -> NewKeyTerms:
    return NewKeyTerms(request.display_name, tuple(request.scopes), _expire_time(request), tuple(request.allowed_cidrs))


def _expire_time(request: messages.CreateApiKeyRequest | messages.UpdateApiKeyRequest) -> datetime | None:
    return parse_timestamp(request.expire_time, "expire_time") if request.HasField("expire_time") else None


def _key(record: ApiKeyRecord) -> messages.ApiKey:
    return messages.ApiKey(
        key_id=record.key_id,
        display_name=record.display_name,
        scopes=record.scopes,
        create_time=to_timestamp(record.create_time),
        expire_time=to_timestamp(record.expire_time),
        revoke_time=to_timestamp(record.revoke_time),
        last_use_time=to_timestamp(record.last_use_time),
        allowed_cidrs=record.allowed_cidrs,
        replaced_by=record.replaced_by,
    )
