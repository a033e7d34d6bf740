"""Proves who calls and for which tenant, and nothing about what they may do. Refuses claims that do not agree with each other."""

from typing import Any

import structlog

from mesh.common.v1 import error_reason_pb2
from services.kernel.cell import Cell
from services.kernel.context_token import ContextTokenVerifier
from services.kernel.credential_resolver import CredentialResolver
from services.kernel.errors import Forbidden, Unauthenticated
from services.kernel.ids import TenantId, uuid_text
from services.kernel.request_context import EXTERNAL, RequestScope, required_scope
from services.kernel.rpc import metadata as keys
from services.kernel.rpc.identity import ServiceIdentity, peer_host
from services.kernel.rpc.interceptor import Behavior, Deserializer, MeshInterceptor, Method
from services.kernel.tenant_context import TenantContext

log = structlog.get_logger(__name__)


class AuthInterceptor(MeshInterceptor):
    """Fills the scope's caller and tenant from metadata, certificate and tokens."""

    def __init__(self, identity: ServiceIdentity, resolver: CredentialResolver, verifier: ContextTokenVerifier, cell: Cell) -> None:
        super().__init__()
        self._cell = cell
        self._identity = identity
        self._resolver = resolver
        self._verifier = verifier

    def wrap(self, method: Method, inner: Behavior, deserialize: Deserializer | None) -> Behavior:
        """Returns the behaviour that runs only for a proven caller."""

        async def authenticated(request: Any, context: Any) -> Any:
            call = required_scope()
            keys.refuse_malformed(call.raw_metadata)
            request_id = call.metadata.get(keys.REQUEST_ID)
            if request_id is not None:
                call.client_call_id = keys.parse_uuid_key(request_id, keys.REQUEST_ID)
            if keys.AUTHORIZATION in call.metadata:
                await self._admit_external(call, context)
            else:
                await self._admit_service(call, context)
            return await inner(request, context)

        return authenticated

    async def _admit_external(self, call: RequestScope, context: Any) -> None:
        header = call.metadata[keys.AUTHORIZATION]
        if keys.TENANT_CONTEXT in call.metadata:
            raise Unauthenticated(
                error_reason_pb2.ERROR_REASON_CONTEXT_INVALID,
                "a caller with a credential sends no x-tenant-context; remove it",
            )
        credential = header[len(keys.BEARER) :].strip()
        if header[: len(keys.BEARER)].lower() != keys.BEARER.lower() or not credential:
            raise Unauthenticated(error_reason_pb2.ERROR_REASON_CREDENTIAL_INVALID, "authorization must read: Bearer <credential>")
        claimed = _claimed_tenant(call)
        call.caller = EXTERNAL
        call.peer_address = peer_host(context.peer())
        tenant = await self._resolver.resolve(credential, claimed)
        _refuse_mismatch(tenant, claimed)
        self._cell.refuse_elsewhere(tenant.region)
        call.tenant = tenant

    async def _admit_service(self, call: RequestScope, context: Any) -> None:
        service = self._identity.of(context, call.metadata)
        token = call.metadata.get(keys.TENANT_CONTEXT)
        if service is None:
            if token is not None:
                raise Unauthenticated(
                    error_reason_pb2.ERROR_REASON_CONTEXT_INVALID,
                    "x-tenant-context is taken from services of the mesh only; send your credential as authorization",
                )
            raise Unauthenticated(
                error_reason_pb2.ERROR_REASON_CREDENTIAL_MISSING,
                "send your API key as authorization: Bearer <key>",
            )
        call.caller = service
        if token is not None:
            tenant = await self._verifier.verify(token)
            if tenant.tenant_id is None or call.metadata.get(keys.TENANT_ID) != uuid_text(tenant.tenant_id):
                _refuse_mismatch(tenant, _claimed_tenant(call))
            self._cell.refuse_elsewhere(tenant.region)
            call.tenant = tenant


def _claimed_tenant(call: RequestScope) -> TenantId | None:
    claimed = call.metadata.get(keys.TENANT_ID)
    return None if claimed is None else TenantId(keys.parse_uuid_key(claimed, keys.TENANT_ID))


def _refuse_mismatch(tenant: TenantContext, claimed: TenantId | None) -> None:
    if claimed is not None and claimed != tenant.tenant_id:
        # A service that presents one tenant's token under another's name is broken or somebody else.
        log.error("tenant_mismatch", security_event=True, proven_tenant_id=str(tenant.tenant_id), claimed_tenant_id=str(claimed))
        raise Forbidden(
            error_reason_pb2.ERROR_REASON_TENANT_MISMATCH,
            "x-tenant-id names another tenant than your credential proves; leave it out or correct it",
        )
