-- Decides every rule at once and takes the hold. A refusal writes nothing.
-- ARGV: id, the id's own time, tokens, cost, lease, window, forget, largest age of an id, five limits.
-- Answers: {"rebuild"} | {"old"} | {"ahead"} | {"ended"} | {"conflict"} | {"refused" | "held", now, epoch, reserve_us, expired holds, figures…}
local epoch = current_epoch()
if not epoch then
  return { 'rebuild' }
end
local id, minted_us, tokens, cost = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local lease_us, window_us, forget_us, age_us = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
local limits = five_limits(9)
local now = store_time()
if minted_us < now - age_us then
  return { 'old' }
elseif minted_us > now + age_us then
  return { 'ahead' }
end

local function held(r)
  local u = usage(now, window_us)
  return { 'held', now, tonumber(epoch), r.reserve_us, 0, figures(u, limits, 0, window_us) }
end

local known = record(id)
if known then
  if known.tokens ~= tokens or known.cost ~= cost then
    return { (known.state == 'held' or known.state == 'pinned') and 'conflict' or 'ended' }
  end
  local lease = call('ZSCORE', leases, id)
  if known.state ~= 'held' or not lease or tonumber(lease) <= now then
    -- A lease that ended may be under a fence already: the caller must not count on the hold.
    return { 'ended' }
  end
  call('ZADD', leases, integer(now + lease_us), id)
  return held(known)
end

local u = usage(now, window_us)
if refused(u, limits, tokens, cost) then
  local expired = call('ZCOUNT', leases, '-inf', integer(now))
  return { 'refused', now, tonumber(epoch), 0, expired, figures(u, limits, tokens, window_us) }
end

-- Counters of days and months that no rule and no snapshot asks for.
local function roll_over(day)
  if call('HGET', meta, 'day') == day then
    return
  end
  local oldest_day = dates(now - 86400000000)
  local _, oldest_month = dates(now - 31 * 86400000000)
  for _, field in ipairs(call('HKEYS', meta)) do
    local kind, date = string.match(field, '^(%a+_%a+):(.+)$')
    local past = kind and date < (#date == 10 and oldest_day or oldest_month)
    -- A hold that old is still owed: its counter goes when it does.
    if past and (string.match(kind, '_used$') or call('HGET', meta, field) == '0') then
      call('HDEL', meta, field)
    end
  end
  call('HSET', meta, 'day', day)
end

tidy(now, window_us, forget_us)
local day, month = dates(now)
roll_over(day)
add('tokens_held:' .. day, tokens)
add('cost_held:' .. month, cost)
add('window_tokens', tokens)
call('ZADD', window, integer(now), id)
call('ZADD', leases, integer(now + lease_us), id)
local r = { state = 'held', epoch = tonumber(epoch), reserve_us = now, tokens = tokens, cost = cost }
keep(id, r)
outstanding(1)
return held(r)
