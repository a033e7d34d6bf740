"""A context token proves its claims to whoever knows the key, and nothing else does."""

from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from services.kernel.context_token import ContextTokenVerifier, SigningKey, mint
from services.kernel.errors import Unauthenticated, Unavailable
from services.kernel.ids import TenantId, new_uuid7
from tests.kernel.mesh import Keys, claims_of
from tests.support.waiting import eventually

START = datetime(2026, 1, 1, tzinfo=UTC)


class Clock:
    """Time as the test tells it."""

    def __init__(self) -> None:
        self.now = START
        self.seconds = 0.0

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)
        self.seconds += seconds


def verifier_of(keys: Keys, clock: Clock, **options: int) -> ContextTokenVerifier:
    """A verifier in the test's time."""
    return ContextTokenVerifier(keys, clock=lambda: clock.now, monotonic=lambda: clock.seconds, **options)


async def refused(verifier: ContextTokenVerifier, token: str) -> bool:
    """Tells whether the token is refused as it should be."""
    try:
        await verifier.verify(token)
    except Unauthenticated as error:
        return error.reason_name == "CONTEXT_INVALID"
    return False


async def test_a_token_proves_what_was_minted() -> None:
    """Every claim arrives, with the token itself to pass on."""
    keys, clock = Keys(), Clock()
    tenant = TenantId(new_uuid7())
    token = keys.token(tenant, now=START, tier="professional", scopes=["a:b", "c:d"], config_version=7)
    context = await verifier_of(keys, clock).verify(token)
    assert (context.tenant_id, context.tier, context.config_version, context.token) == (tenant, "professional", 7, token)
    assert context.scopes == {"a:b", "c:d"}
    assert context.expire_time == START + timedelta(seconds=200)
    assert not context.operator
    assert token not in repr(context)


@given(st.data())
async def test_any_altered_character_is_refused(data: st.DataObject) -> None:
    """Changing, dropping or adding one character anywhere makes the token worthless."""
    keys, clock = Keys(), Clock()
    token = keys.token(now=START)
    position = data.draw(st.integers(0, len(token) - 1))
    letter = data.draw(st.sampled_from("ABCxyz019-_.= \n"))
    head, tail = token[:position], token[position + 1 :]
    altered = data.draw(st.sampled_from([head + letter + tail, head + tail, token + letter]))
    if altered != token:
        assert await refused(verifier_of(keys, clock), altered)


@given(st.text(max_size=200))
async def test_no_text_passes_for_a_token(text: str) -> None:
    """Arbitrary text is refused with the same reason."""
    assert await refused(verifier_of(Keys(), Clock()), text)


async def test_a_forger_with_a_key_of_its_own_is_refused() -> None:
    """The key id of a real key with another key's signature proves nothing."""
    keys, clock = Keys(), Clock()
    forged = mint(claims_of(None, now=START), SigningKey("k1", Ed25519PrivateKey.generate()))
    assert await refused(verifier_of(keys, clock), forged)


async def test_a_token_ends_at_its_time_even_when_it_was_verified_before() -> None:
    """The remembered result does not outlive the token."""
    keys, clock = Keys(), Clock()
    verifier, token = verifier_of(keys, clock), keys.token(now=START, lifetime=10)
    await verifier.verify(token)
    clock.advance(9.9)
    await verifier.verify(token)
    clock.advance(0.2)
    assert await refused(verifier, token)
    assert await refused(verifier, token)


async def test_a_token_from_the_future_is_refused() -> None:
    """More than the allowed skew of clocks ahead is not believed."""
    keys, clock = Keys(), Clock()
    assert await refused(verifier_of(keys, clock), keys.token(now=START + timedelta(seconds=30)))


@pytest.mark.parametrize("lifetime", [0.0, -1.0, 301.0])
def test_no_token_is_minted_for_longer_than_five_minutes(lifetime: float) -> None:
    """A lifetime outside (0, 300] seconds is a fault of the minting code."""
    with pytest.raises(ValueError, match="300"):
        Keys().token(now=START, lifetime=lifetime)


async def test_only_an_operator_may_be_without_a_tenant() -> None:
    """An empty tenant id in anyone else's claims is refused."""
    keys, clock = Keys(), Clock()
    verifier = verifier_of(keys, clock)
    operator = await verifier.verify(keys.token(now=START, operator=True))
    assert operator.tenant_id is None
    claims = claims_of(None, now=START)
    claims.tenant_id = b""
    assert await refused(verifier, mint(claims, keys.signing[0]))


async def test_keys_are_fetched_once_and_a_new_key_is_found() -> None:
    """A known key costs no fetch; a rotated one is fetched when it first appears."""
    keys, clock = Keys(), Clock()
    verifier = verifier_of(keys, clock)
    for _ in range(5):
        await verifier.verify(keys.token(now=START))
    assert keys.fetches == 1
    clock.advance(2)
    keys.signing.insert(0, SigningKey("k2", Ed25519PrivateKey.generate()))
    await verifier.verify(keys.token(now=START))
    assert keys.fetches == 2


async def test_a_token_nobody_can_judge_is_not_called_forged() -> None:
    """While the keys cannot be had a token is neither good nor bad: the caller is asked to come back, again and again."""
    keys, clock = Keys(), Clock()
    verifier = verifier_of(keys, clock)
    keys.failure = Unavailable("tenant")
    for _ in range(3):
        with pytest.raises(Unavailable):
            await verifier.verify(keys.token(now=START))
    keys.failure = None
    clock.advance(2)
    assert (await verifier.verify(keys.token(now=START))).tier == "free"


async def test_unknown_key_ids_do_not_flood_the_key_source() -> None:
    """However many forged key ids arrive, the source is asked at most once a second."""
    keys, clock = Keys(), Clock()
    verifier = verifier_of(keys, clock)
    for number in range(50):
        stranger = SigningKey(f"stranger-{number}", Ed25519PrivateKey.generate())
        assert await refused(verifier, mint(claims_of(None, now=START), stranger))
    assert keys.fetches == 1


async def test_the_memory_of_verified_tokens_is_bounded() -> None:
    """Old results give way to new ones."""
    keys, clock = Keys(), Clock()
    verifier = verifier_of(keys, clock, cache_size=3)
    for _ in range(10):
        await verifier.verify(keys.token(now=START))
    assert len(verifier._verified) == 3


async def test_a_key_that_is_published_no_more_is_forgotten() -> None:
    """The keys are looked at again beside the calls; once a key is gone its tokens are refused, those verified before as well."""
    keys, clock = Keys(), Clock()
    verifier = verifier_of(keys, clock)
    old, kept = keys.token(now=START), SigningKey("k2", Ed25519PrivateKey.generate())
    keys.signing.append(kept)
    await verifier.verify(old)
    await verifier.verify(mint(claims_of(None, now=START), kept))
    keys.signing.pop(0)
    clock.advance(31)
    await verifier.verify(old)

    async def was_looked_at() -> bool:
        return keys.fetches == 2

    await eventually(was_looked_at, within_seconds=20.0)
    assert await refused(verifier, old)
    assert (await verifier.verify(keys.token(now=START))).tier == "free"


async def test_keys_nobody_confirmed_for_300_s_are_confirmed_before_they_are_believed() -> None:
    """A verifier that slept through the end of a key refuses its tokens at once when it wakes."""
    keys, clock = Keys(), Clock()
    verifier, leaked = verifier_of(keys, clock), keys.signing[0]
    await verifier.verify(keys.token(now=START))
    keys.signing[0] = SigningKey("k2", Ed25519PrivateKey.generate())
    clock.advance(300)
    assert await refused(verifier, mint(claims_of(None, now=clock.now), leaked))


async def test_keys_outlive_an_outage_by_as_long_as_a_token_and_no_more() -> None:
    """While the keys cannot be had the known ones serve until every token of before has ended; then nobody can judge."""
    keys, clock = Keys(), Clock()
    verifier = verifier_of(keys, clock)
    await verifier.verify(keys.token(now=START))
    keys.failure = Unavailable("tenant")
    clock.advance(320)
    assert (await verifier.verify(keys.token(now=clock.now))).tier == "free"
    clock.advance(15)
    with pytest.raises(Unavailable):
        await verifier.verify(keys.token(now=clock.now))


async def test_a_token_that_ended_still_proves_what_it_proved() -> None:
    """For a record of the past a token is judged as of then, and up to the grace after it; it admits nobody any more."""
    keys, clock, grace = Keys(), Clock(), timedelta(seconds=60)
    tenant = TenantId(new_uuid7())
    token, verifier = keys.token(tenant, now=START), verifier_of(keys, clock)
    clock.advance(100_000)
    assert await refused(verifier, token)
    for seconds in (0, 199, 200, 260):
        proven = await verifier.verify_as_of(token, START + timedelta(seconds=seconds), grace=grace)
        assert proven.tenant_id == tenant
    for seconds in (-100, 261):
        with pytest.raises(Unauthenticated):
            await verifier.verify_as_of(token, START + timedelta(seconds=seconds), grace=grace)
    assert await refused(verifier, token)


async def test_the_past_is_proven_by_signature_alone() -> None:
    """A token that nobody signed proves nothing of the past either, however often it is shown."""
    keys, clock = Keys(), Clock()
    token, verifier = Keys().token(now=START), verifier_of(keys, clock)
    for _ in range(2):
        with pytest.raises(Unauthenticated):
            await verifier.verify_as_of(token, START)


async def test_remembering_signatures_is_bounded() -> None:
    """A verifier remembers no more signatures than it was told to."""
    keys, clock = Keys(), Clock()
    verifier = verifier_of(keys, clock, cache_size=2)
    for _ in range(5):
        await verifier.verify_as_of(keys.token(TenantId(new_uuid7()), now=START), START)
    assert len(verifier._signed) == 2
