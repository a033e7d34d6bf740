-- Applies the ledger's answers about ended leases. ARGV: the epoch they were asked in, then two an item: id, verdict (void | unresolved).
-- Answers how many holds changed. An answer of another epoch, or about a hold that has ended since, changes nothing.
local epoch = current_epoch()
if not epoch or tonumber(epoch) ~= tonumber(ARGV[1]) then
  return 0
end
local now, names, windows, ids, found = store_time(), {}, {}, {}, {}
for i = 2, #ARGV, 2 do
  ids[#ids + 1] = ARGV[i]
end
for i, packed in ipairs(fetch(reservations, ids)) do
  local r = packed and cmsgpack.unpack(packed)
  found[ids[i]] = r and r[STATE] == HELD and r or nil
  if found[ids[i]] then
    counters_of(r, names, windows)
  end
end
read(names, windows, now)
local kept, over_by, freed, gone = {}, {}, {}, 0
for i = 2, #ARGV, 2 do
  local id, r = ARGV[i], found[ARGV[i]]
  if r and r[STATE] == HELD then
    freed[#freed + 1] = id
    if ARGV[i + 1] == 'void' then
      finish(id, r, now, RELEASED, 0, 0, 0, false, kept, over_by)
      gone = gone + 1
    else
      r[STATE] = PINNED
      kept[#kept + 1], kept[#kept + 2] = id, cmsgpack.pack(r)
    end
  end
end
write()
in_chunks('HSET', reservations, kept)
in_chunks('ZADD', ended, over_by)
in_chunks('ZREM', leases, freed)
outstanding(-gone)
if #freed > 0 then
  wake_first()
end
return #freed
