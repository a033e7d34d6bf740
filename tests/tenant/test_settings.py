"""Settings and keys: what cannot be used is refused at the start, without repeating it."""

import base64
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
from pydantic import SecretStr, ValidationError

from services.kernel.context_token import ContextTokenVerifier
from services.kernel.ids import TenantId
from services.tenant.context_minting import ContextMinter, Grant, read_public_keys, read_signing_key
from services.tenant.settings import TenantSettings
from services.tenant.tenant_record import TenantFacts, TenantState


def test_several_operator_keys_may_be_listed() -> None:
    """A comma separated list of digests is taken, blanks aside; none at all means no operators."""
    settings = TenantSettings(operator_key_sha256=f" {'ab' * 32} , {'CD' * 32},")
    assert settings.operator_key_hashes() == (b"\xab" * 32, b"\xcd" * 32)
    assert TenantSettings(operator_key_sha256="").operator_key_hashes() == ()


def test_something_that_is_no_digest_is_refused() -> None:
    """A key pasted in place of its digest stops the start."""
    with pytest.raises(ValidationError, match="TENANTRY_OPERATOR_KEY_SHA256"):
        TenantSettings(operator_key_sha256="op_key")


WEAK_SECRETS = {
    "no key": "whsec_",
    "a short key": "whsec_" + base64.b64encode(b"k" * 23).decode(),
    "no base64": "whsec_" + "!" * 40,
    "base64 of another alphabet": "whsec_" + "-_" * 20,
    "base64 without its end": "whsec_" + base64.b64encode(b"k" * 25).decode().rstrip("="),
    "a short text": "twenty-three characters",
    "blanks": " " * 40,
}


@pytest.mark.parametrize("weakness", WEAK_SECRETS)
def test_a_webhook_secret_that_signs_nothing_is_refused(weakness: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A secret without 24 bytes of key stops the start; the message says how to make one and does not repeat what was given."""
    secret = WEAK_SECRETS[weakness]
    monkeypatch.setenv("TENANTRY_EVENT_WEBHOOK_SECRET", secret)
    with pytest.raises(ValidationError) as caught:
        TenantSettings(event_webhook_url="https://hooks.example")
    said = caught.value.errors()[0]["msg"]
    assert "TENANTRY_EVENT_WEBHOOK_SECRET" in said
    assert "24 bytes" in said
    assert "openssl rand -base64 32" in said
    given = secret.removeprefix("whsec_").strip()
    assert not given or given not in str(caught.value)


def test_a_webhook_secret_is_decoded_once() -> None:
    """`whsec_` and base64 is the key in it; any other text is the key itself; without an address there may be none."""
    key = bytes(range(24))
    for secret, wanted in (("whsec_" + base64.b64encode(key).decode(), key), ("k" * 24, b"k" * 24)):
        settings = TenantSettings(event_webhook_url="https://hooks.example", event_webhook_secret=SecretStr(secret))
        assert settings.webhook_signing_key() == wanted
    assert TenantSettings().event_webhook_url == ""


@pytest.mark.parametrize("seed", ["", "secretsecret", "!!!", base64.b64encode(b"short").decode()])
def test_a_signing_key_that_is_none_is_refused_without_repeating_it(seed: str) -> None:
    """The message says what a key looks like and not what was given: it may be the private key with a typing error."""
    with pytest.raises(ValueError, match="32 bytes") as caught:
        read_signing_key(seed)
    assert not seed or seed not in str(caught.value)


def test_one_seed_is_one_key_with_one_name_everywhere() -> None:
    """Replicas with the same seed publish the same key under the same id."""
    seed = base64.b64encode(bytes(range(32))).decode()
    one, two = read_signing_key(seed), read_signing_key(seed)
    assert one.key_id == two.key_id
    public = base64.b64encode(one.private_key.public_key().public_bytes_raw()).decode()
    assert [key.public_bytes_raw() for key in read_public_keys(f"{public}, ")] == [two.private_key.public_key().public_bytes_raw()]


async def test_a_minted_context_says_what_its_token_proves() -> None:
    """The context handed out in process equals what any verifier reads from the token."""
    minter = ContextMinter(read_signing_key(base64.b64encode(bytes(32)).decode()), [], region="local", clock=lambda: datetime.now(UTC))
    end = datetime.now(UTC) + timedelta(seconds=30)
    facts = TenantFacts(TenantState.ACTIVE, "free", "local", 4, "pool", encrypt_content=False)
    context = minter.mint(Grant(TenantId(uuid4()), facts, "key:k", frozenset({"b:c", "a:b"}), end_time=end))
    assert await ContextTokenVerifier(minter).verify(context.token) == context
