"""Stripe Billing's meter events, by Stripe's own library. An identifier it has already is a receipt."""

from datetime import UTC, datetime

import stripe

from services.metering.exports.outgoing import Outgoing, TellFailed
from services.metering.exports.stripe_windows import refuse_out_of_window

TIMEOUT_SECONDS = 10.0
# How Stripe says that it has the identifier; it has no code of its own.
_HAD_ALREADY = "already exists with identifier"
_LONGEST_PAUSE_SECONDS = 3_600.0


class StripeMeterEvents:
    """Build it inside a running loop. The library's own retries are off: the outbox is the one place that retries."""

    def __init__(self, secret_key: str, base_url: str, *, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        self._http = stripe.AIOHTTPClient(timeout=timeout_seconds)
        self._client = stripe.StripeClient(
            secret_key, base_addresses={"api": base_url.rstrip("/")}, max_network_retries=0, http_client=self._http
        )

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.close_async()  # type: ignore[no-untyped-call] # the library's own

    async def tell(self, item: Outgoing) -> None:
        """Creates the meter event. Raises: TellFailed."""
        refuse_out_of_window(item, datetime.now(UTC))
        if not item.customer_id:
            msg = "the tenant has no Stripe customer any more"
            raise TellFailed(msg, may_have_arrived=item.send_time is not None, is_final=True)
        try:
            await self._client.v1.billing.meter_events.create_async(
                {
                    "event_name": item.event_name,
                    "identifier": item.identifier,
                    "timestamp": int(item.use_time.timestamp()),
                    "payload": {"stripe_customer_id": item.customer_id, "value": str(item.quantity)},
                }
            )
        except stripe.InvalidRequestError as error:
            if _HAD_ALREADY not in (error.user_message or str(error)):
                raise TellFailed(_refused(error), may_have_arrived=False, is_final=True) from None
        except stripe.StripeError as error:
            raise _failure(error) from None
        except ValueError:
            # The library reads what is no text of any encoding with no error of its own.
            msg = "Stripe's answer cannot be read"
            raise TellFailed(msg, may_have_arrived=True) from None


def _failure(error: stripe.StripeError) -> TellFailed:
    status = error.http_status
    if status is None:
        return TellFailed("Stripe did not answer", may_have_arrived=True)
    if status < 400:
        return TellFailed("Stripe's answer cannot be read", may_have_arrived=True)
    if status >= 500:
        return TellFailed(f"Stripe answered {status}", may_have_arrived=True)
    return TellFailed(_refused(error), may_have_arrived=False, pause_seconds=_retry_after(error) if status == 429 else None)


def _refused(error: stripe.StripeError) -> str:
    # The code and not the words, which may hold what was sent.
    return f"Stripe refused it ({error.code or type(error).__name__}, {error.http_status})"[:300]


def _retry_after(error: stripe.StripeError) -> float | None:
    told = (error.headers or {}).get("retry-after", "")
    return min(float(told), _LONGEST_PAUSE_SECONDS) if told.isascii() and told.isdigit() else None
