"""Development certificates: made once, renewed before their end, replaced when damaged, their keys their owner's alone."""

import datetime
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from devstack.certificates import CLIENT, DevelopmentCertificates
from devstack.state import SERVICES
from services.kernel.rpc.identity import SPIFFE_PREFIX

NO_TENANT = [*SERVICES, CLIENT]
HOUR = datetime.timedelta(hours=1)


class Clock:
    """A clock that stands still until told."""

    def __init__(self) -> None:
        self.now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)

    def __call__(self) -> datetime.datetime:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """Now, and as much later as the test says."""
    return Clock()


@pytest.fixture
def made(tmp_path: Path, clock: Clock) -> DevelopmentCertificates:
    """Certificates made for the first time."""
    certificates = DevelopmentCertificates(tmp_path / "certificates", clock=clock)
    assert certificates.renew() == NO_TENANT
    return certificates


def leaf(certificates: DevelopmentCertificates, name: str) -> x509.Certificate:
    """A leaf as it is on disk."""
    return x509.load_pem_x509_certificate(certificates.files(name).certificate.read_bytes())


def bundle(certificates: DevelopmentCertificates) -> list[x509.Certificate]:
    """The authorities that are trusted."""
    return x509.load_pem_x509_certificates(certificates.files(CLIENT).authorities.read_bytes())


def test_a_leaf_names_its_service_and_the_client_none(made: DevelopmentCertificates, clock: Clock) -> None:
    """A service's leaf lives a day and names one service, localhost and its address; the client's names no service."""
    for name in SERVICES:
        names = leaf(made, name).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.UniformResourceIdentifier) == [f"{SPIFFE_PREFIX}{name}"]
        assert names.get_values_for_type(x509.DNSName) == ["localhost"]
        assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    shown = leaf(made, CLIENT).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert shown.get_values_for_type(x509.UniformResourceIdentifier) == []
    for name in NO_TENANT:
        assert leaf(made, name).not_valid_after_utc == clock.now + 24 * HOUR
        key = serialization.load_pem_private_key(made.files(name).key.read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        assert key.curve.name == "secp256r1"
    (authority,) = bundle(made)
    assert authority.not_valid_after_utc == clock.now + 7 * 24 * HOUR


def test_every_key_is_its_owners_alone(made: DevelopmentCertificates) -> None:
    """No private key can be read by anybody else, the authority's least of all."""
    keys = list(made.folder.rglob("*.key"))
    assert len(keys) == len(NO_TENANT) + 1
    assert {stat.S_IMODE(path.stat().st_mode) for path in keys} == {0o600}
    assert stat.S_IMODE((made.folder / "authorities").stat().st_mode) == 0o700


def test_made_again_nothing_changes(made: DevelopmentCertificates, clock: Clock) -> None:
    """While there are hours left, no file is touched and nothing is said."""
    before = {path: path.read_bytes() for path in made.folder.rglob("*") if path.is_file()}
    clock.now += 15 * HOUR
    said: list[str] = []
    assert made.renew(said.append) == []
    assert said == []
    assert {path: path.read_bytes() for path in made.folder.rglob("*") if path.is_file()} == before


def test_what_is_near_its_end_is_renewed(made: DevelopmentCertificates, clock: Clock) -> None:
    """With less than eight hours left every leaf is new, under the same authority, and it is said in a sentence."""
    before = {name: leaf(made, name).serial_number for name in NO_TENANT}
    (authority,) = bundle(made)
    clock.now += 17 * HOUR
    said: list[str] = []
    assert made.renew(said.append) == NO_TENANT
    assert len(said) == 1
    assert all(leaf(made, name).serial_number != before[name] for name in NO_TENANT)
    assert all(leaf(made, name).not_valid_after_utc > clock.now + 23 * HOUR for name in NO_TENANT)
    assert bundle(made) == [authority]


def test_a_new_authority_is_trusted_before_it_signs(made: DevelopmentCertificates, clock: Clock) -> None:
    """Near its end an authority is joined by the next: for an hour the old one goes on signing, and all along every leaf is trusted."""
    (first,) = bundle(made)
    seen: set[bytes] = set()
    issuers: list[list[str]] = []
    for _ in range(8 * 24):
        clock.now += HOUR
        known = {certificate.subject.rfc4514_string() for certificate in bundle(made)}
        renewed = made.renew()
        trusted = {certificate.subject.rfc4514_string() for certificate in bundle(made)}
        for name in NO_TENANT:
            assert leaf(made, name).issuer.rfc4514_string() in trusted
            assert leaf(made, name).not_valid_after_utc > clock.now
        # Whoever had not seen the newest bundle yet still trusted everything that was issued.
        assert all(leaf(made, name).issuer.rfc4514_string() in known for name in renewed)
        issuers.append(sorted({leaf(made, name).issuer.rfc4514_string() for name in NO_TENANT}))
        seen |= {certificate.subject.public_bytes() for certificate in bundle(made)}
    assert len(seen) >= 2
    assert first not in bundle(made)
    assert issuers[0] != issuers[-1]


def test_after_a_long_pause_everything_begins_anew(made: DevelopmentCertificates, clock: Clock) -> None:
    """When authority and leaves are over, all are made again, and the old authority is trusted no more."""
    (first,) = bundle(made)
    clock.now += 24 * 30 * HOUR
    assert made.renew() == NO_TENANT
    (second,) = bundle(made)
    assert second != first
    assert len(list((made.folder / "authorities").iterdir())) == 2


@pytest.mark.parametrize("damage", ["cut", "gone", "another's key", "another authority"])
def test_a_damaged_leaf_is_made_again(made: DevelopmentCertificates, tmp_path: Path, clock: Clock, damage: str) -> None:
    """A leaf that is cut, gone, not its key's or not the authority's is replaced, and no other is."""
    files = made.files("metering")
    match damage:
        case "cut":
            files.certificate.write_bytes(files.certificate.read_bytes()[:100])
        case "gone":
            files.key.unlink()
        case "another's key":
            files.key.write_bytes(made.files("tenant").key.read_bytes())
        case _:
            other = DevelopmentCertificates(tmp_path / "other", clock=clock)
            other.renew()
            files.certificate.write_bytes(other.files("metering").certificate.read_bytes())
            files.key.write_bytes(other.files("metering").key.read_bytes())
    assert made.renew() == ["metering"]
    assert made.renew() == []
