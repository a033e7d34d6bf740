"""An export is a function of its period and its moment: whole, in one order, the same however often it is cut off and by whatever."""

import asyncio
import csv
import io
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pyarrow.parquet
import pytest

from devstack.managed_process import ManagedProcess
from devstack.ports import free_port
from devstack.stack import is_serving_at
from mesh.metering.v1 import export_service_pb2 as pb
from mesh.metering.v1.export_service_pb2_grpc import ExportServiceStub
from services.kernel.errors import MeshError
from services.kernel.rpc import metadata as keys
from services.kernel.rpc.wire_status import decode_rpc_error
from tests.metering.billing import ended, use_tokens, use_units
from tests.metering.command_line import TENANTCTL, as_tenant, environment
from tests.metering.events import PRODUCT, TYPE, event, record, register, reverse
from tests.metering.mesh import MODEL, Mesh, Tenant, bill
from tests.metering.replicas import environment_of
from tests.metering.usage import fold
from tests.support.waiting import eventually

ENTRIES, EVENTS, USAGE = pb.EXPORT_KIND_ENTRIES, pb.EXPORT_KIND_EVENTS, pb.EXPORT_KIND_USAGE
# A cursor belongs to the request it came of: all ask for the same period.
END = datetime.now(UTC) + timedelta(hours=1)
TYPE_NAME = f"{PRODUCT}/{TYPE}"
MANY = """
INSERT INTO metering.unit_entries (tenant_id, reservation_id, entry_id, product_unit, quantity, reserve_time, record_time, epoch)
SELECT $1, uuidv7(), uuidv7(), 'ai_interviews', n, $2, now() - interval '1 minute', 0 FROM generate_series(1, $3) AS n
"""


def asking(kind: int, *, size: int = 2, cursor: str = "") -> pb.ExportUsageRequest:
    """Asks for the last three billing periods."""
    request = pb.ExportUsageRequest(kind=kind, page_size=size, cursor=cursor)  # type: ignore[arg-type] # the enum's number
    request.start_time.FromDatetime(ended(3).start_time)
    request.end_time.FromDatetime(END)
    return request


async def pages(channel: grpc.aio.Channel, tenant: Tenant, request: pb.ExportUsageRequest) -> AsyncIterator[pb.ExportUsageResponse]:
    """Streams as the tenant's own application."""
    try:
        async for page in ExportServiceStub(channel).ExportUsage(
            request, metadata=((keys.AUTHORIZATION, f"Bearer key-{tenant.id}"),), timeout=60
        ):
            yield page
    except grpc.aio.AioRpcError as error:
        raise decode_rpc_error(error, "metering") from None


def rows_of(page: pb.ExportUsageResponse) -> list[Any]:
    """The rows of a page, whatever they are."""
    return [*page.entries, *page.events, *page.uses]


async def exported(mesh: Mesh, tenant: Tenant, request: pb.ExportUsageRequest) -> list[Any]:
    """All rows of an export."""
    return [row async for page in pages(mesh.outside.channel, tenant, request) for row in rows_of(page)]


async def used(mesh: Mesh) -> Tenant:
    """A tenant with calls, uses of units, refusals, and events near and far from when they were recorded, one of them taken back."""
    tenant = mesh.new_tenant()
    await use_tokens(mesh, tenant, ended(2).start_time, [100, 200, 300])
    await mesh.settle(bill((await mesh.opened(tenant, user="user-2")).ref))
    await use_units(mesh, tenant, ended(2).start_time, quantity=7)
    await register(mesh)
    gone = event("gone", quantity=1)
    await record(mesh, tenant, [event("far", time=ended(2).start_time, quantity=5), event("near", quantity=6), gone])
    await reverse(mesh, tenant, gone)
    await mesh.refuse(mesh.refusals(tenant, 3))
    await fold(mesh)
    return tenant


async def test_an_export_has_every_row_once_whatever_the_size_of_its_pages(mesh: Mesh) -> None:
    """Entries, events and sums: all of them, with what they are; pages of one row hold the same as pages of a thousand."""
    tenant = await used(mesh)
    for kind in (ENTRIES, EVENTS, USAGE):
        whole = await exported(mesh, tenant, asking(kind, size=1000))
        for size in (1, 2, 3):
            assert await exported(mesh, tenant, asking(kind, size=size)) == whole
    entries = await exported(mesh, tenant, asking(ENTRIES))
    assert sorted((row.product_unit, row.model, row.tokens.output_tokens, row.quantity) for row in entries) == [
        ("", MODEL, 50, 0), ("", MODEL, 100, 0), ("", MODEL, 200, 0), ("", MODEL, 300, 0), ("ai_interviews", "", 0, 7),
    ]  # fmt: skip
    assert [row.use_time.ToNanoseconds() for row in entries] == sorted(row.use_time.ToNanoseconds() for row in entries)
    assert {row.user for row in entries} == {"user-1", "user-2"} and all(row.entry_id and row.reservation_id for row in entries)
    events = await exported(mesh, tenant, asking(EVENTS))
    assert [(row.id, row.quantity, bool(row.reverses)) for row in events] == [
        ("far", 5, False), ("near", 6, False), ("gone", 1, False), ("gone", -1, True),
    ]  # fmt: skip
    sums = await exported(mesh, tenant, asking(USAGE))
    assert sum(row.cost.nano_usd for row in sums) == sum(row.cost.nano_usd for row in entries)
    assert sorted((row.product_unit, row.event_type, row.quantity, row.refusal_reason, row.refusal_count) for row in sums) == [
        ("", "", 0, "", 0), ("", "", 0, "", 0), ("", "", 0, "PLAN_LIMIT", 3),
        ("ai_interviews", "", 7, "", 0), ("ai_interviews", TYPE_NAME, 5, "", 0), ("ai_interviews", TYPE_NAME, 6, "", 0),
    ]  # fmt: skip


async def test_an_export_that_is_cut_off_goes_on_as_it_would_have(mesh: Mesh) -> None:
    """After any page its cursor gives the rest, in the same order; what is recorded meanwhile, wherever it belongs, is in neither."""
    tenant = await used(mesh)
    sums = [page async for page in pages(mesh.outside.channel, tenant, asking(USAGE, size=1))]
    for number, page in enumerate(sums[:-1]):
        rest = await exported(mesh, tenant, asking(USAGE, size=1, cursor=page.cursor))
        assert rest == [row for later in sums[number + 1 :] for row in rows_of(later)]
    for kind in (ENTRIES, EVENTS):
        whole = [page async for page in pages(mesh.outside.channel, tenant, asking(kind, size=1))]
        assert [bool(page.cursor) for page in whole] == [True] * (len(whole) - 1) + [False]
        await use_tokens(mesh, tenant, ended(2).start_time, [9])
        await use_units(mesh, tenant, ended(1).start_time, quantity=9)
        await record(mesh, tenant, [event(time=ended(2).start_time), event()])
        for number, page in enumerate(whole[:-1]):
            rest = await exported(mesh, tenant, asking(kind, size=1, cursor=page.cursor))
            assert rest == [row for later in whole[number + 1 :] for row in rows_of(later)]


async def test_whatever_is_recorded_before_the_moment_is_in_the_export(mesh: Mesh) -> None:
    """Writers that have read their clock and not committed are waited for: no row of before the moment appears afterwards."""
    tenant = await used(mesh)
    async with mesh.admin.acquire() as connection:
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute("SELECT pg_advisory_xact_lock_shared(metering.tenant_lock($1))", tenant.id)
        await connection.execute(MANY.replace("now() - interval '1 minute'", "clock_timestamp()"), tenant.id, ended(2).start_time, 1)
        async with asyncio.TaskGroup() as group:
            exporting = group.create_task(exported(mesh, tenant, asking(ENTRIES, size=1000)))
            waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
            await eventually(lambda: _any(mesh, waiting), within_seconds=30)
            await transaction.commit()
        assert len(exporting.result()) == 6


async def _any(mesh: Mesh, sql: str) -> bool:
    return bool(await mesh.admin.fetchval(sql))


async def test_a_service_killed_in_mid_export_costs_nothing(mesh: Mesh, tmp_path: Path) -> None:
    """`tenantctl` writes an export while the service is killed with SIGKILL and started again: the file has every row once."""
    tenant, port = mesh.new_tenant(), free_port()
    await mesh.admin.execute(MANY, tenant.id, ended(2).start_time, 12_000)
    argv, started = [sys.executable, "-m", "services.metering"], environment_of(mesh, port, {})

    async def serving(number: int) -> ManagedProcess:
        process = ManagedProcess("metering", argv, log_path=tmp_path / f"metering-{number}.log", env=started)
        await process.start()
        await eventually(lambda: is_serving_at(f"127.0.0.1:{port}", "mesh.metering.v1.LedgerService"), within_seconds=60)
        return process

    first = await serving(1)
    arguments = [f"--address=127.0.0.1:{port}", "usage", "export", f"--period={ended(2).start_time:%Y-%m}"]
    writing = await asyncio.create_subprocess_exec(
        str(TENANTCTL), *arguments, env=environment(TENANTRY_API_KEY=f"key-{tenant.id}"), stdout=asyncio.subprocess.PIPE, limit=4096
    )
    assert writing.stdout is not None
    # With the first row a page has come; the pipe is full and the stream waits: the service dies in the middle of it.
    begun = await writing.stdout.readline() + await writing.stdout.readline()
    first.kill()
    await first.wait()
    second = await serving(2)
    try:
        async with asyncio.timeout(60):
            text = (begun + await writing.stdout.read()).decode()
            assert await writing.wait() == 0
    finally:
        second.kill()
        await second.wait()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [len(rows), len({row["entry_id"] for row in rows})] == [12_000, 12_000]
    assert sum(int(row["quantity"]) for row in rows) == 12_000 * 12_001 // 2


async def test_csv_and_parquet_hold_the_same_rows(mesh: Mesh, tmp_path: Path) -> None:
    """Of every kind; Parquet with types: moments in UTC, integers of 64 bits. A file is there whole or not at all."""
    tenant = await used(mesh)
    period = [f"--from={ended(3).start_time:%Y-%m-%d}", f"--to={datetime.now(UTC) + timedelta(days=1):%Y-%m-%d}"]
    for kind in ("entries", "events", "usage"):
        files = {form: tmp_path / f"{kind}.{form}" for form in ("csv", "parquet")}
        for form, path in files.items():
            written = await as_tenant(mesh, tenant, "usage", "export", *period, f"--kind={kind}", f"--format={form}", f"--output={path}")
            assert written.code == 0, written.err
        table = pyarrow.parquet.read_table(files["parquet"])
        told = [{name: _as_csv(value) for name, value in row.items()} for row in table.to_pylist()]
        assert told and told == list(csv.DictReader(io.StringIO(files["csv"].read_bytes().decode(), newline="")))
        types = {field.name: str(field.type) for field in table.schema}
        assert types["quantity"] == "int64" and types.get("use_time", types.get("day")) == "timestamp[us, tz=UTC]"
    assert {path.suffix for path in tmp_path.iterdir()} == {".csv", ".parquet"}
    refused = await as_tenant(mesh, tenant, "usage", "export", "--format=parquet")
    assert refused.code == 2 and "--output" in refused.err


def _as_csv(value: object) -> str:
    return value.astimezone(UTC).isoformat().replace("+00:00", "Z") if isinstance(value, datetime) else str(value)


async def test_a_cursor_belongs_to_its_export(mesh: Mesh) -> None:
    """Another tenant's, another kind's and made-up cursors are refused, and so are periods that make no sense."""
    tenant, other = await used(mesh), await used(mesh)
    first = await anext(pages(mesh.outside.channel, tenant, asking(ENTRIES, size=1)))
    wrong = pb.ExportUsageRequest(kind=ENTRIES)
    wrong.start_time.FromDatetime(datetime(2026, 1, 2, tzinfo=UTC))
    wrong.end_time.FromDatetime(datetime(2026, 1, 1, tzinfo=UTC))
    cases = [
        (other, asking(ENTRIES, cursor=first.cursor)), (tenant, asking(EVENTS, cursor=first.cursor)),
        (tenant, asking(ENTRIES, cursor="AAAA")),
        (tenant, wrong), (tenant, pb.ExportUsageRequest()),
    ]  # fmt: skip
    for whose, request in cases:
        with pytest.raises(MeshError) as refused:
            await exported(mesh, whose, request)
        assert refused.value.reason_name == "INVALID_REQUEST"


async def test_a_page_of_events_fits_a_message(mesh: Mesh) -> None:
    """However much metadata events have, pages are cut before they are larger than a message may be."""
    tenant = mesh.new_tenant()
    await register(mesh)
    much = {f"key-{number}": "ü" * 512 for number in range(32)}
    for _ in range(2):
        await record(mesh, tenant, [event(metadata=much) for _ in range(60)])
    found = [page async for page in pages(mesh.outside.channel, tenant, asking(EVENTS, size=1000))]
    assert len(found) > 1 and sum(len(page.events) for page in found) == 120
    assert max(page.ByteSize() for page in found) < 4 * 1024 * 1024
