"""The tenant service, as the monthly job asks it: which plan a tenant is on."""

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

    async def tier(self, tenant_id: TenantId) -> str:
        """Returns the tenant's plan now; empty for one that is not there any more. Raises: MeshError when nobody answers."""
        request = pb.GetTenantPlanRequest(tenant_id=tenant_id.bytes)
        try:
            response = await self._channel.unary(self._stub.GetTenantPlan, request, timeout_seconds=_TIMEOUT_SECONDS, idempotent=True)
        except MeshError as error:
            if error.code is grpc.StatusCode.NOT_FOUND:
                return ""
            raise
        return response.plan
