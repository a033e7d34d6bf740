"""What a set of processes costs: CPU time and resident memory, read from the operating system."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import psutil

BYTES_PER_MEGABYTE = 1_000_000


@dataclass(frozen=True, slots=True)
class CpuReading:
    """CPU seconds (user and system) of each process so far."""

    seconds: Mapping[str, float]

    @classmethod
    def of(cls, pids: Mapping[str, int]) -> Self:
        """Reads the processes' counters now."""
        seconds = {}
        for name, pid in pids.items():
            times = psutil.Process(pid).cpu_times()
            seconds[name] = times.user + times.system
        return cls(seconds)

    def since(self, earlier: "CpuReading") -> dict[str, float]:
        """Returns the seconds spent after an earlier reading, by process."""
        return {name: self.seconds[name] - earlier.seconds[name] for name in self.seconds}


def resident_megabytes(pids: Mapping[str, int]) -> dict[str, float]:
    """Returns each process's resident memory."""
    return {name: round(psutil.Process(pid).memory_info().rss / BYTES_PER_MEGABYTE, 1) for name, pid in pids.items()}
