"""Measurements. `python -m bench NAME` prints one JSON object as its last line; speed is measured here and never asserted in a test."""

# First, because it says before grpc is loaded that children will be started.
import devstack  # noqa: F401
