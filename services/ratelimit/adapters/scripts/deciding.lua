-- Whether a demand fits: shared by the scripts that decide. terms.py makes what is read here.
local now = store_time()

-- Rules come by sevens: where the counter is (0: none, each request by itself; -1: what runs, every lease;
-- -2: what runs, where leases may be of uses too), unit, limit, 1 in shadow, the fewest output tokens a
-- call may be shortened to (0: it may not), scope, 1 if the ledger does not have what it counts and it is closed.
local STRIDE = 7

-- When counters were loaded after a loss, 0 if they never were lost.
local loaded_us = 0

-- The longest that a slice may be used, its holder's clock allowed for. Within a second, so that a change of the rules is in force by then.
local LONGEST_SLICE_US = 850000

-- Until when nobody knows what a rule's window holds; 0 where it is known. A slice from before the loss is used on for as long as it may be, which is
-- after the loading: a window is known again when even that has left it.
local function blind_until(c, plan, i)
  local until_us = plan.rules[i + 6] == 1 and loaded_us + LONGEST_SLICE_US + c[WINDOW] or 0
  return until_us > now and until_us or 0
end

-- The end of counters' names in that of three periods, told by where they begin and the last ends, which is now.
local function suffix_of(first, second, third, over)
  if now < first or now >= over then
    return nil
  end
  local start = now < second and first or now < third and second or third
  return string.format('@%d', start / 1000000)
end

-- The ends of counters' names by calendar: day, month, cycle. Nothing when the caller's clock is so far off that its periods do not reach now.
local function suffixes_of(packed)
  local d1, d2, d3, d4, m1, m2, m3, m4, c1, c2, c3, c4 = struct.unpack('>i8i8i8i8i8i8i8i8i8i8i8i8', packed)
  local day, month, cycle = suffix_of(d1, d2, d3, d4), suffix_of(m1, m2, m3, m4), suffix_of(c1, c2, c3, c4)
  return day and month and cycle and { day, month, cycle } or nil
end

-- What a subject is held to, and its counters, which are read. `form` is what plans share: {of each counter its unit (+ SHADED for one of shadow
-- rules), its calendar and its window; rules; 1 if any is in shadow}. `own` is what the subject's is: {user, feature, unit of the product, stems of
-- the counters' names}.
local function plan_of(form, own, suffixes)
  -- Tables that are made as long as they will be need not grow.
  local stems, calendars = own[4], form[2]
  local names, its_counters = { unpack(stems) }, { unpack(stems) }
  for place = 1, #names do
    local suffix = suffixes[calendars[place]]
    if suffix then
      names[place] = names[place] .. suffix
    end
  end
  read(names, form[3], now)
  for place = 1, #names do
    its_counters[place] = book[names[place]]
  end
  return {
    user = own[1], feature = own[2], product_unit = own[3], stems = stems, names = names, counters = its_counters,
    units = form[1], windows = form[3], rules = form[4], has_shadow = form[5] == 1,
  }
end

-- What runs: the number of living leases, and where a rule needs it the records they stand for.
local running, living

local function all_running()
  running = running or call('ZCOUNT', leases, '(' .. integer(now), '+inf')
  return running
end

local function running_for(scope, shadow, user, feature, beside_uses)
  if scope == 't' and not shadow and not beside_uses then
    return all_running()
  end
  if not living then
    living = {}
    for i, packed in ipairs(fetch(reservations, call('ZRANGEBYSCORE', leases, '(' .. integer(now), '+inf'))) do
      living[i] = packed and cmsgpack.unpack(packed) or {}
    end
  end
  local count = 0
  for _, r in ipairs(living) do
    local same = (scope == 't' or scope == 'f' or r[USER] == user) and (scope == 't' or scope == 'u' or r[FEATURE] == feature)
    -- What rules in shadow refused does not run for them; a use of units (attempt 0) is no call.
    if same and r[ATTEMPT] ~= 0 and not (shadow and r[SHADOW_TOKENS] < 0) then
      count = count + 1
    end
  end
  return count
end

local function counter_of(plan, i)
  local place = plan.rules[i]
  return place > 0 and plan.counters[place] or nil
end

local function used_by(plan, i)
  local place = plan.rules[i]
  if place > 0 then
    local c = plan.counters[place]
    return loaded_us > 0 and blind_until(c, plan, i) > 0 and math.max(c[USED], plan.rules[i + 2]) or c[USED]
  elseif place == 0 then
    return 0
  end
  return running_for(plan.rules[i + 5], plan.rules[i + 3] == 1, plan.user, plan.feature, place == -2)
end

-- By unit how much a demand needs; false where it is not counted. Attempts: 0 a product's units, 1 a call, from 2 on a retry.
local function needs_of(attempt, tokens, cost, quantity)
  if attempt == 0 then
    return { false, false, false, false, false, quantity }
  end
  return { attempt == 1 and 1, tokens, cost, 1, attempt > 1 and 1, false }
end

-- By how much a rule is too small for the demand. Compared with what is left of the limit: both sides stay below 2^53.
local function over(plan, i, item)
  local need = item.needs[plan.rules[i + 1]]
  return need and need - (plan.rules[i + 2] - used_by(plan, i)) or 0
end

-- What leaving out `count` output tokens saves, rounded down, so that what is left is never too little. The price is split: their product may pass 2^53.
local function saved(item, count)
  local whole, part = math.floor(item.price / 1000000), item.price % 1000000
  return count * whole + math.floor(count * part / 1000000)
end

-- The fewest output tokens to leave out to save so much; more than there are when all of them do not.
local function cut_for(item, cost)
  local low, high = 1, item.output + 1
  while low < high do
    local middle = math.floor((low + high) / 2)
    if saved(item, middle) >= cost then
      high = middle
    else
      low = middle + 1
    end
  end
  return low
end

-- Whether the demand fits under the rules, `all` those in shadow included, and what may be granted: tokens, cost, output tokens.
-- Shortened only where every rule in its way allows it.
local function fitted(plan, item, all)
  local cut, fewest, rules = 0, item.fewest, plan.rules
  for i = 1, #rules, STRIDE do
    if all or rules[i + 3] == 0 then
      local excess = over(plan, i, item)
      if excess > 0 then
        local unit, shortest = rules[i + 1], rules[i + 4]
        if item.output == 0 or shortest == 0 or (unit ~= TOKENS and unit ~= COST) then
          return false
        end
        fewest = math.max(fewest, shortest)
        cut = math.max(cut, unit == TOKENS and excess or cut_for(item, excess))
      end
    end
  end
  if cut == 0 then
    return true, item.tokens, item.cost, item.output
  elseif item.output - cut < fewest then
    return false
  end
  return true, item.tokens - cut, item.cost - saved(item, cut), item.output - cut
end

-- By rule when it has room: 0 it has, -1 no window's log says when. Of the rules in shadow, or of the others.
local function frees(plan, item, shadow)
  local times = {}
  for i = 1, #plan.rules, STRIDE do
    local excess = plan.rules[i + 3] == (shadow and 1 or 0) and over(plan, i, item) or 0
    local time = 0
    if excess > 0 then
      local c = counter_of(plan, i)
      time = c and c[WINDOW] > 0 and math.max(frees_us(c, excess), blind_until(c, plan, i)) or 0
      time = time > 0 and time or -1
    end
    times[#times + 1] = time
  end
  return times
end

-- The answer's figures, by threes a rule: used, when its log gives something back next (0: it is empty or has none), when it has room.
local function figures(answer, plan, times)
  local size = #answer
  for i = 1, #plan.rules, STRIDE do
    local c = counter_of(plan, i)
    answer[size + 1] = used_by(plan, i)
    answer[size + 2] = c and c[WINDOW] > 0 and resets_us(c) or 0
    answer[size + 3] = times and times[(i - 1) / STRIDE + 1] or 0
    size = size + 3
  end
  return answer
end

-- Verdicts, as numbers.
local V_HELD, V_REFUSED, V_OLD, V_AHEAD, V_ENDED, V_CONFLICT, V_DONE, V_QUEUED = 1, 2, 3, 4, 5, 6, 7, 12
