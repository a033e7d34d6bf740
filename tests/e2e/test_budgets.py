"""A budget on a whole mesh: its alert reaches the tenant's receiver, and one that blocks stops its user and nobody else."""

import json
from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from devstack.mesh_client import credentials, refusal
from devstack.state import DemoTenant
from mesh.common.v1 import limit_rule_pb2 as rules_pb
from mesh.inference.v1 import inference_service_pb2
from mesh.metering.v1 import budget_service_pb2 as pb
from mesh.metering.v1 import webhook_service_pb2 as hooks_pb
from mesh.tenant.v1 import configuration_service_pb2
from tests.support.mesh import Mesh
from tests.support.waiting import eventually
from tests.tenant.receivers import running_receiver

PATIENCE_SECONDS = 60.0


async def generate(mesh: Mesh, tenant: DemoTenant, user: str) -> None:
    """One call of a user."""
    request = inference_service_pb2.GenerateRequest(
        messages=[inference_service_pb2.Message(role=inference_service_pb2.ROLE_USER, text="Go on.")],
        options=inference_service_pb2.GenerateOptions(max_output_tokens=50, user=user),
    )
    await mesh.client.inference.Generate(request, metadata=credentials(tenant.api_key), timeout=30)


async def put(mesh: Mesh, tenant: DemoTenant, **parts: Any) -> None:
    """Puts a budget of cost over a month, for one user."""
    budget = pb.Budget(measure=pb.BUDGET_MEASURE_COST_NANO_USD, period=pb.BUDGET_PERIOD_MONTH, user="ada", **parts)
    await mesh.client.budgets.PutBudget(pb.PutBudgetRequest(budget=budget), metadata=credentials(tenant.api_key), timeout=30)


async def block(mesh: Mesh, tenant: DemoTenant, limit: int) -> None:
    """Adds the tenant's own rule that a refusal of PutBudget names."""
    rule = rules_pb.LimitRule(
        name="budget_ada",
        unit=rules_pb.LIMIT_UNIT_COST_NANO_USD,
        window=rules_pb.LIMIT_WINDOW_MONTH,
        scope=rules_pb.LIMIT_SCOPE_USER,
        user="ada",
        limit=limit,
    )
    request = configuration_service_pb2.UpdateConfigurationRequest(
        overrides=configuration_service_pb2.ConfigurationOverrides(limit_rules={"rules": [rule]}),
        update_mask=FieldMask(paths=["limit_rules.rules.budget_ada"]),
    )
    await mesh.client.configuration.UpdateConfiguration(request, metadata=credentials(tenant.api_key), timeout=30)


async def test_an_alert_reaches_the_receiver_and_a_block_refuses_one_user(mesh: Mesh) -> None:
    """A real call fires the threshold; with the rule that the refusal names that user is refused with BUDGET, another is not."""
    tenant = await mesh.tenant("enterprise")
    metadata = credentials(tenant.api_key)
    async with running_receiver() as receiver:
        made = hooks_pb.CreateWebhookEndpointRequest(url=receiver.url)
        await mesh.client.webhooks.CreateWebhookEndpoint(made, metadata=metadata, timeout=30)
        await put(mesh, tenant, name="ada", amount=1)
        await generate(mesh, tenant, "ben")
        assert not (await mesh.client.budgets.ListAlerts(pb.ListAlertsRequest(), metadata=metadata, timeout=30)).alerts
        await generate(mesh, tenant, "ada")

        async def all_told() -> bool:
            return len({headers["webhook-id"] for headers, _ in receiver.received}) == 3

        await eventually(all_told, within_seconds=PATIENCE_SECONDS)
    standing = await mesh.client.budgets.GetBudget(pb.GetBudgetRequest(name="ada"), metadata=metadata, timeout=30)
    assert {json.loads(body)["data"]["used"] for _, body in receiver.received} == {standing.used}
    wanted = {"name": "ada", "amount": standing.used, "action": pb.BUDGET_ACTION_BLOCK}
    with pytest.raises(grpc.aio.AioRpcError) as unenforced:
        await put(mesh, tenant, **wanted)
    assert refusal(unenforced.value).metadata == {"resource": "limit_rule", "state": "MISSING"}
    await block(mesh, tenant, standing.used)
    await put(mesh, tenant, **wanted)

    async def ada_is_refused() -> bool:
        try:
            await generate(mesh, tenant, "ada")
        except grpc.aio.AioRpcError as error:
            told = refusal(error)
            assert (told.reason, told.metadata["rule"]) == ("BUDGET", "budget_ada")
            return True
        return False

    await eventually(ada_is_refused, within_seconds=PATIENCE_SECONDS)
    await generate(mesh, tenant, "ben")
    again = await mesh.client.budgets.GetBudget(pb.GetBudgetRequest(name="ada"), metadata=metadata, timeout=30)
    assert again.blocks
