"""The allow-list of request fields: whatever is set and not on it is refused by name, so that nothing asked for is silently dropped."""

from google.protobuf.message import Message

from .failure import unimplemented

# One node holds the only replica, so every ordering and every consistency level asked for is what it already does.
ALWAYS_TRUE_HERE = ("ordering", "read_consistency")


def accept_only(message: Message, *served: str) -> None:
    """Refuse the message when it sets a field outside those served.

    Raises:
        Failure: UNIMPLEMENTED, naming `Message.field`.
    """
    for field, _ in message.ListFields():
        if field.name not in served:
            raise unimplemented(f"{message.DESCRIPTOR.name}.{field.name}")


def accept_call(request: Message, *served: str) -> None:
    """Do the same for a whole request, whose collection name, timeout and replica options are always served."""
    accept_only(request, "collection_name", "timeout", *ALWAYS_TRUE_HERE, *served)
