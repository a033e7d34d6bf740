"""The service as `python -m services.ratelimit`, with a wrong clock: TEST_SKEW_SECONDS is added wherever the limits read the time of day.

Only there: credentials are judged by a clock too, and a process whose credentials are wrong proves nothing about limits.
"""

import os
from datetime import datetime, timedelta, tzinfo

from services.kernel.command import main
from services.ratelimit import reservation
from services.ratelimit.adapters import redis_store
from services.ratelimit.app import build
from services.ratelimit.settings import RatelimitSettings

_SKEW = timedelta(seconds=float(os.environ["TEST_SKEW_SECONDS"]))


class SkewedDatetime(datetime):
    """The machine's time, and the skew."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override] # a plain datetime is what callers want
        return datetime.now(tz) + _SKEW


if __name__ == "__main__":
    redis_store.datetime = SkewedDatetime  # type: ignore[misc, attr-defined] # the name this module looks up
    reservation.datetime = SkewedDatetime  # type: ignore[misc, attr-defined]
    main(RatelimitSettings, build)
