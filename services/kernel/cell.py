"""Which region this cell serves, and which cell serves the others. A tenant of another region is refused, and told where to go."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from services.kernel.errors import WrongCell
from services.kernel.settings import ServiceSettings


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell's own region, and region → address of the others."""

    region: str
    addresses: Mapping[str, str] = field(default_factory=dict)

    def refuse_elsewhere(self, region: str) -> None:
        """Raises: WrongCell for another region's name; an empty one means here."""
        if region not in ("", self.region):
            raise WrongCell(region, self.addresses.get(region, ""))


def cell_of(settings: ServiceSettings) -> Cell:
    """Returns the cell the settings speak of."""
    return Cell(settings.region, settings.cell_addresses())
