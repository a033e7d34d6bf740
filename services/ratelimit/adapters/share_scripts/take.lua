-- Takes part of an account's minute for a tenant.
-- ARGV: tenant, weight, window, limits (requests, input, output; 0 unlimited), need (requests, input, output).
-- Answers {verdict, now, dimension from 0, limit, used, when it frees}: 0 taken | 1 account full | 2 share used | 3 larger than the account.
local TAKEN, FULL, SHARE_USED, TOO_LARGE = 0, 1, 2, 3
local tenant, weight, window_us = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local limits = { tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6]) }
local need = { tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9]) }
local now = store_time()
local quantum = window_us / BUCKETS
local bucket = math.floor(now / quantum)
local first = bucket - BUCKETS

for d = 1, 3 do
  if limits[d] > 0 and need[d] > limits[d] then
    return { TOO_LARGE, now, d - 1, limits[d], 0, 0 }
  end
end

local function forget_the_idle(weights)
  -- Longer than a window: whatever they took has left every log by then.
  local gone = call('ZRANGEBYSCORE', active, '-inf', integer(now - window_us - 2 * quantum), 'LIMIT', 0, 100)
  for _, other in ipairs(gone) do
    local packed = call('HGET', members, other)
    weights = weights - (packed and cmsgpack.unpack(packed)[1] or 0)
    call('HDEL', members, other)
    call('ZREM', active, other)
    call('ZREM', lacking, other)
  end
  return weights
end

local found = call('HMGET', totals, 'log', 'weights')
local weights = forget_the_idle(tonumber(found[2]) or 0)
local packed = call('HGET', members, tenant)
local mine = packed and cmsgpack.unpack(packed) or { 0, {} }
weights = weights - mine[1] + weight
local my_log, my_use = counted(mine[2], first)
local all_log, all_use = counted(unpacked_log(found[1]), first)

local function keep(verdict)
  call('HSET', members, tenant, cmsgpack.pack({ weight, my_log }))
  call('HSET', totals, 'weights', integer(weights), 'log', cmsgpack.pack(all_log))
  call('ZADD', active, integer(now), tenant)
  for _, key in ipairs(KEYS) do
    call('PEXPIRE', key, math.ceil(window_us / 500))
  end
  return verdict
end

-- The share is rounded down, so that shares together never pass the limit; who has nothing in the window may always take one call.
local function share(d)
  return math.floor(limits[d] * weight / weights)
end

local borrows, full
for d = 1, 3 do
  if limits[d] > 0 then
    if not borrows and my_use[d] > 0 and my_use[d] + need[d] > share(d) then
      borrows = d
    end
    if not full and all_use[d] + need[d] > limits[d] then
      full = d
    end
  end
end

if full then
  if not borrows then
    call('ZADD', lacking, integer(now), tenant)
  end
  local excess = all_use[full] + need[full] - limits[full]
  return keep({ FULL, now, full - 1, limits[full], all_use[full], frees_us(all_log, full, excess, quantum) })
end
-- A claim lasts a window after its owner was last refused: by then everything that was borrowed has come back.
if borrows and call('ZCOUNT', lacking, '(' .. integer(now - window_us), '+inf') - (call('ZSCORE', lacking, tenant) and 1 or 0) > 0 then
  local excess = my_use[borrows] + need[borrows] - share(borrows)
  return keep({ SHARE_USED, now, borrows - 1, share(borrows), my_use[borrows], math.max(now + quantum, frees_us(my_log, borrows, excess, quantum)) })
end
added(my_log, bucket, need)
added(all_log, bucket, need)
-- The claim stands until its owner has its share: a tenant that were satisfied by one call would see the rest lent again.
for d = 1, 3 do
  if limits[d] > 0 and my_use[d] + 2 * need[d] > share(d) then
    call('ZREM', lacking, tenant)
  end
end
return keep({ TAKEN, now, 0, 0, 0, 0 })
