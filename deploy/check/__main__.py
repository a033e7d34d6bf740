"""`python -m deploy.check [--require-tools]`: 0 when everything holds, 1 when something does not, 3 when a tool is missing.

A missing tool is 1 where skipping would be a lie: with CI=true, or with --require-tools.
"""

import argparse
import os
import sys

from deploy.check.checks import run
from deploy.check.tools import ToolMissing, find_tools


def main(arguments: list[str]) -> int:
    """Prints one line a check, and how many passed and failed."""
    parser = argparse.ArgumentParser(prog="python -m deploy.check", description="Holds the manifests against Kubernetes and the code.")
    parser.add_argument("--require-tools", action="store_true", help="a missing tool is a failure (as with CI=true)")
    required = parser.parse_args(arguments).require_tools or os.environ.get("CI") == "true"
    try:
        tools = find_tools()
    except ToolMissing as error:
        sys.stdout.write(f"nothing was checked: {error}\n")
        return 1 if required else 3
    results = []
    for result in run(tools):
        sys.stdout.write(result.line() + "\n")
        results.append(result)
    failed = sum(bool(result.problems) for result in results)
    sys.stdout.write(f"{len(results) - failed} passed, {failed} failed\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
