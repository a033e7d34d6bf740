-- Loads one part of a snapshot of the ledger, if it answers the last request. Until the last part there is no epoch, so nothing reads what lies
-- here: parts keep the store free for others and the whole still appears at once.
-- ARGV: nonce, epoch, lease, number of this part from 0, 1 if it is the last, version and families of the configuration, stems of units' windows
-- by commas, how many sums, sums, calls.
-- A sum is a counter's name and its value; a call is an id and its record with its charges, in the order of their times. Answers 1 when loaded, 0 when another request was made since, or the request is of another history.
local m = current('epoch', 'nonce', 'loaded_parts', 'known', 'stems')
if m[1] or m[2] ~= ARGV[1] then
  return 0
end
local part, expected = tonumber(ARGV[4]), tonumber(m[3]) or 0
if part ~= expected then
  -- Sums are added up: a part that arrives again over another connection must not count twice.
  return part < expected and 1 or 0
end
local now = store_time()
local lease_us, sums, known = tonumber(ARGV[3]), tonumber(ARGV[9]), m[4] == '1'

-- Windows of units that were counted before and are counted still, where only the rules are others. They have every use, also those that were in
-- no ledger then: whether a unit's uses must be in it is a matter of its rules, and a tenant that changes them in turn must get no more of it.
local before, own = {}, {}
for stem in string.gmatch(known and m[5] or '', '[^,]+') do
  before[stem] = true
end
for stem in string.gmatch(ARGV[8], '[^,]+') do
  own[stem] = before[stem]
end

local function stays(name)
  return own[string.match(name, '^[^:]*:[^:]*:%a~?')]
end

-- Everything else goes: the snapshot brings it anew. Where only the rules are others, uses stay that were answered, and `ended`, which says when they
-- may be forgotten: one of them that is repeated must use nothing more.
local function clear()
  call('DEL', reservations, leases)
  local gone = {}
  for _, name in ipairs(known and call('HKEYS', counters) or {}) do
    if not stays(name) then
      gone[#gone + 1] = name
    end
  end
  if known then
    in_chunks('HDEL', counters, gone)
  else
    call('DEL', counters, ended, uses)
  end
end

if part == 0 then
  clear()
end
call('HSET', meta, 'loaded_parts', part + 1)
local last_sum = 9 + 2 * sums
for i = 10, last_sum, 2 do
  call('HINCRBY', counters, ARGV[i], ARGV[i + 1])
end
local records, names, windows = {}, {}, {}
for i = last_sum + 1, #ARGV, 2 do
  local r = cmsgpack.unpack(ARGV[i + 1])
  records[#records + 1] = r
  counters_of(r, names, windows)
end
read(names, windows, now)
local kept, leased, over_by, held_again, owed = {}, {}, {}, {}, 0
for place, r in ipairs(records) do
  local id, holds = ARGV[last_sum + 2 * place - 1], r[STATE] <= PINNED
  -- A clock that is behind the one that stamped it: it counts from here on, and leaves its windows in time.
  r[RESERVED] = math.min(r[RESERVED], now)
  for i = 1, #r[CHARGES], 3 do
    local c = book[r[CHARGES][i]]
    -- Of days, months and cycles the sums have what is settled.
    if c[WINDOW] == 0 and holds then
      add(c, now, charged(r, r[CHARGES][i + 1]))
    elseif c[WINDOW] > 0 and r[RESERVED] > now - c[WINDOW] and not stays(r[CHARGES][i]) then
      add(c, r[RESERVED], charged(r, r[CHARGES][i + 1]))
    end
  end
  if holds then
    owed, held_again[#held_again + 1] = owed + 1, id
  else
    r[CHARGES] = nil
    over_by[#over_by + 1], over_by[#over_by + 2] = integer(now), id
  end
  if r[STATE] == HELD then
    leased[#leased + 1], leased[#leased + 2] = integer(now + lease_us), id
  end
  kept[#kept + 1], kept[#kept + 2] = id, cmsgpack.pack(r)
end
write()
in_chunks('HSET', reservations, kept)
in_chunks('ZADD', leases, leased)
in_chunks('ZADD', ended, over_by)
-- Its end of before the ledger did not have: nothing of it may be forgotten while it is held.
in_chunks('ZREM', ended, held_again)
owed = call('HINCRBY', meta, 'outstanding', owed)
if ARGV[5] ~= '1' then
  idle_rest()
  return 1
end
call('HDEL', meta, 'nonce', 'nonce_us', 'loaded_parts', 'known')
call('HSET', meta, 'epoch', ARGV[2], 'version', ARGV[6], 'families', ARGV[7], 'stems', ARGV[8])
if tonumber(ARGV[2]) > 1 and not known then
  -- Not the first time: what the ledger does not have is gone.
  call('HSET', meta, 'loaded_us', integer(now))
end
if owed == 0 then
  idle()
else
  busy()
end
return 1
