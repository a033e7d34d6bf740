"""Billing plans: read from a file that says everything, loaded once, never changed, and shown before they are."""

import asyncio
import dataclasses
from datetime import UTC, datetime, timedelta
from pathlib import Path

import asyncpg
import pytest
import yaml

from services.kernel.migrate import MigrationRefused
from services.kernel.tenant_database import JobsDatabase
from services.metering.adapters.postgres_billing_plans import billing_plan_changes, load_billing_plans
from services.metering.app.loading import migrate_schema, preview_billing_plans
from services.metering.billing.plan_file import BillingPlansRefused, parse_billing_plans
from services.metering.billing.terms import BillingTerms, PlanVersion
from services.metering.billing.tiers import Graduated, Package, PerUnit, Tier, Volume
from services.metering.settings import PACKAGED_BILLING_PLANS
from services.tenant.app import PLAN_FILE
from tests.metering.mesh import Mesh, settings_for
from tests.metering.peers import Peers

USD = 1_000_000_000
FUTURE = datetime(2099, 1, 1, tzinfo=UTC)


def file_of(charge: str = "{meter: ai_interviews, unit: {price: '1.50'}}", *, plan: str = "custom", **whole: str) -> str:
    """A file of one plan with one charge; `whole` are further lines of the version."""
    more = "".join(f"\n    {name}: {text}" for name, text in whole.items())
    return f"""
currency: USD
versions:
  - plan: {plan}
    version: "1"
    effective_time: "2026-01-01T00:00:00Z"
    charges: [{charge}]{more}
"""


def test_every_plan_on_offer_has_terms() -> None:
    """The packaged file bills exactly the plans of the tenant service."""
    offered = {plan["name"] for plan in yaml.safe_load(PLAN_FILE.read_text())["plans"]}
    assert {version.plan for version in parse_billing_plans(PACKAGED_BILLING_PLANS.read_text())} == offered


@pytest.mark.parametrize(
    ("charge", "pricing"),
    [
        ("{meter: m, unit: {price: '1.50'}}", PerUnit(3 * USD // 2 * 10**6)),
        ("{meter: calls.tokens, unit: {price: '5.00', per: 100_000}}", PerUnit(50 * USD)),
        ("{meter: calls.cost_nano_usd, unit: {price: '1.20', per: 1_000_000_000}}", PerUnit(1_200_000)),
        ("{meter: m, package: {size: 60, price: '0.10'}}", Package(60, USD // 10)),
        ("{meter: m, graduated: [{up_to: 5, price: '2'}, {price: '1'}]}", Graduated((Tier(5, 2 * USD * 10**6), Tier(None, USD * 10**6)))),
        ("{meter: m, volume: [{price: '0'}]}", Volume((Tier(None, 0),))),
    ],
)
def test_prices_become_exact_integers(charge: str, pricing: object) -> None:
    """Dollars for some units become nano-dollars for a million, without a float."""
    (version,) = parse_billing_plans(file_of(charge))
    assert version.terms.charges[0].pricing == pricing


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "not YAML"),
        ("[]", "the file holds currency, versions"),
        (file_of().replace("USD", "EUR"), "everything is billed in USD"),
        (file_of("{meter: m, unit: {price: 1.5}}"), "write dollars as text"),
        (file_of("{meter: m, unit: {price: '-1'}}"), "write dollars as text"),
        (file_of("{meter: m, unit: {price: NaN}}"), "write dollars as text"),
        (file_of("{meter: m, unit: {price: '0.0000000001'}}"), "write dollars as text"),
        (file_of("{meter: m, unit: {price: '1', per: 7}}"), "no whole number"),
        (file_of("{meter: m, unit: {price: '1'}, package: {size: 1, price: '1'}}"), "exactly one of"),
        (file_of("{meter: m}"), "exactly one of"),
        (file_of("{meter: calls.words, unit: {price: '1'}}"), "must be named like"),
        (file_of("{meter: m, included: -1, unit: {price: '1'}}"), "whole number from 0"),
        (file_of("{meter: m, included: true, unit: {price: '1'}}"), "whole number from 0"),
        (file_of("{meter: m, package: {size: 0, price: '1'}}"), "whole number from 1"),
        (file_of("{meter: m, graduated: [{up_to: 5, price: '2'}, {up_to: 4, price: '2'}, {price: '1'}]}"), "must rise"),
        (file_of("{meter: m, volume: []}"), "at least 1"),
        (file_of("{meter: m, volume: [{up_to: 5, price: '2'}]}"), "a tier holds price"),
        (file_of("{meter: m, unit: {price: '1'}}, {meter: m, unit: {price: '1'}}"), "occurs twice"),
        (file_of(plan="Free"), "small letters"),
        (file_of(minimum="-5"), "write dollars as text"),
        (file_of(discounts="[{name: d, basis_points: 10_001}]"), "at most 10000"),
        (file_of(discounts="[{name: d, basis_points: 1, amount: '1'}]"), "either basis_points or amount"),
        (file_of(fees="[{name: base, price: '1', per: 2}]"), "a fee holds name, price"),
        (file_of(note="x"), "a version holds"),
        (file_of().replace("00:00Z", "00:00"), "whole second with its zone"),
        (file_of().replace("00:00Z", "00:00.5Z"), "whole second with its zone"),
    ],
)
def test_doubtful_files_are_refused_in_words(text: str, said: str) -> None:
    """Whatever is wrong is named with its place; nothing is guessed."""
    with pytest.raises(BillingPlansRefused, match=said):
        parse_billing_plans(text)


@pytest.fixture
async def owner(ledger_dsn: str, mesh: Mesh) -> JobsDatabase:
    """The migrating administrator's connection."""
    database = await JobsDatabase.open(ledger_dsn, max_size=1, application_name="test-billing-plans")
    yield database
    await database.close()


def version(plan: str, name: str, time: datetime, minimum: int = 0) -> PlanVersion:
    """A version of a plan."""
    return PlanVersion(plan, name, time, BillingTerms(minimum_nano_usd=minimum))


async def test_versions_are_added_and_never_changed(owner: JobsDatabase, admin: asyncpg.Pool) -> None:
    """Loading again adds nothing; a stored version with other content, or a new one that begins in the past, is refused whole."""
    first = version("growing", "1", datetime(2026, 1, 1, tzinfo=UTC))
    later = version("growing", "2", FUTURE)
    assert [change.version for change in await load_billing_plans(owner, [first])] == [first]
    assert await load_billing_plans(owner, [first]) == []
    assert [change.version for change in await billing_plan_changes(owner, [first, later])] == [later]
    changed = dataclasses.replace(first, terms=BillingTerms(minimum_nano_usd=1))
    backdated = version("growing", "0", datetime.now(UTC) - timedelta(hours=1))
    for wanted, said in (([later, changed], "other content"), ([later, backdated], "would change what was billed")):
        with pytest.raises(BillingPlansRefused, match=said):
            await load_billing_plans(owner, wanted)
    stored = "SELECT version FROM metering.billing_plan_versions WHERE plan = 'growing' ORDER BY version"
    assert [row["version"] for row in await admin.fetch(stored)] == ["1"]
    assert [change.version for change in await load_billing_plans(owner, [first, later])] == [later]


async def test_a_preview_says_what_migrate_would_load_and_loads_nothing(
    ledger_dsn: str, mesh: Mesh, peers: Peers, tmp_path: Path, admin: asyncpg.Pool
) -> None:
    """A line for each new version; a file that would be refused is refused in the same words."""
    path = tmp_path / "plans.yaml"
    settings = settings_for(ledger_dsn, peers, billing_plans_path=path)

    async def preview() -> str:
        return await asyncio.to_thread(preview_billing_plans, settings)

    path.write_text(file_of(plan="previewed"))
    assert await preview() == "previewed 1: first version of the plan"
    assert await admin.fetchval("SELECT count(*) FROM metering.billing_plan_versions WHERE plan = 'previewed'") == 0
    await migrate_schema(settings)
    assert await preview() == "nothing would change: every version is loaded"
    path.write_text(file_of("{meter: other, unit: {price: '1'}}", plan="previewed"))
    for refused in (preview(), migrate_schema(settings)):
        with pytest.raises(MigrationRefused, match="other content"):
            await refused
    path.unlink()
    with pytest.raises(MigrationRefused, match="cannot be read"):
        await preview()
