"""Runs a whole mesh, kills a part of it every 1-3 s while callers use it, and compares every ledger afterwards.

python -m tests.chaos [--duration SECONDS] [--seed NUMBER] [--settle SECONDS] [--state FOLDER]
The first line is the seed, from which everything random follows; the last is one JSON object. Exits 1 with what differs.
"""

import argparse
import asyncio
import json
import secrets
import sys
from pathlib import Path

from tests.chaos.storm import Storm, run


def main() -> int:
    """Returns 0 when everything agrees."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--duration", type=float, default=60.0, help="how long processes die, in seconds")
    parser.add_argument("--seed", type=int, default=None, help="from which everything random follows; default: a new one")
    parser.add_argument("--settle", type=float, default=10.0, help="within how many seconds of the last restart all must agree")
    parser.add_argument("--state", type=Path, default=None, help="keeps the stores and logs in this folder; default: removes them")
    chosen = parser.parse_args()
    seed = secrets.randbelow(1 << 32) if chosen.seed is None else chosen.seed
    _say(f"seed {seed}")
    told = asyncio.run(run(Storm(seed, chosen.duration, chosen.settle), chosen.state))
    for difference in told["differences"]:
        _say(difference)
    if told["differences"]:
        _say(f"the books differ; the same again: make chaos DURATION={chosen.duration:g} SEED={seed}")
    _say(json.dumps(told))
    return 1 if told["differences"] else 0


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
