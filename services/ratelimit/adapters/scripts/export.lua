-- Reads a page of all that is kept of the tenant. ARGV: the cursor, 0 at first.
-- Answers {next cursor, fields of meta and counters (first page), id and record by turns}.
local page = call('HSCAN', reservations, ARGV[1], 'COUNT', CHUNK)
local first = ARGV[1] == '0'
return { page[1], first and call('HGETALL', meta) or {}, page[2], first and call('HGETALL', counters) or {} }
