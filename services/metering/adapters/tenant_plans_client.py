"""The tenant service, as loops ask it that no tenant calls: which plan a tenant is on, and by which calendar it counts."""

import grpc

from mesh.tenant.v1 import plan_service_pb2 as pb
from mesh.tenant.v1.plan_service_pb2_grpc import PlanServiceStub
from services.kernel.errors import MeshError
from services.kernel.ids import TenantId
from services.kernel.rpc.channel import MeshChannel

_TIMEOUT_SECONDS = 5.0


class RemoteTenantPlans:
    """`mesh.tenant.v1.PlanService.GetTenantPlan`."""

    def __init__(self, channel: MeshChannel) -> None:
        self._channel = channel
        self._stub = PlanServiceStub(channel.channel)

    async def get(self, tenant_id: TenantId) -> pb.GetTenantPlanResponse:
        """Returns what the tenant is on. Raises: MeshError, NOT_FOUND for one that is not there any more."""
        request = pb.GetTenantPlanRequest(tenant_id=tenant_id.bytes)
        return await self._channel.unary(self._stub.GetTenantPlan, request, timeout_seconds=_TIMEOUT_SECONDS, idempotent=True)

    async def tier(self, tenant_id: TenantId) -> str:
        """Returns the tenant's plan now; empty for one that is not there any more. Raises: MeshError when nobody answers."""
        try:
            return (await self.get(tenant_id)).plan
        except MeshError as error:
            if error.code is grpc.StatusCode.NOT_FOUND:
                return ""
            raise
