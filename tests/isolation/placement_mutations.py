"""The walls between tenants' places, taken down one at a time, and the tests that must notice."""

from tests.isolation.mutations import one

PLACES = "tests/isolation/test_places.py"
NOWHERE_ELSE = f"{PLACES}::test_a_placed_tenants_content_is_nowhere_else"
WHERE = "tests/kernel/test_placement.py::test_a_transaction_is_where_its_tenant_lives"
STALE = f"{PLACES}::test_the_shared_tables_refuse_who_lives_elsewhere"

_DATABASE = "services/kernel/tenant_database.py"


PLACEMENT_MUTATIONS = (
    one(
        "a bridge's search path is another tenant's",
        _DATABASE,
        "        schema = place.schema or self._home_schema\n",
        '        schema = self.__dict__.setdefault("_first", place.schema) if place.schema else self._home_schema\n',
        f"{NOWHERE_ELSE}[bridge-plain]",
    ),
    one(
        "a bridge's search path is nobody's",
        _DATABASE,
        "if place.kind is not PlacementKind.POOL:\n            begin += ",
        "if place.kind is PlacementKind.SILO:\n            begin += ",
        f"{WHERE}[bridge]",
    ),
    one(
        "a silo's tenant is served from the shared database",
        _DATABASE,
        "if place.kind is PlacementKind.SILO and self._silos is not None:",
        "if place.kind is PlacementKind.SILO and self._silos is None:",
        f"{WHERE}[silo]",
    ),
    one(
        "a transaction does not assert that its tenant is here",
        _DATABASE,
        "if walled and self._places is not None:",
        "if walled and self._places is not None and place.kind is None:",
        STALE,
    ),
    one(
        "inference's place refuses nobody who has left",
        "services/inference/migrations/0002_placement.sql",
        "        RAISE EXCEPTION 'the tenant lives elsewhere' USING ERRCODE = 'TM001';\n",
        "        NULL;\n",
        STALE,
    ),
    one(
        "retrieval's search does not assert that its tenant is here",
        "services/retrieval/migrations/0003_keys.sql",
        "    PERFORM retrieval.retrieval_assert_here(p_tenant_id);\n    RETURN QUERY",
        "    RETURN QUERY",
        STALE,
    ),
    one(
        "everybody may connect to a silo",
        "services/tenant/adapters/silo_maker.py",
        '            await connection.execute(f"REVOKE ALL ON DATABASE {name} FROM PUBLIC")\n',
        "",
        f"{PLACES}::test_the_shared_roles_do_not_enter_a_silo",
    ),
    one(
        "retrieval's place refuses nobody who has left",
        "services/retrieval/migrations/0002_placement.sql",
        "        RAISE EXCEPTION 'the tenant lives elsewhere' USING ERRCODE = 'TM001';\n",
        "        NULL;\n",
        STALE,
    ),
)
