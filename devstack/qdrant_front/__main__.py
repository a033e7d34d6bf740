"""`python -m devstack.qdrant_front`: the command line. The API key comes in the environment, never as an argument."""

import argparse
import asyncio
import logging
import os
import signal
from pathlib import Path

from .server import HOST, Settings, serve

API_KEY_VARIABLE = "QDRANT_API_KEY"


def _settings() -> Settings:
    parser = argparse.ArgumentParser(prog="python -m devstack.qdrant_front", description="Qdrant's gRPC API over the engine in process.")
    parser.add_argument("--port", type=int, default=7416, help="0 chooses a free one (default 7416)")
    parser.add_argument("--data-dir", type=Path, required=True, help="where collections live")
    parser.add_argument("--max-open-shards", type=int, default=256, help="collections held open at once (default 256)")
    arguments = parser.parse_args()
    if arguments.max_open_shards < 1:
        parser.error("--max-open-shards must be 1 or larger")
    api_key = os.environ.get(API_KEY_VARIABLE, "")
    if not api_key:
        parser.error(f"the environment variable {API_KEY_VARIABLE} is not set")
    return Settings(port=arguments.port, data_dir=arguments.data_dir, max_open_shards=arguments.max_open_shards, api_key=api_key)


async def _main(settings: Settings) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await serve(settings, lambda port: print(f"listening {HOST}:{port}", flush=True), stop)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    asyncio.run(_main(_settings()))
