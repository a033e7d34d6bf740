-- Lists holds whose lease has ended and forgets what no rule counts. ARGV: window, forget, at most this many.
-- Answers {epoch or -1, leases in all, ids…}.
local epoch = call('HGET', meta, 'epoch')
if not epoch then
  return { -1, 0 }
end
local now = store_time()
tidy(now, tonumber(ARGV[1]), tonumber(ARGV[2]))
local ids = call('ZRANGEBYSCORE', leases, '-inf', integer(now), 'LIMIT', 0, tonumber(ARGV[3]))
return { tonumber(epoch), call('ZCARD', leases), unpack(ids) }
