"""Drives another service's TenantLifecycleService."""

from mesh.common.v1 import lifecycle_service_pb2, lifecycle_service_pb2_grpc
from services.kernel.rpc.channel import MeshChannel
from services.kernel.tenant_context import TenantContext

# A service may make collections and tables here; the whole creation takes a few seconds.
PROVISION_TIMEOUT_SECONDS = 10.0
# A page of records is read, sealed and written.
REENCRYPT_TIMEOUT_SECONDS = 15.0


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
