"""CPU that sealing and opening one value costs, in microseconds, by size: what a turn or a chunk of an encrypting tenant adds to a call."""

import json
import secrets
import time

from services.kernel.ids import TenantId, new_uuid7
from services.kernel.sealing import TenantKeys, row_identity

SIZES = (200, 2_048, 20_000, 200_000)
ROUNDS = 10
SECONDS_A_ROUND = 0.05


def measure() -> dict[str, float]:
    """Returns microseconds by operation and size, the best of several rounds."""
    keys = TenantKeys.of(TenantId(new_uuid7()), {1: secrets.token_bytes(32)}, 1)
    identity = row_identity("inference.turns", "text", secrets.token_hex(32), secrets.token_bytes(16), "1")
    figures: dict[str, float] = {}
    for size in SIZES:
        plaintext = secrets.token_bytes(size)
        sealed = keys.seal(plaintext, identity)
        figures[f"seal_{size}_bytes_us"] = min(_seal(keys, plaintext, identity) for _ in range(ROUNDS))
        figures[f"open_{size}_bytes_us"] = min(_open(keys, sealed, identity) for _ in range(ROUNDS))
    return figures


def _seal(keys: TenantKeys, plaintext: bytes, identity: bytes) -> float:
    count, begin = 0, time.process_time()
    while (spent := time.process_time() - begin) < SECONDS_A_ROUND:
        for _ in range(20):
            keys.seal(plaintext, identity)
        count += 20
    return round(spent / count * 1e6, 2)


def _open(keys: TenantKeys, sealed: bytes, identity: bytes) -> float:
    count, begin = 0, time.process_time()
    while (spent := time.process_time() - begin) < SECONDS_A_ROUND:
        for _ in range(20):
            keys.open(sealed, identity)
        count += 20
    return round(spent / count * 1e6, 2)


def main(arguments: list[str]) -> None:
    """Prints the figures as one JSON object."""
    print(json.dumps(measure()))
