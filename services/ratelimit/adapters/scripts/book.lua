-- The counters that a script has to do with: read at once, changed in memory, written at once. sliding_window.py is the specification of the logs.
local MOST_ENTRIES = 128
local book = {} -- name -> counter

-- Fields of a counter. WINDOW is 0 for a calendar's. LOG is as it lies in the store: the time that distances are from, then by twos an entry's
-- distance and amount; nothing where there are no entries. FROM and UPTO are where the first and the last that counts are in it.
local WINDOW, USED, DIRTY, LOG, FROM, UPTO = 1, 2, 3, 4, 5, 6

local function counter_from(value, window_us, now)
  if window_us == 0 then
    return { 0, value and tonumber(value) or 0, false }
  elseif not value then
    return { window_us, 0, false, false, 2, 0 }
  end
  local log = cmsgpack.unpack(value)
  local from, upto, used, over = 2, #log - 1, 0, now - window_us - log[1]
  while from <= upto and log[from] <= over do
    from = from + 2
  end
  for i = from + 1, upto + 1, 2 do
    used = used + log[i]
  end
  return { window_us, used, false, log, from, upto }
end

-- Reads those counters that are not in the book, with as many windows.
local function read(names, windows, now)
  if next(book) then
    local unknown, theirs = {}, {}
    for i, name in ipairs(names) do
      if not book[name] then
        unknown[#unknown + 1], theirs[#theirs + 1] = name, windows[i]
      end
    end
    names, windows = unknown, theirs
  end
  for i, value in ipairs(fetch(counters, names)) do
    book[names[i]] = counter_from(value, windows[i], now)
  end
end

local function quantum(c, us)
  return math.floor(us / (c[WINDOW] / MOST_ENTRIES))
end

local function is_full(c)
  return c[UPTO] - c[FROM] >= 2 * MOST_ENTRIES - 2
end

-- Whether what comes at a time joins that entry: then it is counted too long by less than a quantum.
local function is_merged(c, place, us)
  return is_full(c) and quantum(c, c[LOG][1] + c[LOG][place]) == quantum(c, us)
end

local function add(c, now, amount)
  if amount == 0 then
    return
  end
  c[DIRTY], c[USED] = true, c[USED] + amount
  if c[WINDOW] == 0 then
    return
  end
  local upto = c[UPTO]
  if upto < c[FROM] then
    c[LOG], c[FROM], c[UPTO] = { now, 0, amount }, 2, 2
    return
  end
  local log = c[LOG]
  local since = now - log[1]
  if log[upto] >= since then
    log[upto + 1] = log[upto + 1] + amount
  elseif is_merged(c, upto, now) then
    log[upto], log[upto + 1] = since, log[upto + 1] + amount
  else
    log[upto + 2], log[upto + 3], c[UPTO] = since, amount, upto + 2
  end
end

local function take(c, place, amount)
  local log = c[LOG]
  while amount > 0 and place <= c[UPTO] do
    local taken = math.min(amount, log[place + 1])
    amount = amount - taken
    c[USED] = c[USED] - taken
    log[place + 1] = log[place + 1] - taken
    if log[place + 1] > 0 then
      place = place + 2
    else
      table.remove(log, place)
      table.remove(log, place)
      c[UPTO] = c[UPTO] - 2
    end
  end
end

-- Corrects what was added at `reserve_us`.
local function adjust(c, reserve_us, now, difference)
  if difference == 0 then
    return
  elseif c[WINDOW] == 0 then
    c[USED], c[DIRTY] = math.max(0, c[USED] + difference), true
    return
  elseif reserve_us <= now - c[WINDOW] then
    return
  elseif c[UPTO] < c[FROM] then
    add(c, reserve_us, math.max(0, difference))
    return
  end
  local log, place = c[LOG], c[UPTO] + 2
  local since = reserve_us - log[1]
  while place > c[FROM] and log[place - 2] >= since do
    place = place - 2
  end
  c[DIRTY] = true
  if difference < 0 then
    take(c, place, -difference)
  elseif place <= c[UPTO] and (log[place] == since or is_merged(c, place, reserve_us)) then
    log[place + 1], c[USED] = log[place + 1] + difference, c[USED] + difference
  elseif place > c[FROM] and is_merged(c, place - 2, reserve_us) then
    log[place - 2], log[place - 1], c[USED] = since, log[place - 1] + difference, c[USED] + difference
  else
    table.insert(log, place, since)
    table.insert(log, place + 1, difference)
    c[UPTO], c[USED] = c[UPTO] + 2, c[USED] + difference
  end
end

-- When the first entry leaves the window; 0 where there is none.
local function resets_us(c)
  return c[UPTO] >= c[FROM] and c[LOG][1] + c[LOG][c[FROM]] + c[WINDOW] or 0
end

-- When as much as `excess` has left the window; 0 when that much never does.
local function frees_us(c, excess)
  for i = c[FROM], c[UPTO], 2 do
    excess = excess - c[LOG][i + 1]
    if excess <= 0 then
      return c[LOG][1] + c[LOG][i] + c[WINDOW]
    end
  end
  return 0
end

-- Leaves out of a log what has left its window, and writes its times as distances from the first, which are short.
local function shortened(c)
  local log, gone = c[LOG], c[FROM] - 2
  local first = log[c[FROM]]
  if gone > 0 or first ~= 0 then
    for i = c[FROM], c[UPTO], 2 do
      log[i - gone], log[i - gone + 1] = log[i] - first, log[i + 1]
    end
    for i = c[UPTO] + 1, c[UPTO] + 2 - gone, -1 do
      log[i] = nil
    end
    log[1], c[FROM], c[UPTO] = log[1] + first, 2, c[UPTO] - gone
  end
  return log
end

-- Writes what has changed. A counter of nothing is none.
local function write()
  local set, gone, size = {}, {}, 0
  for name, c in pairs(book) do
    if c[DIRTY] then
      if c[USED] == 0 then
        gone[#gone + 1] = name
      else
        set[size + 1], set[size + 2] = name, c[WINDOW] == 0 and integer(c[USED]) or cmsgpack.pack(shortened(c))
        size = size + 2
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
local function counters_of(r, names, windows)
  for i = 1, #(r[CHARGES] or {}), 3 do
    names[#names + 1], windows[#windows + 1] = r[CHARGES][i], r[CHARGES][i + 2]
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
