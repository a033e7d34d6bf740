"""`python -m tests.protocol.stage.patient SERVICE`: a service of the mesh that waits for answers as long as a run holds them back.

Nothing but its patience differs: in the model a message may take any time, and no run is to depend on a machine's pace.
"""

import sys
from collections.abc import Callable

from services.inference import overrun, settlement
from services.inference.adapters import metering_client, ratelimit_client
from services.inference.app import build as build_inference
from services.inference.settings import InferenceSettings
from services.kernel.command import main
from services.metering.app import build as build_metering
from services.metering.settings import MeteringSettings
from services.ratelimit import fencing, ready_counters, rebuild
from services.ratelimit.adapters import redis_snapshots
from services.ratelimit.app import build as build_ratelimit
from services.ratelimit.settings import RatelimitSettings

PATIENCE_SECONDS = 600.0
LOOK_SECONDS = 0.05


def _inference() -> None:
    ratelimit_client.RESERVE_SECONDS = ratelimit_client.RELEASE_SECONDS = PATIENCE_SECONDS
    ratelimit_client.EXTEND_SECONDS = metering_client.EXTEND_SECONDS = PATIENCE_SECONDS
    overrun.COUNT_SECONDS = overrun.EXTEND_SECONDS = PATIENCE_SECONDS
    metering_client.OPEN_SECONDS = metering_client.SETTLE_SECONDS = settlement.SETTLE_SECONDS = PATIENCE_SECONDS
    main(InferenceSettings, build_inference)


def _ratelimit() -> None:
    fencing.SWEEP_SECONDS = LOOK_SECONDS
    rebuild.REBUILD_SECONDS = rebuild.SNAPSHOT_SECONDS = ready_counters._DEFAULT_DEADLINE_SECONDS = PATIENCE_SECONDS
    redis_snapshots._NONCE_LIFE_MILLISECONDS = int(PATIENCE_SECONDS * 1000)
    main(RatelimitSettings, build_ratelimit)


def _metering() -> None:
    main(MeteringSettings, build_metering)


_SERVICES: dict[str, Callable[[], None]] = {"inference": _inference, "ratelimit": _ratelimit, "metering": _metering}

if __name__ == "__main__":
    _SERVICES[sys.argv.pop(1)]()
