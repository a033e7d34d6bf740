-- Where a demand that waits stands in line: shared by what decides.

-- How a demand stands, packed by redis_store.py: {1 to keep its place, since when it waits or 0, a lane for each rule of the plan}.
local function standing_of(packed)
  if packed == '' then
    return nil
  end
  local s = cmsgpack.unpack(packed)
  return { keep = s[1] == 1, since = s[2], lanes = s[3] }
end

-- Whether its place in line proves that it came in time, however old its id has become meanwhile.
local function came_in_time(item)
  return ticket_of(item.id) ~= nil
end

local function leave_line(item)
  tear_ticket(item.id)
end

-- Those before it who wait for a limit that counts it too: how many, and the lanes they share with it.
local function before(item)
  local plan, own, shared, count = item.plan, {}, {}, 0
  for i = 1, #plan.rules, STRIDE do
    local need = plan.rules[i + 3] == 0 and item.needs[plan.rules[i + 1]]
    if need and need > 0 then
      own[item.standing.lanes[(i - 1) / STRIDE + 1]] = true
    end
  end
  for _, t in ipairs(line()) do
    if (t.id == item.id and not t.ghost) or (item.standing.since > 0 and t.since > item.standing.since) then
      break
    end
    local meets = false
    for _, lane in ipairs(t.lanes) do
      if own[lane] and not (t.ghost and item.standing.keep) then
        meets, shared[lane] = true, true
      end
    end
    count = count + (meets and 1 or 0)
  end
  return count, shared
end

-- Gives it a place, or keeps it. Answers since when it waits; 0 where it has none. Who has not said yet that it waits stands here as a ghost: it
-- keeps its turn before others of the same script, and nothing of it is written.
local function stand(item, lanes)
  local list, t = {}, ticket_of(item.id)
  for lane in pairs(lanes) do
    list[#list + 1] = lane
  end
  table.sort(list)
  local last = queue[#queue]
  local since = item.standing.since > 0 and item.standing.since or math.max(now, last and last.since + 1 or 0)
  if not item.standing.keep then
    queue[#queue + 1] = { id = item.id, since = since, lanes = list, ghost = true }
    return 0
  elseif t then
    moved = moved or table.concat(t.lanes) ~= table.concat(list)
    t.lanes = list
  elseif #queue >= MOST_TICKETS then
    return 0
  else
    t = { id = item.id, since = since, lanes = list }
    queue[#queue + 1] = t
    sort_line()
  end
  keep_ticket(t)
  return t.since
end

-- The answer to one that is not admitted: {verdict, since, when the first hold could come back by itself (0: there is none), how many are before it …}
local function kept_waiting(item, ahead, lanes, times, expired, fresh_until)
  for place, time in ipairs(times or {}) do
    if time ~= 0 then
      lanes[item.standing.lanes[place]] = true
    end
  end
  local since = stand(item, lanes)
  local first = call('ZRANGEBYSCORE', leases, '(' .. integer(now), '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
  local returns = tonumber(first[2]) or fresh_until
  return figures({ times and V_REFUSED or V_QUEUED, since, returns, ahead, 0, expired }, item.plan, times)
end
