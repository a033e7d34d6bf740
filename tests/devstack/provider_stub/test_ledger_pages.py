"""The ledger as a usage feed: pages of a stretch of time, none lost and none twice."""

from datetime import UTC, datetime, timedelta

import pytest

from devstack.provider_stub.errors import ApiError
from devstack.provider_stub.ledger_pages import page

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
LINES = [{"request_id": str(number), "started_at": (NOON + timedelta(seconds=number)).isoformat()} for number in range(10)]


def ids(answer: dict[str, object]) -> list[str]:
    """Which requests a page holds."""
    data = answer["data"]
    assert isinstance(data, list)
    return [line["request_id"] for line in data]


def test_pages_follow_each_other_without_loss() -> None:
    """Page by page the requests of the stretch come in the order they began, its end left out."""
    query = {"starting_at": (NOON + timedelta(seconds=2)).isoformat(), "ending_at": (NOON + timedelta(seconds=9)).isoformat(), "limit": "3"}
    found, pages = [], 0
    while True:
        answer = page(LINES, query, NOON)
        found += ids(answer)
        pages += 1
        if not answer["has_more"]:
            break
        query = query | {"page": str(answer["next_page"])}
    assert (found, pages) == ([str(number) for number in range(2, 9)], 3)
    assert answer["complete_until"] == NOON.isoformat()


def test_without_a_query_everything_is_told() -> None:
    """As before there were pages."""
    answer = page(LINES, {}, NOON)
    assert (len(ids(answer)), answer["has_more"], answer["next_page"]) == (10, False, None)


@pytest.mark.parametrize(
    "query", [{"starting_at": "noon"}, {"ending_at": "2026-03-01T12:00:00"}, {"limit": "0"}, {"limit": "1001"}, {"page": "-1"}]
)
def test_a_query_that_cannot_be_read_is_refused(query: dict[str, str]) -> None:
    """A misspelt feed request is an error, not an empty page."""
    with pytest.raises(ApiError):
        page(LINES, query, NOON)
