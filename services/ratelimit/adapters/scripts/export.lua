-- Reads a page of all that is kept of the tenant. ARGV: the cursor, 0 at first. Answers {next cursor, fields of meta (first page), id and record by turns}.
local page = call('HSCAN', reservations, ARGV[1], 'COUNT', CHUNK)
return { page[1], ARGV[1] == '0' and call('HGETALL', meta) or {}, page[2] }
