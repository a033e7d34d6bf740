-- Tells what is used and whether a demand would be held. Writes nothing.
-- ARGV: version and families of the configuration, calendars, plan, attempt, tokens, cost, quantity. Answers as reserve.lua, one item.
local m = current('epoch', 'version', 'families', 'loaded_us')
local epoch = tonumber(m[1])
loaded_us = tonumber(m[4]) or 0
if not epoch then
  return { 'rebuild' }
end
local fits = fit(m[3], m[2], ARGV[2], ARGV[1])
if fits == 'others' then
  return { 'rebuild' }
elseif fits == 'behind' then
  return { 'behind', tonumber(m[2]) }
end
local suffixes = suffixes_of(ARGV[3])
if not suffixes then
  return { 'periods', now }
end
local form, own = cmsgpack.unpack(ARGV[4])
local plan = plan_of(form, own, suffixes)
local item = { tokens = tonumber(ARGV[6]), cost = tonumber(ARGV[7]), output = 0, fewest = 1 }
item.needs = needs_of(tonumber(ARGV[5]), item.tokens, item.cost, tonumber(ARGV[8]))
local ok = fitted(plan, item, false)
local times, shaded = frees(plan, item, false), frees(plan, item, true)
for i, time in ipairs(shaded) do
  times[i] = times[i] ~= 0 and times[i] or time
end
return { 'ok', now, epoch, figures({ ok and V_HELD or V_REFUSED, 0, item.tokens, item.cost, 0, count_ended(now) }, plan, times) }
