"""Days, months and billing cycles in time zones: no moment is in none or in two, whatever the clocks do."""

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.ratelimit.calendar_periods import Calendar, microseconds, moment, time_zone
from services.ratelimit.limit_rule import CALENDAR, Window

ZONES = [
    "UTC",
    "Europe/Berlin",
    "America/New_York",
    "America/Sao_Paulo",
    "Asia/Kathmandu",
    "Asia/Beirut",
    "Pacific/Apia",
    "Australia/Lord_Howe",
    "America/Havana",
]


def us_of(year: int) -> int:
    """The beginning of a year."""
    return microseconds(datetime(year, 1, 3, tzinfo=UTC))


calendars = st.builds(Calendar, st.sampled_from([ZoneInfo(name) for name in ZONES]), st.integers(1, 31))
times = st.integers(us_of(1971), us_of(2200))


@given(calendars, st.sampled_from(CALENDAR), times)
def test_every_moment_is_in_exactly_one_period(calendar: Calendar, window: Window, now_us: int) -> None:
    """Boundaries rise, contain the moment between the second and the third, and are those of each of their moments."""
    before, start, end, after = calendar.boundaries(window, now_us)
    assert before < start <= now_us < end < after
    for us in (start, end - 1):
        assert calendar.boundaries(window, us) == (before, start, end, after)
    assert calendar.boundaries(window, end)[:3] == (start, end, after)
    assert calendar.period(window, start - 1) == (before, start)


@given(calendars, times)
def test_days_are_dates_and_months_and_cycles_begin_with_days(calendar: Calendar, now_us: int) -> None:
    """A day's moments share their local date; a month begins on the first and a cycle on its day or the last there is."""
    for window in CALENDAR:
        _, start, end, _ = calendar.boundaries(window, now_us)
        first, last = (moment(us).astimezone(calendar.zone) for us in (start, end - 1))
        assert calendar.period(Window.DAY, start)[0] == start
        if window is Window.DAY:
            assert first.date() == last.date()
        elif window is Window.MONTH:
            assert (first.day, (last + timedelta(days=1)).day, first.month) == (1, 1, last.month)
        else:
            following = (first.replace(day=28, fold=0) + timedelta(days=4)).replace(day=1) - timedelta(days=1)
            assert first.day in (min(calendar.anchor_day, following.day), min(calendar.anchor_day, following.day) + 1)


@pytest.mark.parametrize(
    ("zone", "now", "start", "end"),
    [
        # The clock is put forward: 23 hours.
        ("Europe/Berlin", "2026-03-29T12:00", "2026-03-28T23:00", "2026-03-29T22:00"),
        # It is put back: 25 hours.
        ("Europe/Berlin", "2026-10-25T12:00", "2026-10-24T22:00", "2026-10-25T23:00"),
        # Midnight itself is skipped: the day begins with the first moment there is, 01:00.
        ("America/Sao_Paulo", "2018-11-04T12:00", "2018-11-04T03:00", "2018-11-05T02:00"),
        # A whole day is skipped: the 29th is followed by the 31st.
        ("Pacific/Apia", "2011-12-30T09:59", "2011-12-29T10:00", "2011-12-30T10:00"),
        ("Pacific/Apia", "2011-12-30T10:00", "2011-12-30T10:00", "2011-12-31T10:00"),
    ],
)
def test_days_follow_the_clocks_of_their_place(zone: str, now: str, start: str, end: str) -> None:
    """A day is as long as its place makes it."""
    period = Calendar(ZoneInfo(zone)).period(Window.DAY, us(now))
    assert [moment(each).strftime("%Y-%m-%dT%H:%M") for each in period] == [start, end]


@pytest.mark.parametrize(
    ("anchor_day", "now", "start", "end"),
    [
        (15, "2026-02-14T23:59", "2026-01-15", "2026-02-15"),
        (15, "2026-02-15T00:00", "2026-02-15", "2026-03-15"),
        (31, "2026-02-28T00:00", "2026-02-28", "2026-03-31"),
        (31, "2028-02-28T23:59", "2028-01-31", "2028-02-29"),
        (30, "2026-03-01T00:00", "2026-02-28", "2026-03-30"),
        (1, "2026-12-31T23:59", "2026-12-01", "2027-01-01"),
    ],
)
def test_a_cycle_begins_on_its_day_or_the_last_of_a_shorter_month(anchor_day: int, now: str, start: str, end: str) -> None:
    """A subscription of the 31st is renewed on the 28th of February and on the 31st of March."""
    period = Calendar(UTC, anchor_day).period(Window.CYCLE, us(now))
    assert [f"{moment(each):%Y-%m-%d}" for each in period] == [start, end]


def test_an_unknown_time_zone_is_utc() -> None:
    """A misspelt zone must not stop a tenant's calls."""
    assert time_zone("Mars/Olympus") is UTC
    assert time_zone("../etc/passwd") is UTC
    assert time_zone("") is UTC
    assert time_zone("Europe/Berlin") == ZoneInfo("Europe/Berlin")


def us(text: str) -> int:
    """A UTC time in words."""
    return microseconds(datetime.fromisoformat(text).replace(tzinfo=UTC))
