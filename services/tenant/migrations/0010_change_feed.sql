-- The feed holds no text that a caller chose: a kind is a word of the code's own.
ALTER TABLE tenant.changes ADD CONSTRAINT changes_kind_is_a_word CHECK (kind ~ '^[A-Z][A-Z_]{0,31}$');

-- Old rows are nobody's any more: each replica removes them in passing, and the policy, not the statement, says what is old.
CREATE POLICY feed_trimming ON tenant.changes FOR DELETE TO :service USING (change_time < now() - interval '1 hour');
GRANT DELETE ON tenant.changes TO :service;

-- The newest row stays however old it is: without it nobody could tell how far the feed has come.
CREATE FUNCTION tenant.trim_changes(p_kept interval) RETURNS void
LANGUAGE sql SECURITY INVOKER AS $$
    DELETE FROM tenant.changes c
    WHERE c.change_time < now() - p_kept AND c.change_id < (SELECT max(n.change_id) FROM tenant.changes n)
$$;

REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA tenant FROM PUBLIC;
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA tenant TO :service;
