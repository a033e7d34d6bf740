"""The tenant service in a process that kills itself, once, right before or right after the commit of the step that a file names.

The file holds words such as `ERASE RETRIEVAL before`; the process removes it and dies. With `asleep` in the place of `before` it stops
where the step begins, as a machine that is suspended, until somebody wakes it. Without the file it is the service as it is.
"""

import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from services.kernel.command import main
from services.kernel.tenant_database import TenantDatabase
from services.tenant.adapters import postgres_erasure, postgres_provisioning
from services.tenant.adapters.saga_steps import mark_done
from services.tenant.app import build, migrate_schema
from services.tenant.erasure import EraseStep, ErasurePlan
from services.tenant.provisioning import ProvisioningPlan, Step
from services.tenant.settings import TenantSettings

WISH = Path(os.environ["DEATH_WISH"])
STEPS: dict[str, Any] = {"PROVISION": Step, "ERASE": EraseStep}
_transaction = TenantDatabase.transaction
_due = False


def die() -> None:
    """Ends this process as a power cut would."""
    WISH.unlink()
    os.kill(os.getpid(), signal.SIGKILL)


def sleeping(plan: Any, kind: str) -> Any:
    """The plan's own way to run a step, with a sleep in front of the wanted one."""
    run = plan.run

    async def run_and_maybe_sleep(self: Any, step: int, saga: Any) -> None:
        if WISH.exists() and WISH.read_text().split() == [kind, STEPS[kind](step).name, "asleep"]:
            WISH.unlink()
            os.kill(os.getpid(), signal.SIGSTOP)
        await run(self, step, saga)

    return run_and_maybe_sleep


async def mark_and_maybe_die(connection: Any, tenant_id: Any, kind: str, step: int, detail: str = "[]") -> None:
    """Marks the step; before its commit the process may die here, and after it in the transaction's end."""
    global _due
    await mark_done(connection, tenant_id, kind, step, detail)
    if not WISH.exists():
        return
    wanted_kind, wanted_step, moment = WISH.read_text().split()
    if kind == wanted_kind and int(step) == STEPS[kind][wanted_step]:
        if moment == "before":
            die()
        _due = True


@asynccontextmanager
async def transaction_and_maybe_die(database: TenantDatabase, tenant_id: Any) -> AsyncIterator[Any]:
    """The service's own transaction, with death behind its commit."""
    async with _transaction(database, tenant_id) as connection:
        yield connection
    if _due:
        die()


if __name__ == "__main__":
    postgres_provisioning.mark_done = mark_and_maybe_die
    postgres_erasure.mark_done = mark_and_maybe_die
    TenantDatabase.transaction = transaction_and_maybe_die  # type: ignore[method-assign,assignment] # the point of this module
    ProvisioningPlan.run = sleeping(ProvisioningPlan, "PROVISION")  # type: ignore[method-assign] # as above
    ErasurePlan.run = sleeping(ErasurePlan, "ERASE")  # type: ignore[method-assign] # as above
    sys.argv[1:] = ["serve"]
    main(TenantSettings, build, migrate_schema)
