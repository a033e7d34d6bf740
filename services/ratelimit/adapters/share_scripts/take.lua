-- Takes part of an account's minute for a call.
-- ARGV: tenant, weight, window, limits (requests, input, output; 0 unlimited), need (requests, input, output), the call's id, how it
-- waits (0 not at all | 1 it will, and has not said since when | 2 in the line), since when or 0, the attempt that takes it.
-- Answers {verdict, now, dimension from 0, limit, used, when it frees, since when it waits, how many are before it}:
-- 0 taken | 1 account full | 2 share used | 3 larger than the account | 4 taken before | 5 others of its tenant wait before it | 6 less was taken before.
local TAKEN, FULL, SHARE_USED, TOO_LARGE, AGAIN, QUEUED, OTHER = 0, 1, 2, 3, 4, 5, 6
local tenant, weight, window_us, id = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), name_of_call(ARGV[1], ARGV[10])
local limits = { tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6]) }
local need = { tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9]) }
local now = store_time()
local quantum = window_us / BUCKETS
local waits, since, attempt = tonumber(ARGV[11]), tonumber(ARGV[12]), tonumber(ARGV[13])
-- So much of the work that others left behind is done at a time.
local MOST = 50

for d = 1, 3 do
  if limits[d] > 0 and need[d] > limits[d] then
    return { TOO_LARGE, now, d - 1, limits[d], 0, 0, 0, 0 }
  end
end

local line, was
if waits > 0 then
  line, was = line_of(tenant)
end

local function leave_line()
  if line then
    tear_ticket(line, ARGV[10])
    store_line(tenant, line, was)
  end
end

-- Since when it waits, once it has a place.
local function stays_in_line()
  if waits < 2 then
    return 0
  end
  local its_since = stand(line, ARGV[10], since)
  store_line(tenant, line, was)
  return its_since
end

local found = call('HMGET', totals, 'log', 'weights', 'claimed')
local all_log = unpacked(found[1])
-- A clock that stepped back adds to the newest bucket.
local bucket = math.max(math.floor(now / quantum), all_log[#all_log - 3] or 0)
local first = bucket - BUCKETS
local before = unpacked(call('HGET', calls, id))
if before[1] and before[1] >= first then
  leave_line()
  if before[NEEDED] and (need[2] > before[NEEDED] or need[3] > before[NEEDED + 1]) then
    return { OTHER, now, 0, 0, 0, 0, 0, 0 }
  elseif join(before, attempt) then
    call('HSET', calls, id, cmsgpack.pack(before))
  end
  return { AGAIN, now, 0, 0, 0, 0, 0, 0 }
end
local ahead = line and ahead_of(line, ARGV[10], since) or 0
if ahead > 0 then
  return { QUEUED, now, 0, 0, 0, 0, stays_in_line(), ahead }
end
local weights, claimed = tonumber(found[2]) or 0, claimed_of(found[3])
local all_use
all_log, all_use = counted(all_log, first)

local function forget_the_idle()
  -- Longer than a window: whatever they took has left every log by then.
  local gone = call('ZRANGEBYSCORE', active, '-inf', integer(now - window_us - 2 * quantum), 'LIMIT', 0, MOST)
  for _, other in ipairs(gone) do
    weights = weights - forget(other, call('HGET', members, other), claimed)
  end
  local left = call('ZRANGEBYSCORE', recent, '-inf', '(' .. integer(first), 'LIMIT', 0, MOST)
  if #left > 0 then
    call('HDEL', calls, unpack(left))
    call('ZREM', recent, unpack(left))
  end
end

forget_the_idle()
local packed = call('HGET', members, tenant)
local mine = member_of(packed)
weights = weights - mine[1] + weight
mine[1] = weight

-- Shares are rounded down, so that together they never pass the limit.
local function share(d, of)
  return math.floor(limits[d] * of / weights)
end

-- Brings a member's part of the sums of claims up to date; answers whether it claims anything still.
-- In each dimension a member has {the bucket in which it was last refused, what it needed then, and its part of the sums: weight, use, what is kept
-- for it}. Kept is what its share lacks, in whole calls: a rest that none of its calls fits into is of use to others. Who has nothing in the
-- window has at least one call, however small its share.
local function reclaim(who, member, use)
  local own, lives = member[3], false
  unclaim(own, claimed)
  for d = 1, 3 do
    local at = (d - 1) * CLAIM_FIELDS
    if limits[d] > 0 and own[at + REFUSED] + CLAIM_BUCKETS > bucket then
      lives = true
      local lacking = math.floor(math.max(0, share(d, member[1]) - use[d]) / own[at + WANT])
      if use[d] == 0 then
        lacking = math.max(1, lacking)
      end
      own[at + WEIGHT], own[at + USE], own[at + KEPT] = member[1], use[d], lacking * own[at + WANT]
      for field = WEIGHT, KEPT do
        claimed[at + field] = claimed[at + field] + own[at + field]
      end
    elseif own[at + REFUSED] > 0 then
      own[at + REFUSED] = 0
      call('ZREM', turns[d], who)
    end
  end
  return lives
end

local function store_claim(who, member, lives)
  call('HSET', members, who, cmsgpack.pack(member))
  if lives then
    call('ZADD', claims, integer(bucket), who)
  else
    call('ZREM', claims, who)
  end
end

-- What claims keep follows what has left the window since: once a bucket, so many of them at a time.
local function renew_claims()
  for _, other in ipairs(call('ZRANGEBYSCORE', claims, '-inf', '(' .. integer(bucket), 'LIMIT', 0, MOST)) do
    if other ~= tenant then
      local member, use = member_of(call('HGET', members, other)), nil
      member[2], use = counted(member[2], first)
      store_claim(other, member, reclaim(other, member, use))
    end
  end
end

renew_claims()
local my_use
mine[2], my_use = counted(mine[2], first)
unclaim(mine[3], claimed)

-- Where the call is larger than its tenant's share: when the share will have added up to it, since the tenant was first refused it.
local function due_us(d)
  local score = call('ZSCORE', turns[d], tenant)
  return score and tonumber(score) or math.floor(now + window_us * need[d] * weights / (limits[d] * weight))
end

-- What must stay free beside the call: for those whose turn is before its own, or for one whose turn has come.
local function before_it(d, own)
  if my_use[d] == 0 and need[d] > own then
    return need[d] * call('ZCOUNT', turns[d], '-inf', '(' .. integer(due_us(d)))
  end
  local head = call('ZRANGE', turns[d], 0, 0, 'WITHSCORES')
  if head[1] and head[1] ~= tenant and tonumber(head[2]) <= now then
    return member_of(call('HGET', members, head[1]))[3][(d - 1) * CLAIM_FIELDS + WANT]
  end
  return 0
end

-- Why the call cannot have what it needs of a dimension, and how much must leave the log first; nil when it can. A tenant within its share is kept
-- out by nothing but a full account. One that has nothing in the window may take one call larger than its share, in turn. Who is beyond its share
-- borrows, and takes nothing that is kept for others; while others claim too, what nobody else uses is lent by weight among those who claim, each at
-- most a part of a call beyond its own.
local function obstacle(d)
  local at, own = (d - 1) * CLAIM_FIELDS, share(d, weight)
  if limits[d] == 0 or need[d] == 0 then
    return nil
  end
  local excess = all_use[d] + need[d] - limits[d]
  if excess <= 0 then
    excess = excess + before_it(d, own)
  end
  if excess > 0 then
    return FULL, math.min(excess, all_use[d])
  elseif my_use[d] == 0 or my_use[d] + need[d] <= own then
    return nil
  end
  local lent = limits[d] - (all_use[d] - claimed[at + USE] - my_use[d])
  local passes = claimed[at + WEIGHT] > 0 and my_use[d] * (claimed[at + WEIGHT] + weight) >= lent * weight
  if passes or all_use[d] + need[d] + claimed[at + KEPT] > limits[d] then
    return SHARE_USED, math.min(my_use[d], my_use[d] + need[d] - own)
  end
end

local function keep()
  store_claim(tenant, mine, reclaim(tenant, mine, my_use))
  call('HSET', totals, 'weights', integer(weights), 'log', cmsgpack.pack(all_log), 'claimed', cmsgpack.pack(claimed))
  call('ZADD', active, integer(now), tenant)
  for _, key in ipairs(KEYS) do
    call('PEXPIRE', key, math.ceil(window_us / 500))
  end
end

local function refused(d)
  local at = (d - 1) * CLAIM_FIELDS
  mine[3][at + REFUSED], mine[3][at + WANT] = bucket, need[d]
  if need[d] > share(d, weight) then
    call('ZADD', turns[d], 'NX', integer(due_us(d)), tenant)
  else
    call('ZREM', turns[d], tenant)
  end
end

local why, which, excess
for d = 1, 3 do
  local its_why, its_excess = obstacle(d)
  if its_why then
    refused(d)
    if not why or its_why < why then
      why, which, excess = its_why, d, its_excess
    end
  end
end

if why then
  keep()
  local figures = why == FULL and { limits[which], all_use[which], all_log } or { share(which, weight), my_use[which], mine[2] }
  local frees = math.max(now + quantum, frees_us(figures[3], which, excess, quantum))
  return { why, now, which - 1, figures[1], figures[2], frees, stays_in_line(), 0 }
end

add(mine[2], bucket, need)
add(all_log, bucket, need)
for d = 1, 3 do
  my_use[d] = my_use[d] + need[d]
  call('ZREM', turns[d], tenant)
end
call('HSET', calls, id, cmsgpack.pack({ bucket, need[1], need[2], need[3], need[2], need[3], attempt }))
call('ZADD', recent, integer(bucket), id)
keep()
leave_line()
return { TAKEN, now, 0, 0, 0, 0, 0, 0 }
