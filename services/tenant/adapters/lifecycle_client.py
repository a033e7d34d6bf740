"""Drives another service's TenantLifecycleService."""

from collections.abc import AsyncIterator, Sequence
from datetime import datetime

from mesh.common.v1 import lifecycle_service_pb2 as messages
from mesh.common.v1 import lifecycle_service_pb2_grpc
from services.kernel.rpc.channel import MeshChannel
from services.kernel.tenant_context import TenantContext
from services.kernel.tenant_scan import ScannedStore
from services.kernel.timestamps import to_timestamp
from services.tenant.tenant_remains import ExportedRecord, RemovedRecords

# A service may make collections and tables here; the whole creation takes a few seconds.
PROVISION_TIMEOUT_SECONDS = 30.0
# A page of records is read, sealed and written.
REENCRYPT_TIMEOUT_SECONDS = 15.0
# As long as copying a large tenant takes; what was copied is kept when it is cut off, and the next call goes on from there.
MOVE_TIMEOUT_SECONDS = 600.0
# Removing and counting many rows takes longer than making none; the saga's lease is kept meanwhile.
ERASE_TIMEOUT_SECONDS = 60.0
SCAN_TIMEOUT_SECONDS = 120.0
PURGE_TIMEOUT_SECONDS = 60.0
EXPORT_TIMEOUT_SECONDS = 3600.0


class GrpcLifecyclePeer:
    """One service, over its channel."""

    def __init__(self, channel: MeshChannel) -> None:
        self._channel = channel
        self._stub = lifecycle_service_pb2_grpc.TenantLifecycleServiceStub(channel.channel)

    async def provision(self, context: TenantContext) -> None:
        """Makes the tenant's place there. Raises: MeshError as the service raised it."""
        request = messages.ProvisionTenantRequest()
        await self._channel.unary(
            self._stub.ProvisionTenant, request, timeout_seconds=PROVISION_TIMEOUT_SECONDS, tenant=context, idempotent=True
        )

    async def reencrypt(self, context: TenantContext, active_version: int) -> tuple[int, bool]:
        """Has some records sealed again; returns how many, and whether none are left. Raises: MeshError as the service raised it."""
        response = await self._channel.unary(
            self._stub.ReencryptTenant,
            messages.ReencryptTenantRequest(active_version=active_version),
            timeout_seconds=REENCRYPT_TIMEOUT_SECONDS,
            tenant=context,
            idempotent=True,
        )
        return response.resealed_count, response.done

    async def move(self, context: TenantContext) -> None:
        """Moves its part of the tenant. Raises: MeshError as the service raised it."""
        await self._move(context, messages.MOVE_PHASE_COPY)

    async def drop_left(self, context: TenantContext) -> None:
        """Removes what its part left in the shared stores. Raises: MeshError as the service raised it."""
        await self._move(context, messages.MOVE_PHASE_DROP)

    async def _move(self, context: TenantContext, phase: messages.MovePhase.ValueType) -> None:
        await self._channel.unary(
            self._stub.MoveTenant,
            messages.MoveTenantRequest(phase=phase),
            timeout_seconds=MOVE_TIMEOUT_SECONDS,
            tenant=context,
            idempotent=True,
        )

    async def erase(self, context: TenantContext) -> Sequence[RemovedRecords]:
        """Removes the tenant there and returns what was found. Raises: MeshError as the service raised it."""
        request = messages.EraseTenantRequest()
        answer = await self._channel.unary(
            self._stub.EraseTenant, request, timeout_seconds=ERASE_TIMEOUT_SECONDS, tenant=context, idempotent=True
        )
        return [RemovedRecords(item.kind, item.count) for item in answer.erased]

    async def scan(self, context: TenantContext, canaries: Sequence[str]) -> Sequence[ScannedStore]:
        """Looks for what the service holds of the tenant. Raises: MeshError as the service raised it."""
        request = messages.ScanTenantRequest(canaries=canaries)
        answer = await self._channel.unary(
            self._stub.ScanTenant, request, timeout_seconds=SCAN_TIMEOUT_SECONDS, tenant=context, idempotent=True
        )
        return [ScannedStore(item.store, item.found_count, item.canary_count, item.kept, item.sight) for item in answer.stores]

    async def purge(self, context: TenantContext, older_than: datetime) -> tuple[int, bool]:
        """Removes a batch of what retention does not keep; returns how many records, and whether there may be more."""
        request = messages.PurgeTenantRequest(older_than=to_timestamp(older_than))
        answer = await self._channel.unary(
            self._stub.PurgeTenant, request, timeout_seconds=PURGE_TIMEOUT_SECONDS, tenant=context, idempotent=True
        )
        return sum(item.count for item in answer.purged), answer.more

    async def export(self, context: TenantContext) -> AsyncIterator[ExportedRecord]:
        """Streams everything the service keeps of the tenant. Raises: MeshError as the service raised it."""
        request = messages.ExportTenantRequest()
        async with self._channel.stream(
            self._stub.ExportTenant, request, timeout_seconds=EXPORT_TIMEOUT_SECONDS, tenant=context
        ) as records:
            async for record in records:
                yield ExportedRecord(record.kind, record.record_json.decode())
