"""What is altered in one bit, or moved anywhere, does not open; keys are fetched once, kept for 300 s, forgotten at once."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.kernel.errors import Unauthenticated, Unavailable
from services.kernel.ids import TenantId, new_uuid7
from services.kernel.request_context import bind_tenant
from services.kernel.sealing import OVERHEAD_BYTES, SealBroken, TenantKeys, VersionUnknown, row_identity, sealed_version
from services.kernel.tenant_cipher import TRUSTED_SECONDS, KeyUseFailed, TenantCipher
from services.kernel.tenant_context import TenantContext
from services.kernel.timed_cache import TimedCache

TENANT, OTHER = TenantId(new_uuid7()), TenantId(new_uuid7())
KEY = secrets.token_bytes(32)
KEYS = TenantKeys.of(TENANT, {1: KEY}, 1)
HERE = row_identity("table", "column", b"row")


def context_of(tenant_id: TenantId | None, *, encrypts: bool = True) -> TenantContext:
    """A proven tenant."""
    later = datetime.now(UTC) + timedelta(seconds=300)
    return TenantContext(tenant_id, "free", "local", "key:1", frozenset(), 1, later, False, "token", encrypt_content=encrypts)


class Source:
    """Hands out what a test put in, when the gate is open."""

    def __init__(self) -> None:
        self.keys: dict[TenantId, dict[int, bytes]] = {}
        self.fetched: list[TenantId] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def fetch(self, context: TenantContext, tenant_id: TenantId) -> TenantKeys:
        self.fetched.append(tenant_id)
        keys = dict(self.keys.setdefault(tenant_id, {1: secrets.token_bytes(32)}))
        await self.gate.wait()
        return TenantKeys.of(tenant_id, keys, max(keys))


class Clock:
    """A time that stands until it is moved."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@given(st.binary(max_size=4096))
def test_what_is_sealed_opens_and_shows_nothing(plaintext: bytes) -> None:
    """The plaintext comes back whole, is not in the sealed value, and two sealings of it differ."""
    sealed = KEYS.seal(plaintext, HERE)
    assert KEYS.open(sealed, HERE) == plaintext
    assert len(sealed) == len(plaintext) + OVERHEAD_BYTES
    assert sealed != KEYS.seal(plaintext, HERE)
    assert len(plaintext) < 4 or plaintext not in sealed


@given(st.binary(max_size=200), st.data())
def test_no_altered_value_opens(plaintext: bytes, data: st.DataObject) -> None:
    """One flipped bit anywhere, header and tag included, or a cut or longer value, is refused."""
    sealed = KEYS.seal(plaintext, HERE)
    bit = data.draw(st.integers(0, len(sealed) * 8 - 1))
    flipped = bytearray(sealed)
    flipped[bit // 8] ^= 1 << bit % 8
    length = data.draw(st.integers(0, len(sealed) - 1))
    for altered in (bytes(flipped), sealed[:length], sealed + b"\x00"):
        with pytest.raises((SealBroken, VersionUnknown)):
            KEYS.open(altered, HERE)


parts = st.lists(st.text(max_size=6) | st.binary(max_size=6), max_size=4)


@given(parts, parts, st.binary(max_size=50))
def test_a_moved_value_opens_nowhere_else(place: list[str | bytes], other: list[str | bytes], plaintext: bytes) -> None:
    """Another identity, another tenant or another key refuses; identities that differ in any part differ as a whole."""
    sealed = KEYS.seal(plaintext, row_identity(*place))
    assert KEYS.open(sealed, row_identity(*place)) == plaintext
    as_bytes = [[part.encode() if isinstance(part, str) else part for part in parts] for parts in (place, other)]
    assert (row_identity(*place) == row_identity(*other)) == (as_bytes[0] == as_bytes[1])
    if as_bytes[0] != as_bytes[1]:
        with pytest.raises(SealBroken):
            KEYS.open(sealed, row_identity(*other))
    for keys in (TenantKeys.of(OTHER, {1: KEY}, 1), TenantKeys.of(TENANT, {1: secrets.token_bytes(32)}, 1)):
        with pytest.raises(SealBroken):
            keys.open(sealed, row_identity(*place))


@given(st.binary(max_size=60))
def test_no_other_bytes_are_taken_for_a_sealed_value(noise: bytes) -> None:
    """Random bytes are refused with a typed error, never with another one."""
    with pytest.raises((SealBroken, VersionUnknown)):
        KEYS.open(noise, HERE)


def test_the_version_is_authenticated() -> None:
    """A value of one key version that is relabelled as another's does not open, though both are at hand."""
    both = TenantKeys.of(TENANT, {1: KEY, 2: KEY}, 2)
    sealed = both.seal(b"text", HERE)
    assert sealed_version(sealed) == 2
    with pytest.raises(SealBroken):
        both.open(sealed[:4] + b"\x01" + sealed[5:], HERE)


def test_a_keyed_digest_is_equal_for_equal_content_under_one_key_alone() -> None:
    """Digests compare content within a tenant, purpose and key version, and are none that the content alone could make."""
    keys = TenantKeys.of(TENANT, {1: KEY, 2: secrets.token_bytes(32)}, 2)
    assert keys.digest(b"text", b"p") == keys.digest(b"text", b"p", 2)
    others = {keys.digest(b"text", b"p", 1), keys.digest(b"text", b"q"), keys.digest(b"other", b"p")}
    assert len(others | {keys.digest(b"text", b"p"), TenantKeys.of(OTHER, {1: KEY}, 1).digest(b"text", b"p")}) == 5
    with pytest.raises(VersionUnknown):
        keys.digest(b"text", b"p", 3)


def test_no_key_shows_in_a_repr_and_only_whole_keys_are_taken() -> None:
    """A traceback that prints the keys prints none; a short key or a missing active one is refused."""
    assert repr(KEY) not in repr(KEYS)
    for keys, active in (({1: KEY[:31]}, 1), ({1: KEY}, 2), ({}, 1)):
        with pytest.raises(ValueError, match="32 bytes"):
            TenantKeys.of(TENANT, keys, active)


async def test_many_uses_ask_once() -> None:
    """Whoever comes while the keys are being fetched waits for the same answer; later uses ask nobody."""
    source = Source()
    cipher = TenantCipher(source)
    source.gate.clear()
    context = context_of(TENANT)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(cipher.seal(context, b"text", HERE)) for _ in range(10)]
        await asyncio.sleep(0)
        source.gate.set()
    assert [await cipher.open(context, task.result(), HERE) for task in tasks] == [b"text"] * 10
    assert source.fetched == [TENANT]


async def test_keys_are_trusted_for_300_seconds_from_the_question() -> None:
    """After that they are fetched anew: a destroyed key is out of every memory within five minutes even if no news of it came."""
    source, clock = Source(), Clock()
    cipher = TenantCipher(source, monotonic=clock)
    for at, expected in ((0.0, 1), (TRUSTED_SECONDS - 0.1, 1), (TRUSTED_SECONDS, 2)):
        clock.now = at
        await cipher.keys(context_of(TENANT))
        assert len(source.fetched) == expected


async def test_a_tenant_that_is_forgotten_is_asked_for_anew() -> None:
    """Forgetting one tenant leaves the others; forgetting all leaves none; an answer under way at that moment is not kept."""
    source = Source()
    cipher = TenantCipher(source)
    for tenant_id in (TENANT, OTHER):
        await cipher.keys(context_of(tenant_id))
    cipher.forget(TENANT)
    source.gate.clear()
    async with asyncio.TaskGroup() as group:
        late = group.create_task(cipher.keys(context_of(TENANT)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        cipher.forget(TENANT)
        source.keys[TENANT] = {2: secrets.token_bytes(32)}
        source.gate.set()
    assert late.result().active_version == 1
    assert (await cipher.keys(context_of(TENANT))).active_version == 2
    await cipher.keys(context_of(OTHER))
    assert source.fetched == [TENANT, OTHER, TENANT, TENANT]
    cipher.forget(None)
    await cipher.keys(context_of(OTHER))
    assert source.fetched[-1] == OTHER


async def test_a_value_of_a_newer_key_is_opened_after_one_question() -> None:
    """A replica that knows the old key alone opens what another one sealed with the new."""
    source = Source()
    reader, writer = TenantCipher(source), TenantCipher(source)
    context = context_of(TENANT)
    old = await reader.seal(context, b"old", HERE)
    source.keys[TENANT][2] = secrets.token_bytes(32)
    new = await writer.seal(context, b"new", HERE)
    assert await reader.open_all(context, [(old, HERE), (new, HERE)]) == [b"old", b"new"]
    assert len(source.fetched) == 3


async def test_what_does_not_open_is_internal_and_a_security_event(capsys: pytest.CaptureFixture[str]) -> None:
    """The caller hears nothing of why; the log names tenant and identity, and no content."""
    cipher = TenantCipher(Source())
    context = context_of(TENANT)
    sealed = await cipher.seal(context, b"the content", HERE)
    unknown = sealed[:4] + b"\x09" + sealed[5:]
    for value, identity in ((sealed, b"elsewhere"), (unknown, HERE), (b"noise", HERE)):
        with pytest.raises(KeyUseFailed) as caught:
            await cipher.open(context, value, identity)
        assert (caught.value.code.name, "content" in caught.value.message) == ("INTERNAL", False)
    logged = "".join(capsys.readouterr())
    assert (logged.count("key_use_failed"), logged.count("security_event"), "the content" in logged) == (3, 3, False)


async def test_a_bare_id_acts_in_the_name_of_the_call_in_hand_alone() -> None:
    """Keys are fetched for the tenant whose call is in hand; for any other, and without a call, only what is at hand serves."""
    cipher = TenantCipher(Source())
    with bind_tenant(context_of(TENANT)):
        sealed = await cipher.seal(TENANT, b"text", HERE)
        assert (cipher.is_sealing(TENANT), cipher.is_sealing(OTHER)) == (True, False)
        with pytest.raises(Unavailable):
            await cipher.keys(OTHER)
    assert await cipher.open(TENANT, sealed, HERE) == b"text"
    assert not cipher.is_sealing(TENANT)
    with bind_tenant(context_of(TENANT, encrypts=False)):
        assert not cipher.is_sealing(TENANT)
    with pytest.raises(Unauthenticated):
        await cipher.keys(context_of(None))


async def test_nothing_sealed_asks_for_nothing() -> None:
    """A page without a sealed value costs no question."""
    source = Source()
    assert await TenantCipher(source).open_all(context_of(TENANT), []) == []
    assert source.fetched == []


async def test_a_failed_question_is_not_remembered() -> None:
    """Every waiter hears of it, and the next asks again; the oldest answers go first when there are too many."""
    cache: TimedCache[int, str] = TimedCache(2, 60.0)

    def answering(value: str) -> Callable[[], Awaitable[str]]:
        async def fetch() -> str:
            if not value:
                raise Unavailable("data_key")
            return value

        return fetch

    for _ in range(2):
        with pytest.raises(Unavailable):
            await cache.get(1, answering(""))
    assert [await cache.get(key, answering(str(key))) for key in (1, 2, 3)] == ["1", "2", "3"]
    assert [cache.peek(key) for key in (1, 2, 3)] == [None, "2", "3"]
