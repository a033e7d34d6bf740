"""How a provider can fail, and what each way says about the bill. Strict: only what is certainly unbilled counts as unbilled."""

from services.inference.refusals import ProviderMisconfigured, ProviderRefused, ProviderUnavailable, StreamInterrupted
from services.kernel.errors import MeshError
from services.kernel.ids import CallId

# The provider answers these before it works on a request. Anything else may have been billed.
UNBILLED_STATUSES = frozenset((400, 401, 403, 404, 413, 422, 429, 529))
_REFUSING_STATUSES = frozenset((400, 404, 413, 422))
_KEY_STATUSES = frozenset((401, 403))


class ProviderFailure(Exception):
    """The provider did not answer to the end.

    `http_status` is None without a response; `accepted` once it had begun to answer; `unsent` when the request never left this process,
    `own_key` when it went out under the tenant's own key.
    """

    def __init__(
        self,
        cause: str,
        *,
        http_status: int | None = None,
        retry_after_seconds: float | None = None,
        accepted: bool = False,
        unsent: bool = False,
        own_key: bool = False,
    ) -> None:
        super().__init__(cause)
        self.cause = cause
        self.http_status = http_status
        self.retry_after_seconds = retry_after_seconds
        self.accepted = accepted
        self.unsent = unsent
        self.own_key = own_key

    @property
    def key_refused(self) -> bool:
        """True when the provider does not accept the key."""
        return not self.accepted and self.http_status in _KEY_STATUSES

    @property
    def unbilled(self) -> bool:
        """True when the attempt was certainly not billed."""
        return self.unsent or (not self.accepted and self.http_status in UNBILLED_STATUSES)

    def as_refusal(self, call_id: CallId) -> MeshError:
        """Returns what the caller is told."""
        if self.accepted:
            return StreamInterrupted(call_id)
        if self.http_status in _REFUSING_STATUSES:
            return ProviderRefused(self.http_status)
        if self.http_status in _KEY_STATUSES:
            return ProviderMisconfigured(self.http_status, own_key=self.own_key)
        return ProviderUnavailable(self.http_status, self.retry_after_seconds, unbilled=self.unbilled, call_id=call_id)
