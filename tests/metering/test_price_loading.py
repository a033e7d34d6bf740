"""Loading the price book through the real service: seen first, then exactly that; a version that was loaded never changes."""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import asyncpg
import pytest

from mesh.metering.v1 import price_service_pb2 as pb
from services.kernel.errors import MeshError
from services.kernel.migrate import MigrationRefused
from services.metering.app.loading import migrate_schema, preview_price_book
from services.metering.price_book import parse_price_book
from services.metering.rating import BatchPrices
from services.metering.settings import PACKAGED_PRICE_BOOK
from tests.metering.mesh import Mesh, Tenant, dsn_of, running_mesh, settings_for
from tests.metering.peers import OPERATOR, Peers
from tests.metering.rerating import as_operator
from tests.support.stores import PostgresStore

VERSION = """
  - version: "{version}"
    effective_time: "{time}"
    source: "a page"
    retrieved: "2026-01-02"
    prices: [{{provider: p, model: m, input: "{price}", output: "2", cache_read: "0", cache_write_5m: "0", cache_write_1h: "0"{more}}}]
"""
PACKAGED_DIGEST = "1e2408171fbf841ddc2e093739339df3285f54e7af14a0fb38a12a4b720c0a76"
EARLY, NOW_ISH = "2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z"


def version(name: str, time: str = EARLY, price: str = "1", more: str = "") -> str:
    """A version of one model."""
    return VERSION.format(version=name, time=time, price=price, more=more)


@pytest.fixture(scope="module")
async def dsn(postgres: PostgresStore) -> str:
    """A database of these tests."""
    return await postgres.fresh_database()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The price book of these tests' service, with its first version."""
    book = tmp_path_factory.mktemp("prices") / "book.yaml"
    book.write_text("versions:" + version("v1"))
    return book


@pytest.fixture(scope="module")
async def own(dsn: str, path: Path, peers: Peers) -> AsyncIterator[Mesh]:
    """A service whose price book the tests write."""
    await migrate_schema(settings_for(dsn, peers, price_book_path=path))
    async with asyncpg.create_pool(dsn, min_size=1, max_size=2) as admin:
        running = await running_mesh(dsn, peers, admin, price_book_path=path)
        yield running
        await running.close()


async def load(mesh: Mesh, digest: str = "", *, tenant: Tenant | None = None, **credentials: str) -> pb.LoadPriceBookResponse:
    """Loads with a digest; without one only looks."""
    request = pb.LoadPriceBookRequest(validate_only=not digest, digest=digest)
    return await as_operator(mesh, tenant, "LoadPriceBook", request, **credentials)


async def names(mesh: Mesh) -> list[str]:
    """The stored versions, oldest first."""
    return [row["version"] for row in await mesh.admin.fetch("SELECT version FROM metering.price_versions ORDER BY effective_time")]


def add(path: Path, *versions: str) -> None:
    """Adds versions to the book."""
    path.write_text(path.read_text() + "".join(versions))


async def in_force(mesh: Mesh) -> pb.GetPriceBookResponse:
    """What the service answers inference."""
    caller = mesh.inference
    return await caller.channel.unary(caller.prices.GetPriceBook, pb.GetPriceBookRequest(), timeout_seconds=5)


def test_packaged_version_is_the_one_that_releases_before_loaded() -> None:
    """New classes of prices do not make another version of what has none of them: `migrate` of an older database is not refused."""
    (packaged,) = parse_price_book(PACKAGED_PRICE_BOOK.read_text())
    assert packaged.digest.hex() == PACKAGED_DIGEST


def test_batch_prices_are_read_class_by_class() -> None:
    """What is told is exact, what is left out has no price, and either makes another version."""
    (plain,) = parse_price_book("versions:" + version("v"))
    (batch,) = parse_price_book("versions:" + version("v", more=', batch: {input: "0.5", cache_read: "0"}'))
    assert batch.prices["p", "m"].batch == BatchPrices(input=500_000_000, cache_read=0)
    assert plain.prices["p", "m"].batch is None
    assert plain.digest != batch.digest


async def test_what_was_seen_is_what_is_loaded(own: Mesh, path: Path) -> None:
    """A look tells versions, prices before and after, and whether the past is concerned; the load stores that, at once in force."""
    soon = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    await in_force(own)
    add(path, version("v2", NOW_ISH, "1.5", ', batch: {output: "1"}'), version("v3", soon, "1.5").replace("model: m", "model: n"))
    before = await names(own)
    shown = await load(own)
    assert await names(own) == before
    second, third = shown.changes
    assert [(change.version, change.is_retroactive) for change in shown.changes] == [("v2", True), ("v3", False)]
    (model,) = second.models
    assert (model.model, model.before.input, model.after.input) == ("m", 1_000_000_000, 1_500_000_000)
    assert (model.before.HasField("batch"), model.after.batch.HasField("input"), model.after.batch.output) == (False, False, 10**9)
    gone, come = third.models
    assert (gone.model, gone.HasField("after"), come.model, come.HasField("before")) == ("m", False, "n", False)
    assert await load(own, shown.digest) == shown
    answer = await in_force(own)
    assert (answer.version, answer.prices[0].batch.output, answer.HasField("next_effective_time")) == ("v2", 10**9, True)
    again = await load(own, shown.digest)
    assert (list(again.changes), again.digest, (await names(own))[-2:]) == ([], shown.digest, ["v2", "v3"])


async def test_two_who_load_at_once_load_once(own: Mesh, path: Path) -> None:
    """They take turns; one finds it loaded."""
    add(path, version("raced", "2026-01-15T00:00:00Z"))
    digest = (await load(own)).digest
    answers = await asyncio.gather(*[load(own, digest) for _ in range(4)])
    assert sorted(len(answer.changes) for answer in answers) == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("change", "reason", "metadata"),
    [
        (lambda text: text.replace('input: "1"', 'input: "1.1"', 1), "CONTENT_CONFLICT", {"resource": "price_version", "version": "v1"}),
        (
            lambda text: text + version("twin", EARLY).replace("2026-01-01T00", "2026-01-20T00").replace('"1"', "1"),
            "PRICE_BOOK_REFUSED",
            {},
        ),
        (lambda text: "currency: EUR\n" + text, "PRICE_BOOK_REFUSED", {}),
        (lambda text: text.replace('version: "v1"', 'version: "renamed"'), "PRICE_BOOK_REFUSED", {}),
        (lambda text: text + version("b", "2026-01-21T00:00:00Z", more=", batch: {}"), "PRICE_BOOK_REFUSED", {}),
        (lambda text: text + version("b", "2026-01-21T00:00:00Z", more=', batch: {inptu: "1"}'), "PRICE_BOOK_REFUSED", {}),
        (lambda text: text + version("b", "2026-01-21T00:00:00Z", more=", batch: {input: 0.5}"), "PRICE_BOOK_REFUSED", {}),
        (lambda text: None, "PRICE_BOOK_REFUSED", {}),
    ],
    ids=["edited", "number", "euros", "same moment", "no batch price", "unknown class", "float", "absent"],
)
async def test_doubtful_book_is_refused_whole(own: Mesh, path: Path, change, reason: str, metadata: dict[str, str]) -> None:  # type: ignore[no-untyped-def] # a function of text
    """An edited version, another currency, a price that is no exact text, a moment that is taken, no file: typed, and nothing is stored."""
    text, before = path.read_text(), await names(own)
    doubtful = change(text + version("good", "2026-01-19T00:00:00Z"))
    try:
        path.unlink() if doubtful is None else path.write_text(doubtful)
        for digest in ("", "0" * 64):
            with pytest.raises(MeshError) as refused:
                await load(own, digest)
            if digest == "" or refused.value.reason_name != "WRONG_STATE":
                assert refused.value.reason_name == reason
                assert metadata.items() <= refused.value.metadata.items()
    finally:
        path.write_text(text)
    assert await names(own) == before


async def test_edited_version_is_refused_with_both_digests(own: Mesh, path: Path) -> None:
    """Whoever edits what is in force learns which version it is and that it differs."""
    text = path.read_text()
    (stored, *_), (given, *_) = parse_price_book(text), parse_price_book(text.replace('input: "1"', 'input: "1.1"', 1))
    try:
        path.write_text(text.replace('input: "1"', 'input: "1.1"', 1))
        with pytest.raises(MeshError, match="add a new one") as refused:
            await load(own)
    finally:
        path.write_text(text)
    assert refused.value.metadata["stored_digest"] == stored.digest.hex()
    assert refused.value.metadata["request_digest"] == given.digest.hex()


async def test_nothing_is_loaded_unseen(own: Mesh, path: Path) -> None:
    """Without a digest, with that of another book, by a tenant's key or without a reason."""
    text = path.read_text()
    digest = (await load(own)).digest
    tenant = own.new_tenant()
    add(path, version("unseen", "2026-01-22T00:00:00Z"))
    try:
        with pytest.raises(MeshError) as refused:
            await load(own, digest)
        assert (refused.value.reason_name, refused.value.metadata["state"]) == ("WRONG_STATE", "CHANGED")
        with pytest.raises(MeshError) as refused:
            await as_operator(own, None, "LoadPriceBook", pb.LoadPriceBookRequest())
        assert refused.value.metadata == {"field": "digest"}
        for credential, reason in ((f"key-{tenant.id}", "mine"), (OPERATOR, "")):
            with pytest.raises(MeshError) as refused:
                await load(own, (await load(own)).digest, tenant=tenant, credential=credential, reason=reason)
            assert refused.value.reason_name in ("CALLER_NOT_ALLOWED", "OPERATOR_REASON_MISSING")
    finally:
        path.write_text(text)
    assert "unseen" not in await names(own)


@pytest.mark.parametrize("table", ["price_versions", "prices"])
async def test_prices_that_are_there_cannot_be_changed_by_anybody(own: Mesh, dsn: str, table: str) -> None:
    """The jobs role may add; the service's own may not even that; an administrator's change is refused by the trigger."""
    changes = [f"UPDATE metering.{table} SET version = version", f"DELETE FROM metering.{table}", f"TRUNCATE metering.{table} CASCADE"]
    for change in changes:
        with pytest.raises(asyncpg.RestrictViolationError):
            await own.admin.execute(change)
    for role, statements in (
        ("metering_jobs", changes),
        ("metering_service", [*changes, f"INSERT INTO metering.{table} SELECT * FROM metering.{table}"]),
    ):
        connection = await asyncpg.connect(dsn_of(dsn, role))
        try:
            for statement in statements:
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await connection.execute(statement)
        finally:
            await connection.close()


async def test_command_tells_what_migrate_would_load(own: Mesh, path: Path) -> None:
    """A line a version and a line a model; nothing is stored; a doubtful book is refused as `migrate` refuses it."""
    text, before = path.read_text(), await names(own)
    try:
        assert await asyncio.to_thread(preview_price_book, own.settings) == "nothing would change: every version is loaded"
        path.write_text(text + version("w", "2026-01-23T00:00:00Z", "7").replace("model: m", "model: n"))
        first, gone, come = (await asyncio.to_thread(preview_price_book, own.settings)).splitlines()
        assert first.startswith("w: in force from 2026-01-23T00:00:00+00:00; calls since then")
        assert (gone, come) == (
            "  p m: 1000000000/2000000000/0/0/0 -> no price",
            "  p n: no price -> 7000000000/2000000000/0/0/0",
        )
        path.write_text(text.replace('input: "1"', 'input: "1.1"', 1))
        with pytest.raises(MigrationRefused, match="version v1 has other content"):
            await asyncio.to_thread(preview_price_book, own.settings)
    finally:
        path.write_text(text)
    assert await names(own) == before


def test_command_without_its_database_says_so_in_a_sentence() -> None:
    """Whoever mistyped an address reads no traceback."""
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
    where = {"TENANTRY_POSTGRES_ADMIN_DSN": f"postgresql://nobody@127.0.0.1:{port}/none"}
    command = [sys.executable, "-m", "services.metering", "preview-price-book"]
    ended = subprocess.run(command, env={**os.environ, **where}, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert ended.stderr == "UNAVAILABLE DEPENDENCY_UNAVAILABLE: postgres does not answer; try again shortly\n"
