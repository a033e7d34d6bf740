"""The embedded stack for development and tests: real stores from their wheels, a provider stub, a supervisor. Loopback only."""

import os

# The supervisor starts children; gRPC's fork handlers would only print that they were skipped. Must be set before grpc is imported.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
