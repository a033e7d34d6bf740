"""Envoy's RateLimitService: descriptors in, one decision over all of them, Envoy's answer out."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from google.protobuf.duration_pb2 import Duration

from envoy.config.core.v3.base_pb2 import HeaderValue
from envoy.service.ratelimit.v3 import rls_pb2 as messages
from envoy.service.ratelimit.v3 import rls_pb2_grpc
from services.kernel.cell import Cell
from services.kernel.context_token import ContextTokenVerifier
from services.kernel.credential_resolver import CredentialResolver
from services.kernel.errors import InvalidRequest, LimitExceeded, MeshError
from services.kernel.ids import ReservationId, new_uuid7
from services.kernel.request_context import required_scope
from services.kernel.tenant_context import TenantContext
from services.ratelimit.consumption import Consumptions, Use
from services.ratelimit.decision import Refusal
from services.ratelimit.descriptor import DOMAIN, MOST_DESCRIPTORS, GatewayUse, Proof, read_descriptor
from services.ratelimit.limit_rule import SECOND_US, LimitRule, Window
from services.ratelimit.limits import UnkeepableName
from services.ratelimit.ready_counters import tenant_of
from services.ratelimit.reservation import Held
from services.ratelimit.standing import LimitStatus

Answer = messages.RateLimitResponse
_UINT32_MOST = 2**32 - 1
_OK, _OVER = Answer.OK, Answer.OVER_LIMIT
_SLIDING_UNITS = {1: Answer.RateLimit.SECOND, 60: Answer.RateLimit.MINUTE, 3600: Answer.RateLimit.HOUR}
_UNITS = {Window.DAY: Answer.RateLimit.DAY, Window.MONTH: Answer.RateLimit.MONTH, Window.CYCLE: Answer.RateLimit.MONTH}


class EnvoyServicer(rls_pb2_grpc.RateLimitServiceServicer):
    """Serves envoy.service.ratelimit.v3.RateLimitService."""

    def __init__(self, consumptions: Consumptions, resolver: CredentialResolver, verifier: ContextTokenVerifier, cell: Cell) -> None:
        self._consumptions = consumptions
        self._resolver = resolver
        self._verifier = verifier
        self._cell = cell

    async def ShouldRateLimit(self, request: messages.RateLimitRequest, context: object) -> messages.RateLimitResponse:
        """Counts all descriptors, or none when one is over a limit."""
        if request.domain != DOMAIN:
            raise InvalidRequest("domain", f"must be {DOMAIN}: set it in the gateway's rate limit filter")
        if not 1 <= len(request.descriptors) <= MOST_DESCRIPTORS:
            raise InvalidRequest("descriptors", f"must be 1 to {MOST_DESCRIPTORS}")
        try:
            read = [_read(request, place) for place in range(len(request.descriptors))]
        except UnkeepableName as unkeepable:
            # What a caller may have chosen must not lift its limits: see `_decided`.
            return _kept_out(len(request.descriptors), unkeepable)
        tenant = await self._one_tenant([proof for proof, _ in read])
        return await self._decided(tenant, [use for _, use in read])

    async def _one_tenant(self, proofs: Sequence[Proof]) -> TenantContext:
        first = await self._proven(proofs[0])
        for proof in proofs[1:]:
            if proof != proofs[0] and tenant_of(await self._proven(proof)) != tenant_of(first):
                raise InvalidRequest("descriptors", "must all prove the same tenant: ask once for each")
        return first

    async def _proven(self, proof: Proof) -> TenantContext:
        if proof.tenant_context:
            context = await self._verifier.verify(proof.tenant_context)
        else:
            # A key may be bound to its caller's networks; the gateway stands between, and says where it saw the caller.
            required_scope().peer_address = proof.remote_address
            context = await self._resolver.resolve(proof.credential, None)
        if context.tenant_id is None:
            raise InvalidRequest("descriptors", "prove no tenant: an operator's credential is no tenant's")
        self._cell.refuse_elsewhere(context.region)
        return context

    async def _decided(self, tenant: TenantContext, asked: Sequence[GatewayUse]) -> messages.RateLimitResponse:
        uses = [Use(ReservationId(new_uuid7()), item.product_unit, item.hits, item.subject) for item in asked]
        try:
            outcome = await self._consumptions.decide_together(tenant, uses)
        except LimitExceeded as guarded:
            # An error is no refusal to a gateway: most let the request pass then, and the guard would lift every limit.
            return _kept_out(len(asked), guarded)
        if isinstance(outcome, Refusal):
            return _over(asked, outcome)
        limits = [_tightest(held) for held in outcome]
        named = [limit for limit in limits if limit is not None]
        return Answer(
            overall_code=_OK,
            statuses=[_status(_OK, limit) for limit in limits],
            response_headers_to_add=_headers(min(named, key=lambda limit: limit.remaining)) if named else [],
        )


def _read(request: messages.RateLimitRequest, place: int) -> tuple[Proof, GatewayUse]:
    item = request.descriptors[place]
    hits = item.hits_addend.value if item.HasField("hits_addend") else request.hits_addend or 1
    return read_descriptor(place, ((entry.key, entry.value) for entry in item.entries), hits)


@dataclass(frozen=True, slots=True)
class _Limit:
    rule: LimitRule
    remaining: int
    until_reset_us: int | None

    @classmethod
    def of(cls, status: LimitStatus, now_us: int) -> "_Limit":
        return cls(status.rule, status.remaining, None if status.reset_us is None else max(0, status.reset_us - now_us))


def _tightest(held: Held | None) -> _Limit | None:
    if held is None or not held.limits:
        return None
    return _Limit.of(min(held.limits, key=lambda status: status.remaining), held.answer.now_us)


def _over(asked: Sequence[GatewayUse], refusal: Refusal) -> messages.RateLimitResponse:
    rule, limit = refusal.status.rule, _Limit.of(refusal.status, refusal.now_us)
    statuses = [
        _status(_OVER, limit) if use.product_unit == rule.product_unit and rule.applies_to(use.subject) else _status(_OK, None)
        for use in asked
    ]
    headers = _headers(limit) + _retry_after(refusal.retry_after_seconds)
    return Answer(overall_code=_OVER, statuses=statuses, response_headers_to_add=headers, raw_body=refusal.message.encode())


def _kept_out(count: int, error: MeshError) -> messages.RateLimitResponse:
    return Answer(
        overall_code=_OVER,
        statuses=[_status(_OVER, None)] * count,
        response_headers_to_add=_retry_after(error.retry_after_seconds),
        raw_body=error.message.encode(),
    )


def _status(code: "Answer.Code.ValueType", limit: _Limit | None) -> "Answer.DescriptorStatus":
    if limit is None:
        return Answer.DescriptorStatus(code=code)
    rule, until_us = limit.rule, limit.until_reset_us
    return Answer.DescriptorStatus(
        code=code,
        current_limit=Answer.RateLimit(requests_per_unit=min(rule.limit, _UINT32_MOST), unit=_unit(rule), name=rule.name),
        limit_remaining=min(limit.remaining, _UINT32_MOST),
        duration_until_reset=None if until_us is None else Duration(seconds=until_us // SECOND_US, nanos=until_us % SECOND_US * 1000),
    )


def _unit(rule: LimitRule) -> "Answer.RateLimit.Unit.ValueType":
    # A window that Envoy has no word for keeps its name and says no unit.
    if rule.window is Window.SLIDING:
        return _SLIDING_UNITS.get(rule.window_us // SECOND_US, Answer.RateLimit.UNKNOWN)
    return _UNITS.get(rule.window, Answer.RateLimit.UNKNOWN)


def _headers(limit: _Limit) -> list[HeaderValue]:
    headers = [
        HeaderValue(key="x-ratelimit-limit", value=str(limit.rule.limit)),
        HeaderValue(key="x-ratelimit-remaining", value=str(limit.remaining)),
    ]
    if limit.until_reset_us is not None:
        headers.append(HeaderValue(key="x-ratelimit-reset", value=str(-(-limit.until_reset_us // SECOND_US))))
    return headers


def _retry_after(seconds: float | None) -> list[HeaderValue]:
    return [] if seconds is None else [HeaderValue(key="retry-after", value=str(ceil(seconds)))]
