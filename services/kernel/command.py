"""The command line every service has: `serve`, `migrate` and what is its own. A wrong setting is one sentence, not a traceback."""

import argparse
import asyncio
import sys
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import TypeVar

from pydantic import ValidationError

from services.kernel.errors import MeshError
from services.kernel.migrate import MigrationRefused
from services.kernel.rpc.certificates import CertificatesUnusable
from services.kernel.rpc.server import App, run_service
from services.kernel.settings import ServiceSettings
from services.kernel.telemetry.logging import configure_logging

Settings = TypeVar("Settings", bound=ServiceSettings)


def main(
    settings_type: type[Settings],
    build: Callable[[Settings], Awaitable[App]],
    migrate: Callable[[Settings], Coroutine[None, None, None]] | None = None,
    others: Mapping[str, Callable[[Settings], str]] | None = None,
) -> None:
    """Runs one command of a service and exits: 0 when done, 2 for wrong settings, unusable certificates or a refused migration; else 1.

    `others` are commands of the service's own, which answer with what is printed.
    """
    own = others or {}
    parser = argparse.ArgumentParser(prog=f"python -m services.{settings_type.service_name}")
    parser.add_argument("command", nargs="?", default="serve", choices=("serve", *(("migrate",) if migrate else ()), *own))
    command = parser.parse_args().command
    try:
        settings = settings_type()
        if command in own:
            print(own[command](settings))  # noqa: T201 - for people
            return
        if command == "migrate" and migrate is not None:
            configure_logging(settings.service_name, settings.log_level)
            asyncio.run(migrate(settings))
        else:
            run_service(lambda: build(settings), settings)
    except ValidationError as error:
        for problem in error.errors():
            name = "_".join(str(part) for part in problem["loc"]).upper()
            print(f"{'TENANTRY_' + name + ': ' if name else ''}{problem['msg']}", file=sys.stderr)  # noqa: T201 - for people
        sys.exit(2)
    except MeshError as error:
        if command == "serve":
            raise
        print(error, file=sys.stderr)  # noqa: T201 - for people
        sys.exit(1)
    except MigrationRefused as error:
        print(f"migration refused: {error}", file=sys.stderr)  # noqa: T201 - for people
        sys.exit(2)
    except CertificatesUnusable as error:
        print(f"the certificates cannot be used: {error}", file=sys.stderr)  # noqa: T201 - for people
        sys.exit(2)
