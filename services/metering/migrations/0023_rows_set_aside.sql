-- How many rows of the provider's feed could not be read when the report was made.
ALTER TABLE reconciliations ADD COLUMN set_aside_count bigint NOT NULL DEFAULT 0 CHECK (set_aside_count >= 0);
