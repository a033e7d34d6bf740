-- Writes down whose snapshot may be loaded. ARGV: nonce, how long another's nonce is respected, how long an unanswered one lives (ms).
-- Answers "ready" (there is an epoch) | "pending" (another has asked just now) | "begun" |
-- "erased" (it must not come back).
if call('HEXISTS', meta, 'erased') == 1 then
  return 'erased'
end
local m = current('epoch', 'nonce', 'nonce_us')
if m[1] then
  return 'ready'
end
if m[2] == ARGV[1] then
  return 'begun' -- this request, repeated over another connection
end
local now = store_time()
if m[2] and now - tonumber(m[3]) < tonumber(ARGV[2]) then
  return 'pending'
end
call('DEL', meta)
call('HSET', meta, 'history', current_history(), 'nonce', ARGV[1], 'nonce_us', integer(now))
call('PEXPIRE', meta, ARGV[3])
return 'begun'
