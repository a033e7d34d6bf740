"""Settings and keys: what cannot be used is refused at the start, without repeating it."""

import base64
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
from pydantic import ValidationError

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
