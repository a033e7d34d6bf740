"""The embedded stack for development and tests: real stores from their wheels, a provider stub, a supervisor. Loopback only."""
