-- Batch prices, loads of the price book by operators, and re-ratings: entries that correct what a wrong price made of calls.

-- NULL: no price of that class is known. That is not the same as nothing.
ALTER TABLE prices
    ADD COLUMN batch_input_nano_usd bigint CHECK (batch_input_nano_usd BETWEEN 0 AND 1000000000000000),
    ADD COLUMN batch_output_nano_usd bigint CHECK (batch_output_nano_usd BETWEEN 0 AND 1000000000000000),
    ADD COLUMN batch_cache_read_nano_usd bigint CHECK (batch_cache_read_nano_usd BETWEEN 0 AND 1000000000000000),
    ADD COLUMN batch_cache_write_5m_nano_usd bigint CHECK (batch_cache_write_5m_nano_usd BETWEEN 0 AND 1000000000000000),
    ADD COLUMN batch_cache_write_1h_nano_usd bigint CHECK (batch_cache_write_1h_nano_usd BETWEEN 0 AND 1000000000000000);
-- Operators load the reviewed file through the service. Nobody was granted a change of what is there, and triggers refuse it.
GRANT INSERT ON price_versions, prices TO :jobs;

-- Number 2 is the late settlement of a reconciled call, as ever; re-ratings are numbered from 3, so neither takes the other's place.
-- NOT VALID: what is there is within the narrower bound, and nobody waits while that is checked.
ALTER TABLE entries DROP CONSTRAINT entries_number_check;
ALTER TABLE entries ADD CONSTRAINT entries_number_check CHECK (number >= 1) NOT VALID;
ALTER TABLE entries ADD COLUMN rerating_id uuid;
ALTER TABLE entries ADD CONSTRAINT only_prices_are_rerated CHECK (
    rerating_id IS NULL OR (number >= 3 AND total_tokens = 0
        AND greatest(abs(input_tokens), abs(output_tokens), abs(cache_read_tokens), abs(cache_write_5m_tokens), abs(cache_write_1h_tokens)) = 0))
    NOT VALID;
-- In the order in which a re-rating goes through its calls: its last entry says where it is.
CREATE INDEX entries_by_rerating ON entries (tenant_id, rerating_id, reserve_time, reservation_id) WHERE rerating_id IS NOT NULL;

-- What is rated anew: calls reserved in a period and rated by some versions before `cutoff_time`. Numbered, so that of two that begin at once one is
-- refused. What came of it is in its entries.
CREATE TABLE reratings (
    tenant_id uuid NOT NULL,
    rerating_id uuid NOT NULL,
    number integer NOT NULL CHECK (number >= 1),
    start_time timestamptz NOT NULL,
    end_time timestamptz NOT NULL CHECK (end_time > start_time),
    price_versions text[] NOT NULL CHECK (cardinality(price_versions) BETWEEN 1 AND 100),
    right_version text NOT NULL CHECK (right_version <> ALL (price_versions)),
    cutoff_time timestamptz NOT NULL CHECK (cutoff_time <= begin_time),
    digest bytea NOT NULL CHECK (octet_length(digest) = 32),
    begin_time timestamptz NOT NULL,
    PRIMARY KEY (tenant_id, rerating_id),
    UNIQUE (tenant_id, number)
);

-- A row here: all of its entries are written. `told_epoch` is the epoch that was begun for the limits to count anew, if it was.
CREATE TABLE rerating_ends (
    tenant_id uuid NOT NULL,
    rerating_id uuid NOT NULL,
    finish_time timestamptz NOT NULL,
    told_epoch bigint CHECK (told_epoch >= 1),
    PRIMARY KEY (tenant_id, rerating_id),
    FOREIGN KEY (tenant_id, rerating_id) REFERENCES reratings (tenant_id, rerating_id)
);

CREATE TRIGGER reratings_are_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON reratings
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER rerating_ends_are_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON rerating_ends
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
ALTER TABLE reratings ENABLE ROW LEVEL SECURITY;
ALTER TABLE reratings FORCE ROW LEVEL SECURITY;
ALTER TABLE rerating_ends ENABLE ROW LEVEL SECURITY;
ALTER TABLE rerating_ends FORCE ROW LEVEL SECURITY;
CREATE POLICY own_tenant ON reratings TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid)) WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
CREATE POLICY own_tenant ON rerating_ends TO :service
    USING (tenant_id = (SELECT current_setting('app.tenant_id')::uuid)) WITH CHECK (tenant_id = (SELECT current_setting('app.tenant_id')::uuid));
GRANT SELECT, INSERT ON reratings, rerating_ends TO :service;

-- The end of a re-rating. Where it changed what calls of the last 32 days cost, longer than any period of the limits, it begins an epoch as
-- begin_epoch does, and puts the end of a call that never was into the outbox: limits that have an older epoch drop what they counted and ask for it
-- again, and others ignore it. The exclusive lock is a statement of its own before any read, for the reason told in 0003.
CREATE FUNCTION finish_rerating(p_tenant uuid, p_rerating uuid) RETURNS void
LANGUAGE plpgsql VOLATILE SECURITY INVOKER AS $$
DECLARE
    v_now timestamptz;
    v_epoch bigint;
BEGIN
    PERFORM pg_advisory_xact_lock(metering.tenant_lock(p_tenant));
    IF EXISTS (SELECT FROM metering.rerating_ends e WHERE e.tenant_id = p_tenant AND e.rerating_id = p_rerating) THEN
        RETURN;
    END IF;
    v_now := clock_timestamp();
    IF EXISTS (SELECT FROM metering.entries n
               WHERE n.tenant_id = p_tenant AND n.rerating_id = p_rerating AND n.reserve_time > v_now - interval '32 days'
                 AND n.cost_nano_usd <> 0) THEN
        INSERT INTO metering.tenant_epochs AS e (tenant_id, epoch, begin_time) VALUES (p_tenant, 1, v_now)
        ON CONFLICT (tenant_id) DO UPDATE SET epoch = e.epoch + 1, begin_time = v_now
        RETURNING e.epoch INTO v_epoch;
        INSERT INTO metering.outbox (tenant_id, reservation_id, kind, epoch, tokens, cost_nano_usd, due_time)
        VALUES (p_tenant, p_rerating, 2, v_epoch, 0, 0, v_now);
    END IF;
    INSERT INTO metering.rerating_ends (tenant_id, rerating_id, finish_time, told_epoch) VALUES (p_tenant, p_rerating, v_now, v_epoch);
END
$$;

REVOKE ALL ON FUNCTION finish_rerating FROM PUBLIC;
GRANT EXECUTE ON FUNCTION finish_rerating TO :service;
