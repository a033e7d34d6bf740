"""The certificate authorities of the embedded stack: each lives a week, is trusted before it signs, and its key is its owner's alone."""

import datetime
import os
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

LIFETIME = datetime.timedelta(days=7)
# A leaf lives a day: an authority that has less than this left is joined by its successor.
SUCCESSION = datetime.timedelta(days=3)
# What runs learns of a new authority from the bundle before anything signed by it shows up.
TRUSTED_BEFORE_SIGNING = datetime.timedelta(hours=1)
CLOCKS_DIFFER = datetime.timedelta(minutes=5)
PEM = serialization.Encoding.PEM


@dataclass(frozen=True, slots=True)
class Authority:
    """One authority: its certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def make(cls, now: datetime.datetime) -> "Authority":
        """Makes a new one."""
        key = ec.generate_private_key(ec.SECP256R1())
        serial = x509.random_serial_number()
        # Two authorities of one name would be tried for each other's leaves.
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"tenantry development {serial:x}"[:64])])
        usage = x509.KeyUsage(
            digital_signature=False,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            key_cert_sign=True,
            crl_sign=True,
            encipher_only=False,
            decipher_only=False,
        )
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(serial)
            .not_valid_before(now - CLOCKS_DIFFER)
            .not_valid_after(now + LIFETIME)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )
        return cls(builder.sign(key, hashes.SHA256()), key)

    @property
    def pem(self) -> bytes:
        """The certificate as text."""
        return self.certificate.public_bytes(PEM)

    @property
    def ends(self) -> datetime.datetime:
        """When it stops being one."""
        return self.certificate.not_valid_after_utc

    def signs_since(self) -> datetime.datetime:
        """When it has been in the bundle for long enough to sign beside another."""
        return self.certificate.not_valid_before_utc + CLOCKS_DIFFER + TRUSTED_BEFORE_SIGNING


def read_authorities(folder: Path, now: datetime.datetime) -> list[Authority]:
    """Returns the authorities that are valid now, oldest first; what is damaged or over is removed."""
    found: list[Authority] = []
    for path in sorted(folder.glob("*.pem")):
        authority = _read(path)
        if authority is not None and authority.ends > now:
            found.append(authority)
        else:
            path.unlink(missing_ok=True)
            path.with_suffix(".key").unlink(missing_ok=True)
    return sorted(found, key=lambda authority: authority.certificate.not_valid_before_utc)


def _read(path: Path) -> Authority | None:
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        key = serialization.load_pem_private_key(path.with_suffix(".key").read_bytes(), None)
    except (ValueError, TypeError, FileNotFoundError):
        return None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or certificate.public_key() != key.public_key():
        return None
    return Authority(certificate, key)


def keep(authority: Authority, folder: Path) -> None:
    """Writes an authority, its key first."""
    name = f"{authority.certificate.serial_number:x}"
    write_key(folder / f"{name}.key", authority.key)
    write(folder / f"{name}.pem", authority.pem, mode=0o644)


def signing(authorities: list[Authority], now: datetime.datetime) -> Authority:
    """Returns the youngest authority that everybody knows by now; the oldest there is when none has been known for long."""
    ready = [authority for authority in authorities if authority.signs_since() <= now]
    return ready[-1] if ready else authorities[0]


def write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    """Writes a private key that only its owner can read."""
    write(path, key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()), mode=0o600)


def write(path: Path, content: bytes, *, mode: int) -> None:
    """Replaces a file at once: readers see the old one or the new one, whole."""
    draft = path.with_name(path.name + ".draft")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_CREAT | os.O_WRONLY | os.O_EXCL, mode), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
