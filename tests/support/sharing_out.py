"""How a run in several processes is shared out: which tests stay together, and which begin first.

Each process has stores and meshes of its own, made when the first test there wants them. Tests of a file stay together. So do those of
folders that go through costly states one after the other: each file by itself would go through all of them again.
"""

import pytest
from xdist.scheduler import LoadScopeScheduling

TOGETHER = ("tests/protocol", "tests/isolation", "tests/retrieval")
# What takes longest, in this order, so that at the end no process is busy for long with what it began late.
FIRST = ("tests/isolation", "tests/protocol", "tests/chaos/test_storm.py")


class Schedule(LoadScopeScheduling):
    """Gives each process a file or a folder at a time."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        return next((folder for folder in TOGETHER if path.startswith(f"{folder}/")), path)


def longest_first(items: list[pytest.Item]) -> None:
    """Puts what is known to take long before the rest, each in the order it has."""

    def place(item: pytest.Item) -> int:
        return next((place for place, path in enumerate(FIRST) if item.nodeid.startswith((f"{path}/", f"{path}::"))), len(FIRST))

    items.sort(key=place)
