"""The command line against a running service: what it prints, what it refuses, and the code it ends with."""

import csv
import io
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import grpc
import pytest

from devstack.certificates import DevelopmentCertificates
from mesh.metering.v1 import verification_service_pb2 as pb
from mesh.metering.v1 import verification_service_pb2_grpc
from tenantry.ctl.periods import Period, period_of
from tenantry.ctl.wrong_use import WrongUse
from tests.metering.billing import ended, use_tokens
from tests.metering.command_line import as_operator, as_tenant, run
from tests.metering.mesh import MODEL, Mesh, mesh_of_its_own
from tests.metering.peers import Peers
from tests.metering.verifying import busy_tenant, spoil
from tests.support.stores import PostgresStore


@pytest.fixture(scope="module")
async def mesh(postgres: PostgresStore, peers: Peers) -> AsyncIterator[Mesh]:
    """A service with few tenants: a walk of all of them takes as long as there are tenants."""
    async with mesh_of_its_own(postgres, peers) as running:
        yield running


async def test_usage_is_told_as_a_table_as_json_and_as_csv(mesh: Mesh) -> None:
    """The three forms hold the same rows; amounts are nano-USD but in the table, which has dollars."""
    tenant = mesh.new_tenant()
    await use_tokens(mesh, tenant, ended(2).start_time, [1_000, 500])
    month = f"--period={ended(2).start_time:%Y-%m}"
    told = {
        form: await as_tenant(mesh, tenant, "usage", month, "--group-by=model,user", f"--format={form}")
        for form in ("table", "json", "csv")
    }
    assert [answer.code for answer in told.values()] == [0, 0, 0]
    (row,) = json.loads(told["json"].out)
    assert (row["model"], row["user"], row["settled"], row["output_tokens"], row["cost_nano_usd"]) == (MODEL, "user-1", 2, 1_500, 7_500_000)
    (line,) = csv.DictReader(io.StringIO(told["csv"].out))
    assert line == {name: str(value) for name, value in row.items()}
    heads, cells = (text.split() for text in told["table"].out.splitlines())
    del line["cost_nano_usd"]
    assert dict(zip(heads, cells, strict=True)) == line | {"cost_usd": "0.0075"}


async def test_an_operator_asks_over_tenants_or_for_one(mesh: Mesh) -> None:
    """Without --tenant all are asked about, by tenant where wanted; with it that tenant, users and all."""
    tenant = mesh.new_tenant()
    await use_tokens(mesh, tenant, ended(2).start_time, [10])
    month = f"--period={ended(2).start_time:%Y-%m}"
    everybody = await as_operator(mesh, None, "usage", month, "--group-by=tenant", "--format=json")
    assert str(tenant.id) in {row["tenant_id"] for row in json.loads(everybody.out)}
    own = await as_operator(mesh, tenant, "usage", month, "--group-by=user", "--format=json")
    assert [row["user"] for row in json.loads(own.out)] == ["user-1"]


async def test_invoices_are_listed_shown_written_and_closed(mesh: Mesh, tmp_path: Path) -> None:
    """An operator closes a period; the tenant lists it, reads its lines and writes it to a file, whole or not at all."""
    tenant = await busy_tenant(mesh)
    start = f"--period-start={ended(1).start_time:%Y-%m-%d}"
    refused = await as_tenant(mesh, tenant, "invoice", "close", start)
    assert refused.code == 2 and "TENANTRY_OPERATOR_KEY" in refused.err
    closed = await as_operator(mesh, tenant, "invoice", "close", start)
    assert closed.code == 0, closed.err
    listed = json.loads((await as_tenant(mesh, tenant, "invoice", "list", "--format=json")).out)
    assert [row["number"] for row in listed] == [1, 2]
    shown = json.loads((await as_tenant(mesh, tenant, "invoice", "show", "1", "--format=json")).out)
    assert sum(row["amount_nano_usd"] for row in shown) == listed[0]["charges_nano_usd"]
    target = tmp_path / "one.html"
    written = await as_tenant(mesh, tenant, "invoice", "export", listed[0]["invoice_id"], "--format=html", f"--output={target}")
    assert written.code == 0 and target.read_text().startswith("<!DOCTYPE html>") and list(tmp_path.iterdir()) == [target]
    draft = await as_tenant(mesh, tenant, "invoice", "draft")
    assert draft.code == 0 and "due" in draft.out
    missing = await as_tenant(mesh, tenant, "invoice", "show", "9")
    assert missing.code == 2 and "invoice list" in missing.err


async def test_verify_ends_with_one_when_anything_differs(mesh: Mesh) -> None:
    """Books that agree: 0 and a count. A spoilt sum: 1, and a row with whose it is and both figures; over all tenants too."""
    tenant = await busy_tenant(mesh)
    good = await as_operator(mesh, tenant, "ledger", "verify")
    assert good.code == 0 and good.out.endswith(" figures compared, 0 differ\n"), good
    await spoil(mesh, "UPDATE metering.usage_rollups SET retries = 77 WHERE tenant_id = $1 AND grain = 5", tenant.id)
    for whose in (tenant, None):
        bad = await as_operator(mesh, whose, "ledger", "verify", "--format=json")
        (row,) = (row for row in json.loads(bad.out) if row["tenant_id"] == str(tenant.id))
        assert bad.code == 1 and (row["check"], row["figure"], row["stored"], row["recomputed"]) == ("usage_sum", "retries", "77", "0")


@pytest.mark.parametrize(
    ("arguments", "credentials", "code", "words"),
    [
        (["usage"], {}, 2, "set TENANTRY_API_KEY"),
        (["usage"], {"TENANTRY_API_KEY": "a", "TENANTRY_OPERATOR_KEY": "b"}, 2, "unset the one"),
        (["usage"], {"TENANTRY_OPERATOR_KEY": "b"}, 2, "--reason"),
        (["--reason=r", "invoice", "list"], {"TENANTRY_OPERATOR_KEY": "b"}, 2, "--tenant"),
        (["ledger", "verify"], {"TENANTRY_API_KEY": "a"}, 2, "TENANTRY_OPERATOR_KEY"),
        (["usage", "--group-by=colour"], {"TENANTRY_API_KEY": "a"}, 2, "prompt_version"),
        (["usage", "--period=2026-13"], {"TENANTRY_API_KEY": "a"}, 2, "2026-11"),
        (["--tls-cert=x", "usage"], {"TENANTRY_API_KEY": "a"}, 2, "--tls-ca"),
        (["usage"], {"TENANTRY_API_KEY": "a\n"}, 2, "TENANTRY_API_KEY holds"),
        (["--tenant=\u00fc", "--reason=r", "usage"], {"TENANTRY_OPERATOR_KEY": "b"}, 2, "--tenant holds"),
        (["--tls-ca=/nowhere/ca.pem", "usage"], {"TENANTRY_API_KEY": "a"}, 1, "/nowhere/ca.pem"),
        (["--address=127.0.0.1:1", "usage"], {"TENANTRY_API_KEY": "a"}, 1, "check --address"),
    ],
)
async def test_what_cannot_work_is_told_with_what_to_do(arguments: list[str], credentials: dict[str, str], code: int, words: str) -> None:
    """A wrong command ends with 2, a mesh that is not there with 1; one line says what to do, and no traceback follows."""
    answer = await run(*arguments, **credentials)
    assert answer.code == code and words in answer.err and answer.err.count("\n") == 1 and answer.out == ""


async def test_a_refusal_of_the_mesh_says_its_reason_and_what_to_do(mesh: Mesh) -> None:
    """The reason stands first, as programs know it, then the words, then advice."""
    answer = await run(f"--address={mesh.inference.address}", "invoice", "show", "no-id", TENANTRY_API_KEY=f"key-{mesh.new_tenant().id}")
    assert answer.code == 1 and answer.err.startswith("tenantctl: INVALID_REQUEST: ") and "invoice_id" in answer.err


def test_periods_are_what_people_type() -> None:
    """A month, two dates, the last days; of UTC, half open."""
    now = datetime(2026, 3, 5, 12, tzinfo=UTC)

    def read(**given: str) -> Period:
        options = {"period": None, "start": None, "end": None, "last": None} | given
        return period_of(type("Options", (), options)(), now)  # type: ignore[arg-type] # what it reads of the arguments

    assert read() == Period(None, None)
    assert read(period="2025-12") == Period(datetime(2025, 12, 1, tzinfo=UTC), datetime(2026, 1, 1, tzinfo=UTC))
    assert read(start="2026-01-01", end="2026-01-02T01:00:00+01:00") == Period(
        datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 2, tzinfo=UTC)
    )
    assert read(last="2d") == Period(datetime(2026, 3, 3, 12, tzinfo=UTC), now)
    for wrong in (
        {"last": "0d"},
        {"last": "x"},
        {"start": "x"},
        {"start": "2026-02-01", "end": "2026-02-01"},
        {"period": "2026-01", "last": "1d"},
    ):
        with pytest.raises(WrongUse):
            read(**wrong)


class Ledger(verification_service_pb2_grpc.VerificationServiceServicer):
    """Books without a tenant in them."""

    async def VerifyLedger(self, request: pb.VerifyLedgerRequest, context: object) -> pb.VerifyLedgerResponse:
        return pb.VerifyLedgerResponse()


async def test_a_mesh_on_tls_is_called_with_a_certificate(tmp_path: Path) -> None:
    """With an authority and a certificate of its own; without the certificate the handshake fails, without an authority nobody answers."""
    certificates = DevelopmentCertificates(tmp_path)
    certificates.renew()
    own, leaf = certificates.files("metering"), certificates.files("client")
    pair = [(own.key.read_bytes(), own.certificate.read_bytes())]
    trust = grpc.ssl_server_credentials(pair, own.authorities.read_bytes(), require_client_auth=True)
    server = grpc.aio.server()
    verification_service_pb2_grpc.add_VerificationServiceServicer_to_server(Ledger(), server)
    port = server.add_secure_port("127.0.0.1:0", trust)
    await server.start()
    try:
        command = [f"--address=localhost:{port}", "--reason=audit", "--timeout=10"]
        with_ca = [f"--tls-ca={leaf.authorities}"]
        with_leaf = [f"--tls-cert={leaf.certificate}", f"--tls-key={leaf.key}"]
        told = [
            await run(*command, *options, "ledger", "verify", TENANTRY_OPERATOR_KEY="op")
            for options in ([*with_ca, *with_leaf], with_ca, [])
        ]
    finally:
        await server.stop(0)
    assert [answer.code for answer in told] == [0, 1, 1], told
    assert told[0].out == "0 tenants, 0 figures compared, 0 differ\n" and "with TLS" in told[1].err and "--tls-ca" in told[2].err
