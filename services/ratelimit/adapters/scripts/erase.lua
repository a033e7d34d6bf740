-- Removes all that is kept of the tenant. Answers how many records there were of each kind, in the order of the keys.
local counts = { call('EXISTS', meta), call('HLEN', reservations), call('ZCARD', leases), call('ZCARD', window), call('ZCARD', ended) }
forget_all()
return counts
