"""Seals and opens a tenant's content with keys fetched from the tenant service. Keys are in memory alone, at most 300 s, and never logged.

What does not open is a security event: the caller is told INTERNAL and nothing else.
"""

from collections.abc import Callable, Sequence
from typing import NoReturn, Protocol

import grpc
import structlog

from mesh.common.v1 import error_reason_pb2
from mesh.tenant.v1 import data_key_service_pb2, data_key_service_pb2_grpc
from services.kernel.errors import MeshError, Unauthenticated, Unavailable
from services.kernel.ids import TenantId
from services.kernel.request_context import maybe_tenant
from services.kernel.rpc.channel import MeshChannel
from services.kernel.sealing import SealBroken, TenantKeys, VersionUnknown, sealed_version
from services.kernel.tenant_context import TenantContext
from services.kernel.timed_cache import TimedCache

log = structlog.get_logger(__name__)

TRUSTED_SECONDS = 300.0
CAPACITY = 10_000
_TIMEOUT_SECONDS = 2.0


class KeyUseFailed(MeshError):
    """A sealed value did not open: it was altered or moved, or its key is gone. What exactly is in the log, not in the answer."""

    def __init__(self) -> None:
        super().__init__(grpc.StatusCode.INTERNAL, error_reason_pb2.ERROR_REASON_INTERNAL, "an internal failure; the trace id leads to it")


class DataKeySource(Protocol):
    """Where a tenant's data keys come from."""

    async def fetch(self, context: TenantContext, tenant_id: TenantId) -> TenantKeys:
        """Returns every live key. Raises: MeshError; WRONG_STATE once they were destroyed."""
        ...


class RemoteDataKeys:
    """Asks `DataKeyService.GetDataKeys`."""

    def __init__(self, channel: MeshChannel) -> None:
        self._channel = channel
        self._stub = data_key_service_pb2_grpc.DataKeyServiceStub(channel.channel)

    async def fetch(self, context: TenantContext, tenant_id: TenantId) -> TenantKeys:
        """Returns every live key of the context's tenant."""
        response = await self._channel.unary(
            self._stub.GetDataKeys,
            data_key_service_pb2.GetDataKeysRequest(),
            timeout_seconds=_TIMEOUT_SECONDS,
            tenant=context,
            idempotent=True,
        )
        active = max((item.version for item in response.keys if item.active), default=0)
        return TenantKeys.of(tenant_id, {item.version: item.key for item in response.keys}, active)


class TenantCipher:
    """The keys of the tenants this process works for. `forget` is for the change feed."""

    def __init__(self, source: DataKeySource, *, monotonic: Callable[[], float] | None = None) -> None:
        self._source = source
        self._cache: TimedCache[TenantId, TenantKeys] = (
            TimedCache(CAPACITY, TRUSTED_SECONDS) if monotonic is None else TimedCache(CAPACITY, TRUSTED_SECONDS, monotonic)
        )

    def is_sealing(self, tenant_id: TenantId) -> bool:
        """Tells whether what is written now for the tenant is sealed: its context says so. False without a context of that tenant."""
        context = maybe_tenant()
        return context is not None and context.tenant_id == tenant_id and context.encrypt_content

    async def keys(self, tenant: TenantContext | TenantId, *, with_version: int = 0) -> TenantKeys:
        """Returns the tenant's keys, none older than 300 s; fetched anew when `with_version` is not among the known ones.

        A bare id is fetched in the name of the call in hand. Raises: Unavailable when it is none of that tenant; WRONG_STATE
        once the keys were destroyed; KeyUseFailed when there is no key of that version.
        """
        tenant_id, context = _named(tenant)
        known = self._cache.peek(tenant_id)
        if known is not None and with_version and not known.has(with_version):
            self._cache.forget(tenant_id)
            known = None
        if known is None:
            known = await self._fetched(tenant_id, context)
        if with_version and not known.has(with_version):
            _report(tenant_id, b"", f"no data key of version {with_version}")
        return known

    async def seal(self, tenant: TenantContext | TenantId, plaintext: bytes, identity: bytes) -> bytes:
        """Seals under the active key. Raises: as `keys`."""
        return (await self.keys(tenant)).seal(plaintext, identity)

    async def open(self, tenant: TenantContext | TenantId, sealed: bytes, identity: bytes) -> bytes:
        """Opens what `seal` returned for the same tenant and identity. Raises: KeyUseFailed; as `keys`."""
        [plaintext] = await self.open_all(tenant, [(sealed, identity)])
        return plaintext

    async def open_all(self, tenant: TenantContext | TenantId, items: Sequence[tuple[bytes, bytes]]) -> list[bytes]:
        """Opens values with their identities, in order; without any nothing is fetched. Raises: KeyUseFailed; as `keys`."""
        if not items:
            return []
        keys = await self.keys(tenant)
        for sealed, identity in items:
            version = _version(keys.tenant_id, sealed, identity)
            if not keys.has(version):
                keys = await self.keys(tenant, with_version=version)
        return [_opened(keys, sealed, identity) for sealed, identity in items]

    def forget(self, tenant_id: TenantId | None) -> None:
        """Drops a tenant's keys, or everybody's: the next use asks again."""
        self._cache.forget(tenant_id)

    async def _fetched(self, tenant_id: TenantId, context: TenantContext | None) -> TenantKeys:
        if context is None:
            raise Unavailable("data_key", "the tenant's keys are not at hand; they are fetched with its next call")
        return await self._cache.get(tenant_id, lambda: self._source.fetch(context, tenant_id))


def _version(tenant_id: TenantId, sealed: bytes, identity: bytes) -> int:
    try:
        return sealed_version(sealed)
    except SealBroken as error:
        _report(tenant_id, identity, str(error))


def _opened(keys: TenantKeys, sealed: bytes, identity: bytes) -> bytes:
    try:
        return keys.open(sealed, identity)
    except (SealBroken, VersionUnknown) as error:
        _report(keys.tenant_id, identity, str(error))


def _named(tenant: TenantContext | TenantId) -> tuple[TenantId, TenantContext | None]:
    if isinstance(tenant, TenantContext):
        if tenant.tenant_id is None:
            raise Unauthenticated.context_missing()
        return tenant.tenant_id, tenant
    context = maybe_tenant()
    return tenant, context if context is not None and context.tenant_id == tenant else None


def _report(tenant_id: TenantId, identity: bytes, why: str) -> NoReturn:
    # Identities are tables, columns and row ids: no content.
    log.error("key_use_failed", security_event=True, tenant_id=str(tenant_id), identity=identity.hex(), reason=why)
    raise KeyUseFailed from None
