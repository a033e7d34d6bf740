-- Takes off what a call did not use of what it took. ARGV: tenant, window, when it was taken, unused (requests, input, output).
local tenant, window_us, taken_us = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local unused = { tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6]) }
local bucket = math.floor(taken_us / (window_us / BUCKETS))
local packed = call('HGET', members, tenant)
local total = call('HGET', totals, 'log')
if not packed or not total then
  return 0
end
local mine, all = cmsgpack.unpack(packed), cmsgpack.unpack(total)
-- Only what is still the tenant's own is taken off the whole: nobody gives back what another took.
local off = taken_off(mine[2], bucket, unused)
taken_off(all, bucket, off)
call('HSET', members, tenant, cmsgpack.pack(mine))
call('HSET', totals, 'log', cmsgpack.pack(all))
return 1
