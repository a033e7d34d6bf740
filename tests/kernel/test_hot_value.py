"""Values that are made by the thousand: equal, hashed and kept as frozen ones are, and frozen to the type checker."""

from dataclasses import replace

import pytest

from services.kernel.hot_value import hot_value


@hot_value
class Size:
    """A value with a part that has a default."""

    width: int
    height: int = 1


@hot_value
class NamedSize(Size):
    """One that says more."""

    name: str = ""


def test_a_hot_value_is_what_a_frozen_one_is_but_for_the_writing() -> None:
    """Equal by its fields and its type, a key of dicts, changed by copies, without room for anything else."""
    assert Size(2) == Size(2, 1) != Size(2, 3)
    assert {Size(2): "found"}[Size(2, 1)] == "found"
    assert replace(Size(2), height=5) == Size(2, 5)
    assert NamedSize(2, 1, "small") != Size(2, 1)
    assert repr(NamedSize(2, name="small")) == "NamedSize(width=2, height=1, name='small')"
    with pytest.raises(AttributeError):
        Size(2).depth = 3  # type: ignore[attr-defined]


def test_the_type_checker_is_told_that_nobody_assigns_its_fields() -> None:
    """What a frozen dataclass forbids at run time is left to the check of types, which reads this."""
    told = hot_value.__dataclass_transform__  # type: ignore[attr-defined]
    assert told["kwargs"] == {"frozen_default": True} or told["frozen_default"] is True
