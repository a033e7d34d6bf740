"""Within what times Stripe takes a meter event, and knows one again. Pure.

Source: Stripe API, "Create a billing meter event": a timestamp within the past 35 days or up to 5 minutes in the future; identifiers are
unique within at least 24 hours.
"""

from datetime import datetime, timedelta

from services.metering.exports.outgoing import Outgoing, TellFailed

# With a margin each: for the time a request is under way, and for clocks that differ.
_OLDEST = timedelta(days=35) - timedelta(minutes=30)
_FUTURE = timedelta(minutes=4)
KNOWN_AGAIN = timedelta(hours=23)


def refuse_out_of_window(item: Outgoing, now: datetime) -> None:
    """Refuses what Stripe would refuse, or might count twice. Raises: TellFailed."""
    if now - item.use_time > _OLDEST:
        msg = "used over 35 days ago, which Stripe does not take"
        raise TellFailed(msg, may_have_arrived=item.send_time is not None, is_final=True)
    if item.use_time - now > _FUTURE:
        msg = "used in the future: waits until Stripe takes it"
        raise TellFailed(msg, may_have_arrived=False, pause_seconds=(item.use_time - now).total_seconds())
    if item.send_time is not None and now - item.send_time > KNOWN_AGAIN:
        msg = "may have arrived over 23 hours ago: look at Stripe before it is told again, which knows ids for 24 hours"
        raise TellFailed(msg, may_have_arrived=True, is_final=True)
