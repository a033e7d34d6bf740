-- How the guard of a tenant stands, after opening it where that is due.
-- ARGV: failed authentications and refusals to count, failures and refusals in a minute that open it (0: they never do), first length, longest.
-- guard  hash  until_us, length_us of the last opening | cause: 1 refusals, 2 failures | failures, refusals: second, count, … of the last minute,
--              packed: 60 pairs at most, whatever their number
-- Answers {now, until, cause, refusals of the last minute}.
local MINUTE, HOUR_US, REFUSALS, FAILURES = 60, 3600000000, 1, 2
local now = store_time()
local second = math.floor(now / 1000000)
local g = call('HMGET', guard, 'until_us', 'length_us', 'cause', 'failures', 'refusals')
local until_us, length_us, cause = tonumber(g[1]) or 0, tonumber(g[2]) or 0, tonumber(g[3]) or REFUSALS
local most_failures, most_refusals = tonumber(ARGV[3]), tonumber(ARGV[4])

local function keep(field_seconds, ...)
  call('HSET', guard, ...)
  local left = call('PTTL', guard)
  call('PEXPIRE', guard, math.max(left, field_seconds * 1000))
end

-- The last minute's sum, after counting what is told.
local function counted(field, packed, told)
  local flat, sum = {}, 0
  local before = packed and cmsgpack.unpack(packed) or {}
  for i = 1, #before, 2 do
    if before[i] > second - MINUTE then
      flat[#flat + 1], flat[#flat + 2], sum = before[i], before[i + 1], sum + before[i + 1]
    end
  end
  if told > 0 then
    if flat[#flat - 1] == second then
      flat[#flat] = flat[#flat] + told
    else
      flat[#flat + 1], flat[#flat + 2] = second, told
    end
    sum = sum + told
    keep(MINUTE + 1, field, cmsgpack.pack(flat))
  end
  return sum
end

local failures = counted('failures', g[4], tonumber(ARGV[1]))
-- Refusals that are told while it is open are of before: what it opened for must not open it again.
local refusals = counted('refusals', g[5], until_us <= now and tonumber(ARGV[2]) or 0)
local tried, pressed = most_failures > 0 and failures > most_failures, most_refusals > 0 and refusals > most_refusals
if until_us <= now and (pressed or tried) then
  -- Again within an hour of its last end: twice as long.
  local again = until_us > 0 and now - until_us < HOUR_US
  length_us = again and math.min(2 * length_us, tonumber(ARGV[6])) or tonumber(ARGV[5])
  until_us, cause = now + length_us, tried and FAILURES or REFUSALS
  call('HDEL', guard, 'failures', 'refusals')
  refusals = 0
  keep(math.ceil((length_us + HOUR_US) / 1000000), 'until_us', integer(until_us), 'length_us', integer(length_us), 'cause', cause)
end
return { now, until_us, cause, refusals }
