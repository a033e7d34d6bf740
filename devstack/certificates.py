"""`make certs`: one certificate for each service and one for clients, made or renewed when its end is near. Safe to repeat.

A leaf lives a day. A service's names it in a URI; the client's names no service, so that it may knock and needs a credential.
"""

import datetime
import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from devstack.authorities import CLOCKS_DIFFER, PEM, SUCCESSION, Authority, keep, read_authorities, signing, write, write_key
from devstack.managed_process import ProcessFailedError
from devstack.ports import LOOPBACK
from devstack.state import SERVICES
from services.kernel.rpc.identity import SPIFFE_PREFIX

CLIENT = "client"
LEAF_LIFETIME = datetime.timedelta(hours=24)
RENEWED_BEFORE_END = datetime.timedelta(hours=8)

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class LeafFiles:
    """Where one leaf, its key and the bundle of authorities are."""

    certificate: Path
    key: Path
    authorities: Path


class DevelopmentCertificates:
    """The folder of certificates of one stack."""

    def __init__(self, folder: Path, *, clock: Callable[[], datetime.datetime] = lambda: datetime.datetime.now(datetime.UTC)) -> None:
        """`folder` is made when it is missing; the stack's is `.tenantry/certificates`."""
        self.folder = folder
        self._clock = clock

    def files(self, name: str) -> LeafFiles:
        """Returns the paths of a service's leaf, or the client's."""
        return LeafFiles(self.folder / f"{name}.pem", self.folder / f"{name}.key", self.folder / "ca.pem")

    def renew(self, tell: Tell = lambda _: None) -> list[str]:
        """Makes what is missing, renews what is near its end and returns the names of the leaves that are new.

        Raises: ProcessFailedError when the folder cannot be used.
        """
        try:
            return self._renew(tell)
        except OSError as error:
            raise ProcessFailedError(f"{self.folder} cannot be used: {error.strerror}. Run this where you may write.") from None

    def _renew(self, tell: Tell) -> list[str]:
        now = self._clock()
        (self.folder / "authorities").mkdir(parents=True, exist_ok=True, mode=0o700)
        authorities = self._authorities(now, tell)
        due = [name for name in (*SERVICES, CLIENT) if not self._is_good(name, authorities, now)]
        for name in due:
            self._issue(name, signing(authorities, now), now)
        if due:
            tell(f"made certificates for {', '.join(due)}, valid until {_stamp(now + LEAF_LIFETIME)}")
        return due

    def _authorities(self, now: datetime.datetime, tell: Tell) -> list[Authority]:
        kept = read_authorities(self.folder / "authorities", now)
        if not kept or kept[-1].ends - now < SUCCESSION:
            kept.append(Authority.make(now))
            keep(kept[-1], self.folder / "authorities")
            tell(f"made a certificate authority, valid until {_stamp(kept[-1].ends)}")
        bundle, path = b"".join(authority.pem for authority in kept), self.folder / "ca.pem"
        if not path.exists() or path.read_bytes() != bundle:
            write(path, bundle, mode=0o644)
        return kept

    def _is_good(self, name: str, authorities: list[Authority], now: datetime.datetime) -> bool:
        files = self.files(name)
        try:
            leaf = x509.load_pem_x509_certificate(files.certificate.read_bytes())
            key = serialization.load_pem_private_key(files.key.read_bytes(), None)
        except (ValueError, TypeError, FileNotFoundError):
            return False
        return (
            leaf.not_valid_after_utc - now > RENEWED_BEFORE_END
            and leaf.not_valid_before_utc <= now
            and leaf.public_key() == key.public_key()
            and leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value == _names(name)
            and any(_is_signed_by(leaf, authority) for authority in authorities)
        )

    def _issue(self, name: str, authority: Authority, now: datetime.datetime) -> None:
        key, files = ec.generate_private_key(ec.SECP256R1()), self.files(name)
        uses = [ExtendedKeyUsageOID.CLIENT_AUTH, *([ExtendedKeyUsageOID.SERVER_AUTH] if name != CLIENT else [])]
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
            .issuer_name(authority.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - CLOCKS_DIFFER)
            .not_valid_after(min(now + LEAF_LIFETIME, authority.ends))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_names(name), critical=False)
            .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False)
        )
        # The key first: whoever looks between the two finds a pair that does not fit, and keeps what it has.
        write_key(files.key, key)
        write(files.certificate, builder.sign(authority.key, hashes.SHA256()).public_bytes(PEM), mode=0o644)


def _names(name: str) -> x509.SubjectAlternativeName:
    if name == CLIENT:
        return x509.SubjectAlternativeName([x509.DNSName(f"{CLIENT}.tenantry.invalid")])
    uri = x509.UniformResourceIdentifier(f"{SPIFFE_PREFIX}{name}")
    return x509.SubjectAlternativeName([uri, x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address(LOOPBACK))])


def _is_signed_by(leaf: x509.Certificate, authority: Authority) -> bool:
    try:
        leaf.verify_directly_issued_by(authority.certificate)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _stamp(moment: datetime.datetime) -> str:
    return moment.strftime("%Y-%m-%d %H:%M UTC")
