"""What a refused open means for the call, and the one case in which an undispatched attempt starts again with a new reservation."""

from typing import Never, assert_never

from mesh.common.v1 import error_reason_pb2
from services.inference.call import Attempt, Stage
from services.inference.ports import Opened, OpenOutcome
from services.inference.refusals import PriceMissing
from services.kernel.errors import ContentConflict, MeshError, ReservationLost, Unauthenticated


class StartAgain(Exception):
    """The attempt cannot go on and was not dispatched; another one may. `refusal` is what the caller hears when there is none."""

    def __init__(self, refusal: MeshError) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


def refuse_unopened(attempt: Attempt, opened: Opened) -> Never:
    """Raises what the outcome of a refused open calls for."""
    reservation_id, model = attempt.ref.reservation_id, attempt.question.model.name
    # The ledger holds nothing of this attempt, so its hold may go at once ...
    attempt.stage = Stage.RESERVED
    match opened.outcome:
        case OpenOutcome.STALE_EPOCH:
            # ... but an older epoch at the limits than at the ledger must be noticed there: the void's commit carries the newer one and
            # makes them rebuild. A release alone would leave every later call of the tenant stale as well.
            attempt.stage = Stage.OPENING
            raise StartAgain(ReservationLost(reservation_id, "the limits were rebuilt while the call began; start it again"))
        case OpenOutcome.ENDED:
            if not opened.void:
                # ... unless its lease ended in between: then it stands as unresolved, and is voided before it is released.
                attempt.stage = Stage.OPENING
            raise ReservationLost(reservation_id, "the reservation ended before the call was recorded; start it again with a new call id")
        case OpenOutcome.CALL_ID_TAKEN:
            call_id = str(attempt.question.call_id)
            raise ContentConflict(
                "call", f"call id {call_id} was used before; look it up with GetCall, or ask again with a new x-request-id", call_id=call_id
            )
        case OpenOutcome.PRICE_MISSING:
            raise PriceMissing(model)
        case OpenOutcome.TENANT_NOT_PROVEN:
            raise Unauthenticated(
                error_reason_pb2.ERROR_REASON_CONTEXT_INVALID, "the credential's context ended while the call began; start it again"
            )
        case OpenOutcome.OPENED:
            msg = "an opened call is not refused"
            raise AssertionError(msg)
        case _:
            assert_never(opened.outcome)
