-- Counts calls with what they really used instead of what they took; repeated it changes nothing more. What has left the window is left alone.
-- ARGV: window, then by sixes: tenant, the call's id, requests, input, output, the attempt that gives it back, 0 where none does. A call that used
-- nothing at all may be taken again; one that is given back, when no other attempt has it. Answers how many changed.
local window_us = tonumber(ARGV[1])
local first = math.floor(store_time() / (window_us / BUCKETS)) - BUCKETS
-- So many of those who have waited longest are told that something came back, and the tenants it came back from.
local MOST_WOKEN = 4
local all_log, changed
local woken = {}

-- Takes an attempt off an entry; answers whether it was the last.
local function left_by(attempt, id, entry)
  local place = attempt_in(entry, attempt)
  if place and #entry > FIRST_ATTEMPT then
    table.remove(entry, place)
    call('HSET', calls, id, cmsgpack.pack(entry))
    return false
  end
  return place ~= nil
end

local function count(tenant, id, use, attempt)
  local entry = unpacked(call('HGET', calls, id))
  if not entry[1] or entry[1] < first or (attempt > 0 and not left_by(attempt, id, entry)) then
    return
  end
  local differences, differs, nothing = {}, false, true
  for d = 1, 3 do
    differences[d] = use[d] - entry[d + 1]
    differs = differs or differences[d] ~= 0
    nothing = nothing and use[d] == 0
  end
  if nothing then
    call('HDEL', calls, id)
    call('ZREM', recent, id)
  elseif differs then
    entry[2], entry[3], entry[4] = use[1], use[2], use[3]
    call('HSET', calls, id, cmsgpack.pack(entry))
  else
    return
  end
  all_log = all_log or unpacked(call('HGET', totals, 'log'))
  correct(all_log, entry[1], differences)
  changed, woken[tenant] = (changed or 0) + 1, true
  local packed = call('HGET', members, tenant)
  if packed then
    local member = member_of(packed)
    correct(member[2], entry[1], differences)
    call('HSET', members, tenant, cmsgpack.pack(member))
    -- Its part of the sums is of before: the next who takes makes it anew.
    call('ZADD', claims, 'XX', 0, tenant)
  end
end

for i = 2, #ARGV, 6 do
  local use = { tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3]), tonumber(ARGV[i + 4]) }
  count(ARGV[i], name_of_call(ARGV[i], ARGV[i + 1]), use, tonumber(ARGV[i + 5]))
end
if changed then
  call('HSET', totals, 'log', cmsgpack.pack(all_log))
  for _, tenant in ipairs(call('ZRANGE', fronts, 0, MOST_WOKEN - 1)) do
    woken[tenant] = true
  end
  local ids = {}
  for tenant in pairs(woken) do
    local line = line_of(tenant)
    ids[#ids + 1] = line[1]
    if not line[1] then
      -- Nobody lives there: the next time others are called.
      store_line(tenant, line)
    end
  end
  wake(ids)
end
return changed or 0
