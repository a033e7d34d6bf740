-- Loads one part of a snapshot of the ledger, if it answers the last request. Until the last part there is no epoch, so nothing reads what lies
-- here: parts keep the store free for others and the whole still appears at once.
-- ARGV: nonce, epoch, lease, window, number of this part from 0, 1 if it is the last, how many sums, sums, calls.
-- A sum is a field of meta and its value; a call is an id and its record. Answers 1 when loaded, 0 when another request was made since, or the request is of another history.
local m = current('epoch', 'nonce', 'loaded_parts')
if m[1] or m[2] ~= ARGV[1] then
  return 0
end
local part, expected = tonumber(ARGV[5]), tonumber(m[3]) or 0
if part ~= expected then
  -- Sums are added up: a part that arrives again over another connection must not count twice.
  return part < expected and 1 or 0
end
local now = store_time()
local lease_us, window_us, sums = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[7])
if part == 0 then
  call('DEL', reservations, leases, window, ended)
end
call('HSET', meta, 'loaded_parts', part + 1)
for i = 8, 7 + 2 * sums, 2 do
  call('HSET', meta, ARGV[i], ARGV[i + 1])
end
local owed = 0
for i = 8 + 2 * sums, #ARGV, 2 do
  local id, r = ARGV[i], unpacked(ARGV[i + 1])
  call('HSET', reservations, id, ARGV[i + 1])
  if r.reserve_us > now - window_us then
    call('ZADD', window, integer(r.reserve_us), id)
    add('window_tokens', r.tokens)
  end
  if r.state == 'held' or r.state == 'pinned' then
    local day, month = dates(r.reserve_us)
    add('tokens_held:' .. day, r.tokens)
    add('cost_held:' .. month, r.cost)
    owed = owed + 1
  else
    call('ZADD', ended, integer(now), id)
  end
  if r.state == 'held' then
    call('ZADD', leases, integer(now + lease_us), id)
  end
end
owed = call('HINCRBY', meta, 'outstanding', owed)
if ARGV[6] ~= '1' then
  idle_rest()
  return 1
end
call('HDEL', meta, 'nonce', 'nonce_us', 'loaded_parts')
call('HSET', meta, 'epoch', ARGV[2], 'day', (dates(now)))
if owed == 0 then
  idle()
else
  busy()
end
return 1
