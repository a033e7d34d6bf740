"""grpc's sockets are read by the thread that waits for their events: a setting that grpc reads when it is loaded."""

import asyncio
import os
import sys

# What a service does first, and then something that makes grpc read its settings.
_SERVICE = """
import os, services.kernel.command, grpc
grpc.insecure_channel("127.0.0.1:1").close()
print(os.environ["GRPC_EXPERIMENTS"])
"""


async def _told(**changes: str) -> tuple[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_EXPERIMENTS"} | changes
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", _SERVICE, stdout=pipe, stderr=pipe, env=environment)
    output, errors = await asyncio.wait_for(child.communicate(), 30)
    assert child.returncode == 0, errors.decode()
    return output.decode().strip(), errors.decode()


async def test_grpc_knows_the_engine_it_is_told() -> None:
    """The setting is there before grpc is loaded, and names nothing that this version of grpc has not."""
    told, errors = await _told()
    assert told == "-event_engine_client,-event_engine_listener"
    assert "Unknown experiment" not in errors


async def test_an_operator_may_choose_another() -> None:
    """What the environment says is left as it is; grpc reads it then, as a name it does not know shows."""
    told, errors = await _told(GRPC_EXPERIMENTS="no_such_thing")
    assert told == "no_such_thing"
    assert "Unknown experiment: no_such_thing" in errors
