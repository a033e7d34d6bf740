"""mesh.metering.v1.LedgerService: messages in, the ledger's answers out."""

from mesh.metering.v1 import ledger_service_pb2 as pb
from mesh.metering.v1 import ledger_service_pb2_grpc
from services.kernel.request_context import current_tenant_id
from services.metering.call import CallKey
from services.metering.epoch import Epochs
from services.metering.ledger import Ledger
from services.metering.refusal import RefusalBook
from services.metering.servicers import epoch_messages
from services.metering.servicers import ledger_messages as messages


class LedgerServicer(ledger_service_pb2_grpc.LedgerServiceServicer):
    """Records calls durably."""

    def __init__(self, ledger: Ledger, epochs: Epochs, refusals: RefusalBook) -> None:
        self._ledger = ledger
        self._refusals = refusals
        self._epochs = epochs

    async def OpenCalls(self, request: pb.OpenCallsRequest, context: object) -> pb.OpenCallsResponse:
        """Records calls before anything is sent."""
        opened = await self._ledger.open([messages.opening(call, index) for index, call in enumerate(request.calls)])
        return pb.OpenCallsResponse(results=[messages.open_result(result) for result in opened])

    async def SettleCalls(self, request: pb.SettleCallsRequest, context: object) -> pb.SettleCallsResponse:
        """Records what calls were billed."""
        settled = await self._ledger.settle([messages.settlement(call, index) for index, call in enumerate(request.calls)])
        return pb.SettleCallsResponse(results=[messages.settle_result(result) for result in settled])

    async def VoidCalls(self, request: pb.VoidCallsRequest, context: object) -> pb.VoidCallsResponse:
        """Ends calls without a bill."""
        ended = await self._ledger.end([messages.ending(call, index) for index, call in enumerate(request.calls)])
        return pb.VoidCallsResponse(states=[messages.state(result.state) for result in ended])

    async def RenewCalls(self, request: pb.RenewCallsRequest, context: object) -> pb.RenewCallsResponse:
        """Prolongs leases."""
        lost = await self._ledger.renew([CallKey(ref.tenant_id, ref.reservation_id) for ref in request.calls])
        return pb.RenewCallsResponse(lost=[pb.CallRef(tenant_id=key.tenant_id, reservation_id=key.reservation_id) for key in lost])

    async def FenceCalls(self, request: pb.FenceCallsRequest, context: object) -> pb.FenceCallsResponse:
        """Decides calls whose lease at the limits ended."""
        fenced = await self._ledger.fence([messages.fencing(call) for call in request.calls])
        return pb.FenceCallsResponse(outcomes=[messages.fence_outcome(result) for result in fenced])

    async def ExtendCalls(self, request: pb.ExtendCallsRequest, context: object) -> pb.ExtendCallsResponse:
        """Raises the bounds of open calls."""
        extended = await self._ledger.extend([messages.extension(call) for call in request.calls])
        return pb.ExtendCallsResponse(outcomes=[messages.extend_outcome(result) for result in extended])

    async def RecordUnits(self, request: pb.RecordUnitsRequest, context: object) -> pb.RecordUnitsResponse:
        """Records uses of units."""
        recorded = await self._ledger.record([messages.unit_use(item, index) for index, item in enumerate(request.items)])
        return pb.RecordUnitsResponse(outcomes=[messages.record_units_outcome(result) for result in recorded])

    async def RecordRefusals(self, request: pb.RecordRefusalsRequest, context: object) -> pb.RecordRefusalsResponse:
        """Counts calls that the limits refused."""
        counts = [messages.refusal_count(item, index) for index, item in enumerate(request.counts)]
        recorded = await self._refusals.record(request.replica_id, counts)
        return pb.RecordRefusalsResponse(outcomes=[messages.record_refusals_outcome(result) for result in recorded])

    async def BeginEpoch(self, request: pb.BeginEpochRequest, context: object) -> pb.BeginEpochResponse:
        """Begins an epoch of the call's tenant."""
        periods = [epoch_messages.counted_period(period, index) for index, period in enumerate(request.periods)]
        snapshot = await self._epochs.begin_epoch(current_tenant_id(), periods, epoch_messages.recent_seconds(request))
        return epoch_messages.begin_epoch_response(request.nonce, snapshot)
