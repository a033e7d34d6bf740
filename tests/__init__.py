"""The tests. Real stores, real processes, real attackers."""

# First of all, because it says before grpc is loaded that children will be started.
import devstack  # noqa: F401
