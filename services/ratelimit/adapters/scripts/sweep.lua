-- Lists holds whose lease has ended and forgets what no rule counts. ARGV: window, forget, at most this many.
-- Answers {epoch or -1, leases in all, ids…}.
local m, stale = current('epoch')
local epoch = m[1]
if stale then
  -- Its tenant may never call again, and nothing else would end these holds.
  forget_all()
end
if not epoch then
  return { -1, 0 }
end
local now = store_time()
tidy(now, tonumber(ARGV[1]), tonumber(ARGV[2]))
local ids = call('ZRANGEBYSCORE', leases, '-inf', integer(now), 'LIMIT', 0, tonumber(ARGV[3]))
return { tonumber(epoch), call('ZCARD', leases), unpack(ids) }
