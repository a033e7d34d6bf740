-- Decides demands in their order, each against every rule at once, and takes their holds. What is refused writes nothing.
-- ARGV: lease, forget, largest age of an id, version of the configuration (8 bytes each), its families, calendars, demands (ITEM_BYTES each), number
-- of forms, forms, number of plans, by twos a plan's form and what is its own, and if any of the demands stands in line, of each how: see turns.lua.
-- A demand: id, its own time, attempt, tokens, cost, quantity, plan, output tokens, fewest of them, price of 10^6 of them, how: a sum of 1 to be used
-- at once (no hold) and 2 to be taken only if all the others are.
-- Answers {"rebuild"} | {"behind", version} | {"periods", now} | {"ok", now, epoch, items…};
-- an item: {verdict, reserve_us, tokens, cost, output, expired holds, figures…}
local ITEM_BYTES = 96
local m = current('epoch', 'version', 'families', 'outstanding', 'loaded_us')
local epoch = tonumber(m[1])
loaded_us = tonumber(m[5]) or 0
if not epoch then
  return { 'rebuild' }
end
local lease_us, forget_us, age_us, version = struct.unpack('>i8i8i8i8', ARGV[1])
local fits = fit(m[3], m[2], ARGV[2], version)
if fits == 'others' then
  return { 'rebuild' }
elseif fits == 'behind' then
  return { 'behind', tonumber(m[2]) }
end
local suffixes = suffixes_of(ARGV[3])
if not suffixes then
  return { 'periods', now }
end
local forms, plans = {}, {}
local last_form = 5 + ARGV[5]
for i = 6, last_form do
  forms[i - 5] = cmsgpack.unpack(ARGV[i])
end
local last_plan = last_form + 1 + 2 * ARGV[last_form + 1]
for i = last_form + 2, last_plan, 2 do
  plans[#plans + 1] = plan_of(forms[tonumber(ARGV[i])], cmsgpack.unpack(ARGV[i + 1]), suffixes)
end
if ARGV[last_plan + 1] then
  stand_in_line()
end

local ids, items = {}, {}
for at = 1, #ARGV[4], ITEM_BYTES do
  local id, minted_us, attempt, tokens, cost, quantity, plan, output, fewest, price, how =
    struct.unpack('>c16i8i8i8i8i8i8i8i8i8i8', ARGV[4], at)
  local place = #ids + 1
  ids[place] = id
  items[place] = {
    id = id, minted_us = minted_us, attempt = attempt, tokens = tokens, cost = cost, quantity = quantity, plan = plans[plan], output = output,
    fewest = fewest, price = price, at_once = how % 2 == 1, together = how >= 2, needs = needs_of(attempt, tokens, cost, quantity),
    standing = standing_of and standing_of(ARGV[last_plan + place]),
  }
end
local records = records_of(ids)
local kept, used_up, leased, over_by, holds = {}, {}, {}, {}, 0

-- A lease that ended may be under a fence already: the caller must not count on the hold.
local function leased_still(id)
  return lives(leased[id] or tonumber(call('ZSCORE', leases, id) or nil), now)
end

local function held(item, r)
  return figures({ V_HELD, r[RESERVED], r[R_TOKENS], r[R_COST], r[OUTPUT], 0 }, item.plan, item.frees)
end

local function again(item, r)
  local plan = item.plan
  local same = r[ASKED_TOKENS] == item.tokens and r[ASKED_COST] == item.cost and r[PRODUCT_UNIT] == plan.product_unit
  -- It counts for whom it was taken: for another it would be no use of theirs, and the ledger's conflict would end a hold that is recorded.
  same = same and r[USER] == plan.user and r[FEATURE] == plan.feature
  if r[STATE] == SETTLED and item.attempt == 0 and r[ATTEMPT] == 0 then
    -- Units of a product that are used already.
    same = same and r[QUANTITY] == item.quantity
    return same and figures({ V_DONE, r[RESERVED], 0, 0, 0, 0 }, item.plan) or { V_CONFLICT }
  end
  if not same or (r[STATE] <= PINNED and r[QUANTITY] ~= item.quantity) then
    return { r[STATE] <= PINNED and V_CONFLICT or V_ENDED }
  elseif r[STATE] ~= HELD or not leased_still(item.id) then
    return { V_ENDED }
  end
  leased[item.id] = lease_score(now + lease_us, item.attempt)
  return held(item, r)
end

-- Charges counters of the plan, those of rules in shadow only when `shaded` is there.
local function charge(item, r, shaded)
  local plan, needs, charges, size = item.plan, item.needs, {}, 0
  local names, counters_of_plan, units = plan.names, plan.counters, plan.units
  for place = 1, #names do
    local unit = units[place]
    if needs[unit % SHADED] and (unit < SHADED or shaded) then
      local c = counters_of_plan[place]
      add(c, now, charged(r, unit))
      charges[size + 1], charges[size + 2], charges[size + 3] = names[place], unit, c[WINDOW]
      size = size + 3
    end
  end
  return charges
end

local function hold(item, tokens, cost, output)
  local plan = item.plan
  local shaded, shaded_tokens, shaded_cost = true, tokens, cost
  if plan.has_shadow then
    shaded, shaded_tokens, shaded_cost = fitted(plan, item, true)
    if not shaded then
      item.frees = frees(plan, item, true)
    end
  end
  local r = {
    HELD, epoch, now, tokens, cost, item.quantity, plan.user, plan.feature, item.attempt, plan.product_unit,
    item.tokens, item.cost, output, shaded and shaded_tokens or -1, shaded and shaded_cost or -1, false,
  }
  r[CHARGES] = charge(item, r, shaded)
  records[item.id] = r
  if item.at_once then
    r[STATE], r[CHARGES] = SETTLED, nil
    over_by[#over_by + 1], over_by[#over_by + 2] = integer(now), item.id
    used_up[#used_up + 1], used_up[#used_up + 2] = item.id, cmsgpack.pack(r)
  else
    leased[item.id], holds = lease_score(now + lease_us, item.attempt), holds + 1
    if running and item.attempt > 0 then
      running = running + 1
    end
    if living and item.attempt > 0 then
      living[#living + 1] = r
    end
    kept[#kept + 1], kept[#kept + 2] = item.id, cmsgpack.pack(r)
  end
  return held(item, r)
end

local expired

local function decide(item)
  if item.minted_us < now - age_us and not (item.standing and came_in_time(item)) then
    return { V_OLD }
  elseif item.minted_us > now + age_us then
    return { V_AHEAD }
  elseif records[item.id] then
    if item.standing then
      leave_line(item)
    end
    return again(item, records[item.id])
  end
  local ahead, lanes = 0, nil
  if item.standing then
    ahead, lanes = before(item)
  end
  local ok, tokens, cost, output = fitted(item.plan, item, false)
  if ok and ahead == 0 then
    if item.standing then
      leave_line(item)
    end
    return hold(item, tokens, cost, output)
  end
  expired = expired or count_ended(now)
  if item.standing then
    return kept_waiting(item, ahead, lanes, not ok and frees(item.plan, item, false) or nil, expired, holds > 0 and now + lease_us or 0)
  end
  return figures({ V_REFUSED, 0, 0, 0, 0, expired }, item.plan, frees(item.plan, item, false))
end

local answer = { 'ok', now, epoch }
local spoilt = false
for _, item in ipairs(items) do
  local decided = decide(item)
  answer[#answer + 1] = decided
  spoilt = spoilt or (item.together and decided[1] ~= V_HELD and decided[1] ~= V_DONE)
end
if spoilt then
  -- Nothing was written yet: what the others took is forgotten with this script.
  return answer
end
local until_us, size = {}, 0
for id, time in pairs(leased) do
  until_us[size + 1], until_us[size + 2] = integer(time), id
  size = size + 2
end
in_chunks('ZADD', leases, until_us)
if #kept > 0 or #used_up > 0 then
  tidy(now, forget_us)
  write()
  in_chunks('HSET', reservations, kept)
  in_chunks('HSET', uses, used_up)
  in_chunks('ZADD', ended, over_by)
  outstanding(holds)
  if holds == 0 and tonumber(m[4] or 0) == 0 then
    idle()
  end
end
if write_line then
  write_line()
end
return answer
