"""The API's refusals: one exception that carries a status and an error type, and the one body shape every refusal has."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import orjson

TYPE_BY_STATUS: Mapping[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    529: "overloaded_error",
}
MESSAGE_BY_STATUS: Mapping[int, str] = {
    400: "The request was refused.",
    401: "invalid x-api-key",
    403: "Your API key does not have permission to use the specified resource.",
    404: "Not found",
    405: "Method Not Allowed",
    413: "Request exceeds the maximum size",
    429: "This request would exceed your account's rate limit. Please try again later.",
    500: "Internal server error",
    529: "Overloaded",
}


@dataclass(slots=True)
class ApiError(Exception):
    """A refusal before any token was generated; nothing is billed for it."""

    status: int
    message: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)


def invalid(message: str) -> ApiError:
    """Return the refusal of a request that breaks the contract (400)."""
    return ApiError(400, message)


def error_body(status: int, message: str, request_id: str) -> bytes:
    """Return the JSON body of an error; an empty message takes the usual one of the status."""
    error = {"type": TYPE_BY_STATUS[status], "message": message or MESSAGE_BY_STATUS[status]}
    return orjson.dumps({"type": "error", "error": error, "request_id": request_id})
