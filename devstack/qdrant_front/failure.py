"""Failures with the gRPC status and the wording a Qdrant node answers them with, and the mapping of the engine's own errors to them."""

import grpc

_BAD_REQUEST_PREFIXES = (
    "Vector dimension error",
    "Not existing vector name error",
    "Payload type does not match",
    "Unable to infer type",
    "Validation failed",
    "Wrong usage of sparse vectors",
    "Wrong usage of multi vectors",
    "No range index for",
    "invalid JSON path",
)


class Failure(Exception):
    """A refusal that reaches the caller as this status code and message."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


def wrong_input(description: str) -> Failure:
    """Say that the request itself is wrong."""
    return Failure(grpc.StatusCode.INVALID_ARGUMENT, f"Wrong input: {description}")


def not_found(description: str) -> Failure:
    """Say that the named thing is absent."""
    return Failure(grpc.StatusCode.NOT_FOUND, f"Not found: {description}")


def no_collection(name: str) -> Failure:
    """Say that neither a collection nor an alias has this name."""
    return not_found(f"Collection `{name}` doesn't exist!")


def already_exists(description: str) -> Failure:
    """Say that the name is taken."""
    return Failure(grpc.StatusCode.ALREADY_EXISTS, f"Wrong input: {description}")


def forbidden(description: str) -> Failure:
    """Say that the caller is known and may not do this."""
    return Failure(grpc.StatusCode.PERMISSION_DENIED, f"Forbidden: {description}")


def unauthenticated(description: str) -> Failure:
    """Say that the caller is not known."""
    return Failure(grpc.StatusCode.UNAUTHENTICATED, description)


def unimplemented(what: str) -> Failure:
    """Name the part of the API this server does not serve."""
    return Failure(grpc.StatusCode.UNIMPLEMENTED, f"{what} is not implemented by this server")


def internal(description: str) -> Failure:
    """Say that the fault is on this side."""
    return Failure(grpc.StatusCode.INTERNAL, f"Service internal error: {description}")


def from_engine(error: Exception) -> Failure:
    """Map an exception of the engine, which types none of them, by the text it prints."""
    text = str(error)
    if text.startswith("No point with id"):
        return not_found(f"{text} found")
    if isinstance(error, (ValueError, TypeError, OverflowError)) or text.startswith(_BAD_REQUEST_PREFIXES):
        return wrong_input(text)
    return internal(text)
