"""The data directory: who may use it, and where its parts are. One process at a time holds it."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def catalog_path(data_dir: Path) -> Path:
    """Return where the names are kept."""
    return data_dir / "catalog.json"


def collections_path(data_dir: Path) -> Path:
    """Return where the shards are kept, one directory a collection."""
    return data_dir / "collections"


@contextmanager
def exclusive_use(data_dir: Path) -> Iterator[None]:
    """Hold the directory, creating it if need be; the hold ends with the process however it ends.

    Raises:
        SystemExit: another process holds it.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    with (data_dir / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"another server uses {data_dir}") from None
        yield
