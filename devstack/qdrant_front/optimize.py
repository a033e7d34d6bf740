"""`python -m devstack.qdrant_front.optimize`: builds the HNSW indexes and reclaims deleted points, while no server runs on the directory.

Not done while serving: the engine would hold Python's interpreter lock, and so every caller, for as long as the index takes to build.
Until it is run, `hnsw_config` and `optimizers_config` are kept and searches are exact scans.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qdrant_edge import EdgeShard

from .catalog import Catalog
from .data_dir import catalog_path, collections_path, exclusive_use


@dataclass(frozen=True, slots=True)
class Optimized:
    """What a collection looks like afterwards."""

    name: str
    changed: bool
    point_count: int
    indexed_vector_count: int


def optimize_all(data_dir: Path) -> Iterator[Optimized]:
    """Optimize the collections in order of name, one open at a time."""
    with exclusive_use(data_dir):
        for name in sorted(Catalog.load(catalog_path(data_dir)).names.collections):
            shard = EdgeShard.load(str(collections_path(data_dir) / name))
            try:
                changed = shard.optimize()
                shard.flush()
                info = shard.info()
            finally:
                shard.close()
            yield Optimized(name, changed, info.points_count, info.indexed_vectors_count)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m devstack.qdrant_front.optimize", description="Build the indexes of a stopped server.")
    parser.add_argument("--data-dir", type=Path, required=True, help="where collections live")
    for done in optimize_all(parser.parse_args().data_dir):
        print(f"{done.name} changed={done.changed} points={done.point_count} indexed_vectors={done.indexed_vector_count}")
