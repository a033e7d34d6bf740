"""Drives another service's TenantLifecycleService."""

from mesh.common.v1 import lifecycle_service_pb2, lifecycle_service_pb2_grpc
from services.kernel.rpc.channel import MeshChannel
from services.kernel.tenant_context import TenantContext

# A service may make collections and tables here; the whole creation takes a few seconds.
PROVISION_TIMEOUT_SECONDS = 30.0
# A page of records is read, sealed and written.
REENCRYPT_TIMEOUT_SECONDS = 15.0
# As long as copying a large tenant takes; what was copied is kept when it is cut off, and the next call goes on from there.
MOVE_TIMEOUT_SECONDS = 600.0


class GrpcLifecyclePeer:
    """One service, over its channel."""

    def __init__(self, channel: MeshChannel) -> None:
        self._channel = channel
        self._stub = lifecycle_service_pb2_grpc.TenantLifecycleServiceStub(channel.channel)

    async def provision(self, context: TenantContext) -> None:
        """Makes the tenant's place there. Raises: MeshError as the service raised it."""
        await self._channel.unary(
            self._stub.ProvisionTenant,
            lifecycle_service_pb2.ProvisionTenantRequest(),
            timeout_seconds=PROVISION_TIMEOUT_SECONDS,
            tenant=context,
            idempotent=True,
        )

    async def reencrypt(self, context: TenantContext, active_version: int) -> tuple[int, bool]:
        """Has some records sealed again; returns how many, and whether none are left. Raises: MeshError as the service raised it."""
        response = await self._channel.unary(
            self._stub.ReencryptTenant,
            lifecycle_service_pb2.ReencryptTenantRequest(active_version=active_version),
            timeout_seconds=REENCRYPT_TIMEOUT_SECONDS,
            tenant=context,
            idempotent=True,
        )
        return response.resealed_count, response.done

    async def move(self, context: TenantContext) -> None:
        """Moves its part of the tenant. Raises: MeshError as the service raised it."""
        await self._move(context, lifecycle_service_pb2.MOVE_PHASE_COPY)

    async def drop_left(self, context: TenantContext) -> None:
        """Removes what its part left in the shared stores. Raises: MeshError as the service raised it."""
        await self._move(context, lifecycle_service_pb2.MOVE_PHASE_DROP)

    async def _move(self, context: TenantContext, phase: lifecycle_service_pb2.MovePhase.ValueType) -> None:
        await self._channel.unary(
            self._stub.MoveTenant,
            lifecycle_service_pb2.MoveTenantRequest(phase=phase),
            timeout_seconds=MOVE_TIMEOUT_SECONDS,
            tenant=context,
            idempotent=True,
        )
