"""Sagas, receipts, scans and events as messages."""

from mesh.tenant.v1 import event_service_pb2
from mesh.tenant.v1 import tenant_service_pb2 as messages
from services.kernel.timestamps import to_timestamp
from services.tenant.events import Event, EventState
from services.tenant.provisioning import ORDER
from services.tenant.receipt import ErasureReceipt
from services.tenant.saga import Saga, SagaState, StepState

_SAGA_STATES = {
    SagaState.RUNNING: messages.SAGA_STATE_RUNNING,
    SagaState.COMPENSATING: messages.SAGA_STATE_COMPENSATING,
    SagaState.DONE: messages.SAGA_STATE_DONE,
    SagaState.FAILED: messages.SAGA_STATE_FAILED,
}
_STEP_STATES = {
    StepState.BEGUN: messages.SAGA_STEP_STATE_BEGUN,
    StepState.DONE: messages.SAGA_STEP_STATE_DONE,
    StepState.UNDONE: messages.SAGA_STEP_STATE_UNDONE,
}
_EVENT_STATES = {
    EventState.PENDING: event_service_pb2.EVENT_STATE_PENDING,
    EventState.DELIVERED: event_service_pb2.EVENT_STATE_DELIVERED,
    EventState.DEAD: event_service_pb2.EVENT_STATE_DEAD,
}


def progress(saga: Saga) -> messages.WatchProvisioningResponse:
    """Builds the whole of a creation."""
    steps = []
    for step in ORDER:
        record = saga.steps.get(step)
        steps.append(
            messages.SagaStep(
                name=step.name,
                state=messages.SAGA_STEP_STATE_PENDING if record is None else _STEP_STATES[record.state],
                begin_time=None if record is None else to_timestamp(record.begin_time),
                end_time=None if record is None else to_timestamp(record.end_time),
            )
        )
    return messages.WatchProvisioningResponse(
        tenant_id=str(saga.tenant_id), state=_SAGA_STATES[saga.state], steps=steps, cause=saga.cause, attempts=saga.attempts
    )


def receipt_message(receipt: ErasureReceipt) -> messages.ErasureReceipt:
    """Builds a receipt."""
    return messages.ErasureReceipt(body_json=receipt.body, signature=receipt.signature, key_id=receipt.key_id, verified=receipt.verified)


def event_message(event: Event) -> event_service_pb2.Event:
    """Builds an event."""
    return event_service_pb2.Event(
        event_id=str(event.event_id),
        tenant_id=str(event.tenant_id),
        event_type=event.event_type,
        sink=event.sink,
        state=_EVENT_STATES[event.state],
        attempts=event.attempts,
        last_error=event.last_error,
        create_time=to_timestamp(event.create_time),
        end_time=to_timestamp(event.end_time),
    )


def event_state(value: int) -> EventState | None:
    """Reads a wanted state; None for any."""
    return next((state for state, number in _EVENT_STATES.items() if number == value), None)
