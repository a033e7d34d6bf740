"""Erasure receipts: what was found and removed where, signed so that nobody alters it later. Refuses a body that is not the signed one."""

import base64
import binascii
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from services.kernel.context_token import SigningKey
from services.kernel.tenant_scan import ScannedStore

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


def what_is_left(receipt: ErasureReceipt) -> list[str]:
    """Returns what the scan at the end found where it should not be, such as `3 records in postgres:inference.turns`; empty: nothing.

    Only the signed body is asked: whoever hands on a receipt may have changed everything beside it. Raises: ReceiptRefused.
    """
    try:
        verification = json.loads(receipt.body)["verification"]
        left = [words for item in verification["stores"] for words in _left_in(ScannedStore(**item))]
        return left if left or verification["verified"] is True else ["something that the statement does not name"]
    except (KeyError, TypeError):
        raise ReceiptRefused("the body does not say what was looked for") from None


def _left_in(store: ScannedStore) -> Iterator[str]:
    if store.found and not store.kept:
        yield f"{store.found} {'record' if store.found == 1 else 'records'} in {store.store}"
    if store.canaries:
        yield f"{store.canaries} {'record' if store.canaries == 1 else 'records'} with a canary in {store.store}"


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
    """`verify-receipt FILE PUBLIC_KEY`: prints what holds and returns the exit code.

    0: the receipt is genuine and says that nothing is left. 1: it is not genuine, or it says that something is left. 2: asked wrongly.
    """
    if len(arguments) != 2:
        print("usage: python -m services.tenant verify-receipt FILE PUBLIC_KEY_BASE64")  # noqa: T201 - for people
        return 2
    try:
        public_key = Ed25519PublicKey.from_public_bytes(base64.b64decode(arguments[1], validate=True))
        receipt = read_receipt(Path(arguments[0]).read_text())
        statement = verify_receipt(receipt, public_key)
        left = what_is_left(receipt)
    except (ReceiptRefused, OSError, ValueError) as error:
        print(f"refused: {error}")  # noqa: T201 - for people
        return 1
    erased = f"tenant {statement['tenant_id']}, erased {statement['end_time']}"
    if left:
        print(f"the receipt is genuine and says that not everything is gone: {erased}; left: {', '.join(left)}")  # noqa: T201 - for people
        return 1
    print(f"the receipt holds: {erased}")  # noqa: T201 - for people
    return 0
