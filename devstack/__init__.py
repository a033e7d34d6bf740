"""The embedded stack for development and tests: real stores from their wheels, a provider stub, a supervisor. Loopback only."""

import os
import sys

FORK_SUPPORT = "GRPC_ENABLE_FORK_SUPPORT"
# The supervisor forks; gRPC's own fork handlers would wake its threads in the child, which now and then kills it before it starts.
# They can only be switched off before grpc is loaded.
FORKS_SAFELY = "grpc" not in sys.modules or os.environ.get(FORK_SUPPORT) == "0"
os.environ.setdefault(FORK_SUPPORT, "0")
