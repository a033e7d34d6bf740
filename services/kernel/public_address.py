"""Which network addresses anybody on the internet can have. Refuses those of this machine, of private networks and of links."""

from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

# Source: RFC 6052, 2.1: the last 32 bits are an IPv4 address, which a translator on the way calls.
_TRANSLATED = IPv6Network("64:ff9b::/96")


def is_public(address: str) -> bool:
    """Tells whether a literal address is a global unicast one, and so is the IPv4 address that it may carry. Raises: ValueError."""
    found = ip_address(address)
    carried = [] if isinstance(found, IPv4Address) else _carried(found)
    if carried:
        return all(map(_is_global, carried))
    return _is_global(found)


def _is_global(found: IPv4Address | IPv6Address) -> bool:
    return found.is_global and not found.is_multicast and not found.is_reserved


def _carried(found: IPv6Address) -> list[IPv4Address]:
    # An address that a network unpacks leads to what is packed in it.
    if found in _TRANSLATED:
        return [IPv4Address(int(found) & 0xFFFFFFFF)]
    teredo = found.teredo or ()
    return [each for each in (found.ipv4_mapped, found.sixtofour, *teredo) if each is not None]
