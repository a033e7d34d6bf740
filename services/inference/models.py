"""The model catalogue: which provider serves a model and how much it reads and writes at most. Prices live in the ledger's price book."""

from dataclasses import dataclass

PROVIDER = "anthropic"


@dataclass(frozen=True, slots=True)
class Model:
    """One model; both token limits are inclusive."""

    name: str
    context_tokens: int = 200_000
    max_output_tokens: int = 64_000


# Source: the provider's model page; a model that is priced but not listed here gets the usual limits.
_KNOWN = (
    Model("claude-sonnet-4-6"),
    Model("claude-opus-4-6", max_output_tokens=128_000),
    Model("claude-haiku-4-5-20251001"),
    Model("claude-haiku-4-5"),
)
CATALOGUE = {model.name: model for model in _KNOWN}


def is_known(name: str) -> bool:
    """Tells whether the catalogue lists the model."""
    return name in CATALOGUE


def describe(name: str) -> Model:
    """Returns the model's limits; the usual ones for a model that only the price book knows."""
    return CATALOGUE.get(name) or Model(name)
