"""Whom a store runs as that refuses to be root, and how that user gets at its folder."""

import os
import pwd
import stat
from pathlib import Path

from devstack.managed_process import UnprivilegedUser


def unprivileged_user() -> UnprivilegedUser | None:
    """Returns `nobody` for root; None for everybody else, who runs stores as themselves."""
    if os.geteuid() != 0:
        return None
    nobody = pwd.getpwnam("nobody")
    return UnprivilegedUser(nobody.pw_uid, nobody.pw_gid)


def make_traversable(path: Path) -> None:
    """Lets other users pass through a folder and those above it, without letting them list or read."""
    for folder in (path, *path.parents):
        mode = folder.stat().st_mode
        if not mode & stat.S_IXOTH and folder.stat().st_uid == os.geteuid():
            folder.chmod(stat.S_IMODE(mode) | stat.S_IXOTH)
