-- Removes a tenant from an account; what it took stays in the sum of all until it leaves the window. ARGV: tenant. Answers 1 when it was there.
call('HDEL', lines, ARGV[1])
call('ZREM', fronts, ARGV[1])
local packed = call('HGET', members, ARGV[1])
if not packed then
  return 0
end
local found = call('HMGET', totals, 'weights', 'claimed')
local claimed = claimed_of(found[2])
local weights = (tonumber(found[1]) or 0) - forget(ARGV[1], packed, claimed)
call('HSET', totals, 'weights', integer(math.max(0, weights)), 'claimed', cmsgpack.pack(claimed))
return 1
