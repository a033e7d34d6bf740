"""Reserve and ReserveBatch are held to their contract while they are read: refused as its judge refuses them, read as they were sent."""

from collections.abc import Sequence

import pytest
from google.protobuf.descriptor import Descriptor
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from buf.validate import validate_pb2
from mesh.ratelimit.v1 import rate_limit_service_pb2 as pb
from services.kernel.errors import FieldViolation, MeshError
from services.kernel.ids import new_uuid7
from services.kernel.rpc.validation import refuse_broken
from services.ratelimit.limits import Amounts, Demand, Shortening, Subject, UnkeepableName
from services.ratelimit.request import Request
from services.ratelimit.servicers import reserve_requests
from services.ratelimit.servicers.reserve_requests import OWN_CHECKS, items_of, request_of

ID = new_uuid7()
TEXT = str(ID)
IDS = ("", "x", TEXT.replace("-", ""), f"{{{TEXT}}}", f"{TEXT}0", f"{TEXT}\n", f"g{TEXT[1:]}", f"urn:uuid:{TEXT}", TEXT.upper())


def texts(most: int) -> list[str]:
    """Texts of a length around what is allowed, of letters of one byte and of four, and of what no ledger keeps."""
    return [letter * length for letter in ("a", "𝄞", "\x00") for length in (0, 1, most, most + 1)]


def around(least: int, most: int) -> list[int]:
    """Numbers around what is allowed."""
    return [least - 1, least, least + 1, most, most + 1]


# Of each field what its rule has to decide: values around its bounds.
VALUES: dict[str, Sequence[object]] = {
    "reservation_id": IDS,
    "amounts.tokens": around(0, 10_000_000),
    "amounts.cost_nano_usd": around(0, 10**15),
    "user": texts(200),
    "feature": texts(100),
    "attempt": around(0, 100),
    "provider_account": texts(100),
    "input_tokens": around(0, 10_000_000),
    "shorten.max_output_tokens": around(1, 1_000_000),
    "shorten.min_output_tokens": around(1, 1_000_000),
    "shorten.output_nano_usd_per_million": around(0, 10**15),
    "max_wait": [(seconds, nanos) for seconds in (-1, 0, 1, 59, 60, 61) for nanos in (-1, 0, 1, 999_999_999, 1_000_000_000)],
    # Absent, or there and empty.
    "amounts": [None],
    "shorten": [None],
}


def changed(message: pb.ReserveRequest, field: str, value: object) -> None:
    """Puts a value into a field; None empties a message."""
    part, _, name = field.rpartition(".")
    if part == "shorten" and not message.HasField("shorten"):
        message.shorten.max_output_tokens, message.shorten.min_output_tokens = 200, 20
    if isinstance(value, tuple):
        message.max_wait.seconds, message.max_wait.nanos = value
    elif field == "amounts":
        message.ClearField("amounts")
    elif field == "shorten":
        message.shorten.Clear()
        message.shorten.SetInParent()
    else:
        setattr(getattr(message, part) if part else message, name, value)


def good() -> pb.ReserveRequest:
    """A request that keeps the contract."""
    return pb.ReserveRequest(reservation_id=TEXT, amounts=pb.Amounts(tokens=1_200, cost_nano_usd=3_000_000))


@st.composite
def requests(draw: st.DrawFn) -> pb.ReserveRequest:
    """A request that keeps the contract or breaks it, in a part or two as a rule."""
    message = good()
    for field in draw(st.lists(st.sampled_from([*VALUES]), max_size=3)):
        changed(message, field, draw(st.sampled_from(VALUES[field])))
    return message


@st.composite
def batch_items(draw: st.DrawFn) -> pb.ReserveBatchItem:
    """An item with a token and a request, or without either now and then."""
    item = pb.ReserveBatchItem(context_token=draw(st.sampled_from(["proof", *texts(8_192)])))
    if draw(st.integers(0, 9)):
        item.request.CopyFrom(draw(requests()))
    return item


def refusal(message: Message) -> tuple[FieldViolation, ...] | None:
    """How the contract's judge refuses the message; None when it does not."""
    try:
        refuse_broken(message)
    except MeshError as error:
        return error.field_violations
    return None


def as_sent(message: pb.ReserveRequest, *, gathered: bool = False) -> Request | str:
    """The request, read plainly; or the field that holds what no contract can refuse and no ledger keep."""
    for field in ("user", "feature"):
        if "\x00" in getattr(message, field):
            return field
    short, wait = message.shorten, message.max_wait
    shortening = Shortening(short.max_output_tokens, short.min_output_tokens, short.output_nano_usd_per_million)
    amounts = Amounts(message.amounts.tokens, message.amounts.cost_nano_usd)
    return Request(
        ID,
        Demand(amounts, message.attempt or 1, shortening=shortening if message.HasField("shorten") else None),
        Subject(message.user, message.feature),
        message.provider_account,
        message.input_tokens,
        wait.seconds + wait.nanos / 1e9,
        gathered=gathered,
    )


def as_read(read: Request | MeshError) -> Request | str:
    """The same of what was read."""
    if isinstance(read, Request):
        return read
    assert isinstance(read, UnkeepableName)
    return read.metadata["field"]


Said = Request | str | tuple[FieldViolation, ...]


def said(sent: pb.ReserveRequest) -> Said:
    """What is read of a request, or how it is refused."""
    try:
        return request_of(sent)
    except UnkeepableName as unkeepable:
        return unkeepable.metadata["field"]
    except MeshError as refused:
        return refused.field_violations


def judged(sent: pb.ReserveRequest) -> Said:
    """What its contract says of it."""
    violations = refusal(sent)
    return as_sent(sent) if violations is None else violations


@pytest.mark.parametrize("field", VALUES)
def test_each_bound_is_the_contracts(field: str) -> None:
    """Around every bound a Reserve is refused with the judge's words, or read whole."""
    for value in VALUES[field]:
        sent = good()
        changed(sent, field, value)
        assert said(sent) == judged(sent)


@settings(max_examples=100, deadline=None)
@given(requests())
def test_what_breaks_several_rules_is_refused_with_the_same_words(sent: pb.ReserveRequest) -> None:
    """Each violation is named as the judge names it."""
    assert said(sent) == judged(sent)


@settings(max_examples=100, deadline=None)
@given(st.lists(batch_items(), min_size=1, max_size=3))
def test_a_batch_is_refused_for_any_item_as_the_contract_refuses_it(sent: Sequence[pb.ReserveBatchItem]) -> None:
    """With the item's place in each violation; what passes is read in order, and a name that no ledger keeps is its own item's fault."""
    batch = pb.ReserveBatchRequest(items=sent)
    violations = refusal(batch)
    if violations is None:
        read = [(token, as_read(request)) for token, request in items_of(batch)]
        assert read == [(item.context_token, as_sent(item.request, gathered=True)) for item in sent]
        return
    with pytest.raises(MeshError) as refused:
        items_of(batch)
    assert refused.value.field_violations == violations


@pytest.mark.parametrize("count", [0, 1_001])
def test_how_many_is_judged_too(count: int) -> None:
    """The bound is on the whole batch."""
    item = pb.ReserveBatchItem(context_token="proof", request=good())
    batch = pb.ReserveBatchRequest(items=[item] * count)
    with pytest.raises(MeshError) as refused:
        items_of(batch)
    assert refused.value.field_violations == refusal(batch)


def test_the_judge_is_not_asked_about_what_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call as inference asks for it, which may be shortened and may wait, is read without him."""
    monkeypatch.setattr(reserve_requests, "refuse_broken", lambda message: pytest.fail(f"asked about {message}"))
    message = pb.ReserveRequest(reservation_id=TEXT, amounts=pb.Amounts(tokens=1_200), user="ada", feature="chat", attempt=2)
    message.shorten.max_output_tokens, message.shorten.min_output_tokens, message.max_wait.seconds = 200, 20, 5
    item = pb.ReserveBatchItem(context_token="proof", request=message)
    assert items_of(pb.ReserveBatchRequest(items=[item])) == [("proof", as_sent(message, gathered=True))]
    assert request_of(message) == as_sent(message)


def test_the_rules_that_are_held_are_all_there_are() -> None:
    """A rule that joins the contract has to be held where requests are read: the reading and this list are to follow it."""

    def numbers(least: int, most: int) -> dict[str, object]:
        return {"int64": {"gte": str(least), "lte": str(most)}}

    def text(most: int) -> dict[str, object]:
        return {"string": {"maxLen": str(most)}}

    assert rules_of(pb.ReserveRequest.DESCRIPTOR) == {
        "reservation_id": {"string": {"uuid": True}},
        "amounts": {"required": True},
        "user": text(200),
        "feature": text(100),
        "attempt": {"int32": {"gte": 0, "lte": 100}},
        "shorten": {},
        "max_wait": {"duration": {"gte": "0s", "lte": "60s"}},
        "provider_account": text(100),
        "input_tokens": numbers(0, 10_000_000),
    }
    assert rules_of(pb.Amounts.DESCRIPTOR) == {"tokens": numbers(0, 10_000_000), "cost_nano_usd": numbers(0, 10**15)}
    assert rules_of(pb.Shorten.DESCRIPTOR) == {
        "max_output_tokens": numbers(1, 1_000_000),
        "min_output_tokens": numbers(1, 1_000_000),
        "output_nano_usd_per_million": numbers(0, 10**15),
    }
    assert rules_of(pb.ReserveBatchItem.DESCRIPTOR) == {
        "context_token": {"string": {"minLen": "1", "maxLen": "8192"}},
        "request": {"required": True},
    }
    assert rules_of(pb.ReserveBatchRequest.DESCRIPTOR) == {"items": {"repeated": {"minItems": "1", "maxItems": "1000"}}}
    assert {f"/mesh.ratelimit.v1.RateLimitService/{name}" for name in ("Reserve", "ReserveBatch")} == OWN_CHECKS


def rules_of(message: Descriptor) -> dict[str, object]:
    """The rules of each field; none is of a message as a whole."""
    assert not message.GetOptions().HasExtension(validate_pb2.message)
    return {field.name: MessageToDict(field.GetOptions().Extensions[validate_pb2.field]) for field in message.fields}
