"""Short ways to put budgets and receivers and to see what came of them, through the real service as a tenant's admin."""

import json
from datetime import UTC, datetime

import grpc

from mesh.metering.v1 import budget_service_pb2 as pb
from mesh.metering.v1 import webhook_service_pb2 as hooks_pb
from services.kernel.rpc import metadata as keys
from services.kernel.rpc.wire_status import decode_rpc_error
from tests.metering.mesh import Mesh, Tenant, bill
from tests.metering.peers import OPERATOR
from tests.support.waiting import eventually
from tests.tenant.receivers import Receiver

DAY, MONTH, CYCLE = pb.BUDGET_PERIOD_DAY, pb.BUDGET_PERIOD_MONTH, pb.BUDGET_PERIOD_BILLING_CYCLE
COST, TOKENS, UNIT = pb.BUDGET_MEASURE_COST_NANO_USD, pb.BUDGET_MEASURE_TOKENS, pb.BUDGET_MEASURE_PRODUCT_UNIT
WAIT_SECONDS = 30.0


def new_tenant(mesh: Mesh) -> Tenant:
    """A tenant that the tenant service knows, with the admin's credential "admin-<id>"."""
    tenant = mesh.new_tenant()
    mesh.peers.tenants.tiers[tenant.id] = "free"
    mesh.peers.tenants.credentials[f"admin-{tenant.id}"] = tenant.id
    mesh.peers.tenants.admins.add(f"admin-{tenant.id}")
    return tenant


async def ask(mesh: Mesh, tenant: Tenant, method: str, request: object, *, credential: str = ""):
    """Calls either service from outside, as the tenant's admin unless told otherwise."""
    stub = mesh.outside.budgets if hasattr(mesh.outside.budgets, method) else mesh.outside.webhooks
    bearer = credential or f"admin-{tenant.id}"
    metadata = [(keys.AUTHORIZATION, f"Bearer {bearer}")]
    if bearer == OPERATOR:
        metadata += [(keys.TENANT_ID, str(tenant.id)), (keys.OPERATOR_REASON, "ticket 4711")]
    try:
        return await getattr(stub, method)(request, metadata=metadata, timeout=30)
    except grpc.aio.AioRpcError as error:
        raise decode_rpc_error(error, "metering") from None


async def put(mesh: Mesh, tenant: Tenant, name: str = "budget", amount: int = 1_000, **parts: object) -> pb.Budget:
    """Puts a budget of tokens over a day, unless told otherwise."""
    budget = pb.Budget(**({"name": name, "amount": amount, "measure": TOKENS, "period": DAY} | parts))  # type: ignore[arg-type] # as the test says
    return (await ask(mesh, tenant, "PutBudget", pb.PutBudgetRequest(budget=budget))).budget


async def stands(mesh: Mesh, tenant: Tenant, name: str = "budget", **names: str) -> pb.GetBudgetResponse:
    """How a budget stands, of these names where it is for each."""
    return await ask(mesh, tenant, "GetBudget", pb.GetBudgetRequest(name=name, **names))


async def alerts(mesh: Mesh, tenant: Tenant) -> list[pb.BudgetAlert]:
    """The tenant's alerts, oldest first."""
    listed = await ask(mesh, tenant, "ListAlerts", pb.ListAlertsRequest(page_size=1000))
    return list(reversed(listed.alerts))


async def fired(mesh: Mesh, tenant: Tenant, name: str = "budget") -> list[int]:
    """The thresholds of a budget that fired, rising, in whatever period."""
    return sorted(alert.threshold_percent for alert in await alerts(mesh, tenant) if alert.budget_name == name)


async def wait_fired(mesh: Mesh, tenant: Tenant, wanted: list[int], name: str = "budget") -> None:
    """Waits until exactly these thresholds fired."""

    async def as_wanted() -> bool:
        return await fired(mesh, tenant, name) == wanted

    await eventually(as_wanted, within_seconds=WAIT_SECONDS)


async def looked_at(mesh: Mesh, tenant: Tenant) -> None:
    """Waits until nothing of the tenant is marked any more: whatever was committed before was looked at."""

    async def nothing_marked() -> bool:
        return await mesh.admin.fetchval("SELECT count(*) FROM metering.budget_marks WHERE tenant_id = $1", tenant.id) == 0

    await eventually(nothing_marked, within_seconds=WAIT_SECONDS)


async def use(
    mesh: Mesh, tenant: Tenant, tokens: int, *, user: str = "user-1", feature: str = "chat", time: datetime | None = None
) -> None:
    """Settles a call of so many tokens."""
    call = await mesh.opened(tenant, user=user, feature=feature, reserve_time=time or datetime.now(UTC))
    await mesh.settle(bill(call.ref, input_tokens=tokens, output_tokens=0))


async def receiver_at(mesh: Mesh, tenant: Tenant, url: str) -> hooks_pb.CreateWebhookEndpointResponse:
    """Makes a receiver."""
    return await ask(mesh, tenant, "CreateWebhookEndpoint", hooks_pb.CreateWebhookEndpointRequest(url=url))


async def deliveries(mesh: Mesh, tenant: Tenant) -> list[hooks_pb.Delivery]:
    """The tenant's deliveries, oldest first."""
    listed = await ask(mesh, tenant, "ListDeliveries", hooks_pb.ListDeliveriesRequest(page_size=1000))
    return list(reversed(listed.deliveries))


async def wait_delivered(mesh: Mesh, tenant: Tenant, count: int) -> list[hooks_pb.Delivery]:
    """Waits until so many deliveries were taken."""
    found: list[hooks_pb.Delivery] = []

    async def all_taken() -> bool:
        found[:] = [each for each in await deliveries(mesh, tenant) if each.state == hooks_pb.DELIVERY_STATE_DELIVERED]
        return len(found) == count

    await eventually(all_taken, within_seconds=WAIT_SECONDS)
    return found


async def wait_received(receiver: Receiver, count: int) -> None:
    """Waits until so many posts arrived."""

    async def all_there() -> bool:
        return len(receiver.received) >= count

    await eventually(all_there, within_seconds=WAIT_SECONDS)


def data_of(body: bytes) -> dict[str, object]:
    """The data of a CloudEvent."""
    return json.loads(body)["data"]
