-- How the guard of a tenant stands, after opening it where that is due.
-- ARGV: failed authentications to count, 1 if it is to open for refusals, failures in a minute that open it (0: they never do), first length, longest.
-- guard  hash  until_us, length_us of the last opening | cause: 1 refusals, 2 failures | failures: second, count, … of the last minute, packed
-- Answers {now, until, cause}.
local MINUTE, HOUR_US, REFUSALS, FAILURES = 60, 3600000000, 1, 2
local now = store_time()
local second = math.floor(now / 1000000)
local g = call('HMGET', guard, 'until_us', 'length_us', 'cause', 'failures')
local until_us, length_us, cause = tonumber(g[1]) or 0, tonumber(g[2]) or 0, tonumber(g[3]) or REFUSALS
local told, refused, most_failures = tonumber(ARGV[1]), ARGV[2] == '1', tonumber(ARGV[3])

local function keep(field_seconds, ...)
  call('HSET', guard, ...)
  local left = call('PTTL', guard)
  call('PEXPIRE', guard, math.max(left, field_seconds * 1000))
end

local flat, sum = {}, 0
local before = g[4] and cmsgpack.unpack(g[4]) or {}
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
  keep(MINUTE + 1, 'failures', cmsgpack.pack(flat))
end
local tried = most_failures > 0 and sum > most_failures
if until_us <= now and (refused or tried) then
  -- Again within an hour of its last end: twice as long.
  local again = until_us > 0 and now - until_us < HOUR_US
  length_us = again and math.min(2 * length_us, tonumber(ARGV[5])) or tonumber(ARGV[4])
  until_us, cause = now + length_us, tried and FAILURES or REFUSALS
  call('HDEL', guard, 'failures')
  keep(math.ceil((length_us + HOUR_US) / 1000000), 'until_us', integer(until_us), 'length_us', integer(length_us), 'cause', cause)
end
return { now, until_us, cause }
