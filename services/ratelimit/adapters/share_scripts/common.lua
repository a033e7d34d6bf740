-- Shared head of the scripts of provider accounts. All keys of an account lie in one slot; time is the store's own, in microseconds.
--
-- members  hash  tenant -> packed {weight, log, claims}: see `reclaim` for claims; a log is {bucket, requests, input, output, …}, oldest first
-- active   zset  tenants by when they last asked; who has not asked for a window is no member any more
-- claims   zset  tenants that were refused, by the bucket for which their part of the sums was made
-- totals   hash  log -> the packed log of all tenants together; weights -> the sum of the members' weights; claimed -> packed sums of all claims
-- calls    hash  call, named by a digest of its tenant and its id -> packed {bucket, requests, input, output} that it is counted with, behind them
--                what it needed of input and output, and the attempts that have it: see `attempts`
-- recent   zset  calls by their bucket
-- turns    zset  a dimension: tenants that were refused a call larger than their share, by when their share would have added up to it
--
-- A bucket is a sixtieth of the window and counts until all of it has left: what is taken is never let go early.
local members, active, claims, totals, calls, recent = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local turns = { KEYS[7], KEYS[8], KEYS[9] }
local call = redis.call
local BUCKETS = 60
-- Longer than a window: by then everything that was borrowed before the refusal has come back.
local CLAIM_BUCKETS = BUCKETS + 2
local REFUSED, WANT, WEIGHT, USE, KEPT, CLAIM_FIELDS = 1, 2, 3, 4, 5, 5

local function integer(n)
  return string.format('%.0f', n)
end

local function store_time()
  local t = call('TIME')
  return tonumber(t[1]) * 1000000 + tonumber(t[2])
end

-- No tenant counts another's call, and nothing of a tenant is left to read here when it is erased.
local function name_of_call(tenant, id)
  return redis.sha1hex(tenant .. id)
end

local function unpacked(packed)
  return packed and cmsgpack.unpack(packed) or {}
end

local function zeros(count)
  local list = {}
  for i = 1, count do
    list[i] = 0
  end
  return list
end

local function member_of(packed)
  return packed and cmsgpack.unpack(packed) or { 0, {}, zeros(3 * CLAIM_FIELDS) }
end

local function claimed_of(packed)
  return packed and cmsgpack.unpack(packed) or zeros(3 * CLAIM_FIELDS)
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

-- Adds to the log's newest bucket, or begins it.
local function add(log, bucket, amounts)
  local n = #log
  if n > 0 and log[n - 3] == bucket then
    for d = 1, 3 do
      log[n - 3 + d] = log[n - 3 + d] + amounts[d]
    end
  else
    log[n + 1], log[n + 2], log[n + 3], log[n + 4] = bucket, amounts[1], amounts[2], amounts[3]
  end
end

-- Corrects what was added in `bucket`.
local function correct(log, bucket, differences)
  for i = 1, #log, 4 do
    if log[i] == bucket then
      for d = 1, 3 do
        log[i + d] = math.max(0, log[i + d] + differences[d])
      end
      return
    end
  end
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

-- Takes a member's part out of the sums of claims.
local function unclaim(own, claimed)
  for d = 0, 2 do
    for field = WEIGHT, KEPT do
      local at = d * CLAIM_FIELDS + field
      claimed[at] = claimed[at] - own[at]
      own[at] = 0
    end
  end
end

-- Attempts to hold a call, each a number. A call is taken once for all of them, and given back when the last of them is refused what it is for. 0 is
-- one that never gives back. Only so many are told apart: what more of them have stays. So does what a replica of before took, which names none.
local NEEDED, FIRST_ATTEMPT, MOST_ATTEMPTS = 5, 7, 8

local function attempt_in(entry, attempt)
  for i = FIRST_ATTEMPT, #entry do
    if entry[i] == attempt then
      return i
    end
  end
end

-- Answers whether the entry changed.
local function join(entry, attempt)
  if not entry[NEEDED] or attempt_in(entry, 0) or attempt_in(entry, attempt) then
    return false
  end
  entry[#entry + 1] = #entry < FIRST_ATTEMPT + MOST_ATTEMPTS - 1 and attempt or 0
  return true
end

-- Removes a tenant; what it took stays in the sum of all until it leaves the window. Answers its weight.
local function forget(tenant, packed, claimed)
  local member = member_of(packed)
  unclaim(member[3], claimed)
  call('HDEL', members, tenant)
  call('ZREM', active, tenant)
  call('ZREM', claims, tenant)
  for d = 1, 3 do
    call('ZREM', turns[d], tenant)
  end
  return member[1]
end
