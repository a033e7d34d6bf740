"""python -m devstack.provider_stub: the provider on a loopback port until SIGTERM or SIGINT.

Refuses to start without an API key to ask for.
"""

import argparse
import asyncio
import os
import signal
import sys
from pathlib import Path

import uvloop

from devstack.provider_stub.cache import PromptCache
from devstack.provider_stub.ledger import Ledger
from devstack.provider_stub.models import KNOWN, catalogue
from devstack.provider_stub.server import ProviderStub


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m devstack.provider_stub", description="The Anthropic Messages API on 127.0.0.1.")
    parser.add_argument("--port", type=int, default=7418, help="0 chooses a free one")
    parser.add_argument("--ledger", type=Path, required=True, help="file the billed calls are appended to")
    parser.add_argument("--api-key-env", default="PROVIDER_STUB_API_KEY", help="variable that holds the accepted keys, comma-separated")
    parser.add_argument("--models", default=",".join(model.id for model in KNOWN), help="model ids on offer, comma-separated")
    parser.add_argument("--cache-minimum-tokens", type=int, default=0, help="shorter prefixes are not cached")
    parser.add_argument("--allow-directives", action="store_true", help="honour [[stub: …]] in the last user message")
    return parser.parse_args()


async def _serve(arguments: argparse.Namespace, api_keys: list[str]) -> None:
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    ledger = Ledger(arguments.ledger)
    cache = PromptCache(minimum_tokens=arguments.cache_minimum_tokens)
    stub = ProviderStub(ledger, api_keys, catalogue(arguments.models.split(",")), cache, allow_directives=arguments.allow_directives)
    runner, port = await stub.listen(arguments.port)
    print(f"listening 127.0.0.1:{port}", flush=True)
    try:
        await stopping.wait()
    finally:
        await runner.cleanup()
        await ledger.close()


def main() -> int:
    """Run the server and returns the exit code."""
    arguments = _arguments()
    api_keys = [key for key in os.environ.get(arguments.api_key_env, "").split(",") if key]
    if not api_keys:
        print(f"{arguments.api_key_env} holds no API key", file=sys.stderr)
        return 2
    uvloop.run(_serve(arguments, api_keys))
    return 0


if __name__ == "__main__":
    sys.exit(main())
