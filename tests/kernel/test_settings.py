"""Settings that would weaken trust do not start a service."""

from typing import Any

import pytest
from pydantic import ValidationError

from services.kernel.settings import is_loopback
from tests.kernel.mesh import TenantSettings

FILES: dict[str, Any] = {"tls_cert_file": "c", "tls_key_file": "k", "tls_ca_file": "a"}


@pytest.mark.parametrize("address", ["0.0.0.0:7401", "[::]:7401", "10.0.0.1:7401", "example.com:7401", ":7401"])
def test_plaintext_is_bound_to_loopback_only(address: str) -> None:
    """Anything another machine could reach needs TLS, and the sentence says what to set."""
    with pytest.raises(ValidationError, match="TENANTRY_TLS_CERT_FILE"):
        TenantSettings(listen_address=address)
    assert TenantSettings(listen_address=address, **FILES).tls_enabled


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.8.8.8:1", "[::1]:1", "localhost:1", "unix:/tmp/socket"])
def test_loopback_is_recognised(address: str) -> None:
    """Every spelling of this machine."""
    assert is_loopback(address)


@pytest.mark.parametrize("missing", FILES)
def test_half_a_tls_configuration_is_refused(missing: str) -> None:
    """All three files or none."""
    with pytest.raises(ValidationError, match="all three"):
        TenantSettings(**{key: value for key, value in FILES.items() if key != missing})


@pytest.mark.parametrize("hashes", ["tenant=abc", "tenant", "=00", "tenant=" + "0" * 62])
def test_malformed_peer_digests_are_refused(hashes: str) -> None:
    """A digest that could never match is a mistake worth a sentence."""
    with pytest.raises(ValidationError):
        TenantSettings(peer_token_hashes=hashes)


def test_the_environment_is_read_and_secrets_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """TENANTRY_* names set the fields; a printed settings object shows no bearer; settings do not change."""
    monkeypatch.setenv("TENANTRY_SERVICE_TOKEN", "very-secret")
    monkeypatch.setenv("TENANTRY_DRAIN_SECONDS", "3")
    monkeypatch.setenv("TENANTRY_SOMETHING_ELSE", "x")
    settings = TenantSettings(peer_token_hashes=f"tenant={'ab' * 32}, inference={'cd' * 32}")
    assert settings.drain_seconds == 3
    assert "very-secret" not in repr(settings)
    assert settings.peer_hashes() == {"tenant": b"\xab" * 32, "inference": b"\xcd" * 32}
    with pytest.raises(ValidationError):
        settings.drain_seconds = 1.0
