"""What the rpcs share: the rights they need, the selectors of points they read, and the answer to a write."""

from collections.abc import Callable
from time import perf_counter

import grpc
from google.protobuf.message import Message
from qdrant_client import grpc as q
from qdrant_edge import UpdateOperation

from ..access import CURRENT_ACCESS, Need
from ..convert_filter import engine_filter
from ..convert_values import payload, point_id
from ..failure import wrong_input

Context = grpc.aio.ServicerContext[Message, Message]

AnyWrite = (
    q.UpsertPoints
    | q.DeletePoints
    | q.SetPayloadPoints
    | q.DeletePayloadPoints
    | q.CreateFieldIndexCollection
    | q.DeleteFieldIndexCollection
)
AnyRequest = AnyWrite | q.GetPoints | q.ScrollPoints | q.CountPoints | q.QueryPoints | q.QueryBatchPoints


def admit(request: AnyRequest, need: Need) -> float:
    """Check the caller's rights to the collection as named, and returns when the work began."""
    CURRENT_ACCESS.get().require(request.collection_name, need)
    return perf_counter()


def written(request: AnyWrite, started: float) -> q.PointsOperationResponse:
    """Answer a write that is applied and logged."""
    status = q.UpdateStatus.Completed if request.wait else q.UpdateStatus.Acknowledged
    return q.PointsOperationResponse(result=q.UpdateResult(status=status), time=perf_counter() - started)


def field_name(request: q.CreateFieldIndexCollection | q.DeleteFieldIndexCollection) -> str:
    """Return the name of the payload field, which is not empty."""
    if not request.field_name:
        raise wrong_input("field_name must not be empty")
    return request.field_name


def selected(
    sent: q.PointsSelector,
    by_ids: Callable[..., UpdateOperation],
    by_filter: Callable[..., UpdateOperation],
    *arguments: object,
) -> UpdateOperation:
    """Build the one of two operations that the selector asks for."""
    match sent.WhichOneof("points_selector_one_of"):
        case "points":
            return by_ids([point_id(known) for known in sent.points.ids], *arguments)
        case "filter":
            return by_filter(engine_filter(sent.filter), *arguments)
    raise wrong_input("PointsSelector is missing")


def payload_operation(
    request: q.SetPayloadPoints, by_ids: Callable[..., UpdateOperation], by_filter: Callable[..., UpdateOperation]
) -> UpdateOperation:
    """Build the operation that writes the request's payload, whole or under its key."""
    key = request.key if request.HasField("key") else None
    return selected(request.points_selector, by_ids, by_filter, payload(request.payload), key)
