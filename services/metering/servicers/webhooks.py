"""mesh.metering.v1.WebhookService: the receivers of the call's tenant."""

from uuid import UUID

import structlog

from mesh.metering.v1 import webhook_service_pb2 as pb
from mesh.metering.v1 import webhook_service_pb2_grpc
from services.kernel.ids import parse_uuid
from services.kernel.paging import cut_page, decode_page_token, encode_page_token, page_size, position_time
from services.kernel.request_context import current_tenant, current_tenant_id, operator_reason
from services.kernel.timestamps import to_timestamp
from services.metering.webhooks.desk import WebhookDesk
from services.metering.webhooks.endpoint import Delivery, DeliveryPosition, DeliveryState, Endpoint

log = structlog.get_logger(__name__)

_USUAL_OVERLAP_SECONDS = 86_400.0


class WebhookServicer(webhook_service_pb2_grpc.WebhookServiceServicer):
    """Keeps receivers and shows deliveries."""

    def __init__(self, desk: WebhookDesk) -> None:
        self._desk = desk

    async def CreateWebhookEndpoint(self, request: pb.CreateWebhookEndpointRequest, context: object) -> pb.CreateWebhookEndpointResponse:
        """Makes a receiver."""
        endpoint, secret = await self._desk.create(current_tenant_id(), request.url)
        _say("webhook_endpoint_created", endpoint.endpoint_id)
        return pb.CreateWebhookEndpointResponse(endpoint=_endpoint(endpoint), secret=secret)

    async def ListWebhookEndpoints(self, request: pb.ListWebhookEndpointsRequest, context: object) -> pb.ListWebhookEndpointsResponse:
        """Lists receivers."""
        return pb.ListWebhookEndpointsResponse(endpoints=[_endpoint(each) for each in await self._desk.list_all(current_tenant_id())])

    async def RotateWebhookSecret(self, request: pb.RotateWebhookSecretRequest, context: object) -> pb.RotateWebhookSecretResponse:
        """Makes a new secret."""
        overlap = request.overlap.ToNanoseconds() / 1e9 if request.HasField("overlap") else _USUAL_OVERLAP_SECONDS
        endpoint, secret = await self._desk.rotate(current_tenant_id(), parse_uuid(request.endpoint_id, "endpoint_id"), overlap)
        _say("webhook_secret_rotated", endpoint.endpoint_id)
        return pb.RotateWebhookSecretResponse(endpoint=_endpoint(endpoint), secret=secret)

    async def DeleteWebhookEndpoint(self, request: pb.DeleteWebhookEndpointRequest, context: object) -> pb.DeleteWebhookEndpointResponse:
        """Removes a receiver."""
        endpoint_id = parse_uuid(request.endpoint_id, "endpoint_id")
        await self._desk.delete(current_tenant_id(), endpoint_id)
        _say("webhook_endpoint_deleted", endpoint_id)
        return pb.DeleteWebhookEndpointResponse()

    async def ListDeliveries(self, request: pb.ListDeliveriesRequest, context: object) -> pb.ListDeliveriesResponse:
        """Lists deliveries, newest first."""
        tenant_id, size = current_tenant_id(), page_size(request.page_size)
        state = DeliveryState(request.state) if request.state else None
        endpoint_id = parse_uuid(request.endpoint_id, "endpoint_id") if request.endpoint_id else None
        listing = f"webhook_deliveries:{tenant_id}:{request.state}:{request.endpoint_id}"
        found = await self._desk.deliveries(tenant_id, state, endpoint_id, _position(request.page_token, listing), size + 1)
        page, following = cut_page(
            found, size, lambda last: encode_page_token(listing, [last.create_time.isoformat(), str(last.delivery_id)])
        )
        return pb.ListDeliveriesResponse(deliveries=[_delivery(each) for each in page], next_page_token=following)

    async def ReplayDeliveries(self, request: pb.ReplayDeliveriesRequest, context: object) -> pb.ReplayDeliveriesResponse:
        """Sends deliveries again."""
        wanted = [parse_uuid(text, f"delivery_ids[{index}]") for index, text in enumerate(request.delivery_ids)]
        dead_of = parse_uuid(request.dead_of_endpoint_id, "dead_of_endpoint_id") if request.dead_of_endpoint_id else None
        count = await self._desk.replay(current_tenant_id(), wanted, dead_of)
        log.info("deliveries_replayed", count=count, subject=current_tenant().subject, reason=operator_reason())
        return pb.ReplayDeliveriesResponse(replayed_count=count)


def _say(event: str, endpoint_id: UUID) -> None:
    log.info(event, endpoint_id=str(endpoint_id), subject=current_tenant().subject, reason=operator_reason())


def _position(token: str, listing: str) -> DeliveryPosition | None:
    position = decode_page_token(token, listing, 2)
    return None if position is None else DeliveryPosition(position_time(position[0]), parse_uuid(position[1], "page_token"))


def _endpoint(endpoint: Endpoint) -> pb.WebhookEndpoint:
    return pb.WebhookEndpoint(
        endpoint_id=str(endpoint.endpoint_id),
        url=endpoint.url,
        create_time=to_timestamp(endpoint.create_time),
        previous_secret_end_time=to_timestamp(endpoint.previous_end_time),
    )


def _delivery(delivery: Delivery) -> pb.Delivery:
    return pb.Delivery(
        delivery_id=str(delivery.delivery_id),
        endpoint_id=str(delivery.endpoint_id),
        event_id=str(delivery.event_id),
        event_type=delivery.event_type,
        data_json=delivery.data,
        state=pb.DeliveryState.ValueType(delivery.state),
        attempts=delivery.attempts,
        last_error=delivery.last_error,
        create_time=to_timestamp(delivery.create_time),
        due_time=to_timestamp(delivery.due_time) if delivery.end_time is None else None,
        end_time=to_timestamp(delivery.end_time),
    )
