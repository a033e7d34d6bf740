"""The price book: loaded once, never changed, answered as what is in force."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import asyncpg
import pytest

from mesh.metering.v1 import price_service_pb2 as pb
from services.kernel.migrate import MigrationRefused
from services.kernel.rpc import metadata as keys
from services.kernel.tenant_database import JobsDatabase
from services.metering.adapters.postgres_prices import load_price_book
from services.metering.app.loading import migrate_schema
from services.metering.price_book import PriceBookRefused, parse_price_book
from services.metering.settings import PACKAGED_PRICE_BOOK
from tests.metering.mesh import MODEL, Mesh, bill, running_mesh, settings_for
from tests.metering.peers import Peers
from tests.support.stores import PostgresStore

FULL = """
versions:
  - version: "{version}"
    effective_time: "{time}"
    source: "a page"
    retrieved: "2026-01-02"
    prices:
      - {{provider: anthropic, model: m, aliases: [n], input: "1.5", output: "2", cache_read: "0.000000001",
         cache_write_5m: "0", cache_write_1h: "1"}}
"""


def book(version: str = "v1", time: str = "2026-01-01T00:00:00Z") -> str:
    """A price book of one version."""
    return FULL.format(version=version, time=time)


def test_packaged_book_has_the_published_prices() -> None:
    """The five classes of the three models, in nano-dollars per million tokens, aliases included."""
    (version,) = parse_price_book(PACKAGED_PRICE_BOOK.read_text())
    usd = 1_000_000_000
    haiku = version.prices["anthropic", "claude-haiku-4-5-20251001"]
    assert haiku == version.prices["anthropic", "claude-haiku-4-5"]
    assert (haiku.input, haiku.output, haiku.cache_read, haiku.cache_write_5m, haiku.cache_write_1h) == (
        usd,
        5 * usd,
        usd // 10,
        5 * usd // 4,
        2 * usd,
    )
    sonnet, opus = version.prices["anthropic", "claude-sonnet-4-6"], version.prices["anthropic", "claude-opus-4-6"]
    assert (sonnet.input, sonnet.output, sonnet.cache_write_5m) == (3 * usd, 15 * usd, 15 * usd // 4)
    assert (opus.input, opus.output, opus.cache_read, opus.cache_write_1h) == (5 * usd, 25 * usd, usd // 2, 10 * usd)


def test_decimal_text_becomes_exact_nano_dollars() -> None:
    """The smallest and fractional prices are converted without a float."""
    (version,) = parse_price_book(book())
    prices = version.prices["anthropic", "m"]
    assert (prices.input, prices.cache_read) == (1_500_000_000, 1)
    assert version.prices["anthropic", "n"] == prices


def test_digest_follows_the_content_and_not_the_writing() -> None:
    """Comments and spaces do not make another version; a price does."""
    (one,), (same,) = parse_price_book(book()), parse_price_book("# a comment\n" + book().replace('"1.5"', '"1.50"'))
    (other,) = parse_price_book(book().replace('"1.5"', '"1.51"'))
    assert one.digest == same.digest != other.digest


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "not YAML"),
        ("a: 1", "list `versions`"),
        ("versions: []", "at least one version"),
        (book().replace('"1.5"', "1.5"), "in quotes"),
        (book().replace('"1.5"', '"-1"'), "0 or more"),
        (book().replace('"1.5"', '"NaN"'), "0 or more"),
        (book().replace('"1.5"', '"x"'), "no decimal"),
        (book().replace('"1.5"', '"0.0000000001"'), "nine decimals"),
        (book().replace('"1.5"', '"9999999"'), "million dollars"),
        (book().replace("input:", "inptu:"), "lacks input"),
        (book().replace("aliases: [n]", "alias: [n]"), "unknown fields alias"),
        (book().replace("[n]", "[m]"), "two prices"),
        (book(time="yesterday"), "effective_time"),
        (book(time="2026-01-01T00:00:00"), "with its zone"),
        (book().replace("2026-01-02", "soon"), "retrieved"),
        (book(version="a b"), "letters"),
        (book().replace('"a page"', '""'), "source"),
        (book().split("prices:")[0] + "prices: []", "at least one model"),
        (book().replace("[n]", "n"), "aliases must be a list"),
        (book().replace("provider: anthropic", 'provider: ""'), "provider must be a name"),
        (book().replace("[n]", '[""]'), "name of 1-200"),
        ("versions: [v1]", "must be a mapping"),
        ("currency: EUR\n" + book(), "rated in USD"),
        (book() + book().replace("versions:\n", ""), "version v1"),
        (book() + book(version="v2").replace("versions:\n", ""), "effective_time"),
    ],
)
def test_doubtful_book_is_refused_in_a_sentence(text: str, sentence: str) -> None:
    """Whatever is wrong with the file, the message says where and what to write."""
    with pytest.raises(PriceBookRefused, match=sentence):
        parse_price_book(text)


async def test_price_book_in_force_is_answered(mesh: Mesh) -> None:
    """The version in force with every model's five prices, and no next one when none is known."""
    caller = mesh.inference
    response = await caller.channel.unary(caller.prices.GetPriceBook, pb.GetPriceBookRequest(), timeout_seconds=5)
    assert response.version == "2026-01"
    assert [price.model for price in response.prices] == [
        "claude-haiku-4-5",
        "claude-haiku-4-5-20251001",
        "claude-opus-4-6",
        "claude-sonnet-4-6",
    ]
    assert not response.HasField("next_effective_time")


async def test_outside_callers_read_the_price_book_with_their_key(mesh: Mesh) -> None:
    """A tenant's key with usage:read may read prices."""
    tenant = mesh.new_tenant()
    response = await mesh.outside.prices.GetPriceBook(
        pb.GetPriceBookRequest(), metadata=((keys.AUTHORIZATION, f"Bearer key-{tenant.id}"),), timeout=5
    )
    assert response.version == "2026-01"


async def test_versions_are_loaded_once_and_never_changed(postgres: PostgresStore, peers: Peers, tmp_path: Path) -> None:
    """Loading is idempotent; a stored version with other content, or another one of the same moment, is refused by name."""
    dsn = await postgres.fresh_database()
    path = tmp_path / "prices.yaml"
    for text, refusal in (
        (book(), None),
        (book(), None),
        (book().replace('"1.5"', '"1.6"'), "version v1 has other content"),
        (book(version="v2"), "version v2: another stored version"),
        ("nothing", "list `versions`"),
    ):
        path.write_text(text)
        settings = settings_for(dsn, peers, price_book_path=path)
        if refusal is None:
            await migrate_schema(settings)
        else:
            with pytest.raises(MigrationRefused, match=refusal):
                await migrate_schema(settings)
    with pytest.raises(MigrationRefused, match="cannot be read"):
        await migrate_schema(settings_for(dsn, peers, price_book_path=tmp_path / "absent.yaml"))


async def test_next_version_takes_over_at_its_time_and_old_calls_keep_theirs(postgres: PostgresStore, peers: Peers) -> None:
    """A call is billed by the version it was opened with, though a later one is in force when it is settled."""
    dsn = await postgres.fresh_database()
    await migrate_schema(settings_for(dsn, peers))
    async with asyncpg.create_pool(dsn, min_size=1, max_size=2) as admin:
        mesh = await running_mesh(dsn, peers, admin)
        try:
            tenant = mesh.new_tenant()
            call = await mesh.opened(tenant)
            soon = datetime.now(UTC) + timedelta(hours=1)
            text = book(version="dear", time=soon.isoformat()).replace("model: m", f"model: {MODEL}").replace('"1.5"', '"99"')
            loader = await JobsDatabase.open(dsn, max_size=1)
            assert [change.version.version for change in await load_price_book(loader, parse_price_book(text))] == ["dear"]
            await loader.close()
            caller = mesh.inference
            response = await caller.channel.unary(caller.prices.GetPriceBook, pb.GetPriceBookRequest(), timeout_seconds=5)
            assert response.version == "2026-01"
            assert response.next_effective_time.ToDatetime(tzinfo=UTC) == soon
            dear = await mesh.opened(tenant, price_version="dear")
            results = await mesh.settle(bill(call.ref, output_tokens=0), bill(dear.ref, output_tokens=0))
            assert [result.cost_nano_usd for result in results] == [100_000, 9_900_000]
        finally:
            await mesh.close()
