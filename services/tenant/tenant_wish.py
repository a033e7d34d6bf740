"""What tenant is asked for, as it is stored with the request. Refuses to hold the secrets of its place unsealed."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from services.kernel.placement import PlacementKind
from services.tenant.placement import PlacementWish

SEALED_STORES = "sealed_stores"


@dataclass(frozen=True, slots=True)
class TenantWish:
    """What tenant to make."""

    slug: str
    display_name: str
    plan: str
    owner_email: str
    assistant_name: str
    placement: PlacementWish = field(default_factory=PlacementWish)

    def digest(self) -> bytes:
        """Returns the SHA-256 of the content: a repeated request must have the same."""
        content = asdict(self)
        if self.placement == PlacementWish():
            # A wish that says nothing of its place has the digest it had before places could be chosen.
            del content["placement"]
        else:
            content["placement"]["silo"] = self.placement.silo.named()
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).digest()

    def content(self, sealed_stores: str) -> dict[str, str]:
        """Returns what is stored with the request, its secrets sealed; `read_wish` is the way back."""
        named = {name: value for name, value in asdict(self).items() if name != "placement"}
        return named | {"placement": self.placement.kind.value, SEALED_STORES: sealed_stores}


def read_wish(content: Mapping[str, str]) -> TenantWish:
    """Reads a stored wish, without the secrets of its place."""
    named = {name: value for name, value in content.items() if name not in ("placement", SEALED_STORES)}
    return TenantWish(**named, placement=PlacementWish(PlacementKind(content.get("placement", PlacementKind.POOL))))
