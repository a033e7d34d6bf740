"""`python -m bench NAME [options]`: runs one measurement."""

import sys
from collections.abc import Callable

from bench import (
    budget_alerts,
    call_overhead,
    holds_ahead,
    kernel_overhead,
    revocation,
    sealing,
    slices,
    tenants,
    usage_query,
    usage_writes,
)
from bench.ingest import run as ingest
from bench.limits import run as limits

BENCHES: dict[str, Callable[[list[str]], None]] = {
    "budget_alerts": budget_alerts.main,
    "call_overhead": call_overhead.main,
    "holds_ahead": holds_ahead.main,
    "ingest": ingest.main,
    "kernel_overhead": kernel_overhead.main,
    "limits": limits.main,
    "revocation": revocation.main,
    "tenants": tenants.main,
    "sealing": sealing.main,
    "slices": slices.main,
    "usage_query": usage_query.main,
    "usage_writes": usage_writes.main,
}


def main() -> int:
    """Runs the named bench with the options that follow its name."""
    if len(sys.argv) < 2 or sys.argv[1] not in BENCHES:
        print(f"usage: python -m bench {{{','.join(BENCHES)}}} [options]", file=sys.stderr)
        return 2
    BENCHES[sys.argv[1]](sys.argv[2:])
    return 0


if __name__ == "__main__":
    sys.exit(main())
