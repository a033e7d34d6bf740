-- Removes a tenant from an account; what it took stays in the sum of all until it leaves the window. ARGV: tenant. Answers 1 when it was there.
local packed = call('HGET', members, ARGV[1])
call('ZREM', active, ARGV[1])
call('ZREM', lacking, ARGV[1])
if not packed then
  return 0
end
call('HDEL', members, ARGV[1])
local weights = tonumber(call('HGET', totals, 'weights')) or 0
call('HSET', totals, 'weights', integer(math.max(0, weights - cmsgpack.unpack(packed)[1])))
return 1
