"""mesh.metering.v1.PriceService: the price book in force; loads and re-ratings for operators."""

from datetime import UTC, datetime
from uuid import UUID

import structlog
from google.protobuf.timestamp_pb2 import Timestamp

from mesh.metering.v1 import price_service_pb2 as pb
from mesh.metering.v1 import price_service_pb2_grpc
from services.kernel.errors import InvalidRequest
from services.kernel.ids import TenantId, parse_uuid
from services.kernel.paging import cut_page, decode_page_token, encode_page_token, page_size, refused_page_token
from services.kernel.request_context import current_tenant, operator_reason
from services.kernel.timestamps import parse_timestamp, to_timestamp
from services.metering.price_catalog import PriceCatalog
from services.metering.price_loading import PriceLoading
from services.metering.rerate_job import RerateRuns, RunPosition
from services.metering.rerating import RerateDesk, RerateOrder, Rerating
from services.metering.servicers.price_messages import change_message, model_price, rerate_response, rerate_run

log = structlog.get_logger(__name__)

_MOST_NUMBER = 2_147_483_647
_FIRST, _LAST = datetime(1970, 1, 1, tzinfo=UTC), datetime(9999, 1, 1, tzinfo=UTC)


class PriceServicer(price_service_pb2_grpc.PriceServiceServicer):
    """Reads the price book, and writes through the loading and the desk."""

    def __init__(self, catalog: PriceCatalog, loading: PriceLoading, desk: RerateDesk, runs: RerateRuns) -> None:
        self._catalog = catalog
        self._loading = loading
        self._desk = desk
        self._runs = runs

    async def GetPriceBook(self, request: pb.GetPriceBookRequest, context: object) -> pb.GetPriceBookResponse:
        """Returns the version in force, and when the next one takes over."""
        found = await self._catalog.in_force()
        return pb.GetPriceBookResponse(
            version=found.version.version,
            effective_time=to_timestamp(found.version.effective_time),
            next_effective_time=to_timestamp(found.next_effective_time),
            prices=[model_price(provider, model, prices) for (provider, model), prices in sorted(found.version.prices.items())],
        )

    async def LoadPriceBook(self, request: pb.LoadPriceBookRequest, context: object) -> pb.LoadPriceBookResponse:
        """Loads the price book file, or tells what loading would change."""
        _on_record("price_book_load_asked_for", request.validate_only)
        changes, digest = await self._loading.load(seen_digest=request.digest, validate_only=request.validate_only)
        return pb.LoadPriceBookResponse(changes=[change_message(change) for change in changes], digest=digest)

    async def RerateUsage(self, request: pb.RerateUsageRequest, context: object) -> pb.RerateUsageResponse:
        """Rates calls of the named tenant anew, or tells what that would change."""
        tenant_id = _named_tenant()
        _on_record("rerating_asked_for", request.validate_only)
        order = RerateOrder(
            _moment(request.start_time, "start_time"),
            _moment(request.end_time, "end_time"),
            request.price_versions,
            request.right_version,
        )
        if order.end_time <= order.start_time:
            raise InvalidRequest("end_time", "must be after start_time")
        if request.validate_only:
            return rerate_response(await self._desk.preview(tenant_id, order))
        if not request.rerating_id:
            raise InvalidRequest("rerating_id", "must be a new id of yours")
        if not request.HasField("cutoff_time"):
            raise InvalidRequest("cutoff_time", "must be what the same call with validate_only answered: see what would change first")
        rerating = Rerating(parse_uuid(request.rerating_id, "rerating_id"), order, _moment(request.cutoff_time, "cutoff_time"))
        return rerate_response(await self._desk.rerate(tenant_id, rerating))

    async def ListReratings(self, request: pb.ListReratingsRequest, context: object) -> pb.ListReratingsResponse:
        """Lists re-ratings, of all tenants or of the named one."""
        only = current_tenant().tenant_id
        log.info("reratings_asked_for", operator=current_tenant().subject, reason=operator_reason())
        listing = f"reratings|{only or ''}|{request.undone_only}"
        size = page_size(request.page_size)
        found = await self._runs.page(only, _run_position(request.page_token, listing), size + 1, undone_only=request.undone_only)
        page, following = cut_page(found, size, lambda last: encode_page_token(listing, [str(last.tenant_id), str(last.number)]))
        return pb.ListReratingsResponse(reratings=[rerate_run(run) for run in page], next_page_token=following)


def _named_tenant() -> TenantId:
    tenant_id = current_tenant().tenant_id
    if tenant_id is None:
        raise InvalidRequest("x-tenant-id", "must name the tenant whose calls are rated anew")
    return tenant_id


def _run_position(token: str, listing: str) -> RunPosition | None:
    position = decode_page_token(token, listing, 2)
    if position is None:
        return None
    tenant_id, number = position
    if not number.isascii() or not number.isdigit() or int(number) > _MOST_NUMBER:
        raise refused_page_token()
    return RunPosition(TenantId(UUID(int=parse_uuid(tenant_id, "page_token").int)), int(number))


def _on_record(event: str, validate_only: bool) -> None:
    log.info(event, validate_only=validate_only, operator=current_tenant().subject, reason=operator_reason())


def _moment(stamp: Timestamp, field: str) -> datetime:
    moment = parse_timestamp(stamp, field)
    if not _FIRST <= moment < _LAST:
        raise InvalidRequest(field, "must be a moment from 1970 to 9998")
    return moment
