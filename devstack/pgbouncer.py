"""PgBouncer in transaction mode before the embedded Postgres, where the machine has one: few server connections, changing hands often.

It resets nothing between two clients: what a service leaves on a connection, the next one finds.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from devstack.managed_process import ManagedProcess, ProcessFailedError
from devstack.ports import LOOPBACK, answers
from devstack.unprivileged import make_traversable, unprivileged_user

READY_TIMEOUT_SECONDS = 10.0
# So few that tenants meet on them all the time.
SERVER_CONNECTIONS = 2
# Where Debian puts it, which is not on everybody's path.
SYSTEM_FOLDERS = "/usr/sbin:/usr/local/sbin:/usr/local/bin"


def find_pgbouncer() -> str | None:
    """Returns the program's path, or None where there is none."""
    return shutil.which("pgbouncer") or shutil.which("pgbouncer", path=SYSTEM_FOLDERS)


class PgBouncer:
    """One pooler for the given roles of one database server."""

    def __init__(
        self, folder: Path, *, port: int, role_dsns: Sequence[str], log_path: Path, server_connections: int = SERVER_CONNECTIONS
    ) -> None:
        """Each DSN is one role's at the server itself. Raises: ProcessFailedError when there is no pgbouncer here."""
        program = find_pgbouncer()
        if program is None:
            raise ProcessFailedError("pgbouncer is not installed. On Debian: apt install pgbouncer")
        self.port = port
        self._folder = folder
        self._role_dsns = list(role_dsns)
        self._server_connections = server_connections
        self._user = unprivileged_user()
        self.process = ManagedProcess("pgbouncer", [program, str(folder / "pgbouncer.ini")], log_path=log_path, user=self._user)

    async def start(self) -> None:
        """Starts it and waits until it listens."""
        self._write_configuration()
        await self.process.start()
        await self.process.wait_ready(self._listens, timeout_seconds=READY_TIMEOUT_SECONDS)

    async def stop(self) -> None:
        """Stops it; its clients lose their connections."""
        await self.process.stop()

    def _write_configuration(self) -> None:
        parts = [urlsplit(dsn) for dsn in self._role_dsns]
        server = parts[0]
        self._folder.mkdir(parents=True, exist_ok=True)
        users = "".join(f'"{unquote(part.username or "")}" "{unquote(part.password or "")}"\n' for part in parts)
        self._write("users.txt", users)
        self._write(
            "pgbouncer.ini",
            f"[databases]\n* = host={server.hostname} port={server.port}\n"
            f"[pgbouncer]\nlisten_addr = {LOOPBACK}\nlisten_port = {self.port}\nunix_socket_dir =\n"
            f"auth_type = scram-sha-256\nauth_file = {self._folder / 'users.txt'}\n"
            f"pool_mode = transaction\ndefault_pool_size = {self._server_connections}\nmax_client_conn = 500\n"
            "server_round_robin = 1\nserver_reset_query =\nquery_wait_timeout = 5\n",
        )
        if self._user is not None:
            make_traversable(self._folder)
            os.chown(self._folder, self._user.uid, self._user.gid)

    def _write(self, name: str, text: str) -> None:
        # Passwords go in by file, for the pooler's own eyes.
        path = self._folder / name
        path.unlink(missing_ok=True)
        path.touch(mode=0o600)
        path.write_text(text)
        if self._user is not None:
            os.chown(path, self._user.uid, self._user.gid)

    async def _listens(self) -> bool:
        return answers(self.port)
