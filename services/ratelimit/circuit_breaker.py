"""Whether it is worth asking a dependency that has just failed. Refuses while open; lets one probe through at a time after a pause."""

import time
from collections.abc import Callable


class CircuitBreaker:
    """Opens after `failure_threshold` failures in a row, and closes with the first success: its own, or that of one `beside` it.

    `beside`: of another way to the same dependency.
    """

    def __init__(
        self,
        *,
        failure_threshold: int = 2,
        open_seconds: float = 0.2,
        clock: Callable[[], float] = time.monotonic,
        beside: "CircuitBreaker | None" = None,
    ) -> None:
        self._failure_threshold = failure_threshold
        self._open_seconds = open_seconds
        self._clock = clock
        self._beside = beside
        self._failures = 0
        self._probe_at = self._failed_at = self._succeeded_at = 0.0

    def admits(self) -> bool:
        """Tells whether to try now. While open, True is given to one caller a pause: the probe."""
        if self._failures < self._failure_threshold:
            return True
        if self._beside is not None and self._beside._succeeded_at > self._failed_at:
            return True
        now = self._clock()
        if now < self._probe_at:
            return False
        # The next probe is put off here already, so a probe that never reports back cannot hold the breaker open for ever.
        self._probe_at = now + self._open_seconds
        return True

    def succeeded(self) -> None:
        """The dependency answered."""
        self._failures = 0
        self._succeeded_at = self._clock()

    def failed(self) -> None:
        """The dependency did not answer."""
        self._failures += 1
        self._failed_at = self._clock()
        self._probe_at = self._failed_at + self._open_seconds
