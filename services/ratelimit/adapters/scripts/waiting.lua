-- Who waits for a turn. `waiters` holds tickets, id -> packed {since, end of its lease, lanes}: a lane is a limit that kept the ticket's demand out.
-- Whoever else is counted in one of its lanes and waits too stays behind it. A ticket whose lease ended stands for nobody: its process has died.
local WAKES, TICKET_US, MOST_TICKETS = 'tenantry:ratelimit:wakes', 1500000, 500
local queue -- the living tickets, first come first
local tickets_kept, tickets_gone, moved, died = {}, {}, false, false

local function sort_line()
  table.sort(queue, function(a, b)
    return a.since < b.since or (a.since == b.since and a.id < b.id)
  end)
end

local function line()
  if not queue then
    queue = {}
    local found, time = call('HGETALL', waiters), store_time()
    for i = 1, #found, 2 do
      local t = cmsgpack.unpack(found[i + 1])
      if t[2] > time then
        queue[#queue + 1] = { id = found[i], since = t[1], lease = t[2], lanes = t[3] }
      else
        tickets_gone[#tickets_gone + 1], died = found[i], true
      end
    end
    sort_line()
  end
  return queue
end

local function ticket_of(id)
  for place, t in ipairs(line()) do
    if t.id == id and not t.ghost then
      return t, place
    end
  end
end

-- Whether anybody waits in one of these lanes.
local function is_occupied(lanes)
  local own = {}
  for _, lane in ipairs(lanes) do
    own[lane] = true
  end
  for _, t in ipairs(line()) do
    for _, lane in ipairs(t.lanes) do
      if own[lane] then
        return true
      end
    end
  end
  return false
end

-- Tells the processes that hold them the tickets that are first in one of their lanes: one of the others cannot be admitted before these.
local function wake_first()
  local taken, ids = {}, {}
  for _, t in ipairs(line()) do
    local first = false
    for _, lane in ipairs(t.lanes) do
      first, taken[lane] = first or not taken[lane], true
    end
    if first and not t.ghost then
      ids[#ids + 1] = t.id
    end
  end
  if #ids > 0 then
    call('PUBLISH', WAKES, table.concat(ids))
  end
end

local function keep_ticket(t)
  t.lease = store_time() + TICKET_US
  tickets_kept[#tickets_kept + 1], tickets_kept[#tickets_kept + 2] = t.id, cmsgpack.pack({ t.since, t.lease, t.lanes })
end

local function tear_ticket(id)
  local t, place = ticket_of(id)
  if t then
    table.remove(queue, place)
    tickets_gone[#tickets_gone + 1], moved = id, true
  end
end

-- Writes what has changed of the line, and wakes who has come to its front by it.
local function write_line()
  if #tickets_kept == 0 and not moved then
    return
  end
  in_chunks('HDEL', waiters, tickets_gone)
  in_chunks('HSET', waiters, tickets_kept)
  if #tickets_kept > 0 then
    -- Nobody is left to tidy up after the last process that dies.
    call('PEXPIRE', waiters, 2 * TICKET_US / 1000)
  end
  if moved or died then
    wake_first()
  end
end
