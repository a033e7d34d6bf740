"""What makes the edit of a migration idle: a later file of the same folder that says the same thing anew or takes it away."""

from pathlib import Path

import pytest

from tests.isolation.mutations import Edit
from tests.isolation.superseded import not_understood, superseded

ROOT = Path(__file__).parents[2]

FIRST = """
-- A comment ends no statement; it's not part of one.
CREATE TABLE calls (tenant_id uuid, state integer CHECK (state > 0));
CREATE UNIQUE INDEX calls_live ON calls (tenant_id) WHERE state = 1;
CREATE FUNCTION metering.fence(p_tenant uuid) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM 1; -- fenced: it's over
END;
$$;
CREATE VIEW counted WITH (security_invoker = true) AS SELECT tenant_id FROM calls WHERE state = 2;
CREATE TRIGGER calls_stay BEFORE UPDATE OR DELETE ON calls FOR EACH ROW EXECUTE FUNCTION refuse();
CREATE POLICY own_tenant ON calls TO :service
    USING (tenant_id = '1');
ALTER TABLE calls FORCE ROW LEVEL SECURITY;
ALTER TABLE calls ADD CONSTRAINT tier_length CHECK (state < 9) NOT VALID;
GRANT SELECT, INSERT ON calls, metering.entries TO :service, :jobs;
REVOKE ALL ON FUNCTION fence(uuid), unfence(uuid, text) FROM PUBLIC;
DO $$
BEGIN
    FOREACH v_table IN ARRAY ARRAY['users', 'keys'] LOOP
        EXECUTE format('ALTER TABLE tenant.%I ENABLE ROW LEVEL SECURITY', v_table);
        EXECUTE format(
            'CREATE POLICY own_tenant ON tenant.%I USING (tenant_id = (SELECT current_setting(''app.tenant_id''))) '
            'WITH CHECK (tenant_id IS NOT NULL)', v_table);
    END LOOP;
END
$$;
INSERT INTO calls (tenant_id) VALUES (NULL);
"""
FENCE, INDEX, VIEW, STAY = "PERFORM 1;", "WHERE state = 1", "WHERE state = 2", "UPDATE OR DELETE"
OWN, FORCED, TIER, SHAPE = "(tenant_id = '1')", "FORCE ROW", "state < 9", "state > 0"
RIGHT, CLOSED, LOOP, LOOPED = (
    "GRANT SELECT, INSERT ON",
    "REVOKE ALL ON FUNCTION fence(uuid), unfence(uuid, text) FROM PUBLIC;",
    "'users', ",
    "tenant_id IS NOT NULL",
)
SAID_ANEW = (
    (FENCE, "CREATE OR REPLACE FUNCTION fence(p_tenant uuid) RETURNS void LANGUAGE sql AS $$ SELECT 1; $$;"),
    (FENCE, "CREATE FUNCTION fence(p_tenant uuid, p_epoch bigint) RETURNS void LANGUAGE sql AS $$ SELECT 1; $$;"),
    (FENCE, "DROP FUNCTION IF EXISTS metering.other(uuid, text), metering.fence(uuid);"),
    (FENCE, "ALTER FUNCTION fence(uuid) SECURITY INVOKER;"),
    (INDEX, "DROP INDEX metering.calls_live;"),
    (INDEX, "DROP TABLE calls CASCADE;"),
    (OWN, "DROP TABLE entries, calls RESTRICT;"),
    (VIEW, "CREATE OR REPLACE VIEW counted WITH (security_invoker = true) AS SELECT tenant_id FROM calls;"),
    (STAY, "DROP TRIGGER calls_stay ON metering.calls;"),
    (STAY, "ALTER TABLE calls DISABLE TRIGGER calls_stay;"),
    (STAY, "DROP TABLE calls;"),
    (OWN, "DROP POLICY IF EXISTS own_tenant ON calls;"),
    (OWN, "ALTER POLICY own_tenant ON metering.calls TO :service USING (false);"),
    (FORCED, "ALTER TABLE calls NO FORCE ROW LEVEL SECURITY;"),
    (TIER, "ALTER TABLE calls DROP CONSTRAINT tier_length;"),
    (TIER, "ALTER TABLE calls DROP CONSTRAINT IF EXISTS tier_length;"),
    (SHAPE, "ALTER TABLE calls DROP CONSTRAINT calls_state_check;"),
    (SHAPE, "ALTER TABLE calls ALTER COLUMN state TYPE bigint;"),
    (RIGHT, "REVOKE ALL ON entries FROM :jobs;"),
    (RIGHT, "GRANT SELECT, DELETE ON entries TO :jobs;"),
    (RIGHT, "REVOKE DELETE ON ALL TABLES IN SCHEMA metering FROM :jobs;"),
    (CLOSED, "REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA metering FROM PUBLIC;"),
    (LOOP, "ALTER TABLE tenant.users DISABLE ROW LEVEL SECURITY;"),
    (LOOPED, "DROP POLICY own_tenant ON tenant.keys;"),
)
LEFT_ALONE = (
    (FENCE, "-- DROP FUNCTION fence();\nCREATE FUNCTION unfence() RETURNS text LANGUAGE sql AS $$ SELECT ';DROP FUNCTION fence;'; $$;"),
    (INDEX, "CREATE INDEX calls_dead ON calls (tenant_id) WHERE state = 3;"),
    (VIEW, "CREATE VIEW uncounted AS SELECT tenant_id FROM counted;"),
    (STAY, "DROP TRIGGER calls_stay ON entries;"),
    (OWN, "CREATE POLICY own_tenant ON entries TO :service USING (true); ALTER TABLE calls NO FORCE ROW LEVEL SECURITY;"),
    (FORCED, "ALTER TABLE calls ENABLE ROW LEVEL SECURITY;"),
    (SHAPE, "ALTER TABLE calls ADD COLUMN tier text, ADD CONSTRAINT tier CHECK (tier <> '');"),
    (RIGHT, "GRANT UPDATE ON entries, calls TO :jobs; GRANT DELETE ON calls TO :owner; REVOKE ALL ON FUNCTION fence(uuid) FROM PUBLIC;"),
    (RIGHT, "REVOKE ALL ON ALL FUNCTIONS IN SCHEMA metering FROM :jobs;"),
    (CLOSED, "GRANT EXECUTE ON FUNCTION unfence(uuid, text), fence(uuid) TO :service;"),
    (LOOP, "ALTER TABLE tenant.keys DISABLE ROW LEVEL SECURITY;"),
)


def _why(folder: Path, find: str, later: str) -> str:
    (folder / "0001_first.sql").write_text(FIRST)
    (folder / "0002_later.sql").write_text(later)
    put = find.replace("INSERT", "INSERT, DELETE") if find == RIGHT else ""
    assert FIRST.count(find) == 1
    return superseded(folder, Edit("0001_first.sql", find, put))


@pytest.mark.parametrize(("find", "later"), SAID_ANEW)
def test_what_is_said_anew_or_taken_away_is_superseded(tmp_path: Path, find: str, later: str) -> None:
    """An edit of what a later file replaces, overloads, alters, drops, grants or revokes is idle, and the later file is named."""
    assert "0002_later.sql has the last word on" in _why(tmp_path, find, later)


@pytest.mark.parametrize(("find", "later"), LEFT_ALONE)
def test_what_is_left_alone_stands(tmp_path: Path, find: str, later: str) -> None:
    """An edit counts where later files speak of other things: of other tables, other rights, or only in a comment or a body."""
    assert _why(tmp_path, find, later) == ""


def test_an_edit_of_no_known_statement_is_not_vouched_for(tmp_path: Path) -> None:
    """Of an edit that changes no statement that is understood nobody can say whether it still counts."""
    assert "no statement that is known" in _why(tmp_path, "VALUES (NULL)", "")


def test_earlier_files_and_other_folders_have_no_say(tmp_path: Path) -> None:
    """The files of a folder are applied in the order of their numbers, and no other folder speaks of the same schema."""
    (tmp_path / "other").mkdir()
    for path in ("0001_first.sql", "other/0003_later.sql"):
        (tmp_path / path).write_text("DROP POLICY own_tenant ON calls;")
    (tmp_path / "0002_second.sql").write_text(FIRST)
    assert superseded(tmp_path, Edit("0002_second.sql", OWN, "(true)")) == ""


@pytest.mark.parametrize(
    "statement",
    [
        "create or replace function fence() returns void language sql as $$ $$;",
        "ALTER TABLE calls RENAME TO asked;",
        "DROP SCHEMA metering CASCADE;",
        "ALTER TABLE ONLY calls NO FORCE ROW LEVEL SECURITY;",
        "ALTER TABLE calls DISABLE TRIGGER ALL;",
        "CREATE INDEX IF NOT EXISTS calls_live ON calls (state);",
        "DO $$ BEGIN FOREACH v IN ARRAY ARRAY['a'] LOOP NULL; END LOOP; EXECUTE 'drop policy own_tenant on calls'; END $$;",
        "DO $$ BEGIN FOREACH v IN ARRAY ARRAY['a'] LOOP EXECUTE 'DROP POLICY own_tenant ON ' || v; END LOOP; END $$;",
    ],
)
def test_a_statement_in_unknown_words_is_noticed(statement: str) -> None:
    """What may be of a wall, and is not read as one, is told: it would otherwise pass for a statement that leaves all walls alone."""
    assert len(not_understood(f"INSERT INTO calls DEFAULT VALUES; {statement} SELECT 1;")) == 1


def test_every_statement_of_the_migrations_is_understood() -> None:
    """No migration says anything in words that would let it pass for one that leaves all walls alone."""
    for path in sorted(ROOT.glob("services/*/*migrations/*.sql")):
        assert not_understood(path.read_text()) == [], path.name


def test_only_migrations_are_looked_at(tmp_path: Path) -> None:
    """An edit of code is of what is called, whatever a database says."""
    assert superseded(tmp_path, Edit("tenant_proof.py", "if wrong:", "if False:")) == ""
