-- Shared head of the scripts of provider accounts. All keys of an account lie in one slot; time is the store's own, in microseconds.
--
-- members  hash  tenant -> packed {weight, log}; a log is {bucket, requests, input, output, …}, oldest first
-- active   zset  tenants by when they last asked; who has not asked for a window is no member any more
-- lacking  zset  tenants within their share that were refused, by when
-- totals   hash  log -> the packed log of all tenants together; weights -> the sum of the members' weights
--
-- A bucket is a sixtieth of the window and counts until all of it has left: what is taken is never let go early.
local members, active, lacking, totals = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local call = redis.call
local BUCKETS = 60

local function integer(n)
  return string.format('%.0f', n)
end

local function store_time()
  local t = call('TIME')
  return tonumber(t[1]) * 1000000 + tonumber(t[2])
end

local function unpacked_log(packed)
  return packed and cmsgpack.unpack(packed) or {}
end

-- The part of a log that counts from bucket `first` on, and the sums of its three dimensions.
local function counted(log, first)
  local kept, sums = {}, { 0, 0, 0 }
  for i = 1, #log, 4 do
    if log[i] >= first then
      local n = #kept
      kept[n + 1], kept[n + 2], kept[n + 3], kept[n + 4] = log[i], log[i + 1], log[i + 2], log[i + 3]
      for d = 1, 3 do
        sums[d] = sums[d] + log[i + d]
      end
    end
  end
  return kept, sums
end

-- Adds to the bucket; a clock that stepped back adds to the newest one.
local function added(log, bucket, amounts)
  local n = #log
  if n > 0 and log[n - 3] >= bucket then
    for d = 1, 3 do
      log[n - 3 + d] = log[n - 3 + d] + amounts[d]
    end
  else
    log[n + 1], log[n + 2], log[n + 3], log[n + 4] = bucket, amounts[1], amounts[2], amounts[3]
  end
  return log
end

-- Takes off what was taken in `bucket`, if that still counts; never below nothing. Answers what was taken off.
local function taken_off(log, bucket, amounts)
  local off = { 0, 0, 0 }
  for i = 1, #log, 4 do
    if log[i] == bucket then
      for d = 1, 3 do
        off[d] = math.min(log[i + d], amounts[d])
        log[i + d] = log[i + d] - off[d]
      end
      break
    end
  end
  return off
end

-- When `excess` of dimension d will have left the log.
local function frees_us(log, d, excess, quantum)
  for i = 1, #log, 4 do
    excess = excess - log[i + d]
    if excess <= 0 then
      return (log[i] + BUCKETS + 1) * quantum
    end
  end
  return 0
end
