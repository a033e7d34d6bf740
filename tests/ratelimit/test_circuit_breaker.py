"""When a failing dependency is asked again."""

from services.ratelimit.circuit_breaker import CircuitBreaker


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_it_opens_after_failures_in_a_row_and_probes_once_a_pause() -> None:
    """Open it refuses; after the pause one caller may try, and the others wait for its answer."""
    clock = Clock()
    breaker = CircuitBreaker(failure_threshold=2, open_seconds=1.0, clock=clock)
    breaker.failed()
    assert breaker.admits()
    breaker.failed()
    assert not breaker.admits()
    clock.now += 1.0
    assert [breaker.admits() for _ in range(3)] == [True, False, False]
    breaker.failed()
    assert not breaker.admits()


def test_one_success_closes_it() -> None:
    """The first answer of the dependency lets everyone through again."""
    clock = Clock()
    breaker = CircuitBreaker(failure_threshold=1, open_seconds=1.0, clock=clock)
    breaker.failed()
    clock.now += 1.0
    assert breaker.admits()
    breaker.succeeded()
    assert [breaker.admits() for _ in range(3)] == [True, True, True]


def test_an_answer_on_another_way_closes_it() -> None:
    """Whoever asked the same dependency another way since it failed knows that it is back; an answer of before says nothing."""
    clock = Clock()
    beside = CircuitBreaker(failure_threshold=1, open_seconds=1.0, clock=clock)
    breaker = CircuitBreaker(failure_threshold=1, open_seconds=1.0, clock=clock, beside=beside)
    beside.succeeded()
    clock.now += 0.1
    breaker.failed()
    assert not breaker.admits()
    clock.now += 0.1
    beside.succeeded()
    assert [breaker.admits() for _ in range(3)] == [True, True, True]
    clock.now += 0.1
    breaker.failed()
    assert not breaker.admits()


def test_a_probe_that_never_reports_does_not_keep_it_open() -> None:
    """Another probe may go after another pause."""
    clock = Clock()
    breaker = CircuitBreaker(failure_threshold=1, open_seconds=1.0, clock=clock)
    breaker.failed()
    clock.now += 1.0
    assert breaker.admits()
    clock.now += 1.0
    assert breaker.admits()
