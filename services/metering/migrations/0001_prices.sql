-- Prices: shared reference data, no tenant. Written by `migrate` as the owner, read by everybody, never changed:
-- a ledger entry names the version it was rated by, so an edited price would change the past.

CREATE TABLE price_versions (
    version text PRIMARY KEY CHECK (version ~ '^[A-Za-z0-9._-]{1,100}$'),
    effective_time timestamptz NOT NULL UNIQUE,
    source text NOT NULL CHECK (length(source) BETWEEN 1 AND 500),
    retrieved date NOT NULL,
    digest bytea NOT NULL CHECK (octet_length(digest) = 32),
    load_time timestamptz NOT NULL DEFAULT now()
);

-- Nano-USD per 1,000,000 tokens of each class.
CREATE TABLE prices (
    version text NOT NULL REFERENCES price_versions (version),
    provider text NOT NULL CHECK (length(provider) BETWEEN 1 AND 63),
    model text NOT NULL CHECK (length(model) BETWEEN 1 AND 200),
    input_nano_usd bigint NOT NULL CHECK (input_nano_usd BETWEEN 0 AND 1000000000000000),
    output_nano_usd bigint NOT NULL CHECK (output_nano_usd BETWEEN 0 AND 1000000000000000),
    cache_read_nano_usd bigint NOT NULL CHECK (cache_read_nano_usd BETWEEN 0 AND 1000000000000000),
    cache_write_5m_nano_usd bigint NOT NULL CHECK (cache_write_5m_nano_usd BETWEEN 0 AND 1000000000000000),
    cache_write_1h_nano_usd bigint NOT NULL CHECK (cache_write_1h_nano_usd BETWEEN 0 AND 1000000000000000),
    PRIMARY KEY (version, provider, model)
);

CREATE FUNCTION refuse_change() RETURNS trigger
LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '%.% is append-only: write a new row instead', TG_TABLE_SCHEMA, TG_TABLE_NAME USING ERRCODE = 'restrict_violation';
END
$$;

CREATE TRIGGER price_versions_are_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON price_versions
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER prices_are_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON prices
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();

GRANT SELECT ON price_versions, prices TO :service, :jobs;
