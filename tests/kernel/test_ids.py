"""Ids sort by time, tell their time, and have one spelling."""

from datetime import UTC, datetime
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.kernel.errors import InvalidRequest
from services.kernel.ids import new_uuid7, new_uuid7_texts, new_uuid7s, parse_uuid, uuid7_time, uuid_from_bytes

MOMENTS = st.datetimes(datetime(1970, 1, 2), datetime(9000, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001 - hypothesis wants naive bounds


def test_ids_of_a_process_are_unique_and_in_order() -> None:
    """Each id sorts after every id minted before it, also within one millisecond."""
    ids = [new_uuid7() for _ in range(20_000)]
    assert sorted(set(ids)) == ids


def test_ids_of_a_batch_are_in_order_with_all_others() -> None:
    """A batch's ids are of version 7 and of now, and sort with each other and with those minted one by one, before and after."""
    minted = [new_uuid7()]
    for count in (1, 5_000, 0, 2):
        minted += [UUID(bytes=raw) for raw in new_uuid7s(count)] + [new_uuid7()] + [UUID(text) for text in new_uuid7_texts(count)]
    assert sorted(set(minted)) == minted
    assert {(value.version, value.variant) for value in minted} == {(7, "specified in RFC 4122")}
    told = [uuid7_time(value) for value in minted]
    assert all(moment is not None and abs((moment - datetime.now(UTC)).total_seconds()) < 60 for moment in told)


def test_a_batch_that_would_run_over_its_bits_begins_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the last id before the variant's bits would be counted into, a batch is still in order and of version 7."""
    monkeypatch.setattr("services.kernel.ids._last", (2**44, 2**62 - 10))
    monkeypatch.setattr("services.kernel.ids.secrets.randbits", lambda bits: 0)
    last = new_uuid7()
    batch = [UUID(bytes=raw) for raw in new_uuid7s(100)]
    assert sorted({last, *batch}) == [last, *batch]
    assert {(value.version, value.variant) for value in batch} == {(7, "specified in RFC 4122")}
    assert new_uuid7() > batch[-1]


@pytest.mark.parametrize("before", [2**48 - 101, 2**48 - 100, 2**48 - 50, 2**48 - 1, 0])
def test_texts_of_a_batch_are_those_of_its_ids(monkeypatch: pytest.MonkeyPatch, before: int) -> None:
    """Also where they count up out of the last group of digits."""
    monkeypatch.setattr("services.kernel.ids.secrets.randbits", lambda bits: 0)
    batches = []
    for mint in (new_uuid7s, new_uuid7_texts):
        monkeypatch.setattr("services.kernel.ids._last", (2**44, before - 1))
        batches.append(mint(100))
    assert batches[1] == [str(UUID(bytes=bytes(raw))) for raw in batches[0]]
    assert UUID(batches[1][0]).int % 2**62 == before


@given(MOMENTS)
def test_an_id_tells_when_it_was_minted(moment: datetime) -> None:
    """Version, variant and time follow RFC 9562; the time is exact to the millisecond."""
    value = new_uuid7(moment)
    assert value.version == 7
    assert value.variant == "specified in RFC 4122"
    told = uuid7_time(value)
    assert told is not None
    assert abs((told - moment).total_seconds()) < 0.002


def test_other_versions_tell_no_time() -> None:
    """Only version 7 carries its time."""
    assert uuid7_time(uuid4()) is None


@given(st.uuids())
def test_canonical_text_is_accepted_in_either_case(value: UUID) -> None:
    """The 36 characters of a UUID read back as the same id."""
    assert parse_uuid(str(value), "id") == value
    assert parse_uuid(str(value).upper(), "id") == value
    assert uuid_from_bytes(value.bytes, "id") == value


@given(st.one_of(st.text(max_size=60), st.uuids().map(lambda value: value.hex), st.uuids().map(lambda value: "{" + str(value) + "}")))
def test_any_other_spelling_is_refused(text: str) -> None:
    """Braces, bare hex and every other text are refused with the field's name."""
    with pytest.raises(InvalidRequest) as refused:
        parse_uuid(text, "document_id")
    assert refused.value.metadata["field"] == "document_id"


@given(st.uuids(), st.integers(0, 35), st.one_of(st.characters(), st.sampled_from("_ +\uff11\u0663gG\n")))
def test_one_other_character_is_refused(value: UUID, place: int, character: str) -> None:
    """Every place takes what belongs there: one of 16 digits in either case, or a dash. Other scripts' digits are none."""
    text = str(value)
    changed = text[:place] + character + text[place + 1 :]
    if text[place] == character or (text[place] != "-" and character in "0123456789abcdefABCDEF"):
        assert str(parse_uuid(changed, "id")) == changed.lower()
    else:
        with pytest.raises(InvalidRequest):
            parse_uuid(changed, "id")


@given(st.binary(max_size=40).filter(lambda raw: len(raw) != 16))
def test_an_id_is_sixteen_bytes(raw: bytes) -> None:
    """Bytes of any other length are no id."""
    with pytest.raises(InvalidRequest):
        uuid_from_bytes(raw, "id")


def test_a_clock_that_steps_back_does_not_break_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids go on counting from the last one while the clock is behind it."""
    before = new_uuid7()
    monkeypatch.setattr("services.kernel.ids.time.time_ns", lambda: 0)
    behind = [new_uuid7() for _ in range(100)]
    assert sorted([before, *behind]) == [before, *behind]


def test_a_time_beyond_the_calendar_is_no_time() -> None:
    """A version 7 id with an absurd time is an id all the same."""
    assert uuid7_time(UUID("ffffffff-ffff-7fff-bfff-ffffffffffff")) is None
