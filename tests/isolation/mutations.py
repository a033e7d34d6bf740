"""The walls that are taken down, one at a time, and the tests that must notice. Where two walls stand, each is watched alone."""

from dataclasses import dataclass

STORES = "tests/isolation/test_stores.py"
CALLERS = "tests/isolation/test_callers.py"
CREDENTIALS = "tests/isolation/test_credentials.py"
WALLS = "tests/isolation/test_each_wall_alone.py"
RULES = f"{STORES}::test_every_schema_keeps_the_isolation_rules"
# One of the two ways of setting a tenant is enough to notice.
REACHES = f"{STORES}::test_a_service_role_reaches_only_the_tenant_that_is_set[transaction-plain]"

_OWN = "(tenant_id = (SELECT current_setting('app.tenant_id')::uuid))"
_OWN_ON_TWO_LINES = f"\n    USING {_OWN}\n    WITH CHECK {_OWN}"
_EVERYBODYS = " USING (true) WITH CHECK (true)"


@dataclass(frozen=True, slots=True)
class Edit:
    """A text that stands in a file exactly once, and what is put in its place."""

    path: str
    find: str
    put: str


@dataclass(frozen=True, slots=True)
class Mutation:
    """One wall taken down."""

    name: str
    tests: tuple[str, ...]
    edits: tuple[Edit, ...]


def one(name: str, path: str, find: str, put: str, *tests: str) -> Mutation:
    """A wall that stands in one place."""
    return Mutation(name, tests, (Edit(path, find, put),))


_INFERENCE = "services/inference/migrations/0001_prompts_and_conversations.sql"
_METERING = "services/metering/migrations/0002_ledger.sql"
_RETRIEVAL = "services/retrieval/migrations/0001_documents.sql"
_TENANT = "services/tenant/migrations/0001_tenants.sql"
_AUDIT = "services/tenant/migrations/0009_audit.sql"
_OUTBOX = "services/inference/migrations/0004_audit.sql"
_AUTH = "services/kernel/rpc/auth.py"
_POLICY = "services/kernel/rpc/policy.py"
_TOKENS = "services/kernel/context_token.py"
_RECORD_PROOF = "ProvenRecord(item, context.subject, source) if context.tenant_id == item.tenant_id else None"

_POLICIES = (
    one(
        "policy of inference.conversations lets everybody through",
        _INFERENCE,
        f"CREATE POLICY conversations_of_tenant ON inference.conversations TO :service{_OWN_ON_TWO_LINES}",
        f"CREATE POLICY conversations_of_tenant ON inference.conversations TO :service{_EVERYBODYS}",
        REACHES,
    ),
    one(
        "policy of metering.entries lets everybody through",
        _METERING,
        f"CREATE POLICY own_tenant ON entries TO :service\n    USING {_OWN} WITH CHECK {_OWN}",
        f"CREATE POLICY own_tenant ON entries TO :service{_EVERYBODYS}",
        REACHES,
    ),
    one(
        "policy of metering.events lets everybody through",
        "services/metering/migrations/0010_events.sql",
        f"CREATE POLICY own_tenant ON events TO :service\n    USING {_OWN} WITH CHECK {_OWN}",
        f"CREATE POLICY own_tenant ON events TO :service{_EVERYBODYS}",
        REACHES,
    ),
    one(
        "policy of retrieval.chunks lets everybody through",
        _RETRIEVAL,
        f"CREATE POLICY tenant_only ON chunks TO :service{_OWN_ON_TWO_LINES}",
        f"CREATE POLICY tenant_only ON chunks TO :service{_EVERYBODYS}",
        REACHES,
    ),
    one(
        "policy of tenant.audit_documents lets everybody through",
        _AUDIT,
        f"CREATE POLICY tenant_isolation ON tenant.audit_documents{_OWN_ON_TWO_LINES}",
        f"CREATE POLICY tenant_isolation ON tenant.audit_documents{_EVERYBODYS}",
        REACHES,
    ),
    one(
        "tenant.users has no row-level security",
        _TENANT,
        "ARRAY['tenants', 'users', 'api_keys',",
        "ARRAY['tenants', 'api_keys',",
        REACHES,
    ),
    one(
        "row-level security of inference.turns is not forced",
        _INFERENCE,
        "ALTER TABLE inference.turns FORCE ROW LEVEL SECURITY;\n",
        "",
        RULES,
    ),
    one(
        "inference.recall runs as its owner",
        "services/inference/migrations/0003_keys.sql",
        "call_positions integer[]\n)\nLANGUAGE plpgsql SECURITY INVOKER",
        "call_positions integer[]\n)\nLANGUAGE plpgsql SECURITY DEFINER",
        RULES,
    ),
    one(
        "the relay's role may rewrite the audit outbox",
        _OUTBOX,
        "GRANT UPDATE (due_time, send_count) ON",
        "GRANT UPDATE ON",
        f"{STORES}::test_the_jobs_role_does_its_jobs_and_nothing_else",
    ),
    one(
        "the service may update and delete audit records",
        _TENANT,
        "GRANT SELECT, INSERT ON tenant.audit TO :service;",
        "GRANT SELECT, INSERT, UPDATE, DELETE ON tenant.audit TO :service;",
        f"{WALLS}::test_changing_what_was_recorded_is_not_granted",
    ),
    one(
        "no trigger guards audit records",
        _AUDIT,
        "CREATE TRIGGER audit_is_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON tenant.audit\n",
        "CREATE TRIGGER audit_is_append_only BEFORE TRUNCATE ON tenant.audit\n",
        f"{WALLS}::test_a_trigger_alone_refuses_to_change_what_was_recorded",
    ),
)

_FILTERS = (
    one(
        "a statement forgets its tenant",
        "services/inference/adapters/postgres.py",
        'DELETE_CONVERSATION = "DELETE FROM conversations WHERE tenant_id = $1 AND conversation_id = $2"',
        'DELETE_CONVERSATION = "DELETE FROM conversations WHERE $1::uuid IS NOT NULL AND conversation_id = $2"',
        "tests/contract/test_house.py::test_every_statement_on_tenant_data_names_the_tenant",
    ),
    Mutation(
        "retrieval finds chunks by id alone, and the policies look away",
        (REACHES, RULES),
        (
            Edit(
                "services/retrieval/migrations/0003_keys.sql",
                "WHERE c.tenant_id = p_tenant_id AND c.chunk_id = ANY (p_chunk_ids)\n",
                "WHERE c.chunk_id = ANY (p_chunk_ids)\n",
            ),
            Edit(
                _RETRIEVAL,
                f"CREATE POLICY tenant_only ON documents TO :service{_OWN_ON_TWO_LINES}",
                f"CREATE POLICY tenant_only ON documents TO :service{_EVERYBODYS}",
            ),
            Edit(
                _RETRIEVAL,
                f"CREATE POLICY tenant_only ON chunks TO :service{_OWN_ON_TWO_LINES}",
                f"CREATE POLICY tenant_only ON chunks TO :service{_EVERYBODYS}",
            ),
        ),
    ),
    one(
        "a transaction's tenant outlives it",
        "services/kernel/tenant_database.py",
        "SELECT set_config('app.tenant_id', '{UUID(int=tenant_id.int)}', true)",
        "SELECT set_config('app.tenant_id', '{UUID(int=tenant_id.int)}', false)",
        f"{WALLS}::test_a_connection_keeps_no_tenant",
    ),
    one(
        "searches use the key with every right",
        "services/retrieval/adapters/qdrant.py",
        'token: Metadata = (("api-key", self._tokens.mint(name, "r")),)',
        "token: Metadata = self._admin",
        f"{WALLS}::test_the_collections_token_alone_names_one_collection",
    ),
    one(
        "hits of other tenants are not dropped",
        "services/retrieval/library.py",
        "own = [hit for hit in hits if hit.tenant_id == tenant_id]",
        "own = list(hits)",
        f"{WALLS}::test_the_library_alone_drops_points_of_other_tenants",
    ),
    one(
        "Redis keys are not the tenant's own",
        "services/ratelimit/adapters/tenant_scripts.py",
        'return f"{{{uuid_text(tenant_id)}}}:"',
        'return "{shared}:"',
        "tests/isolation/test_key_stores.py::test_every_redis_key_is_a_known_tenants",
    ),
    one(
        "a page token is good for any list",
        "services/kernel/paging.py",
        "or check != _check(listing, body) or",
        "or",
        f"{WALLS}::test_a_page_token_is_good_for_its_own_list_alone",
    ),
)

_IDENTITIES = (
    one(
        "x-tenant-id is not compared",
        _AUTH,
        "if claimed is not None and claimed != tenant.tenant_id:",
        "if False and claimed != tenant.tenant_id:",
        f"{CALLERS}::test_a_token_of_another_tenant_than_named_is_refused",
    ),
    one(
        "a context token beside a credential is overlooked",
        _AUTH,
        "        if keys.TENANT_CONTEXT in call.metadata:\n            raise",
        "        if keys.TENANT_CONTEXT in ():\n            raise",
        f"{CREDENTIALS}::test_a_real_context_is_worth_nothing_outside",
    ),
    one(
        "metadata may be said twice",
        _AUTH,
        "            keys.refuse_malformed(call.raw_metadata)\n",
        "",
        f"{CREDENTIALS}::test_metadata_said_twice_is_refused",
    ),
    one(
        "context signatures are not verified",
        _TOKENS,
        "        try:\n            key.verify(signature, payload)\n        except InvalidSignature:\n"
        "            raise _invalid() from None\n        context",
        "        del key, signature\n        context",
        f"{CREDENTIALS}::test_a_forged_context_convinces_no_rpc",
    ),
    one(
        "context tokens do not end",
        _TOKENS,
        "if expires <= now or issued > now",
        "if issued > now",
        f"{CREDENTIALS}::test_a_forged_context_convinces_no_rpc",
    ),
    one(
        "a service's bearer is not compared",
        "services/kernel/rpc/identity.py",
        "if not hmac.compare_digest(digest, expected or bytes(32)) or expected is None:",
        "if digest is None or expected is None:",
        f"{CALLERS}::test_a_services_bearer_speaks_for_no_other_service",
    ),
    one(
        "a key's secret is not compared",
        "services/tenant/authentication.py",
        "if not proven or stored.revoke_time is not None:",
        "if stored.revoke_time is not None:",
        f"{CREDENTIALS}::test_every_bad_credential_is_refused_in_the_same_words",
    ),
    one(
        "a JWT's signature is not verified",
        "services/tenant/jwt_proof.py",
        "if key is None or not key.verify(token, Algorithm(token.algorithm)):",
        "if key is None:",
        f"{CREDENTIALS}::test_a_forged_jwt_convinces_no_rpc",
    ),
    one(
        "the tenant a host names is not compared",
        "services/tenant/authentication.py",
        "        if named - {grant.tenant_id}:\n            raise",
        "        if named is None:\n            raise",
        f"{CREDENTIALS}::test_a_name_of_another_tenant_beside_a_key_is_refused",
    ),
    one(
        "a revoked key goes on",
        "services/tenant/authentication.py",
        "if not proven or stored.revoke_time is not None:",
        "if not proven:",
        f"{CREDENTIALS}::test_every_bad_credential_is_refused_in_the_same_words",
    ),
)

_RIGHTS = (
    one(
        "any service may call any method",
        _POLICY,
        "if call.caller not in policy.callers:",
        "if not policy.callers:",
        f"{CALLERS}::test_a_service_cannot_use_what_is_for_others",
    ),
    one(
        "scopes are not asked for",
        _POLICY,
        "            if wanted not in held:",
        "            if not wanted:",
        f"{CALLERS}::test_a_key_reaches_only_its_scopes",
    ),
    one(
        "the policy lets an operator act without a reason",
        _POLICY,
        "if not 1 <= len(reason) <= _MAX_REASON_LENGTH:",
        "if reason is None:",
        f"{WALLS}::test_the_policy_alone_asks_an_operator_for_a_reason",
    ),
    one(
        "authentication lets an operator act without a reason",
        "services/tenant/authentication.py",
        "if not 1 <= len(reason) <= MAX_REASON_LENGTH:",
        "if reason is None:",
        f"{WALLS}::test_authentication_alone_asks_an_operator_for_a_reason",
    ),
    one(
        "operator methods are for every tenant",
        _POLICY,
        "            if call.tenant is None or not call.tenant.operator:\n",
        "            if call.tenant is None:\n",
        f"{CALLERS}::test_operator_methods_are_for_operators_who_say_why",
    ),
    one(
        "batch methods take a tenant",
        _POLICY,
        "            if call.caller != EXTERNAL:\n                _refuse_tenant_metadata(call)",
        "            pass",
        f"{CALLERS}::test_batch_methods_take_no_tenant_of_their_own",
    ),
    one(
        "a method for a tenant runs without one",
        _POLICY,
        "            _refuse_without_tenant(call)\n",
        "            pass\n",
        f"{CREDENTIALS}::test_the_right_service_needs_a_proven_tenant",
    ),
    one(
        "calls are opened without proof of their tenant",
        "services/metering/tenant_proof.py",
        "return context.tier if context.tenant_id is not None and context.tenant_id.bytes == tenant_id else None",
        "return context.tier if context.tenant_id is not None else None",
        "tests/isolation/test_batches.py::test_a_batch_opens_only_what_its_own_token_proves",
    ),
    one(
        "audit records are taken without proof of their tenant",
        "services/tenant/audit_log.py",
        _RECORD_PROOF,
        "ProvenRecord(item, context.subject, source)",
        f"{WALLS}::test_an_audit_record_needs_its_own_tenants_token",
    ),
)

MUTATIONS = (*_POLICIES, *_FILTERS, *_IDENTITIES, *_RIGHTS)
