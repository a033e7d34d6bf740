-- Lists holds whose lease has ended and forgets what no rule counts. ARGV: forget, at most this many.
-- Answers {epoch or -1, leases in all, 1 if there is more to forget later and 2 if at once, in how many microseconds to look again, ids…}; the wait
-- is until the next lease ends, 0 where there is something to do at once.
local m, stale = current('epoch')
local epoch = m[1]
if stale then
  -- Its tenant may never call again, and nothing else would end these holds.
  forget_all()
end
if not epoch then
  return { -1, 0, 0, 0 }
end
local now = store_time()
tidy(now, tonumber(ARGV[1]))

-- A period this old is read by no rule: the one before this has ended, by any calendar.
local KEPT_DAYS, KEPT_MONTHS = 3 * 86400, 70 * 86400
local seconds = math.floor(now / 1000000)

-- Whether a counter is of no use any more, and whether it will be some day soon.
local function dead(name, value)
  local window, span = string.match(name, '^[^:]+:(%a)([^:]*):')
  if window == 's' then
    local flat = cmsgpack.unpack(value)
    return flat[1] + flat[#flat - 1] <= now - tonumber(span) * 1000000, true
  end
  local start = tonumber(string.match(name, '@(%d+)$'))
  return start < seconds - (window == 'd' and KEPT_DAYS or KEPT_MONTHS), false
end

-- A bounded part of the counters, another one each time.
local gone, later, unfinished = {}, false, false
if call('HLEN', counters) > 0 then
  local from = call('HGET', meta, 'cursor') or '0'
  local page = call('HSCAN', counters, from, 'COUNT', 100)
  for i = 1, #page[2], 2 do
    local over, soon = dead(page[2][i], page[2][i + 1])
    if over then
      gone[#gone + 1] = page[2][i]
    end
    later = later or (soon and not over)
  end
  unfinished = page[1] ~= '0'
  later = later or unfinished
  if page[1] ~= from then
    call('HSET', meta, 'cursor', page[1])
  end
  in_chunks('HDEL', counters, gone)
end
later = later or call('ZCARD', ended) > 0
local ids = {}
for _, scores in ipairs(ended_between(now)) do
  for _, id in ipairs(call('ZRANGEBYSCORE', leases, scores[1], scores[2], 'LIMIT', 0, tonumber(ARGV[2]) - #ids)) do
    ids[#ids + 1] = id
  end
end

local function next_end()
  local first
  for _, scores in ipairs({ { integer(now - USES_EARLIER), '(0' }, { '(' .. integer(now), '+inf' } }) do
    local found = call('ZRANGEBYSCORE', leases, scores[1], scores[2], 'WITHSCORES', 'LIMIT', 0, 1)[2]
    local score = tonumber(found or nil)
    local until_us = score and (score < 0 and score + USES_EARLIER or score)
    first = until_us and math.min(first or until_us, until_us) or first
  end
  return first or now
end

local wait_us = (unfinished or #ids > 0) and 0 or math.max(0, next_end() - now)
return { tonumber(epoch), call('ZCARD', leases), unfinished and #gone > 0 and 2 or later and 1 or 0, wait_us, unpack(ids) }
