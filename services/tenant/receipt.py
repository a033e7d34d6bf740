"""Erasure receipts: what was found and removed where, signed so that nobody alters it later. Refuses a body that is not the signed one."""

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from services.kernel.context_token import SigningKey

# The key signs context tokens too: with this before the body, neither can ever pass for the other.
DOMAIN = b"tenantry.erasure-receipt.v1\n"


@dataclass(frozen=True, slots=True)
class ErasureReceipt:
    """A signed statement; `body` is the very text that was signed."""

    body: str
    signature: bytes
    key_id: str

    @property
    def verified(self) -> bool:
        """True when the scan at the end found nothing that should not be there."""
        return bool(json.loads(self.body)["verification"]["verified"])


class ReceiptRefused(Exception):
    """The receipt is not what the key signed, or is no receipt; the message says which."""


def sign_receipt(statement: Mapping[str, object], key: SigningKey) -> ErasureReceipt:
    """Signs the statement, naming the key in it."""
    body = json.dumps({**statement, "key_id": key.key_id}, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return ErasureReceipt(body, key.private_key.sign(DOMAIN + body.encode()), key.key_id)


def verify_receipt(receipt: ErasureReceipt, public_key: Ed25519PublicKey) -> Mapping[str, object]:
    """Returns what the receipt states. Raises: ReceiptRefused."""
    try:
        public_key.verify(receipt.signature, DOMAIN + receipt.body.encode())
    except InvalidSignature:
        raise ReceiptRefused("the signature is not of this body and key") from None
    statement: Mapping[str, object] = json.loads(receipt.body)
    if statement.get("key_id") != receipt.key_id:
        raise ReceiptRefused("the body names another key")
    return statement


def read_receipt(text: str) -> ErasureReceipt:
    """Reads a receipt from the JSON that grpcurl prints of an ErasureReceipt, or of an answer that holds one. Raises: ReceiptRefused."""
    try:
        fields = json.loads(text)
        fields = fields.get("receipt", fields)
        body, signature, key_id = (fields.get(camel) or fields[snake] for camel, snake in _FIELDS)
        return ErasureReceipt(str(body), base64.b64decode(signature, validate=True), str(key_id))
    except (ValueError, KeyError, AttributeError, TypeError, binascii.Error):
        raise ReceiptRefused("this is no receipt: expected JSON with bodyJson, signature and keyId") from None


_FIELDS = (("bodyJson", "body_json"), ("signature", "signature"), ("keyId", "key_id"))


def check_file(arguments: Sequence[str]) -> int:
    """`verify-receipt FILE PUBLIC_KEY`: prints what holds and returns the exit code: 0 verified, 1 not."""
    if len(arguments) != 2:
        print("usage: python -m services.tenant verify-receipt FILE PUBLIC_KEY_BASE64")  # noqa: T201 - for people
        return 2
    try:
        public_key = Ed25519PublicKey.from_public_bytes(base64.b64decode(arguments[1], validate=True))
        statement = verify_receipt(read_receipt(Path(arguments[0]).read_text()), public_key)
    except (ReceiptRefused, OSError, ValueError) as error:
        print(f"refused: {error}")  # noqa: T201 - for people
        return 1
    print(f"the receipt holds: tenant {statement['tenant_id']}, erased {statement['end_time']}")  # noqa: T201 - for people
    return 0
