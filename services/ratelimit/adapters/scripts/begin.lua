-- Writes down whose snapshot may be loaded. ARGV: nonce, how long another's nonce is respected, how long an unanswered one lives (ms), version and
-- families of the configuration. Answers {one of the following, the store's time}: "ready" (there is an epoch with these families) | "pending"
-- (another has asked just now) | "begun" | "erased" (it must not come back).
local now = store_time()
if call('HEXISTS', meta, 'erased') == 1 then
  return { 'erased', now }
end
local m = current('epoch', 'nonce', 'nonce_us', 'version', 'families', 'loaded_us', 'stems')
if m[1] and fit(m[5], m[4], ARGV[5], ARGV[4]) ~= 'others' then
  return { 'ready', now }
end
if m[2] == ARGV[1] then
  return { 'begun', now } -- this request, repeated over another connection
end
if m[2] and now - tonumber(m[3]) < tonumber(ARGV[2]) then
  return { 'pending', now }
end
call('DEL', meta)
call('HSET', meta, 'history', current_history(), 'nonce', ARGV[1], 'nonce_us', integer(now))
if m[1] then
  -- Only the rules are others: what is counted here and nowhere else is still known.
  call('HSET', meta, 'known', '1')
  for field, value in pairs({ loaded_us = m[6], stems = m[7] }) do
    if value then
      call('HSET', meta, field, value)
    end
  end
end
call('PEXPIRE', meta, ARGV[3])
return { 'begun', now }
