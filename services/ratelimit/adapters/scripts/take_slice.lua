-- Charges units of a product ahead of their use: as many as are wanted, or a part of what the rules have left. What is refused writes nothing.
-- They may be used until the slice's lease ends, so they are dated then: a window that any of the uses can be in counts all of them from now on.
-- Where somebody waits for one of the rules nothing is charged: many units at once would pass who came before.
-- ARGV: forget, largest age of an id, version and families of the configuration, plan, id, its own time, wanted, how long at most, by which number
-- what is left is divided, the rules' lanes. No calendars: a unit with one is never sliced.
-- Answers {"rebuild"} | {"behind", version} | {"ok", now, epoch, {verdict, granted, how long from now, largest use (0: any), figures…}}
local MARGIN_US = 50000 -- the holder's clock may run so much slower than the store's

local m = current('epoch', 'version', 'families', 'outstanding', 'loaded_us')
local epoch = tonumber(m[1])
loaded_us = tonumber(m[5]) or 0
if not epoch then
  return { 'rebuild' }
end
local fits = fit(m[3], m[2], ARGV[4], ARGV[3])
if fits == 'others' then
  return { 'rebuild' }
elseif fits == 'behind' then
  return { 'behind', tonumber(m[2]) }
end
local form, own = cmsgpack.unpack(ARGV[5])
local plan = plan_of(form, own, {})
local id, wanted_quantity = ARGV[6], tonumber(ARGV[8])
local one = { needs = needs_of(0, 0, 0, 1), tokens = 0, cost = 0, output = 0, fewest = 1 }

local function answer(verdict, granted, left_us, largest, times)
  return { 'ok', now, epoch, figures({ verdict, granted, left_us, largest }, plan, times) }
end

-- The most that one use may need, and how much and for how long the rules allow.
local largest, room = 0, wanted_quantity
local lease_us = math.min(tonumber(ARGV[9]), LONGEST_SLICE_US - MARGIN_US)
for i = 1, #plan.rules, STRIDE do
  local limit, c = plan.rules[i + 2], counter_of(plan, i)
  if c then
    room = math.min(room, math.max(1, math.floor((limit - used_by(plan, i)) / tonumber(ARGV[10]))))
    -- The units leave the window so much later than if they were used at once: never by more than a part of it.
    lease_us = math.min(lease_us, math.floor(c[WINDOW] / 8))
  else
    largest = largest > 0 and math.min(largest, limit) or limit
  end
end

local function again(r)
  local same = r[STATE] == SLICED and r[ASKED_TOKENS] == wanted_quantity and r[PRODUCT_UNIT] == plan.product_unit
  if not same or r[USER] ~= plan.user or r[FEATURE] ~= plan.feature then
    return answer(V_CONFLICT, 0, 0, 0)
  end
  local left_us = r[RESERVED] - MARGIN_US - now
  if r[EPOCH] ~= epoch or not r[CHARGES] or left_us <= 0 then
    return answer(V_ENDED, 0, 0, 0)
  end
  return answer(V_HELD, r[QUANTITY], left_us, largest)
end

local minted_us, age_us = tonumber(ARGV[7]), tonumber(ARGV[2])
if minted_us < now - age_us then
  return answer(V_OLD, 0, 0, 0)
elseif minted_us > now + age_us then
  return answer(V_AHEAD, 0, 0, 0)
end
local known = records_of({ id })[id]
if known then
  return again(known)
elseif not fitted(plan, one, false) then
  return answer(V_REFUSED, 0, 0, 0, frees(plan, one, false))
elseif is_occupied(cmsgpack.unpack(ARGV[11])) then
  return answer(V_QUEUED, 0, 0, 0)
end

local over_us = now + lease_us + MARGIN_US
local charges = {}
for place, name in ipairs(plan.names) do
  adjust(plan.counters[place], over_us, now, room)
  charges[#charges + 1], charges[#charges + 2], charges[#charges + 3] = name, plan.units[place], plan.windows[place]
end
tidy(now, tonumber(ARGV[1]))
write()
local r = {
  SLICED, epoch, over_us, 0, 0, room, plan.user, plan.feature, 0, plan.product_unit, wanted_quantity, 0, 0, 0, 0,
}
r[CHARGES] = charges
call('HSET', reservations, id, cmsgpack.pack(r))
call('ZADD', ended, integer(now), id)
if tonumber(m[4] or 0) == 0 then
  idle()
end
return answer(V_HELD, room, lease_us, largest)
