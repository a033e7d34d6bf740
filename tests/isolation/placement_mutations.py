"""The walls between tenants' places, taken down one at a time, and the tests that must notice."""

from tests.isolation.mutations import Edit, Mutation

PLACES = "tests/isolation/test_places.py"
NOWHERE_ELSE = f"{PLACES}::test_a_placed_tenants_content_is_nowhere_else"
STALE = f"{PLACES}::test_the_shared_tables_refuse_who_lives_elsewhere"

_DATABASE = "services/kernel/tenant_database.py"


def _one(name: str, path: str, find: str, put: str, *tests: str) -> Mutation:
    return Mutation(name, tests, (Edit(path, find, put),))


PLACEMENT_MUTATIONS = (
    _one(
        "a bridge's search path is another tenant's",
        _DATABASE,
        "        schema = place.schema or self._home_schema\n",
        '        schema = self.__dict__.setdefault("_first", place.schema) if place.schema else self._home_schema\n',
        f"{NOWHERE_ELSE}[bridge-plain]",
    ),
    _one(
        "a bridge's search path is nobody's",
        _DATABASE,
        "if place.kind is not PlacementKind.POOL:\n            begin += ",
        "if place.kind is PlacementKind.SILO:\n            begin += ",
        f"{NOWHERE_ELSE}[bridge-plain]",
    ),
    _one(
        "a silo's tenant is served from the shared database",
        _DATABASE,
        "if place.kind is PlacementKind.SILO and self._silos is not None:",
        "if place.kind is PlacementKind.SILO and self._silos is None:",
        f"{NOWHERE_ELSE}[silo-plain]",
    ),
    _one(
        "a transaction does not assert that its tenant is here",
        _DATABASE,
        "if walled and self._places is not None:",
        "if walled and self._places is None:",
        f"{STALE}",
    ),
    _one(
        "inference's place refuses nobody who has left",
        "services/inference/migrations/0002_placement.sql",
        "        RAISE EXCEPTION 'the tenant lives elsewhere' USING ERRCODE = 'TM001';\n",
        "        NULL;\n",
        f"{STALE}",
    ),
    _one(
        "retrieval's search does not assert that its tenant is here",
        "services/retrieval/migrations/0003_keys.sql",
        "    PERFORM retrieval.retrieval_assert_here(p_tenant_id);\n    RETURN QUERY",
        "    RETURN QUERY",
        f"{STALE}",
    ),
    _one(
        "everybody may connect to a silo",
        "services/tenant/adapters/silo_maker.py",
        '            await connection.execute(f"REVOKE ALL ON DATABASE {name} FROM PUBLIC")\n',
        "",
        f"{PLACES}::test_the_shared_roles_do_not_enter_a_silo",
    ),
    _one(
        "a sealed value is anybody's",
        "services/kernel/sealing.py",
        "return header + self.tenant_id.bytes + identity",
        "return header",
        "tests/kernel/test_tenant_cipher.py::test_a_moved_value_opens_nowhere_else",
    ),
)
