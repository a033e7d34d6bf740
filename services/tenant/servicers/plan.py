"""PlanService on the wire, and plans as messages."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from mesh.tenant.v1 import plan_service_pb2 as messages
from mesh.tenant.v1 import plan_service_pb2_grpc
from mesh.tenant.v1.tenant_service_pb2 import AiSettings, FeatureTerms, PlanLimits
from services.kernel.errors import NotFound
from services.kernel.ids import TenantId, uuid_from_bytes
from services.kernel.timestamps import to_timestamp
from services.tenant.limit_rules import LimitRules, larger_plans, lifting_plan
from services.tenant.plan import Plan, PlanDirectory
from services.tenant.servicers.limit_rules import limit_rules_message
from services.tenant.tenant_record import DEFAULT_ASSISTANT_NAME, TenantConfig


class TenantPlans(PlanDirectory, Protocol):
    """The plans in force, and who is on which."""

    async def get_config(self, tenant_id: TenantId) -> TenantConfig | None:
        """Returns a tenant's configuration; None when it is absent."""
        ...


class PlanServicer(plan_service_pb2_grpc.PlanServiceServicer):
    """Reads plans."""

    def __init__(self, directory: TenantPlans) -> None:
        self._directory = directory

    async def ListPlans(self, request: messages.ListPlansRequest, context: object) -> messages.ListPlansResponse:
        """Lists every plan in force."""
        plans = await self._directory.list_plans()
        return messages.ListPlansResponse(plans=[_plan(plan, plans) for plan in plans])

    async def GetTenantPlan(self, request: messages.GetTenantPlanRequest, context: object) -> messages.GetTenantPlanResponse:
        """Tells which plan a tenant is on, and its calendar."""
        config = await self._directory.get_config(TenantId(uuid_from_bytes(request.tenant_id, "tenant_id")))
        if config is None:
            raise NotFound("tenant")
        rules = config.limit_rules
        return messages.GetTenantPlanResponse(
            plan=config.plan.name, time_zone=rules.time_zone, cycle_anchor_time=to_timestamp(rules.cycle_anchor_time)
        )


def plan_limits(plan: Plan) -> PlanLimits:
    """Returns the plan's limits as a message."""
    return PlanLimits(
        requests_per_minute=plan.requests_per_minute,
        tokens_per_minute=plan.tokens_per_minute,
        tokens_per_day=plan.tokens_per_day,
        cost_nano_usd_per_month=plan.cost_nano_usd_per_month,
        concurrent_calls=plan.concurrent_calls,
        context_tokens=plan.context_tokens,
        weight=plan.weight,
        tokens_per_month=plan.tokens_per_month,
    )


def feature_terms(plan: Plan) -> dict[str, FeatureTerms]:
    """Returns what the plan says of each feature, as messages by name."""
    return {feature.name: FeatureTerms(enabled=feature.enabled, limit=feature.limit) for feature in plan.features}


def ai_settings(plan: Plan, assistant_name: str) -> AiSettings:
    """Returns how a tenant of the plan uses models, as a message."""
    return AiSettings(
        default_model=plan.default_model,
        allowed_models=plan.allowed_models,
        assistant_name=assistant_name,
        default_max_output_tokens=plan.default_max_output_tokens,
        max_output_tokens=plan.max_output_tokens,
    )


def _plan(plan: Plan, ladder: Sequence[Plan]) -> messages.Plan:
    rules = tuple(replace(rule, lifting_plan=lifting_plan(rule, larger_plans(plan, ladder))) for rule in plan.rules())
    return messages.Plan(
        name=plan.name,
        limits=plan_limits(plan),
        ai=ai_settings(plan, DEFAULT_ASSISTANT_NAME),
        data_retention_days=plan.data_retention_days,
        encrypt_content=plan.encrypt_content,
        placements=plan.isolation,
        features=feature_terms(plan),
        limit_rules=limit_rules_message(LimitRules(rules, "", None, plan.limit_terms.abuse_guard), plan.weight),
    )
