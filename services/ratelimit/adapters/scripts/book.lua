-- The counters that a script has to do with: read at once, changed in memory, written at once. sliding_window.py is the specification of the logs.
local MOST_ENTRIES = 128
local book = {} -- name -> counter

local function sliding(packed, window_us, now)
  local c = { window = window_us, times = {}, amounts = {}, count = 0, used = 0 }
  if packed then
    local flat, start = cmsgpack.unpack(packed), now - window_us
    local first, times, amounts, count, used = flat[1], c.times, c.amounts, 0, 0
    for i = 2, #flat, 2 do
      local time = first + flat[i]
      if time > start then
        count = count + 1
        times[count], amounts[count] = time, flat[i + 1]
        used = used + flat[i + 1]
      end
    end
    c.count, c.used = count, used
  end
  return c
end

-- Reads those counters that are not in the book. `wanted`: names and windows by turns, window 0 for a calendar's.
local function read(wanted, now)
  local names, windows = {}, {}
  for i = 1, #wanted, 2 do
    if not book[wanted[i]] then
      book[wanted[i]] = true
      names[#names + 1], windows[#windows + 1] = wanted[i], wanted[i + 1]
    end
  end
  local found = fetch(counters, names)
  for i, name in ipairs(names) do
    local value = found[i]
    book[name] = windows[i] > 0 and sliding(value, windows[i], now) or { window = 0, used = tonumber(value or 0) }
  end
end

local function quantum(c, us)
  return math.floor(us / (c.window / MOST_ENTRIES))
end

local function add(c, now, amount)
  if amount == 0 then
    return
  end
  c.dirty, c.used = true, c.used + amount
  if c.window == 0 then
    return
  end
  local count = c.count
  local last = c.times[count]
  if last and last >= now then
    c.amounts[count] = c.amounts[count] + amount
  elseif count >= MOST_ENTRIES and quantum(c, last) == quantum(c, now) then
    c.times[count], c.amounts[count] = now, c.amounts[count] + amount
  else
    c.count = count + 1
    c.times[count + 1], c.amounts[count + 1] = now, amount
  end
end

local function take(c, place, amount)
  while amount > 0 and place <= c.count do
    local taken = math.min(amount, c.amounts[place])
    amount = amount - taken
    c.used = c.used - taken
    c.amounts[place] = c.amounts[place] - taken
    if c.amounts[place] > 0 then
      place = place + 1
    else
      table.remove(c.times, place)
      table.remove(c.amounts, place)
      c.count = c.count - 1
    end
  end
end

-- Corrects what was added at `reserve_us`.
local function adjust(c, reserve_us, now, difference)
  if difference == 0 then
    return
  elseif c.window == 0 then
    c.used, c.dirty = math.max(0, c.used + difference), true
    return
  elseif reserve_us <= now - c.window then
    return
  end
  local place = c.count + 1
  while place > 1 and c.times[place - 1] >= reserve_us do
    place = place - 1
  end
  c.dirty = true
  if difference < 0 then
    take(c, place, -difference)
  elseif place <= c.count and (c.times[place] == reserve_us or c.count >= MOST_ENTRIES) then
    c.amounts[place], c.used = c.amounts[place] + difference, c.used + difference
  elseif c.count < MOST_ENTRIES then
    table.insert(c.times, place, reserve_us)
    table.insert(c.amounts, place, difference)
    c.count, c.used = c.count + 1, c.used + difference
  else
    add(c, reserve_us, difference)
  end
end

-- When as much as `excess` has left the window; 0 when that much never does.
local function frees_us(c, excess)
  for i = 1, c.count do
    excess = excess - c.amounts[i]
    if excess <= 0 then
      return c.times[i] + c.window
    end
  end
  return 0
end

-- Writes what has changed. A counter of nothing is none.
local function write()
  local set, gone = {}, {}
  for name, c in pairs(book) do
    if c.dirty then
      if c.used == 0 then
        gone[#gone + 1] = name
      elseif c.window == 0 then
        set[#set + 1], set[#set + 2] = name, integer(c.used)
      else
        -- Times are written as distances from the first, which are short.
        local first, flat = c.times[1], { c.times[1] }
        for i = 1, c.count do
          flat[2 * i], flat[2 * i + 1] = c.times[i] - first, c.amounts[i]
        end
        set[#set + 1], set[#set + 2] = name, cmsgpack.pack(flat)
      end
    end
  end
  in_chunks('HSET', counters, set)
  in_chunks('HDEL', counters, gone)
end

-- How much of a unit a record is charged with.
local function charged(r, unit)
  if unit == REQUESTS or unit == RETRIES then
    return 1
  elseif unit == TOKENS then
    return r[R_TOKENS]
  elseif unit == COST then
    return r[R_COST]
  elseif unit == TOKENS + SHADED then
    return r[SHADOW_TOKENS]
  elseif unit == COST + SHADED then
    return r[SHADOW_COST]
  elseif unit == PRODUCT or unit == PRODUCT + SHADED then
    return r[QUANTITY]
  end
  return 1
end

-- The counters of a record's charges, for `read`.
local function counters_of(r, wanted)
  for i = 1, #(r[CHARGES] or {}), 3 do
    wanted[#wanted + 1], wanted[#wanted + 2] = r[CHARGES][i], r[CHARGES][i + 2]
  end
end

-- Ends a held or pinned reservation whose counters are in the book: the hold goes, `tokens`, `cost` and `quantity` were used.
-- `counted`: its request stays counted. Returns the arguments for HSET and ZADD.
local function finish(id, r, now, state, tokens, cost, quantity, counted, kept, over)
  for i = 1, #r[CHARGES], 3 do
    local unit = r[CHARGES][i + 1]
    local plain, used = unit % SHADED, counted and 1 or 0
    if plain == TOKENS then
      used = tokens
    elseif plain == COST then
      used = cost
    elseif plain == PRODUCT then
      used = quantity
    end
    adjust(book[r[CHARGES][i]], r[RESERVED], now, used - charged(r, unit))
  end
  r[STATE], r[R_TOKENS], r[R_COST], r[QUANTITY], r[CHARGES] = state, tokens, cost, quantity, nil
  kept[#kept + 1], kept[#kept + 2] = id, cmsgpack.pack(r)
  over[#over + 1], over[#over + 2] = integer(now), id
end
