"""The certificate files of one process, read again when they change. Keeps what it has rather than take a pair that does not fit.

Looking costs three `stat` calls, and one look serves a whole second; nothing is read unless a file is another than before.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from services.kernel.settings import ServiceSettings

log = structlog.get_logger(__name__)

LOOK_EVERY_SECONDS = 1.0

# Per file: modification time, size and inode; a file that is missing has none.
Stamp = tuple[tuple[int, int, int] | None, ...]


class CertificatesUnusable(Exception):
    """Files that are missing, cut short or do not belong together; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Certificates:
    """A certificate chain with its own key, and the authorities that peers must be signed by; PEM."""

    chain: bytes
    key: bytes
    authorities: bytes


class CertificateFiles:
    """Three files, and what was last found in them that can be used."""

    def __init__(
        self,
        certificate: Path,
        key: Path,
        authorities: Path,
        *,
        look_every_seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Reads the files. Raises: CertificatesUnusable when there is nothing to begin with."""
        self._paths = (certificate, key, authorities)
        self._look_every_seconds = LOOK_EVERY_SECONDS if look_every_seconds is None else look_every_seconds
        self._clock = clock
        self._stamp = self._look()
        self._looked_at = clock()
        # A server is asked by grpc's own threads.
        self._lock = threading.Lock()
        self._current = self._read()

    @classmethod
    def of(cls, settings: ServiceSettings) -> "CertificateFiles":
        """The files that the settings name."""
        return cls(Path(settings.tls_cert_file), Path(settings.tls_key_file), Path(settings.tls_ca_file))

    def current(self) -> Certificates:
        """Returns the newest set that can be used. Files that cannot are told of once, and the set before them stays in use."""
        with self._lock:
            now = self._clock()
            if now - self._looked_at >= self._look_every_seconds:
                self._looked_at = now
                stamp = self._look()
                if stamp != self._stamp:
                    self._take(stamp)
            return self._current

    def _take(self, stamp: Stamp) -> None:
        try:
            found = self._read()
        except CertificatesUnusable as problem:
            log.warning("certificates_kept", problem=str(problem))
        else:
            if found != self._current:
                self._current = found
                log.info("certificates_loaded", serial=leaf_of(found).serial_number, ends=leaf_of(found).not_valid_after_utc.isoformat())
        # The stamp from before reading: what is written meanwhile is another one, and is read at the next look.
        self._stamp = stamp

    def _look(self) -> Stamp:
        return tuple(_stamp(path) for path in self._paths)

    def _read(self) -> Certificates:
        try:
            chain, key, authorities = (path.read_bytes() for path in self._paths)
        except OSError as error:
            raise CertificatesUnusable(f"{error.filename}: {error.strerror}") from error
        found = Certificates(chain, key, authorities)
        refuse_misfits(found, names=tuple(path.name for path in self._paths))
        return found


def leaf_of(certificates: Certificates) -> x509.Certificate:
    """Returns the process's own certificate, the first of its chain."""
    return x509.load_pem_x509_certificates(certificates.chain)[0]


def refuse_misfits(certificates: Certificates, *, names: tuple[str, ...]) -> None:
    """Raises CertificatesUnusable unless all three parse and the key is the certificate's own."""
    readers: tuple[tuple[str, Callable[[], object]], ...] = (
        (names[0], lambda: x509.load_pem_x509_certificates(certificates.chain)),
        (names[1], lambda: serialization.load_pem_private_key(certificates.key, None)),
        (names[2], lambda: x509.load_pem_x509_certificates(certificates.authorities)),
    )
    for (name, read), text in zip(readers, (certificates.chain, certificates.key, certificates.authorities), strict=True):
        try:
            read()
        except (ValueError, TypeError) as error:
            raise CertificatesUnusable(f"{name} is not whole") from error
        # A bundle that is cut in its second certificate parses as the first alone.
        if text.count(b"-----BEGIN ") != text.count(b"-----END "):
            raise CertificatesUnusable(f"{name} is not whole")
    own = serialization.load_pem_private_key(certificates.key, None).public_key()
    spki = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    if own.public_bytes(*spki) != leaf_of(certificates).public_key().public_bytes(*spki):
        raise CertificatesUnusable(f"{names[1]} is not the key of {names[0]}")


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
