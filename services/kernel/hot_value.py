"""Values of which every decision makes several: frozen to the type checker, plain slots at run time."""

from dataclasses import dataclass
from typing import TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def hot_value(cls: type[T]) -> type[T]:
    """Makes a dataclass with slots, equality and a hash, whose fields mypy lets nobody assign.

    A frozen dataclass sets each field by `object.__setattr__`, three times as dear as this one: a decision spent more on that than on
    anything else. Whatever is not made by the thousand is a frozen dataclass.
    """
    return dataclass(slots=True, unsafe_hash=True)(cls)
