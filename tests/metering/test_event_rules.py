"""Events are held to their contract while they are read: refused as the contract's own judge refuses them, and read as they were sent."""

from collections.abc import Sequence

import pytest
from google.protobuf.descriptor import Descriptor
from google.protobuf.json_format import MessageToDict
from hypothesis import given, settings
from hypothesis import strategies as st

from buf.validate import validate_pb2
from mesh.metering.v1 import event_service_pb2 as pb
from services.kernel.errors import FieldViolation, InvalidRequest, MeshError
from services.kernel.rpc.validation import refuse_broken
from services.metering.event import Event, content_digest
from services.metering.servicers.event_messages import events
from services.metering.servicers.events import OWN_CHECKS

TENANT = bytes(range(16))
LAST_SECOND = 253_402_300_799
# What each rule decides lies around its bounds; and what a text is made of may take one byte or four, or none that Postgres keeps.
LETTERS = st.sampled_from(("a", "é", "𝄞", "\n", "\x00"))


def texts(most: int) -> st.SearchStrategy[str]:
    """Texts of a length around what is allowed."""
    return st.builds(lambda letter, length: letter * length, LETTERS, st.sampled_from((1, 0, most, most + 1)))


def names(most: int) -> st.SearchStrategy[str]:
    """Names of products and types, good ones more often than not."""
    odd = st.sampled_from(("", "A", "1a", "a-b", "a.b", "a b", "aé", "a\n", "\na", "a" * most, "a" * (most + 1), "._", "a\x00"))
    return st.one_of(st.just("interviews"), st.just("a"), odd)


SECONDS = st.one_of(st.just(1_700_000_000), st.sampled_from((-1, 0, 1, LAST_SECOND, LAST_SECOND + 1)))
NANOS = st.one_of(st.just(0), st.sampled_from((-1, 1_999, 999_999_999, 1_000_000_000)))
QUANTITIES = st.one_of(st.just(1), st.sampled_from((-1, 0, 10**12, 10**12 + 1)))
FEW_PAIRS = st.dictionaries(texts(64), texts(512), min_size=1, max_size=2)
METADATA = st.one_of(FEW_PAIRS, st.sampled_from((32, 33)).map(lambda count: {str(index): "v" for index in range(count)}))


@st.composite
def messages(draw: st.DrawFn) -> pb.Event:
    """An event that keeps the contract or breaks it, in a part or two as a rule."""
    message = pb.Event(id="one", source="/interviews", product="hiring", type="interview.completed", data=pb.EventData(quantity=1))
    message.time.seconds = 1_700_000_000
    changes = draw(st.lists(st.sampled_from(CHANGES), max_size=3))
    for change in changes:
        change(draw, message)
    return message


def _time(draw: st.DrawFn, message: pb.Event) -> None:
    message.time.seconds, message.time.nanos = draw(SECONDS), draw(NANOS)


def _text(field: str, values: st.SearchStrategy[str]) -> "Change":
    def change(draw: st.DrawFn, message: pb.Event) -> None:
        setattr(message, field, draw(values))

    return change


def _metadata(draw: st.DrawFn, message: pb.Event) -> None:
    message.data.metadata.clear()
    message.data.metadata.update(draw(METADATA))


def _quantity(draw: st.DrawFn, message: pb.Event) -> None:
    message.data.quantity = draw(QUANTITIES)


CHANGES = (
    _text("id", texts(200)),
    _text("source", texts(200)),
    _text("subject", texts(200)),
    _text("feature", texts(100)),
    _text("product", names(63)),
    _text("type", names(100)),
    _time,
    _quantity,
    _metadata,
    _metadata,
    lambda draw, message: message.ClearField("time"),
    lambda draw, message: message.ClearField("data"),
)
Change = type(_time)


def refusal(request: pb.RecordEventsRequest) -> tuple[FieldViolation, ...] | None:
    """How the contract's judge refuses the request; None when it does not."""
    try:
        refuse_broken(request)
    except MeshError as error:
        return error.field_violations
    return None


def unstorable(request: pb.RecordEventsRequest) -> str | None:
    """The field that holds what no contract can refuse and no database keep; None without any."""
    for index, item in enumerate(request.events):
        pairs = [text for pair in item.data.metadata.items() for text in pair]
        if "\x00" in "".join((item.id, item.source, item.product, item.type, item.subject, item.feature, *pairs)):
            return f"events[{index}]"
        if not 0 <= item.time.seconds <= LAST_SECOND or not 0 <= item.time.nanos <= 999_999_999:
            return f"events[{index}].time"
    return None


def as_sent(message: pb.Event) -> tuple[object, ...]:
    """What of an event is kept, read plainly."""
    data, pairs = message.data, dict(sorted(message.data.metadata.items()))
    named = [message.source, message.id, message.product, message.type, str(data.quantity), message.subject, message.feature]
    digest = content_digest([*named, *(text for pair in pairs.items() for text in pair)])
    occurred_us = message.time.seconds * 1_000_000 + message.time.nanos // 1_000
    return (
        TENANT,
        message.source,
        message.id,
        digest,
        message.product,
        message.type,
        data.quantity,
        occurred_us,
        message.subject,
        message.feature,
    )


def as_read(event: Event) -> tuple[object, ...]:
    """The same of what was read."""
    return (
        event.tenant_id,
        event.source,
        event.id,
        event.digest,
        event.product,
        event.event_type,
        event.quantity,
        event.occurred_us,
        event.user,
        event.feature,
    )


@settings(max_examples=600, deadline=None)
@given(st.lists(messages(), min_size=1, max_size=3))
def test_what_the_contract_refuses_is_refused_with_the_same_words(sent: Sequence[pb.Event]) -> None:
    """Each violation is named as the judge names it; what passes is read whole, in order, with ids that rise."""
    request = pb.RecordEventsRequest(events=sent)
    violations, field = refusal(request), unstorable(request)
    if violations is None and field is None:
        read = events(request, TENANT)
        assert [as_read(event) for event in read] == [as_sent(message) for message in sent]
        assert [event.event_id for event in read] == sorted({event.event_id for event in read})
        return
    with pytest.raises(InvalidRequest) as refused:
        events(request, TENANT)
    assert refused.value.field_violations == violations if violations else refused.value.metadata["field"] == field


@pytest.mark.parametrize("count", [0, 5_001])
def test_how_many_is_judged_too(count: int) -> None:
    """The bound is on the whole request."""
    message = pb.Event(id="one", source="/interviews", product="hiring", type="held", data=pb.EventData(quantity=1))
    message.time.seconds = 1
    request = pb.RecordEventsRequest(events=[message] * count)
    with pytest.raises(InvalidRequest) as refused:
        events(request, TENANT)
    assert refused.value.field_violations == refusal(request)


def test_the_rules_that_are_held_are_all_there_are() -> None:
    """A rule that joins the contract has to be held where events are read: the reading and this list are to follow it."""
    name, text = {"string": {"minLen": "1", "maxLen": "200"}}, {"string": {"maxLen": "200"}}
    pattern = {
        product: {"string": {"pattern": f"^[a-z][a-z0-9_{more}]{{0,{most}}}$"}} for product, more, most in (("a", "", 62), ("b", ".", 99))
    }
    assert rules_of(pb.Event.DESCRIPTOR) == {
        "id": name,
        "source": name,
        "product": pattern["a"],
        "type": pattern["b"],
        "subject": text,
        "time": {"required": True},
        "feature": {"string": {"maxLen": "100"}},
        "data": {"required": True},
    }
    assert rules_of(pb.EventData.DESCRIPTOR) == {
        "quantity": {"int64": {"gte": "1", "lte": "1000000000000"}},
        "metadata": {
            "map": {
                "maxPairs": "32",
                "keys": {"string": {"minLen": "1", "maxLen": "64"}},
                "values": {"string": {"maxLen": "512"}},
            }
        },
    }
    assert rules_of(pb.RecordEventsRequest.DESCRIPTOR) == {"events": {"repeated": {"minItems": "1", "maxItems": "5000"}}}
    assert {"/mesh.metering.v1.EventService/RecordEvents"} == OWN_CHECKS


def rules_of(message: Descriptor) -> dict[str, object]:
    """The rules of each field; none is of a message as a whole."""
    assert not message.GetOptions().HasExtension(validate_pb2.message)
    return {field.name: MessageToDict(field.GetOptions().Extensions[validate_pb2.field]) for field in message.fields}
