-- Reads a page of all that is kept of the tenant. ARGV: the cursor, 0 at first; which records: reservations | uses.
-- Answers {next cursor, fields of meta and counters (first page of reservations), id and record by turns}.
local page = call('HSCAN', ARGV[2] == 'uses' and uses or reservations, ARGV[1], 'COUNT', CHUNK)
local first = ARGV[1] == '0' and ARGV[2] ~= 'uses'
return { page[1], first and call('HGETALL', meta) or {}, page[2], first and call('HGETALL', counters) or {} }
