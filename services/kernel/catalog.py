"""Reads Postgres' own catalog and says where a schema breaks the isolation rules. Changes nothing.

What it holds a schema to: row-level security enabled and forced, one shape of policy, a NOLOGIN owner, service roles that own nothing and
bypass nothing, indexes that lead with `tenant_id`, partitions without grants, views and functions that run as their caller.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import asyncpg

from services.kernel.migrate import Destination, home_of

POLICY_EXPRESSION = "(tenant_id = ( SELECT (current_setting('app.tenant_id'::text))::uuid AS current_setting))"

SELECT_RELATIONS = """
SELECT c.oid, c.relname AS name, c.relkind::text AS kind, c.relispartition AS is_partition, o.rolname AS owner,
       c.relrowsecurity AS row_security, c.relforcerowsecurity AS forced, coalesce(c.reloptions, '{}') AS options,
       EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attname = 'tenant_id' AND NOT a.attisdropped) AS has_tenant,
       ARRAY(SELECT DISTINCT coalesce(g.rolname, 'public') FROM aclexplode(c.relacl) x LEFT JOIN pg_roles g ON g.oid = x.grantee
             WHERE x.grantee <> c.relowner) AS grantees
FROM pg_class c JOIN pg_roles o ON o.oid = c.relowner
WHERE c.relnamespace = $1::regnamespace AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
ORDER BY c.relname
"""
SELECT_POLICIES = """
SELECT tablename, policyname, permissive, roles::text[] AS roles, cmd, qual, with_check FROM pg_policies WHERE schemaname = $1
ORDER BY tablename, policyname
"""
SELECT_INDEXES = """
SELECT t.relname AS table_name, i.relname AS name, a.attname AS first_column
FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid JOIN pg_class t ON t.oid = x.indrelid
LEFT JOIN pg_attribute a ON a.attrelid = t.oid AND a.attnum = x.indkey[0] AND x.indkey[0] <> 0
WHERE t.relnamespace = $1::regnamespace ORDER BY i.relname
"""
SELECT_FUNCTIONS = """
SELECT p.proname AS name, p.prosecdef AS definer, o.rolname AS owner FROM pg_proc p JOIN pg_roles o ON o.oid = p.proowner
WHERE p.pronamespace = $1::regnamespace ORDER BY p.proname
"""
SELECT_ROLES = """
SELECT rolname AS name, rolsuper, rolbypassrls, rolcanlogin, rolcreaterole,
       ARRAY(SELECT g.rolname FROM pg_roles g WHERE g.oid <> r.oid AND pg_has_role(r.oid, g.oid, 'MEMBER')) AS member_of
FROM pg_roles r WHERE rolname = ANY($1)
"""


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken rule: the object, such as `table calls`, and what is wrong with it."""

    subject: str
    problem: str


async def violations(
    connection: asyncpg.Connection,
    schema: str,
    *,
    shared_tables: Iterable[str] = (),
    exempt_indexes: Iterable[str] = (),
    destinations: Sequence[Destination] = (),
) -> list[Violation]:
    """Returns every violation in the schema; an empty list is a pass.

    `shared_tables` hold reference data of no tenant; `exempt_indexes` serve the jobs role's sweeps over all tenants. `destinations` say
    whose the tables of a placed tenant are: two services' in a bridge; by default the schema is a service's own.
    """
    places = destinations or (home_of(schema),)
    shared = frozenset(shared_tables) | {place.history.partition(".")[2] for place in places}
    relations = await connection.fetch(SELECT_RELATIONS, schema)
    policies = await connection.fetch(SELECT_POLICIES, schema)
    indexes = await connection.fetch(SELECT_INDEXES, schema)
    functions = await connection.fetch(SELECT_FUNCTIONS, schema)
    roles = await connection.fetch(SELECT_ROLES, [role for place in places for role in _role_names(place).values()])
    return [
        *_of_relations(relations, policies, places, shared),
        *_of_policies(policies, places, shared),
        *_of_indexes(indexes, shared, frozenset(exempt_indexes)),
        *_of_functions(functions, places),
        *(violation for place in places for violation in _of_roles(roles, place)),
    ]


def _role_names(place: Destination) -> dict[str, str]:
    names = {"owner": place.owner, "service": place.service, "jobs": place.jobs}
    return {kind: name for kind, name in names.items() if name}


def _of_relations(
    relations: list[asyncpg.Record],
    policies: list[asyncpg.Record],
    places: Sequence[Destination],
    shared: frozenset[str],
) -> Iterable[Violation]:
    with_policy = {policy["tablename"] for policy in policies}
    owners = {place.owner for place in places}
    for relation in relations:
        name, kind = relation["name"], relation["kind"]
        if relation["owner"] not in owners:
            yield Violation(f"relation {name}", f"is owned by {relation['owner']}, not by {' or '.join(sorted(owners))}")
        if "public" in relation["grantees"]:
            yield Violation(f"relation {name}", "is granted to PUBLIC")
        if kind == "v" and not {"security_invoker=true", "security_invoker=on", "security_invoker=1"} & set(relation["options"]):
            yield Violation(f"view {name}", "does not run as its caller: set security_invoker")
        if kind in "mf":
            yield Violation(f"relation {name}", "is a materialized view or foreign table, where row-level security does not hold")
        if kind in "rp" and name not in shared:
            yield from _of_tenant_table(relation, with_policy)


def _of_tenant_table(relation: asyncpg.Record, with_policy: set[str]) -> Iterable[Violation]:
    subject = f"table {relation['name']}"
    if not relation["has_tenant"]:
        yield Violation(subject, "has no tenant_id and is not listed as shared reference data")
    if not relation["row_security"]:
        yield Violation(subject, "row-level security is not enabled")
    if not relation["forced"]:
        yield Violation(subject, "row-level security is not forced")
    if relation["name"] not in with_policy:
        yield Violation(subject, "has no policy")
    if relation["is_partition"] and relation["grantees"]:
        yield Violation(subject, f"is a partition with grants to {', '.join(relation['grantees'])}")


def _of_policies(policies: list[asyncpg.Record], places: Sequence[Destination], shared: frozenset[str]) -> Iterable[Violation]:
    jobs = [[place.jobs] for place in places if place.jobs]
    for policy in policies:
        # A restrictive policy can only take away; the jobs role has policies of its own by rule 9.
        if policy["tablename"] in shared or policy["permissive"] != "PERMISSIVE" or policy["roles"] in jobs:
            continue
        subject = f"policy {policy['policyname']} on {policy['tablename']}"
        for clause in ("qual", "with_check"):
            expression = policy[clause]
            if expression is not None and not _confines(expression):
                yield Violation(subject, f"{clause} is {expression}")
        if policy["qual"] is None and policy["with_check"] is None:
            yield Violation(subject, "restricts nothing")


def _confines(expression: str) -> bool:
    """Tells whether the expression is the tenant's own, alone or narrowed by AND; an OR beside it would widen it."""
    plain, wanted = re.sub(r"\s+", " ", expression), POLICY_EXPRESSION
    return plain == wanted or (plain.startswith(f"({wanted} AND ") and " OR " not in plain)


def _of_indexes(indexes: list[asyncpg.Record], shared: frozenset[str], exempt: frozenset[str]) -> Iterable[Violation]:
    for index in indexes:
        if index["table_name"] in shared or index["name"] in exempt:
            continue
        if index["first_column"] != "tenant_id":
            yield Violation(f"index {index['name']} of {index['table_name']}", "does not lead with tenant_id")


def _of_functions(functions: list[asyncpg.Record], places: Sequence[Destination]) -> Iterable[Violation]:
    workers = {role for place in places for role in (place.service, place.jobs)}
    for function in functions:
        if function["definer"]:
            yield Violation(f"function {function['name']}", "is SECURITY DEFINER: it would run past row-level security")
        if function["owner"] in workers:
            yield Violation(f"function {function['name']}", f"is owned by {function['owner']}")


def _of_roles(roles: list[asyncpg.Record], place: Destination) -> Iterable[Violation]:
    names = _role_names(place)
    found = {role["name"]: role for role in roles}
    for kind, name in names.items():
        role = found.get(name)
        if role is None:
            yield Violation(f"role {name}", "does not exist")
            continue
        if role["rolsuper"] or role["rolbypassrls"] or role["rolcreaterole"]:
            yield Violation(f"role {name}", "is superuser, may create roles or bypasses row-level security")
        if kind == "owner" and role["rolcanlogin"]:
            yield Violation(f"role {name}", "can log in")
        if kind != "owner" and role["member_of"]:
            yield Violation(f"role {name}", f"is a member of {', '.join(role['member_of'])}")
