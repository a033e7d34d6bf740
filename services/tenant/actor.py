"""Who makes a change, as the audit log names them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Actor:
    """A subject such as `key:<key id>` or `operator:<key id>`, why it acts (operators only) and from where."""

    subject: str
    reason: str
    peer_address: str
