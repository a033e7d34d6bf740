"""A call ends once."""

from pathlib import Path

from devstack.provider_stub.billed_call import BilledCall, CallIdentity
from devstack.provider_stub.cache import InputUsage
from devstack.provider_stub.ledger import Ledger, fold


async def test_only_the_first_ending_is_recorded(tmp_path: Path) -> None:
    """A client that leaves after the call was completed does not turn it into a cancelled one."""
    ledger = Ledger(tmp_path / "ledger.jsonl")
    call = BilledCall(ledger, CallIdentity("req_1", "call", "hash", "model"), InputUsage(12, 3, 4, 5))
    call.start()
    call.generated_tokens = 7
    call.end("complete")
    call.generated_tokens = 8
    call.end("cancelled")
    await ledger.close()
    (line,) = fold(ledger.path)
    assert (line["outcome"], line["input_tokens"], line["output_tokens"], line["cache_read"]) == ("complete", 12, 7, 5)
    assert (line["cache_creation_5m"], line["cache_creation_1h"]) == (3, 4)
