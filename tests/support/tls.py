"""Looking at a TLS port from outside: which certificate a new connection is shown."""

import asyncio
import socket
import ssl
from pathlib import Path

from cryptography import x509


async def served_serial(port: int, *, authorities: Path, certificate: Path, key: Path) -> int:
    """The serial of the certificate that a loopback port shows to a client with this one."""
    return await asyncio.to_thread(_served_serial, port, authorities, certificate, key)


def serial_in(path: Path) -> int:
    """The serial of a certificate as it is on disk."""
    return x509.load_pem_x509_certificate(path.read_bytes()).serial_number


def _served_serial(port: int, authorities: Path, certificate: Path, key: Path) -> int:
    trust = ssl.create_default_context(cafile=str(authorities))
    # Certificates of tests carry no key identifiers.
    trust.verify_flags &= ~ssl.VERIFY_X509_STRICT
    trust.load_cert_chain(certificate, key)
    trust.set_alpn_protocols(["h2"])
    with socket.create_connection(("localhost", port), timeout=10) as plain, trust.wrap_socket(plain, server_hostname="localhost") as tls:
        return x509.load_der_x509_certificate(tls.getpeercert(binary_form=True) or b"").serial_number
