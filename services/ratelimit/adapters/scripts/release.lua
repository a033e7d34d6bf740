-- Lets a hold go whose call cannot be dispatched. ARGV: id, epoch. Answers 1 when it went, 0 when there was none.
local epoch = current_epoch()
if not epoch or tonumber(epoch) ~= tonumber(ARGV[2]) then
  return 0
end
local r = record(ARGV[1])
if not r or r.state ~= 'held' then
  return 0
end
finish(ARGV[1], r, store_time(), 'released', 0, 0, false)
return 1
