"""Decisions of the limits: through the service, beside what they cannot be cheaper than and beside others that limit rates."""
