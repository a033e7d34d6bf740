"""Optional command-line tools, installed by `make tools`."""

import shutil
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / ".tools"


def tool(name: str) -> str:
    """Returns the tool's path, or skips the test and says why."""
    found = shutil.which(name, path=str(TOOLS)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: `make tools` installs it where there is Go")
    return found
