-- Applies the ledger's answers about ended leases. ARGV: the epoch they were asked in, then two an item: id, verdict (void | unresolved).
-- Answers how many holds changed. An answer of another epoch, or about a hold that has ended since, changes nothing.
local epoch = current_epoch()
if not epoch or tonumber(epoch) ~= tonumber(ARGV[1]) then
  return 0
end
local now = store_time()
local changed = 0
for i = 2, #ARGV, 2 do
  local r = record(ARGV[i])
  if r and r.state == 'held' then
    changed = changed + 1
    if ARGV[i + 1] == 'void' then
      finish(ARGV[i], r, now, 'released', 0, 0, false)
    else
      pin(ARGV[i], r)
    end
  end
end
return changed
