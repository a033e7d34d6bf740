-- Removes all that is kept of the tenant. ARGV: how long the tombstone stands (ms). Answers how many records there were of each kind, in the
-- order of the keys. The tombstone is a field of meta: `begin` refuses a rebuild while it stands, which is longer than any token of the tenant.
local counts = { call('HEXISTS', meta, 'erased') == 1 and 0 or call('EXISTS', meta), call('HLEN', reservations), call('ZCARD', leases), call('HLEN', counters), call('ZCARD', ended), call('HLEN', waiters), call('EXISTS', guard), call('HLEN', uses) }
forget_all()
call('DEL', guard)
call('HSET', meta, 'history', current_history(), 'erased', '1')
call('PEXPIRE', meta, ARGV[1])
return counts
