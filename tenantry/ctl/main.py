"""The command line: reads arguments, runs one command, and says in one sentence what went wrong and what to do.

Exits 0 when done, 1 when the mesh refused or books differ, 2 when the command makes no sense.
"""

import argparse
import asyncio
import sys
from collections.abc import Sequence

import grpc

from tenantry.ctl import invoices, ledger, reratings, usage
from tenantry.ctl.connection import add_connection_options, connect, explain
from tenantry.ctl.wrong_use import WrongUse

_EXAMPLES = """\
credentials come from the environment:
  TENANTRY_API_KEY       a key of one tenant, with the scope usage:read
  TENANTRY_OPERATOR_KEY  an operator's key; with it --tenant names the tenant and --reason says why

examples:
  tenantctl usage --period 2026-11 --group-by model,feature
  tenantctl usage --last 7d --bucket day --format csv > week.csv
  tenantctl usage export --kind entries --period 2026-11 --format parquet --output november.parquet
  tenantctl --tenant 01a22392-57e7-71c6-89b5-43733f4583ae --reason "ticket 4711" invoice list
  tenantctl invoice export 1 --format html --output november.html
  tenantctl --reason "monthly audit" ledger verify
  tenantctl --reason "monthly audit" rerating list --undone
"""


def parser() -> argparse.ArgumentParser:
    """Builds the parser of all commands."""
    made = argparse.ArgumentParser(
        prog="tenantctl",
        description="What tenants used and owe, and whether the books agree.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_connection_options(made)
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for room in (usage, invoices, ledger, reratings):
        room.add_commands(commands)
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command of the process's arguments and exits."""
    options = parser().parse_args(argv)
    try:
        sys.exit(asyncio.run(_run(options)))
    except WrongUse as error:
        print(f"tenantctl: {error}", file=sys.stderr)
        sys.exit(2)
    except grpc.aio.AioRpcError as error:
        print(f"tenantctl: {explain(error, options)}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        print(f"tenantctl: {error.filename or 'output'}: {error.strerror}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


async def _run(options: argparse.Namespace) -> int:
    async with connect(options) as mesh:
        code: int = await options.run(mesh, options)
        return code
