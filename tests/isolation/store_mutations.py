"""More walls of the stores, taken down one at a time: what may be written, by which role, and what a stored value is bound to."""

from pathlib import Path

from tests.isolation.mutations import REACHES, RULES, STORES, WALLS, Mutation, one

HOUSE = "tests/contract/test_house.py::test_every_statement_on_tenant_data_names_the_tenant"
TOKENS = f"{WALLS}::test_the_collections_token_alone_names_one_collection"
BOOKS = f"{STORES}::test_the_jobs_role_cannot_rewrite_the_books"
NOT_GRANTED = f"{WALLS}::test_changing_what_was_recorded_is_not_granted"
TRIGGERS = f"{WALLS}::test_a_trigger_alone_refuses_to_change_what_was_recorded"
SEALED = "tests/kernel/test_tenant_cipher.py::test_a_moved_value_opens_nowhere_else"

_OWN = "(tenant_id = (SELECT current_setting('app.tenant_id')::uuid))"
_INFERENCE = "services/inference/migrations/0001_prompts_and_conversations.sql"
_METERING = "services/metering/migrations/0002_ledger.sql"
_ROOT = Path(__file__).parents[2]
_EXPORTS = next(str(path.relative_to(_ROOT)) for path in (_ROOT / "services/metering/migrations").glob("*_exports.sql"))
_RETRIEVAL = "services/retrieval/migrations/0001_documents.sql"
_AUDIT = "services/tenant/migrations/0009_audit.sql"
_MOVES = "services/tenant/migrations/0006_placement.sql"
_KEY_STORE = "services/tenant/key_store_migrations/0001_data_keys.sql"
_MIGRATE = "services/kernel/migrate.py"
_QDRANT = "services/retrieval/adapters/qdrant.py"
_QDRANT_TOKEN = "services/retrieval/adapters/qdrant_token.py"
_SEALING = "services/kernel/sealing.py"


def _open_for_writing(table: str, path: str, policy: str, between: str = "\n    ") -> Mutation:
    """Reads stay the tenant's own; rows may be written into any tenant."""
    found = f"CREATE POLICY {policy}\n    USING {_OWN}{between}WITH CHECK "
    return one(f"rows of {table} may be written into any tenant", path, f"{found}{_OWN}", f"{found}(true)", REACHES)


_WRITING = (
    _open_for_writing("inference.prompts", _INFERENCE, "prompts_of_tenant ON inference.prompts TO :service"),
    _open_for_writing("metering.calls", _METERING, "own_tenant ON calls TO :service", " "),
    _open_for_writing(
        "metering.event_claims", "services/metering/migrations/0010_events.sql", "own_tenant ON event_claims TO :service", " "
    ),
    _open_for_writing("metering.stripe_customers", _EXPORTS, "own_tenant ON stripe_customers TO :service", " "),
    _open_for_writing("retrieval.documents", _RETRIEVAL, "tenant_only ON documents TO :service"),
    _open_for_writing("tenant.provider_keys", "services/tenant/migrations/0008_keys.sql", "tenant_isolation ON tenant.provider_keys"),
    one(
        "a policy forgives that no tenant is set",
        _INFERENCE,
        f"CREATE POLICY turns_of_tenant ON inference.turns TO :service\n    USING {_OWN}",
        "CREATE POLICY turns_of_tenant ON inference.turns TO :service\n"
        "    USING (tenant_id = (SELECT current_setting('app.tenant_id', true)::uuid))",
        f"{STORES}::test_without_a_tenant_there_are_errors_and_no_rows",
    ),
    one(
        "a directory's entries are anybody's to remove",
        _MOVES,
        f"CREATE POLICY tenant_removal ON tenant.move_directory FOR DELETE TO :service\n    USING {_OWN}",
        "CREATE POLICY tenant_removal ON tenant.move_directory FOR DELETE TO :service\n    USING (true)",
        REACHES,
    ),
    one(
        "a directory's entries are anybody's to make",
        _MOVES,
        f"CREATE POLICY tenant_entry ON tenant.move_directory FOR INSERT TO :service\n    WITH CHECK {_OWN}",
        "CREATE POLICY tenant_entry ON tenant.move_directory FOR INSERT TO :service\n    WITH CHECK (true)",
        REACHES,
    ),
    one(
        "policies of the key store let everybody through",
        _KEY_STORE,
        "USING (tenant_id = (SELECT current_setting(''app.tenant_id'')::uuid)) '\n"
        "            'WITH CHECK (tenant_id = (SELECT current_setting(''app.tenant_id'')::uuid))'",
        "USING (true) '\n            'WITH CHECK (true)'",
        f"{STORES}::test_the_key_store_keeps_the_isolation_rules",
    ),
    one(
        "an index of every tenant's rows by time",
        _METERING,
        "calls_unresolved ON calls (tenant_id, unresolved_time)",
        "calls_unresolved ON calls (unresolved_time, tenant_id)",
        RULES,
    ),
)

_ROLES = (
    one("roles get around row-level security", _MIGRATE, "NOSUPERUSER NOBYPASSRLS", "NOSUPERUSER BYPASSRLS", REACHES),
    one("whoever owns the tables may log in", _MIGRATE, "{'LOGIN' if login else 'NOLOGIN'}", "LOGIN{'' if login else ''}", RULES),
    one(
        "the sweep may write settlements",
        _METERING,
        "ON entries FOR INSERT TO :jobs WITH CHECK (kind = 2)",
        "ON entries FOR INSERT TO :jobs WITH CHECK (true)",
        BOOKS,
    ),
    one(
        "the sweep may prolong leases",
        _METERING,
        "ON call_leases TO :jobs USING (true) WITH CHECK (false)",
        "ON call_leases TO :jobs USING (true) WITH CHECK (true)",
        BOOKS,
    ),
    one(
        "the repairing job may read documents",
        _RETRIEVAL,
        "GRANT SELECT (tenant_id, document_id, content_sha256, indexed, update_time) ON documents TO :jobs;",
        "GRANT SELECT ON documents TO :jobs;",
        f"{STORES}::test_the_repairing_job_reads_no_contents",
    ),
    one(
        "the service may update and delete ledger entries",
        _METERING,
        "GRANT SELECT, INSERT ON entries TO :service;",
        "GRANT SELECT, INSERT, UPDATE, DELETE ON entries TO :service;",
        NOT_GRANTED,
    ),
    one(
        "the service may update and delete what was seen",
        _AUDIT,
        "GRANT SELECT, INSERT ON tenant.audit_documents TO :service;",
        "GRANT SELECT, INSERT, UPDATE, DELETE ON tenant.audit_documents TO :service;",
        NOT_GRANTED,
    ),
    one(
        "no trigger guards ledger entries",
        _METERING,
        "CREATE TRIGGER entries_are_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON entries",
        "CREATE TRIGGER entries_are_append_only BEFORE TRUNCATE ON entries",
        TRIGGERS,
    ),
    one(
        "no trigger guards what was seen",
        _AUDIT,
        "CREATE TRIGGER audit_documents_are_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON",
        "CREATE TRIGGER audit_documents_are_append_only BEFORE TRUNCATE ON",
        TRIGGERS,
    ),
)

_STATEMENTS = (
    one(
        "a statement of retrieval forgets its tenant",
        "services/retrieval/adapters/postgres.py",
        'DELETE_CHUNKS = "DELETE FROM chunks WHERE tenant_id = $1 AND document_id = $2"',
        'DELETE_CHUNKS = "DELETE FROM chunks WHERE $1::uuid IS NOT NULL AND document_id = $2"',
        HOUSE,
    ),
    one(
        "a statement of metering forgets its tenant",
        "services/metering/adapters/postgres_usage.py",
        'SELECT_ATTEMPTS = _RECORD + "WHERE tenant_id = $1 AND call_id = $2 ORDER',
        'SELECT_ATTEMPTS = _RECORD + "WHERE $1::uuid IS NOT NULL AND call_id = $2 ORDER',
        HOUSE,
    ),
    one(
        "a statement of tenant forgets its tenant",
        "services/tenant/adapters/postgres_issuers.py",
        'DELETE_ISSUER = "DELETE FROM tenant.issuers WHERE tenant_id = $1 AND issuer_id = $2 RETURNING',
        'DELETE_ISSUER = "DELETE FROM tenant.issuers WHERE $1::uuid IS NOT NULL AND issuer_id = $2 RETURNING',
        HOUSE,
    ),
    one(
        "a statement runs without naming its tenant",
        "services/kernel/tenant_database.py",
        "    if tenant_id is not None and tenant_id not in args:\n",
        "    if tenant_id is not None and tenant_id is None:\n",
        "tests/kernel/test_tenant_database.py",
    ),
)

_POINTS = (
    one(
        "writes of points use the key with every right",
        _QDRANT,
        'token: Metadata = (("api-key", self._tokens.mint(alias_name(tenant_id), "rw")),)',
        "token: Metadata = self._admin",
        TOKENS,
    ),
    one(
        "a token for points names no collection",
        _QDRANT_TOKEN,
        '"access": [{"collection": collection, "access": access}]',
        '"access": access',
        TOKENS,
    ),
    one("a token for searching may write", _QDRANT, 'self._tokens.mint(name, "r")', 'self._tokens.mint(name, "rw")', TOKENS),
    one(
        "a token for points does not end",
        _QDRANT_TOKEN,
        '{"exp": time.time_ns() // 1_000_000_000 + LIFETIME_SECONDS, "access"',
        '{"access"',
        TOKENS,
    ),
    one(
        "points do not carry their tenant",
        _QDRANT,
        "{TENANT_FIELD: _text(str(tenant_id)), DOCUMENT_FIELD: _text(str(document_id))}",
        "{TENANT_FIELD: _text(str(document_id)), DOCUMENT_FIELD: _text(str(document_id))}",
        f"{WALLS}::test_each_point_is_written_with_its_own_tenant",
    ),
)

_SECRETS = (
    one(
        "a sealed value is any tenant's who has its key",
        _SEALING,
        "return header + self.tenant_id.bytes + identity",
        "return header + identity",
        SEALED,
    ),
    one(
        "a sealed value fits any row and column",
        _SEALING,
        "return header + self.tenant_id.bytes + identity",
        "return header + self.tenant_id.bytes",
        SEALED,
    ),
    one(
        "a sealed value may claim another key version",
        _SEALING,
        "return header + self.tenant_id.bytes + identity",
        "return self.tenant_id.bytes + identity",
        "tests/kernel/test_tenant_cipher.py::test_no_altered_value_opens",
        "tests/kernel/test_tenant_cipher.py::test_the_version_is_authenticated",
    ),
    one(
        "a wrapped data key is any tenant's",
        "services/tenant/data_keys.py",
        'row_identity("data_key", tenant_id.bytes, str(version))',
        'row_identity("data_key", str(version))',
        "tests/tenant/test_data_keys.py::test_a_stored_key_is_wrapped_and_bound_to_its_tenant",
    ),
)

STORE_MUTATIONS = (*_WRITING, *_ROLES, *_STATEMENTS, *_POINTS, *_SECRETS)
