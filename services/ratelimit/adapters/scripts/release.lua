-- Lets a hold go whose call cannot be dispatched. ARGV: id, epoch. Answers 1 when it went, 0 when there was none.
local epoch = current_epoch()
if not epoch or tonumber(epoch) ~= tonumber(ARGV[2]) then
  return 0
end
local r = record(ARGV[1])
if not r or r[STATE] ~= HELD then
  return 0
end
local now, names, windows, kept, over_by = store_time(), {}, {}, {}, {}
counters_of(r, names, windows)
read(names, windows, now)
finish(ARGV[1], r, now, RELEASED, 0, 0, 0, false, kept, over_by)
write()
call('HSET', reservations, unpack(kept))
call('ZADD', ended, unpack(over_by))
call('ZREM', leases, ARGV[1])
outstanding(-1)
wake_first()
return 1
