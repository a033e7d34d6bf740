"""Text from callers that will be stored and shown. Refuses control characters, which no store or log takes well."""

import unicodedata

from services.kernel.errors import InvalidRequest

_REFUSED_CATEGORIES = frozenset(("Cc", "Cs", "Zl", "Zp"))


def printable(value: str, field: str) -> str:
    """Returns the text unchanged. Raises: InvalidRequest(field) when it holds a control character or a line break."""
    if any(unicodedata.category(character) in _REFUSED_CATEGORIES for character in value):
        raise InvalidRequest(field, "must not hold control characters or line breaks")
    return value
