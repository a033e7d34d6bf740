"""The ways a call of this service can be refused or fail, each with its reason, what varies and what to do next."""

from collections.abc import Mapping, Sequence

from mesh.common.v1 import error_reason_pb2, limit_rule_pb2
from mesh.common.v1.error_reason_pb2 import ErrorReason
from services.inference.models import PROVIDER
from services.kernel.errors import Forbidden, InvalidRequest, LimitExceeded, MeshError, QuotaViolation, Unavailable, WrongState
from services.kernel.ids import CallId

MAX_RETRY_AFTER_SECONDS = 60.0
DEFAULT_RETRY_AFTER_SECONDS = 1.0


class LimitRefused(LimitExceeded):
    """A limit refuses the call; `unit` is what the rule counts, unspecified where no rule of the tenant's refused."""

    def __init__(
        self,
        reason: ErrorReason.ValueType,
        message: str,
        retry_after_seconds: float | None,
        quota: Sequence[QuotaViolation],
        metadata: Mapping[str, str],
        unit: limit_rule_pb2.LimitUnit.ValueType,
    ) -> None:
        super().__init__(reason, message, retry_after_seconds, quota, **metadata)
        self.unit = unit


class UnknownModel(InvalidRequest):
    """No model of that name exists here."""

    def __init__(self, model: str, allowed: Sequence[str]) -> None:
        super().__init__(
            "options.model",
            f"no model {model!r} is known; name one of your plan's models ({', '.join(allowed)}), or none for the default",
            reason=error_reason_pb2.ERROR_REASON_UNKNOWN_MODEL,
            metadata={"model": model},
        )


class ModelNotInPlan(Forbidden):
    """The plan does not include the model."""

    def __init__(self, model: str, tier: str, allowed: Sequence[str]) -> None:
        super().__init__(
            error_reason_pb2.ERROR_REASON_MODEL_TIER,
            f"the plan {tier} does not include {model}; use one that it does ({', '.join(allowed)}) or change the plan",
            model=model,
            tier=tier,
        )


class RequestTooLarge(InvalidRequest):
    """The request alone exceeds a cap of the plan."""

    def __init__(self, field: str, rule: str, limit: int, requested: int) -> None:
        super().__init__(
            field,
            f"needs up to {requested} tokens of at most {limit} ({rule}); shorten it",
            reason=error_reason_pb2.ERROR_REASON_REQUEST_TOO_LARGE,
            metadata={"rule": rule, "limit": str(limit), "requested": str(requested)},
        )


class PriceMissing(WrongState):
    """No price is in force for the model, so nothing can be billed and nothing is sent."""

    def __init__(self, model: str) -> None:
        super().__init__("price", "MISSING", f"no price is in force for {model}; use another model or ask the operator")
        self.reason = error_reason_pb2.ERROR_REASON_PRICE_MISSING
        self.metadata = {"model": model}


class ProviderRefused(InvalidRequest):
    """The provider refused the request as such."""

    def __init__(self, http_status: int) -> None:
        super().__init__(
            "",
            f"the model provider refused the request (HTTP {http_status}); change the request before trying again, nothing was billed",
            reason=error_reason_pb2.ERROR_REASON_PROVIDER_REFUSED,
            metadata={"provider": PROVIDER, "http_status": str(http_status)},
        )


class ProviderMisconfigured(WrongState):
    """The provider does not accept the account's key."""

    def __init__(self, http_status: int, *, own_key: bool) -> None:
        house = "the model provider refused the account's key; the operator has to renew it"
        own = "the model provider refused your own key; store a valid one with PutProviderKey, or delete it to use the house's"
        super().__init__("provider", "MISCONFIGURED", own if own_key else house)
        self.reason = error_reason_pb2.ERROR_REASON_PROVIDER_MISCONFIGURED
        self.metadata = {"provider": PROVIDER, "http_status": str(http_status), "key_owner": "tenant" if own_key else "house"}


class ProviderUnavailable(Unavailable):
    """The provider is overloaded, failing or out of reach."""

    def __init__(self, http_status: int | None, retry_after_seconds: float | None, *, unbilled: bool, call_id: CallId) -> None:
        billing = "nothing was billed" if unbilled else f"call {call_id} is listed as unresolved until its bill is known"
        wait = DEFAULT_RETRY_AFTER_SECONDS if retry_after_seconds is None else min(retry_after_seconds, MAX_RETRY_AFTER_SECONDS)
        super().__init__(
            PROVIDER,
            f"the model provider cannot answer now; try again shortly with a new call id, {billing}",
            retry_after_seconds=wait,
            reason=error_reason_pb2.ERROR_REASON_PROVIDER_UNAVAILABLE,
            provider=PROVIDER,
            http_status="" if http_status is None else str(http_status),
            call_id=str(call_id),
        )


class StreamInterrupted(Unavailable):
    """The provider's stream ended before its end."""

    def __init__(self, call_id: CallId) -> None:
        super().__init__(
            PROVIDER,
            f"the model provider's stream broke off; the text so far was delivered and call {call_id} is listed as unresolved",
            retry_after_seconds=None,
            reason=error_reason_pb2.ERROR_REASON_STREAM_INTERRUPTED,
            call_id=str(call_id),
        )


class AnswerStopped(MeshError):
    """The provider wrote more than it was allowed, and the limits had no more for it: the answer ends where it stands."""

    def __init__(self, cause: MeshError, call_id: CallId) -> None:
        super().__init__(
            cause.code,
            cause.reason,
            f"the answer grew past what was held for it and was ended; the text so far was delivered and call {call_id} is listed as "
            f"unresolved until its bill is known: {cause.message}",
            metadata={**cause.metadata, "call_id": str(call_id)},
            retry_after_seconds=cause.retry_after_seconds,
            quota_violations=cause.quota_violations,
        )


class SettlementPending(Unavailable):
    """The answer is complete; the ledger has not confirmed its bill yet."""

    def __init__(self, call_id: CallId) -> None:
        super().__init__(
            "metering",
            f"the answer is complete, its bill is still being recorded: do not repeat the call, look it up with GetCall {call_id}",
            retry_after_seconds=1.0,
            answer_complete="true",
            call_id=str(call_id),
        )
