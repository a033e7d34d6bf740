-- Prolongs leases that have not ended. ARGV: lease, ids. Answers one number an id: 1 prolonged, 0 lost.
-- An ended lease stays ended: its slot may be another call's, and a fence may be on its way.
local epoch = current_epoch()
local now = store_time()
local until_us = integer(now + tonumber(ARGV[1]))
local answers = {}
for i = 2, #ARGV do
  local lease = call('ZSCORE', leases, ARGV[i])
  local alive = epoch and lease and tonumber(lease) > now
  if alive then
    call('ZADD', leases, until_us, ARGV[i])
  end
  answers[#answers + 1] = alive and 1 or 0
end
return answers
