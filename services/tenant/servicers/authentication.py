"""AuthenticationService on the wire."""

import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from uuid import UUID

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from mesh.tenant.v1 import authentication_service_pb2 as messages
from mesh.tenant.v1 import authentication_service_pb2_grpc
from services.kernel.context_token import ContextKeySource
from services.kernel.ids import TenantId
from services.kernel.timestamps import to_timestamp
from services.tenant.authentication import Authenticator, CredentialAttempt
from services.tenant.change_hub import ChangeHub, Notice
from services.tenant.name_resolution import NameResolution
from services.tenant.servicers.tenant import STATES
from services.tenant.text import printable


class AuthenticationServicer(authentication_service_pb2_grpc.AuthenticationServiceServicer):
    """Turns credentials into context tokens for the other services, and names into tenants for front ends."""

    def __init__(self, authenticator: Authenticator, names: NameResolution, keys: ContextKeySource, changes: ChangeHub) -> None:
        self._authenticator = authenticator
        self._names = names
        self._keys = keys
        self._changes = changes

    async def Authenticate(self, request: messages.AuthenticateRequest, context: object) -> messages.AuthenticateResponse:
        """Resolves one credential."""
        claimed = TenantId(UUID(bytes=request.claimed_tenant_id)) if request.claimed_tenant_id else None
        attempt = CredentialAttempt(
            request.credential,
            claimed,
            request.operator_reason,
            printable(request.peer_address, "peer_address"),
            request.host,
            request.path,
        )
        proven = await self._authenticator.authenticate(attempt)
        return messages.AuthenticateResponse(context_token=proven.token, expire_time=to_timestamp(proven.expire_time))

    async def ResolveTenant(self, request: messages.ResolveTenantRequest, context: object) -> messages.ResolveTenantResponse:
        """Answers whose a host or a path is."""
        tenant = await self._names.resolve(request.host, request.path)
        return messages.ResolveTenantResponse(
            tenant_id=str(tenant.tenant_id),
            slug=tenant.slug,
            display_name=tenant.display_name,
            region=tenant.region,
            state=STATES[tenant.state],
        )

    async def GetContextKeys(self, request: messages.GetContextKeysRequest, context: object) -> messages.GetContextKeysResponse:
        """Publishes the verifying keys."""
        keys = await self._keys.fetch_keys()
        return messages.GetContextKeysResponse(keys=[_context_key(key_id, key) for key_id, key in keys.items()])

    async def WatchChanges(self, request: messages.WatchChangesRequest, context: object) -> AsyncIterator[messages.WatchChangesResponse]:
        """Streams what changes."""
        async with aclosing(self._changes.watch(request.after_change_id)) as notices:
            async for notice in notices:
                yield _told(notice)


def _told(notice: Notice) -> messages.WatchChangesResponse:
    told = messages.WatchChangesResponse(
        change_id=notice.change_id,
        changes=[
            messages.Change(change_id=change.change_id, tenant_id=change.tenant_id.bytes, kind=change.kind) for change in notice.changes
        ],
        forget_everything=notice.forget_everything,
    )
    # Counted now and not when it was read: a notice that waited in a queue is that much older.
    told.read_age.FromNanoseconds(max(0, round((time.monotonic() - notice.read_at) * 1e9)))
    return told


def _context_key(key_id: str, key: Ed25519PublicKey) -> messages.ContextKey:
    return messages.ContextKey(key_id=key_id, public_key=key.public_bytes_raw())
