"""Another process of a service beside the one that a stack runs, on a port of its own. Who starts it stops it."""

import sys

from devstack.environment import service_environment
from devstack.managed_process import ManagedProcess
from devstack.ports import LOOPBACK, free_port
from devstack.stack import HEALTH_SERVICE_NAMES, SERVICE_READY_SECONDS, Stack, is_serving_at


async def start_replica(
    stack: Stack, service: str, name: str, *, trace_sample_ratio: float = 0.0, **extra_environment: str
) -> tuple[ManagedProcess, str]:
    """Starts it and returns it with its address once it serves; its log is named after it. Raises: ProcessFailedError."""
    address = f"{LOOPBACK}:{free_port()}"
    environment = service_environment(
        service, stack.state, stack.ports, stack.provider, trace_sample_ratio=trace_sample_ratio, wiring=stack.wiring
    )
    process = ManagedProcess(
        name,
        [sys.executable, "-m", f"services.{service}", "serve"],
        log_path=stack.state.log_path(name),
        env=environment | {"TENANTRY_LISTEN_ADDRESS": address} | extra_environment,
    )
    await process.start()
    await process.wait_ready(lambda: is_serving_at(address, HEALTH_SERVICE_NAMES[service]), timeout_seconds=SERVICE_READY_SECONDS)
    return process, address
