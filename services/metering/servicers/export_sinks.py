"""mesh.metering.v1.ExportSinkService: what is told to whom, for operators."""

from uuid import UUID

import structlog

from mesh.metering.v1 import export_sink_service_pb2 as pb
from mesh.metering.v1 import export_sink_service_pb2_grpc, invoice_service_pb2
from services.kernel.errors import InvalidRequest
from services.kernel.ids import TenantId
from services.kernel.paging import cut_page, decode_page_token, encode_page_token, page_size, refused_page_token
from services.kernel.request_context import current_tenant, operator_reason, required_scope
from services.kernel.timestamps import to_timestamp
from services.metering.exports.meters import KnownUnits, refuse_untold
from services.metering.exports.outgoing import ExportSettings, OutgoingKey, Sink, Waiting

log = structlog.get_logger(__name__)


class ExportSinkServicer(export_sink_service_pb2_grpc.ExportSinkServiceServicer):
    """Sets and shows."""

    def __init__(self, settings: ExportSettings, units: KnownUnits) -> None:
        self._settings = settings
        self._units = units

    async def SetStripeCustomer(self, request: pb.SetStripeCustomerRequest, context: object) -> pb.SetStripeCustomerResponse:
        """Sets the tenant's customer."""
        tenant_id = current_tenant().tenant_id
        if tenant_id is None:
            raise InvalidRequest("x-tenant-id", "must name the tenant whom the customer is")
        _note()
        await self._settings.set_customer(tenant_id, request.customer_id)
        return pb.SetStripeCustomerResponse()

    async def SetStripeMeter(self, request: pb.SetStripeMeterRequest, context: object) -> pb.SetStripeMeterResponse:
        """Sets a meter."""
        # One that is set can always be ended.
        if request.event_name:
            await refuse_untold(request.meter, self._units, accept_unknown_unit=request.accept_unknown_unit)
        _note()
        await self._settings.set_meter(request.meter, request.event_name)
        return pb.SetStripeMeterResponse()

    async def SetEndpointExport(self, request: pb.SetEndpointExportRequest, context: object) -> pb.SetEndpointExportResponse:
        """Turns the endpoint on or off."""
        _note()
        await self._settings.turn_endpoint(on=request.is_on)
        return pb.SetEndpointExportResponse()

    async def GetExportSinks(self, request: pb.GetExportSinksRequest, context: object) -> pb.GetExportSinksResponse:
        """Shows what is set."""
        tenant_id = current_tenant().tenant_id
        return pb.GetExportSinksResponse(
            stripe_meters=[pb.StripeMeter(meter=meter, event_name=name) for meter, name in await self._settings.meters()],
            stripe_customer_id="" if tenant_id is None else await self._settings.customer(tenant_id),
            is_endpoint_on=await self._settings.is_endpoint_on(),
        )

    async def ListPendingExports(self, request: pb.ListPendingExportsRequest, context: object) -> pb.ListPendingExportsResponse:
        """Lists what is not delivered."""
        tenant_id, size = current_tenant().tenant_id, page_size(request.page_size)
        listing = f"exports|{tenant_id or ''}|{request.sink}|{request.dead_only}"
        sink = Sink(request.sink) if request.sink else None
        after = _position(request.page_token, listing)
        found = await self._settings.waiting(tenant_id, sink, after, size + 1, dead_only=request.dead_only)
        page, following = cut_page(found, size, lambda last: encode_page_token(listing, _place(last.key)))
        return pb.ListPendingExportsResponse(exports=[_export(item) for item in page], next_page_token=following)

    async def ReplayExports(self, request: pb.ReplayExportsRequest, context: object) -> pb.ReplayExportsResponse:
        """Tells again what was given up."""
        _note()
        count = await self._settings.replay(current_tenant().tenant_id, Sink(request.sink), accept_repeats=request.accept_repeats)
        return pb.ReplayExportsResponse(replayed_count=count)


def _note() -> None:
    log.info("export_change_asked_for", method=required_scope().method, operator=current_tenant().subject, reason=operator_reason())


def _place(key: OutgoingKey) -> list[str]:
    return [str(key.tenant_id), str(int(key.sink)), str(key.usage_id), key.meter]


def _position(token: str, listing: str) -> OutgoingKey | None:
    position = decode_page_token(token, listing, 4)
    if position is None:
        return None
    try:
        return OutgoingKey(TenantId(UUID(position[0])), Sink(int(position[1])), UUID(position[2]), position[3])
    except ValueError:
        raise refused_page_token() from None


def _export(item: Waiting) -> pb.PendingExport:
    return pb.PendingExport(
        tenant_id=str(item.key.tenant_id),
        sink=pb.ExportSink.ValueType(int(item.key.sink)),
        usage_id=str(item.key.usage_id),
        source=invoice_service_pb2.UsageSource.ValueType(int(item.source)),
        meter=item.key.meter,
        quantity=item.quantity,
        use_time=to_timestamp(item.use_time),
        attempts=item.attempts,
        last_error=item.last_error,
        due_time=to_timestamp(item.due_time),
    )
