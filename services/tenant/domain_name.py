"""Hosts and paths as names of tenants. Refuses, as a custom domain, whatever is no full host name of its own.

Names are compared in ASCII alone: Unicode gets its ASCII form once, where an operator registers it, and matches nothing elsewhere.
"""

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass

import idna

from services.kernel.errors import InvalidRequest

MAX_DOMAIN_LENGTH = 253
_PATH = re.compile(r"/t/([^/?#]+)")
_PORT = re.compile(r":[0-9]*$")
# A last label of digits, or written as 0x…, makes a name that browsers read as an address.
_NUMERIC = re.compile(r"(?:[0-9]+|0[xX][0-9a-fA-F]*)")
_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class NameClaim:
    """What a host and a path claim: at most one of a slug by host and a domain, and a slug by path; None where they claim nothing."""

    host_slug: str | None = None
    domain: str | None = None
    path_slug: str | None = None

    @property
    def is_empty(self) -> bool:
        """True when nothing is claimed at all."""
        return self == NameClaim()


def read_claim(host: str, path: str, base_domains: Sequence[str]) -> NameClaim:
    """Returns what is claimed. Under a base domain every prefix is claimed as a slug, also one that no tenant could have."""
    name = _bare(host)
    named = _PATH.match(path)
    path_slug = None if named is None else named[1]
    for base in base_domains:
        if name.endswith(f".{base}"):
            return NameClaim(host_slug=name[: -len(base) - 1], path_slug=path_slug)
    if not name or name in base_domains or not name.isascii():
        return NameClaim(path_slug=path_slug)
    return NameClaim(domain=name, path_slug=path_slug)


def read_domain(text: str, field: str, base_domains: Sequence[str] = ()) -> str:
    """Returns the host name in lower-case ASCII. Raises: InvalidRequest(field)."""
    if "*" in text:
        raise InvalidRequest(field, "must name one host, not a wildcard")
    if _is_address(text):
        raise InvalidRequest(field, "must be a name, not an address")
    if ":" in text:
        raise InvalidRequest(field, "must be a name without a port")
    try:
        name = idna.encode(text.removesuffix("."), uts46=True, std3_rules=True).decode("ascii").lower()
    except UnicodeError:
        raise InvalidRequest(field, "must be a host name: labels of letters, digits and hyphens between dots") from None
    labels = name.split(".")
    if len(labels) < 2 or len(name) > MAX_DOMAIN_LENGTH or not all(_LABEL.fullmatch(label) for label in labels):
        raise InvalidRequest(field, "must be a full host name of at least two labels")
    if _NUMERIC.fullmatch(labels[-1]):
        raise InvalidRequest(field, "must be a name, not an address")
    if any(name == base or name.endswith(f".{base}") for base in base_domains):
        raise InvalidRequest(field, "must not lie under a base domain: those hosts are the tenants' slugs")
    return name


def read_base_domains(texts: Sequence[str]) -> tuple[str, ...]:
    """Returns the base domains in lower-case ASCII. Raises: ValueError for what is none, and where one lies under another."""
    try:
        names = tuple(dict.fromkeys(read_domain(text, "base domain") for text in texts))
    except InvalidRequest as error:
        raise ValueError(error.message) from None
    if any(name.endswith(f".{other}") for name in names for other in names):
        msg = "a base domain must not lie under another: a host would have two meanings"
        raise ValueError(msg)
    return names


def _bare(host: str) -> str:
    # ASCII first: lower() turns the Kelvin sign and others into ASCII letters.
    name = _PORT.sub("", host.strip()).rstrip(".")
    return name.lower() if name.isascii() else name


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text.strip("[]"))
    except ValueError:
        return False
    return True
