-- Who waits for an account's room: a line a tenant, {id, since, end of its lease, …}, first come first. A ticket whose lease ended stands for nobody.
--
-- lines   hash  tenant -> its line, packed
-- fronts  zset  tenants in whose line somebody stands, by since when its first waits
local lines, fronts = KEYS[10], KEYS[11]
-- Wakes and leases are as in waiting.lua of the tenants' own lines: one channel, one renewal for both.
local WAKES, TICKET_US, MOST_TICKETS = 'tenantry:ratelimit:wakes', 1500000, 500

-- The living tickets, and the first of them as the line was left.
local function line_of(tenant)
  local now, line, all = store_time(), {}, unpacked(call('HGET', lines, tenant))
  for i = 1, #all, 3 do
    if all[i + 2] > now then
      local n = #line
      line[n + 1], line[n + 2], line[n + 3] = all[i], all[i + 1], all[i + 2]
    end
  end
  return line, all[1]
end

local function place_in(line, id)
  for i = 1, #line, 3 do
    if line[i] == id then
      return i
    end
  end
end

local function wake(ids)
  if #ids > 0 then
    call('PUBLISH', WAKES, table.concat(ids))
  end
end

-- Writes a line, and wakes who has come to its front; `was` was its first.
local function store_line(tenant, line, was)
  if #line == 0 then
    call('HDEL', lines, tenant)
    call('ZREM', fronts, tenant)
    return
  end
  call('HSET', lines, tenant, cmsgpack.pack(line))
  call('ZADD', fronts, integer(line[2]), tenant)
  -- Nobody is left to tidy up after the last process that dies.
  call('PEXPIRE', lines, 2 * TICKET_US / 1000)
  call('PEXPIRE', fronts, 2 * TICKET_US / 1000)
  if was and line[1] ~= was then
    wake({ line[1] })
  end
end

local function tear_ticket(line, id)
  local place = place_in(line, id)
  for _ = 1, place and 3 or 0 do
    table.remove(line, place)
  end
end

-- How many stand before one that waits since then; all of them before one that says nothing.
local function ahead_of(line, id, since)
  local count = 0
  for i = 1, #line, 3 do
    if line[i] == id or (since > 0 and line[i + 1] > since) then
      break
    end
    count = count + 1
  end
  return count
end

-- Gives it a place, or keeps it. Answers since when it waits; 0 where the line is full.
local function stand(line, id, since)
  local until_us, place = store_time() + TICKET_US, place_in(line, id)
  if place then
    line[place + 2] = until_us
    return line[place + 1]
  elseif #line >= 3 * MOST_TICKETS then
    return 0
  end
  local last = line[#line - 1]
  since = since > 0 and since or math.max(store_time(), last and last + 1 or 0)
  place = 3 * ahead_of(line, id, since) + 1
  table.insert(line, place, until_us)
  table.insert(line, place, since)
  table.insert(line, place, id)
  return since
end
