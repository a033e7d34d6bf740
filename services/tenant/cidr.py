"""Networks a key may be used from. Refuses any spelling but the strict one: an address with no bits beyond its prefix, and the prefix."""

import ipaddress
import re
from collections.abc import Sequence
from functools import lru_cache

from services.kernel.errors import InvalidRequest

MAX_CIDRS = 20
# The prefix in digits alone: ip_network also takes a netmask, which reads as something else to most people.
_STRICT = re.compile(r"[0-9A-Fa-f.:]+/[0-9]{1,3}")
_MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def read_cidrs(texts: Sequence[str], field: str) -> tuple[str, ...]:
    """Returns the networks in their usual spelling, each once. Raises: InvalidRequest naming the item, such as `allowed_cidrs[3]`."""
    if len(texts) > MAX_CIDRS:
        raise InvalidRequest(field, f"must have at most {MAX_CIDRS} networks")
    return tuple(dict.fromkeys(str(_read(text, f"{field}[{position}]")) for position, text in enumerate(texts)))


def is_within(peer_address: str, cidrs: tuple[str, ...]) -> bool:
    """Tells whether the address lies in one of the networks; an address that is none, such as an unknown one, lies in no network."""
    try:
        address = ipaddress.ip_address(peer_address)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or address
    return any(address in network for network in _networks(cidrs))


@lru_cache(maxsize=4096)
def _networks(cidrs: tuple[str, ...]) -> tuple[Network, ...]:
    return tuple(ipaddress.ip_network(cidr) for cidr in cidrs)


def _read(text: str, field: str) -> Network:
    try:
        network = ipaddress.ip_network(text) if _STRICT.fullmatch(text) else None
    except ValueError:
        network = None
    if network is None:
        raise InvalidRequest(field, "must be a network such as 192.0.2.0/24 or 2001:db8::/48, with no bits set beyond the prefix")
    if isinstance(network, ipaddress.IPv6Network) and network.subnet_of(_MAPPED):
        # Addresses are compared as IPv4, so their networks must be.
        mapped = network.network_address.ipv4_mapped
        return ipaddress.ip_network(f"{mapped}/{network.prefixlen - _MAPPED.prefixlen}")
    return network
