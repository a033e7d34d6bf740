-- Takes back what was not used of slices, and dates what was: it was used before this was sent, so until now at the latest.
-- Who is first in line is woken: what came back may be enough.
-- ARGV: by threes id, epoch, used. Answers how many slices ended by it.
local epoch = tonumber(current_epoch())
if not epoch then
  return 0
end
local now, ids, names, windows, found = store_time(), {}, {}, {}, {}
for i = 1, #ARGV, 3 do
  ids[#ids + 1] = ARGV[i]
end
for i, packed in ipairs(fetch(reservations, ids)) do
  local r = packed and cmsgpack.unpack(packed)
  if r and r[STATE] == SLICED and r[CHARGES] and r[EPOCH] == epoch and epoch == tonumber(ARGV[3 * i - 1]) then
    found[ids[i]] = r
    counters_of(r, names, windows)
  end
end
read(names, windows, now)
local kept = {}
for i, id in ipairs(ids) do
  local r = found[id]
  -- A slice named twice ends once: its record has no charges then.
  if r and r[CHARGES] then
    local used = math.min(tonumber(ARGV[3 * i]), r[QUANTITY])
    for j = 1, #r[CHARGES], 3 do
      -- What has left its window is left alone by both.
      adjust(book[r[CHARGES][j]], r[RESERVED], now, -r[QUANTITY])
      adjust(book[r[CHARGES][j]], math.min(r[RESERVED], now), now, used)
    end
    r[QUANTITY], r[CHARGES] = used, nil
    kept[#kept + 1], kept[#kept + 2] = id, cmsgpack.pack(r)
  end
end
write()
in_chunks('HSET', reservations, kept)
if #kept > 0 then
  wake_first()
end
return #kept / 2
