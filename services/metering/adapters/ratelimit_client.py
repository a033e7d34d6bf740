"""The limits, over gRPC: tells them ends of calls."""

from collections.abc import Sequence

import structlog

from mesh.ratelimit.v1 import rate_limit_service_pb2 as pb
from mesh.ratelimit.v1 import rate_limit_service_pb2_grpc
from services.kernel.rpc.channel import MeshChannel
from services.metering.outbox import CallEnd, EndKind

log = structlog.get_logger(__name__)

COMMIT_TIMEOUT_SECONDS = 2.0
# The contract's own bounds: an end beyond them would make the limits refuse the whole batch, for ever.
MAX_TOKENS = 10_000_000
MAX_NANO_USD = 1_000_000_000_000_000


class RemoteLimits:
    """`mesh.ratelimit.v1.RateLimitService.Commit`."""

    def __init__(self, channel: MeshChannel) -> None:
        self._channel = channel
        self._stub = rate_limit_service_pb2_grpc.RateLimitServiceStub(channel.channel)

    async def commit(self, ends: Sequence[CallEnd]) -> Sequence[bool]:
        """Applies ends and answers for each whether it is done."""
        request = pb.CommitRequest(commits=[_commit(end) for end in ends])
        response = await self._channel.unary(self._stub.Commit, request, timeout_seconds=COMMIT_TIMEOUT_SECONDS)
        return [outcome == pb.COMMIT_OUTCOME_DONE for outcome in response.outcomes]


def _commit(end: CallEnd) -> pb.Commit:
    if end.tokens > MAX_TOKENS or end.cost_nano_usd > MAX_NANO_USD:
        log.error("settlement_beyond_limits_contract", tokens=end.tokens, nano_usd=end.cost_nano_usd)
    return pb.Commit(
        reservation=pb.ReservationRef(tenant_id=end.tenant_id, reservation_id=end.reservation_id),
        epoch=end.epoch,
        kind=pb.CommitKind.ValueType(end.kind),
        actual=pb.Amounts(tokens=min(end.tokens, MAX_TOKENS), cost_nano_usd=min(end.cost_nano_usd, MAX_NANO_USD)),
        output_tokens=min(end.output_tokens, MAX_TOKENS) if end.kind is EndKind.SETTLED else None,
    )
