"""FlagService on the wire."""

from collections.abc import Iterable

from mesh.tenant.v1 import flag_service_pb2 as messages
from mesh.tenant.v1 import flag_service_pb2_grpc
from services.kernel.ids import TenantId, parse_uuid
from services.kernel.timestamps import to_timestamp
from services.tenant.feature_flag import Flag, FlagRule, KeptFlag
from services.tenant.flag_keeping import FlagKeeping
from services.tenant.servicers.caller import acting_subject
from services.tenant.text import printable

_RULES = {
    FlagRule.TENANT: messages.FLAG_RULE_TENANT,
    FlagRule.TIER: messages.FLAG_RULE_TIER,
    FlagRule.PERCENTAGE: messages.FLAG_RULE_PERCENTAGE,
    FlagRule.DEFAULT: messages.FLAG_RULE_DEFAULT,
}


class FlagServicer(flag_service_pb2_grpc.FlagServiceServicer):
    """Keeps and explains the flags."""

    def __init__(self, keeping: FlagKeeping) -> None:
        self._keeping = keeping

    async def PutFlag(self, request: messages.PutFlagRequest, context: object) -> messages.PutFlagResponse:
        """Makes or replaces a flag."""
        kept, changed = await self._keeping.put(
            _flag(request.flag), acting_subject(), expected_version=request.expected_version, validate_only=request.validate_only
        )
        return messages.PutFlagResponse(flag=_message(kept), changed=changed)

    async def DeleteFlag(self, request: messages.DeleteFlagRequest, context: object) -> messages.DeleteFlagResponse:
        """Removes a flag."""
        await self._keeping.delete(request.name, acting_subject())
        return messages.DeleteFlagResponse()

    async def ListFlags(self, request: messages.ListFlagsRequest, context: object) -> messages.ListFlagsResponse:
        """Lists flags by name."""
        flags, following = await self._keeping.list(request.page_size, request.page_token)
        return messages.ListFlagsResponse(flags=[_message(kept) for kept in flags], next_page_token=following)

    async def EvaluateFlags(self, request: messages.EvaluateFlagsRequest, context: object) -> messages.EvaluateFlagsResponse:
        """Explains every flag for one tenant."""
        found = await self._keeping.explain(TenantId(parse_uuid(request.tenant_id, "tenant_id")))
        return messages.EvaluateFlagsResponse(
            evaluations=[
                messages.FlagEvaluation(name=one.name, enabled=one.enabled, rule=_RULES[one.rule], bucket=one.bucket) for one in found
            ]
        )


def _flag(message: messages.Flag) -> Flag:
    return Flag(
        name=message.name,
        description=printable(message.description, "flag.description"),
        default_value=message.default_value,
        tenants_on=_tenants(message.tenants_on, "flag.tenants_on"),
        tenants_off=_tenants(message.tenants_off, "flag.tenants_off"),
        tiers_on=frozenset(message.tiers_on),
        tiers_off=frozenset(message.tiers_off),
        percentage_basis_points=message.percentage_basis_points,
    )


def _tenants(texts: Iterable[str], field: str) -> frozenset[TenantId]:
    return frozenset(TenantId(parse_uuid(text, f"{field}[{index}]")) for index, text in enumerate(texts))


def _message(kept: KeptFlag) -> messages.Flag:
    flag = kept.flag
    return messages.Flag(
        name=flag.name,
        description=flag.description,
        default_value=flag.default_value,
        tenants_on=sorted(map(str, flag.tenants_on)),
        tenants_off=sorted(map(str, flag.tenants_off)),
        tiers_on=sorted(flag.tiers_on),
        tiers_off=sorted(flag.tiers_off),
        percentage_basis_points=flag.percentage_basis_points,
        version=kept.version,
        update_time=to_timestamp(kept.update_time),
    )
